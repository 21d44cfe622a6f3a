"""The table of forecasts follows from its rows, which name recipes that exist."""

import importlib
import json
import math
import shlex

import pytest

from launch import forecasts
from sora_jax.core import mesh as meshes
from sora_jax.forecast import chips

REPORT = {
    "memory": {"parameters": 3 * 2**30, "temporary": 2**30}, "hbm": 5 * 2**30,
    "used": 0.8, "recompute": 1.1, "devices": 8, "kind": "tpu7x", "seconds": 6.0,
    "seconds_per_clip": 300.0, "rows": 2, "tokens": 4000, "mfu": 0.25,
    "compile_seconds": 61.7, "estimate_errors": {"one": -0.086},
}  # fmt: skip


@pytest.mark.parametrize("row", forecasts.ROWS, ids=lambda row: " ".join(row[:4]))
def test_a_row_is_of_a_recipe_and_fills_its_slice(row):
    recipe, _, topology, mesh, _, changes = row
    c = importlib.import_module(f"configs.{recipe}").get_config()
    for name in changes:
        *path, last = name.split(".")
        place = c
        for part in path:
            place = place[part]
        assert last in place, name
    kind, sizes = topology.split(":")
    devices = math.prod(map(int, sizes.split("x"))) * (2 if kind == "tpu7x" else 1)
    assert kind in chips.CHIPS and math.prod(meshes.parse(mesh).values()) == devices


def test_the_committed_table_is_that_of_the_committed_reports():
    kept = json.loads(forecasts.REPORTS.read_text())
    commands = {shlex.join(forecasts.arguments(row)) for row in forecasts.ROWS}
    assert kept.keys() <= commands
    assert forecasts.TABLE.read_text() == forecasts.table(kept)


def test_a_line_counts_chips_and_says_what_does_not_fit():
    row = ("wan_14b", "sample", "tpu7x:2x2x1", "fsdp=2,ulysses=4", 2, {})
    line = forecasts.line(row, REPORT)
    # Eight devices are four chips: 6 s of them for two rows.
    assert "| 6 s | 12 | 300 s | 25% | 62 s |" in line
    assert "4.0 of 5.00 GiB (80%) |" in line
    assert "**too much**" in forecasts.line(row, REPORT | {"used": 1.01})
    refused = forecasts.line(row, {"refused": "it does not fit: 40 GiB"})
    assert "it does not fit: 40 GiB" in refused
    assert refused.count("|") == line.count("|")


def test_reports_of_preflight_are_kept(monkeypatch, tmp_path):
    """A program that does not fit is a result; any other failure is an error."""
    row = ("wan_14b", "train", "v5e:2x2", "ulysses=4", 1, {})
    monkeypatch.setattr(forecasts, "ROWS", [row])
    monkeypatch.setattr(forecasts, "REPORTS", tmp_path / "found.json")
    monkeypatch.setattr(forecasts, "TABLE", tmp_path / "table.md")
    monkeypatch.setattr("sys.argv", ["forecasts.py"])
    said = {"code": 1, "error": "a warning\npreflight: it does not fit: so much"}

    class Done:
        def __init__(self):
            self.returncode, self.stderr = said["code"], said["error"]

    monkeypatch.setattr(forecasts.subprocess, "run", lambda *args, **kwargs: Done())
    forecasts.main()
    assert json.loads(forecasts.REPORTS.read_text()) == {
        shlex.join(forecasts.arguments(row)): {"refused": "it does not fit: so much"}
    }
    assert "it does not fit: so much" in forecasts.TABLE.read_text()
    said |= {"code": 2, "error": "preflight: no libtpu"}
    with pytest.raises(RuntimeError, match="no libtpu"):
        forecasts.main()
