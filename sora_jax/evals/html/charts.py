"""Line, strip and histogram charts as inline SVG, drawn by matplotlib.

The SVG has no ids, scripts or references, so any number of charts can share a page; its
colours of text, grid and axes come from the page's style sheet, which finds them by class.

Letters: n points of a series.
"""

import io
import math
import re
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from xml.etree import ElementTree

import numpy as np

Series = tuple[Sequence[float], Sequence[float | None]]

_WIDTH, _HEIGHT = 760, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 132, 16, 46
_STRIP_HEIGHT, _STRIP_LEFT, _STRIP_RIGHT = 56, 108, 24
_DOT_RADIUS = 3
_BINS = 40
_MAX_POINTS = 160
_LABEL_GAP = 15
# Blue to orange along a perceptual path, so that the order is readable, also in grey.
_COLOURS = ("#3d63be", "#0080b7", "#009695", "#00a061", "#829d1a", "#c39200", "#ee8545")
_SETTINGS = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a $ in a name is a $
    "font.family": "DejaVu Sans",  # for its measures; the page has its own font
    "path.simplify": False,
    "font.size": 12,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.xmargin": 0,
    "axes.ymargin": 0.06,
    "xtick.bottom": False,
    "ytick.left": False,
    "xtick.major.pad": 6,
    "ytick.major.pad": 6,
    "lines.markersize": 2 * _DOT_RADIUS,
    "lines.markeredgewidth": 0,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "butt",
}


def line_chart(
    series: Mapping[str, Series],
    *,
    label: str,
    x_label: str,
    y_label: str,
    log_y: bool,
    bands: Mapping[str, tuple[Series, Series]] = types.MappingProxyType({}),
) -> str:
    """Draws one line per series, named at its right end, as an `<svg>` element.

    Long series are shown as means over equal numbers of points (of the logarithm where
    the scale is logarithmic), so that noise does not hide the trend. Values that are
    None, not finite, or not positive on a logarithmic scale are left out.

    Args:
      series: name -> (x, y); the order gives the colours, from blue to orange.
      label: what the chart shows, for screen readers.
      x_label, y_label: names of the axes, with units.
      log_y: whether y is logarithmic.
      bands: name of a series -> the lower and upper end of its interval, as series.

    Raises:
      ValueError: no series holds a point that can be drawn.
    """
    lines = {name: _binned(*points, log_y) for name, points in series.items()}
    lines = {name: line for name, line in lines.items() if len(line[0])}
    if not lines:
        raise ValueError(f"the chart {label!r} has no point that can be drawn")

    def draw(axes) -> None:
        colours = _colours(len(lines))
        for (name, (x_n, y_n)), colour in zip(lines.items(), colours, strict=True):
            if name in bands:
                (x_low, low), (x_high, high) = (
                    _binned(*end, log_y) for end in bands[name]
                )
                x, y = np.append(x_low, x_high[::-1]), np.append(low, high[::-1])
                axes.fill(x, y, color=colour, alpha=0.16, linewidth=0, gid=".band")
            axes.plot(
                x_n, y_n, color=colour, marker="o", markevery=[-1], gid=f".line {name}"
            )
        axes.set_xlabel(x_label, labelpad=10)
        axes.set_ylabel(y_label, rotation_mode="anchor")
        axes.yaxis.set_label_coords(14 / _WIDTH, 0.5, axes.get_figure().transFigure)
        axes.locator_params(nbins=5, steps=[1, 2, 5, 10])
        if log_y:
            axes.set_yscale("log")
            axes.set_yticks(_log_ticks(*axes.get_ylim()))
            axes.minorticks_off()
        axes.xaxis.set_major_formatter("{x:,.7g}")
        axes.yaxis.set_major_formatter("{x:g}")
        _name_lines(axes, lines)

    return _svg(label, _HEIGHT, (_LEFT, _RIGHT, _TOP, _BOTTOM), draw)


