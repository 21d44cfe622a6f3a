"""What the loader makes of a record: arrays for one row of a batch.

Letters: t time, h height, w width, c channel, l text length.
"""

import threading
from typing import Any

import numpy as np

from sora_jax.data import captions, records, tokenizer

# A tier's number in `tier`, for logs by tier; the last one stands for "no caption".
TIER_NAMES = (*records.TIERS, captions.NO_CAPTION)


class Text:
    """Draws a caption and tokenises it.

    Args:
      sampler: which tier is drawn.
      tokens: the tokenizer.
      length: ids in a row.
    """

    def __init__(
        self,
        sampler: captions.CaptionSampler,
        tokens: tokenizer.Tokenizer,
        length: int,
    ):
        self.sampler, self.tokens, self.length = sampler, tokens, length

    def __call__(self, record: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns ids int32[l], mask bool[l] and tier int32 (of TIER_NAMES)."""
        text, tier = self.sampler.pick(record.captions, rng)
        ids_bl, mask_bl = self.tokens.encode([text], self.length)
        return {
            "ids": ids_bl[0],
            "mask": mask_bl[0],
            "tier": np.int32(TIER_NAMES.index(tier)),
        }


class LatentExample:
    """Cached latents with their text: {"latents": float32[t, h, w, c], ids, mask, tier}."""

    def __init__(self, text: Text):
        self.text = text

    def __call__(self, record: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"latents": record.latents, **self.text(record, rng)}


class VideoExample:
    """Decoded frames: {"video": uint8[t, h, w, 3]}, with text where it is asked for.

    Args:
      text: adds ids, mask and tier.
      memory_bytes: decoded clips are kept until they fill so much (in each worker), so
        that a small data set is decoded once and not once an epoch.
    """

    def __init__(self, text: Text | None = None, memory_bytes: int = 1 << 29):
        self.text, self.memory_bytes = text, memory_bytes
        self._kept: dict[str, np.ndarray] = {}
        self._used = 0
        self._keeping = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"text": self.text, "memory_bytes": self.memory_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __call__(
        self, record: records.ClipRecord, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        frames_thwc = self._kept.get(record.sha256)
        if frames_thwc is None:
            frames_thwc = record.frames()
            with self._keeping:
                if self._used + frames_thwc.nbytes <= self.memory_bytes:
                    self._kept[record.sha256] = frames_thwc
                    self._used += frames_thwc.nbytes
        text = self.text(record, rng) if self.text else {}
        return {"video": frames_thwc, **text}
