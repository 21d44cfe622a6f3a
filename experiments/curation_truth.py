"""Measures the stages of curation against exact truth, on scenes of the toy world.

    python -m experiments.curation_truth [--clips FOLDER] [--seed 0]

Reels of 64-pixel scenes with known cuts, scenes with known motion, copies of scenes that
are coded, scaled, cropped or brighter, and scenes with lines of text and with black bars.
All go through H.264 once. The limits of the stages were set on scenes of seeds 3 to 12
and 101 to 103; the default seed draws others. --clips lists what the stages say of the
videos of a folder, where no truth is known.

Letters: t time, h height, w width, c channel.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from scipy import stats

from sora_jax.data import cuts, video_io
from sora_jax.data.curation import (
    duplicates,
    fingerprint,
    letterbox,
    motion,
    stages,
    text_area,
)
from sora_jax.toyworld import families, render, scene

FPS = 8.0
SEED = 1000  # added to --seed
REELS, SHOTS = 4, 50
SPEED_CLIPS, SCENES, COPIED = 60, 600, 80
WORDS = "the quick brown fox jumps over a lazy dog while six big crows look on".split()


def coded(frames_thwc: np.ndarray, crf: int = 23) -> np.ndarray:
    """Returns frames after H.264."""
    return video_io.decode(video_io.encode_mp4(frames_thwc, FPS, crf=crf)).frames


def resized(frames_thwc: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns frames of another size."""
    bicubic = PIL.Image.Resampling.BICUBIC
    return np.stack(
        [
            np.asarray(PIL.Image.fromarray(frame).resize((width, height), bicubic))
            for frame in frames_thwc
        ]
    )


# -- cuts -----------------------------------------------------------------------------


def reel(seed: int, dissolves: int = 0) -> tuple[np.ndarray, set[int], list[range]]:
    """Joins scenes of 9 to 33 frames, also at two and three times the speed.

    Args:
      seed: of the scenes.
      dissolves: frames of a dissolve, which half of the joints then are.

    Returns:
      frames uint8[t, h, w, c], the first frames of shots after a cut, and the frames of
      each dissolve.
    """
    rng = np.random.default_rng(seed)
    parts: list[np.ndarray] = []
    cut, dissolved, at = set(), [], 0
    for index in range(SHOTS):
        drawn = families.scene("tw64", "test_len", index, None, seed)
        shot = render.render(drawn)[:: rng.choice([1, 1, 2, 3])]
        shot = shot[: rng.integers(9, len(shot) + 1)]
        if parts and dissolves and rng.random() < 0.5:
            share = (np.arange(dissolves) + 1)[:, None, None, None] / (dissolves + 1)
            mixed = (1 - share) * parts[-1][-1] + share * shot[0]
            parts.append(mixed.astype(np.uint8))
            dissolved.append(range(at, at + dissolves + 1))
            at += dissolves
        elif parts:
            cut.add(at)
        parts.append(shot)
        at += len(shot)
    return np.concatenate(parts), cut, dissolved


def measure_cuts(seed: int) -> Iterator[str]:
    """Yields lines on cuts and dissolves."""
    for name, dissolves in (("cuts alone", 0), ("half dissolves of 4 frames", 4)):
        right = found_all = truth_all = touched = fades = 0
        for number in range(REELS):
            frames_thwc, truth, dissolved = reel(seed + number, dissolves)
            found = {first for first, _ in cuts.shots(coded(frames_thwc))[1:]}
            at_fades = {one for one in found for fade in dissolved if one in fade}
            touched += sum(any(one in fade for one in found) for fade in dissolved)
            fades += len(dissolved)
            # A cut that is reported inside a dissolve is neither right nor wrong.
            found -= at_fades
            right += len(found & truth)
            found_all, truth_all = found_all + len(found), truth_all + len(truth)
        f1 = 2 * right / (found_all + truth_all)
        yield f"cuts, {name}: F1 {f1:.4f} ({right} right, {found_all} found, {truth_all})"
        if fades:
            yield f"  dissolves found as cuts: {touched} of {fades}"


# -- motion ---------------------------------------------------------------------------


def at_speed(seed: int, index: int, family: str, factor: float) -> scene.Scene:
    """Returns nine frames of a scene at `factor` times its speed."""
    drawn = families.scene("tw64", "train", index, {family: 1.0}, seed)
    steps = factor * np.arange(9)
    return dataclasses.replace(
        drawn,
        pos=drawn.pos[:1] + steps[:, None, None] * (drawn.pos[1] - drawn.pos[0]),
        vel=factor * drawn.vel[:9],
        camera=drawn.camera[:1] + steps[:, None] * (drawn.camera[1] - drawn.camera[0]),
    )


def measure_motion(seed: int) -> Iterator[str]:
    """Yields lines on the rank correlation with the true motion."""
    rng = np.random.default_rng(seed)
    everything: dict[str, list[float]] = {"true": [], "found": []}
    for family in ("motion", "motion_binding", "camera"):
        mean, found, local, speed = [], [], [], []
        for index in range(SPEED_CLIPS):
            drawn = at_speed(seed, index, family, rng.uniform(0, 2.2))
            frames_thwc = coded(render.render(drawn), 20)
            flow, _ = render.flow(drawn)
            scores = motion.score(frames_thwc, FPS)
            mean.append(np.linalg.norm(flow, axis=-1).mean() * FPS / drawn.size)
            found.append(scores["motion"])
            local.append(scores["motion_local"])
            shift = (
                drawn.pos[1] - drawn.pos[0] - (drawn.camera[1] - drawn.camera[0])[:2]
            )
            speed.append(np.linalg.norm(shift, axis=-1).max(initial=0.0))
        everything["true"] += mean
        everything["found"] += found
        rank = stats.spearmanr(mean, found).statistic
        line = f"motion, {family}: Spearman {rank:.4f} with the mean true flow"
        if family != "camera":
            rank = stats.spearmanr(speed, local).statistic
            line += f"; motion_local {rank:.4f} with the fastest object's speed"
        yield line
    rank = stats.spearmanr(everything["true"], everything["found"]).statistic
    yield f"motion, all: Spearman {rank:.4f} with the mean true flow"


