"""The control table of a folder of clips.

Letters: n clips, t frames, h height, w width, c channels.
"""

import collections
import itertools
import pathlib
from collections.abc import Sequence

import numpy as np

from sora_jax.evals.metrics import control_tables, controls, motion, temporal_metrics
from sora_jax.evals.videos import clip_files, clip_measures

CLIPS, FRAMES = 24, 24  # at most, since they are measured again for each control
_DRAWN = 4  # times as many clips are read at most, to find those that can be used


def measure(
    folder: pathlib.Path,
    settings: clip_measures.Settings,
    *,
    metrics: Sequence[temporal_metrics.Metric] = temporal_metrics.METRICS,
) -> tuple[control_tables.Table, list[str]]:
    """Returns the control table of a folder's clips, and sentences on what it leaves out.

    The table uses clips that move and share the most frequent shape. A clip that is still
    or has another shape is replaced by a further one, until `_DRAWN` times as many clips
    were drawn as are wanted.

    Args:
      folder: see `clip_files.find`.
      settings: number of clips (`CLIPS` at most) and frames (`FRAMES`), and how they are
        measured.
      metrics: see `control_tables.build`.

    Raises:
      FileNotFoundError, ValueError: the folder has fewer than two such clips.
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
    for index in itertools.islice(drawn, _DRAWN * wanted):
        source = found.sources[index]
        try:
            clip = reader(source)
        except clip_files.UnusableClip as error:
            left_out.append(str(error))
            continue
        fps = (clip.fps or settings.fps) / settings.stride
        # A still clip is equal to its still control.
        degree = temporal_metrics.Clips(clip.video_thwc[None], fps).degree[
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
            f"a control table needs 2 clips of one shape that move, but {folder} has "
            f"{usable()}: of {len(kept) + len(still)} that were read {len(still)} are "
            "still"
        )
    [(common, _)] = shapes.most_common(1)
    t, h, w, fps = common
    if others := [name for name, _, shape in kept if shape != common]:
        left_out.append(
            f"{len(others)} clips differ from the most common shape, {t} frames of {w}x{h} "
            f"at {fps:g} fps: {clip_measures.listed(others)}"
        )
    if t < control_tables.LEAST_FOR_SEAMS:
        left_out.append(
            f"the clips have {t} frames, but a {clip_measures.SEAM} needs "
            f"{control_tables.LEAST_FOR_SEAMS}"
        )
    video_nthwc = np.stack([video for _, video, shape in kept if shape == common])
    title = f"{folder.resolve().name}, {t} frames of {w}x{h}"
    return control_tables.build(
        video_nthwc, fps=fps, title=title, metrics=metrics
    ), left_out
