"""The job, on a run folder as training leaves it, with tiny random weights."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np
import optax
import PIL.Image
import pytest
from absl.testing import flagsaver
from flax import nnx

from configs import toy
from sora_jax.core import config as configs
from sora_jax.core import digests, job, mesh, paths
from sora_jax.data import tokenizer, video_io
from sora_jax.generation import pipeline, recipes
from sora_jax.training import checkpoint, cost, state
from tests import conftest
from tests.captioning import server
from tests.generation import tiny

CAPTIONS = ["a red circle moves left", "a blue square moves right", "a cat"]


def fields(config) -> dict:
    return dict(vars(config))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    pieces = tokenizer.train(CAPTIONS, folder / "tokenizer.model", 320)
    c = toy.get_config()
    c.model.dit.update(fields(tiny.DIT))
    text = fields(tiny.TEXT)
    del text["vocab_size"]  # the tokenizer says it
    c.model.text_encoder.update(text)
    c.text.length, c.noise.shift = 24, 5.0
    c.sample.update(
        {"num_frames": 9, "height": 16, "width": 16, "fps": 8.0}
        | {"num_inference_steps": 4, "guidance_scale": 3.5, "sampler": "euler"}
    )
    configs.write(folder, c)

    words = dataclasses.replace(tiny.TEXT, vocab_size=pieces.vocab_size)
    params = {
        name: jax.device_get(nnx.to_pure_dict(nnx.split(module, nnx.Param)[1]))
        for name, module in tiny.networks(words).items()
    }
    checkpoint.save_weights(folder / "vae", params.pop("vae"), tiny.VAE)
    optimizer = optax.sgd(1.0)
    whole = state.TrainState(
        params=jax.tree.map(np.zeros_like, params),  # never used: ema is
        ema=params,
        opt_state=optimizer.init(params),
        step=np.array(7, np.int32),
        skipped=np.array(0, np.int32),
        skipped_in_a_row=np.array(0, np.int32),
    )
    writer = checkpoint.Checkpointer(folder / "checkpoints", keep=1)
    writer.save(7, whole, {"seed": 0})
    writer.close()
    return folder


@pytest.fixture(scope="module")
def generate(run_folder):
    """Calls the job with flags."""
    with conftest.lone_job("generate") as job:

        def call(**values):
            values = {"model": str(run_folder)} | values
            with flagsaver.flagsaver(**values):
                with jax.set_mesh(jax.sharding.get_mesh()):  # the job sets its own
                    conftest.run_job(job)

        yield call


def test_a_run_folder_becomes_a_pipeline(run_folder):
    with jax.set_mesh(mesh.make_mesh({"replica": -1})):
        pipe = pipeline.Pipeline.from_pretrained(run_folder)
        output = pipe("a red circle moves left", output_type="latent")
    assert output.frames.shape == (1, 3, 2, 2, 4) and output.frames.std() > 0.1
    assert (pipe.settings.shift, pipe.settings.fps) == (5.0, 8.0)
    recipe = output.recipes[0]
    assert recipe["step"] == 7 and recipe["model"] == run_folder.name
    config = configs.read(run_folder)
    assert recipe["config_digest"] == configs.digest(config)
    assert recipe["vae_digest"] == checkpoint.weights_digest(run_folder / "vae")


def test_one_prompt_makes_one_file(generate, tmp_path, capsys):
    out = tmp_path / "clip.mp4"
    generate(prompt="a cat", seed=3, out=str(out), fps=6.0)
    video = video_io.decode(out)
    assert video.frames.shape == (9, 16, 16, 3) and video.fps == 6.0
    recipe = json.loads(out.with_suffix(".json").read_text())
    assert recipe["prompt"] == "a cat" and recipe["seed"] == 3
    assert f"1 clip written: {out}" in capsys.readouterr().out


def test_a_video_is_made_again_from_itself(generate, tmp_path):
    first, again, other = (tmp_path / f"{name}.mp4" for name in "abc")
    generate(prompt="a cat", seed=3, out=str(first), sampler="unipc", shift=2.0)
    generate(**{"from": str(first)}, out=str(again))
    assert again.read_bytes() == first.read_bytes()
    generate(**{"from": str(first)}, out=str(other), shift=4.0)
    assert other.read_bytes() != first.read_bytes()
    recipe = json.loads(other.with_suffix(".json").read_text())
    assert (recipe["shift"], recipe["sampler"], recipe["seed"]) == (4.0, "unipc", 3)


def test_an_upsampled_prompt_is_stored_shown_and_kept(generate, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "clips"
    prompts.write_text("a red circle\na cat\n")
    generate(
        prompts=str(prompts), out=str(out), upsample="rules", upsample_tier="short"
    )
    told = capsys.readouterr().out
    files = sorted(out.glob("*.json"))
    first, second = (json.loads(file.read_text()) for file in files)
    assert first["original_prompt"] == "a red circle" != first["prompt"]
    assert first["upsampler"] == second["upsampler"] == "rules:short"
    assert second["prompt"] == second["original_prompt"] == "a cat"
    assert f"a red circle -> {first['prompt']}\n" in told
    assert "prompts that stay as they are: a cat\n" in told
    again = tmp_path / "again.mp4"
    generate(**{"from": str(files[0].with_suffix(".mp4"))}, out=str(again))
    assert again.read_bytes() == files[0].with_suffix(".mp4").read_bytes()


def test_a_chat_model_is_asked_once_for_a_prompt(generate, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "clips"
    prompts.write_text("a cat\na red circle\n")
    words = "a cat moves left while a red circle moves right and a blue square moves"
    answers = (f"{words} {side}" for side in ("left", "right", "left left"))
    flags = {"prompts": str(prompts), "out": str(out), "upsample": "chat"}
    with server.serve(lambda *_: server.Reply(text=next(answers))) as served:
        flags |= {"upsample_url": served.url, "upsample_model": "m"}
        with pytest.raises(SystemExit, match="num_frames is 8"):
            generate(**flags, num_frames=8)
        assert not served.asked  # a wrong argument costs nothing
        generate(**flags)
        assert len(served.asked) == 2
        made = {f.name: f.read_bytes() for f in out.iterdir()}
        (out / "00001-a-red-circle.mp4").unlink()
        generate(**flags)
        assert len(served.asked) == 2
    assert {f.name: f.read_bytes() for f in out.iterdir()} == made
    assert "1 of 2 clips exist already" in capsys.readouterr().out


def test_upsampling_that_is_asked_for_wrongly_is_refused(generate, tmp_path):
    for wrong, message in (
        ({"upsample_tier": "dense"}, "no meaning with no --upsample"),
        ({"upsample": "rules", "upsample_url": "http://h/v1"}, "no meaning with --ups"),
        ({"upsample": "chat", "upsample_model": "m"}, "chat needs --upsample_url"),
        ({"upsample": "rules", "upsample_tier": "alt"}, "rules write short, medium"),
        ({"upsample": "rules", "upsample_tier": "dense"}, "rules:dense rewrote 'a red"),
    ):
        with pytest.raises(SystemExit, match=message):
            generate(prompt="a red circle", out=str(tmp_path / "x.mp4"), **wrong)


def test_a_video_of_other_weights_is_not_made_again(generate, run_folder, tmp_path):
    foreign = tmp_path / "foreign.mp4"
    frames = np.zeros((9, 16, 16, 3), np.uint8)
    foreign.write_bytes(video_io.encode_mp4(frames, 8.0))
    with pytest.raises(
        SystemExit, match="contains no recipe: generate did not make it"
    ):
        generate(**{"from": str(foreign)}, out=str(tmp_path / "a.mp4"))
    made = {"prompt": "a cat", "seed": 3, "fps": 8.0, "model": "x", "step": 9}
    recipes.save(frames / 1.0, foreign, made)
    with pytest.raises(SystemExit, match="was made by 'x' .*step 9.*step 7"):
        generate(**{"from": str(foreign)}, out=str(tmp_path / "a.mp4"))
    recipes.save(frames / 1.0, foreign, made | {"image_sha256": "f" * 64})
    with pytest.raises(SystemExit, match="from an image, which it does not contain"):
        generate(**{"from": str(foreign)}, out=str(tmp_path / "a.mp4"))


def test_nothing_is_overwritten_unasked(generate, tmp_path, capsys):
    out = tmp_path / "clip.mp4"
    given = {"prompt": "a cat", "seed": 3, "num_inference_steps": 1, "out": str(out)}
    out.write_bytes(b"a film of somebody's")
    with pytest.raises(SystemExit, match="clip.mp4 exists and has no recipe"):
        generate(**given)
    assert out.read_bytes() == b"a film of somebody's"
    generate(**given, overwrite=True)
    assert video_io.decode(out).frames.shape == (9, 16, 16, 3)
    capsys.readouterr()
    with pytest.raises(
        SystemExit, match="with another recipe .seed was 3.*or add --over"
    ):
        generate(**given | {"seed": -1})
    generate(**given)
    assert "1 of 1 clips exist already" in capsys.readouterr().out


def test_random_seeds_of_a_list_stay_when_it_goes_on(generate, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "clips"
    prompts.write_text("a cat\na cat\n")
    given = {"prompts": str(prompts), "out": str(out), "seed": -1, "format": "gif"}
    given |= {"num_inference_steps": 1}

    def seeds():
        return [json.loads(p.read_text())["seed"] for p in sorted(out.glob("*.json"))]

    generate(**given)
    first = seeds()
    assert len({*first}) == 2 and min(first) >= 0
    (out / "00001-a-cat.gif.json").unlink()
    generate(**given)
    assert seeds() == first


@pytest.mark.parametrize("suffix", ["webm", "gif"])
def test_other_formats_hold_the_video_and_its_recipe(
    generate, tmp_path, capsys, suffix
):
    out, again = tmp_path / f"clip.{suffix}", tmp_path / f"again.{suffix}"
    generate(prompt="a cat", seed=3, out=str(out), fps=12.0)
    said = capsys.readouterr().out
    assert (suffix == "gif") == ("12 frames a second each is shown for 8 or 9" in said)
    generate(prompt="a cat", seed=3, out=str(tmp_path / "clip.mp4"), fps=12.0)
    reference = video_io.decode(tmp_path / "clip.mp4").frames.astype(float)
    video = video_io.decode(out)
    assert video.fps == pytest.approx(12, rel=0.05)
    colours = (frames.mean((1, 2)) for frames in (video.frames, reference))
    np.testing.assert_allclose(*colours, atol=8)
    beside = json.loads((tmp_path / f"clip.{suffix}.json").read_text())
    assert beside["prompt"] == "a cat" and beside["fps"] == 12.0
    generate(**{"from": str(out)}, out=str(again))
    assert again.read_bytes() == out.read_bytes()


def test_a_dry_run_says_what_a_clip_takes_and_makes_none(generate, tmp_path, capsys):
    generate(prompt="a cat", size="24*16", num_frames=13, dry_run=True)
    text = capsys.readouterr().out
    assert "13 frames of 24 x 16" in text and "latents 4 x 2 x 3 x 4, 24 tokens" in text
    config = dataclasses.replace(tiny.DIT)
    flops = cost.dit_forward_flops(config, tokens=24, text_tokens=24)
    assert f"{flops / 1e12:.3g} TFLOP a pass, 8 passes" in text
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="--size is WIDTHxHEIGHT such as 832"):
        generate(prompt="a cat", size="24", dry_run=True)


def test_flags_have_the_names_of_wans_own_script(generate):
    from absl import flags

    for alias, name in {
        "frame_num": "num_frames", "base_seed": "seed", "save_file": "out",
        "sample_steps": "num_inference_steps", "sample_shift": "shift",
        "sample_guide_scale": "guidance_scale", "sample_solver": "sampler",
        "ckpt_dir": "model",
    }.items():  # fmt: skip
        flag = flags.FLAGS[alias]
        with flagsaver.flagsaver():
            setattr(flags.FLAGS, alias, flag.value)
            assert flags.FLAGS[name].value == flag.value, alias


def test_a_list_is_made_once_and_goes_on_where_it_was(generate, tmp_path, capsys):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text(
        "prompt,seed,num_inference_steps\na cat,5,\na red circle,,2\na cat,,\n"
    )
    out = tmp_path / "clips"
    generate(prompts=str(prompts), out=str(out), seed=10, batch_size=2)
    files = sorted(out.glob("*.mp4"))
    assert [f.name for f in files] == [
        "00000-a-cat.mp4", "00001-a-red-circle.mp4", "00002-a-cat.mp4",
    ]  # fmt: skip
    found = [json.loads(f.with_suffix(".json").read_text()) for f in files]
    assert [recipe["seed"] for recipe in found] == [5, 11, 12]
    assert [recipe["num_inference_steps"] for recipe in found] == [4, 2, 4]

    times = [f.stat().st_mtime_ns for f in files]
    files[1].with_suffix(".json").unlink()  # as if it had been interrupted there
    capsys.readouterr()
    generate(prompts=str(prompts), out=str(out), seed=10, batch_size=2)
    assert "2 of 3 clips exist already" in capsys.readouterr().out
    again = [f.stat().st_mtime_ns for f in files]
    assert (again[0], again[2]) == (times[0], times[2]) and again[1] > times[1]
    new = json.loads(files[1].with_suffix(".json").read_text())
    assert new == found[1]  # the same bytes, since the video's hash is in it

    with pytest.raises(SystemExit, match="guidance_scale was 3.5 and is 2.0.*another"):
        generate(prompts=str(prompts), out=str(out), seed=10, guidance_scale=2.0)


def test_a_list_is_shown_on_one_sheet(generate, tmp_path):
    prompts, sheet = tmp_path / "prompts.txt", tmp_path / "sheet.png"
    prompts.write_text("a cat\na dog\n")
    settings = {"prompts": str(prompts), "out": str(tmp_path / "clips")}
    generate(**settings, sheet=str(sheet))
    first = sheet.read_bytes()
    pixels = np.asarray(PIL.Image.open(sheet))
    frames = video_io.decode(tmp_path / "clips" / "00000-a-cat.mp4").frames
    large = frames[0].repeat(6, 0).repeat(6, 1)  # 16 pixels become 96
    np.testing.assert_array_equal(pixels[38:134, 16:112], large)
    generate(**settings, sheet=str(sheet))  # of clips that exist
    assert sheet.read_bytes() == first


def test_a_step_cache_is_calibrated_then_used(generate, run_folder, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "clip.mp4"
    prompts.write_text("a cat\na red circle moves left\n")
    with pytest.raises(
        SystemExit, match="step cache is not calibrated.*step_cache.json"
    ):
        generate(prompt="a cat", out=str(out), step_cache=0.1)
    sampling = {"num_inference_steps": 6, "batch_size": 2}
    with paths.lock(run_folder), pytest.raises(SystemExit, match="in use by process"):
        generate(prompts=str(prompts), calibrate_step_cache=True, **sampling)
    generate(prompts=str(prompts), calibrate_step_cache=True, **sampling)
    text = capsys.readouterr().out
    assert "of 6 evaluations are computed" in text and "PSNR" in text
    assert f"written: {run_folder / 'step_cache.json'}" in text
    generate(prompt="a cat", out=str(out), step_cache=50.0, **sampling)
    text = capsys.readouterr().out
    # two are retained, then two of three are spared
    assert "step cache 50: 3 of 6 evaluations are computed, up to 2.00 x" in text
    generate(prompt="a cat", dry_run=True, step_cache=50.0, **sampling)
    assert "3 of 6 evaluations are computed" in capsys.readouterr().out
    listed = tmp_path / "listed.csv"
    listed.write_text("prompt,step_cache\na cat,0\na dog,50\n")
    generate(prompts=str(listed), out=str(tmp_path / "listed"), **sampling)
    assert "step cache 50: 3 of 6 evaluations" in capsys.readouterr().out
    recipe = json.loads(out.with_suffix(".json").read_text())
    digest = json.loads((run_folder / "step_cache.json").read_text())
    assert recipe["step_cache"] == 50.0 and len(recipe["step_cache_digest"]) == 16
    again = tmp_path / "again.mp4"
    generate(**{"from": str(out)}, out=str(again), batch_size=2)
    assert again.read_bytes() == out.read_bytes()
    with pytest.raises(
        SystemExit, match="calibrated for num_inference_steps 6 and not 4"
    ):
        generate(prompt="a cat", out=str(tmp_path / "other.mp4"), step_cache=0.1)
    digest["max_skips"] = 1
    digests.store(run_folder / "step_cache.json", json.dumps(digest))
    with pytest.raises(SystemExit, match="was made with the step cache's calibration"):
        generate(**{"from": str(out)}, out=str(tmp_path / "b.mp4"), batch_size=2)
    (run_folder / "step_cache.json").unlink()


def test_a_picture_becomes_the_first_frame(generate, tmp_path):
    picture = tmp_path / "red.png"
    PIL.Image.new("RGB", (40, 20), (255, 0, 0)).save(picture)
    out = tmp_path / "clip.mp4"
    generate(prompt="a cat", image=str(picture), out=str(out), num_inference_steps=1)
    recipe = json.loads(out.with_suffix(".json").read_text())
    assert len(recipe["image_sha256"]) == 64
    again = tmp_path / "again.mp4"
    with pytest.raises(SystemExit, match="which it does not contain: give --image"):
        generate(**{"from": str(out)}, out=str(again))
    generate(**{"from": str(out)}, image=str(picture), out=str(again))
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    "values, message",
    [
        ({}, "--prompt, --prompts and --from"),
        ({"prompt": "a", "prompts": "b.txt"}, "--prompt, --prompts and --from"),
        (
            {"prompt": "a", "out": "x.avi"},
            "ends in one of .mp4, .webm, .gif, .png, not 'x.avi'",
        ),
        ({"prompt": "a", "format": "gif"}, "--format is for --prompts"),
        ({"prompt": "a", "out": ""}, "give --out: the video's file"),
        ({"prompts": "list.txt", "out": ""}, "give --out: the video's file"),
        ({"prompt": "a", "out": "x.gif", "fps": 60.0}, "at most 50 frames a second"),
        (
            {"prompt": "a", "out": "x.gif", "fps": float("nan")},
            "fps is nan; it must be a number in",
        ),
        ({"prompt": "a", "out": "x.gif", "fps": 0.01}, "a GIF is at most 655 seconds"),
        ({"prompt": "a", "calibrate_step_cache": True}, "no clips: leave out --out"),
        (
            {"prompt": "a", "calibrate_step_cache": True, "out": None, "dry_run": True},
            "makes no clips: leave out --dry_run",
        ),
        (
            {"prompts": "rows.csv", "out": "x"},
            "^generate: 00001-b.mp4: num_frames is 4",
        ),
        (
            {"prompt": "a", "model": "other"},
            "other is a run of objective vae, not of a denoiser",
        ),
        ({"prompt": "a", "out": "list.txt/x.mp4"}, "list.txt is a file, not a folder"),
        ({"prompt": "a", "out": "list.txt/clips/x.mp4"}, "list.txt is a file, not a"),
        (
            {"prompts": "list.txt", "out": "list.txt"},
            "list.txt is a file, not a folder",
        ),
        ({"prompt": "a", "out": "folder.mp4"}, "cannot be written: it is a folder"),
        ({"prompt": "a", "seed": -2}, "or -1 for a random one, not -2"),
        ({"prompt": "a", "seed": 2**64}, "whole number in .0, 2.64., or -1"),
        ({"prompt": "a", "size": "16x16", "width": 16}, "--size sets both: leave out"),
        (
            {"prompt": "a", "negative_prompt": "b", "guidance_scale": 1.0},
            "negative_prompt is given, but guidance_scale is 1",
        ),
        ({"prompt": "a", "num_frames": 10}, "the nearest is 9 or 13"),
        ({"prompt": "a", "height": 20}, "the nearest is 16 or 24"),
        ({"prompt": " "}, "prompt 0 is empty|prompt is empty"),
        ({"prompt": "a " * 60}, "tokens; this model reads 24"),
        ({"prompts": "none.txt"}, "none.txt"),
        ({"prompt": "a", "model": "nowhere"}, "nowhere"),
        (
            {"prompt": "a", "dtype": "bfloat16"},
            "is a run, whose dtype is in its config",
        ),
        ({"prompt": "a", "mesh": "8"}, "--mesh is like fsdp=4,tensor=2, not '8'"),
        ({"prompt": "a", "mesh": "data=8"}, "'data'.* unknown; choose from"),
        (
            {"prompt": "a", "mesh": "tensor=8"},
            "num_heads of the .* is 2, which does not",
        ),
        ({"prompt": "a", "sampler": "ddim"}, "sampler 'ddim' is unknown"),
    ],
)
def test_what_cannot_be_done_ends_with_one_sentence(
    generate, tmp_path, monkeypatch, values, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "list.txt").write_text("a cat")
    (tmp_path / "rows.csv").write_text("prompt,num_frames\na,5\nb,4\n")
    configs.write(tmp_path / "other", {"objective": "vae"})
    before = {p.name for p in tmp_path.rglob("*")}
    with pytest.raises(SystemExit, match=message) as caught:
        generate(**({"out": "clip.mp4"} | values))
    assert str(caught.value).startswith("generate: ")
    assert {p.name for p in tmp_path.rglob("*")} == before


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A video file of nine frames, and its frames."""
    frames = np.random.default_rng(3).integers(0, 256, (9, 16, 16, 3), np.uint8)
    file = tmp_path_factory.mktemp("film") / "film.mp4"
    file.write_bytes(video_io.encode_lossless(frames, 6.0))
    return file, video_io.decode(file).frames


