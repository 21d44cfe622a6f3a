"""One HTML file that shows what a model does: videos, tables, curves, config, protocol.

The file needs no network and no other file: videos are data URIs, charts are SVG, the one
script is inline, and a content security policy forbids everything else, so that a
prompt in it cannot run or fetch anything even if the escaping failed.
"""

import base64
import dataclasses
import datetime
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sora_jax.data import video_io

Raw = str  # HTML that this file made; everything else is escaped on its way in.


@dataclasses.dataclass(frozen=True)
class Clip:
    """One video of an entry.

    Attributes:
      label: what it is, such as "seed 0" or "ground truth".
      mp4: the file's bytes.
      marks: part -> right or wrong, as the oracle reads it; empty where not scored.
      aspect: width / height.
    """

    label: str
    mp4: bytes
    marks: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    aspect: float = 1.0


@dataclasses.dataclass(frozen=True)
class Entry:
    """A prompt and its videos, side by side; wide where they are many or large."""

    prompt: str
    group: str
    clips: Sequence[Clip]
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class Cell:
    """A number, its 95 % interval where it has one, and how it is written.

    Attributes:
      value: None writes a dash.
      low, high: ends of the interval.
      digits: significant digits; None writes a proportion with three decimals.
      bar: draw the value as a bar from 0 to 1.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    digits: int | None = None
    bar: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under named columns; `note` says how to read them.

    `strong` names the rows that the eye should find; `remarks` stand at the end of
    theirs, under the heading that "" has.
    """

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    strong: Sequence[str] = ()
    remarks: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A score at the head of the page and the level it is meant to reach."""

    name: str
    cell: Cell
    bar: float | None
    note: str


@dataclasses.dataclass(frozen=True)
class Chart:
    """A finished `<svg>` (from `curves`) with a title and a note."""

    title: str
    note: str
    svg: Raw


@dataclasses.dataclass(frozen=True)
class Differences:
    """The fields in which configs of runs differ: dotted name -> a text for each run."""

    runs: Sequence[str]
    fields: Mapping[str, Sequence[str]]


def facts() -> dict[str, str]:
    """On what it was measured, and when."""
    return {
        "Device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "Measured": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
    }


def mp4(video_thwc: np.ndarray, fps: float) -> bytes:
    """A uint8 clip as a browser plays it."""
    # Twice the size keeps the colours of single pixels, of which H.264 stores a quarter.
    if video_thwc.shape[1] <= 64:
        video_thwc = video_thwc.repeat(2, axis=1).repeat(2, axis=2)
    return video_io.encode_mp4(video_thwc, fps)


def as_text(tables_: Sequence[Table]) -> str:
    """The tables as plain text, aligned for a terminal."""
    blocks = []
    for table in tables_:
        lines = [["", *table.columns]]
        lines += [[name, *map(_cell_text, cells)] for name, cells in table.rows]
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


def _cell_text(cell: Cell) -> str:
    if cell.value is None:
        return "-"

    def digits(value):
        return f"{value:.3f}" if cell.digits is None else f"{value:.{cell.digits}g}"

    if cell.low is None or cell.high is None:
        return digits(cell.value)
    return f"{digits(cell.value)} ({digits(cell.low)}..{digits(cell.high)})"


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
    """Returns the whole page.

    Args:
      title: heading of the page.
      facts: what ran, on what, when; name -> value.
      figures: the few scores that matter most.
      entries: prompts with their videos, grouped by `Entry.group` in order.
      in_columns: a row of the page for each prompt, equal clips below each other.
      tables, charts: results; `charts_title` stands above the latter.
      failures: one sentence for each input that could not be used.
      config: resolved text of the run's config.
      differences: in what it and the configs of other runs differ.
      protocol: fields of the manifest.
    """
    sections = [
        _section("videos", "Videos", _videos(entries, in_columns)) if entries else "",
        _section("scores", "Scores", "".join(map(_table, tables))) if tables else "",
        _section("charts", charts_title, "".join(map(_chart, charts)))
        if charts
        else "",
        _section("failures", "Not used", _list(failures)) if failures else "",
        _section("protocol", "Protocol", _protocol(protocol)) if protocol else "",
        _section("config", "Config", _differences(differences) + _config(config))
        if config
        else "",
    ]
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; media-src data:; img-src data:; "
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        # Without an icon of its own the browser would ask the network for one.
        '<link rel="icon" href="data:,">'
        f"<title>{_escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<header><h1>{_escape(title)}</h1>{_facts(facts)}</header>"
        f"{_figures(figures)}<main>{''.join(sections)}</main>"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _escape(value: Any) -> Raw:
    return html.escape(str(value), quote=True)


def _section(name: str, title: str, body: Raw) -> Raw:
    return f'<section id="{name}"><h2>{title}</h2>{body}</section>'


def _facts(facts: Mapping[str, Any]) -> Raw:
    pairs = (
        f"<div><dt>{_escape(name)}</dt><dd>{_escape(value)}</dd></div>"
        for name, value in facts.items()
    )
    return f'<dl class="facts">{"".join(pairs)}</dl>'


def _figures(figures: Sequence[Figure]) -> Raw:
    if not figures:
        return ""
    return f'<div class="figures">{"".join(map(_figure, figures))}</div>'


def _figure(figure: Figure) -> Raw:
    value, bar = figure.cell.value, figure.bar
    state, goal = "", ""
    if bar is not None and value is not None:
        state = " met" if value >= bar else " missed"
        goal = f'<i style="left:{100 * bar:.1f}%" title="bar {bar:g}"></i>'
    # What is not known draws no bar.
    width = f"{100 * value:.1f}" if value is not None else "0"
    against = f"bar {bar:g} · " if bar is not None else ""
    return (
        f'<article class="figure{state}"><h3>{_escape(figure.name)}</h3>'
        f"<p><b>{_number(figure.cell)}</b> <small>{_interval(figure.cell)}</small></p>"
        f'<div class="gauge"><span style="width:{width}%"></span>{goal}</div>'
        f"<p><small>{against}{_escape(figure.note)}</small></p></article>"
    )


def _videos(entries: Sequence[Entry], in_columns: bool) -> Raw:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    return "".join(
        f'<h3>{_escape(group)}</h3><div class="entries{" columns" * in_columns}'
        f'{" wide" * any(entry.wide for entry in members)}">'
        + "".join(map(_entry, members))
        + "</div>"
        for group, members in groups.items()
    )


def _entry(entry: Entry) -> Raw:
    clips = "".join(_clip(clip, entry.prompt) for clip in entry.clips)
    return (
        f'<article class="entry"><h4>{_escape(entry.prompt)}</h4>'
        f'<div class="clips">{clips}</div></article>'
    )


def _clip(clip: Clip, prompt: str) -> Raw:
    data = base64.b64encode(clip.mp4).decode()
    marks = "".join(
        f'<span class="{"right" if right else "wrong"}">{"✓" if right else "✗"} '
        f"{_escape(part)}</span>"
        for part, right in clip.marks.items()
    )
    return (
        f'<figure><video data-src="data:video/mp4;base64,{data}" muted loop '
        f'playsinline style="aspect-ratio:{clip.aspect:.4g}" '
        f'aria-label="{_escape(f"{clip.label}: {prompt}")}">'
        f"</video><figcaption>{_escape(clip.label)}<br>{marks}</figcaption></figure>"
    )


def _table(table: Table) -> Raw:
    columns = [*table.columns, *([table.remarks[""]] if table.remarks else [])]
    head = "".join(f'<th scope="col">{_escape(name)}</th>' for name in columns)
    rows = "".join(
        f"<tr{' class=strong' if name in table.strong else ''}>"
        f'<th scope="row">{_escape(name)}</th>{"".join(map(_cell, cells))}'
        + (_remark(table.remarks.get(name, "")) if table.remarks else "")
        + "</tr>"
        for name, cells in table.rows
    )
    return (
        f'<div class="table"><h3>{_escape(table.title)}</h3>'
        f'<p class="note">{_escape(table.note)}</p><div class="scroll"><table>'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div></div>"
    )


def _remark(text: str) -> Raw:
    return f'<td class="remark">{_escape(text)}</td>'


def _cell(cell: Cell) -> Raw:
    if cell.value is None:
        return '<td class="none">–</td>'
    interval = _interval(cell)
    small = f"<small>{interval}</small>" if interval else ""
    style = f' style="--v:{100 * cell.value:.1f}%"' if cell.bar else ""
    return f"<td{' class=bar' if cell.bar else ''}{style}>{_number(cell)}{small}</td>"


def _number(cell: Cell) -> str:
    return "–" if cell.value is None else _digits(cell.value, cell.digits)


def _interval(cell: Cell) -> str:
    if cell.low is None or cell.high is None:
        return ""
    return f"{_digits(cell.low, cell.digits)} … {_digits(cell.high, cell.digits)}"


def _digits(value: float, digits: int | None) -> str:
    text = f"{value:.3f}" if digits is None else f"{value:.{digits}g}"
    return text.replace("-", "\N{MINUS SIGN}")


def _chart(chart: Chart) -> Raw:
    return (
        f'<div class="panel"><h3>{_escape(chart.title)}</h3>'
        f'<p class="note">{_escape(chart.note)}</p>{chart.svg}</div>'
    )


def _list(sentences: Iterable[str]) -> Raw:
    return f"<ul>{''.join(f'<li>{_escape(one)}</li>' for one in sentences)}</ul>"


def _protocol(protocol: Mapping[str, Any]) -> Raw:
    rows = "".join(
        f'<tr><th scope="row">{_escape(name)}</th>'
        f"<td><code>{_escape(json.dumps(value))}</code></td></tr>"
        for name, value in protocol.items()
    )
    return (
        '<p class="note">Results are comparable where all of this is equal.</p>'
        f'<div class="scroll"><table class="protocol"><tbody>{rows}</tbody></table></div>'
    )


def _differences(found: Differences | None) -> Raw:
    if found is None:
        return ""
    head = "".join(f'<th scope="col">{_escape(run)}</th>' for run in found.runs)
    rows = "".join(
        f'<tr><th scope="row"><code>{_escape(name)}</code></th>'
        + "".join(f"<td><code>{_escape(value)}</code></td>" for value in values)
        + "</tr>"
        for name, values in found.fields.items()
    )
    return (
        '<div class="table"><h3>Differences of config</h3>'
        f'<p class="note">Fields that differ: {len(found.fields)}.</p>'
        f'<div class="scroll"><table class="protocol"><thead><tr><th></th>{head}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div></div>"
    )


def _config(config: str) -> Raw:
    return f"<details><summary>Resolved config</summary><pre>{_escape(config)}</pre></details>"


# Browsers refuse more than some 75 players on a page, so a video has its data only while
# it is near the view. How many have played is left on the root element, where a test (or
# a person) can read it.
_SCRIPT = """
const root = document.documentElement;
const videos = document.querySelectorAll("video");
const played = new Set();
const count = () => {
  root.dataset.videos = videos.length;
  root.dataset.ready = played.size;
};
const watcher = new IntersectionObserver((seen) => {
  for (const {target: video, isIntersecting} of seen) {
    if (isIntersecting) {
      video.src = video.dataset.src;
      video.play().catch(() => {});
    } else if (video.src) {
      video.removeAttribute("src");
      video.load();
    }
  }
}, {rootMargin: "300px"});
for (const video of videos) {
  video.addEventListener("loadeddata", () => { played.add(video); count(); });
  watcher.observe(video);
}
count();
"""

_STYLE = """
:root { --bg: #fbfaf8; --card: #fff; --ink: #1c1b1a; --soft: #6d6a66; --line: #e4e0da;
  --fill: #9db9e8; --good: #157347; --bad: #b3261e; --accent: #2f5fb3; }
@media (prefers-color-scheme: dark) { :root { --bg: #151517; --card: #1e1e21;
  --ink: #ecebe8; --soft: #a09d98; --line: #333338; --fill: #45628f; --good: #58c98c;
  --bad: #ff8a80; --accent: #8ab0f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 40px 28px 80px; background: var(--bg);
  color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 16px; letter-spacing: -.02em; }
h2 { font-size: 21px; margin: 52px 0 14px; letter-spacing: -.01em; }
h3 { font-size: 15px; margin: 26px 0 6px; }
h4 { font-size: 14px; font-weight: 550; margin: 0 0 10px; overflow-wrap: anywhere; }
small, .note, figcaption { color: var(--soft); }
.note { margin: 0 0 10px; font-size: 13.5px; max-width: 78ch; }
.facts { display: flex; flex-wrap: wrap; gap: 6px 30px; margin: 0; }
.facts dt { color: var(--soft); font-size: 12px; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(215px, 1fr));
  gap: 14px; margin-top: 30px; }
.figure, .entry, .panel, .table { background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; padding: 16px 18px; }
.figure h3 { margin: 0; font-weight: 550; color: var(--soft); font-size: 13.5px; }
.figure p { margin: 4px 0; }
.figure b { font-size: 28px; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.met b { color: var(--good); } .missed b { color: var(--bad); }
.gauge { position: relative; height: 6px; border-radius: 3px; background: var(--line);
  margin: 6px 0 10px; }
.gauge span { position: absolute; inset: 0 auto 0 0; border-radius: 3px;
  background: var(--accent); }
.gauge i { position: absolute; top: -3px; bottom: -3px; width: 2px; background: var(--ink); }
.entries { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr));
  gap: 14px; }
