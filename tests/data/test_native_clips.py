"""Clips that keep the aspect, the length and the frame rate of their videos."""

import json

import numpy as np
import pytest

from sora_jax.data import inspection, records, shards, video_clips, webdataset
from sora_jax.data.shape_classes import Budget
from tests.data.test_prepare import refusal, run
from tests.data.test_video_io import film, write

# Of 9 frames, 36 tokens a frame: 64x32 of 16:9, 48x48 of 1:1.
BUDGET = Budget(108, 8)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    return folder


def source_of(folder, **changes):
    values = {"size": BUDGET, "num_frames": (9, 5), "fps": None, "max_fps": 12}
    return video_clips.FolderClips(folder, **values | {"split_shots": True} | changes)


def made(folder, out, **changes):
    """Writes the shards; returns the clips by id, and the report."""
    shards.write(out, source_of(folder, **changes))
    report = json.loads((out / "report.json").read_text())
    return {clip.id: clip for clip in shards.open(out)}, report


def test_each_video_keeps_its_aspect_and_its_rate(folder, tmp_path):
    write(folder / "wide.mp4", film(20, height=90, width=160), crf="1")
    write(folder / "high.mp4", film(9, height=160, width=90), crf="1")
    write(folder / "turned.mp4", film(9, height=90, width=160), rotation=90, crf="1")
    write(folder / "small.mp4", film(9, height=30, width=42), crf="1")
    write(folder / "fast.mp4", film(24, 24, height=90, width=160), 24, crf="1")
    write(folder / "tiny.gif", film(9, height=6, width=30), codec="gif")
    clips, report = made(folder, tmp_path / "out", lossless=True)
    shapes = {
        "wide.mp4#00000": (9, 32, 56, 10.0),
        "wide.mp4#00001": (9, 32, 56, 10.0),
        "high.mp4#00000": (9, 56, 32, 10.0),
        "turned.mp4#00000": (9, 56, 32, 10.0),
        "small.mp4#00000": (9, 24, 32, 10.0),
        "fast.mp4#00000": (9, 32, 56, 12.0),
    }
    found = {
        id: (clip.num_frames, clip.height, clip.width, clip.fps)
        for id, clip in clips.items()
    }
    assert found == shapes
    skipped = [(one["file"], one["reason"]) for one in report["skipped"]]
    assert skipped == [
        (
            "tiny.gif",
            "its frames of 30x6 pixels are smaller than a token of 8, or too narrow for "
            f"{BUDGET.max_tokens} tokens",
        )
    ]
    remarks = {remark["what"]: remark["files"] for remark in report["remarks"]}
    cropped = "scaled to the size of their clips, and cropped by {} % at most"
    assert remarks[cropped.format(3)] == {
        "wide.mp4": 18, "high.mp4": 9, "turned.mp4": 9, "fast.mp4": 9,
    }  # fmt: skip
    # Every second frame of 24 a second, each a twelfth of a second after the last.
    red = clips["fast.mp4#00000"].frames()[..., 0].mean((1, 2))
    assert np.abs(red - (40 + 40 * np.arange(9) / 12)).max() < 3
    # All of the picture is there, at the same scale in both directions; what is further
    # to the right or below is brighter than 255.
    _, green, blue = np.moveaxis(
        clips["wide.mp4#00000"].frames()[0].astype(float), -1, 0
    )
    y, x = np.mgrid[:32, :56]
    scale = 90 / 32
    x = (160 - 56 * scale) / 2 + (x + 0.5) * scale - 0.5
    assert np.abs(green - (40 + 2.5 * x))[:, :28].max() < 6
    y = (y + 0.5) * scale - 0.5
    assert np.abs(blue - (40 + 3 * y))[:24].max() < 6


def test_a_shot_gives_the_longest_clips_that_it_fills(folder, tmp_path):
    """Shots of 13, 4 and 30 frames, in clips of 17 or 5: none longer, none with a cut."""
    film_a, film_b, film_c = film(13), 255 - film(4), film(30)[::-1] // 3
    write(folder / "a.mp4", np.concatenate([film_a, film_b, film_c]), crf="1")
    write(folder / "b.mp4", film(11), crf="1")
    clips, report = made(
        folder, tmp_path / "out", num_frames=(17, 5), size=(48, 64), lossless=True
    )
    parts = {}
    for id, clip in clips.items():
        parts.setdefault(id.partition("#")[0], []).append(clip)
    lengths = {name: [c.num_frames for c in many] for name, many in parts.items()}
    assert lengths == {"a.mp4": [5, 5, 17, 5, 5], "b.mp4": [5, 5]}
    shown = [film_a[:5], film_a[5:10], film_c[:17], film_c[17:22], film_c[22:27]]
    for clip, frames in zip(parts["a.mp4"], shown, strict=True):
        assert np.abs(clip.frames() - frames.astype(int)).mean() < 6
    (between,) = [r for r in report["remarks"] if "cut to other shots" in r["what"]]
    assert between["files"] == {"a.mp4": 3 + 4}
    manifest = shards.open(tmp_path / "out").manifest
    assert manifest["shapes"] == [[5, 48, 64, 6], [17, 48, 64, 1]]
    assert manifest["num_frames"] == [5, 17]