def test_a_task_makes_a_video_of_another_once(generate, film, tmp_path, capsys):
    file, frames = film
    out = tmp_path / "varied.mp4"
    asked = dict(
        task="vary", prompt="a cat", video=str(file), strength=0.6, out=str(out)
    )
    generate(**asked)
    assert "1 clip of 9 frames written" in capsys.readouterr().out
    made = video_io.decode(out)
    assert made.frames.shape == frames.shape and made.fps == 6.0
    recipe = recipes.read(out)
    assert recipe["task"] == "vary" and recipe["inputs"]["strength"] == 0.6
    generate(**asked)
    assert "exists already" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="exists with another recipe .*strength"):
        generate(**asked | {"strength": 0.7})
    again = {"from": str(out), "out": str(tmp_path / "again.mp4")}
    with pytest.raises(SystemExit, match="--task vary needs --video"):
        generate(**again)
    with pytest.raises(SystemExit, match="video is not the one .* SHA-256 differs"):
        generate(**again, video=str(out))
    with pytest.raises(SystemExit, match="was made by task 'vary': leave out --task"):
        generate(**again, task="loop")
    assert not (tmp_path / "again.mp4").exists()
    generate(**again, video=str(file))
    assert (tmp_path / "again.mp4").read_bytes() == out.read_bytes()
    assert recipes.read(again["out"]) == recipes.read(out)
    generate(**asked | {"strength": 0.7}, overwrite=True)
    assert recipes.read(out)["inputs"]["strength"] == 0.7


