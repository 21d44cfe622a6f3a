"""Reports a sweep: one table, and quality against cost with the Pareto front."""

import dataclasses
import datetime
import difflib
import json
import pathlib
from collections.abc import Mapping, Sequence

from experiments.sweeping import index as indices
from experiments.sweeping import points, runner
from sora_jax.core import digests, paths
from sora_jax.diffusion import samplers
from sora_jax.evals import protocol, statistics
from sora_jax.evals.html import charts, page
from sora_jax.evals.prompts import samples, scoring
from sora_jax.training import metrics

MARK = "●"  # of a point on the Pareto front


@dataclasses.dataclass(frozen=True)
class Measured:
    """A finished point and its scores.

    Attributes:
      entry: the point.
      measures: name -> value with its 95 % interval, where it has one.
      protocol: fields of the manifest; empty for training without evaluation.
    """

    entry: indices.Entry
    measures: Mapping[str, statistics.Estimate]
    protocol: Mapping[str, object]


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of the table."""

    measured: Measured
    cost: float
    quality: statistics.Estimate
    on_front: bool


def measure(entry: indices.Entry) -> Measured:
    """Reads the scores of a finished point.

    Shares are pooled over seeds, with Wilson's interval: a prompt with n seeds counts as
    n clips. Other measures are means over seeds, and their interval reaches from the
    lowest end to the highest.

    Raises:
      ValueError: the digest is not that of the protocol.
    """
    file = entry.folder / runner.SCORES
    if not file.is_file():
        rows = metrics.read(entry.folder / "run" / "metrics.jsonl")
        last = {
            n: v for row in rows for n, v in row.items() if isinstance(v, int | float)
        }
        return Measured(entry, {n: statistics.Estimate(v) for n, v in last.items()}, {})
    scores = json.loads(digests.read(file, required=False))
    if protocol.digest(scores["protocol"]) != scores["digest"]:
        raise ValueError(f"{file}: its digest is not that of its protocol")
    rows = [
        row
        for name, row in scores["rows"].items()
        if name == scoring.MODEL or name.startswith(f"{scoring.MODEL}, seed")
    ]
    parts = {
        f"{s}/{p}": (s, p) for r in rows for s, v in r["suites"].items() for p in v
    }
    shares = {
        name: _pooled([row["suites"][suite][part] for row in rows])
        for name, (suite, part) in parts.items()
    }
    looks = {n: _mean([row["look"][n] for row in rows]) for n in rows[0]["look"]}
    return Measured(entry, shares | looks, scores["protocol"])


def _pooled(shares: Sequence[Mapping]) -> statistics.Estimate:
    right = sum(share["right"] for share in shares)
    count = sum(share["count"] for share in shares)
    return statistics.proportion(right, count)


def _mean(estimates: Sequence[Mapping]) -> statistics.Estimate:
    value = sum(one["value"] for one in estimates) / len(estimates)
    if any(one["low"] is None for one in estimates):
        return statistics.Estimate(value)
    low, high = min(e["low"] for e in estimates), max(e["high"] for e in estimates)
    return statistics.Estimate(value, low, high)


def differing(found: Sequence[Measured], varied: Sequence[str]) -> list[str]:
    """The fields in which the protocols differ, all of them on purpose.

    How clips are made may differ, and the seeds where the sweep varies them.

    Args:
      found: the finished points.
      varied: keys that the sweep varies.

    Raises:
      protocol.UnequalProtocols: another field differs, so the points cannot be compared;
        the message names the field and the points.
    """
    allowed = {*samples.MAKING, *(key.removeprefix("evaluate.") for key in varied)}
    fields = {name for one in found for name in one.protocol}
    differ = []
    for name in sorted(fields):
        first = found[0]
        for other in found[1:]:
            a, b = first.protocol.get(name), other.protocol.get(name)
            if a == b:
                continue
            if name not in allowed:
                raise protocol.UnequalProtocols(
                    f"the points cannot be compared: {name} of {first.entry.id} "
                    f"({first.entry.name}) is {a!r}, of {other.entry.id} "
                    f"({other.entry.name}) it is {b!r}"
                )
            differ.append(name)
            break
    return differ


def cost_of(one: Measured, what: str) -> float:
    """The cost of a point: network evaluations per clip, seconds, or a setting.

    Raises:
      ValueError: the point has no such cost.
    """
    if what == "seconds":
        return one.entry.seconds
    if what == "evaluations":
        if not one.protocol:
            raise ValueError("a sweep of training runs alone has no cost 'evaluations'")
        made = one.protocol
        if made.get("step_cache"):
            raise ValueError(
                "a step cache skips evaluations, which are not counted; use the cost "
                "'seconds'"
            )
        once = samplers.evaluations(made["sampler"], made["num_inference_steps"])
        return float(once * (1 if made["guidance_scale"] == 1 else 2))
    value = one.entry.settings.get(what)
    if not isinstance(value, int | float):
        raise ValueError(
            f"the cost must be 'evaluations', 'seconds' or a setting that is a number in "
            f"all points; {what!r} is {value!r} in {one.entry.name}"
        )
    return float(value)


def quality_of(one: Measured, name: str) -> statistics.Estimate:
    """A measure of a point.

    Raises:
      ValueError: the point has no such measure; the message names the nearest.
    """
    if name in one.measures:
        return one.measures[name]
    near = difflib.get_close_matches(name, one.measures, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {[*one.measures]}"
    raise ValueError(f"{one.entry.name} has no measure {name!r}; {hint}")


def pareto(
    found: Sequence[tuple[float, float]], *, lower_is_better: bool = False
) -> list[bool]:
    """Whether each (cost, quality) is on the Pareto front."""
    sign = -1 if lower_is_better else 1
    order = sorted(range(len(found)), key=lambda i: (found[i][0], -sign * found[i][1]))
    best, marks = None, [False] * len(found)
    for i in order:
        cost, quality = found[i][0], sign * found[i][1]
        # A point equal to one on the front is on it too.
        if best is None or quality > best[1] or (cost, quality) == best:
            best, marks[i] = (cost, quality), True
    return marks


def lines(found: Sequence[Measured], sweep: points.Sweep) -> list[Line]:
    """The rows of the table, in the order of the sweep.

    Raises:
      ValueError: see `cost_of` and `quality_of`.
    """
    costs = [cost_of(one, sweep.cost) for one in found]
    qualities = [quality_of(one, sweep.quality) for one in found]
    pairs = [(cost, q.value) for cost, q in zip(costs, qualities, strict=True)]
    front = pareto(pairs, lower_is_better=sweep.lower_is_better)
    return [*map(Line, found, costs, qualities, front)]


def write(
    out: pathlib.Path,
    sweep: points.Sweep,
    index: indices.Index,
    facts: Mapping[str, object],
) -> str:
    """Writes table.md, table.json and report.html; returns the table as text.

    Args:
      out: the sweep's folder.
      sweep: the request.
      index: the points; at least one has finished.
      facts: name -> value, for the head of the table and the report.

    Raises:
      ValueError: the points cannot be compared, or lack the quality or the cost.
    """
    found = [measure(entry) for entry in index.in_state(indices.FINISHED)]
    differ = differing(found, sweep.varied)
    rows = lines(found, sweep)
    missing = [
        f"{entry.name or entry.id}: {runner.describe(entry)}"
        for entry in index.entries
        if entry.state != indices.FINISHED
    ]
    direction = "lower" if sweep.lower_is_better else "higher"
    facts = dict(facts) | {
        "Written": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        "Quality": f"{sweep.quality}, {direction} is better, with its 95 % interval",
        "Cost": _cost_name(sweep.cost),
        "Points": f"{len(found)} of {len(index.entries)} finished",
        "Protocols differ in": ", ".join(differ) or "nothing",
    }
    text = markdown(rows, sweep, facts, missing)
    paths.write_atomically(out / "table.md", text)
    common = {n: v for n, v in found[0].protocol.items() if n not in differ}
    content = {
        "facts": {name: str(value) for name, value in facts.items()},
        "quality": sweep.quality,
        "lower_is_better": sweep.lower_is_better,
        "cost": sweep.cost,
        "protocol": common,
        "differs": differ,
        "rows": [_json(row) for row in rows],
        "missing": missing,
    }
    paths.write_atomically(out / "table.json", json.dumps(content, indent=1) + "\n")
    html = page.render(
        title=f"{out.resolve().name}: a sweep",
        facts=facts,
        tables=[table(rows, sweep)],
        charts=[chart(rows, sweep)],
        charts_title="Quality against cost",
        failures=missing,
        protocol=common,
    )
    paths.write_atomically(out / "report.html", html)
    return text


def _json(row: Line) -> dict:
    entry = row.measured.entry
    return {
        "id": entry.id,
        "name": entry.name,
        "settings": entry.settings,
        "cost": row.cost,
        "seconds": entry.seconds,
        "quality": row.quality.to_json(),
        "pareto": row.on_front,
        "measures": {n: e.to_json() for n, e in row.measured.measures.items()},
        "protocol": row.measured.protocol,
        "folder": str(entry.folder),
    }


def _cost_name(cost: str) -> str:
    names = {
        "evaluations": "network evaluations per clip",
        "seconds": "seconds from start to end of the point's jobs",
    }
    return names.get(cost, cost)


def markdown(
    rows: Sequence[Line],
    sweep: points.Sweep,
    facts: Mapping[str, object],
    missing: Sequence[str],
) -> str:
    """The table with its facts and the points that are missing, as Markdown."""
    keys = [key for key in sweep.varied if key not in (sweep.cost,)]
    columns = [c for c in sweep.columns if any(c in r.measured.measures for r in rows)]
    head = [*keys, sweep.cost, sweep.quality, *columns, "seconds", "Pareto"]
    if sweep.cost == "seconds":
        head.remove("seconds")
    body = []
    for row in rows:
        entry, measures = row.measured.entry, row.measured.measures
        cells = [str(entry.settings.get(key, "")) for key in keys]
        cells += [f"{row.cost:.6g}", _interval(row.quality)]
        cells += [_interval(measures[c]) if c in measures else "" for c in columns]
        cells += [] if sweep.cost == "seconds" else [f"{entry.seconds:.1f}"]
        body.append([*cells, MARK if row.on_front else ""])
    table_ = [head, ["---"] * len(head), *body]
    text = [f"- {name}: {value}" for name, value in facts.items()]
    text += ["", *(f"| {' | '.join(line)} |" for line in table_)]
    text += [""] * bool(missing) + [f"- not in the table: {one}" for one in missing]
    return "\n".join(text) + "\n"


def _interval(estimate: statistics.Estimate) -> str:
    text = f"{estimate.value:.3f}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ({estimate.low:.3f}-{estimate.high:.3f})"


def table(rows: Sequence[Line], sweep: points.Sweep) -> page.Table:
    """The same for a report, with the points of the front in bold."""
    columns = [c for c in sweep.columns if any(c in r.measured.measures for r in rows)]
    cells = [
        (
            row.measured.entry.name,
            [
                page.Cell(row.cost, digits=6),
                page.Cell.of(row.quality),
                *(page.Cell.of(row.measured.measures.get(c)) for c in columns),
                page.Cell(row.measured.entry.seconds, digits=4),
            ],
        )
        for row in rows
    ]
    return page.Table(
        "All points",
        "Bold: the Pareto front; no other point is better in quality or cost without being "
        "worse in the other. It is computed from the values alone; where intervals overlap, "
        "another sample might give another front.",
        [_cost_name(sweep.cost), sweep.quality, *columns, "seconds"],
        cells,
        [row.measured.entry.name for row in rows if row.on_front],
    )


def chart(rows: Sequence[Line], sweep: points.Sweep) -> page.Chart:
    """Every point with its interval as a vertical line, and the Pareto front."""
    front = sorted((row.cost, row.quality.value) for row in rows if row.on_front)
    series = {"Pareto front": tuple(zip(*front, strict=True))}
    for number, row in enumerate(rows, 1):
        value, low, high = row.quality.value, row.quality.low, row.quality.high
        ends = [] if low is None or high is None else [low, high]
        settings = row.measured.entry.settings
        name = ", ".join(str(settings[key]) for key in sweep.varied if key in settings)
        # The line ends at the value, where the chart draws its dot.
        series[f"{number}: {name}"] = [row.cost] * (len(ends) + 1), [*ends, value]
    svg = charts.line_chart(
        series,
        label=f"{sweep.quality} against {_cost_name(sweep.cost)}",
        x_label=_cost_name(sweep.cost),
        y_label=sweep.quality,
        log_y=False,
    )
    note = f"Points are named by row number and {', '.join(sweep.varied)}."
    return page.Chart(f"{sweep.quality} against {sweep.cost}", note, svg)
