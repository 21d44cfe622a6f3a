"""Breaks one piece of code at a time and sees whether the named test notices.

    python -m tests.mutations [--only SUBSTRING] [--workers N]

Each entry of `mutations.json` has four fields. `function` says where: a module, class or
function by its dotted name, from the right as many parts as make it unique, such as
`loop.train`. `find` and `replace` are code: statements, an expression, or keyword
arguments. `find` must occur exactly once in that function; layout, quotes, parentheses
and comments do not matter, since syntax trees are compared. A body of `...` means
whatever the body is (`if x: ...`), and `replace` may be empty. `test`, named like the
function, must then fail.

The mutations are made in copies of the tree, one for each worker, where the tests are
first seen to pass. The exit code is 0 if every mutation was noticed.
"""

import argparse
import ast
import builtins
import compileall
import contextlib
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import pathlib
import py_compile
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from multiprocessing import connection
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIST = ROOT / "tests" / "mutations.json"
KEYS = {"function", "find", "replace", "test"}
# pytest's exit code if tests ran and some failed; others mean that none has run.
TESTS_FAILED = 1
# Added to it, since Python's exit code is 1 as well where a process fails before pytest.
_FROM_PYTEST = 100
# Imported once, in the process that the tests' processes are forked from.
LIBRARIES = ["jax", "flax.nnx", "optax", "orbax.checkpoint.experimental.v1", "pytest"]
LIBRARIES += ["tensorflow_datasets", "grain", "av", "scipy.stats"]
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_BODIES = ("body", "orelse")
_BY_CONTENT = py_compile.PycInvalidationMode.CHECKED_HASH


class Run(NamedTuple):
    """Tests to run in a copy of the tree, and what is changed there before."""

    tests: list[str]  # pytest's names
    file: pathlib.Path | None = None  # relative to the root
    text: str = ""  # of the file
    entry: dict[str, str] | None = None  # of the list of mutations


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


@functools.cache
def _modules(root: pathlib.Path) -> list[tuple[tuple[str, ...], pathlib.Path]]:
    """Returns the name and the file of each module, outside hidden folders."""
    files = sorted([*root.glob("*.py"), *root.glob("[!.]*/**/*.py")])
    return [(file.relative_to(root).with_suffix("").parts, file) for file in files]


@functools.cache
def _tree(file: pathlib.Path) -> ast.Module:
    return ast.parse(file.read_text())


def _definition(node: ast.AST, names: list[str]) -> ast.AST | None:
    """Returns what `names` lead to, one definition in the body of another."""
    for name in names:
        inner = [n for n in node.body if isinstance(n, _DEFINITIONS) and n.name == name]
        if not inner:
            return None
        node = inner[-1]
    return node


def locate(name: str, root: pathlib.Path = ROOT) -> tuple[pathlib.Path, list[str]]:
    """Returns the file that a dotted name leads to, and the names inside of it.

    Raises:
      ValueError: there is no such file or definition, or more than one.
    """
    parts = name.split(".")
    found = [
        (file, parts[i:])
        for i in range(1, len(parts) + 1)
        for module, file in _modules(root)
        if list(module[-i:]) == parts[:i] and _definition(_tree(file), parts[i:])
    ]
    if len(found) != 1:
        files = ", ".join(str(file.relative_to(root)) for file, _ in found) or "no file"
        raise ValueError(
            f"mutations.json: {name} is in {files}: write the name it has now, with as "
            "many folders in front as make it unique"
        )
    return found[0]


def _is_header(node: ast.AST) -> bool:
    """Says whether this is a compound statement whose body is `...`."""
    body = getattr(node, "body", None)
    rest = isinstance(body, list) and len(body) == 1 and ast.unparse(body[0]) == "..."
    return rest and isinstance(node, ast.stmt)


def _same(pattern: object, node: object) -> bool:
    if type(pattern) is not type(node):
        return False
    if isinstance(pattern, list):
        return len(pattern) == len(node) and all(map(_same, pattern, node))
    if not isinstance(pattern, ast.AST):
        return pattern == node
    unread = ("ctx", *(_BODIES if _is_header(pattern) else ()))
    return all(
        _same(getattr(pattern, field, None), getattr(node, field, None))
        for field in pattern._fields
        if field not in unread
    )


