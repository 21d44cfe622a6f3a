"""Lists of prompts: what a user writes to have many videos made at once.

    prompts.txt     one prompt a line
    prompts.csv     a header, then a line a clip: prompt,seed,...
    prompts.jsonl   one object a line: {"prompt": ..., "seed": ...}

Every line may set what a call can set; the rest is the same for all. An image is found
from the folder of the list.
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
    """Reads the clips that a file asks for: one dict of call arguments each.

    Raises:
      ValueError: the file, or one of its lines, is not one of the forms above, or two
        lines ask for the same file; the message names file and line.
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
        if path.suffix == ".csv":  # an empty field is one that is not given
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
    """The call arguments of a line, or of a recipe, each of its type.

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