def strip_chart(groups: Mapping[str, Sequence[float]], *, label: str) -> str:
    """Draws a dot for each value, one strip per group, and each group's mean as a bar.

    Overlapping dots are moved apart by their rank, never at random.

    Args:
      groups: name -> values; the order gives the colours, from blue to orange.
      label: what the chart shows; also the name of its axis.

    Raises:
      ValueError: there are no values, or one is not finite.
    """
    values = np.array([x for of in groups.values() for x in of], np.float64)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"the chart {label!r} needs finite values, and one at least")

    def draw(axes) -> None:
        colours = _colours(len(groups))
        for y, (of, colour) in enumerate(zip(groups.values(), colours, strict=True)):
            # Multiples of the golden ratio, modulo 1, never line up.
            away_n = np.arange(len(of)) * 0.618034 % 1 - 0.5
            y_n = y + away_n * (1 - 22 / _STRIP_HEIGHT)
            axes.plot(sorted(of), y_n, "o", color=colour, alpha=0.55, gid=".dots")
            if len(of):
                x, half = np.mean(of), 22 / _STRIP_HEIGHT
                ends = [x, x], [y - half, y + half]
                axes.plot(*ends, color=colour, linewidth=3, gid=".mean mean")

    return _strips(groups, label, draw)


def histogram(
    groups: Mapping[str, Sequence[float]], *, label: str, marks: Sequence[float] = ()
) -> str:
    """Draws how the values of each group are distributed, one histogram above another.

    All have the same bins; the highest bar of each is as high as its strip.

    Args:
      groups: name -> values; the order gives the colours, from blue to orange.
      label: what the chart shows; also the name of its axis.
      marks: values at which a line is drawn through all strips, such as limits.

    Raises:
      ValueError: there are no values, or one is not finite.
    """
    values = np.array([x for of in groups.values() for x in of], np.float64)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"the chart {label!r} needs finite values, and one at least")
    edges = np.histogram_bin_edges(np.append(values, marks), _BINS)

    def draw(axes) -> None:
        colours = _colours(len(groups))
        for y, (of, colour) in enumerate(zip(groups.values(), colours, strict=True)):
            counts, _ = np.histogram(of, edges)
            heights = 0.84 * counts / max(1, counts.max())
            floor = y + 0.42
            axes.stairs(
                floor - heights, edges, baseline=floor, fill=True, color=colour,
                gid=".bars",
            )  # fmt: skip
        for mark in marks:
            ends = [mark, mark], [-0.5, len(groups) - 0.5]
            axes.plot(*ends, color="#c0392b", linewidth=1.5, gid=f".mark {mark:g}")

    return _strips(groups, label, draw)


def _strips(
    groups: Mapping[str, Sequence[float]], label: str, draw: Callable[..., None]
) -> str:
    """Returns a figure with a strip for each group, which `draw` fills."""

    def draw_all(axes) -> None:
        draw(axes)
        axes.margins(x=0.03)
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_yticks(range(len(groups)), groups)
        axes.grid(visible=False, axis="y")
        axes.locator_params("x", nbins=5, steps=[1, 2, 5, 10])
        axes.xaxis.set_major_formatter("{x:,.7g}")
        axes.set_xlabel(label, labelpad=6)
        for name in axes.get_yticklabels():
            name.set_gid(".end")

    bottom = 44
    height = _TOP + _STRIP_HEIGHT * len(groups) + bottom
    return _svg(label, height, (_STRIP_LEFT, _STRIP_RIGHT, _TOP, bottom), draw_all)


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


def _colours(count: int) -> np.ndarray:
    from matplotlib import colors

    path = colors.LinearSegmentedColormap.from_list("path", _COLOURS)
    return path(np.linspace(0, 1, count))


def _log_ticks(low: float, high: float) -> np.ndarray:
    """1, 2, 5 times powers of ten; equal steps where the range holds fewer than two."""
    from matplotlib import ticker

    subs = (1, 2, 5) if high < 1000 * low else (1,)
    ticks = ticker.LogLocator(subs=subs).tick_values(low, high)
    ticks = ticks[(low <= ticks) & (ticks <= high)]
    if len(ticks) < 2:
        ticks = ticker.MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)
    return ticks[(low <= ticks) & (ticks <= high)]


