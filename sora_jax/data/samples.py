"""Evenly spaced samples of records or texts."""

import numpy as np


def evenly(count: int, most: int) -> list[int]:
    """Returns up to `most` of the indices below `count`, spread over all of them."""
    return np.linspace(0, count - 1, min(count, most)).astype(int).tolist()
