"""The clips that are timed are those that were written."""

import numpy as np

from experiments.bench import decoding
from sora_jax.data import video_io

H, W = 48, 64


def test_clips_are_the_frames_that_were_written(tmp_path):
    path, count = tmp_path / "a.mp4", 3 * decoding.LENGTH
    decoding.write(path, decoding.pictures(None, H, W), count)
    shown = decoding.pictures(None, H, W)
    truth = decoding.normalised([next(shown) for _ in range(count)])
    header = video_io.probe(path)
    last = decoding.contiguous(path, count, (H, W))
    assert last.shape == (decoding.LENGTH, H, W, 3) and last.dtype == np.float32
    assert np.abs(last - truth[-decoding.LENGTH :]).mean() < 0.03
    for start in (0, 5, 20):
        found = decoding.at_random(path, header, [7, start], (H, W))
        wanted = truth[start : start + decoding.LENGTH]
        assert np.abs(found - wanted).mean() < 0.03
        # Neighbours differ by more, so that a shift by one frame is noticed.
        other = truth[start + 1 : start + 1 + decoding.LENGTH]
        assert np.abs(found - other).mean() > 0.05
