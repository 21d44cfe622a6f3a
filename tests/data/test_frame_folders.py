"""Folders of numbered frames are clips to `prepare` and to `evaluate`, by one road."""

import numpy as np
import PIL.Image
import pytest

from sora_jax.data import folders, shards, video_clips
from sora_jax.evals.videos import clip_files
from tests.data.test_prepare import refusal, run
from tests.data.test_reading import measured, prepared
from tests.data.test_video_io import film, write

H, W = 48, 64


def save(folder, frames_thwc, first=1, suffix="png", name="{:05d}", **options):
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame_hwc in enumerate(frames_thwc, first):
        file = folder / f"{name.format(number)}.{suffix}"
        PIL.Image.fromarray(frame_hwc).save(file, **options)
    return folder


@pytest.mark.parametrize(
    "suffix, name, options, error",
    [
        ("png", "{:05d}", {}, 0),
        ("JPG", "frame_{}", {"quality": 95}, 6),
        ("jpeg", "{}", {"quality": 95}, 6),
        ("webp", "take 2, {}b", {"lossless": True}, 0),
    ],
)
def test_prepare_and_evaluate_see_the_same_frames(
    tmp_path, suffix, name, options, error
):
    """Numbers order them, not letters, and begin anywhere."""
    shown = film(12)
    save(tmp_path / "a" / "clip7", shown, 3, suffix, name, **options)
    clips, others = prepared(tmp_path, (H, W), 5, 10.0, frames_fps=10.0)
    clip = measured(tmp_path, 12)["a/clip7"]
    assert not others and clip.size == (H, W) and len(clip.video_thwc) == 12
    assert np.array_equal(clips["a/clip7"], clip.video_thwc[:10])
    assert np.abs(clip.video_thwc.astype(int) - shown).max() <= error


def test_frames_are_taken_at_their_times_and_scaled_as_video(tmp_path):
    shown = film(36, fps=30)
    save(tmp_path / "clip", shown)
    (tmp_path / "clip" / "00002.png").write_bytes(b"never on screen, so never read")
    clips, others = prepared(tmp_path, (H, W), 5, 10.0, frames_fps=30.0)
    assert np.array_equal(clips["clip"], shown[:30:3]) and not others
    small, _ = prepared(tmp_path, (24, 24), 5, 10.0, frames_fps=30.0)
    middle = shown[:30:3, :, 8:56].reshape(10, 24, 2, 24, 2, 3).mean((2, 4))
    assert np.abs(small["clip"] - middle).max() <= 1
    # 30 frames at 10 a second: 3 s, of which 20 fps make 60, each twice.
    save(tmp_path / "clip", shown)
    _, (remark,) = prepared(tmp_path, (H, W), 5, 60.0, frames_fps=30.0)
    assert "repeated" in remark.what and remark.frames == 70 - 35
    _, (late,) = prepared(tmp_path, (H, W), 5, 3.0, frames_fps=30.0)
    assert late.reason == (
        "it lasts 1.20 s, and the last of 5 frames at 3 fps is due at 1.33 s"
    )


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def damage(folder, what):
    """Does something to the fourth of twelve frames."""
    frame = folder / "00004.png"
    if what == "gap":
        frame.unlink()
        (folder / "00005.png").unlink()
    elif what == "no number":
        frame.rename(folder / "cover.png")
    elif what == "twice":
        (folder / "4.jpg").write_bytes(frame.read_bytes())
    elif what == "size":
        PIL.Image.fromarray(noise(W, H)).save(frame)
    elif what == "cut off":
        frame.write_bytes(frame.read_bytes()[:-40])
    elif what == "no picture":
        frame.write_bytes(b"nothing")


