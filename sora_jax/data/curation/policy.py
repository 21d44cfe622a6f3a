"""Which clips a curated folder keeps: a policy in TOML, which Python reads by itself.

    filter = true                        # false: keep all clips, and only add scores
    stages = ["motion", "sharpness"]     # default: all of stages.STAGES
    licences = ["CC0-1.0", "CC-BY-4.0"]  # clips under other terms are refused
    consent_files = ["consent.txt"]      # only clips that these lists name
    opt_out = ["source:https://example.org/film"]
    opt_out_files = ["opt_out.txt"]      # no clip that these lists name, and no copy of it

    [limits]                             # by score
    motion = {min = 0.02, max = 2.0}

    [duplicates]                         # keep one of each group of near-duplicates
    distance = 0.2

Unknown keys are refused. Files are relative to the policy's own folder; `lists` says what
stands in them.
"""

import dataclasses
import difflib
import math
import os
import pathlib
import tomllib
from collections.abc import Collection, Mapping
from typing import Any

from sora_jax.data.curation import duplicates, fingerprint, lists, stages


@dataclasses.dataclass(frozen=True)
class Limit:
    """The range of a score, both ends included."""

    min: float = -math.inf
    max: float = math.inf


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is kept; the fields are those of the file.

    Attributes:
      filter: whether clips are refused at all.
      stages: names of the stages that score, in the registry's order.
      licences: that are allowed, in lower case; None: all, and none at all.
      consent: a clip must be named by it; None: consent is not asked for.
      opt_out: a clip must not be named by it, nor be a copy of one that is.
      limits: by score.
      duplicates: largest distance of copies; None: copies are kept.
    """

    filter: bool = True
    stages: tuple[str, ...] = tuple(stages.STAGES)
    licences: frozenset[str] | None = None
    consent: lists.Entries | None = None
    opt_out: lists.Entries = lists.Entries()
    limits: Mapping[str, Limit] = dataclasses.field(default_factory=dict)
    duplicates: float | None = None

    def settings(self) -> dict[str, Any]:
        """JSON values that determine the decisions; long lists by their digest."""
        return {
            "filter": self.filter,
            "licences": None if self.licences is None else sorted(self.licences),
            "consent": self.consent and self.consent.digest,
            "opt_out": self.opt_out.digest if self.opt_out.entries else None,
            "limits": {
                score: {
                    end: value
                    for end, value in dataclasses.asdict(limit).items()
                    if math.isfinite(value)
                }
                for score, limit in self.limits.items()
            },
            "duplicates": self.duplicates,
            "stages": {name: stages.STAGES[name].VERSION for name in self.stages},
            "fingerprint": fingerprint.VERSION,
        }


def read(path: str | os.PathLike) -> Policy:
    """Reads a policy.

    Raises:
      ValueError: it is not a policy; names the file and the key.
      OSError: it, or a list that it names, cannot be read.
    """
    path = pathlib.Path(path)
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    return _Reader(path).policy(fields)


class _Reader:
    """Checks the fields of one file."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def policy(self, fields: Mapping[str, Any]) -> Policy:
        known = (
            "filter", "stages", "licences", "consent", "consent_files", "opt_out",
            "opt_out_files", "limits", "duplicates",
        )  # fmt: skip
        self._check_known("", fields, known)
        filters = fields.get("filter", True)
        if not isinstance(filters, bool):
            self._refuse("filter", "true or false", filters)
        names = self._texts(fields, "stages", list(stages.STAGES))
        self._check_known("stages", names, stages.STAGES)
        names = tuple(name for name in stages.STAGES if name in names)
        licences, consent = None, self._entries(fields, "consent")
        if "licences" in fields:
            licences = frozenset(x.lower() for x in self._texts(fields, "licences", []))
        opt_out = self._entries(fields, "opt_out") or lists.Entries()
        if not filters and (licences is not None or consent or opt_out.entries):
            raise ValueError(
                f"{self.path}: filter = false keeps every clip, so licences, consent "
                "and opt_out have no meaning; remove them, or set filter = true"
            )
        return Policy(
            filters,
            names,
            licences,
            consent,
            opt_out,
            self._limits(fields.get("limits", {}), names),
            self._duplicates(fields),
        )

    def _limits(self, fields: Any, names: Collection[str]) -> dict[str, Limit]:
        self._check_table("limits", fields)
        self._check_known("limits", fields, stages.scores_of(stages.STAGES))
        limits = {}
        for score, ends in fields.items():
            key = f"limits.{score}"
            if score not in stages.scores_of(names):
                raise ValueError(f"{self.path}: {key} is a score of a stage left out")
            self._check_table(key, ends)
            self._check_known(key, ends, ("min", "max"))
            for end, value in ends.items():
                self._check_number(f"{key}.{end}", value)
            limits[score] = Limit(**ends)
            if not ends or limits[score].min > limits[score].max:
                self._refuse(key, "a range {min = ..., max = ...}", ends)
        return limits

    def _duplicates(self, fields: Mapping[str, Any]) -> float | None:
        if "duplicates" not in fields:
            return None
        table = fields["duplicates"]
        self._check_table("duplicates", table)
        self._check_known("duplicates", table, ("distance",))
        distance = table.get("distance", duplicates.DISTANCE)
        self._check_number("duplicates.distance", distance)
        if not 0 <= distance <= 1:
            self._refuse("duplicates.distance", "from 0 to 1", distance)
        return float(distance)

    def _entries(self, fields: Mapping[str, Any], key: str) -> lists.Entries | None:
        """The list `key` of the file and of its files; None if neither is given."""
        if key not in fields and f"{key}_files" not in fields:
            return None
        entries = lists.read(self._texts(fields, key, []), f"{self.path}: {key}")
        for name in self._texts(fields, f"{key}_files", []):
            file = self.path.parent / name
            text = file.read_text(encoding="utf-8-sig")
            entries += lists.read(text.splitlines(), str(file))
        return lists.Entries(tuple(dict.fromkeys(entries)))

    def _texts(self, fields: Mapping[str, Any], key: str, default: list) -> list[str]:
        value = fields.get(key, default)
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            self._refuse(key, "a list of texts", value)
        return value

    def _check_known(self, table: str, keys: Any, known: Collection[str]) -> None:
        for key in keys:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {[*known]}"
                name = f"{table}.{key}" if table else key
                raise ValueError(f"{self.path}: {name} is unknown; {hint}")

    def _check_table(self, key: str, value: Any) -> None:
        if not isinstance(value, dict):
            self._refuse(key, "a table", value)

    def _check_number(self, key: str, value: Any) -> None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            self._refuse(key, "a finite number", value)

    def _refuse(self, key: str, wanted: str, value: Any) -> None:
        raise ValueError(f"{self.path}: {key} is {wanted}, not {value!r}")
