"""LPIPS's weights as one file, converted once from torchvision's and lpips' files.

They are not shipped. Converting needs torch, in its own environment, to read the published
files; everything else reads the safetensors file.

Letters: b clips, t frames, h height, w width, c channels.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping

import jax
import numpy as np
import safetensors.numpy

from sora_jax.core import digests, paths, trees
from sora_jax.models import lpips
from sora_jax.training import checkpoint, torch_files, weight_files
from sora_jax.training import state as states

NAME = "lpips"  # of the network in a train state


def networks_of(config: lpips.Config) -> states.Networks:
    """The network {"lpips"} without arrays."""
    return states.Networks(lambda rngs: {NAME: lpips.LPIPS(config, rngs)})


@dataclasses.dataclass(frozen=True)
class Weights:
    """A checked file of weights.

    file: the file. config: of their network. tensors: views of the file by name.
    """

    file: pathlib.Path
    config: lpips.Config
    tensors: Mapping[str, np.ndarray]

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, for protocols."""
        return paths.sha256_file(self.file)

    def load(self) -> dict:
        """Reads the parameters, replicated over the current mesh.

        Raises:
          digests.Damaged: the file differs from what was written.
        """
        digests.check(self.file, required=False)
        networks = networks_of(self.config)
        layouts = trees.flatten(networks.layouts()[NAME])

        def place(name, leaf):
            array = np.asarray(self.tensors[name], leaf.dtype)
            return jax.make_array_from_callback(
                leaf.shape, layouts[name], lambda index: array[index]
            )

        return trees.map_paths(place, networks.abstract()[NAME])


def open_weights(file: str | pathlib.Path) -> Weights:
    """Checks a file that `convert` wrote: every name and shape.

    Raises:
      FileNotFoundError: the file is missing; the message says how to make it.
      ValueError: it is damaged, or holds another network's weights.
    """
    file = pathlib.Path(file)
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: LPIPS needs torchvision's vgg16-397923af.pth "
            "(download.pytorch.org/models) and weights/v0.1/vgg.pth of the lpips "
            "package, converted by `python -m sora_jax.convert --from "
            "vgg16-397923af.pth --lpips_heads vgg.pth --out FILE`; without it everything "
            "but LPIPS is computed"
        )
    if file.suffix != ".safetensors":
        raise ValueError(
            f"{file} is not a .safetensors file; `python -m sora_jax.convert` makes one "
            "of the published .pth files"
        )
    tensors = weight_files.TensorFiles(file.parent, file.stem)
    try:
        config = lpips.Config(lpips.network_of(tensors, "convs.0.kernel"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    shapes = networks_of(config).abstract()[NAME]
    checkpoint.unflatten(tensors, shapes, str(file))
    return Weights(file, config, tensors)


def convert(
    trunk: pathlib.Path,
    heads: pathlib.Path,
    target: pathlib.Path,
    python: str | pathlib.Path,
) -> Weights:
    """Converts the two published files to one.

    Args:
      trunk: torchvision's vgg16-397923af.pth or alexnet-owt-7be5be79.pth.
      heads: vgg.pth or alex.pth of the lpips package, weights/v0.1.
      target: the .safetensors file to write.
      python: the Python of an environment with torch and safetensors.

    Raises:
      FileNotFoundError: a file or that Python is missing.
      ValueError: a file is damaged, holds something other than tensors, or the wrong
        tensors; or that Python has no torch.
    """
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} must end in .safetensors")
    for file in (trunk, heads):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing")
    # torchvision's file names end in the first digits of their SHA-256.
    digits = re.search(r"-([0-9a-f]{8})\.pth$", trunk.name)
    if digits and not paths.sha256_file(trunk).startswith(digits[1]):
        raise ValueError(
            f"{trunk} is damaged: its SHA-256 does not start with {digits[1]}"
        )
    tensors = [torch_files.read(file, python) for file in (trunk, heads)]
    config = lpips.Config(lpips.network_of(tensors[0], "features.0.weight"))
    arrays = lpips.from_torch(config, *tensors)
    digests.store(target, safetensors.numpy.save(arrays))
    return open_weights(target)
