"""Rules that rewrite a short prompt of the toy world as a caption that says more.

What the prompt states is kept. What it leaves open (a speed, a place, the background, even
a colour) is drawn as for a scene of training, and all of it is worded as a caption.
"""

import dataclasses
import functools
import re

from sora_jax.toyworld import families, grammar, lexicon
from sora_jax.toyworld.scene import Draws, Slots, Subject

SIZE_CLASS = "tw32"  # whose colours, shapes and ways are filled in
_TRIES = 100
# Words of prompts that are in no caption.
_FILLERS = frozenset(
    "a an the and while with of in on at to is are that there then".split()
)


def upsample(text: str, tier: str, seed: int = 0) -> str:
    """Rewrites a prompt; returns it as it is where that would change what it states.

    That is where it has words that captions do not have, states nothing of the toy world,
    an event, or more than a caption of the tier can say.

    Args:
      text: the prompt.
      tier: of caption: "short", "medium", "dense" or "structured".
      seed: another one fills in other facts.

    Raises:
      ValueError: an unknown tier.
    """
    stated = grammar.parse(text)
    foreign = set(grammar.unread(text)) - _words_around()
    unknown = foreign or stated.family is None
    if unknown or stated.events or len(stated.subjects) > 2:
        return text
    label = f"upsample/{SIZE_CLASS}/{tier}/{text}"
    first = int(Draws(seed, label, 0).unit() * 2**40)
    for number in range(_TRIES):
        scene = families.scene(
            SIZE_CLASS, "train", first + number, {stated.family: 1.0}, seed
        )
        full = _filled(stated, scene.truth)
        if full is not None:
            wording = families.FAMILIES[stated.family].wording
            draws = Draws(seed, label, number)
            longer, said = grammar.compose(full, wording, tier, draws)
            if _contains(said.by_place(), stated.by_place()):
                return longer
    return text


@functools.cache
def _words_around() -> frozenset[str]:
    """Words of captions that state nothing."""
    texts = [*lexicon.VERBS, *lexicon.MOVING, *lexicon.RESTS, *lexicon.COLOUR_FORMS]
    for family in families.FAMILIES.values():
        for templates in dataclasses.astuple(family.wording):
            for group in templates:
                texts += [group] if isinstance(group, str) else group
    texts = (re.sub(r"\{\w*\}", " ", text) for text in texts)
    return frozenset(word for text in texts for word in text.split()) | _FILLERS


def _filled(stated: Slots, drawn: Slots) -> Slots | None:
    """What is stated, with the rest as drawn; None if the two do not go together."""
    if len(stated.subjects) > len(drawn.subjects):
        return None
    padded = stated.subjects + (Subject(),) * len(drawn.subjects)
    pairs = zip(drawn.subjects, padded, strict=False)
    subjects = tuple(_over(drawn, given) for drawn, given in pairs)
    colours = [subject.colour for subject in subjects]
    if len(set(colours)) < len(colours):  # colours tell subjects apart
        return None
    full = _over(drawn, dataclasses.replace(stated, subjects=()))
    full = dataclasses.replace(full, subjects=subjects)
    # Training has none of the held-out combinations: only a prompt may ask for one.
    return None if full.held_out() and not stated.held_out() else full


def _over(drawn, stated):
    """The fields of one record where they are given, else those of the other."""
    return dataclasses.replace(drawn, **_given(stated))


def _given(record) -> dict[str, object]:
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    return {name: value for name, value in values.items() if value not in (None, ())}


def _contains(said: Slots, stated: Slots) -> bool:
    """Whether all that is stated is said, of the same subjects in order."""
    pairs = [*zip(stated.subjects, said.subjects, strict=False)]
    if len(pairs) < len(stated.subjects):
        return False
    pairs.append(
        tuple(dataclasses.replace(slots, subjects=()) for slots in (stated, said))
    )
    return all(_given(a).items() <= _given(b).items() for a, b in pairs)
