"""cuDNN's attention without a GPU: what it is asked for, and all that surrounds it."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax._src.ad_checkpoint import saved_residuals
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from sora_jax.core import mesh
from sora_jax.models import attention, cudnn_attention, dit, rows
from tests.models.test_attention import compare, draw, graded, masks


@pytest.fixture
def hopper(monkeypatch):
    """JAX believes that it traces for an H100 with cuDNN 9.15."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91500)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda least: True)
    equal = "is_cuda_compute_capability_equal"
    monkeypatch.setattr(cudnn, equal, lambda version: version == "9.0")
    monkeypatch.setattr(cudnn_attention, "is_available", lambda: True)


@pytest.fixture
def in_xla(monkeypatch):
    """XLA's operation in the place of the kernel, with the same arguments."""
    product = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    monkeypatch.setattr(cudnn_attention, "_product", product)


@pytest.mark.parametrize(
    "kind, n, m",
    [(kind, 67, 53) for kind in ("all", "mask", "segments", "both")]
    + [("no key", 67, 54), ("all", 67, 54), ("all", 66, 53)],
)
def test_masks_and_odd_sizes(close, in_xla, kind, n, m):
    given = (*draw(2, n, m, 3, 8), *masks(kind, 2, n, m))
    found = graded(attention.cudnn)(*given)
    compare(close, found, graded(attention.reference)(*given), kind)


@pytest.mark.parametrize("kind", ["all", "mask", "segments", "both"])
def test_heads_that_share_keys_stay_heads(close, in_xla, kind):
    q, k, v, *seen = (*draw(2, 67, 53, 6, 8), *masks(kind, 2, 67, 53))
    k, v = (x[:, :, ::3] for x in (k, v))

    def folded(q, k, v, mask=None, of_q=None, of_k=None):
        of_q = None if of_q is None else jnp.repeat(of_q, 3, axis=1)
        given = attention._fold(q, 3, None), k, v, mask, of_q, of_k
        return attention._unfold(attention.cudnn(*given, group=3), 3, None)

    def repeated(q, k, v, *seen):
        return attention.reference(q, *(jnp.repeat(x, 3, 2) for x in (k, v)), *seen)

    found, expected = (graded(form)(q, k, v, *seen) for form in (folded, repeated))
    compare(close, found, expected, kind)


def test_devices_that_share_rows_and_heads(close, in_xla):
    given = (*draw(2, 64, 48, 4, 8), *masks("mask", 2, 64, 48))
    expected = graded(attention.reference)(*given)
    layout = jax.P("fsdp", "ulysses", "tensor", None)
    with jax.set_mesh(mesh.make_mesh({"fsdp": 2, "ulysses": 2, "tensor": 2})):
        q = jax.device_put(given[0], layout)
        k, v = (jax.device_put(x, jax.P("fsdp", None, "tensor")) for x in given[1:3])
        found = graded(attention.cudnn)(q, k, v, given[3])
    compare(close, found, expected)


def lowered(function, *given) -> str:
    traced = jax.jit(function).trace(*given)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def calls(text: str) -> list[str]:
    """Names of cuDNN's operations in a program, in their order."""
    return re.findall(r"__cudnn\$fmha\w+", text)


def test_what_cudnn_is_asked_for(hopper):
    q = jax.ShapeDtypeStruct((1, 4096, 6, 64), jnp.bfloat16)
    text = lowered(attention.attention, q, q, q)
    assert calls(text) == ["__cudnn$fmhaSoftmax"]
    found = re.search(r'"fmha_scale.*?: ?([\d.]+)', text.replace("\\22", '"'))
    assert float(found[1]) == 64**-0.5
    assert "NO_MASK" in text and "PADDING" not in text
    # A mask is a bias, and nobody asks for its gradient.
    mask = jax.ShapeDtypeStruct((1, 4096), jnp.bool_)
    text = lowered(graded(attention.attention), q, q, q, mask)
    assert calls(text) == [
        "__cudnn$fmhaScaleBiasSoftmax",
        "__cudnn$fmhaScaleBiasSoftmaxBackward",
    ]


