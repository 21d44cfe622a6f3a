"""Tasks: the ways of making or editing a video that begin with more than a text.

A task turns what the user gives into windows of latents: what is known in each of them, at
which level the solver starts, and how the results are joined. `TASKS` lists them: a new
task is one function and one line. Frames that were given come back as they were.

Letters: t frames, h height, w width of a video; b clips.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sora_jax.data import conditions, regions
from sora_jax.generation import given as givens
from sora_jax.generation import windows

_LAST = 3  # frames that are given as pictures where a clip must meet another one


@dataclasses.dataclass(frozen=True)
class Size:
    """Frames, height and width of a task's windows, and frames a second of its video."""

    num_frames: int
    height: int
    width: int
    fps: float


@dataclasses.dataclass(frozen=True)
class Task:
    """One way of making a video.

    Attributes:
      make: of (windows, **inputs), the frames of all clips, uint8 [b, t, h, w, 3].
      about: what it does, in a few words.
      inputs: names of videos and images that it takes, in the order of their importance.
      options: other inputs and their defaults; None: must be given.
      needs: of (inputs, number of windows), what the denoiser must have been trained
        with; see `Settings.trained_patterns`.
      size: of (inputs, the size that was asked for, stride), that of its windows.
      windows: of (inputs, size), how many it makes.
      fits: whether videos are scaled to the size of the windows.
      fixed: whether the inputs say how long a window is.
      may_give: what it gives a denoiser that was trained with it, and others not.
    """

    make: Callable[..., np.ndarray]
    about: str
    inputs: tuple[str, ...] = ("video",)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    needs: Callable[[Mapping, int], tuple[str, ...]] = lambda inputs, windows: ()
    size: Callable[[Mapping, Size, int], Size] = lambda inputs, size, stride: size
    windows: Callable[[Mapping, Size, int], int] = lambda inputs, size, stride: 1
    fits: bool = True
    fixed: bool = False
    may_give: str = ""


def _whole(count: int, stride: int) -> int:
    """The least 1 + stride n frames that hold so many."""
    return 1 + stride * math.ceil(max(count - 1, 0) / stride)


def _of_video(inputs: Mapping, size: Size, stride: int) -> Size:
    """Windows of the video's length, which must be that of some latents."""
    frames = len(inputs["video"])
    if (frames - 1) % stride:
        less = 1 + (frames - 1) // stride * stride
        raise ValueError(
            f"the video has {frames} frames; this task takes 1 + {stride} n: the nearest "
            f"is {less} or {less + stride}"
        )
    return dataclasses.replace(size, num_frames=frames)


def _joined(make: windows.Windows, *parts: np.ndarray) -> np.ndarray:
    """Joins videos in time: those of all clips, and those that were given."""
    return np.concatenate([make.of_all(part) for part in parts], axis=1)


# -- keyframes ------------------------------------------------------------------------


def keyframes(
    make: windows.Windows, images: Sequence[np.ndarray], at: Sequence[int]
) -> np.ndarray:
    """A video with the given pictures at the given frames.

    One at frame 0 alone is a first frame, whose latent is known.
    """
    images = np.stack(images)
    if [*at] == [0]:
        given = make.head(make.encode(images))
    else:
        given = make.pictures(images, at)
    made = make.decode(make.sample(given))
    made[:, [*at]] = images
    return made


def _keyframes_size(inputs: Mapping, size: Size, stride: int) -> Size:
    """That of the video, in which each picture must have a frame of its own."""
    at, count, frames = inputs["at"], len(inputs["images"]), size.num_frames
    if count != len(at):
        raise ValueError(f"there are {count} images and {len(at)} times for them")
    if outside := [frame for frame in at if frame >= frames]:
        raise ValueError(
            f"a keyframe is at frame {outside[0]}; the video has frames 0 to {frames - 1}"
        )
    if twice := [frame for frame in at if at.count(frame) > 1]:
        raise ValueError(f"two keyframes are at frame {twice[0]}: leave out one")
    return size


def _keyframes_need(inputs: Mapping, windows: int) -> tuple[str, ...]:
    return ("first_frame",) if [*inputs["at"]] == [0] else ("keyframes",)


# -- loops ----------------------------------------------------------------------------


