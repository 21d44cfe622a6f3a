"""Times the data path: rendering and decoding clips, and making batches.

    python -m experiments.bench.data [--clips 2000]

Prints CPU time beside wall time, since it depends less on other work of the machine. The
bars: a batch of 64 cached latents of 6 KB with captions in less than 3 ms of one core, and
8,000 TW32 clips rendered on two cores in less than 60 s.
"""

import os
import pathlib
import resource
import tempfile
import time

import numpy as np
from absl import app, flags

from sora_jax.data import captions, latent_cache, loader, shards, tokenizer, toy_clips
from sora_jax.data import transforms as transforms_lib

_CLIPS = flags.DEFINE_integer("clips", 2000, "Number of clips.", lower_bound=640)
_FAMILIES = {"attribute": 0.25, "motion": 0.6, "relation": 0.15}
_BATCH = 64


def processor_seconds() -> float:
    """Returns the CPU time of this process and its finished children."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (
            resource.getrusage(resource.RUSAGE_SELF),
            resource.getrusage(resource.RUSAGE_CHILDREN),
        )
    )


class Stopwatch:
    """Prints the time of a `with` block, in total and per unit."""

    def __init__(self, what: str, units: int, unit: str):
        self.what, self.units, self.unit = what, units, unit

    def __enter__(self):
        self.wall, self.processor = time.perf_counter(), processor_seconds()

    def __exit__(self, *exception):
        wall = time.perf_counter() - self.wall
        processor = processor_seconds() - self.processor
        print(
            f"{self.what:44} {wall:7.2f} s wall, {processor:7.2f} s CPU; "
            f"per {self.unit}: {1e3 * wall / self.units:7.3f} ms wall, "
            f"{1e3 * processor / self.units:7.3f} ms CPU"
        )


def steps_of(source, transform, num_steps, **arguments):
    """Runs the loader for a number of steps after the first batch."""
    with loader.make_loader(
        source,
        transform,
        seed=0,
        batch_size=_BATCH,
        num_steps=num_steps + 1,
        **arguments,
    ) as rows:
        next(rows)
        yield
        for _ in rows:
            pass
        yield


def main(arguments):
    del arguments
    count, cores = _CLIPS.value, len(os.sched_getaffinity(0))
    print(f"{cores} cores, load {os.getloadavg()[0]:.1f}")
    epoch = count // _BATCH
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        source = toy_clips.ToyClips("tw32", count, families=_FAMILIES)
        with Stopwatch(f"make TW32 clips, {cores} processes", count, "clip"):
            shards.write(folder / "shards", source, num_workers=cores)
        clips = shards.open(folder / "shards")
        with Stopwatch("read and verify clips", count, "clip"):
            records = clips.read(range(count))
        with Stopwatch("decode clips", count, "clip"):
            for record in records:
                record.frames()
        with Stopwatch("train the tokenizer", 1, "run"):
            tokens = tokenizer.train(clips.all_captions(), folder / "t.model", 512)

        def encode(batch):
            return np.zeros((len(batch), 3, 4, 4, 32), np.float32)  # 6 KB each

        with Stopwatch("write latents (without the encoder)", count, "clip"):
            latent_cache.write(
                folder / "latents", clips, encode, vae_digest="", preprocessing={}
            )
        cache = latent_cache.open(folder / "latents")
        text = transforms_lib.LatentsAndText(
            transforms_lib.Tokenize(
                captions.CaptionSampler({"short": 0.6, "medium": 0.4}), tokens, 24
            )
        )
        for what in ("first", "second"):
            run = steps_of(cache, text, epoch)
            next(run)
            with Stopwatch(f"batches of latents, {what} epoch", epoch, "batch"):
                next(run)
            list(run)
        crop = transforms_lib.CropClips()
        for workers in (0, cores):
            run = steps_of(clips, crop, epoch, num_workers=workers)
            next(run)
            with Stopwatch(f"batches of video, {workers} processes", epoch, "batch"):
                next(run)
            list(run)


if __name__ == "__main__":
    app.run(main)
