"""A run folder belongs to one run, which may go on elsewhere, and longer."""

import math

import pytest

from configs import toy
from sora_jax.core import config as configs
from sora_jax.data import shards
from sora_jax.models import video_vae
from sora_jax.training import checkpoint, run_folder, trained_vae
from tests.data import clips
from tests.evals import tiny_run
from tests.training.tiny_job import write_latents


def recipe(**changes):
    c = toy.get_config()
    c.update_from_flattened_dict({n.replace("__", "."): v for n, v in changes.items()})
    return c


@pytest.fixture
def run(tmp_path):
    """A folder of a run that has taken 600 steps of 1000."""
    run_folder.claim(tmp_path, recipe(loop__num_steps=1000))
    (tmp_path / "checkpoints" / "600").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    "changes",
    [
        {"model__dit__dim": 320}, {"model__dit__dtype": "bfloat16"}, {"noise__shift": 2.0},
        {"known__known_tau": 0.1}, {"seed": 1}, {"data__batch_size": 8},
        {"data__crops": ((1.0, ((5, 0, 0, 1),)),)}, {"text__length": 12},
        {"optim__learning_rate": 1.0, "loop__num_steps": 2000}, {"packing__window": 9},
        {"reconstruction__l1": 1.0}, {"objective": "vae"}, {"sample__levels": "diffusers"},
    ],
)  # fmt: skip
def test_what_defines_a_run_is_refused(run, changes):
    with pytest.raises(ValueError) as refused:
        run_folder.check(run, recipe(**{"loop__num_steps": 1000} | changes))
    name, value = next(iter(changes.items()))
    assert f"{name.replace('__', '.')}: " in str(refused.value)
    assert f"now {value!r}" in str(refused.value)
    assert "num_steps" not in str(refused.value)


def test_a_run_may_go_on_elsewhere_and_longer(run):
    begun = run_folder.digest(run)
    assert begun == configs.digest(configs.read(run))
    elsewhere = {
        "mesh__fsdp": 2, "mesh__tensor": 4, "model__dit__remat": "none",
        "data__latents": "/other", "init": "/gone", "loop__checkpoint_every": 7,
        "loop__accumulation": 2, "sample__fps": 24.0, "loop__num_steps": 1000,
    }  # fmt: skip
    longer = elsewhere | {"loop__num_steps": 2000}
    for changes in (elsewhere, longer):
        run_folder.check(run, recipe(**changes))
        assert run_folder.claim(run, recipe(**changes))
        assert configs.difference(configs.read(run), recipe(**changes)) == []
        assert run_folder.claim(run, recipe(**changes)) == []
    first, second = run_folder.changes(run)
    assert first["was"]["mesh.fsdp"] == -1 and first["now"]["mesh.fsdp"] == 2
    assert (second["step"], second["was"], second["now"]) == (
        600, {"loop.num_steps": 1000}, {"loop.num_steps": 2000},
    )  # fmt: skip
    # The weights of step 600 are what they were; later ones follow a longer schedule.
    assert run_folder.digest(run) == run_folder.digest(run, 600) == begun
    assert run_folder.digest(run, 601) == configs.digest(recipe(loop__num_steps=2000))
    with pytest.raises(ValueError, match=r"num_steps is 599, but .* has taken 600"):
        run_folder.check(run, recipe(loop__num_steps=599))


def test_what_the_first_checkpoint_is_made_of_stays_until_there_is_one(tmp_path):
    run_folder.claim(tmp_path, recipe(init="/a"))
    with pytest.raises(ValueError, match=r"init: '/a', now '/b'"):
        run_folder.check(tmp_path, recipe(init="/b"))


def test_other_data_under_any_path_is_refused(tmp_path):
    run_folder.keep_data(tmp_path, "data.latents", ["refused start"])
    run_folder.keep_data(tmp_path, "data.latents", ["a", "b"])
    run_folder.claim(tmp_path, recipe())
    run_folder.keep_data(tmp_path, "data.latents", ["a", "b"])
    with pytest.raises(ValueError, match="data.latents names other data than the run"):
        run_folder.keep_data(tmp_path, "data.latents", ["b", "a"])


def test_the_job_tells_what_has_changed_and_what_follows(tmp_path, start, capsys):
    shards.write(tmp_path / "shards", clips.Clips(num=24, per_part=12))
    vae = video_vae.Config(latent_channels=4, base_dim=4, num_res_blocks=1)
    params = tiny_run.filled(trained_vae.networks_of(vae).abstract()["vae"])
    for name, grid in (("latents", (2, 2, 2)), ("others", (2, 2, 4))):
        write_latents(tmp_path / name, tmp_path / "shards", grid)
        checkpoint.save_weights(tmp_path / name / "vae", params, vae)
    given = {"loop__num_steps": 60}
    start("run", data__latents=str(tmp_path / "latents"), **given)
    assert configs.read(tmp_path / "run").sample.fps == 8.0  # that of its clips
    (tmp_path / "run" / "checkpoints" / "40").mkdir(parents=True)
    (tmp_path / "latents").rename(tmp_path / "elsewhere")
    given |= {"mesh__fsdp": 4, "mesh__tensor": 2, "loop__num_steps": 90}
    with pytest.raises(SystemExit, match="data.latents names other data than the run"):
        start("run", data__latents=str(tmp_path / "others"), **given)
    with pytest.raises(SystemExit, match="noise.shift: 12.0, now 2.0"):
        start("run", data__latents=str(tmp_path / "elsewhere"), noise__shift=2.0)
    assert not run_folder.changes(tmp_path / "run")
    capsys.readouterr()
    call = start("run", data__latents=str(tmp_path / "elsewhere"), **given)
    assert call.args[0].num_steps == 90 and call.kwargs["mesh"].shape["tensor"] == 2
    said = capsys.readouterr().err
    assert (
        "a changed config: data.latents: " in said and "mesh.tensor: 1, now 2" in said
    )
    assert "the learning rate, data.crops and" in said
    (change,) = run_folder.changes(tmp_path / "run")
    assert change["step"] == 40 and change["now"]["loop.num_steps"] == 90


@pytest.mark.parametrize("name", ["optim.clip_norm", "noise.std", "optim.b1"])
def test_the_job_refuses_a_number_before_it_reads_any_data(tmp_path, start, name):
    with pytest.raises(
        SystemExit, match=rf"train: {name} is inf; it must be a number in"
    ):
        start("run", **{name.replace(".", "__"): math.inf})
    assert not (tmp_path / "run").exists()
