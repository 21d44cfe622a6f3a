"""The command: what it makes, what it refuses, and that it goes on after a kill."""

import functools
import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sora_jax import prepare
from sora_jax.core import paths
from sora_jax.data import shards, toy_clips, video_io
from sora_jax.toyworld import captions, families, render, scene
from tests import conftest
from tests.data.test_video_io import film, write

ROOT = pathlib.Path(__file__).resolve().parents[2]


run = functools.partial(conftest.run_with_flags, prepare)
refusal = functools.partial(conftest.refusal, prepare)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != paths.LOCK  # of this process
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
def test_an_unknown_toy_world_is_refused(changes, message):
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
    first = out / ".partial" / "00000" / "part.json"
    while not first.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(source="toyworld:tw16", num_clips=300, workers=0, out=out)
    assert "300 clips of 5 frames, 16 wide, 16 high, 8 fps" in capsys.readouterr().out
    shards.write(tmp_path / "whole", toy_clips.ToyClips("tw16", 300))
    assert contents(out) == contents(tmp_path / "whole")


def test_a_folder_of_videos(tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    write(folder / "a.mp4", film(30))
    (folder / "a.txt").write_text("a film")
    (folder / "b.mov").write_bytes(b"junk")
    asked = {"source": f"folder:{folder}", "out": out, "workers": 2}
    asked |= {"size": "32x24", "num_frames": 9, "fps": 6}
    run(**asked)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("skipped b.mov: it is not an MP4")
    assert said[1] == "1 video with untagged colours, read as bt601: 18 frames"
    made = "2 clips of 9 frames, 32 wide, 24 high, 6 fps; captions: 2 alt; 1 skipped"
    assert made in said[2]
    assert said[3:] == [
        f"{folder}: 3 files: 2 of videos, 1 of captions, 0 others",
        "2 videos: 1 gave clips, 1 none",
    ]
    assert len(shards.open(out)) == 2
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    run(**asked)
    assert capsys.readouterr().out.splitlines()[0] == said[0]
    assert stamps == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    difference = refusal(**asked | {"fps": 5})
    assert "fps: was 6.0, is 5.0" in difference


def test_the_same_command_adds_the_videos_that_are_new(tmp_path, capsys, monkeypatch):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("a", "gone"):
        write(folder / f"{name}.mp4", film(10))
        (folder / f"{name}.txt").write_text(f"film {name}")
    whole = write(tmp_path / "b.mkv", film(60), g="10", crf="1").read_bytes()
    (folder / "b.mp4").write_bytes(whole[: len(whole) // 10])
    (folder / "notes.doc").touch()
    asked = {"source": f"folder:{folder}", "out": out, "workers": 0}
    asked |= {"size": "32x24", "num_frames": 5, "fps": 5}
    run(**asked)
    opened, before = shards.open(out), contents(out)
    skipped = json.loads(before["report.json"])["skipped"]
    names = ["notes.doc", "b.mp4", "b.mp4 from 0.30 s on"]
    assert [one["file"] for one in skipped] == names
    assert [clip.id for clip in opened] == ["a.mp4#00000", "gone.mp4#00000"]
    write(folder / "c.mp4", film(20))
    (folder / "b.mp4").unlink()
    write(folder / "b.mp4", film(10))  # it had given no clip, so it is made now
    (folder / "a.txt").write_text("another caption")
    (folder / "gone.mp4").unlink()
    (folder / "notes.doc").unlink()
    assert "fps: was 5.0, is 6.0" in refusal(**asked | {"fps": 6})
    # Interrupted at the worst moment, the folder is what it was.
    with monkeypatch.context() as patched:
        patched.setattr(shards, "_write_tfds_metadata", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(**asked)
    assert len(shards.open(out)) == 2 and (out / ".partial").exists()
    decoded = []
    monkeypatch.setattr(video_io, "sample", lambda *a: decoded.append(a) or iter(()))
    capsys.readouterr()
    run(**asked)
    said = capsys.readouterr().out
    assert "videos that are new, and are added: 2 (b.mp4, c.mp4)" in said
    assert "that are changed, and keep their old clips: 1 (a.mp4)" in said
    assert "videos that are gone, and keep their clips: 1 (gone.mp4)" in said
    assert "5 clips of 5 frames" in said and decoded == []
    added = shards.open(out)
    ids = [f"{name}.mp4#{k:05d}" for name, k in
           (("a", 0), ("gone", 0), ("b", 0), ("c", 0), ("c", 1))]  # fmt: skip
    assert [clip.id for clip in added] == ids
    assert added[0].captions == {"alt": "film a"}
    assert [clip.id for clip in opened] == ids[:2]  # who reads it goes on
    changed = {"manifest.json", "report.json", "items.json", "dataset_info.json"}
    changed.add("digests.sha256")
    after = contents(out)
    assert all(after[name] == before[name] for name in set(before) - changed)
    assert len(added.manifest["digest"]) == 64 != opened.manifest["digest"]
    report = json.loads(after["report.json"])
    assert [one["file"] for one in report["skipped"]] == ["gone.txt"]
    # Each file counts once, though the job was interrupted behind the report.
    (untagged,) = report["remarks"]
    assert untagged["frames"] == 25 and untagged["files"] == {
        "a.mp4": 5, "gone.mp4": 5, "b.mp4": 5, "c.mp4": 10,
    }  # fmt: skip
    run(**asked)
    assert contents(out) == after
    # What gave no clip may be deleted without a word.
    (folder / "junk.mp4").write_bytes(b"junk")
    run(**asked)
    (folder / "junk.mp4").unlink()
    capsys.readouterr()
    run(**asked)
    assert "gone, and keep their clips: 1 (gone.mp4)" in capsys.readouterr().out


def test_names_do_not_reach_the_terminal_as_they_are(tmp_path, capsys):
    """Line ends, codes and direction marks are shown; report.json has the names."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    bad = ["a\nb.mp4", "\x1b[31mred.mp4", "a\u202egpj.4pm.mp4", "b" * 250 + ".mp4"]
    asked = {"source": f"folder:{folder}", "out": out, "workers": 0}
    # The names of clips with a cut are printed.
    asked |= {"size": "32x24", "num_frames": 5, "fps": 5, "split_shots": False}
    for name in bad:
        (folder / name).write_bytes(b"junk")
    said = refusal(**asked)
    assert said.isprintable() and "\\x1b[31mred.mp4: it is not" in said
    good = ["猫が寝ている.mp4", "می\u200cخوابد.mp4", "кот\n.mp4", "..b\\..\\c.mp4"]
    for name in good:
        (folder / name).unlink(missing_ok=True)
        write(folder / name, np.concatenate([film(5), 255 - film(5)]))
    for number in range(20):
        (folder / f"junk {number}.mp4").write_bytes(b"junk")
    run(**asked)
    said = capsys.readouterr().out
    assert all(line.replace("\u200c", "").isprintable() for line in said.splitlines())
    for shown in ("a\\nb.mp4", "\\x1b[31mred.mp4", "a\\u202egpj.4pm.mp4"):
        assert f"skipped {shown}: it is not an MP4" in said
    assert f"{'b' * 80}...{'b' * 76}.mp4: it is" in said
    assert "skipped ..b\\..\\c.mp4: it is hidden: its name begins with a dot" in said
    assert "    24: it is not an MP4, MOV, WebM" in said
    assert "27 videos: 3 gave clips, 24 none" in said
    report = json.loads((out / "report.json").read_text())
    assert {*bad} < {one["file"] for one in report["skipped"]}
    # Each name as it is in the folder; the last one is hidden.
    assert {clip.id for clip in shards.open(out)} == {f"{n}#00000" for n in good[:3]}


def of_two_sizes(tmp_path):
    """Flags that prepare a large video and a small one."""
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "large.mp4", film(10))
    write(folder / "small.mp4", film(10, height=24, width=32))
    asked = {"source": f"folder:{folder}", "out": tmp_path / "out", "workers": 0}
    return asked | {"size": "32x24", "num_frames": 5, "fps": 5}


def test_limits_that_change_before_a_job_goes_on(tmp_path, monkeypatch, capsys):
    """What the first limits refused is tried with the new ones."""
    asked = of_two_sizes(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shards, "_write_tfds_metadata", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(**asked | {"max_side": 50})
    run(**asked | {"max_side": 64})
    assert "2 clips of 5 frames" in capsys.readouterr().out


def test_a_video_beyond_the_limits_is_tried_again_with_others(tmp_path, capsys):
    asked = of_two_sizes(tmp_path)
    for changes, said in (
        ({"max_side": 50}, "skipped large.mp4: its frames of 64x48 are beyond the lim"),
        (
            {"max_side": 50},
            "--max_gib, --max_seconds, --max_side and --max_minutes set limits",
        ),
        ({"max_side": 64}, "videos that are new, and are added: 1 (large.mp4)"),
        (
            {"max_side": 50},
            "2 clips of 5 frames, 32 wide, 24 high, 5 fps; captions: none; 0 skip",
        ),
    ):
        run(**asked | changes)
        assert said in capsys.readouterr().out


def test_refusals_are_one_clear_sentence(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"junk")
    source, out = f"folder:{folder}", tmp_path / "out"
    said = refusal(source=source, out=out, workers=0)
    assert said.startswith("prepare: nothing usable was found (a.mp4: it is not an MP4")
    assert "\n" not in said
    assert "lies inside" in refusal(source=source, out=folder / "out")
    assert "--size is WIDTHxHEIGHT" in refusal(source=source, out=out, size="64")
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