def loop(make: windows.Windows) -> np.ndarray:
    """A video that repeats: the frame after its last is its first.

    Its latents are a circle, of `stride` frames each. A denoiser that learned loops sees
    time as a circle. Others need no training (Mobius, arXiv 2502.20307): the latents are
    rolled at every step of the solver. One that learned windows from mid-clip, where no
    latent is a single frame, sees them as one of these.
    """
    t, trained = make.grid[0] - 1, make.pipe.settings.trained_patterns
    learned = "loop" in trained
    start = int(learned or "mid_clip" in trained)
    given = givens.Given(start=start, is_loop=learned)
    return make.decode_loop(make.sample(given, length=t, is_rolled=not learned))


def _loop_size(inputs: Mapping, size: Size, stride: int) -> Size:
    if size.num_frames < 1 + 2 * stride:
        raise ValueError(
            f"num_frames is {size.num_frames}, too few for a circle: give "
            f"{1 + 2 * stride} or more"
        )
    return size


# -- references -----------------------------------------------------------------------


def reference(make: windows.Windows, references: Sequence[np.ndarray]) -> np.ndarray:
    """A video of something that pictures show, elsewhere or in another setting."""
    return make.decode(make.sample(make.references(np.stack(references))))


def _references_size(inputs: Mapping, size: Size, stride: int) -> Size:
    if (count := len(inputs["references"])) > conditions.MOST_REFERENCES:
        raise ValueError(
            f"there are {count} references; up to {conditions.MOST_REFERENCES} are used"
        )
    return size


# -- longer videos --------------------------------------------------------------------


