"""The scores of tasks: the truth is perfect, and what is still, pasted or wrong is not."""

import dataclasses
import json
import types

import numpy as np
import pytest

from experiments import task_scoring as scoring
from experiments import task_truth
from sora_jax.evals import statistics
from sora_jax.generation import tasks

CLIPS = 4
TRIALS = sorted(task_truth.TRIALS)


@pytest.fixture(scope="module")
def scored():
    """The rows of every task, without a model: by task and row."""
    found = {}
    for name, trial in task_truth.TRIALS.items():
        cases = trial.cases(CLIPS)
        truths = [scoring.Result.of(one.truth_thwc) for one in cases]
        pace = None
        if trial.beside:
            pace = np.mean(
                [
                    np.linalg.norm(np.diff(c.path_tx, axis=0), axis=1).mean()
                    for c in cases
                ]
            )
        found[name] = task_truth.rows(trial, cases, {}, truths, pace)
    return found


def seen(case, video_thwc):
    usual_p = scoring.changes(case.truth_thwc)
    result = scoring.Result.of(video_thwc)
    best = scoring.Result.of(case.truth_thwc)
    return scoring.Seen(case, result, best, usual_p, scoring.spread([usual_p]))


@pytest.mark.parametrize("name", TRIALS)
def test_the_truth_is_perfect(scored, name):
    assert scored[name][task_truth.TRUTH][scoring.ALL].value == 1
    if "reference" in name:  # of few clips; no more than chance of many
        return
    for figure in task_truth.TRIALS[name].figures:
        value = scored[name][task_truth.TRUTH][figure.name].value
        if figure.bar is not None:
            assert value >= figure.bar if figure.at_least else value <= figure.bar


@pytest.mark.parametrize("name", TRIALS)
@pytest.mark.parametrize("control", ["copy", "freeze", "paste", "another clip"])
def test_no_control_is_good(scored, name, control):
    if (row := scored[name].get(control)) is None:
        pytest.skip("nothing is given that could be used so")
    if (name, control) == ("text", "freeze"):
        assert row["moving things: all of the text"].value == 0
        return  # half of the things are still
    assert row[scoring.ALL].value == 0


@pytest.mark.parametrize("name", TRIALS)
def test_a_still_video_beats_the_truth_in_nothing_that_has_a_bar(scored, name):
    still, truth = scored[name]["freeze"], scored[name][task_truth.TRUTH]
    failed = []
    for figure in task_truth.TRIALS[name].figures:
        if figure.bar is None:
            continue
        sign = 1 if figure.at_least else -1
        assert sign * still[figure.name].value <= sign * truth[figure.name].value + 1e-9
        failed.append(sign * still[figure.name].value < sign * figure.bar)
    assert any(failed)


@pytest.mark.parametrize("name", ["extend", "extend_backwards", "connect", "fill_2"])
def test_a_still_continuation_is_off_the_place_frozen_and_has_a_seam(scored, name):
    still = scored[name]["freeze"]
    assert still["same object, moving"].value == 0
    assert still["seam \\|z\\|"].value > 3
    assert still["given part exact"].value == 1
    places = [key for key in still if key.startswith("place error")]
    assert all(still[key].value > 1.1 for key in places)


def test_what_is_given_is_where_the_truth_has_it():
    (one,) = task_truth.extensions(1)
    assert len(one.truth_thwc) == 17 and one.whole_t.sum() == 9
    np.testing.assert_array_equal(one.inputs["video"], one.truth_thwc[one.whole_t])
    (one,) = task_truth.backward_extensions(1)
    np.testing.assert_array_equal(one.inputs["video"], one.truth_thwc[one.whole_t])
    (one,) = task_truth.connections(1)
    ends = np.concatenate([one.inputs["video"], one.inputs["video_2"]])
    np.testing.assert_array_equal(ends, one.truth_thwc[one.whole_t])
    (one,) = task_truth.fills(1, 4)
    np.testing.assert_array_equal(one.inputs["video"], one.truth_thwc[one.whole_t])
    assert (one.inputs["fps"], one.whole_t.sum()) == (2, 3)


