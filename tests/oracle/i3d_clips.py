"""What I3D in PyTorch makes of small clips, from uint8 pixels to logits.

Run by the peers' Python: `python i3d_clips.py FOLDER COUNT` writes random weights
(FOLDER/piergiaj.safetensors, epsilon 1e-5), COUNT clips of 16 x 64 x 64 and their logits
(FOLDER/clips.safetensors). Pixels are resized and scaled as CD-FVD's code does it.
"""

import pathlib
import sys

import torch
import torch_i3d
from safetensors.torch import save_file
from torch.nn import functional

FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last_3d,
}


@torch.inference_mode()
def logits(model, video, batch: int, layout: str = "contiguous"):
    """Of clips [b, 3, t, h, w] of uint8, some at a time."""
    found = []
    for chunk in video.split(batch):
        b, c, t, h, w = chunk.shape
        frames = chunk.transpose(1, 2).reshape(b * t, c, h, w).float()
        frames = functional.interpolate(
            frames, size=(224, 224), mode="bilinear", align_corners=False
        )
        x = frames.view(b, t, c, 224, 224).transpose(1, 2) * 2 / 255 - 1
        found.append(model(x.contiguous(memory_format=FORMATS[layout]))[0])
    return torch.cat(found)


def write(folder: pathlib.Path, count: int) -> torch.Tensor:
    """Writes weights, clips and their logits; returns the clips."""
    model = torch_i3d.random_i3d("piergiaj", 1e-5)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "piergiaj.safetensors")
    generator = torch.Generator().manual_seed(1)
    shape = (count, 3, 16, 64, 64)
    video = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    found = {"video": video, "logits": logits(model, video, 4, "channels_last")}
    save_file(found, folder / "clips.safetensors")
    return video


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
