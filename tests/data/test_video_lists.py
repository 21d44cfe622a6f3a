"""Lists of other projects: which videos and times they name, and what they say of them."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from sora_jax import prepare
from sora_jax.data import shards, tables, video_clips, video_io, video_lists
from tests import conftest
from tests.data.test_video_io import film, write

SIZE, FRAMES, FPS = (24, 32), 5, 5.0


@pytest.fixture
def folder(tmp_path):
    """Videos that are only looked for, a.mp4 and deep/b.mkv, and two of one name."""
    for name in ("a.mp4", "deep/b.mkv", "one/c.mp4", "two/c.mp4", "notes.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"12345")
    return tmp_path / "in"


def scanned(folder, name, content):
    """The listing of one list, and the reasons by place."""
    path = folder.parent / name
    path.write_text(content)
    listing = video_lists.scan(folder, {name: path})
    return listing, {one.file: one.reason for one in listing.skipped}


def csv(*rows):
    """Rows of values as lines; each value in quotes."""
    quoted = (
        ",".join('"' + str(v).replace('"', '""') + '"' for v in row) for row in rows
    )
    return "\n".join(quoted) + "\n"


# Each: the list, then (captions, scores, source) by video, and the columns not read.
FORMS = {
    "Open-Sora": (
        "open_sora.csv",
        csv(
            ["path", "text", "num_frames", "fps", "aes", "flow", "cmotion"],
            ["a.mp4", "a dog, asleep", 120, 30.0, 5.25, "", "pan left"],
            ["{folder}/deep/b.mkv", "[a cat]", 60, 24, 4.5, 0.5, "static"],
        ),
        {"a.mp4": ({"alt": "a dog, asleep"}, {"aes": 5.25}, ""),
         "deep/b.mkv": ({"alt": "[a cat]"}, {"aes": 4.5, "flow": 0.5}, "")},
        "cmotion",
    ),
    "OpenVid-1M": (
        "openvid.csv",
        csv(
            ["video", "caption", "aesthetic score", "camera motion", "seconds"],
            ["b.mkv", "a cat", 4.5, "pan", 3],
        ),
        {"deep/b.mkv": ({"alt": "a cat"}, {"aesthetic score": 4.5}, "")},
        "camera motion",
    ),
    "Panda-70M": (
        "panda.csv",
        csv(
            ["videoID", "url", "timestamp", "caption", "matching_score", "x"],
            ["a", "https://www.youtube.com/watch?v=a",
             "[['0:00:05.839', '0:01:12.345'], ['1:00:00', '1:00:01.5']]",
             """["It's a \\d dog", 'two "cats"']""", "[0.5, 0.25]", "['y', 'z']"],
        ),
        {"a.mp4@5.839-72.345": ({"alt": "It's a \\d dog"}, {"matching_score": 0.5},
                                "https://www.youtube.com/watch?v=a"),
         "a.mp4@3600.000-3601.500": ({"alt": 'two "cats"'}, {"matching_score": 0.25},
                                     "https://www.youtube.com/watch?v=a")},
        "x",
    ),
    "Koala-36M": (
        "koala.csv",
        csv(
            ["videoID", "url", "timestamp", "caption", "clarity_score",
             "video_training_suitability_score"],
            ["b_7", "https://www.youtube.com/watch?v=b&t=1", "['0:00:01.0', '0:00:02']",
             "a bird", 0.75, 3.5],
        ),
        {"deep/b.mkv@1.000-2.000": (
            {"alt": "a bird"},
            {"clarity_score": 0.75, "video_training_suitability_score": 3.5},
            "https://www.youtube.com/watch?v=b&t=1")},
        None,
    ),
    "JSON, with times in columns, several captions and tiers": (
        "mine.jsonl",
        "\n".join(
            json.dumps(row)
            for row in (
                {"file": "a.mp4", "start": 1, "end": 2.5, "dense": ["x", "y"],
                 "licence": "CC0", "scores": {"motion": 2}, "source": "me"},
                {"file": "a.mp4", "start_time": "0:01", "end_time": "2.5", "text": "z"},
                {"file": "two/c.mp4", "caption": "w"},
            )
        ),
        {"a.mp4@1.000-2.500": ({"dense": "x\ny", "alt": "z"}, {"motion": 2.0}, "me"),
         "two/c.mp4": ({"alt": "w"}, {}, "")},
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_told_from_its_columns(folder, form):
    name, content, expected, unread = FORMS[form]
    content = content.replace("{folder}", str(folder.absolute()))
    listing, reasons = scanned(folder, name, content)
    assert {
        video: (dict(text.captions), dict(text.scores), text.source)
        for video, text in listing.texts.items()
    } == expected
    assert reasons == ({name: f"its columns {unread} are not read"} if unread else {})
    assert set(listing.videos) == set(expected) == set(listing.digests)
    for video, path in listing.places.items():
        assert path == folder / video.partition("@")[0]
        span = listing.spans.get(video)
        assert video == path.relative_to(folder).as_posix() + (
            f"@{span[0]:.3f}-{span[1]:.3f}" if span else ""
        )


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"path": "none.mp4"}, "there is no video 'none.mp4' in"),
        ({"path": "in/a.mp4"}, "there is no video"),
        ({"path": "x/a.mp4"}, "there is no video"),  # of that name in another folder
        ({"path": "c.mp4"}, "'c.mp4' may be any of one/c.mp4, two/c.mp4: name it with"),
        ({"path": "/etc/a.mp4"}, "'/etc/a.mp4' leads out of"),
        ({"path": "deep/../../in/a.mp4"}, "leads out of"),
        ({"path": 3}, "path is int, not a name"),
        ({"name": "a.mp4"}, "it names no video: its fields are"),
        ({"path": ""}, "it names no video: the field is empty"),
        ({"path": "a.mp4", "start": 1}, "None is not a time"),
        ({"path": "a.mp4", "start": 2, "end": 1}, "time range of 2 to 1 s is empty"),
        ({"path": "a.mp4", "start": -1, "end": 1}, "-1 is not a time from the begin"),
        ({"path": "a.mp4", "timestamp": 3.5}, "3.5 is not a time range"),
        ({"path": "a.mp4", "timestamp": "[1, 2"}, "'[1, 2' is not a list"),
        ({"path": "a.mp4", "timestamp": "[" * 9999}, "is not a list"),
        ({"path": "a.mp4", "timestamp": "[exit(), 2]"}, "is not a list"),
        ({"path": "a.mp4", "timestamp": ["x", 2]}, "'x' is not a time: write seconds"),
        (
            {"path": "a.mp4", "timestamp": [[0, 1], [1, 2]], "text": ["x"]},
            "it has 2 time ranges and 1 of text",
        ),
        ({"path": "a.mp4", "text": 7}, "alt is int, not text"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(folder, row, reason):
    good = {"path": "deep/b.mkv", "text": "y"}
    content = "\n".join(json.dumps(one) for one in ({"text": "x"} | row, good))
    listing, reasons = scanned(folder, "list.jsonl", content)
    assert set(listing.videos) == {"deep/b.mkv"} and len(reasons) == 1
    assert reason in reasons["list.jsonl:1"]
    assert listing.counts == {"videos": 1, "others": 1}


def test_one_bad_part_of_a_row_costs_itself(folder):
    row = {
        "path": "a.mp4",
        "timestamp": [[0, 1], [2, 2], [3, 4]],
        "text": ["x", "y", ""],
    }
    listing, reasons = scanned(folder, "list.jsonl", json.dumps(row))
    assert {video: text.captions for video, text in listing.texts.items()} == {
        "a.mp4@0.000-1.000": {"alt": "x"},
        "a.mp4@3.000-4.000": {},
    }
    assert reasons == {
        "list.jsonl:1 (2 of 3)": "its time range of 2 to 2 s is empty",
        "list.jsonl:1 (3 of 3)": "it has no caption, and its clips have none",
    }


def test_a_list_that_cannot_be_read_is_named(folder):
    for content, reason in {
        "path,name\na.mp4,x\n": "it has no caption: its fields are 'path', 'name'",
        "name,text\na.mp4,x\n": "it names no video: its fields are 'name', 'text'",
        "path;text\na.mp4;x\n": "has semicolons between its columns",
    }.items():
        listing, reasons = scanned(folder, "list.csv", content)
        assert listing.videos == {} and reason in reasons["list.csv:1"]
    (folder.parent / "bad.parquet").write_bytes(b"PAR1 and no more")
    listing = video_lists.scan(folder, {"bad": folder.parent / "bad.parquet"})
    assert "it cannot be read as Parquet" in listing.skipped[0].reason


# -- clips ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """A folder of one video whose pictures tell their number: 40 at 10 a second."""
    folder = tmp_path_factory.mktemp("counted")
    frames_thwc = np.zeros((40, *SIZE, 3), np.uint8)
    frames_thwc += np.arange(40, dtype=np.uint8)[:, None, None, None]
    (folder / "long.mp4").write_bytes(video_io.encode_lossless(frames_thwc, 10.0))
    return folder


def numbers(tmp_path, counted, ranges, fps=10.0):
    """The numbers of the pictures in the clips of time ranges, and the report."""
    rows = [
        json.dumps({"path": "long.mp4", "start": a, "end": b, "text": f"{a}"})
        for a, b in ranges
    ]
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(rows))
    lists = {"list.jsonl": path}
    source = video_clips.ListClips(
        counted, SIZE, FRAMES, fps, lossless=True, lists=lists
    )
    shards.write(tmp_path / "out", source)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    clips = [*shards.open(tmp_path / "out")]
    return [clip.frames()[:, 0, 0, 0].tolist() for clip in clips], clips, report


def test_clips_come_from_inside_of_their_time_range_alone(tmp_path, counted):
    ranges = [(0, 0.5), (0.5, 1.0), (0.52, 1.19), (0.58, 1.11), (1.4995, 2.6), (3, 9)]
    found, clips, report = numbers(tmp_path, counted, ranges)
    assert found == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
        [6, 7, 8, 9, 10],
        [6, 7, 8, 9, 10],
        [15, 16, 17, 18, 19],
        [20, 21, 22, 23, 24],
        [30, 31, 32, 33, 34],
        [35, 36, 37, 38, 39],
    ]
    assert clips[2].id == "long.mp4@0.520-1.190#00000"
    assert clips[2].captions == {"alt": "0.52"}
    assert clips[5].source == "long.mp4@1.500-2.600 from 2.000 s"
    assert report["skipped"] == [
        {
            "file": "long.mp4@3.000-9.000 from 4.00 s on",
            "reason": "its list says 9.00 s, but its file ends earlier",
        }
    ]


def test_a_time_range_that_is_too_short_is_named(tmp_path, counted):
    ranges = [(0, 1), (1.01, 1.5), (7, 8)]
    found, _, report = numbers(tmp_path, counted, ranges, fps=5.0)
    assert found == [[0, 2, 4, 6, 8]]
    reasons = {one["file"]: one["reason"] for one in report["skipped"]}
    due = "and the last of 5 frames at 5 fps is due at 0.80 s"
    assert reasons == {
        "long.mp4@1.010-1.500": f"it lasts 0.40 s, {due}",
        "long.mp4@7.000-8.000": "it begins at 7.00 s, and its file ends at 4.00 s",
    }


def test_videos_in_parquet_give_the_clips_of_a_folder(tmp_path):
    """Paths, and videos in the file itself; in groups of two rows, read by a worker."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(5):
        write(folder / f"{index}.mp4", film(10 + 10 * (index % 2)))
        (folder / f"{index}.txt").write_text(f"film {index}")
    rows = [
        {
            "video": {"bytes": (folder / f"{k}.mp4").read_bytes(), "path": f"{k}.mp4"},
            "text": f"film {k}",
            "motion_score": k / 2,
        }
        for k in range(5)
    ]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "inside.parquet", row_group_size=2)
    paths = [
        row | {"video": {"bytes": None, "path": row["video"]["path"]}} for row in rows
    ]
    table = pyarrow.Table.from_pylist(paths, table.schema)
    pyarrow.parquet.write_table(table, tmp_path / "paths.parquet")
    theirs = made(
        video_clips.FolderClips(folder, SIZE, FRAMES, FPS), tmp_path / "theirs"
    )
    assert len(theirs) == 7
    for name, ids in (("inside", "inside.parquet:{}"), ("paths", "{}.mp4")):
        lists = {f"{name}.parquet": tmp_path / f"{name}.parquet"}
        source = video_clips.ListClips(folder, SIZE, FRAMES, FPS, lists=lists)
        ours = made(source, tmp_path / name, num_workers=1)
        first = 1 if name == "inside" else 0
        for one, other in zip(ours, theirs, strict=True):
            index = int(other.id[0])
            assert one.id.rpartition("#")[0] == ids.format(index + first)
            assert one.video == other.video and one.captions == other.captions
            assert one.scores == {"motion_score": index / 2}


