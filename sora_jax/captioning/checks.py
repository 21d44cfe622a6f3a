"""Which answers are no captions, and why.

The rules are for captions in English. They look at the text alone, except for the last:
a thing that moves left in the text and right in the clip.
"""

import collections
import itertools
import re
import unicodedata
from collections.abc import Callable

from sora_jax.captioning import captioner, motion
from sora_jax.data import texts

# Raise the one whose answers may be judged otherwise: of assistants, of other captioners.
VERSIONS = {True: 1, False: 2}

# Words of a tier's captions, at least and at most.
WORDS = {"model_short": (2, 30), "model_dense": (12, 250)}

_REFUSED = re.compile(
    r"\b(i['’]?m sorry|i am sorry|i apologi[sz]e|i can(no|['’])t|i can not|i['’]?m unable"
    r"|i am unable|i['’]?m not able|i am not able|i won['’]t|as an ai\b|as a language model"
    r"|i don['’]t see any|i do not see any|no (images?|video|frames) (was|were|is|are)"
    r"|(provide|upload|share) (the|an?|your|some) (images?|video|frames))",
    re.IGNORECASE,
)
_OPENING = re.compile(
    r"(sure|certainly|of course|okay|here(['’]s| is| are)|(dense |short )?(caption|description)\b"
    r"|in (the|this) (video|clip|footage|sequence|frames?|images?)\b"
    r"|(the|this|these) (short |provided |given )?(video|clip|footage|sequence|frames?|images?)"
    r"( clip| sequence| frames| of frames)?"
    r" (shows?|show|depicts?|features?|captures?|begins?|starts?|opens?|presents?|displays?"
    r"|portrays?|illustrates?|appears?|seems?|is|are)\b)",
    re.IGNORECASE,
)
_PHRASES = re.compile(
    r"\b(in conclusion|in summary|to summari[sz]e|overall, (the|this)|let me know"
    r"|(first|second|third|fourth|last|final|next) (frame|image)\b|frames? \d+"
    r"|(across|throughout|in) (all )?(the|these) (frames|images))\b",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"\*\*|```|<\w|</|^\s*[#{\[]|^\s*([-*•]|\d+[.)]) |\\n")
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_ENGLISH = frozenset(
    "a an and are as at by from in into is it its of on over the their there to two up"
    " while with".split()
)
_LEAST_ENGLISH = 0.1  # share of such words, of texts that are long enough to tell
_TELLS_LANGUAGE = 12  # words
_OTHER_SCRIPT = 0.1  # share of letters that are not Latin

# -- directions -----------------------------------------------------------------------

_OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
_VERB = (
    r"(?:mov|travel|slid|glid|drift|head|shift|float|roll|run|walk|fl(?:y|ies)|swim|swam"
    r"|driv|rac|sail|scroll|crawl|march|stroll|jog|sprint|rid|proceed|advanc|go(?:es|ing)\b"
    r"|pass|cross|mak)\w*"
)
# What may stand between a verb and its direction: no noun that the side could belong to.
_BETWEEN = (
    r"(?:\s+(?:\w+ly|straight|its|their|his|her|way|fast|very|steadily|slowly|further|back"
    r"|across|the|to|towards?|frame|screen|scene|picture|image)){0,5}?"
)
# After a side that is a direction: the end, or a word that begins something else.
_AFTER = (
    r"(?=\s*(?:[.,;:!?)]|$)|\s+(?:and|while|as|across|at|in|on|over|through|then|until|before"
    r"|behind|past|along|with|toward|towards|against|by|for|when|during|\w+ly"
    r"|of\s+the\s+(?:frame|screen|scene|picture|view|image)\b))"
)
_TO = (
    r"(left|right|up|down|top|bottom|upper|lower)(?:wards?)?\b"
    r"(?:(?:\s+and\s+|[\s-]+)(left|right|up|down)(?:wards?)?\b)?"
    r"(?:\s+(?:side|edge|corner|part|half|end)\b)?"
)
_MOVES = re.compile(rf"\b{_VERB}{_BETWEEN}\s+{_TO}{_AFTER}")
_WARDS = re.compile(r"\b(left|right|up|down)wards?\b")
_FROM_TO = re.compile(
    r"\bfrom (?:the )?(?:left|right|top|bottom)[\w\s-]{0,40}? to(?:wards?)? (?:the )?"
    r"(left|right|top|bottom)\b"
)
_VERTICAL = {"top": "up", "upper": "up", "bottom": "down", "lower": "down"}
# Sentences about the view, and those that deny or that compare.
_NOT_OF_THINGS = re.compile(
    r"\b(camera|view|viewpoint|lens|shot|pans?|panning|tilts?|tilting|zooms?|zooming|not|never"
    r"|without|neither|nor|no longer|\w+n['’]t|look\w*|fac(?:es|ing|ed)|point\w*|turn\w*)\b"
)
# Shares of a clip's motion: of a way that things surely go, and of one that none goes.
_CLEAR, _TRACES = 0.8, 0.1


