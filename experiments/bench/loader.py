"""Measures whether training waits for data: steps with the loader and without.

    python -m experiments.bench.loader --model runs/quickstart/model \
        --latents runs/quickstart/latents [--rounds 6]

Trains the run's recipe from new weights, in alternating turns: with batches from the
loader, and with one fixed batch. Prints the speed of each turn and the ratio of the
medians; the bar is .97.
"""

import argparse
import pathlib
import statistics
import time

import jax

from sora_jax.core import config as configs
from sora_jax.core import mesh as meshes
from sora_jax.core import rng
from sora_jax.data import captions, latent_cache, loader, transforms
from sora_jax.data import tokenizer as tokenizers
from sora_jax.training import loop, objectives, optim
from sora_jax.training import state as states
from sora_jax.training import step as steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, required=True, help="run folder")
    parser.add_argument("--latents", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=40, help="per turn")
    args = parser.parse_args()
    c, source = configs.read(args.model), latent_cache.open(args.latents)
    tokenizer = tokenizers.Tokenizer(args.model / "tokenizer.model")
    objective = objectives.denoiser(c, tokenizer, fps=source.fps)
    optimizer = optim.make(configs.build(optim.Config, c.optim, "optim"), 1000)
    mesh = meshes.make_mesh()
    sampler = captions.CaptionSampler(dict(c.text.tiers))
    transform = transforms.LatentsAndText(
        transforms.Tokenize(sampler, tokenizer, c.text.length)
    )
    batches = loader.make_loader(
        source, transform, seed=c.seed, batch_size=c.data.batch_size
    )
    speeds = {"loader": [], "one batch": []}
    with jax.set_mesh(mesh), batches as rows:
        state = jax.jit(
            lambda: states.init(objective.networks, optimizer, rng.key(0, "init"), {})
        )()
        train_step = jax.jit(
            steps.make_train_step(
                objective, optimizer, seed=0, num_steps=9, ema_decay=0.99
            ),
            donate_argnums=0,
        )
        fixed = loop.to_device(next(rows), mesh)
        state, metrics = train_step(state, fixed)
        jax.block_until_ready(metrics)
        for turn in range(2 * args.rounds):
            kind = ("loader", "one batch")[turn % 2]
            began = time.perf_counter()
            for _ in range(args.steps):
                batch = fixed
                if kind == "loader":
                    batch = loop.to_device(next(rows), mesh)
                before, (state, metrics) = metrics, train_step(state, batch)
                jax.device_get(before)  # one step behind, as in the training loop
            jax.block_until_ready(metrics)
            seconds = time.perf_counter() - began
            speeds[kind].append(args.steps * c.data.batch_size / seconds)
            print(f"{kind:10} {speeds[kind][-1]:8.1f} clips per second", flush=True)
    medians = {kind: statistics.median(values) for kind, values in speeds.items()}
    print(f"ratio of the medians {medians['loader'] / medians['one batch']:.3f}")


if __name__ == "__main__":
    main()
