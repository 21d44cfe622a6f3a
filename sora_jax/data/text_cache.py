"""Cached text states: what a frozen text encoder makes of each caption, computed once.

A folder holds text_states.array_record-* files with one record for each different text:
its states without padding, as safetensors bytes, under the name that its token ids give
it. `text_states.json` says which encoder, which tokenizer, which captions and which
preprocessing they come from. The null text is always among them. A cache of others is
refused with the reason.

Letters: b batch, l tokens, d width.
"""

import dataclasses
import hashlib
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from sora_jax.data import array_files, caches, captions, tokenizer

MANIFEST = "text_states.json"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16)}
_SHORTEST = 16  # tokens that a batch is padded to at least

# encode(ids int32[b, l], mask bool[b, l]) -> states [b, l, d], as they are stored
Encode = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRecord:
    """One text's states [l, d], of its tokens only; `id` is the `name` of their ids."""

    id: str
    states: np.ndarray


def name(ids_l: np.ndarray) -> str:
    """Returns the name of a text: the hash of its ids without padding, 32 hex digits."""
    return hashlib.sha256(np.asarray(ids_l, "<i4").tobytes()).hexdigest()[:32]


def write(
    out_dir: str | os.PathLike,
    texts: Iterable[str],
    pieces: tokenizer.Tokenizer,
    encode: Encode,
    *,
    length: int,
    dim: int,
    dtype: str,
    settings: Mapping[str, Any],
    batch_size: int = 32,
    texts_per_file: int = 512,
    process: int = 0,
    num_processes: int = 1,
    barrier: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Encodes all texts, and the null text; goes on where it was interrupted.

    Before the work begins, a batch is timed, and what all of them will take is printed.

    Args:
      out_dir: a new folder, one that an interrupted run has left, or a finished one.
      texts: the captions; of those with the same ids one is kept.
      pieces: the tokenizer.
      encode: gives the states of `batch_size` texts, padded to `length` or to less.
      length: tokens that a text is cut to.
      dim: d.
      dtype: of the states, one of DTYPES.
      settings: JSON values that say where texts and states come from; `length`, `dtype`
        and the tokenizer are added.
      batch_size: texts in one call of `encode`.
      texts_per_file: texts in one file; what an interruption can cost.
      process, num_processes, barrier: see `caches.write`.

    Returns:
      The manifest.

    Raises:
      OSError: the disk has no room for what is to come; nothing was written yet.
      ShardsError: the folder belongs to another encoder, other texts or other settings.
      ValueError: `encode` gives something that is not finite or has a wrong shape.
    """
    out = pathlib.Path(out_dir)
    stated = {
        "format": array_files.FORMAT,
        "tokenizer": pieces.digest,
        "length": length,
        "dtype": dtype,
        "texts_per_file": texts_per_file,
        **settings,
    }
    texts = list(dict.fromkeys(texts))
    if process == 0 and texts:
        tokens = [len(pieces.pieces(text)) for text in texts]
        captions.warn_of_cut(tokens, length, "--text_length")
    different = _different(texts, pieces, length)
    # Texts of a batch are about as long, so that little of it is padding.
    parts = [
        sorted(different[start : start + texts_per_file], key=len)
        for start in range(0, len(different), texts_per_file)
    ]

    def forecast(missing):
        widths = [
            _width(batch, length)
            for part in missing
            for batch in _batches(part, batch_size)
        ]
        if len(widths) < caches.FEW:
            return
        texts = [text for part in missing for text in part]
        middle = _batches(missing[0], batch_size)[len(missing[0]) // batch_size // 2]
        _padded_states(middle, encode, batch_size, length, pieces.pad_id)  # compiles
        began = time.monotonic()
        _padded_states(middle, encode, batch_size, length, pieces.pad_id)
        seconds = (time.monotonic() - began) * sum(widths) / _width(middle, length)
        here = sum(map(len, texts)) * dim * DTYPES[dtype].itemsize
        work = f"{len(texts)} captions"
        whole = here * num_processes
        caches.announce(out, "text states", work, seconds, here, whole)

    def encoded(part, summary, bar):
        del summary
        for batch in _batches(part, batch_size):
            states_bld = _padded_states(
                batch, encode, batch_size, length, pieces.pad_id
            )
            shape = (len(batch), _width(batch, length), dim)
            if states_bld.shape != shape or states_bld.dtype != DTYPES[dtype]:
                raise ValueError(
                    f"encode gave {states_bld.dtype} {states_bld.shape}; states of "
                    f"these texts are {dtype} {shape}"
                )
            if not np.isfinite(states_bld.astype(np.float32)).all():
                text = pieces.decode(batch[0])
                raise ValueError(f"states of {text!r} and on are not finite")
            for ids, states_ld in zip(batch, states_bld, strict=True):
                yield _pack(ids, states_ld[: len(ids)])
            bar.update(len(batch))

    return caches.write(
        out,
        MANIFEST,
        array_files.plain(stated),
        parts,
        prefix="text_states",
        unit="captions",
        forecast=forecast,
        encode=encoded,
        describe=lambda summaries: {"dim": dim},
        process=process,
        num_processes=num_processes,
        barrier=barrier,
    )


def _different(texts, pieces, length: int) -> list[np.ndarray]:
    """The null text's ids and those of all others, once each, without padding."""
    found: dict[bytes, np.ndarray] = {}
    for text in ("", *texts):
        ids_1l, mask_1l = pieces.encode([text], length)
        ids = ids_1l[0][mask_1l[0]]
        found.setdefault(ids.tobytes(), ids)
    return [*found.values()]


def _batches(part: Sequence[np.ndarray], batch_size: int) -> list[list[np.ndarray]]:
    starts = range(0, len(part), batch_size)
    return [[*part[start : start + batch_size]] for start in starts]


def _width(batch: Sequence[np.ndarray], length: int) -> int:
    """Tokens that a batch is padded to: a power of two, so that programs are few."""
    longest = max(_SHORTEST, *map(len, batch))
    return min(length, 1 << (longest - 1).bit_length())


def _padded_states(batch, encode, batch_size: int, length: int, pad_id: int):
    """Encodes a batch, padded in both directions: [b, l, d] of its own texts."""
    ids_bl = np.full((batch_size, _width(batch, length)), pad_id, np.int32)
    mask_bl = np.zeros(ids_bl.shape, bool)
    for row in range(batch_size):
        ids = batch[min(row, len(batch) - 1)]
        ids_bl[row, : len(ids)] = ids
        mask_bl[row, : len(ids)] = True
    return np.asarray(encode(ids_bl, mask_bl))[: len(batch)]


def _pack(ids: np.ndarray, states_ld: np.ndarray):
    states_ld = np.ascontiguousarray(states_ld)
    entry = {
        "id": name(ids),
        "sha256": hashlib.sha256(states_ld.tobytes()).hexdigest(),
        "shape": list(states_ld.shape),
    }
    return safetensors.numpy.save({"states": states_ld}), entry


class TextStates(caches.Cache):
    """A finished cache; `[i]` gives a verified `TextRecord`, `padded` a text's states."""

    def __init__(
        self, folder: pathlib.Path, manifest: dict[str, Any], memory_bytes: int
    ):
        super().__init__(folder, manifest, memory_bytes)
        self._places = {self.entry(index)["id"]: index for index in range(len(self))}

    def nbytes_of(self, record: TextRecord) -> int:
        return record.states.nbytes

    def padded(self, ids_l: np.ndarray, mask_l: np.ndarray) -> np.ndarray:
        """Returns the states [l, d] of a text, zero where there is no token.

        Args:
          ids_l: its ids, padded at the end.
          mask_l: true at the ids.

        Raises:
          CorruptRecord: they are damaged.
          ShardsError: the cache does not have them.
        """
        asked = name(ids_l[mask_l])
        if asked not in self._places:
            raise array_files.ShardsError(
                f"{self.folder} has no states of the token ids {ids_l[mask_l].tolist()}"
            )
        found_ld = self[self._places[asked]].states
        states_ld = np.zeros((len(ids_l), found_ld.shape[1]), found_ld.dtype)
        states_ld[: len(found_ld)] = found_ld
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
      folder: what `write` has written.
      tiers: captions of these tiers must be in it.
      memory_bytes: how much of the cache may stay in memory.
      **settings: what the states must come from, each under its name in the settings:
        `text_encoder`, `tokenizer`, `captions`, `length`, `clean`.

    Raises:
      ShardsError: there is none, or it comes from something else.
    """
    folder = pathlib.Path(folder)
    manifest = array_files.read_manifest(folder, MANIFEST, "text states")
    stated = manifest["settings"]
    again = "delete that folder, and prepare them again or train without them"
    for what, asked in settings.items():
        if stated[what] != asked:
            raise array_files.ShardsError(
                f"the text states in {folder} come from {what.replace('_', ' ')} "
                f"{str(stated[what])[:12]}, not {str(asked)[:12]}: {again}"
            )
    if lacking := sorted(set(tiers) - set(stated.get("tiers", ()))):
        raise array_files.ShardsError(
            f"the text states in {folder} are of captions of the tiers "
            f"{stated.get('tiers')}, without {lacking}: {again}"
        )
    return TextStates(folder, manifest, memory_bytes)
