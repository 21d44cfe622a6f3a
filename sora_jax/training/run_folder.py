"""To which run a folder belongs: the config that lies in it, and what it was made of.

A folder is claimed once everything that a run needs has been found to fit together, so
that a start that was refused leaves nothing behind that the next one would trip over.
"""

import pathlib
from collections.abc import Mapping

import jax

from sora_jax.core import config as configs
from sora_jax.core import paths


def check(folder: pathlib.Path, config: Mapping) -> None:
    """Compares a config with that of the folder's run, where there is one.

    Raises:
      ValueError: the folder belongs to a run with another config; lists the fields.
    """
    if not is_claimed(folder):
        return
    changed = configs.difference(configs.read(folder), config)
    if changed:
        raise ValueError(
            f"{folder} holds a run with another config; choose another --workdir "
            "or give the old values. It differs in: " + "; ".join(changed)
        )


def is_claimed(folder: pathlib.Path) -> bool:
    """Whether a run has begun in this folder."""
    return (folder / "config.py.txt").is_file()


def claim(folder: pathlib.Path, config: Mapping) -> None:
    """Writes the config of a new run; the first process does."""
    if jax.process_index() == 0 and not is_claimed(folder):
        paths.write_atomically(folder / "config.py.txt", configs.to_text(config))


def keep(folder: pathlib.Path, name: str, source: pathlib.Path) -> None:
    """Copies a file that a run needs into it; the first process does.

    Raises:
      ValueError: the run has begun with another file.
    """
    target = folder / name
    if is_claimed(folder) and target.is_file():
        if paths.sha256_file(target) != paths.sha256_file(source):
            raise ValueError(
                f"{target} was copied from {source} when the run began, and that is "
                "another file now: choose another --workdir, or bring the old one back"
            )
    elif jax.process_index() == 0:
        paths.copy_atomically(source, target)
