"""What is found in a folder: videos, links, and captions in every layout."""

import json
import os
import pathlib
import time

import pytest

from sora_jax.data import folders


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def files(folder, contents):
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(content)


def captions(folder):
    """Captions by video and what was skipped, of a folder."""
    listing = folders.scan(folder)
    said = {video: dict(text.captions) for video, text in listing.texts.items()}
    return said, {one.file: one.reason for one in listing.skipped}


def test_captions_may_hold_line_ends_of_any_kind(folder):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (folder / name).touch()
    (folder / "captions.csv").write_bytes(b'file,caption\r\na.mp4,"two\nlines, "\r\n')
    rows = [
        {"file": "b.mp4", "caption": "one\u2028two"},
        {"file": "c.mp4", "dense": "x"},
    ]
    (folder / "captions.jsonl").write_text(
        "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), newline=""
    )
    listing = folders.scan(folder)
    assert listing.skipped == ()
    assert {video: text.captions for video, text in listing.texts.items()} == {
        "a.mp4": {"alt": "two lines,"},
        "b.mp4": {"alt": "one two"},
        "c.mp4": {"dense": "x"},
    }


@pytest.mark.parametrize(
    "file, content, where, message",
    [
        (
            "captions.jsonl",
            '{"file": "b.mp4", "short": "x"}',
            ":1",
            "not a video of the",
        ),
        ("captions.jsonl", '{"caption": "x"}', ":1", "names no file"),
        ("captions.jsonl", '\n{"file": 3}', ":2", "names no file"),
        ("captions.jsonl", "[1]", ":1", "not an object"),
        ("captions.jsonl", "{", ":1", "not JSON"),
        ("captions.jsonl", "[" * 100_000, ":1", "not JSON"),
        ("captions.jsonl", b"[\x00]\x00", ":1", "zero bytes, as UTF-16 does"),
        ("captions.jsonl", " " * (1 << 20) + "{}", ":1", "1048578 characters; the lim"),
        ("captions.csv", "file,caption\na.mp4,\n", ":2", "no caption"),
        ("captions.csv", "file,caption\na.mp4,a, b\n", ":2", "comma in quotes"),
        ("captions.csv", "File,Caption\na.mp4,x\n", ":1", "'File', 'Caption', none"),
        ("captions.csv", "name\nx\n", ":1", "names no file: its fields are 'name'"),
        ("a.json", '{"descripton": "x"}', "", "no caption"),
        ("a.json", '{"captions": {"tiny": "x"}}', "", "tiny"),
        ("a.json", '{"captions": [1]}', "", "not an object of tiers"),
        ("a.json", '{"dense": 7}', "", "dense is int, not text"),
        ("a.json", "[" * 100_000, "", ""),
        ("a.txt", "", "", "no caption"),
        ("a.txt", "x" * 4001, "", "4001 characters; the limit is 4000"),
        ("a.txt", b"\xff\xff", ":1", "not UTF-8"),
        ("a.txt", " " * (1 << 20) + "x", "", "larger than 1048576 bytes"),
    ],
)
def test_captions_that_cannot_be_read_are_listed(folder, file, content, where, message):
    (folder / "a.mp4").touch()
    content = content.encode() if isinstance(content, str) else content
    (folder / file).write_bytes(content)
    listing = folders.scan(folder)
    (skipped,) = listing.skipped
    assert skipped.file == file + where and message in skipped.reason
    assert listing.texts == {}


