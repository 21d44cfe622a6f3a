"""Which checkpoints of a run are as they were written: they carry lists of digests.

A damaged one is never read, and never ends a run that has an older good one.
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

# The parts of a checkpoint; what only generates reads and checks the first.
PARTS = ("ema", "state", "meta")
# Orbax writes these two when the digests are there already; nothing of them is used.
_META, _COMMITTED = "_CHECKPOINT_METADATA", "commit_success.txt"
_LONGEST = 1000  # bytes of a reason


def steps(checkpoints: pathlib.Path) -> list[int]:
    """The steps of finished checkpoints, oldest first."""
    found = (step.name for step in checkpoints.glob("*"))
    return sorted(int(name) for name in found if name.isdigit())


def check(checkpoints: pathlib.Path, step: int, parts: Sequence[str]) -> None:
    """Checks parts of a checkpoint; processes that share the folder share the work.

    Raises:
      digests.Damaged: on every process, where one of them found it so.
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
    """A text that a process has, on all of them; empty where none has one."""
    if jax.process_count() == 1:
        return text
    line = text.encode()[:_LONGEST].ljust(_LONGEST, b"\0")
    lines_pb = multihost_utils.process_allgather(np.frombuffer(line, np.uint8))
    texts = (bytes(line_b).rstrip(b"\0") for line_b in lines_pb)
    return next(filter(None, texts), b"").decode(errors="replace")


def _check_meta(file: pathlib.Path) -> None:
    """Checks that Orbax can read its own description of a checkpoint."""
    try:
        found = json.loads(file.read_bytes())
        parts = {*found["item_handlers"]}
        times = found["init_timestamp_nsecs"], found["commit_timestamp_nsecs"]
        fine = parts <= {*PARTS} and {*map(type, times)} == {int}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        fine = False
    if not fine:
        raise digests.Damaged(f"{file} is missing or damaged")


def newest(
    checkpoints: pathlib.Path, parts: Sequence[str], *, move_aside: bool = False
) -> int | None:
    """The newest checkpoint of which these parts are as they were written.

    Says on stderr which newer ones are damaged. None where there is no checkpoint.

    Args:
      checkpoints: the folder.
      parts: that are to be read.
      move_aside: renames those that are damaged, so that their step can be saved again.

    Raises:
      digests.Damaged: all of them are; nothing is moved.
    """
    found, damaged = steps(checkpoints), {}
    while found:
        step = found.pop()
        try:
            check(checkpoints, step, parts)
        except digests.Damaged as error:
            if step in steps(checkpoints):
                damaged[step] = error
                continue
            # A run that goes on has deleted it meanwhile, and written newer ones.
            return newest(checkpoints, parts, move_aside=move_aside)
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
            f"no checkpoint in {checkpoints} is good, of {sorted(damaged)}: bring one "
            f"back, or begin a new run in another folder. Of step {step}: {reason}"
        )
    return None


def _move_aside(folder: pathlib.Path) -> pathlib.Path:
    """Renames a damaged checkpoint; the first process does."""
    target, number = folder.with_name(f"{folder.name}.damaged"), 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.damaged_{number}")
    meshes.barrier("damaged")
    if jax.process_index() == 0:
        folder.rename(target)
    meshes.barrier("moved aside")
    return target
