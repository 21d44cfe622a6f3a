"""Times an epoch of cached latents beside a raw read of their files and torch's DataLoader.

    python -m experiments.bench.latents --latents runs/quickstart/latents [--clips 8192]

Every form gives the latents and the token ids of the same clips in batches of 64, in a
random order, and is timed in turns of alternating order; nothing is computed with them.
Ours: `read` takes every record from its file, checks its SHA-256 and tokenises a caption,
as in the first epoch; `kept` has them in memory, as from the second epoch on. Theirs:
`raw` reads the bytes of the same files from end to end and does nothing with them;
`files` is a torch DataLoader over one file of torch.save a clip, `memory` one over a
single tensor. A number behind a name is that of worker processes, which are started before the
first turn; ours is a thread where it is 0. The files are in the system's page cache, but for the row "cold": there they are
dropped from it before each turn (posix_fadvise).

The bars: .8 of the raw read, and twice the speed of the DataLoader over files with as
many workers.
"""

import argparse
import contextlib
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from experiments.bench import side_by_side
from sora_jax.data import captions, latent_cache, loader, transforms
from sora_jax.data import tokenizer as tokenizers

BATCH, LENGTH = 64, 36
RAW_BAR, TORCH_BAR = 0.8, 2.0
CHUNK = 1 << 20  # bytes of a raw read
TIERS = {"short": 0.5, "medium": 0.5}


class Part:
    """The first records of a cache; picklable, for worker processes."""

    def __init__(self, cache: latent_cache.Latents, count: int):
        self.cache, self.count = cache, count

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> list:
        return self.cache.read(indices)


def whole_files(cache: latent_cache.Latents, clips: int) -> tuple[list, int]:
    """Returns the first files that hold at least so many clips, and their number."""
    files, count = [], 0
    for file in cache.manifest["files"]:
        if count < clips:
            files.append(cache.folder / file["file"])
            count += file["count"]
    return files, count


def raw_read(files: Sequence[pathlib.Path]) -> int:
    """Reads files from end to end; returns their bytes."""
    buffer, total = bytearray(CHUNK), 0
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while size := opened.readinto(buffer):
                total += size
    return total


def drop(files: Sequence[pathlib.Path]) -> None:
    """Asks the system to forget the contents of files."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@contextlib.contextmanager
def epochs(source: Part, transform, workers: int) -> Iterator[Callable[[], None]]:
    """Opens an endless loader; gives a function that reads an epoch's whole batches.

    The loader stays open, so that starting its processes is not timed.
    """
    with loader.make_loader(
        source, transform, seed=0, batch_size=BATCH, num_workers=workers
    ) as rows:
        next(rows)

        def epoch() -> None:
            for _ in range(len(source) // BATCH):
                next(rows)

        yield epoch


def timed(work: Callable[[], object], before: Callable[[], object] = lambda: None):
    """Returns a function of the number of runs that returns the seconds of one."""

    def seconds(count: int) -> float:
        total = 0.0
        for _ in range(count):
            before()
            began = time.perf_counter()
            work()
            total += time.perf_counter() - began
        return total / count

    return seconds


def case_of(source: Part, transform) -> dict[str, np.ndarray]:
    """Latents and token ids of all clips, for the peer; raises ValueError if damaged."""
    found = source.read(range(len(source)))
    examples = [transform(record, np.random.default_rng(0)) for record in found]
    return {
        name: np.stack([example[name] for example in examples])
        for name in ("latents", "text_ids")
    }


def check(peer: side_by_side.Peer, latents: np.ndarray, kind: str) -> None:
    """Compares the sums of the peer's clips with ours; ValueError if they differ."""
    peer.seconds(f"{kind}_sums")
    theirs = peer.results()[f"{kind}_sums"]
    ours = np.sort(latents.reshape(len(latents), -1).sum(1, dtype=np.float64))
    side_by_side.check(f"sums of the clips, {kind}", ours, theirs, 1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latents", type=pathlib.Path, required=True)
    parser.add_argument("--clips", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()
    python, cores = side_by_side.PEERS, side_by_side.THREADS
    if why := side_by_side.missing(python, ["safetensors"]):
        raise SystemExit(f"latents: {why}")
    anew = latent_cache.open(args.latents, memory_bytes=0)
    kept = latent_cache.open(args.latents, memory_bytes=8 << 30)
    files, count = whole_files(anew, args.clips)
    anew, kept = Part(anew, count), Part(kept, count)
    size = raw_read(files)
    print(f"{count} clips in {len(files)} files of {size / 2**20:.0f} MiB", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        texts = [
            text for k in range(0, count, 8) for text in anew.cache.captions(k).values()
        ]
        tokenizer = tokenizers.train(texts, folder / "t.model", 640)
        text = transforms.Tokenize(captions.CaptionSampler(TIERS), tokenizer, LENGTH)
        transform = transforms.LatentsAndText(text)
        case = case_of(kept, transform)  # which also fills its memory
        config = {"batch_size": BATCH}
        with side_by_side.Peer(python, "timed_loader.py", folder, case, config) as peer:
            versions = peer.versions()
            check(peer, case["latents"], "files")
            check(peer, case["latents"], "memory")
            rows = []
            for workers in (0, cores):
                theirs = {
                    f"{kind}_{workers}": lambda n, k=kind, w=workers: peer.seconds(
                        f"{k}_{w}", n
                    )
                    for kind in ("files", "memory")
                }
                bars = {"raw": RAW_BAR, f"files_{workers}": TORCH_BAR}
                for name, source in (("read", anew), ("kept", kept)):
                    if workers and source is kept:
                        continue  # each worker has a memory of its own, filled later
                    with epochs(source, transform, workers) as ours:
                        calls = {
                            side_by_side.OURS: timed(ours),
                            "raw": timed(lambda: raw_read(files)),
                            **theirs,
                        }
                        times = side_by_side.take_turns(calls, args.rounds)
                    what = f"{name}, {workers} workers"
                    rows.append(side_by_side.row(what, times, bars))
            forget = lambda: drop(files)  # noqa: E731
            with epochs(anew, transform, 0) as ours:
                calls = {
                    side_by_side.OURS: timed(ours, forget),
                    "raw": timed(lambda: raw_read(files), forget),
                }
                times = side_by_side.take_turns(calls, args.rounds)
            rows.append(
                side_by_side.row("read, cold, 0 workers", times, {"raw": RAW_BAR})
            )
    side_by_side.write(args.json, rows, clips=count, bytes=size, **versions)


if __name__ == "__main__":
    main()