def test_slices_of_a_long_video_give_the_same_frames(folder, monkeypatch):
    path = write(folder / "a.mp4", film(60, height=90, width=160), g="7")

    def frames(source):
        parts, _ = source.plan(source.items)
        note = lambda item=None, finished=0: None  # noqa: E731
        found = [clip for part in parts for clip in source.clips(part, note, {})]
        clips = [clip for clip in found if isinstance(clip, records.ClipRecord)]
        assert len({clip.id for clip in clips}) == len(clips)
        return np.concatenate([clip.frames() for clip in clips]), len(parts)

    whole, one = frames(source_of(folder, lossless=True))
    monkeypatch.setattr(video_clips, "_SLICE_BYTES", path.stat().st_size // 3)
    sliced, several = frames(source_of(folder, lossless=True))
    assert one == 1 and several > 2 and len(whole) == 6 * 9 + 5
    np.testing.assert_array_equal(sliced, whole)


def test_a_clip_of_an_archive_is_kept_if_it_would_be_made(folder, tmp_path):
    write(folder / "a.mp4", film(9, height=90, width=160))
    before, _ = made(folder, tmp_path / "out")
    webdataset.write(tmp_path / "tars", shards.open(tmp_path / "out"), 1 << 20)
    archive = video_clips.TarClips(
        tmp_path / "tars", BUDGET, (9, 5), None, max_fps=12, archives=("00000.tar",)
    )
    shards.write(tmp_path / "again", archive)
    (clip,) = shards.open(tmp_path / "again")
    assert clip.video == before["a.mp4#00000"].video and clip.fps == 10.0


def test_what_is_told_beforehand_is_what_is_made(folder, tmp_path, capsys):
    write(folder / "wide.mp4", film(23, height=90, width=160))
    write(folder / "high.mp4", film(9, height=160, width=90))
    write(folder / "square.mp4", film(7, height=64))
    asked = {"source": f"folder:{folder}", "size": "native", "fps": "native"}
    asked |= {"num_frames": "9,5", "max_tokens": 108, "multiple_of": 8}
    run(**asked, workers=0, inspect=tmp_path / "sheet.png")
    told = capsys.readouterr().out
    run(**asked, workers=0, out=tmp_path / "out")
    made = capsys.readouterr().out
    shapes = [
        "     2: 9 frames, 56 wide, 32 high", "     1: 5 frames, 56 wide, 32 high",
        "     1: 5 frames, 56 wide, 56 high", "     1: 9 frames, 32 wide, 56 high",
    ]  # fmt: skip
    assert "give up to 5 clips of 4 shapes, up to 30 fps\n" in told
    assert "5 clips of 4 shapes, 10 fps" in made
    for said in (told, made):
        assert [line for line in said.splitlines() if " wide, " in line] == shapes
    seen = inspection.inspect(source_of(folder))
    assert sorted(one.picture_hwc.shape[:2] for one in seen) == [
        (110, 192), (192, 110), (192, 192),
    ]  # fmt: skip


def test_settings_that_make_no_sense_are_refused(folder, tmp_path):
    write(folder / "a.mp4", film(5))
    asked = {"source": f"folder:{folder}", "out": tmp_path / "out", "workers": 0}
    native = asked | {"size": "native"}
    for changes, reason in (
        (
            asked | {"max_tokens": 9},
            "--max_tokens has no meaning without --size native",
        ),
        (asked | {"max_fps": 9}, "--max_fps has no meaning without --fps native"),
        (native, "--size native needs --max_tokens"),
        (native | {"max_tokens": 4}, "too few for clips of 17 frames"),
        (native | {"max_tokens": 99, "multiple_of": 4}, "even and at least 8"),
        (asked | {"num_frames": "17,6"}, "1 + 4n frames, such as 5 or 9, not 6"),
        (asked | {"num_frames": "17,x"}, "--num_frames is numbers such as 49,17"),
        (asked | {"fps": "fast"}, "--fps is a number, or native, not 'fast'"),
        (
            asked | {"fps": "native", "max_fps": 999},
            "max_fps must be between 0 and 240",
        ),
    ):
        assert reason in refusal(**changes)