def test_edits_of_a_part_change_nothing_outside_of_it():
    for make in (task_truth.inpaintings, task_truth.backgrounds):
        for one in make(CLIPS):
            same = (one.before_thwc == one.truth_thwc).all(-1)
            assert same[one.given_thw].all() and not same.all()
            np.testing.assert_array_equal(one.inputs["mask"], ~one.given_thw)
    (one,) = task_truth.inpaintings(1)
    assert one.stated.subjects[0].colour == one.colour != one.old
    (one,) = task_truth.backgrounds(1)
    assert one.stated.tone in ("dark", "light")


def test_places_of_things_are_those_of_the_scene():
    for one in task_truth.outpaintings(2) + task_truth.loops(2):
        assert seen(one, one.truth_thwc).errors_t.max() < 0.5


def test_a_lost_thing_is_wrong_in_all():
    (one,) = task_truth.extensions(1)
    empty = seen(one, np.full_like(one.truth_thwc, 127))
    assert scoring.frozen(empty) and not scoring.kept(empty)
    assert scoring.place(empty) == scoring.velocity(empty) == scoring.LOST
    assert scoring.pace(empty) == 0 and not scoring.uncut(empty)
    assert not scoring.smooth_path(seen(task_truth.connections(1)[0], empty.video_thwc))


