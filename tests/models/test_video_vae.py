"""The video VAE against AutoencoderKLWan, and what holds beside it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.core import mesh, sharding, trees
from sora_jax.models import conv, exchange, video_vae

TINY = video_vae.Config(base_dim=8, latent_channels=6, num_res_blocks=1)


def peer_config(case):
    return video_vae.Config(
        latent_channels=case["z_dim"],
        patch_size=case.get("patch_size", 1),
        base_dim=case["base_dim"],
        decoder_base_dim=case.get("decoder_base_dim"),
        channel_multipliers=tuple(case["dim_mult"]),
        num_res_blocks=case["num_res_blocks"],
        temporal_downsample=tuple(case["temperal_downsample"]),
        residual_shortcuts=case.get("is_residual", False),
    )


def make(config):
    return lambda: video_vae.VideoVAE(config, nnx.Rngs(0))


@pytest.mark.peers
@pytest.mark.parametrize("name", ["wan_2_1_vae", "wan_2_2_vae", "toy_vae"])
def test_encode_and_decode_are_those_of_wan(goldens, build, close, name):
    """Images and clips in one pass; the peer goes frame by frame with its caches."""
    golden = goldens[name]
    config = peer_config(golden.case["config"])
    params = exchange.VAE.restore(golden.weights, config)
    vae = build(make(config), params)
    encode = jax.jit(lambda vae, video: vae.encode(video))
    decode = jax.jit(lambda vae, latents: jnp.clip(vae.decode(latents), -1, 1))
    for i, (b, t, h, w) in enumerate(golden.case["videos"]):
        size = f"{name} {b}x{t}x{h}x{w}"
        video, latents, mean, logvar, decoded = (
            jnp.moveaxis(array, 1, -1)
            for array in (
                golden.inputs[f"video{i}"],
                golden.inputs[f"latents{i}"],
                golden.outputs[f"mean{i}"],
                golden.outputs[f"logvar{i}"],
                golden.outputs[f"video{i}"],
            )
        )
        moments = encode(vae, video)
        assert latents.shape[1:] == config.latent_shape(t, h, w)
        close(f"{size} mean", moments[0], mean, 1e-5)
        close(f"{size} logvar", moments[1], logvar, 1e-5)
        close(f"{size} video", decode(vae, latents), decoded, 1e-5)


@pytest.fixture(scope="module")
def tiny(build):
    return build(make(TINY))


@pytest.fixture(scope="module")
def encode(tiny):
    return jax.jit(tiny.encode)


@pytest.fixture(scope="module")
def decode(tiny):
    return jax.jit(tiny.decode)


def video(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.uniform(-1, 1, (*shape, 3)), jnp.float32)


def test_later_frames_change_no_earlier_latent_by_a_bit(encode):
    clip = video(1, 13, 16, 16)
    before = encode(clip)
    for frame in (1, 4, 5, 9, 12):
        after = encode(clip.at[:, frame:].set(video(1, 13 - frame, 16, 16, seed=1)))
        same = (frame + 3) // 4  # latents whose frames all come before
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a[:, :same], b[:, :same])
            assert np.all(np.any(a[:, same:] != b[:, same:], axis=(2, 3, 4)))


def test_later_latents_change_no_earlier_frame_by_a_bit(decode):
    latents = jax.random.normal(jax.random.key(0), (1, 4, 2, 2, 6))
    before = decode(latents)
    for place in (1, 2, 3):
        after = decode(latents.at[:, place].add(1.0))
        same = 4 * place - 3
        np.testing.assert_array_equal(before[:, :same], after[:, :same])
        assert np.all(np.any(before[:, same:] != after[:, same:], axis=(2, 3, 4)))


def test_steps_may_halve_time_alone(build):
    config = dataclasses.replace(TINY, patch_size=4, spatial_downsample=(True, False))
    folded, clip = build(make(config)), video(1, 9, 16, 16)
    through = jax.jit(lambda vae, clip: vae.decode(vae.encode(clip)[0]))
    mean, _ = jax.jit(folded.encode)(clip)
    assert mean.shape[1:] == config.latent_shape(9, 16, 16) == (3, 2, 2, 6)
    before = through(folded, clip)
    after = through(folded, clip.at[:, 5:].set(0.5))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert before.shape == clip.shape and np.any(before[:, 5:] != after[:, 5:])


def test_an_image_is_the_first_frame(encode):
    clip = video(1, 13, 16, 16)
    image_mean, _ = encode(clip[:, :1])
    clip_mean, _ = encode(clip)
    np.testing.assert_allclose(image_mean, clip_mean[:, :1], atol=1e-5)


@pytest.mark.parametrize(
    "size, nearest",
    [
        ((4, 16, 16), "1 or 5"),
        ((6, 16, 16), "5 or 9"),
        ((0, 16, 16), "1 or 5"),
        ((5, 20, 16), "16 x 16"),
        ((5, 16, 29), "16 x 32"),
        ((5, 3, 16), "8 x 16"),
    ],
)
def test_an_impossible_size_is_refused_with_the_nearest(tiny, size, nearest):
    with pytest.raises(ValueError, match=nearest):
        tiny.encode(jnp.zeros((1, *size, 3)))


def test_strides_of_the_layouts():
    for config, time, space in (
        (video_vae.Config(), 4, 8),
        (video_vae.Config(patch_size=4, spatial_downsample=(False, False)), 4, 4),
        (video_vae.WAN_2_1, 4, 8),
        (video_vae.WAN_2_2, 4, 16),
    ):
        assert (config.temporal_stride, config.spatial_stride) == (time, space)
    assert video_vae.WAN_2_2.latent_shape(121, 704, 1280) == (31, 44, 80, 48)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temporal_downsample": (True,)}, "2 steps"),
        ({"spatial_downsample": (True,)}, "2 steps"),
        (
            {"temporal_downsample": (True, False), "spatial_downsample": (True, False)},
            "must halve time, or height and width",
        ),
        (
            {"residual_shortcuts": False, "spatial_downsample": (True, False)},
            "every step must halve space",
        ),
        ({"latent_mean": (0.0, 1.0)}, "6 latent channels"),
        ({"channel_multipliers": (1, 2, 3)}, "16 and 24"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_normalize_uses_the_statistics_of_the_config(tiny, build):
    mean, std = tuple(range(6)), (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    config = dataclasses.replace(TINY, latent_mean=mean, latent_std=std)
    vae = build(make(config))
    latents = jnp.asarray(mean) + 3 * jnp.asarray(std)
    latents = jnp.broadcast_to(latents, (1, 2, 2, 2, 6))
    np.testing.assert_allclose(vae.normalize(latents), 3 * jnp.ones_like(latents))
    np.testing.assert_allclose(vae.denormalize(vae.normalize(latents)), latents)
    np.testing.assert_array_equal(tiny.normalize(latents), latents)


def test_a_new_vae_has_quiet_branches_and_latents():
    """Branches and the latent's noise begin at next to nothing, and grow by learning."""
    vae = jax.jit(make(TINY))()
    paths = trees.flatten(nnx.to_pure_dict(nnx.state(vae, nnx.Param)))
    quiet = [path for path, leaf in paths.items() if not np.any(leaf)]
    assert sum(path.endswith("conv2.kernel") for path in quiet) == 13
    assert sum(path.endswith("proj.kernel") for path in quiet) == 2
    logvar_bias = vae.quant_conv.bias[6:]
    np.testing.assert_array_equal(logvar_bias, -10.0 * np.ones(6))


