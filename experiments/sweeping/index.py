"""The state of each point of a sweep: one line of OUT/index.jsonl, written atomically.

A sweep is resumed from this file. The results of a point are in OUT/points/ID.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

from experiments.sweeping import points
from sora_jax.core import config as configs
from sora_jax.core import paths

WAITING, RUNNING, SUBMITTED = "waiting", "running", "submitted"
FINISHED, FAILED, STOPPED = "finished", "failed", "stopped"


@dataclasses.dataclass
class Entry:
    """The state of one point.

    Attributes:
      id, name, settings: of the point.
      state: one of the words above.
      commands: of its jobs, each a list of arguments.
      log: file of their output.
      seconds: run time of its jobs, over all attempts since the last failure.
      exit_code: of the last job that ended; None before.
      pid: of the running job.
    """

    id: str
    name: str
    settings: Mapping[str, object]
    state: str
    commands: list[list[str]]
    log: str
    seconds: float = 0.0
    exit_code: int | None = None
    pid: int | None = None

    @property
    def folder(self) -> pathlib.Path:
        """The folder of the point's results."""
        return pathlib.Path(self.log).parent


class Index:
    """The entries of a sweep in its order, stored on disk by `write`.

    Points that an earlier run in the same folder has finished stay finished. A sweep may
    gain points, but not lose any.

    Args:
      out: the sweep's folder.
      resolved: the points.
      python: interpreter of the jobs.

    Raises:
      ValueError: the folder belongs to another sweep; the message says what differs.
    """

    def __init__(
        self,
        out: pathlib.Path,
        resolved: Sequence[points.Resolved],
        python: str,
    ):
        self.path = out / "index.jsonl"
        before = {entry.id: entry for entry in read(self.path)}
        wanted = {point.id for point in resolved}
        new = [point for point in resolved if point.id not in before]
        for entry in before.values():
            if entry.id not in wanted:
                raise ValueError(_refusal(out, entry, new or resolved))
        self.entries = []
        for point in resolved:
            folder = out / "points" / point.id
            entry = Entry(
                point.id,
                point.name,
                point.settings,
                WAITING,
                [[python, *command] for command in point.commands(folder)],
                str(folder / "log.txt"),
            )
            if point.id in before:
                known = before[point.id]
                entry.state, entry.seconds = known.state, known.seconds
                entry.exit_code, entry.pid = known.exit_code, known.pid
            self.entries.append(entry)

    def write(self) -> None:
        """Writes the file."""
        lines = (json.dumps(dataclasses.asdict(entry)) for entry in self.entries)
        paths.write_atomically(self.path, "".join(f"{line}\n" for line in lines))

    def in_state(self, *states: str) -> list[Entry]:
        """Returns the entries in one of these states."""
        return [entry for entry in self.entries if entry.state in states]


def read(path: pathlib.Path) -> list[Entry]:
    """Returns the entries of an index file; none if there is no file."""
    if not path.is_file():
        return []
    return [Entry(**json.loads(line)) for line in path.read_text().splitlines()]


def _refusal(
    out: pathlib.Path, entry: Entry, resolved: Sequence[points.Resolved]
) -> str:
    differences = [configs.difference(entry.settings, p.settings) for p in resolved]
    nearest = min(differences, key=len) or ["the job"]
    return (
        f"{out} holds another sweep, with a point {entry.id} ({entry.name}) that this one "
        f"lacks; the nearest point differs in {'; '.join(nearest)}. Use another --out"
    )