def _name_lines(axes, lines: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Writes the names right of the axes, moved apart where they would overlap."""
    axes.autoscale_view()
    last = np.array([(x_n[-1], y_n[-1]) for x_n, y_n in lines.values()])
    ends = _HEIGHT - axes.transData.transform(last)[:, 1]
    order = np.argsort(ends, kind="stable")
    places, lowest = ends.copy(), -math.inf
    for i in order:
        places[i] = lowest = max(ends[i], lowest + _LABEL_GAP)
    # Names that were pushed below the chart move up again.
    highest = _HEIGHT - 12.0
    for i in order[::-1]:
        places[i] = min(places[i], highest)
        highest = places[i] - _LABEL_GAP
    for name, end, place in zip(lines, last, places, strict=True):
        axes.annotate(
            name,
            end,
            (_WIDTH - _RIGHT + 16, _HEIGHT - place),
            textcoords="figure points",
            va="center",
            gid=".end",
            arrowprops={"arrowstyle": "-", "shrinkA": 3, "shrinkB": 4, "gid": ".lead"},
        )


def _svg(
    label: str,
    height: int,
    margins: tuple[int, int, int, int],
    draw: Callable[..., None],
) -> str:
    """Returns a figure whose axes `draw` fills; margins: left, right, top, bottom."""
    # The import takes half a second; jobs that draw no chart skip it.
    from matplotlib import figure, style

    left, right, top, bottom = margins
    file = io.BytesIO()
    with style.context(_SETTINGS, after_reset=True), warnings.catch_warnings():
        # The browser has fonts for what matplotlib's lack.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        whole = figure.Figure((_WIDTH / 72, height / 72), dpi=72, facecolor="none")
        axes = whole.subplots(
            gridspec_kw={
                "left": left / _WIDTH,
                "right": 1 - right / _WIDTH,
                "top": 1 - top / height,
                "bottom": bottom / height,
            }
        )
        draw(axes)
        for line in (*axes.get_xgridlines(), *axes.get_ygridlines()):
            line.set_gid(".grid")
        axes.spines["bottom"].set_gid(".axis")
        whole.savefig(file, format="svg")
    # XML has no control characters, and a name may hold one.
    return _inline(
        re.sub(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]", b"", file.getvalue()), label
    )


def _inline(svg: bytes, label: str) -> str:
    """Reduces matplotlib's file to an element of a page.

    A gid of ".kind name" becomes a class and a tooltip; markers, which are all round,
    become circles, and coordinates keep one decimal.
    """
    root = ElementTree.fromstring(re.sub(rb">\s+<", b"><", svg))
    view = root.get("viewBox")
    root.attrib.clear()
    root.attrib |= {"class": "chart", "viewBox": view, "role": "img"}
    root.set("aria-label", label)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element[:] = [e for e in element if not re.search("(metadata|defs)$", e.tag)]
        kind, _, name = element.attrib.pop("id", "").partition(" ")
        element.attrib.pop("clip-path", None)
        if element.tag == "use":
            element.tag, style = "circle", element.get("style")
            x, y = element.get("x"), element.get("y")
            element.attrib = {"cx": x, "cy": y, "r": str(_DOT_RADIUS), "style": style}
        if kind.startswith("."):
            element.set("class", kind[1:])
        if name:
            title = ElementTree.Element("title")
            title.text = name
            element.insert(0, title)
        for key in {"d", "x", "y", "cx", "cy"} & element.attrib.keys():
            element.set(key, re.sub(r"\d+\.\d+", _rounded, element.get(key)))
    return ElementTree.tostring(root, encoding="unicode")


def _rounded(number: re.Match) -> str:
    return f"{float(number[0]):.1f}"
