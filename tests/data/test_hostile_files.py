"""Files that are damaged or made to do harm cost themselves, and nothing else."""

import collections
import fractions
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from launch import quickstart
from sora_jax.core import digests
from sora_jax.data import folders, records, shards, video_clips, video_io
from tests.data import hostile_files
from tests.data.test_prepare import run
from tests.data.test_video_io import film, write

ROOT = pathlib.Path(__file__).resolve().parents[2]
MOST_MEMORY = 1_500_000_000  # bytes, of the job and its two workers


def check_accounts(out, names):
    """Each name gave clips or is listed with a reason; returns how many gave clips."""
    done = json.loads(digests.read(out / "items.json"))
    skipped = json.loads(digests.read(out / "report.json"))["skipped"]
    reasons = collections.defaultdict(set)
    for one in skipped:
        assert one["reason"]
        # A part of a video is named "a.mp4 from 3.00 s on".
        reasons[one["file"].partition(" from ")[0]].add(one["reason"])
    used = {name for name, digest in done.items() if " " not in digest}
    assert used | reasons.keys() >= set(names)
    clips = [clip.id.rpartition("#")[0] for clip in shards.open(out)]
    assert set(clips) == used
    return len(used)


def test_hostile_files_cost_themselves_only(tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    names = hostile_files.make(folder, 57, heavy=False)
    write(folder / "good.mp4", film(30))
    before = {path.name for path in tmp_path.parent.iterdir()}
    asked = {"source": f"folder:{folder}", "size": "32x24", "num_frames": 5, "fps": 4}
    run(**asked, frames_fps=8, workers=1, out=out)
    assert check_accounts(out, [*names, "good.mp4"]) > 5
    good = [clip for clip in shards.open(out) if clip.id.startswith("good.mp4")]
    assert len(good) == 2
    said = capsys.readouterr().out
    assert all(line.isprintable() for line in said.splitlines())
    # No name has led out of the folder, and no text was run.
    assert {path.name for path in tmp_path.parent.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    assert not (ROOT / "pwned").exists()


def peak_of(command, log):
    """Runs a command with its output in a file; returns its exit code and peak memory."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.DEVNULL
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, quickstart.resident_bytes(process.pid))
            time.sleep(0.1)
    return process.returncode, peak


@pytest.mark.slow
def test_a_thousand_hostile_files(tmp_path):
    """No crash, no hang, little memory, and each of them accounted for."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    names = hostile_files.make(folder, 1000, heavy=True)
    command = [sys.executable, "-m", "sora_jax.prepare", "--source", f"folder:{folder}"]
    command += ["--size", "64x48", "--num_frames", "5", "--fps", "4", "--workers", "2"]
    command += ["--frames_fps", "8", "--out", str(out)]
    began = time.monotonic()
    code, peak = peak_of(command, tmp_path / "log")
    seconds, said = time.monotonic() - began, (tmp_path / "log").read_text()
    print(*said.splitlines()[-3:], f"{seconds:.0f} s, {peak / 1e9:.3f} GB", sep="\n")
    assert code == 0
    assert check_accounts(out, names) > 100
    assert 0 < peak <= MOST_MEMORY


def found_in(folder, **changes):
    """What a folder gives, in this process: clips, and what was skipped or remarked."""
    arguments = {"size": (24, 32), "num_frames": 5, "fps": 5.0} | changes
    source = video_clips.FolderClips(folder, **arguments)
    clips, others = [], []
    for part in source.plan(tuple(source.items))[0]:
        for one in source.clips(part, lambda item=None, finished=0: None, {}):
            is_clip = isinstance(one, records.ClipRecord)
            (clips if is_clip else others).append(one)
    return clips, others


def test_sound_and_subtitles_do_not_change_a_video(tmp_path):
    """The sound is as long as the film, and the subtitle three times as long."""
    path = hostile_files.with_sound_and_subtitles(tmp_path / "a.mkv")
    assert video_io.probe(path).seconds == pytest.approx(3.0, abs=0.01)
    clips, others = found_in(tmp_path)
    assert len(clips) == 3
    assert not [one for one in others if isinstance(one, shards.Skipped)]
    red = np.concatenate([clip.frames()[..., 0].mean((1, 2)) for clip in clips])
    assert np.abs(red - (40 + 40 * np.arange(15) / 5)).max() < 6


def test_ten_hours_are_read_to_their_end(tmp_path):
    shown = film(600, 600 / 4)  # its red grows by 40 in a quarter of the time
    write(tmp_path / "a.mp4", shown, fps=fractions.Fraction(1, 60), g="20")
    clips, others = found_in(tmp_path, fps=0.01)
    assert not [one for one in others if isinstance(one, shards.Skipped)]
    assert len(clips) == 72 and clips[-1].id == "a.mp4#00071"
    red = clips[-1].frames()[..., 0].mean((1, 2))
    minutes = (100 * np.arange(355, 360) / 60).astype(int)
    assert np.abs(red - (40 + 40 * minutes / 150)).max() < 6
    (refused,) = found_in(
        tmp_path, fps=0.01, limits=video_clips.limits(4, 3600, None, 60)
    )[1]
    assert "600 frames in 36000 s are beyond the limit of" in refused.reason


def test_a_path_that_is_too_long_for_the_system_is_named(tmp_path):
    write(tmp_path / "a.mp4", film(10))
    place = os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=place)
        inner = os.open("d" * 250, os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = inner
    os.close(place)
    listing = folders.scan(tmp_path)
    assert [*listing.videos] == ["a.mp4"]
    (skipped,) = listing.skipped
    assert skipped.reason == "it cannot be listed: File name too long"
    assert listing.counts == {"videos": 1, "others": 1, "captions": 0}


def test_numbers_of_frames_that_are_absurd_are_refused(tmp_path):
    for clip, names in (("far", ("1", "9" * 200)), ("twice", ("1", "01"))):
        (tmp_path / clip).mkdir()
        for name in names:
            (tmp_path / clip / f"{name}.png").write_bytes(b"")
    write(tmp_path / "a.mp4", film(10))
    clips, others = found_in(tmp_path, frames_fps=8.0)
    reasons = {one.file: one.reason for one in others if hasattr(one, "reason")}
    assert [clip.id for clip in clips] == ["a.mp4#00000"]
    assert "of the frames 1 to 999" in reasons["far"]
    assert "repeats a number" in reasons["twice"]
