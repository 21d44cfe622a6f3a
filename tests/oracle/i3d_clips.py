"""What I3D in PyTorch makes of small clips, from uint8 pixels to logits.

Run by the peers' Python: `python i3d_clips.py FOLDER COUNT` writes random weights
(FOLDER/piergiaj.safetensors, epsilon 1e-5), COUNT clips of 16 x 64 x 64 and their logits
(FOLDER/clips.safetensors). Pixels are resized and scaled as CD-FVD's code does it.

`python i3d_clips.py FOLDER COUNT THREADS` goes on as a server for the bench: a line of
standard input, which is a number of clips at a time and "channels_last" or
"contiguous", has all clips computed once more, and the seconds are written as a line.
"""

import pathlib
import sys
import time

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


def main(folder: str, count: str, threads: str | None = None) -> None:
    folder = pathlib.Path(folder)
    if threads:
        torch.set_num_threads(int(threads))
    model = torch_i3d.random_i3d("piergiaj", 1e-5)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "piergiaj.safetensors")
    generator = torch.Generator().manual_seed(1)
    shape = (int(count), 3, 16, 64, 64)
    video = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    found = {"video": video, "logits": logits(model, video, 4, "channels_last")}
    save_file(found, folder / "clips.safetensors")
    if not threads:
        return
    models = {
        name: torch_i3d.random_i3d("piergiaj", 1e-5).to(memory_format=kind)
        for name, kind in FORMATS.items()
    }
    print("ready", flush=True)
    for line in sys.stdin:
        batch, layout = line.split()
        began = time.perf_counter()
        logits(models[layout], video, int(batch), layout)
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
