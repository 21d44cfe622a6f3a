"""The errors beside every estimate follow from what is committed, and are in bounds."""

import dataclasses

import pytest

from sora_jax.forecast import calibration, step_time
from sora_jax.forecast.chips import REACHED


def test_the_table_is_what_the_measurements_lead_to():
    fitted = dataclasses.asdict(calibration.fit(calibration.measured()))
    assert dataclasses.asdict(REACHED) == pytest.approx(fitted, rel=0.02)


def test_estimates_meet_what_is_published():
    offload, full, sampling = calibration.checks()
    assert offload.estimated < full.estimated
    mean = (offload.estimated + full.estimated) / 2
    assert mean == pytest.approx(calibration.TRAINING, rel=0.02)
    assert abs(offload.error) < 0.15 and abs(full.error) < 0.15
    assert abs(sampling.error) < 0.25


def test_an_error_is_a_share_of_what_is_published():
    check = calibration.Check("a clip", 40.0, 30.0)
    assert check.error == -0.25
    assert str(check) == "a clip: 30.0 s estimated, 40.0 s published, -25.0%"


def test_a_gradient_in_two_parts_costs_two_more_products_and_its_scores_again():
    def work(values, gradients, products, scores):
        flops = 2.0 * 128 * (2 * values + products * gradients)
        return step_time.Work(flops=flops, scores=values + scores * gradients)

    ours, theirs = work(3e6, 1e6, 5, 1), work(3e6, 1e6, 7, 2)
    found = calibration.as_published(ours, (500, 1000))
    assert found == dataclasses.replace(theirs, tiles=10.0)
    sampled = work(3e6, 0, 5, 1)
    assert calibration.as_published(sampled, (500, 1000)).flops == sampled.flops
