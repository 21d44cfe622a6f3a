"""Names and layouts of the peers' weights, and the denoiser against Wan's."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.core import trees
from sora_jax.models import (
    dit,
    exchange,
    peer_configs,
    rows,
    text_encoder,
    video_vae,
)

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"
WAN_1_3B = dit.Config(mask_text=False, known_embedding=False, pooled_text=False)
# What the denoiser has beyond Wan, by the path of the parameter.
OURS = {"known", "context", "pooled_text.kernel", "pooled_text.bias"}


def shapes(make):
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(make), nnx.Param))


def fit(make, export, config):
    """Returns {their name: shape} of what our class holds at a config's sizes."""
    flat = jax.eval_shape(lambda params: export(params, config), shapes(make))
    return {name: list(array.shape) for name, array in flat.items()}


def make_dit(config):
    return lambda: dit.DiT(config, rngs=nnx.Rngs(0))


def make_vae(config):
    return lambda: video_vae.VideoVAE(config, nnx.Rngs(0))


def make_text_encoder(config):
    return lambda: text_encoder.TextEncoder(config, nnx.Rngs(0))


@pytest.mark.parametrize(
    "peer, make, export, config",
    [
        (
            "WanTransformer3DModel",
            make_dit,
            exchange.TRANSFORMER.export,
            WAN_1_3B,
        ),
        (
            "AutoencoderKLWan",
            make_vae,
            exchange.VAE.export,
            video_vae.WAN_2_1,
        ),
        (
            "UMT5EncoderModel",
            make_text_encoder,
            exchange.TEXT_ENCODER.export,
            text_encoder.UMT5_XXL,
        ),
    ],
)
def test_one_parameter_for_each_of_wan_2_1_1_3b(peer, make, export, config):
    """Each name and shape of the peer has one array of ours, and none is left over.

    Export refuses a parameter that has no place, so equality is both directions.
    """
    names = json.loads((GOLDEN / "wan_2_1_1_3b_names.json").read_text())
    assert fit(make(config), export, config) == names[peer]


def test_what_is_ours_beyond_wan_is_listed():
    full = dataclasses.replace(
        WAN_1_3B, known_embedding=True, context_embedding=True, pooled_text=True
    )
    ours = trees.flatten(shapes(make_dit(full)))
    wan = trees.flatten(shapes(make_dit(WAN_1_3B)))
    assert set(ours) - set(wan) == OURS
    assert not set(wan) - set(ours)
    assert {path.split(".")[0] for path in OURS} == set(exchange.TRANSFORMER.beyond)


def random_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), tree)


