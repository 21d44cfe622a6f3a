"""Several checkpoints of a run: all of them, those asked for, and as they appear."""

import itertools
import json
import os
import re
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import toy
from sora_jax.core import config as configs
from sora_jax.core import mesh as meshes
from sora_jax.evals import statistics
from sora_jax.evals.prompts import (
    cached_sampling,
    checkpoints,
    run_scores,
    scoring,
)
from sora_jax.generation import cache_calibration, compiled, pipeline, runs
from sora_jax.training import checkpoint, run_folder, state, trained_vae
from tests import conftest
from tests.evals import tiny_run

JOB = []
ASKED = {
    "motion": 5,
    "relation": 0,
    "attribute": 0,
    "motion_held_out": 2,
    "relation_held_out": 0,
    "attribute_held_out": 0,
    "batch_size": 8,
}
MAKE_MESH = meshes.make_mesh
PARTS = "parts/model,-seed-0-motion.safetensors"


@pytest.fixture(scope="module", autouse=True)
def job():
    with conftest.lone_job("evaluate") as module:
        JOB.append(module)
        yield


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Most of these tests are not about meshes."""
    mesh = MAKE_MESH(devices=jax.devices()[:1])
    monkeypatch.setattr(meshes, "make_mesh", lambda shape: mesh)


@pytest.fixture(scope="module")
def reference():
    """What scores are held against, which is the same for all tests that ask the same."""
    return []


@pytest.fixture(autouse=True)
def made_once(monkeypatch, reference):
    make = scoring.make_reference

    def made(*arguments):
        reference[:] = reference or [make(*arguments)]
        return reference[0]

    monkeypatch.setattr(scoring, "make_reference", made)


@pytest.fixture(autouse=True)
def untrained(monkeypatch):
    """Weights that no initializer is compiled for, which takes longest of all."""

    def init(self, key):
        params = jax.tree.map(jnp.asarray, tiny_run.filled(self.abstract()))
        return state._place(params, self.partitions())

    monkeypatch.setattr(state.Networks, "init", init)


@pytest.fixture(scope="module")
def vaes():
    return {}


@pytest.fixture(autouse=True)
def read_once(monkeypatch, vaes):
    """The VAE is the same in all runs, and is read three times for each checkpoint."""
    load = trained_vae.load

    def read(folder, **named):
        digest = checkpoint.weights_digest(trained_vae.component(folder))
        key = digest, jax.sharding.get_mesh()
        vaes[key] = vaes.get(key) or load(folder, **named)
        return vaes[key]

    monkeypatch.setattr(trained_vae, "load", read)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Shards, and a run of three steps that has saved at 0 and at 1."""
    folder = tmp_path_factory.mktemp("scores")
    tiny_run.make_shards(folder / "shards")
    tiny_run.make_run(folder / "run", folder / "shards")
    set_config(folder / "run", num_steps=3, checkpoint_every=1, keep_checkpoints=2)
    tiny_run.add_checkpoint(folder / "run", 1)
    return folder


@pytest.fixture
def model(base, tmp_path):
    """A copy of the run, to be spoilt."""
    return shutil.copytree(base / "run", tmp_path / "run")


def set_config(folder, **loop):
    config = configs.read(folder)
    config.loop.update(loop)
    configs.write(folder, config)


@pytest.fixture
def score(base, tmp_path):
    """Runs the job on a model; returns the folder with its results."""

    def run(model, out="out", **given):
        given = ASKED | given
        out = tmp_path / out
        tiny_run.evaluate(
            JOB[-1], model=model, shards=base / "shards", out=out, **given
        )
        return out

    return run


@pytest.fixture
def looks(monkeypatch):
    """Sets what happens to a run while it is waited for, one thing a look."""

    def happen(*events):
        left = iter(events)

        def sleep(seconds):
            assert seconds == checkpoints.POLL_SECONDS
            event = next(left, None)
            assert event is not None, "the run is waited for without end"
            event()

        monkeypatch.setattr(checkpoints.time, "sleep", sleep)

    return happen


