"""The basic layers of all networks.

Parameters are float32 and have the logical names of their axes (`axes`) as metadata, from
which the trainer derives their shardings. Every layer computes in the dtype of its input,
norms in float32.

Letters: b batch, n tokens, d model width, i input width, o output width.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.core import sharding
from sora_jax.models import quantization

Axes = tuple[str | None, ...]
# For products that need float32 precision: by default TPUs round float32 operands to
# bfloat16, and GPUs to TF32.
EXACT = jax.lax.Precision.HIGHEST


def param(rngs: nnx.Rngs, init, shape: tuple[int, ...], axes: Axes) -> nnx.Param:
    """Makes a float32 parameter with the logical names of its axes."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


class AdapterParam(nnx.Param):
    """A parameter of an adapter, which is trained while its network's own are not."""


def fan_in_normal(fan_in: int, scale: float = 1.0):
    """Returns a normal initializer of standard deviation scale / sqrt(fan_in)."""
    return nnx.initializers.normal(scale / fan_in**0.5)


def matmul(
    x: jax.Array,
    kernel_io: jax.Array,
    out: str | None,
    kind: str = "",
    precision: jax.lax.Precision | None = None,
) -> jax.Array:
    """x W over the last axis, which the result has sharded as the logical axis `out`.

    Args:
      x: [..., i].
      kernel_io: W.
      out: logical axis of the result's last axis; None: it is replicated.
      kind: a quantization, one of `quantization.KINDS`; "": none.
      precision: of the product, where it is not quantized.

    Rows and tokens are flattened into one axis where tokens are not sharded: the weight's
    gradient then sums over one axis instead of two, several times faster on CPU.
    """

    def product(x, spec):
        if kind:
            return quantization.product(x, kernel_io, kind, spec)
        return jnp.einsum(
            "...i,io->...o", x, kernel_io, precision=precision, out_sharding=spec
        )

    spec = sharding.spec_like(x, out)
    if x.ndim < 3 or sharding.is_sharded(x, range(1, x.ndim - 1)):
        return product(x, spec)
    rows, i, o = math.prod(x.shape[:-1]), *kernel_io.shape
    flat_ri = jnp.reshape(x, (rows, i), out_sharding=sharding.flattened_spec(x))
    y_ro = product(flat_ri, sharding.flattened_spec(spec))
    return jnp.reshape(y_ro, (*x.shape[:-1], o), out_sharding=spec)


class Adapter(nnx.Module):
    """s (x A) B, which is added to a layer's output; see models/lora.py.

    Args:
      shape: of the layer's kernel, [i, o] or stacked.
      axes: logical names of the kernel's two axes.
      rank: r, the width between A [i, r] and B [r, o].
      scale: s.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: Axes,
        rank: int,
        scale: float,
        rngs: nnx.Rngs,
    ):
        *stacked, i, o = shape
        random = fan_in_normal(i)(rngs.params(), (*stacked, i, rank), jnp.float32)
        self.a = AdapterParam(random, axes=(axes[0], None))
        zero = jnp.zeros((*stacked, rank, o), jnp.float32)
        self.b = AdapterParam(zero, axes=(None, axes[1]))
        self.scale = scale

    def __call__(self, x: jax.Array, out: str | None, precision) -> jax.Array:
        """Returns s (x A) B for x [..., i]; out, precision: see `matmul`."""
        a_ir, b_ro = (
            sharding.gather_weight(m[...].astype(x.dtype), m.get_metadata("axes"))
            for m in (self.a, self.b)
        )
        x = matmul(x, a_ir, None, precision=precision)
        return matmul(x, b_ro, out, precision=precision) * self.scale


class Linear(nnx.Module):
    """y = x W + b over the last axis, and what an adapter adds to it.

    Args:
      i, o: input and output width.
      axes: logical names of the kernel's two axes. The output's last axis is sharded as
        the second, so ("embed", "mlp") followed by ("mlp", "embed") is the column- then
        row-parallel pair of tensor parallelism.
      bias: whether there is a b.
      init: kernel initializer, by default normal with variance 1 / i.
      kind: quantization of x W, one of `quantization.KINDS`; "": none.
      precision: of x W, such as `EXACT`; None: the platform's default.
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
        self.adapter: Adapter | None = nnx.data(None)

    def add_adapter(self, rank: int, scale: float, rngs: nnx.Rngs) -> None:
        """Adds s (x A) B to the output, of layers that may be stacked; see `Adapter`."""
        axes = self.kernel.get_metadata("axes")
        self.adapter = Adapter(self.kernel.shape, axes, rank, scale, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        axes = self.kernel.get_metadata("axes")
        out = None if axes[1] == "embed" else axes[1]
        kernel_io = sharding.gather_weight(self.kernel[...].astype(x.dtype), axes)
        y = matmul(x, kernel_io, out, self.kind, self.precision)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        if self.adapter is not None:
            y = y + self.adapter(x, out, self.precision)
        return y


class Embed(nnx.Module):
    """Looks up rows of a table: ids [b, l] -> [b, l, d]."""

    def __init__(self, size: int, d: int, *, init=None, rngs: nnx.Rngs):
        init = init or nnx.initializers.normal(1.0)
        self.table = param(rngs, init, (size, d), (None, "embed"))

    def __call__(self, ids_bl: jax.Array) -> jax.Array:
        table = sharding.gather_weight(self.table[...], (None, "embed"))
        # A gather, with a scatter-add as its gradient. The tokenizer checks ids, so they
        # are not clipped here.
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
    """Returns a function that picks each token's vector of those per level [b, k, d]."""
    if level_index_bn is None:
        if k != 1:
            raise ValueError(f"{k} noise levels per row need level_index_bn")
        return lambda table_bkd: table_bkd
    one_hot_bnk = jax.nn.one_hot(level_index_bn, k, dtype=jnp.float32)

    def pick(table_bkd):
        # A matmul with k rows: cheaper to differentiate than a gather, and it shards. In
        # EXACT precision it does not round the numbers of the table.
        return jnp.einsum("bnk,bkd->bnd", one_hot_bnk, table_bkd, precision=EXACT)

    return pick


def stack(make, count: int, rngs: nnx.Rngs):
    """Builds `count` copies of a module, their parameters stacked on a new axis 0.

    `jax.lax.scan` over the result runs them in order with one compiled body.
    """
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(count))
