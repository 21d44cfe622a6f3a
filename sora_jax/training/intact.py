"""Which checkpoints of a run are undamaged, by the lists of digests in them.

A damaged checkpoint is never read, and does not end a run that has an older good one.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from sora_jax.core import digests
from sora_jax.core import mesh as meshes

# The parts of a checkpoint; generation reads and checks only the first.
PARTS = ("ema", "state", "meta")
# Orbax writes these two after the digests; the second is never read.
_META, _COMMITTED = "_CHECKPOINT_METADATA", "commit_success.txt"
_LONGEST = 1000  # bytes of an error message that processes exchange


def steps(checkpoints: pathlib.Path) -> list[int]:
    """The steps of finished checkpoints, oldest first."""
    names = (step.name for step in checkpoints.glob("*"))
    return sorted(int(name) for name in names if name.isdigit())


def check(checkpoints: pathlib.Path, step: int, parts: Sequence[str]) -> None:
    """Checks parts of a checkpoint; all processes call it and share the hashing.

    Raises:
      digests.Damaged: on every process, if any of them found damage.
    """
    folder, reason = checkpoints / str(step), ""
    try:
        _check_meta(folder / _META)
        for part in parts:
            share = jax.process_index(), jax.process_count()
            digests.check_folder(folder / part, *share, besides=_COMMITTED)
    except digests.Damaged as error:
        reason = str(error)
    if reason := _of_any_process(reason):
        raise digests.Damaged(reason)


def _of_any_process(text: str) -> str:
    """The first non-empty text of any process, returned on all processes."""
    if jax.process_count() == 1:
        return text
    line = text.encode()[:_LONGEST].ljust(_LONGEST, b"\0")
    lines_pb = multihost_utils.process_allgather(np.frombuffer(line, np.uint8))
    texts = (bytes(line_b).rstrip(b"\0") for line_b in lines_pb)
    return next(filter(None, texts), b"").decode(errors="replace")


def _check_meta(file: pathlib.Path) -> None:
    """Checks that Orbax's description of a checkpoint is readable."""
    try:
        meta = json.loads(file.read_bytes())
        parts = {*meta["item_handlers"]}
        times = meta["init_timestamp_nsecs"], meta["commit_timestamp_nsecs"]
        fine = parts <= {*PARTS} and {*map(type, times)} == {int}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        fine = False
    if not fine:
        raise digests.Damaged(f"{file} is missing or damaged")


def newest(
    checkpoints: pathlib.Path, parts: Sequence[str], *, move_aside: bool = False
) -> int | None:
    """The newest step whose parts are undamaged; None if there is no checkpoint.

    Reports on stderr which newer checkpoints are damaged.

    Args:
      checkpoints: the folder.
      parts: that will be read.
      move_aside: rename damaged checkpoints, so that their step can be saved again.

    Raises:
      digests.Damaged: all checkpoints are damaged; none is renamed.
    """
    there = steps(checkpoints)
    damaged = {}
    for step in reversed(there):
        try:
            check(checkpoints, step, parts)
        except digests.Damaged as error:
            if steps(checkpoints) != there:
                # A running job has written newer ones and deleted this one.
                return newest(checkpoints, parts, move_aside=move_aside)
            damaged[step] = error
            continue
        for bad, reason in damaged.items():
            moved = ""
            if move_aside:
                moved = f"; it is now {_move_aside(checkpoints / str(bad)).name}"
            if jax.process_index() == 0:
                print(
                    f"the checkpoint of step {bad} is not used, that of step {step} is: "
                    f"{reason}{moved}",
                    file=sys.stderr,
                )
        return step
    if damaged:
        step, reason = next(iter(damaged.items()))
        raise digests.Damaged(
            f"no checkpoint in {checkpoints} is good, of {there}: restore one from a "
            f"copy, or begin a new run in another folder. Of step {step}: {reason}"
        )
    return None


def _move_aside(folder: pathlib.Path) -> pathlib.Path:
    """Renames a damaged checkpoint, on process 0, and returns its new path."""
    target, number = folder.with_name(f"{folder.name}.damaged"), 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.damaged_{number}")
    meshes.barrier("damaged")
    if jax.process_index() == 0:
        folder.rename(target)
    meshes.barrier("moved aside")
    return target
