"""Benches beside a peer, tiny: they compare before they time, and say what is no result."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.bench import attention, denoiser, side_by_side

TINY = dataclasses.replace(
    denoiser.SMALL, dim=24, num_layers=2, num_heads=2, mlp_dim=48, text_dim=16
)
ROWS = ("forward", "train", "checkpointed", "sample")


def compare(python, rows=ROWS, config=TINY):
    return denoiser.compare(python, config, (2, 4, 6), 5, rows, ["eager"], 2, 3, "tiny")


@pytest.mark.slow
@pytest.mark.peers
def test_the_denoiser_agrees_with_diffusers_before_timing(peers_python):
    rows = compare(peers_python)
    assert [made["name"] for made in rows] == [f"tiny float32 {row}" for row in ROWS]
    assert all(made["ratios"]["eager"] > 0 for made in rows)
    assert rows[2]["memory"].keys() == {"ours", "eager"}


@pytest.mark.peers
def test_no_ratio_if_results_differ(peers_python, monkeypatch):
    ours = denoiser.our_operations

    def other(config, params, inputs, steps):
        inputs = inputs | {"text": 1.001 * inputs["text"]}
        return ours(config, params, inputs, steps)

    monkeypatch.setattr(denoiser, "our_operations", other)
    with pytest.raises(ValueError, match="forward differs from the peer's"):
        compare(peers_python, ["forward"])


def test_without_a_peer_only_ours_is_timed():
    (made,) = compare(None, ["forward"])
    assert set(made["times"]) == {"ours"} and made["ratios"] == {}
    assert "does not exist" in side_by_side.missing("/no/python", ["diffusers"])


@pytest.mark.slow
@pytest.mark.peers
def test_attention_agrees_with_torch_and_jax(peers_python, tmp_path):
    forms = ["stock", "reference", "chunked", "sdpa"]
    rows = attention.compare((2, 40, 3, 8), "float32", forms, peers_python, 2)
    assert [set(made["ratios"]) for made in rows] == [{*forms}] * 2
    side_by_side.write(str(tmp_path / "rows.json"), rows, bench="attention")
    lines = side_by_side.table(str(tmp_path / "rows.json")).splitlines()
    assert lines[1:] == [side_by_side.line(made) for made in rows]
    assert json.loads((tmp_path / "rows.json").read_text())["bench"] == "attention"


def test_turns_alternate_and_a_ratio_is_the_median_of_rounds():
    asked = []

    def call(name, times):
        return lambda count: asked.append((name, count)) or times.pop(0)

    times = side_by_side.take_turns(
        {"ours": call("a", [9, 1, 2, 1]), "sdpa": call("b", [0.2, 2, 3, 4])}, 3
    )
    # Once to know how often; what is shorter than a turn is done more than once.
    a, b = ("a", 1), ("b", 3)
    assert asked == [("a", 1), ("b", 1), a, b, b, a, a, b]
    assert side_by_side.ratio(times["ours"], times["sdpa"]) == 2.0


@pytest.mark.parametrize("last, noisy", [(1.1, False), (1.3, True)])
def test_times_that_vary_are_noisy(last, noisy):
    times = {"ours": [1.0, 1.0, last], "sdpa": [1.0, 1.0, 1.0]}
    made = side_by_side.row("a row", times, {"sdpa": 1.2})
    assert made["noisy"] is noisy
    assert ("NOISY" in side_by_side.line(made)) is noisy
    assert "(bar 1.2 MISSED)" in side_by_side.line(made)


@pytest.mark.parametrize("wrong", [1.001, np.nan])
def test_different_results_are_refused(wrong):
    side_by_side.check("same", np.ones(3), np.ones(3), 1e-4)
    with pytest.raises(ValueError, match="other differs from the peer's"):
        side_by_side.check("other", wrong * np.ones(3), np.ones(3), 1e-4)
