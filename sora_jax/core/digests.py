"""SHA-256 digests of stored files: written beside them, and checked on every read.

A folder's `digests.sha256` has a line for each file that this code writes into it and
reads again. It is in the format of sha256sum, so `sha256sum -c digests.sha256` checks the
folder too. Logs, reports and videos are not listed.
"""

import concurrent.futures
import errno
import os
import pathlib
import re
from collections.abc import Iterable, Mapping

from sora_jax.core import paths

FILE = "digests.sha256"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_THREADS = 4  # hashing releases the GIL, and reads about 2 GB/s a thread

# Digests by path in the folder: two while a file is being replaced, of which either may be.
Listed = Mapping[str, set[str]]


class Damaged(ValueError):
    """A stored file is not what was written, or has no digest."""


# -- single files ---------------------------------------------------------------------


def store(path: str | os.PathLike, content: bytes | str) -> None:
    """Writes a file and its digest so that a crash leaves the old file or the new one.

    One process at a time may write to a folder.
    """
    path = pathlib.Path(path)
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    new = {paths.sha256_bytes(content)}
    listed = _read_list(path.parent) or {}
    old = listed.get(path.name, set()) if path.is_file() else set()
    # The digest is written first: a file without one cannot be read.
    write_list(path.parent, {**listed, path.name: old | new})
    paths.write_atomically(path, content)
    if old - new:
        write_list(path.parent, {**listed, path.name: new})


def copy(source: str | os.PathLike, path: str | os.PathLike) -> None:
    """Copies a file, checks the copy against the source's digest, and lists it.

    A source in a folder without a list, such as downloaded weights, is not checked.

    Raises:
      Damaged: the source is damaged; nothing was copied.
    """
    source, path = pathlib.Path(source), pathlib.Path(path)
    wanted = _wanted(source, required=False)
    paths.copy_atomically(source, path)
    actual = paths.sha256_file(path)
    if wanted and actual not in wanted:
        path.unlink()
        raise _damaged(source, actual, wanted)
    write_list(path.parent, {**(_read_list(path.parent) or {}), path.name: {actual}})


def read(path: str | os.PathLike, *, required: bool = True) -> bytes:
    """Returns the content of a file, checked.

    Args:
      path: the file.
      required: whether it must have a digest. If not, it is checked where its folder has
        a list; folders of downloaded weights have none.

    Raises:
      FileNotFoundError: there is no such file.
      Damaged: it is not what was written, or has no digest.
    """
    path = pathlib.Path(path)
    path.stat()  # a missing file is not a damaged one
    while True:
        wanted = _wanted(path, required)
        content = path.read_bytes()
        if not wanted or _is_one_of(path, paths.sha256_bytes(content), wanted):
            return content


def check(path: str | os.PathLike, *, required: bool = True) -> None:
    """Checks a file without reading it into memory; see `read`."""
    path = pathlib.Path(path)
    while wanted := _wanted(path, required):
        if _is_one_of(path, paths.sha256_file(path), wanted):
            return


def check_all(files: Iterable[pathlib.Path], *, required: bool = True) -> None:
    """Checks several files in parallel; see `read`."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(lambda path: check(path, required=required), files):
            pass


def _wanted(path: pathlib.Path, required: bool) -> set[str]:
    listed = _read_list(path.parent)
    if listed is None and not required:
        return set()
    if path.name in (listed or {}):
        return listed[path.name]
    if listed is None:
        what = f"there is no {path.parent / FILE}"
    else:
        what = f"{path.parent / FILE} does not name it"
    raise Damaged(
        f"{path} has no digest: {what}; make it again, or, if it is known to be good, "
        f"add the line that `sha256sum {path.name}` prints"
    )


def _is_one_of(path: pathlib.Path, actual: str, wanted: set[str]) -> bool:
    """Returns whether a digest is listed; False if another process changed the list.

    The caller must then read the file again: it may have been replaced in between.
    """
    if actual in wanted:
        return True
    if _wanted(path, required=True) == wanted:
        raise _damaged(path, actual, wanted)
    return False


def _damaged(path: pathlib.Path, actual: str, wanted: set[str]) -> Damaged:
    return Damaged(
        f"{path} is damaged: its SHA-256 is {actual[:12]}, and {FILE} beside it says "
        f"{' or '.join(sorted(digest[:12] for digest in wanted))}; restore a good copy, "
        "or, if it was changed on purpose, put the line that "
        f"`sha256sum {path.name}` prints into {FILE}"
    )


# -- whole folders --------------------------------------------------------------------


def hash_files(folder: pathlib.Path, names: Iterable[str]) -> dict[str, set[str]]:
    """Hashes files of a folder, for `write_list`."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        names = list(names)
        hashed = pool.map(lambda name: paths.sha256_file(folder / name), names)
        return {name: {digest} for name, digest in zip(names, hashed, strict=True)}


def files_in(folder: pathlib.Path) -> list[str]:
    """Returns the paths of all files in a folder and its subfolders, except for the list.

    Hidden files are skipped: they are still being written.
    """
    files = (p.relative_to(folder) for p in folder.rglob("[!.]*") if p.is_file())
    return sorted(str(path) for path in files if str(path) != FILE)


def write_list(folder: pathlib.Path, listed: Listed, name: str = FILE) -> None:
    """Writes the list of a folder."""
    lines = [
        f"{digest}  {path}\n"
        for path, digests in sorted(listed.items())
        for digest in sorted(digests)
    ]
    paths.write_atomically(folder / name, "".join(lines))


def check_folder(
    folder: pathlib.Path, part: int = 0, parts: int = 1, besides: str = ""
) -> None:
    """Checks that a folder has the files on its list, undamaged, and no others.

    Args:
      folder: the folder.
      part, parts: process `part` of `parts`, each of which hashes every `parts`-th file.
      besides: a file that may be there without a digest; it is not read.

    Raises:
      Damaged: a file is damaged, missing, or not on the list; or there is no list.
    """
    try:
        listed, there = _read_list(folder), files_in(folder)
        if listed is None:
            raise Damaged(
                f"{folder} has no digests: there is no {folder / FILE}; it is damaged, "
                "or was written by a version of this code that kept none"
            )
        if missing := sorted(listed.keys() - set(there)):
            raise Damaged(f"{folder / missing[0]} is missing")
        if unknown := sorted(set(there) - listed.keys() - {besides}):
            raise Damaged(
                f"{folder / unknown[0]} has no digest: {folder / FILE} does not name it"
            )
        for name, actual in hash_files(folder, sorted(listed)[part::parts]).items():
            if not actual <= listed[name]:
                raise Damaged(f"{folder / name} is damaged: it has another SHA-256")
    except OSError as error:
        # Deleted meanwhile, or lost by the disk.
        if error.errno not in (errno.ENOENT, errno.EIO):
            raise
        raise Damaged(f"{folder} cannot be read: {error}") from None


def _read_list(folder: pathlib.Path) -> dict[str, set[str]] | None:
    """Returns the list of a folder; None where it has none."""
    return read_list(folder / FILE) if (folder / FILE).is_file() else None


def read_list(file: pathlib.Path) -> dict[str, set[str]]:
    """Reads what `write_list` wrote.

    Raises:
      Damaged: a line is not a digest and a name.
    """
    listed: dict[str, set[str]] = {}
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        matched = _LINE.fullmatch(line.decode(errors="replace"))
        if matched:
            listed.setdefault(matched[2], set()).add(matched[1])
        elif line:
            raise Damaged(
                f"{file} is damaged: line {number} is not the digest and the name of a "
                "file"
            )
    return listed
