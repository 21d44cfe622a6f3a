"""Clips that share a row: what each gives alone, in forward, loss and gradient."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.core import mesh
from sora_jax.data import conditions, packing, records
from sora_jax.diffusion import timesteps
from sora_jax.training import loop, objectives
from tests.training import tiny

GRIDS = [(2, 4, 4), (1, 4, 2), (3, 2, 6), (1, 2, 2), (4, 4, 4), (2, 2, 2)]
FPS = [8.0, 8.0, 16.0, 24.0, 12.0, 6.0]
ROWS = [(0, 1), (2, 3, 5), (4,), ()]  # clips of each row
TOKENS, CLIPS, LENGTH = 72, 3, 6  # tokens divide over eight devices
NOISE = timesteps.Config(shift=3.0)
PATTERNS = {"none": 0.25, "first_frame": 0.25, "levels": 0.5}
KNOWN = conditions.Config(PATTERNS, levels=((0.1, 0.5),), dropout=0.2)
# What is given of each clip, and its slots by frame.
CONDITIONS = {
    0: conditions.Condition("first_frame", head=1),
    1: conditions.Condition(),
    2: conditions.Condition("levels", levels=(0, 3, 1)),
    3: conditions.Condition(),
    4: conditions.Condition("head", head=2),
    5: conditions.Condition("levels", levels=(2, 2)),
}
COMMON = dict(text_dropout=0.2, null_ids=[1] + [0] * 5)


class Source:
    """Latents of the grids, one of which may be damaged."""

    def __init__(self, damaged=()):
        self.damaged = damaged

    def __len__(self):
        return len(GRIDS)

    def read(self, indices):
        return [
            records.CorruptRecord("file", str(i), "bad") if i in self.damaged
            else Record(i)
            for i in indices
        ]  # fmt: skip


class Record:
    def __init__(self, index):
        random = np.random.default_rng(index)
        self.fps = FPS[index]
        self.latents = random.normal(size=(*GRIDS[index], 4)).astype(np.float32)
        ids = random.integers(3, 40, LENGTH).astype(np.int32)
        ids[3 + index % 3 :] = 0
        self.ids, self.tier = ids, np.int32(index % 3)


def slots_of(clip):
    return conditions.slots(CONDITIONS[clip], GRIDS[clip])


def transform(record, random, condition, others=()):
    return {
        "latents": record.latents,
        "slots": conditions.slots(condition, record.latents.shape[:3]),
        "pattern": np.int32(conditions.PATTERNS.index(condition.pattern)),
        "start": np.int32(0),
        "period": np.float32(0),
        "beside": record.latents[:0],
        "times": np.zeros(0, np.float32),
        "text_ids": record.ids,
        "text_mask": record.ids != 0,
        "text_tier": record.tier,
    }


class Plan:
    """The rows above, as a planner gives them."""

    seed = 0

    def step(self, number):
        rows = tuple(tuple(map(placed, row)) for row in ROWS)
        return packing.Step(packing.Shape(len(ROWS), TOKENS, CLIPS), rows)


def placed(clip):
    return packing.Clip(clip, int(np.prod(GRIDS[clip])), CONDITIONS[clip])


def close(name, ours, theirs, tolerance):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    error = np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-6)
    print(f"{name}: relative error {error:.1e}")
    assert error <= tolerance, f"{name}: {error:.2e} > {tolerance:.0e}"


def packed_batch(**more):
    batches = packing.Batches(Source(**more), transform, Plan(), (1, 1, 1), 0, 1)
    return batches[0]


@functools.cache
def make():
    objective = objectives.Denoiser(tiny.DIT, tiny.TEXT, NOISE, KNOWN, **COMMON)
    params = jax.jit(objective.networks.init)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    random = np.random.default_rng(5)  # nothing stays at the zero that it begins with
    leaves = [
        leaf + 0.1 * random.standard_normal(leaf.shape, np.float32) for leaf in leaves
    ]
    return objective, jax.tree.unflatten(tree, leaves)


def drawn(objective, batch):
    batch = jax.tree.map(jnp.asarray, batch)
    return jax.jit(objective.draw)(jax.random.key(7), batch, jnp.zeros(()))


@functools.cache
def program(objective):
    def total(params, batch):
        found = objective.loss(objective.networks.bind(params), batch)
        return found[0], found[1:]

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def graded(objective, params, batch):
    return program(objective)(params, batch)


def test_packed_clips_are_each_clip_alone():
    objective, params = make()
    batch = drawn(objective, packed_batch()[0])
    (total, (weight, metrics)), gradient = graded(objective, params, batch)
    assert weight == len(GRIDS)
    used = sum(int(np.prod(GRIDS[clip])) for row in ROWS for clip in row)
    share = 1 - used / (len(ROWS) * TOKENS)
    assert float(metrics["padding"][0] / metrics["padding"][1]) == pytest.approx(share)
    losses, gradients, in_bands = [], [], 0
    tiers = collections.defaultdict(list)
    for row, clips in enumerate(ROWS):
        first = 0
        for place, clip in enumerate(clips):
            grid, size = GRIDS[clip], int(np.prod(GRIDS[clip]))
            alone = objectives.Denoiser(
                tiny.DIT, tiny.TEXT, NOISE, KNOWN, fps=FPS[clip], **COMMON
            )
            noise = batch["noise"][row, first : first + size]
            given = {
                "latents": Record(clip).latents[None],
                "text_ids": batch["text_ids"][row, place][None],
                "text_mask": batch["text_mask"][row, place][None],
                "tau": batch["tau"][row, place][None, None],
                "drop": batch["drop"][row, place][None, None],
                "known_tau": batch["known_tau"][row, place][None, None],
                "extra_tau": batch["extra_tau"][row, place][None, None],
                "slots": slots_of(clip)[None],
                "pattern": batch["pattern"][row, place][None],
                "noise": noise.reshape(1, *grid, 4),
            }
            (loss, (_, found)), of_clip = graded(alone, params, given)
            losses.append(loss)
            is_dropped = bool(batch["drop"][row, place])
            tiers["none" if is_dropped else records.TIERS[clip % 3]].append(loss)
            gradients.append(of_clip)
            in_bands += found["loss_band"][0]
            first += size
    assert np.ptp(losses) > 0.1 and len(set(np.ravel(batch["known_tau"]))) > 4
    by_pattern = metrics["loss_pattern"][1]
    assert by_pattern.sum() == len(GRIDS) and np.count_nonzero(by_pattern) == 4
    assert np.asarray(batch["drop"]).any()
    close("loss", total, sum(losses), 1e-5)
    close("by band", metrics["loss_band"][0], in_bands, 1e-5)
    names = objective.metric_names["loss_tier"]
    for name, found, count in zip(names, *metrics["loss_tier"], strict=True):
        assert count == len(tiers[name])
        close(name, found, sum(tiers[name]), 1e-5)
    summed = jax.tree.map(lambda *parts: sum(parts), *gradients)
    pairs = zip(
        jax.tree.leaves_with_path(gradient), jax.tree.leaves(summed), strict=True
    )
    for (path, ours), theirs in pairs:
        close(jax.tree_util.keystr(path), ours, theirs, 1e-4)


def test_a_clip_with_pictures_is_the_same_alone():
    """Its pictures are seen by its own tokens, at their own times, and by no others."""
    objective, params = make()
    given = conditions.Condition("both", 1, head=1, pictures=(5, 8))
    pictures = np.random.default_rng(9).normal(size=(2, 2, 6, 4)).astype(np.float32)
    tokens = given.tokens(GRIDS[2], (1, 1, 1))

    def with_pictures(record, random, condition, others=()):
        found = transform(record, random, condition)
        if condition != given:
            return found
        window = record.latents[1:]
        return found | {
            "latents": window,
            "slots": conditions.slots(given, window.shape[:3]),
            "start": np.int32(1),
            "beside": pictures,
            "times": np.float32([5 / 4, 2.0]),
        }

    def batch_of(row, room):
        plan = Plan()
        step = packing.Step(packing.Shape(1, room, len(row)), (row,))
        plan.step = lambda number: step
        batches = packing.Batches(Source(), with_pictures, plan, (1, 1, 1), 0, 1)
        return batches[0][0]

    clip = packing.Clip(2, tokens, given)
    alone = drawn(objective, batch_of((clip,), tokens))
    shared = drawn(objective, batch_of((placed(0), clip), TOKENS + 24))
    here = slice(32, 32 + tokens)
    for name in ("tau", "known_tau", "drop", "extra_tau"):
        alone[name] = shared[name][:, 1:]
    alone["noise"] = shared["noise"][:, here]
    loss = lambda batch: np.ravel(objective.clip_losses(  # noqa: E731
        objective.networks.bind(params), batch
    ))  # fmt: skip
    np.testing.assert_allclose(loss(alone)[0], loss(shared)[1], rtol=1e-5)
    # Both pictures, their times and the window's start matter.
    for name, change in (
        ("tokens", lambda x: x.at[:, -12:].add(1.0)),
        ("tokens", lambda x: x.at[:, -24:-12].add(1.0)),
        ("places", lambda x: x.at[:, -24:-12, 0].add(0.25)),
        ("places", lambda x: x.at[:, :24, 0].add(1.0)),
    ):
        other = alone | {name: change(alone[name])}
        assert abs(loss(other)[0] - loss(alone)[0]) > 1e-5
    assert loss(alone)[0] > 0


def test_known_tokens_have_no_loss():
    objective, params = make()
    batch = drawn(objective, packed_batch()[0])
    modules = objective.networks.bind(params)
    is_known = np.asarray(batch["slots"] == conditions.Slot.KNOWN)
    assert is_known.any()
    # Where known tokens are clean, their noise is only in their target.
    batch["known_tau"] = jnp.zeros_like(batch["known_tau"])
    loss_bk = objective.clip_losses(modules, batch)
    noise = jnp.where(is_known[..., None], 100.0, batch["noise"])
    found_bk = objective.clip_losses(modules, batch | {"noise": noise})
    np.testing.assert_allclose(found_bk, loss_bk, rtol=1e-6)


@pytest.mark.parametrize(
    "shape",
    [
        {"fsdp": 2, "ulysses": 2, "tensor": 2},
        {"ring": 4, "ulysses": 2},
        pytest.param({"fsdp": 4, "ring": 2}, marks=pytest.mark.slow),
        pytest.param({"ring": 8}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_mesh_changes_nothing(shape):
    objective, params = make()
    batch = drawn(objective, packed_batch()[0])
    (total, _), gradient = graded(objective, params, batch)
    made = mesh.make_mesh(shape)
    with jax.set_mesh(made):
        rows = loop.to_device(packed_batch()[0], made)
        there = jax.device_put(params, objective.networks.layouts())
        (found, _), of_mesh = graded(objective, there, drawn(objective, rows))
    close("loss", found, total, 1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(of_mesh), jax.tree.leaves(gradient), strict=True
    ):
        close("gradient", ours, theirs, 1e-4)


def test_padding_may_hold_anything():
    objective, params = make()
    batch = drawn(objective, packed_batch()[0])
    one = graded(objective, params, batch)[0][0]
    other = dict(batch)
    padding = (batch["segments"] == 0)[..., None]
    other["tokens"] = jnp.where(padding, 9.0, batch["tokens"])
    assert graded(objective, params, other)[0][0] == one


def test_a_damaged_clip_leaves_padding_and_is_named():
    batch, damaged = packed_batch(damaged=(2,))
    assert [name for name, _ in damaged] == ["2"]
    assert batch["frames"][1].tolist() == [0, 1, 2]
    objective, params = make()
    (_, (weight, _)), gradient = graded(objective, params, drawn(objective, batch))
    assert weight == len(GRIDS) - 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_step_without_a_clip_that_can_be_read_is_all_padding():
    batch, damaged = packed_batch(damaged=(0, 1, 2, 3, 4))
    assert len(damaged) == 5 and batch["frames"].sum() == 2  # clip 5 is left
    rest = Plan()
    rest.step = lambda number: packing.Step(packing.Shape(1, 16, 2), ((placed(1),),))
    batch, damaged = packing.Batches(
        Source(damaged=(1,)), transform, rest, (1, 1, 1), 0, 1
    )[0]
    assert [name for name, _ in damaged] == ["1"]
    assert batch["tokens"].shape == (1, 16, 4) and not batch["segments"].any()
    assert batch["text_ids"].shape == (1, 2, LENGTH)
