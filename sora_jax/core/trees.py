"""Nested dicts of arrays, and their leaves by dotted name."""

from collections.abc import Callable, Mapping
from typing import Any


def map_paths(function: Callable[[str, Any], Any], tree: Any, path: str = "") -> Any:
    """Maps each leaf of nested dicts to function("a.b", leaf)."""
    if isinstance(tree, Mapping):
        inner = f"{path}." if path else ""
        return {key: map_paths(function, tree[key], f"{inner}{key}") for key in tree}
    return function(path, tree)


def flatten(tree: Mapping) -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a.b": x}."""
    flat: dict[str, Any] = {}
    map_paths(flat.__setitem__, tree)
    return flat
