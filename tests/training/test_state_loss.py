"""The second task of the toy world: what it adds, what it leaves alone, what it asks."""

import collections
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import toy, toy_vae
from sora_jax.core import config as configs
from sora_jax.core import mesh as meshes
from sora_jax.data import conditions, latent_cache, packing, shards, transforms
from sora_jax.diffusion import timesteps
from sora_jax.models import rows, video_vae
from sora_jax.toyworld import families, scene, tokens
from sora_jax.training import (
    checkpoint,
    initial,
    jobs,
    loop,
    objectives,
    reconstruction,
    state_loss,
)
from tests.training import tiny, tiny_job

DIT = dataclasses.replace(tiny.DIT, num_layers=2)


@functools.cache
def objective(weight=0.5, mesh=None):
    del mesh
    return objectives.Denoiser(
        DIT, tiny.TEXT, timesteps.Config(shift=3.0), conditions.Config({"none": 1.0}),
        text_dropout=0.2, null_ids=[1] + [0] * 5, fps=8.0,
        state_loss=state_loss.Config(weight, 0.5) if weight else None,
    )  # fmt: skip


def batch(rows=8):
    random = np.random.default_rng(3)
    return tiny.batch(1, rows) | shown_by(random, rows, 32)


def shown_by(random, rows, count):
    shape, colour = (
        random.integers(1, classes, (rows, count)).astype(np.int8)
        for classes in (tokens.SHAPE_CLASSES, tokens.COLOUR_CLASSES)
    )
    # Half of the tokens show nothing; a clip without a state, and an empty one.
    shape[:, ::2] = colour[:, ::2] = tokens.NOTHING
    shape[0] = colour[0] = -1
    shape[1] = colour[1] = tokens.NOTHING
    motion = random.normal(size=(rows, count, 2)).astype(np.float32)
    return {"shown_shape": shape, "shown_colour": colour, "shown_motion": motion}


def expected(found, given):
    """The loss summed over rows, and how many shapes of how many things are right."""
    found = np.asarray(found, np.float64)
    ends = tokens.SHAPE_CLASSES, tokens.SHAPE_CLASSES + tokens.COLOUR_CLASSES
    *logits, motion = np.split(found, ends, -1)
    logs = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits]
    total, right, things = 0.0, 0, 0
    for row, shape in enumerate(given["shown_shape"]):
        colour, moves = given["shown_colour"][row], given["shown_motion"][row]
        for part in (shape == 0, shape > 0):
            if part.any():
                nats = -sum(
                    log[row, part, classes[part]]
                    for log, classes in zip(logs, (shape, colour), strict=True)
                )
                off = np.nan_to_num(motion[row] - moves)
                total += np.mean(nats + np.mean(off**2, -1)[part])
        right += np.sum((logits[0][row].argmax(-1) == shape) & (shape > 0))
        things += np.sum(shape > 0)
    return total, right, things


def params_of(made):
    params = jax.jit(made.networks.init)(jax.random.key(0))
    random = np.random.default_rng(5)  # nothing stays at the zero that it begins with
    return jax.tree.map(
        lambda leaf: leaf + 0.1 * random.standard_normal(leaf.shape, np.float32), params
    )


def graded(made, params, given):
    def total(params, given):
        found = made.loss(made.networks.bind(params), given)
        return found[0], found[1:]

    return jax.jit(jax.value_and_grad(total, has_aux=True))(params, given)


def test_the_loss_is_the_velocitys_and_a_weighted_sum_of_both_errors():
    made, plain = objective(), objective(0.0)
    params = params_of(made)
    given = jax.jit(made.draw)(jax.random.key(7), batch(), jnp.zeros(()))
    (total, (weight, metrics)), gradient = graded(made, params, given)
    names = ("dit", "text_encoder")
    (alone, _), of_plain = graded(plain, {n: params[n] for n in names}, given)

    @jax.jit
    def hidden(params):
        modules = made.networks.bind(params)
        return made.clip_losses(modules, given, hidden_after=1)

    _, states = hidden(params)
    head = jax.device_get(params[state_loss.NAME])
    states = np.asarray(states, np.float64)
    states /= np.sqrt(np.mean(states**2, -1, keepdims=True))
    found = states @ head["kernel"] + head["bias"]
    wanted, rights, things = expected(found, jax.device_get(given))
    assert float(weight) == 8
    assert float(total - alone) == pytest.approx(0.5 * float(wanted), rel=1e-4)
    assert float(metrics["state_loss"][0]) == pytest.approx(float(wanted), rel=1e-4)
    assert [float(x) for x in metrics["shown_shape_right"]] == [rights, things]
    # Blocks after the tapped one learn from the velocity alone, those before from both.
    kernel = gradient["dit"]["blocks"]["ffn"]["up"]["kernel"]
    before = of_plain["dit"]["blocks"]["ffn"]["up"]["kernel"]
    np.testing.assert_allclose(kernel[1], before[1], rtol=1e-3, atol=1e-5)
    assert np.abs(kernel[0] - before[0]).max() > 1e-3
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient["state_head"]))


