"""Configs: reading, printing, comparing, and turning sections into dataclasses.

A recipe is a Python file with `get_config()` that returns a `ConfigDict`; flags override
single fields. Inside the library every part owns a frozen dataclass, which `build` makes
from a section of the config, after checking types and ranges (`Range`). The resolved
config that a run saves is text, and reading it back runs no code.
"""

import ast
import dataclasses
import difflib
import hashlib
import math
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Annotated

import ml_collections

from sora_jax.core import digests

_FILE = "config.py.txt"
Flat = dict[str, object]
DTYPES = ("float32", "bfloat16", "float16")  # compute types of networks


@dataclasses.dataclass(frozen=True)
class Range:
    """Which numbers a field takes: `rate: Annotated[float, Range("(0, 1]")] = 0.5`.

    Numbers without a range must be finite.

    Attributes:
      interval: such as "(0, 1]": [ and ] include an end, ( and ) exclude it.
      also: one more number that the field takes, as a special value.
      meaning: what the special value means.
    """

    interval: str
    also: float | None = None
    meaning: str = ""

    def takes(self, value: float) -> bool:
        """Returns whether the field takes this number; inf and nan never."""
        least, most = map(float, self.interval[1:-1].split(","))
        above = value >= least if self.interval[0] == "[" else value > least
        below = value <= most if self.interval[-1] == "]" else value < most
        return math.isfinite(value) and (above and below or value == self.also)

    def __str__(self) -> str:
        also = "" if self.also is None else f", or {self.also:g}: {self.meaning}"
        return f" in {self.interval}{also}"


Count = Annotated[int, Range("[1, 2147483647]")]  # of steps, which are int32
Size = Annotated[int, Range("[1, 1e6]")]  # of an array axis, or of a loop
Grid = tuple[Size, Size, Size]  # time, height, width
Share = Annotated[float, Range("[0, 1]")]
Factor = Annotated[float, Range("[0, 1e6]")]
Seed = Annotated[int, Range("[0, 18446744073709551616)")]  # 64 bits


def flatten(config: Mapping, prefix: str = "") -> Flat:
    """Returns {"a.b.c": value} with tuples in place of lists, sorted by name."""
    flat: Flat = {}
    for name in sorted(config):
        value = config[name]
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = _plain(value)
    return flat


def _plain(value: object) -> object:
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a config holds numbers, text, tuples and sections, not {value!r}")


def to_text(config: Mapping) -> str:
    """Returns one `name = value` line a field; `from_text` reads it back.

    Raises:
      ValueError: a number is not finite, and so could not be read back.
    """
    flat = flatten(config)
    for name, value in flat.items():
        if not _is_finite(value):
            raise ValueError(f"{name} is {value!r}; numbers of a config must be finite")
    return "".join(f"{name} = {value!r}\n" for name, value in flat.items())


