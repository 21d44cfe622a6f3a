"""LoRA: low-rank corrections of a trained network's layers (arXiv 2106.09685).

    y = x W + bias + (alpha / rank) (x A) B

W and the bias stay as they are. A [i, rank] is random and B [rank, o] zero at first, so
that a network with adapters computes the same as without them until it is trained.

Letters: i input width, o output width, r rank. Adapters of stacked layers are stacked too.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.core import config as configs
from sora_jax.core import trees
from sora_jax.models import layers

PART = "lora"  # the name, among the networks of a run, under which adapters are kept


@dataclasses.dataclass(frozen=True)
class Config:
    """Which layers of a denoiser have adapters, and of which rank."""

    rank: Annotated[int, configs.Range("[1, 4096]", 0, "no adapters")] = 0
    alpha: Annotated[float, configs.Range("(0, 1e6]", 0, "the rank")] = 0.0
    # Patterns of layers' names; the default is all projections of attention.
    layers: tuple[str, ...] = (r"\.attn[12]\.to_(q|k|v|out)$",)

    def __post_init__(self):
        for pattern in self.layers:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"layers has {pattern!r}, which is not a regular expression: {error}"
                ) from None
        if self.rank and not self.layers:
            raise ValueError(f"rank is {self.rank}, but layers names no layer")

    @property
    def scale(self) -> float:
        """The factor on (x A) B."""
        return self.alpha / self.rank if self.alpha else 1.0

    def chosen(self, names: Sequence[str]) -> list[str]:
        """The layers, of those named, that have adapters.

        Raises:
          ValueError: a pattern fits no layer.
        """
        for pattern in self.layers:
            if not any(re.search(pattern, name) for name in names):
                raise ValueError(
                    f"lora.layers has {pattern!r}, which fits none of the layers: "
                    f"{', '.join(names)}"
                )
        return [n for n in names if any(re.search(p, n) for p in self.layers)]


def linear_layers(module: nnx.Module, name: str) -> dict[str, layers.Linear]:
    """The Linear layers of a network by dotted name, such as dit.blocks.attn1.to_q."""

    def found() -> Iterator[tuple[str, layers.Linear]]:
        for path, part in nnx.iter_modules(module):
            if isinstance(part, layers.Linear):
                yield ".".join((name, *map(str, path))), part

    return dict(found())


def adapt[M: nnx.Module](module: M, name: str, config: Config, rngs: nnx.Rngs) -> M:
    """Gives layers of a network adapters, and returns it.

    Args:
      module: the network; nothing is changed where the rank is 0.
      name: of the network, with which the names of its layers begin.
      config: rank and patterns.
      rngs: of the random A.

    Raises:
      ValueError: a pattern fits no layer.
    """
    if not config.rank:
        return module
    there = linear_layers(module, name)
    for chosen in config.chosen([*there]):
        there[chosen].add_adapter(config.rank, config.scale, rngs)
    return module


@functools.partial(jax.jit, donate_argnums=0)
def _merged(kernel_io: jax.Array, a_ir, b_ro, scale: float) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    added_io = jnp.einsum(
        "...ir,...ro->...io",
        a_ir,
        b_ro,
        precision=layers.EXACT,
        out_sharding=None if mesh.empty else jax.typeof(kernel_io).sharding.spec,
    )
    return (kernel_io.astype(jnp.float32) + scale * added_io).astype(kernel_io.dtype)


def merge(params: Mapping, adapters: Mapping, scale: float) -> dict:
    """W + scale A B of every layer with an adapter: a network without adapters.

    Args:
      params: of the network; the kernels of adapted layers are used up, so that two
        networks are never in memory.
      adapters: those of its adapters, {"blocks": {..., "adapter": {"a", "b"}}}.
      scale: see `Config`.

    Returns:
      Nested dicts like `params`, in the same types and layouts.
    """
    flat = trees.flatten(adapters)

    def one(path: str, leaf: Any) -> Any:
        layer, _, kind = path.rpartition(".")
        a, b = (flat.get(f"{layer}.adapter.{matrix}") for matrix in "ab")
        return leaf if kind != "kernel" or a is None else _merged(leaf, a, b, scale)

    return trees.map_paths(one, params)
