"""Copies of a run's metrics and sample videos for TensorBoard and Weights & Biases.

`metrics.jsonl` stays the run's record. A tracker that fails, for example without a
network, is left out from then on; the run continues.

Letters: t time, h height, w width, c channels (RGB).
"""

import io
import pathlib
import sys
import uuid
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from sora_jax.data import gif

_ID = "wandb_id.txt"  # of a run folder, so that a resumed run stays one run


class Tracker(Protocol):
    """Where metrics and videos are copied to."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Copies metrics of a step."""

    def videos(self, step: int, videos: Mapping[str, np.ndarray], fps: float) -> None:
        """Copies videos, uint8 [t, h, w, c] by prompt, as GIFs of their true rate."""

    def close(self) -> None:
        """Writes what is left."""


class TensorBoard:
    """Writes event files to RUN/tensorboard.

    Args:
      folder: the run folder.
      start_step: from which a run is resumed; TensorBoard then hides later steps of
        before.
    """

    def __init__(self, folder: pathlib.Path, start_step: int):
        import tensorboardX  # slow to import

        later = start_step + 1 if start_step else None
        self._writer = tensorboardX.SummaryWriter(
            str(folder / "tensorboard"), purge_step=later
        )
        self._proto = tensorboardX.proto.summary_pb2.Summary

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def videos(self, step: int, videos: Mapping[str, np.ndarray], fps: float) -> None:
        for prompt, video_thwc in videos.items():
            _, h, w, c = video_thwc.shape
            image = self._proto.Image(
                height=h,
                width=w,
                colorspace=c,
                encoded_image_string=gif.encode(video_thwc, fps),
            )
            value = self._proto.Value(tag=f"samples/{prompt}", image=image)
            self._writer.file_writer.add_summary(self._proto(value=[value]), step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Logs to a project of Weights & Biases, or offline with WANDB_MODE=offline.

    Args:
      folder: the run folder.
      project: the project's name.
      config: the run's config, flat.

    Raises:
      ValueError: the library is not installed.
    """

    def __init__(self, folder: pathlib.Path, project: str, config: Mapping):
        try:
            import wandb
        except ImportError:
            raise ValueError(
                "wandb is not installed: pip install -r launch/requirements/wandb.txt"
            ) from None
        self._library, file = wandb, folder / _ID
        if not file.is_file():
            file.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=project,
            dir=folder,
            id=file.read_text(),
            name=folder.name,
            resume="allow",
            config=dict(config),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def videos(self, step: int, videos: Mapping[str, np.ndarray], fps: float) -> None:
        made = {}
        for prompt, video_thwc in videos.items():
            file = io.BytesIO(gif.encode(video_thwc, fps))
            made[f"samples/{prompt}"] = self._library.Video(file, format="gif")
        self._run.log(made, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackers:
    """Several trackers; one that fails is reported and left out."""

    def __init__(self, trackers: Mapping[str, Tracker]):
        self._trackers = dict(trackers)

    def _call(self, method: str, *args) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                getattr(tracker, method)(*args)
            except Exception as error:
                del self._trackers[name]
                print(
                    f"train: {name} failed ({type(error).__name__}: {error}); the run "
                    "continues without it",
                    file=sys.stderr,
                )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._call("scalars", step, values)

    def videos(self, step: int, videos: Mapping[str, np.ndarray], fps: float) -> None:
        self._call("videos", step, videos, fps)

    def close(self) -> None:
        self._call("close")
