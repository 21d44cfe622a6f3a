"""Weights of LPIPS as a file: what is refused, and with which sentence."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from sora_jax.models import lpips
from sora_jax.training import perceptual
from tests.training import tiny_lpips


def test_a_missing_file_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        perceptual.open_weights(tmp_path / "none.safetensors")
    for part in ("vgg16-397923af.pth", "download.pytorch.org", "sora_jax.convert"):
        assert part in str(error.value)
    assert "everything but LPIPS" in str(error.value)


def test_what_was_written_is_read(tmp_path):
    file = tiny_lpips.write(tmp_path / "a.safetensors")
    weights = perceptual.open_weights(file)
    assert weights.config == lpips.Config("alexnet")
    kernel = weights.load()["convs"][2]["kernel"]
    np.testing.assert_array_equal(kernel, weights.tensors["convs.2.kernel"])
    assert np.asarray(kernel).std() > 0
    assert len(weights.sha256) == 64


def test_other_files_are_refused(tmp_path):
    file = tiny_lpips.write(tmp_path / "a.safetensors")
    arrays = safetensors.numpy.load_file(file)
    del arrays["convs.4.bias"]
    safetensors.numpy.save_file(arrays, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="convs.4.bias is missing"):
        perceptual.open_weights(tmp_path / "b.safetensors")
    safetensors.numpy.save_file({"x": np.zeros(3)}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="numbers of type F64"):
        perceptual.open_weights(tmp_path / "c.safetensors")
    (tmp_path / "d.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="damaged"):
        perceptual.open_weights(tmp_path / "d.safetensors")
    (tmp_path / "vgg.pth").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="is not a .safetensors file"):
        perceptual.open_weights(tmp_path / "vgg.pth")


def test_without_torch_it_says_where_torch_goes(tmp_path):
    """Ours has none; nor has a Python that is not there."""
    trunk, heads = tmp_path / "trunk.pth", tmp_path / "heads.pth"
    trunk.touch(), heads.touch()
    target = tmp_path / "out.safetensors"
    for python in (sys.executable, str(tmp_path / "python")):
        with pytest.raises(
            (ValueError, OSError), match="launch/requirements/peers.txt"
        ):
            perceptual.convert(trunk, heads, target, python)
    assert not target.exists()


def test_a_download_that_was_cut_off_is_refused(tmp_path):
    trunk, heads = tmp_path / "vgg16-397923af.pth", tmp_path / "vgg.pth"
    trunk.write_bytes(b"half"), heads.touch()
    with pytest.raises(ValueError, match="SHA-256"):
        perceptual.convert(trunk, heads, tmp_path / "out.safetensors", sys.executable)


@pytest.mark.peers
def test_a_file_that_would_run_code_is_refused(peers_python, tmp_path):
    program = (
        "import sys, torch, pathlib\n"
        "class Trap:\n"
        "    def __reduce__(self):\n"
        "        return pathlib.Path.touch, (pathlib.Path(sys.argv[2]),)\n"
        "torch.save({'features.0.weight': Trap()}, sys.argv[1])\n"
    )
    trap, sprung = tmp_path / "trap.pth", tmp_path / "sprung"
    command = [peers_python, "-c", program, str(trap), str(sprung)]
    subprocess.run(command, check=True)
    with pytest.raises(ValueError, match="torch cannot read"):
        perceptual.convert(trap, trap, tmp_path / "out.safetensors", peers_python)
    assert not pathlib.Path(sprung).exists()