def directions(text: str) -> set[str]:
    """Returns which of "left", "right", "up", "down" a text says that things move.

    Positions ("on the left", "left of the house"), the camera's motion, and sentences
    with a negation give none.
    """
    found = set()
    for sentence in re.split(r"[.;!?]\s+|\bwhile\b|\bas\b", text.lower()):
        if _NOT_OF_THINGS.search(sentence):
            continue
        for pattern in (_MOVES, _WARDS, _FROM_TO):
            for match in pattern.finditer(sentence):
                found |= {
                    _VERTICAL.get(side, side) for side in filter(None, match.groups())
                }
    return found


def _contradiction(text: str, measured: Callable[[], motion.Motion]) -> str | None:
    said = directions(text)
    if not said:
        return None
    seen = measured()
    if not seen.is_known:
        return None
    for way in sorted(said):
        other = _OPPOSITE[way]
        if (
            other not in said
            and seen.shares[other] >= _CLEAR
            and seen.shares[way] <= _TRACES
        ):
            return f"it says {way}, and what moves in the clip moves {other}"
    return None


# -- texts ----------------------------------------------------------------------------


def cleaned(text: str) -> str:
    """Returns an answer as one line, without quotes around it."""
    text = texts.normalise(text)
    if len(text) > 1 and (text[0], text[-1]) in (('"', '"'), ("“", "”"), ("'", "'")):
        text = text[1:-1].strip()
    return text


def problem(
    answer: captioner.Answer,
    tier: str,
    measured: Callable[[], motion.Motion],
    is_assistant: bool = True,
) -> str | None:
    """Returns why an answer is no caption; None if it may be kept.

    Args:
      answer: of a captioner.
      tier: that it was asked for.
      measured: returns the motion in the clip; called where the text states a direction.
      is_assistant: see `captioner.Captioner`.
    """
    text = cleaned(answer.text)
    return problem_of_text(answer, tier, is_assistant) or _contradiction(text, measured)


def problem_of_text(
    answer: captioner.Answer, tier: str, is_assistant: bool = True
) -> str | None:
    """The same by the text alone, for one that describes no clip."""
    text = cleaned(answer.text)
    if answer.stopped in ("refusal", "content_filter"):
        return f"it is withheld ({answer.stopped})"
    if not text:
        return "it is empty"
    if is_assistant and _REFUSED.search(text):
        return "it refuses"
    if answer.stopped == "length":
        return "it is cut off at the limit of tokens"
    if answer.stopped in ("abort", "error"):
        return "the server broke it off"
    if is_assistant and (matched := _MARKUP.search(answer.text.strip())):
        return f"it has markup: {matched[0]!r}"
    opening = _OPENING.match(text) or _PHRASES.search(text)
    if is_assistant and opening:
        return f"it has a set phrase: {opening[0]!r}"
    return _wrong_script(text) or _wrong_length(text, tier) or _repeated(text)


def _wrong_script(text: str) -> str | None:
    letters = [character for character in text if character.isalpha()]
    other = [c for c in letters if not unicodedata.name(c, "").startswith("LATIN")]
    if not letters or len(other) > _OTHER_SCRIPT * len(letters):
        return "it is not in Latin letters"
    words = [word.lower() for word in _WORD.findall(text)]
    if len(words) >= _TELLS_LANGUAGE:
        if sum(word in _ENGLISH for word in words) < _LEAST_ENGLISH * len(words):
            return "it is not in English"
    return None


def _wrong_length(text: str, tier: str) -> str | None:
    least, most = WORDS[tier]
    count = len(_WORD.findall(text))
    if not least <= count <= most or len(text) > texts.MAX_CHARACTERS:
        return f"it has {count} words, not {least} to {most}"
    return None


def _repeated(text: str) -> str | None:
    words = [word.lower() for word in _WORD.findall(text)]
    for one, other, third in zip(words, words[1:], words[2:], strict=False):
        if one == other == third:
            return f"it repeats {one!r}"
    runs = collections.Counter(
        itertools.islice(zip(*(words[k:] for k in range(5)), strict=False), len(words))
    )
    for run, count in runs.most_common(1):
        if count > 2:
            return f"it repeats {' '.join(run)!r}"
    return None
