"""The list of mutations fits the tree, and its runner can tell what was noticed."""

import pathlib
import subprocess

import pytest

from tests import mutations

DOUBLE = '''"""Doubles."""

import math


class Twice:
    """Doubles."""

    def of(self, x):
        """Doubles a number."""
        if x > 1:  # a comment
            return self.product(
                2,
                x,
                sign=1,
            )
        return 2 * x if x else "nought"

    def product(self, a, b, sign):
        return math.prod([a, (b), sign])
'''
TESTS = """import double

def test_four():
    assert double.Twice().of(2) == 4

def test_nought():
    assert double.Twice().of(0) == "nought"
"""


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> pathlib.Path:
    """Returns a tree of one module and its tests."""
    (tmp_path / "room").mkdir()
    (tmp_path / "double.py").write_text(DOUBLE)
    (tmp_path / "room" / "test_double.py").write_text(TESTS)
    return tmp_path


def entry(find, replace, function="double.Twice.of", test="test_four"):
    """Returns an entry of the list."""
    named = {"function": function, "test": f"test_double.{test}"}
    return {**named, "find": find, "replace": replace}


def test_every_mutation_can_be_made():
    problems = []
    for one in mutations.read():
        try:
            mutations.broken(one)
        except ValueError as error:
            problems.append(str(error))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "find, replace, old, new",
    [
        ("x > 1", "x > 2", "if x > 1:", "if x > 2:"),
        ("if x>1: ...", "if (x): ...", "if x > 1:", "if x:"),
        ("'nought'", "None", "'nought'", "None"),
        ("return 2*x if x else 'nought'", "pass", "return 2 * x if x else 'nought'", "pass"),
        ("sign=1", "sign=2", "sign=1)", "sign=2)"),
        ("sign=1", "", ", sign=1)", ")"),
        ("self.product(2, x, sign=1)", "4", "self.product(2, x, sign=1)", "4"),
        ("x > 1", "any(y for y in x)", "x > 1", "any((y for y in x))"),
        ("(2 * (x))", "x + x", "2 * x if", "x + x if"),
    ],
)  # fmt: skip
def test_layout_quotes_and_comments_do_not_matter(tree, find, replace, old, new):
    text = mutations.ast.unparse(mutations.ast.parse(DOUBLE))
    assert text.count(old) == 1
    run = mutations.broken(entry(find, replace), tree)
    assert run.text == text.replace(old, new) + "\n"
    assert (run.file, run.tests) == (
        pathlib.Path("double.py"),
        ["room/test_double.py::test_four"],
    )


def test_what_is_deleted_leaves_a_body(tree):
    find = "return math.prod([a, b, sign])"
    run = mutations.broken(entry(find, "", "double.Twice.product"), tree)
    assert run.text.endswith("def product(self, a, b, sign):\n        pass\n")


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"find": "5 * x"}, "'5 \\* x' occurs 0 times: write code that occurs once"),
        ({"find": "x"}, "'x' occurs 4 times"),
        ({"find": "if x:"}, "write whole expressions, statements or keyword arguments"),
        ({"replace": "y * len([x])"}, "y is in `replace` and nowhere in double.py"),
        ({"function": "double.Twice.by"}, "double.Twice.by is in no file: write the name"),
        ({"test": "test_double.test_five"}, "test_double.test_five is in no file"),
    ],
)  # fmt: skip
def test_an_entry_that_does_not_fit_is_named(tree, changed, message):
    with pytest.raises(ValueError, match=message):
        mutations.broken({**entry("2 * x", "x"), **changed}, tree)


def test_a_name_is_as_long_as_makes_it_unique(tree):
    (tree / "room" / "double.py").write_text(DOUBLE)
    with pytest.raises(ValueError, match="is in double.py, room/double.py: write"):
        mutations.locate("double.Twice.of", tree)
    found = mutations.locate("room.double.Twice.of", tree)
    assert found == (tree / "room" / "double.py", ["Twice", "of"])


def test_the_runner_tells_noticed_from_unnoticed(tree, capsys):
    noticed = entry("x > 1", "not x", test="test_nought")
    unnoticed = entry("x > 1", "x > 2")
    # A file of tests that cannot be imported proves nothing.
    not_run = entry("import math", "import meth", "double")
    runs = [mutations.broken(one, tree) for one in (noticed, unnoticed, not_run)]
    test = "room/test_double.py::test_four"
    sound, unsound = mutations.Run([test]), mutations.Run([test, "no_such.py"])
    runs += [sound, unsound]
    assert mutations.failures(runs, [tree]) == [*runs[1:3], unsound]
    printed = capsys.readouterr().out
    verdicts = ["1/5 noticed", "2/5 SURVIVED", "3/5 NOT RUN", "No module named 'meth'"]
    verdicts += ["4/5 passed", "5/5 NOT RUN", "file or directory not found: no_such.py"]
    places = [printed.index(verdict) for verdict in verdicts]
    assert places == sorted(places)
    assert (tree / "double.py").read_text() == DOUBLE


def test_a_test_that_hangs_is_ended_with_all_that_it_started(tree):
    (tree / "room" / "test_double.py").write_text(
        "import pathlib, subprocess, time, double\n\n"
        "def test_four():\n"
        "    if double.Twice().of(2) != 4:\n"
        "        child = subprocess.Popen(['sleep', '600'])\n"
        "        pathlib.Path('child').write_text(str(child.pid))\n"
        "        time.sleep(600)\n"
    )
    run = mutations.broken(entry("x > 1", "not x"), tree)
    run = run._replace(text=run.text.replace("2 * x", "3 * x"))
    [(_, code, seconds, _)] = mutations.outcomes([run], [tree], timeout=8)
    assert code == mutations.TESTS_FAILED and 8 <= seconds < 60
    process = pathlib.Path("/proc", (tree / "child").read_text())
    assert not process.exists() or "zombie" in (process / "status").read_text()
    assert (tree / "double.py").read_text() == DOUBLE


def test_the_copy_is_the_tree(tmp_path):
    mutations.copy_tree(tmp_path)
    names = subprocess.check_output(
        ["git", "ls-files"], cwd=mutations.ROOT, text=True
    ).split("\n")
    for name in filter(None, names):
        ours = mutations.ROOT / name
        if ours.is_file():
            assert pathlib.Path(tmp_path / name).read_bytes() == ours.read_bytes()
    assert not (tmp_path / ".git").exists()
