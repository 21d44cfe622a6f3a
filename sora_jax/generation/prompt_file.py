"""Lists of prompts: what a user writes to have many videos made at once.

    prompts.txt     one prompt a line
    prompts.csv     a header, then a line a clip: prompt,seed,...
    prompts.jsonl   one object a line: {"prompt": ..., "seed": ...}

Every line may set what a call can set; the rest is the same for all. An image is found
from the folder of the list.
"""

import csv
import json
import pathlib
import re
from collections.abc import Iterator

WHOLE = ("seed", "num_frames", "height", "width", "num_inference_steps")
NUMBERS = ("guidance_scale", "guidance_scale_2", "shift", "fps", "step_cache")
TEXTS = ("id", "prompt", "negative_prompt", "sampler", "image")
FIELDS = TEXTS + WHOLE + NUMBERS


def read(path: str | pathlib.Path) -> list[dict]:
    """Reads the clips that a file asks for: one dict of call arguments each.

    Raises:
      ValueError: the file, or one of its lines, is not one of the forms above; the
        message names file and line.
      FileNotFoundError: there is no such file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the list of prompts {path} does not exist")
    readers = {".txt": _lines, ".csv": _table, ".jsonl": _objects}
    if path.suffix not in readers:
        raise ValueError(f"{path} is not a .txt, .csv or .jsonl file")
    rows = []
    for number, row in readers[path.suffix](path):
        try:
            row = _checked(row)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if "image" in row:
            row["image"] = str(path.parent / row["image"])
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no prompt")
    names = [row["id"] for row in rows if "id" in row]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: id {twice[0]!r} is there more than once")
    return rows


def _lines(path: pathlib.Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _table(path: pathlib.Path) -> Iterator[tuple[int, dict]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}, line {reader.line_num}: it has not as many columns as "
                    f"the header, which names {reader.fieldnames}"
                )
            yield reader.line_num, {name: text for name, text in row.items() if text}


def _objects(path: pathlib.Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: not an object")
        yield number, row


def _checked(row: dict) -> dict:
    unknown = sorted(set(row) - set(FIELDS))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is unknown; there are {', '.join(FIELDS)}")
    if "prompt" not in row:
        raise ValueError("it has no prompt")
    values = {}
    for name, value in row.items():
        if name in TEXTS:
            if not isinstance(value, str):
                raise ValueError(f"{name} is text, not {value!r}")
            values[name] = value
            continue
        kind, what = (int, "a whole number") if name in WHOLE else (float, "a number")
        wrong = ValueError(f"{name} is {what}, not {value!r}")
        try:
            number = kind(value)
        except (TypeError, ValueError):
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


def file_name(index: int, row: dict) -> str:
    """The video's file name: its id, or its number in the list and its first words."""
    if "id" in row:
        return f"{row['id']}.mp4"
    words = re.sub(r"[^a-z0-9]+", "-", row["prompt"].lower()).strip("-")
    return f"{index:05d}-{words[:60].strip('-') or 'clip'}.mp4"