def _forms(find: str, replace: str) -> Iterator[tuple[list[ast.AST], list[ast.AST]]]:
    """Yields both as statements, or as expressions, and also as keyword arguments."""
    old, new = ast.parse(find).body, ast.parse(replace).body
    if [type(node) for node in (*old, *new)] == [ast.Expr, ast.Expr]:
        yield [old[0].value], [new[0].value]
    else:
        yield old, new
    try:
        old, new = (ast.parse(f"f({code})").body[0].value for code in (find, replace))
    except SyntaxError:
        return
    if old.keywords and not old.args and not new.args:
        yield old.keywords, new.keywords


def _unknown(code: list[ast.AST], module: ast.Module) -> list[str]:
    """Returns the names in the code that are bound neither there nor in the module."""
    nodes = list(itertools.chain(*map(ast.walk, code)))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    bound = set(dir(builtins))
    for node in (*nodes, *ast.walk(module)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, (*_DEFINITIONS, ast.ExceptHandler)):
            bound.add(node.name)
    return sorted({node.id for node in names} - bound)


def _places(scope: ast.AST, old: list[ast.AST]) -> Iterator[tuple[ast.AST, str, int]]:
    """Yields where the nodes stand: in which field of which node, from which item."""
    for node in ast.walk(scope):
        for field, value in ast.iter_fields(node):
            items = value if isinstance(value, list) else [value]
            for i in range(len(items) - len(old) + 1):
                if all(map(_same, old, items[i:])):
                    yield node, field, i


def broken(entry: dict[str, str], root: pathlib.Path = ROOT) -> Run:
    """Returns the run of an entry: its test, and the file with the mutation in it.

    Raises:
      ValueError: the code to find does not occur in the function exactly once, or there
        is not exactly one such function or test.
    """
    file, names = locate(entry["function"], root)
    tree = ast.parse(file.read_text())  # to be changed, unlike the cached one
    try:
        found = [
            (*place, old, new)
            for old, new in _forms(entry["find"], entry["replace"])
            for place in _places(_definition(tree, names), old)
        ]
    except SyntaxError as error:
        raise ValueError(
            f"mutations.json: {entry['function']}: {error.text!r} is no code: write "
            "whole expressions, statements or keyword arguments"
        ) from error
    if len(found) != 1:
        raise ValueError(
            f"mutations.json: {entry['function']}: {entry['find']!r} occurs "
            f"{len(found)} times: write code that occurs once"
        )
    node, field, i, old, new = found[0]
    if unknown := _unknown(new, tree):
        raise ValueError(
            f"mutations.json: {entry['function']}: {', '.join(unknown)} is in `replace` "
            f"and nowhere in {file.name}: write the name it has now"
        )
    value = getattr(node, field)
    if isinstance(value, list):
        was, value[i : i + len(old)] = value[i], new
        if field == "body" and not value:
            value.append(ast.Pass())
    else:
        was = value
        setattr(node, field, new[0])
    for header in filter(_is_header, new):
        for part in _BODIES:
            setattr(header, part, getattr(was, part, []))
    test, _, case = entry["test"].partition("[")
    test_file, test_names = locate(test, root)
    test = "::".join([str(test_file.relative_to(root)), *test_names])
    test += case and f"[{case}"
    return Run([test], file.relative_to(root), ast.unparse(tree) + "\n", entry)


def _set_environment(folder: str) -> None:
    """Sets what processes that are started from here on take from the environment."""
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # files change twice in a second
    # JAX reads these as it is imported. All processes share the programs that XLA has
    # compiled; conftest.py makes no folder for them in a worker of a session.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/programs"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["PYTEST_XDIST_WORKER"] = "mutations"