def test_a_late_thing_has_its_distance_and_velocity():
    (one,) = task_truth.extensions(1)
    # half as fast after the join
    slow = one.truth_thwc.copy()
    for frame in range(9, 17):
        slow[frame] = one.truth_thwc[8 + (frame - 8) // 2]
    half = seen(one, slow)
    speed = np.linalg.norm(one.path_tx[1] - one.path_tx[0])
    assert scoring.place_after(8)(half) == pytest.approx(4 * speed, abs=0.4)
    assert scoring.velocity(half) == pytest.approx(speed / 2, abs=0.15)
    assert scoring.place_after(1)(half) == pytest.approx(speed, abs=0.3)


def test_a_jump_is_a_cut_a_seam_and_no_even_path():
    (one,) = task_truth.connections(1)
    jumps = one.truth_thwc.copy()
    jumps[5:12] = one.truth_thwc[12]
    found = seen(one, jumps)
    assert scoring.exact(found)
    assert not scoring.uncut(found) and not scoring.smooth_path(found)
    assert scoring.seam(found) > 5 > scoring.seam(seen(one, one.truth_thwc))


def test_the_spread_of_even_motion_is_not_zero_and_a_jump_does_not_widen_it():
    even = np.full(8, 2.0)
    assert scoring.spread([even] * 3) == 0.25
    rough = np.tile([1.0, 3.0], 4)
    wide = scoring.spread([rough] * 3)
    assert wide == pytest.approx(1.4826)
    assert scoring.spread([rough] * 3 + [np.append(even, 100)]) < 2 * wide


def test_a_loop_closes_and_a_line_does_not():
    (one,) = task_truth.loops(1)
    assert scoring.closing(seen(one, one.truth_thwc)) == pytest.approx(1, abs=0.2)
    (line,) = task_truth.first_frames(1)
    assert scoring.closing(seen(line, line.truth_thwc)) > 2
    still = np.repeat(line.truth_thwc[:1], 9, axis=0)
    assert scoring.closing(seen(line, still)) == scoring.LOST


def test_a_place_copied_from_the_picture_correlates():
    cases = task_truth.references(12, named=True)
    there = [seen(c, np.repeat(c.inputs["references"][0][None], 9, 0)) for c in cases]
    assert scoring.place_correlation(there).value > 0.95
    assert (
        abs(scoring.place_correlation([seen(c, c.truth_thwc) for c in cases]).value)
        < 0.6
    )
    assert all(
        not (c.stated.subjects[0].colour or c.stated.subjects[0].shape)
        for c in task_truth.references(3, named=False)
    )


def test_given_frames_are_measured_before_they_are_put_in():
    (one,) = task_truth.keyframes(1, (3,))
    worse = np.clip(one.truth_thwc.astype(int) + 20, 0, 255).astype(np.uint8)
    result = scoring.Result(one.pasted(worse), worse)
    usual_p = scoring.changes(one.truth_thwc)
    best = scoring.Result.of(one.truth_thwc)
    found = scoring.Seen(one, result, best, usual_p, 0.25)
    assert scoring.exact(found)
    assert scoring.anchor(found) == pytest.approx(22.1, abs=0.5)
    assert scoring.anchor_gap(found) < -40


class Clip:
    def __init__(self, video_thwc):
        self._video_thwc = video_thwc

    def frames(self):
        return self._video_thwc


@pytest.mark.parametrize("name", ["extend", "fill_2", "outpaint", "text", "loop"])
def test_the_nearest_training_clip_is_found(name):
    cases = task_truth.TRIALS[name].cases(3)
    t = len(cases[0].truth_thwc)
    window = slice(8, 17) if t == 17 else slice(0, 9)
    clips = [Clip(one.truth_thwc[window]) for one in cases]
    odd = Clip(np.zeros((5, 32, 32, 3), np.uint8))
    results = task_truth.nearest(cases, [odd, *clips[::-1]])
    for one, result in zip(cases, results, strict=True):
        np.testing.assert_array_equal(result.video_thwc, one.truth_thwc)
    with pytest.raises(ValueError, match="no training clip"):
        task_truth.nearest(cases, [odd])


def test_controls_take_what_is_given():
    (one,) = task_truth.fills(1, 4)
    held = scoring.freeze(one).video_thwc
    np.testing.assert_array_equal(held[1:4], one.truth_thwc[[0, 0, 0]])
    np.testing.assert_array_equal(held[5:8], one.truth_thwc[[4, 4, 4]])
    again = scoring.copy(one).video_thwc
    np.testing.assert_array_equal(again[1:4], one.truth_thwc[[0, 4, 8]])
    grey = scoring.paste(one).video_thwc
    assert (grey[1] == 127).all() and (grey[4] == one.truth_thwc[4]).all()
    (before,) = task_truth.backward_extensions(1)
    np.testing.assert_array_equal(
        scoring.freeze(before).video_thwc[0], before.truth_thwc[8]
    )


def test_rows_are_stored_and_read(scored):
    found = scored["extend"]
    again = task_truth._of_json(json.loads(json.dumps(task_truth._to_json(found))))
    assert again == found
    text = task_truth.table("extend", {task_truth.OURS: found["freeze"]} | found)
    assert "Missed: place error at +1, px" in text and "given part exact" in text
    assert "All bars are met" in task_truth.table(
        "extend", {task_truth.OURS: found[task_truth.TRUTH]}
    )


def test_finished_tasks_are_not_computed_again(scored, monkeypatch, tmp_path, capsys):
    settings = statistics.Estimate(1.0)
    pipe = types.SimpleNamespace(source={"step": 1}, settings=settings)
    load = lambda model: pipe  # noqa: E731
    monkeypatch.setattr(task_truth.pipeline.Pipeline, "from_pretrained", load)
    asked = []

    def try_task(trial, pipe, count, clips):
        asked.append(count)
        if trial.task == "fill":
            raise tasks.Untrained("task 'fill' needs 'every'")
        return {task_truth.OURS: scored["extend"]["freeze"]}

    monkeypatch.setattr(task_truth, "try_task", try_task)
    out = tmp_path / "out.json"

    def run(clips):
        arguments = ["task_truth", "--tasks", "extend,fill_2", "--clips", str(clips)]
        monkeypatch.setattr("sys.argv", [*arguments, "--out", str(out)])
        task_truth.main()
        return capsys.readouterr().out

    first = run(4)
    assert "Not trained: task 'fill'" in first and "given part exact" in first
    assert run(4) == first and asked == [4, 4, 4]  # fill, which has no rows, again
    assert run(5) != first and asked[-2:] == [5, 5]
    pipe.source = {"step": 2}
    run(5)
    assert asked[-2:] == [5, 5] and len(asked) == 7


def test_a_value_meets_its_bar():
    lowest = scoring.Figure("x", len, 0.9)
    assert lowest.meets(True) and not lowest.meets(False) and lowest.meets(None)
    highest = scoring.Figure("x", len, 2.0, at_least=False, clip_bar=3.0)
    assert highest.meets(2.5) and not highest.meets(3.5)
    assert highest.meets(False) and not highest.meets(True)
    assert dataclasses.replace(highest, judges=False).meets(9.0)
    middle = scoring.Figure("x", len, median=True).estimate([0.0, 1.0, 45.0, None])
    assert middle.value == 1 and middle.low >= 0 and middle.count == 3
    assert isinstance(middle, statistics.Estimate)
