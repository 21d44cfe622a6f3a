"""The folder has as many files as asked, and inputs that are lost are named."""

import contextlib
import dataclasses
import functools
import io

from experiments import killed_prepare
from sora_jax import prepare
from tests import conftest


def test_inputs_that_are_lost_are_named(tmp_path):
    folder, out, log = tmp_path / "in", tmp_path / "out", tmp_path / "log"
    folder.mkdir()
    inputs = killed_prepare.make(folder, 70, 0)
    assert inputs.files == killed_prepare.count_files(folder) == 70
    assert len(inputs.whole) > 8 and len(inputs.damaged) == 23 and inputs.useless
    run = functools.partial(conftest.run_with_flags, prepare)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        run(
            source=f"folder:{folder}",
            size="64x48",
            num_frames=5,
            fps=4,
            frames_fps=8,
            workers=1,
            out=out,
        )
    log.write_text(said.getvalue())
    faults = functools.partial(killed_prepare.faults, out=out, log=log)
    assert faults(inputs) == []
    name = next(name for name, captions in inputs.whole.items() if captions)
    for change, message in (
        ({"whole": {name: {"alt": "another text"}}}, f"{name}: clips with"),
        ({"whole": {"lost.mp4": {}}}, "lost.mp4: clips with []"),
        ({"damaged": [*inputs.damaged, "lost.mp4"]}, "lost.mp4: neither clips nor"),
        ({"useless": [name]}, f"{name}: no reason, or clips"),
        ({"files": 71}, "prepare counts 70 files"),
    ):
        changed = dataclasses.replace(inputs, **change)
        assert any(fault.startswith(message) for fault in faults(changed)), message