# -- copies ---------------------------------------------------------------------------


def copies(frames_thwc: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (kind, frames) of copies of a clip."""
    height, width = frames_thwc.shape[1:3]
    yield "coded at crf 30", coded(frames_thwc, 30)
    small = resized(frames_thwc, height * 5 // 8 // 2 * 2, width * 5 // 8 // 2 * 2)
    yield "5/8 of the size", coded(small, 20)
    yield "twice the size", coded(resized(frames_thwc, 2 * height, 2 * width), 20)
    for share in (0.03, 0.05):
        edge = round(share * height)
        inner = frames_thwc[:, edge : height - edge, edge : width - edge]
        yield f"cropped by {share:.0%}", coded(resized(inner, height, width), 20)
    brighter = np.clip(frames_thwc.astype(int) + 25, 0, 255).astype(np.uint8)
    yield "25 levels brighter", coded(brighter, 20)
    yield "a fifth darker", coded((0.8 * frames_thwc).astype(np.uint8), 20)


def measure_copies(seed: int) -> Iterator[str]:
    """Yields lines on the recall and the precision of near-duplicates."""
    scenes = [
        render.render(families.scene("tw64", "train", index, None, seed))
        for index in range(SCENES)
    ]
    prints = [fingerprint.of(frames_thwc) for frames_thwc in scenes]
    kinds, own = [""] * SCENES, [*range(SCENES)]
    for index in range(COPIED):
        for kind, frames_thwc in copies(scenes[index]):
            prints.append(fingerprint.of(frames_thwc))
            kinds.append(kind)
            own.append(index)
    found = duplicates.find(prints)
    right = {place: found[place] == own[place] for place in range(SCENES, len(prints))}
    claimed = sum(one is not None for one in found)
    recall, precision = sum(right.values()) / len(right), sum(right.values()) / claimed
    yield (
        f"copies: recall {recall:.4f} of {len(right)}, precision {precision:.4f} of "
        f"{claimed} claimed, among {SCENES} scenes"
    )
    for kind in dict.fromkeys(kinds[SCENES:]):
        of = [hit for place, hit in right.items() if kinds[place] == kind]
        yield f"  {kind}: recall {np.mean(of):.3f}"


# -- text and bars --------------------------------------------------------------------


def measure_text(seed: int) -> Iterator[str]:
    """Yields lines on text and on black bars, in frames of 256 pixels."""
    rng = np.random.default_rng(seed)
    plain, written, barred, true = [], [], [], []
    for index in range(60):
        drawn = render.render(families.scene("tw64", "train", index, None, seed))[:1]
        frame = resized(drawn, 256, 256)[0]
        plain.append(text_area.score(coded(frame[None]), FPS)["text_area"])
        picture = PIL.Image.fromarray(frame)
        font = PIL.ImageFont.load_default(int(rng.choice([12, 16, 20, 24])))
        place = (10, int(rng.integers(4, 220)))
        text = " ".join(rng.choice(WORDS, 4))
        PIL.ImageDraw.Draw(picture).text(place, text, "white", font)
        seen = coded(np.asarray(picture)[None])
        written.append(text_area.score(seen, FPS)["text_area"])
        bar = int(rng.integers(0, 48))
        shown = frame.copy()
        shown[:bar] = shown[256 - bar :] = 0
        true.append(2 * bar / 256)
        barred.append(letterbox.score(coded(shown[None]), FPS)["letterbox"])
    hits, false = np.mean(np.array(written) > 0), np.mean(np.array(plain) > 0)
    yield f"text: found in {hits:.3f} of frames with a line of it, in {false:.3f} without"
    error = np.abs(np.array(barred) - true).max()
    yield f"bars: largest error of the area {error:.4f}"


def describe(folder: pathlib.Path) -> Iterator[str]:
    """Yields what the stages say of each second of the videos of a folder."""
    for path in sorted(p for p in folder.iterdir() if p.suffix in video_io.SUFFIXES):
        header = video_io.probe(path)
        times = np.arange(video_io.ticks(header.seconds, FPS)) / FPS
        frames_thwc = np.stack([*video_io.sample(path, times, (180, 320))])
        found = [first / FPS for first, _ in cuts.shots(frames_thwc)[1:]]
        yield f"{path.name}: {header.seconds:.1f} s, cuts at {found or 'no time'}"
        windows = [frames_thwc[at : at + 9] for at in range(0, len(times) - 8, 9)]
        copy_of = duplicates.find([fingerprint.of(window) for window in windows])
        for number, window in enumerate(windows):
            scores = stages.run(stages.STAGES, window, FPS)
            said = ", ".join(f"{name} {value:.3g}" for name, value in scores.items())
            copy = "" if copy_of[number] is None else f", a copy of {copy_of[number]}"
            yield f"  window {number}: {said}{copy}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=pathlib.Path, help="folder of real videos")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    seed = SEED + 10 * arguments.seed
    for measure in (measure_cuts, measure_motion, measure_copies, measure_text):
        for line in measure(seed):
            print(line, flush=True)
    if arguments.clips:
        for line in describe(arguments.clips):
            print(line, flush=True)


if __name__ == "__main__":
    main()
