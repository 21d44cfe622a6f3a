"""Conversion of the configs of diffusers' and transformers' models from and to ours.

Fields that affect the computation are read strictly, with type and range. A setting that
our classes lack is refused by name, unless it has the one value that they implement. An
unknown field is passed on to the caller, since any release of a peer library may add
some, unless it contradicts a field of ours.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sora_jax.models import dit, text_encoder, video_vae

# Unknown fields, with their values, by file.
Unknown = dict[str, dict[str, Any]]


class Type(NamedTuple):
    """What a field's value must be, in words and as a test, and how to convert it."""

    words: str
    holds: Callable[[Any], bool]
    read: Callable[[Any], Any] = lambda value: value


def whole(least: int, most: int) -> Type:
    return Type(
        f"a whole number from {least} to {most}",
        lambda value: type(value) is int and least <= value <= most,
    )


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _list(words: str, holds: Callable[[Any], bool]) -> Type:
    return Type(
        f"a list of {words}, at least one",
        lambda values: (
            isinstance(values, list | tuple)
            and 0 < len(values) <= 1024
            and all(map(holds, values))
        ),
        tuple,
    )


# Far above any model, but low enough that no loop takes hours and no array fills memory.
SIZE, COUNT = whole(1, 2**20), whole(1, 1024)
_FLAG = Type("true or false", lambda value: type(value) is bool)
_FRACTION = Type(
    "a number between 0 and 1", lambda value: is_number(value) and 0 < value < 1, float
)
_FACTOR = Type(
    "a number above 0, up to 1000",
    lambda value: is_number(value) and 0 < value <= 1000,
    float,
)
_SIZES = _list("whole numbers from 1 to 1024", COUNT.holds)
_FLAGS = _list("true and false", _FLAG.holds)
_NUMBERS = _list("finite numbers", is_number)
_POSITIVE = _list("numbers above 0", lambda value: is_number(value) and value > 0)

_DEFAULT = object()
# The storage type of the weights, and the release that wrote them.
_OF_FILES = ("dtype", "torch_dtype", "transformers_version")


class Fields:
    """The fields of a peer's config file, each of which must be taken once.

    Args:
      theirs: the file's fields.
      where: the file's name, for messages.
      model: the class that the file must describe.
      unseen: fields that no tensor's shape implies. Where one is missing, an unknown
        field may be its new name, so its default must not be assumed.
    """

    def __init__(
        self, theirs: Mapping, where: str, model: str, unseen: tuple[str, ...] = ()
    ):
        named = theirs.get("_class_name") or theirs.get("architectures") or model
        named = named[0] if isinstance(named, list) and named else named
        if named != model:
            raise ValueError(f"{where} is the config of {named}, not of {model}")
        self._left = {k: v for k, v in theirs.items() if not k.startswith("_")}
        self._where, self._model = where, model
        self._lost = [name for name in unseen if name not in theirs]
        self.ignore(*_OF_FILES)
        self.only(quantization_config=None)

    def take(
        self, name: str, kind: Type, default: Any = _DEFAULT, alias: str | None = None
    ) -> Any:
        """Returns the value of a field, which may be null where the default is None.

        Args:
          name: the field.
          kind: its type.
          default: where the field is missing; without one it is required.
          alias: an alternative name that the peer library accepts.
        """
        value = self._left.pop(name, _DEFAULT)
        other = self._left.pop(alias, value) if alias else value
        if value is not _DEFAULT and other != value:
            raise ValueError(
                f"{self._where}: {name} is {_short(value)}, but its alias {alias} is "
                f"{_short(other)}"
            )
        value = default if other is _DEFAULT else other
        if value is _DEFAULT:
            raise ValueError(f"{self._where} lacks {name}")
        if value is default:
            return value
        if not kind.holds(value):
            raise ValueError(
                f"{self._where}: {name} is {_short(value)}; it must be {kind.words}"
            )
        return kind.read(value)

    def only(self, **values: Any) -> None:
        """Takes fields that must have these values where they are present."""
        for name, value in values.items():
            actual = self._left.pop(name, value)
            if actual != value:
                raise ValueError(
                    f"{self._where}: {name} is {_short(actual)}; this project supports "
                    f"{self._model} with {value!r} only"
                )

    def ignore(self, *names: str) -> None:
        """Takes fields that do not affect the computation."""
        for name in names:
            self._left.pop(name, None)

    def build[T](self, cls: type[T], unknown: Unknown | None, **values: Any) -> T:
        """Builds our config, after all known fields were taken.

        Args:
          cls: its class.
          unknown: filled with the unknown fields; None: these are refused.
          **values: its fields.

        Raises:
          ValueError: the values are not valid together, or an unknown field has the name
            of one of ours and another value, or may be the new name of a missing one.
        """
        try:
            made = cls(**values)
        except (ValueError, ArithmeticError) as error:
            raise ValueError(f"{self._where}: {error}") from None
        ours_by_name = dataclasses.asdict(made)
        for name, value in self._left.items():
            ours = ours_by_name.get(name, value)
            ours = list(ours) if isinstance(ours, tuple) else ours
            if ours != value:
                raise ValueError(
                    f"{self._where}: {name} is {_short(value)}, but this project's "
                    f"{self._model} computes with {_short(ours)}"
                )
        names = ", ".join(sorted(self._left))
        if self._left and self._lost:
            raise ValueError(
                f"{self._where} lacks {', '.join(self._lost)}, and has unknown fields of "
                f"{self._model} that may be new names of it: {names}"
            )
        if self._left and unknown is None:
            raise ValueError(
                f"{self._where} has unknown fields of {self._model}: {names}"
            )
        if self._left:
            unknown[self._where] = self._left
        return made


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def describe(unknown: Unknown) -> str:
    """Returns the unknown fields, with their values, in one line."""
    fields = [
        f"{name} = {_short(value)} of {where}"
        for where, left in unknown.items()
        for name, value in sorted(left.items())
    ]
    more = f" (and {len(fields) - 10} more)" if len(fields) > 10 else ""
    return "; ".join(fields[:10]) + more


