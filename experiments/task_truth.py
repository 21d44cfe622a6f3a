"""Every task of the product on the toy world, where the truth is known exactly.

    python -m experiments.task_truth --clips 64 --out runs/task_truth.json

Unseen scenes are rendered, and part of each is given to a task with the scene's caption;
the rest of the scene is the truth. Things go straight on, so that it is also known what
came before and after: clips of 17 frames in which things are slow are cut for that.

Beside the model's results stand the truth, its reconstruction by the video VAE (in windows
of the model's length), the nearest training clip, and controls that nobody would want:
what is given again and again (copy), the last given frame (freeze), what is given on grey
(paste), the truth of another clip, and what the model makes of another clip's condition
with this clip's text (shuffled). `task_scoring.py` has the figures; all rows go through
them. Prints a Markdown table for each task, with 95 % intervals.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from experiments import edit_truth
from experiments import task_scoring as scoring
from experiments.task_scoring import Case, Figure, Result
from sora_jax.core import paths
from sora_jax.data import shards
from sora_jax.evals import statistics
from sora_jax.generation import pipeline, tasks, windows
from sora_jax.toyworld import captions, families, render, variants
from sora_jax.toyworld import scene as scenes

VERSION = 1  # of cases and figures: results of another one are computed again
SEED = 11
EDIT_OPTIONS = {
    "edit": {"strength": 0.9, "method": "flowedit"},
    "vary": {"strength": 0.8},
}
_FPS = scoring.TIER.fps
_MARGIN = 2.0  # pixels between a thing and the edge of the box around it
_REACH = 1.15  # of the corners of a shape of radius 1
_CHUNK = 256  # training clips that are compared at a time
OURS, TRUTH, RECONSTRUCTION = "ours", "ground truth", "its reconstruction"
AT_ONCE = "its reconstruction without windows"

# -- cases ----------------------------------------------------------------------------


def drawn(
    count: int,
    family: str,
    split: str = "test",
    keep: Callable[[scenes.Scene], bool] = lambda scene: True,
) -> list[scenes.Scene]:
    """The first unseen scenes of a family that may be kept.

    Raises:
      ValueError: there are too few.
    """
    found = []
    for index in range(1000 + 400 * count):
        scene = families.scene("tw32", split, index, {family: 1.0}, SEED)
        if keep(scene):
            found.append(scene)
        if len(found) == count:
            return found
    raise ValueError(f"only {len(found)} of {count} scenes of {family!r} are as needed")


def places(scene: scenes.Scene) -> np.ndarray:
    """Where the camera sees the first thing's centre, float [t, 2]."""
    zoom_t1 = np.exp(scene.camera[:, 2:3])
    return (scene.pos[:, 0] - scene.camera[:, :2]) * zoom_t1 + scene.size / 2


def case(scene: scenes.Scene, given: Iterable[int] = (), **more) -> Case:
    """The case of a scene of which some whole frames are given; `more` are its fields."""
    text, stated = captions.stated(scene, "medium")
    truth_thwc = more.pop("truth_thwc", None)
    truth_thwc = render.render(scene) if truth_thwc is None else truth_thwc
    given_thw = np.zeros(truth_thwc.shape[:3], bool)
    given_thw[[*given]] = True
    (thing, *_) = scene.objects
    fields = {
        "text": text,
        "stated": stated,
        "truth_thwc": truth_thwc,
        "path_tx": places(scene),
        "given_thw": given_thw,
        "colour": thing.colour,
        "shape": thing.shape,
        "inputs": {},
        "family": scene.family,
    }
    return Case(**fields | more)