@pytest.mark.parametrize(
    "remat, values", [("none", 2), ("attention", 3), ("full", 4), ("offload", 3)]
)
def test_remat_keeps_what_its_name_says(hopper, remat, values):
    """Of a block's two attentions only the text's is computed again, or both."""
    config = dit.Config(
        dim=128, num_layers=2, num_heads=2, mlp_dim=128, text_dim=16, freq_dim=16,
        remat=remat, dtype="bfloat16",
    )  # fmt: skip
    graph, state = nnx.split(nnx.eval_shape(lambda: dit.DiT(config, rngs=nnx.Rngs(0))))
    n, length = 4096, 1024
    shape = jax.ShapeDtypeStruct

    def loss(state, x, level, positions, text, mask):
        model = nnx.merge(graph, state)
        return jnp.sum(model(rows.Rows(x, positions, level, text, mask)))

    text = lowered(
        jax.grad(loss),
        state,
        shape((1, n, config.token_dim), jnp.float32),
        shape((1, 1), jnp.float32),
        shape((1, n, 3), jnp.float32),
        shape((1, length, 16), jnp.float32),
        shape((1, length), jnp.bool_),
    )
    found = calls(text)
    assert sum(name.endswith("Backward") for name in found) == 2
    assert sum(not name.endswith("Backward") for name in found) == values


@pytest.mark.parametrize("n", [128, 127])
@pytest.mark.parametrize("kind", ["all", "mask", "segments"])
def test_a_gradient_keeps_the_result_and_its_sums_alone(hopper, kind, n):
    """Not what hides keys, of the size of all scores, nor anything that was filled."""
    shapes = [(2, n, 4, 64)] * 3

    @functools.partial(
        jax.checkpoint,
        policy=jax.checkpoint_policies.save_only_these_names(attention.SAVED),
    )
    def loss(q, k, v, *seen):
        y = attention.cudnn(*map(jnp.sin, (q, k, v)), *seen)
        return jnp.sum(y.astype(jnp.float32))

    given = (jnp.zeros(shape, jnp.bfloat16) for shape in shapes)
    kept = saved_residuals(loss, *given, *masks(kind, 2, n, n))
    named = [x.shape for x, why in kept if "argument" not in why and x.ndim > 1]
    even = n + n % 2
    assert sorted(named) == [(2, 4, even), (2, even, 4, 64)]


def test_grouped_heads_hide_keys_once(hopper):
    """4096 queries of each of 16 heads with one key: the bias of one is 32 MB."""
    q = jax.ShapeDtypeStruct((1, 4096, 16, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 4096, 1, 64), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((1, 4096), jnp.bool_)
    text = lowered(attention.attention, q, k, k, mask)
    assert calls(text) == ["__cudnn$fmhaScaleBiasSoftmax"]


def test_what_the_kernels_do_not_take_is_computed_in_chunks(hopper):
    q = jax.ShapeDtypeStruct((1, 4096, 6, 64), jnp.float32)
    assert not calls(lowered(attention.attention, q, q, q))  # single precision
    q = jax.ShapeDtypeStruct((1, 32_768, 2, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, 32_768), jnp.int32)
    packed = functools.partial(attention.attention, mask_bm=None)
    run = lambda q, k, v, a, b: packed(q, k, v, q_segments_bn=a, k_segments_bm=b)  # noqa: E731
    assert not calls(lowered(run, q, q, q, ids, ids))  # a bias of 2 GB
    q = jax.ShapeDtypeStruct((1, 4096, 2, 192), jnp.bfloat16)
    assert not calls(lowered(attention.attention, q, q, q))  # a large head


def test_it_is_not_there_on_a_cpu():
    assert not cudnn_attention.is_available()