LAYOUTS = {
    "metadata of Hugging Face, in a folder of its own": (
        {"train/metadata.csv": "file_name,text\na.mp4,first\nb.mp4,second\n"},
        {"train/a.mp4": {"alt": "first"}, "train/b.mp4": {"alt": "second"}},
    ),
    "metadata.jsonl": (
        {"metadata.jsonl": '{"file_name": "train/a.mp4", "text": "first"}'},
        {"train/a.mp4": {"alt": "first"}},
    ),
    "prompts.txt and videos.txt": (
        {"prompts.txt": "first, with a comma\n\nsecond\n",
         "videos.txt": "train/a.mp4\nc.mp4\ntrain/b.mp4\n\n"},
        {"train/a.mp4": {"alt": "first, with a comma"}, "train/b.mp4": {"alt": "second"}},
    ),
    "videos.txt with names that a caption could not have": (
        {"prompts.txt": "first\nsecond\n", "videos.txt": "two  blanks\t.mp4 \nso\u00adft.mp4",
         "two  blanks\t.mp4": "", "so\u00adft.mp4": ""},
        {"two  blanks\t.mp4": {"alt": "first"}, "so\u00adft.mp4": {"alt": "second"}},
    ),
    "prompt.txt": (
        {"train/prompt.txt": "first", "train/videos.txt": "a.mp4"},
        {"train/a.mp4": {"alt": "first"}},
    ),
    "several captions of a video": (
        {"captions.csv": "file,caption,short\nc.mp4,one,s\nc.mp4,two,\nc.mp4,one,t\n",
         "captions.jsonl": '{"file": "train/a.mp4", "caption": ["x", "y\\nz"]}'},
        {"c.mp4": {"alt": "one\ntwo", "short": "s\nt"}, "train/a.mp4": {"alt": "x\ny z"}},
    ),
    "recipes of WebM and GIF": (
        {"d.webm": "", "d.gif": "", "d.webm.json": '{"prompt": "first", "fps": 8}',
         "d.gif.json": '{"prompt": "second"}'},
        {"d.webm": {"alt": "first"}, "d.gif": {"alt": "second"}},
    ),
    "the deeper list wins, then captions, then what stands beside": (
        {"captions.csv": "file,caption\ntrain/a.mp4,lost\nc.mp4,kept\ntrain/b.mp4,lost\n",
         "train/metadata.csv": "file_name,text\na.mp4,deep\nb.mp4,lost\n",
         "metadata.csv": "file_name,text\nc.mp4,lost\n", "train/b.txt": "beside"},
        {"train/a.mp4": {"alt": "deep"}, "c.mp4": {"alt": "kept"},
         "train/b.mp4": {"alt": "beside"}},
    ),
}  # fmt: skip


ENCODED = {
    "utf-8-sig": None, "utf-16": None, "utf-32": None, "utf-8": "cp1252",
    "cp1252": "cp1252", "utf-16-le": "utf-16-le",
}  # fmt: skip


@pytest.mark.parametrize("stored", ENCODED)
def test_captions_are_read_in_the_encoding_that_is_named(folder, stored):
    """UTF-8 and what has a mark without it, and lists as well as single captions."""
    said = "un café tôt"
    rows = json.dumps({"file": "c.mp4", "caption": said}, ensure_ascii=False)
    contents = {
        "a.txt": said, "captions.csv": f"file,caption\nb.mp4,{said}\n",
        "captions.jsonl": rows, "prompts.txt": said, "videos.txt": "d.mp4",
    }  # fmt: skip
    files(folder, {name: text.encode(stored) for name, text in contents.items()})
    files(folder, dict.fromkeys(("a.mp4", "b.mp4", "c.mp4", "d.mp4"), ""))
    listing = folders.scan(folder, encoding=ENCODED[stored])
    assert listing.skipped == () and len(listing.texts) == 4
    assert {text.captions["alt"] for text in listing.texts.values()} == {said}


def test_each_file_counts_once(folder, monkeypatch):
    files(folder, {
        "a.mp4": "", "a.txt": "x", "b.webm": "", "b.webm.txt": "y", "cover.jpg": "",
        "none.txt": "z", "notes.doc": "", "captions.csv": "file,caption\nc.mp4,lost\n",
        "deep/1.png": "", "deep/2.png": "", ".hidden/d.mp4": "", "gone.mp4": "",
        "..\\..\\up.mp4": "", ".DS_Store": "",
    })  # fmt: skip
    os.symlink("nowhere", folder / "link.mp4")
    (folder / os.fsdecode(b"\xff.mp4")).touch()
    os.mkfifo(folder / "pipe.mp4")
    stat = pathlib.Path.stat

    def refusing(path, **options):
        if path.name == "gone.mp4":
            raise FileNotFoundError(2, "No such file or directory")
        return stat(path, **options)

    monkeypatch.setattr(pathlib.Path, "stat", refusing)
    listing = folders.scan(folder)
    assert listing.counts == {"videos": 2, "captions": 3, "others": 10}
    assert listing.texts["b.webm"].captions == {"alt": "y"}
    skipped = {one.file: one.reason for one in listing.skipped}
    assert skipped.pop("gone.mp4") == "it cannot be read: No such file or directory"
    assert sorted(skipped) == [
        "..\\..\\up.mp4", "\\xff.mp4", "captions.csv:2", "cover.jpg", "deep", "link.mp4", "none.txt",
        "notes.doc", "pipe.mp4",
    ]  # fmt: skip
    with_frames = folders.scan(folder, frames_fps=8.0)
    assert with_frames.counts == {"videos": 4, "captions": 3, "others": 8}


