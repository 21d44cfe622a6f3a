"""A report as one HTML file: videos, tables, charts, config and protocol.

The file needs no network and no other file: videos are data URIs, charts are SVG, the only
script is inline, and a content security policy forbids everything else. Jinja2 escapes all
text; if that failed, the policy would still keep a prompt from running or fetching anything.

What a page shows is put together by the owner of the report: prompts/summary.py and
prompts/run_scores.py, videos/folder_page.py, and vae_report.py.
"""

import base64
import dataclasses
import datetime
import hashlib
import json
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jinja2
import numpy as np

from sora_jax.data import video_io
from sora_jax.evals import statistics

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclasses.dataclass(frozen=True)
class Clip:
    """One video of an entry.

    Attributes:
      label: what it is, such as "seed 0" or "ground truth".
      mp4: the file's bytes.
      marks: part -> whether the oracle finds it right; empty if not scored.
      aspect: width / height.
    """

    label: str
    mp4: bytes
    marks: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    aspect: float = 1.0

    @classmethod
    def encode(
        cls,
        label: str,
        video_thwc: np.ndarray,
        fps: float,
        marks: Mapping[str, bool] = types.MappingProxyType({}),
    ) -> "Clip":
        """Makes a clip of uint8 frames of even height and width."""
        aspect = video_thwc.shape[2] / video_thwc.shape[1]
        # H.264 has one colour for 2 x 2 pixels; at twice the size each keeps its own.
        if video_thwc.shape[1] <= 64:
            video_thwc = video_thwc.repeat(2, axis=1).repeat(2, axis=2)
        return cls(label, video_io.encode_mp4(video_thwc, fps), marks, aspect)

    @property
    def data_uri(self) -> str:
        """The file as a URI."""
        return f"data:video/mp4;base64,{base64.b64encode(self.mp4).decode()}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A prompt and its videos, side by side; `wide` gives large videos more room."""

    prompt: str
    group: str
    clips: Sequence[Clip]
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class Cell:
    """A number, its 95 % interval if it has one, and its format.

    Attributes:
      value: the number; None is shown as a dash.
      low, high: ends of the interval.
      digits: significant digits; None means three decimals.
      bar: whether the value is drawn as a bar from 0 to 1.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    digits: int | None = None
    bar: bool = False

    @classmethod
    def of(cls, estimate: statistics.Estimate | None, **options) -> "Cell":
        """Makes the cell of an estimate (value, low, high), or of None."""
        if estimate is None:
            return cls(None)
        return cls(estimate.value, estimate.low, estimate.high, **options)

    @property
    def number(self) -> str:
        """The value as the page shows it."""
        return "–" if self.value is None else self._page(self.value)

    @property
    def interval(self) -> str:
        """The interval as the page shows it; empty where there is none."""
        if self.low is None or self.high is None:
            return ""
        return f"{self._page(self.low)} … {self._page(self.high)}"

    @property
    def text(self) -> str:
        """Value and interval for a terminal."""
        if self.value is None:
            return "-"
        if self.low is None or self.high is None:
            return self._digits(self.value)
        ends = f"{self._digits(self.low)}..{self._digits(self.high)}"
        return f"{self._digits(self.value)} ({ends})"

    def _page(self, value: float) -> str:
        return self._digits(value).replace("-", "\N{MINUS SIGN}")

    def _digits(self, value: float) -> str:
        return f"{value:.3f}" if self.digits is None else f"{value:.{self.digits}g}"


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under named columns.

    Attributes:
      title: heading.
      note: how to read the table.
      columns: names of the columns.
      rows: name and cells of each row.
      strong: names of rows in bold.
      remarks: name of a row -> text in its last column; "" -> heading of that column.
    """

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    strong: Sequence[str] = ()
    remarks: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A score at the top of the page and the level that it should reach."""

    name: str
    cell: Cell
    bar: float | None
    note: str


@dataclasses.dataclass(frozen=True)
class Chart:
    """An `<svg>` element, made by `charts`, with a title and a note."""

    title: str
    note: str
    svg: str


@dataclasses.dataclass(frozen=True)
class Differences:
    """Fields in which configs of runs differ: dotted name -> its text in each run."""

    runs: Sequence[str]
    fields: Mapping[str, Sequence[str]]


def facts() -> dict[str, str]:
    """The devices, and the time of the measurement."""
    return {
        "Device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "Measured": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
    }


def as_text(tables_: Sequence[Table]) -> str:
    """The tables as plain text, aligned for a terminal."""
    blocks = []
    for table in tables_:
        lines = [["", *table.columns]]
        lines += [[name, *(cell.text for cell in cells)] for name, cells in table.rows]
        for line in lines if table.remarks else ():
            line.append(table.remarks.get(line[0], ""))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(
                value.ljust(width) for value, width in zip(line, widths, strict=True)
            ).rstrip()
            for line in lines
        ]
        blocks.append("\n".join([table.title, *("  " + line for line in text)]))
    return "\n\n".join(blocks)


def render(
    *,
    title: str,
    facts: Mapping[str, Any],
    figures: Sequence[Figure] = (),
    entries: Sequence[Entry] = (),
    in_columns: bool = False,
    tables: Sequence[Table] = (),
    charts: Sequence[Chart] = (),
    charts_title: str = "Training",
    failures: Sequence[str] = (),
    config: str = "",
    differences: Differences | None = None,
    protocol: Mapping[str, Any] | None = None,
) -> str:
    """Renders the page.

    Args:
      title: heading of the page.
      facts: what ran, on what, when; name -> value.
      figures: the most important scores.
      entries: prompts with their videos, grouped by `Entry.group` in order.
      in_columns: one row per prompt, so that clips of one kind form a column.
      tables, charts: results.
      charts_title: heading above the charts.
      failures: one sentence for each input that could not be used.
      config: resolved text of the run's config.
      differences: between that config and those of other runs.
      protocol: fields of the manifest.
    """
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    script = _TEMPLATES.get_template("page.js").render()
    digest = hashlib.sha256(script.encode()).digest()
    return _TEMPLATES.get_template("report.html").render(
        title=title,
        facts=facts,
        figures=figures,
        entries=groups,
        in_columns=in_columns,
        tables=tables,
        charts=charts,
        charts_title=charts_title,
        failures=failures,
        config=config,
        differences=differences,
        protocol={name: json.dumps(value) for name, value in (protocol or {}).items()},
        script_sha256=base64.b64encode(digest).decode(),
    )
