"""Attention in chunks against the reference: values, gradients, memory, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.core import mesh
from sora_jax.models import (
    attention,
    chunked_attention,
    splash_attention,
    vae_layers,
)

SMALL_TILES = splash_attention.Tiles((128, 256), (256, 128))


def draw(b, n, m, h, e, seed=0):
    rng = np.random.default_rng(seed)
    sizes = ((b, n, h, e), (b, m, h, e), (b, m, h, e))
    return tuple(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in sizes)


def ids(b, n, count, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, count, (b, n)))


def graded(form, **options):
    """A function that returns the result and the gradients of q, k and v."""

    def loss(q, k, v, *seen):
        y = form(q, k, v, *seen, **options)
        return jnp.sum(jnp.sin(3 * y)), y

    def run(q, k, v, *seen):
        gradient = jax.grad(loss, (0, 1, 2), has_aux=True)
        (dq, dk, dv), y = gradient(q, k, v, *seen)
        return y, dq, dk, dv

    return jax.jit(run)


def compare(close, found, expected, label=""):
    names = ("result", "dq", "dk", "dv")
    for name, a, b in zip(names, found, expected, strict=True):
        close(f"{label} {name}", a, b, 1e-6 if name == "result" else 1e-5)


def masks(kind, b, n, m):
    mask = ids(b, m, 4, seed=1) > 0
    segments = ids(b, n, 3, seed=2), ids(b, m, 3, seed=3)
    return {
        "all": (),
        "mask": (mask,),
        "segments": (None, *segments),
        "both": (mask, *segments),
        # No key of the last row, and none for the first row's segment 7.
        "no key": (mask.at[-1].set(False), segments[0].at[0, :3].set(7), segments[1]),
    }[kind]


@pytest.mark.parametrize("kind", ["all", "mask", "segments", "both", "no key"])
@pytest.mark.parametrize(
    # queries, keys, and bytes: one chunk, several, groups of rows, one query at a time,
    # and as many keys as have exponentials of their own
    "n, m, chunk_bytes",
    [
        (67, 67, 10**6),
        (67, 53, 8000),
        (301, 64, 40_000),
        (5, 300, 1),
        (9, chunked_attention._LONG, 20_000),
    ],
)
def test_values_and_gradients_are_the_references(close, kind, n, m, chunk_bytes):
    given = (*draw(2, n, m, 3, 8), *masks(kind, 2, n, m))
    found = graded(attention.chunked, chunk_bytes=chunk_bytes)(*given)
    compare(close, found, graded(attention.reference)(*given), kind)


def test_exponentials_are_those_of_float64():
    x = np.linspace(-100, 0, 1_000_001, dtype=np.float32)
    found = np.asarray(jax.jit(chunked_attention._exp)(x), np.float64)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(found - exact).max() < 2e-7 and found[-1] == 1
    # The polynomial, and what roundings of log 2 and of x / log 2 come to.
    far = np.abs(found / exact - 1) / (2.5e-7 - 8e-8 * x.astype(np.float64))
    assert far[x > -87].max() < 1
    low = jnp.float32([-127 * np.log(2) - 0.01, np.finfo(np.float32).min, -np.inf])
    assert (chunked_attention._exp(low) == 0).all()
    assert np.isnan(chunked_attention._exp(jnp.float32(np.nan)))


def test_scores_of_many_keys_are_arrays_of_their_own():
    for m, count in ((chunked_attention._LONG - 1, 0), (chunked_attention._LONG, 3)):
        lowered = jax.jit(attention.chunked).lower(*draw(1, 8, m, 1, 8))
        assert lowered.as_text().count("optimization_barrier") == count


def repeated(q, k, v, *seen):
    """Grouped-query attention by its definition: every head has keys of its own."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    return attention.reference(q, k, v, *seen)


