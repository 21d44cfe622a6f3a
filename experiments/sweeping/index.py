"""Which points have run: a line of OUT/index.jsonl each, always whole.

The file is what a sweep is resumed from, and what a person greps. A point's results
lie in OUT/points/ID.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

from experiments.sweeping import points
from sora_jax.core import config as configs
from sora_jax.core import paths

WAITING, RUNNING, HANDED_OVER = "waiting", "running", "handed over"
FINISHED, FAILED, STOPPED = "finished", "failed", "stopped"


@dataclasses.dataclass
class Entry:
    """What is known of one point.

    Attributes:
      id, name, settings: of the point.
      state: one of the words above.
      commands: what runs, one list of arguments a job.
      seconds: of its jobs, over all attempts since it last failed.
      exit_code: of the job that ended last; None before.
      log: file of what they print.
      pid: of the job that runs now.
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
        """Where the point's results lie."""
        return pathlib.Path(self.log).parent


class Index:
    """The entries of a sweep, in its order, on disk after every `write`.

    What an earlier sweep in the same folder has finished stays finished where this one
    has the same points. It may have more of them, never fewer: then it is another.

    Args:
      out: the sweep's folder.
      resolved: the points.
      python: what starts a job.

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
        """Puts the file in step with the entries."""
        lines = (json.dumps(dataclasses.asdict(entry)) for entry in self.entries)
        paths.write_atomically(self.path, "".join(f"{line}\n" for line in lines))

    def in_state(self, *states: str) -> list[Entry]:
        """The entries in one of these states."""
        return [entry for entry in self.entries if entry.state in states]


def read(path: pathlib.Path) -> list[Entry]:
    """The entries of an index; none where there is no file."""
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
        f"lacks; the nearest differs in {'; '.join(nearest)}. Give another --out"
    )
