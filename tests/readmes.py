"""The Markdown files of the tree, and the code blocks in them."""

import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROOMS = ("configs", "experiments", "launch", "sora_jax", "tests")
FILES = [
    ROOT / "README.md",
    *(path for room in ROOMS for path in sorted((ROOT / room).rglob("*.md"))),
]


def blocks(language: str) -> list[str]:
    """Returns the code blocks of a language in all files."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [block for file in FILES for block in pattern.findall(file.read_text())]


def commands() -> list[list[str]]:
    """Returns the shell commands of all files, each as its words.

    Each line of a `bash` block is a command; in a `console` block the lines that begin
    with `$ ` are, and the others are output. Commands joined by `&&` are separate, as is
    one that follows `--`. Variables set in front of a command are left out.
    """
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    lines += [
        line.removeprefix("$ ")
        for block in blocks("console")
        for line in block.splitlines()
        if line.startswith("$ ")
    ]
    found = []
    for line in lines:
        words = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word in ("&&", "--"):
                found += [words] if words else []
                words = []
            elif words or not re.match(r"[A-Z_]+=", word):
                words.append(word)
    return found
