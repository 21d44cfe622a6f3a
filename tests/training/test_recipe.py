"""Every number of a config at its edges: refused in one sentence, or meant."""

import copy
import dataclasses
import math
import types
import typing

import ml_collections
import pytest

from configs import toy
from sora_jax.core import config as configs
from sora_jax.generation import request, runs
from sora_jax.training import recipe

BILLION = 10**9
# What is not refused; all else of 0, -1, 1e9, inf and nan is.
MEANT = {
    "seed": {0, BILLION},
    "mesh.replica": {-1}, "mesh.fsdp": {-1}, "mesh.ring": {-1}, "mesh.ulysses": {-1},
    "mesh.tensor": {-1},
    "data.num_workers": {0}, "data.max_corrupt_share": {0}, "data.gap_clips": {0},
    "data.mirror": {0}, "data.shift": {0}, "data.noise": {0}, "model.captioner.vocab_size": {0},
    "data.crops[0][1][0][0]": {0}, "data.crops[0][1][0][1]": {0},
    "data.crops[0][1][0][2]": {0},
    "packing.shapes": {0}, "packing.tokens": {0}, "packing.max_padding": {0},
    "text.dropout": {0}, "text.tiers.alt": {0}, "text.tiers.short": {0},
    "text.tiers.medium": {0}, "text.tiers.dense": {0}, "text.tiers.structured": {0},
    "text.tiers.model_short": {0}, "text.tiers.model_dense": {0},
    "text.tags[0][1][0]": {0, -1, BILLION}, "text.tag_keep": {0}, "text.shuffle": {0},
    "model.dit.num_kv_heads": {0}, "model.text_encoder.vocab_size": {0},
    "model.vae.linear_channels": {0}, "model.discriminator.num_layers": {0},
    "noise.logit_normal": {0}, "noise.mean": {0, -1}, "noise.levels[0]": {0},
    "noise.band_edges[0]": {0},
    "state_loss.weight": {0}, "state_loss.depth": {0}, "state_loss.noise": {0},
    "reconstruction.latent_noise": {0}, "loop.minutes": {0},
    "known.known_tau": {0}, "known.dropout": {0}, "known.mid_clip": {0},
    "known.probabilities.head": {0}, "known.probabilities.tail": {0},
    "known.probabilities.both": {0}, "known.probabilities.keyframes": {0},
    "known.probabilities.every": {0}, "known.probabilities.region": {0},
    "known.probabilities.levels": {0}, "known.probabilities.reference": {0},
    "known.probabilities.edit": {0}, "known.probabilities.loop": {0}, "lora.rank": {0}, "lora.alpha": {0},
    "reconstruction.l1": {0}, "reconstruction.bands": {0}, "reconstruction.kl": {0},
    "reconstruction.lpips": {0}, "reconstruction.adversarial": {0},
    "reconstruction.adversarial_start": {0}, "reconstruction.disc_learning": {0},
    "optim.learning_rate": {0}, "optim.muon_learning_rate": {0},
    "optim.learning_rate_factors[0][1]": {0}, "optim.warmup_steps": {0, BILLION},
    "optim.final_fraction": {0}, "optim.b1": {0}, "optim.b2": {0}, "optim.momentum": {0},
    "optim.weight_decay": {0}, "optim.clip_norm": {0, BILLION}, "optim.ema_decay": {0},
    "loop.num_steps": {BILLION}, "loop.log_every": {0, BILLION},
    "loop.checkpoint_every": {0, BILLION}, "loop.eval_every": {0, BILLION},
    "loop.keep_checkpoints": {0}, "loop.max_skipped_in_a_row": {BILLION},
    "sample.boundary": {0}, "sample.guidance_scale": {0}, "sample.guidance_scale_2": {0},
    "sample.step_cache": {0}, "sample.guidance_rescale": {0}, "sample.given_scale": {0},
    "sample.anchor_tau": {0}, "known.images": {0},
}  # fmt: skip
# Of sample, what other sections say.
ELSEWHERE = ("text_length", "shift", "known_tau", "trained_levels", "trained_patterns")


def is_number(hint) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(map(is_number, typing.get_args(hint)))
    return typing.get_args(hint)[:1] in ((int,), (float,)) or hint in (int, float)


def places(value, hint):
    """The numbers in a field: where each is, in [0][1] and .name, and how it is set."""
    if is_number(hint):
        yield "", lambda _, number: number
    elif isinstance(value, dict):
        for name, item in value.items():
            for where, put in places(item, typing.get_args(hint)[1]):
                yield f".{name}{where}", _putter(dict, name, put)
    elif isinstance(value, list | tuple):
        inner = typing.get_args(hint)
        for index, item in enumerate(value):
            of = inner[0] if inner[1:] == (...,) else inner[index]
            for where, put in places(item, of):
                yield f"[{index}]{where}", _putter(list, index, put)


