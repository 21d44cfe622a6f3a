"""Cached text states: a frozen text encoder's output for each caption, computed once.

A folder holds text_states.array_record-* files with one record for each distinct text:
its states without padding, as safetensors bytes, keyed by a hash of its token ids.
`text_states.json` names the encoder, the tokenizer, the captions and the preprocessing
that they come from. The null text is always included. Opening a cache of another encoder
or other captions raises an error.

Letters: b batch, l tokens, d width.
"""

import dataclasses
import hashlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from sora_jax.data import array_files, caches, captions
from sora_jax.data import tokenizer as tokenizers

_NAME = "text_states"
MANIFEST = f"{_NAME}.json"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16)}
_SHORTEST = 16  # tokens; no batch is padded to fewer

# encode(ids int32[b, l], mask bool[b, l]) -> states [b, l, d], in the stored type
Encode = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRecord:
    """One text's states [l, d], without padding; `id` is the `key` of its token ids."""

    id: str
    states: np.ndarray


def key(ids_l: np.ndarray) -> str:
    """Returns a text's key: the hash of its ids without padding, 32 hex digits."""
    return hashlib.sha256(np.asarray(ids_l, "<i4").tobytes()).hexdigest()[:32]


def write(
    out_dir: str | os.PathLike,
    texts: Iterable[str],
    tokenizer: tokenizers.Tokenizer,
    encode: Encode,
    *,
    length: int,
    dim: int,
    dtype: str,
    settings: Mapping[str, Any],
    batch_size: int = 32,
    texts_per_file: int = 512,
    processes: caches.Processes = caches.Processes(),
) -> dict[str, Any]:
    """Encodes all texts and the null text; continues an interrupted run.

    Args:
      out_dir: see `caches.write`.
      texts: the captions; those with equal ids are stored once.
      tokenizer: encodes the texts to ids.
      encode: returns the states of `batch_size` texts, padded to `length` or to less.
      length: tokens that a text is cut to.
      dim: d.
      dtype: of the states, one of DTYPES.
      settings: JSON values that say where texts and states come from; `length`, `dtype`
        and the tokenizer's digest are added.
      batch_size: texts in one call of `encode`.
      texts_per_file: texts in one file, which is what an interruption can cost.
      processes: that share the folder.

    Returns:
      The manifest.

    Raises:
      ValueError: `encode` returns numbers that are not finite, or a wrong shape or type.
      OSError, ShardsError: see `caches.write`.
    """
    settings = {
        "tokenizer": tokenizer.digest,
        "length": length,
        "dtype": dtype,
        "texts_per_file": texts_per_file,
        **settings,
    }
    texts = list(dict.fromkeys(texts))
    if processes.index == 0 and texts:
        tokens = [len(tokenizer.ids(text)) for text in texts]
        captions.warn_of_cut(tokens, length, "--text_length")
    # Sorted, so that the texts of a batch have similar lengths and need little padding.
    files = [
        [*itertools.batched(sorted(ids, key=len), batch_size)]
        for ids in itertools.batched(
            _distinct(texts, tokenizer, length), texts_per_file
        )
    ]
    source = _Source(settings, files, tokenizer, encode, length, dim, dtype, batch_size)
    return caches.write(out_dir, source, processes)


def _distinct(texts, tokenizer, length: int) -> list[np.ndarray]:
    """The ids without padding of the null text and of all distinct texts."""
    distinct: dict[bytes, np.ndarray] = {}
    for text in ("", *texts):
        ids_1l, mask_1l = tokenizer.encode([text], length)
        ids = ids_1l[0][mask_1l[0]]
        distinct.setdefault(ids.tobytes(), ids)
    return [*distinct.values()]


