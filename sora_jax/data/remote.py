"""Folders of videos at any address that fsspec can list: gs://, s3://, https://, ...

A video is copied to a temporary file before it is opened, so that the limits of
`containers` and the decoder see a file as any other, and no failure of the network is
taken for a fault of the video. The file has no name, so the system frees its space even
if the process is killed. A process holds one video at a time.

Failures are retried, and then end the job; the parts that are written are kept.
"""

import atexit
import concurrent.futures
import contextlib
import dataclasses
import functools
import pathlib
import re
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import IO, Any

import fsspec

from sora_jax.data import containers

_PAUSES = (1.0, 4.0, 16.0)  # seconds before another attempt
_PATIENCE = 120.0  # seconds without a byte; less than a worker may be silent
_CHUNK = 1 << 20
_THREADS = 16
_DEPTH = 32  # folders below one another, for servers that list a folder in itself
_HTTP = ("http", "https")
# What tells the versions of a file apart, by file system.
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "Last-Modified", "LastModified")
_VERSIONS += ("last_modified", "mtime", "updated", "created")


class RemoteError(OSError):
    """An address cannot be read; the message says why."""


class _Silent(Exception):
    """A server sends nothing."""


# These are not cured by another attempt; a silent thread may still write to the file.
_LASTING = (FileNotFoundError, PermissionError, NotImplementedError, _Silent)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file: its size in bytes, what tells its versions apart, and its address."""

    size: int
    version: str
    path: str


def is_address(name: str) -> bool:
    """Returns whether the name of a folder is an address such as gs://bucket/videos."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:(//|:)", name) is not None


