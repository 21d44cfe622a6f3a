"""Small sources of clips for the tests of this room; importable by worker processes."""

import dataclasses
import json
import os
import pathlib
import signal
import sys
import time

import numpy as np

from sora_jax.data import records, shards, video_io, workers


def modules(part, note, avoid):
    """A task that names the modules of its process."""
    return [*sys.modules]


def keeps_memory(part, note, avoid):
    """A task that keeps 200 MiB for all items; tells whether 32 and 256 more fit."""
    note(item="one")
    with workers.uncounted_memory():
        kept = np.empty(200 << 20, np.uint8)

    def fits(size):
        try:
            [*workers.limited(np.empty(size, np.uint8) for _ in "x")]
        except MemoryError:
            return False
        return True

    return fits(32 << 20), fits(256 << 20), kept.size


def clip(index, num_frames=5, size=16):
    """A clip whose first pixel tells its index."""
    frames_thwc = np.full((num_frames, size, size, 3), 100, np.uint8)
    frames_thwc[:, 0, 0] = index
    return records.ClipRecord(
        id=f"clip-{index}",
        video=video_io.encode_lossless(frames_thwc, 8),
        fps=8.0,
        num_frames=num_frames,
        height=size,
        width=size,
        captions={"short": f"clip number {index}", "dense": f"é {index % 3}"},
        caption_sources={"short": "human", "dense": "model:m1"},
        shots=((0, 2), (2, num_frames)),
        scores={"motion": 0.5},
        licence="CC0-1.0",
        source="test",
        state_json=json.dumps({"index": index}),
    )


@dataclasses.dataclass(frozen=True)
class Clips:
    """`num` clips in parts of `per_part`; some items skip, crash, hang or take 6 s.

    Those of `hogs` read what takes 1 GiB of memory, and those of `endless` go on for ever.
    Each part leaves a file in the folder `seen`, named after its process's parent.
    """

    num: int = 12
    per_part: int = 4
    skipped: tuple[int, ...] = ()
    kills: tuple[int, ...] = ()
    hangs: tuple[int, ...] = ()
    slow: tuple[int, ...] = ()
    hogs: tuple[int, ...] = ()
    endless: tuple[int, ...] = ()
    fails_at: int = -1
    seen: str = ""
    split: str = "train"
    unit: str = "clips"
    admits: str = ""
    bounds = workers.Bounds()

    @property
    def items(self):
        return {"": ""}

    @property
    def settings(self):
        return {"source": "test", "num": self.num, "more": {"per_part": self.per_part}}

    def plan(self, items):
        starts = range(0, self.num, self.per_part)
        parts = [[start, min(start + self.per_part, self.num)] for start in starts]
        return parts, [shards.Skipped("notes.doc", "no video")]

    def expected(self, part):
        return part[1] - part[0]

    def only(self, part):
        return self

    def clips(self, part, note, avoid):
        if self.seen:
            (pathlib.Path(self.seen) / f"{os.getppid()}").touch()
        for index in range(*part):
            item = f"item-{index}"
            if item in avoid:
                yield shards.Skipped(item, avoid[item])
                continue
            note(item=item)
            if index in self.kills:
                os.kill(os.getpid(), signal.SIGKILL)
            if index in self.hangs:
                time.sleep(100)
            for _ in range(20 if index in self.slow else 0):
                time.sleep(0.3)
                note(item=item)
            if index in self.hogs:
                np.empty(1 << 30, np.uint8)  # not where a file is read
                try:
                    [*workers.limited(np.empty(1 << 30) for _ in "x")]
                except MemoryError:
                    yield shards.Skipped(item, "it asks for too much memory")
                    continue
            while index in self.endless:
                note(item=item)
            if index == self.fails_at:
                raise KeyError("interrupted here")
            if index in self.skipped:
                yield shards.Skipped(item, "of no use")
            else:
                yield clip(index)
            note(finished=1)