def read_transformer(
    theirs: Mapping, where: str = "config", unknown: Unknown | None = None
) -> dit.Config:
    """Returns the config of a WanTransformer3DModel, which does not mask text padding.

    Args:
      theirs: the fields of its config.json.
      where: the file, for messages.
      unknown: filled with the unknown fields; None: these are refused.

    Raises:
      ValueError: it names what our denoiser lacks (the image encoder's branch of Wan 2.1
        I2V, the 36 input channels of I2V-A14B, ...).
    """
    unseen = "num_attention_heads", "attention_head_dim", "qk_norm", "eps"
    fields = Fields(theirs, where, "WanTransformer3DModel", unseen)
    channels = fields.take("in_channels", SIZE, 16)
    out_channels = fields.take("out_channels", SIZE, None) or channels
    names = "image_dim", "added_kv_proj_dim"
    image = {name: theirs[name] for name in names if theirs.get(name)}
    if image or channels != out_channels:
        raise ValueError(
            f"{where} is of an image-to-video model ({channels} input channels"
            f"{''.join(f', {n} {_short(v)}' for n, v in image.items())}), which is not "
            "supported: use a text-to-video folder, or TI2V-5B for pictures"
        )
    heads = fields.take("num_attention_heads", COUNT, 40)
    head_dim = fields.take("attention_head_dim", COUNT, 128)
    fields.only(qk_norm="rms_norm_across_heads", eps=1e-6, pos_embed_seq_len=None)
    fields.only(image_dim=None, added_kv_proj_dim=None)
    fields.ignore("rope_max_seq_len")  # the length of its tables
    return fields.build(
        dit.Config,
        unknown,
        in_channels=channels,
        out_channels=out_channels,
        patch=fields.take("patch_size", _SIZES, (1, 2, 2)),
        dim=heads * head_dim,
        num_layers=fields.take("num_layers", COUNT, 40),
        num_heads=heads,
        mlp_dim=fields.take("ffn_dim", SIZE, 13824),
        text_dim=fields.take("text_dim", SIZE, 4096),
        freq_dim=fields.take("freq_dim", SIZE, 256),
        cross_attn_norm=fields.take("cross_attn_norm", _FLAG, True),
        mask_text=False,
        known_embedding=False,
        context_embedding=False,
        pooled_text=False,
    )


def write_transformer(config: dit.Config) -> dict:
    """Returns the config.json of the equivalent WanTransformer3DModel."""
    return {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": None,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": config.cross_attn_norm,
        "eps": 1e-6,
        "ffn_dim": config.mlp_dim,
        "freq_dim": config.freq_dim,
        "image_dim": None,
        "in_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_channels,
        "patch_size": list(config.patch),
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }


