"""The video VAE's loss: bands, the discriminator's late and scaled say, bad numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.core import mesh as meshes
from sora_jax.core import trees
from sora_jax.models import discriminator, video_vae
from sora_jax.training import loop, optim, perceptual, reconstruction
from sora_jax.training import state as states
from sora_jax.training import step as steps
from tests.training import tiny_lpips

VAE = video_vae.Config(
    latent_channels=4, patch_size=2, base_dim=8, channel_multipliers=(1, 1),
    num_res_blocks=1, temporal_downsample=(True,),
)  # fmt: skip
JUDGE = discriminator.Config(base_dim=8, num_layers=2)
WEIGHTS = reconstruction.Weights(
    l1=0.0, mse=10.0, bands=0.5, adversarial=0.3, adversarial_start=0.5
)
OPTIM = optim.Config(learning_rate=1e-3, warmup_steps=0, final_fraction=1.0)
STEPS = 8


def clips(rows=8, frames=5, size=16, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (rows, frames, size, size, 3), np.uint8)


@pytest.fixture(scope="module")
def objective():
    return reconstruction.Reconstruction(VAE, WEIGHTS, JUDGE)


@pytest.fixture(scope="module")
def run(objective):
    """(step function, state of step 0) on one device."""
    optimizer = optim.make(OPTIM, STEPS)
    state = jax.jit(states.make_init(objective.networks, optimizer, 0))({})
    step = steps.make_train_step(
        objective, optimizer, seed=0, num_steps=STEPS, ema_decay=0.9
    )
    return jax.jit(step), state


def moved(before, after):
    return {
        name: any(
            np.any(np.asarray(a) != np.asarray(b))
            for a, b in zip(
                *map(jax.tree.leaves, (before.params[name], after.params[name])),
                strict=True,
            )
        )
        for name in before.params
    }


def test_bands_see_edges_and_motion_and_no_constant():
    flat = jnp.ones((2, 5, 16, 16, 3)) * jnp.array([0.3, 0.0]).reshape(2, 1, 1, 1, 1)
    np.testing.assert_allclose(reconstruction.band_error(flat), 0, atol=1e-7)
    # A ramp of slope s along an axis: s at the first scale, twice that at the next.
    ramp = np.arange(16.0)[None, None, None, :, None] * np.ones((1, 1, 16, 1, 3))
    found = reconstruction.band_error(jnp.asarray(ramp, jnp.float32))
    np.testing.assert_allclose(found, 1 + 2 + 4, rtol=1e-5)
    flicker = np.arange(5.0)[None, :, None, None, None] * np.ones((1, 1, 16, 16, 3))
    found = reconstruction.band_error(jnp.asarray(flicker, jnp.float32))
    np.testing.assert_allclose(found, 3, rtol=1e-5)


def test_the_discriminator_begins_late_and_then_both_learn(run):
    step, state = run
    batch = {"video": clips()}
    early, metrics = step(state, batch)
    assert moved(state, early) == {"vae": True, "discriminator": False}
    assert float(metrics["discriminator"][0]) == 0
    late = dataclasses.replace(state, step=jnp.asarray(STEPS // 2, jnp.int32))
    after, metrics = step(late, batch)
    assert moved(state, after) == {"vae": True, "discriminator": True}
    assert float(metrics["discriminator"][0]) > 0


@pytest.fixture(scope="module")
def gradient(run):
    """The gradient of the summed loss, with other weights."""
    _, state = run

    @functools.cache
    def call(**weights):
        changed = reconstruction.Reconstruction(
            VAE, dataclasses.replace(WEIGHTS, **weights), JUDGE
        )
        batch = changed.draw(jax.random.key(1), {"video": clips()}, 0.9)

        def of(params):
            return changed.loss(changed.networks.bind(params), batch)[0]

        names = changed.networks.abstract()
        return jax.jit(jax.grad(of))({name: state.params[name] for name in names})

    return call


def test_the_judgement_is_scaled_to_its_share_of_the_gradient(gradient):
    """At the output layer's bias the share is exact in direction and nearly in size."""
    plain = gradient(adversarial=0.0)["vae"]
    small, large = (gradient(adversarial=share)["vae"] for share in (0.1, 0.2))
    a, b = (
        np.concatenate(
            [np.ravel(x - y) for x, y in zip(*map(jax.tree.leaves, pair), strict=True)]
        )
        for pair in ((small, plain), (large, plain))
    )
    assert np.linalg.norm(a) > 0
    np.testing.assert_allclose(b, 2 * a, rtol=0.05, atol=0.02 * np.abs(b).max())


