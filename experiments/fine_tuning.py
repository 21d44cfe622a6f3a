"""Can the shipped weights learn a new word from 50 clips, and keep what they know?

    python -m experiments.fine_tuning --out runs/violet

No clip that the toy's weights were trained on is violet. This writes 50 videos of violet
things with captions, as a user's folder has them, and as many others of the toy world as
--old says, since training on the new ones alone makes a model forget. It makes shards
and latents of them, and trains the shipped weights on these in full and with LoRA. Each
job's command is printed. Then it samples new prompts, scores them with the oracle, and
prints a table: violet prompts, and those of the six families before and after. Writes
OUT/before.png, OUT/full.png and OUT/lora.png.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import time
from collections.abc import Iterator

import numpy as np

from experiments import jobs
from sora_jax.data import video_io
from sora_jax.evals import pixels
from sora_jax.evals.prompts import make_clips, toyworld
from sora_jax.generation import contact_sheet, pipeline
from sora_jax.toyworld import captions, families, oracle, render
from sora_jax.toyworld import scene as scenes

TIER, CLIPS = "tw32", 50
NEW, RGB = "violet", (125, 50, 225)
COLOURS = scenes.PALETTE | {NEW: RGB}
WORDED_AS = "cyan"  # the colour whose place the new one takes in a caption
FAMILIES = {"attribute": 0.5, "motion": 0.5}
OLD = ("attribute", "count", "relation", "motion", "motion_binding", "camera")
SHARES = {  # of the old clips: as in the training of the shipped weights
    "attribute": 0.15,
    "count": 0.15,
    "relation": 0.2,
    "motion": 0.2,
    "motion_binding": 0.2,
    "camera": 0.1,
}
# The fields of each way to train, beside those of configs/toy.py.
WAYS = {
    "full": {
        "optim.learning_rate": 3e-4,
        "optim.muon_learning_rate": 2e-3,
        "optim.learning_rate_factors": "()",
    },
    "lora": {
        "text.frozen": True,
        "lora.rank": 8,
        "lora.layers": "('attn', 'ffn')",
        "optim.learning_rate": 2e-3,
    },
}


def new_scenes(split: str, seed: int) -> Iterator[scenes.Scene]:
    """Scenes of one violet thing that stands still or moves, without end."""
    for index in itertools.count():
        scene = families.scene(TIER, split, index, FAMILIES, seed)
        (thing,) = scene.objects
        yield dataclasses.replace(
            scene,
            objects=(dataclasses.replace(thing, colour=NEW),),
            factors=scene.factors | {"colours": [NEW]},
        )


def stated(scene: scenes.Scene, tier: str) -> tuple[str, scenes.Slots]:
    """A caption of a scene with a violet thing, and what it states."""
    known = scene.factors | {"colours": [WORDED_AS]}
    text, slots = captions.stated(dataclasses.replace(scene, factors=known), tier)
    (thing,) = slots.subjects
    if thing.colour is not None:
        thing = dataclasses.replace(thing, colour=NEW)
    slots = dataclasses.replace(slots, subjects=(thing,))
    return text.replace(WORDED_AS, NEW), slots


def write_folder(folder: pathlib.Path, old: int) -> set[str]:
    """Writes 50 violet videos and `old` others, with captions; returns these."""
    folder.mkdir(parents=True, exist_ok=True)
    used, fps = set(), scenes.TIERS[TIER].fps
    others = (families.scene(TIER, "train", index, SHARES) for index in range(old))
    drawn = [
        *((NEW, scene) for scene in itertools.islice(new_scenes("train", 0), CLIPS)),
        *(("old", scene) for scene in others),
    ]
    for number, (name, scene) in enumerate(drawn):
        word = stated if name == NEW else captions.stated
        texts = {tier: word(scene, tier)[0] for tier in ("short", "medium")}
        video = video_io.encode_lossless(render.render(scene, COLOURS), fps)
        (folder / f"{name}_{number:03d}.mp4").write_bytes(video)
        (folder / f"{name}_{number:03d}.json").write_text(json.dumps(texts))
        used |= set(texts.values())
    return used


def new_suites(count: int, used: set[str]) -> list[toyworld.Suite]:
    """New prompts of violet things by family: `count` of each."""
    found: dict[str, dict[str, scenes.Slots]] = {family: {} for family in FAMILIES}
    for number, scene in enumerate(new_scenes("test", 1)):
        text, slots = stated(scene, ("short", "medium")[number % 2])
        texts = found[scene.family]
        fits = slots.family == scene.family and slots.subjects[0].colour == NEW
        if fits and text not in used and len(texts) < count:
            texts.setdefault(text, slots)
        if all(len(texts) == count for texts in found.values()):
            break
    return [
        toyworld.Suite(
            f"{NEW}, {family}",
            family,
            tuple(toyworld.Prompt(text, slots) for text, slots in texts.items()),
        )
        for family, texts in found.items()
    ]


def score(
    model: str | pathlib.Path, suites: list[toyworld.Suite], sheet: pathlib.Path
) -> dict[str, toyworld.Shares]:
    """Samples and scores all prompts; draws some of the new ones."""
    pipe = pipeline.Pipeline.from_pretrained(model)
    found = {}
    for suite in suites:
        seeds = [make_clips.clip_seed(0, prompt) for prompt in suite.prompts]
        frames = pixels.to_uint8(pipe(suite.texts, seed=seeds, batch_size=32).frames)
        seen = [oracle.read(np.asarray(video), COLOURS) for video in frames]
        found[suite.name] = toyworld.summarize(toyworld.verdicts(suite, seen))
        if suite is suites[0]:
            contact_sheet.write(sheet, list(frames[:10]), suite.texts[:10])
    return found


def table(scores: dict[str, dict[str, toyworld.Shares]]) -> str:
    """A Markdown table: a row for each part of each suite, a column for each model."""
    lines = [
        f"| prompts | part | {' | '.join(scores)} |",
        "|---" * (2 + len(scores)) + "|",
    ]
    first = next(iter(scores.values()))
    for suite, parts in first.items():
        for part in parts:
            of_models = (shares[suite][part] for shares in scores.values())
            cells = (f"{s.value:.3f} ({s.low:.3f}-{s.high:.3f})" for s in of_models)
            lines.append(f"| {suite} | {part} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--model", default="toy", help="what is fine-tuned")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--old", type=int, default=250, help="old clips mixed in")
    parser.add_argument("--prompts", type=int, default=64, help="per suite")
    args = parser.parse_args()
    out, tier = args.out, scenes.TIERS[TIER]
    used = write_folder(out / "videos", args.old)
    size = f"{tier.size}x{tier.size}"
    jobs.run(
        "prepare",
        source=f"folder:{out / 'videos'}",
        size=size,
        num_frames=tier.num_frames,
        fps=tier.fps,
        lossless=True,
        out=out / "shards",
    )
    jobs.run(
        "prepare",
        source=f"shards:{out / 'shards'}",
        vae=args.model,
        out=out / "latents",
    )
    seconds = {}
    for way, fields in WAYS.items():
        began = time.monotonic()
        jobs.run(
            "train",
            config="configs/toy.py",
            out=out / way,
            init=args.model,
            config__data__latents=out / "latents",
            config__loop__num_steps=args.steps,
            config__loop__eval_every=0,
            config__optim__ema_decay=0.99,
            config__noise__shift=4,
            config__noise__std=1.5,
            **{f"config__{name.replace('.', '__')}": v for name, v in fields.items()},
        )
        seconds[way] = time.monotonic() - began
    old = toyworld.make_suites(
        dict.fromkeys(OLD, args.prompts), tier=TIER, exclude_texts=used, seed=7
    )
    suites = [*new_suites(args.prompts // 2, used), *old]
    models = {"before": args.model} | {way: out / way for way in WAYS}
    scores = {
        name: score(model, suites, out / f"{name}.png")
        for name, model in models.items()
    }
    print(table(scores))
    print({way: f"{spent:.0f} s of training" for way, spent in seconds.items()})


if __name__ == "__main__":
    main()
