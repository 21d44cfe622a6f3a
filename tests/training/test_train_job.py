"""The train job as a user runs it: killed, stopped, in several processes."""

import contextlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from sora_jax.core import trees
from sora_jax.data import shards, toy_clips
from sora_jax.models import video_vae
from sora_jax.training import checkpoint, metrics, stopping, trained_vae, weight_files
from tests.data import clips
from tests.training import tiny_lpips
from tests.training.tiny_job import STEPS, TINY, write_latents

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A latent cache with four channels and the VAE it claims to come from."""
    base = tmp_path_factory.mktemp("job")
    shards.write(base / "shards", clips.Clips(num=24, per_part=12))

    write_latents(base / "latents", base / "shards", (2, 2, 2))
    config = video_vae.Config(latent_channels=4, base_dim=4, num_res_blocks=1)
    params = trained_vae.networks_of(config).init(jax.random.key(0))["vae"]
    checkpoint.save_weights(base / "latents" / "vae", jax.device_get(params), config)
    return base


def command(folder, run, **changes):
    values = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    return [
        sys.executable, "-m", "sora_jax.train", "--config=configs/toy.py",
        f"--out={run}", f"--config.data.latents={folder / 'latents'}",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]  # fmt: skip


def environment(devices):
    flags = (
        f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    )
    return os.environ | {"XLA_FLAGS": flags}


def run_job(arguments, devices=1, timeout=240):
    found = subprocess.run(
        arguments, cwd=ROOT, env=environment(devices), text=True,
        capture_output=True, timeout=timeout,
    )  # fmt: skip
    return found.returncode, found.stderr + found.stdout


def losses(run):
    rows = metrics.read(run / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row]


def wait_for_losses(run, count, seconds=240):
    """Returns when a run has logged so many steps, or when the time is up."""
    deadline = time.monotonic() + seconds
    while len(losses(run)) < count and time.monotonic() < deadline:
        time.sleep(0.02)


def final(run):
    state = checkpoint.read_state(run)
    assert state["step"] == STEPS
    return state["params"], state["ema"]


@pytest.fixture(scope="module")
def uninterrupted(folder):
    run = folder / "whole"
    code, output = run_job(command(folder, run))
    assert code == 0, output
    return run


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_runs_end_with_the_same_bits(folder, uninterrupted, kills):
    run = folder / f"killed{kills}"
    moments = random.Random(0)
    for _ in range(kills):
        # From the first import to the last save, wherever the moment falls.
        before = len(losses(run))
        job = subprocess.Popen(
            command(folder, run), cwd=ROOT, env=environment(1),
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for = before + moments.randrange(1, max(2, (STEPS - before) // 2))
        deadline = time.monotonic() + 120
        while job.poll() is None and time.monotonic() < deadline:
            if len(losses(run)) >= wait_for:
                time.sleep(moments.uniform(0, 0.1))
                break
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            job.send_signal(signal.SIGKILL)
        job.wait()
    code, output = run_job(command(folder, run))
    assert code == 0, output
    # The same loss at every step is the same data in the same order.
    assert losses(run) == losses(uninterrupted)
    for found, wanted in zip(final(run), final(uninterrupted), strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert optimizer_state(run) == optimizer_state(uninterrupted)


def optimizer_state(run):
    """Every leaf of the newest checkpoint's optimizer state, as bytes."""
    leaves = checkpoint.read_state(run)["opt_state"]
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(leaves)]


def test_a_stopped_job_has_its_own_exit_code(folder):
    """By Ctrl-C; SIGTERM is told to the loop in tests/training/test_loop.py."""
    run = folder / "stopped"
    arguments = command(folder, run, loop__num_steps=100_000)
    job = subprocess.Popen(
        arguments, cwd=ROOT, env=environment(1), stderr=subprocess.PIPE, text=True
    )
    wait_for_losses(run, 1)
    job.send_signal(signal.SIGINT)
    output = job.communicate(timeout=120)[1]
    assert job.returncode == stopping.PREEMPTED_EXIT_CODE, output
    assert "the state is saved" in output
    assert checkpoint.load_run(run).step >= len(losses(run)) - 1 > 0


def pod(folder, run, devices=2, **changes):
    """The command of two processes with so many devices each."""
    launcher = ["launch/local_pod.py", "--processes", "2", "--devices", str(devices)]
    job = command(folder, run, **({"mesh__fsdp": 2, "mesh__tensor": 2} | changes))
    return [sys.executable, *launcher, "--grace", "2", "--", *job]


@pytest.fixture(scope="module")
def uninterrupted_pod(folder):
    run = folder / "pod"
    code, output = run_job(pod(folder, run))
    assert code == 0, output
    return run


def test_two_processes_do_what_one_does(uninterrupted_pod, uninterrupted):
    np.testing.assert_allclose(
        losses(uninterrupted_pod), losses(uninterrupted), rtol=1e-5
    )


