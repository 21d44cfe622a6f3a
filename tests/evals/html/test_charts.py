"""Charts: what is drawn stands where its values say, in a form that a page can hold."""

import math
import re
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from sora_jax.evals.html import charts

NAMES = {"label": "l", "x_label": "step", "y_label": "loss"}


class Drawn:
    """A chart read back: its values follow from where its gridlines and labels are."""

    def __init__(self, svg: str, *, log_y: bool = False):
        self.root = ElementTree.fromstring(svg)
        ticks = {0: [], 1: []}
        for group in self.root.iter("g"):
            line = group.find("g[@class='grid']/path")
            if line is not None:
                (x, y), (x_end, _) = numbers(line)
                text = group.find("g/text").text.replace("\N{MINUS SIGN}", "-")
                value = float(text.replace(",", ""))
                ticks[int(x != x_end)].append((value, x if x == x_end else y))
        self.ticks = {axis: [value for value, _ in of] for axis, of in ticks.items()}
        self._ticks, self._log_y = ticks, log_y

    def parts(self, kind: str) -> list[ElementTree.Element]:
        return [g for g in self.root.iter("g") if g.get("class") == kind]

    def points(self, kind: str) -> list[np.ndarray]:
        """Values [n, 2] of the path of each part of a kind."""
        return [self.values(numbers(part.find("path"))) for part in self.parts(kind)]

    def values(self, pixels: np.ndarray) -> np.ndarray:
        columns = [pixels[:, 0], pixels[:, 1]]
        for axis, ticks in self._ticks.items():
            if len(ticks) > 1:
                value, pixel = np.array(ticks).T
                log = axis == 1 and self._log_y
                slope, start = np.polyfit(pixel, np.log(value) if log else value, 1)
                found = slope * columns[axis] + start
                columns[axis] = np.exp(found) if log else found
        return np.stack(columns, axis=1)

    @property
    def texts(self) -> list[str]:
        return [text.text for text in self.root.iter("text")]


def numbers(path: ElementTree.Element) -> np.ndarray:
    """The pixels [n, 2] of a path."""
    return np.array(re.findall(r"[\d.]+", path.get("d")), float).reshape(-1, 2)


def test_points_on_a_log_scale():
    svg = charts.line_chart(
        {"a": ([0, 1, 2], [1.0, 10.0, 100.0])},
        label="l", x_label="step", y_label="<loss>", log_y=True,
    )  # fmt: skip
    chart = Drawn(svg, log_y=True)
    [line] = chart.points("line")
    np.testing.assert_allclose(line, [[0, 1], [1, 10], [2, 100]], rtol=2e-3, atol=1e-3)
    pixels = numbers(chart.parts("line")[0].find("path"))
    assert pixels[0, 1] > pixels[2, 1]  # larger is higher up
    assert chart.ticks[1] == [1, 2, 5, 10, 20, 50, 100]
    assert "step" in chart.texts and "&lt;loss&gt;" in svg


def test_ticks_of_ranges_wide_and_narrow():
    wide = charts.line_chart({"a": ([0, 1], [1e-5, 1.0])}, log_y=True, **NAMES)
    assert len(Drawn(wide).ticks[1]) >= 5
    assert {math.log10(tick) % 1 for tick in Drawn(wide).ticks[1]} == {0}
    narrow = charts.line_chart({"a": ([0, 1], [1.1, 1.2])}, log_y=True, **NAMES)
    assert len(Drawn(narrow).ticks[1]) >= 3
    alone = charts.line_chart({"a": ([2e6], [-3.0])}, log_y=False, **NAMES)
    assert 2e6 in Drawn(alone).ticks[0] and -3 in Drawn(alone).ticks[1]
    assert "2,000,000" in Drawn(alone).texts


def test_what_cannot_be_drawn_is_left_out():
    broken = [1.0, None, math.nan, -1.0, 0.5]
    svg = charts.line_chart({"a": (range(5), broken)}, log_y=True, **NAMES)
    [line] = Drawn(svg, log_y=True).points("line")
    np.testing.assert_allclose(line, [[0, 1], [4, 0.5]], rtol=2e-3, atol=1e-2)
    with pytest.raises(ValueError, match="no point"):
        charts.line_chart({"a": ([0], [None])}, log_y=True, **NAMES)


