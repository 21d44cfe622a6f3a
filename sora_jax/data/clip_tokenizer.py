"""Text to token ids as CLIP reads it: byte-level pairs, lower case, a start and an end.

The vocabulary and the merges come from the folder of a CLIP as transformers stores it:
`tokenizer.json`, or `vocab.json` with `merges.txt`. What is done before them is always
the same (NFC, white space to one blank, lower case, words and single digits and runs of
other signs), as in transformers' CLIPTokenizer, whose ids these are.

Letters: b texts, l tokens.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers import normalizers, pre_tokenizers

START, END = "<|startoftext|>", "<|endoftext|>"
FILES = ("tokenizer.json", "vocab.json", "merges.txt")
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]"
    r"|[^\s\p{L}\p{N}]+"
)


class ClipTokenizer:
    """Encodes texts for CLIP's text network.

    Args:
      folder: of a CLIP, as transformers stores it.

    Attributes:
      digest: SHA-256 over vocabulary and merges, whichever files they come from.
      start_id, end_id: the ids around every text; the latter also pads.
      vocab_size: the largest id, and one.

    Raises:
      FileNotFoundError: the folder has no tokenizer.
      ValueError: a file is not what it should be.
    """

    def __init__(self, folder: str | os.PathLike):
        folder = pathlib.Path(folder)
        try:
            vocab, merges = _read(folder)
            model = tokenizers.models.BPE(
                vocab,
                merges,
                unk_token=END,
                continuing_subword_prefix="",
                end_of_word_suffix="</w>",
                fuse_unk=False,
            )
            missing = [token for token in (START, END) if token not in vocab]
            if missing:
                raise ValueError(f"its vocabulary has no {' and no '.join(missing)}")
        except FileNotFoundError:
            raise
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{folder} has no tokenizer of a CLIP: {error}") from None
        self._tokenizer = tokenizers.Tokenizer(model)
        self._tokenizer.normalizer = normalizers.Sequence(
            [
                normalizers.NFC(),
                normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
                normalizers.Lowercase(),
            ]
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(_WORDS), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        self._tokenizer.add_special_tokens([START, END])
        self.start_id, self.end_id = vocab[START], vocab[END]
        self.vocab_size = 1 + max(vocab.values())
        content = json.dumps([sorted(vocab.items()), merges])
        self.digest = hashlib.sha256(content.encode()).hexdigest()

    def ids(self, text: str) -> list[int]:
        """Returns a text's ids with start and end, however many there are."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self.start_id, *ids, self.end_id]

    def encode(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Returns ids int32 [b, l]; a text that is too long is cut before its end mark.

        Args:
          texts: b texts; the empty one is start and end.
          length: ids of each row, 77 for the published CLIPs. A shorter text is filled
            up with the end mark, behind the first of which CLIP reads nothing.
        """
        ids_bl = np.full((len(texts), length), self.end_id, np.int32)
        for row, text in enumerate(texts):
            ids = self.ids(text)[: length - 1]
            ids_bl[row, : len(ids)] = ids
        return ids_bl


def _read(folder: pathlib.Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the pairs to be merged, in order."""
    whole, vocabulary, pairs = (folder / name for name in FILES)
    if whole.is_file():
        model = json.loads(whole.read_text("utf-8"))["model"]
        vocab, lines = model["vocab"], model["merges"]
    elif vocabulary.is_file() and pairs.is_file():
        vocab = json.loads(vocabulary.read_text("utf-8"))
        lines = pairs.read_text("utf-8").split("\n")
        lines = [line for line in lines if line and not line.startswith("#version")]
    else:
        raise FileNotFoundError(
            f"{folder} has no {FILES[0]}, nor {FILES[1]} with {FILES[2]}: take them from "
            "the folder of the same CLIP"
        )
    merges = [tuple(x.split(" ") if isinstance(x, str) else x) for x in lines]
    return dict(vocab), merges
