"""Files of prompts, for many videos in one job.

    prompts.txt     one prompt per line
    prompts.csv     a header, then one row per clip: prompt,seed,...
    prompts.jsonl   one object per line: {"prompt": ..., "seed": ...}

A row may set any argument of a call; flags set the others for all rows. The path of an
image is relative to the folder of the file.
"""

import pathlib
import re
from collections.abc import Collection, Iterator, Sequence

from sora_jax.data import texts
from sora_jax.generation import request as requests

# Type by column.
FIELDS = {"id": str, "prompt": str, "negative_prompt": str, "image": str, "seed": int}
FIELDS |= {name: argument.kind for name, argument in requests.SHARED.items()}


def read(path: str | pathlib.Path) -> list[dict]:
    """Reads the clips of a file, each as a dict of the arguments of a call.

    Raises:
      ValueError: the file or one of its lines has another format, or two lines would be
        written to the same file; the message names file and line.
      FileNotFoundError: there is no such file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the list of prompts {path} is not a file")
    readers = {".txt": _lines, ".csv": _rows, ".jsonl": _rows}
    if path.suffix not in readers:
        raise ValueError(f"{path} is not a .txt, .csv or .jsonl file")
    rows, lines = [], {}
    try:
        for number, row in readers[path.suffix](path):
            row = _checked(number, row)
            if "image" in row:
                row["image"] = str(path.parent / row["image"])
            # Some file systems ignore case.
            name = file_name(len(rows), row).lower()
            if name in lines:
                raise texts.BadLine(
                    number, f"it and line {lines[name]} would both be written to {name}"
                )
            lines[name] = number
            rows.append(row)
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from None
    if not rows:
        raise ValueError(f"{path} holds no prompt")
    return rows


def _lines(path: pathlib.Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(texts.lines(path), 1):
        if prompt := texts.normalise(line):
            yield number, {"prompt": prompt}


def _rows(path: pathlib.Path) -> Iterator[tuple[int, dict]]:
    for number, row in texts.rows(path, _check_header):
        if isinstance(row, texts.BadLine):
            raise row
        if path.suffix == ".csv":  # an empty field is unset
            row = {name: text for name, text in row.items() if text}
        yield number, row


def _check_header(header: Sequence[str]) -> None:
    _check_names(header)
    texts.check_named(header, ["prompt"], "has no prompt")


def _check_names(names: Collection[str]) -> None:
    if unknown := sorted(set(names) - set(FIELDS)):
        raise ValueError(
            f"{unknown[0]!r} is unknown; there are {', '.join(FIELDS)}, in lower case"
        )


def _checked(line: int, row: dict) -> dict:
    try:
        return values_of(row)
    except ValueError as error:
        raise texts.BadLine(line, str(error)) from None


def values_of(row: dict) -> dict:
    """The arguments of a call in a line or a recipe, converted to their types.

    Raises:
      ValueError: a field is unknown or has a value of another type.
    """
    _check_names(row)
    if "prompt" not in row:
        raise ValueError("it has no prompt")
    values = {}
    for name, value in row.items():
        if (kind := FIELDS[name]) is str:
            if not isinstance(value, str):
                raise ValueError(f"{name} is text, not {value!r}")
            values[name] = value
            continue
        what = "a whole number" if kind is int else "a number"
        wrong = ValueError(f"{name} is {what}, not {value!r}")
        try:
            number = kind(value)
        except (TypeError, ValueError, OverflowError):
            raise wrong from None
        if isinstance(value, bool | float) and number != value or value is True:
            raise wrong
        values[name] = number
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", values.get("id", "x")):
        raise ValueError(
            f"id {values['id']!r} names a file: up to 100 of A-Z a-z 0-9 . _ -, "
            "the first a letter or digit"
        )
    return values


def file_name(index: int, row: dict, suffix: str = ".mp4") -> str:
    """The video's file name: its id, or its number in the list and its first words."""
    if "id" in row:
        return f"{row['id']}{suffix}"
    words = re.sub(r"[^a-z0-9]+", "-", row["prompt"].lower()).strip("-")
    return f"{index:05d}-{words[:60].strip('-') or 'clip'}{suffix}"
