"""The journal of a captioning job: every answer as soon as it is there.

    {"clip": "a.mp4#00000", "sha256": "...", "tier": "model_dense", "text": "A dog ...",
     "model": "...", "prompt": "...", "settings": "...", "seed": 1, "time": "...", "tries": 2,
     "requests": 3, "input_tokens": 2214, "output_tokens": 131,
     "rejected": [{"text": "I cannot ...", "reason": "it refuses", "seed": 0}],
     "failed": null}

A line tells all about one clip and one tier; the last one counts. So a job that is killed
asks nothing again that was answered before.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sora_jax.captioning import captioner

NAME = "captions.jsonl"
_SYNC = 1.0  # seconds between writes that are forced to the disk


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is known about a clip and a tier.

    Attributes:
      clip, sha256, tier: of the question.
      text: the caption that is kept; None: there is none yet.
      seed: of the last answer.
      tries: answers.
      rejected: answers that were not kept: text, reason and seed of each.
      requests, input_tokens, output_tokens: that all of them took.
      failed: why the last question has no answer; None where it has.
      lasting: whether asking again would fail again.
    """

    clip: str
    sha256: str
    tier: str
    text: str | None = None
    seed: int = 0
    tries: int = 0
    rejected: tuple[Mapping[str, Any], ...] = ()
    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    failed: str | None = None
    lasting: bool = False

    def answered(
        self, answer: captioner.Answer, seed: int, text: str, problem: str | None
    ) -> "Entry":
        """Returns the entry after one more answer, which is kept without a problem."""
        rejected = self.rejected
        if problem:
            rejected += ({"text": answer.text, "reason": problem, "seed": seed},)
        return dataclasses.replace(
            self,
            text=None if problem else text,
            seed=seed,
            tries=self.tries + 1,
            rejected=rejected,
            requests=self.requests + answer.requests,
            input_tokens=self.input_tokens + answer.input_tokens,
            output_tokens=self.output_tokens + answer.output_tokens,
            failed=None,
            lasting=False,
        )

    def failing(self, failure: captioner.Failure) -> "Entry":
        """Returns the entry after a question without an answer."""
        return dataclasses.replace(
            self,
            requests=self.requests + failure.requests,
            failed=failure.reason,
            lasting=failure.lasting,
        )


class Journal:
    """The answers of one captioner, in a file that grows; a context manager.

    Lines of other captioners or of other prompts are left in the file and do not count.

    Args:
      path: the file; made if it is missing. A last line that a crash cut off is removed.
      writer: the captioner, whose name and hashes are written with each answer.

    Raises:
      ValueError: a line that is complete is no entry.
      OSError: the file cannot be read or written.
    """

    def __init__(self, path: pathlib.Path, writer: captioner.Captioner):
        self._path = path
        self._stamps = {
            tier: {"model": writer.id, "prompt": prompt, "settings": writer.digest}
            for tier, prompt in writer.prompts.items()
        }
        self._entries: dict[tuple[str, str], Entry] = {}
        content = path.read_bytes() if path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        fields = {field.name for field in dataclasses.fields(Entry)}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                stamp = {name: row[name] for name in ("model", "prompt", "settings")}
                entry = Entry(**{name: row[name] for name in fields})
            except (ValueError, LookupError, TypeError):
                raise ValueError(
                    f"{path}: line {number} is no answer; remove it, and it is asked again"
                ) from None
            if stamp == self._stamps.get(entry.tier):
                self._entries[entry.clip, entry.tier] = entry
        self._file = open(path, "ab", buffering=0)
        if len(whole) < len(content):
            self._file.truncate(len(whole))
        self._synced = time.monotonic()

    def entry(self, clip: str, sha256: str, tier: str) -> Entry:
        """Returns what is known of a clip and a tier; a changed clip is a new one."""
        found = self._entries.get((clip, tier))
        return found if found and found.sha256 == sha256 else Entry(clip, sha256, tier)

    def open_tiers(
        self, clip: str, sha256: str, tiers: Sequence[str], retries: int
    ) -> list[str]:
        """Returns the tiers in which a clip is still to be asked about."""
        found = {tier: self.entry(clip, sha256, tier) for tier in tiers}
        return [t for t, e in found.items() if e.text is None and e.tries <= retries]

    def write(self, entry: Entry) -> None:
        """Appends an entry, which replaces what was known.

        Raises:
          OSError: it could not be written; the file is left without it.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row = dataclasses.asdict(entry) | self._stamps[entry.tier] | {"time": now}
        line = (json.dumps(row) + "\n").encode()
        end = os.fstat(self._file.fileno()).st_size
        try:
            while line:  # a disk that is nearly full takes a part of it first
                line = line[self._file.write(line) :]
            if time.monotonic() - self._synced > _SYNC:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            self._file.truncate(end)
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self._entries[entry.clip, entry.tier] = entry

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
