"""What a curation did, in numbers: for `curation.json`, the terminal and the page."""

import collections
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from sora_jax.data import reports
from sora_jax.data.curation import decisions, policy


def summarise(
    policy_: policy.Policy,
    clips: Sequence[decisions.Scored],
    decided: Sequence[decisions.Decision],
) -> dict[str, Any]:
    """Returns the counts, as JSON values.

    Of each rule: `clips` that it speaks against, those that it `alone` speaks against,
    and how many are `left` after it and the rules before it. Of the lists, the entries
    that named no clip.
    """
    rules = _rules([one.reasons for one in decided])
    left, refused = set(range(len(clips))), {}
    for rule in rules:
        hit = {i for i, one in enumerate(decided) if rule in one.reasons}
        left -= hit
        refused[rule] = {
            "clips": len(hit),
            "alone": sum(len(decided[i].reasons) == 1 for i in hit),
            "left": len(left),
        }
    kept = [clip for clip, one in zip(clips, decided, strict=True) if one.kept]
    licences = collections.Counter(clip.licence for clip in kept)
    consent = policy_.consent
    return {
        "clips": len(clips),
        "kept": len(kept),
        "refused": refused,
        "licences_kept": dict(sorted(licences.items())),
        "without_a_clip": {
            "consent": decisions.unused(consent, clips) if consent else [],
            "opt_out": decisions.unused(policy_.opt_out, clips),
        },
        "policy": policy_.settings(),
    }


def _rules(reasons: Sequence[Mapping[str, str]]) -> list[str]:
    """The rules that speak against any clip, in their order."""
    found = {rule for of in reasons for rule in of}
    first = ("damaged", "licence", "consent", "opt_out")
    limits = sorted(rule for rule in found if rule.startswith("limits."))
    return [rule for rule in (*first, *limits, "duplicates") if rule in found]


def lines(summary: Mapping[str, Any]) -> list[str]:
    """Returns the lines that `prepare` prints."""
    kept_all = "" if summary["policy"]["filter"] else " (filter = false)"
    found = [
        f"curation: {summary['kept']} of {summary['clips']} clips kept{kept_all}",
        *(
            f"{of['clips']:6d} against {rule}, {of['alone']} of them by it alone; "
            f"{of['left']} left"
            for rule, of in summary["refused"].items()
        ),
    ]
    for name, entries in summary["without_a_clip"].items():
        if entries:
            some = ", ".join(map(reports.name, itertools.islice(entries, 3)))
            found.append(
                f"entries of {name} that name no clip of the input: {len(entries)}, such "
                f"as {some}"
            )
    return found
