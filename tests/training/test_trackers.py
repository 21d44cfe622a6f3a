"""What TensorBoard and wandb themselves read of a run."""

import base64
import io
import json
import os
import pathlib
import subprocess

import jax
import numpy as np
import PIL.Image
import pytest

from sora_jax.core import mesh as meshes
from sora_jax.training import metrics, trackers
from tests.training import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]
ORACLE = ROOT / "tests" / "oracle" / "trackers.py"


def ask(peers_python, *arguments, **environment):
    command = [peers_python, ORACLE, *map(str, arguments)]
    said = subprocess.check_output(command, env=os.environ | environment, text=True)
    return json.loads(said.splitlines()[-1])


@pytest.mark.peers
def test_tensorboard_shows_what_the_record_has_and_gifs_of_the_true_rate(
    peers_python, tmp_path
):
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    video = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 3), np.uint8)
    with jax.set_mesh(mesh):
        first = trackers.TensorBoard(tmp_path, 0)
        first.videos(2, {"a cat": video}, 8.0)
        given = trackers.Trackers({"tensorboard": first})
        tiny.train(tmp_path, mesh, num_steps=4, checkpoint_every=2, trackers=given)
        # Resumed, it goes on.
        again = trackers.Trackers({"tensorboard": trackers.TensorBoard(tmp_path, 4)})
        tiny.train(tmp_path, mesh, num_steps=6, checkpoint_every=2, trackers=again)
    found = ask(peers_python, "tensorboard", tmp_path / "tensorboard")
    rows = metrics.read(tmp_path / "metrics.jsonl")
    for name in ("loss", "clips_per_second"):
        wanted = [(row["step"], row[name]) for row in rows]
        np.testing.assert_allclose(found["scalars"][name], wanted, rtol=1e-6)
    ((step, encoded),) = found["images"]["samples/a cat"]
    with PIL.Image.open(io.BytesIO(base64.b64decode(encoded))) as gif:
        assert step == 2 and gif.size == (12, 8) and gif.n_frames == 3
        total = 0
        for index in range(3):
            gif.seek(index)
            total += gif.info["duration"]
    assert total == 380  # milliseconds: 3 frames at 8 a second, in hundredths


@pytest.mark.peers
def test_wandb_finds_one_run_that_was_resumed(peers_python, tmp_path):
    found = ask(peers_python, "wandb", ROOT, tmp_path, WANDB_MODE="offline")
    ((run, project),) = found["runs"]
    assert project == "toys" and run == (tmp_path / "wandb_id.txt").read_text()
    losses = [row["loss"] for row in found["history"] if "loss" in row]
    assert losses == [0.5, 0.25]
    assert len(found["files"]) == 2
    with PIL.Image.open(found["files"][0]) as gif:
        assert gif.n_frames == 3


def test_a_tracker_that_fails_is_left_out(capsys):
    class Failing:
        def scalars(self, step, values):
            raise ConnectionError("no network")

    seen = []

    class Good:
        def scalars(self, step, values):
            seen.append(step)

        def close(self):
            seen.append("closed")

    both = trackers.Trackers({"wandb": Failing(), "tensorboard": Good()})
    for step in (1, 2):
        both.scalars(step, {"loss": 1.0})
    both.close()
    assert seen == [1, 2, "closed"]
    said = capsys.readouterr().err
    assert said.count("wandb failed (ConnectionError: no network)") == 1


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb is not installed: pip install -r"):
        trackers.WandB(tmp_path, "toys", {})
