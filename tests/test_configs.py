"""Every recipe is built, and its train step is traced at full size on a pod's mesh."""

import ast
import dataclasses
import importlib
import pathlib
import typing

import jax
import jax.numpy as jnp
import pytest

from sora_jax.core import config as configs
from sora_jax.core import mesh as meshes
from sora_jax.data import conditions, tokenizer, transforms
from sora_jax.diffusion import timesteps
from sora_jax.generation import request, runs
from sora_jax.models import video_vae
from sora_jax.training import jobs, loop, objectives, optim, reconstruction, trained_vae
from sora_jax.training import recipe as recipes
from sora_jax.training import state as states
from sora_jax.training import step as steps

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "configs"
RECIPES = sorted(
    f.stem for f in FOLDER.glob("*.py") if f.stem not in ("__init__", "base")
)
# Parameters of the published weights: denoiser, video VAE, text encoder.
PUBLISHED = {
    "wan_1_3b": (1_418_996_800, 126_892_531, 5_680_910_336),
    "wan_5b": (4_999_787_712, 704_688_668, 5_680_910_336),
    "wan_14b": (14_288_491_584, 126_892_531, 5_680_910_336),
    "wan_a14b": (14_288_491_584, 126_892_531, 5_680_910_336),
}
# Parameters of the denoisers that are trained from scratch, in round numbers.
SIZES = {"s": 60e6, "b": 250e6, "l": 700e6}
# Video VAEs that are trained from scratch: parameters, and the latent of 17 x 256 x 256.
FROM_SCRATCH = {
    "toy_vae": (3_279_848, (5, 64, 64, 24)),
    "toy_vae_4x16x16": (11_218_976, (5, 16, 16, 48)),
    "vae_4x16x16": (193_673_116, (5, 16, 16, 48)),
    "vae_8x32x32": (265_701_036, (3, 8, 8, 128)),
}


# Fields of dataclasses that are not in configs/base.py.
NOT_IN_BASE = {
    "model.text_encoder.dim": "it is model.dit.text_dim",
    "model.vae.video_channels": "videos are RGB",
    "model.discriminator.video_channels": "videos are RGB",
    "model.vae.latent_mean": "it is measured after training",
    "model.vae.latent_std": "it is measured after training",
    "sample.text_length": "it is text.length",
    "sample.shift": "it is noise.shift",
    "sample.known_tau": "it is known.known_tau",
    "sample.trained_levels": "it is noise.levels",
    "sample.trained_patterns": "they are known.probabilities",
    "sample.boundary": "convert sets it when it joins two experts",
    "sample.guidance_scale_2": "convert sets it when it joins two experts",
}
# Fields whose value in a recipe stands for what is only known later.
IN_RECIPES = (
    "model.text_encoder.vocab_size",
    "model.captioner.vocab_size",
    "sample.takes_images",
)
# Sections that are mappings without a dataclass.
MAPPINGS = ("text.tiers", "known.probabilities")


def fields(kind, where=""):
    """(dotted name, field) of a dataclass and those that it holds."""
    for field, hint in zip(
        dataclasses.fields(kind), typing.get_type_hints(kind).values(), strict=True
    ):
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, f"{where}{field.name}.")
        elif field.name != "sample":
            yield where + field.name, field
    if kind is recipes.Recipe:
        yield from fields(request.Settings, "sample.")


def test_base_holds_every_field():
    names = {name for name, _ in fields(recipes.Recipe)}
    assert NOT_IN_BASE.keys() <= names
    in_base = {
        next((m for m in MAPPINGS if name.startswith(f"{m}.")), name)
        for name in configs.flatten(recipe("base"))
    }
    assert in_base == names - NOT_IN_BASE.keys()


def test_a_network_has_one_default():
    """A network's dataclass and configs/base.py give the same values."""
    values, compared = configs.flatten(recipe("base")), 0
    for name, field in fields(recipes.Recipe):
        if name.startswith(("model.", "noise.", "sample.", "lora.")) and name in values:
            if field.default is dataclasses.MISSING or name in IN_RECIPES:
                continue
            assert values[name] == field.default, name
            compared += 1
    assert compared > 40


def imported(name):
    """The recipes that a recipe imports, and those that these import."""
    found = set()
    for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "configs":
            for alias in node.names:
                found |= {alias.name} | imported(alias.name)
    return found


def test_only_toys_follow_the_toy():
    for name in [*RECIPES, "base"]:
        toys = {found for found in imported(name) if found.startswith("toy")}
        assert not toys or name.startswith("toy"), name
    assert "toy" in imported("toy_vae_4x16x16") and "wan_1_3b" in imported("l")