@dataclasses.dataclass(frozen=True)
class RemoteFolder:
    """A folder at an address.

    Args:
      address: such as gs://bucket/videos.
      allow_http: allow addresses of http and https.

    Raises:
      ValueError: fsspec does not know the protocol or needs another package for it, or
        it is not allowed.
    """

    address: str
    allow_http: bool = False

    def __post_init__(self):
        protocol = self.address.partition(":")[0]
        if "::" in self.address:
            raise ValueError(f"{self}: addresses within addresses (::) are not read")
        if protocol in _HTTP and not self.allow_http:
            raise ValueError(f"{self}: --allow_http allows to read from web servers")
        try:
            _ = self._place
        except (ImportError, ValueError) as error:
            raise ValueError(f"{self}: {error}") from None

    def __str__(self) -> str:
        return self.address

    def __getstate__(self):
        return {"address": self.address, "allow_http": self.allow_http}

    @functools.cached_property
    def _place(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """The file system and the path in it; not pickled, for its connections."""
        return fsspec.url_to_fs(self.address)

    @property
    def _is_http(self) -> bool:
        return self.address.startswith(_HTTP)

    def entries(self) -> dict[str, Entry]:
        """Lists all files at any depth, by names relative to the folder.

        Raises:
          RemoteError: it cannot be listed, or is empty.
        """
        system, root = self._place
        root = root.rstrip("/")
        system.invalidate_cache()
        found = self._tried(
            lambda: system.find(root, maxdepth=_DEPTH, detail=True), str(self)
        )
        infos = {}
        for path, info in found.items():
            name = path.removeprefix(f"{root}/")
            if name == path or name.endswith("/") or info.get("type") == "directory":
                continue
            if self._is_http:
                if re.search("[?#]", name):  # a link of a listing that sorts it
                    continue
                name = urllib.parse.unquote(name)
            if ".." not in name.split("/"):
                infos[name] = {**info, "name": path}
        if not infos:
            raise RemoteError(f"there are no files in {self}")
        unknown = [name for name, info in infos.items() if info.get("size") is None]
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            asked = pool.map(lambda name: self._info(infos[name]["name"]), unknown)
            infos |= dict(zip(unknown, asked, strict=True))
        return {name: _entry(info) for name, info in sorted(infos.items())}

    def _info(self, path: str) -> dict[str, Any]:
        system, _ = self._place
        return {**self._tried(lambda: system.info(path), path), "name": path}

    @contextlib.contextmanager
    def copied(
        self, entries: Mapping[str, Entry], names: Collection[str], most: int
    ) -> Iterator[pathlib.Path]:
        """Yields a temporary folder with copies of small files, of the same names.

        A file of more than `most` bytes is not read: its copy has its size and no content.
        """
        with tempfile.TemporaryDirectory() as folder:

            def copy(name: str) -> None:
                path, entry = pathlib.Path(folder, name), entries[name]
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    if entry.size > most:
                        file.truncate(entry.size)
                    else:
                        self._fetch(entry, file, lambda: None)

            with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
                for _ in pool.map(copy, names):
                    pass
            yield pathlib.Path(folder)

    def fetched(
        self,
        name: str,
        entry: Entry,
        limits: containers.Limits,
        tell: Callable[[], None],
    ) -> pathlib.Path:
        """Returns the path of a copy of a video, which is kept until the next call.

        Args:
          name: of the video.
          entry: of the video.
          limits: of the file; one that is too large is not read.
          tell: called from time to time, as a sign of life.

        Raises:
          UnreadableVideo: the file is beyond the limits.
          RemoteError: it cannot be read, or has changed since it was listed.
        """
        if entry.size > limits.max_bytes:
            raise containers.UnreadableVideo(
                f"{self}/{name}: {entry.size} bytes are beyond the limit of "
                f"{limits.max_bytes}"
            )
        if _held.get("entry") != entry:
            release()
            _held["file"] = tempfile.TemporaryFile()
            self._fetch(entry, _held["file"], tell)
            _held["entry"] = entry
        return pathlib.Path(f"/proc/self/fd/{_held['file'].fileno()}")

    def _fetch(self, entry: Entry, file: IO[bytes], tell: Callable[[], None]) -> None:
        self._tried(lambda: self._copy(entry, file, tell), entry.path)

    def _copy(self, entry: Entry, file: IO[bytes], tell: Callable[[], None]) -> None:
        """Copies a file, in a thread, so that a server that is silent is noticed."""
        file.seek(0)
        file.truncate()
        options = {"block_size": 0} if self._is_http else {"cache_type": "readahead"}
        last, done = time.monotonic(), 0

        def copy() -> None:
            nonlocal last, done
            with self._place[0].open(entry.path, "rb", **options) as source:
                # One byte more than there should be.
                while chunk := source.read(min(_CHUNK, entry.size + 1 - done)):
                    file.write(chunk)
                    last, done = time.monotonic(), done + len(chunk)
                    if done > entry.size:
                        break

        copying = _Thread(copy)
        copying.start()
        while copying.is_alive():
            copying.join(0.5)
            tell()
            if time.monotonic() - last > _PATIENCE:
                raise _Silent(f"no byte has come for {_PATIENCE:.0f} s")
        if copying.error:
            raise copying.error
        if done != entry.size:
            raise OSError(f"{done} bytes have come, and {entry.size} were listed")
        file.flush()

    def _tried[Result](self, call: Callable[[], Result], what: str) -> Result:
        """Calls a function again when it fails; raises RemoteError in the end."""
        for pause in (*_PAUSES, None):
            try:
                return call()
            except Exception as error:  # each file system has types of its own
                reason = str(error) or type(error).__name__
                if isinstance(error, _LASTING):
                    reason = f"{type(error).__name__}: {reason}"
                elif pause is not None:
                    time.sleep(pause)
                    continue
                times = 1 if isinstance(error, _LASTING) else len(_PAUSES) + 1
                raise RemoteError(
                    f"{what} cannot be read ({' '.join(reason.split())[:300]}), after "
                    f"{times} attempt{'s' * (times > 1)}; the same command goes on"
                ) from error
        raise AssertionError


_held: dict[str, Any] = {}  # the video that this process has a copy of


@atexit.register
def release() -> None:
    """Removes the copy of a video that this process has."""
    if file := _held.pop("file", None):
        file.close()
    _held.clear()


class _Thread(threading.Thread):
    """A thread that keeps the exception that ended it."""

    error: Exception | None = None

    def __init__(self, call: Callable[[], None]):
        super().__init__(daemon=True)
        self._call = call

    def run(self) -> None:
        try:
            self._call()
        except Exception as error:
            self.error = error


def _entry(info: Mapping[str, Any]) -> Entry:
    version = next((info[key] for key in _VERSIONS if info.get(key)), "")
    size = info.get("size")
    if size is None:
        raise RemoteError(f"{info['name']}: its server does not tell its size")
    return Entry(int(size), str(version), info["name"])