def _is_finite(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def from_text(text: str) -> ml_collections.ConfigDict:
    """Reads what `to_text` wrote. Values are literals; no code runs.

    Raises:
      ValueError: a line is not `name = literal`.
    """
    config: dict = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, separator, literal = line.partition(" = ")
        try:
            value = ast.literal_eval(literal)
        except (SyntaxError, ValueError):
            separator = ""
        if not separator:
            raise ValueError(
                f"line {number} of the config is not `name = value`: {line}"
            )
        *sections, leaf = name.strip().split(".")
        node = config
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return ml_collections.ConfigDict(config)


def read(path: str | pathlib.Path) -> ml_collections.ConfigDict:
    """Reads the resolved config of a run folder, or such a file itself.

    Raises:
      FileNotFoundError: there is no such file.
      digests.Damaged: the file is not what was written.
    """
    path = pathlib.Path(path)
    file = path / _FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not a run folder: it has no {_FILE}")
    return from_text(digests.read(file, required=path.is_dir()).decode())


def write(folder: str | pathlib.Path, config: Mapping) -> None:
    """Writes the resolved config of a run folder."""
    digests.store(pathlib.Path(folder) / _FILE, to_text(config))


def digest(config: Mapping) -> str:
    """Returns the first 16 hex digits of the SHA-256 of the resolved text."""
    return hashlib.sha256(to_text(config).encode()).hexdigest()[:16]


def difference(old: Mapping, new: Mapping) -> list[str]:
    """Lists the fields that differ, one readable line each."""
    a, b = flatten(old), flatten(new)
    lines = []
    for name in sorted(a.keys() | b.keys()):
        if name not in b:
            lines.append(f"{name}: {a[name]!r}, now absent")
        elif name not in a:
            lines.append(f"{name}: absent, now {b[name]!r}")
        elif a[name] != b[name]:
            lines.append(f"{name}: {a[name]!r}, now {b[name]!r}")
    return lines


def differing(by_run: Mapping[str, Mapping]) -> dict[str, list[str]]:
    """Returns the fields in which configs differ: dotted name -> their values as text.

    The text is empty for a config that lacks the field.
    """
    flat = [flatten(config) for config in by_run.values()]
    different = {}
    for name in sorted({name for fields in flat for name in fields}):
        values = [repr(f[name]) if name in f else "" for f in flat]
        if len(set(values)) > 1:
            different[name] = values
    return different


def build[T](cls: type[T], section: Mapping, where: str = "config") -> T:
    """Makes the frozen dataclass `cls` from a config section.

    Args:
      cls: the dataclass; its type annotations and ranges (`Range`) are checked.
      section: value by name of the field.
      where: dotted name of the section, for messages; "": the whole config.

    Raises:
      ValueError: a key is unknown (with the nearest known one), a required one is
        missing, a value has another type or is outside of the field's range, or `dtype`
        is not one of `DTYPES`.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls, include_extras=True)
    values = {}
    for name in section:
        place = f"{where}.{name}" if where else name
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = (
                f"; did you mean {near[0]!r}?" if near else f"; there are {[*fields]}"
            )
            raise ValueError(f"{place} is unknown{hint}")
        value = section[name]
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            nested = hints[name]
            if dataclasses.is_dataclass(nested):
                value = build(nested, value, place)
            else:
                value = {key: _plain(item) for key, item in value.items()}
        else:
            value = _plain(value)
        if name == "dtype" and value not in DTYPES:
            raise ValueError(f"{place} is {value!r}; it must be one of {[*DTYPES]}")
        _check(hints[name], value, place)
        values[name] = value
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where or 'the config'} lacks {', '.join(missing)}")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


def check(made: object) -> None:
    """Checks the fields of a dataclass that may not come from `build`.

    Raises:
      ValueError: a field has another type or is outside of its range.
    """
    for name, hint in typing.get_type_hints(type(made), include_extras=True).items():
        _check(hint, getattr(made, name), name)


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}


def _check(hint: object, value: object, where: str) -> None:
    """Raises ValueError if a value has another type than the hint, or is out of range.

    Checks numbers, text and booleans: alone, in tuples, and in sections that have no
    dataclass.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [kind for kind in inner if kind is not types.NoneType]
        if value is not None and len(kinds) == 1:
            _check(kinds[0], value, where)
    elif origin is tuple:
        endless = inner[1:] == (...,)
        if not isinstance(value, tuple):
            raise ValueError(f"{where} is {value!r}; it must be a tuple")
        if not endless and len(value) != len(inner):
            raise ValueError(f"{where} is {value!r}; it must have {len(inner)} entries")
        for index, item in enumerate(value):
            _check(inner[0 if endless else index], item, f"{where}[{index}]")
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        for name, item in value.items() if isinstance(value, Mapping) else ():
            _check(inner[1], item, f"{where}.{name}")
    else:
        range_ = hint.__metadata__[0] if origin is Annotated else None
        kind = inner[0] if origin is Annotated else hint
        if kind not in _NAMES:
            return
        taken = (int, float) if kind is float else kind
        right = isinstance(value, taken) and isinstance(value, bool) == (kind is bool)
        if right and kind in (int, float):
            right = range_.takes(value) if range_ else math.isfinite(value)
        if not right:
            words = "a finite number" if kind is float and not range_ else _NAMES[kind]
            raise ValueError(f"{where} is {value!r}; it must be {words}{range_ or ''}")
