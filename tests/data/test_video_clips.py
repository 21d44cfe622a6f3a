"""A folder as people have it: every container, every way to write captions, junk."""

import fractions
import json
import os
import pathlib

import numpy as np
import PIL.Image
import pytest

from sora_jax.data import records, reports, shards, video_clips, video_io
from tests.data.test_video_io import film, write

SIZE, FRAMES, FPS = (24, 32), 5, 5.0


def folder_clips(folder, **changes):
    arguments = {"size": SIZE, "num_frames": FRAMES, "fps": FPS} | changes
    return video_clips.FolderClips(folder, **arguments)


def made(folder, tmp_path, **changes):
    """Writes the shards; returns the clips by id and the skipped by file."""
    out = tmp_path / "out"
    shards.write(out, folder_clips(folder, **changes))
    skipped = json.loads((out / "report.json").read_text())["skipped"]
    return (
        {clip.id: clip for clip in shards.open(out)},
        {entry["file"]: entry["reason"] for entry in skipped},
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    return tmp_path / "in"


def test_every_container_and_every_kind_of_caption(folder, tmp_path):
    write(folder / "a.mp4", film(24))
    write(folder / "b.mov", film(12))
    write(folder / "deep" / "c.mkv", film(10))
    write(folder / "d.webm", film(10), codec="libvpx-vp9", **{"cpu-used": "8"})
    write(folder / "e.gif", film(10), codec="gif")
    write(folder / "f.MP4", film(10))
    (folder / "a.txt").write_text("  a red\n film\u0000 ")
    (folder / "b.json").write_text(
        json.dumps({"short": "s", "captions": {"dense": "d"}, "license": "CC0"})
    )
    (folder / "captions.jsonl").write_text(
        '{"file": "deep/c.mkv", "caption": "from jsonl", "medium": "m"}\n'
        '{"file_name": "./a.mp4", "text": "loses", "short": "stays"}\n\n'
    )
    (folder / "captions.csv").write_text(
        '\ufefffile,caption,licence,source\nd.webm,"a, quoted",CC-BY,web\n'
        "deep/c.mkv,loses,MIT,\n",
        encoding="utf-8",
    )
    clips, skipped = made(folder, tmp_path)
    assert skipped == {}
    assert set(clips) == {
        "a.mp4#00000", "a.mp4#00001", "b.mov#00000", "deep/c.mkv#00000",
        "d.webm#00000", "e.gif#00000", "f.MP4#00000",
    }  # fmt: skip
    a, b = clips["a.mp4#00001"], clips["b.mov#00000"]
    assert a.captions == {"alt": "a red film", "short": "stays"}
    assert a.caption_sources == {"alt": "original", "short": "original"}
    assert a.source == "a.mp4 from 1.000 s"
    assert (b.captions, b.licence) == ({"short": "s", "dense": "d"}, "CC0")
    c, d = clips["deep/c.mkv#00000"], clips["d.webm#00000"]
    assert (c.captions, c.licence) == ({"alt": "from jsonl", "medium": "m"}, "MIT")
    assert (d.captions["alt"], d.licence, d.source) == ("a, quoted", "CC-BY", "web")
    assert clips["e.gif#00000"].captions == {}
    for clip in clips.values():
        assert clip.frames().shape == (FRAMES, *SIZE, 3)
        assert (clip.num_frames, clip.height, clip.width, clip.fps) == (5, 24, 32, 5.0)


def test_names_and_captions_outside_of_unicode_do_not_stop_the_job(folder, tmp_path):
    write(folder / "a.mp4", film(10))
    (folder / "a.json").write_text('{"caption": "half a \\ud83d smile"}')
    (folder / os.fsdecode(b"b\xff.mp4")).touch()
    clips, skipped = made(folder, tmp_path)
    assert clips["a.mp4#00000"].captions == {"alt": "half a smile"}
    assert skipped == {"b\\xff.mp4": "its name is not UTF-8, so it is not read"}


@pytest.mark.parametrize("lossless, error", [(False, 6), (True, 3)])
def test_windows_follow_one_another_at_the_right_times(
    folder, tmp_path, lossless, error
):
    write(folder / "a.mp4", film(47), crf="1")
    clips, _ = made(folder, tmp_path, lossless=lossless)
    assert sorted(clips) == [f"a.mp4#{k:05d}" for k in range(4)]
    frames = np.concatenate([clips[name].frames() for name in sorted(clips)])
    seconds = np.arange(20) / FPS
    assert np.abs(frames[..., 0].mean((1, 2)) - (40 + 40 * seconds)).max() < error


def test_slices_of_a_long_video_give_the_windows_of_the_whole(folder, monkeypatch):
    path = write(folder / "a.mp4", film(60), g="7")
    whole = folder_clips(folder, lossless=True)
    monkeypatch.setattr(video_clips, "_SLICE_BYTES", path.stat().st_size // 3)
    sliced = folder_clips(folder, lossless=True)
    parts, _ = sliced.plan(sliced.items)
    assert parts == [[["a.mp4", k, 4]] for k in range(4)]

    def clips(source, parts):
        note = lambda item=None, finished=0: None  # noqa: E731
        found = [clip for part in parts for clip in source.clips(part, note, {})]
        return [clip for clip in found if isinstance(clip, records.ClipRecord)]

    expected = clips(whole, [[["a.mp4", 0, 1]]])
    assert len(expected) == 6 and clips(sliced, parts) == expected


def test_what_cannot_be_used_is_listed_with_the_reason(folder, tmp_path):
    write(folder / "good.mp4", film(10))
    write(folder / "short.mp4", film(8))
    whole = (folder / "good.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 3])
    (folder / "junk.webm").write_bytes(b"junk" * 100)
    (folder / "empty.gif").touch()
    (folder / "list.mp4").write_text("#EXTM3U\nhttp://127.0.0.1/x.ts\n")
    (folder / "notes.doc").write_text("x")
    (folder / "alone.txt").write_text("a caption without its video")
    (folder / ".hidden.mp4").write_bytes(b"x")
    outside = tmp_path / "outside.mp4"
    outside.write_bytes(whole)
    (folder / "link.mp4").symlink_to(outside)
    (folder / "good.txt").symlink_to("/etc/passwd")
    clips, skipped = made(folder, tmp_path)
    assert list(clips) == ["good.mp4#00000"] and clips["good.mp4#00000"].captions == {}
    assert "0.80 s, and the last of 5 frames at 5 fps is due at 0.80 s" in (
        skipped.pop("short.mp4")
    )
    assert "a link out of the folder" in skipped.pop("link.mp4")
    assert "a link out of the folder" in skipped.pop("good.txt")
    assert "no video of this name" in skipped.pop("alone.txt")
    assert "it is hidden" in skipped.pop(".hidden.mp4")
    assert "not a video (.mp4, .mov," in skipped.pop("notes.doc")
    for name in ("junk.webm", "empty.gif", "list.mp4"):
        assert "not an MP4, MOV, WebM, MKV, AVI, MPEG or GIF" in skipped.pop(name)
    assert "cut.mp4" in skipped and len(skipped) == 1


@pytest.mark.parametrize(
    "name, codec, options",
    [
        ("a.mkv", "libx264", {"g": "10", "crf": "1"}),
        ("a.avi", "mpeg4", {"g": "1", "b": "9M"}),
    ],
)
def test_a_video_that_ends_early_gives_what_it_has(folder, name, codec, options):
    """Wherever it is cut off, at a key frame too: frames of their times, and a reason."""
    path = write(folder / name, film(60), codec=codec, **options)
    content, counts = path.read_bytes(), []
    for share in np.linspace(0.06, 0.84, 14):
        path.write_bytes(content[: int(len(content) * share)])
        found = list(
            folder_clips(folder).clips(
                [[name, 0, 1]], lambda item=None, finished=0: None, {}
            )
        )
        clips = [one for one in found if isinstance(one, records.ClipRecord)]
        for number, clip in enumerate(clips):
            red = clip.frames()[..., 0].mean((1, 2))
            seconds = number + np.arange(5) / 5
            assert np.abs(red - (40 + 40 * seconds)).max() < 9, (share, number)
        (*_, reason) = [one.reason for one in found if isinstance(one, shards.Skipped)]
        if clips:
            whole = "its header says 6.00 s, but it ends earlier"
            assert reason == whole or reason.endswith(" is damaged")
        counts.append(len(clips))
    assert counts == sorted(counts) and {0, 4} <= {*counts}


@pytest.mark.parametrize(
    "name",
    [
        "../secret.mp4",
        "/etc/passwd",
        "deep/../../secret.mp4",
        "a\0.mp4",
        "..\\secret.mp4",
    ],
)
def test_no_caption_file_leads_out_of_the_folder(folder, tmp_path, name):
    write(tmp_path / "secret.mp4", film(10))
    write(folder / "a.mp4", film(10))
    (folder / "captions.jsonl").write_text(json.dumps({"file": name, "caption": "x"}))
    clips, skipped = made(folder, tmp_path)
    assert list(clips) == ["a.mp4#00000"] and clips["a.mp4#00000"].captions == {}
    assert "leads out of the folder" in skipped["captions.jsonl:1"]


def test_items_change_with_the_videos_and_the_captions(folder):
    write(folder / "a.mp4", film(10))
    before = folder_clips(folder)
    os.utime(folder / "a.mp4", (1, 1))  # a copied folder is the same folder
    assert folder_clips(folder).items == before.items
    (folder / "a.txt").write_text("new")
    named = folder_clips(folder).items
    (folder / "a.mp4").rename(folder / "b.mp4")
    renamed = folder_clips(folder).items
    write(folder / "b.mp4", film(11))
    larger = folder_clips(folder)
    assert [*before.items] == [*named] == ["a.mp4"] and [*renamed] == ["b.mp4"]
    assert before.items != named and renamed != larger.items
    assert larger.settings == before.settings
    assert json.loads(json.dumps(before.settings)) == before.settings


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_frames": 6}, "such as 5 or 9, not 6"),
        ({"num_frames": 0}, "such as 1 or 5, not 0"),
        ({"size": (25, 32)}, "even"),
        ({"size": (4, 32)}, "at least 8"),
        ({"fps": 0}, "fps"),
        ({"fps": float("nan")}, "fps"),
    ],
)
def test_impossible_sizes_are_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        folder_clips(folder, **changes)
    with pytest.raises(ValueError, match="no folder"):
        folder_clips(pathlib.Path("/nowhere"))


def test_an_item_that_killed_its_process_is_left_out(folder):
    write(folder / "a.mp4", film(10))
    write(folder / "b.mp4", film(10))
    noted = []
    found = list(
        folder_clips(folder).clips(
            [["a.mp4", 0, 1], ["b.mp4", 0, 1]],
            lambda item=None, finished=0: noted.append(item or finished),
            {"a.mp4": "it died"},
        )
    )
    assert found[0] == shards.Skipped("a.mp4", "it died", "a.mp4")
    clips = [clip for clip in found if isinstance(clip, records.ClipRecord)]
    assert len(clips) == 1 and not isinstance(found[-1], shards.Skipped)
    # The item is named again for each frame, so that no slow file counts as hung.
    assert noted[0] == noted[-1] == 1 and noted[1:-1] == ["b.mp4"] * len(noted[1:-1])
    assert len(noted[1:-1]) > 10


def test_an_error_of_a_whole_file_is_reported_once(folder, tmp_path, monkeypatch):
    write(folder / "a.mp4", film(10))
    write(folder / "large.mp4", film(60), crf="1")
    monkeypatch.setattr(video_clips, "_SLICE_BYTES", 2000)
    (folder / "junk.webm").write_bytes(b"junk" * 5000)
    write(folder / "ycgco.mp4", film(60), **{"x264-params": "colormatrix=ycgco"})
    limits = video_io.Limits(max_bytes=(folder / "large.mp4").stat().st_size - 1)
    out = tmp_path / "out"
    shards.write(out, folder_clips(folder, limits=limits))
    skipped = json.loads((out / "report.json").read_text())["skipped"]
    assert [one["file"] for one in skipped] == ["junk.webm", "large.mp4", "ycgco.mp4"]
    assert "matrix 8 of H.273" in skipped[2]["reason"]


def test_limits_of_the_flags(tmp_path):
    usual = video_io.DEFAULT_LIMITS
    assert video_clips.limits(64, 86400, None, 60) == usual
    given = video_clips.limits(0.5, 172800, 7680, 5)
    assert (given.max_bytes, given.max_seconds) == (1 << 29, 172800)
    assert (given.max_frames, given.max_work_seconds) == (2 * usual.max_frames, 300)
    assert (given.max_side, given.max_pixels) == (7680, 7680**2)
    for wrong in (0, -1, float("inf"), float("nan"), 1e300):
        for asked in ((wrong, 1, None, 1), (1, wrong, None, 1), (1, 1, None, wrong)):
            with pytest.raises(ValueError, match="must be above 0 and at most 1e9"):
                video_clips.limits(*asked)
    path = write(tmp_path / "a.mkv", film(10))
    assert video_io.probe(path, video_clips.limits(1e9, 1e9, 10**9, 1)).width == 64


def test_windows_with_a_cut_have_several_shots_and_are_named(folder, tmp_path):
    """An edit of two scenes, and one without a cut."""
    scenes = np.concatenate([film(13), 255 - film(12)])
    write(folder / "a.mp4", scenes, crf="4")
    write(folder / "b.mp4", film(25))
    out = tmp_path / "out"
    manifest = shards.write(out, folder_clips(folder, fps=10.0, num_frames=25))
    shots = {clip.id: clip.shots for clip in shards.open(out)}
    assert shots == {"a.mp4#00000": ((0, 13), (13, 25)), "b.mp4#00000": ((0, 25),)}
    assert manifest["with_cut"] == 1
    lines = reports.summary(out, manifest, 1.0)
    assert lines[-2] == (
        "clips that seem to contain a cut: 1 (a.mp4#00000 at frame 13)"
    )


def test_windows_begin_anew_at_cuts(folder, tmp_path):
    """Three shots of 13, 4 and 30 frames in windows of 9: one, none, three."""
    film_a, film_b, film_c = film(13), 255 - film(4), film(30)[::-1] // 3
    shots = [film_a, film_b, film_c]
    write(folder / "a.mp4", np.concatenate(shots), crf="1")
    write(folder / "b.mp4", film(25))
    options = {"fps": 10.0, "num_frames": 9, "size": (48, 64), "lossless": True}
    split, _ = made(folder, tmp_path, **options, split_shots=True)
    # The number is that of the window without cuts that has the first frame.
    places = {"00000": (film_a, 0), "00001": (film_c, 0), "00002": (film_c, 9)}
    places |= {"00003": (film_c, 18)}
    assert {id.partition("#")[2] for id in split if id.startswith("a")} == {*places}
    for number, (shot, first) in places.items():
        clip = split[f"a.mp4#{number}"]
        error = np.abs(clip.frames() - shot[first : first + 9].astype(int)).mean()
        assert error < 6 and clip.shots == ((0, 9),)
    assert split["a.mp4#00001"].source == "a.mp4 from 1.700 s"
    remarks = json.loads((tmp_path / "out" / "report.json").read_text())["remarks"]
    [remark] = [one for one in remarks if "cut to other shots" in one["what"]]
    # What is left of the last shot is the end of the video, as without cuts.
    assert remark["files"] == {"a.mp4": 4 + 4}
    whole, _ = made(folder, tmp_path / "whole", **options)
    assert [id for id in split if id.startswith("b")] == ["b.mp4#00000", "b.mp4#00001"]
    for id in ("b.mp4#00000", "b.mp4#00001"):
        assert whole[id].video == split[id].video
    assert len(whole["a.mp4#00001"].shots) > 1


def test_a_video_of_short_shots_says_so(folder, tmp_path):
    parts = [film(4), 255 - film(4)] * 3
    write(folder / "a.mp4", np.concatenate(parts), crf="1")
    write(folder / "b.mp4", film(10))
    options = {"fps": 10.0, "num_frames": 5}
    clips, skipped = made(folder, tmp_path, **options, split_shots=True)
    assert skipped == {"a.mp4": "none of its shots has 5 frames at 10 fps"}
    assert len(clips) == 2
    images, _ = made(folder, tmp_path / "images", num_frames=1, split_shots=True)
    assert sum(id.startswith("a") for id in images) == 12


def test_a_frame_that_stays_on_screen_gives_one_clip(folder, tmp_path):
    """Two frames of 50 s each: a hundred clips would have two different ones."""
    write(folder / "a.mp4", film(2), fps=fractions.Fraction(1, 50))
    clips, skipped = made(folder, tmp_path)
    assert [*clips] == ["a.mp4#00000", "a.mp4#00050"] and skipped == {}
    remarks = json.loads((tmp_path / "out" / "report.json").read_text())["remarks"]
    frames = {remark["what"]: remark["frames"] for remark in remarks}
    assert frames["still for whole clips, which are left out"] == 98 * FRAMES
    images, _ = made(folder, tmp_path / "images", num_frames=1)
    assert [*images] == ["a.mp4#00000", "a.mp4#00250"]


def test_a_file_that_unpacks_to_far_too_much_is_refused(folder, tmp_path):
    """Where the header counts the frames, and where it does not."""
    write(folder / "a.mp4", film(10))
    frame_hw = np.zeros((1080, 1920), np.uint8)
    still = [PIL.Image.fromarray(frame_hw + k) for k in range(2)]
    still[0].save(
        folder / "bomb.gif", save_all=True, append_images=[still[1], still[0]] * 9
    )
    write(folder / "bomb.mkv", np.zeros((60, 1080, 1920, 3), np.uint8))
    (folder / "bomb").mkdir()
    for number in range(30):
        still[0].save(folder / "bomb" / f"{number}.webp", lossless=True)
    limits = video_io.Limits(max_expansion=100)
    clips, skipped = made(folder, tmp_path, limits=limits, frames_fps=10.0)
    assert {clip.partition("#")[0] for clip in clips} == {"a.mp4"}
    assert set(skipped) == {"bomb", "bomb.gif", "bomb.mkv"}
    for reason in skipped.values():
        assert "bytes unpack to more than 100 pixels a byte" in reason


def test_memory_allowed_grows_with_frames_and_clips(folder):
    def memory(size=SIZE, side=4096):
        limits = video_clips.limits(1, 1, side, 1)
        return folder_clips(folder, size=size, limits=limits).bounds.memory

    clip = 3 * FRAMES * (720 * 1280 - SIZE[0] * SIZE[1])
    assert memory(size=(720, 1280)) - memory() == 4 * clip
    assert memory(side=8192) - memory() == 3 * 40 * 4096**2
    assert memory(side=10**9) < 1 << 38  # what a system's limits can hold


def test_limits_hold_for_folders(folder, tmp_path):
    write(folder / "a.mp4", film(10))
    write(folder / "b.mp4", film(10, height=24, width=32))
    clips, skipped = made(folder, tmp_path, limits=video_io.Limits(max_side=40))
    assert list(clips) == ["b.mp4#00000"]
    assert "64x48 are beyond the limit" in skipped["a.mp4"]
