"""The configs of diffusers' and transformers' models as ours, and the other way round.

Both directions are strict: a setting that our classes do not have is refused by its
name, unless it has the one value that they compute with.
"""

from collections.abc import Callable, Mapping
from typing import Any

from sora_jax.models import dit, text_encoder, video_vae

_DEFAULT = object()


class _Fields:
    """The fields of a peer's config file, each of which must be taken once."""

    def __init__(self, given: Mapping, where: str, model: str):
        named = given.get("_class_name") or given.get("architectures") or model
        named = named[0] if isinstance(named, list) and named else named
        if named != model:
            raise ValueError(f"{where} is the config of {named}, not of {model}")
        self._left = {k: v for k, v in given.items() if not k.startswith("_")}
        self._where, self._model = where, model

    def take(self, name: str, kind: Callable, default: Any = _DEFAULT) -> Any:
        value = self._left.pop(name, default)
        if value is _DEFAULT:
            raise ValueError(f"{self._where} lacks {name}")
        try:
            return value if value is None or value is default else kind(value)
        except (TypeError, ValueError):
            raise ValueError(f"{self._where}: {name} is {value!r}") from None

    def only(self, **values: Any) -> None:
        """Takes fields that may have these values and no others."""
        for name, value in values.items():
            found = self._left.pop(name, value)
            if found != value:
                raise ValueError(
                    f"{self._where}: {name} is {found!r}; this project's classes know "
                    f"{self._model} with {value!r} only"
                )

    def ignore(self, *names: str) -> None:
        """Takes fields that say nothing about what is computed."""
        for name in names:
            self._left.pop(name, None)

    def finish(self) -> None:
        if self._left:
            raise ValueError(
                f"{self._where} has fields that are not known of {self._model}: "
                f"{', '.join(sorted(self._left))}"
            )


def _ints(value) -> tuple[int, ...]:
    return tuple(int(v) for v in value)


def _floats(value) -> tuple[float, ...]:
    return tuple(float(v) for v in value)


def _bools(value) -> tuple[bool, ...]:
    return tuple(bool(v) for v in value)


def read_transformer(given: Mapping, where: str = "config") -> dit.Config:
    """The config of a WanTransformer3DModel: text is zero-padded and seen whole.

    Raises:
      ValueError: naming what our denoiser does not have (the image encoder's branch of
        Wan 2.1 I2V, the 36 input channels of I2V-A14B, ...).
    """
    fields = _Fields(given, where, "WanTransformer3DModel")
    image = {n: given[n] for n in ("image_dim", "added_kv_proj_dim") if given.get(n)}
    channels = given.get("in_channels", 16), given.get("out_channels") or 16
    if image or channels[0] != channels[1]:
        raise ValueError(
            f"{where} is of an image-to-video model ({channels[0]} input channels"
            f"{''.join(f', {n} {v}' for n, v in image.items())}), which is not "
            "supported: take a text-to-video folder, or TI2V-5B for pictures"
        )
    heads = fields.take("num_attention_heads", int, 40)
    head_dim = fields.take("attention_head_dim", int, 128)
    config = {
        "in_channels": fields.take("in_channels", int, 16),
        "out_channels": fields.take("out_channels", int, 16) or channels[0],
        "patch": fields.take("patch_size", _ints, (1, 2, 2)),
        "dim": heads * head_dim,
        "num_layers": fields.take("num_layers", int, 40),
        "num_heads": heads,
        "mlp_dim": fields.take("ffn_dim", int, 13824),
        "text_dim": fields.take("text_dim", int, 4096),
        "freq_dim": fields.take("freq_dim", int, 256),
        "cross_attn_norm": fields.take("cross_attn_norm", bool, True),
    }
    fields.only(qk_norm="rms_norm_across_heads", eps=1e-6, pos_embed_seq_len=None)
    fields.only(image_dim=None, added_kv_proj_dim=None)
    fields.ignore("rope_max_seq_len")  # the longest that its tables hold
    fields.finish()
    return dit.Config(
        **config, mask_text=False, known_embedding=False, pooled_text=False
    )


def write_transformer(config: dit.Config) -> dict:
    """The config.json of the WanTransformer3DModel that computes the same."""
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


# Fields of every transformers config that say how generate, a tokenizer or a file work.
_UMT5_IGNORED = (
    "architectures", "bos_token_id", "chunk_size_feed_forward", "classifier_dropout",
    "decoder_start_token_id", "dropout_rate", "dtype", "eos_token_id", "id2label",
    "initializer_factor", "is_decoder", "is_encoder_decoder", "label2id",
    "num_decoder_layers", "output_attentions", "output_hidden_states", "output_past",
    "pad_token_id", "problem_type", "return_dict", "scalable_attention",
    "tie_word_embeddings", "tokenizer_class", "torch_dtype", "transformers_version",
    "use_cache",
)  # fmt: skip


def read_text_encoder(given: Mapping, where: str = "config") -> text_encoder.Config:
    """The config of a UMT5EncoderModel."""
    fields = _Fields(given, where, "UMT5EncoderModel")
    config = {
        "vocab_size": fields.take("vocab_size", int, 250112),
        "dim": fields.take("d_model", int, 512),
        "num_layers": fields.take("num_layers", int, 8),
        "num_heads": fields.take("num_heads", int, 6),
        "head_dim": fields.take("d_kv", int, 64),
        "mlp_dim": fields.take("d_ff", int, 1024),
        "num_buckets": fields.take("relative_attention_num_buckets", int, 32),
        "max_distance": fields.take("relative_attention_max_distance", int, 128),
    }
    fields.only(
        model_type="umt5", feed_forward_proj="gated-gelu", layer_norm_epsilon=1e-6,
        is_gated_act=True, dense_act_fn="gelu_new",
    )  # fmt: skip
    fields.ignore(*_UMT5_IGNORED)
    fields.finish()
    return text_encoder.Config(**config)


def write_text_encoder(config: text_encoder.Config) -> dict:
    """The config.json of the UMT5EncoderModel that computes the same."""
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


def read_vae(given: Mapping, where: str = "config") -> video_vae.Config:
    """The config of an AutoencoderKLWan, of Wan 2.1 or of Wan 2.2."""
    fields = _Fields(given, where, "AutoencoderKLWan")
    patch = fields.take("patch_size", int, None) or 1
    channels = 3 * patch**2
    fields.only(in_channels=channels, out_channels=channels, dropout=0.0)
    fields.only(attn_scales=[])
    config = video_vae.Config(
        latent_channels=fields.take("z_dim", int, 16),
        patch_size=patch,
        base_dim=fields.take("base_dim", int, 96),
        decoder_base_dim=fields.take("decoder_base_dim", int, None),
        channel_multipliers=fields.take("dim_mult", _ints, (1, 2, 4, 4)),
        num_res_blocks=fields.take("num_res_blocks", int, 2),
        temporal_downsample=fields.take(
            "temperal_downsample", _bools, (False, True, True)
        ),
        residual_shortcuts=fields.take("is_residual", bool, False),
        latent_mean=fields.take("latents_mean", _floats),
        latent_std=fields.take("latents_std", _floats),
    )
    fields.only(
        scale_factor_temporal=config.temporal_stride,
        scale_factor_spatial=config.spatial_stride,
    )
    fields.ignore("clip_output")
    fields.finish()
    return config


def write_vae(config: video_vae.Config) -> dict:
    """The config.json of the AutoencoderKLWan that computes the same."""
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
