"""Control tables of the toy world: what the oracle and the metrics say of spoilt clips.

    python -m experiments.toyworld_controls --tier tw32 --clips 140
    python -m experiments.toyworld_controls --tables temporal --clips 96 --seed 11
    python -m experiments.toyworld_controls --model runs/model --checkpoints 2000,4400

Prints Markdown tables to stdout.

The oracle's table has, for each family, the share of clips that pass: the scene's own
video (plain, blurred and noised, or through a linear autoencoder of about 30 dB), and
tampered videos. A tampered share is followed, in brackets, by its expected value: the
share of scenes whose statements still hold (a mirrored clip of something that moves up
still moves up). A share that differs by more than the tolerance is marked with "!".
Below the table are the controls of single families (`family_controls.py`).

The temporal tables have each metric of clips and of their spoilt copies, with the orders
that must hold (`sora_jax/evals/metrics/control_tables.py`), for families in which
something moves and for a set in which everything moves to the right. With --model, the
clips are samples of its checkpoints for motion prompts.

The exit status is 1 if a share is off or an order does not hold.
"""

import argparse
import dataclasses
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from experiments import family_controls
from sora_jax.evals import pixels
from sora_jax.evals.features import networks
from sora_jax.evals.metrics import control_tables, temporal_metrics
from sora_jax.evals.metrics import controls as spoilt
from sora_jax.generation import pipeline
from sora_jax.toyworld import families, journeys, oracle, render, rules, shots
from sora_jax.toyworld.grammar import CONVERSE
from sora_jax.toyworld.scene import DIRECTIONS, Scene, Slots, find_tier
from sora_jax.training import checkpoint

TOLERANCE = 0.03
PSNR = 30.0  # of the linear autoencoder, dB
FLOORS = {"truth": 0.995, "blur 1, noise 12": 0.98}
SIDES = ("left", "right")

_MIRRORED = {
    "left": "right",
    "right": "left",
    "up-left": "up-right",
    "up-right": "up-left",
    "down-left": "down-right",
    "down-right": "down-left",
    "pan-left": "pan-right",
    "pan-right": "pan-left",
}
_REVERSED = {
    "left": "right",
    "right": "left",
    "up": "down",
    "down": "up",
    "up-left": "down-right",
    "up-right": "down-left",
    "down-left": "up-right",
    "down-right": "up-left",
    "pan-left": "pan-right",
    "pan-right": "pan-left",
    "tilt-up": "tilt-down",
    "tilt-down": "tilt-up",
    "zoom-in": "zoom-out",
    "zoom-out": "zoom-in",
}


# -- Degraded videos -------------------------------------------------------------------


def degrade(video: np.ndarray, sigma: float, noise: float, seed: int) -> np.ndarray:
    """Blur, then Gaussian noise of that standard deviation (of 255), as uint8."""
    out = spoilt.blur(video, sigma, int(np.ceil(3 * sigma)))
    out += np.random.default_rng(seed).normal(0.0, noise, out.shape)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