def test_tokens_that_show_a_thing_may_weigh_more():
    config = dataclasses.replace(DIT, patch=(1, 2, 2))
    made = objectives.Denoiser(
        config, tiny.TEXT, timesteps.Config(shift=3.0), conditions.Config({"none": 1.0}),
        text_dropout=0.0, null_ids=[1] + [0] * 5, fps=8.0,
        state_loss=state_loss.Config(0.5, 0.5, focus=3.0),
    )  # fmt: skip
    params = params_of(made)
    shown = shown_by(np.random.default_rng(3), 8, 2 * 2 * 2)
    free = {"slots": np.zeros((8, 8), np.int8), "pattern": np.zeros(8, np.int32)}
    given = jax.jit(made.draw)(
        jax.random.key(7), tiny.batch(1, 8) | free | shown, jnp.zeros(())
    )
    found = made.clip_losses(made.networks.bind(params), given)
    plain = {name: leaf for name, leaf in given.items() if "shown" not in name}
    alone = np.asarray(made.clip_losses(made.networks.bind(params), plain))[:, 0]
    tokens_of = np.asarray(shown["shown_shape"]).reshape(8, 2, 2, 2)
    weight = 1 + 2 * (tokens_of > tokens.NOTHING).repeat(2, 2).repeat(2, 3)
    tau = given["tau"][:, :, None, None, None]
    row = rows.of_video(
        config,
        given["latents"] * (1 - tau) + given["noise"] * tau,
        given["tau"],
        *made._text(made.networks.bind(params), given),
        fps=8.0,
    )
    velocity = made.networks.bind(params)["dit"](row)
    velocity = rows.to_video(velocity, (2, 4, 4), config.patch)
    error = np.square(velocity - (given["noise"] - given["latents"])).mean(-1)
    wanted = (error * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))
    np.testing.assert_allclose(found[:, 0], wanted, rtol=1e-4)
    np.testing.assert_allclose(alone, error.mean((1, 2, 3)), rtol=1e-4)
    assert np.abs(wanted / alone - 1).max() > 1e-3


def test_the_velocity_is_the_same_with_hidden_states():
    made = objective()
    params = params_of(made)
    given = jax.jit(made.draw)(jax.random.key(7), batch(), jnp.zeros(()))

    @jax.jit
    def both(params):
        modules = made.networks.bind(params)
        return made.clip_losses(modules, given, 1)[0], made.clip_losses(modules, given)

    np.testing.assert_allclose(*both(params), rtol=1e-6)


