"""Trains the toy state network, whose features FVD-toy uses, and writes its weights.

    python -m experiments.train_state_network --out sora_jax/evals/features/weights

takes about six minutes on two cores. At the end it prints how well the state is read from
test scenes, clean and blurred. The weights in the repository were trained by this command.
Since every FVD-toy depends on them, new weights need a new name.

Letters: b clips, t frames, h height, w width, c channels, k colours, m moments, x
(right, down).
"""

import argparse
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sora_jax.core import progress
from sora_jax.evals.features import networks
from sora_jax.models import feature_net
from sora_jax.toyworld import families, render
from sora_jax.toyworld import scene as scenes
from sora_jax.training import optim
from sora_jax.training import state as states

TIER = "tw32"
COLOURS = tuple(scenes.PALETTE)
SIDES = tuple(scenes.RELATIONS)
BLUR, NOISE = 1.2, 12 / 127.5  # largest blur (pixels) and noise of the augmentation
HELD_OUT_SHARE = 0.15  # scenes with combinations that are held out from denoisers


def read_batch(split_seed: int, start: int, count: int) -> dict[str, np.ndarray]:
    """Renders scenes start to start + count with their targets."""
    rows = []
    for index in range(start, start + count):
        held_out = (index * 0.618034) % 1 < HELD_OUT_SHARE
        split = "test_comp" if held_out else "train"
        scene = families.scene(TIER, split, index, seed=split_seed)
        rows.append({"video": render.render(scene), **targets(scene)})
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def targets(scene: scenes.Scene) -> dict[str, np.ndarray]:
    """Returns the state of a scene in the format of the network's heads."""
    zoom_t = np.exp(scene.camera[:, 2])
    offset = scene.pos - scene.camera[:, None, :2]
    screen = offset * zoom_t[:, None, None] / scene.size  # frame widths from centre
    last, k = scene.num_frames - 1, len(COLOURS)
    found = {
        "count": np.zeros(k, np.int32),
        "shape": np.zeros(k, np.int32),
        "position": np.zeros((k, 3, 2), np.float32),
        "velocity": np.zeros((k, 2), np.float32),
        "radius": np.zeros(k, np.float32),
    }
    for colour in {thing.colour for thing in scene.objects}:
        at = COLOURS.index(colour)
        members = [i for i, o in enumerate(scene.objects) if o.colour == colour]
        path_tx = screen[:, members].mean(1)
        found["count"][at] = len(members)
        found["shape"][at] = scenes.SHAPES.index(scene.objects[members[0]].shape)
        found["position"][at] = path_tx[[0, last // 2, last]]
        found["velocity"][at] = (path_tx[-1] - path_tx[0]) * scene.size / last
        radius = np.mean([scene.objects[i].radius for i in members])
        found["radius"][at] = radius * zoom_t[last // 2]
    # The background moves opposite to the camera.
    shift = (scene.camera[0, :2] - scene.camera[-1, :2]) / last
    growth = scene.camera[-1, 2] - scene.camera[0, 2]
    found["camera"] = np.array([*shift, growth], np.float32)
    found["side"] = np.array(-1, np.int32)
    pair = [COLOURS.index(thing.colour) for thing in scene.objects]
    if scene.family == "relation":
        first, second = np.argsort(pair)
        gap = scene.pos[0, first] - scene.pos[0, second]
        along = [gap @ np.array(unit) for unit in scenes.RELATIONS.values()]
        found["side"] = np.array(np.argmax(along), np.int32)
    return found


def spoil(key: jax.Array, video_bthwc: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Blurs the first half of the clips and adds noise, as in generated video.

    Returns:
      The clips, and blur (pixels) and noise (standard deviation) of each: [b, 2].
    """
    keys = jax.random.split(key, 3)
    half = len(video_bthwc) // 2
    sigma_b = BLUR * jax.random.uniform(keys[0], (half,))
    noise_b = NOISE * jax.random.uniform(keys[1], (half,))
    spoilt = gaussian_blur(video_bthwc[:half], sigma_b)
    noise = jax.random.normal(keys[2], spoilt.shape)
    spoilt = spoilt + noise_b[:, None, None, None, None] * noise
    amounts_b2 = jnp.stack([sigma_b, noise_b], axis=1)
    rest = ((0, len(video_bthwc) - half), (0, 0))
    return jnp.concatenate([spoilt, video_bthwc[half:]]), jnp.pad(amounts_b2, rest)


def gaussian_blur(video_bthwc: jax.Array, sigma_b: jax.Array) -> jax.Array:
    """Blurs height and width of each clip with its own sigma, in pixels."""
    size = video_bthwc.shape[2]
    away = jnp.arange(size)[:, None] - jnp.arange(size)
    kernel = jnp.exp(-0.5 * jnp.square(away / jnp.maximum(sigma_b, 0.1)[:, None, None]))
    kernel = kernel / kernel.sum(2, keepdims=True)
    # One matrix product per axis is several times faster on a CPU than shifted sums.
    return jnp.einsum(
        "bij,bkl,btjlc->btikc", kernel, kernel, video_bthwc, optimize="optimal"
    )


def losses(
    read: Mapping[str, jax.Array], batch: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Returns the mean loss of each head, over clips that have its colour or side."""
    entropy = optax.softmax_cross_entropy_with_integer_labels
    there_bk = (batch["count"] > 0).astype(jnp.float32)
    sided_b = (batch["side"] >= 0).astype(jnp.float32)

    def mean(values, weight):
        return (values * weight).sum() / jnp.maximum(weight.sum(), 1)

    def squared(name, unit, axes):
        return mean(jnp.square((read[name] - batch[name]) / unit).mean(axes), there_bk)

    return {
        "count": entropy(read["count"], batch["count"]).sum(1).mean(),
        "shape": 2 * mean(entropy(read["shape"], batch["shape"]), there_bk),
        "position": squared("position", 0.15, (2, 3)),
        "velocity": squared("velocity", 0.5, 2),
        "radius": squared("radius", 0.5, ()),
        "camera": jnp.square(
            (read["camera"] - batch["camera"]) / jnp.array([0.3, 0.3, 0.1])
        ).mean(),
        "side": mean(entropy(read["side"], jnp.maximum(batch["side"], 0)), sided_b),
        "quality": jnp.square(
            (read["quality"] - batch["quality"]) / jnp.array([0.4, 0.04])
        ).mean(),
    }


def figures(read: Mapping, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns accuracies of classes, and root mean square errors of measured values."""
    there, sided = batch["count"] > 0, batch["side"] >= 0
    right = {
        name: np.asarray(read[name]).argmax(-1) == batch[name]
        for name in ("count", "shape", "side")
    }
    error = {
        name: np.square(np.asarray(read[name]) - batch[name])
        for name in ("position", "velocity", "radius", "camera")
    }
    return {
        "count of all colours right": right["count"].all(1).mean(),
        "shape right": right["shape"][there].mean(),
        "side right": right["side"][sided].mean(),
        "position, pixels": 32 * error["position"][there].mean() ** 0.5,
        "velocity, pixels a frame": error["velocity"][there].mean() ** 0.5,
        "radius, pixels": error["radius"][there].mean() ** 0.5,
        "camera, pixels a frame": error["camera"][:, :2].mean() ** 0.5,
        "growth, log units": error["camera"][:, 2].mean() ** 0.5,
    }


def as_float(video_bthwc: np.ndarray) -> np.ndarray:
    return video_bthwc.astype(np.float32) / 127.5 - 1


def train(num_steps: int, batch_size: int, seed: int) -> feature_net.StateNetwork:
    networks = states.Networks(
        lambda rngs: {"reader": feature_net.StateNetwork(feature_net.Config(), rngs)}
    )
    optimizer = optim.make(
        optim.Config(
            learning_rate=2e-3,
            muon_learning_rate=0.02,
            not_muon=("heads",),
            warmup_steps=50,
            final_fraction=0.01,
        ),
        num_steps,
    )

    @jax.jit
    def step(params, state, batch, key):
        def loss(params):
            video, amounts = spoil(key, batch["video"])
            read = networks.bind(params)["reader"](video)
            parts = losses(read, batch | {"quality": amounts})
            return sum(parts.values()), parts

        (_, parts), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, parts

    params = jax.jit(networks.init)(jax.random.key(seed))
    state = optimizer.init(params)
    # The default generator takes a third of the time of a step on a CPU.
    root = jax.random.key(seed, impl="unsafe_rbg")
    with progress.Progress(num_steps, "train", "steps") as line:
        for number in range(num_steps):
            batch = read_batch(seed, number * batch_size, batch_size)
            batch["video"] = as_float(batch["video"])
            key = jax.random.fold_in(root, number)
            params, state, parts = step(params, state, batch, key)
            parts = {name: float(value) for name, value in parts.items()}
            line.set_postfix(parts, refresh=False)
            line.update()
    return networks.bind(params)["reader"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    network = train(options.steps, options.batch_size, options.seed)
    batch = read_batch(options.seed + 1, 0, 2000)
    video = as_float(batch["video"])
    noise = np.random.default_rng(0).normal(size=video.shape).astype(np.float32)
    for name, shown in (
        ("clean", video),
        ("blur 1, noise 8", gaussian_blur(video, np.ones(2000)) + noise * 8 / 127.5),
    ):
        print(name)
        for label, value in figures(network(jnp.asarray(shown)), batch).items():
            print(f"  {label:28s} {value:.3f}")
    sha256 = networks.save(network, options.out, networks.TOY)
    print(f"{options.out / networks.TOY}.safetensors, SHA-256 {sha256}")


if __name__ == "__main__":
    main()
