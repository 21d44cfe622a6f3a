"""What recaptioning does to a text-to-video model (DALL-E 3, section 3, on the toy world).

    python -m experiments.recaption_effect --latents runs/recaptioned_latents \\
        --out runs/recaption_effect --seeds 0,1

--latents are those of recaptioned shards (`recaption --captioner network`, then
`prepare --vae`): a clip has its noisy original text (alt), the toy world's exact captions,
and those of the captioner. One text encoder is trained on these captions, without any
video: it reads alt, short, medium and dense, and writes structured; then each run trains the toy's denoiser on other tiers of captions, for as many
steps. Every run is sampled from the same unseen scenes, of which it gets a short prompt,
the same one rewritten by rules or by --upsampler, and a dense prompt. The oracle scores
what a prompt states.

The same command resumes: finished runs and scores are kept in OUT, and the table has those
that are there. Prints a Markdown table with 95 % intervals and writes OUT/effect.png.
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping

import matplotlib.pyplot as plt
import numpy as np

from experiments import jobs
from sora_jax.core import paths
from sora_jax.data import latent_cache
from sora_jax.evals import pixels, statistics
from sora_jax.evals.prompts import toyworld
from sora_jax.generation import pipeline, prompt_upsampler
from sora_jax.toyworld import captions, families

SIZE_CLASS, LENGTH = "tw32", 112  # tokens of the longest dense caption
# What each run reads: weights of the caption tiers.
RUNS = {
    "alt": {"alt": 1.0},
    "short": {"short": 1.0},
    "dense": {"dense": 1.0},
    "ours 50": {"model_dense": 0.5, "alt": 0.5},
    "ours 80": {"model_dense": 0.8, "alt": 0.2},
    "ours 95": {"model_dense": 0.95, "alt": 0.05},
    "ours": {"model_dense": 1.0},
}
TIERS = ("alt", "short", "medium", "dense", "structured", "model_dense", "model_short")
TEXT_TIERS = {"alt": 0.2, "short": 0.25, "medium": 0.2, "dense": 0.35}


def tier_flags(weights: Mapping[str, float]) -> dict[str, float]:
    """The flags that give weight to these tiers alone."""
    return {f"config.text.tiers.{tier}": weights.get(tier, 0.0) for tier in TIERS}


def train_text(args: argparse.Namespace) -> pathlib.Path:
    """Trains the text encoder that all runs begin with."""
    folder = args.out / "text"
    flags = {
        "config": "configs/toy_text.py",
        "out": folder,
        "config.data.latents": args.latents,
        "config.text.length": LENGTH,
        "config.loop.num_steps": args.text_steps,
    }
    if not (folder / "text_encoder" / "weights.safetensors").is_file():
        jobs.run("train", **flags, **tier_flags(TEXT_TIERS))
    return folder


def train(
    args: argparse.Namespace, name: str, seed: int, text: pathlib.Path
) -> pathlib.Path:
    """Trains a run where that is not done."""
    folder = args.out / f"{name.replace(' ', '_')}_{seed}"
    flags = {
        "config": "configs/toy.py",
        "out": folder,
        "config.seed": seed,
        "config.data.latents": args.latents,
        "config.data.gap_clips": 0,
        "config.text.encoder": text,
        "config.text.length": LENGTH,
        "config.loop.num_steps": args.steps,
        "config.loop.checkpoint_every": args.steps,
        "config.loop.eval_every": 0,
        "config.optim.ema_decay": 0.995,
    }
    if not (folder / "checkpoints" / str(args.steps)).is_dir():
        jobs.run("train", **flags, **tier_flags(RUNS[name]))
    return folder


def suites(count: int, seen: frozenset[str], seed: int) -> dict[str, tuple]:
    """Unseen scenes by family: suites of their short prompts and of their dense ones."""
    found = {}
    for family in families.BASIC:
        short, dense = {}, {}
        for index in range(100 * count):
            scene = families.scene(SIZE_CLASS, "test", index, {family: 1.0}, seed)
            text, slots = captions.stated(scene, "short")
            if text in seen or slots.family != family or text in short:
                continue
            short[text] = toyworld.Prompt(text, slots)
            dense[text] = toyworld.Prompt(*captions.stated(scene, "dense"))
            if len(short) == count:
                break
        else:
            raise ValueError(
                f"only {len(short)} of {count} short prompts of {family!r} are in no "
                "caption of the training clips; ask for fewer"
            )
        found[family] = tuple(
            toyworld.Suite(family, family, tuple(prompts.values()))
            for prompts in (short, dense)
        )
    return found


def prompts_of(
    suites: Mapping[str, tuple], rewriters: Mapping[str, Callable]
) -> Iterator[tuple[str, toyworld.Suite, list]]:
    """Kinds of prompts: (kind, suite that is scored, what the model is given)."""
    for short, dense in suites.values():
        yield "short", short, short.texts
        for name, rewrite in rewriters.items():
            yield f"short, {name}", short, rewrite(short.texts, range(len(short)))
        yield "dense", dense, dense.texts


def score(folder: pathlib.Path, asked) -> dict[str, dict[str, list]]:
    """Samples and scores a run: for each kind and family, [right, stated] of each clip."""
    pipe = pipeline.Pipeline.from_pretrained(folder)
    found: dict[str, dict[str, list]] = {}
    for kind, suite, given in asked:
        frames = pixels.to_uint8(pipe(given, seed=0, batch_size=32).frames)
        verdicts = toyworld.verdicts(suite, [np.asarray(video) for video in frames])
        found.setdefault(kind, {})[suite.family] = [
            [
                sum(right for part, right in v.items() if part != toyworld.PASS),
                len(v) - 1,
            ]
            for v in verdicts
        ]
    return found


def shares(clips: list[list[int]]) -> statistics.Estimate:
    """The mean share of its stated facts that a clip shows."""
    return statistics.bootstrap_mean(np.array([r / n for r, n in clips if n]))


def table(results: Mapping[str, list[dict]]) -> str:
    """A Markdown table: a row for each run, with all its seeds, and kind of prompt."""
    names = [*families.BASIC]
    lines = [
        f"| trained on | prompts | all | {' | '.join(names)} |",
        "|---" * (3 + len(names)) + "|",
    ]
    for name, seeds in results.items():
        for kind in seeds[0]:
            by_family = {f: sum((s[kind][f] for s in seeds), []) for f in names}
            whole = shares(sum(by_family.values(), []))
            cells = " | ".join(f"{shares(c).value:.3f}" for c in by_family.values())
            lines.append(
                f"| {name} | {kind} | {whole.value:.3f} ({whole.low:.3f}-"
                f"{whole.high:.3f}) | {cells} |"
            )
    return "\n".join(lines)


def plot(results: Mapping[str, list[dict]], file: pathlib.Path) -> None:
    """Draws the shares of all families: a group of bars for each run."""
    kinds = [*next(iter(results.values()))[0]]
    figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
    for place, kind in enumerate(kinds):
        found = [
            shares(sum((sum(s[kind].values(), []) for s in seeds), []))
            for seeds in results.values()
        ]
        values = np.array([e.value for e in found])
        spread = np.array([[e.value - e.low, e.high - e.value] for e in found]).T
        at = np.arange(len(found)) + (place - (len(kinds) - 1) / 2) * 0.8 / len(kinds)
        axes.bar(at, values, 0.75 / len(kinds), yerr=spread, label=kind, capsize=2)
    axes.set_xticks(range(len(results)), results)
    axes.set_ylabel("share of stated facts shown")
    axes.set_ylim(0, 1)
    axes.legend(title="prompts", ncols=len(kinds), fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(file, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latents", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--upsampler", help="run of a trained upsampler")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--runs", default=",".join(RUNS), help="which, in this order")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--text_steps", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=32, help="scenes of a family")
    args = parser.parse_args()
    text = train_text(args)
    # Not those of the captioner, so that the scenes do not depend on it.
    seen = frozenset(latent_cache.open(args.latents).all_captions(captions.TIERS))
    rewriters = {"rules": prompt_upsampler.Rules("dense")}
    if args.upsampler:
        rewriters["network"] = prompt_upsampler.Network(args.upsampler, "dense")
    asked = [*prompts_of(suites(args.prompts, seen, seed=11), rewriters)]
    settings = {"steps": args.steps, "prompts": args.prompts, "rewriters": [*rewriters]}
    results: dict[str, list[dict]] = {}
    for seed in args.seeds.split(","):
        for name in args.runs.split(","):
            file = args.out / f"{name.replace(' ', '_')}_{seed}.json"
            found = json.loads(file.read_text()) if file.is_file() else {}
            if found.get("settings") != settings:
                folder = train(args, name, int(seed), text)
                found = {"settings": settings, "scores": score(folder, asked)}
                paths.write_atomically(file, json.dumps(found) + "\n")
            results.setdefault(name, []).append(found["scores"])
            print(table(results), flush=True)
            plot(results, args.out / "effect.png")


if __name__ == "__main__":
    main()