def made(source, out, **options):
    shards.write(out, source, **options)
    return list(shards.open(out))


def test_a_group_of_rows_that_is_too_large_is_refused(tmp_path, monkeypatch):
    rows = [{"video": {"bytes": b"x" * 1000, "path": None}, "text": "a"}] * 2
    path = tmp_path / "list.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    listing = video_lists.scan(tmp_path, {"list.parquet": path})
    (first, second) = listing.places.values()
    assert first.read() == b"x" * 1000
    monkeypatch.setattr(tables, "_GROUP_BYTES", 900)
    tables._group.cache_clear()
    with pytest.raises(video_io.UnreadableVideo, match="fewer rows a group"):
        second.read()


run, refusal = conftest.run_with_flags, conftest.refusal


def test_the_command_reads_a_list(tmp_path, counted, capsys):
    rows = csv(["path", "text"], ["long.mp4", "x"], ["none.mp4", "y"])
    (tmp_path / "train.csv").write_text(rows)
    out, source = tmp_path / "out", f"list:{tmp_path / 'train.csv'}"
    asked = {"source": source, "videos": counted, "out": out, "workers": 0}
    asked |= {"size": "32x24", "num_frames": 9, "fps": 10}
    run(prepare, **asked)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"skipped train.csv:3: there is no video 'none.mp4' in {counted}"
    assert "4 clips of 9 frames, 32 wide, 24 high, 10 fps; captions: 4 alt" in said[1]
    assert said[2] == f"{counted}: 2 rows: 1 of videos, 1 others"
    (tmp_path / "train.csv").write_text(rows.replace("none", "long") + '"long","z"\n')
    run(prepare, **asked)
    assert "changed, and keep their old clips: 1 (long.mp4)" in capsys.readouterr().out
    run(
        prepare,
        **{n: asked[n] for n in ("source", "videos")},
        inspect=tmp_path / "a.png",
    )
    assert "1 can be used" in capsys.readouterr().out
    assert "--frames_fps has no meaning" in refusal(prepare, **asked, frames_fps=8)
    inside = {"source": f"list:{tmp_path}", "out": tmp_path / "new"}
    assert "lies inside" in refusal(prepare, **asked | inside)
    wrong = refusal(prepare, **asked | {"source": "list:none.csv"})
    assert wrong == "prepare: there is no file none.csv"
    wrong = refusal(prepare, **asked | {"source": f"list:{__file__}"})
    assert wrong.endswith("is not .csv or .jsonl or .parquet")
    wrong = refusal(prepare, source=f"folder:{counted}", out=out, videos=counted)
    assert "--videos has no meaning for --source folder" in wrong
