"""Captions and prompts as people write them: one text, and files that list many.

    list.txt     a text a line
    list.csv     a header, then the fields of a row with commas between: file,caption
    list.jsonl   an object a line: {"file": "a.mp4", "caption": "..."}

All lists are read by this module, so that errors have the same message everywhere, with
the number of the line. They are UTF-8, or begin with the mark of another Unicode
encoding; a reader may name one more encoding for files that are neither. Captions and
prompts both pass through `normalise`, so that prompts have the form of the training
captions.
"""

import codecs
import csv
import io
import json
import os
import pathlib
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

MAX_CHARACTERS = 4000  # of a caption or a prompt
MAX_BYTES = 256 << 20  # of a file
# Characters of a line of JSON, whose objects take twenty times the memory.
_MAX_LINE = 1 << 20
# Marks at the beginning of a file; those of UTF-32 begin with those of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_JOINERS = "\u200c\u200d"
_ZERO_WIDTH_SPACE = "\u200b"
_LINE_END = "\r\n|\n|\r"
# The side words that a mirrored video exchanges, with what may be joined to them.
_SIDES = re.compile(
    r"\b(left|right)(?=(?:wards?|most|hand|hander|handed)?\b)", re.IGNORECASE
)
# Texts whose meaning these words change otherwise, or which a mirror cannot keep true.
_NOT_MIRRORED = re.compile(
    r"\b(?:right (?:now|away|after|before|in|on|at|behind|next|angles?|there|here|one|"
    r"answer|time|way)|left (?:behind|over|alone|unattended|out)|(?:is|are|was|were|has|"
    r"have|had|be|been|being|gets?|all|nothing|something|nobody|just) (?:left|right)\b(?! "
    r"(?:of|to|from|side|hand))|(?:counter-?|anti-?)?clockwise|east|west|eastern|western|"
    r"text|letters?|words?|sign|signs|logo|caption|reads?|says?|copyrights?|rights)\b",
    re.IGNORECASE,
)

# Words at the beginning of a sentence that point to the one before it, or tell an order.
_REFERS_BACK = re.compile(
    r"(?:and|but|so|or|yet|then|next|after|afterwards?|before|later|finally|eventually|"
    r"suddenly|soon|once|when|while|as|meanwhile|however|instead|also|again|first|"
    r"second|third|last|it|its|they|their|theirs|them|he|she|his|hers?|him|this|that|"
    r"these|those|both|neither|either|each|all|another|others?|here|there|seen the other "
    r"way|the (?:other|same|former|latter|first|second|third|last|next|rest)|at (?:last|"
    r"first)|in the end)\b",
    re.IGNORECASE,
)
# What ends with a full stop and is no end of a sentence: initials, abbreviations.
_NO_END = re.compile(
    r"(?:^|[\s(])(?:[a-z]|(?:[a-z]\.)+[a-z]|mr|mrs|ms|dr|st|vs|etc|cf|approx|no|fig)\.$",
    re.I,
)
_QUOTES = frozenset('"\u201c\u201d\u00ab\u00bb\u201e')
_ORDINALS = ("first", "second", "third", "fourth", "fifth")


class BadLine(ValueError):
    """A line of a file that cannot be read.

    Attributes:
      line: its number, starting at 1.
      reason: why.
    """

    def __init__(self, line: int, reason: str):
        super().__init__(line, reason)
        self.line, self.reason = line, reason

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


def normalise(text: str) -> str:
    """Returns a text as one line of visible characters.

    White space, line ends and control characters become single spaces. Joiners (U+200C,
    U+200D) are kept, since they belong to the spelling of Persian and Indic scripts and
    combine emoji; other format characters, such as soft hyphens and direction marks, are
    removed. A zero-width space separates words, so it becomes a space.
    """
    if not text.isprintable():
        text = "".join(map(_visible, text))
    return " ".join(text.split()).strip(f" {_JOINERS}")


def _visible(character: str) -> str:
    if character.isprintable() or character in _JOINERS:
        return character
    is_format = unicodedata.category(character) == "Cf"
    return "" if is_format and character != _ZERO_WIDTH_SPACE else " "


