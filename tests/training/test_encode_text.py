"""A denoiser on stored text states: the same loss, without the text encoder."""

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.core import digests, rng
from sora_jax.core import mesh as meshes
from sora_jax.data import latent_cache, shards, text_cache
from sora_jax.generation import pipeline
from sora_jax.models import dit
from sora_jax.training import (
    checkpoint,
    encode_latents,
    encode_text,
    initial,
    jobs,
    loop,
    metrics,
    pretrained,
)
from tests import conftest
from tests.data import clips
from tests.training import test_initial, tiny_folder

# Half of the rows have the null text's states.
HOW = {"data__batch_size": 8, "text__length": 24, "text__dropout": 0.5}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Weights, and latents: alone, and with states of either type beside them."""
    base = tiny_folder.write_with_latents(tmp_path_factory.mktemp("states"))
    for dtype in ("float32", "bfloat16"):
        (base / dtype).mkdir()
        shutil.copytree(base / "latents", base / dtype / "latents")
        encode_text.encode(
            base / dtype / "latents", base / "folder", length=24, dtype=dtype
        )
    (base / "float32" / "folder").symlink_to(base / "folder")
    return base


def recipe(made, which=".", **changes):
    where = {"data__latents": str(made / which / "latents")}
    return test_initial.recipe(made, **HOW | where | changes)


def job_of(c, run):
    """The job on four devices, and their mesh."""
    mesh = meshes.make_mesh({"fsdp": 2, "tensor": 2}, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        return jobs.denoiser(c, run, mesh), mesh


def losses(c, run, steps=3):
    """The first batches' losses at the weights that the run begins with."""
    job, mesh = job_of(c, run)
    with jax.set_mesh(mesh):
        params = job.initial() | job.fixed()
        assert params.keys() == job.objective.networks.abstract().keys()

        @jax.jit
        def loss(params, batch, step):
            batch = job.objective.draw(rng.key(c.seed, "train", step), batch, 0.0)
            modules = job.objective.networks.bind(params)
            total, weight, _ = job.objective.loss(modules, batch)
            return total / weight, batch["drop"]

        found = []
        with job.batches(0) as rows:
            for step in range(steps):
                value, drop_b = loss(params, loop.to_device(next(rows), mesh), step)
                found.append(float(value))
                assert 0 < drop_b.sum() < 8
    return job, found


@pytest.mark.parametrize("changes", [{}, {"model__dit__mask_text": True}], ids=str)
def test_the_loss_is_that_of_the_text_encoder(made, tmp_path, monkeypatch, changes):
    """On stored float32 to rounding, on bfloat16 to bfloat16's; half have no text."""
    read = pretrained.Component.fitted

    def fitted(component, config):  # the folder's transformer sees padding
        if changes and component.kind.config is dit.Config:
            config = dataclasses.replace(config, mask_text=False)
        return read(component, config)

    monkeypatch.setattr(pretrained.Component, "fitted", fitted)
    plain, wanted = losses(recipe(made, **changes), tmp_path / "plain")
    cached, found = losses(recipe(made, "float32", **changes), tmp_path / "f")
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    _, half = losses(recipe(made, "bfloat16", **changes), tmp_path / "b")
    np.testing.assert_allclose(half, wanted, rtol=2**-8)
    assert half != found
    assert plain.objective.networks.abstract().keys() == {"dit", "text_encoder"}
    assert cached.objective.networks.abstract().keys() == {"dit"}
    assert plain.fixed().keys() == {"text_encoder"} and cached.fixed() == {}


def test_states_are_those_of_the_encoder(made):
    """Every caption of every tier and the null text, by the numbers; padding aside."""
    folder = made / "float32" / "latents"
    component = pretrained.open_component(
        made / "folder" / "text_encoder", "text_encoder"
    )
    _, tokenizer = initial.read_tokenizer(made / "folder", True)
    found = text_cache.open(encode_text.cache_folder(folder))
    source = latent_cache.open(folder)
    texts = ["", *sorted({*source.all_captions()})]
    assert len(found) == len(texts) == 20
    ids_bl, mask_bl = tokenizer.encode(texts, 24)
    wanted = np.asarray(component.module()(jnp.asarray(ids_bl), jnp.asarray(mask_bl)))
    for row, expected_ld in enumerate(wanted):
        states_ld = found.padded(ids_bl[row], mask_bl[row])
        np.testing.assert_allclose(states_ld, expected_ld, atol=1e-5)
    assert found.manifest["settings"]["text_encoder"] == component.digest()


@pytest.fixture(scope="module")
def run(made):
    """The job as a user runs it, with states, on two devices."""
    folder = made / "run"
    code, output = test_initial.train(made / "float32", folder, devices=2, **HOW)
    assert code == 0, output
    return folder


