"""Config files of the peers: what is read, what contradicts, what is only not known."""

import dataclasses
import json
import math
import pathlib

import pytest

from sora_jax.models import dit, identity, peer_configs, text_encoder, video_vae

# The files of the folder `t2v` that tests/oracle/wan_pipeline.py writes, by release.
RELEASES = json.loads(
    (pathlib.Path(__file__).parents[1] / "golden" / "peer_configs.json").read_text()
)
OLDEST, *_, NEWEST = RELEASES
READERS = {
    "model_index.json": peer_configs.read_index,
    "scheduler/scheduler_config.json": peer_configs.read_scheduler,
    "transformer/config.json": peer_configs.read_transformer,
    "text_encoder/config.json": peer_configs.read_text_encoder,
    "vae/config.json": peer_configs.read_vae,
}
INDEX, SCHEDULER, TRANSFORMER, TEXT, VAE = READERS
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


def read(file, unknown=None, without=(), **changes):
    given = RELEASES[NEWEST][file] | changes
    given = {name: value for name, value in given.items() if name not in without}
    return READERS[file](given, file, unknown)


@pytest.mark.parametrize("file", READERS)
@pytest.mark.parametrize("release", RELEASES)
def test_every_release_says_the_same_and_has_no_unknown_field(release, file):
    found = READERS[file](RELEASES[release][file], file)
    assert found == read(file)


def test_sizes_are_those_of_the_files():
    found = read(TRANSFORMER)
    assert (found.dim, found.num_heads, found.mlp_dim, found.text_dim) == (
        24,
        2,
        48,
        32,
    )
    found = read(TEXT)
    assert (found.dim, found.head_dim, found.vocab_size) == (32, 8, 64)
    assert read(VAE).latent_std == (1.5, 0.7, 1.0, 2.0)
    assert read(SCHEDULER) == peer_configs.Scheduler("unipc", 5.0)
    assert peer_configs.read_scheduler(EULER) == peer_configs.Scheduler("euler", 3.0)
    assert read(INDEX).parts[:3] == ("transformer", "text_encoder", "vae")


@pytest.mark.parametrize("file", READERS)
def test_a_field_that_is_not_known_changes_nothing_and_is_told(file):
    """As the next release of a peer may add: of any type, beside all that it had."""
    fields = {"newer": True, "newest": [1, {"a": None}], "refiner": ["diffusers", "R"]}
    unknown = {}
    assert read(file, unknown, **fields) == read(file)
    assert unknown == {file: fields}
    told = peer_configs.describe(unknown)
    assert f"newer = True of {file}" in told and "newest = [1, {'a': None}]" in told
    with pytest.raises(
        ValueError, match="unknown fields of .*: newer, newest, refiner"
    ):
        read(file, **fields)


