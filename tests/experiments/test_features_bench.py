"""The features' bench at a size that tests can afford: it compares before it times."""

import numpy as np
import pytest

from experiments.bench import features


@pytest.mark.slow
@pytest.mark.peers
def test_results_are_compared_before_timing(peers_python):
    ratios = features.compare(peers_python, 1, 1, ("1 channels_last",))
    assert ratios.keys() == {"1 channels_last"} and ratios["1 channels_last"] > 0


@pytest.mark.parametrize("wrong", [1.001, np.nan])
def test_different_results_are_not_timed(wrong):
    features.check(np.ones((2, 3)), np.ones((2, 3)))
    with pytest.raises(ValueError, match="features of 2 clips differs from the peer's"):
        features.check(wrong * np.ones((2, 3)), np.ones((2, 3)))
