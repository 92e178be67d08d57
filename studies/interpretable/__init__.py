"""Interpretable rewards: attributes, debiasing, gate, RewardBench (arXiv 2406.12845)."""