def test_tasks_read_pictures_masks_and_times(generate, film, tmp_path, monkeypatch):
    file, frames = film
    for name in ("a", "b"):
        PIL.Image.fromarray(frames[0]).save(tmp_path / f"{name}.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    PIL.Image.fromarray(mask).save(tmp_path / "mask.png")
    seen = []

    def run(self, task, prompt, **given):
        seen.append((task, given))
        frames = np.zeros((1, 9, 16, 16, 3), np.float32)
        return pipeline.Output(frames, ({},))

    monkeypatch.setattr(pipeline.Pipeline, "run", run)
    settings = pipeline.requests.Settings
    check = pipeline.tasks.check
    monkeypatch.setattr(
        pipeline.tasks, "check",
        lambda *given: check(*given[:-1], [*map(str, EVERY_PATTERN)]),
    )  # fmt: skip
    assert settings
    keys = f"0={tmp_path / 'a.png'},8={tmp_path / 'b.png'}"
    asked = dict(prompt="a cat")
    generate(
        task="keyframes",
        keyframes=keys.split(","),
        out=str(tmp_path / "k.mp4"),
        **asked,
    )
    assert seen[-1][1]["at"] == [0, 8] and np.shape(seen[-1][1]["images"]) == (
        2,
        16,
        16,
        3,
    )
    generate(
        task="inpaint", video=str(file), mask=str(tmp_path / "mask.png"),
        out=str(tmp_path / "i.mp4"), **asked,
    )  # fmt: skip
    np.testing.assert_array_equal(seen[-1][1]["mask"], mask > 0)
    np.testing.assert_array_equal(seen[-1][1]["video"], frames)
    assert seen[-1][1]["fps"] == 6.0


EVERY_PATTERN = ("first_frame", "keyframes", "region")


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"video": "x.mp4"}, "--video has no meaning without --task"),
        ({"task": "vary"}, "--task vary needs --video"),
        ({"task": "vary", "video": "no.mp4"}, "no.mp4"),
        ({"task": "vary", "video": "FILM", "factor": 2}, "--factor has no meaning"),
        ({"task": "extend", "video": "FILM", "frames": 4}, "trained with 'head'"),
        ({"task": "vary", "video": "FILM", "dry_run": True}, "no --dry_run"),
        ({"task": "vary", "video": "FILM", "sheet": "a.png"}, "no --sheet"),
        ({"task": "keyframes", "keyframes": []}, "keyframes is empty"),
        ({"task": "keyframes", "keyframes": ["a.png"]}, "FRAME=IMAGE"),
        ({"task": "vary", "video": "FILM", "strength": 2.0}, "in .0, 1., not 2"),
        ({"task": "edit", "video": "FILM"}, "flowedit needs source"),
        (
            {"task": "inpaint", "video": "FILM", "mask": "FILM_TEXT"},
            "FILM_TEXT|picture",
        ),
    ],
)
def test_wrong_flags_of_tasks_get_one_sentence(
    generate, film, tmp_path, flags, message
):
    flags = {n: str(film[0]) if v == "FILM" else v for n, v in flags.items()}
    out = tmp_path / "no.mp4"
    with pytest.raises(SystemExit, match=message) as error:
        generate(prompt="a cat", out=str(out), **flags)
    assert "\n" not in str(error.value).strip() and not out.exists()