def scored_steps(out):
    files = out.glob("steps/*/scores.json")
    return sorted(int(file.parent.name) for file in files)


def read(file):
    return json.loads(file.read_text())


def never(*arguments, **named):
    raise AssertionError("done again")


def test_all_checkpoints_by_one_program(base, score, monkeypatch, capsys):
    """Each has the scores that it has alone; the reference is made once."""
    made, sizes = [], []
    make_reference, add = scoring.make_reference, run_scores.RunScores.add

    def counted(*arguments):
        made.append(1)
        return make_reference(*arguments)

    def measured(self, *arguments):
        add(self, *arguments)
        programs = (compiled.denoise_chunk, compiled.encode_text, compiled.decode_video)
        sizes.append([program._cache_size() for program in programs])

    monkeypatch.setattr(scoring, "make_reference", counted)
    monkeypatch.setattr(run_scores.RunScores, "add", measured)
    out = score(base / "run", checkpoints="all")
    assert scored_steps(out) == [0, 1] and len(made) == 1
    assert sizes[0] == sizes[1] and min(sizes[0]) > 0
    printed = capsys.readouterr().out
    assert "step 1: motion/" in printed and "Motion: 5 prompts" in printed

    newest = read(out / "scores.json")
    assert newest == read(out / "steps" / "000001" / "scores.json")
    oldest = read(out / "steps" / "000000" / "scores.json")
    clips = {
        step: safetensors.numpy.load_file(out / "steps" / step / PARTS)["motion"]
        for step in ("000000", "000001")
    }
    assert (clips["000000"] != clips["000001"]).any()
    alone = read(score(base / "run", "alone", checkpoints=0) / "scores.json")
    assert alone["scores"] == oldest["scores"] and alone["rows"] == oldest["rows"]
    assert alone.keys() | {"made_with", "saved"} == oldest.keys()

    page = (out / "report.html").read_text()
    # Four prompts of a suite, two where there are no more; two checkpoints,
    # reconstruction and ground truth.
    assert page.count("<video") == (4 + 2) * 4
    assert 'class="entries columns"' in page
    for text in (
        "Motion by checkpoint",
        "Motion held out by checkpoint",
        "loss by noise",
    ):
        assert text in page
    assert page.count('class="band"') >= 2
    assert re.search(r'<tr class=strong><th scope="row">step 1</th>', page)
    assert '<th scope="row">step 0</th>' in page
    assert '<th scope="row">untrained weights</th>' in page


def test_what_is_scored_is_not_scored_again(model, score, monkeypatch):
    out = score(model, checkpoints="0,1")
    before = read(out / "scores.json")
    shutil.rmtree(model / "checkpoints" / "0")  # its scores are kept
    (out / "report.html").unlink()
    tiny_run.add_checkpoint(model, 2)
    with monkeypatch.context() as patch:
        for place, name in ((pipeline.Pipeline, "__call__"), (scoring, "judge")):
            patch.setattr(place, name, never)
        score(model, checkpoints="0,1")
        with pytest.raises(AssertionError, match="done again"):
            score(model, checkpoints="1,2")
        with pytest.raises(AssertionError, match="done again"):
            score(model, checkpoints="0,1", guidance_scale=3.0)
        # A run that was trained anew in the same folder has other weights.
        shutil.move(model / "checkpoints" / "1", model / "before")
        tiny_run.add_checkpoint(model, 1)
        for asked in ("0,1", "1"):
            with pytest.raises(AssertionError, match="done again"):
                score(model, checkpoints=asked)
        shutil.rmtree(model / "checkpoints" / "1")
        shutil.move(model / "before", model / "checkpoints" / "1")
    assert read(out / "scores.json") == before
    assert "step 0" in (out / "report.html").read_text()
    score(model, checkpoints="1,2")
    page = (out / "report.html").read_text()
    assert ">step 2<" in page and ">step 0<" not in page  # those that are asked for
    assert scored_steps(out) == [0, 1, 2]