def copy_tree(target: pathlib.Path) -> None:
    """Copies the files that git knows or would take, and links the environments."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    names = subprocess.check_output(command, cwd=ROOT, text=True).split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():  # not one that has been removed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    for environment in (".venv", ".peers", ".beam"):
        if (ROOT / environment).exists():
            (target / environment).symlink_to(ROOT / environment)


def _pytest(root: pathlib.Path, tests: list[str], log: pathlib.Path) -> None:
    """Runs tests in a tree, in this process, and ends it."""
    os.setsid()  # so that what the tests start can be ended with them
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(root)
    elsewhere = [path for path in sys.path if path not in ("", str(ROOT))]
    sys.path[:] = [str(root), *elsewhere]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # this package lies in another tree
    pytest = importlib.import_module("pytest")
    # Without the plugins that are installed, which take two seconds to import.
    options = ["-x", "-p", "no:cacheprovider", "--disable-plugin-autoload"]
    code = pytest.main([*options, *tests])
    sys.exit(_FROM_PYTEST + code)


def _kill(process: multiprocessing.process.BaseProcess) -> None:
    """Ends a process and all that it has started, if they have not ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def outcomes(
    runs: list[Run], roots: list[pathlib.Path], timeout: float = 600
) -> Iterator[tuple[Run, int, float, str]]:
    """Runs each in one of the trees, as many side by side as there are trees.

    Yields:
      The run, pytest's exit code, the seconds that it took and what it printed.
    """
    # Forks are safe there: no thread of JAX's runs before the first computation.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    waiting, free, active = runs[::-1], [*roots], []
    try:
        while waiting or active:
            while waiting and free:
                run, root = waiting.pop(), free.pop()
                log = root.with_suffix(".log")
                whole = (root / run.file).read_text() if run.file else ""
                if run.file:
                    (root / run.file).write_text(run.text)
                process = context.Process(target=_pytest, args=(root, run.tests, log))
                process.start()
                active.append((process, time.monotonic(), run, root, whole, log))
            connection.wait([process.sentinel for process, *_ in active], timeout=1)
            for one in [*active]:
                process, began, run, root, whole, log = one
                seconds = time.monotonic() - began
                if process.is_alive() and seconds < timeout:
                    continue
                hangs = process.is_alive()
                _kill(process)
                code = TESTS_FAILED if hangs else process.exitcode - _FROM_PYTEST
                if run.file:
                    (root / run.file).write_text(whole)
                active.remove(one)
                free.append(root)
                yield run, code, seconds, log.read_text()
    finally:
        for process, *_ in active:
            _kill(process)


def failures(runs: list[Run], roots: list[pathlib.Path]) -> list[Run]:
    """Does the runs and prints a table of them.

    Returns:
      The runs with a mutation that no test noticed, and those without one that failed.
    """
    found = []
    with contextlib.closing(outcomes(runs, roots)) as ends:
        for number, (run, code, seconds, output) in enumerate(ends, 1):
            verdicts = ["SURVIVED", "noticed"] if run.entry else ["passed", "FAILED"]
            ran = code in (0, TESTS_FAILED)
            verdict = verdicts[code] if ran else f"NOT RUN (pytest's exit code {code})"
            what = run.file or f"{len(run.tests)} tests without a mutation"
            print(f"{number:3}/{len(runs)} {verdict:<8} {seconds:5.1f}s  {what}")
            for sign, key in (("-", "find"), ("+", "replace")) if run.entry else ():
                print(textwrap.indent(run.entry[key] or "(nothing)", f"    {sign} "))
            print(f"    {run.tests[0]}", flush=True)
            if code != (TESTS_FAILED if run.entry else 0):
                found.append(run)
                if not (run.entry and ran):
                    print(output)
    return found


def main() -> int:
    """Runs the command of this file's head; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="part of the file or the test")
    workers = min(4, os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=workers, help="runs at a time")
    args = parser.parse_args()
    runs = [broken(entry) for entry in read()]
    runs = [r for r in runs if args.only in str(r.file) or args.only in r.tests[0]]
    if not runs:
        print(f"no mutation's file or test has {args.only!r} in its name")
        return 2
    by_file: dict[str, list[Run]] = {}
    for run in runs:
        by_file.setdefault(run.tests[0].partition("::")[0], []).append(run)
    for group in by_file.values():  # first of all without a mutation
        group.insert(0, Run(sorted({run.tests[0] for run in group})))
    with tempfile.TemporaryDirectory() as folder:
        _set_environment(folder)
        roots = [pathlib.Path(folder, f"tree{i}") for i in range(args.workers)]
        for root in roots:
            copy_tree(root)
            for run in runs:  # what a mutation does beside, such as losing comments
                (root / run.file).write_text(ast.unparse(_tree(ROOT / run.file)) + "\n")
            compileall.compile_dir(root, quiet=1, invalidation_mode=_BY_CONTENT)
        failed = failures([run for group in by_file.values() for run in group], roots)
    unnoticed = [run for run in failed if run.entry]
    print(f"{len(runs)} mutations, {len(runs) - len(unnoticed)} noticed")
    for run in failed:
        print("not noticed" if run.entry else "FAILED WITHOUT A MUTATION", run.tests[0])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