def test_the_vae_does_not_move_the_discriminator_nor_the_other_way_round(gradient):
    """Its gradient is that of its own hinge loss alone."""
    base, other = gradient(adversarial=0.1), gradient(adversarial=0.2)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        base["discriminator"],
        other["discriminator"],
    )
    doubled = gradient(adversarial=0.1, disc_learning=2.0)
    for name, factor in (("discriminator", 2), ("vae", 1)):
        for a, b in zip(
            *map(jax.tree.leaves, (doubled[name], base[name])), strict=True
        ):
            np.testing.assert_allclose(a, factor * np.asarray(b), rtol=1e-4, atol=1e-6)


def test_a_score_for_each_window_of_a_video_or_a_picture():
    judge = discriminator.Discriminator(JUDGE, nnx.Rngs(0))
    assert judge(jnp.zeros((2, 5, 16, 16, 3))).shape == (2, 2, 4, 4)
    assert judge(jnp.zeros((2, 1, 18, 17, 3))).shape == (2, 1, 4, 4)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(run):
    step, state = run
    late = dataclasses.replace(state, step=jnp.asarray(STEPS - 1, jnp.int32))
    params = trees.map_paths(
        lambda path, leaf: leaf * jnp.nan if "discriminator" in path else leaf,
        late.params,
    )
    broken = dataclasses.replace(late, params=params)
    after, metrics = step(broken, {"video": clips()})
    assert int(after.skipped) == 1 and float(metrics["skipped_steps"][0]) == 1
    assert moved(broken, after)["vae"] is False