def test_a_mesh_changes_nothing():
    made = objective()
    params = params_of(made)
    drawn = jax.jit(made.draw)(jax.random.key(7), batch(), jnp.zeros(()))
    (total, _), gradient = graded(made, params, drawn)
    mesh = meshes.make_mesh({"fsdp": 2, "ulysses": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        made = objective(mesh=mesh)
        rows = loop.to_device(batch(), mesh)
        drawn = jax.jit(made.draw)(jax.random.key(7), rows, jnp.zeros(()))
        there = jax.device_put(params, made.networks.layouts())
        (found, _), of_mesh = graded(made, there, drawn)
    assert float(found) == pytest.approx(float(total), rel=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(of_mesh), jax.tree.leaves(gradient), strict=True
    ):
        error = np.linalg.norm(np.asarray(ours) - theirs)
        assert error <= 1e-4 * max(np.linalg.norm(theirs), 1e-6)


@pytest.mark.parametrize(
    "layers, depth, after", [(5, 0.6, 3), (1, 0.6, 1), (4, 0.0, 1)]
)
def test_the_depth_is_a_share_of_the_blocks(layers, depth, after):
    assert state_loss.Config(0.1, depth).after(layers) == after


def test_all_blocks_may_come_before():
    config = dataclasses.replace(DIT, num_layers=1)
    made = objectives.Denoiser(
        config, tiny.TEXT, timesteps.Config(), conditions.Config(), text_dropout=0.0,
        null_ids=[1] + [0] * 5, fps=8.0, state_loss=state_loss.Config(0.1),
    )  # fmt: skip
    given = jax.jit(made.draw)(jax.random.key(7), batch(), jnp.zeros(()))
    _, gradient = graded(made, params_of(made), given)
    assert np.any(gradient["dit"]["blocks"]["ffn"]["up"]["kernel"])


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return tiny_job.write_toy_world(tmp_path_factory.mktemp("state"), 16)


def test_rows_say_what_their_clips_tokens_show(latents, tmp_path):
    c = toy.get_config()
    c.update_from_flattened_dict(tiny_job.TINY)
    c.data.latents = str(latents)
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        task = jobs.denoiser(c, tmp_path, mesh)
        with task.batches(0) as rows:
            found = next(rows)
    assert task.objective.state_loss.weight == 0.1
    by_latents = {
        record.latents.tobytes(): record
        for record in latent_cache.open(latents).read(range(16))
    }
    for row in range(8):
        record = by_latents[found["latents"][row].tobytes()]
        drawn = scene.Scene.from_json(record.state_json)
        shown = tokens.shown(drawn, (2, 2, 2), 4)
        np.testing.assert_array_equal(
            found["shown_shape"][row], shown.shape_thw.ravel()
        )
        np.testing.assert_array_equal(
            found["shown_colour"][row], shown.colour_thw.ravel()
        )
        np.testing.assert_array_equal(
            found["shown_motion"][row], shown.motion_thw2.reshape(-1, 2)
        )


@pytest.mark.parametrize("state_json", [None, '{"n": 3}', "another length"])
def test_a_clip_without_a_state_says_so(state_json):
    shown, grid = transforms.Shown(4), (2, 2, 2)
    if state_json == "another length":  # tw16 has two latent frames, and not three
        grid = 3, 2, 2
        state_json = families.scene("tw16", "train", 0).to_json()
    found = shown(types.SimpleNamespace(id="clip", state_json=state_json), grid)
    assert {*found["shown_shape"], *found["shown_colour"]} == {-1}
    assert found["shown_motion"].shape == (len(found["shown_shape"]), 2)


def test_packed_rows_say_what_their_tokens_show(latents, tmp_path):
    """Of whole clips, and of windows that begin or end in the middle; padding: -1."""
    c = toy.get_config()
    c.update_from_flattened_dict(tiny_job.TINY)
    c.data.latents, c.packing.shapes, c.packing.unit = str(latents), 1, 8
    c.packing.max_padding, c.known.images, c.packing.tokens = 1.0, 0.5, 24
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        task = jobs.denoiser(c, tmp_path, mesh)
        with task.batches(0) as rows:
            found = jax.device_get(next(rows))
    assert task.objective.state_loss.weight == 0.1
    patch = task.objective.dit_config.patch
    # Of made-up latents, clips with the same first pixel have the same.
    patch, of_first = task.objective.dit_config.patch, collections.defaultdict(list)
    for record in latent_cache.open(latents).read(range(16)):
        first = packing.patches(record.latents[: patch[0]], patch)[0].tobytes()
        drawn = scene.Scene.from_json(record.state_json)
        of_first[first].append(tokens.shown(drawn, (2, 2, 2), 4))
    lengths = set()
    for row, segments in enumerate(found["segments"]):
        for number in range(1, segments.max() + 1):
            here = segments == number
            count = int(here.sum())
            lengths.add(count)
            assert any(
                np.array_equal(
                    found["shown_shape"][row][here], x.shape_thw.ravel()[:count]
                )
                and np.array_equal(
                    found["shown_colour"][row][here], x.colour_thw.ravel()[:count]
                )
                and np.array_equal(
                    found["shown_motion"][row][here],
                    x.motion_thw2.reshape(-1, 2)[:count],
                )
                for x in of_first[found["tokens"][row][here][:4].tobytes()]
            )
        assert {*found["shown_shape"][row][segments == 0]} <= {-1}
    assert lengths == {4, 8}


def test_clips_of_packed_rows_weigh_what_they_weigh_alone():
    """Two clips in a row, of which one is half as long, with padding behind them."""
    random = np.random.default_rng(3)
    whole = {name: array[2:] for name, array in shown_by(random, 4, 8).items()}
    found = random.normal(size=(2, 8, state_loss._SPLIT[1] + 2)).astype(np.float32)
    alone = [
        state_loss.loss(
            found[i : i + 1, :end], {k: v[i : i + 1, :end] for k, v in whole.items()}
        )
        for i, end in ((0, 8), (1, 4))
    ]

    def packed(array, empty):
        row = np.full((1, 14, *array.shape[2:]), empty, array.dtype)
        row[0, :8], row[0, 8:12] = array[0], array[1, :4]
        return row

    segments = np.repeat([1, 2, 0], [8, 4, 2])[None]
    together = state_loss.loss(
        packed(found, 7.0),
        {name: packed(array, -1) for name, array in whole.items()},
        jax.nn.one_hot(segments - 1, 3),
    )
    total = sum(float(x[0]) for x in alone)
    assert float(together[0]) == pytest.approx(total, rel=1e-5)
    for name, (of_all, weight) in together[1].items():
        for value, place in ((of_all, 0), (weight, 1)):
            wanted = sum(float(metrics[name][place]) for _, metrics in alone)
            assert float(value) == pytest.approx(wanted, rel=1e-5), name


def test_others_read_a_run_without_its_head_and_runs_begin_with_it(tmp_path):
    made, plain = objective(), objective(0.0)
    params = jax.device_get(params_of(made))
    configs.write(tmp_path, toy.get_config())
    checkpoint.save_run(tmp_path, params)
    run = checkpoint.load_run(tmp_path, layouts=plain.networks.layouts())
    assert run.params.keys() == {"dit", "text_encoder"}
    for has_head in (False, True):
        networks = objectives.denoiser_networks(DIT, tiny.TEXT, has_state_head=has_head)
        found = initial._reader(tmp_path, DIT, networks, networks)()
        assert (state_loss.NAME in found) == has_head
        for name, network in found.items():
            jax.tree.map(np.testing.assert_array_equal, network, params[name])


VAE = video_vae.Config(
    latent_channels=4, patch_size=2, base_dim=8, channel_multipliers=(1, 1),
    num_res_blocks=1, temporal_downsample=(True,),
)  # fmt: skip


def test_a_video_vaes_latents_have_the_task_under_noise():
    weights = reconstruction.Weights(l1=0.0, mse=10.0, bands=0.0)
    made = reconstruction.Reconstruction(
        VAE, weights, state_loss=state_loss.Config(0.25, noise=0.5)
    )
    plain = reconstruction.Reconstruction(VAE, weights)
    random = np.random.default_rng(3)
    shown = shown_by(random, 4, 3 * 4 * 4)
    shown["shown_motion"][:, :16] = np.nan  # of the first latent frame
    video = random.integers(0, 256, (4, 5, 16, 16, 3), np.uint8)
    params = params_of(made)
    given = jax.jit(made.draw)(
        jax.random.key(7), {"video0": video} | shown, jnp.zeros(())
    )
    (total, (weight, metrics)), gradient = graded(made, params, given)
    (alone, _), _ = graded(plain, {"vae": params["vae"]}, given)

    mean = made.networks.bind(params)["vae"].encode(video / np.float32(127.5) - 1)[0]
    mean = np.asarray(mean, np.float64)
    scaled = (mean - mean.mean((0, 1, 2, 3))) / mean.std((0, 1, 2, 3))
    head = jax.device_get(params[state_loss.NAME])
    found = scaled + 0.5 * np.asarray(given["masking"])
    found = (found @ head["kernel"] + head["bias"]).reshape(4, 48, -1)
    wanted, rights, things = expected(found, shown)
    assert float(weight) == 4 and np.std(given["masking"]) == pytest.approx(1, abs=0.1)
    assert float(total - alone) == pytest.approx(0.25 * float(wanted), rel=1e-3)
    assert [float(x) for x in metrics["shown_shape_right"]] == [rights, things]
    moving = np.sum((shown["shown_shape"] > 0)[:, 16:])
    assert float(metrics["shown_motion_error"][1]) == moving
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    assert np.any(gradient[state_loss.NAME]["kernel"])


def vae_job(latents, tmp_path, **changes):
    c = toy_vae.get_config()
    c.data.shards, c.data.batch_size = str(latents.parent / "shards"), 8
    c.update_from_flattened_dict(changes)
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        return jobs.vae(c, tmp_path, mesh)


def test_rows_say_what_the_latents_of_whole_clips_show(latents, tmp_path):
    task = vae_job(latents, tmp_path)
    clips = shards.open(latents.parent / "shards").read(range(16))
    by_video = {clip.frames().tobytes(): clip for clip in clips}
    with task.batches(0) as rows:
        found = next(rows)
    size = task.objective.config.latent_shape(*found["video0"].shape[1:4])[:3]
    for row, video in enumerate(found["video0"]):
        drawn = scene.Scene.from_json(by_video[video.tobytes()].state_json)
        shown = tokens.shown(drawn, size, 4)
        shape, motion = (
            found[name][row].reshape(*size, -1)
            for name in ("shown_shape", "shown_motion")
        )
        np.testing.assert_array_equal(shape[..., 0], shown.shape_thw)
        # The first latent frame is made of one video frame, which shows no motion.
        assert np.isnan(motion[0]).all()
        np.testing.assert_array_equal(motion[1:], shown.motion_thw2[1:])


def test_windows_have_no_second_task_and_say_so(latents, tmp_path, capsys):
    crops = ((1.0, ((5, 8, 8, 1),)),)
    task = vae_job(latents, tmp_path, **{"data.crops": crops})
    assert task.objective.state_loss is None
    assert "state_loss is left out" in capsys.readouterr().err
    with task.batches(0) as rows:
        assert next(rows).keys() == {"video0"}
