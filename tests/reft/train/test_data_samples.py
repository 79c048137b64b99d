"""Samples of a data set: which examples, and that reading them changes no random state."""

from __future__ import annotations

import random

import numpy as np
import torch

from reft.train.data_samples import preserve_random_state, spread_indices


def test_indices_are_spread_over_the_data():
    assert spread_indices(3, 64) == [0, 1, 2]
    assert spread_indices(0, 64) == []
    assert spread_indices(10, 4) == [0, 2, 5, 7]
    assert len(spread_indices(4000, 64)) == len(set(spread_indices(4000, 64))) == 64


def test_the_random_state_is_restored():
    def numbers():
        return random.random(), float(np.random.rand()), float(torch.rand(1))  # noqa: NPY002

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = numbers()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    with preserve_random_state(torch.device("cpu")):
        assert numbers() == expected
    assert numbers() == expected
