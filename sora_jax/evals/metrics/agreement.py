"""Whether clips show what their captions say, by CLIP; beside it, what any caption gets.

    clip = agreement.Agreement("clip-vit-base-patch32")
    captions = agreement.read_captions(folder, names)

CLIPSIM (arXiv 2104.14806): the mean over frames of the cosine of frame and caption, times
100. The number alone says nothing, since any caption has some 20 with any picture: so
each clip is also compared with the captions of the other clips, the mean over all
orders in which the captions could be shuffled such that none keeps its own.

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
_AT_ONCE = 64  # texts
_SUFFIXES = (".txt", ".json", ".jsonl", ".csv")


@dataclasses.dataclass(frozen=True)
class Captions:
    """Captions of a folder's clips by their names, and what could not be read."""

    texts: Mapping[str, str]
    failures: tuple[str, ...]


def read_captions(folder: pathlib.Path, names: Collection[str]) -> Captions:
    """Reads what lies beside the clips of a folder: see `data.folders`.

    What is named after a file of many clips is the caption of none of them; such a clip
    may be named in a list, such as captions.csv.

    Of several captions of a clip the first one of the first tier counts: the text that
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
      folder: of a CLIP, as transformers stores it, tokenizer included.

    Attributes:
      network: features of frames and of texts.
      tokenizer: makes the latter's token ids.

    Raises:
      WrongWeights: there are none, or other ones, or the tokenizer is not theirs.
      FileNotFoundError, ValueError: there is no tokenizer.
    """

    def __init__(self, folder: str | pathlib.Path):
        self.network = networks.open("clip", folder)
        self.tokenizer = clip_tokenizer.ClipTokenizer(folder)
        config = self.network.text_config
        ours = self.tokenizer.vocab_size, self.tokenizer.end_id
        if ours != (config.vocab_size, config.end):
            raise WrongWeights(
                f"{folder}: its tokenizer has {ours[0]} ids and ends texts with "
                f"{ours[1]}, its network {config.vocab_size} and {config.end}"
            )

    def fit(self, frame_hwc: np.ndarray) -> np.ndarray:
        """The middle of a frame uint8 at the network's size, as CLIP's own code makes it.

        The short side is brought to size by Pillow's bicubic filter and the middle is
        cut out (`resize.resize`); a smaller frame is left to the network as it is.
        """
        side, (h, w) = self.network.size, frame_hwc.shape[:2]
        short = min(h, w)
        if short <= side:
            return frame_hwc
        size = side * w // short, side * h // short
        bicubic = PIL.Image.Resampling.BICUBIC
        found = np.asarray(PIL.Image.fromarray(frame_hwc).resize(size, bicubic))
        top, left = (round((of - side) / 2) for of in found.shape[:2])
        return found[top : top + side, left : left + side]

    def to_json(self) -> dict[str, Any]:
        """What agreements must have alike to be compared, as JSON values."""
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
        """Agreement of each clip with its own text, and with the other texts.

        Args:
          frames_nd: the mean over a clip's frames of their features of length one.
          texts: n of them.

        Returns:
          100 times the cosine, and its mean over all texts that are not the clip's own
          words; None where there is none.
        """
        if not len(texts):
            return [], []
        ids = self.tokenizer.encode(texts, self.network.text_config.length)
        text_nd = networks.unit(
            np.concatenate(
                [
                    self.network.texts(ids[start : start + _AT_ONCE])
                    for start in range(0, len(ids), _AT_ONCE)
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
