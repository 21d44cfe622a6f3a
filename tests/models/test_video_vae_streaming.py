"""Videos in chunks, and frames that are split over devices, against one pass on one."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.core import mesh
from sora_jax.models import conv, streaming, video_vae

SIZES = {"latent_channels": 6, "base_dim": 8, "num_res_blocks": 1}
STEP = {"channel_multipliers": (1, 1), "temporal_downsample": (True,)}
CONFIGS = {
    "wan 2.1": dataclasses.replace(video_vae.WAN_2_1, **SIZES),
    "wan 2.2": dataclasses.replace(video_vae.WAN_2_2, **SIZES, decoder_base_dim=8),
    "time alone": video_vae.Config(
        **SIZES, **STEP, patch_size=4, spatial_downsample=(False,)
    ),
    "shortcuts": video_vae.Config(**SIZES, **STEP),
    "linear path": video_vae.Config(**SIZES, **STEP, linear_channels=4),
    "no shortcuts": video_vae.Config(
        **SIZES, **STEP, patch_size=1, residual_shortcuts=False
    ),
}


@pytest.fixture(scope="module")
def make(build):
    return functools.cache(
        lambda name: build(lambda: video_vae.VideoVAE(CONFIGS[name], nnx.Rngs(0)))
    )


@jax.jit
def encode(vae, clip):
    return vae.encode(clip)


@jax.jit
def decode(vae, latents):
    return vae.decode(latents)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def join(chunks):
    return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *chunks)


def parts(array, *lengths):
    ends = [0, *itertools.accumulate(lengths), array.shape[1]]
    return (array[:, a:b] for a, b in itertools.pairwise(ends))


@pytest.mark.parametrize(
    "name, num_latents, chunk, lengths",
    [
        ("wan 2.1", 4, 2, ()),
        ("wan 2.2", 4, 2, ()),
        ("time alone", 3, 1, ()),
        ("linear path", 3, 1, ()),
        ("shortcuts", 7, 3, (2, 0, 4)),  # a rest, and parts that are no chunks
    ],
)
def test_a_video_in_chunks_is_the_video_at_once(
    make, close, name, num_latents, chunk, lengths
):
    vae, config = make(name), CONFIGS[name]
    stride, time = config.spatial_stride, config.temporal_stride
    num_frames = 1 + time * (num_latents - 1)
    clip = noise(2, num_frames, 2 * stride, 3 * stride, 3)
    latents = noise(2, num_latents, 2, 3, 6)
    moments, video = encode(vae, clip), decode(vae, latents)
    assert moments[0].shape == latents.shape and video.shape == clip.shape
    encoded = [*vae.encode_stream(parts(clip, *lengths) if lengths else clip, chunk)]
    source = parts(latents, *lengths) if lengths else latents
    decoded = [*vae.decode_stream(source, chunk)]
    sizes = [
        len(range(i, min(i + chunk, num_latents))) for i in range(0, num_latents, chunk)
    ]
    assert [mean.shape[1] for mean, _ in encoded] == sizes
    ends = [1 + time * (size - 1) for size in itertools.accumulate(sizes)]
    assert [*itertools.accumulate(part.shape[1] for part in decoded)] == ends
    for what, ours, whole in zip(
        ("mean", "logvar"), join(encoded), moments, strict=True
    ):
        close(f"{name} {what}", ours, whole, 1e-5)
    close(f"{name} video", join(decoded), video, 1e-5)


def test_a_video_may_go_on_from_an_image(make, close):
    """The state that an image left is that of a video's first frame."""
    vae, clip = make("shortcuts"), noise(2, 5, 8, 12, 3)
    run = jax.jit(lambda vae, *chunk: vae.encode_chunk(*chunk))
    (image, _), state = run(vae, clip[:, :1])
    (rest, _), _ = run(vae, clip[:, 1:], state)
    close("an image and four frames", join([image, rest]), encode(vae, clip)[0], 1e-5)


