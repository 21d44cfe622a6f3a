"""What programs need on a slice, how long they take, and what is too large."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


SMALL = {
    "model.dit.dim": 256, "model.dit.num_heads": 2, "model.dit.num_layers": 2,
    "model.dit.mlp_dim": 512, "data.batch_size": 2, "sample.num_frames": 33,
    "sample.height": 480, "sample.width": 480,
}  # fmt: skip


def run(libtpu, *flags, optimization="", **changes):
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    command = [sys.executable, "-m", "sora_jax.preflight", *flags]
    command += [f"--config.{name}={value}" for name, value in changes.items()]
    environment = os.environ | {
        "TPU_LIBRARY_PATH": libtpu, "JAX_ENABLE_COMPILATION_CACHE": "false",
    }  # fmt: skip
    if optimization:  # "O0" compiles several times faster, into a slower program
        environment["JAX_OPTIMIZATION_LEVEL"] = optimization
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.tpu
def test_a_small_denoiser_is_compiled_for_four_chips(libtpu, tmp_path):
    flags = ["--config=configs/wan_1_3b.py", "--topology=v5e:2x2"]
    flags += ["--mesh=fsdp=2,ulysses=2", f"--out={tmp_path / 'found.json'}"]
    code, output, errors = run(libtpu, *flags, **SMALL)
    assert code == 0, errors[-2000:]
    print(output)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["tokens"] == 8100 and found["devices"] == 4
    # All but each block's input is computed twice.
    assert 1.25 < found["recompute"] < 1.45
    assert found["memory"]["optimizer"] == pytest.approx(
        2 * found["memory"]["parameters"], rel=0.01
    )
    names = set(found["collectives"])
    assert {"all-to-all over ulysses", "all-gather over fsdp,ulysses"} <= names
    assert 0 < found["used"] < 0.5 and "GiB" in output
    # Kernels, in XLA's program, make 2 products forward, twice, and 5 for the gradient.
    value = 2 * 2 * 2 * 8100 * 8100 * 256 / 4
    assert found["work"]["flops"] == pytest.approx(value * 9, rel=0.1)
    assert found["seconds"] == pytest.approx(sum(found["parts"].values()))
    assert 0.05 < found["mfu"] < 0.6
    assert "estimated, not measured" in output and output.count("published") == 3


@pytest.mark.tpu
def test_a_step_of_the_sampler_is_compiled(libtpu, tmp_path):
    flags = ["--config=configs/wan_1_3b.py", "--topology=v5e:2x2", "--job=sample"]
    flags += ["--mesh=ulysses=2,fsdp=2", f"--out={tmp_path / 'found.json'}"]
    code, _, errors = run(libtpu, *flags, **SMALL)
    assert code == 0, errors[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["rows"] == 2 and found["runs"] == 50
    assert found["recompute"] == pytest.approx(1, rel=0.1)
    value = 2 * 2 * 2 * 8100 * (8100 + 512) * 256 * 2 / 4  # with guidance
    assert found["work"]["flops"] == pytest.approx(2 * value, rel=0.1)
    assert found["seconds_per_clip"] == pytest.approx(25 * found["seconds"])


@pytest.mark.tpu
@pytest.mark.parametrize(
    "config, what",
    [
        ("toy", "decoding of 3"),
        pytest.param("toy_vae", "step", marks=pytest.mark.slow),
    ],
)
def test_a_video_vae_is_compiled(libtpu, config, what):
    flags = [f"--config=configs/{config}.py", "--topology=v5e:2x2", "--job=vae"]
    changes = {"model.vae.base_dim": 16}
    code, output, errors = run(libtpu, *flags, optimization="O0", **changes)
    assert code == 0, errors[-2000:]
    assert what in output and "estimated, not measured" in output


@pytest.mark.slow
@pytest.mark.tpu
def test_layouts_are_ranked(libtpu, tmp_path):
    flags = ["--config=configs/wan_1_3b.py", "--topology=v5e:2x2", "--search"]
    flags += ["--compile_limit=1", f"--out={tmp_path / 'found.json'}"]
    code, output, errors = run(libtpu, *flags, optimization="O0", **SMALL)
    assert code == 0, errors[-2000:]
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert found["mesh"] in output and "fit by formula" in output
    assert "compiling" in errors


@pytest.mark.tpu
def test_what_does_not_fit_is_said_with_how_much_would(libtpu):
    flags = ["--config=configs/wan_14b.py", "--topology=v5e:2x2", "--mesh=ulysses=4"]
    code, _, errors = run(libtpu, *flags, data__batch_size=1)
    assert code == 1
    assert "take 40.0 GiB of the 15.75 of a device; shard them over 11" in errors
    assert "by formula it would fit on 32 devices with --mesh=" in errors


@pytest.mark.tpu
def test_adapters_of_weights_that_do_not_fit(libtpu):
    """14.3B weights in bfloat16 alone; all of their training state would be 160 GiB."""
    flags = ["--config=configs/wan_14b.py", "--topology=v5e:1x1"]
    code, _, errors = run(libtpu, *flags, data__batch_size=1, lora__rank=16)
    assert code == 1
    assert "optimizer and fixed alone take 27.3 GiB of the 15.75" in errors
    assert "by formula it would fit on 8 devices with --mesh=" in errors


def test_without_a_compiler_or_a_denoiser_it_is_one_sentence(tmp_path):
    flags = ["--config=configs/toy_vae.py", "--topology=v5e:2x2"]
    code, _, errors = run(str(tmp_path / "none.so"), *flags)
    assert code == 2 and "the config is of a vae, not of a denoiser" in errors
    flags = ["--config=configs/toy.py", "--topology=v5e:2x2"]
    code, _, errors = run(str(tmp_path / "none.so"), *flags)
    assert code == 2 and "cannot compile for v5e:2x2" in errors
