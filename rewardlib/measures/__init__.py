"""Metrics of rankings, rewards and preferences, with intervals from resampled prompts."""
