"""The report page: escaped, self-contained, and playing in a real browser."""

import html.parser
import math
import os
import re

import numpy as np
import pytest

from sora_jax.data import video_io
from sora_jax.evals.html import charts, page
from tests.evals.html import browser

HOSTILE = '<script>document.title="owned"</script> "red" & <b>circle</b>'


def clip_mp4(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    frames = np.full((9, 32, 32, 3), 120, np.uint8)
    y, x = rng.integers(6, 20, 2)
    for t in range(9):
        frames[t, y : y + 8, x - 4 + t : x + 4 + t] = (220, 40, 40)
    return video_io.encode_mp4(frames, 8)


@pytest.fixture(scope="module")
def rendered() -> str:
    steps = range(0, 4000, 10)
    loss = {
        "0.85-0.93": (steps, [math.exp(-step / 900) + 0.02 for step in steps]),
        "0.93-1": (steps, [0.9 + 0.1 * math.exp(-step / 400) for step in steps]),
    }
    chart = charts.line_chart(
        loss, label="loss by band", x_label="step", y_label="loss", log_y=True
    )
    entries = [
        page.Entry(
            prompt,
            "motion",
            [
                page.Clip("seed 0", clip_mp4(number), {"colour": True, "dir": False}),
                page.Clip("ground truth", clip_mp4(number + 10)),
            ],
        )
        for number, prompt in enumerate([HOSTILE, "a red circle moves left", "third"])
    ]
    return page.render(
        title=HOSTILE,
        facts={"model": HOSTILE, "device": "cpu"},
        figures=[
            page.Figure("colour", page.Cell(0.98, 0.95, 0.99), 0.97, "worst seed"),
            page.Figure("direction", page.Cell(0.91, 0.87, 0.94), 0.95, HOSTILE),
        ],
        entries=entries,
        tables=[
            page.Table(
                "Motion",
                HOSTILE,
                ["colour", "direction"],
                [
                    (
                        "model",
                        [page.Cell(0.98, 0.95, 0.99, bar=True), page.Cell(None)],
                    ),
                    (HOSTILE, [page.Cell(12.345, digits=3), page.Cell(1.0)]),
                ],
            )
        ],
        charts=[page.Chart("Loss", HOSTILE, chart)],
        failures=[HOSTILE],
        config=f"name = {HOSTILE!r}\n",
        protocol={"num_frames": 9, "prompts": HOSTILE},
    )


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.scripts = [], []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.found and self.found[-1][0] == "script":
            self.scripts.append(data)


def test_what_users_give_is_escaped(rendered):
    tags = Tags()
    tags.feed(rendered)
    assert sum(tag == "script" for tag, _ in tags.found) == 1
    # The only bold text is that of the two figures.
    assert sum(tag == "b" for tag, _ in tags.found) == 2
    assert "&lt;script&gt;document.title=&#34;owned&#34;" in rendered
    assert "<script>document" not in rendered


def test_nothing_is_fetched(rendered):
    tags = Tags()
    tags.feed(rendered)
    for tag, attrs in tags.found:
        for name in ("src", "data-src", "href", "poster", "srcset", "action"):
            assert attrs.get(name, "data:").startswith("data:"), (tag, attrs)
    assert not re.search(r"https?://|@import|url\(", rendered)
    policy = next(attrs["content"] for _, attrs in tags.found if "http-equiv" in attrs)
    assert "default-src 'none'" in policy


def test_numbers_and_marks(rendered):
    assert "0.980" in rendered and "0.950 … 0.990" in rendered
    assert '<article class="figure met">' in rendered
    assert '<article class="figure missed">' in rendered
    assert '<span class="right">✓ colour' in rendered
    assert '<span class="wrong">✗ dir' in rendered
    assert '<td class="none">–</td>' in rendered


@pytest.fixture
def chromium(tmp_path):
    if browser.find() is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI needs chromium for this test: apt-get install chromium")
        pytest.skip(
            "chromium is not installed, so the report is not opened in a browser"
        )
    with browser.Browser(tmp_path / "profile") as page:
        yield page


def test_page_plays_in_a_browser(rendered, chromium, tmp_path):
    """All videos can play, nothing is complained about, the script tag stays text."""
    file = tmp_path / "report.html"
    file.write_text(rendered)
    chromium.open(file.as_uri())
    ready = "document.documentElement.dataset.ready"
    assert chromium.wait_for(ready, "6") == "6"
    states = "[...document.querySelectorAll('video')].map(v => v.readyState >= 2)"
    assert chromium.evaluate(states) == [True] * 6
    assert chromium.evaluate("document.title") == HOSTILE
    # Wider than the view means that a row of the tables or a prompt sticks out.
    assert chromium.evaluate("document.body.scrollWidth <= innerWidth")
    assert not chromium.complaints


def test_videos_of_one_length_loop_in_step(rendered, chromium, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(rendered)
    chromium.open(file.as_uri())
    ready = "document.documentElement.dataset.ready"
    assert chromium.wait_for(ready, "6") == "6"
    chromium.evaluate(
        "for (const [i, v] of [...document.querySelectorAll('video')].entries())"
        " v.currentTime = (i * 0.2) % v.duration"
    )
    in_step = """(() => {
      const videos = [...document.querySelectorAll('video')];
      const apart = videos.map(v => {
        const d = Math.abs(v.currentTime - videos[0].currentTime);
        return Math.min(d, v.duration - d);
      });
      return videos.every(v => !v.paused) && Math.max(...apart) < 0.15;
    })()"""
    assert chromium.evaluate(in_step) is False
    assert chromium.wait_for(in_step, True, 20) is True


def test_many_videos_share_few_players(chromium, tmp_path):
    """Browsers have some 75 players a page; only what is in view may hold one."""
    mp4 = clip_mp4(0)
    entries = [
        page.Entry(f"prompt {n}", "g", [page.Clip("c", mp4)]) for n in range(200)
    ]
    file = tmp_path / "report.html"
    file.write_text(page.render(title="t", facts={}, entries=entries))
    chromium.open(file.as_uri())
    assert chromium.wait_for("document.querySelectorAll('video').length", 200) == 200
    last = "[...document.querySelectorAll('video')].at(-1)"
    assert chromium.evaluate(f"{last}.readyState") == 0
    chromium.evaluate(f"{last}.scrollIntoView()")
    assert chromium.wait_for(f"{last}.readyState >= 2", True) is True
    first = "document.querySelector('video')"
    assert chromium.wait_for(f"{first}.hasAttribute('src')", False) is False
    assert not chromium.complaints


def test_remarks_stand_at_the_end_of_their_rows():
    rows = [("one", [page.Cell(1.0)]), ("two", [page.Cell(2.0)])]
    remarks = {"": "says", "two": "<this>"}
    table = page.Table("T", "", ["value"], rows, remarks=remarks)
    rendered = page.render(title="t", facts={}, tables=[table])
    assert '<th scope="col">says</th>' in rendered
    assert rendered.count('<td class="remark">') == 2 and "&lt;this&gt;" in rendered
    assert page.as_text([table]).splitlines()[-1].endswith("2.000  <this>")
