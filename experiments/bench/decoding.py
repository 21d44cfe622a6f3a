"""Times decoding, scaling and normalising clips of 17 frames beside PyAV and torchcodec.

    python -m experiments.bench.decoding [--clip FILE] [--json runs/decoding.json]

Makes H.264 files with a key frame at the beginning alone, of 960 x 544 and of 256 x 256,
from --clip or from moving patterns, and pins everything to one core. `contiguous` reads a
file from its beginning to its end in clips of 17 frames at half its size, float32 in
[-1, 1]; beside it are PyAV's own loops over the same bytes, `yuv` that does nothing with
the frames and `rgb24` that converts them, both at full size. `random` reads single clips
at random places of the file. The bars: .9 of `yuv`, 1.3 times `rgb24`, and as fast as
torchcodec in both.

torchcodec is no requirement. SORA_TORCHCODEC_PYTHON names a Python that has it, with torch
and safetensors; without it, it is left out. It keeps the file open (`kept`), or opens it
anew for each clip, as ours does; frames are scaled by its own transform.
"""

import argparse
import io
import itertools
import os
import pathlib
import random
import tempfile
from collections.abc import Callable, Iterator

import av
import numpy as np

from experiments.bench import side_by_side
from sora_jax.data import video_io

LENGTH, FPS = 17, 24
SIZES = ((544, 960), (256, 256))
PYTHON = os.environ.get("SORA_TORCHCODEC_PYTHON", "")
BARS = {"yuv": 0.9, "rgb24": 1.3, "torchcodec": 1.0, "torchcodec_kept": 1.0}
MOST_APART = 0.03  # of a clip's frames at full size, as scaling filters differ


def pictures(clip: str | None, height: int, width: int) -> Iterator[np.ndarray]:
    """Yields frames uint8[h, w, 3] for ever: of a file, to and fro, or patterns."""
    if clip is None:
        y, x = np.mgrid[:height, :width].astype(np.float32)
        for k in itertools.count():
            waves = [np.sin(x / 23 + y / (17 + 9 * c) + k / (5 + c)) for c in range(3)]
            yield (128 + 100 * np.stack(waves, -1)).astype(np.uint8)
    shown = video_io.sample(
        pathlib.Path(clip), (k / FPS for k in itertools.count()), (height, width)
    )
    frames = list(shown)
    yield from itertools.cycle([*frames, *frames[-2:0:-1]])


def write(path: pathlib.Path, frames: Iterator[np.ndarray], count: int) -> None:
    """Encodes frames as H.264 with one key frame, as x264 does by default otherwise."""
    first = next(frames)
    with av.open(str(path), "w") as container:
        options = {"g": str(count), "sc_threshold": "0", "crf": "23"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        stream.colorspace = stream.color_primaries = stream.color_trc = 1  # BT.709
        stream.color_range = av.video.reformatter.ColorRange.MPEG
        for frame_hwc in itertools.chain([first], itertools.islice(frames, count - 1)):
            frame = av.VideoFrame.from_ndarray(frame_hwc, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def normalised(frames: list[np.ndarray]) -> np.ndarray:
    """Frames as a network takes them: float32[t, h, w, c] in [-1, 1]."""
    video_thwc = np.stack(frames).astype(np.float32)
    video_thwc *= 1 / 127.5
    video_thwc -= 1
    return video_thwc


def contiguous(path: pathlib.Path, count: int, size: tuple[int, int]) -> np.ndarray:
    """Reads all clips of a file one after another; returns the last."""
    times = ((k + 0.5) / FPS for k in range(count))
    shown = video_io.sample(path, times, size)
    for frames in itertools.batched(shown, LENGTH):
        last = normalised(list(frames))
    return last


def at_random(path, header, starts, size: tuple[int, int]) -> np.ndarray:
    """Reads clips at some first frames; returns the last."""
    for start in starts:
        times = ((start + k + 0.5) / FPS for k in range(LENGTH))
        last = normalised(list(video_io.sample(path, times, size, header=header)))
    return last


def plain(content: bytes, kind: str | None) -> None:
    """PyAV's own loop over a file."""
    with av.open(io.BytesIO(content)) as container:
        for frame in container.decode(video=0):
            if kind is not None:
                frame.to_ndarray(format=kind)


def seconds_of(work: Callable[[], object]) -> Callable[[int], float]:
    return lambda count: side_by_side.seconds(work, count)


def compare(
    folder: pathlib.Path, path: pathlib.Path, count: int, half: tuple[int, int], args
) -> list[dict]:
    """Times one file; returns the rows."""
    header, draw = video_io.probe(path), random.Random(0)
    starts = [draw.randrange(count - LENGTH + 1) for _ in range(args.random)]
    whole = header.height, header.width
    content, name = path.read_bytes(), f"{header.width} x {header.height}"
    print(f"{name}: {count} frames, {len(content) / 2**20:.1f} MiB", flush=True)
    calls = {
        "contiguous": {
            side_by_side.OURS: seconds_of(lambda: contiguous(path, count, half)),
            "yuv": seconds_of(lambda: plain(content, None)),
            "rgb24": seconds_of(lambda: plain(content, "rgb24")),
        },
        "random": {
            side_by_side.OURS: seconds_of(lambda: at_random(path, header, starts, half))
        },
    }
    config = {
        "video": str(path),
        "length": LENGTH,
        "size": half,
        "contiguous": list(range(0, count, LENGTH)),
        "random": starts,
    }

    def measure() -> list[dict]:
        return [
            side_by_side.row(
                f"{name}, {what}", side_by_side.take_turns(given, args.rounds), BARS
            )
            for what, given in calls.items()
        ]

    if not PYTHON:
        return measure()
    with side_by_side.Peer(PYTHON, "timed_decoding.py", folder, {}, config) as peer:
        for what, ours in (
            ("contiguous", contiguous(path, count, whole)),
            ("random", at_random(path, header, starts, whole)),
        ):
            peer.seconds(f"{what}_whole")
            theirs = np.moveaxis(peer.results()[f"{what}_whole"], 1, -1)
            side_by_side.check(f"{name}, {what}", ours, theirs, MOST_APART)
            calls[what]["torchcodec"] = lambda n, w=what: peer.seconds(w, n)
        calls["random"]["torchcodec_kept"] = lambda n: peer.seconds("random_kept", n)
        return measure()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip", help="a video whose frames are used")
    parser.add_argument("--clips", type=int, default=15, help="of 17 frames in a file")
    parser.add_argument("--random", type=int, default=8, help="clips at random places")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--height", type=int, help="only the file of this height")
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    side_by_side.THREADS = 1
    if not PYTHON:
        print(
            "torchcodec is left out: SORA_TORCHCODEC_PYTHON names no Python that has it "
            "(pip install torch torchcodec safetensors, in an environment of its own)"
        )
    elif why := side_by_side.missing(PYTHON, ["torchcodec", "safetensors"]):
        raise SystemExit(f"decoding: {why}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for height, width in SIZES:
            if args.height not in (None, height):
                continue
            path, count = folder / f"{height}.mp4", LENGTH * args.clips
            write(path, pictures(args.clip, height, width), count)
            rows += compare(folder, path, count, (height // 2, width // 2), args)
    side_by_side.write(args.json, rows, cores=1)


if __name__ == "__main__":
    main()