@pytest.mark.parametrize("name", LAYOUTS)
def test_captions_are_read_in_every_layout(folder, name):
    contents, expected = LAYOUTS[name]
    files(folder, dict.fromkeys(("c.mp4", "train/a.mp4", "train/b.mp4"), "") | contents)
    said, skipped = captions(folder)
    assert said == expected
    assert set(skipped) <= {"prompts.txt:2"}  # where a line is empty


def test_captions_of_two_writers_have_both(folder):
    files(folder, {"a.mp4": "", "captions.jsonl": "\n".join(
        json.dumps({"file": "a.mp4", "caption": text, "caption_source": writer})
        for text, writer in (("x", "human"), ("y", "model:m"), ("z", "human"))
    )})  # fmt: skip
    text = folders.scan(folder).texts["a.mp4"]
    assert text.captions == {"alt": "x\ny\nz"}
    assert text.sources == {"alt": "human, model:m"}


def test_many_rows_of_one_video_take_no_longer_than_of_many(folder):
    rows = "".join(f"a.mp4,caption {k}\n" for k in range(10_000))
    files(folder, {"a.mp4": "", "captions.csv": f"file,caption\n{rows}"})
    began = time.monotonic()
    said, _ = captions(folder)
    assert said["a.mp4"]["alt"].count("\n") == 9_999
    assert time.monotonic() - began < 5  # 0.3 s, and 15 s where each is joined anew


def test_lists_that_do_not_fit_are_named(folder):
    files(folder, {"a.mp4": "", "prompts.txt": "x\ny\n", "videos.txt": "a.mp4\n",
                   "captions.csv": "file;caption\na.mp4;x\n"})  # fmt: skip
    said, skipped = captions(folder)
    assert said == {} and len(skipped) == 2
    assert "it has 1 lines and prompts.txt 2" in skipped["videos.txt"]
    assert "'file;caption' has semicolons" in skipped["captions.csv:1"]


def test_links_are_listed_or_named(folder, tmp_path):
    files(folder, {"a.mp4": "", "deep/b.mp4": "", ".hidden/d.mp4": ""})
    files(tmp_path / "disk", {"c.mp4": "", "more/e.mp4": ""})
    links = {
        "loop": folder, "deep/loop": folder / "deep", "turn": folder / "turn",
        "nowhere": tmp_path / "none", "same": folder / "deep", "copy.mp4": "a.mp4",
        "disk": tmp_path / "disk", "c.mp4": tmp_path / "disk" / "c.mp4",
        "hidden": folder / ".hidden", "up": tmp_path,
    }  # fmt: skip
    for name, target in links.items():
        os.symlink(target, folder / name)
    listing = folders.scan(folder)
    skipped = {one.file: one.reason for one in listing.skipped}
    assert [*listing.videos] == ["a.mp4", "copy.mp4", "deep/b.mp4", "hidden/d.mp4"]
    for name in ("loop", "deep/loop", "same"):
        assert "a link to a folder that is listed under its own" in skipped.pop(name)
    for name in ("turn", "nowhere"):
        assert "a broken link" in skipped.pop(name)
    for name in ("disk", "c.mp4", "up"):
        assert f"out of the folder, to {tmp_path}" in skipped.pop(name)
    assert skipped == {}
    names, _ = folders.walk(folder, follow_links=True)
    assert {"c.mp4", "disk/c.mp4", "disk/more/e.mp4", "deep/b.mp4"} <= set(names)
    inside = [name for name in names if name.endswith("b.mp4")]
    assert inside == ["deep/b.mp4"]  # once, though loops and `up` lead there again


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    files(folder, {"a.mp4": "", "closed/b.mp4": ""})
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    names, skipped = folders.walk(folder)
    assert names == ["a.mp4"] and len(skipped) == 1
    assert skipped[0].file == "closed" and "Permission denied" in skipped[0].reason