@pytest.mark.slow
def test_processes_that_split_no_rows_read_the_same_ones(folder, tmp_path):
    """Two processes that hold half of every head each, beside one."""
    text = {"objective": "text_encoder", "text__target": "dense", "loop__num_steps": 5}
    code, output = run_job(command(folder, tmp_path / "one", **text))
    assert code == 0, output
    two = pod(folder, tmp_path / "two", devices=1, mesh__fsdp=1, **text)
    code, output = run_job(two)
    assert code == 0, output
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    np.testing.assert_allclose(two, one, rtol=1e-5)


@pytest.mark.slow
def test_a_pod_that_loses_a_process_goes_on_exactly(folder, uninterrupted_pod):
    run = folder / "bereft"
    said = folder / "bereft.txt"
    with said.open("w") as file:
        launcher = subprocess.Popen(
            pod(folder, run), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        )
    wait_for_losses(run, 6)
    assert losses(run), said.read_text()
    children = pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    members = [int(pid) for pid in children.read_text().split()]
    assert len(members) == 2
    os.kill(members[1], signal.SIGKILL)
    assert launcher.wait(timeout=120) != 0
    assert not any(pathlib.Path(f"/proc/{pid}").exists() for pid in members)
    assert 6 <= len(losses(run)) < STEPS
    code, output = run_job(pod(folder, run))
    assert code == 0, output
    assert losses(run) == losses(uninterrupted_pod)
    for found, wanted in zip(final(run), final(uninterrupted_pod), strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_another_config_is_refused_with_the_difference(folder, uninterrupted, start):
    given = {"data__latents": folder / "latents", "optim__learning_rate": 0.5}
    with pytest.raises(SystemExit, match="optim.learning_rate: 0.003, now 0.5"):
        start(uninterrupted, **given)


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.data.latent=x", 'Did you mean "latents" instead of "latent"?'),
        (
            "--config=configs/nope.py",
            "train: --config names a file or field that does not exist",
        ),
        ("--bogus=1", "train: Unknown command line flag 'bogus'"),
    ],
)
def test_a_field_or_recipe_that_is_not_there_is_one_sentence(folder, flag, message):
    code, output = run_job([*command(folder, folder / "typo"), flag])
    assert code == 2 and message in output, output
    assert "Traceback" not in output


def test_a_recipe_that_is_not_there_is_one_sentence_also_where_none_of_it_is_changed(
    folder,
):
    alone = [sys.executable, "-m", "sora_jax.train", "--config=configs/nope.py"]
    code, output = run_job([*alone, f"--out={folder / 'typo'}"])
    assert (
        code == 2
        and "train: --config names a file or field that does not exist" in output
    )
    assert "Traceback" not in output and not (folder / "typo").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model__dit__patch": (1, 4, 4)}, "do not divide into patches of 1 x 4 x 4"),
        ({"data__batch_size": 6}, "data.batch_size is 6, which does not divide"),
        (
            {"optim__learning_rate_factors": (("^text_encoder", 0.1),)},
            "text.encoder names no trained text encoder",
        ),
        (
            {
                f"text__tiers__{tier}": tier == "alt"
                for tier in ("short", "medium", "structured", "alt")
            },
            r"no clip has a caption of the tiers \['alt'\]",
        ),
    ],
)
def test_what_cannot_be_trained_is_named_before_a_run_begins(
    folder, start, tmp_path, changes, message
):
    latents = {"data__latents": folder / "latents"}
    with pytest.raises(SystemExit, match=message):
        start("run", **latents, **changes)
    assert not (tmp_path / "run" / "config.py.txt").exists()
    start("run", **latents)  # the same folder takes the right command


@pytest.fixture(scope="module")
def text_run(folder):
    """The run of a text encoder, three steps long."""
    run = folder / "text"
    text = {"objective": "text_encoder", "text__target": "dense"}
    code, output = run_job(command(folder, run, loop__num_steps=3, **text))
    assert code == 0, output
    return run


def test_a_run_goes_on_with_what_it_began_with(folder, text_run, start, tmp_path):
    """Neither the text encoder that it began with nor other latents are needed."""
    text, run, base = (tmp_path / name for name in ("text", "run", "base"))
    shutil.copytree(text_run, text)
    shutil.copytree(folder / "latents", base / "latents")
    arguments = command(base, run, text__encoder=text, loop__num_steps=4)
    code, output = run_job(arguments)
    assert code == 0, output
    shutil.rmtree(text)
    code, output = run_job(arguments)
    assert code == 0, output
    weights = base / "latents" / "vae" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    given = {"data__latents": base / "latents", "text__encoder": text}
    with pytest.raises(SystemExit, match="another file now"):
        start(run, **given, loop__num_steps=4)


