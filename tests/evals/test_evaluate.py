"""The whole job on a model without training: rows, resumption, protocol, faults."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from sora_jax.core import mesh as meshes
from sora_jax.core import xla_flags
from sora_jax.evals import protocol
from sora_jax.evals.prompts import make_clips, scoring, toyworld
from sora_jax.generation import pipeline, recipes
from tests import conftest
from tests.evals import tiny_run
from tests.training import tiny_lpips

ROOT = pathlib.Path(__file__).resolve().parents[2]
JOB = []  # the job as a module, while its fixture lasts
ASKED = {
    "motion": 8,
    "relation": 4,
    "attribute": 4,
    "motion_held_out": 2,
    "relation_held_out": 0,
    "attribute_held_out": 0,
    "seeds": "0,1",
    "batch_size": 8,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_run.make_shards(folder / "shards")
    tiny_run.make_run(folder / "run", folder / "shards")
    return folder


@pytest.fixture(scope="module", autouse=True)
def job():
    """The job as a module, for `run`."""
    with conftest.lone_job("evaluate") as module:
        JOB.append(module)
        yield


@pytest.fixture(scope="module", autouse=True)
def one_device(job):
    """The test process has eight, over which networks this small do not divide."""
    with pytest.MonkeyPatch.context() as patch:
        mesh = meshes.make_mesh(devices=jax.devices()[:1])
        patch.setattr(meshes, "make_mesh", lambda shape: mesh)
        yield


def run(**given) -> None:
    tiny_run.evaluate(JOB[-1], **given)


@pytest.fixture(scope="module")
def scored(folder):
    out = folder / "scores"
    run(model=folder / "run", shards=folder / "shards", out=out, **ASKED)
    return json.loads((out / "scores.json").read_text())


def test_all_rows_are_there(folder, scored):
    expected = [
        "ground truth",
        "VAE reconstruction",
        "model, seed 0",
        "model, seed 1",
        "model, worst seed",
        "untrained weights",
        "shuffled captions",
        "nearest training clip",
    ]
    assert list(scored["rows"])[:8] == expected
    motion = {name: row["suites"].get("motion") for name, row in scored["rows"].items()}
    assert motion["ground truth"]["pass"]["value"] == 1
    assert motion["VAE reconstruction"]["pass"]["value"] == 0  # its weights are random
    assert motion["nearest training clip"]["colour"]["value"] > 0
    assert motion["model, seed 1"]["direction"]["count"] == 8
    assert 0.6 < motion["ground truth"]["pass"]["low"] < 1
    look = scored["rows"]["ground truth"]["look"]
    assert look[scoring.FVD_TOY]["low"] < look[scoring.FVD_TOY]["high"]
    assert scored["scores"]["ground truth/motion/direction"] == 1
    lines = (folder / "scores" / "clips.jsonl").read_text().splitlines()
    assert len(lines) == 18 * 4 + 16 + 18
    assert scored["digest"] == protocol.digest(scored["protocol"])
    assert scored["protocol"]["seeds"] == [0, 1]
    assert scored["protocol"]["num_inference_steps"] == 2


def test_report_shows_the_run(folder, scored):
    page = (folder / "scores" / "report.html").read_text()
    assert page.count("<video") >= 18 * 3 - 6
    assert "loss by noise level" in page and "τ 0.85–0.93" in page
    assert "model.dit.dim = 32" in page
    assert scored["digest"] in page


def test_finished_parts_are_used_again(folder, scored, monkeypatch):
    def never(*arguments, **named):
        raise AssertionError("a finished part was made again")

    monkeypatch.setattr(pipeline.Pipeline, "__call__", never)
    out = folder / "scores"
    run(model=folder / "run", shards=folder / "shards", out=out, **ASKED)
    assert json.loads((out / "scores.json").read_text()) == scored
    with pytest.raises(AssertionError, match="made again"):
        other = ASKED | {"guidance_scale": 2.0}
        run(model=folder / "run", shards=folder / "shards", out=out, **other)


def test_an_older_checkpoint_and_another_shift(folder):
    """Both change the clips as they should, and the protocol says which shift it was."""
    model = folder / "two_checkpoints"
    shutil.copytree(folder / "run", model)
    tiny_run.add_checkpoint(model, 1)
    few = dict.fromkeys(toyworld.SIZES, 0) | {"motion": 2, "batch_size": 8}

    def clips(name: str, **settings) -> tuple[np.ndarray, float]:
        out = folder / name
        run(model=model, shards=folder / "shards", out=out, **few, **settings)
        parts = safetensors.numpy.load_file(
            out / "parts" / "model,-seed-0-motion.safetensors"
        )
        scores = json.loads((out / "scores.json").read_text())
        return parts["motion"], scores["protocol"]["shift"]

    newest, shift = clips("newest")
    oldest = clips("oldest", checkpoints=0)[0]
    assert (oldest != newest).any() and shift == 12
    shifted, shift = clips("shifted", checkpoints=0, shift=1.0)
    assert (shifted != oldest).any() and shift == 1
    with pytest.raises(SystemExit, match=r"no checkpoint of step 7, only of \[0, 1\]"):
        clips("absent", checkpoints=7)


@pytest.mark.slow
def test_another_batch_size_has_the_same_scores(folder):
    """To six digits: clips depend on their own prompt and seed, not on their company.

    The jobs as they are shipped: with the flag that they set (`xla_flags.ANY_BATCH`), and
    with LLVM's costly passes, which the tests leave out and without which the last values
    of an array may be rounded otherwise than those in the middle.
    """
    asked = ASKED | {"model": folder / "run", "shards": folder / "shards"}
    asked |= {"relation": 0, "attribute": 0}
    outs = {size: folder / f"batch_size_{size}" for size in (8, 5)}
    jobs = []
    for size, out in outs.items():
        given = (asked | {"batch_size": size, "out": out}).items()
        command = [sys.executable, "-m", "sora_jax.evaluate"]
        command += [f"--{name}={value}" for name, value in given]
        jobs.append(
            subprocess.Popen(command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""})
        )
    assert [job.wait(timeout=300) for job in jobs] == [0, 0]
    one, other = (
        json.loads((out / "scores.json").read_text()) for out in outs.values()
    )
    assert one["digest"] == other["digest"]
    assert one["scores"].keys() == other["scores"].keys()
    for name, value in one["scores"].items():
        assert other["scores"][name] == pytest.approx(value, rel=1e-6), name


def test_the_job_sets_the_flag_of_any_batch():
    """Whatever this machine's kernels are, which may add up alike without it."""
    code = """if True:
        import atexit, os, runpy
        atexit.register(lambda: print(os.environ["XLA_FLAGS"]))
        runpy.run_module("sora_jax.evaluate", run_name="__main__")
    """
    command = [sys.executable, "-c", code, "--out=x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "give one of --model" in done.stderr
    for name, value in xla_flags.ANY_BATCH.items():
        assert f"--{name}={value}" in done.stdout.split()


def test_a_folder_of_samples(folder, capsys):
    """Ground truth clips saved as samples pass, but for one that is damaged."""
    suites = toyworld.make_suites(
        {"motion": 9, "attribute": 3}, tier="tw32", exclude_texts=[], seed=5
    )
    clips = folder / "clips"
    for suite in suites:
        drawn = make_clips.matching_scenes(suite, tier="tw32", seed=9)
        videos = make_clips.render_scenes({suite.name: drawn})[suite.name]
        for number, (text, video) in enumerate(zip(suite.texts, videos, strict=True)):
            # Twice the size would change the tier; the oracle bears the codec's loss.
            recipe = {"prompt": text, "fps": 8.0, "sampler": "euler", "seed": number}
            file = clips / f"{suite.name}{number}.mp4"
            recipes.save(np.float32(video) / 255, file, recipe)
    (clips / "motion3.mp4").write_bytes(b"damaged")
    run(samples=clips, shards=folder / "shards", out=folder / "clip_scores")
    found = json.loads((folder / "clip_scores" / "scores.json").read_text())
    motion = found["rows"]["model"]["suites"]["motion"]
    assert motion["direction"]["count"] == 9 and motion["direction"]["right"] == 8
    assert found["protocol"]["sampler"] == "euler"
    assert found["protocol"]["codec"] == "h264"
    assert any("motion3.mp4" in sentence for sentence in found["failures"])
    assert "Motion: 9 prompts" in capsys.readouterr().out
    run(samples=clips, shards=folder / "shards", out=folder / "clip_scores_again")
    for name in ("scores.json", "clips.jsonl"):  # which hold no times
        again = (folder / "clip_scores_again" / name).read_bytes()
        assert again == (folder / "clip_scores" / name).read_bytes()


def test_a_video_vae_by_itself(folder, capsys):
    """Of a run, on clips that are spread over the shards."""
    out, lpips = folder / "vae_scores", tiny_lpips.write(folder / "lpips.safetensors")
    given = {"vae": folder / "run", "lpips": lpips, "num_clips": 10}
    run(shards=folder / "shards", out=out, **given)
    scores = json.loads((out / "scores.json").read_text())
    assert scores["clips"] == {"asked": 10, "measured": 10, "failed": 0}
    assert scores["scores"]["VAE reconstruction/LPIPS"] > 0
    lines = [json.loads(x) for x in (out / "clips.jsonl").read_text().splitlines()]
    assert lines[-1]["clip"].endswith("0000036")
    assert "0.85–0.93" in (out / "report.html").read_text()  # of the run's training
    assert "10 of 10 clips" in capsys.readouterr().out


def test_wrong_use_ends_with_a_sentence(folder):
    with pytest.raises(SystemExit, match="give one of --model, --samples, --vae and"):
        run(shards=folder / "shards", out=folder / "x")
    with pytest.raises(SystemExit, match="--lpips need --vae"):
        given = {"model": folder / "run", "lpips": folder / "none.safetensors"}
        run(shards=folder / "shards", out=folder / "x", **given)
    for given, sentence in (
        ({"model": "x", "num_clips": 9}, "--num_clips need --vae or --videos"),
        ({"samples": "x", "seeds": "0", "motion": 3}, "--motion, --seeds need --model"),
        ({"vae": "x", "also": "y"}, "--also need --model or --samples"),
        ({"videos": "x"}, "--shards need --model or --samples or --vae"),
    ):
        with pytest.raises(SystemExit, match=f"evaluate: {sentence}"):
            run(shards=folder / "shards", out=folder / "x", **given)
    with pytest.raises(SystemExit, match="everything but LPIPS is computed"):
        given = {"vae": folder / "run", "lpips": folder / "none.safetensors"}
        run(shards=folder / "shards", out=folder / "x", **given)
    with pytest.raises(SystemExit, match="checkpoint|run folder"):
        run(model=folder / "shards", shards=folder / "shards", out=folder / "x")
    arguments = {"model": folder / "run", "shards": folder / "shards"}
    for given, sentence in (
        ({"suites": "count"}, "NAME:NUMBER"),
        ({"out": ""}, "give --out"),
        ({"seeds": ""}, "--seeds are whole numbers from 0, such as 0,1, not ''"),
        ({"seeds": "0,x"}, "--seeds are whole numbers .* not '0,x'"),
        ({"seeds": "-1"}, "--seeds are whole numbers .* not '-1'"),
        ({"seeds": str(2**64)}, "--seeds are whole numbers .* not '18446744"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            run(**arguments | {"out": folder / "x"} | given)