def test_a_run_is_followed_to_its_last_step(model, score, looks, capsys):
    """Checkpoints come while it is looked at; one goes before it was seen."""

    def two_more():
        tiny_run.add_checkpoint(model, 2, keep=1)
        tiny_run.add_checkpoint(model, 3, keep=1)

    looks(lambda: None, two_more)
    out = score(model, follow=True)
    assert scored_steps(out) == [0, 1, 3]
    said = capsys.readouterr().err
    assert "step 2: deleted before it was read" in said
    assert "its newest 2 (loop.keep_checkpoints)" in said
    page = (out / "report.html").read_text()
    assert "step 2: deleted before it was read" in page and ">step 3<" in page
    assert read(out / "scores.json") == read(out / "steps" / "000003" / "scores.json")
    score(model, follow=True)  # ends at once: a look would fail
    assert scored_steps(out) == [0, 1, 3]


def test_steps_before_checkpoint_every_was_changed_are_not_missed(tmp_path):
    c, noted = toy.get_config(), []
    c.loop.num_steps = 1400
    for every, steps in ((500, [500, 1000]), (200, [1200, 1400])):
        c.loop.checkpoint_every = every
        run_folder.claim(tmp_path, c)
        for step in steps:
            (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    (tmp_path / "checkpoints" / "500").rmdir()
    followed = checkpoints.follow(tmp_path, lambda step: False, noted.append)
    assert [*followed] == [1000, 1200, 1400] and not noted


def test_a_run_without_a_checkpoint_is_waited_for(model, score, looks):
    shutil.rmtree(model / "checkpoints" / "1")
    shutil.move(model / "checkpoints", model / "later")
    set_config(model, num_steps=0)
    looks(lambda: shutil.move(model / "later", model / "checkpoints"))
    assert scored_steps(score(model, follow=True)) == [0]


def test_a_stopped_evaluation_goes_on(model, score, looks, monkeypatch):
    """SIGTERM ends it as Ctrl-C does."""
    before = signal.getsignal(signal.SIGTERM)
    looks(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        score(model, follow=True)
    assert signal.getsignal(signal.SIGTERM) is before
    asked, load = [], runs.load

    def counted(folder, step):
        asked.append(step)
        return load(folder, step=step)

    monkeypatch.setattr(runs, "load", counted)
    looks(lambda: tiny_run.add_checkpoint(model, 3))
    out = score(model, follow=True)
    assert asked == [3] and scored_steps(out) == [0, 1, 3]
    assert "deleted before" in (out / "report.html").read_text()  # step 2


def test_a_checkpoint_that_is_deleted_while_it_is_read(
    model, score, monkeypatch, capsys
):
    tiny_run.add_checkpoint(model, 2)
    load = runs.load

    def vanishing(folder, step):
        if step == 1:
            shutil.rmtree(folder / "checkpoints" / "1")
        return load(folder, step=step)

    monkeypatch.setattr(runs, "load", vanishing)
    out = score(model, checkpoints="all")
    assert scored_steps(out) == [0, 2]
    sentence = "step 1: deleted while it was read, so it is not scored"
    assert f"evaluate: {sentence}\n" in capsys.readouterr().err
    assert sentence in (out / "report.html").read_text()


def test_a_damaged_checkpoint_is_named(model, score, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "_DELETE_SECONDS", 0.2)
    for file in (model / "checkpoints" / "1").rglob("*"):
        if file.is_file():
            file.write_bytes(b"damaged")
    out = score(model, checkpoints="all")
    assert scored_steps(out) == [0]
    assert "step 1: the checkpoint cannot be read" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="evaluate: step 1: the checkpoint cannot be"):
        score(model, checkpoints=1)
    with pytest.raises(SystemExit, match="no checkpoint of .* was scored"):
        score(model, "none", checkpoints="1,7")


def test_a_stopped_run_is_warned_about_once(model, score, looks, capsys):
    long_ago = time.time() - 3 * 3600
    for file in ("config.py.txt", "metrics.jsonl", "checkpoints"):
        os.utime(model / file, (long_ago, long_ago))
    looks(*itertools.repeat(lambda: None, 3), lambda: tiny_run.add_checkpoint(model, 3))
    score(model, follow=True)
    said = capsys.readouterr().err
    assert len(re.findall(r"has written nothing for 1\d\d minutes", said)) == 1
    assert "is at step 1 of 3" in said


def test_wrong_use_ends_with_a_sentence(base, model, score, tmp_path):
    with pytest.raises(SystemExit, match="evaluate: .*nowhere is not a run folder"):
        score(tmp_path / "nowhere", follow=True)
    with pytest.raises(SystemExit, match="leave --checkpoints out"):
        score(model, follow=True, checkpoints="all")
    with pytest.raises(SystemExit, match="calibrated for one checkpoint"):
        score(model, follow=True, step_cache=0.1)
    with pytest.raises(SystemExit, match="not 1,newest"):
        score(model, checkpoints="1,newest")
    with pytest.raises(SystemExit, match="--follow need --model"):
        tiny_run.evaluate(
            JOB[-1], vae=model, follow=True, shards=base / "shards", out=tmp_path
        )
    with pytest.raises(SystemExit, match="elsewhere is not a run folder"):
        score(model, also=tmp_path / "elsewhere")
    shutil.rmtree(model / "checkpoints")
    with pytest.raises(SystemExit, match="holds no checkpoint yet"):
        score(model, checkpoints="all")


def test_configs_of_other_runs_are_compared(base, model, score):
    set_config(model, num_steps=7)
    out = score(base / "run", also=model)
    page = (out / "report.html").read_text()
    table = page[page.index("Config differences") :]
    assert "Fields that differ: 1." in table
    row = re.search(r"<code>loop.num_steps</code></th>(.*?)</tr>", table).group(1)
    assert re.findall("<code>(.*?)</code>", row) == ["3", "7"]
    out = score(base / "run", "alone")
    assert "Config differences" not in (out / "report.html").read_text()


@pytest.mark.slow
def test_eight_devices_make_the_same_clips(base, score, monkeypatch):
    """Weights are read onto the mesh in parts, and clips are split over it."""
    one = score(base / "run")
    mesh = MAKE_MESH({"fsdp": 8})
    monkeypatch.setattr(meshes, "make_mesh", lambda shape: mesh)
    found, load = [], runs.load

    def watched(folder, step):
        found.append(load(folder, step=step))
        return found[-1]

    monkeypatch.setattr(runs, "load", watched)
    eight = score(base / "run", "eight")
    leaves = jax.tree.leaves(found[0].params["dit"])
    assert {leaf.sharding.num_devices for leaf in leaves} == {8}
    assert any(not leaf.sharding.is_fully_replicated for leaf in leaves)
    clips = [safetensors.numpy.load_file(out / PARTS)["motion"] for out in (one, eight)]
    assert np.abs(clips[0].astype(int) - clips[1]).max() <= 1
    assert (clips[0] != clips[1]).mean() < 1e-3
    # What one device has finished, eight go on with.
    monkeypatch.setattr(pipeline.Pipeline, "__call__", never)
    assert scored_steps(score(base / "run")) == []


def test_steps_of_a_folder(base):
    assert checkpoints.chosen(base / "run", []) == [1]
    assert checkpoints.chosen(base / "run", ["all"]) == [0, 1]
    assert checkpoints.chosen(base / "run", ["7", "1", "7"]) == [1, 7]
    assert checkpoint.steps(base / "run") == [0, 1]


def test_no_guidance_is_asked_for(base):
    """A weight of zero is a weight, not the model's own."""
    asked = {"guidance_scale": 0.0}
    sampling = checkpoints.Sampling(
        base / "run", [], base, seeds=(0,), batch_size=1, mesh=None, asked=asked
    )
    settings = runs.settings(configs.read(base / "run"))
    assert sampling.making["guidance_scale"] == 0
    assert sampling.making["shift"] == settings.shift


def test_a_step_cache_needs_one_checkpoint(base, model, score):
    asked = {"num_inference_steps": 4, "step_cache": 100.0}
    with jax.set_mesh(MAKE_MESH(devices=jax.devices()[:1])):
        pipe = pipeline.Pipeline.from_pretrained(model)
        file = pipe.calibration
        cached_sampling.calibrate(
            pipe, prompt="a red circle", num_inference_steps=4, batch_size=8,
            thresholds=(), retention=0.0,
        ).save(file)  # fmt: skip
    out = score(model, **asked)
    found = json.loads((out / "scores.json").read_text())
    assert found["protocol"]["step_cache"] == 100.0
    assert "step cache 100" in (out / "report.html").read_text()
    with pytest.raises(SystemExit, match="calibrated for step 1 and not 0"):
        score(model, out="other", checkpoints="0", **asked)
    # Results of before there was a step cache are those of none.
    made_with = [
        checkpoints.Sampling(
            model, [], base, seeds=(0,), batch_size=1, mesh=None, asked=given
        ).made_with()
        for given in ({}, {"step_cache": 0.0}, {"step_cache": 0.1})
    ]
    assert "step_cache" not in made_with[0]["making"]
    assert "step_cache" not in made_with[0] and made_with[0] == made_with[1]
    assert made_with[2]["making"]["step_cache"] == 0.1
    assert made_with[2]["step_cache"] == cache_calibration.read(file).digest()


def test_no_process_samples_if_another_could_not_read(base, monkeypatch):
    sampling = checkpoints.Sampling(
        base / "run", [], base, seeds=(0,), batch_size=1, mesh=MAKE_MESH(), asked={}
    )
    multihost = checkpoints.multihost_utils
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(checkpoints, "load", lambda *which: object())
    monkeypatch.setattr(sampling, "_sample", never)
    asked = []

    def other_cannot(value):
        asked.append(bool(value))
        return np.array([value, False])

    monkeypatch.setattr(multihost, "process_allgather", other_cannot)
    with pytest.raises(checkpoints.Unreadable, match="step 1: another process could"):
        sampling.material(1, base)

    def gone(*which):
        raise FileNotFoundError("it has gone")

    monkeypatch.setattr(checkpoints, "load", gone)
    with pytest.raises(FileNotFoundError, match="it has gone"):
        sampling.material(1, base)
    assert asked == [True, False]


def test_processes_go_through_the_steps_of_the_first(monkeypatch):
    """The others do not look at the folder, which they might see at another moment."""
    sent = []

    def broadcast(value):
        if jax.process_index() == 0:
            sent.append(value)
            return value
        assert value == -1
        return sent.pop(0)

    multihost = checkpoints.multihost_utils
    monkeypatch.setattr(multihost, "broadcast_one_to_all", broadcast)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process, steps in ((0, iter([500, 1000])), (1, map(never, [1]))):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert [*checkpoints.on_every_process(steps)] == [500, 1000]
    assert not sent
    # The first one ends by an error, in what it looks at or in what it does.
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with pytest.raises(AssertionError, match="done again"):
        next(checkpoints.on_every_process(map(never, [1])))
    every = checkpoints.on_every_process(iter([500, 1000]))
    assert next(every) == 500
    every.close()
    assert sent == [-1, 500, -1]


def test_clips_of_few_checkpoints_are_read():
    points = [run_scores.Point(step, [], {}) for step in range(40)]
    asked = []
    run_scores._entries(points, asked.append, [], 8)
    assert len(asked) == run_scores.COLUMNS
    assert asked[0] is points[0] and asked[-1] is points[-1]


def test_curves_have_bands():
    def point(step, right):
        shares = {"motion": {"pass": statistics.proportion(right, 10)}}
        look = {scoring.FVD_TOY: statistics.Estimate(5 - right, 4 - right, 7 - right)}
        row = scoring.Row(f"{scoring.MODEL}, seed 0", shares=shares, look=look)
        return run_scores.Point(step, [row], {})

    charts = run_scores._curves([point(100, 1), point(200, 3)], (0,))
    assert [chart.title for chart in charts] == [
        *("Motion by checkpoint", "FVD-toy by checkpoint")
    ]
    for chart in charts:
        assert chart.svg.count('class="band"') == 1
