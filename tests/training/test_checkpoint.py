"""Weights as files, and runs that are read back."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from sora_jax.core import mesh as meshes
from sora_jax.core import trees
from sora_jax.training import checkpoint, pretrained, run_folder, weight_files
from sora_jax.training import state as states
from tests.training import tiny, tiny_folder


@dataclasses.dataclass(frozen=True)
class Config:
    dim: int = 3
    name: str = "x"


PARAMS = {
    "a": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3)},
    "blocks": {0: {"b": np.ones(2, np.float32)}},
}


def test_weights_come_back(tmp_path):
    checkpoint.save_weights(tmp_path, PARAMS, Config())
    fields = json.loads((tmp_path / "config.json").read_text())
    assert Config(**fields) == Config()
    flat = weight_files.TensorFiles(tmp_path, "weights")
    params = checkpoint.unflatten(flat, PARAMS, "here")
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    before = checkpoint.weights_digest(tmp_path)
    checkpoint.save_weights(tmp_path, PARAMS, Config(dim=4))
    assert checkpoint.weights_digest(tmp_path) != before


def test_every_tensor_that_does_not_fit_is_named():
    flat = trees.flatten(PARAMS)
    flat["extra"] = flat.pop("a.kernel")
    flat["blocks.0.b"] = np.ones(3, np.float32)
    with pytest.raises(ValueError) as error:
        checkpoint.unflatten(flat, PARAMS, "file")
    for part in (
        "file does not fit",
        "a.kernel is missing",
        "extra is unexpected",
        "blocks.0.b has shape (3,), wanted (2,)",
    ):
        assert part in str(error.value)


def test_damaged_components_are_refused(tmp_path):
    def read():
        pretrained.open_component(tmp_path, "text_encoder")

    params = tiny_folder.weights("text_encoder")
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        read()
    checkpoint.save_weights(tmp_path, params, tiny_folder.TEXT)
    read()
    (tmp_path / "weights.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="damaged"):
        read()
    checkpoint.save_weights(tmp_path, params, tiny_folder.TEXT)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        read()


def test_a_run_gives_its_averaged_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        checkpoint.load_run(tmp_path)
    mesh = meshes.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    run_folder.claim(tmp_path, {"seed": 0})
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoint.load_run(tmp_path)
    with jax.set_mesh(mesh):
        state = tiny.train(tmp_path, mesh, num_steps=3)
    run = checkpoint.load_run(tmp_path)
    assert run.step == 3 and run.config.seed == 0
    jax.tree.map(np.testing.assert_array_equal, run.params, jax.device_get(state.ema))
    plain = checkpoint.read_state(tmp_path)["params"]
    jax.tree.map(np.testing.assert_array_equal, plain, jax.device_get(state.params))


def test_only_the_newest_checkpoints_stay(tmp_path):
    mesh = meshes.make_mesh({"fsdp": 1}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        tiny.train(tmp_path, mesh, num_steps=6, checkpoint_every=2, keep_checkpoints=2)
    steps = sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir())
    assert steps == ["4", "6"]
    meta = checkpoint.Checkpointer(tmp_path / "checkpoints", keep=2)
    assert meta.latest() == 6
    meta.close()


def test_keep_0_keeps_all_checkpoints(tmp_path):
    zero = np.zeros((), np.int32)
    params = {"network": {"kernel": np.zeros(2, np.float32)}}
    state = states.TrainState(params, params, (), zero, zero, zero)
    saver = checkpoint.Checkpointer(tmp_path / "checkpoints", keep=0)
    for step in range(1, 5):
        saver.save(step, state, {"seconds": {}})
    saver.close()
    assert checkpoint.steps(tmp_path) == [1, 2, 3, 4]


def test_metrics_rows_are_json(tmp_path):
    mesh = meshes.make_mesh({"fsdp": 1}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        tiny.train(tmp_path, mesh, num_steps=2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[-1])
    for name in ("loss", "grad_norm", "clips_per_second", "data_wait_share", "seconds"):
        assert isinstance(row[name], float), name
    assert any(name.startswith("loss_band/") for name in row)
