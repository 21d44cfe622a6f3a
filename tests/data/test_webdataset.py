"""Tar archives: read as a folder of the same files is, and written for others to read."""

import functools
import hashlib
import io
import json
import pathlib
import subprocess
import tarfile

import pytest

from sora_jax import prepare
from sora_jax.data import folders, shards, toy_clips, video_clips, video_io, webdataset
from tests import conftest
from tests.data import clips
from tests.data.test_video_io import film, write

ORACLE = pathlib.Path(__file__).resolve().parents[1] / "oracle" / "webdataset_files.py"
SIZE, FRAMES, FPS = (24, 32), 5, 5.0


def archive(path, members):
    """Writes a tar of {name: bytes or text}, or of (name, content) pairs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = members.items() if isinstance(members, dict) else members
    with tarfile.open(path, "w") as tar:
        for name, content in pairs:
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def scanned(folder):
    """What is listed of a folder of archives, and the reasons by name."""
    root, names = folders.matching(str(folder), (webdataset.SUFFIX,))
    listing = webdataset.scan(root, names)
    reasons = [(one.file, one.reason) for one in listing.skipped]
    assert len(set(reasons)) == len(reasons)
    return listing, dict(reasons)


def made(source, out, **options):
    shards.write(out, source, **options)
    return list(shards.open(out))


@pytest.fixture
def film_bytes(tmp_path):
    return write(tmp_path / "film.mp4", film(10)).read_bytes()


def test_the_clips_are_those_of_a_folder_of_the_same_files(tmp_path):
    """Bit for bit: of a rotated film, another container, and a damaged one."""
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "a.mp4", film(30), rotation=90)
    write(folder / "b.mkv", film(12))
    whole = write(tmp_path / "c.mp4", film(60), g="10", crf="1").read_bytes()
    (folder / "c.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "a.txt").write_text("a red film")
    (folder / "b.json").write_text(
        json.dumps(
            {"short": "s", "licence": "CC0", "url": "x.org/b", "aesthetic_score": 5}
        )
    )
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    archive(tmp_path / "tars" / "deep" / "0.tar", files)
    settings = (SIZE, FRAMES, FPS)
    theirs = made(video_clips.FolderClips(folder, *settings), tmp_path / "theirs")
    source = video_clips.TarClips(
        tmp_path / "tars", *settings, archives=("deep/0.tar",)
    )
    ours = made(source, tmp_path / "ours", num_workers=1)
    assert len(ours) == 4  # three of a, one of b
    for one, other in zip(ours, theirs, strict=True):
        assert one.id == f"deep/0.tar/{other.id}"
        assert one.video == other.video and one.shots == other.shots
        assert one.captions == other.captions and one.licence == other.licence
    assert ours[3].scores == {"aesthetic_score": 5.0} and ours[3].source == "x.org/b"
    reasons = [
        [
            (one["file"].rpartition("/")[2], one["reason"])
            for one in json.loads((tmp_path / out / "report.json").read_text())[
                "skipped"
            ]
            if "caption" not in one["reason"]
        ]
        for out in ("ours", "theirs")
    ]
    assert reasons[0] == reasons[1] != []


def test_members_of_a_key_belong_together(tmp_path):
    """Also where they are apart; names of members lead nowhere, and are only names."""
    said = {"caption": "from json", "dense": "long", "scores": {"motion": 0.5}}
    archive(
        tmp_path / "in" / "0.tar",
        {
            "./x/a.MP4": b"1", "x/b.webm": b"22", "x/a.txt": "from text",
            "x/a.json": json.dumps(said), "x.y/c.left.mp4": b"333",
            "x.y/c.right.mp4": b"4444", "x.y/c.right.txt": "right", "x.y/c.txt": "both",
            "../../etc/d.mp4": b"55555", "../../etc/d.txt": "up", "/e.mov": b"6",
            "/e.txt": "said", "/e.json": json.dumps({"short": "said"}), "x/b.cls": "3",
        },
    )  # fmt: skip
    listing, reasons = scanned(tmp_path / "in")
    texts = {name[6:]: text for name, text in listing.texts.items()}
    assert {name: dict(text.captions) for name, text in texts.items()} == {
        "x/a.MP4": {"alt": "from json\nfrom text", "dense": "long"}, "x/b.webm": {},
        "x.y/c.left.mp4": {"alt": "both"}, "x.y/c.right.mp4": {"alt": "right"},
        "../../etc/d.mp4": {"alt": "up"}, "/e.mov": {"short": "said"},
    }  # fmt: skip
    assert texts["x/a.MP4"].scores == {"motion": 0.5}
    assert listing.counts == {"videos": 6, "captions": 7, "others": 1}
    assert reasons == {
        "0.tar/x/b.webm": "it has no caption, and its clips have none",
        "0.tar/x/b.cls": "it is neither a video nor captions (.txt, .json)",
    }
    for name, place in listing.places.items():
        content = place.read()
        assert len(content) == listing.videos[name] and content == content[:1] * len(
            content
        )


def test_faults_of_members_are_named(tmp_path):
    link = tarfile.TarInfo("link.mp4")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    path = archive(
        tmp_path / "in" / "0.tar",
        [
            ("a.mp4", b"1"), ("a.mp4", b"2"), ("a.txt", "kept"), ("noname", b""),
            (".hidden.mp4", b""), ("b.txt", "alone"), ("c.mp4", b"3"), ("c.json", "{"),
            ("d.mp4", b"4"), ("d.txt", "x" * (folders.CAPTION_BYTES + 1)),
            ("e.mp4", b"5"), ("e.txt", b"\xff\xff"), ("\udcff.mp4", b"6"),
        ],
    )  # fmt: skip
    with tarfile.open(path, "a") as tar:
        tar.addfile(link)
    listing, reasons = scanned(tmp_path / "in")
    assert set(listing.videos) == {f"0.tar/{key}.mp4" for key in "acde"}
    assert listing.texts["0.tar/a.mp4"].captions == {"alt": "kept"}
    assert listing.places["0.tar/a.mp4"].start == tarfile.BLOCKSIZE  # the first
    for name, reason in {
        "a.mp4": "its key has a member of this kind already",
        "noname": "no key in front of a dot",
        ".hidden.mp4": "no key in front of a dot",
        "b.txt": "there is no video of its key",
        "c.json": "Expecting property name",
        "d.txt": "larger than 1048576 bytes",
        "e.txt:1": "not UTF-8",
        "\\xff.mp4": "its name is not UTF-8",
        "link.mp4": "not a regular file",
        "c.mp4": "no caption", "d.mp4": "no caption", "e.mp4": "no caption",
    }.items():  # fmt: skip
        assert reason in reasons.pop(f"0.tar/{name}")
    assert reasons == {}
    assert listing.counts == {"videos": 4, "captions": 4, "others": 6}


def test_damaged_archives_are_named_and_give_what_is_whole(tmp_path):
    folder = tmp_path / "in"
    whole = archive(
        folder / "whole.tar", {"a.mp4": "x" * 600, "a.txt": "a", "b.mp4": "y" * 600}
    ).read_bytes()
    header_of_b = whole.index(b"b.mp4")
    (folder / "cut.tar").write_bytes(whole[: header_of_b + 700])
    (folder / "header.tar").write_bytes(whole[: header_of_b + 100])
    bad = bytearray(whole)
    bad[header_of_b + 1] ^= 1
    (folder / "flipped.tar").write_bytes(bad)
    (folder / "gzip.tar").write_bytes(b"\x1f\x8b\x08\0more")
    (folder / "junk.tar").write_bytes(b"junk" * 300)
    (folder / "empty.tar").touch()
    (folder / "no_end.tar").write_bytes(whole[: header_of_b + 512 + 1024])
    listing, reasons = scanned(folder)
    assert set(listing.videos) == {
        f"{name}.tar/{key}.mp4"
        for name, keys in (
            ("whole", "ab"), ("cut", "a"), ("header", "a"), ("flipped", "a"),
            ("no_end", "ab"),
        )
        for key in keys
    }  # fmt: skip
    for name, reason in {
        "cut.tar/b.mp4": "the archive ends before it does",
        "cut.tar": "damaged behind member 3",
        "header.tar": "damaged behind member 2",
        "flipped.tar": "damaged behind member 2",
        "gzip.tar": "compressed with gzip: unpack it",
        "junk.tar": "not a tar archive",
        "empty.tar": "not a tar archive",
    }.items():
        assert reason in reasons.pop(name), name
    assert set(reasons) == {"whole.tar/b.mp4", "no_end.tar/b.mp4"}  # no caption


def test_cosmos_curate_keeps_videos_and_captions_apart(tmp_path):
    place = tmp_path / "in" / "resolution_720" / "frames_0_255"
    name = "part_000000/000000.tar"
    window = {"start_frame": 0, "end_frame": 255, "qwen_caption": "a dog runs"}
    window["qwen_lm_enhanced_caption"] = "a brown dog runs"
    metas = {"motion_score": {"global_mean": 0.5}, "aesthetic_score": 4.5}
    metas |= {"source_video": "s3://in/long.mp4"}
    archive(place / "video" / name, {"u1.mp4": b"1", "u2.mp4": b"2", "u3.mp4": b"3"})
    archive(
        place / "metas" / name,
        {
            "u1.json": json.dumps({**metas, "windows": [window]}),
            "u2.json": json.dumps({**metas, "windows": [window, window]}),
        },
    )
    archive(place / "t5_xxl" / name, {"u1.pickle": b"never read"})
    listing, reasons = scanned(tmp_path / "in")
    u1, u2, u3 = (listing.texts[name] for name in sorted(listing.videos))
    assert u1.captions == {"dense": "a dog runs\na brown dog runs"}
    assert u1.sources == {"dense": "model:qwen, model:qwen_lm_enhanced"}
    assert u1.scores == {"motion_score_global_mean": 0.5, "aesthetic_score": 4.5}
    assert u1.source == "s3://in/long.mp4" and u2.captions == u3.captions == {}
    said = "\n".join(reasons.values())
    assert "captions of 2 windows of frames" in said and "pickles" in said
    assert said.count("no caption") == 2 and len(reasons) == 4


def test_patterns_name_archives(tmp_path):
    for number in range(3):
        archive(tmp_path / "in" / f"a-{number:02d}.tar", {})
    archive(tmp_path / "in" / "deep" / "b.tar", {})
    find = functools.partial(folders.matching, suffixes=(webdataset.SUFFIX,))
    some = ["a-00.tar", "a-01.tar"]
    for pattern, expected in {
        "in": ["a-00.tar", "a-01.tar", "a-02.tar", "deep/b.tar"],
        "in/a-{00..01}.tar": some,
        "in/a-0[01].tar": some,
        "in/**/*.tar": ["a-00.tar", "a-01.tar", "a-02.tar", "deep/b.tar"],
        "in/deep/b.tar": ["b.tar"],
    }.items():
        root, names = find(f"{tmp_path}/{pattern}")
        assert names == expected and all((root / name).is_file() for name in names)
    (tmp_path / "none").mkdir()
    for pattern, message in {
        "in/a-{00..03}.tar": "there is no file .*a-03.tar",
        "in/c*.tar": "there is no file .*c",
        "none": "there is no file .tar in",
    }.items():
        with pytest.raises(ValueError, match=message):
            find(f"{tmp_path}/{pattern}")


# -- writing --------------------------------------------------------------------------


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_become_archives_and_shards_again(tmp_path, capsys):
    """Clips come back with the same bytes, captions and state."""
    shards.write(tmp_path / "toys", toy_clips.ToyClips("tw16", 7))
    clips_of = [*shards.open(tmp_path / "toys")]
    tars = tmp_path / "tars"
    with conftest.lone_job("convert") as convert:
        asked = {"from": tmp_path / "toys", "layout": "webdataset", "out": tars}
        conftest.run_with_flags(convert, **asked)
        assert "--dtype has no meaning" in conftest.refusal(
            convert, **asked, dtype="float32"
        )
        assert "no finished shards" in conftest.refusal(
            convert, **asked | {"from": tmp_path}
        )
    assert f"{tars}: 7 clips in 1 archives" in capsys.readouterr().out
    conftest.run_with_flags(
        prepare, source=f"webdataset:{tars}", out=tmp_path / "again", size="16x16",
        num_frames=5, workers=0,
    )  # fmt: skip
    assert (
        "21 members: 7 of videos, 14 of captions, 0 others" in capsys.readouterr().out
    )
    again = [*shards.open(tmp_path / "again")]
    for index, (one, other) in enumerate(zip(again, clips_of, strict=True)):
        assert one.id == f"00000.tar/{index:09d}.mp4#00000"
        assert one.video == other.video and one.captions == other.captions
        assert one.caption_sources == other.caption_sources
        assert (one.fps, one.shots) == (other.fps, other.shots)
        assert json.loads(one.state_json) == json.loads(other.state_json)


@pytest.mark.parametrize("kind", ["groups", "loops"])
def test_relations_of_clips_come_back(kind, tmp_path):
    """Across archives: an edit may name a clip of a later one. The longest clips alone."""
    shards.write(tmp_path / "toys", toy_clips.ToyClips("tw32", 8, kind=kind))
    opened = shards.open(tmp_path / "toys")
    clips_of = {opened[index].id: opened[index] for index in range(len(opened))}
    webdataset.write(tmp_path / "tars", opened, 1 << 14)
    archives = sorted(path.name for path in (tmp_path / "tars").glob("*.tar"))
    assert len(archives) > 1
    frames = {clip.num_frames for clip in clips_of.values()}
    source = video_clips.TarClips(
        tmp_path / "tars", (32, 32), max(frames), 8.0, archives=tuple(archives)
    )
    again = made(source, tmp_path / "again")
    by_video = {one.video: one for one in again}
    name_of = {
        clip.id: by_video[clip.video].id
        for clip in clips_of.values()
        if clip.video in by_video
    }
    assert len(name_of) == sum(c.num_frames == max(frames) for c in clips_of.values())
    for clip in clips_of.values():
        if clip.id in name_of:
            one = by_video[clip.video]
            assert (one.subject, one.period) == (clip.subject, clip.period)
            assert one.edit_of == name_of.get(clip.edit_of, "")


def test_a_clip_is_encoded_again_only_where_it_must_be(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.mp4", film(11))
    before = made(
        video_clips.FolderClips(tmp_path / "in", SIZE, 5, FPS), tmp_path / "before"
    )
    webdataset.write(tmp_path / "tars", shards.open(tmp_path / "before"), 1 << 20)
    path = tmp_path / "tars" / "00000.tar"
    source = functools.partial(
        video_clips.TarClips, tmp_path / "tars", archives=(path.name,)
    )
    encoded = []
    encode = video_io.encode_mp4
    monkeypatch.setattr(
        video_io, "encode_mp4", lambda *a, **k: encoded.append(1) or encode(*a, **k)
    )
    (same,) = made(source(SIZE, 5, FPS), tmp_path / "same")
    assert encoded == [] and same.video == before[0].video
    assert same.captions == {} and same.source == before[0].source
    for name, size, num_frames, fps in (
        ("size", (32, 32), 5, FPS), ("frames", SIZE, 1, FPS), ("fps", SIZE, 5, 4.5)
    ):  # fmt: skip
        encoded.clear()
        made(source(size, num_frames, fps), tmp_path / name)
        assert encoded, name
    # A checksum that is not the video's, as where it was encoded anew by others.
    text = path.read_bytes()
    digest = same.sha256.encode()
    path.write_bytes(text.replace(digest, b"0" * len(digest)))
    encoded.clear()
    (other,) = made(source(SIZE, 5, FPS), tmp_path / "other")
    assert encoded and other.video != same.video


def test_archives_hold_the_whole_record(tmp_path):
    shards.write(tmp_path / "in", clips.Clips(3))
    opened = shards.open(tmp_path / "in")
    webdataset.write(tmp_path / "out", opened, 1 << 20)
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        names = tar.getnames()
        assert names[:3] == ["000000000.mp4", "000000000.txt", "000000000.json"]
        assert len(names) == 9 and {m.mtime for m in tar} == {0}
        assert {(m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, "", 0o644)}
        read = [tar.extractfile(name).read() for name in names[3:6]]
    clip = opened[1]
    assert read[0] == clip.video and read[1].decode() == clip.captions["dense"]
    assert json.loads(read[2]) == {
        "id": "clip-1", "captions": {"short": ["clip number 1"], "dense": ["é 1"]},
        "caption_sources": {"short": "human", "dense": "model:m1"}, "fps": 8.0,
        "num_frames": 5, "height": 16, "width": 16, "shots": [[0, 2], [2, 5]],
        "scores": {"motion": 0.5}, "licence": "CC0-1.0", "source": "test",
        "sha256": hashlib.sha256(clip.video).hexdigest(), "state": {"index": 1},
    }  # fmt: skip


def test_an_interrupted_export_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch):
    shards.write(tmp_path / "in", clips.Clips(8))
    opened, size = shards.open(tmp_path / "in"), 10_000
    webdataset.write(tmp_path / "whole", opened, size)
    whole = contents(tmp_path / "whole")
    assert len(whole) > 4  # archives, and two more files
    with monkeypatch.context() as patched:
        members_of = webdataset._members_of
        patched.setattr(
            webdataset,
            "_members_of",
            lambda clip: 1 / (clip.id != "clip-5") and members_of(clip),
        )
        with pytest.raises(ZeroDivisionError):
            webdataset.write(tmp_path / "out", opened, size)
    assert 2 < len(contents(tmp_path / "out")) < len(whole)
    written = []
    monkeypatch.setattr(
        webdataset, "_members_of", lambda clip: written.append(clip) or members_of(clip)
    )
    webdataset.write(tmp_path / "out", opened, size)
    assert contents(tmp_path / "out") == whole and 0 < len(written) < 8
    webdataset.write(tmp_path / "out", opened, size)
    assert len(written) < 8  # nothing is written again
    with pytest.raises(ValueError, match="other shards or in another size"):
        webdataset.write(tmp_path / "out", opened, size + 1)
    with pytest.raises(ValueError, match="is not empty"):
        webdataset.write(tmp_path / "in", opened, size)


def test_a_damaged_record_is_named_and_left_out(tmp_path, monkeypatch):
    shards.write(tmp_path / "in", clips.Clips(4))
    from_example = shards._from_example

    def damaged(raw):
        clip = from_example(raw)
        if clip.id == "clip-2":
            object.__setattr__(clip, "video", clip.video[:-1])
        return clip

    monkeypatch.setattr(shards, "_from_example", damaged)
    manifest = webdataset.write(tmp_path / "out", shards.open(tmp_path / "in"), 1 << 30)
    (reason,) = manifest["damaged"]
    assert "'clip-2' is corrupt" in reason
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        assert len(tar.getnames()) == 9 and "000000002.mp4" not in tar.getnames()


@pytest.mark.peers
def test_webdataset_reads_ours_and_we_read_theirs(peers_python, tmp_path, film_bytes):
    shards.write(tmp_path / "in", clips.Clips(6))
    opened = shards.open(tmp_path / "in")
    webdataset.write(tmp_path / "ours", opened, 10_000)
    (tmp_path / "film.txt").write_text("a film")
    command = [peers_python, ORACLE, tmp_path / "ours", tmp_path / "film.mp4"]
    said = subprocess.check_output([*command, tmp_path / "theirs"], text=True)
    read = json.loads(said.splitlines()[-1])
    assert len(read) == 6 and len({one["archive"] for one in read}) > 1
    for index, (one, clip) in enumerate(zip(read, opened, strict=True)):
        assert one["key"] == f"{index:09d}" and one["sha256"] == clip.sha256
        assert one["txt"] == clip.captions["dense"] and one["json"]["id"] == clip.id
    listing, reasons = scanned(tmp_path / "theirs")
    assert len(listing.videos) == 5 and reasons == {}
    for index, (name, place) in enumerate(sorted(listing.places.items())):
        assert video_io.probe(place).seconds == pytest.approx(1.0)
        captions = {"alt": f"film {index}", "dense": f"dense {index}"}
        assert listing.texts[name].captions == captions
