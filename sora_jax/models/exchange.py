"""Conversion of parameters to the names and layouts of diffusers and transformers.

For WanTransformer3DModel, AutoencoderKLWan and UMT5EncoderModel, in both directions. Ours
are the nested dicts of `nnx.to_pure_dict`; theirs are flat dicts from name to array, as in
a safetensors file. Both directions are strict: every array has exactly one place, and one
error names all arrays that have none.

Our kernels are [..., in, out], torch's [out, in, ...]. Our transformer blocks are stacked
on a leading axis, theirs are numbered.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from sora_jax.core import trees
from sora_jax.models import dit, text_encoder, video_vae

_NAMED = 20  # names in an error: enough to see which kind of tensors they are
Tree = Mapping[Any, Any]  # nested dicts of arrays
Flat = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Entry:
    """The names of one array on either side, and how its axes are arranged.

    Theirs is ours (row `layer` of it, if stacked), reshaped to `split` if set, with its
    axes in the order `axes`, and with `ones` = (front, back) axes of size 1 added.
    """

    theirs: str
    ours: str
    axes: tuple[int, ...]
    ones: tuple[int, int] = (0, 0)
    split: tuple[int, ...] | None = None
    layer: int | None = None

    def transposed(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns their shape, without the ones, from the shape of ours."""
        shape = shape if self.layer is None else shape[1:]
        return tuple((self.split or shape)[axis] for axis in self.axes)

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        front, back = self.ones
        return (1,) * front + self.transposed(shape) + (1,) * back

    def export(self, array: Any) -> Any:
        shape = self.their_shape(array.shape)
        array = array if self.layer is None else array[self.layer]
        array = array.reshape(self.split or array.shape)
        return array.transpose(self.axes).reshape(shape)

    def view(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Returns theirs as (a row of) ours of that shape; copies only with `split`."""
        array = array.reshape(self.transposed(shape)).transpose(np.argsort(self.axes))
        return array.reshape(shape if self.layer is None else shape[1:])

    def restore(self, array: Any, shape: tuple[int, ...]) -> np.ndarray:
        return self.view(np.asarray(array, np.float32), shape)


@dataclasses.dataclass(frozen=True)
class Exported:
    """An array of ours that is converted to theirs when numpy reads it."""

    entry: Entry
    array: Any

    @property
    def nbytes(self) -> int:
        shape = self.entry.transposed(self.array.shape)
        return math.prod(shape) * self.array.dtype.itemsize

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.entry.export(self.array), dtype, copy=copy)


def linear_entries(
    theirs: str, ours: str, bias: bool = True, **where
) -> Iterator[Entry]:
    yield Entry(f"{theirs}.weight", f"{ours}.kernel", (1, 0), **where)
    if bias:
        where = {"layer": where.get("layer")}
        yield Entry(f"{theirs}.bias", f"{ours}.bias", (0,), **where)


def _conv(theirs: str, ours: str, rank: int) -> Iterator[Entry]:
    axes = (rank + 1, rank, *range(rank))
    yield Entry(f"{theirs}.weight", f"{ours}.kernel", axes)
    yield Entry(f"{theirs}.bias", f"{ours}.bias", (0,))


def _transformer(config: dit.Config) -> Iterator[Entry]:
    patch = (*config.patch, config.in_channels, config.dim)
    yield Entry(
        "patch_embedding.weight", "patch_embedding.kernel", (4, 3, 0, 1, 2), split=patch
    )
    yield Entry("patch_embedding.bias", "patch_embedding.bias", (0,))
    for part in ("time_embedder", "text_embedder"):
        for linear in ("linear_1", "linear_2"):
            yield from linear_entries(
                f"condition_embedder.{part}.{linear}", f"{part}.{linear}"
            )
    yield from linear_entries("condition_embedder.time_proj", "time_proj")
    yield Entry("scale_shift_table", "scale_shift_table", (0, 1), (1, 0))
    yield from linear_entries("proj_out", "proj_out")
    for layer in range(config.num_layers):
        theirs = f"blocks.{layer}"
        at = {"layer": layer}
        table = "scale_shift_table"
        yield Entry(f"{theirs}.{table}", f"blocks.{table}", (0, 1), (1, 0), **at)
        for name in ("attn1", "attn2"):
            for part in ("to_q", "to_k", "to_v"):
                yield from linear_entries(
                    f"{theirs}.{name}.{part}", f"blocks.{name}.{part}", **at
                )
            yield from linear_entries(
                f"{theirs}.{name}.to_out.0", f"blocks.{name}.to_out", **at
            )
            for part in ("norm_q", "norm_k"):
                ours = f"blocks.{name}.{part}.scale"
                yield Entry(f"{theirs}.{name}.{part}.weight", ours, (0,), **at)
        if config.cross_attn_norm:
            yield Entry(f"{theirs}.norm2.weight", "blocks.norm2.scale", (0,), **at)
            yield Entry(f"{theirs}.norm2.bias", "blocks.norm2.bias", (0,), **at)
        yield from linear_entries(f"{theirs}.ffn.net.0.proj", "blocks.ffn.up", **at)
        yield from linear_entries(f"{theirs}.ffn.net.2", "blocks.ffn.down", **at)


def _video_vae(config: video_vae.Config) -> Iterator[Entry]:
    yield from linear_entries("quant_conv", "quant_conv", ones=(0, 3))
    yield from linear_entries("post_quant_conv", "post_quant_conv", ones=(0, 3))
    levels = range(len(config.channel_multipliers))
    widths = {
        "encoder": config.widths(config.base_dim),
        "decoder": config.widths(config.decoder_base_dim or config.base_dim)[::-1],
    }
    for half in ("encoder", "decoder"):
        yield from _conv(f"{half}.conv_in", f"{half}.conv_in", 3)
        yield from _conv(f"{half}.conv_out", f"{half}.conv_out", 3)
        yield Entry(f"{half}.norm_out.gamma", f"{half}.norm_out.scale", (0,), (0, 3))
        middle = f"{half}.mid_block"
        for i in range(2):
            yield from _res_block(
                f"{middle}.resnets.{i}", f"{middle}.resnets.{i}", False
            )
        attention = f"{middle}.attentions.0"
        yield Entry(f"{attention}.norm.gamma", f"{attention}.norm.scale", (0,), (0, 2))
        yield from linear_entries(
            f"{attention}.to_qkv", f"{attention}.to_qkv", ones=(0, 2)
        )
        yield from linear_entries(f"{attention}.proj", f"{attention}.proj", ones=(0, 2))
    flat = 0  # Wan 2.1 numbers the encoder's blocks and downsamplers together
    for level in levels:
        ours = f"encoder.down_blocks.{level}"
        for i in range(config.num_res_blocks):
            theirs = f"{ours}.resnets.{i}"
            if not config.residual_shortcuts:
                theirs, flat = f"encoder.down_blocks.{flat}", flat + 1
            before = widths["encoder"][max(level - 1, 0)]
            changes = i == 0 and before != widths["encoder"][level]
            yield from _res_block(theirs, f"{ours}.resnets.{i}", changes)
        if level < levels[-1]:
            theirs = f"{ours}.downsampler"
            if not config.residual_shortcuts:
                theirs, flat = f"encoder.down_blocks.{flat}", flat + 1
            temporal = config.temporal_downsample[level]
            yield from _resample(theirs, f"{ours}.downsampler", temporal)
    for level in levels:
        ours = f"decoder.up_blocks.{level}"
        for i in range(config.num_res_blocks + 1):
            before = widths["decoder"][max(level - 1, 0)]
            if level and not config.residual_shortcuts:
                before //= 2
            changes = i == 0 and before != widths["decoder"][level]
            yield from _res_block(f"{ours}.resnets.{i}", f"{ours}.resnets.{i}", changes)
        if level < levels[-1]:
            name = "upsampler" if config.residual_shortcuts else "upsamplers.0"
            temporal = config.temporal_downsample[::-1][level]
            yield from _resample(f"{ours}.{name}", f"{ours}.upsampler", temporal)


def _res_block(theirs: str, ours: str, changes_width: bool) -> Iterator[Entry]:
    for i in (1, 2):
        yield Entry(f"{theirs}.norm{i}.gamma", f"{ours}.norm{i}.scale", (0,), (0, 3))
        yield from _conv(f"{theirs}.conv{i}", f"{ours}.conv{i}", 3)
    if changes_width:
        shortcut = "conv_shortcut"
        yield from linear_entries(
            f"{theirs}.{shortcut}", f"{ours}.{shortcut}", ones=(0, 3)
        )


def _resample(theirs: str, ours: str, temporal: bool) -> Iterator[Entry]:
    yield from _conv(f"{theirs}.resample.1", f"{ours}.conv", 2)
    if temporal:
        yield from _conv(f"{theirs}.time_conv", f"{ours}.time_conv", 3)


def _text_encoder(config: text_encoder.Config) -> Iterator[Entry]:
    yield Entry("shared.weight", "embedding.table", (0, 1))
    yield Entry("encoder.final_layer_norm.weight", "norm_out.scale", (0,))
    for layer in range(config.num_layers):
        at = {"layer": layer}
        first, second = (f"encoder.block.{layer}.layer.{i}" for i in (0, 1))
        for i, theirs in ((1, first), (2, second)):
            norm = f"blocks.norm{i}.scale"
            yield Entry(f"{theirs}.layer_norm.weight", norm, (0,), **at)
        theirs = f"{first}.SelfAttention"
        for part in "qkvo":
            yield from linear_entries(
                f"{theirs}.{part}", f"blocks.attention.{part}", False, **at
            )
        bias = "blocks.attention.distance_bias"
        yield Entry(f"{theirs}.relative_attention_bias.weight", bias, (0, 1), **at)
        for part, ours in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
            theirs = f"{second}.DenseReluDense.{part}"
            yield from linear_entries(theirs, f"blocks.mlp.{ours}", False, **at)


@dataclasses.dataclass(frozen=True)
class Peer:
    """A class of a peer library, and the conversion of its arrays from and to ours.

    beyond: our parts that it lacks; they are zero when read. added: fields of our config
    that turn these parts on. inexpressible: returns the names of what else a network of
    ours does that it cannot. aliases: alternative names of tensors in its files.
    """

    name: str
    entries: Callable[[Any], Iterator[Entry]]
    make: Callable[[Any, nnx.Rngs], nnx.Module]
    beyond: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    inexpressible: Callable[[Tree, Any], list[str]] = lambda params, config: []
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def shapes(self, config: Any) -> Tree:
        """Returns our parameters as shapes."""
        module = nnx.eval_shape(lambda: self.make(config, nnx.Rngs(0)))
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    def by_parameter(self, config: Any) -> dict[str, list[Entry]]:
        """Returns the tensors of each parameter, in the order of the layers."""
        entries: dict[str, list[Entry]] = {}
        for entry in self.entries(config):
            entries.setdefault(entry.ours, []).append(entry)
        return entries

    def resolve(self, flat: Mapping[str, Any]) -> Flat:
        """Replaces aliases by first names; ValueError where their tensors differ."""
        flat = {name: flat[name] for name in flat}
        for name, alias in self.aliases.items():
            other = flat.pop(alias, None)
            if other is not None and not np.array_equal(
                flat.setdefault(name, other), other
            ):
                raise ValueError(
                    f"{name} and {alias} of {self.name} must be equal, but they differ"
                )
        return flat

    def _check_expressible(self, params: Tree, config: Any) -> None:
        beyond = self.inexpressible(params, config)
        if beyond:
            raise ValueError(f"{self.name} cannot express {', '.join(beyond)} of ours")

    def check(self, flat: Mapping[str, Any], config: Any) -> None:
        """Checks that tensors fit the config, and the config the peer.

        Raises:
          ValueError: tensors are missing, unexpected or of another shape, which it names;
            or the config has options that the peer lacks.
        """
        self._check_expressible({}, config)
        ours = trees.flatten(self.shapes(config))
        expected = {
            entry.theirs: entry.their_shape(ours[entry.ours].shape)
            for entry in self.entries(config)
        }
        wrong = {
            name: f"{name} {tuple(flat[name].shape)} instead of {shape}"
            for name, shape in expected.items()
            if name in flat and tuple(flat[name].shape) != shape
        }
        missing, unexpected = set(expected) - set(flat), set(flat) - set(expected)
        check_fit(f"weights of {self.name}", wrong, missing, unexpected)

    def export(self, params: Tree, config: Any, lazily: bool = False) -> Flat:
        """Returns our parameters as theirs.

        Args:
          params: ours.
          config: the network's.
          lazily: whether to return `Exported`, which converts one array at a time.

        Raises:
          ValueError: they do not fit the config, or the network has parts that the peer
            lacks; all of them are named.
        """
        self._check_expressible(params, config)
        params, entries = trees.flatten(params), [*self.entries(config)]
        places = {entry.ours for entry in entries}
        common = {
            path: array
            for path, array in params.items()
            if path.split(".")[0] not in self.beyond
        }
        check_fit(
            f"parameters for {self.name}",
            {},
            places - set(common),
            set(common) - places,
        )
        if lazily:
            return {e.theirs: Exported(e, common[e.ours]) for e in entries}
        return {entry.theirs: entry.export(common[entry.ours]) for entry in entries}

    def restore(self, flat: Mapping[str, Any], config: Any) -> Tree:
        """Returns their tensors as our parameters, float32; raises as `check`."""
        flat = self.resolve(flat)
        self.check(flat, config)
        entries = self.by_parameter(config)

        def build(path: str, like: jax.ShapeDtypeStruct) -> np.ndarray:
            if path not in entries and path.split(".")[0] in self.beyond:
                return np.zeros(like.shape, np.float32)
            rows = [e.restore(flat[e.theirs], like.shape) for e in entries[path]]
            return rows[0] if entries[path][0].layer is None else np.stack(rows)

        return trees.map_paths(build, self.shapes(config))


def _beyond_wan(params: Tree, config: dit.Config) -> list[str]:
    trained = [
        path
        for path, array in trees.flatten(params).items()
        if path.split(".")[0] in _BEYOND_WAN and np.any(np.asarray(array))
    ]
    options = {
        "num_kv_heads": config.kv_heads != config.num_heads,
        "mask_text": config.mask_text,
        "additive_positions": config.additive_positions,
        "input_skip": config.input_skip,
        "rope_theta": config.rope_theta != dit.Config.rope_theta,
        "time_scale": config.time_scale is not None,
    }
    return trained + [f"config.{name}" for name, is_used in options.items() if is_used]


# While they are zero, as at first, the denoiser computes the same as Wan.
_BEYOND_WAN = ("known", "context", "pooled_text")
TRANSFORMER = Peer(
    "WanTransformer3DModel",
    _transformer,
    lambda config, rngs: dit.DiT(config, rngs=rngs),
    beyond=_BEYOND_WAN,
    added=("known_embedding", "context_embedding", "pooled_text"),
    inexpressible=_beyond_wan,
)


def _beyond_wan_vae(params: Mapping, config: video_vae.Config) -> list[str]:
    """Returns what an AutoencoderKLWan lacks; its steps all halve height and width."""
    del params
    options = ["config.linear_channels"] if config.linear_channels else []
    if not all(space for _, space in config.steps):
        options.append(f"config.spatial_downsample {config.spatial_downsample}")
    return options


VAE = Peer(
    "AutoencoderKLWan",
    _video_vae,
    video_vae.VideoVAE,
    inexpressible=_beyond_wan_vae,
)
TEXT_ENCODER = Peer(
    "UMT5EncoderModel",
    _text_encoder,
    text_encoder.TextEncoder,
    inexpressible=lambda params, config: (
        ["config.absolute_positions"] if config.absolute_positions else []
    ),
    aliases={"shared.weight": "encoder.embed_tokens.weight"},
)


def check_fit(
    what: str, wrong: Mapping[str, str], missing: set[str], unexpected: set[str]
) -> None:
    """Raises ValueError with one sentence where arrays do not have their places."""
    problems = [
        f"{kind}: {', '.join(names[:_NAMED])}"
        + (f" (and {len(names) - _NAMED} more)" if len(names) > _NAMED else "")
        for kind, names in (
            ("missing", sorted(missing)),
            ("unexpected", sorted(unexpected)),
            ("of another shape", [*wrong.values()]),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{what} do not fit the config; {'; '.join(problems)}")
