"""The captioner's cached steps, its samples and its beams, against plain computation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.models import captioner

CONFIG = captioner.Config(
    num_frames=3,
    size=8,
    patch=4,
    frame_dim=8,
    dim=16,
    num_layers=1,
    decoder_layers=2,
    num_heads=2,
    mlp_dim=24,
    vocab_size=5,
    length=4,
)


@pytest.fixture(scope="module")
def module():
    """A captioner none of whose layers is zero."""
    made = captioner.Captioner(CONFIG, rngs=nnx.Rngs(0))
    graph, params = nnx.split(made)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [
        leaf + 0.4 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.uniform(-1, 1, (2, 3, 8, 8, 3)), jnp.float32)


TIERS = jnp.array([0, 1])
search = jax.jit(captioner.beam_search, static_argnames="beams")
draw = jax.jit(captioner.sample)


def test_cached_steps_give_what_the_whole_caption_gives(module, clips):
    ids_bl = jnp.array([[2, 3, 4, 1], [4, 4, 1, 0]])
    whole_blv = module(clips, TIERS, ids_bl)
    memory, cache = module.begin(clips), module.empty_cache(2)
    before_b = jnp.zeros(2, jnp.int32)
    for place in range(4):
        found_bv, cache = module.step(TIERS, before_b, place, memory, cache)
        np.testing.assert_allclose(found_bv, whole_blv[:, place], atol=1e-5)
        before_b = ids_bl[:, place]


def test_a_token_depends_on_clip_tier_and_earlier_tokens_only(module, clips):
    ids_bl = jnp.array([[2, 3, 4, 1], [2, 3, 4, 1]])
    same = jnp.zeros(2, jnp.int32)
    here = module(clips, same, ids_bl)
    assert np.abs(here[0] - here[1]).max() > 1e-2  # the clip
    assert np.abs(here - module(clips, same + 1, ids_bl)).max() > 1e-2
    later = module(clips, same, ids_bl.at[:, 2].set(1))
    np.testing.assert_array_equal(here[:, :3], later[:, :3])
    assert np.abs(here[:, 3] - later[:, 3]).max() > 1e-2
    turned = clips[:, ::-1]  # time is read in order
    assert np.abs(here - module(turned, same, ids_bl)).max() > 1e-2


def every_caption() -> np.ndarray:
    """All captions of four tokens: they end with 1, or are cut."""
    found = [list(cut) for cut in itertools.product((0, 2, 3, 4), repeat=4)]
    for length in range(1, 5):
        for body in itertools.product((0, 2, 3, 4), repeat=length - 1):
            found.append([*body, 1] + [0] * (4 - length))
    return np.array(found)


@pytest.fixture(scope="module")
def scored(module, clips):
    """Every caption, and its log-probability for either clip, [2, n]."""
    ids_nl = every_caption()
    ended_nl = np.cumsum(ids_nl == 1, 1) - (ids_nl == 1)  # behind the end mark
    totals = []
    for row in range(2):
        logits_nlv = jax.jit(lambda m, *given: m(*given))(
            module,
            jnp.repeat(clips[row : row + 1], len(ids_nl), 0),
            jnp.repeat(TIERS[row : row + 1], len(ids_nl)),
            jnp.asarray(ids_nl),
        )
        nats_nlv = np.asarray(jax.nn.log_softmax(logits_nlv))
        nats_nl = np.take_along_axis(nats_nlv, ids_nl[..., None], 2)[..., 0]
        totals.append(np.sum(nats_nl * (ended_nl == 0), 1))
    return ids_nl, np.stack(totals)


def total_of(scored, row, ids_l) -> float:
    ids_nl, total_2n = scored
    (place,) = np.flatnonzero((ids_nl == np.asarray(ids_l)).all(1))
    return float(total_2n[row, place])


def test_every_caption_has_its_share(scored):
    np.testing.assert_allclose(np.exp(scored[1]).sum(1), 1, atol=1e-5)


def test_wide_beams_find_the_best_of_all_captions(module, clips, scored):
    ids_nl, total_2n = scored
    found_bl, total_b = search(module, clips, TIERS, beams=300)
    tokens_n = np.maximum((ids_nl != 0).sum(1), 1)  # 0 is padding's id
    for row in range(2):
        best = int(np.argmax(total_2n[row] / tokens_n))
        np.testing.assert_array_equal(found_bl[row], ids_nl[best])
        assert float(total_b[row]) == pytest.approx(total_2n[row, best], abs=1e-4)


def test_one_beam_takes_the_likeliest_tokens(module, clips, scored):
    found_bl, total_b = search(module, clips, TIERS)
    logits_blv = module(clips, TIERS, found_bl)
    for row, ids_l in enumerate(np.asarray(found_bl)):
        ends = list(ids_l).index(1) + 1 if 1 in ids_l else 4
        likeliest_l = np.argmax(logits_blv[row], -1)
        np.testing.assert_array_equal(ids_l[:ends], likeliest_l[:ends])
        assert not ids_l[ends:].any()
        wanted = total_of(scored, row, ids_l)
        assert float(total_b[row]) == pytest.approx(wanted, abs=1e-4)


def test_samples_have_the_probabilities_of_the_logits(module, clips, scored):
    many = jnp.repeat(clips[:1], 2000, 0)
    keys = jax.random.split(jax.random.key(5), 2000)
    ids_bl, total_b = draw(module, many, jnp.zeros(2000, jnp.int32), keys)
    ids_nl, total_2n = scored
    for ids_l, wanted in zip(ids_nl, np.exp(total_2n[0]), strict=True):
        share = np.mean((np.asarray(ids_bl) == ids_l).all(1))
        assert share == pytest.approx(wanted, abs=0.05)
    early = np.flatnonzero((np.asarray(ids_bl)[:, :2] == 1).any(1))
    assert len(early) > 5
    for row in (0, 7, *early[:5]):
        wanted = total_of(scored, 0, ids_bl[row])
        assert float(total_b[row]) == pytest.approx(wanted, abs=1e-4)
    cold_bl, _ = draw(module, clips, TIERS, keys[:2], 1e-4)
    np.testing.assert_array_equal(cold_bl, search(module, clips, TIERS)[0])


def test_impossible_sizes_are_refused(module, clips):
    with pytest.raises(ValueError, match="patch 3 does not divide size 8"):
        captioner.Config(size=8, patch=3)
    with pytest.raises(ValueError, match="3 heads do not divide dim 16"):
        captioner.Config(dim=16, num_heads=3)
    with pytest.raises(ValueError, match="tiers must be one or more different"):
        captioner.Config(tiers=("short", "short"))
    with pytest.raises(ValueError, match="takes video of \\(3, 8, 8, 3\\)"):
        module.encode(clips[:, :2])