# Fields of transformers' configs that only affect generation, the tokenizer, the decoder
# or files.
_UMT5_IGNORED = (
    "architectures",
    "bos_token_id",
    "chunk_size_feed_forward",
    "classifier_dropout",
    "decoder_start_token_id",
    "dropout_rate",
    "eos_token_id",
    "id2label",
    "initializer_factor",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "num_decoder_layers",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "scalable_attention",
    "scale_decoder_outputs",
    "tie_word_embeddings",
    "tokenizer_class",
    "use_cache",
)


def read_text_encoder(
    theirs: Mapping, where: str = "config", unknown: Unknown | None = None
) -> text_encoder.Config:
    """Returns the config of a UMT5EncoderModel; arguments as in `read_transformer`."""
    distance = "relative_attention_max_distance"
    unseen = distance, "layer_norm_epsilon", "feed_forward_proj"
    fields = Fields(theirs, where, "UMT5EncoderModel", unseen)
    fields.only(
        model_type="umt5",
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
        is_gated_act=True,
        dense_act_fn="gelu_new",
    )
    fields.ignore(*_UMT5_IGNORED)
    return fields.build(
        text_encoder.Config,
        unknown,
        vocab_size=fields.take("vocab_size", SIZE, 250112),
        dim=fields.take("d_model", SIZE, 512, "hidden_size"),
        num_layers=fields.take("num_layers", COUNT, 8, "num_hidden_layers"),
        num_heads=fields.take("num_heads", COUNT, 6, "num_attention_heads"),
        head_dim=fields.take("d_kv", COUNT, 64, "head_dim"),
        mlp_dim=fields.take("d_ff", SIZE, 1024),
        num_buckets=fields.take("relative_attention_num_buckets", whole(4, 1024), 32),
        max_distance=fields.take(distance, SIZE, 128),
    )


def write_text_encoder(config: text_encoder.Config) -> dict:
    """Returns the config.json of the equivalent UMT5EncoderModel."""
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "d_ff": config.mlp_dim,
        "d_kv": config.head_dim,
        "d_model": config.dim,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.0,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-6,
        "num_decoder_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": config.max_distance,
        "relative_attention_num_buckets": config.num_buckets,
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
    }


def read_vae(
    theirs: Mapping, where: str = "config", unknown: Unknown | None = None
) -> video_vae.Config:
    """Returns the config of an AutoencoderKLWan, of Wan 2.1 or Wan 2.2.

    Arguments as in `read_transformer`.
    """
    fields = Fields(theirs, where, "AutoencoderKLWan")
    patch = fields.take("patch_size", whole(1, 64), None) or 1
    channels = 3 * patch**2
    fields.only(in_channels=channels, out_channels=channels, dropout=0.0)
    fields.only(attn_scales=[])
    fields.ignore("clip_output")
    halved = fields.take("temperal_downsample", _FLAGS, (False, True, True))
    # These state the strides, and do not set them.
    fields.only(scale_factor_temporal=2 ** sum(halved))
    fields.only(scale_factor_spatial=patch * 2 ** len(halved))
    return fields.build(
        video_vae.Config,
        unknown,
        latent_channels=fields.take("z_dim", COUNT, 16),
        patch_size=patch,
        base_dim=fields.take("base_dim", SIZE, 96),
        decoder_base_dim=fields.take("decoder_base_dim", SIZE, None),
        channel_multipliers=fields.take("dim_mult", _SIZES, (1, 2, 4, 4)),
        num_res_blocks=fields.take("num_res_blocks", COUNT, 2),
        temporal_downsample=halved,
        residual_shortcuts=fields.take("is_residual", _FLAG, False),
        latent_mean=fields.take("latents_mean", _NUMBERS),
        latent_std=fields.take("latents_std", _POSITIVE),
    )


def write_vae(config: video_vae.Config) -> dict:
    """Returns the config.json of the equivalent AutoencoderKLWan."""
    folds = config.patch_size > 1
    channels = 3 * config.patch_size**2
    return {
        "_class_name": "AutoencoderKLWan",
        "attn_scales": [],
        "base_dim": config.base_dim,
        "decoder_base_dim": config.decoder_base_dim,
        "dim_mult": list(config.channel_multipliers),
        "dropout": 0.0,
        "in_channels": channels,
        "is_residual": config.residual_shortcuts,
        "latents_mean": list(config.latent_mean or (0.0,) * config.latent_channels),
        "latents_std": list(config.latent_std or (1.0,) * config.latent_channels),
        "num_res_blocks": config.num_res_blocks,
        "out_channels": channels,
        "patch_size": config.patch_size if folds else None,
        "scale_factor_spatial": config.spatial_stride,
        "scale_factor_temporal": config.temporal_stride,
        "temperal_downsample": list(config.temporal_downsample),
        "z_dim": config.latent_channels,
    }


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """A folder's scheduler: its solver, and the shift of its noise levels."""

    sampler: str
    shift: float