def escaped(text: str) -> str:
    """Returns a text in which all that is not visible is written as its code, as \\x1b.

    Names of files may hold line ends, direction marks, and codes that a terminal obeys.
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or character in _JOINERS
        else character.encode("unicode_escape").decode()
        for character in text
    )


def check_encoding(name: str) -> None:
    """Raises ValueError if Python has no encoding of texts of this name."""
    try:
        "".encode(codecs.lookup(name).name)
    except (LookupError, ValueError):
        raise ValueError(
            f"there is no encoding {name!r}; write one such as cp1252, gb18030 or "
            "shift_jis"
        ) from None


def read_text(
    path: str | os.PathLike, encoding: str | None = None, most: int = MAX_BYTES
) -> str:
    """Reads a file of text; line ends are kept.

    Args:
      path: a file of UTF-8, or one that begins with a byte order mark.
      encoding: of a file that is neither; None: it is refused.
      most: bytes that the file may have.

    Raises:
      BadLine: the file has another encoding.
      ValueError: it is too large.
    """
    path = pathlib.Path(path)
    if path.stat().st_size > most:
        raise ValueError(f"it is larger than {most} bytes")
    return decode(path.read_bytes(), encoding)


def decode(content: bytes, encoding: str | None = None) -> str:
    """Returns the text of a file's bytes; see `read_text`.

    Raises:
      BadLine: they have another encoding.
    """
    kinds = [kind for mark, kind in _MARKS.items() if content.startswith(mark)][:1]
    # UTF-16 without a mark is valid UTF-8 where it is English.
    if not kinds and content.count(0) > len(content) // 4:
        if encoding is None:
            raise BadLine(1, "it has zero bytes, as UTF-16 does; save it as UTF-8")
        kinds = [encoding]
    for kind in kinds or filter(None, ["utf-8", encoding]):
        try:
            return content.decode(kind)
        except UnicodeDecodeError as error:
            failed = error
    *before, beginning = re.split(_LINE_END.encode(), content[: failed.start])
    raise BadLine(
        len(before) + 1,
        f"byte {len(beginning) + 1} of the line (0x{content[failed.start]:02x}) is "
        f"not {failed.encoding.upper()}; save it as UTF-8",
    )


def lines(path: str | os.PathLike, encoding: str | None = None) -> list[str]:
    """Reads the lines of a file unchanged, without blank ones at the end.

    Args:
      path, encoding: as for `read_text`.

    Raises:
      BadLine, ValueError: as `read_text`.
    """
    result = re.split(_LINE_END, read_text(path, encoding))
    while result and not result[-1].strip():
        result.pop()
    return result


def rows(
    path: str | os.PathLike,
    check_header: Callable[[Sequence[str]], None],
    encoding: str | None = None,
) -> Iterator[tuple[int, dict[str, Any] | BadLine]]:
    """Yields (line, fields) of a .csv or .jsonl file, in its order.

    A row that cannot be read gives a `BadLine` instead of its fields. So does a wrong
    encoding or a wrong header, which ends the iteration.

    Args:
      path: the file.
      check_header: is given the columns of a .csv; raises ValueError where they are
        not those that are needed.
      encoding: as for `read_text`.

    Raises:
      ValueError: the file is too large.
    """
    try:
        text = read_text(path, encoding)
    except BadLine as error:
        yield error.line, error
        return
    read = _csv_rows if pathlib.Path(path).suffix == ".csv" else _json_rows
    for line, fields in read(text, check_header):
        if isinstance(fields, str):
            fields = BadLine(line, fields)
        yield line, fields


def _csv_rows(text: str, check_header) -> Iterator[tuple[int, dict[str, str] | str]]:
    """Yields (line, fields), or in their place why a row cannot be read."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1  # on which the row begins; it may have several
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, _why(error, reader.line_num - line)
            if header is None:
                return
            continue
        if not row:
            continue
        if header is None:
            header = row
            try:
                _check_columns(header)
                check_header(header)
            except ValueError as error:
                yield line, str(error)
                return
        elif len(row) != len(header):
            reason = (
                f"it has {len(row)} field{'s' * (len(row) != 1)}, and the header names "
                f"{len(header)}: {', '.join(header)}"
            )
            if len(row) > len(header):
                reason += '; put a text with a comma in quotes: "a, b"'
            yield line, reason
        else:
            yield line, dict(zip(header, row, strict=True))


