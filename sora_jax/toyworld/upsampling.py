"""Rules that rewrite a short prompt of the toy world as a caption that says more.

What the prompt states is kept. What it leaves open (a speed, a place, the background, even
a colour) is drawn as for a scene of training, and all of it is worded as a caption.
"""

import dataclasses

from sora_jax.toyworld import families, grammar
from sora_jax.toyworld.scene import Draws, Slots, Subject

_TRIES = 100


def upsample(text: str, tier: str, seed: int = 0, size_class: str = "tw32") -> str:
    """Rewrites a prompt; returns it as it is if it states nothing of the toy world.

    Args:
      text: the prompt. Words that the toy world does not have are dropped.
      tier: of caption: "short", "medium", "dense" or "structured".
      seed: another one fills in other facts.
      size_class: tier of scenes whose colours, shapes and ways are filled in.

    Raises:
      ValueError: an unknown tier.
    """
    stated = grammar.parse(text)
    if stated.family is None or len(stated.subjects) > 2:
        return text
    label = f"upsample/{size_class}/{tier}/{text}"
    first = int(Draws(seed, label, 0).unit() * 2**40)
    for number in range(_TRIES):
        scene = families.scene(
            size_class, "train", first + number, {stated.family: 1.0}, seed
        )
        full = _filled(stated, scene.truth)
        if full is not None:
            wording = families.FAMILIES[stated.family].wording
            return grammar.compose(full, wording, tier, Draws(seed, label, number))[0]
    return text


def _filled(stated: Slots, drawn: Slots) -> Slots | None:
    """What is stated, with the rest as drawn; None if the two do not go together."""
    if len(stated.subjects) > len(drawn.subjects):
        return None
    subjects = tuple(
        _over(drawn_subject, stated_subject)
        for drawn_subject, stated_subject in zip(
            drawn.subjects,
            stated.subjects + (Subject(),) * len(drawn.subjects),
            strict=False,
        )
    )
    colours = [subject.colour for subject in subjects]
    if len(set(colours)) < len(colours):  # colours tell subjects apart
        return None
    full = _over(drawn, dataclasses.replace(stated, subjects=()))
    full = dataclasses.replace(full, subjects=subjects)
    # Training has none of the held-out combinations: only a prompt may ask for one.
    return None if full.held_out() and not stated.held_out() else full


def _over(drawn, stated):
    """The fields of one record where they are given, else those of the other."""
    given = {
        field.name: value
        for field in dataclasses.fields(stated)
        if (value := getattr(stated, field.name)) not in (None, ())
    }
    return dataclasses.replace(drawn, **given)
