"""Lists of consent and of opt-out: which clips an entry names.

An entry, one a line of a file, is one of

    source:https://example.org/film     all clips of this source, and of pages below it
    sha256:<64 hexadecimal digits>      the clip with these bytes
    hash:<64 hexadecimal digits>        clips that look like it: a perceptual hash

Hashes stand in `decisions.jsonl` of a curated folder. Sources are compared without
`http://` or `https://`, `www.`, the case of the host, and a slash at the end.

Letters: n clips, m hashes, b bits.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from sora_jax.data.curation import fingerprint

# Of a hash alone, without a thumbnail: nearly all copies, and no pair of the toy world's
# scenes, see `duplicates`.
HASH_BITS = 48
KINDS = ("source", "sha256", "hash")


@dataclasses.dataclass(frozen=True)
class Entries:
    """The entries of a list, without repeats, in their order."""

    entries: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of the entries, whatever their order."""
        return hashlib.sha256("\n".join(sorted(self.entries)).encode()).hexdigest()

    def matches(
        self,
        sources: Sequence[str],
        sha256s: Sequence[str],
        hashes: Sequence[str],
    ) -> list[list[str]]:
        """Returns the entries that name each clip, given what is known of each.

        Args:
          sources, sha256s: of the clips.
          hashes: perceptual hashes; "" for clips without one.
        """
        exact = {key(entry): entry for entry in self.entries}
        found: list[list[str]] = []
        for source, sha256 in zip(sources, sha256s, strict=True):
            keys = [f"sha256:{sha256}", *(f"source:{p}" for p in _prefixes(source))]
            found.append([exact[one] for one in keys if one in exact])
        wanted = [entry for entry in self.entries if entry.startswith("hash:")]
        clips = [clip for clip, text in enumerate(hashes) if text]
        if wanted and clips:
            hash_mb = np.stack([fingerprint.signs(e.partition(":")[2]) for e in wanted])
            for start in range(0, len(clips), 1024):
                block = clips[start : start + 1024]
                hash_nb = np.stack([fingerprint.signs(hashes[clip]) for clip in block])
                near_nm = fingerprint.differing_bits(hash_nb, hash_mb) <= HASH_BITS
                for row, column in zip(*np.nonzero(near_nm), strict=True):
                    found[block[row]].append(wanted[column])
        return found


def read(lines: Iterable[str], where: str) -> tuple[str, ...]:
    """Returns the entries of lines; empty ones and those that begin with # are comments.

    Raises:
      ValueError: a line is no entry; names the place and the line.
    """
    entries = []
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if line and not line.startswith("#"):
            kind, colon, value = line.partition(":")
            if not colon or kind not in KINDS or not value.strip():
                raise ValueError(
                    f"{where}:{number}: an entry is source:URL, sha256:HEX or hash:HEX, "
                    f"not {line[:80]!r}"
                )
            value = value.strip()
            if kind != "source":
                value = value.lower()
                if not re.fullmatch("[0-9a-f]{64}", value):
                    raise ValueError(
                        f"{where}:{number}: {kind} has 64 hexadecimal digits, not "
                        f"{value[:80]!r}"
                    )
            entries.append(f"{kind}:{value}")
    return tuple(dict.fromkeys(entries))


def key(entry: str) -> str:
    """Returns an entry as it is compared: equal for all ways to write a source."""
    kind, _, value = entry.partition(":")
    return f"source:{_address(value)}" if kind == "source" else entry


def _address(source: str) -> str:
    if scheme := re.match(r"https?://(www\.)?", source, re.IGNORECASE):
        host, slash, path = source[scheme.end() :].partition("/")
        source = host.lower() + slash + path
    return source.rstrip("/")


def _prefixes(source: str) -> list[str]:
    """A source and all that it lies below, the longest first."""
    whole = _address(source)
    ends = [match.start() for match in re.finditer(r"[/?&# ]", whole)]
    return list(dict.fromkeys([whole, *(whole[:end] for end in reversed(ends))]))
