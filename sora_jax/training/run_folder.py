"""To which run a folder belongs: the config that lies in it, and what it was made of.

A folder is claimed once everything that a run needs has been found to fit together, so
that a start that was refused leaves nothing behind that the next one would trip over.

A run may go on with another layout, other paths or more steps. config.py.txt then has
the new values, and config_changes.jsonl what they were, at which step and when.
"""

import datetime
import json
import pathlib
from collections.abc import Mapping, Sequence

import jax

from sora_jax.core import config as configs
from sora_jax.core import digests, paths
from sora_jax.training import checkpoint

# What decides where and how a run is computed, watched and sampled from, not what it
# learns. All other fields define the run.
INCIDENTAL = frozenset(
    {
        "mesh.replica", "mesh.fsdp", "mesh.ring", "mesh.ulysses", "mesh.tensor",
        "model.dit.remat",
        # Where the data lies; that it is the same is checked by its digest.
        "data.shards", "data.latents", "data.eval_shards", "data.eval_clips",
        "data.num_workers", "data.max_corrupt_share", "packing.max_padding",
        "reconstruction.lpips_weights",  # the run has a copy
        "loop.num_steps", "loop.accumulation", "loop.log_every", "loop.eval_every",
        "loop.checkpoint_every", "loop.keep_checkpoints", "loop.max_skipped_in_a_row",
        # Defaults that every call can change, and writes down.
        "sample.num_frames", "sample.height", "sample.width", "sample.fps",
        "sample.num_inference_steps", "sample.guidance_scale", "sample.sampler",
        "sample.takes_images", "sample.batch_size", "sample.chunk_steps",
        "sample.step_cache",
    }
)  # fmt: skip
# What the first checkpoint is made of, and nothing after it.
READ_ONCE = frozenset({"init", "text.encoder"})

_CHANGES = "config_changes.jsonl"
_DATA = "data.json"


def check(folder: pathlib.Path, config: Mapping) -> None:
    """Compares a config with that of the folder's run, where there is one.

    Raises:
      ValueError: the folder belongs to a run that is defined by another config (lists
        the fields), or it has taken more steps than are asked for now.
    """
    if not is_claimed(folder):
        return
    taken = _steps_taken(folder)
    may_change = INCIDENTAL | READ_ONCE if taken is not None else INCIDENTAL
    changed = configs.difference(configs.read(folder), config)
    refused = [line for line in changed if line.split(":")[0] not in may_change]
    if refused:
        raise ValueError(
            f"{folder} holds a run with another config; choose another --workdir "
            "or give the old values. It differs in: " + "; ".join(refused)
        )
    num_steps = configs.flatten(config).get("loop.num_steps", taken)
    if taken is not None and num_steps < taken:
        raise ValueError(
            f"loop.num_steps is {num_steps}, but the run in {folder} has taken {taken} "
            "steps: ask for as many or more"
        )


def _steps_taken(folder: pathlib.Path) -> int | None:
    return max(checkpoint.steps(folder), default=None)


def is_claimed(folder: pathlib.Path) -> bool:
    """Whether a run has begun in this folder."""
    return (folder / "config.py.txt").is_file()


def claim(folder: pathlib.Path, config: Mapping) -> list[str]:
    """Writes the config of a run, and what has changed in it; the first process does.

    Returns:
      What has changed since the run was started last, one line a field.
    """
    if jax.process_index():
        return []
    changed = []
    if is_claimed(folder):
        was, now = configs.flatten(configs.read(folder)), configs.flatten(config)
        changed = configs.difference(was, now)
        if not changed:
            return []
        names = [line.split(":")[0] for line in changed]
        entry = {
            "step": _steps_taken(folder) or 0,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "was": {name: was[name] for name in names if name in was},
            "now": {name: now[name] for name in names if name in now},
        }
        lines = [json.dumps(line) + "\n" for line in [*changes(folder), entry]]
        digests.store(folder / _CHANGES, "".join(lines))
    configs.write(folder, config)
    return changed


def changes(folder: pathlib.Path) -> list[dict]:
    """What has changed in a run's config, oldest first: step, date, was and now."""
    file = folder / _CHANGES
    return (
        list(map(json.loads, digests.read(file).splitlines())) if file.is_file() else []
    )


def digest(folder: pathlib.Path, step: int = 0) -> str:
    """16 hex digits that name the config by which the weights of a step were trained.

    It is that which the run began with: what may change later does not bear on the
    weights, but for the number of steps that the learning rate follows, from there on.
    """
    config = configs.read(folder)
    flat = configs.flatten(config)
    for change in reversed(changes(folder)):
        for name in change["was"] | change["now"]:
            if name == "loop.num_steps" and change["step"] < step:
                continue
            flat.pop(name, None)
            flat |= {name: change["was"][name]} if name in change["was"] else {}
    if changes(folder):
        config = configs.from_text(configs.to_text(flat))
    return configs.digest(config)


def keep_data(folder: pathlib.Path, field: str, found: Sequence[str]) -> None:
    """Notes which data a run reads; the first process does.

    Args:
      folder: of the run.
      field: of the config, that names the data.
      found: the digest of each folder of it, in order.

    Raises:
      ValueError: the run has begun with other data.
    """
    file = folder / _DATA
    if is_claimed(folder) and file.is_file():
        if json.loads(digests.read(file)).get(field) != list(found):
            raise ValueError(
                f"{field} names other data than the run in {folder} began with: choose "
                "another --workdir, or bring the old data back"
            )
    elif jax.process_index() == 0:
        text = json.dumps({field: list(found)}, indent=2) + "\n"
        digests.store(file, text)


def keep(folder: pathlib.Path, name: str, source: pathlib.Path) -> None:
    """Copies a file that a run needs into it; the first process does.

    Raises:
      ValueError: the run has begun with another file, or the file is damaged.
    """
    target = folder / name
    if is_claimed(folder) and target.is_file():
        if paths.sha256_file(target) != paths.sha256_file(source):
            raise ValueError(
                f"{target} was copied from {source} when the run began, and that is "
                "another file now: choose another --workdir, or bring the old one back"
            )
    elif jax.process_index() == 0:
        digests.copy(source, target)
