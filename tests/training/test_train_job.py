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
from sora_jax.data import latent_cache, shards, toy_clips
from sora_jax.models import video_vae
from sora_jax.training import checkpoint, metrics, stopping, trained_vae, weight_files
from tests.data import clips
from tests.training import tiny_lpips

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 20
TINY = {
    "model.dit.dim": 32, "model.dit.num_heads": 2, "model.dit.num_layers": 1,
    "model.dit.mlp_dim": 32, "model.dit.text_dim": 16, "model.dit.freq_dim": 16,
    "model.dit.in_channels": 4, "model.dit.out_channels": 4,
    "model.text_encoder.num_layers": 1, "model.text_encoder.num_heads": 2,
    "model.text_encoder.head_dim": 8, "model.text_encoder.mlp_dim": 16,
    "text.vocab_size": 300, "optim.learning_rate_factors": "()", "data.batch_size": 8, "loop.num_steps": STEPS,
    "loop.log_every": 1, "loop.checkpoint_every": 4,
}  # fmt: skip


def write_latents(out, shards_folder, grid):
    """A cache of made-up latents of four channels."""

    def encode(batch):
        numbers = np.array([clip.frames()[0, 0, 0, 0] for clip in batch])
        noise = np.random.default_rng(numbers.tolist()).normal(size=(*grid, 4))
        return (noise + numbers[:, None, None, None, None] / 24).astype(np.float32)

    latent_cache.write(
        out, shards.open(shards_folder), encode, vae_digest="tiny", preprocessing={}
    )


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


def test_another_config_is_refused_with_the_difference(folder, uninterrupted):
    changed = command(folder, uninterrupted, optim__learning_rate=0.5)
    code, output = run_job(changed)
    assert code == 1 and "optim.learning_rate: 0.003, now 0.5" in output


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


def test_patches_that_do_not_divide_are_named_before_a_run_begins(folder):
    arguments = command(folder, folder / "patch", model__dit__patch="(1,4,4)")
    code, output = run_job(arguments)
    assert code == 1 and "do not divide into patches of 1 x 4 x 4" in output
    assert not (folder / "patch" / "config.py.txt").exists()


def test_what_does_not_divide_is_named(folder):
    arguments = command(folder, folder / "odd", data__batch_size=6, mesh__fsdp=4)
    code, output = run_job(arguments, devices=4)
    assert code == 1 and "data.batch_size is 6, which does not divide" in output


def test_clips_without_the_captions_asked_for_are_refused(folder):
    tiers = {f"text__tiers__{tier}": 0 for tier in ("short", "medium")}
    arguments = command(folder, folder / "mute", **tiers, text__tiers__alt=1)
    code, output = run_job(arguments)
    assert code == 1 and "no clip has a caption of the tiers ['alt']" in output
    # What was refused has not begun: the same folder takes the right command.
    code, output = run_job(command(folder, folder / "mute", loop__num_steps=1))
    assert code == 0, output


def test_a_random_text_encoder_is_not_trained_at_the_rate_of_a_trained_one(folder):
    slow = '(("^text_encoder",0.1),)'
    arguments = command(folder, folder / "slow", optim__learning_rate_factors=slow)
    code, output = run_job(arguments)
    assert code == 1 and "text.encoder names no trained text encoder" in output
    assert "Traceback" not in output


@pytest.fixture(scope="module")
def text_run(folder):
    """The run of a text encoder, three steps long."""
    run = folder / "text"
    text = {"objective": "text_encoder", "text__target": "dense"}
    code, output = run_job(command(folder, run, loop__num_steps=3, **text))
    assert code == 0, output
    return run


def test_a_run_goes_on_with_what_it_began_with(folder, text_run, tmp_path):
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
    code, output = run_job(arguments)
    assert code == 1 and "another file now" in output and "Traceback" not in output


def test_a_denoiser_begins_with_the_text_encoder_it_is_given(
    folder, text_run, tmp_path
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

    other = command(
        folder, tmp_path / "other", text__encoder=text, model__text_encoder__head_dim=4
    )
    code, output = run_job(other)
    assert code == 1 and "head_dim: 8, now 4" in output
    code, output = run_job(
        command(folder, tmp_path / "none", text__encoder=tmp_path / "nothing")
    )
    assert code == 1 and "is neither a finished run of objective text_encoder" in output
    assert "Traceback" not in output


def test_a_video_vae_learns_from_lpips(tmp_path):
    """The file is copied, is in no checkpoint, and the run goes on without it."""
    shards.write(tmp_path / "shards", toy_clips.ToyClips("tw32", 8))
    weights, run = tmp_path / "lpips.safetensors", tmp_path / "run"
    recipe = {
        "objective": "vae", "data__shards": tmp_path / "shards",
        "data__eval_shards": tmp_path / "shards", "data__eval_clips": 8,
        "model__vae__base_dim": 8, "model__vae__latent_channels": 4,
        "reconstruction__lpips": 0.5, "loop__num_steps": 2,
    }  # fmt: skip
    code, output = run_job(command(tmp_path, run, **recipe))
    assert code == 1 and "names no file of weights" in output
    recipe["reconstruction__lpips_weights"] = weights
    code, output = run_job(command(tmp_path, run, **recipe))
    assert code == 1 and "without it everything but LPIPS is computed" in output
    assert "Traceback" not in output and not run.exists()
    tiny_lpips.write(weights)
    small = recipe | {"data__crops": "((1.0,((5,16,32,1),)),)"}
    code, output = run_job(command(tmp_path, run, **small))
    assert code == 1 and "pixels, not 16 x 32" in output and not run.exists()
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


def test_clips_of_several_sizes_train_in_packed_rows(folder, tmp_path):
    caches = [folder / "latents"]
    for number, grid in enumerate([(1, 2, 2), (3, 2, 4), (4, 4, 4)]):
        caches.append(tmp_path / f"latents{number}")
        write_latents(caches[-1], folder / "shards", grid)
    packed = {
        "data.latents": ",".join(map(str, caches)), "data.batch_size": 8,
        "packing.shapes": 3, "packing.unit": 8, "packing.clips": 10,
        "packing.window": 960, "loop.num_steps": 12,
    }  # fmt: skip
    found = {}
    for devices in (1, 4):
        run = tmp_path / f"on{devices}"
        code, output = run_job(command(folder, run, **packed), devices=devices)
        assert code == 0, output
        assert "packing: rows of 1 x 16, 2 x 8 tokens a group" in output
        found[devices] = losses(run)
    assert len(found[1]) == 12
    np.testing.assert_allclose(found[4], found[1], rtol=2e-4)
    row = metrics.read(run / "metrics.jsonl")[-1]
    assert 0 <= row["padding"] < 0.05 and row["clips_per_row"] >= 1
    # More padding than allowed, and sizes without packing, end before a run begins.
    for changes, message in (
        ({"packing.clips": 1}, "padding, more than packing.max_padding"),
        ({"packing.shapes": 0}, "4 folders: rows of several need packing.shapes"),
    ):
        code, output = run_job(command(folder, tmp_path / "no", **packed | changes))
        assert code == 1 and message in output
        assert not (tmp_path / "no" / "checkpoints").exists()
        assert not (tmp_path / "no" / "vae").exists()
