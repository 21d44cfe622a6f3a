"""Times I3D's features, from small uint8 frames to logits, beside PyTorch's.

    python -m experiments.bench.features [--clips 64] [--repeat 5]

Both use the same random weights (epsilon 1e-5), number of threads and float32, and resize
16 x 64 x 64 to 224 as public FVD code does. The results are compared first; then both are
timed in turns of alternating order. The peer is timed in both of its memory layouts, with
one and with four clips per batch; its fastest form counts.
"""

import argparse
import functools
import os
import pathlib
import tempfile

import numpy as np
from safetensors.numpy import load_file

from experiments.bench import side_by_side
from sora_jax.evals.features import networks, weight_folders
from sora_jax.models import i3d, i3d_exchange

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4
FORMS = ("1 contiguous", "4 contiguous", "1 channels_last", "4 channels_last")


def check(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Compares features with the peer's.

    Raises:
      ValueError: they differ.
    """
    side_by_side.check(f"features of {len(theirs)} clips", ours, theirs, TOLERANCE)


def compare(python: str, clips: int, repeat: int, forms=FORMS) -> dict[str, float]:
    """Times both in turns; returns the peer's time divided by ours, by form.

    Raises:
      ValueError: the results differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        given = {}, {"clips": clips}
        with side_by_side.Peer(python, "timed_i3d.py", folder, *given) as peer:
            peer.versions()  # answered after it has written its clips
            case = load_file(folder / "clips.safetensors")
            config = i3d.Config(eps=1e-5)
            tensors = load_file(folder / "piergiaj.safetensors")
            params = i3d_exchange.read_i3d(tensors, config)
            network = weight_folders.build(i3d.I3D, config, params)
            ours = networks.VideoFeatures(
                weight_folders.Weights("i3d", {"video": network}, "")
            )
            video = np.ascontiguousarray(np.moveaxis(case["video"], 1, -1))
            check(ours(video), case["logits"])  # which also compiles
            run = functools.partial(ours, video)
            calls = {"ours": functools.partial(side_by_side.seconds, run)}
            for form in forms:
                name = form.replace(" ", "_")
                calls[form] = functools.partial(peer.seconds, name)
            times = side_by_side.take_turns(calls, repeat)
    ratios = {}
    for form in forms:
        ratios[form] = float(np.median(times[form]) / np.median(times["ours"]))
        print(
            f"{clips} clips: ours {side_by_side.describe(times['ours'])}, theirs {form} "
            f"{side_by_side.describe(times[form])}: {ratios[form]:.2f} times"
        )
    print(f"against the peer's best form: {min(ratios.values()):.2f} times")
    return ratios


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--peer", default=side_by_side.PEERS)
    options = parser.parse_args(argv)
    print(f"{side_by_side.THREADS} cores, load {os.getloadavg()[0]:.1f}")
    compare(options.peer, options.clips, options.repeat, options.forms.split(","))
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
