"""What README.md tells people to type works: the example, the commands, the links."""

import importlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Returns the code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Returns the shell commands, each as its words."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_the_example_trains_and_samples(tmp_path):
    (tmp_path / "example.py").write_text(blocks("python")[0])
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


def test_commands_start_files_that_exist():
    assert len(commands()) > 8
    for words in commands():
        if words[0] == "python":
            file = ROOT / (words[2].replace(".", "/") + ".py")
            if words[1] != "-m":
                file = ROOT / words[1]
            assert file.is_file(), words
        else:
            assert os.access(ROOT / words[0], os.X_OK), words


_LIST_FLAGS = """
import importlib, json, sys
from absl import flags

found = {}
for job in sys.argv[1:]:
    known = set(flags.FLAGS)
    importlib.import_module(job)
    found[job] = sorted(set(flags.FLAGS) - known)
    for name in found[job]:
        delattr(flags.FLAGS, name)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def flags_of_jobs() -> dict[str, list[str]]:
    jobs = sorted(
        {words[words.index("-m") + 1] for words in commands() if "-m" in words}
    )
    program = [sys.executable, "-c", _LIST_FLAGS, *jobs]
    return json.loads(subprocess.check_output(program, cwd=ROOT, text=True))


def test_jobs_have_the_flags_and_configs_the_fields(flags_of_jobs):
    for words in commands():
        if "-m" not in words:
            continue
        start = words.index("-m") + 1
        config = None
        for word in words[start + 1 :]:
            if not word.startswith("--"):
                continue
            name, _, value = word.removeprefix("--").partition("=")
            if name == "config":
                assert (ROOT / value).is_file(), value
                recipe = value.removesuffix(".py").replace("/", ".")
                config = importlib.import_module(recipe).get_config()
            elif name.startswith("config."):
                *sections, field = name.split(".")[1:]
                section = config
                for part in sections:
                    section = section[part]
                assert field in section, name
            else:
                assert name in flags_of_jobs[words[start]], (words[start], name)


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    here = [link for link in links if not link.startswith("https://")]
    assert here and not [link for link in here if not (ROOT / link).exists()]


def test_the_map_is_the_tree():
    """Every room and every folder of the tree is on the map, and nothing else."""
    mapped = set(re.findall(r"^\| `([\w/]+)/` \|", TEXT, re.MULTILINE))
    there = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*", "sora_jax/*")
        for path in ROOT.glob(pattern)
        if path.is_dir()
        and not path.name.startswith((".", "_"))
        and any(path.iterdir())
    }
    assert mapped == there - {"sora_jax", "runs"}
