"""Clips are resized as public code does it: compared with torch, method by method."""

import pathlib
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file

from sora_jax.evals.features import resize

ORACLE = pathlib.Path(__file__).resolve().parents[2] / "oracle"


@pytest.fixture(scope="module")
def torch_resized(peers_python, tmp_path_factory):
    out = tmp_path_factory.mktemp("resize") / "resized.safetensors"
    subprocess.run([peers_python, ORACLE / "resize.py", out], check=True)
    found = load_file(out)
    numbers = {name.partition("/")[0] for name in found}
    return [
        {m: np.moveaxis(found[f"{n}/{m}"], 1, -1)[None] for m in ("in", *METHODS)}
        for n in sorted(numbers)
    ]


METHODS = (*resize.BILINEAR, "bicubic")


@pytest.mark.peers
@pytest.mark.parametrize("method", METHODS)
def test_resized_as_torch_does(torch_resized, method):
    for case in torch_resized:
        wanted = case[method]
        found = np.asarray(resize.resize(case["in"], wanted.shape[2], method))
        apart = np.abs(found - wanted).max()  # of 255
        assert apart < (5e-3 if method == "bicubic" else 1e-4)


@pytest.mark.peers
def test_resizing_methods_differ(torch_resized):
    """So that one under another's name would be seen."""
    case = torch_resized[0]
    for one in METHODS:
        for other in METHODS:
            if one != other:
                assert np.abs(case[one] - case[other]).max() > 5


def test_positions_of_output_pixels():
    """Two pixels made four, by hand."""
    assert resize.places("tf", 2, 4).tolist() == [0, 0.5, 1, 1.5]
    np.testing.assert_allclose(resize.places("align_corners", 2, 4) * 3, range(4))
    assert resize.places("half_pixel", 2, 4).tolist() == [0, 0.25, 0.75, 1.25]
    for method in resize.BILINEAR:  # what lies outside is the last pixel
        np.testing.assert_allclose(resize.matrix(method, 2, 4)[-1], [0, 1])


def test_the_centre_is_cropped():
    video = np.zeros((1, 1, 8, 16, 3), np.float32)
    video[:, :, :, 4:12] = 1
    cut = np.asarray(resize.resize(video, 8, "half_pixel, cropped"))
    np.testing.assert_array_equal(cut, np.ones((1, 1, 8, 8, 3)))
    squeezed = np.asarray(resize.resize(video, 8, "half_pixel"))
    assert squeezed[0, 0, 0, 0, 0] == 0
    assert resize.resize(video, 4, "tf, cropped").shape == (1, 1, 4, 4, 3)


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="'linear', it must be one of tf, tf, cropped"):
        resize.resize(np.zeros((1, 1, 2, 2, 3), np.float32), 4, "linear")
