"""torchcodec's decoding of clips of a video, timed.

Run by a Python that has torch and torchcodec: `python timed_decoding.py FOLDER THREADS`;
see timed.py. FOLDER/config.json has the video, the clips' length, the size (height, width)
of the result, the first frames of clips at random, and those of clips one after another.
Frames are scaled by torchcodec's own transform, then normalised to [-1, 1]; those called
`whole` are not scaled, and are there to be compared.
"""

import json
import pathlib
import sys

import timed
import torch
from torchcodec import transforms
from torchcodec.decoders import VideoDecoder


def main(folder: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    folder = pathlib.Path(folder)
    config = json.loads((folder / "config.json").read_text())
    length = config["length"]

    def opened(scaled=True):
        return VideoDecoder(
            config["video"],
            num_ffmpeg_threads=int(threads),
            seek_mode="approximate",  # frames are evenly spaced; without a scan
            transforms=[transforms.Resize(tuple(config["size"]))] if scaled else None,
        )

    def clip(decoder, start):
        frames = decoder.get_frames_in_range(start, start + length).data
        return frames.float().mul_(1 / 127.5).sub_(1)

    def all_of(starts, keep: bool):
        decoder = opened() if keep else None
        for start in starts:
            last = clip(decoder if keep else opened(), start)
        return last

    kept = opened()
    whole = opened(scaled=False)
    operations = {
        "contiguous_whole": lambda: clip(whole, config["contiguous"][-1]),
        "random_whole": lambda: clip(whole, config["random"][-1]),
        "contiguous": lambda: all_of(config["contiguous"], True),
        "random": lambda: all_of(config["random"], False),
        "random_kept": lambda: [clip(kept, start) for start in config["random"]][-1],
    }
    timed.serve(folder, operations)


if __name__ == "__main__":
    main(*sys.argv[1:])
