"""The small layers that every network here is made of.

Parameters are float32 and carry the logical names of their axes (`axes`) as metadata,
from which the trainer derives their shardings. Every layer computes in the dtype of its
input, norms in float32.

Letters: b batch, n tokens, d model width, i input width, o output width.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.core import sharding
from sora_jax.models import quantization

Axes = tuple[str | None, ...]
# Of products whose float32 operands are meant: where nothing else is said, TPUs round
# them to bfloat16 and GPUs to TF32.
EXACT = jax.lax.Precision.HIGHEST


def param(rngs: nnx.Rngs, init, shape: tuple[int, ...], axes: Axes) -> nnx.Param:
    """Makes a float32 parameter whose axes have the given logical names."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


def fan_in_normal(fan_in: int, scale: float = 1.0):
    """Normal initializer of standard deviation scale / sqrt(fan_in)."""
    return nnx.initializers.normal(scale / fan_in**0.5)


def matmul(
    x: jax.Array,
    kernel_io: jax.Array,
    out: str | None,
    kind: str = "",
    precision: jax.lax.Precision | None = None,
) -> jax.Array:
    """x W over the last axis, whose layout becomes that of the logical axis `out`.

    In 8 bits where `kind` is one of those of `quantization.KINDS`; or else in a
    precision, where one is named.

    Rows and tokens become one axis where tokens are not split: the weight's gradient
    then sums over one axis instead of two, which XLA does several times faster on CPU.
    """

    def product(x, layout):
        if kind:
            return quantization.product(x, kernel_io, kind, layout)
        return jnp.einsum(
            "...i,io->...o", x, kernel_io, precision=precision, out_sharding=layout
        )

    layout = sharding.spec_like(x, out)
    if x.ndim < 3 or sharding.is_sharded(x, range(1, x.ndim - 1)):
        return product(x, layout)
    rows, i, o = math.prod(x.shape[:-1]), *kernel_io.shape
    flat_ri = jnp.reshape(x, (rows, i), out_sharding=sharding.flattened_spec(x))
    y_ro = product(flat_ri, sharding.flattened_spec(layout))
    return jnp.reshape(y_ro, (*x.shape[:-1], o), out_sharding=layout)


class Linear(nnx.Module):
    """y = x W + b over the last axis.

    Args:
      i, o: input and output width.
      axes: logical names of the kernel's two axes; the second is also the layout of
        the output's last axis, so ("embed", "mlp") followed by ("mlp", "embed") is the
        column- then row-parallel pair of tensor parallelism.
      bias: whether there is a b.
      init: kernel initializer, by default normal with variance 1 / i.
      kind: of 8 bits that x W is computed in, one of `quantization.KINDS`; "": none.
      precision: of x W, such as `EXACT`; None: the platform's.
    """

    def __init__(
        self,
        i: int,
        o: int,
        *,
        axes: Axes = ("embed", None),
        bias: bool = True,
        init=None,
        kind: str = "",
        precision: jax.lax.Precision | None = None,
        rngs: nnx.Rngs,
    ):
        self.kernel = param(rngs, init or fan_in_normal(i), (i, o), axes)
        out = None if axes[1] == "embed" else axes[1]
        self.bias = param(rngs, nnx.initializers.zeros, (o,), (out,)) if bias else None
        self.kind, self.precision = kind, precision

    def __call__(self, x: jax.Array) -> jax.Array:
        axes = self.kernel.get_metadata("axes")
        out = None if axes[1] == "embed" else axes[1]
        kernel_io = sharding.gather_weight(self.kernel[...].astype(x.dtype), axes)
        y = matmul(x, kernel_io, out, self.kind, self.precision)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        return y


class Embed(nnx.Module):
    """Looks rows up in a table: ids [b, l] -> [b, l, d]."""

    def __init__(self, size: int, d: int, *, init=None, rngs: nnx.Rngs):
        init = init or nnx.initializers.normal(1.0)
        self.table = param(rngs, init, (size, d), (None, "embed"))

    def __call__(self, ids_bl: jax.Array) -> jax.Array:
        table = sharding.gather_weight(self.table[...], (None, "embed"))
        # A table lookup by scatter in the backward pass; ids are checked by the
        # tokenizer, so nothing is clipped here.
        return table.at[ids_bl].get(
            out_sharding=sharding.out_sharding("batch", None, None),
            mode="promise_in_bounds",
        )


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32 (arXiv 1910.07467)."""

    def __init__(
        self, d: int, *, eps: float = 1e-6, axis: str | None = None, rngs: nnx.Rngs
    ):
        self.scale = param(rngs, nnx.initializers.ones, (d,), (axis,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        y = x32 * jax.lax.rsqrt(variance + self.eps) * self.scale[...]
        return y.astype(x.dtype)


def layer_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """(x - mean) / std over the last axis, in float32, without affine terms."""
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    centred = x32 - mean
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + eps)


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias, in float32 (arXiv 1607.06450)."""

    def __init__(self, d: int, *, eps: float = 1e-6, rngs: nnx.Rngs):
        self.scale = param(rngs, nnx.initializers.ones, (d,), (None,))
        self.bias = param(rngs, nnx.initializers.zeros, (d,), (None,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = layer_norm(x, self.eps) * self.scale[...] + self.bias[...]
        return y.astype(x.dtype)


def picker(level_index_bn: jax.Array | None, k: int):
    """Returns a function that spreads per-level vectors [b, k, d] over the tokens."""
    if level_index_bn is None:
        if k != 1:
            raise ValueError(f"{k} noise levels a row need level_index_bn")
        return lambda table_bkd: table_bkd
    one_hot_bnk = jax.nn.one_hot(level_index_bn, k, dtype=jnp.float32)

    def pick(table_bkd):
        # A matmul with k rows: cheaper to differentiate than a gather, and it shards.
        # It picks the very numbers of the table only where they are not rounded.
        return jnp.einsum("bnk,bkd->bnd", one_hot_bnk, table_bkd, precision=EXACT)

    return pick


def stack(make, count: int, rngs: nnx.Rngs):
    """Builds `count` copies of a module as one, parameters stacked on a new axis 0.

    `jax.lax.scan` over the result runs them one after the other with one compiled body.
    """
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(count))
