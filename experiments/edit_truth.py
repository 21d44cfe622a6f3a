"""Edits of toy-world clips by text, against the truth: the asked part and the rest.

    python -m experiments.edit_truth --clips 64

Unseen clips of one moving or still thing get a prompt with another colour, in the same
words. The oracle says whether the thing has the new colour, and whether its shape and
motion are what they were; the background must stay, which is the PSNR of the pixels that
are further than two from anything coloured, in the clip or in the result. Beside the
edits stand the clip itself (a copy), its reconstruction by the video VAE, and a new video
from the text alone.
"""

import argparse

import numpy as np
import scipy.ndimage

from sora_jax.evals import statistics
from sora_jax.evals.prompts import toyworld
from sora_jax.generation import pipeline
from sora_jax.toyworld import captions, families, render

_COLOURED = 40  # difference of the largest and the smallest channel, of 255


def pairs(count: int, family: str) -> list[tuple]:
    """(frames, suite of the new prompt, of the old one) of unseen scenes of one thing."""
    found = []
    for index in range(100 * count):
        scene = families.scene("tw32", "test", index, {family: 1.0}, 11)
        target = captions.exchanged(scene, "medium", "colour")
        if target is None or len(scene.truth.subjects) != 1:
            continue
        texts = target, captions.caption(scene, "medium")
        suites = [
            toyworld.Suite(family, family, (toyworld.Prompt(t, captions.parse(t)),))
            for t in texts
        ]
        found.append((render.render(scene), *suites))
        if len(found) == count:
            return found
    raise ValueError(f"there are only {len(found)} scenes of {family!r} to edit")


def background(source: np.ndarray, made: np.ndarray) -> float:
    """PSNR where neither video shows anything coloured."""
    things = np.zeros(source.shape[:3], bool)
    for video in (source, made):
        coloured = np.ptp(video.astype(int), axis=-1) > _COLOURED
        coloured = scipy.ndimage.binary_opening(coloured, np.ones((1, 2, 2)))
        things |= scipy.ndimage.binary_dilation(coloured, np.ones((1, 5, 5)))
    error = np.square(source.astype(float) - made)[~things].mean()
    return float(10 * np.log10(255**2 / max(error, 1e-2)))


def measure(made: list[np.ndarray], asked: list[tuple]) -> dict[str, list]:
    """For each clip: the asked part, the rest, both, and the background's PSNR."""
    found = {"new colour": [], "shape and motion": [], "both": [], "background, dB": []}
    for video, (source, *suites) in zip(made, asked, strict=True):
        video = video.astype(np.uint8)
        # The oracle finds a thing by its colour: the rest is read of either of the two.
        verdicts = [toyworld.verdicts(one, [video])[0] for one in suites]
        colour = verdicts[0]["colour"]
        others = verdicts[0].keys() - {"colour", toyworld.PASS}
        rest = any(all(one[part] for part in others) for one in verdicts)
        values = colour, rest, colour and rest, background(source, video)
        for column, value in zip(found.values(), values, strict=True):
            column.append(value)
    return found


def row(name: str, made: list[np.ndarray], asked: list[tuple]) -> str:
    """A row of the table: the asked part, the rest, both, and the background."""
    *shares, psnr = measure(made, asked).values()
    cells = []
    for right in shares:
        share = statistics.proportion(sum(right), len(right))
        cells.append(f"{share.value:.3f} ({share.low:.3f}-{share.high:.3f})")
    return f"| {name} | {' | '.join(cells)} | {np.mean(psnr):.1f} |"


def edited(pipe: pipeline.Pipeline, asked: list[tuple], task: str, **options) -> list:
    """What a task makes of the clips with the new texts: float [t, h, w, 3], of 255."""
    made = []
    for seed, (video, new, old) in enumerate(asked):
        flows = options.get("method") == "flowedit"
        own = options | ({"source": old.texts[0]} if flows else {})
        out = pipe.run(task, new.texts[0], video=video, seed=seed, batch_size=1, **own)
        made.append(np.round(255 * out.frames[0]))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="toy")
    parser.add_argument("--clips", type=int, default=64, help="half of them move")
    parser.add_argument("--strengths", default="0.8,0.9,0.95")
    args = parser.parse_args()
    pipe = pipeline.Pipeline.from_pretrained(args.model)
    half = args.clips // 2
    asked = pairs(half, "attribute") + pairs(args.clips - half, "motion")
    videos = [source for source, *_ in asked]
    latents = [pipe.encode(v[None].astype(np.float32) / 127.5 - 1) for v in videos]
    again = [np.round(255 * np.asarray(pipe.decode_latents(x)))[0] for x in latents]
    new = pipe([new.texts[0] for _, new, _ in asked], seed=0).frames
    print("| what | new colour | shape and motion | both | background, dB |")
    print("|---|---|---|---|---|")
    print(row("the clip itself", videos, asked))
    print(row("its reconstruction", again, asked))
    print(row("a new video from the text", [*np.round(255 * new)], asked), flush=True)
    flow = {"method": "flowedit"}
    for strength in map(float, args.strengths.split(",")):
        for name, task, options in (
            ("SDEdit", "vary", {}),
            ("FlowEdit", "edit", flow),
            (
                "FlowEdit, source guided by 1.5",
                "edit",
                flow | {"source_guidance_scale": 1.5},
            ),
        ):
            made = edited(pipe, asked, task, strength=strength, **options)
            print(row(f"{name} from {strength:g}", made, asked), flush=True)


if __name__ == "__main__":
    main()