@pytest.mark.parametrize(
    "what, reason",
    [
        ("gap", "2 of the frames 1 to 12 are missing, the first of them 4"),
        ("no number", "the frame cover.png has no number"),
        ("twice", "the frame 4.jpg repeats a number"),
        ("size", "its frames differ in size: 00004.png is 48x64, and 00001.png 64x48"),
        ("cut off", "00004.png: it cannot be read: image file is truncated"),
        ("no picture", "00004.png: it is not a PNG, JPEG"),
    ],
)
def test_prepare_and_evaluate_refuse_with_the_same_words(tmp_path, what, reason):
    save(tmp_path / "good", film(5))
    damage(save(tmp_path / "bad", film(12)), what)
    clips, (left,) = prepared(tmp_path, (H, W), 5, 10.0, frames_fps=10.0)
    assert [*clips] == ["good"]
    assert left.file == "bad" and left.reason.startswith(reason)
    sources = {source.name: source for source in clip_files.find(tmp_path).sources}
    with pytest.raises(clip_files.UnusableClip) as caught:
        clip_files.Reader(12, 1)(sources["bad"])
    assert str(caught.value).startswith(f"bad: {reason}")


def test_frames_are_pictures_as_they_are_meant_to_be_seen(tmp_path):
    """16 bits are scaled, EXIF turns, transparent parts are black, and that is said."""
    grey = np.full((H, W), 257 * 40, np.uint16)
    save(tmp_path / "deep", [grey] * 5)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned clockwise to be seen
    save(tmp_path / "turned", [np.rot90(frame) for frame in film(5)], exif=exif)
    clear = np.full((H, W, 4), (250, 10, 10, 51), np.uint8)
    save(tmp_path / "clear", [clear] * 5)
    clips, (remark,) = prepared(tmp_path, (H, W), 5, 10.0, frames_fps=10.0)
    assert np.array_equal(clips["turned"], film(5))
    assert (clips["deep"] == 40).all() and (clips["clear"] == (50, 2, 2)).all()
    assert (remark.file, remark.frames) == ("clear", 5)
    for name, clip in measured(tmp_path, 5).items():
        assert np.array_equal(clip.video_thwc, clips[name]), name
        assert clip.notes == (remark.what,) * (name == "clear")


def test_captions_of_folders_are_found_as_those_of_files(tmp_path):
    for name in ("a", "b.v1", "in/c", "in/d", "e"):
        save(tmp_path / name, film(5), name="in_{}")
    (tmp_path / "a.txt").write_text("beside")
    (tmp_path / "b.v1.txt").write_text("with a dot")
    (tmp_path / "in" / "metadata.csv").write_text("file_name,text\nc,table\n")
    (tmp_path / "videos.txt").write_text("in/d/\n")
    (tmp_path / "prompts.txt").write_text("line\n")
    (tmp_path / "none.txt").write_text("of nothing")
    listing = folders.scan(tmp_path, frames_fps=8.0)
    said = {name: text.captions["alt"] for name, text in listing.texts.items()}
    assert said == {
        "a": "beside", "b.v1": "with a dot", "in/c": "table", "in/d": "line",
    }  # fmt: skip
    assert listing.skipped == (
        shards.Skipped("none.txt", "there is no video of this name"),
    )


def test_pictures_that_are_no_frames_are_listed(tmp_path):
    """Beside videos, in the folder itself, and all where no rate is given."""
    save(tmp_path / "deep", film(2))
    write(tmp_path / "deep" / "a.mp4", film(5))
    save(tmp_path, film(1), name="cover")
    save(tmp_path / "clip", film(5))
    (tmp_path / "clip.txt").write_text("a caption")
    with_rate = folders.scan(tmp_path, frames_fps=8.0)
    assert [*with_rate.videos] == ["deep/a.mp4", "clip"]
    without = folders.scan(tmp_path)
    assert [*without.videos] == ["deep/a.mp4"]
    reason = "it is a picture {}: the frames of a clip must be in a folder of their own"
    loose = dict.fromkeys(
        ("deep/00001.png", "deep/00002.png"), reason.format("next to videos")
    ) | {"cover.png": reason.format("in the folder itself")}
    assert {one.file: one.reason for one in with_rate.skipped} == loose
    unread = (
        "its 5 pictures may be a clip's frames: --frames_fps says how many a second"
    )
    found = {one.file: one.reason for one in without.skipped}
    assert found == loose | {"clip": unread}
    found = clip_files.find(tmp_path)
    assert [source.name for source in found.sources] == ["clip", "deep/a.mp4"]
    assert found.notes == ("4 files of other kinds are not read (.png, .txt)",)


