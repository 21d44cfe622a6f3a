"""What every recipe keeps on every slice: sizes that divide, layouts, and exchanges.

No test has devices of its recipe's size: steps are traced under a mesh without any, and
what XLA makes of a block is read from a tiny denoiser on eight virtual devices. The
layout of every parameter is kept in tests/golden/sharding.json, which

    python -m tests.training.test_contracts

writes anew; read its difference before it is committed.
"""

import collections
import dataclasses
import functools
import importlib
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sora_jax.core import config as configs
from sora_jax.core import mesh as meshes
from sora_jax.core import sharding, trees
from sora_jax.forecast import hlo, programs
from sora_jax.models import captioner, dit, layers, video_vae
from sora_jax.models import rows as rows_of
from sora_jax.training import jobs, loop, trained_captioner, trained_vae
from tests.training import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "sharding.json"
# Slices and their devices: of v5p a name counts cores, two to a device; a device of a
# tpu7x is a core.
TOPOLOGIES = {
    "v5e-4": 4, "v5e-16": 16, "v5e-256": 256,
    "v5p-8": 4, "v5p-128": 64,
    "v6e-8": 8, "v6e-16": 16, "v6e-256": 256,
    "tpu7x-8": 8, "tpu7x-16": 16, "tpu7x-128": 128,
}  # fmt: skip
COUNTS = sorted(set(TOPOLOGIES.values()))
DENOISERS = ("s", "b", "l", "wan_1_3b", "wan_5b", "wan_14b", "wan_a14b")
# Those for a few devices, which share too little width for more.
SMALL = ("toy", "toy_mixture", "toy_text", "toy_captioner", "toy_upsampler")
VAES = ("toy_vae", "toy_vae_4x16x16", "vae_4x16x16", "vae_8x32x32")


@functools.cache
def networks(name):
    """The networks that a recipe trains."""
    c = recipe(name)
    if c.objective == "vae":
        vae = configs.build(video_vae.Config, c.model.vae, "model.vae")
        return trained_vae.networks_of(vae)
    if c.objective in ("captioner", "upsampler"):
        sizes = dict(c.model.captioner) | {"vocab_size": 640}
        return trained_captioner.networks_of(captioner.Config(**sizes))
    return programs.denoiser_objective(c).networks


def recipe(name):
    return importlib.import_module(f"configs.{name}").get_config()


def abstract_mesh(**shape):
    axes = (jax.sharding.AxisType.Explicit,) * len(meshes.AXES)
    sizes = tuple(shape.get(axis, 1) for axis in meshes.AXES)
    return jax.sharding.AbstractMesh(sizes, meshes.AXES, axis_types=axes)