@dataclasses.dataclass(frozen=True)
class _Source:
    """Texts as a `caches.Source`: items are ids without padding, batches lists of them."""

    settings: Mapping[str, Any]
    files: Sequence[Sequence[Sequence[np.ndarray]]]
    tokenizer: tokenizers.Tokenizer
    encode_texts: Encode
    length: int
    dim: int
    dtype: str
    batch_size: int
    name, unit = _NAME, "captions"

    def read(self, batch, summary):
        del summary
        return batch

    def encode(self, items, summary):
        del summary
        ids_bl = np.full(
            (self.batch_size, self.cost(items)), self.tokenizer.pad_id, np.int32
        )
        mask_bl = np.zeros(ids_bl.shape, bool)
        for row in range(self.batch_size):
            ids = items[min(row, len(items) - 1)]
            ids_bl[row, : len(ids)] = ids
            mask_bl[row, : len(ids)] = True
        states_bld = np.asarray(self.encode_texts(ids_bl, mask_bl))[: len(items)]
        shape = (len(items), self.cost(items), self.dim)
        if states_bld.shape != shape or states_bld.dtype != DTYPES[self.dtype]:
            raise ValueError(
                f"encode returned {states_bld.dtype} {states_bld.shape}; states of "
                f"these texts are {self.dtype} {shape}"
            )
        if not np.isfinite(states_bld.astype(np.float32)).all():
            text = self.tokenizer.decode(items[0])
            raise ValueError(
                f"states in the batch that begins with {text!r} are not finite"
            )
        return states_bld

    def pack(self, item, array):
        states_ld = np.ascontiguousarray(array[: len(item)])
        entry = {
            "id": key(item),
            "sha256": hashlib.sha256(states_ld.tobytes()).hexdigest(),
            "shape": list(states_ld.shape),
        }
        return safetensors.numpy.save({"states": states_ld}), entry

    def cost(self, batch):
        """Tokens that a batch is padded to: a power of two, so that few programs are
        compiled."""
        longest = max(_SHORTEST, *map(len, batch))
        return min(self.length, 1 << (longest - 1).bit_length())

    def nbytes(self, batches, items, arrays):
        del items, arrays
        tokens = sum(len(ids) for batch in batches for ids in batch)
        return tokens * self.dim * DTYPES[self.dtype].itemsize

    def describe(self, summaries):
        del summaries
        return {"dim": self.dim}


class TextStates(caches.Cache):
    """A finished cache; `[i]` is a verified `TextRecord`, `padded` finds a text's states."""

    def __init__(
        self, folder: pathlib.Path, manifest: dict[str, Any], memory_bytes: int
    ):
        super().__init__(folder, manifest, memory_bytes)
        self._places = {self.entry(index)["id"]: index for index in range(len(self))}

    def nbytes_of(self, record: TextRecord) -> int:
        return record.states.nbytes

    def padded(self, ids_l: np.ndarray, mask_l: np.ndarray) -> np.ndarray:
        """Returns the states [l, d] of a text, zero at padding.

        Args:
          ids_l: its ids, padded at the end.
          mask_l: true at the ids.

        Raises:
          CorruptRecord: the states are damaged.
          ShardsError: the cache does not hold them.
        """
        wanted = key(ids_l[mask_l])
        if wanted not in self._places:
            raise array_files.ShardsError(
                f"{self.folder} has no states of the token ids {ids_l[mask_l].tolist()}"
            )
        stored_ld = self[self._places[wanted]].states
        states_ld = np.zeros((len(ids_l), stored_ld.shape[1]), stored_ld.dtype)
        states_ld[: len(stored_ld)] = stored_ld
        return states_ld

    def parse(self, raw: bytes, entry: Mapping[str, Any]) -> TextRecord:
        _, content = caches.split(raw, entry, "states")
        dtype = DTYPES[self.manifest["settings"]["dtype"]]
        states_ld = np.frombuffer(content, dtype).reshape(entry["shape"])
        return TextRecord(id=entry["id"], states=states_ld)


def open(
    folder: str | os.PathLike,
    *,
    tiers: Iterable[str] = (),
    memory_bytes: int = 1 << 30,
    **settings: Any,
) -> TextStates:
    """Opens a finished cache of text states.

    Args:
      folder: written by `write`.
      tiers: captions of these tiers must be in it.
      memory_bytes: how much of the cache may be kept in memory.
      **settings: values that the cache's settings must have: `text_encoder`,
        `tokenizer`, `captions`, `length`, `clean`.

    Raises:
      ShardsError: the cache is missing or unfinished, or its settings differ.
    """
    folder = pathlib.Path(folder)
    advice = "delete that folder, and prepare them again or train without them"
    manifest = caches.read_manifest(folder, _NAME, settings, advice)
    stored = manifest["settings"]
    if lacking := sorted(set(tiers) - set(stored.get("tiers", ()))):
        raise array_files.ShardsError(
            f"the text states in {folder} are of captions of the tiers "
            f"{stored.get('tiers')}, without {lacking}: {advice}"
        )
    return TextStates(folder, manifest, memory_bytes)
