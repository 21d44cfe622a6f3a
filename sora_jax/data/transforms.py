"""From a stored record to the arrays of one training row.

Every function is pure in (record, generator), and the generator is a function of (seed,
step, row).

Letters: n crops, t time, h height, w width, c channels, l tokens, d text width.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sora_jax.data import captions, records, text_states, tokenizer


@dataclasses.dataclass(frozen=True)
class Crop:
    """A window of a clip; 0 means the clip's own size. `count` windows a clip."""

    num_frames: int = 0
    height: int = 0
    width: int = 0
    count: int = 1


class CropClips:
    """Cuts random windows out of decoded clips: {"video": uint8 [n, t, h, w, c]}.

    A window may begin at any frame, so that the autoencoder also learns clips whose
    first frame is in the middle of something.
    """

    def __init__(self, crop: Crop):
        self.crop = crop

    def __call__(
        self, record: records.ClipRecord, random: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Raises ValueError where the clip is smaller than the window."""
        frames_thwc = record.frames()
        crop = self.crop
        size = tuple(
            wanted or whole
            for wanted, whole in zip(
                (crop.num_frames, crop.height, crop.width),
                frames_thwc.shape,
                strict=False,
            )
        )
        room = [whole - s for whole, s in zip(frames_thwc.shape, size, strict=False)]
        if min(room) < 0:
            raise ValueError(
                f"clip {record.id!r} is {frames_thwc.shape[:3]}, smaller than the "
                f"window {size}"
            )
        starts_n3 = random.integers(0, np.array(room) + 1, (crop.count, 3))
        windows = [
            frames_thwc[t : t + size[0], h : h + size[1], w : w + size[2]]
            for t, h, w in starts_n3
        ]
        return {"video": np.stack(windows)}


class Tokenize:
    """Picks a caption and turns it into ids: `text_ids`, `text_mask`."""

    def __init__(
        self,
        sampler: captions.CaptionSampler,
        pieces: tokenizer.Tokenizer,
        length: int,
    ):
        self.sampler, self.pieces, self.length = sampler, pieces, length
        self._seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, record, random: np.random.Generator) -> dict[str, np.ndarray]:
        text, _ = self.sampler.pick(record.captions, random)
        if text not in self._seen:
            if len(self._seen) >= 200_000:  # bounded; a data set may be endless
                self._seen.clear()
            ids_1l, mask_1l = self.pieces.encode([text], self.length)
            self._seen[text] = ids_1l[0], mask_1l[0]
        ids_l, mask_l = self._seen[text]
        return {"text_ids": ids_l, "text_mask": mask_l}


class LatentsAndText:
    """What the denoiser trains with: the latents and one of their captions.

    The caption is its `text_ids`, or its `text_states` [l, d] where a cache of them is
    given; which caption it is does not depend on that.
    """

    def __init__(self, text: Tokenize, states: text_states.TextStates | None = None):
        self.text, self.states = text, states

    def __call__(self, record, random: np.random.Generator) -> dict[str, np.ndarray]:
        text = self.text(record, random)
        if self.states is not None:
            ids_l, mask_l = text["text_ids"], text["text_mask"]
            states_ld = self.states.padded(ids_l, mask_l)
            text = {"text_states": states_ld, "text_mask": mask_l}
        return {"latents": record.latents} | text


class TwoCaptions:
    """What the text encoder trains with: a caption to read and one to write.

    Of a clip that lacks either there is nothing to write: `target_ids` are padding.
    """

    def __init__(self, read: Tokenize, write: Tokenize):
        self.read, self.write = read, write

    def __call__(self, record, random: np.random.Generator) -> dict[str, np.ndarray]:
        target = self.write(record, random)["text_ids"]
        if not all(t.sampler.has(record.captions) for t in (self.read, self.write)):
            target = np.full_like(target, self.write.pieces.pad_id)
        return self.read(record, random) | {"target_ids": target}


def join_crops(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """[b, n, ...] -> [b n, ...]: every window becomes a row."""
    video = batch["video"]
    return {"video": video.reshape(-1, *video.shape[2:])}


def stages(
    crops: Sequence[tuple[float, int, int, int, int]], num_steps: int
) -> list[tuple[range, Crop]]:
    """Splits a run's steps by share: (share, frames, height, width, count) each.

    Raises:
      ValueError: the shares do not sum to 1.
    """
    total = sum(stage[0] for stage in crops)
    if abs(total - 1) > 1e-6:
        raise ValueError(f"the shares of data.crops sum to {total:g}, not 1")
    result, done, start = [], 0.0, 0
    for share, *size in crops:
        done += share
        end = round(done * num_steps)
        result.append((range(start, end), Crop(*size)))
        start = end
    return result
