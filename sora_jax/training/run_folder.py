"""Which run a folder belongs to: its config, and digests of the data it is trained on.

A run claims its folder by writing config.py.txt once everything has been checked, so a
start that was refused leaves the folder free.

A run may be resumed with another mesh, other paths or more steps. config.py.txt then has
the new values; config_changes.jsonl has the old ones, the step and the date.
"""

import datetime
import json
import pathlib
from collections.abc import Mapping, Sequence

import jax

from sora_jax.core import config as configs
from sora_jax.core import digests, paths
from sora_jax.training import checkpoint

# Fields that decide where and how a run is computed, logged and sampled, not what it
# learns. All other fields define the run.
INCIDENTAL = frozenset(
    {
        "mesh.replica",
        "mesh.fsdp",
        "mesh.ring",
        "mesh.ulysses",
        "mesh.tensor",
        "model.dit.remat",
        # Paths of the data; its digest is compared instead.
        "data.shards",
        "data.latents",
        "data.eval_shards",
        "data.eval_clips",
        "data.gap_clips",
        "data.sample_prompts",
        "data.num_workers",
        "data.max_corrupt_share",
        "packing.max_padding",
        "reconstruction.lpips_weights",  # the run has a copy
        "loop.num_steps",
        "loop.minutes",
        "loop.accumulation",
        "loop.log_every",
        "loop.eval_every",
        "loop.checkpoint_every",
        "loop.keep_checkpoints",
        "loop.max_skipped_in_a_row",
        # Defaults that each call can override.
        "sample.num_frames",
        "sample.height",
        "sample.width",
        "sample.fps",
        "sample.num_inference_steps",
        "sample.guidance_scale",
        "sample.sampler",
        "sample.takes_images",
        "sample.batch_size",
        "sample.chunk_steps",
        "sample.step_cache",
        "sample.guidance_rescale",
        "sample.given_scale",
        "sample.anchor_tau",
    }
)
# Fields that are not used once there is a checkpoint.
READ_ONCE = frozenset({"init", "text.encoder"})

CHANGES = "config_changes.jsonl"
_DATA = "data.json"


def check(folder: pathlib.Path, config: Mapping) -> None:
    """Compares a config with that of the folder's run, if there is one.

    Raises:
      ValueError: the run is defined by another config (the message lists the fields),
        or it has already taken more steps than the config asks for.
    """
    if not is_claimed(folder):
        return
    if checkpoint.is_released(folder):
        raise ValueError(
            f"{folder} holds released weights, which have no training state: train in "
            f"another --out with --init {folder}"
        )
    taken = _steps_taken(folder)
    may_change = INCIDENTAL | READ_ONCE if taken is not None else INCIDENTAL
    changed = configs.difference(configs.read(folder), config)
    refused = [line for line in changed if line.split(":")[0] not in may_change]
    if refused:
        raise ValueError(
            f"{folder} holds a run with another config; choose another --out "
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
    """Whether a run has started in this folder."""
    return (folder / "config.py.txt").is_file()


def claim(folder: pathlib.Path, config: Mapping) -> list[str]:
    """Writes the config of a run and, on resuming, what has changed in it.

    Only process 0 writes. Call it after `check`.

    Returns:
      The changes since the last start, one line a field.
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
        digests.store(folder / CHANGES, "".join(lines))
    configs.write(folder, config)
    return changed


def changes(folder: pathlib.Path) -> list[dict]:
    """The changes of a run's config, oldest first: step, date, was and now."""
    file = folder / CHANGES
    if not file.is_file():
        return []
    return [json.loads(line) for line in digests.read(file).splitlines()]


def changed_at(folder: pathlib.Path, name: str) -> int:
    """The step at which a field of the config was last changed; 0 if never."""
    return max((c["step"] for c in changes(folder) if name in c["now"]), default=0)


def digest(folder: pathlib.Path, step: int = 0) -> str:
    """16 hex digits that identify the config which the weights of a step depend on.

    That is the config of the run's first start, since fields that may change later do
    not affect the weights. The exception is loop.num_steps: through the learning rate
    schedule it affects the steps after its change.
    """
    flat = configs.flatten(configs.read(folder))
    for change in reversed(changes(folder)):
        stays = {"loop.num_steps"} if change["step"] < step else set()
        for name in change["now"].keys() - stays:
            del flat[name]
        flat |= {n: old for n, old in change["was"].items() if n not in stays}
    return configs.digest(flat)


def keep_data(folder: pathlib.Path, field: str, data_digests: Sequence[str]) -> None:
    """Records which data a new run is trained on (process 0), or checks a resumed one.

    Args:
      folder: of the run.
      field: of the config, which names the folders of the data.
      data_digests: of each of these folders, in order.

    Raises:
      ValueError: the run started with other data.
    """
    file = folder / _DATA
    if is_claimed(folder) and file.is_file():
        if json.loads(digests.read(file)).get(field) != list(data_digests):
            raise ValueError(
                f"{field} names other data than the run in {folder} started with: "
                "choose another --out, or give the path of the old data"
            )
    elif jax.process_index() == 0:
        text = json.dumps({field: list(data_digests)}, indent=2) + "\n"
        digests.store(file, text)


def keep(folder: pathlib.Path, name: str, source: pathlib.Path) -> None:
    """Copies a file that a new run needs into its folder (process 0), or checks the copy.

    Raises:
      ValueError: the run started with another file, or the file is damaged.
    """
    target = folder / name
    if is_claimed(folder) and target.is_file():
        if paths.sha256_file(target) != paths.sha256_file(source):
            raise ValueError(
                f"{target} was copied from {source} when the run started, and that is "
                "another file now: choose another --out, or restore the old file"
            )
    elif jax.process_index() == 0:
        digests.copy(source, target)
