"""What the README files tell people to type works: examples, commands, paths, links."""

import ast
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from tests import readmes
from tests.readmes import ROOT

MAX_LINES = 220  # of README.md, so that it can be read
# Programs that README commands may start and that are not part of the tree.
PROGRAMS = {"git", "cd", ".", "pip", "hf", "printf"}
PATH = re.compile(rf"(?:{'|'.join(readmes.ROOMS)})/[\w./-]+")


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_LINES


def test_the_example_trains_and_samples(tmp_path):
    example = next(block for block in readmes.blocks("python") if "optax" in block)
    (tmp_path / "example.py").write_text(example)
    printed = subprocess.run(
        [sys.executable, "-W", "error", tmp_path / "example.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    before, after = map(float, re.findall(r"\d+\.\d+", printed)[:2])
    assert after < before
    assert "(4, 3, 8, 8, 16)" in printed


def test_what_examples_import_exists():
    assert len(readmes.blocks("python")) > 3
    for block in readmes.blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for name in (alias.name for alias in node.names):
                    if not hasattr(module, name):
                        importlib.import_module(f"{node.module}.{name}")


def test_commands_start_files_that_exist():
    assert len(readmes.commands()) > 40
    for words in readmes.commands():
        if words[0] in ("python", "python3"):
            if words[1] != "-m":
                assert (ROOT / words[1]).is_file(), words
            else:
                assert importlib.util.find_spec(words[2]) is not None, words
        elif words[0] not in PROGRAMS:
            assert os.access(ROOT / words[0], os.X_OK), words


def test_paths_in_commands_exist():
    for words in readmes.commands():
        for word in words:
            path = word.rpartition("=")[2]
            assert not PATH.fullmatch(path) or (ROOT / path).exists(), words


def test_paths_in_the_text_exist():
    for file in readmes.FILES:
        for path in re.findall(r"`([\w./-]+/[\w./-]*)`", file.read_text()):
            if path.startswith("runs/") or not (path.endswith((".py", "/"))):
                continue
            places = (ROOT, ROOT / "sora_jax", file.parent)
            assert any((place / path).exists() for place in places), (file, path)


# A job's own flags, and those of modules that several jobs import.
_LIST_FLAGS = """
import importlib, json, sys
from absl import flags

found, shared = {}, set()
for job in sys.argv[1:]:
    known = set(flags.FLAGS)
    importlib.import_module(job)
    new = set(flags.FLAGS) - known
    found[job] = {n for n in new if flags.FLAGS.find_module_defining_flag(n) == job}
    shared |= new - found[job]
    for name in found[job]:
        delattr(flags.FLAGS, name)
print(json.dumps({job: sorted(names | shared) for job, names in found.items()}))
"""


def program(words: list[str]) -> str | None:
    """Returns the module or file of the tree that a command starts, None for others."""
    if words[0] in ("python", "python3"):
        name = words[1] if words[1] != "-m" else words[2].replace(".", "/") + ".py"
        return name if (ROOT / name).is_file() else None
    return words[0].removeprefix("./") if words[0].startswith("./") else None


@pytest.fixture(scope="module")
def flags_of_programs() -> dict[str, set[str]]:
    """Returns the flags of each program that the commands start."""
    found, jobs = {}, []
    for name in sorted({program(words) for words in readmes.commands()} - {None}):
        text = (ROOT / name).read_text()
        if "absl" in text:
            jobs.append(name)
        elif name != "launch/test":  # its arguments are pytest's
            file = name if name.endswith(".py") else name + ".py"
            command = [sys.executable, file, "--help"]
            if name.startswith(("experiments", "tests")):
                module = name.removesuffix(".py").replace("/", ".")
                command = [sys.executable, "-m", module, "--help"]
            found[name] = set(
                re.findall(
                    r"--(\w+)", subprocess.check_output(command, cwd=ROOT, text=True)
                )
            )
    modules = [name.removesuffix(".py").replace("/", ".") for name in jobs]
    listed = json.loads(
        subprocess.check_output(
            [sys.executable, "-c", _LIST_FLAGS, *modules], cwd=ROOT, text=True
        )
    )
    return found | dict(zip(jobs, map(set, listed.values()), strict=True))


def test_programs_have_the_flags_and_configs_the_fields(flags_of_programs):
    for words in readmes.commands():
        name = program(words)
        if name not in flags_of_programs:
            continue
        config = None
        for word in words[1:]:
            if not word.startswith("--"):
                continue
            flag, _, value = word.removeprefix("--").partition("=")
            if flag == "config":
                recipe = value.removesuffix(".py").replace("/", ".")
                config = importlib.import_module(recipe).get_config()
            elif flag.startswith("config."):
                *sections, field = flag.split(".")[1:]
                section = config
                for part in sections:
                    section = section[part]
                assert field in section, words
            else:
                assert flag in flags_of_programs[name], (name, flag)


def test_links_lead_somewhere():
    for file in readmes.FILES:
        links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", file.read_text())
        here = [link for link in links if not link.startswith("https://")]
        missing = [link for link in here if not (file.parent / link).exists()]
        assert not missing, (file, missing)


def test_the_map_is_the_tree():
    """Every room and every folder of the tree is on the map, and nothing else."""
    text = (ROOT / "README.md").read_text()
    mapped = set(re.findall(r"^\| `([\w/]+)/` \|", text, re.MULTILINE))
    there = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*", "sora_jax/*")
        for path in ROOT.glob(pattern)
        if path.is_dir()
        and not path.name.startswith((".", "_"))
        and any(path.iterdir())
    }
    assert mapped == there - {"sora_jax", "runs"}