@pytest.mark.parametrize("missing", [2, 1, 0])
@pytest.mark.parametrize(
    "size", [(1, 6, 5), (2, 6, 5), (5, 3, 3), (1, 2, 7), (5, 2, 2), (2, 1, 1)]
)
def test_all_forms_of_the_convolution_are_one(size, missing):
    """The CPU's form, and its form for tiny frames, against XLA's direct one.

    With two, one and none of the frames before the first ones missing.
    """
    rng = np.random.default_rng(0)
    t, h, w = size
    x, kernel, weight = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in (
            (2, t + 2 - missing, h, w, 4),
            (3, 3, 3, 4, 5),
            (2, *size, 5),
        )
    )

    def graded(form):
        def loss(x, kernel):
            y = form(x, kernel, missing=missing)
            return jnp.sum(y * weight), y

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, kernel)

    ours, direct = graded(conv.causal_conv3d), graded(conv._direct)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(direct), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_form_of_the_convolution_follows_the_target():
    """A TPU's program, lowered on a CPU host, holds one 3D convolution."""
    x, kernel = jnp.zeros((1, 5, 8, 8, 4)), jnp.zeros((3, 3, 3, 4, 4))
    traced = jax.jit(conv.causal_conv3d).trace(x, kernel)
    counts = {
        platform: traced.lower(lowering_platforms=(platform,))
        .as_text()
        .count("stablehlo.convolution")
        for platform in ("cpu", "tpu", "cuda")
    }
    # One for the first frame, which sees no other, and four for each two that follow.
    assert counts == {"cpu": 5, "tpu": 1, "cuda": 1}


def test_no_loop_over_time(tiny):
    clip = video(1, 17, 16, 16)
    text = jax.jit(lambda v: tiny.decode(tiny.encode(v)[0])).lower(clip).as_text()
    assert "convolution" in text and "while" not in text


def test_a_mesh_changes_nothing(build, spread):
    config = dataclasses.replace(
        TINY, channel_multipliers=(1, 1), temporal_downsample=(True,)
    )
    vae, clip = build(make(config)), video(4, 3, 8, 8)

    def loss(vae, clip):
        mean, logvar = vae.encode(clip)
        decoded = vae.decode(mean + jnp.exp(0.5 * logvar))
        return jnp.sum(jnp.square(decoded - clip)), (mean, decoded)

    graded = jax.jit(jax.value_and_grad(loss, has_aux=True))
    expected = graded(vae, clip)
    with jax.set_mesh(mesh.make_mesh({"replica": 2, "fsdp": 2, "tensor": 2})):
        value = graded(spread(vae), sharding.reshard(clip, "batch", *[None] * 4))
        (_, (mean, decoded)), grads = value
        for activation in (mean, decoded):
            assert jax.typeof(activation).sharding.spec[0] == ("replica", "fsdp")
        kernel = grads.decoder.mid_block.resnets[0].conv1.kernel[...]
        assert jax.typeof(kernel).sharding.spec[-1] == ("fsdp", "ring", "ulysses")
    for a, b in zip(jax.tree.leaves(value), jax.tree.leaves(expected), strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale)


def test_half_precision_computes_in_half_and_answers_in_single(encode, build):
    half = build(make(dataclasses.replace(TINY, dtype="bfloat16")))
    clip = video(1, 13, 16, 16)  # as in other tests, so that it is compiled
    mean, _ = jax.jit(half.encode)(clip)
    expected, _ = encode(clip)
    assert mean.dtype == jnp.float32
    error = np.linalg.norm(mean - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.05
