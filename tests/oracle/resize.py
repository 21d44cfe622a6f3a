"""Writes what torch makes of clips of several sizes, resized in every way of ours.

Run by the peers' Python: `python resize.py OUT` writes OUT (safetensors): NUMBER/in is a
clip [frames, channels, height, width] of values to 255 and NUMBER/METHOD its resized
frames. TensorFlow 1's way is computed from its formula by gathering pixels.
"""

import sys

import torch
from safetensors.torch import save_file
from torch.nn import functional

SIZES = (((64, 64), 224), ((33, 47), 24), ((7, 5), 32), ((224, 300), 224))


def gather_tf(x, size):
    """Reads at i * scale, the source's pixel 0 at 0, and clamps at the last pixel."""
    for axis in (2, 3):
        count = x.shape[axis]
        at = torch.arange(size, dtype=torch.float32) * (count / torch.tensor(size))
        low = at.floor().long()
        high = (low + 1).clamp(max=count - 1)
        shape = [1, 1, 1, 1]
        shape[axis] = size
        part = (at - low).view(shape)
        low, high = x.index_select(axis, low), x.index_select(axis, high)
        x = low + (high - low) * part
    return x


def main(out: str) -> None:
    torch.manual_seed(0)
    found = {}
    for number, (shape, size) in enumerate(SIZES):
        x = torch.rand(2, 3, *shape) * 255
        at = {"size": (size, size), "align_corners": False}
        found |= {
            f"{number}/in": x,
            f"{number}/tf": gather_tf(x, size),
            f"{number}/half_pixel": functional.interpolate(x, mode="bilinear", **at),
            f"{number}/align_corners": functional.interpolate(
                x, mode="bilinear", **at | {"align_corners": True}
            ),
            f"{number}/bicubic": functional.interpolate(
                x, mode="bicubic", antialias=True, **at
            ),
        }
    save_file({k: v.contiguous() for k, v in found.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
