"""Reward models as estimators, their solvers, files and scores."""
