"""Atomic writes of files, checksums, locks on folders, and shipped models."""

import contextlib
import errno
import fcntl
import hashlib
import os
import pathlib
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator

LOCK = ".lock"
_SHIPPED = pathlib.Path(__file__).parent.parent / "weights"
# flock raises these on file systems without locks, such as some network file systems.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_IN_WORDS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, *_NOT_WRITABLE)


class InUse(OSError):
    """Another process has locked the folder."""


def model(name: str | os.PathLike) -> pathlib.Path:
    """The folder of a model: the path itself, or the shipped model of that name.

    A folder of that name in the working directory comes first.
    """
    path = pathlib.Path(name)
    shipped = _SHIPPED / path.name
    is_name = path.name == str(path) and not path.exists()
    return shipped if is_name and path.name and shipped.is_dir() else path


@contextlib.contextmanager
def lock(folder: str | os.PathLike) -> Iterator[None]:
    """Locks a folder against other processes; makes it if it is missing.

    The lock is an flock on the file `.lock` in the folder, so the kernel releases it
    when the process ends. The file is deleted at the end, and so is the folder if it was
    made here and is still empty. A job of several processes takes the lock in one of
    them. A read-only folder needs no lock. On a file system without locks a warning is
    printed.

    Raises:
      InUse: another process holds the lock.
      OSError: the folder cannot be made.
    """
    folder = pathlib.Path(folder)
    is_new = not folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if is_new:
            stack.callback(_remove_if_empty, folder)
        try:
            descriptor = _take(folder / LOCK)
        except OSError as error:
            if error.errno not in _NOT_WRITABLE:
                raise
        else:
            stack.callback(os.close, descriptor)
            stack.callback((folder / LOCK).unlink, missing_ok=True)
        yield


def _take(file: pathlib.Path) -> int:
    """Opens and locks the lock file, and returns its descriptor."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _flock(descriptor, file)
            # The previous holder may have removed the file after it was opened here.
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                with contextlib.suppress(OSError):  # a full disk
                    name = f"process {os.getpid()} on {socket.gethostname()}"
                    os.ftruncate(descriptor, os.pwrite(descriptor, name.encode(), 0))
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int, file: pathlib.Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace")
        raise InUse(
            f"{file.parent} is in use by {holder or 'another process'}: wait until that "
            "ends, or choose another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(
            f"{file.parent} is on a file system without locks: make sure that no second "
            "process writes to it",
            file=sys.stderr,
        )


def _remove_if_empty(folder: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields the name of a temporary file, which is renamed to `path` at the end.

    No reader sees a partial file, and a crash leaves none. An OSError about the temporary
    file is raised with the name of `path`.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        ours = str(temporary) in (str(error.filename or temporary), error.filename2)
        if error.errno is None or not ours:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def error_of(text: str, path: str | os.PathLike) -> OSError:
    """Returns an OSError for a library's message about a file, with its errno if known."""
    for code in _IN_WORDS:
        if os.strerror(code) in text:
            return OSError(code, os.strerror(code), str(path))
    return OSError(
        f"{path}: {(text.strip().splitlines() or ['unknown error'])[0][:300]}"
    )


def write_atomically(path: str | os.PathLike, content: bytes | str) -> None:
    """Writes a file atomically; see `replacing`."""
    if isinstance(content, str):
        content = content.encode()
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: str | os.PathLike) -> None:
    """Returns when a file's content is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def check_writable(path: str | os.PathLike) -> None:
    """Checks that `write_atomically` can write a file, before hours of work.

    It tries a write, since only the file system can tell, and removes what it wrote.

    Raises:
      OSError: one sentence that names the file and the reason.
    """
    path = pathlib.Path(path)
    temporary, made = path.with_name(f".{path.name}.{secrets.token_hex(4)}"), []
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        for folder in (path.parent, *path.parent.parents):
            if folder.exists():
                break
            made.append(folder)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file, not a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(b"0")
        temporary.unlink()
    except OSError as error:
        raise type(error)(f"{path} cannot be written: {error.strerror}") from None
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def copy_atomically(source: str | os.PathLike, path: str | os.PathLike) -> None:
    """Copies a file atomically; see `replacing`."""
    with replacing(path) as temporary:
        shutil.copyfile(source, temporary)


def sha256_bytes(content: bytes) -> str:
    """Returns the hex SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: str | os.PathLike) -> str:
    """Returns the hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
