"""Shards of clips whose first pixel tells their number and whose square moves one way."""

import dataclasses

import numpy as np

from sora_jax.data import records, shards, video_io, workers

# Where the square of a clip goes, by the clip's number.
WAYS = ("left", "right", "up", "down")
_STEPS = {"left": (0, -3), "right": (0, 3), "up": (-3, 0), "down": (3, 0)}


def frames(way: str | None, number: int = 0, num_frames: int = 5) -> np.ndarray:
    """A bright square on grey that goes 3 pixels a frame, or rests."""
    frames_thwc = np.full((num_frames, 32, 32, 3), 100, np.uint8)
    frames_thwc[:, :4, :4] = (0, 0, 20 + 10 * number)
    dy, dx = _STEPS.get(way, (0, 0))
    for t in range(num_frames):
        y, x = 13 + dy * (t - 2), 13 + dx * (t - 2)
        frames_thwc[t, y : y + 6, x : x + 6] = 220
    return frames_thwc


@dataclasses.dataclass(frozen=True)
class Clips:
    """A `shards.Source` of clips named as those of a folder of videos are."""

    num: int
    split = "train"
    unit, admits, bounds = "clips", "", workers.Bounds()
    settings = {"source": "moving"}

    @property
    def items(self):
        return {f"{number}.mp4": "x" for number in range(self.num)}

    def plan(self, items):
        return [[number] for number in range(self.num)], []

    def expected(self, part):
        return len(part)

    def clips(self, part, note, avoid):
        for number in part:
            yield records.ClipRecord(
                id=f"{number}.mp4#00000",
                video=video_io.encode_lossless(frames(WAYS[number % 4], number), 8),
                fps=8.0,
                num_frames=5,
                height=32,
                width=32,
                captions={"alt": f"clip {number}"},
                caption_sources={"alt": "original"},
            )
            note(finished=1)


def write(folder, num: int) -> shards.Shards:
    """Writes shards of that many clips and opens them."""
    shards.write(folder, Clips(num))
    return shards.open(folder)


def number_of(first: tuple[int, int, int]) -> int:
    """The number of the clip whose first pixel a request shows."""
    return round((first[2] - 20) / 10)
