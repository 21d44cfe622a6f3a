"""Attention compiled for TPUs that are not there: the kernel, and what chips exchange."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Prints what one chip of four holds and does for the gradient of a row of 16,384 tokens.
PROGRAM = """
import json, re, sys
import jax, jax.numpy as jnp
from sora_jax.core import mesh, xla_flags
from sora_jax.models import attention

xla_flags.set_defaults()

devices = mesh.compile_only("v5e:2x2")
made = mesh.make_mesh(json.loads(sys.argv[1]), devices)
layout = jax.NamedSharding(made, jax.P(None, ("ring", "ulysses"), None, None))
q = jax.ShapeDtypeStruct((1, 16384, 8, 128), jnp.bfloat16, sharding=layout)

def loss(q, k, v):
    return jnp.sum(attention.attention(q, k, v).astype(jnp.float32) ** 2)

with jax.set_mesh(made):
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, q, q).compile()
text, memory = compiled.as_text(), compiled.memory_analysis()
# The gradient's kernel runs in a loop over heads.
kinds = "collective-permute-start|collective-permute-done|splash|while"
events = re.findall(rf"^ *(?:ROOT )?%({kinds})[-.\\w]* = ", text, re.MULTILINE)
sends, beside = 0, 0
for event in events:
    sends += {"collective-permute-start": 1, "collective-permute-done": -1}.get(event, 0)
    beside += sends > 0 and not event.startswith("collective")
print(json.dumps({
    "kernels": text.count("splash"),
    "exchanged": len(re.findall(r"%all-to-all[-.\\w]* = ", text)),
    "beside others": len(re.findall(r"%all-to-all-start[-.\\w]* = ", text)),
    "sent on": text.count("collective-permute-start"),
    "while kernels run": beside,
    "gathered": text.count("all-gather"),
    "temporary": memory.temp_size_in_bytes,
}))
"""


# The scores of two heads alone would be 2 GB.
@pytest.mark.tpu
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"ulysses": 4}, marks=pytest.mark.slow),
        pytest.param({"ring": 4}, marks=pytest.mark.slow),
        {"ring": 2, "ulysses": 2},
    ],
    ids=str,
)
def test_four_chips_share_a_row(libtpu, shape):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_LIBRARY_PATH": libtpu,
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(shape)],
        cwd=ROOT, env=environment, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["kernels"] > 0 and found["gathered"] == 0
    assert (found["exchanged"] > 0) == ("ulysses" in shape)
    assert (found["beside others"] > 0) == ("ulysses" in shape)
    assert (found["sent on"] > 0) == ("ring" in shape)
    assert found["while kernels run"] >= 2 * ("ring" in shape)  # result and gradient
    assert found["temporary"] < 0.4e9
