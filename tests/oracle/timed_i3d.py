"""I3D in PyTorch, from uint8 pixels to logits, timed.

Run by the peers' Python: `python timed_i3d.py FOLDER THREADS`; see timed.py. It works as
i3d_clips.py does, on FOLDER/config.json's number of clips, and writes what that writes
before it serves. An operation is how many clips are computed at a time and in which layout
of memory, as `4_channels_last`.
"""

import functools
import json
import pathlib
import sys

import i3d_clips
import timed
import torch
import torch_i3d


def main(folder: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    folder = pathlib.Path(folder)
    count = json.loads((folder / "config.json").read_text())["clips"]
    video = i3d_clips.write(folder, count)
    operations = {}
    for layout, kind in i3d_clips.FORMATS.items():
        model = torch_i3d.random_i3d("piergiaj", 1e-5).to(memory_format=kind)
        for batch in (1, 4):
            operations[f"{batch}_{layout}"] = functools.partial(
                i3d_clips.logits, model, video, batch, layout
            )
    timed.serve(folder, operations)


if __name__ == "__main__":
    main(*sys.argv[1:])
