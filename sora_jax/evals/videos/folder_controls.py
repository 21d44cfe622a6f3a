"""The control table of a folder of clips.

Letters: n clips, t frames, h height, w width, c channels.
"""

import collections
import itertools
import pathlib
from collections.abc import Sequence

import numpy as np

from sora_jax.evals.metrics import control_metrics, control_tables, controls, motion
from sora_jax.evals.videos import clip_files, clip_measures

CLIPS, FRAMES = 24, 24  # of a folder, of which each control is measured again
_LOOKED_AT = 4  # times as many clips, to find those that move and have one shape


def measure(
    folder: pathlib.Path,
    settings: clip_measures.Settings,
    *,
    metrics: Sequence[control_metrics.Metric] = control_metrics.METRICS,
) -> tuple[control_tables.Table, list[str]]:
    """The control table of a folder's clips, and what it leaves out, in sentences.

    Controls are made of clips that move and have one shape, the usual one of those that
    are drawn: a clip that does not move, or has another shape, is replaced by one more,
    until `_LOOKED_AT` times as many were drawn as are wanted.

    Args:
      folder: as `clip_files.find` reads it.
      settings: how many clips (`CLIPS` at most) and frames (`FRAMES`) are used, and how.
      metrics: as `build`.

    Raises:
      FileNotFoundError, ValueError: there are not two such clips.
    """
    found = clip_files.find(folder, settings.colour)
    most = min(settings.num_frames or FRAMES, FRAMES)
    reader = clip_files.Reader(
        most,
        settings.stride,
        least=controls.LEAST_FRAMES,
        shrink=clip_measures.working_size,
    )
    wanted = min(settings.num_clips or CLIPS, CLIPS)
    left_out, still, shapes = list(found.failures), [], collections.Counter()
    kept: list[tuple[str, np.ndarray, tuple]] = []

    def usable() -> int:
        return max(shapes.values(), default=0)

    drawn = clip_files.drawn(len(found.sources), wanted, usable)
    for index in itertools.islice(drawn, _LOOKED_AT * wanted):
        source = found.sources[index]
        try:
            clip = reader(source)
        except clip_files.UnusableClip as error:
            left_out.append(str(error))
            continue
        fps = (clip.fps or settings.fps) / settings.stride
        # What is still cannot be told from its still control.
        degree = control_metrics.Clips(clip.video_thwc[None], fps).degree[
            "dynamic_degree"
        ]
        if degree[0] <= motion.STILL:
            still.append(source.name)
            continue
        shape = (*clip.video_thwc.shape[:3], fps)
        shapes[shape] += 1
        kept.append((source.name, clip.video_thwc, shape))
    if still:
        left_out.append(f"{len(still)} clips are still: {clip_measures.listed(still)}")
    elif not kept:
        raise ValueError(f"{folder} has no clip for a control table: {left_out[0]}")
    if usable() < 2:
        raise ValueError(
            f"a control table needs 2 clips of one shape that move, and {folder} has "
            f"{usable()}: of {len(kept) + len(still)} that are looked at {len(still)} "
            "are still"
        )
    [(usual, _)] = shapes.most_common(1)
    t, h, w, fps = usual
    if others := [name for name, _, shape in kept if shape != usual]:
        left_out.append(
            f"{len(others)} clips are not {t} frames of {w} x {h} at {fps:g} a second as "
            f"most are: {clip_measures.listed(others)}"
        )
    if t < control_tables.LEAST_FOR_SEAMS:
        left_out.append(
            f"the clips have {t} frames, too few for a {clip_measures.SEAM}, which needs "
            f"{control_tables.LEAST_FOR_SEAMS}"
        )
    video_nthwc = np.stack([video for _, video, shape in kept if shape == usual])
    title = f"{folder.resolve().name}, {t} frames of {w} x {h}"
    return control_tables.build(
        video_nthwc, fps=fps, title=title, metrics=metrics
    ), left_out
