"""Resampled prompts that the tests of metrics share."""

import numpy as np

from rewardlib.measures import intervals


def weights_for(n, resamples=200, seed=0):
    return intervals.resample_weights(n, np.random.default_rng(seed), resamples)
