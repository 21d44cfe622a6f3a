"""The command: what it makes, what it refuses, and that it goes on after a kill."""

import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from absl.testing import flagsaver

from sora_jax import prepare
from sora_jax.data import shards, toy_clips
from sora_jax.toyworld import captions, families, render, scene
from tests.data.test_video_io import film, write

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(**changes):
    """Runs the job in this process with these flags."""
    with flagsaver.flagsaver():
        for name, value in changes.items():
            prepare.flags.FLAGS[name].parse(str(value))
            prepare.flags.FLAGS[name].using_default_value = False
        prepare.main(["prepare"])


def refusal(**changes):
    """Runs the job in this process; returns its last words."""
    with pytest.raises(SystemExit) as caught:
        run(**changes)
    return str(caught.value)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_toy_clips_are_the_toy_world(tmp_path):
    """Frames exact to the bit after H.264, captions and state those of the scene."""
    weights = {"motion": 0.5, "relation": 0.5}
    source = toy_clips.ToyClips("tw32", 12, split="val", families=weights, seed=3)
    shards.write(tmp_path / "out", source)
    for index, clip in enumerate(shards.open(tmp_path / "out")):
        truth = families.scene("tw32", "val", index, weights, 3)
        np.testing.assert_array_equal(clip.frames(), render.render(truth))
        assert clip.captions == captions.captions(truth)
        assert scene.Scene.from_json(clip.state_json).to_json() == truth.to_json()
        assert (clip.num_frames, clip.height, clip.width, clip.fps) == (9, 32, 32, 8.0)
        assert clip.caption_sources["dense"] == "oracle"
    assert shards.open(tmp_path / "out").manifest["split"] == "val"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tier": "tw99"}, "tw99"),
        ({"split": "training"}, "training"),
        ({"families": {"juggling": 1.0}}, "juggling"),
        ({"num_clips": 0}, "1 or more"),
    ],
)
def test_a_toy_world_that_is_none_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        toy_clips.ToyClips(**{"tier": "tw32", "num_clips": 4} | changes)


def test_a_killed_job_goes_on_and_gives_the_same_files(tmp_path, capsys):
    """kill -9 as soon as the first file is there; two processes, then none."""
    out = tmp_path / "killed"
    arguments = ["--source", "toyworld:tw16", "--num_clips", "300", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sora_jax.prepare", *arguments, "--out", str(out)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    first = out / ".partial" / "00000.json"
    while not first.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(source="toyworld:tw16", num_clips=300, workers=0, out=out)
    assert "300 clips of 5 frames, 16x16, 8 fps" in capsys.readouterr().out
    shards.write(tmp_path / "whole", toy_clips.ToyClips("tw16", 300))
    assert contents(out) == contents(tmp_path / "whole")


def test_a_folder_of_videos(tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    write(folder / "a.mp4", film(30))
    (folder / "a.txt").write_text("a film")
    (folder / "b.mov").write_bytes(b"junk")
    asked = {"source": f"folder:{folder}", "out": out, "workers": 2}
    asked |= {"size": "24x32", "num_frames": 9, "fps": 6}
    run(**asked)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("skipped b.mov: it is not an MP4")
    assert "2 clips of 9 frames, 24x32, 6 fps; captions: 2 alt; 1 skipped" in said[1]
    assert len(shards.open(out)) == 2
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    run(**asked)
    assert capsys.readouterr().out.splitlines()[0] == said[0]
    assert stamps == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    difference = refusal(**asked | {"fps": 5})
    assert "fps: 6.0 there, 5.0 asked for" in difference


def test_refusals_are_one_clear_sentence(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"junk")
    source, out = f"folder:{folder}", tmp_path / "out"
    said = refusal(source=source, out=out, workers=0)
    assert said.startswith("prepare: nothing usable was found (a.mp4: it is not an MP4")
    assert "\n" not in said
    assert "lies inside" in refusal(source=source, out=folder / "out")
    assert "--size is height x width" in refusal(source=source, out=out, size="64")
    assert "--vae has no meaning" in refusal(source=source, out=out, vae="runs/vae")
    assert "--split is one word" in refusal(source=source, out=out, split="../x")
    assert "there is no folder" in refusal(source="folder:/nowhere", out=out)
    for wrong in ("toyworld", "http:x", "toyworld:"):
        assert "--source is toyworld:TIER" in refusal(source=wrong, out=out)
    toy = {"source": "toyworld:tw32", "out": out}
    assert "--fps has no meaning" in refusal(**toy, fps=8)
    for wrong in ("motion", "motion:x", "motion:-1", "motion:nan"):
        assert "write motion:0.6,count:0.4" in refusal(**toy, families=wrong)
    assert "needs --vae" in refusal(source="shards:x", out=out)


def test_flags_become_sizes():
    assert toy_clips.parse_families(None) is None
    assert toy_clips.parse_families("motion:0.6, count:.4") == {
        "motion": 0.6,
        "count": 0.4,
    }
    assert prepare.parse_size("64x96") == (64, 96)