@pytest.mark.slow
def test_eight_devices_learn_the_same(objective, run):
    step, state = run
    late = dataclasses.replace(state, step=jnp.asarray(STEPS // 2, jnp.int32))
    _, wanted = step(late, {"video": clips()})
    mesh = meshes.make_mesh({"fsdp": 8})
    optimizer = optim.make(OPTIM, STEPS)
    with jax.set_mesh(mesh):
        begun = jax.jit(states.make_init(objective.networks, optimizer, 0))({})
        begun = dataclasses.replace(begun, step=late.step)
        one = steps.make_train_step(
            objective, optimizer, seed=0, num_steps=STEPS, ema_decay=0.9
        )
        _, found = jax.jit(one)(begun, loop.to_device({"video": clips()}, mesh))
    for name in ("loss", "discriminator", "adversarial_weight", "grad_norm"):
        a, b = (float(m[name][0] / m[name][1]) for m in (wanted, found))
        assert a == pytest.approx(b, rel=1e-4), name


@pytest.fixture(scope="module")
def perception(tmp_path_factory):
    """(objective with LPIPS and all else, weights of LPIPS)."""
    file = tiny_lpips.write(tmp_path_factory.mktemp("lpips") / "a.safetensors")
    weights = dataclasses.replace(WEIGHTS, lpips=2.0, lpips_weights=str(file))
    seen = perceptual.open_weights(file)
    return reconstruction.Reconstruction(VAE, weights, JUDGE, seen.config), seen


def one_step(objective, fixed):
    """A judged step on clips of 32 pixels: (state before, after, metrics)."""
    optimizer = optim.make(OPTIM, STEPS)
    begin = states.make_init(objective.networks, optimizer, 0, tuple(fixed))
    state = jax.jit(begin)({})
    late = jnp.full_like(state.step, STEPS // 2)
    state = dataclasses.replace(state, step=late, fixed=fixed)
    step = steps.make_train_step(
        objective, optimizer, seed=0, num_steps=STEPS, ema_decay=0.9
    )
    batch = {"video": clips(frames=1, size=32)}
    mesh = jax.sharding.get_mesh()
    batch = batch if mesh.empty else loop.to_device(batch, mesh)
    return state, *jax.jit(step)(state, batch)


def test_lpips_moves_the_vae_and_nothing_moves_lpips(perception):
    objective, seen = perception
    before, after, metrics = one_step(objective, {perceptual.NAME: seen.load()})
    assert before.params.keys() == {"vae", "discriminator"} == after.ema.keys()
    jax.tree.map(
        np.testing.assert_array_equal, after.fixed, {perceptual.NAME: seen.load()}
    )
    assert moved(before, after)["vae"]
    plain = reconstruction.Reconstruction(VAE, WEIGHTS, JUDGE)
    _, other, without = one_step(plain, {})
    assert any(
        np.any(a != b)
        for a, b in zip(
            *(jax.tree.leaves(s.params["vae"]) for s in (after, other)), strict=True
        )
    )
    value = float(metrics["lpips"][0])
    assert value > 0 and "lpips" not in without
    # What it adds to the loss, less what the judge says in another voice.
    gap = float(metrics["loss"][0] - without["loss"][0])
    quiet = [
        float(m["adversarial_weight"][0]) / metrics["lpips"][1]
        for m in (metrics, without)
    ]
    assert quiet[0] > quiet[1] > 0  # a share of a gradient that has grown
    assert gap == pytest.approx(2 * value, rel=0.2)


@pytest.mark.parametrize(
    "axes",
    [{"fsdp": 2, "ring": 4}, pytest.param({"fsdp": 8}, marks=pytest.mark.slow)],
    ids=str,
)
def test_eight_devices_see_the_same_lpips(perception, axes):
    objective, seen = perception
    _, _, wanted = one_step(objective, {perceptual.NAME: seen.load()})
    with jax.set_mesh(meshes.make_mesh(axes)):
        _, _, found = one_step(objective, {perceptual.NAME: seen.load()})
    for name in ("loss", "lpips", "discriminator", "grad_norm"):
        a, b = (float(m[name][0] / m[name][1]) for m in (wanted, found))
        assert a == pytest.approx(b, rel=1e-4), name


def test_a_weight_without_a_file_is_refused():
    with pytest.raises(ValueError, match="lpips is 0.5, but .* names no file"):
        reconstruction.Weights(lpips=0.5)
    with pytest.raises(ValueError, match="lpips is -1"):
        reconstruction.Weights(lpips=-1.0)


def mix():
    """Clips, and twice as many images of another size."""
    return {"video0": clips(8), "video1": clips(16, frames=1, size=24, seed=1)}


PLAIN = reconstruction.Reconstruction(VAE, dataclasses.replace(WEIGHTS, adversarial=0))


def test_every_video_of_a_mix_weighs_the_same(objective, run):
    """The loss is the sum of both kinds' sums, over the number of videos."""
    _, state = run

    @jax.jit
    def loss(batch):
        drawn = objective.draw(jax.random.key(1), batch, 0.9)
        # A kind's noise is another in a mix.
        drawn |= {name: 0 * drawn[name] for name in drawn if name.startswith("noise")}
        return objective.loss(objective.networks.bind(state.params), drawn)

    alone = [loss({name: video})[2] for name, video in mix().items()]
    _, weight, found = loss(mix())
    assert float(weight) == 8 + 16
    for name in ("l1", "psnr", "discriminator"):
        sums = [float(metrics[name][0]) for metrics in alone]
        assert float(found[name][0]) == pytest.approx(sum(sums), rel=1e-5)
        assert sums[0] / 8 != pytest.approx(sums[1] / 16, rel=1e-4)


def taps(gradient):
    """Norms of what time convolutions give to earlier frames, and to their own."""
    earlier, own = [], []
    for leaf in jax.tree.leaves(gradient):
        if leaf.ndim == 5 and leaf.shape[0] == 3:
            earlier.append(float(jnp.linalg.norm(leaf[:-1])))
            if leaf.shape[1] == 3:  # steps that change the frame rate leave images out
                own.append(float(jnp.linalg.norm(leaf[-1])))
    return np.array(earlier), np.array(own)


def test_images_alone_do_not_move_the_time_taps(run):
    _, state = run
    params = jax.tree.map(
        # Convolutions that begin at zero would hide what is before them.
        lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(0), leaf.shape),
        state.params,
    )
    own_params = {"vae": params["vae"]}

    @jax.jit
    def gradient(batch):
        drawn = PLAIN.draw(jax.random.key(1), batch, 0.0)
        bound = PLAIN.networks.bind
        return jax.grad(lambda p: PLAIN.loss(bound(p), drawn)[0])(own_params)

    earlier, own = taps(gradient({"video1": mix()["video1"]}))
    assert len(earlier) > 8 and np.all(earlier == 0) and np.all(own > 0)
    earlier, own = taps(gradient(mix()))
    assert np.all(earlier > 0) and np.all(own > 0)


def test_a_mix_is_learned_the_same_on_eight_devices():
    """And in two parts of each kind as in one."""
    given = {name: np.repeat(video, 2, axis=0) for name, video in mix().items()}
    optimizer = optim.make(OPTIM, STEPS)

    def learn(batch, accumulation):
        step = steps.make_train_step(
            PLAIN, optimizer, seed=0, num_steps=STEPS, ema_decay=0.9,
            accumulation=accumulation,
        )  # fmt: skip
        begun = jax.jit(states.make_init(PLAIN.networks, optimizer, 0))({})
        return jax.jit(step)(begun, batch)[1]

    wanted = learn(given, 1)
    mesh = meshes.make_mesh({"fsdp": 8})
    with jax.set_mesh(mesh):
        found = learn(loop.to_device(given, mesh), 2)
    for name in ("loss", "l1", "bands", "kl", "grad_norm"):
        a, b = (float(m[name][0] / m[name][1]) for m in (wanted, found))
        assert a == pytest.approx(b, rel=1e-5), name


def test_latents_are_decoded_under_noise_of_each_videos_own_strength():
    weights = reconstruction.Weights(
        l1=0.0, mse=1.0, bands=0.0, kl=0.0, latent_noise=0.5
    )
    made = reconstruction.Reconstruction(VAE, weights)
    many = {"video0": clips(rows=64)}
    drawn = jax.jit(made.draw)(jax.random.key(3), many, jnp.zeros(()))
    added = np.asarray(drawn["added/video0"])
    strengths = added.std((1, 2, 3, 4))
    assert strengths.min() < 0.1 and 0.4 < strengths.max() < 0.6
    assert strengths.mean() == pytest.approx(0.25, abs=0.05)

    few = {name: leaf[:4] for name, leaf in drawn.items()}
    params = jax.jit(made.networks.init)(jax.random.key(0))
    vae = made.networks.bind(params)["vae"]
    video = np.asarray(few["video0"], np.float32) / 127.5 - 1
    mean, logvar = vae.encode(video)
    deviation = np.asarray(mean, np.float64).std((0, 1, 2, 3))
    latents = mean + jnp.exp(0.5 * logvar) * few["noise/video0"]
    decoded = vae.decode(latents + deviation.astype(np.float32) * added[:4])
    total, weight, _ = made.loss(made.networks.bind(params), few)
    wanted = np.mean(np.square(np.asarray(decoded) - video))
    assert float(total / weight) == pytest.approx(float(wanted), rel=1e-4)
    plain = reconstruction.Reconstruction(
        VAE, dataclasses.replace(weights, latent_noise=0.0)
    )
    alone, _, _ = plain.loss(plain.networks.bind(params), few)
    assert abs(float(alone - total)) > 1e-4 * float(total)
