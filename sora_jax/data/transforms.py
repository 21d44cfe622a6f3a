"""From a stored record to the arrays of one training row.

Every function is pure in (record, generator), and the generator is a function of (seed,
step, row).

Letters: n windows, t time, h height, w width, c channels, l tokens, d text width, r tiers.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from sora_jax.data import captions, conditions, records, text_cache, texts
from sora_jax.data import tokenizer as tokenizers
from sora_jax.toyworld import scene, tokens


@dataclasses.dataclass(frozen=True)
class Crop:
    """A kind of window: its size (0: the clip's own), and how many are cut of a clip."""

    num_frames: int = 0
    height: int = 0
    width: int = 0
    count: int = 1

    def __post_init__(self):
        if min(self.size) < 0 or self.count < 1:
            raise ValueError(
                f"data.crops: {self.count} windows of {_times(self.size)}: sizes must "
                "be 0 (the clip's own) or more, and there must be 1 window or more"
            )

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width as configured."""
        return self.num_frames, self.height, self.width

    def within(self, whole: Sequence[int]) -> tuple[int, int, int]:
        """Returns the window's size in a clip of (frames, height, width)."""
        return tuple(
            wanted or size for wanted, size in zip(self.size, whole, strict=True)
        )


class CropClips:
    """Cuts random windows of every kind out of decoded clips.

    Each kind is an entry of its own: {"video0": uint8 [n, t, h, w, c], "video1": ...}
    with its own n, t, h and w. A window may start at any frame, so that the autoencoder
    also sees clips that start in the middle of a motion.

    Args:
      crops: the kinds.
      shown: also says what the places of a whole clip's latents show.
      grid: of these latents along time, height and width.
    """

    def __init__(
        self,
        crops: Sequence[Crop] = (Crop(),),
        shown: "Shown | None" = None,
        grid: tuple[int, int, int] = (1, 1, 1),
    ):
        self.crops, self.shown, self.grid = tuple(crops), shown, grid

    def __call__(
        self, record: records.ClipRecord, random: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Raises ValueError if the clip is smaller than a window."""
        frames_thwc = record.frames()
        windows = {
            f"video{place}": self._cut(crop, record.id, frames_thwc, random)
            for place, crop in enumerate(self.crops)
        }
        shown = {} if self.shown is None else self.shown(record, self.grid)
        return windows | {name: array[None] for name, array in shown.items()}

    def _cut(self, crop, clip_id, frames_thwc, random) -> np.ndarray:
        whole = frames_thwc.shape[:3]
        size = crop.within(whole)
        room = np.array(whole) - size
        if min(room) < 0:
            raise ValueError(
                f"clip {clip_id!r} is {_times(whole)}, smaller than the window "
                f"{_times(size)}"
            )
        starts_n3 = random.integers(0, room + 1, (crop.count, 3))
        windows = [
            frames_thwc[t : t + size[0], h : h + size[1], w : w + size[2]]
            for t, h, w in starts_n3
        ]
        return np.stack(windows)


def _times(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


class Tokenize:
    """Picks a caption and turns it into ids: `text_ids`, `text_mask`.

    `text_tier` is the place of its tier in `captions.REALISED`.
    """

    def __init__(
        self,
        sampler: captions.CaptionSampler,
        tokenizer: tokenizers.Tokenizer,
        length: int,
    ):
        self.sampler, self.tokenizer, self.length = sampler, tokenizer, length
        self._seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, record, random: np.random.Generator) -> dict[str, np.ndarray]:
        scores = record.scores if self.sampler.variation.tags else None
        text, tier = self.sampler.pick(record.captions, random, scores)
        if text not in self._seen:
            if len(self._seen) >= 200_000:  # bounds the cache's memory
                self._seen.clear()
            ids_1l, mask_1l = self.tokenizer.encode([text], self.length)
            self._seen[text] = ids_1l[0], mask_1l[0]
        ids_l, mask_l = self._seen[text]
        place = np.int32(captions.REALISED.index(tier))
        return {"text_ids": ids_l, "text_mask": mask_l, "text_tier": place}


class LatentsAndText:
    """An example for the denoiser: latents, one of their captions, and what is given.

    The caption is given as `text_ids`, or as `text_states` [l, d] if there is a cache of
    states; the choice of the caption is the same for both. Each token has its `slots`,
    int8 [n], and each clip its `pattern`, a place in `conditions.PATTERNS`. A packed clip
    also has the first latent frame of its window, `start`, the `period` of a loop in latent
    frames (else 0), and what is given `beside` it, latents [q, h, w, c] with their
    `times` [q], in latent frames; in its tokens they come last: pictures, references
    before the clip, the frames of a source.

    Args:
      text: picks a caption.
      states: of the captions, if they are cached.
      shown: what tokens of the toy world show.
      given: how often what is given of a clip.
      patch: latents of a token along time, height and width.
      temporal_stride: video frames per latent frame, except for the first.
    """

    def __init__(
        self,
        text: Tokenize,
        states: text_cache.TextStates | None = None,
        shown: "Shown | None" = None,
        given: conditions.Config = conditions.Config(),
        patch: tuple[int, int, int] = (1, 1, 1),
        temporal_stride: int = 4,
    ):
        self.text, self.states, self.shown = text, states, shown
        self.given, self.patch, self.temporal_stride = given, patch, temporal_stride

    def draw(
        self, entry: Mapping, random: np.random.Generator
    ) -> tuple[conditions.Condition, int]:
        """Draws the condition of a clip, and says how many tokens it then has."""
        drawn = conditions.draw(
            self.given, entry, random, self.patch, self.temporal_stride
        )
        return drawn, drawn.tokens(entry["shape"], self.patch)

    def __call__(
        self,
        record,
        random: np.random.Generator,
        condition: conditions.Condition | None = None,
        others: Sequence = (),
    ) -> dict[str, np.ndarray]:
        """Draws the condition if it is not given: that of clips of one size.

        others: the records of `Condition.others`.
        """
        told = record
        if condition is not None and condition.source is not None:
            told = _telling(record, others[-1], self.text.sampler.has)
        text = self.text(told, random)
        if self.states is not None:
            ids_l = text.pop("text_ids")
            text["text_states"] = self.states.padded(ids_l, text["text_mask"])
        is_packed = condition is not None
        if condition is None:
            entry = {"shape": record.latents.shape, "region": record.views.region}
            condition, _ = self.draw(entry, random)
        given = self._given(record, condition, is_packed, others)
        more = {}
        if self.shown is not None:
            pairs = zip(record.latents.shape[:3], self.patch, strict=True)
            grid = tuple(size // patch for size, patch in pairs)
            window = slice(condition.start, condition.stop)
            more = {
                name: _window(array_n, grid, window, len(given["slots"]))
                for name, array_n in self.shown(record, grid).items()
            }
        return given | text | more

    def _given(
        self,
        record,
        condition: conditions.Condition,
        is_packed: bool,
        others: Sequence,
    ) -> dict[str, np.ndarray]:
        """The latents of a clip's window, and what is given of it and beside it."""
        views, latents_thwc = record.views, record.latents
        region = None
        if condition.pattern is conditions.Pattern.REGION:
            region = views.region
            latents_thwc = np.where(region[..., None], views.kept, latents_thwc)
        first = condition.start * self.patch[0]
        stop = None if condition.stop is None else condition.stop * self.patch[0]
        latents_thwc = latents_thwc[first:stop]
        grid = [
            size // patch
            for size, patch in zip(latents_thwc.shape, self.patch, strict=False)
        ]
        if region is not None:  # a token is known if all of its latents are
            pairs = [
                part for pair in zip(grid, self.patch, strict=True) for part in pair
            ]
            region = region[first:stop].reshape(pairs).all((1, 3, 5))
        found = {
            "latents": latents_thwc,
            "slots": conditions.slots(condition, grid, region),
            "pattern": np.int32(conditions.PATTERNS.index(condition.pattern)),
        }
        if not is_packed:
            return found
        beside, times = [latents_thwc[:0]], []
        if condition.pictures:
            places = [views.frames.index(frame) for frame in condition.pictures]
            beside.append(views.pictures[places])
            frames = np.array(condition.pictures)
            times += (frames / self.temporal_stride / self.patch[0]).tolist()
        for number, _ in enumerate(condition.references):
            beside.append(others[number].latents[:1])
            times.append(conditions.reference_time(number))
        if condition.source is not None:
            beside.append(others[-1].latents)
            times += range(grid[0])
        loops = condition.pattern is conditions.Pattern.LOOP
        return found | {
            "start": np.int32(condition.start),
            "period": np.float32(grid[0] * loops),
            "beside": np.concatenate(beside),
            "times": np.float32(times),
        }


def _telling(record, source, has: Callable[[Mapping[str, str]], bool]):
    """A record with those of its captions that its source does not have.

    has: whether one of some captions is of a tier that is used; if none is, the record
      stays as it is.
    """
    captions = {
        tier: records.join(
            [
                text
                for text in records.variants(several)
                if text not in records.variants(source.captions.get(tier, ""))
            ]
        )
        for tier, several in record.captions.items()
    }
    captions = {tier: text for tier, text in captions.items() if text}
    return dataclasses.replace(record, captions=captions) if has(captions) else record


def _window(
    shown_n: np.ndarray, grid: tuple[int, int, int], window: slice, count: int
) -> np.ndarray:
    """What the tokens of a window show, and the `count` tokens with those beside: -1."""
    own_n = shown_n.reshape(*grid, *shown_n.shape[1:])[window]
    own_n = own_n.reshape(-1, *shown_n.shape[1:])
    found_n = np.full((count, *own_n.shape[1:]), -1, own_n.dtype)
    found_n[: len(own_n)] = own_n
    return found_n


class Shown:
    """What the tokens of a toy-world clip show: `shown_shape`, `_colour`, `_motion`.

    Of a clip whose state is not that of a toy world, or of tokens that span several
    latent frames, every shape and colour is -1.

    Args:
      temporal_stride: video frames per latent frame, except for the first.
      causal: whether tokens of the first latent frame, which is made of one video frame,
        cannot show its motion, which is then nan.
    """

    def __init__(self, temporal_stride: int, causal: bool = False):
        self.temporal_stride, self.causal = temporal_stride, causal
        self._seen: dict[tuple, dict[str, np.ndarray]] = {}

    def __call__(self, record, grid: tuple[int, int, int]) -> dict[str, np.ndarray]:
        """grid: tokens along time, height and width."""
        key = record.id, grid
        if key not in self._seen:
            if len(self._seen) >= 200_000:  # bounds the cache's memory
                self._seen.clear()
            self._seen[key] = self._of(record.state_json, grid)
        return self._seen[key]

    def _of(
        self, state_json: str | None, grid: tuple[int, int, int]
    ) -> dict[str, np.ndarray]:
        count = int(np.prod(grid))
        shape_n = colour_n = np.full(count, -1, np.int8)
        motion_n2 = np.zeros((count, 2), np.float32)
        with contextlib.suppress(ValueError):
            drawn = scene.Scene.from_json(state_json or "")
            found = tokens.shown(drawn, grid, self.temporal_stride)
            shape_n, colour_n = found.shape_thw.ravel(), found.colour_thw.ravel()
            if self.causal:
                found.motion_thw2[0] = np.nan
            motion_n2 = found.motion_thw2.reshape(-1, 2)
        return {
            "shown_shape": shape_n,
            "shown_colour": colour_n,
            "shown_motion": motion_n2,
        }


class TwoCaptions:
    """An example of a caption to read and one to write, for text encoder and upsampler.

    `target_tier` is the place of the written one's tier in `captions.REALISED`. For a clip
    that lacks either, `target_ids` are padding.
    """

    def __init__(self, read: Tokenize, write: Tokenize):
        self.read, self.write = read, write

    def __call__(self, record, random: np.random.Generator) -> dict[str, np.ndarray]:
        written = self.write(record, random)
        target = written["text_ids"]
        if not all(t.sampler.has(record.captions) for t in (self.read, self.write)):
            target = np.full_like(target, self.write.tokenizer.pad_id)
        text = self.read(record, random)
        read = {name: text[name] for name in ("text_ids", "text_mask")}
        return read | {"target_ids": target, "target_tier": written["text_tier"]}


class CaptionedClips:
    """An example for the captioner: `video`, and one of its captions with its `tier`.

    Args:
      sampler: of captions.
      tokenizer: of captions.
      length: tokens of a row.
      shape: frames, height and width that clips are resampled to.
      tiers: the captioner's; `tier` is an index of them, -1 for a clip without a caption.
      mirror: share of the clips that are mirrored from left to right, if `texts.mirrored`
        knows their caption.
      shift: pixels by which all frames are shifted, at most; edges are repeated.
      noise: standard deviation of the noise of each pixel, of 255.
    """

    def __init__(
        self,
        sampler: captions.CaptionSampler,
        tokenizer: tokenizers.Tokenizer,
        length: int,
        shape: tuple[int, int, int],
        tiers: Sequence[str],
        mirror: float = 0.0,
        shift: int = 0,
        noise: float = 0.0,
    ):
        self.sampler, self.tokenizer, self.length = sampler, tokenizer, length
        self.shape, self.tiers, self.mirror = tuple(shape), list(tiers), mirror
        self.shift, self.noise = shift, noise

    def __call__(
        self, record: records.ClipRecord, random: np.random.Generator
    ) -> dict[str, np.ndarray]:
        text, tier = self.sampler.pick(record.captions, random)
        video_thwc = resampled(record.frames(), self.shape)
        turned = texts.mirrored(text) if random.random() < self.mirror else None
        if turned is not None:
            text, video_thwc = turned, video_thwc[:, :, ::-1]
        video_thwc = self._changed(video_thwc, random)
        ids_1l, _ = self.tokenizer.encode([text], self.length)
        known = self.tiers.index(tier) if tier in self.tiers else -1
        return {
            "video": np.ascontiguousarray(video_thwc),
            "text_ids": ids_1l[0],
            "tier": np.int32(known),
        }

    def _changed(self, video_thwc, random: np.random.Generator) -> np.ndarray:
        if self.shift:
            dy, dx = random.integers(0, 2 * self.shift + 1, 2)
            edges = (0, 0), (self.shift,) * 2, (self.shift,) * 2, (0, 0)
            padded = np.pad(video_thwc, edges, mode="edge")
            _, h, w = self.shape
            video_thwc = padded[:, dy : dy + h, dx : dx + w]
        if self.noise:
            noise = self.noise * random.standard_normal(video_thwc.shape, np.float32)
            video_thwc = np.clip(np.round(video_thwc + noise), 0, 255).astype(np.uint8)
        return video_thwc


def resampled(video_thwc: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Samples a clip evenly in time and scales its frames: uint8 [t, h, w, c].

    Pixels are averaged where frames shrink (Pillow's reducing box filter), and repeated
    where they grow by whole factors. A clip of fewer frames repeats some.

    Args:
      shape: frames, height and width of the result.
    """
    t, h, w = shape
    chosen = np.linspace(0, len(video_thwc) - 1, t).round().astype(int)
    video_thwc = video_thwc[chosen]
    if video_thwc.shape[1:3] == (h, w):
        return video_thwc
    box = PIL.Image.Resampling.BOX
    scaled = [PIL.Image.fromarray(frame).resize((w, h), box) for frame in video_thwc]
    return np.stack([np.asarray(frame) for frame in scaled])


def join_crops(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """[b, n, ...] -> [b n, ...] for every kind: each window becomes a row."""
    return {name: video.reshape(-1, *video.shape[2:]) for name, video in batch.items()}


def stages(
    crops: Sequence[tuple[float, Sequence[tuple[int, int, int, int]]]], num_steps: int
) -> list[tuple[range, tuple[Crop, ...]]]:
    """Splits a run's steps into stages by their shares.

    Args:
      crops: (share, kinds) of each stage; a kind is (frames, height, width, count), and
        every step has windows of all kinds of its stage.
      num_steps: steps of the run.

    Raises:
      ValueError: the shares do not sum to 1, a stage has no kind, or a kind is
        impossible.
    """
    for stage in crops:
        if len(stage) != 2 or any(np.shape(kind) != (4,) for kind in stage[1]):
            raise ValueError(
                "data.crops: a stage is (share, kinds), and a kind (frames, height, "
                f"width, windows a clip), not {stage}"
            )
    total = sum(share for share, _ in crops)
    if abs(total - 1) > 1e-6:
        raise ValueError(f"the shares of data.crops sum to {total:g}, not 1")
    result, done, start = [], 0.0, 0
    for share, kinds in crops:
        if not kinds:
            raise ValueError(
                f"data.crops: the stage with share {share:g} has no windows"
            )
        done += share
        end = round(done * num_steps)
        result.append((range(start, end), tuple(Crop(*kind) for kind in kinds)))
        start = end
    return result


def window_size(crop: Crop, clips: Mapping[str, Any]) -> tuple[int, int, int]:
    """Returns a window's (frames, height, width) in any clip of a folder.

    Args:
      crop: the kind of window.
      clips: a manifest's `num_frames`, `height` and `width`; lists of all values where
        the clips differ.

    Raises:
      ValueError: a clip is smaller, or the window is the clip's own size and clips
        differ in size.
    """
    smallest = []
    for wanted, field in zip(crop.size, ("num_frames", "height", "width"), strict=True):
        sizes = np.atleast_1d(clips[field]).tolist()
        if not wanted and len(sizes) > 1:
            raise ValueError(
                f"data.crops: a window with the clip's own {field} needs clips of "
                f"equal {field}, but they have from {min(sizes)} to {max(sizes)}"
            )
        if wanted > min(sizes):
            raise ValueError(
                f"data.crops: a window of {_times(crop.size)} is larger than a clip "
                f"whose {field} is {min(sizes)}"
            )
        smallest.append(min(sizes))
    return crop.within(smallest)