.entries.wide { grid-template-columns:
  repeat(auto-fill, minmax(min(480px, 100%), 1fr)); }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(88px, 1fr));
  gap: 12px; }
.wide .clips { grid-template-columns: repeat(auto-fill, minmax(136px, 1fr)); }
figure { margin: 0; } figcaption { overflow-wrap: anywhere; font-size: 12px; line-height: 1.45; margin-top: 4px; }
.columns { grid-template-columns: minmax(0, 1fr); }
.columns .clips { grid-template-columns: none; grid-auto-flow: column;
  grid-auto-columns: minmax(76px, 128px); overflow-x: auto; }
video { display: block; width: 100%; image-rendering: pixelated;
  border-radius: 6px; background: var(--line); }
.right, .wrong { display: inline-block; margin-right: 7px; white-space: nowrap; }
.right { color: var(--good); } .wrong { color: var(--bad); }
.table, .panel { margin-bottom: 14px; } .table h3, .panel h3 { margin-top: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 6px 12px 6px 8px; text-align: left; border-top: 1px solid var(--line);
  vertical-align: top; white-space: nowrap; }
thead th { border-top: 0; color: var(--soft); font-weight: 500; font-size: 12.5px;
  vertical-align: bottom; }
tbody th { font-weight: 450; white-space: normal; min-width: 13em; }
td small { display: block; font-size: 11.5px; }
.strong th, .strong td { font-weight: 650; } .strong small { font-weight: 400; }
.bar { background: linear-gradient(90deg, var(--fill) var(--v), transparent 0)
  no-repeat 8px bottom / calc(100% - 20px) 3px; }
.none { color: var(--soft); }
.remark { color: var(--soft); font-size: 13px; white-space: normal; min-width: 15em; }
.protocol td, .protocol th { white-space: normal; overflow-wrap: anywhere; }
code, pre { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 16px; overflow-x: auto; }
summary { cursor: pointer; }
.chart { display: block; width: 100%; height: auto; }
.chart text { fill: var(--soft); font-size: 12px; } .chart .end { fill: var(--ink); }
.chart .grid { stroke: var(--line); } .chart .axis { stroke: var(--soft); }
.chart .line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.chart .band { fill: var(--c); opacity: .16; }
.chart .lead { stroke: var(--line); fill: none; }
@media print { .entry, .panel, .table { break-inside: avoid; } }
"""
