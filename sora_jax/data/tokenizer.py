"""Text to token ids with sentencepiece, with T5's conventions.

The class reads the tokenizers that `train` writes as well as the `spiece.model` of a UMT5
folder; the ids of padding, end and unknown come from the model.

Letters: b batch, l length.
"""

import functools
import hashlib
import html
import importlib
import importlib.util
import io
import os
import pathlib
import threading
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import sentencepiece

from sora_jax.core import digests, paths
from sora_jax.data import samples

# The pieces that are not words: pad, eos, unk and one for each byte.
_FIXED_PIECES = 3 + 256
_CACHED_TEXTS = 200_000
_MOST_TEXTS = 1_000_000  # to train a tokenizer on


def train(
    texts: Iterable[str], path: str | os.PathLike, vocab_size: int = 1024
) -> "Tokenizer":
    """Trains a byte pair tokenizer and writes it to a file.

    Byte pair encoding (arXiv 1508.07909) with byte fallback, so that any text can be
    encoded. A unigram model breaks the most common words of a small corpus into letters
    ("m a gent a"), and a model learns a word much faster as one piece. The same texts in
    any order give the same bytes; of more than a million texts, a million are used,
    spread over the sorted list. A small corpus gets a smaller vocabulary.

    Args:
      texts: the captions; equal ones count as often as they occur.
      path: the file to write.
      vocab_size: the most pieces, including the 259 for padding, end, unknown and bytes.

    Raises:
      ValueError: there is no text, or vocab_size leaves no room for words.
    """
    if vocab_size < _FIXED_PIECES + 32:
        raise ValueError(
            f"a vocabulary needs at least {_FIXED_PIECES + 32} pieces "
            f"({_FIXED_PIECES} are bytes and marks), not {vocab_size}"
        )
    lines = sorted(text for text in map(str.strip, texts) if text)
    if not lines:
        raise ValueError("there is no caption to train the tokenizer on")
    lines = [lines[index] for index in samples.evenly(len(lines), _MOST_TEXTS)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        max_sentence_length=1 << 16,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    digests.store(path, model.getvalue())
    return Tokenizer(path)


# A folder's tokenizer; if a T5 folder has both, diffusers reads the first.
FILES = ("tokenizer.json", "spiece.model", "tokenizer.model")


def find(folder: str | os.PathLike) -> pathlib.Path:
    """The tokenizer's file in a run folder or in a peer's tokenizer folder.

    Raises:
      FileNotFoundError: the folder has no tokenizer.
    """
    for name in FILES:
        if (found := pathlib.Path(folder) / name).is_file():
            return found
    raise FileNotFoundError(f"{folder} has no {', '.join(FILES[:-1])} or {FILES[-1]}")


def load(path: str | os.PathLike, clean_texts: bool = False) -> "Tokenizer":
    """Reads a sentencepiece model or a `tokenizer.json`.

    Args:
      path: the file, or its folder.
      clean_texts: whether texts are cleaned first, as `clean` does.
    """
    path = pathlib.Path(path)
    path = find(path) if path.is_dir() else path
    kind = JsonTokenizer if path.suffix == ".json" else Tokenizer
    return kind(path, clean_texts)


def clean(text: str) -> str:
    """Cleans a text as Wan's pipelines do before tokenizing.

    Broken encodings are repaired if ftfy is installed, HTML is unescaped twice, and white
    space becomes single spaces.
    """
    return " ".join(html.unescape(html.unescape(_mender()(text))).split())


@functools.cache
def _mender() -> Callable[[str], str]:
    if importlib.util.find_spec("ftfy"):
        return importlib.import_module("ftfy").fix_text
    return str


class Tokenizer:
    """Encodes texts to padded ids; caches the ids of texts.

    Args:
      path: the file.
      clean_texts: whether texts are cleaned first, as `clean` does.

    Attributes:
      digest: SHA-256 of the model, hex.
      vocab_size: number of ids.
      pad_id, eos_id, unk_id: 0, 1 and 2 for ours.

    Raises:
      ValueError: the file is not a sentencepiece model, or lacks padding or end.
    """

    file_name = "spiece.model"

    def __init__(self, path: str | os.PathLike, clean_texts: bool = False):
        self._clean_texts = clean_texts
        self._load(digests.read(path, required=False), str(path))

    def _load(self, model: bytes, name: str) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(f"{name} is not a sentencepiece model: {error}") from None
        self.digest = hashlib.sha256(model).hexdigest()
        self.vocab_size = self._processor.vocab_size()
        self.pad_id = self._processor.pad_id()
        self.eos_id = self._processor.eos_id()
        self.unk_id = self._processor.unk_id()
        if min(self.pad_id, self.eos_id) < 0:
            raise ValueError(
                f"{name} has no piece for padding or for the end of a text"
            )
        self._ids: dict[str, tuple[int, ...]] = {}
        self._caching = threading.Lock()

    def __getstate__(self) -> dict:
        return {"model": self._model, "clean_texts": self._clean_texts}

    def __setstate__(self, state: dict) -> None:
        self._clean_texts = state["clean_texts"]
        self._load(state["model"], "the tokenizer")

    def save(self, folder: str | os.PathLike) -> None:
        """Writes a `tokenizer.json`, and the model's own bytes, into a peer's folder."""
        folder = pathlib.Path(folder)
        paths.write_atomically(folder / self.file_name, self._model)
        if self.file_name != "tokenizer.json":
            paths.write_atomically(folder / "tokenizer.json", _to_json(self._model))

    def ids(self, text: str) -> tuple[int, ...]:
        """Returns a text's ids with the end mark, neither cut nor padded."""
        ids = self._ids.get(text)
        if ids is None:
            cleaned = clean(text) if self._clean_texts else text
            ids = (*self._encode(cleaned), self.eos_id)
            with self._caching:
                if len(self._ids) >= _CACHED_TEXTS:
                    self._ids.clear()
                self._ids[text] = ids
        return ids

    def _encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode(
        self, texts: Sequence[str], length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts; one that is too long is cut and still ends with the end mark.

        Args:
          texts: b texts.
          length: ids of each row.

        Returns:
          ids int32[b, l], padded with pad_id, and mask bool[b, l], true at the ids. The
          empty text is a single end mark.
        """
        if isinstance(texts, str):
            raise TypeError("encode takes a list of texts, not one text")
        ids_bl = np.full((len(texts), length), self.pad_id, np.int32)
        mask_bl = np.zeros((len(texts), length), bool)
        for row, text in enumerate(texts):
            ids = self.ids(text)
            if len(ids) > length:
                ids = (*ids[: length - 1], self.eos_id)
            ids_bl[row, : len(ids)] = ids
            mask_bl[row, : len(ids)] = True
        return ids_bl, mask_bl

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids up to the first end mark, without padding."""
        kept = []
        for index in ids:
            if index == self.eos_id:
                break
            if index != self.pad_id:
                kept.append(int(index))
        return self._processor.decode(kept)


def _to_json(model: bytes) -> str:
    """Converts a sentencepiece model for the tokenizers library, with the same ids.

    Pairs whose concatenation is a piece are merged, the best piece first, as
    sentencepiece does.
    """
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2 as proto

    spec = proto.ModelProto()
    spec.ParseFromString(model)
    names = [piece.piece for piece in spec.pieces]
    unk = spec.trainer_spec.unk_id
    fallback = spec.trainer_spec.byte_fallback
    if spec.trainer_spec.model_type == proto.TrainerSpec.BPE:
        ids = {name: index for index, name in enumerate(names)}
        best_first = sorted(spec.pieces, key=lambda piece: -piece.score)
        merges = [
            (piece.piece[:cut], piece.piece[cut:])
            for piece in best_first
            if piece.type == piece.NORMAL
            for cut in range(1, len(piece.piece))
            if piece.piece[:cut] in ids and piece.piece[cut:] in ids
        ]
        made = tokenizers.models.BPE(
            ids, merges, unk_token=names[unk], fuse_unk=True, byte_fallback=fallback
        )
    else:
        scored = [(piece.piece, piece.score) for piece in spec.pieces]
        made = tokenizers.models.Unigram(scored, unk_id=unk, byte_fallback=fallback)
    whole = tokenizers.Tokenizer(made)
    normal = tokenizers.normalizers
    charsmap = spec.normalizer_spec.precompiled_charsmap
    steps = [normal.Precompiled(charsmap)] if charsmap else []
    steps += [normal.Strip(), normal.Replace(tokenizers.Regex(" {2,}"), " ")]
    whole.normalizer = normal.Sequence(steps)
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    whole.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Metaspace(),
            tokenizers.decoders.Fuse(),
        ]
    )
    eos = spec.trainer_spec.eos_id
    whole.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {names[eos]}", special_tokens=[(names[eos], eos)]
    )
    special = {unk, eos, spec.trainer_spec.pad_id}
    whole.add_special_tokens([names[index] for index in sorted(special)])
    return whole.to_str()


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` of a T5 folder, read by the tokenizers library.

    Raises:
      ValueError: the library is not installed or cannot read the file, or `<pad>` or
        `</s>` is missing.
    """

    file_name = "tokenizer.json"

    def _load(self, model: bytes, name: str) -> None:
        try:
            import tokenizers
        except ImportError:
            raise ValueError(
                f"{name} needs the tokenizers library: pip install tokenizers"
            ) from None
        self._model = model
        try:
            self._processor = tokenizers.Tokenizer.from_str(model.decode())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library's panics are not Exceptions
            raise ValueError(
                f"{name} is damaged, or newer than the tokenizers library, version "
                f"{tokenizers.__version__}, reads: {error}"
            ) from None
        self._processor.no_truncation()
        self._processor.no_padding()
        self.digest = hashlib.sha256(model).hexdigest()
        self.vocab_size = 1 + max(self._processor.get_vocab().values())
        special_ids = [
            self._processor.token_to_id(t) for t in ("<pad>", "</s>", "<unk>")
        ]
        if None in special_ids[:2]:
            raise ValueError(f"{name} has no <pad> or no </s>")
        self.pad_id, self.eos_id, self.unk_id = special_ids
        self._ids: dict[str, tuple[int, ...]] = {}
        self._caching = threading.Lock()

    def _encode(self, text: str) -> list[int]:
        return self._processor.encode(text, add_special_tokens=False).ids