@pytest.mark.parametrize(
    "file, without, changes, message",
    [
        # Of the name of a field of ours, with another value.
        (TRANSFORMER, (), {"rope_theta": 1e6}, "rope_theta is .*, but .* with 10000.0"),
        (TRANSFORMER, (), {"num_kv_heads": 1}, "num_kv_heads is 1, but .* with 0"),
        (TRANSFORMER, (), {"quantization": "int8"}, "quantization is 'int8', but"),
        (VAE, (), {"temporal_downsample": [True] * 3}, "temporal_downsample is .*, but"),
        (TEXT, (), {"absolute_positions": True}, "absolute_positions is True, but"),
        # Known, with a value that is not computed with.
        (TRANSFORMER, (), {"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'; this"),
        (TRANSFORMER, (), {"eps": 1e-5}, "eps is 1e-05; .* with 1e-06 only"),
        (TEXT, (), {"dense_act_fn": "silu"}, "dense_act_fn is 'silu'"),
        (TEXT, (), {"hidden_size": 64}, "d_model is 32, but its alias hidden_size is 64"),
        (TEXT, (), {"quantization_config": {"bits": 4}}, "quantization_config is"),
        (VAE, (), {"scale_factor_spatial": 16}, "scale_factor_spatial is 16"),
        (SCHEDULER, (), {"solver_order": 3}, "solver_order is 3; .* with 2 only"),
        (SCHEDULER, (), {"shift_terminal": 0.1}, "shift_terminal is 0.1"),
        (SCHEDULER, ("prediction_type",), {}, "prediction_type is 'epsilon'"),
        # Perhaps a new name of one that no tensor's shape tells.
        (TRANSFORMER, ("eps",), {"norm_eps": 1e-5}, "lacks eps, .* names of it: norm_eps"),
        (TRANSFORMER, ("num_attention_heads",), {"heads": 2}, "lacks num_attention_heads"),
        (TEXT, ("relative_attention_max_distance",), {"far": 64}, "lacks relative_att"),
        (SCHEDULER, ("flow_shift",), {"level_shift": 3.0}, "lacks flow_shift, .*: level"),
    ],
)  # fmt: skip
def test_what_contradicts_is_refused(file, without, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        read(file, {}, without, **changes)
    assert str(error.value).startswith(file) and "\n" not in str(error.value)


def test_other_names_that_transformers_reads_are_read():
    renamed = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    without = ("d_model", "num_layers", "num_heads", "dtype")
    assert read(TEXT, None, without, torch_dtype="float32", **renamed) == read(TEXT)


WRONG = (
    (TRANSFORMER, "num_layers", (0, -1, 10**9, 2.0, True, "2", None, math.nan, [2], {})),
    (TRANSFORMER, "ffn_dim", (10**30, math.inf, -math.inf, 0)),
    (TRANSFORMER, "attention_head_dim", (0, 11, 10**9)),
    (TRANSFORMER, "patch_size", ("122", [0, 2, 2], [1, 2, 2.5], 2, {"a": 1})),
    (TRANSFORMER, "cross_attn_norm", ("false", 1, None)),
    (TRANSFORMER, "eps", (math.nan, None)),
    (TEXT, "d_model", (0, "x", 10**9)),
    (TEXT, "relative_attention_num_buckets", (0, 2, 3000)),
    (TEXT, "relative_attention_max_distance", (0, 1e2)),
    (VAE, "patch_size", (0, "2", 10**9)),
    (VAE, "dim_mult", ([], [1], [1] * 2000, [1, 1, 2, 0], 3)),
    (VAE, "temperal_downsample", ([0, 1, 1], [True], "abc", None)),
    (VAE, "latents_mean", ([], [0.0], [math.nan] * 4, ["0"] * 4, None)),
    (VAE, "latents_std", ([1.0, 0.0, 1.0, 1.0], [1.0, -1.0, 1.0, 1.0], [math.inf] * 4)),
    (SCHEDULER, "flow_shift", (0, -1, math.nan, math.inf, 10**30, "5", True, None)),
    (SCHEDULER, "_class_name", ("DDIMScheduler", None, 3, ["UniPCMultistepScheduler"])),
    (INDEX, "_class_name", ("WanImageToVideoPipeline", None, ["WanPipeline"], {})),
    (INDEX, "expand_timesteps", ("false", 1, [])),
    (INDEX, "boundary_ratio", (0.9, 0, 2, "x", math.nan, True)),
    (INDEX, "transformer_2", (["diffusers", "WanTransformer3DModel"], ["diffusers", None])),
    (INDEX, "vae", (None, [None, None], "vae", 3)),
)  # fmt: skip


@pytest.mark.parametrize(
    "file, name, value", [(f, n, v) for f, n, values in WRONG for v in values]
)
def test_a_wrong_value_is_refused_in_one_sentence(file, name, value):
    with pytest.raises(ValueError, match=file.replace(".", r"\.")) as error:
        read(file, {}, **{name: value})
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


# What a config says of how a network is computed, or of one thing in two ways.
SAME = {
    dit.Config(num_heads=12): (
        {"dtype": "bfloat16"}, {"remat": "dots"}, {"quantization": "int8"},
        {"num_kv_heads": 12}, {"temporal_stride": 2},
    ),
    text_encoder.Config(): ({"dtype": "bfloat16"},),
    video_vae.Config(): (
        {"dtype": "bfloat16"}, {"decoder_base_dim": 32},
        {"spatial_downsample": (True, True)},
        {"latent_mean": (0.0,) * 32}, {"latent_std": (1.0,) * 32},
    ),
}  # fmt: skip
OTHER = {
    dit.Config: {
        "in_channels": 8, "out_channels": 8, "patch": (2, 2, 2), "dim": 24,
        "num_layers": 3, "num_heads": 6, "num_kv_heads": 4, "mlp_dim": 7,
        "text_dim": 8, "freq_dim": 8, "cross_attn_norm": False, "mask_text": False,
        "known_embedding": False, "context_embedding": True, "pooled_text": False,
        "additive_positions": True,
        "input_skip": True, "rope_theta": 2.0, "time_scale": 1.0,
    },
    text_encoder.Config: {
        "vocab_size": 8, "dim": 8, "num_layers": 3, "num_heads": 2, "head_dim": 8,
        "mlp_dim": 8, "num_buckets": 8, "max_distance": 64, "absolute_positions": True,
    },
    video_vae.Config: {
        "video_channels": 4, "latent_channels": 8, "patch_size": 4, "base_dim": 64,
        "decoder_base_dim": 64, "channel_multipliers": (1, 1, 1),
        "num_res_blocks": 1, "temporal_downsample": (True, False),
        "spatial_downsample": (True, False), "residual_shortcuts": False,
        "linear_channels": 3, "latent_mean": (1.0,) * 32, "latent_std": (2.0,) * 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("config", SAME, ids=lambda config: type(config).__module__)
def test_a_network_is_what_its_weights_compute(config):
    """Every field either defines the network or is listed as one that does not."""
    same = identity.of(config)
    for changes in SAME[config]:
        assert identity.of(dataclasses.replace(config, **changes)) == same
    for name, value in OTHER[type(config)].items():
        other = dataclasses.replace(config, **{name: value})
        assert identity.of(other) != same, name
    told = {name for changes in SAME[config] for name in changes}
    assert told | set(OTHER[type(config)]) == {
        f.name for f in dataclasses.fields(config)
    }
