"""Every job is refused a folder that another one writes to, before it does any work."""

import pathlib

import jax
import pytest
from absl.testing import flagsaver

from sora_jax.core import paths
from sora_jax.data import shards
from tests import conftest
from tests.data import clips

RECIPE = str(pathlib.Path(__file__).parents[1] / "configs" / "toy.py")


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
    "name, held, flags",
    [
        ("prepare", "out", {"source": "toyworld:tw32", "out": "out"}),
        ("prepare", "out", {"source": "shards:shards", "vae": "vae", "out": "out"}),
        ("prepare", "out", {"source": "latents:out", "text_encoder": "text"}),
        ("train", "out", {"config": RECIPE, "out": "out"}),
        ("evaluate", "out", {"videos": "videos", "reference": "real", "out": "out"}),
        ("evaluate", "out", {"vae": "vae", "shards": "shards", "out": "out"}),
        ("generate", "out", {"model": "run", "prompts": "list.txt", "out": "out"}),
        ("convert", "out.partial", {"from": "weights.npz", "out": "out"}),
    ],
)
def test_a_job_is_refused_a_folder_in_use(name, held, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("a red circle moves left\n")
    (tmp_path / "weights.npz").touch()
    if "shards" in flags:
        shards.write("shards", clips.Clips(num=2))
    with (
        conftest.lone_job(name) as job,
        flagsaver.flagsaver(),
        paths.lock(held),
        jax.set_mesh(jax.sharding.get_mesh()),
        pytest.raises((SystemExit, OSError)) as raised,
    ):
        for flag, value in flags.items():
            job.flags.FLAGS[flag].parse(value)
            job.flags.FLAGS[flag].present = 1
            job.flags.FLAGS[flag].using_default_value = False
        conftest.run_job(job)
    assert f"{held} is in use by process " in str(raised.value)
    assert not (tmp_path / held).exists()  # nothing was written