def test_a_folder_of_one_clip_is_refused(tmp_path):
    save(tmp_path, film(5))
    for find in (folders.scan, clip_files.find):
        with pytest.raises(ValueError, match="name the folder that holds the clips"):
            find(tmp_path)


def test_a_clip_changes_with_its_frames_and_their_rate(tmp_path):
    write(tmp_path / "a.mp4", film(5))
    save(tmp_path / "clip", film(5))

    def digests(fps):
        return folders.scan(tmp_path, frames_fps=fps).digests

    first, faster = digests(8.0), digests(9.0)
    assert first["clip"] != faster["clip"] and first["a.mp4"] == faster["a.mp4"]
    (tmp_path / "clip" / "00005.png").rename(tmp_path / "clip" / "00006.png")
    assert digests(8.0)["clip"] != first["clip"]


def test_slices_of_a_long_clip_give_the_windows_of_the_whole(tmp_path, monkeypatch):
    save(tmp_path / "clip", film(30))
    whole, _ = prepared(tmp_path, (H, W), 5, 10.0, frames_fps=10.0)
    monkeypatch.setattr(video_clips, "_SLICE_BYTES", 2000)
    sliced, others = prepared(tmp_path, (H, W), 5, 10.0, frames_fps=10.0)
    assert np.array_equal(whole["clip"], film(30)) and not others
    assert np.array_equal(sliced["clip"], whole["clip"])


def test_the_limits_hold_for_frames(tmp_path):
    save(tmp_path / "clip", film(5))
    for limits, reason in (
        (
            video_clips.limits(4, 21600, 40, 60),
            "00001.png: its frames of 64x48 are beyond the",
        ),
        (
            video_clips.limits(4, 0.4, None, 60),
            "its 5 frames in 0 s are beyond the limit of",
        ),
    ):
        _, (left,) = prepared(tmp_path, (H, W), 5, 10.0, frames_fps=10.0, limits=limits)
        assert left.file == "clip" and left.reason.startswith(reason)


def test_the_job_reads_folders_of_frames(tmp_path, capsys):
    """Asks for the rate, and adds what it was not given before."""
    save(tmp_path / "in" / "clip7", film(10), suffix="jpg")
    (tmp_path / "in" / "clip7.txt").write_text("a red film")
    asked = {"source": f"folder:{tmp_path / 'in'}", "out": tmp_path / "out"}
    asked |= {"size": "32x24", "num_frames": 5, "fps": 10, "workers": 0}
    assert refusal(**asked) == (
        "prepare: nothing usable was found (clip7: its 10 pictures may be a clip's "
        "frames: --frames_fps says how many a second)"
    )
    for wrong in (0, -1, "inf", "nan"):
        assert "frames_fps must be between 0 and 1000" in refusal(
            frames_fps=wrong, **asked
        )
    write(tmp_path / "in" / "a.mp4", film(5))
    run(**asked)
    assert "skipped clip7: its 10 pictures" in capsys.readouterr().out
    run(frames_fps=10, **asked)
    assert "new, and are added: 1 (clip7)" in capsys.readouterr().out
    clips = {clip.id: clip for clip in shards.open(tmp_path / "out")}
    assert [*clips] == ["a.mp4#00000", "clip7#00000", "clip7#00001"]
    assert clips["clip7#00001"].captions == {"alt": "a red film"}
    assert clips["clip7#00001"].source == "clip7 from 0.500 s"
