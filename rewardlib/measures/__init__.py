"""Metrics of rankings, rewards and preferences, each in one place, with intervals over prompts."""