@pytest.fixture
def files(film, tmp_path, monkeypatch):
    """A folder of inputs, right and wrong, which is the working directory."""
    file, frames = film
    (tmp_path / "nine.mp4").write_bytes(file.read_bytes())
    (tmp_path / "seven.mp4").write_bytes(video_io.encode_lossless(frames[:7], 6.0))
    PIL.Image.fromarray(frames[0]).save(tmp_path / "a.png")
    PIL.Image.fromarray(frames[0, :8, :8]).save(tmp_path / "small.png")
    for name in ("broken.png", "broken.mp4"):
        (tmp_path / name).write_bytes(b"x" * 99)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


NINE = {"video": "nine.mp4"}


@pytest.mark.parametrize(
    "task, flags, message",
    [
        ("inpaint", NINE | {"mask": "small.png"}, "mask has 1 frames of 8 x 8"),
        ("inpaint", NINE | {"mask": "seven.mp4"}, "mask has 7 frames of 16 x 16"),
        ("inpaint", {"video": "seven.mp4", "mask": "a.png"}, "the nearest is 5 or 9"),
        ("edit", {"video": "seven.mp4", "source": "a"}, "the nearest is 5 or 9"),
        ("fill", NINE | {"factor": 9}, "more than a window of 9 frames has room"),
        ("outpaint", NINE | {"size": "16x16"}, "give a larger height or width"),
        ("keyframes", {"keyframes": ["0=broken.png"]}, "broken.png: .*picture"),
        ("keyframes", {"keyframes": ["0=no.png"]}, "no.png: .*No such file"),
        ("inpaint", NINE | {"mask": "broken.png"}, "broken.png: .*picture"),
        ("vary", {"video": "broken.mp4"}, "broken.mp4"),
        ("vary", {"video": "no.mp4"}, "no.mp4: .*No such file"),
        ("keyframes", {"keyframes": ["-1=a.png"]}, "FRAME=IMAGE.*not '-1=a.png'"),
        ("keyframes", {"keyframes": ["0=a.png", "9=a.png"]}, "has frames 0 to 8"),
        ("keyframes", {"keyframes": ["4=a.png", "4=a.png"]}, "two .* at frame 4"),
        ("replace", NINE | {"first": -1, "last": 3}, "first is .* 0 on, not -1"),
        ("vary", NINE | {"strength": 0.0}, r"in \(0, 1\], not 0$"),
        ("vary", NINE | {"strength": 1.5}, r"in \(0, 1\], not 1.5$"),
        ("extend", NINE | {"frames": 0}, "frames is 0: there is nothing to make"),
        ("extend", NINE | {"frames": -4}, "from 0 on, not -4"),
        ("loop", {"num_frames": 0}, "num_frames is 0"),
        ("loop", {"num_frames": 5}, "too few for a circle"),
        ("loop", NINE, "--video has no meaning for --task loop"),
        ("connect", NINE | {"frames": 3}, "--task connect needs --video_2"),
        ("inpaint", NINE, "--task inpaint needs --mask"),
        ("edit", NINE, "flowedit needs source"),
        ("extend", NINE | {"frames": 4}, "'extend' needs a denoiser .*'head'"),
    ],
)
def test_bad_input_of_a_task_leaves_nothing_behind(
    generate, files, task, flags, message
):
    before = {path: path.stat().st_mtime_ns for path in files.rglob("*")}
    with pytest.raises(job.BadInput, match=message) as error:
        generate(prompt="a cat", task=task, out="new/clip.mp4", **flags)
    assert str(error.value).startswith("generate: ") and "\n" not in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in files.rglob("*")} == before


