"""What a train step needs on a slice: operations, exchanges, memory, and what is too large."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from sora_jax.core import mesh
from sora_jax.models import attention
from sora_jax.training import preflight

ROOT = pathlib.Path(__file__).resolve().parents[2]


def flops(function, *shapes, devices=1):
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return preflight.flops_of(jax.make_jaxpr(function)(*given).jaxpr, devices)


def test_a_loops_products_count_as_often_as_it_runs():
    def layers(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    assert flops(layers, (5, 8), (3, 8, 8)) == 3 * 2 * 5 * 8 * 8
    gradient = jax.grad(lambda x, w: jnp.sum(layers(x, w)), (0, 1))
    assert flops(gradient, (5, 8), (3, 8, 8)) == 3 * 3 * 2 * 5 * 8 * 8
    again = jax.checkpoint(lambda x, w: jnp.sum(jnp.sin(x @ w)))
    once = jax.grad(lambda x, w: jnp.sum(jnp.sin(x @ w)), (0, 1))
    twice = flops(jax.grad(again, (0, 1)), (5, 8), (8, 8))
    assert twice / flops(once, (5, 8), (8, 8)) == pytest.approx(4 / 3)


def test_a_kernel_counts_by_formula_and_a_devices_part_for_all():
    shape = 1, 4096, 2, 128  # scores beyond a chunk, so the kernel has a say
    value = 4 * 4096 * 4096 * 2 * 128
    assert flops(attention.attention, *[shape] * 3) == value

    def loss(*qkv):
        return jnp.sum(attention.attention(*qkv))

    assert flops(jax.grad(loss, (0, 1, 2)), *[shape] * 3) == pytest.approx(
        3 * value, rel=1e-3
    )
    for axis in ("ulysses", "ring"):
        with jax.set_mesh(mesh.make_mesh({axis: 2}, jax.devices()[:2])):
            layout = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(None, axis))
            qkv = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout)] * 3
            traced = jax.jit(attention.attention).trace(*qkv)
            assert preflight.flops_of(traced.jaxpr.jaxpr, 2) == value
            traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*qkv)
            found = preflight.flops_of(traced.jaxpr.jaxpr, 2)
            assert found == pytest.approx(3 * value, rel=1e-3)


PROGRAM = """
%body.1 (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %all-to-all.1 = bf16[8,4]{1,0} all-to-all(%x), channel_id=3, replica_groups=mesh['fsdp'=2,'ulysses'=2] {'ulysses'}, dimensions={0}
  %async-collective-start = (bf16[2,4], bf16[8,4]) fusion(%w), kind=kCustom, calls=%fused.7
  %async-collective-done = bf16[8,4] fusion(%async-collective-start), kind=kCustom, calls=%fused.8
}

%fused.7 (p: bf16[2,4]) -> (bf16[2,4], bf16[8,4]) {
  %all-gather.5 = bf16[8,4]{1,0} all-gather(%p), channel_id=9, replica_groups=mesh['fsdp'=2,'ulysses'=2] {'fsdp','ulysses'}, dimensions={0}
}

%fused.8 (p: bf16[2,4]) -> bf16[8,4] {
  %all-gather.6 = bf16[8,4]{1,0} all-gather(%p), channel_id=9, replica_groups=mesh['fsdp'=2,'ulysses'=2] {'fsdp','ulysses'}, dimensions={0}
}

%condition.1 (p: (s32[], bf16[8,4])) -> pred[] {
  %constant.4 = s32[]{:T(128)} constant(30)
  ROOT %lt = pred[] compare(%i, %constant.4), direction=LT
}

ENTRY %main.2 (p: bf16[8,4]) -> bf16[8,4] {
  %while.1 = (s32[], bf16[8,4]) while(%t), condition=%condition.1, body=%body.1
  %all-reduce.3 = f32[16]{0} all-reduce(%g), channel_id=4, replica_groups=mesh['fsdp'=2,'ulysses'=2] {'fsdp'}, to_apply=%add
}
"""


def test_exchanges_count_by_axis_and_as_often_as_their_loop_runs():
    assert preflight.collectives(PROGRAM) == {
        "all-to-all over ulysses": (30 * 64, 0),
        "all-gather over fsdp,ulysses": (30 * 64, 30 * 64),
        "all-reduce over fsdp": (64, 0),
    }


SMALL = {
    "model.dit.dim": 256, "model.dit.num_heads": 2, "model.dit.num_layers": 2,
    "model.dit.mlp_dim": 512, "data.batch_size": 2, "sample.num_frames": 33,
    "sample.height": 480, "sample.width": 480,
}  # fmt: skip


def run(libtpu, *flags, **changes):
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    command = [sys.executable, "-m", "sora_jax.preflight", *flags]
    command += [f"--config.{name}={value}" for name, value in changes.items()]
    environment = os.environ | {
        "TPU_LIBRARY_PATH": libtpu, "JAX_ENABLE_COMPILATION_CACHE": "false",
    }  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True
    )
    return done.returncode, done.stdout, done.stderr


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


@pytest.mark.tpu
def test_what_does_not_fit_is_said_with_how_much_would(libtpu):
    flags = ["--config=configs/wan_14b.py", "--topology=v5e:2x2", "--mesh=ulysses=4"]
    code, _, errors = run(libtpu, *flags, data__batch_size=1)
    assert code == 1
    assert "take 40.0 GiB of the 15.75 of a device; split them over 11" in errors


def test_without_a_compiler_or_a_denoiser_it_is_one_sentence(tmp_path):
    flags = ["--config=configs/toy_vae.py", "--topology=v5e:2x2"]
    code, _, errors = run(str(tmp_path / "none.so"), *flags)
    assert code == 2 and "the config is of a vae, not of a denoiser" in errors
    flags = ["--config=configs/toy.py", "--topology=v5e:2x2"]
    code, _, errors = run(str(tmp_path / "none.so"), *flags)
    assert code == 2 and "cannot compile for v5e:2x2" in errors
