"""The scores of edits: what a perfect edit, a copy and a spoilt background get."""

import dataclasses

import numpy as np
import pytest

from experiments import edit_truth
from sora_jax.toyworld import families, render


@pytest.fixture(scope="module")
def asked():
    return edit_truth.pairs(6, "attribute") + edit_truth.pairs(6, "motion")


def cells(line):
    return [float(cell.split()[0]) for cell in line.strip("| ").split("|")[1:]]


def recoloured(asked):
    """The same scenes with the new colour, rendered again."""
    made = []
    for family in ("attribute", "motion"):
        want = [one for one in asked if one[1].family == family]
        for index in range(10_000):
            if not want:
                break
            scene = families.scene("tw32", "test", index, {family: 1.0}, 11)
            if not np.array_equal(render.render(scene), want[0][0]):
                continue
            colour = want.pop(0)[1].prompts[0].slots.subjects[0].colour
            (thing,) = scene.objects
            thing = dataclasses.replace(thing, colour=colour)
            made.append(
                render.render(dataclasses.replace(scene, objects=(thing,))).astype(
                    float
                )
            )
    return made


def test_a_perfect_edit_is_right_in_all_and_keeps_the_background(asked):
    made = recoloured(asked)
    assert len(made) == len(asked)
    *right, psnr = cells(edit_truth.row("perfect", made, asked))
    assert right == [1.0, 1.0, 1.0] and psnr > 60


def test_a_copy_has_the_old_colour_and_a_spoilt_background_is_seen(asked):
    copies = [source.astype(float) for source, *_ in asked]
    colour, rest, both, psnr = cells(edit_truth.row("copy", copies, asked))
    assert (colour, rest, both) == (0.0, 1.0, 0.0) and psnr > 60
    noise = np.random.default_rng(0).normal(0, 10, copies[0].shape)
    spoilt = [np.clip(video + noise, 0, 255) for video in copies]
    assert 26 < cells(edit_truth.row("spoilt", spoilt, asked))[-1] < 30