def texts(count: int) -> list[Case]:
    """Half of the prompts are of moving things, half of still ones."""
    moving = drawn(count - count // 2, "motion")
    return [case(scene) for scene in [*moving, *drawn(count // 2, "attribute")]]


def at_rate(count: int, frames: int, fps: float) -> list[Case]:
    """Prompts of moving things, for videos of another length or frame rate."""
    seconds = (frames - 1) / fps
    split = "test_len" if seconds > 1 else "test"
    return [
        case(variants.at_rate(scene, fps)) for scene in drawn(count, "motion", split)
    ]


def first_frames(count: int) -> list[Case]:
    return keyframes(count, (0,))


def keyframes(count: int, at: Sequence[int]) -> list[Case]:
    found = []
    for scene in drawn(count, "motion"):
        one = case(scene, at)
        inputs = {"images": [one.truth_thwc[frame] for frame in at], "at": [*at]}
        found.append(dataclasses.replace(one, inputs=inputs))
    return found


def long_clips(count: int, given: Iterable[int], inputs: Callable) -> list[Case]:
    """Clips of 17 frames; `inputs` are those of a task, of a truth."""
    given, found = [*given], []
    for scene in drawn(count, "motion", "test_len"):
        one = case(scene, given)
        found.append(dataclasses.replace(one, inputs=inputs(one.truth_thwc)))
    return found


def extensions(count: int) -> list[Case]:
    return long_clips(count, range(9), lambda v: {"video": v[:9], "frames": 8})


def backward_extensions(count: int) -> list[Case]:
    return long_clips(count, range(8, 17), lambda v: {"video": v[8:], "frames": 8})


def connections(count: int) -> list[Case]:
    return long_clips(
        count,
        [*range(5), *range(12, 17)],
        lambda v: {"video": v[:5], "video_2": v[12:], "frames": 7},
    )


def replacements(count: int) -> list[Case]:
    return long_clips(
        count,
        [*range(6), *range(11, 17)],
        lambda v: {"video": v, "first": 6, "last": 10},
    )


def fills(count: int, factor: int) -> list[Case]:
    """Every second or fourth frame is given, at that share of the frame rate."""
    found = []
    for scene in drawn(count, "motion"):
        one = case(scene, range(0, scene.num_frames, factor))
        video_thwc = one.truth_thwc[::factor]
        inputs = {"video": video_thwc, "factor": factor, "fps": _FPS / factor}
        found.append(dataclasses.replace(one, inputs=inputs))
    return found


def boxes(scene: scenes.Scene) -> np.ndarray:
    """The box around the first thing in each frame, bool [t, h, w]."""
    reach = _REACH * scene.objects[0].radius + _MARGIN
    low_tx = np.floor(scene.pos[:, 0] - reach)
    high_tx = np.ceil(scene.pos[:, 0] + reach)
    at = np.arange(scene.size)
    inside_txn = (at >= low_tx[..., None]) & (at < high_tx[..., None])
    return inside_txn[:, 1, :, None] & inside_txn[:, 0, None, :]


def inpaintings(count: int) -> list[Case]:
    """The moving thing is redrawn in another colour, which the text says.

    The box is around its whole path, so that it does not tell where the thing is when.
    """

    def has_other(scene):
        return captions.exchanged(scene, "medium", "colour") is not None

    found = []
    for scene in drawn(count, "motion", keep=has_other):
        text = captions.exchanged(scene, "medium", "colour")
        stated, (thing,) = captions.parse(text), scene.objects
        new = dataclasses.replace(thing, colour=stated.subjects[0].colour)
        before_thwc, box_thw = render.render(scene), boxes(scene)
        mask_thw = np.broadcast_to(box_thw.any(0), box_thw.shape)
        found.append(
            case(
                dataclasses.replace(scene, objects=(new,)),
                text=text,
                stated=stated,
                given_thw=~mask_thw,
                before_thwc=before_thwc,
                old=thing.colour,
                inputs={"video": before_thwc, "mask": mask_thw},
            )
        )
    return found


def backgrounds(count: int) -> list[Case]:
    """The background is made light where it was dark, or dark; the thing is kept.

    Only structured captions state the tone of every background.
    """
    bases = {"dark": ("light", 148.0), "light": ("dark", 108.0)}
    found = []
    for scene in drawn(
        count, "motion", keep=lambda s: s.truth.tone in bases and s.num_frames == 9
    ):
        tone, base = bases[scene.truth.tone]
        other = dataclasses.replace(
            scene,
            factors=scene.factors | {"tone": tone},
            background=dataclasses.replace(scene.background, base=base),
        )
        text, stated = captions.stated(other, "structured")
        before_thwc, kept_thw = render.render(scene), boxes(scene)
        truth_thwc = np.where(
            kept_thw[..., None], before_thwc, render.render(other)
        ).astype(np.uint8)
        found.append(
            case(
                scene,
                text=text,
                stated=stated,
                truth_thwc=truth_thwc,
                given_thw=kept_thw,
                before_thwc=before_thwc,
                inputs={"video": before_thwc, "mask": ~kept_thw},
            )
        )
    return found


def outpaintings(count: int) -> list[Case]:
    """The middle of a clip is given, with the thing inside, while the camera zooms.

    The movement of the camera is what a still surrounding would miss.
    """
    inside = slice(8, 24)

    def fits(scene):
        if scene.truth.camera not in ("zoom-in", "zoom-out"):
            return False
        radius_t = scene.objects[0].radius * np.exp(scene.camera[:, 2])
        reach_tx = np.abs(places(scene) - scene.size / 2) + radius_t[:, None]
        return bool(reach_tx.max() <= 8)

    found = []
    for scene in drawn(count, "camera", keep=fits):
        one = case(scene)
        given_thw = np.zeros_like(one.given_thw)
        given_thw[:, inside, inside] = True
        inputs = {"video": one.truth_thwc[:, inside, inside]}
        inputs |= {"height": scene.size, "width": scene.size}
        found.append(dataclasses.replace(one, given_thw=given_thw, inputs=inputs))
    return found


def loops(count: int) -> list[Case]:
    """Prompts of moving things. The truth has them go round in a circle, as fast.

    Latents of a circle show `stride` frames each: 8 frames in place of 9.
    """
    found = []
    for scene in drawn(count, "motion"):
        t, speed = scene.num_frames - 1, float(np.linalg.norm(scene.vel[0, 0]))
        # The chord of one step is the speed.
        radius = speed / (2 * math.sin(math.pi / t))
        room = _REACH * scene.objects[0].radius + radius
        middle_x = np.clip(scene.pos[:, 0].mean(0), room, scene.size - room)
        angle_t = 2 * np.pi * np.arange(t) / t
        circle_tx = np.stack([np.cos(angle_t), np.sin(angle_t)], axis=1)
        pos = (middle_x + radius * circle_tx)[:, None]
        circle = dataclasses.replace(scene, pos=pos, camera=scene.camera[:t])
        found.append(case(circle))
    return found


def references(count: int, named: bool) -> list[Case]:
    """Prompts for the thing of a picture, in which it stands elsewhere.

    Args:
      named: whether the text is the medium caption, with the colour and the shape;
        otherwise it says only how "a thing" moves.
    """
    found = []
    for scene in drawn(count, "motion"):
        draws = scenes.Draws(SEED, "reference", scene.index)
        (thing,), size = scene.objects, scene.size
        room = _REACH * thing.radius + 1
        place_x = np.array([draws.uniform(room, size - room) for _ in range(2)])
        other = families.scene("tw32", "val", scene.index, {"motion": 1.0}, SEED)
        shown = dataclasses.replace(
            scene,
            pos=np.broadcast_to(place_x, scene.pos.shape),
            background=other.background,
        )
        fields = {
            "inputs": {"references": [render.render(shown)[0]]},
            "place_x": place_x,
        }
        if not named:
            text, stated = variants.unnamed(scene, "medium")
            fields |= {"text": text, "stated": stated}
        found.append(case(scene, **fields))
    return found


def edits(count: int, what: str) -> list[Case]:
    """A clip of which one thing is changed by the text: its colour, or the background.

    Only structured captions state the tone of every background.
    """
    found = []
    for scene in drawn(count, "motion"):
        seed = SEED
        other = variants.edited(scene, what, seed)
        while what == "background" and other.truth.tone == "medium":
            seed += 1
            other = variants.edited(scene, what, seed)
        tier = "structured" if what == "background" else "medium"
        text, stated = captions.stated(other, tier)
        before_thwc = render.render(scene)
        found.append(
            case(
                other,
                text=text,
                stated=stated,
                before_thwc=before_thwc,
                old=scene.objects[0].colour,
                inputs={"video": before_thwc, "method": "context"},
            )
        )
    return found


# -- what makes results ---------------------------------------------------------------


class _Recorded(windows.Windows):
    """Windows that keep what they decode, before a task puts what is given into it."""

    decoded_bthwc: np.ndarray | None = None

    def decode(self, latents_bthwc) -> np.ndarray:
        decoded_bthwc = super().decode(latents_bthwc)
        self.decoded_bthwc = decoded_bthwc.copy()
        return decoded_bthwc


def by_task(task: str) -> Callable:
    """Makes clips with a task, one after another: it takes one video at a time."""

    def make(pipe: pipeline.Pipeline, cases: Sequence[Case]) -> list[Result]:
        found = []
        for seed, one in enumerate(cases):
            request, inputs, _ = pipe.check_task(
                task, one.text, seed=seed, batch_size=1, **one.inputs
            )
            window = _Recorded(pipe, request, [0], *pipe.encode_prompt(request, [0]))
            (video_thwc,) = tasks.find(task).make(window, **inputs)
            raw_thwc = video_thwc
            if np.shape(window.decoded_bthwc) == (1, *video_thwc.shape):
                (raw_thwc,) = window.decoded_bthwc
            found.append(Result(video_thwc, raw_thwc))
        return found

    return make


def by_text(pipe: pipeline.Pipeline, cases: Sequence[Case]) -> list[Result]:
    """Makes clips from their texts, and from their images if there are any."""
    images = [image for one in cases for image in one.inputs.get("images", ())]
    out = pipe(
        [one.text for one in cases],
        image=images or None,
        seed=[*range(len(cases))],
    )
    return [Result.of(np.round(255 * video).astype(np.uint8)) for video in out.frames]


def by_text_at(frames: int, fps: float) -> Callable:
    """Makes clips from their texts, of a length and frame rate."""

    def make(pipe: pipeline.Pipeline, cases: Sequence[Case]) -> list[Result]:
        texts, seeds = [one.text for one in cases], [*range(len(cases))]
        out = pipe(texts, seed=seeds, num_frames=frames, fps=fps)
        videos = np.round(255 * out.frames).astype(np.uint8)
        return [Result.of(video) for video in videos]

    return make


def by_prompts(task: str) -> Callable:
    """Makes clips with a task that takes no video, in batches."""

    def make(pipe: pipeline.Pipeline, cases: Sequence[Case]) -> list[Result]:
        out = pipe.run(task, [c.text for c in cases], seed=[*range(len(cases))])
        frames = np.round(255 * out.frames).astype(np.uint8)
        return [Result.of(video) for video in frames]

    return make


def reconstructions(
    pipe: pipeline.Pipeline, cases: Sequence[Case], step: int
) -> list[Result]:
    """The truths through the video VAE, in windows of 1 + `step` frames.

    Two windows share a frame; what is given is put into the result. A loop lacks the
    last frame of a window, for which its first is taken.
    """
    found = []
    for one in cases:
        parts, length = [], len(one.truth_thwc)
        rest = ((0, -(length - 1) % pipe.strides.time), (0, 0), (0, 0), (0, 0))
        whole_thwc = np.pad(one.truth_thwc, rest, mode="wrap")
        for start in range(0, len(whole_thwc) - 1, step):
            window_thwc = whole_thwc[None, start : start + step + 1]
            latents = pipe.encode(window_thwc.astype(np.float32) / 127.5 - 1)
            part_thwc = np.asarray(pipe.decode_latents(latents))[0]
            parts.append(np.round(255 * part_thwc[start > 0 :]).astype(np.uint8))
        raw_thwc = np.concatenate(parts)[:length]
        found.append(Result(one.pasted(raw_thwc), raw_thwc))
    return found


def nearest(cases: Sequence[Case], clips: Sequence) -> list[Result]:
    """The training clip that is nearest to what is given, with what is given in it.

    The clip covers the window with the most of what is to be made; where nothing is
    given, the nearest first frame counts.

    Args:
      cases: of equal windows.
      clips: `data.shards.Shards`; those of other sizes are passed over.
    """
    length = min(scoring.TIER.num_frames, len(cases[0].truth_thwc))
    starts, known, wanted = [], [], []
    for one in cases:
        made = [
            np.count_nonzero(~one.given_thw[s : s + length])
            for s in range(len(one.truth_thwc) - length + 1)
        ]
        best = [s for s, count in enumerate(made) if count == max(made)]
        starts.append(best[len(best) // 2])
        window = slice(starts[-1], starts[-1] + length)
        given_thw = one.given_thw[window].copy()
        if not given_thw.any():
            given_thw[0] = True
        known.append(np.repeat(given_thw[..., None], 3, axis=-1).ravel())
        wanted.append(one.truth_thwc[window].ravel())
    known_nv = np.array(known, np.float32)
    wanted_nv = known_nv * np.array(wanted, np.float32)
    least_n, found = np.full(len(cases), np.inf), [None] * len(cases)
    for first in range(0, len(clips), _CHUNK):
        frames = [
            clips[index].frames()[:length]
            for index in range(first, min(first + _CHUNK, len(clips)))
        ]
        shape = (length, *cases[0].truth_thwc.shape[1:])
        frames = [video for video in frames if video.shape == shape]
        if not frames:
            continue
        clips_mv = np.array(frames, np.float32).reshape(len(frames), -1)
        # |k (x - y)|^2 without the part that is the same for all clips
        far_nm = known_nv @ np.square(clips_mv).T - 2 * wanted_nv @ clips_mv.T
        for n, m in enumerate(far_nm.argmin(axis=1)):
            if far_nm[n, m] < least_n[n]:
                least_n[n], found[n] = far_nm[n, m], frames[m]
    results = []
    for one, start, video_thwc in zip(cases, starts, found, strict=True):
        if video_thwc is None:
            raise ValueError(f"no training clip has {length} frames of this size")
        whole_thwc = one.truth_thwc.copy()
        whole_thwc[start : start + length] = video_thwc
        results.append(Result(one.pasted(whole_thwc), whole_thwc))
    return results


# -- tasks and their figures ----------------------------------------------------------

# A thing that stands still beside a given frame is 1.2 px off: less is asked there.
_LESS = 0.75
_EXACT = Figure("given part exact", scoring.exact, 1.0)
_KEPT = Figure("same object, moving", scoring.kept, 0.97)
_SEAM = Figure("seam \\|z\\|", scoring.seam, 2.0, at_least=False)
_NEAR = Figure("never over 1.5 px off", scoring.within(scoring.NEAR), 0.9)
_VELOCITY = Figure(
    "velocity error, px/frame", scoring.velocity, median=True, judges=False
)
_MOTION = Figure("motion as asked", scoring.motion, 0.9)
_FROZEN = Figure("frozen", scoring.frozen, 0.02, at_least=False)
_PLACE = Figure("place error, px", scoring.place, 1.5, at_least=False, median=True)
_LOOKS = Figure("colour and shape", scoring.colour_and_shape, 0.97)
_GONE = Figure("old colour gone", scoring.gone, 0.97)
_ALONE = Figure("one thing", scoring.alone, 0.97)
_FIRST = (
    Figure("first frame, dB", scoring.anchor),
    Figure("above its reconstruction, dB", scoring.anchor_gap, -1.0),
    _MOTION,
    _FROZEN,
    _KEPT,
)
_KEYFRAMES = (
    _EXACT,
    Figure("given frames before pasting, dB", scoring.anchor),
    Figure("above their reconstruction, dB", scoring.anchor_gap, -2.0),
    _SEAM,
    Figure("all that the text says", scoring.passed, 0.95),
    _KEPT,
    _FROZEN,
    _PLACE,
)


def _after(sign: int) -> tuple[Figure, ...]:
    return tuple(
        Figure(
            f"place error at {sign * frames:+d}, px",
            scoring.place_after(sign * frames),
            bar,
            at_least=False,
            median=True,
        )
        # a still thing is 1.25 px off after one frame
        for frames, bar in ((1, _LESS), (4, scoring.NEAR), (8, scoring.NEAR))
    )


_MADE = Figure("made frames, dB", scoring.made_psnr)
_CONNECT = (
    _EXACT,
    Figure("no cut", scoring.uncut, 0.9),
    Figure("even path", scoring.smooth_path, 0.9),
    _KEPT,
    _PLACE,
    _SEAM,
    _MADE,
)
_FILL = (
    _EXACT,
    _MADE,
    Figure("above their reconstruction, dB", scoring.made_gap, -1.0),
    Figure("place error, px", scoring.place, _LESS, at_least=False, median=True),
    Figure(f"never over {_LESS} px off", scoring.within(_LESS), 0.9),
    _KEPT,
    _ALONE,
    _SEAM,
)
# The place depends on the text alone where it does not come from what is given.
_REFERENCE = (
    Figure("colour and shape of the picture, moving", scoring.kept, 0.9),
    _MOTION,
    _FROZEN,
)


def _still_text(seen: scoring.Seen) -> bool | None:
    return scoring.passed(seen) if seen.case.family == "attribute" else None


def _moving_text(seen: scoring.Seen) -> bool | None:
    return scoring.passed(seen) if seen.case.family == "motion" else None


def _frozen_text(seen: scoring.Seen) -> bool | None:
    return scoring.frozen(seen) if seen.case.family == "motion" else None


@dataclasses.dataclass(frozen=True)
class Trial:
    """How a task is tried.

    Attributes:
      cases: makes so many cases.
      make: of (pipe, cases), the results.
      figures: of a result.
      task: its name in `tasks.TASKS`; None: it is a call of the pipeline.
      across: figures of the whole set: (name, function of what is seen, highest value).
      beside: also shows text to video with the same prompts, and its pace counts.
    """

    cases: Callable[[int], list[Case]]
    make: Callable[[pipeline.Pipeline, Sequence[Case]], list[Result]]
    figures: tuple[Figure, ...]
    task: str | None = None
    across: tuple[tuple[str, Callable, float], ...] = ()
    beside: bool = False


def _of_task(task: str, cases: Callable, figures: tuple[Figure, ...], **more) -> Trial:
    return Trial(cases, by_task(task), figures, task, **more)


TRIALS: dict[str, Trial] = {
    "text": Trial(
        texts,
        by_text,
        (
            Figure("moving things: all of the text", _moving_text, 0.9),
            Figure("still things: all of the text", _still_text, 0.9),
            _MOTION,
            _LOOKS,
            Figure("frozen", _frozen_text, 0.02, at_least=False),
        ),
    ),
    **{
        f"text_{frames}_at_{fps}": Trial(
            functools.partial(at_rate, frames=frames, fps=fps),
            by_text_at(frames, fps),
            (
                Figure("motion as asked, by the second", scoring.motion_at(fps), 0.9),
                _LOOKS,
            ),
        )
        for frames, fps in ((9, 8), (5, 4), (9, 4), (17, 8), (17, 16), (33, 16))
    },
    "first_frame": Trial(first_frames, by_text, _FIRST),
    "keyframes_0": _of_task("keyframes", first_frames, (_EXACT, *_FIRST)),
    "keyframes_0_4_8": _of_task("keyframes", lambda n: keyframes(n, (0, 4, 8)), _KEYFRAMES),
    "keyframes_3": _of_task("keyframes", lambda n: keyframes(n, (3,)), _KEYFRAMES),
    "keyframes_8": _of_task("keyframes", lambda n: keyframes(n, (8,)), _KEYFRAMES),
    "extend": _of_task(
        "extend", extensions, (_EXACT, *_after(1), _NEAR, _VELOCITY, _KEPT, _SEAM, _MADE)
    ),
    "extend_backwards": _of_task(
        "extend_backwards",
        backward_extensions,
        (_EXACT, *_after(-1), _NEAR, _VELOCITY, _KEPT, _SEAM, _MADE),
    ),
    "fill_2": _of_task("fill", lambda n: fills(n, 2), _FILL),
    "fill_4": _of_task("fill", lambda n: fills(n, 4), _FILL),
    "connect": _of_task("connect", connections, _CONNECT),
    "replace": _of_task("replace", replacements, _CONNECT),
    "inpaint": _of_task(
        "inpaint",
        inpaintings,
        (
            _EXACT,
            Figure("all that the text says", scoring.passed, 0.9),
            _GONE,
            _KEPT,
            _PLACE,
        ),
    ),
    "inpaint_background": _of_task(
        "inpaint",
        backgrounds,
        (
            _EXACT,
            Figure("background as asked", scoring.tone, 0.9),
            _KEPT,
            _ALONE,
            Figure("step over the border, beside the truth's", scoring.border, judges=False),
        ),
    ),
    "outpaint": _of_task(
        "outpaint",
        outpaintings,
        (
            _EXACT,
            _LOOKS,
            Figure("camera as asked", scoring.camera, 0.9),
            _ALONE,
            Figure(
                "step over the border, beside the truth's",
                scoring.border,
                1.5,
                at_least=False,
                clip_bar=2.0,
            ),
        ),
    ),
    "loop": Trial(
        loops,
        by_prompts("loop"),
        (
            Figure(
                "last to first, of the mean change", scoring.closing, 1.2, at_least=False
            ),
            Figure("motion, of text to video's", scoring.pace_share, 0.8, clip_bar=0.4),
            Figure("colour and shape", scoring.colour_and_shape, 0.9),
        ),
        "loop",
        beside=True,
    ),
    "edit_colour": _of_task(
        "edit",
        lambda n: edits(n, "colour"),
        (
            Figure("all that the text says", scoring.passed, 0.85),
            _GONE,
            _KEPT,
            _PLACE,
            _MADE,
        ),
    ),
    "edit_background": _of_task(
        "edit",
        lambda n: edits(n, "background"),
        (
            Figure("background as asked", scoring.tone, 0.85),
            _KEPT,
            _PLACE,
        ),
    ),
    "reference": _of_task(
        "reference",
        lambda n: references(n, named=False),
        _REFERENCE,
        across=(("correlation of places", scoring.place_correlation, 0.2),),
    ),
    "reference_named": _of_task(
        "reference",
        lambda n: references(n, named=True),
        _REFERENCE,
        across=(("correlation of places", scoring.place_correlation, 0.2),),
    ),
}  # fmt: skip
EDITS = ("vary", "edit")  # by text alone, without training
_BACKGROUND, _GAP = "background, dB", "above its reconstruction, dB"
_EDIT_BARS = {
    "new colour": 0.85,
    "shape and motion": 0.9,
    "both": None,
    _BACKGROUND: None,
    _GAP: -2.0,
}


# -- rows -----------------------------------------------------------------------------

Row = dict[str, statistics.Estimate]


def rows(
    trial: Trial,
    cases: Sequence[Case],
    made: dict[str, Sequence[Result]],
    ceilings: Sequence[Result],
    pace: float | None = None,
) -> dict[str, Row]:
    """Scores everybody's results for a task, the controls too.

    Args:
      made: results by name of the row.
      ceilings: the video VAE's reconstructions of the truths.
      pace: of text to video; see `scoring.Context`.
    """
    usual = tuple(scoring.changes(best.raw_thwc) for best in ceilings)
    context = scoring.Context(usual, scoring.spread(usual), pace)
    made = dict(made)
    made[TRUTH] = [Result.of(one.truth_thwc) for one in cases]
    made[RECONSTRUCTION] = ceilings
    for name, control in (
        ("copy", scoring.copy),
        ("freeze", scoring.freeze),
        ("paste", scoring.paste),
    ):
        results = [control(one) for one in cases]
        if all(result is not None for result in results):
            made[name] = results
    made["another clip"] = scoring.another(cases)
    found = {}
    for name, results in made.items():
        row, members = scoring.score(trial.figures, cases, results, ceilings, context)
        for figure, function, _ in trial.across:
            row[figure] = function(members)
        found[name] = row
    return found


def shuffled(trial: Trial, pipe: pipeline.Pipeline, cases: Sequence[Case]) -> list:
    """What the model makes of another clip's condition with each clip's text.

    Without a condition it is the text that is another clip's.
    """
    mixed = [
        dataclasses.replace(one, inputs=other.inputs)
        if one.inputs
        else dataclasses.replace(one, text=other.text)
        for one, other in zip(cases, scoring.others(cases), strict=True)
    ]
    return trial.make(pipe, mixed)


def try_task(
    trial: Trial, pipe: pipeline.Pipeline, count: int, clips: Sequence | None
) -> dict[str, Row]:
    """All rows of a task.

    Raises:
      ValueError: the model was not trained for it.
    """
    cases = trial.cases(count)
    if trial.task:
        pipe.check_task(trial.task, cases[0].text, batch_size=1, **cases[0].inputs)
    window, whole = pipe.settings.num_frames - 1, len(cases[0].truth_thwc) - 1
    ceilings = reconstructions(pipe, cases, window)
    made, pace = {OURS: trial.make(pipe, cases)}, None
    if whole > window:
        made[AT_ONCE] = reconstructions(pipe, cases, whole)
    made["shuffled"] = shuffled(trial, pipe, cases)
    if trial.beside:
        plain = by_text(pipe, [dataclasses.replace(one, inputs={}) for one in cases])
        plain = [
            Result.of(result.video_thwc[: len(one.truth_thwc)])
            for one, result in zip(cases, plain, strict=True)
        ]
        made["text to video"] = plain
        none = np.zeros(1)
        seen = [
            scoring.Seen(*of, of[1], none, 1.0) for of in zip(cases, plain, strict=True)
        ]
        pace = float(np.mean([scoring.pace(one) for one in seen]))
    if clips is not None:
        made["nearest training clip"] = nearest(cases, clips)
    return rows(trial, cases, made, ceilings, pace)


def try_edit(task: str, pipe: pipeline.Pipeline, count: int) -> dict[str, Row]:
    """All rows of an edit by text; see `edit_truth.py`."""
    half = count // 2
    asked = edit_truth.pairs(count - half, "motion")
    asked += edit_truth.pairs(half, "attribute") if half else []
    videos = [source for source, *_ in asked]
    # the video and its description are another clip's
    mixed = [
        (other[0], one[1], other[2])
        for one, other in zip(asked, asked[1:] + asked[:1], strict=True)
    ]
    ours = edit_truth.edited(pipe, asked, task, **EDIT_OPTIONS[task])
    crossed = edit_truth.edited(pipe, mixed, task, **EDIT_OPTIONS[task])
    latents = [pipe.encode(v[None].astype(np.float32) / 127.5 - 1) for v in videos]
    again = [np.round(255 * np.asarray(pipe.decode_latents(x)))[0] for x in latents]
    still = [np.repeat(video[:1], len(video), axis=0) for video in videos]
    made = {
        f"{OURS}, from {EDIT_OPTIONS[task]['strength']:g}": ours,
        "shuffled": crossed,
        "the clip itself": videos,
        RECONSTRUCTION: again,
        "freeze": still,
    }
    best = edit_truth.measure(again, asked)[_BACKGROUND]
    found = {}
    for name, results in made.items():
        columns = edit_truth.measure(results, asked)
        columns[_GAP] = [*np.subtract(columns[_BACKGROUND], best)]
        found[name] = {
            figure: Figure(figure, len).estimate(values)
            for figure, values in columns.items()
        }
    return found


# -- output ---------------------------------------------------------------------------


def bars(name: str) -> dict[str, tuple[float | None, bool]]:
    """The bar of each figure of a task, and whether it is the lowest good value."""
    if name in EDITS:
        return {figure: (bar, True) for figure, bar in _EDIT_BARS.items()}
    trial = TRIALS[name]
    found = {figure.name: (figure.bar, figure.at_least) for figure in trial.figures}
    found[scoring.ALL] = (None, True)
    return found | {figure: (bar, False) for figure, _, bar in trial.across}


def cell(estimate: statistics.Estimate) -> str:
    """A value with its interval."""
    if not math.isfinite(estimate.value):
        return "-"
    if estimate.low is None:
        return f"{estimate.value:.3g}"
    ends = estimate.value, estimate.low, estimate.high
    digits = 1 if max(map(abs, ends)) >= 10 else 2
    value, low, high = (f"{end:.{digits}f}" for end in ends)
    return f"{value} ({low} to {high})"


def table(name: str, found: dict[str, Row]) -> str:
    """The Markdown table of a task, and which bars our row misses."""
    of, missed = bars(name), []
    heads = []
    for figure, (bar, at_least) in of.items():
        sign = "at least" if at_least else "at most"
        heads.append(figure if bar is None else f"{figure} ({sign} {bar:g})")
    lines = [
        f"| {name} | {' | '.join(heads)} |",
        "|" + "---|" * (1 + len(heads)),
    ]
    for row, values in found.items():
        cells = [cell(values[figure]) for figure in of]
        lines.append(f"| {row} | {' | '.join(cells)} |")
        if row.startswith(OURS):
            for figure, (bar, at_least) in of.items():
                value = values[figure].value
                met = bar is None or (value >= bar if at_least else value <= bar)
                missed += [] if met else [figure]
    lines += ["", f"Missed: {', '.join(missed)}." if missed else "All bars are met."]
    return "\n".join(lines)


def _to_json(found: dict[str, Row]) -> dict:
    return {
        row: {figure: dataclasses.asdict(value) for figure, value in values.items()}
        for row, values in found.items()
    }


def _of_json(stored: dict) -> dict[str, Row]:
    return {
        row: {figure: statistics.Estimate(**value) for figure, value in values.items()}
        for row, values in stored.items()
    }


def digest(pipe: pipeline.Pipeline, model: str, clips: int, known: str | None) -> str:
    """Of the settings on which rows depend."""
    settings = {
        "version": VERSION,
        "model": model,
        "source": pipe.source,
        "settings": dataclasses.asdict(pipe.settings),
        "clips": clips,
        "shards": known,
    }
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*TRIALS, *EDITS]
    parser.add_argument("--model", default="toy")
    parser.add_argument("--tasks", default=",".join(names), help="by commas")
    parser.add_argument("--clips", type=int, default=64, help="of each task")
    parser.add_argument("--shards", help="training clips, for the nearest of them")
    parser.add_argument("--out", help="JSON file; finished tasks are read from it")
    args = parser.parse_args()
    asked = args.tasks.split(",")
    if unknown := [name for name in asked if name not in names]:
        parser.error(f"task {unknown[0]!r} is unknown; there are {', '.join(names)}")
    if args.clips < 2:
        parser.error("--clips is at least 2: controls mix clips")
    pipe = pipeline.Pipeline.from_pretrained(args.model)
    clips = None if args.shards is None else shards.open(args.shards)
    of = digest(pipe, args.model, args.clips, args.shards)
    out = None if args.out is None else pathlib.Path(args.out)
    stored = json.loads(out.read_text()) if out and out.exists() else {}
    for name in asked:
        print(f"## {name}\n")
        done = stored.get(name, {})
        if done.get("digest") != of:
            kind = name if name in EDITS else TRIALS[name].task
            if kind is not None and kind not in tasks.TASKS:
                print("There is no such task.\n", flush=True)
                continue
            start = time.perf_counter()
            try:
                if name in EDITS:
                    found = try_edit(name, pipe, args.clips)
                else:
                    found = try_task(TRIALS[name], pipe, args.clips, clips)
            except tasks.Untrained as error:
                print(f"Not trained: {error}.\n", flush=True)
                continue
            seconds = time.perf_counter() - start
            done = {"digest": of, "seconds": seconds, "rows": _to_json(found)}
            stored[name] = done
            if out:
                paths.write_atomically(out, json.dumps(stored, indent=1) + "\n")
        print(table(name, _of_json(done["rows"])))
        print(f"\n{args.clips} clips, {done['seconds']:.0f} s.\n", flush=True)


if __name__ == "__main__":
    main()
