"""Charts as SVG text, for reports that need no script and no library.

Letters: n points of a series.
"""

import dataclasses
import html
import math
import types
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

Series = tuple[Sequence[float], Sequence[float | None]]

_WIDTH, _HEIGHT = 760, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 132, 16, 46
_MAX_POINTS = 160
_LABEL_GAP = 15


@dataclasses.dataclass(frozen=True)
class _Scale:
    """Maps values to pixels, linearly or in the logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high, value = (
            map(math.log10, (self.low, self.high, value))
            if self.log
            else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def line_chart(
    series: Mapping[str, Series],
    *,
    label: str,
    x_label: str,
    y_label: str,
    log_y: bool,
    bands: Mapping[str, tuple[Series, Series]] = types.MappingProxyType({}),
) -> str:
    """Draws one line a series, named at its right end, as an `<svg>` element.

    Long series are shown as means over equal stretches of steps (in the logarithm where
    the scale is logarithmic), so that noise does not hide the course. Values that
    are None, not finite, or not positive on a logarithmic scale leave a gap.

    Args:
      series: name -> (x, y); the order gives the colours, from dark to light.
      label: what the chart shows, for readers that do not see it.
      x_label, y_label: names of the axes, with units.
      log_y: whether y is logarithmic.
      bands: name of a series -> its interval's lower and upper end, as series.

    Raises:
      ValueError: no series holds a point that can be drawn.
    """
    lines = {name: _binned(*points, log_y) for name, points in series.items()}
    lines = {name: line for name, line in lines.items() if len(line[0])}
    if not lines:
        raise ValueError(f"the chart {label!r} has no point that can be drawn")
    ends = {
        name: tuple(_binned(*end, log_y) for end in bands[name])
        for name in lines
        if name in bands
    }
    drawn = [*lines.values(), *(end for pair in ends.values() for end in pair)]
    x_all, y_all = (np.concatenate(values) for values in zip(*drawn, strict=True))
    x_scale = _Scale(*_padded(x_all, 0, False), _LEFT, _WIDTH - _RIGHT, False)
    y_scale = _Scale(*_padded(y_all, 0.06, log_y), _HEIGHT - _BOTTOM, _TOP, log_y)
    body = [
        *_grid_y(y_scale),
        *_grid_x(x_scale),
        *_axis_labels(x_label, y_label),
        *_bands(ends, [*lines], x_scale, y_scale),
        *_lines(lines, x_scale, y_scale),
    ]
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{html.escape(label)}">' + "".join(body) + "</svg>"
    )


_STRIP_HEIGHT, _STRIP_LEFT = 56, 108


def strip_chart(groups: Mapping[str, Sequence[float]], *, label: str) -> str:
    """Draws a dot for each value, a strip a group, and each group's mean as a bar.

    Dots that would lie on each other are moved apart by their order, never at random.

    Args:
      groups: name -> values; the order gives the colours, from dark to light.
      label: what the chart shows, and the name of its axis.

    Raises:
      ValueError: there is no value, or one is not finite.
    """
    values = np.array([x for of in groups.values() for x in of], np.float64)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"the chart {label!r} needs finite values, and one at least")
    scale = _Scale(*_padded(values, 0.03, False), _STRIP_LEFT, _WIDTH - 24, False)
    bottom = _TOP + _STRIP_HEIGHT * len(groups)
    body = [
        f'<line class="axis" x1="{_STRIP_LEFT}" x2="{_WIDTH - 24}" y1="{bottom}" '
        f'y2="{bottom}"/>'
    ]
    for tick in _ticks(scale):
        x = scale(tick)
        body.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>'
            f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick:,.6g}</text>'
        )
    middle = (_STRIP_LEFT + _WIDTH - 24) / 2
    body.append(
        f'<text class="name" x="{middle}" y="{bottom + 36}" text-anchor="middle">'
        f"{html.escape(label)}</text>"
    )
    for number, (name, of) in enumerate(groups.items()):
        y, colour = _TOP + _STRIP_HEIGHT * (number + 0.5), _colour(number, len(groups))
        body.append(
            f'<text class="end" x="{_STRIP_LEFT - 10}" y="{y + 4}" text-anchor="end">'
            f"{html.escape(name)}</text>"
        )
        for rank, value in enumerate(sorted(of)):
            # Parts of the golden ratio never line up.
            away = (rank * 0.618034 % 1 - 0.5) * (_STRIP_HEIGHT - 22)
            body.append(
                f'<circle cx="{scale(value):.1f}" cy="{y + away:.1f}" r="3" '
                f'style="fill:{colour};fill-opacity:.55"/>'
            )
        if len(of):
            x = scale(float(np.mean(of)))
            body.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 22}" y2="{y + 22}" '
                f'style="stroke:{colour};stroke-width:3"><title>mean</title></line>'
            )
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {bottom + 44}" role="img" '
        f'aria-label="{html.escape(label)}">' + "".join(body) + "</svg>"
    )


def _binned(x_n, y_n, log: bool) -> tuple[np.ndarray, np.ndarray]:
    x_n = np.asarray(x_n, np.float64)
    y_n = np.array([math.nan if y is None else y for y in y_n], np.float64)
    drawable = np.isfinite(y_n) & ((y_n > 0) if log else True)
    x_n, y_n = x_n[drawable], y_n[drawable]
    if len(x_n) <= _MAX_POINTS:
        return x_n, y_n
    y_n = np.log(y_n) if log else y_n
    starts = np.arange(0, len(x_n), math.ceil(len(x_n) / _MAX_POINTS))
    counts = np.diff(np.append(starts, len(x_n)))
    x_bins, y_bins = (np.add.reduceat(values, starts) / counts for values in (x_n, y_n))
    return x_bins, np.exp(y_bins) if log else y_bins


def _padded(values: np.ndarray, share: float, log: bool) -> tuple[float, float]:
    """The range of the values and a little more, never empty."""
    low, high = float(values.min()), float(values.max())
    if log:
        room = (high / low) ** share if high > low else 1.5
        return low / room, high * room
    room = (high - low) * share if high > low else max(abs(high), 1.0) * 0.5
    return low - room, high + room


def _ticks(scale: _Scale) -> list[float]:
    """Round values inside the range: 1, 2, 5 times powers of ten."""
    if scale.log:
        decades = math.log10(scale.high / scale.low)
        digits = (1, 2, 5) if decades < 3 else (1,)
        first, last = (
            math.floor(math.log10(scale.low)),
            math.ceil(math.log10(scale.high)),
        )
        ticks = [d * 10.0**power for power in range(first, last) for d in digits]
        inside = [tick for tick in ticks if scale.low <= tick <= scale.high]
        if len(inside) >= 2:
            return inside
    rough = (scale.high - scale.low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(d * power for d in (1, 2, 5, 10) if d * power >= rough)
    first = math.ceil(scale.low / step - 1e-9)
    last = math.floor(scale.high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _grid_y(scale: _Scale) -> Iterable[str]:
    for tick in _ticks(scale):
        y = scale(tick)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'


def _grid_x(scale: _Scale) -> Iterable[str]:
    bottom = _HEIGHT - _BOTTOM
    yield f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>'
    for tick in _ticks(scale):
        x = scale(tick)
        yield f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 19}" text-anchor="middle">{tick:,.6g}</text>'


def _axis_labels(x_label: str, y_label: str) -> Iterable[str]:
    x, y = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
    yield (
        f'<text class="name" x="{x}" y="{_HEIGHT - 6}" text-anchor="middle">'
        f"{html.escape(x_label)}</text>"
    )
    yield (
        f'<text class="name" transform="translate(14 {y}) rotate(-90)" '
        f'text-anchor="middle">{html.escape(y_label)}</text>'
    )


def _bands(ends, names, x_scale: _Scale, y_scale: _Scale) -> Iterable[str]:
    for name, ((x_low, low), (x_high, high)) in ends.items():
        colour = _colour(names.index(name), len(names))
        x, y = np.append(x_low, x_high[::-1]), np.append(low, high[::-1])
        yield f'<polygon class="band" points="{_points(x, y, x_scale, y_scale)}" style="--c:{colour}"/>'


def _points(x_n, y_n, x_scale: _Scale, y_scale: _Scale) -> str:
    pairs = zip(x_n, y_n, strict=True)
    return " ".join(f"{x_scale(x):.1f},{y_scale(y):.1f}" for x, y in pairs)


def _lines(lines, x_scale: _Scale, y_scale: _Scale) -> Iterable[str]:
    ends = {name: y_scale(y[-1]) for name, (_, y) in lines.items()}
    places = _spread(ends)
    for number, (name, (x, y)) in enumerate(lines.items()):
        colour = _colour(number, len(lines))
        points = _points(x, y, x_scale, y_scale)
        escaped = html.escape(name)
        yield f'<polyline class="line" points="{points}" style="--c:{colour}"><title>{escaped}</title></polyline>'
        end_x, text_x = x_scale(x[-1]), _WIDTH - _RIGHT + 16
        yield f'<circle cx="{end_x:.1f}" cy="{ends[name]:.1f}" r="3" style="fill:{colour}"/>'
        yield (
            f'<path class="lead" d="M{end_x + 4:.1f} {ends[name]:.1f}L{text_x - 3} '
            f'{places[name]:.1f}"/><text class="end" x="{text_x}" '
            f'y="{places[name] + 4:.1f}">{escaped}</text>'
        )


def _spread(ends: Mapping[str, float]) -> dict[str, float]:
    """Moves names apart that would lie on each other, keeping their order."""
    order = sorted(ends, key=lambda name: ends[name])
    places: dict[str, float] = {}
    lowest = -math.inf
    for name in order:
        lowest = max(ends[name], lowest + _LABEL_GAP)
        places[name] = lowest
    # What was pushed out at the bottom comes back up.
    highest = _HEIGHT - 12.0
    for name in reversed(order):
        places[name] = highest = min(places[name], highest)
        highest -= _LABEL_GAP
    return places


def _colour(number: int, count: int) -> str:
    """Steps of one perceptual path, blue to orange: order is readable, also in grey."""
    share = number / max(count - 1, 1)
    hue, lightness = 265 - 215 * share, 0.52 + 0.2 * share
    return f"oklch({lightness:.2f} 0.15 {hue:.0f})"