def _why(error: csv.Error, more_lines: int) -> str:
    reason = {
        "unexpected end of data": "a quote is opened and never closed",
        "',' expected after '\"'": (
            'a quote ends before its field does; inside quotes write "" for "'
        ),
    }.get(str(error), str(error))
    if more_lines:
        lines = "line is" if more_lines == 1 else f"{more_lines} lines are"
        reason += f"; the next {lines} taken as part of it and not read"
    return reason


def _check_columns(header: Sequence[str]) -> None:
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and separator in header[0]:
            raise ValueError(
                f"the header {header[0]!r} has {name} between its columns; write commas"
            )
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise ValueError(f"the header {', '.join(header)} names {twice[0]!r} twice")


def check_named(found: Sequence[str], wanted: Sequence[str], what: str) -> None:
    """Raises ValueError if `found` has none of the wanted names."""
    if not set(found) & set(wanted):
        capitals = {name.strip().lower() for name in found} & set(wanted)
        raise ValueError(
            f"it {what}: its fields are {', '.join(map(repr, found))}, none of "
            f"{', '.join(wanted)}" + (" (in lower case, no spaces)" if capitals else "")
        )


def _json_rows(text: str, check_header) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yields (line, fields), or the reason why the line cannot be read."""
    del check_header
    for number, line in enumerate(re.split(_LINE_END, text), 1):
        if not line.strip():
            continue
        if len(line) > _MAX_LINE:
            yield number, f"it has {len(line)} characters; the limit is {_MAX_LINE}"
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            yield number, f"it is not JSON: {error.msg} (column {error.colno})"
        except (ValueError, RecursionError) as error:  # too many digits, too deep
            yield number, f"it is not JSON: {error}"
        else:
            is_object = isinstance(fields, dict)
            yield number, fields if is_object else "it is not an object with fields"


def mirrored(text: str) -> str | None:
    """Returns a caption of the video mirrored from left to right; None if unknown.

    The words left and right are exchanged. A text in which they may mean something else
    ("right now", "is left"), or which a mirror makes untrue in another way (writing,
    clockwise, east), has no such caption: do not mirror its video.
    """
    if _NOT_MIRRORED.search(text):
        return None

    def other(match: re.Match) -> str:
        word = match[1]
        side = "right" if word.lower() == "left" else "left"
        if word.isupper():
            return side.upper()
        return side.capitalize() if word[0].isupper() else side

    return _SIDES.sub(other, text)


def sentences(text: str) -> tuple[list[str], str] | None:
    """Returns the parts of a text that may change places, and what joins them.

    A part is a sentence with those behind it that refer to it ("It ...", "Then ..."): see
    `_REFERS_BACK`. None: quoted speech, or an end without a full stop.
    """
    if set(text) & _QUOTES or not text.endswith((".", "!", "?")):
        return None
    parts: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        # After an abbreviation, where sentences begin with capitals.
        goes_on = text[:1].isupper() and sentence[:1].islower()
        goes_on = goes_on or _REFERS_BACK.match(sentence)
        if parts and (goes_on or _NO_END.search(parts[-1])):
            parts[-1] += f" {sentence}"
        else:
            parts.append(sentence)
    return parts, " "


def entries(text: str) -> tuple[list[str], str] | None:
    """Returns the entries of "a: b; c: d" that may change places, and what joins them.

    Entries up to the last one whose key was there before, or which is "second", "third",
    ..., are one part, since their order tells what belongs to whom. None: not all are of
    the form "key: value".
    """
    found = text.split("; ")
    keys = [entry.partition(": ")[0].lower() for entry in found]
    if not all(": " in entry for entry in found):
        return None
    bound = [0]
    bound += [k for k, key in enumerate(keys) if key in keys[:k] or key in _ORDINALS]
    fixed = max(bound) + 1
    return ["; ".join(found[:fixed]), *found[fixed:]], "; "


def shuffled(
    text: str,
    split: Callable[[str], tuple[list[str], str] | None],
    random: np.random.Generator,
) -> str:
    """Returns a caption whose parts behind the first one are in a random order.

    Args:
      text: the caption, returned unchanged where it has no such parts.
      split: `sentences` or `entries`.
      random: of the order.
    """
    parts = split(text)
    if parts is None:
        return text
    (first, *rest), joint = parts
    return joint.join([first, *(rest[k] for k in random.permutation(len(rest)))])
