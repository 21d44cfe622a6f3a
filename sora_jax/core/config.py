"""Configs at their edges: reading, printing, comparing, turning into dataclasses.

A recipe is a Python file with `get_config()` that returns a `ConfigDict`; flags change
single fields. Inside the library every part owns a frozen dataclass, and `build` makes
it from a section. The resolved text that a run leaves behind is read back without
running any code.
"""

import ast
import dataclasses
import difflib
import hashlib
import pathlib
import typing
from collections.abc import Mapping

import ml_collections

Flat = dict[str, object]
DTYPES = ("float32", "bfloat16", "float16")  # that networks compute in


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
    """Returns one `name = value` line a field; `from_text` reads it back."""
    return "".join(f"{name} = {value!r}\n" for name, value in flatten(config).items())


def from_text(text: str) -> ml_collections.ConfigDict:
    """Reads what `to_text` wrote. Values are literals: nothing is executed.

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
    """Reads the resolved config of a run folder, or such a file itself."""
    path = pathlib.Path(path)
    file = path / "config.py.txt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not a run folder: it has no config.py.txt")
    return from_text(file.read_text())


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
    """The fields in which configs differ: dotted name -> the value in each, as text.

    A field that a config lacks is the empty text there.
    """
    flat = [flatten(config) for config in by_run.values()]
    found = {}
    for name in sorted({name for fields in flat for name in fields}):
        values = [repr(f[name]) if name in f else "" for f in flat]
        if len(set(values)) > 1:
            found[name] = values
    return found


def build[T](cls: type[T], section: Mapping, where: str = "config") -> T:
    """Makes the frozen dataclass `cls` from a config section.

    Raises:
      ValueError: a key is unknown (with the nearest known one), a required one is
        missing, or `dtype` is none that networks compute in.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for name in section:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = (
                f"; did you mean {near[0]!r}?" if near else f"; there are {[*fields]}"
            )
            raise ValueError(f"{where}.{name} is unknown{hint}")
        value = section[name]
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            nested = hints[name]
            if dataclasses.is_dataclass(nested):
                value = build(nested, value, f"{where}.{name}")
            else:
                value = {key: _plain(item) for key, item in value.items()}
        else:
            value = _plain(value)
        if name == "dtype" and value not in DTYPES:
            raise ValueError(f"{where}.dtype is {value!r}; it is one of {[*DTYPES]}")
        values[name] = value
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    return cls(**values)
