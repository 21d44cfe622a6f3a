"""Tensors of memory-mapped safetensors files.

A folder holds one file, or several with an index that says which tensor is in which.
Everything is checked when it is opened; the tensors are views of the mapped files, so
that reading a part of a tensor copies only that part.
"""

import json
import pathlib
import struct
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from sora_jax.core import digests, paths

# Types of weights; quantized ones would need scales that our layers do not have.
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
# No weight is this large: its square would overflow float32. A flipped high bit of the
# exponent turns weights below 2 into such values; safetensors has no checksum.
LIMIT = 2.0**64
_AT_ONCE = 2**18  # values, which fit in a processor's cache
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def find_impossible(array: np.ndarray) -> float | None:
    """The first value that cannot be a weight (NaN, or LIMIT or more), or None.

    Args:
      array: float32, float16 or bfloat16, contiguous.
    """
    # Without the sign, floats are ordered like their bits, with NaN above infinity; and
    # numpy compares integers many times faster than bfloat16.
    kind = np.dtype(f"u{array.itemsize}").type
    with np.errstate(over="ignore"):  # beyond float16's range
        limit = np.asarray(LIMIT).astype(array.dtype).view(kind)
    bits = array.reshape(-1).view(kind)
    sign = kind(1 << (8 * array.itemsize - 1))
    for first in range(0, bits.size, _AT_ONCE):
        wrong = (bits[first : first + _AT_ONCE] & ~sign) >= limit
        if wrong.any():
            return float(array.reshape(-1)[first + int(wrong.argmax())])
    return None


class TensorFiles(Mapping):
    """Tensors by name; each is a read-only numpy view of its file.

    Args:
      folder: of the files.
      stem: of the files' names: "diffusion_pytorch_model" for diffusers, "model" for
        transformers.

    Attributes:
      paths: of the files, an index last.

    Raises:
      FileNotFoundError: there is no such file, or one that the index names is missing.
      ValueError: a file is damaged, is not a safetensors file, or holds values of a type
        that weights do not have.
    """

    def __init__(self, folder: pathlib.Path, stem: str):
        index = folder / f"{stem}.safetensors.index.json"
        single = folder / f"{stem}.safetensors"
        self._views: dict[str, np.ndarray] = {}
        self._where: dict[str, str] = {}  # the file of each tensor
        if index.is_file():
            placed = _read_index(index)
            names = sorted(set(placed.values()))
            self.paths = (*(folder / name for name in names), index)
            for path in self.paths[:-1]:
                self._open(path)
            _compare(index, placed, self._where)
        elif single.is_file():
            self.paths = (single,)
            self._open(single)
        else:
            pickles = sorted(p.name for p in folder.glob("*") if p.suffix in _PICKLES)
            hint = (
                f"; {pickles[0]} is a pickle, which could run code" if pickles else ""
            )
            raise FileNotFoundError(f"{folder} has no {single.name}{hint}")

    def _open(self, path: pathlib.Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, but the index names it")
        try:
            with safetensors.safe_open(path, "numpy") as whole:
                whole.keys()
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path} is damaged or not a safetensors file: {error}"
            ) from None
        except OSError as error:  # its message does not name the file
            raise type(error)(f"{path} cannot be read: {error}") from None
        pages = np.memmap(path, np.uint8, "r")
        (length,) = struct.unpack("<Q", pages[:8].tobytes())
        header = json.loads(pages[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        wrong = {n: e["dtype"] for n, e in header.items() if e["dtype"] not in DTYPES}
        if wrong:
            name, kind = next(iter(wrong.items()))
            raise ValueError(
                f"{path}: {name} has numbers of type {kind} (as {len(wrong)} tensors "
                f"have); weights are {', '.join(DTYPES)}"
            )
        for name, entry in header.items():
            if len(name) > 256 or not name.isprintable():
                raise ValueError(
                    f"{path} is damaged: {name[:80]!r} is not a tensor's name"
                )
            if name in self._views:
                raise ValueError(f"{path}: {name} is in another file as well")
            first, last = entry["data_offsets"]
            flat = pages[8 + length + first : 8 + length + last]
            if len(flat) and (8 + length + first) % DTYPES[entry["dtype"]].itemsize:
                flat = flat.copy()  # an unaligned file: rare and small
            view = flat.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
            self._views[name] = view
        self._where |= dict.fromkeys(header, path.name)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._views[name]

    def __iter__(self):
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)


def read_json(path: pathlib.Path, *, is_peers: bool = False) -> dict:
    """Reads a JSON file of a folder of weights.

    Args:
      path: the file.
      is_peers: it has no digest, though its folder may hold digests of other files.

    Raises:
      FileNotFoundError, ValueError: it is missing, damaged, or not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    content = path.read_bytes() if is_peers else digests.read(path, required=False)
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is damaged: it is not a JSON object")
    return fields


def exist(folder: pathlib.Path, stem: str) -> bool:
    """Whether a folder has tensors under this stem."""
    names = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
    return any((folder / name).is_file() for name in names)


def _read_index(path: pathlib.Path) -> dict[str, str]:
    placed = read_json(path).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ValueError(f"{path} is not an index of tensors: it has no weight_map")
    files = [*placed.values()]
    for name in files:
        plain = isinstance(name, str) and pathlib.PurePath(name).name == name
        if not plain or not name.endswith(".safetensors"):
            raise ValueError(
                f"{path} names {name!r}; a file of weights must be in the folder of the "
                "index and end in .safetensors"
            )
    return placed


def _compare(index: pathlib.Path, placed: Mapping, found: Mapping) -> None:
    wrong = [f"{n} is not in {f}" for n, f in placed.items() if found.get(n) != f]
    wrong += [f"{n} of {f} is not named" for n, f in found.items() if n not in placed]
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise ValueError(f"{index} is wrong: {'; '.join(wrong[:5])}{more}")


def write(
    folder: pathlib.Path, stem: str, tensors: Mapping, max_bytes: int = 5 * 10**9
) -> None:
    """Writes tensors as one safetensors file, or as several with an index.

    Only one file's tensors are on the host at a time.

    Args:
      folder: to write to; it is created.
      stem: of the files' names.
      tensors: arrays of one of DTYPES by name, on any device.
      max_bytes: of one file, where no single tensor is larger.
    """
    files, room = [[]], max_bytes
    for name, array in tensors.items():
        if array.nbytes > room and files[-1]:
            files.append([])
            room = max_bytes
        files[-1].append(name)
        room -= array.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    placed = {}
    for number, names in enumerate(files, 1):
        file = f"{stem}.safetensors"
        if len(files) > 1:
            file = f"{stem}-{number:05d}-of-{len(files):05d}.safetensors"
        _write_file(folder / file, {name: tensors[name] for name in names})
        placed |= dict.fromkeys(names, file)
    if len(files) > 1:
        total = sum(array.nbytes for array in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        paths.write_atomically(folder / f"{stem}.safetensors.index.json", text)


def _write_file(path: pathlib.Path, tensors: Mapping) -> None:
    host = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with paths.replacing(path) as partial:
        try:
            # Peers refuse a file that does not say for whom it was written.
            safetensors.numpy.save_file(host, partial, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise paths.error_of(str(error), path) from error