@pytest.mark.parametrize(
    "flags, code, said",
    [
        (["--task=turn"], 2, "flag --task=turn: value should be one of <keyframes|"),
        (["--task=vary", "--video=broken.mp4"], 2, "generate: broken.mp4"),
        (["--help"], 0, ""),
    ],
)
def test_exit_codes_of_the_command(files, flags, code, said):
    command = [sys.executable, "-m", "sora_jax.generate", "--prompt=a", "--out=a.mp4"]
    path = {"PYTHONPATH": str(conftest.ROOT)}
    ended = subprocess.run(
        [*command, *flags], env=os.environ | path, capture_output=True, text=True
    )
    assert ended.returncode == code and said in ended.stderr
    assert (
        len(ended.stderr.splitlines()) == bool(code)
        and not pathlib.Path("a.mp4").exists()
    )


BOARD = """\
size: 16x16
fps: 6
shots:
  - {prompt: a cat, frames: 4}
  - {prompt: a dog, frames: 5, seed: 9}
  - {video: nine.mp4}
"""


def test_a_storyboard_from_the_command_line(generate, files, capsys):
    """Made, made again after a change, and left alone without one."""
    board = files / "board.yaml"
    board.write_text(BOARD)
    generate(storyboard="board.yaml", out="film.mp4")
    assert "3 of 3 shots made: 1, 2, 3" in capsys.readouterr().out
    assert video_io.decode(files / "film.mp4").frames.shape == (4 + 5 + 9, 16, 16, 3)
    first = (files / "film_shots" / "001.mp4").read_bytes()
    generate(storyboard="board.yaml", out="film.mp4")
    assert "film.mp4 exists already" in capsys.readouterr().out
    board.write_text(BOARD.replace("seed: 9", "seed: 8"))
    film = (files / "film.mp4").read_bytes()
    with pytest.raises(
        job.BadInput,
        match="002.mp4 exists with another recipe .seed was 9 and is 8.*add --overwrite",
    ):
        generate(storyboard="board.yaml", out="film.mp4")
    assert (files / "film.mp4").read_bytes() == film
    generate(storyboard="board.yaml", out="film.mp4", overwrite=True)
    assert "1 of 3 shots made: 2" in capsys.readouterr().out
    with pytest.raises(job.BadInput, match="is of a storyboard, which makes it again"):
        generate(**{"from": "film.mp4", "out": "other.mp4"})
    shorter = BOARD.replace("seed: 9", "seed: 8").rsplit("  -", 1)[0]
    board.write_text(shorter)  # all shots are there, but the film is another
    with pytest.raises(job.BadInput, match="film.mp4 exists with another recipe"):
        generate(storyboard="board.yaml", out="film.mp4")
    board.write_text(BOARD.replace("seed: 9", "seed: 8"))
    assert (files / "film.mp4").read_bytes() != film
    assert (files / "film_shots" / "001.mp4").read_bytes() == first


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"prompt": "a"}, "leave out --prompt"),
        ({"task": "loop"}, "leave out --task"),
        ({"num_frames": 9}, "leave out --num_frames"),
        ({"seed": 3}, "leave out --seed"),
        ({"guidance_scale": 0.0}, "leave out --guidance_scale"),
        ({"upsample_tier": "dense"}, "leave out --upsample_tier"),
        ({"storyboard": "film.json"}, "film.json is an input of the storyboard"),
        ({"out": "film.webm"}, "a file that ends in .mp4"),
        ({"out": None}, "a file that ends in .mp4"),
        ({"storyboard": "no.yaml"}, "no.yaml: .*No such file"),
        ({"storyboard": "a.png"}, "a.png"),
        ({"storyboard": "bad.yaml"}, "bad.yaml, line 2: shot 1 has no prompt"),
    ],
)
def test_a_storyboard_that_is_wrong_leaves_nothing_behind(
    generate, files, flags, message
):
    (files / "board.yaml").write_text(BOARD)
    (files / "film.json").write_text('{"shots": [{"prompt": "a", "frames": 5}]}')
    (files / "bad.yaml").write_text("shots:\n  - {frames: 5}\n")
    before = {path: path.stat().st_mtime_ns for path in files.rglob("*")}
    with pytest.raises(job.BadInput, match=message) as error:
        generate(**{"storyboard": "board.yaml", "out": "film.mp4"} | flags)
    assert "\n" not in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in files.rglob("*")} == before


def test_a_gallery_is_not_written_over(generate, files):
    page = files / "new" / "gallery.gif"
    page.parent.mkdir()
    page.write_bytes(b"mine")
    with pytest.raises(job.BadInput, match="gallery.gif exists: give --overwrite"):
        generate(gallery=str(page.parent))
    assert page.read_bytes() == b"mine" and [*page.parent.iterdir()] == [page]


def test_a_loop_from_the_command_line(generate, files):
    generate(prompt="a cat", task="loop", out="loop.mp4", num_frames=13)
    assert video_io.decode(files / "loop.mp4").frames.shape == (12, 16, 16, 3)
    assert recipes.read("loop.mp4")["task"] == "loop"
