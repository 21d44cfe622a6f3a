"""Videos at an address give the same bytes as those of a folder; networks fail."""

import dataclasses
import functools
import http.server
import importlib.util
import json
import pathlib
import pickle
import shutil
import subprocess
import threading
import time

import fsspec
import pytest
from fsspec.implementations import memory

from sora_jax import prepare
from sora_jax.core import paths
from sora_jax.data import folders, remote, shards, video_clips, video_io
from tests import conftest
from tests.data.test_video_io import film, write

ROOT = pathlib.Path(__file__).resolve().parents[2]
refusal = functools.partial(conftest.refusal, prepare)


class Flaky(memory.MemoryFileSystem):
    """Files in memory, behind a network that fails as often as `failures` says."""

    protocol = "flaky"
    store, pseudo_dirs = {}, [""]
    failures, calls, silent = 0, 0, False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky://"))

    def _fail(self):
        Flaky.calls += 1
        if Flaky.failures:
            Flaky.failures -= 1
            raise ConnectionError("connection reset by peer")

    def find(self, *arguments, **options):
        self._fail()
        return super().find(*arguments, **options)

    def _open(self, path, mode="rb", **options):
        if mode == "rb":
            self._fail()
            while Flaky.silent:
                time.sleep(0.01)
        return super()._open(path, mode, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos as people have them, with captions in every place, junk and hidden files."""
    folder = tmp_path_factory.mktemp("videos") / "in"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".git").mkdir()
    for index, name in enumerate(("a.mp4", "deep/b c.mkv", "deep/er/é.mov", ".d.mp4")):
        write(folder / name, film(12 + index))
    write(folder / ".git" / "e.mp4", film(12))
    (folder / "a.txt").write_text("beside it")
    (folder / "deep" / "captions.csv").write_text("file,caption\nb c.mkv,in a list\n")
    (folder / "deep" / "er" / "é.json").write_text('{"dense": "é", "licence": "CC0"}')
    (folder / "junk.mp4").write_bytes(b"junk")
    (folder / "notes.doc").write_bytes(b"notes")
    (folder / "alone.txt").write_bytes(b"of no video")
    (folder / "loose.jpg").write_bytes(b"a picture")
    return folder


@pytest.fixture
def flaky(folder, monkeypatch):
    """The address of a copy of the folder."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(Flaky, "store", {})
    monkeypatch.setattr(Flaky, "calls", 0)
    monkeypatch.setattr(remote, "_PAUSES", (0.01, 0.01))
    system = fsspec.filesystem("flaky")
    for path in folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            system.pipe(f"/bucket/in/{name}", path.read_bytes())
    yield "flaky://bucket/in"
    Flaky.failures, Flaky.silent = 0, False
    remote.release()


def clips_of(place, **changes):
    if isinstance(place, str):
        place = remote.RemoteFolder(place)
    return video_clips.FolderClips(place, (24, 32), 5, 5.0, **changes)


def contents(folder):
    """All files but the lists of items, whose hashes have the version of a file."""
    left_out = {"items.json", "digests.sha256", paths.LOCK}
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in left_out
    }


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    shards.write(out, clips_of(folder))
    assert len(shards.open(out)) == 3 and all(c.captions for c in shards.open(out))
    return contents(out)


def test_an_address_gives_the_bytes_of_the_folder(flaky, folder, expected, tmp_path):
    shards.write(tmp_path / "out", clips_of(flaky))
    assert contents(tmp_path / "out") == expected
    listing, wanted = clips_of(flaky).listing, folders.scan(folder)
    for field in ("videos", "texts", "skipped", "counts"):
        assert getattr(listing, field) == getattr(wanted, field)
    # Worker processes and parts of Beam read by their own connections.
    source = clips_of(f"file://{folder}")
    shards.write(tmp_path / "pool", source, num_workers=2)
    assert contents(tmp_path / "pool") == expected
    part = source.plan(source.items)[0][0]
    assert {*source.only(part).listing.entries} == {video for video, _, _ in part}


def test_a_version_tells_when_a_video_has_changed(flaky):
    before = clips_of(flaky).items
    assert clips_of(flaky).items == before
    system = fsspec.filesystem("flaky")
    content = system.cat("/bucket/in/a.mp4")
    system.pipe("/bucket/in/a.mp4", content[:-1] + b"x")
    after = clips_of(flaky).items
    assert {name for name in after if after[name] != before[name]} == {"a.mp4"}


def test_what_is_too_large_is_not_read(flaky, folder, tmp_path):
    limits = dataclasses.replace(video_io.DEFAULT_LIMITS, max_bytes=3)
    note = lambda item=None, finished=0: None  # noqa: E731

    def skipped(place):
        source = clips_of(place, limits=limits)
        parts, _ = source.plan(source.items)
        listed = Flaky.calls
        found = [*source.clips(sum(parts, []), note, {})]
        assert Flaky.calls == listed
        return found

    found = skipped(flaky)
    assert found == skipped(folder) and len(found) == 4
    assert "bytes are beyond the limit of 3" in found[0].reason


def test_a_large_caption_file_is_refused_by_its_size(flaky, monkeypatch):
    find = Flaky.find

    def huge(system, *arguments, **options):
        found = find(system, *arguments, **options)
        found["/bucket/in/deep/captions.csv"]["size"] = 300 << 20
        return found

    monkeypatch.setattr(Flaky, "find", huge)
    (reason,) = (
        s.reason
        for s in clips_of(flaky).listing.skipped
        if s.file == "deep/captions.csv"
    )
    assert "larger than" in reason