class LinearAutoencoder:
    """Principal components of patches: 8 x 8 in the first frame, then 4 x 8 x 8.

    It keeps as many components as give the clips that it is fitted on 30 dB.
    """

    def __init__(self, clips: list[np.ndarray]):
        error = 255.0**2 / 10 ** (PSNR / 10)
        self.codes = []
        for part in range(2):
            rows = np.concatenate([self._split(clip)[part] for clip in clips])
            mean = rows.mean(axis=0)
            values, vectors = np.linalg.eigh(np.cov(rows - mean, rowvar=False))
            lost = np.cumsum(values) / rows.shape[1]  # if the smallest are dropped
            self.codes.append((mean, vectors[:, np.searchsorted(lost, error) :]))

    @staticmethod
    def _split(clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        frames, size = clip.shape[:2]
        cells = size // 8
        parts = []
        for part, depth in ((clip[:1], 1), (clip[1:], 4)):
            grid = part.astype(np.float32).reshape(-1, depth, cells, 8, cells, 8, 3)
            rows = grid.transpose(0, 2, 4, 1, 3, 5, 6)
            parts.append(rows.reshape(-1, depth * 8 * 8 * 3))
        return parts[0], parts[1]

    def __call__(self, clip: np.ndarray) -> np.ndarray:
        size = clip.shape[1]
        cells = size // 8
        out = []
        for rows, depth, code in zip(
            self._split(clip), (1, 4), self.codes, strict=True
        ):
            mean, vectors = code
            rows = (rows - mean) @ vectors @ vectors.T + mean
            grid = rows.reshape(-1, cells, cells, depth, 8, 8, 3)
            grid = grid.transpose(0, 3, 1, 4, 2, 5, 6)
            out.append(grid.reshape(-1, size, size, 3))
        return np.clip(np.rint(np.concatenate(out)), 0, 255).astype(np.uint8)


def shuffled(video: np.ndarray, seed: int) -> np.ndarray:
    """The frames in a random order with little correlation to time."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(video))
        if abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) <= 0.5:
            return video[order]


# -- Which statements still hold -------------------------------------------------------


def renamed(slots: Slots, names: dict[str, str]) -> Slots:
    """The slots with directions, relations, camera motion and events renamed."""
    subjects = tuple(
        dataclasses.replace(subject, direction=names.get(subject.direction))
        if subject.direction in names
        else subject
        for subject in slots.subjects
    )
    return dataclasses.replace(
        slots,
        subjects=subjects,
        relation=names.get(slots.relation, slots.relation),
        camera=names.get(slots.camera, slots.camera),
        events=tuple(
            dataclasses.replace(event, value=names.get(event.value, event.value))
            for event in slots.events
        ),
    )


def _same_from_the_end(scene: Scene, first: int, late: int) -> bool:
    """Whether events that follow each other are the same in the reversed clip.

    `first` is added to the frame of a change that is counted from the end, `late` are the
    frames by which it may differ from its stated time.
    """
    now = scene.truth.events
    was = renamed(scene.truth, _REVERSED).events[::-1]
    if [event.value for event in now] != [event.value for event in was]:
        return False
    fps, last = find_tier(scene.tier).fps, scene.num_frames - 1
    times = [event.second * fps for event in now[1:] if event.second is not None]
    return all(
        abs(last + first - time - wanted) <= late
        for time, wanted in zip(times[::-1], times, strict=True)
    )


def _comes_back(scene: Scene) -> bool:
    """Whether the way back from the end has the direction of the way out."""
    return bool(np.allclose(np.sign(scene.vel[1]), -np.sign(scene.vel[-1])))


# Whether the reversed clip shows the same, for families with events; others: never.
REVERSED_ALIKE: dict[str, Callable[[Scene], bool]] = {
    "collision": lambda scene: comes_as_stated(scene, -scene.vel[-1]),
    "shots": lambda scene: _same_from_the_end(scene, 1, shots.LATE),
    "to_and_fro": _comes_back,
    "camera_path": lambda scene: _same_from_the_end(scene, 0, journeys.LATE),
}


def stays_true(scene: Scene, control: str) -> bool:
    """Whether all scored statements of the scene hold for the tampered video."""
    slots = scene.truth
    if control == "mirrored":
        return renamed(slots, _MIRRORED) == slots
    if slots.events:
        holds = REVERSED_ALIKE.get(scene.family, lambda scene: False)
        return control == "reversed" and holds(scene)
    if control == "reversed":
        relation = slots.relation  # does not depend on time
        return (
            dataclasses.replace(renamed(slots, _REVERSED), relation=relation) == slots
        )
    moving = any(subject.direction for subject in slots.subjects)
    # The other two controls: still, and frames shuffled.
    return not moving and slots.camera in (None, "static")


def comes_as_stated(scene: Scene, velocity: np.ndarray) -> bool:
    """Whether the things move as stated before a collision; velocity is [things, 2]."""
    for subject, (x, y) in zip(scene.truth.subjects, velocity, strict=True):
        ux, uy = DIRECTIONS.get(subject.direction, (0.0, 0.0))
        along = x * ux + y * uy > rules.MOVING
        still = np.hypot(x, y) <= rules.MOVING
        if not (still if subject.direction is None else along):
            return False
    return True


def same_claims(one: Scene, other: Scene) -> bool:
    """Whether all scored statements are the same in two scenes."""
    readable = find_tier(one.tier).shape_readable

    def claims(scene: Scene) -> Slots:
        subjects = [
            dataclasses.replace(s, place=None, shape=s.shape if readable else None)
            for s in scene.truth.subjects
        ]
        relation, events = scene.truth.relation, scene.truth.events
        # "A left of B" and "B right of A" are the same claim, as are two motions.
        if sorted(subjects, key=str) != subjects:
            subjects = subjects[::-1]
            relation = CONVERSE.get(relation)
            events = tuple(
                event
                if event.by is None or event.value == "resting"
                else event.exchanged()
                for event in events
            )
        return dataclasses.replace(
            scene.truth,
            subjects=tuple(subjects),
            relation=relation,
            events=events,
            tone=None,
        )

    return claims(one) == claims(other)


# -- The oracle's table ----------------------------------------------------------------

TAMPERED: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "mirrored": lambda video, seed: video[:, :, ::-1],
    "reversed": lambda video, seed: video[::-1],
    "still": lambda video, seed: np.repeat(video[:1], len(video), axis=0),
    "frames shuffled": shuffled,
}


def controls(
    tier: str,
    family: str,
    clips: int,
    split: str = "test",
    autoencoder: Callable[[np.ndarray], np.ndarray] | None = None,
    keep: Callable[[Scene], bool] = lambda scene: True,
) -> dict[str, tuple[float, float | None]]:
    """Returns pass rates with their expected values (None: as high as possible).

    Uses the first scenes of the family for which `keep` is true.
    """
    drawn = (families.scene(tier, split, i, {family: 1.0}) for i in itertools.count())
    scenes = list(itertools.islice(filter(keep, drawn), clips))
    videos = [render.render(scene) for scene in scenes]

    def rate(change: Callable[[np.ndarray, int], np.ndarray]) -> float:
        verdicts = [
            oracle.score(scene, change(video, i))["pass"]
            for i, (scene, video) in enumerate(zip(scenes, videos, strict=True))
        ]
        return float(np.mean(verdicts))

    found: dict[str, tuple[float, float | None]] = {
        "truth": (rate(lambda video, i: video), 1.0),
        "noise 8": (rate(lambda video, i: degrade(video, 0.01, 8, i)), None),
        "blur .7, noise 8": (rate(lambda video, i: degrade(video, 0.7, 8, i)), None),
        "blur 1, noise 12": (rate(lambda video, i: degrade(video, 1.0, 12, i)), None),
    }
    if autoencoder is not None:
        found["30 dB"] = (rate(lambda video, i: autoencoder(video)), None)
    readings = [oracle.read(video) for video in videos]
    turned = readings[1:] + readings[:1]
    pairs = list(zip(scenes, scenes[1:] + scenes[:1], strict=True))
    passed = map(oracle.score, scenes, turned)
    found["captions shuffled"] = (
        float(np.mean([verdict["pass"] for verdict in passed])),
        float(np.mean([same_claims(*pair) for pair in pairs])),
    )
    for name, change in TAMPERED.items():
        level = float(np.mean([stays_true(scene, name) for scene in scenes]))
        found[name] = (rate(change), level)
    return found


def print_oracle_table(
    tier: str, split: str, clips: int, chosen: Sequence[str] = ()
) -> int:
    """Prints the table, one row per family; returns how many shares are off.

    `chosen` are the families; all by default. The autoencoder of a family that is not
    basic is fitted on clips of its own too, as others have no cuts or turns.
    """
    fitted = [render.render(families.scene(tier, "train", i)) for i in range(300)]
    autoencoder = LinearAutoencoder(fitted)
    started = time.perf_counter()
    wrong = 0
    kinds = {
        name: (name, lambda scene: True)
        for name, family in families.FAMILIES.items()
        if tier in family.tiers and (not chosen or name in chosen)
    }
    if not chosen or "relation" in chosen:
        kinds["left/right"] = "relation", lambda scene: scene.truth.relation in SIDES
    own_rows = {}
    for number, (label, (family, keep)) in enumerate(kinds.items()):
        coder = autoencoder
        if family not in families.BASIC:
            own = (families.scene(tier, "train", i, {family: 1.0}) for i in range(300))
            coder = LinearAutoencoder(fitted + [render.render(scene) for scene in own])
        row = controls(tier, family, clips, split, coder, keep)
        if family in family_controls.CONTROLS:
            own_rows[family] = family_controls.controls(tier, family, clips, split)
        if number == 0:
            print(f"{tier}, split {split}, {clips} clips a row\n")
            print("| family | " + " | ".join(row) + " |")
            print("|---" * (len(row) + 1) + "|")
        cells = []
        for name, (share, level) in row.items():
            off = name in FLOORS and share < FLOORS[name]
            text = f"{share:.3f}"
            if level is not None and name != "truth":
                off = abs(share - level) > TOLERANCE
                text += f" ({level:.3f})"
            wrong += off
            cells.append(text + " !" * off)
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)
    print()
    for family, row in own_rows.items():
        cells = []
        for name, (share, level) in row.items():
            off = abs(share - level) > TOLERANCE
            wrong += off
            cells.append(f"{name} {share:.3f} ({level:.3f})" + " !" * off)
        print(f"{family}: " + ", ".join(cells))
    psnr = [
        10 * np.log10(255**2 / np.mean((clip - autoencoder(clip).astype(float)) ** 2))
        for clip in fitted[:100]
    ]
    print(f"\nLinear autoencoder: {np.mean(psnr):.1f} dB.", end=" ")
    print(f"Took {time.perf_counter() - started:.0f} s.\n")
    return wrong


# -- The temporal metrics' tables ------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Set:
    """Clips of a family and split for which `keep` is true."""

    family: str
    split: str = "test"
    keep: Callable[[Slots], bool] = lambda truth: True
    one_way: bool = False

    def render(self, tier: str, count: int, seed: int, split: str) -> np.ndarray:
        """The first clips of the set, uint8 [n, t, h, w, 3]."""
        found, index = [], 0
        while len(found) < count:
            scene = families.scene(tier, split, index, {self.family: 1.0}, seed)
            index += 1
            if self.keep(scene.truth):
                found.append(render.render(scene))
        return np.stack(found)


def moves_right(truth: Slots) -> bool:
    return truth.subjects[0].direction == "right"


RIGHT = "motion, all to the right"
SETS = {
    "motion": Set("motion"),
    RIGHT: Set("motion", keep=moves_right, one_way=True),
    "motion_binding": Set("motion_binding"),
    "camera that moves": Set("camera", keep=lambda truth: truth.camera != "static"),
    "motion, twice as long": Set("motion", "test_len"),
}


def read_clips(options) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yields title, name of the set, and clips: rendered scenes, or a model's samples."""
    if options.model is None:
        for name, kind in SETS.items():
            video = kind.render(options.tier, options.clips, options.seed, kind.split)
            yield f"{options.tier}, {name}, seed {options.seed}", name, video
        return
    for step in options.checkpoints.split(","):
        run = checkpoint.load_run(options.model, step=int(step) if step else None)
        pipe = pipeline.Pipeline.from_run(run)
        for name in ("motion", RIGHT):
            # About a quarter moves to the right.
            wanted = options.clips * (6 if name == RIGHT else 1)
            drawn = families.prompts("motion", wanted, options.seed, options.tier)
            texts = [text for text, stated in drawn if SETS[name].keep(stated)]
            texts = texts[: options.clips]
            frames = pipe(texts, seed=options.seed, batch_size=32).frames
            yield f"step {run.step}, {name}", name, pixels.to_uint8(frames)


def print_temporal_tables(options) -> int:
    """Prints the tables; returns how many steps of the orders do not hold."""
    network, tables = networks.ToyFeatures(), []
    fps = find_tier(options.tier).fps
    for title, name, video_nthwc in read_clips(options):
        kind = SETS[name]
        reference = None
        if video_nthwc.shape[1] >= network.num_frames:
            count, seed = 4 * options.clips, options.seed + 1
            others = kind.render(options.tier, count, seed, kind.split)
            clips = temporal_metrics.Clips(others, fps)
            reference = temporal_metrics.Reference(clips, network)
        table = control_tables.build(
            video_nthwc,
            fps=fps,
            title=title,
            kind=kind.family,
            one_way=kind.one_way,
            reference=reference,
            seed=options.seed,
        )
        print(table.as_text() + "\n", flush=True)
        tables.append(table)
        if options.out:
            control_tables.write(tables, pathlib.Path(options.out))
    return sum(len(table.broken) for table in tables)


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument("--tables", default="oracle,temporal", help="which to print")
    flags.add_argument("--tier", default="tw32")
    flags.add_argument("--split", default="test", help="of the oracle's table")
    flags.add_argument("--clips", type=int, default=140, help="per row")
    flags.add_argument(
        "--seed", type=int, default=0, help="of the clips of temporal tables"
    )
    flags.add_argument(
        "--model", help="run folder, whose samples replace rendered scenes"
    )
    flags.add_argument("--checkpoints", default="", help="its steps, such as 2000,4400")
    flags.add_argument("--out", help="folder for controls.json and controls.md")
    flags.add_argument("--families", help="of the oracle's table; all by default")
    options = flags.parse_args()
    asked = options.tables.split(",")
    if unknown := set(asked) - {"oracle", "temporal"}:
        flags.error(f"unknown tables {sorted(unknown)}; there are oracle and temporal")
    wrong = 0
    if "oracle" in asked and options.model is None:
        chosen = options.families.split(",") if options.families else ()
        wrong += print_oracle_table(options.tier, options.split, options.clips, chosen)
    if "temporal" in asked:
        wrong += print_temporal_tables(options)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
