"""The gallery of all ways of making a video, on random weights."""

import dataclasses

import numpy as np
import PIL.Image
import pytest

from sora_jax.generation import gallery, pipeline, tasks
from tests.generation import tiny
from tests.generation.test_tasks import EVERYTHING


@pytest.mark.parametrize("trained", [(*EVERYTHING, "images"), ("none",)])
def test_each_task_that_was_trained_has_an_example(tmp_path, trained):
    settings = dataclasses.replace(
        tiny.SETTINGS, num_inference_steps=1, trained_patterns=trained, batch_size=1
    )
    networks = tiny.networks()
    pipe = pipeline.Pipeline(**networks, tokenizer=tiny.Letters(), settings=settings)
    named = []
    found, refused = gallery.examples(pipe, ("a", "b"), progress=named.append)
    assert named == [*tasks.TASKS]
    names = {example.name.split()[0] for example in found}
    free = {"text", "loop", "inpaint", "outpaint", "vary", "blend", "edit"}
    everything = {*tasks.TASKS, "text", "image"}
    assert names == (everything if "images" in trained else free)
    assert refused.keys() == everything - names - {"image"}
    files = gallery.write(tmp_path, found)
    assert {file.stem for file in files} == names | {"gallery"}
    with PIL.Image.open(tmp_path / "gallery.gif") as page:
        assert page.n_frames > 1 and np.ptp(np.asarray(page.convert("RGB"))) > 50