def test_a_denoiser_begins_with_the_text_encoder_it_is_given(
    folder, text_run, start, tmp_path
):
    text, run = text_run, tmp_path / "run"
    given = weight_files.TensorFiles(text / "text_encoder", "weights")
    still = {"optim__learning_rate": 0.0, "optim__muon_learning_rate": 0.0}
    arguments = command(folder, run, text__encoder=text, loop__num_steps=1, **still)
    code, output = run_job(arguments)
    assert code == 0, output
    found = trees.flatten(checkpoint.load_run(run).params["text_encoder"])
    assert found.keys() == given.keys()
    for name, value in given.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert (run / "tokenizer.model").read_bytes() == (
        text / "tokenizer.model"
    ).read_bytes()

    latents = {"data__latents": folder / "latents"}
    with pytest.raises(SystemExit, match="head_dim: 8, now 4"):
        start("other", **latents, text__encoder=text, model__text_encoder__head_dim=4)
    with pytest.raises(SystemExit, match="is neither a finished run of objective text"):
        start("none", **latents, text__encoder=tmp_path / "nothing")


@pytest.mark.slow
def test_a_video_vae_learns_from_lpips(start, tmp_path):
    """The file is copied, is in no checkpoint, and the run goes on without it."""
    shards.write(tmp_path / "shards", toy_clips.ToyClips("tw32", 8))
    weights, run = tmp_path / "lpips.safetensors", tmp_path / "run"
    recipe = {
        "objective": "vae", "data__shards": tmp_path / "shards",
        "data__eval_shards": tmp_path / "shards", "data__eval_clips": 8,
        "model__vae__base_dim": 8, "model__vae__latent_channels": 4,
        "reconstruction__lpips": 0.5, "loop__num_steps": 2,
    }  # fmt: skip
    with pytest.raises(SystemExit, match="names no file of weights"):
        start(run, **recipe)
    recipe["reconstruction__lpips_weights"] = weights
    with pytest.raises(SystemExit, match="without it everything but LPIPS is computed"):
        start(run, **recipe)
    assert not run.exists()
    tiny_lpips.write(weights)
    with pytest.raises(SystemExit, match="at least 31 x 31 pixels, not 16 x 32"):
        start(run, **recipe, data__crops=((1.0, ((5, 16, 32, 1),)),))
    assert not run.exists()
    code, output = run_job(command(tmp_path, run, **recipe))
    assert code == 0, output
    assert checkpoint.networks_in(run).keys() == {"vae"}
    assert [path.name for path in (run / "vae").iterdir()].count("config.json") == 1
    rows = metrics.read(run / "metrics.jsonl")
    assert rows[0]["lpips"] > 0
    assert any(row.get("reconstruction/lpips", 0) > 0 for row in rows)
    weights.unlink()
    code, output = run_job(command(tmp_path, run, **recipe))
    assert code == 0, output


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    """The recipe of rows of clips of four sizes, and its run on one device."""
    base = tmp_path_factory.mktemp("packed")
    caches = [folder / "latents"]
    for number, grid in enumerate([(1, 2, 2), (3, 2, 4), (4, 4, 4)]):
        caches.append(base / f"latents{number}")
        write_latents(caches[-1], folder / "shards", grid)
    recipe = {
        "data.latents": ",".join(map(str, caches)), "data.batch_size": 8,
        "packing.shapes": 3, "packing.unit": 8, "packing.clips": 10,
        "packing.window": 960, "loop.num_steps": 12,
    }  # fmt: skip
    code, output = run_job(command(folder, base / "run", **recipe))
    assert code == 0, output
    assert "packing: rows of 1 x 16, 2 x 8 tokens a group" in output
    return recipe, base / "run"


def test_clips_of_several_sizes_train_in_packed_rows(packed, start, tmp_path):
    recipe, run = packed
    assert len(losses(run)) == 12
    row = metrics.read(run / "metrics.jsonl")[-1]
    assert 0 <= row["padding"] < 0.05 and row["clips_per_row"] >= 1
    # More padding than allowed, and sizes without packing, end before a run begins.
    for changes, message in (
        ({"packing.clips": 1}, "padding, more than packing.max_padding"),
        ({"packing.shapes": 0}, "4 folders: rows of several need packing.shapes"),
    ):
        with pytest.raises(SystemExit, match=message):
            start("no", **recipe | changes)
        assert not (tmp_path / "no" / "checkpoints").exists()
        assert not (tmp_path / "no" / "vae").exists()


@pytest.mark.slow
def test_packed_rows_are_the_same_on_four_devices(folder, packed, tmp_path):
    recipe, run = packed
    code, output = run_job(command(folder, tmp_path / "four", **recipe), devices=4)
    assert code == 0, output
    np.testing.assert_allclose(losses(tmp_path / "four"), losses(run), rtol=2e-4)