@pytest.mark.parametrize("kind", ["all", "both"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("at_once", [0, 2**23])
def test_heads_share_keys(close, monkeypatch, kind, kv_heads, at_once):
    monkeypatch.setattr(attention, "_AT_ONCE_BYTES", at_once)
    q, k, v = draw(2, 67, 53, 8, 8)
    given = (q, k[:, :, :kv_heads], v[:, :, :kv_heads], *masks(kind, 2, 67, 53))
    found = graded(attention.attention)(*given)
    compare(close, found, graded(repeated)(*given), kind)


@pytest.mark.parametrize(
    "shape",
    [{"fsdp": 2, "ulysses": 2, "tensor": 2}, {"ring": 2, "ulysses": 4}],
    ids=str,
)
def test_heads_share_keys_on_devices(close, shape):
    q, k, v = draw(2, 64, 64, 16, 8)
    segments = jnp.tile(jnp.arange(64) // 20, (2, 1))
    given = (q, k[:, :, :4], v[:, :, :4], None, segments, segments)
    expected = graded(repeated)(*given)
    layout = jax.P("fsdp", ("ring", "ulysses"), "tensor", None)
    with jax.set_mesh(mesh.make_mesh({"fsdp": 1} | shape)):
        there = [jax.device_put(x, layout) for x in given[:3]]
        ids = jax.device_put(segments, jax.P(*layout[:2]))
        found = graded(attention.attention)(*there, None, ids, ids)
    compare(close, found, expected)


@pytest.mark.parametrize("size, by, bound", [(16, 1, 2e-2), (128, 3, 1.2e-2)])
def test_half_precision_sums_in_float32(close, size, by, bound):
    """The second size is one whose scale, rounded with the queries, would cost twice."""
    q, k, v = draw(2, 300, 300, 2, size)
    given = tuple(x.astype(jnp.bfloat16) for x in (by * q, by * k, v))
    exact = graded(attention.reference)(*(x.astype(jnp.float32) for x in given))
    found = graded(attention.chunked, chunk_bytes=40_000)(*given)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
    for name, a, b in zip(("result", "dq", "dk", "dv"), found, exact, strict=True):
        close(name, a.astype(jnp.float32), b, bound)


@pytest.mark.parametrize("kind", ["all", "mask", "segments", "both"])
def test_splash_is_the_reference(close, kind):
    """Interpreted: the kernel's arithmetic, not its speed. Odd sizes are padded."""
    given = (*draw(2, 200, 300, 2, 128), *masks(kind, 2, 200, 300))
    found = graded(attention.splash, tiles=SMALL_TILES, interpret=True)(*given)
    compare(close, found, graded(attention.reference)(*given), kind)


def test_splash_on_a_mesh_is_splash_on_one_device(close):
    qkv = draw(2, 256, 256, 2, 128)
    ids_bn = ids(2, 256, 3, seed=2)
    form = functools.partial(attention.splash, tiles=SMALL_TILES, interpret=True)
    expected = graded(attention.reference)(*qkv, None, ids_bn, ids_bn)
    with jax.set_mesh(mesh.make_mesh({"fsdp": 2, "ring": 2}, jax.devices()[:4])):
        split = [jax.device_put(x, jax.P("fsdp", "ring")) for x in qkv]
        rows = jax.device_put(ids_bn, jax.P("fsdp", "ring"))
        found = graded(form)(*split, None, rows, jax.reshard(rows, jax.P("fsdp")))
    compare(close, found, expected, "four")


def cut_small(monkeypatch, chunk_bytes: int) -> None:
    """Cuts the scores of small arrays into chunks of so many bytes too."""
    monkeypatch.setattr(attention, "_AT_ONCE_BYTES", 0)
    monkeypatch.setattr(chunked_attention, "BYTES", chunk_bytes)
    monkeypatch.setattr(attention, "_MIN_QUERIES", 1)


def memory(function, *given) -> int:
    return (
        jax.jit(function).lower(*given).compile().memory_analysis().temp_size_in_bytes
    )


def test_memory_does_not_grow_with_the_scores():
    """One head and a frame of 4096 voxels, as in the video VAE's middle block."""
    qkv = [jax.ShapeDtypeStruct((1, 4096, 1, 128), jnp.float32)] * 3
    scores, array, chunk = 4 * 4096**2, 4 * 4096 * 128, chunked_attention.BYTES

    def gradient(form):
        return lambda *qkv: jax.grad(lambda *x: jnp.sum(form(*x) ** 2), (0, 1, 2))(*qkv)

    assert memory(attention.reference, *qkv) >= scores
    assert memory(attention.attention, *qkv) <= chunk + 6 * array < scores / 2
    assert memory(gradient(attention.reference), *qkv) >= 2 * scores
    found = memory(gradient(attention.attention), *qkv)
    assert found <= 3 * chunk + 12 * array < 1.2 * scores
    small = functools.partial(attention.chunked, chunk_bytes=2**20)
    assert memory(small, *qkv) <= 2**20 + 6 * array
    assert memory(gradient(small), *qkv) <= 3 * 2**20 + 12 * array


def test_the_form_follows_the_scores_on_a_device(monkeypatch):
    forms = []
    for name in ("reference", "chunked"):
        form = getattr(attention, name)
        monkeypatch.setattr(
            attention,
            name,
            lambda *x, form=form, **kept: (
                forms.append(form.__name__) or form(*x, **kept)
            ),
        )
    qkv = draw(2, 1024, 1024, 4, 8)  # scores of 32 MiB
    jax.eval_shape(attention.attention, *(x[:, :512] for x in qkv))
    jax.eval_shape(attention.attention, *qkv)
    with jax.set_mesh(mesh.make_mesh({"tensor": 4}, jax.devices()[:4])):
        layout = jax.P(None, None, "tensor", None)
        split = [jax.device_put(x, layout) for x in qkv]
        jax.eval_shape(attention.attention, *split)
    assert {*forms[1:-1]} == {"chunked"}  # for every platform
    assert forms[0] == forms[-1] == "reference"


def test_chunks_are_larger_where_a_gpu_must_be_kept_busy():
    qkv = [jax.ShapeDtypeStruct((1, 4096, 4, 64), jnp.float32)] * 3  # 268 MB of scores
    traced = jax.jit(attention.attention).trace(*qkv)
    loops = {
        platform: traced.lower(lowering_platforms=(platform,))
        .as_text()
        .count("stablehlo.while")
        for platform in ("cpu", "cuda")
    }
    assert loops == {"cpu": 2, "cuda": 1}  # over heads and their queries; one chunk


MESHES = [
    {"fsdp": 2, "ring": 2, "tensor": 2},
    {"ring": 4, "ulysses": 2},
    {"replica": 2, "fsdp": 2, "ulysses": 2},
]


@pytest.mark.parametrize("kind", ["all", "both"])
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_rows_queries_and_heads_over_devices(close, monkeypatch, shape, kind):
    cut_small(monkeypatch, 0)
    given = (*draw(4, 40, 40, 2, 8), *masks(kind, 4, 40, 40))
    expected = graded(attention.reference)(*given)
    with jax.set_mesh(mesh.make_mesh(shape)):
        rows, tokens = ("replica", "fsdp"), ("ring", "ulysses")
        qkv = jax.P(rows, tokens, "tensor", None)
        layouts = (qkv,) * 3 + (jax.P(rows), jax.P(rows, tokens), jax.P(rows, tokens))
        given = [jax.device_put(*pair) for pair in zip(given, layouts, strict=False)]
        run = graded(attention.attention)
        found = run(*given)
        for x, like in zip(found, (given[0], *given[:3]), strict=True):
            assert x.sharding.is_equivalent_to(like.sharding, 4)
        forward = jax.jit(attention.chunked)
        text = forward.lower(given[0], *given[:1] * 2).compile().as_text()
    compare(close, found, expected, str(shape))
    assert "all-reduce" not in text  # a query's result is made where it lies


def test_heads_are_exchanged_for_tokens_and_nothing_is_gathered(close):
    given = (*draw(2, 64, 64, 4, 8), *masks("segments", 2, 64, 64))
    expected = graded(attention.reference)(*given)
    made = mesh.make_mesh({"tensor": 2, "ulysses": 2}, jax.devices()[:4])
    with jax.set_mesh(made):
        qkv = jax.P(None, "ulysses", "tensor")
        layouts = (*(qkv,) * 3, None, *(jax.P(None, "ulysses"),) * 2)
        given = [
            None if x is None else jax.device_put(x, layout)
            for x, layout in zip(given, layouts, strict=True)
        ]
        run = graded(attention.attention)
        found = run(*given)
        whole = jax.jit(attention.attention).lower(*given[:3]).compile().as_text()
        odd = [x[:, :, :3] for x in draw(2, 64, 64, 4, 8)]  # three heads stay whole
        split = [jax.device_put(x, jax.P(None, "ulysses")) for x in odd]
        gathered = jax.jit(attention.attention)(*split)
    compare(close, found, expected, "exchanged")
    assert "all-to-all" in whole and "all-gather" not in whole
    close("three heads", gathered, attention.reference(*odd), 1e-6)


def test_frames_attend_in_chunks_where_their_height_is_split(
    build, spread, close, monkeypatch
):
    layer = build(lambda: vae_layers.FrameAttention(8, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 8, 6, 8)))
    expected = jax.jit(layer)(x)
    cut_small(monkeypatch, 4 * 2 * 48 * 5)
    close("one device", jax.jit(lambda x: layer(x))(x), expected, 1e-6)
    with jax.set_mesh(mesh.make_mesh({"ring": 4, "tensor": 2})):
        split = jax.device_put(x, jax.P(None, None, "ring", "tensor"))
        close(
            "eight",
            jax.jit(lambda layer, x: layer(x))(spread(layer), split),
            expected,
            1e-6,
        )


def test_tiles_are_those_of_the_device(monkeypatch):
    """Of the mesh's devices, which a program is compiled for, wherever it is traced."""
    chosen = splash_attention.Tiles((256, 128), (128, 256))
    monkeypatch.setattr(splash_attention, "_table", lambda: {("cpu", 128): chosen})
    assert splash_attention.tiles_for(128) == splash_attention.Tiles()  # no mesh
    q = jax.ShapeDtypeStruct((1, 512, 1, 128), jnp.float32)
    with jax.set_mesh(mesh.make_mesh({"fsdp": 1}, jax.devices()[:1])):
        assert splash_attention.tiles_for(128) == chosen
        assert splash_attention.tiles_for(256) == splash_attention.Tiles()
        form = functools.partial(attention.splash, interpret=True)
        seen = []
        kernel = splash_attention._kernel

        def spy(*given, **options):
            seen.append(given[4])
            return kernel(*given, **options)

        monkeypatch.setattr(splash_attention, "_kernel", spy)
        jax.make_jaxpr(graded(form))(q, q, q)
    assert seen == [chosen.value, chosen.gradient]


def test_the_table_of_tiles_can_be_read():
    table = splash_attention._table()
    assert {kind for kind, _ in table} >= {"TPU v5", "TPU v6 lite"}
    for (_, size), tiles in table.items():
        assert size in splash_attention.HEAD_SIZES
        assert all(x % 128 == 0 and 128 <= x <= 4096 for tile in tiles for x in tile)


@pytest.mark.parametrize(
    "shape, keys, dtype",
    [
        ((2, 4096, 4, 32), 4096, "float32"),
        ((2, 2048, 8, 64), 2048, "bfloat16"),
        ((1, 512, 2, 32), 512, "float32"),
        ((2, 4096, 4, 32), 128, "float32"),
    ],
)
def test_what_attention_is_said_to_hold_is_what_xla_sets_aside(shape, keys, dtype):
    """Beside copies of its arrays; the scores of all queries would be 4 to 1024 MiB."""
    b, _, h, e = shape
    q_bnhe = jax.ShapeDtypeStruct(shape, dtype)
    k_bmhe = jax.ShapeDtypeStruct((b, keys, h, e), dtype)
    program = jax.jit(attention.attention).lower(q_bnhe, k_bmhe, k_bmhe).compile()
    found = program.memory_analysis().temp_size_in_bytes
    said = attention.workspace_bytes(q_bnhe, keys, False, "cpu")
    copies = 4 * max(q_bnhe.size, k_bmhe.size) * jnp.dtype(dtype).itemsize
    assert 0.7 * said <= found <= said + copies


def test_no_form_holds_the_scores_of_a_long_video():
    """Wan 1.3B at 81 frames of 832 x 480: 96 GiB of scores, with guidance."""
    q_bnhe = jax.ShapeDtypeStruct((2, 32760, 12, 128), "bfloat16")
    held = {
        platform: attention.workspace_bytes(q_bnhe, 32760, False, platform) / 2**20
        for platform in ("cpu", "tpu", "gpu")
    }
    assert held["tpu"] < 8 and held["cpu"] < 80 and held["gpu"] < 2048
