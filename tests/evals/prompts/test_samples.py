"""Folders of samples are read whole or named; finished parts are kept, others are not."""

import json

import numpy as np
import pytest

from sora_jax.data import video_io
from sora_jax.evals.prompts import samples


def clip(value=100, frames=9, size=32):
    return np.full((frames, size, size, 3), value, np.uint8)


def add(folder, name, prompt, frames=None, **recipe):
    video = video_io.encode_mp4(clip() if frames is None else frames, 8)
    (folder / f"{name}.mp4").write_bytes(video)
    text = json.dumps({"prompt": prompt, "seed": 1, **recipe})
    (folder / f"{name}.json").write_text(text)


def test_a_folder_with_faults(tmp_path):
    add(tmp_path, "a", "a red circle moves left", sampler="euler")
    add(tmp_path, "b", "a blue square", clip(frames=5), sampler="euler")
    add(tmp_path, "c", "a blue square", sampler="heun")
    (tmp_path / "c.mp4").write_bytes(b"no video at all")
    add(tmp_path, "d", "a cyan cross", sampler="euler")
    (tmp_path / "d.json").unlink()
    add(tmp_path, "e", "the weather in spring", sampler="euler")
    add(tmp_path, "f", "a green circle", sampler="euler", step_cache=0.0)
    found = samples.read_folder(tmp_path)
    assert [s.file for s in found.samples] == [
        "a.mp4",
        "b.mp4",
        "c.mp4",
        "e.mp4",
        "f.mp4",
    ]
    assert [s.video_thwc is None for s in found.samples] == [
        False,
        True,
        True,
        False,
        False,
    ]
    told = "\n".join(found.failures)
    assert len(found.failures) == 3
    assert (
        "b.mp4: frames, height and width are (5, 32, 32)" in told
        and "c.mp4" in told
        and "d.mp4: no recipe" in told
    )

    material = samples.read_material(tmp_path)
    assert {suite.name: len(suite) for suite in material.suites} == {
        "attribute": 3,
        "motion": 1,
    }
    assert [v is None for v in material.videos["model"]["attribute"]] == [
        True,
        True,
        False,
    ]
    assert "weather" in material.failures[-1] and len(material.failures) == 4
    assert material.making["sampler"] is None  # not the same for all
    # Clips of before there was a step cache say nothing of it.
    assert material.making["step_cache"] == 0.0
    assert material.codec == "h264"
    add(tmp_path, "f", "a green circle", sampler="euler", step_cache=0.1)
    assert samples.read_material(tmp_path).making["step_cache"] is None


def test_clips_of_rewritten_prompts_are_scored_by_what_was_asked(tmp_path):
    longer = {"original_prompt": "a red circle moves left", "upsampler": "rules:dense"}
    add(tmp_path, "a", "a red square moves right, slowly", **longer)
    add(tmp_path, "b", "a blue square")
    (tmp_path / "c.mp4").write_bytes((tmp_path / "b.mp4").read_bytes())
    (tmp_path / "c.json").write_text("[1]")
    found = samples.read_folder(tmp_path)
    assert [s.prompt for s in found.samples] == [
        "a red circle moves left",
        "a blue square",
    ]
    assert "c.mp4: no recipe" in found.failures[0]
    material = samples.read_material(tmp_path)
    assert material.making["upsampler"] == "rules:dense"  # part of the protocol
    (tmp_path / "a.mp4").unlink()
    assert "upsampler" not in samples.read_material(tmp_path).making


def test_nothing_usable_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no .mp4"):
        samples.read_folder(tmp_path)
    add(tmp_path, "a", "the weather in spring")
    with pytest.raises(ValueError, match="measured"):
        samples.read_material(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    with pytest.raises(FileNotFoundError, match="can be decoded"):
        samples.read_folder(tmp_path)


def test_store_returns_only_parts_made_in_the_same_way(tmp_path):
    store, made = samples.Store(tmp_path), []

    def make():
        made.append(1)
        return {"motion": clip(len(made))}

    first, before = store.get("part", {"seed": 0}, make)
    assert not before
    again, before = samples.Store(tmp_path).get("part", {"seed": 0}, make)
    assert before and len(made) == 1
    np.testing.assert_array_equal(again["motion"], first["motion"])
    other, before = store.get("part", {"seed": 1}, make)
    assert not before and other["motion"].max() == 2
    (tmp_path / "part.safetensors").write_bytes(b"half a fi")
    _, before = store.get("part", {"seed": 1}, make)
    assert not before and len(made) == 3