def _putter(kind, key, put):
    def changed(value, number):
        copied = kind(value)
        copied[key] = put(copied[key], number)
        return tuple(copied) if kind is list else copied

    return changed


def numbers(cls, section: dict, path: str = ""):
    """(name, section, field, setter) of every number, those that base leaves out too."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        field = cls.__dataclass_fields__[name]
        if dataclasses.is_dataclass(hint):
            yield from numbers(hint, section[name], f"{path}{name}.")
            continue
        if name not in section and field.default_factory is not dataclasses.MISSING:
            section[name] = field.default_factory()
        elif name not in section and field.default is not dataclasses.MISSING:
            section[name] = field.default
        for where, put in places(section.get(name), hint):
            yield f"{path}{name}{where}", section, name, put


def build(config: dict) -> None:
    configs.build(recipe.Recipe, config, "")
    runs.settings(ml_collections.ConfigDict(config))


def test_numbers_outside_of_their_range_are_refused_in_one_sentence():
    config = toy.get_config().copy_and_resolve_references().to_dict()
    config["optim"]["learning_rate_factors"] = (("^text_encoder", 0.1),)
    config["text"]["tags"] = (("motion", (0.1,), ("low", "high")),)
    found = [*numbers(recipe.Recipe, config)]
    of_sample = numbers(request.Settings, config["sample"], "sample.")
    found += [one for one in of_sample if one[2] not in ELSEWHERE]
    for name in ELSEWHERE:
        config["sample"].pop(name, None)
    assert {name for name, *_ in found} >= MEANT.keys() and len(found) > 110
    build(config)
    for name, section, field, put in found:
        before, meant = section[field], MEANT.get(name, set())
        for number in (0, -1, BILLION, math.inf, math.nan):
            section[field] = put(copy.deepcopy(before), number)
            try:
                build(config)
            except ValueError as error:
                assert number not in meant, str(error)
                assert field in str(error) and "\n" not in str(error), (
                    name,
                    str(error),
                )
            else:
                assert number in meant, f"{name} takes {number}"
        section[field] = before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loop.num_steps": 2.5}, "loop.num_steps is 2.5; it must be a whole number in"),
        ({"loop.num_steps": True}, "loop.num_steps is True; it must be a whole number"),
        ({"optim.clip_norm": math.inf}, r"optim.clip_norm .* or 0: no clipping"),
        ({"optim.b1": "0.9"}, "optim.b1 is '0.9'; it must be a number in"),
        ({"text.frozen": 1}, "text.frozen is 1; it must be True or False"),
        ({"data.latents": 3}, "data.latents is 3; it must be text"),
        ({"noise.levels": (0.0, 0.5, 1.0)}, "noise.levels .* must have 2 entries"),
        ({"noise.levels": (0.9, 0.1)}, "noise: levels must be low < high"),
        ({"model.dit.num_heads": 7}, "model.dit: dim 160 is not a multiple of num_h"),
        ({"model.dit.freq_dim": 33}, "model.dit: freq_dim 33 must be even"),
        ({"reconstruction.mse": 0.0}, "l1, mse, bands and lpips are all 0"),
        ({"known.probabilities": {"none": math.nan}}, "known.probabilities.none is nan"),
    ],
)  # fmt: skip
def test_types_and_fields_that_do_not_fit_together_are_refused(changes, message):
    config = toy.get_config().copy_and_resolve_references().to_dict()
    for name, value in changes.items():
        *sections, field = name.split(".")
        node = config
        for section in sections:
            node = node[section]
        node[field] = value
    with pytest.raises(ValueError, match=message):
        build(config)


def test_pictures_are_taken_where_first_frames_are_trained():
    c = toy.get_config()
    assert runs.settings(c).takes_images
    c.known.probabilities = {"none": 0.5, "head": 0.5}
    assert runs.settings(c).takes_images
    c.known.probabilities = {"none": 0.5, "tail": 0.5}
    assert not runs.settings(c).takes_images
    c.sample.takes_images = True
    assert runs.settings(c).takes_images


def test_a_rate_that_no_run_has_seen_is_asked_for():
    settings = runs.settings(toy.get_config())
    strides = request.Strides(4, 1, 4, 4)
    with pytest.raises(
        ValueError, match="give fps: the model.s config has no frame rate"
    ):
        request.check(settings, strides, prompt="a red circle")
    assert request.check(settings, strides, prompt="a red circle", fps=9.0).fps == 9