SMALL_DIT = dit.Config(
    in_channels=3, out_channels=5, dim=24, num_layers=2, num_heads=2, mlp_dim=20,
    text_dim=10, freq_dim=8, mask_text=False, known_embedding=False, pooled_text=False,
)  # fmt: skip
SMALL_VAE = video_vae.Config(base_dim=8, decoder_base_dim=16, latent_channels=6)
SMALL_WAN_2_1 = dataclasses.replace(
    video_vae.WAN_2_1, base_dim=4, latent_channels=5, num_res_blocks=1
)
SMALL_TEXT = text_encoder.Config(
    vocab_size=11, dim=12, num_layers=2, num_heads=3, head_dim=5, mlp_dim=14
)
KINDS = {
    "transformer": (
        make_dit,
        SMALL_DIT,
        exchange.TRANSFORMER.export,
        exchange.TRANSFORMER.restore,
    ),
    "vae": (
        make_vae,
        SMALL_VAE,
        exchange.VAE.export,
        exchange.VAE.restore,
    ),
    "wan 2.1 vae": (
        make_vae,
        SMALL_WAN_2_1,
        exchange.VAE.export,
        exchange.VAE.restore,
    ),
    "text encoder": (
        make_text_encoder,
        SMALL_TEXT,
        exchange.TEXT_ENCODER.export,
        exchange.TEXT_ENCODER.restore,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_the_same(kind):
    make, config, export, restore = KINDS[kind]
    params = random_like(shapes(make(config)))
    back = restore(export(params, config), config)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_does_not_fit_is_named_at_once(kind):
    make, config, export, restore = KINDS[kind]
    flat = export(random_like(shapes(make(config))), config)
    missing, misshaped, *_ = sorted(flat)
    del flat[missing]
    flat[misshaped] = flat[misshaped][..., None]
    flat["surplus.weight"] = np.zeros(1)
    with pytest.raises(ValueError) as error:
        restore(flat, config)
    message = str(error.value)
    assert f"missing: {missing};" in message
    assert "unexpected: surplus.weight;" in message
    assert f"of another shape: {misshaped} {flat[misshaped].shape}" in message


def test_of_a_thousand_names_that_do_not_fit_some_are_told():
    """A config of more layers than the file has: a sentence, and no page of names."""
    config = dataclasses.replace(SMALL_DIT, num_layers=40)
    flat = exchange.TRANSFORMER.export(
        random_like(shapes(make_dit(SMALL_DIT))), SMALL_DIT
    )
    with pytest.raises(ValueError, match=r"\(and 1\d\d\d more\)") as error:
        exchange.TRANSFORMER.check(flat, config)
    assert "missing: blocks.10.attn1.norm_k.weight, blocks.10" in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("kind", KINDS)
def test_export_leaves_nothing_out(kind):
    make, config, export, _ = KINDS[kind]
    params = random_like(shapes(make(config)))
    params["surplus"] = {"kernel": np.zeros(1)}
    with pytest.raises(ValueError, match="unexpected: surplus.kernel"):
        export(params, config)


def test_embeddings_may_have_either_of_their_names():
    make, config, export, restore = KINDS["text encoder"]
    flat = export(random_like(shapes(make(config))), config)
    expected = restore(flat, config)
    both = flat | {"encoder.embed_tokens.weight": flat["shared.weight"]}
    other = dict(both)
    del other["shared.weight"]
    for form in (both, other):
        table = restore(form, config)["embedding"]["table"]
        np.testing.assert_array_equal(table, expected["embedding"]["table"])
    both["encoder.embed_tokens.weight"] = flat["shared.weight"] + 1
    with pytest.raises(ValueError, match="they differ"):
        restore(both, config)


def test_export_names_what_wan_cannot_express():
    config = dataclasses.replace(
        SMALL_DIT, known_embedding=True, pooled_text=True, mask_text=True
    )
    params = random_like(shapes(make_dit(config)))
    params["pooled_text"]["bias"][:] = 0
    with pytest.raises(ValueError) as error:
        exchange.TRANSFORMER.export(params, config)
    for name in ("known", "pooled_text.kernel", "config.mask_text"):
        assert name in str(error.value)
    assert "pooled_text.bias" not in str(error.value)


@pytest.mark.parametrize(
    "form",
    [
        {"mask_text": True},
        {"num_kv_heads": 1},
        {"additive_positions": True},
        {"input_skip": True},
        {"rope_theta": 100.0},
        {"time_scale": 2.0},
    ],
)
def test_export_names_a_form_that_wan_does_not_have(form):
    params = random_like(shapes(make_dit(SMALL_DIT)))
    config = dataclasses.replace(SMALL_DIT, **form)
    with pytest.raises(ValueError, match=f"express config.{next(iter(form))} of"):
        exchange.TRANSFORMER.export(params, config)


@pytest.mark.parametrize(
    "kind, form",
    [
        ("transformer", {"time_scale": 2.0}),
        ("vae", {"spatial_downsample": (True, False)}),
        ("vae", {"linear_channels": 1}),
        ("text encoder", {"absolute_positions": True}),
    ],
)
def test_import_into_a_form_that_the_peer_does_not_have_is_refused(kind, form):
    """The shapes fit, but what would be computed is something else."""
    make, config, export, restore = KINDS[kind]
    flat = export(random_like(shapes(make(config))), config)
    with pytest.raises(ValueError, match=f"cannot express config.{next(iter(form))}"):
        restore(flat, dataclasses.replace(config, **form))


def test_import_leaves_what_is_ours_at_zero():
    config = dataclasses.replace(SMALL_DIT, known_embedding=True, pooled_text=True)
    params = random_like(shapes(make_dit(SMALL_DIT)))
    flat = exchange.TRANSFORMER.export(params, SMALL_DIT)
    loaded = exchange.TRANSFORMER.restore(flat, config)
    assert not np.any(loaded["known"]) and not np.any(loaded["pooled_text"]["kernel"])
    again = exchange.TRANSFORMER.export(loaded, config)
    assert all(np.array_equal(again[name], flat[name]) for name in flat)


CASES = [
    "transformer",
    "transformer_without_cross_norm",
    "transformer_one_head",
    "transformer_whole_patches",
    "transformer_patches_of_time",
    "transformer_deep",
]


@pytest.mark.peers
@pytest.mark.parametrize(
    "name, beyond", [(name, False) for name in CASES] + [(CASES[0], True)]
)
def test_velocities_and_gradients_are_those_of_wan(goldens, build, close, name, beyond):
    """With and without our additions; one noise level, and one for each token."""
    golden = goldens[name]
    config = peer_configs.read_transformer(golden.case["config"])
    config = dataclasses.replace(config, known_embedding=beyond, pooled_text=beyond)
    params = exchange.TRANSFORMER.restore(golden.weights, config)
    graph, state = nnx.split(build(make_dit(config), params))

    @jax.jit
    def apply(state, latents, levels, text, mask, known=None):
        row = rows.of_video(config, latents, levels, text, mask, known_bn=known)
        velocity = nnx.merge(graph, state)(row)
        return rows.to_video(velocity, latents.shape[1:4], config.patch)

    for i, size in enumerate(golden.case["latents"]):
        latents = jnp.moveaxis(jnp.asarray(golden.inputs[f"latents{i}"]), 1, -1)
        text = jnp.asarray(golden.inputs[f"text{i}"])
        mask = jnp.any(text != 0, axis=-1)
        tau = jnp.asarray(golden.inputs[f"timestep{i}"])[:, None] / 1000
        velocity = apply(state, latents, tau, text, mask)
        expected = np.moveaxis(golden.outputs[f"velocity{i}"], 1, -1)
        close(f"velocity of {size}", velocity, expected, 1e-5)
        # The first frame's tokens have level 0; they count as known ones.
        first = jnp.zeros(latents.shape[:-1], bool).at[:, : config.patch[0]].set(True)
        levels = jnp.concatenate([tau, jnp.zeros_like(tau)], axis=1)
        inputs = latents, levels, text, mask, rows.known_tokens(first, config.patch)
        expected = np.moveaxis(golden.outputs[f"velocity_per_token{i}"], 1, -1)
        close(f"velocity of {size}, two levels", apply(state, *inputs), expected, 1e-5)

    weight = jnp.moveaxis(jnp.asarray(golden.inputs["weight"]), 1, -1)
    gradient = jax.grad(lambda state: jnp.sum(apply(state, *inputs) * weight))(state)
    found = {
        path: array
        for path, array in trees.flatten(nnx.to_pure_dict(gradient)).items()
        if path.split(".")[0] not in exchange.TRANSFORMER.beyond
    }
    wanted = {
        entry.theirs: entry.export(found[entry.ours])
        for entry in exchange.TRANSFORMER.entries(config)
    }
    for theirs, array in wanted.items():
        close(f"gradient of {theirs}", array, golden.outputs[f"gradient/{theirs}"])
