"""Breaks one line at a time and sees whether the named test notices.

    python -m tests.mutations [--only SUBSTRING]

`mutations.json` lists what is broken: in `file`, the text `find`, which must stand there
exactly once, becomes `replace`; then `test` must fail. Everything happens in a copy of
the tree, where the tests are first seen to pass unbroken. The exit code is 0 where every
mutation was noticed.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIST = ROOT / "tests" / "mutations.json"
KEYS = {"file", "find", "replace", "test"}
TIMEOUT_SECONDS = 600
# pytest's exit code where tests ran and some failed; others mean that none has run.
TESTS_FAILED = 1


def read(path: pathlib.Path = LIST) -> list[dict[str, str]]:
    """Returns the list.

    Raises:
      ValueError: an entry has other keys than it should, or changes nothing.
    """
    entries = json.loads(path.read_text())
    for entry in entries:
        if set(entry) != KEYS or entry["find"] == entry["replace"]:
            raise ValueError(f"{path.name}: {entry} needs {sorted(KEYS)}, and a change")
    return entries


def broken(entry: dict[str, str], root: pathlib.Path = ROOT) -> str:
    """Returns the file's text with the mutation in it.

    Raises:
      ValueError: the text to find does not stand in the file exactly once.
    """
    path = root / entry["file"]
    text = path.read_text() if path.is_file() else ""
    count = text.count(entry["find"])
    if count != 1:
        raise ValueError(
            f"{entry['file']}: {entry['find']!r} stands there {count} times"
        )
    return text.replace(entry["find"], entry["replace"])


def copy_tree(target: pathlib.Path) -> None:
    """Copies the files that git knows or would take, and links the environments."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    names = subprocess.check_output(command, cwd=ROOT, text=True).split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():  # not one that has been removed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    for environment in (".venv", ".peers"):
        if (ROOT / environment).exists():
            (target / environment).symlink_to(ROOT / environment)


def run_tests(root: pathlib.Path, tests: list[str]) -> tuple[int, str]:
    """Runs tests in a tree; returns pytest's exit code and output."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
    # No bytecode: a file that changes twice in a second might be taken from there.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        ended = subprocess.run(
            command,
            cwd=root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return TESTS_FAILED, "timed out"
    return ended.returncode, ended.stdout


def survivors(
    entries: list[dict[str, str]], root: pathlib.Path
) -> list[dict[str, str]]:
    """Tries each mutation in the tree, prints a table; returns those not noticed."""
    unnoticed = []
    for entry in entries:
        path = root / entry["file"]
        whole = path.read_text()
        path.write_text(broken(entry, root))
        began = time.monotonic()
        try:
            code, output = run_tests(root, [entry["test"]])
        finally:
            path.write_text(whole)
        verdicts = {TESTS_FAILED: "noticed", 0: "SURVIVED"}
        verdict = verdicts.get(code, f"NOT RUN (pytest's exit code {code})")
        print(f"{verdict:<9} {time.monotonic() - began:5.1f}s  {entry['file']}")
        print(f"    - {entry['find'].strip()}\n    + {entry['replace'].strip()}")
        print(f"    {entry['test']}")
        sys.stdout.flush()
        if code != TESTS_FAILED:
            unnoticed.append(entry)
        if code not in verdicts:
            print(output)
    return unnoticed


def main() -> int:
    """Runs the command of this file's head; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="part of the file or the test")
    args = parser.parse_args()
    entries = [
        entry
        for entry in read()
        if args.only in entry["file"] or args.only in entry["test"]
    ]
    if not entries:
        print(f"no mutation's file or test has {args.only!r} in its name")
        return 2
    for entry in entries:
        broken(entry)
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        copy_tree(root)
        code, output = run_tests(root, sorted({entry["test"] for entry in entries}))
        if code:
            print(f"{output}\nthe tests fail without any mutation")
            return 2
        unnoticed = survivors(entries, root)
    print(f"{len(entries)} mutations, {len(entries) - len(unnoticed)} noticed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
