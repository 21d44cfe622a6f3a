"""The toy world's oracle: does a video show what a scene or a text states?

Verdicts come from the frames alone: `reading.py` finds what is there, and the family's rule
decides. They are exact on
rendered clips, also under mild blur and noise (see the control table of
`experiments/toyworld_controls.py`). What cannot be parsed counts as not shown.
"""

import numpy as np

from sora_jax.toyworld.families import find_family
from sora_jax.toyworld.reading import Reading, read
from sora_jax.toyworld.scene import FAMILY_OF_EVENT, Scene, Slots

__all__ = ["Reading", "read", "score", "score_slots"]


def score_slots(
    slots: Slots, video: np.ndarray | Reading, family: str | None = None
) -> dict[str, bool]:
    """Verdicts on what the slots state, by the rule of `family` or the slots' own family.

    Slots that state nothing measurable give {"pass": False}.
    """
    name = slots.family if family is None else family
    if name is None:
        return {"pass": False}
    reading = video if isinstance(video, Reading) else read(video)
    family_of, kinds = (
        find_family(name),
        {FAMILY_OF_EVENT[e.kind] for e in slots.events},
    )
    verdict = family_of.rule(slots, reading)
    # What is stated besides counts as not shown.
    if kinds - {name} or len(slots.events) > family_of.most_events:
        return verdict | {"pass": False}
    return verdict


def score(scene: Scene, video: np.ndarray | Reading) -> dict[str, bool]:
    """Verdicts on all facts of the scene, for each part and "pass".

    `video` is uint8[T, H, W, 3] (or its reading). Parts by family: attribute colour,
    shape; count colour, count, shape; relation side, colours, shapes; motion colour,
    shape, direction, speed; motion_binding colours, shapes, directions, speeds; camera
    camera, colour, shape; gravity colour, shape, falls, way, bounce; collision colours,
    shapes, approach, meet, separate, momentum, speeds;
    shots colour, shape, same, cuts, backgrounds, acts; to_and_fro
    colour, shape, direction, turns, speeds, end; camera_path first, second, time, colour,
    shape; change colour, shape, change, steady, same.
    """
    return score_slots(scene.truth, video, scene.family)