def test_a_network_that_fails_is_tried_again(flaky, expected, tmp_path):
    Flaky.failures = 2
    source = clips_of(flaky)
    assert source.listing.videos
    Flaky.failures = 2
    shards.write(tmp_path / "out", source)
    assert contents(tmp_path / "out") == expected


def test_a_network_that_is_down_is_no_fault_of_the_videos(flaky, expected, tmp_path):
    out = tmp_path / "out"
    source = clips_of(flaky)
    assert source.listing.videos
    Flaky.failures = 1000
    with pytest.raises(remote.RemoteError) as caught:
        shards.write(out, source)
    said = str(caught.value)
    assert "/bucket/in/a.mp4 cannot be read (connection reset by peer)" in said
    assert "after 3 attempts; the same command goes on" in said and "\n" not in said
    with pytest.raises(remote.RemoteError, match="flaky://bucket/in cannot be read"):
        clips_of(flaky).listing  # noqa: B018
    Flaky.failures = 0
    shards.write(out, clips_of(flaky))
    assert contents(out) == expected


def test_a_server_that_is_silent_ends_the_job(flaky, monkeypatch):
    monkeypatch.setattr(remote, "_PATIENCE", 0.5)
    source = clips_of(flaky)
    source.listing  # noqa: B018
    Flaky.silent, told = True, []

    def note(item=None, finished=0):
        told.append(item)

    with pytest.raises(remote.RemoteError, match="no byte has come for"):
        [*source.clips([["a.mp4", 0, 1]], note, {})]
    assert {*told} == {"copy of a.mp4"}


def test_a_copy_that_takes_too_long_is_no_fault_of_the_video(flaky):
    """The process that copied it was ended, and the part begins again without it."""
    part, note = [["a.mp4", 0, 1]], lambda item=None, finished=0: None
    with pytest.raises(remote.RemoteError, match="a.mp4 cannot be read: too slow"):
        [*clips_of(flaky).clips(part, note, {"copy of a.mp4": "too slow"})]


def test_a_video_that_changes_after_it_was_listed_is_not_read(flaky):
    source = clips_of(flaky)
    size = source.listing.videos["a.mp4"]
    system, note = fsspec.filesystem("flaky"), lambda item=None, finished=0: None
    for other in (size - 1, 3 * size):
        system.pipe("/bucket/in/a.mp4", bytes(other))
        came = min(other, size + 1)
        wanted = f"{came} bytes have come, and {size} were listed"
        with pytest.raises(remote.RemoteError, match=wanted):
            [*source.clips([["a.mp4", 0, 1]], note, {})]
    system.rm("/bucket/in/a.mp4")
    with pytest.raises(
        remote.RemoteError, match="FileNotFoundError.* after 1 attempt;"
    ):
        [*source.clips([["a.mp4", 0, 1]], note, {})]


def test_copies_have_no_name_and_one_is_kept(flaky):
    source = pickle.loads(pickle.dumps(clips_of(flaky)))
    path = source._path("a.mp4", lambda: None)
    assert not path.resolve().exists() and path.read_bytes()
    calls = Flaky.calls
    assert source._path("a.mp4", lambda: None) == path and Flaky.calls == calls
    source._path("junk.mp4", lambda: None)
    assert remote._held["file"].seek(0, 2) == 4


@pytest.mark.parametrize(
    "address, message",
    [
        ("http://localhost/x", "--allow_http allows"),
        ("https://localhost/x", "--allow_http allows"),
        ("gs://bucket/x", "gcsfs"),
        ("s3://bucket/x", "s3fs"),
        ("nosuch://bucket/x", "Protocol not known: nosuch"),
        ("zip://x::http://localhost/x.zip", "are not read"),
        ("simplecache::http://localhost/x", "are not read"),
    ],
)
def test_addresses_that_are_refused(address, message, tmp_path):
    if message in ("gcsfs", "s3fs") and importlib.util.find_spec(message):
        pytest.skip(f"{message} is installed")
    said = refusal(source=f"folder:{address}", out=tmp_path / "out")
    assert said.startswith(f"prepare: {address}: ") and message in said
    assert "\n" not in said and not (tmp_path / "out").exists()


def test_flags_that_mean_nothing_are_refused(folder, tmp_path):
    out = tmp_path / "out"
    said = refusal(source=f"folder:{folder}", out=out, allow_http=True)
    assert "--allow_http has no meaning for " in said
    said = refusal(source=f"folder:file://{folder}", out=out, follow_links=True)
    assert "--follow_links has no meaning for file://" in said


def test_frames_and_empty_addresses_are_refused(flaky, tmp_path):
    with pytest.raises(ValueError, match="leave out --frames_fps"):
        clips_of(flaky, frames_fps=5.0)
    with pytest.raises(remote.RemoteError, match="there are no files in"):
        clips_of("flaky://bucket/nothing").listing  # noqa: B018


def test_a_web_server_gives_the_bytes_of_the_folder(
    beam_python, folder, expected, tmp_path
):
    """In Beam's environment, which has fsspec's client for web servers."""
    served = tmp_path / "served"
    shutil.copytree(folder, served / "in")
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=str(served)
    )
    handler.log_message = lambda *arguments: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}/in"
        command = [
            beam_python,
            "-m",
            "sora_jax.prepare",
            "--source",
            f"folder:{address}",
        ]
        command += ["--allow_http", "--out", str(tmp_path / "out"), "--workers", "2"]
        command += ["--size", "32x24", "--num_frames", "5", "--fps", "5"]
        command += ["--nosplit_shots"]
        done = subprocess.run(
            command, cwd=ROOT, timeout=120, capture_output=True, text=True
        )
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == expected
    assert f"{address}: " in done.stdout
    assert json.loads((tmp_path / "out" / "items.json").read_text())