def layouts_on(devices):
    """Meshes of so many devices: rows split; tokens too; heads too; all at once."""
    found = {
        "fsdp": {"fsdp": devices},
        "context": {"fsdp": devices // 4, "ulysses": 4},
        "tensor": {"fsdp": devices // 4, "tensor": 4},
    }
    if devices >= 16:
        axes = {"replica": 2, "ring": 2, "ulysses": 2, "tensor": 2}
        found["mixed"] = {"fsdp": devices // 16} | axes
    return {label: abstract_mesh(**shape) for label, shape in found.items()}


def test_every_recipe_is_in_one_of_the_lists():
    files = {file.stem for file in (ROOT / "configs").glob("*.py")}
    assert files - {"__init__", "base"} == {*DENOISERS, *SMALL, *VAES}


@pytest.mark.parametrize("name", DENOISERS)
def test_a_recipe_divides_over_every_slice(name):
    """By what training checks first, with one row for each shard of the batch."""
    c = recipe(name)
    objective = programs.denoiser_objective(c)
    shapes = trees.flatten(objective.networks.abstract())
    layouts = trees.flatten(objective.networks.partitions())
    for devices in COUNTS:
        for label, mesh in layouts_on(devices).items():
            c.data.batch_size = sharding.logical_axis_size(mesh, "batch")
            jobs.check_denoiser(mesh, c, objective)
            for path, leaf in shapes.items():
                for size, entry in zip(leaf.shape, layouts[path], strict=True):
                    assert size % sharding.num_shards(mesh, entry) == 0, (label, path)


def trace(c, mesh):
    """Traces a train step of two layers, one row for each shard; returns the states."""
    c.model.dit.num_layers = 2
    c.data.batch_size = sharding.logical_axis_size(mesh, "batch")
    objective = programs.denoiser_objective(c)
    begin, optimizer = programs.begin(c, objective)
    batch = programs.batch_of(c, mesh, objective)
    step = programs.step_of(c, objective, optimizer)
    with jax.sharding.use_abstract_mesh(mesh):
        before = loop.abstract_state(begin, mesh)
        return before, *jax.eval_shape(step, before, batch)


@pytest.mark.parametrize("label", ["fsdp", "mixed"])
@pytest.mark.parametrize("name", DENOISERS)
def test_a_train_step_keeps_every_sharding(name, label):
    """On the most devices: what divides over them divides over fewer."""
    before, after, metrics = trace(recipe(name), layouts_on(COUNTS[-1])[label])
    assert metrics["loss"][0].shape == ()
    for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
        assert old.sharding.spec == new.sharding.spec


# -- layouts of parameters ------------------------------------------------------------

# A video VAE's first and last convolutions and its linear path stay whole, which counts
# in a small one, or where the path joins 24,576 voxels.
WHOLE = {"toy_vae": 0.10, "toy_vae_4x16x16": 0.10, "vae_8x32x32": 0.05}


@pytest.mark.parametrize("name", DENOISERS + SMALL + VAES)
def test_few_parameters_are_replicated(name):
    shapes = trees.flatten(networks(name).abstract())
    total = sum(leaf.size for leaf in shapes.values())
    for devices in COUNTS if name in DENOISERS else (4, 8, 16):
        mesh = abstract_mesh(fsdp=devices)
        with jax.sharding.use_abstract_mesh(mesh):
            layouts = trees.flatten(networks(name).partitions())
        whole = sum(
            leaf.size
            for path, leaf in shapes.items()
            if all(sharding.num_shards(mesh, entry) == 1 for entry in layouts[path])
        )
        print(f"{name} on {devices}: {whole / total:.2%} whole")
        assert whole / total <= WHOLE.get(name, 0.02)


def dump():
    """The layout of every parameter, recipes of one form together."""
    forms = {}
    for name in DENOISERS + SMALL + VAES:
        layouts = trees.flatten(networks(name).partitions())
        text = {path: str(tuple(layout)) for path, layout in layouts.items()}
        forms.setdefault(json.dumps(text, sort_keys=True), []).append(name)
    return {", ".join(names): json.loads(text) for text, names in forms.items()}


def test_parameters_have_the_golden_shardings():
    assert dump() == json.loads(GOLDEN.read_text())


# -- exchanges ------------------------------------------------------------------------

_SIZE = re.compile(r"\w+\[([\d,]+)\]")


def operations(program):
    """All of a compiled program, with the computations that they stand in."""
    for computation, found in program.computations.items():
        yield from ((computation, one) for one in found)


def exchanges(program):
    """(operation, sizes of its results) of a compiled program."""
    return [
        (
            found.kind,
            [sorted(map(int, s.split(","))) for s in _SIZE.findall(one.result)],
        )
        for computation, one in operations(program)
        if (found := program.exchange(computation, one))
    ]


def per_block(program):
    """How often each operation stands in the body of each loop, in the text's order."""
    return [
        dict(
            collections.Counter(
                found.kind
                for body in loop.called
                for _, found in program.exchanges_in(body)
            )
        )
        for _, loop in operations(program)
        if loop.kind == "while"
    ]


def on(mesh, names, *size, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(
        size, dtype, sharding=sharding.named_sharding(mesh, *names)
    )


# Ten weights a block; heads for tokens in q, k, v and back; a sum after each row-split
# product, and one for each pair of norms. Of the gradient: a sum of all weights'.
BLOCK = {
    "fsdp": [{"all-gather": 10}, {"all-reduce": 1}],
    "ulysses": [
        {"all-gather": 10, "all-to-all": 4},
        {"all-to-all": 4, "all-reduce": 1},
    ],
    "tensor": [{"all-reduce": 5}, {"all-reduce": 7}],
}


@pytest.mark.parametrize("axis", BLOCK)
def test_a_block_exchanges_no_more_than_it_must(axis):
    config = dataclasses.replace(tiny.DIT, num_layers=3, num_heads=8, dim=64)
    mesh = meshes.make_mesh({axis: 8})
    with jax.set_mesh(mesh):
        graph, params = programs.network(mesh, lambda rngs: dit.DiT(config, rngs=rngs))
        rows = functools.partial(on, mesh, ["batch"], 8)

        def loss(params, *given):
            latents_bthwc, levels_bk, text_bld, mask_bl = given
            row = rows_of.of_video(
                config, latents_bthwc, levels_bk, text_bld, mask_bl, fps=8.0
            )
            velocity = nnx.merge(graph, params)(row)
            return jnp.sum(velocity**2)

        given = rows(2, 4, 4, 4), rows(1), rows(6, 16), rows(6, dtype=jnp.bool_)
        compiled = jax.jit(jax.grad(loss)).lower(params, *given).compile()
    assert per_block(hlo.parse(compiled.as_text())) == BLOCK[axis]


@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"fsdp": 4, "ulysses": 2}], ids=str)
@pytest.mark.parametrize("part", ["patches", "words"])
def test_only_weights_move_where_patches_and_words_become_tokens(part, shape):
    """Neither patches nor words leave their device, nor does what is made of them."""
    mesh = meshes.make_mesh(shape)
    make, given = {
        "patches": (
            lambda rngs: layers.Linear(12, 64, axes=(None, "embed"), rngs=rngs),
            on(mesh, ["batch", "tokens", None], 8, 40, 12),
        ),
        "words": (
            lambda rngs: layers.Embed(24, 64, rngs=rngs),
            on(mesh, ["batch", None], 8, 40, dtype=jnp.int32),
        ),
    }[part]
    with jax.set_mesh(mesh):
        graph, params = programs.network(mesh, make)

        def loss(params, x):
            return jnp.sum(jnp.sin(nnx.merge(graph, params)(x)))

        compiled = jax.jit(jax.grad(loss)).lower(params, given).compile()
    found = exchanges(hlo.parse(compiled.as_text()))
    weights = [sorted(leaf.shape) for leaf in jax.tree.leaves(params)]
    print(found)
    assert ("all-gather", weights[-1:]) in found
    assert all(size in weights for _, sizes in found for size in sizes)
    assert math.prod(weights[-1]) < 8 * 40 * 64  # else it could be either


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(dump(), indent=1) + "\n")