def recipe(name):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize("name", RECIPES)
def test_every_section_is_understood(name):
    c = recipe(name)
    assert c.objective in jobs.JOBS
    for section, kind in (
        ("noise", timesteps.Config),
        ("known", conditions.Config),
        ("optim", optim.Config),
        ("loop", loop.Config),
        ("reconstruction", reconstruction.Weights),
    ):
        configs.build(kind, c[section], section)
    vae = configs.build(video_vae.Config, c.model.vae, "model.vae")
    dit, _ = objectives.denoiser_configs(c, 300)
    settings = runs.settings(c)
    assert isinstance(settings, request.Settings)
    # A video of the size that is made by default is one of whole tokens.
    assert vae.latent_channels == dit.in_channels
    grid = vae.latent_shape(settings.num_frames, settings.height, settings.width)[:3]
    assert not any(n % p for n, p in zip(grid, dit.patch, strict=True))


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_of_the_published_weights(name):
    c = recipe(name)
    found = objectives.denoiser_networks(*objectives.denoiser_configs(c, 256_300))
    shapes = found.abstract()
    vae = configs.build(video_vae.Config, c.model.vae, "model.vae")
    sizes = (
        states.count(shapes["dit"]),
        states.count(trained_vae.networks_of(vae).abstract()),
        states.count(shapes["text_encoder"]),
    )
    assert sizes == PUBLISHED[name]


@pytest.mark.parametrize("name", SIZES)
def test_a_denoiser_is_as_large_as_its_recipe_says(name):
    c = recipe(name)
    found = objectives.denoiser_networks(*objectives.denoiser_configs(c, 256_300))
    size = states.count(found.abstract()["dit"])
    assert abs(size / SIZES[name] - 1) <= 0.1
    module = importlib.import_module(f"configs.{name}")
    assert f"of {size / 1e6:.0f}M parameters" in module.__doc__


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_video_vaes_encode_and_decode_at_full_size(name):
    c = recipe(name)
    config = configs.build(video_vae.Config, c.model.vae, "model.vae")
    networks = trained_vae.networks_of(config)
    params = networks.abstract()

    def both(params, video):
        vae = networks.bind(params)["vae"]
        mean, _ = vae.encode(video)
        return mean, vae.decode(mean)

    video = jax.ShapeDtypeStruct((1, 17, 256, 256, 3), jnp.float32)
    mean, decoded = jax.eval_shape(both, params, video)
    assert (states.count(params), mean.shape[1:]) == FROM_SCRATCH[name]
    assert decoded.shape == video.shape


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_windows_of_every_stage_suit_the_video_vae(name):
    c = recipe(name)
    config = configs.build(video_vae.Config, c.model.vae, "model.vae")
    whole = c.sample.num_frames, c.sample.height, c.sample.width
    stages = transforms.stages(c.data.crops, c.loop.num_steps)
    for _, crops in stages:
        for crop in crops:
            config.latent_shape(*crop.within(whole))
    # Whole clips come last, as they are encoded later.
    assert stages[-1][1] == (transforms.Crop(),)


class Ids:
    """As many pieces as UMT5's tokenizer has; nothing is encoded but the empty text."""

    vocab_size, pad_id, eos_id = 256_300, 0, 1
    encode = tokenizer.Tokenizer.encode

    def ids(self, text):
        return (self.eos_id,)


@pytest.mark.parametrize("name", ["wan_14b"])
@pytest.mark.parametrize("shape", [(2, 8, 1, 1, 4), (1, 32, 1, 1, 1)], ids=str)
def test_the_train_step_is_traced_on_a_pod(name, shape):
    """At full size, its text encoder held; without it: training/test_contracts.py."""
    c = recipe(name)
    objective = objectives.denoiser(c, Ids(), fps=16.0)
    optimizer = optim.make(configs.build(optim.Config, c.optim, "optim"), 10)
    vae = configs.build(video_vae.Config, c.model.vae, "model.vae")
    sample = c.sample
    t, h, w, channels = vae.latent_shape(17, sample.height, sample.width)
    rows = 2 * shape[0] * shape[1]
    axes = (jax.sharding.AxisType.Explicit,) * len(meshes.AXES)
    mesh = jax.sharding.AbstractMesh(shape, meshes.AXES, axis_types=axes)
    with jax.sharding.use_abstract_mesh(mesh):

        def place(size, dtype):
            spec = jax.P(("replica", "fsdp"), *(None,) * (len(size) - 1))
            layout = jax.sharding.NamedSharding(mesh, spec)
            return jax.ShapeDtypeStruct(size, dtype, sharding=layout)

        batch = {
            "latents": place((rows, t, h, w, channels), jnp.float32),
            "slots": place((rows, t * h * w // 4), jnp.int8),
            "pattern": place((rows,), jnp.int32),
            "text_ids": place((rows, c.text.length), jnp.int32),
            "text_mask": place((rows, c.text.length), jnp.bool_),
        }
        whole = objective.networks.abstract()
        layouts = objective.networks.partitions()
        fixed = jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(
                leaf.shape,
                jnp.bfloat16,
                sharding=jax.sharding.NamedSharding(mesh, spec),
            ),
            whole["text_encoder"],
            layouts["text_encoder"],
        )

        def begin_and_step(batch, fixed):
            state = states.init(
                objective.networks, optimizer, jax.random.key(0), {}, ["text_encoder"]
            )
            state = dataclasses.replace(state, fixed={"text_encoder": fixed})
            step = steps.make_train_step(
                objective, optimizer, seed=0, num_steps=9, ema_decay=0.9
            )
            return step(state, batch)

        state, metrics = jax.eval_shape(begin_and_step, batch, fixed)
    assert metrics["loss"][0].shape == ()
    whole = sum(
        leaf.size
        for leaf in jax.tree.leaves(state.params)
        if not any(leaf.sharding.spec)
    )
    assert whole <= 0.02 * states.count(state.params)
