"""The plans of two experts: which levels each is asked about, and latents changed by hand."""

import dataclasses

import numpy as np
import pytest

from sora_jax.diffusion import samplers
from sora_jax.generation import plans, request
from tests.generation import tiny

SETTINGS = dataclasses.replace(tiny.SETTINGS, boundary=0.8, num_inference_steps=9)
STRIDES = request.Strides(time=4, patch_time=1, height=8, width=8)


def of(sampler):
    asked = request.check(SETTINGS, STRIDES, prompt="a cat", sampler=sampler)
    return plans.plans(asked, SETTINGS, None)


@pytest.mark.parametrize("sampler", [*samplers.Sampler])
def test_an_expert_is_asked_about_its_own_levels_only(sampler):
    counts = []
    for part, (low, high) in zip(of(sampler), ((0.8, 1), (0, 0.8)), strict=True):
        asked = samplers.evaluation_mask(sampler, part)
        levels = np.stack([part["level"], part["next"]], 1)[:, : asked.shape[1]][asked]
        assert low <= levels.min() and (levels <= high).all() and len(levels) > 3
        counts.append(len(levels))
    assert sum(counts) == samplers.evaluations(sampler, 9, networks=2)


@pytest.mark.parametrize("done", [2, 5, 7, 9])
def test_from_changed_latents_both_experts_go_on_with_a_new_solution(done):
    before = of("unipc")
    after = plans.restart("unipc", before, done)
    taus = np.append(np.concatenate([part["tau"] for part in before]), 0)
    fresh = samplers.plan("unipc", taus[done:]) if done < 9 else {}
    for name in before[0]:
        was, now = (
            np.concatenate([p[name] for p in parts]) for parts in (before, after)
        )
        np.testing.assert_array_equal(now[:done], was[:done])
        if done < 9:
            np.testing.assert_array_equal(now[done:], fresh[name])
    assert [len(part["tau"]) for part in after] == [len(p["tau"]) for p in before]
