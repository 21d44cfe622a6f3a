"""Agreement of clips with their captions, by CLIP, and with the captions of other clips.

    clip = agreement.Agreement("clip-vit-base-patch32")
    captions = agreement.read_captions(folder, names)

CLIPSIM (arXiv 2104.14806) is the mean over frames of the cosine of frame and caption,
times 100. Since any caption and any picture reach about 20, each clip is also compared
with all captions of the other clips; their mean is the control.

Letters: n clips, t frames, d features, l tokens.
"""

import dataclasses
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from sora_jax.data import clip_tokenizer, folders, records
from sora_jax.evals.features import networks
from sora_jax.evals.features.weight_folders import WrongWeights

_SCALE = 100.0
_BATCH = 64  # texts
_SUFFIXES = (".txt", ".json", ".jsonl", ".csv")


@dataclasses.dataclass(frozen=True)
class Captions:
    """Captions of a folder's clips by name, and a sentence for what could not be read."""

    texts: Mapping[str, str]
    failures: tuple[str, ...]


def read_captions(folder: pathlib.Path, names: Collection[str]) -> Captions:
    """Reads the captions beside the clips of a folder: see `data.folders`.

    For a file of many clips, captions must name the clip in a list such as captions.csv.
    If a clip has several captions, the first one of the first tier is used: the text that
    it came with, or its recipe's prompt.
    """
    files = {
        name
        for name in folders.walk(folder)[0]
        if pathlib.PurePath(name).suffix in _SUFFIXES
    }
    found, skipped = folders.read_captions(folder, set(names), files)
    texts = {
        name: next(
            records.variants(text.captions[tier])[0]
            for tier in records.TIERS
            if tier in text.captions
        )
        for name, text in found.items()
    }
    return Captions(texts, tuple(f"{one.file}: {one.reason}" for one in skipped))


class Agreement:
    """CLIP's two networks and its tokenizer.

    Args:
      folder: a CLIP in the layout of transformers, with its tokenizer.

    Attributes:
      network: features of frames and of texts.
      tokenizer: token ids of texts.

    Raises:
      WrongWeights: the weights are missing or of another network, or the tokenizer does
        not match them.
      FileNotFoundError, ValueError: the tokenizer is missing or cannot be read.
    """

    def __init__(self, folder: str | pathlib.Path):
        self.network = networks.open("clip", folder)
        self.tokenizer = clip_tokenizer.ClipTokenizer(folder)
        config = self.network.text_config
        ours = self.tokenizer.vocab_size, self.tokenizer.end_id
        if ours != (config.vocab_size, config.end):
            raise WrongWeights(
                f"{folder}: the tokenizer has {ours[0]} ids and the end token {ours[1]}, "
                f"the network {config.vocab_size} ids and {config.end}"
            )

    def fit(self, frame_hwc: np.ndarray) -> np.ndarray:
        """Returns the centre crop of a frame uint8 at the network's size, as CLIP does.

        The short side is resized by Pillow's bicubic filter. A smaller frame is returned
        as it is; the network resizes it (`resize.resize`).
        """
        side, (h, w) = self.network.size, frame_hwc.shape[:2]
        short = min(h, w)
        if short <= side:
            return frame_hwc
        size = side * w // short, side * h // short
        bicubic = PIL.Image.Resampling.BICUBIC
        resized = np.asarray(PIL.Image.fromarray(frame_hwc).resize(size, bicubic))
        top, left = (round((length - side) / 2) for length in resized.shape[:2])
        return resized[top : top + side, left : left + side]

    def to_json(self) -> dict[str, Any]:
        """Returns the protocol of an agreement, as JSON values."""
        return {
            "frames": "all that are measured",
            "resize": self.network.resize,
            "tokenizer": self.tokenizer.digest,
            "tokens": self.network.text_config.length,
            "weights": self.network.sha256,
        }

    def too_long(self, texts: Sequence[str]) -> int:
        """Returns how many texts have more tokens than the network reads."""
        length = self.network.text_config.length
        return sum(len(self.tokenizer.ids(text)) > length for text in texts)

    def compare(
        self, frames_nd: np.ndarray, texts: Sequence[str]
    ) -> tuple[list[float], list[float | None]]:
        """Returns the agreement of each clip with its own text, and with other texts.

        Args:
          frames_nd: for each clip, the mean of its frames' features of unit length.
          texts: n of them.

        Returns:
          100 times the cosine, and its mean over all texts that differ from the clip's
          own; None where there is no such text.
        """
        if not len(texts):
            return [], []
        ids = self.tokenizer.encode(texts, self.network.text_config.length)
        text_nd = networks.unit(
            np.concatenate(
                [
                    self.network.texts(ids[start : start + _BATCH])
                    for start in range(0, len(ids), _BATCH)
                ]
            )
        )
        score_nn = _SCALE * np.asarray(frames_nd, np.float64) @ text_nd.T
        words = np.array(texts, object)
        others = [
            float(row[words != text].mean()) if (words != text).any() else None
            for row, text in zip(score_nn, texts, strict=True)
        ]
        return np.diagonal(score_nn).tolist(), others
