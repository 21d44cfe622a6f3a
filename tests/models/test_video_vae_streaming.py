"""Videos in chunks, and frames that are split over devices, against one pass on one."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.core import mesh
from sora_jax.models import conv, streaming, video_vae

SIZES = {"latent_channels": 6, "base_dim": 8, "num_res_blocks": 1}
CONFIGS = {
    "toy": video_vae.Config(**SIZES),
    "wan 2.1": dataclasses.replace(video_vae.WAN_2_1, **SIZES),
    "wan 2.2": dataclasses.replace(video_vae.WAN_2_2, **SIZES, decoder_base_dim=8),
    "time alone": video_vae.Config(
        **SIZES, patch_size=4, spatial_downsample=(True, False)
    ),
}


@pytest.fixture(scope="module")
def make(build):
    vaes = {}

    def one(name: str) -> video_vae.VideoVAE:
        if name not in vaes:
            vaes[name] = build(
                lambda: video_vae.VideoVAE(CONFIGS[name], nnx.Rngs(0)), None
            )
        return vaes[name]

    return one


def noise(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def join(chunks):
    return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *chunks)


def parts(array, *lengths):
    ends = [0, *itertools.accumulate(lengths), array.shape[1]]
    return (array[:, a:b] for a, b in itertools.pairwise(ends))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_video_in_chunks_is_the_video_at_once(make, close, name):
    """Single latents; chunks and a rest; parts that are no chunks."""
    vae, stride = make(name), CONFIGS[name].spatial_stride
    clip, latents = noise(2, 21, 2 * stride, 3 * stride, 3), noise(2, 6, 2, 3, 6)
    moments = jax.jit(lambda vae, clip: vae.encode(clip))(vae, clip)
    video = jax.jit(lambda vae, latents: vae.decode(latents))(vae, latents)
    assert moments[0].shape == latents.shape and video.shape == clip.shape
    for chunk, source in ((1, None), (4, None), (4, (2, 0, 7, 1))):
        label = f"{name}, {chunk} at a time, parts {source}"
        encoded = list(
            vae.encode_stream(parts(clip, *source) if source else clip, chunk)
        )
        decoded = list(
            vae.decode_stream(parts(latents, *source[:2]) if source else latents, chunk)
        )
        sizes = [1] * 6 if chunk == 1 else [4, 2]
        assert [mean.shape[1] for mean, _ in encoded] == sizes
        assert [part.shape[1] for part in decoded] == [4 * sizes[0] - 3] + [
            4 * size for size in sizes[1:]
        ]
        for ours, whole in zip(join(encoded), moments, strict=True):
            close(f"{label}: moments", ours, whole, 1e-6)
        close(f"{label}: video", join(decoded), video, 1e-6)


def test_a_first_chunk_may_be_an_image(make, close):
    """What an image was encoded to goes on as a video, with the state that it left."""
    vae, clip = make("wan 2.1"), noise(1, 9, 16, 16, 3)
    run = jax.jit(lambda vae, *chunk: vae.encode_chunk(*chunk))
    (image, _), state = run(vae, clip[:, :1])
    (rest, _), _ = run(vae, clip[:, 1:], state)
    mean, _ = vae.encode(clip)
    close("an image and eight frames", join([image, rest]), mean, 1e-6)


def test_programs_are_compiled_once(make):
    """At most three for each direction, whatever the number of frames and of calls."""
    vae = make("toy")
    for stream, program, unit in (
        (vae.encode_stream, streaming._encode_chunk, 4),
        (vae.decode_stream, streaming._decode_chunk, 1),
    ):
        before = program._cache_size()
        channels = 3 if unit == 4 else 6
        for latents in (7, 13, 10, 7):  # chunks of 3 and one latent over
            frames = 1 + (latents - 1) * unit
            video = noise(1, frames, 8 * unit, 16 * unit // 4, channels)
            list(stream(video, 3))
        assert program._cache_size() - before == 3


def test_memory_does_not_grow_with_the_video(make):
    """33 and 481 frames hold the same arrays; parts are asked for when needed."""
    vae = make("toy")

    def live() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    def measure(stream, num_parts, part):
        asked = []
        source = (asked.append(i) or part for i in range(num_parts))
        peak = 0
        for done, _ in enumerate(stream(source, 4)):
            assert len(asked) <= (done + 2) * 4
            peak = max(peak, live())
        assert len(asked) == num_parts
        return peak

    latent = noise(1, 1, 1, 1, 6)
    short, long = (measure(vae.decode_stream, n, latent) for n in (9, 121))
    assert long == short
    frame = noise(1, 1, 8, 8, 3)
    short, long = (measure(vae.encode_stream, n, frame) for n in (33, 481))
    assert long == short


@pytest.mark.parametrize(
    "frames, chunk, message",
    [
        (13, 0, "at least 1"),
        (11, 2, "num_frames is 11.* 9 or 13"),
        (4, 2, "num_frames is 4.* 1 or 5"),
    ],
)
def test_a_video_that_ends_in_between_is_refused(make, frames, chunk, message):
    with pytest.raises(ValueError, match=message):
        list(make("toy").encode_stream(noise(1, frames, 8, 8, 3), chunk))


MESHES = {
    2: ({"ring": 2}, None),
    4: ({"fsdp": 2, "tensor": 2}, jax.P(None, None, "tensor", "fsdp")),
    8: ({"fsdp": 2, "ring": 2, "ulysses": 2}, jax.P("fsdp", None, ("ring", "ulysses"))),
}


@pytest.mark.parametrize("name", ["wan 2.1", "wan 2.2", "toy"])
@pytest.mark.parametrize("devices", MESHES)
def test_frames_over_devices_are_frames_on_one(make, close, spread, devices, name):
    """At once and in chunks; height, both sides, rows and height; one row on each."""
    vae, stride = make(name), CONFIGS[name].spatial_stride
    shape, layout = MESHES[devices]
    clip, latents = noise(2, 9, 4 * stride, 2 * stride, 3), noise(2, 3, 4, 2, 6)
    encode = jax.jit(lambda vae, clip: vae.encode(clip))
    decode = jax.jit(lambda vae, latents: vae.decode(latents))
    moments, video = encode(vae, clip), decode(vae, latents)
    with jax.set_mesh(mesh.make_mesh(shape, jax.devices()[:devices])):
        vae = spread(vae)
        split = [streaming.spread_frames(x, (4, 2), layout) for x in (clip, latents)]
        found = encode(vae, split[0]), decode(vae, split[1])
        for array in jax.tree.leaves(found):
            assert len(array.sharding.device_set) == devices
            rows = array.sharding.shard_shape(array.shape)
            assert np.prod(array.shape) == devices * np.prod(rows)
        streamed = (
            join(vae.encode_stream(clip, 2, layout)),
            join(vae.decode_stream(latents, 2, layout)),
        )
    for way, results in (("at once", found), ("in chunks", streamed)):
        for ours, one in zip(jax.tree.leaves(results), [*moments, video], strict=True):
            close(f"{name} on {devices}, {way}", ours, one, 1e-5)


def test_neighbours_exchange_borders_and_frames_are_not_gathered():
    clip, kernel = noise(1, 3, 16, 8, 4), noise(3, 3, 3, 4, 4)
    expected = conv.causal_conv3d(jnp.asarray(clip), jnp.asarray(kernel))
    with jax.set_mesh(mesh.make_mesh({"ring": 4, "tensor": 2})):
        layout = jax.P(None, None, "ring", "tensor")
        x = streaming.spread_frames(clip, (16, 8), layout)
        program = jax.jit(conv.causal_conv3d)
        y, text = program(x, kernel), program.lower(x, kernel).compile().as_text()
    assert "collective-permute" in text
    assert "all-gather" not in text and "all-to-all" not in text
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_gradients_pass_between_devices(make, spread, close):
    vae, clip = make("toy"), noise(1, 5, 16, 8, 3)
    graded = jax.jit(jax.grad(lambda vae, clip: jnp.sum(vae.encode(clip)[0] ** 2)))
    expected = graded(vae, clip)
    with jax.set_mesh(mesh.make_mesh({"ring": 2}, jax.devices()[:2])):
        found = graded(spread(vae), streaming.spread_frames(clip, (2, 1)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if np.any(b):
            close("gradient", a, b, 1e-4)


def test_a_size_that_does_not_divide_is_refused_with_one_that_does(make, spread):
    vae, layout = make("toy"), jax.P(None, None, "ring", "tensor")
    with jax.set_mesh(mesh.make_mesh({"ring": 4, "tensor": 2})):
        vae = spread(vae)
        for size, message in (
            ((48, 16), "height of 48 has 6 .* 4 devices; a multiple of 32 .* 64"),
            ((32, 24), "width of 24 has 3 .* 2 devices; a multiple of 16 .* 32"),
        ):
            with pytest.raises(ValueError, match=message):
                next(vae.encode_stream(noise(1, 1, *size, 3), 1, layout))
        with pytest.raises(ValueError, match="height of 6 .* multiple of 4 .* 8"):
            next(vae.decode_stream(noise(1, 1, 6, 2, 6), 1, layout))
        clip = jax.device_put(noise(1, 1, 48, 16, 3), layout)
        with pytest.raises(ValueError, match="height of 48 has 6"):
            vae.encode(clip)


def test_axes_that_rows_leave_free_split_what_divides():
    def layout(shape, rows, latent_size):
        made = mesh.make_mesh(shape, jax.devices()[: np.prod([*shape.values()])])
        with jax.set_mesh(made):
            x = streaming.spread_frames(noise(rows, 1, *latent_size, 1), latent_size)
            return tuple(x.sharding.spec)[:4]

    every = ("replica", "fsdp")
    assert layout({"fsdp": 4, "ring": 2}, 4, (6, 4)) == (every, None, ("ring",), None)
    assert layout({"fsdp": 8}, 1, (60, 104)) == (None, None, None, ("fsdp",))
    assert layout({"ring": 2, "ulysses": 4}, 1, (6, 8)) == (
        every, None, ("ring",), ("ulysses",),
    )  # fmt: skip
    assert layout({"ulysses": 4}, 3, (3, 5)) == (every, None, None, None)
