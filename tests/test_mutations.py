"""The list of mutations fits the tree, and its runner can tell what was noticed."""

import pathlib
import subprocess

import pytest

from tests import mutations


def test_every_mutation_can_be_made():
    for entry in mutations.read():
        mutations.broken(entry)
        name, _, function = entry["test"].partition("::")
        test = mutations.ROOT / name
        assert test.is_file(), name
        assert f"def {function.partition('[')[0]}(" in test.read_text(), entry["test"]


def test_the_runner_tells_noticed_from_unnoticed(tmp_path, capsys, monkeypatch):
    (tmp_path / "double.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "test_double.py").write_text(
        "import double\n\ndef test_four():\n    assert double.double(2) == 4\n"
    )

    def entry(find, replace):
        test = "test_double.py::test_four"
        return {"file": "double.py", "find": find, "replace": replace, "test": test}

    noticed, unnoticed = entry("2 * x", "3 * x"), entry("2 * x", "x * x")
    assert mutations.survivors([noticed, unnoticed], tmp_path) == [unnoticed]
    printed = capsys.readouterr().out
    assert printed.index("noticed") < printed.index("SURVIVED")
    # A test that does not exist proves nothing.
    monkeypatch.setattr(mutations, "run_tests", lambda *_: (4, "no such test"))
    assert mutations.survivors([noticed], tmp_path) == [noticed]
    assert "NOT RUN" in capsys.readouterr().out
    assert (tmp_path / "double.py").read_text().endswith("return 2 * x\n")

    with pytest.raises(ValueError, match="stands there 0 times"):
        mutations.survivors([entry("5 * x", "x")], tmp_path)


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