_SCHEDULERS = {
    "UniPCMultistepScheduler": (
        "unipc",
        "flow_shift",
        {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "predict_x0": True,
            "solver_order": 2,
            "solver_type": "bh2",
            "lower_order_final": True,
            "thresholding": False,
            "disable_corrector": [],
            "final_sigmas_type": "zero",
            "solver_p": None,
        },
        # The scheduler's own defaults, where they differ from the values above.
        {"prediction_type": "epsilon", "use_flow_sigmas": False},
    ),
    "FlowMatchEulerDiscreteScheduler": (
        "euler",
        "shift",
        {"invert_sigmas": False, "stochastic_sampling": False},
        {},
    ),
}
# Fields of both that have no effect with the settings above.
_SCHEDULERS_IGNORE = (
    "base_image_seq_len",
    "base_shift",
    "beta_end",
    "beta_schedule",
    "beta_start",
    "dynamic_thresholding_ratio",
    "max_image_seq_len",
    "max_shift",
    "rescale_betas_zero_snr",
    "sample_max_value",
    "sigma_max",
    "sigma_min",
    "steps_offset",
    "time_shift_type",
    "timestep_spacing",
    "trained_betas",
)


def read_scheduler(
    theirs: Mapping, where: str = "config", unknown: Unknown | None = None
) -> Scheduler:
    """Returns the settings of flow-matching Euler or UniPC.

    Arguments as in `read_transformer`.

    Raises:
      ValueError: another scheduler, or a setting that is not supported.
    """
    named = theirs.get("_class_name")
    if not isinstance(named, str) or named not in _SCHEDULERS:
        raise ValueError(
            f"{where} is a {_short(named)}; {' and '.join(_SCHEDULERS)} are supported"
        )
    sampler, shift, required, defaults = _SCHEDULERS[named]
    fields = Fields(defaults | dict(theirs), where, named, (shift,))
    fields.only(
        **required,
        num_train_timesteps=1000,
        use_dynamic_shifting=False,
        use_karras_sigmas=False,
        use_exponential_sigmas=False,
        use_beta_sigmas=False,
        shift_terminal=None,
    )
    fields.ignore(*_SCHEDULERS_IGNORE)
    return fields.build(
        Scheduler, unknown, sampler=sampler, shift=fields.take(shift, _FACTOR, 1.0)
    )


@dataclasses.dataclass(frozen=True)
class Index:
    """The parts of a pipeline, by name, and its own settings.

    boundary: the noise level below which transformer_2 takes over; None with one
    transformer. takes_images: a picture becomes the first latent, at level 0.
    """

    parts: tuple[str, ...]
    boundary: float | None
    takes_images: bool


_PARTS = (
    "transformer",
    "transformer_2",
    "text_encoder",
    "vae",
    "scheduler",
    "tokenizer",
)
_PART = Type(
    "the two names of a library and a class",
    lambda value: (
        isinstance(value, list) and len(value) == 2 and value.count(None) != 1
    ),
)


def read_index(
    theirs: Mapping, where: str = "config", unknown: Unknown | None = None
) -> Index:
    """Returns the model_index.json of a WanPipeline; arguments as in `read_transformer`.

    Raises:
      ValueError: it is of another pipeline, a part is missing, or there is a boundary
        without a second transformer.
    """
    named = theirs.get("_class_name")
    if named != "WanPipeline":
        raise ValueError(
            f"{where} is of a {_short(named)}; only WanPipeline is supported "
            "(text to video of Wan 2.1 and 2.2, and TI2V-5B)"
        )
    fields = Fields(theirs, where, named)
    entries = {name: fields.take(name, _PART, None) for name in _PARTS}
    parts = tuple(name for name, part in entries.items() if part and any(part))
    if lacking := {"transformer", "text_encoder", "vae"} - set(parts):
        raise ValueError(f"{where} lacks {', '.join(sorted(lacking))}")
    boundary = fields.take("boundary_ratio", _FRACTION, None)
    if (boundary is None) != ("transformer_2" not in parts):
        raise ValueError(
            f"{where} has boundary_ratio {boundary} and "
            f"{'no ' if boundary else 'a '}transformer_2; they go together"
        )
    pictures = fields.take("expand_timesteps", _FLAG, None) or False
    return fields.build(
        Index, unknown, parts=parts, boundary=boundary, takes_images=pictures
    )
