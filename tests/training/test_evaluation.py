"""Evaluators that fail, and traces of steps that a run does not come to."""

import jax
import pytest

from sora_jax.training import evaluation, trace


class Good:
    def run(self, params, step):
        yield "norm", params["x"]


class Bad:
    def run(self, params, step):
        raise ValueError("no memory\nfor this")


def test_an_evaluator_that_fails_does_not_keep_the_others(tmp_path, capsys):
    measuring = evaluation.Evaluation({"bad": Bad(), "good": Good()}, tmp_path)
    assert [*measuring.run(7, {"x": 2.0})] == [{"good/norm": 2.0}]
    sentence = "evaluator 'bad' failed at step 7 (ValueError: no memory; "
    assert measuring.failure.startswith(sentence)
    said = capsys.readouterr().err
    assert said.startswith(f"train: {sentence}") and "Traceback" not in said
    text = (tmp_path / "evaluation_error.txt").read_text()
    assert "Traceback" in text and "for this" in text
    fine = evaluation.Evaluation({"good": Good()}, tmp_path)
    assert [*fine.run(8, {"x": 2.0})] and fine.failure == ""


def test_a_failed_evaluator_ends_a_run_of_several_processes(tmp_path, monkeypatch):
    """The others are in a computation that it would have to take part in."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in (1, 0):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        measuring = evaluation.Evaluation({"bad": Bad(), "good": Good()}, tmp_path)
        with pytest.raises(evaluation.Failed, match="'bad' failed at step 7"):
            [*measuring.run(7, {"x": 2.0})]
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == ["evaluation_error_0.txt", "evaluation_error_1.txt"]


@pytest.mark.parametrize(
    "asked, start, num_steps, traced",
    [
        (range(3, 5), 0, 9, [3, 4, 5]),
        (range(3, 5), 3, 9, [4, 5]),  # a run that goes on in the middle
        (range(3, 5), 5, 9, []),  # or behind it
        (range(3, 5), 0, 4, [3, 4]),
        (range(3, 5), 0, 2, []),
        (range(1, 1), 0, 9, [1]),
        (None, 0, 9, []),
    ],
)
def test_a_trace_has_the_steps_that_a_run_takes(
    asked, start, num_steps, traced, tmp_path, monkeypatch, capsys
):
    on, found, calls = [False], [], []

    def switch(value):
        calls.append(value)
        on[0] = value

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: switch(True))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: switch(False))
    with trace.Trace(tmp_path, asked, start, num_steps) as tracing:
        for step in range(start + 1, num_steps + 1):
            tracing.before(step)
            if on[0]:
                found.append(step)
            assert tracing.is_last(step) == (step == max(traced, default=0))
            tracing.after(step)
    assert found == traced
    assert calls == ([True, False] if traced else [])
    said = capsys.readouterr().err
    assert ("are not traced" in said) == (asked is not None and not traced)


def test_a_trace_that_cannot_be_written_costs_no_run(tmp_path, monkeypatch, capsys):
    def fail():
        raise RuntimeError("RESOURCE_EXHAUSTED: x; No space left on device\nmore")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", fail)
    with trace.Trace(tmp_path, range(1, 9), 0, 9) as tracing:
        tracing.before(1)  # and the run is stopped
    said = capsys.readouterr().err
    assert "could not be written" in said and said.count("\n") == 1
