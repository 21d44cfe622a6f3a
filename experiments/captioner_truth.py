"""What a captioner states of unseen clips of the toy world, against what is true.

    python -m experiments.captioner_truth --captioner runs/captioner --clips 500

Clips are encoded as H.264 and decoded again; the captioner sees nothing else. A caption is
parsed into slots. Precision is the share of stated facts that are true of the scene, recall
the share of the facts of the scene's own caption of that tier that are stated, and F1 their
harmonic mean. "left and right" are the clips whose own caption states a side, a direction
or a camera movement to the left or right: the share of captions that state all of these
rightly. Prints a Markdown table with 95 % intervals, and some captions.
"""

import argparse
import collections
import dataclasses

import numpy as np

from sora_jax.data import video_io
from sora_jax.evals import statistics
from sora_jax.evals.prompts import make_clips
from sora_jax.toyworld import captions, families, render
from sora_jax.toyworld import scene as scenes
from sora_jax.training import trained_captioner

SIDES = {"left", "right", "pan-left", "pan-right"}


def canonical(slots: scenes.Slots) -> scenes.Slots:
    """The same facts with subjects in a fixed order: by place, else by colour."""
    slots = slots.by_place()
    if slots.relation is None:
        order = sorted(slots.subjects, key=lambda s: (s.colour or "", s.shape or ""))
        slots = dataclasses.replace(slots, subjects=tuple(order))
    return slots


def facts(slots: scenes.Slots) -> frozenset[tuple]:
    """What is stated, as (..., slot, value)."""
    return make_clips.facts(canonical(slots))


def is_side(fact: tuple) -> bool:
    """Whether a fact is about left and right."""
    return fact[-2] in ("relation", "direction", "camera") and fact[-1] in SIDES


def f1(counts: collections.Counter) -> tuple[float, float, float]:
    """Precision, recall and F1 of counted facts."""
    precision = counts["true"] / max(1, counts["stated"])
    recall = counts["found"] / max(1, counts["wanted"])
    return precision, recall, 2 * precision * recall / max(1e-9, precision + recall)


def measure(
    drawn: list[scenes.Scene], texts: list[str], tier: str
) -> tuple[dict[str, collections.Counter], statistics.Estimate]:
    """Counts facts by slot, "" for all; and how many clips have their sides right."""
    counts: dict[str, collections.Counter] = collections.defaultdict(
        collections.Counter
    )
    sides = []
    for scene, text in zip(drawn, texts, strict=True):
        stated = facts(captions.parse(text))
        truth = facts(scene.truth)
        wanted = facts(captions.stated(scene, tier)[1])
        for name, members in (
            ("stated", stated),
            ("true", stated & truth),
            ("wanted", wanted),
            ("found", stated & wanted),
        ):
            for fact in members:
                counts[""][name] += 1
                counts[fact[-2]][name] += 1
        about = {fact for fact in wanted if is_side(fact)}
        if about:
            sides.append(about <= stated)
    return counts, statistics.proportion(sum(sides), len(sides))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captioner", required=True, help="a run, or its folder")
    parser.add_argument("--world", default="tw32", choices=[*scenes.TIERS])
    parser.add_argument("--clips", type=int, default=500)
    parser.add_argument("--beams", type=int, default=1)
    args = parser.parse_args()
    captioner = trained_captioner.load(args.captioner)
    fps = scenes.TIERS[args.world].fps
    drawn = [families.scene(args.world, "test", index) for index in range(args.clips)]
    videos = []
    for scene in drawn:
        # At twice the size each pixel keeps its colour.
        frames = render.render(scene).repeat(2, 1).repeat(2, 2)
        decoded = video_io.decode(video_io.encode_mp4(frames, fps)).frames
        videos.append(decoded[:, ::2, ::2])
    print("| tier | precision | recall | F1 | left and right | by slot (F1) |")
    print("|---|---|---|---|---|---|")
    shown = []
    for tier in captioner.config.tiers:
        texts = [t for t, _ in captioner.write(videos, tier, beams=args.beams)]
        counts, side = measure(drawn, texts, tier)
        values = " | ".join(f"{value:.3f}" for value in f1(counts[""]))
        slots = ", ".join(
            f"{name} {f1(of)[2]:.3f}" for name, of in sorted(counts.items()) if name
        )
        print(
            f"| {tier} | {values} | {side.value:.3f} ({side.low:.3f}-{side.high:.3f}) of "
            f"{side.count} | {slots} |"
        )
        shown += [f"{tier}: {text}" for text in texts[: 3 if tier != "dense" else 6]]
    print("\n".join(["", *shown]))
    empty = np.mean([not text for text in texts])
    print(f"captions that did not end: {empty:.1%} of the last tier")


if __name__ == "__main__":
    main()
