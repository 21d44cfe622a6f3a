"""Whole pipelines on tiny random folders of Wan's forms, beside diffusers' own."""

import json
import pathlib
import subprocess

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from sora_jax.core import mesh, trees
from sora_jax.generation import compiled, export, pipeline
from sora_jax.models import rows
from sora_jax.training import pretrained

ORACLE = pathlib.Path(__file__).resolve().parent.parent / "oracle" / "wan_pipeline.py"
FORMS = ("t2v", "t2v_euler", "ti2v", "a14b")
pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def made(peers_python, tmp_path_factory):
    """The folders, what they were asked for, and what diffusers made of it."""
    out = tmp_path_factory.mktemp("wan")
    run = subprocess.run(
        [peers_python, str(ORACLE), str(out)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    asked = json.loads(run.stdout.splitlines()[-1])
    return out, asked, {form: load_file(out / f"{form}.safetensors") for form in FORMS}


@pytest.fixture(scope="module")
def pipes(made):
    out, _, _ = made
    return {
        form: pipeline.Pipeline.from_pretrained(out / form, dtype="float32")
        for form in FORMS
    }


def call(made, pipe, form, **changes):
    _, asked, found = made
    arguments = {
        "prompt": asked["prompts"],
        "negative_prompt": asked["negative_prompt"],
        "num_inference_steps": 12,
        "guidance_scale": 4.0,
        "latents": found[form]["noise"],
        "batch_size": 2,
        **{name: asked[name] for name in ("num_frames", "height", "width")},
    }
    if form == "a14b":
        arguments["guidance_scale_2"] = 2.0
    return pipe(**arguments | {"output_type": "latent"} | changes).frames


def apart(ours_bthwc, theirs_bcthw) -> float:
    theirs = np.asarray(theirs_bcthw, np.float64).transpose(0, 2, 3, 4, 1)
    ours = np.asarray(ours_bthwc, np.float64)
    assert ours.shape == theirs.shape
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("form", FORMS)
def test_latents_and_frames_are_those_of_diffusers(made, pipes, form):
    found = made[2][form]
    latents = call(made, pipes[form], form)
    error = apart(latents, found["latents/whole"])
    frames = call(made, pipes[form], form, output_type="np")
    difference = np.abs(frames - found["frames"]).max()
    print(f"{form}: latents {error:.1e}, frames {difference:.1e}")
    assert error <= 1e-3
    assert difference <= 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_prompt_and_guidance_move_the_result(made, pipes, form):
    """The controls: what the parity above would miss if the inputs did nothing."""
    found = made[2][form]
    whole = found["latents/whole"]
    for name, changes in (
        ("other_prompt", {"prompt": ["two grey hen", "a fox"]}),
        # Ours refuses a negative prompt that guidance leaves without a use.
        ("no_guidance", {"guidance_scale": 1.0, "negative_prompt": ""}),
    ):
        if form == "a14b" and "guidance_scale" in changes:
            # Ours has one for each expert; diffusers' second one needs the first.
            changes = changes | {"guidance_scale_2": 1.0}
        theirs = found[f"latents/{name}"]
        moved = np.linalg.norm(theirs - whole) / np.linalg.norm(whole)
        print(f"{form}, {name}: moves the result by {moved:.3f}")
        assert moved > 0.01
        ours = call(made, pipes[form], form, **changes)
        assert apart(ours, theirs) <= 1e-3


def test_bfloat16_is_near(made):
    out, _, found = made
    pipe = pipeline.Pipeline.from_pretrained(out / "t2v", dtype="bfloat16")
    error = apart(call(made, pipe, "t2v"), found["t2v"]["latents/whole"])
    print(f"bfloat16: {error:.1e}")
    assert 1e-4 < error < 0.03


def test_experts_that_change_places_give_something_else(made, pipes):
    out, _, found = made
    swapped = pipeline.Pipeline.from_pretrained(out / "a14b", dtype="float32")
    swapped._dit, swapped._dit_2 = swapped._dit_2, swapped._dit
    assert apart(call(made, swapped, "a14b"), found["a14b"]["latents/whole"]) > 0.01


def test_height_and_width_are_told_apart_by_their_positions(made, pipes, monkeypatch):
    given = rows.grid_positions
    monkeypatch.setattr(
        rows, "grid_positions", lambda *a: given(*a)[..., jax.numpy.array([0, 2, 1])]
    )
    compiled.start_rows.clear_cache()
    turned = call(made, pipes["t2v"], "t2v")
    compiled.start_rows.clear_cache()
    assert apart(turned, made[2]["t2v"]["latents/whole"]) > 0.01


def test_a_picture_enters_as_it_does_in_diffusers(made, pipes, monkeypatch):
    """TI2V: the peer's encoded first frame is handed to both."""
    found = made[2]["ti2v"]
    first = np.asarray(found["first_latent"]).transpose(0, 2, 3, 4, 1).repeat(2, 0)
    monkeypatch.setattr(compiled, "encode_video", lambda *_: jax.numpy.asarray(first))
    latents = call(made, pipes["ti2v"], "ti2v", image=found["image"])
    error = apart(latents, found["latents/image"])
    print(f"image to video: {error:.1e}")
    assert error <= 1e-3
    np.testing.assert_array_equal(latents[:, :1], first)
    free = found["latents/whole"]
    moved = np.linalg.norm(found["latents/image"][:, :, 1:] - free[:, :, 1:])
    assert moved > 0.01 * np.linalg.norm(free[:, :, 1:])


def test_models_without_pictures_refuse_them(made, pipes):
    with pytest.raises(ValueError, match="from text alone"):
        call(made, pipes["t2v"], "t2v", image=np.zeros((32, 64, 3), np.uint8))


def test_the_same_on_a_mesh(made):
    out, _, found = made
    whole = found["t2v"]["latents/whole"]
    with jax.set_mesh(mesh.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])):
        pipe = pipeline.Pipeline.from_pretrained(out / "t2v", dtype="float32")
        assert apart(call(made, pipe, "t2v"), whole) <= 1e-3


def test_written_loaded_by_diffusers_and_read_back_bit_for_bit(
    made, pipes, peers_python, tmp_path
):
    """Our folder; the folder that diffusers writes after it has loaded ours; its card."""
    card = export.Card(license="apache-2.0", base_model="a/b", datasets=("c/d",))
    ours, again = tmp_path / "ours", tmp_path / "again"
    pipes["a14b"].save_pretrained(ours, card)
    script = ORACLE.with_name("load_and_save.py")
    run = subprocess.run(
        [peers_python, str(script), str(ours), str(again)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["license"] == "apache-2.0" and found["pipeline_tag"] == "text-to-video"
    assert found["base_model"] == "a/b" and found["datasets"] == ["c/d"]
    out, _, _ = made
    for name in ("transformer", "transformer_2", "text_encoder", "vae"):
        first, last = (
            trees.flatten(pretrained.open_component(f / name, name).load())
            for f in (out / "a14b", again)
        )
        assert first.keys() == last.keys()
        for path, array in first.items():
            np.testing.assert_array_equal(array, last[path], err_msg=path)
    with pytest.raises(ValueError, match="is not empty"):
        pipes["a14b"].save_pretrained(ours, card)
