"""Each control changes what its name says, and nothing else."""

import numpy as np
import pytest

from sora_jax.evals.metrics import controls


def counting(frames=9, count=3):
    """Clips whose frame t is filled with 10 t + clip."""
    t = 10 * np.arange(frames)[None, :] + np.arange(count)[:, None]
    filled = np.broadcast_to(t[..., None, None, None], (count, frames, 8, 8, 3))
    return filled.astype(np.uint8)


def order_of(video):
    """Frame numbers of the first clip, read back."""
    return (video[0, :, 0, 0, 0] // 10).tolist()


def test_orders_of_frames():
    made = controls.make(counting(), names=tuple(controls.CONTROLS))
    assert order_of(made["time-reversed"]) == list(range(8, -1, -1))
    assert order_of(made["still"]) == [0] * 9
    assert sorted(order_of(made["frames shuffled"])) == list(range(9))
    assert order_of(made["frames shuffled"]) != list(range(9))
    assert order_of(made["looped"]) == [0, 1, 2, 3, 4, 4, 3, 2, 1]
    assert order_of(controls.looped(counting(8))) == [0, 1, 2, 3, 4, 3, 2, 1]
    assert order_of(made["frame dropped"]) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert order_of(made["frame twice"]) == [0, 1, 2, 3, 3, 4, 5, 6, 7]
    cut = made["cut inserted"]
    assert cut[:, :, 0, 0, 0].tolist()[0] == [0, 10, 20, 30, 41, 51, 61, 71, 81]
    assert cut[2, 4:, 0, 0, 0].tolist() == [40, 50, 60, 70, 80]
    assert all(v.dtype == np.uint8 for v in made.values())


def test_amounts_of_noise_and_drift():
    grey = np.full((2, 9, 32, 32, 3), 100, np.uint8)
    noise = controls.noised(grey, 0).astype(float) - 100
    assert noise.std() == pytest.approx(12, rel=0.02)
    assert (controls.noised(grey, 0) == controls.noised(grey, 0)).all()
    assert (controls.noised(grey, 0) != controls.noised(grey, 1)).any()
    faded = controls.drifting(grey)[0, :, 0, 0, 0]
    assert faded[0] == 100 and faded[4] == 113 or faded[4] == 114
    assert faded[8] == round(0.7 * 100 + 0.3 * 190)


def test_only_the_core_is_made_by_default():
    assert tuple(controls.make(counting())) == controls.CORE


def test_errors_name_the_fault():
    with pytest.raises(ValueError, match=r"unknown control \['upside down'\]"):
        controls.make(counting(), names=["upside down"])
    with pytest.raises(ValueError, match="2 clips or more"):
        controls.with_cut(counting(count=1))