def test_a_run_trains_generates_and_goes_on_as_one_without_states(made, run):
    plain = made / "plain"
    code, output = test_initial.train(made, plain, devices=2, **HOW)
    assert code == 0, output
    one, other = (metrics.read(f / "metrics.jsonl") for f in (run, plain))
    np.testing.assert_allclose(
        [row["loss"] for row in one], [row["loss"] for row in other], rtol=1e-4
    )
    assert checkpoint.load_run(run).params.keys() == {"dit"}
    frames = pipeline.Pipeline.from_pretrained(run)(**test_initial.CALL).frames
    assert np.isfinite(frames).all()
    # A run that began without states goes on without them, and one with them, with.
    c = recipe(made, "float32")
    for folder, networks in ((run, {"dit"}), (plain, {"dit", "text_encoder"})):
        job, _ = job_of(c, folder)
        assert job.objective.networks.abstract().keys() == networks


def test_states_that_changed_or_went_away_end_the_run(made, run, tmp_path):
    shutil.copytree(made / "float32" / "latents", tmp_path / "latents")
    c = recipe(made, data__latents=str(tmp_path / "latents"))
    manifest = encode_text.cache_folder(tmp_path / "latents") / text_cache.MANIFEST
    digests.store(manifest, manifest.read_text() + "\n")
    with pytest.raises(ValueError, match="another file now"):
        job_of(c, run)
    shutil.rmtree(manifest.parent)
    with pytest.raises(ValueError, match="holds no finished text states"):
        job_of(c, run)
    # Made again, by the encoder that the run keeps and as the run reads captions.
    encode_text.encode(tmp_path / "latents", run, dtype="float32")
    assert job_of(c, run)[0].fixed() == {}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text__length": 20}, "come from length 24, not 20"),
        ({"text__clean": False}, "come from clean True, not False"),
    ],
)
def test_another_preprocessing_is_refused(made, tmp_path, changes, message):
    c = recipe(made, "float32", **changes)
    with pytest.raises(ValueError, match=message) as error:
        job_of(c, tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_another_text_encoder_or_other_captions_are_refused(made, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(made / "folder", folder)
    params = tiny_folder.weights("text_encoder", seed=9)
    name = "text_encoder"
    pretrained.write_component(folder / name, name, params, tiny_folder.TEXT)
    c = recipe(made, "float32", init=str(folder))
    with pytest.raises(ValueError, match="come from text encoder .*, not") as error:
        job_of(c, tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    # One that is trained along has no use for them.
    job, _ = job_of(recipe(made, "float32", init=str(folder), text__frozen=False),
                    tmp_path / "along")  # fmt: skip
    assert job.objective.networks.abstract().keys() == {"dit", "text_encoder"}

    few = tmp_path / "few"
    shutil.copytree(made / "latents", few / "latents")
    encode_text.encode(few / "latents", made / "folder", ["short"], length=24)
    with pytest.raises(ValueError, match=r"without \['dense'\]"):
        job_of(recipe(few, init=str(made / "folder")), tmp_path / "tiers")
    with pytest.raises(ValueError, match="text_tiers asks for; there are: short"):
        encode_text.encode(few / "latents", made / "folder", ["alt"])

    shards.write(tmp_path / "shards", clips.Clips(num=12))
    encode_latents.encode(tmp_path / "shards", folder, tmp_path / "others")
    shutil.copytree(made / "float32" / "latents" / "text", tmp_path / "others" / "text")
    c = recipe(made, data__latents=str(tmp_path / "others"))
    with pytest.raises(ValueError, match="come from captions"):
        job_of(c, tmp_path / "captions")


def test_the_command(made, tmp_path, capsys, monkeypatch):
    """After the latents or with them; refusals; a finished cache reads no weights."""

    def run(**flags):
        with conftest.lone_job("prepare") as prepare:
            conftest.run_with_flags(prepare, **flags)

    def refusal(**flags):
        with conftest.lone_job("prepare") as prepare:
            return conftest.refusal(prepare, **flags)

    def digest(folder):
        place = encode_text.cache_folder(folder)
        return text_cache.open(place).manifest["digest"]

    encoder = {"text_encoder": made / "folder", "text_dtype": "float32"}
    shards_source = {"source": f"shards:{made / 'shards'}", "vae": made / "folder"}
    run(**shards_source, out=tmp_path / "with", **encoder, text_length=24)
    assert f"{tmp_path / 'with' / 'text'}: states by" in capsys.readouterr().out
    wanted = digest(made / "float32" / "latents")
    assert digest(tmp_path / "with") == wanted
    shutil.copytree(made / "latents", tmp_path / "after")
    after = {"source": f"latents:{tmp_path / 'after'}"}
    run(**after, **encoder, text_length=24)
    assert digest(tmp_path / "after") == wanted
    monkeypatch.setattr(pretrained.Component, "load", None)
    run(**after, **encoder, text_length=24)
    assert "length: was 24, is 512" in refusal(**after, **encoder)
    assert "needs --text_encoder" in refusal(**after)
    assert "--out has no meaning" in refusal(**after, **encoder, out="x")
    assert "without --text_encoder" in refusal(**shards_source, out="x", text_length=9)
    assert "text_encoder /nowhere is neither a finished run" in refusal(
        **after, text_encoder="/nowhere"
    )
    assert "caption tiers ['long'] are not in" in refusal(
        **after, **encoder, text_tiers="long"
    )
    assert not (pathlib.Path.cwd() / "x").exists()