def test_neither_memory_nor_programs_grow_with_the_video(make, monkeypatch):
    """Of 33 and of 481 frames: parts are asked for when needed, arrays are let go."""
    vae = make("shortcuts")
    traces = []

    def count(name):
        traced = getattr(video_vae.VideoVAE, name)

        def counted(*arguments):
            traces.append(name)
            return traced(*arguments)

        monkeypatch.setattr(video_vae.VideoVAE, name, counted)

    def measure(stream, num_parts, part, unit):
        asked, peak = [], 0
        source = (asked.append(i) or part for i in range(num_parts))
        for done, _ in enumerate(stream(source, 4)):
            assert len(asked) <= (done + 1) * 4 * unit
            peak = max(peak, sum(array.nbytes for array in jax.live_arrays()))
        assert len(asked) == num_parts
        return peak

    for way, part, unit in (
        ("encode", noise(1, 1, 8, 8, 3), 2),
        ("decode", noise(1, 1, 2, 2, 6), 1),
    ):
        count(f"{way}_chunk")
        stream = getattr(vae, f"{way}_stream")
        counts = [1 + frames // 2 * unit for frames in (32, 480, 32)]
        assert len({measure(stream, count, part, unit) for count in counts}) == 1
        # One program for the first, the next and the last chunk, and for all calls.
        assert traces == [f"{way}_chunk"] * 3
        traces.clear()


@pytest.mark.parametrize(
    "frames, chunk, message",
    [
        (13, 0, "at least 1"),
        (4, 4, "num_frames is 4.* 3 or 5"),
    ],
)
def test_a_video_that_ends_in_between_is_refused(make, frames, chunk, message):
    with pytest.raises(ValueError, match=message):
        list(make("shortcuts").encode_stream(noise(1, frames, 8, 8, 3), chunk))


@pytest.mark.parametrize(
    "name, shape, layout",
    [
        ("no shortcuts", {"ring": 1}, jax.P(None, None, "ring", "tensor")),
        ("no shortcuts", {"ring": 2}, None),
        ("shortcuts", {"fsdp": 2, "tensor": 2}, jax.P(None, None, "tensor", "fsdp")),
        pytest.param(
            *("no shortcuts", {"fsdp": 2, "ring": 4}, jax.P("fsdp", None, "ring")),
            marks=pytest.mark.slow,
        ),
        ("linear path", {"fsdp": 2, "ring": 4}, jax.P("fsdp", None, "ring")),
    ],
)
def test_frames_over_devices_are_frames_on_one(
    make, close, spread, name, shape, layout
):
    """Rows, height and width over 2, 4 and 8 devices, down to a row on each."""
    vae, stride = make(name), CONFIGS[name].spatial_stride
    clip, latents = noise(2, 5, 4 * stride, 6 * stride, 3), noise(2, 3, 4, 6, 6)
    moments, video = encode(vae, clip), decode(vae, latents)
    devices = jax.devices()[: np.prod([*shape.values()])]
    with jax.set_mesh(mesh.make_mesh(shape, devices)):
        vae = spread(vae)
        split = [streaming.shard_frames(x, (4, 6), layout) for x in (clip, latents)]
        found = jax.tree.leaves([encode(vae, split[0]), decode(vae, split[1])])
        for array in found:
            held = np.prod(array.sharding.shard_shape(array.shape))
            assert held * len(devices) == array.size
        if len(devices) == 8:
            stream = join(vae.decode_stream(latents, 2, layout))
            close("video in chunks on 8", stream, video, 1e-5)
    for ours, one in zip(found, [*moments, video], strict=True):
        close(f"{name} on {len(devices)}", ours, one, 1e-5)


def test_neighbours_exchange_borders_and_frames_are_not_gathered(close):
    clip, kernel = noise(1, 3, 16, 8, 4), noise(3, 3, 3, 4, 4)

    @jax.jit
    def graded(clip, kernel):
        def loss(clip, kernel):
            y = conv.causal_conv3d(clip, kernel)
            return jnp.sum(y**2), y

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(clip, kernel)

    expected = graded(clip, kernel)
    with jax.set_mesh(mesh.make_mesh({"ring": 4, "tensor": 2})):
        x = streaming.shard_frames(clip, (16, 8), jax.P(None, None, "ring", "tensor"))
        found = graded(x, kernel)
        text = jax.jit(conv.causal_conv3d).lower(x, kernel).compile().as_text()
        voxels = jax.jit(conv.join_voxels)(x)
        assert voxels.sharding.spec[1] == "ring"  # attention's queries stay split
    assert "collective-permute" in text
    assert "all-gather" not in text and "all-to-all" not in text
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        close("values and gradients", a, b, 1e-5)


def test_a_size_that_does_not_divide_is_refused_with_one_that_does(make, spread):
    vae, layout = make("shortcuts"), jax.P(None, None, "ring", "tensor")
    with jax.set_mesh(mesh.make_mesh({"ring": 4, "tensor": 2})):
        vae = spread(vae)
        for size, message in (
            ((24, 8), "height of 24 has 6 .* 4 devices; a multiple of 16 .* 32"),
            ((16, 12), "width of 12 has 3 .* 2 devices; a multiple of 8 .* 16"),
        ):
            with pytest.raises(ValueError, match=message):
                next(vae.encode_stream(noise(1, 1, *size, 3), 1, layout))
        with pytest.raises(ValueError, match="height of 6 .* multiple of 4 .* 8"):
            next(vae.decode_stream(noise(1, 1, 6, 2, 6), 1, layout))
        clip = jax.device_put(noise(1, 1, 24, 8, 3), layout)
        with pytest.raises(ValueError, match="height of 24 has 6"):
            vae.encode(clip)


def test_axes_that_rows_leave_free_split_what_divides():
    def layout(shape, rows, latent_size):
        made = mesh.make_mesh(shape, jax.devices()[: np.prod([*shape.values()])])
        with jax.set_mesh(made):
            x = streaming.shard_frames(noise(rows, 1, *latent_size, 1), latent_size)
            return tuple(x.sharding.spec)[:4]

    every = ("replica", "fsdp")
    assert layout({"fsdp": 4, "ring": 2}, 4, (6, 4)) == (every, None, "ring", None)
    assert layout({"fsdp": 8}, 1, (60, 104)) == (None, None, None, "fsdp")
    assert layout({"ring": 2, "ulysses": 2}, 1, (6, 8)) == (
        every, None, "ring", "ulysses",
    )  # fmt: skip
    assert layout({"ulysses": 4}, 3, (3, 5)) == (every, None, None, None)
