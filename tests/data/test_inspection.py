"""What a folder holds is told before anything is made of it, and is what is then made."""

import json

import numpy as np
import PIL.Image
import pytest

from sora_jax.data import inspection, shards, tokenizer, video_clips
from tests.data.test_prepare import contents, refusal, run
from tests.data.test_video_io import film, write


@pytest.fixture
def folder(tmp_path):
    """Videos of several kinds, some of no use, with captions and other files."""
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "a.mp4", film(40))
    write(folder / "b.mkv", 255 - film(20, height=96), fps=20)
    write(folder / "猫.webm", film(10), codec="libvpx-vp9")
    write(folder / "short.mp4", film(3))
    (folder / "junk.mp4").write_bytes(b"junk")
    (folder / "a.txt").write_text("one two three")
    (folder / "b.json").write_text(json.dumps({"short": "x y", "dense": "x y z w v"}))
    (folder / "cover.jpg").write_bytes(b"a picture")
    return folder


def source_of(folder):
    return video_clips.FolderClips(folder, (24, 32), 5, 5.0)


def test_what_is_told_beforehand_is_what_is_made(folder, tmp_path):
    source = source_of(folder)
    told = {one.name: one for one in inspection.inspect(source)}
    assert [*told] == [*source.items]
    shards.write(tmp_path / "out", source)
    made = [clip.id.partition("#")[0] for clip in shards.open(tmp_path / "out")]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    reasons = {one["item"]: one["reason"] for one in report["skipped_in_items"]}
    for name, one in told.items():
        assert one.clips == made.count(name)
        assert one.reason == reasons.get(name, "")
        if one.clips:
            assert one.picture_hwc.shape == (144, 192, 3)
    red = told["a.mp4"].picture_hwc[..., 0].mean()
    assert abs(red - (40 + 40 * 2.0)) < 6  # of two seconds after the start


def test_the_job_says_what_there_is_and_writes_one_picture(folder, tmp_path, capsys):
    before, sheet = contents(tmp_path), tmp_path / "sheets" / "in.png"
    asked = {"source": f"folder:{folder}", "size": "32x24", "num_frames": 5, "fps": 5}
    tokenizer.train(["one two three"], tmp_path / "text" / "spiece.model", 512)
    run(**asked, workers=2, inspect=sheet, text_encoder=tmp_path / "text")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{folder}: 8 files: 5 of videos, 2 of captions, 1 others"
    assert said[1].startswith("5 videos of 0.00 GiB and 0.00 hours: 3 can be used, and")
    assert "give up to 6 clips of 5 frames, 32 wide, 24 high, 5 fps" in said[1]
    table = {line[:20].strip(): line[20:].split() for line in said[2:11]}
    assert table["height, pixels"] == ["48", "48", "48", "96", "96"]
    assert table["frames a second"] == ["10", "10", "10", "20", "20"]
    assert table["words of a caption"] == ["2", "2", "3", "5", "5"]
    tokens = tokenizer.load(tmp_path / "text").ids("one two three")
    assert int(table["tokens of a caption"][2]) >= len(tokens)
    assert "     2 h264 in mov" in said
    assert "captions: 2 of 5 videos have one; by tier: 1 alt, 1 dense, 1 short" in said
    reasons = "\n".join(said[said.index("2 videos that cannot be used:") :])
    assert "(such as short.mp4)" in reasons and "(such as junk.mp4)" in reasons
    assert "1: it is a picture next to videos" in reasons
    assert said[-2:] == [f"{sheet}: pictures of 5 videos", "picture 5 is of 猫.webm"]
    added = contents(tmp_path).keys() - before.keys()
    assert {name for name in added if not name.startswith("text/")} == {"sheets/in.png"}
    drawn = np.asarray(PIL.Image.open(sheet))
    assert drawn.shape[1] == 5 * 198 + 6
    first, second = (drawn[60, 6 + 198 * k + 60].astype(int) for k in range(2))
    assert np.abs(first - second).max() > 20  # each video has its own picture


def test_what_cannot_be_inspected_is_refused(folder, tmp_path):
    asked = {"source": f"folder:{folder}"}
    for changes, reason in (
        ({"inspect": tmp_path / "a.txt"}, "--inspect is a file .png or .jpg to write"),
        ({"inspect": folder / "a.png"}, "lies inside"),
        ({"inspect": tmp_path / "a.png", "out": tmp_path / "out"}, "give it or --out"),
        ({"out": tmp_path / "out", "text_encoder": "x"}, "without --inspect"),
        ({"source": "toyworld:tw16", "inspect": "a.png"}, "--inspect has no meaning"),
        ({}, "give --out"),
    ):
        assert reason in refusal(**asked | changes)
