"""Both doors beside ffmpeg's own output for the same file.

The cases are pairwise: any two values of two factors meet in some file. The slow test
compares all 768 files; the largest difference was 3 of 255, with ffmpeg 5.1.
"""

import fractions
import itertools
import os
import shutil
import subprocess

import numpy as np
import pytest

from tests.data.test_reading import (
    EVEN,
    MATRICES,
    UNEVEN,
    N,
    measured,
    prepared,
    store_cases,
)

FACTORS = {
    "rotation": (0, 90, 180, 270),
    "mirroring": ((False, False), (True, False), (False, True)),
    "aspect": (None, fractions.Fraction(5, 4)),
    "times": (EVEN, UNEVEN),
    "matrix": tuple(MATRICES),
    "full": (False, True),
    "bits": (8, 10),
}
ALL = list(itertools.product(*FACTORS.values()))
# ffmpeg with its usual flags (`bicubic` alone) is up to 5 of 255 off: without the last
# flag it makes RGB of one chroma sample for two pixels wherever it scales, or has more
# than 8 bits. What 8 bits at their own size become is a table's work, and is the same as
# ours to the bit with its usual flags, but up to 3 off with these.
FLAGS = "bicubic+accurate_rnd+full_chroma_int"


@pytest.fixture(scope="module")
def ffmpeg():
    if (found := shutil.which("ffmpeg")) is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI needs ffmpeg for this test: apt-get install ffmpeg")
        pytest.skip("ffmpeg is not installed, so reading is not compared with it")
    return found


def pairwise(cases):
    """Takes the case that shows most new pairs of values, until all pairs were seen."""

    def pairs(case):
        return set(itertools.combinations(enumerate(case), 2))

    missing, taken = set().union(*map(pairs, cases)), []
    while missing:
        taken.append(max(cases, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(taken[-1])
    return taken


def filters(matrix, fps):
    """Pixels made square, BT.709, and the frame that is on screen at each k / fps.

    ffmpeg turns and mirrors by itself; it leaves pixels as wide as they are stored, and
    the primaries of BT.2020 as they are.
    """
    width, height = "if(gte(sar,1),round(iw*sar),iw)", "if(gte(sar,1),ih,round(ih/sar))"
    chain = [f"scale=w='{width}':h='{height}':flags={FLAGS}"]
    if matrix == "bt2020":
        chain += ["format=yuv444p12", "colorspace=all=bt709", f"scale=flags={FLAGS}"]
    return ",".join([*chain, "format=rgb24", f"fps={fps}:round=up:start_time=0"])


def by_ffmpeg(ffmpeg, path, size, chains):
    """Frames uint8[t, h, w, 3] of each chain of filters."""
    command, found = [ffmpeg, "-v", "error", "-i", path], []
    outputs = [path.with_suffix(f".{k}.rgb") for k in range(len(chains))]
    for output, chain in zip(outputs, chains, strict=True):
        command += ["-vf", chain, "-f", "rawvideo", output]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    for output in outputs:
        found.append(np.fromfile(output, np.uint8).reshape(-1, *size, 3).astype(int))
        output.unlink()
    return found


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(pairwise(ALL), id="pairwise"),
        pytest.param(ALL, id="all", marks=pytest.mark.slow),
    ],
)
def test_prepare_and_evaluate_are_within_4_of_ffmpeg(ffmpeg, tmp_path, cases):
    assert len(cases) == len(ALL) or len(cases) <= 20
    store_cases(tmp_path, cases)
    off = {}
    for folder in tmp_path.iterdir():
        whole = measured(folder, N)
        size = next(iter(whole.values())).size
        made, _ = prepared(folder, size)
        for name, clip in whole.items():
            case = cases[int(name.removesuffix(".mp4"))]
            # `evaluate` takes an uneven clip at its mean rate.
            mean = fractions.Fraction(1000 * (N - 1), case[3][-1])
            chains = [filters(case[4], fps) for fps in (8, mean)]
            theirs = by_ffmpeg(ffmpeg, folder / name, size, chains)
            # `prepare` makes whole clips of 5 frames.
            theirs[0] = theirs[0][: len(theirs[0]) // 5 * 5]
            for door, ours, frames in zip(
                ("prepare", "evaluate"),
                (made[name], clip.video_thwc),
                theirs,
                strict=True,
            ):
                assert len(ours) == len(frames), (door, case)
                off[door, case] = int(np.abs(ours - frames).max())
    worst = max(off, key=off.get)
    print(f"{len(cases)} files: at most {off[worst]} of 255, through {worst}")
    assert off[worst] <= 4, worst