def _lengths(latent_frames: int, known: int) -> tuple[int, int, int]:
    """The window that comes after so many latent frames: (start, its length, known ones).

    A window that holds a video's first latent is like a clip, and a later one like a clip
    without its first latent, as in training with `mid_clip`.
    """
    keep = max(1, 2 * latent_frames // 3)
    if known <= keep:
        return 0, latent_frames, known
    return 1, latent_frames - 1, max(1, 2 * (latent_frames - 1) // 3)


def extend(make: windows.Windows, video: np.ndarray, frames: int) -> np.ndarray:
    """Continues a video by so many frames.

    The latents of what was made are carried from window to window, and decoded once.
    """
    t, stride = make.grid[0], make.stride
    most = 1 + stride * (max(1, 2 * t // 3) - 1)
    count = 1 + (min(len(video), most) - 1) // stride * stride
    latents = make.encode(video[len(video) - count :])
    before = latents.shape[1]
    while stride * (latents.shape[1] - before) < frames:
        start, length, keep = _lengths(t, latents.shape[1])
        head = make.head(latents[:, latents.shape[1] - keep :], start, length)
        window = make.sample(head, length=length)
        latents = jnp.concatenate([latents, window[:, keep:]], axis=1)
    new = make.decode(latents)[:, count:]
    return _joined(make, video, new[:, :frames])


def _extend_needs(inputs: Mapping, windows: int) -> tuple[str, ...]:
    return ("head",) if windows == 1 else ("head", "mid_clip")


def _longer_size(inputs: Mapping, size: Size, stride: int) -> Size:
    if size.num_frames < 1 + stride:
        raise ValueError(
            f"num_frames is {size.num_frames}, of which nothing is left to make beside "
            f"what is given: give {1 + stride} or more"
        )
    return size


def _extend_windows(inputs: Mapping, size: Size, stride: int) -> int:
    t = 1 + (size.num_frames - 1) // stride
    known = min(1 + (len(inputs["video"]) - 1) // stride, max(1, 2 * t // 3))
    missing, count = inputs["frames"], 0
    while missing > 0:
        start, length, keep = _lengths(t, known)
        if length == keep:
            raise ValueError(
                f"frames is {inputs['frames']}; windows of {size.num_frames} frames "
                f"continue a video by {stride * (t - 1)}: give a larger num_frames"
            )
        missing, known, count = missing - stride * (length - keep), t, count + 1
    return count


def extend_backwards(
    make: windows.Windows, video: np.ndarray, frames: int
) -> np.ndarray:
    """Makes so many frames that come before a video.

    Its first frames are given as pictures at the end of the window.
    """
    size, found = make.request.num_frames, make.of_all(video)
    while (missing := frames + len(video) - found.shape[1]) > 0:
        count = min(_LAST, found.shape[1], size - 1)
        given = make.pictures(found[:, :count], range(size - count, size))
        new = make.decode(make.sample(given))[:, : size - count]
        found = np.concatenate([new[:, -missing:], found], axis=1)
    return found


def _backwards_windows(inputs: Mapping, size: Size, stride: int) -> int:
    found, missing, windows_made = len(inputs["video"]), inputs["frames"], 0
    while missing > 0:
        new = size.num_frames - min(_LAST, found, size.num_frames - 1)
        found, missing, windows_made = found + new, missing - new, windows_made + 1
    return windows_made


def connect(
    make: windows.Windows, video: np.ndarray, video_2: np.ndarray, frames: int
) -> np.ndarray:
    """Makes so many frames that lead from the end of a video to the start of another."""
    head, last = _ends(video, video_2, make.stride)
    given = make.pictures(
        video_2[:last],
        range(head + frames, head + frames + last),
        beside=make.head(make.encode(video[len(video) - head :])),
    )
    made = make.decode(make.sample(given))
    return _joined(make, video, made[:, head : head + frames], video_2)


def _ends(video: np.ndarray, video_2: np.ndarray, stride: int) -> tuple[int, int]:
    """Frames that are given of both ends: latents of the first, pictures of the second."""
    head = 1 + stride if len(video) > stride else 1
    return head, min(_LAST, len(video_2))


def _connect_size(inputs: Mapping, size: Size, stride: int) -> Size:
    frames = inputs["frames"]
    head, last = _ends(inputs["video"], inputs["video_2"], stride)
    whole = _whole(head + frames + last, stride)
    return dataclasses.replace(size, num_frames=whole)


def replace(
    make: windows.Windows, video: np.ndarray, first: int, last: int
) -> np.ndarray:
    """Makes frames `first` to `last` of a video anew, to fit those on both sides."""
    return connect(make, video[:first], video[last + 1 :], last + 1 - first)


def _replace_size(inputs: Mapping, size: Size, stride: int) -> Size:
    video, first, last = (inputs[name] for name in ("video", "first", "last"))
    if not 0 < first <= last < len(video) - 1:
        raise ValueError(
            f"frames {first} to {last} are to be replaced, of a video with frames 0 to "
            f"{len(video) - 1}: some must be left on both sides"
        )
    ends = {"video": video[:first], "video_2": video[last + 1 :]}
    return _connect_size(ends | {"frames": last + 1 - first}, size, stride)


def fill(make: windows.Windows, video: np.ndarray, factor: int) -> np.ndarray:
    """Makes `factor` - 1 frames between every two, at that many times the frame rate."""
    size = make.request.num_frames
    per_window = (size - 1) // factor  # steps from given frame to given frame
    parts, done, frames = [], 0, factor * (len(video) - 1) + 1
    while done < len(video) - 1:
        here = video[done : done + per_window + 1]
        given = make.pictures(here, range(0, factor * len(here), factor))
        made = make.decode(make.sample(given))
        for step, frame in enumerate(here):
            made[:, factor * step] = frame
        parts.append(made[:, : factor * (len(here) - 1)])
        done += len(here) - 1
    return _joined(make, *parts, video[-1:])[:, :frames]


def _fill_size(inputs: Mapping, size: Size, stride: int) -> Size:
    factor, video = inputs["factor"], inputs["video"]
    if factor < 2:
        raise ValueError(f"factor is {factor}; frames are filled in from 2 on")
    if len(video) < 2:
        raise ValueError("the video has 1 frame: there is nothing to fill between")
    if size.num_frames - 1 < factor:
        raise ValueError(
            f"factor is {factor}, more than a window of {size.num_frames} frames has room "
            "for: give a smaller factor or a larger num_frames"
        )
    whole = min(size.num_frames, _whole(factor * (len(video) - 1) + 1, stride))
    return dataclasses.replace(size, num_frames=whole, fps=size.fps * factor)


def _fill_windows(inputs: Mapping, size: Size, stride: int) -> int:
    steps = (size.num_frames - 1) // inputs["factor"]
    return math.ceil((len(inputs["video"]) - 1) / steps)


# -- edits ----------------------------------------------------------------------------


def inpaint(make: windows.Windows, video: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Makes a part of a video anew, and keeps the rest.

    A denoiser that learned "region" is given what is kept. With others the solver alone
    keeps it: `Given.blended`.

    Args:
      mask: bool [t, h, w], true where the video is made anew.
    """
    kept, strides = ~mask, make.pipe.vae_strides
    latents = make.encode(regions.blanked(video, kept))
    known_thw = jnp.asarray(regions.of_latents(kept, *strides))
    known_bthw = jnp.broadcast_to(known_thw, (len(make.rows), *known_thw.shape))
    blended = "region" not in make.pipe.settings.trained_patterns
    given = givens.Given(known_bthw, latents, blended=blended)
    made = make.decode(make.sample(given))
    return np.where(kept[None, ..., None], video[None], made)


def vary(make: windows.Windows, video: np.ndarray, strength: float) -> np.ndarray:
    """Variations of a video, or another style of it (SDEdit, arXiv 2108.01073).

    Args:
      strength: the noise level that it is brought to, in (0, 1]; at 1 nothing is left of
        it.
    """
    return make.decode(make.sample(latents_bthwc=make.encode(video), first=strength))


def blend(
    make: windows.Windows,
    video: np.ndarray,
    video_2: np.ndarray,
    strength: float,
    curve: Sequence[float],
) -> np.ndarray:
    """Turns one video into another of its length, along a curve.

    Their latents are mixed, brought to a noise level and denoised (as `vary`).

    Args:
      strength: that noise level, in (0, 1].
      curve: shares of the second video, evenly spaced in time from the first frame to the
        last; those of latents between are interpolated.
    """
    first, second = make.encode(video), make.encode(video_2)
    at = np.linspace(0, len(curve) - 1, first.shape[1])
    share_t = jnp.asarray(np.interp(at, np.arange(len(curve)), curve), jnp.float32)
    mixed = first + share_t[None, :, None, None, None] * (second - first)
    return make.decode(make.sample(latents_bthwc=mixed, first=strength))


def _blend_size(inputs: Mapping, size: Size, stride: int) -> Size:
    lengths = len(inputs["video"]), len(inputs["video_2"])
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"the videos have {lengths[0]} and {lengths[1]} frames: blend takes two of one "
            "length"
        )
    curve = inputs["curve"]
    if len(curve) < 2 or not all(0 <= share <= 1 for share in curve):
        raise ValueError(
            f"curve is two or more shares of the second video in [0, 1], not {[*curve]}"
        )
    return _of_video(inputs, size, stride)


def edit(
    make: windows.Windows,
    video: np.ndarray,
    source: Mapping | None,
    strength: float,
    source_guidance_scale: float,
    method: str,
) -> np.ndarray:
    """Changes a video to what a text says.

    Args:
      source: the encoded description of the video as it is; for FlowEdit.
      strength: the noise level that FlowEdit begins at, in (0, 1].
      source_guidance_scale: weight of that description.
      method: "context" gives the denoiser the video as it is, which it must have learned;
        "flowedit" needs no training (arXiv 2412.08629).
    """
    if method == "context":
        return make.decode(make.sample(make.source(video)))
    latents = make.encode(video)
    return make.decode(make.edit(latents, source, source_guidance_scale, strength))


def outpaint(make: windows.Windows, video: np.ndarray) -> np.ndarray:
    """Makes what lies around a video, which stays in the middle of the larger frame."""
    t, h, w, _ = video.shape
    height, width = make.request.height, make.request.width
    top, left = (height - h) // 2, (width - w) // 2
    inside = slice(top, top + h), slice(left, left + w)
    canvas = np.full((t, height, width, 3), regions.GREY, np.uint8)
    mask = np.ones((t, height, width), bool)
    canvas[:, *inside], mask[:, *inside] = video, False
    return inpaint(make, canvas, mask)


def _outpaint_size(inputs: Mapping, size: Size, stride: int) -> Size:
    _, h, w, _ = inputs["video"].shape
    if size.height < h or size.width < w or (size.height, size.width) == (h, w):
        raise ValueError(
            f"the video is {w} x {h}, and {size.width} x {size.height} is asked for: give "
            "a larger height or width"
        )
    return _of_video(inputs, size, stride)


TASKS: dict[str, Task] = {
    "keyframes": Task(
        keyframes, "pictures at any times", ("images",), {"at": None}, _keyframes_need,
        _keyframes_size,
    ),
    "loop": Task(loop, "a video that repeats", (), size=_loop_size),
    "reference": Task(
        reference, "of what pictures show", ("references",),
        needs=lambda *_: ("reference",), size=_references_size,
    ),
    "extend": Task(
        extend, "continue a video", options={"frames": None},
        needs=_extend_needs, size=_longer_size, windows=_extend_windows,
    ),
    "extend_backwards": Task(
        extend_backwards, "what comes before a video", options={"frames": None},
        needs=lambda *_: ("tail",), size=_longer_size, windows=_backwards_windows,
    ),
    "connect": Task(
        connect, "from one video to another", ("video", "video_2"), {"frames": None},
        lambda *_: ("both",), _connect_size, fixed=True,
    ),
    "replace": Task(
        replace, "new frames in the middle of a video",
        options={"first": None, "last": None}, needs=lambda *_: ("both",),
        size=_replace_size, fixed=True,
    ),
    "fill": Task(
        fill, "more frames a second", options={"factor": 2},
        needs=lambda *_: ("every",), size=_fill_size, windows=_fill_windows,
    ),
    "inpaint": Task(
        inpaint, "a new part of every frame", ("video", "mask"), may_give="region",
        size=_of_video, fixed=True,
    ),
    "outpaint": Task(
        outpaint, "a larger frame around a video", may_give="region",
        size=_outpaint_size, fits=False, fixed=True,
    ),
    "vary": Task(
        vary, "variations, or another style", options={"strength": 0.8}, size=_of_video,
        fixed=True,
    ),
    "blend": Task(
        blend, "one video turns into another", ("video", "video_2"),
        {"strength": 0.7, "curve": (0.0, 1.0)}, size=_blend_size, fixed=True,
    ),
    "edit": Task(
        edit, "another text for the same video",
        options={
            "source": "", "strength": 0.9, "source_guidance_scale": 1.0, "method": "",
        },
        needs=lambda inputs, _: ("edit",) if inputs["method"] == "context" else (),
        size=_of_video, fixed=True,
    ),
}  # fmt: skip


IMAGES = ("images", "references")  # inputs that are pictures, not videos


def pixels(value: Any, name: str) -> np.ndarray:
    """A video or images as uint8 [t, h, w, 3], a mask as bool [t, h, w].

    Raises:
      ValueError: it is something else.
    """
    array = np.asarray(value)
    if name == "mask":
        array = array[None] if array.ndim == 2 else array
        if array.ndim != 3 or not array.size:
            raise ValueError(f"mask is [h, w] or [t, h, w], not {list(array.shape)}")
        return array.astype(bool)
    if array.ndim != 4 or array.shape[-1] != 3 or not array.size:
        what = "are images" if name in IMAGES else "is a video"
        raise ValueError(f"{name} {what}, uint8 [t, h, w, 3], not {list(array.shape)}")
    if array.dtype != np.uint8:
        raise ValueError(f"{name} is uint8, not {array.dtype}")
    return array


def _count(value: Any, name: str) -> int:
    """A whole number from 0 on."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < 0:
        raise ValueError(f"{name} is a whole number from 0 on, not {value!r}")
    return int(value)


METHODS = ("context", "flowedit")


def _edit_method(
    inputs: Mapping[str, Any], given: Mapping[str, Any], trained: Sequence[str]
) -> dict[str, Any]:
    """The method of an edit, and the text of its source if it needs one."""
    method = inputs["method"] or ("context" if "edit" in trained else "flowedit")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it is one of {', '.join(METHODS)}")
    if method == "flowedit" and not inputs["source"]:
        raise ValueError(
            "task 'edit' by flowedit needs source, a description of the video as it is"
        )
    of_flow = ("source", "strength", "source_guidance_scale")
    for name in (n for n in of_flow if method == "context" and given.get(n)):
        raise ValueError(
            f"{name} has no meaning for method context: leave it out, or choose method "
            "flowedit"
        )
    return {"method": method, "source": inputs["source"] or None}


def _number(value: Any, name: str) -> float:
    """A number, whole or not."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise ValueError(f"{name} is a number, not {value!r}")
    return float(value)


def check_mask(videos: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError if a mask is not of the size of its video."""
    if not videos.keys() >= {"mask", "video"}:
        return
    (t, h, w), shape = videos["mask"].shape, videos["video"].shape
    if t not in (1, shape[0]) or (h, w) != shape[1:3]:
        raise ValueError(
            f"the mask has {t} frames of {w} x {h}, the video {shape[0]} of "
            f"{shape[2]} x {shape[1]}: make it a picture or a video of that size"
        )


def fitted(video: np.ndarray, height: int, width: int) -> np.ndarray:
    """A video or mask scaled to cover a size, and cropped at its centre."""
    if video.shape[1:3] == (height, width):
        return video
    if video.ndim == 3:  # what is new in part is new
        masks = fitted(
            np.repeat(255 * video[..., None].astype("u1"), 3, -1), height, width
        )
        return masks[..., 0] > 0
    frames = [givens.fit_image(frame, height, width) for frame in video]
    return np.round((np.stack(frames) + 1) * 127.5).astype(np.uint8)


class Untrained(ValueError):
    """The denoiser was not given in training what a task gives."""


def find(name: str) -> Task:
    """The task of this name; ValueError if there is none."""
    if name not in TASKS:
        raise ValueError(f"task {name!r} is unknown; there are {', '.join(TASKS)}")
    return TASKS[name]


def check(
    name: str,
    inputs: Mapping[str, Any],
    size: Size,
    stride: int,
    trained: Sequence[str],
) -> tuple[dict[str, Any], Size, int]:
    """Resolves and checks what a task is given.

    Args:
      name: of the task.
      inputs: what is given, by the names of `Task.inputs` and `Task.options`.
      size: that was asked for.
      stride: video frames per latent frame.
      trained: what the denoiser was given in training.

    Returns:
      All inputs, the size of the windows, and their number.

    Raises:
      ValueError: one sentence: what is wrong, and what would be right.
    """
    task = find(name)
    named = {k: v for k, v in task.options.items() if v is not None} | dict(inputs)
    for key in (*task.inputs, *task.options):
        if key not in named:
            raise ValueError(f"task {name!r} needs {key}")
    for key in {"frames", "factor", "first", "last"} & named.keys():
        named[key] = _count(named[key], key)
    if "at" in named:
        named["at"] = [
            _count(value, "the frame of a keyframe") for value in named["at"]
        ]
    if named.get("frames") == 0:
        raise ValueError("frames is 0: there is nothing to make")
    if "method" in named:
        named |= _edit_method(named, inputs, trained)
    if not isinstance(named.get("source") or "", str):
        raise ValueError(f"source is text, not {type(named['source']).__name__}")
    for key in {"strength", "source_guidance_scale"} & named.keys():
        named[key] = _number(named[key], key)
    if not 0 < named.get("strength", 1) <= 1:
        raise ValueError(
            f"strength is a noise level in (0, 1], not {named['strength']:g}"
        )
    if not 0 <= (scale := named.get("source_guidance_scale", 1)) <= 100:
        raise ValueError(f"source_guidance_scale is in [0, 100], not {scale:g}")
    if "curve" in named:
        if not isinstance(named["curve"], list | tuple | np.ndarray):
            raise ValueError(f"curve is numbers, not {named['curve']!r}")
        named["curve"] = [_number(share, "curve") for share in named["curve"]]
    if "mask" in named and len(named["mask"]) == 1:
        named["mask"] = np.repeat(named["mask"], len(named["video"]), axis=0)
    found = task.size(named, size, stride)
    count = task.windows(named, found, stride)
    needs = task.needs(named, count)
    if missing := [need for need in needs if need not in trained]:
        raise Untrained(
            f"task {name!r} needs a denoiser that was trained with {missing[0]!r} "
            f"(see known in its config); this one was trained with {', '.join(trained)}"
        )
    return named, found, count