def test_an_interval_is_drawn_as_a_band():
    """Around its line, inside the axes, which it may widen."""
    x = [0, 1, 2]
    svg = charts.line_chart(
        {"a": (x, [1.0, 2.0, 3.0]), "b": (x, [1.0, 1.0, 1.0])},
        bands={"a": ((x, [0.0, 1.0, 2.0]), (x, [3.0, 3.0, 9.0]))},
        log_y=False,
        **NAMES,
    )
    chart = Drawn(svg)
    [band] = chart.points("band")
    around = [[0, 0], [1, 1], [2, 2], [2, 9], [1, 3], [0, 3]]
    np.testing.assert_allclose(band, around, atol=0.02)
    for line, y in zip(chart.points("line"), ([1, 2, 3], [1, 1, 1]), strict=True):
        np.testing.assert_allclose(line, np.stack([x, y], 1), atol=0.01)
    assert [part.find("title").text for part in chart.parts("line")] == ["a", "b"]
    assert numbers(chart.parts("band")[0].find("path"))[:, 1].min() > 16
    # A line and its band have one colour, two lines have two.
    styles = [part.find("path").get("style") for part in chart.parts("line")]
    first, second = (re.search("stroke: (#......)", style)[1] for style in styles)
    assert first != second
    assert f"fill: {first}" in chart.parts("band")[0].find("path").get("style")


def test_long_series_are_averaged():
    noisy = np.exp(np.random.default_rng(0).normal(size=5000) * 0.1)
    svg = charts.line_chart({"a": (range(5000), noisy)}, log_y=True, **NAMES)
    [line] = Drawn(svg, log_y=True).points("line")
    ends = [*range(32, 5000, 32), 5000]
    means = [np.exp(np.log(noisy[max(0, e - 32) : e]).mean()) for e in ends[:-1]]
    assert len(line) == len(ends) <= 160
    np.testing.assert_allclose(line[:-1, 1], means, rtol=2e-3)
    np.testing.assert_allclose(line[0, 0], 15.5, atol=1)


def test_names_stand_apart_at_the_ends_of_their_lines():
    series = {f"n{i}": ([0, 1], [1, 5 + 0.001 * i]) for i in range(20)}
    series |= {"low": ([0, 1], [1, 0]), "lower": ([0, 1], [1, 0])}
    svg = charts.line_chart(series, log_y=False, **NAMES)
    texts = {part.find("text").text: part for part in Drawn(svg).parts("end")}
    assert texts.keys() == series.keys()
    y = sorted(float(part.find("text").get("y")) for part in texts.values())
    assert np.diff(y).min() > 14.8 and 0 < y[0] and y[-1] < 380


def test_a_strip_has_a_dot_a_value_and_a_mean():
    svg = charts.strip_chart(
        {"a<b": [0.0, 1.0, 1.0], "none": []}, label="degree & more"
    )
    chart = Drawn(svg)
    dots = np.array(
        [[float(c.get("cx")), float(c.get("cy"))] for c in chart.root.iter("circle")]
    )
    assert len(dots) == 3 and len(set(dots[:, 1])) == 3
    np.testing.assert_allclose(chart.values(dots)[:, 0], [0, 1, 1], atol=1e-3)
    [mean] = chart.points("mean")
    np.testing.assert_allclose(mean[:, 0], 2 / 3, atol=1e-3)
    assert {"a<b", "none", "degree & more"} <= {*chart.texts}
    for values in ([], [float("nan")]):
        with pytest.raises(ValueError, match="needs finite values"):
            charts.strip_chart({"a": values}, label="x")


def test_a_histogram_has_equal_bins_and_its_marks():
    values = {"kept": [0.0, 1.0, 1.0, 1.0], "refused": [4.0], "none": []}
    chart = Drawn(charts.histogram(values, label="speed & more", marks=[2.5]))
    [mark] = chart.points("mark")
    np.testing.assert_allclose(mark[:, 0], 2.5, atol=1e-3)
    kept, refused, _ = chart.points("bars")
    ends = [[0, 1.1], [3.9, 4]]  # forty bins from 0 to 4
    for bars, (low, high) in zip((kept, refused), ends, strict=True):
        tall = bars[bars[:, 1] < bars[:, 1].max() - 1e-3, 0]
        np.testing.assert_allclose([tall.min(), tall.max()], [low, high], atol=0.01)
    assert {"kept", "refused", "none", "speed & more"} <= {*chart.texts}
    with pytest.raises(ValueError, match="needs finite values"):
        charts.histogram({"a": []}, label="x")


def test_a_page_can_hold_many():
    """Without ids and references, small, the same each time, whatever users prefer."""
    rng = np.random.default_rng(0)
    # Neither a formula nor, where a font lacks it, a warning.
    names = ["cost in $ or $$", "視頻 🎬", *map(str, range(8))]
    series = {name: (range(5000), rng.normal(size=5000)) for name in names}
    svg = charts.line_chart(series, log_y=False, **NAMES)
    assert len(svg) < 40_000
    assert not re.search(r" id=|href|url\(|http|<style|<script", svg)
    assert {*names} <= {*Drawn(svg).texts}
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30}):
        assert charts.line_chart(series, log_y=False, **NAMES) == svg
