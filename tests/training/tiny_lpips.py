"""A file of LPIPS's weights as `convert` makes it, of AlexNet and random."""

import pathlib

import numpy as np
import safetensors.numpy

from sora_jax.core import trees
from sora_jax.models import lpips
from sora_jax.training import perceptual


def write(file: pathlib.Path) -> pathlib.Path:
    """Writes the file; returns its path."""
    random = np.random.default_rng(0)

    def fill(name, leaf):
        drawn = random.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        return np.float32(np.abs(drawn) if "heads" in name else drawn)

    shapes = perceptual.networks_of(lpips.Config("alexnet")).abstract()[perceptual.NAME]
    arrays = trees.flatten(trees.map_paths(fill, shapes))
    file.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(arrays, file)
    return file
