"""The toy world's words: the phrases for each value of each slot.

The first phrase of a value is the usual one and is drawn half of the time. No phrase may
have two meanings or occur in the wording around the slots: the parser finds phrases,
longest first, and ignores all other words.
"""

from sora_jax.toyworld.scene import CAMERAS, DIRECTIONS, PALETTE, PLACES

Phrases = dict[str, tuple[str, ...]]

COLOUR_FORMS = (
    "{}",
    "bright {}",
    "vivid {}",
    "deep {}",
    "solid {}",
    "plain {}",
    "pure {}",
    "strong {}",
    "{} coloured",
)
COLOURS: Phrases = {
    name: tuple(form.format(name) for form in COLOUR_FORMS) for name in PALETTE
}

SHAPES: Phrases = {
    "circle": (
        "circle",
        "disc",
        "ball",
        "dot",
        "round shape",
        "round disc",
        "circular shape",
        "round dot",
    ),
    "square": (
        "square",
        "box",
        "block",
        "tile",
        "square shape",
        "square block",
        "square tile",
        "square box",
    ),
    "triangle": (
        "triangle",
        "wedge",
        "pyramid",
        "triangle shape",
        "triangular shape",
        "triangular wedge",
        "triangular tile",
        "triangular block",
    ),
    "cross": (
        "cross",
        "plus",
        "plus sign",
        "cross shape",
        "plus shape",
        "cross sign",
        "plus symbol",
        "cross symbol",
    ),
    "ring": (
        "ring",
        "hoop",
        "loop",
        "donut",
        "ring shape",
        "hollow circle",
        "round ring",
        "hollow disc",
    ),
}
THING = ("thing", "shape", "something")  # A subject whose shape is not given.

_SIDES = {
    "left": ("left", "left", "left side", "left edge", "leftwards", "leftward"),
    "right": ("right", "right", "right side", "right edge", "rightwards", "rightward"),
    "up": ("up", "top", "upper side", "top edge", "upwards", "upward"),
    "down": ("down", "bottom", "lower side", "bottom edge", "downwards", "downward"),
}


def _directions() -> Phrases:
    phrases: Phrases = {}
    for name, (word, end, side, edge, wards, ward) in _SIDES.items():
        phrases[name] = (
            word,
            wards,
            ward,
            f"to the {end}",
            f"towards the {end}",
            f"to the {side}",
            f"towards the {side}",
            f"towards the {edge}",
        )
    for name in DIRECTIONS:
        if "-" not in name:
            continue
        rise, side = name.split("-")
        end = f"{_SIDES[rise][1]} {side}"
        phrases[name] = (
            f"{rise} and {side}",
            f"{rise} and to the {side}",
            f"diagonally {rise} and {side}",
            f"diagonally {rise} to the {side}",
            f"to the {end}",
            f"towards the {end}",
            f"to the {end} corner",
            f"towards the {end} corner",
        )
    return phrases


DIRECTION_PHRASES = _directions()

SPEEDS: Phrases = {
    "slow": (
        "slowly",
        "at a slow pace",
        "at a slow speed",
        "at low speed",
        "gently",
        "calmly",
        "without hurry",
        "in a slow way",
    ),
    "fast": (
        "quickly",
        "at a fast pace",
        "at a fast speed",
        "at high speed",
        "rapidly",
        "swiftly",
        "in a hurry",
        "in a fast way",
    ),
}

RELATIONS: Phrases = {
    "left": (
        "left of",
        "to the left of",
        "on the left of",
        "at the left of",
        "on the left side of",
        "to the left side of",
        "at the left side of",
        "on the left hand of",
    ),
    "right": (
        "right of",
        "to the right of",
        "on the right of",
        "at the right of",
        "on the right side of",
        "to the right side of",
        "at the right side of",
        "on the right hand of",
    ),
    "above": (
        "above",
        "over",
        "higher than",
        "up above",
        "further up than",
        "on the upper side of",
        "at the upper side of",
        "somewhere above",
    ),
    "below": (
        "below",
        "under",
        "lower than",
        "down below",
        "further down than",
        "on the lower side of",
        "at the lower side of",
        "underneath",
    ),
}

NUMBERS: dict[int, tuple[str, ...]] = {
    1: (
        "one",
        "a single",
        "exactly one",
        "only one",
        "just one",
        "a lone",
        "no more than one",
        "one single",
    ),
    2: (
        "two",
        "a pair of",
        "exactly two",
        "only two",
        "just two",
        "a couple of",
        "a group of two",
        "a total of two",
    ),
    3: (
        "three",
        "a trio of",
        "exactly three",
        "only three",
        "just three",
        "a set of three",
        "a group of three",
        "a total of three",
    ),
    4: (
        "four",
        "a foursome of",
        "exactly four",
        "only four",
        "just four",
        "a set of four",
        "a group of four",
        "a total of four",
    ),
    5: (
        "five",
        "a handful of five",
        "exactly five",
        "only five",
        "just five",
        "a set of five",
        "a group of five",
        "a total of five",
    ),
}
OBJECT = ("object", "item")  # What `total` counts.


def _cameras() -> Phrases:
    static = (
        "the camera stays still",
        "the camera stays fixed",
        "the camera does not move",
        "the camera holds still",
        "the view stays fixed",
        "the view does not move",
        "the camera remains static",
        "the view remains static",
    )
    phrases = {"static": (*static, "camera: static")}
    for name in CAMERAS[1:]:
        verb, way = name.split("-")
        if verb == "zoom":
            phrases[name] = (
                f"the camera zooms {way}",
                f"the view zooms {way}",
                f"the camera slowly zooms {way}",
                f"the camera keeps zooming {way}",
                f"the view keeps zooming {way}",
                f"the lens zooms {way}",
                f"the shot zooms {way}",
                f"the lens keeps zooming {way}",
                f"camera: zoom {way}",
            )
            continue
        end = _SIDES[way][1]
        phrases[name] = (
            f"the camera {verb}s {way}",
            f"the camera {verb}s to the {end}",
            f"the camera {verb}s {way}ward",
            f"the view {verb}s {way}",
            f"the view {verb}s to the {end}",
            f"the camera keeps {verb}{'n' * (verb == 'pan')}ing {way}",
            f"the view keeps {verb}{'n' * (verb == 'pan')}ing {way}",
            f"the shot {verb}s {way}",
            f"camera: {verb} {way}",
        )
    return phrases


CAMERA_PHRASES = _cameras()

TONES: Phrases = {
    "dark": (
        "dark grey",
        "dark",
        "dim grey",
        "dim",
        "shaded",
        "dusky",
        "dusky grey",
        "shaded grey",
    ),
    "medium": (
        "medium grey",
        "grey",
        "mid grey",
        "neutral grey",
        "middle grey",
        "neutral",
        "half bright",
        "half bright grey",
    ),
    "light": (
        "light grey",
        "light",
        "pale grey",
        "pale",
        "clear grey",
        "whitish",
        "whitish grey",
        "bright grey",
    ),
}


def _places() -> Phrases:
    phrases: Phrases = {}
    for name in sum(PLACES, ()):
        if name == "centre":
            words = ("centre", "middle", "central part", "middle part")
            phrases[name] = tuple(f"{p} the {w}" for p in ("in", "near") for w in words)
            continue
        words = name.replace("-", " ")
        other = words.replace("top", "upper").replace("bottom", "lower")
        kind = "corner" if "-" in name else "edge"
        phrases[name] = (
            f"in the {other} part",
            f"near the {words}",
            f"at the {words}",
            f"near the {other} part",
            f"at the {words} {kind}",
            f"near the {words} {kind}",
            f"in the {other} area",
            f"near the {other} area",
        )
    return phrases


PLACE_PHRASES = _places()

# How something comes to fall; a direction may follow.
FALLS: dict[str | None, tuple[str, ...]] = {
    None: (
        "falls",
        "is falling",
        "falling",
        "falls to the ground",
        "falls to the floor",
        "falls through the air",
        "goes to the ground",
        "tumbles",
    ),
    "dropped": (
        "drops",
        "is dropped",
        "is let go",
        "is released",
        "falls straight",
        "drops freely",
        "falls freely",
        "drops from rest",
    ),
    "thrown": (
        "is thrown",
        "is tossed",
        "is flung",
        "is hurled",
        "is pitched",
        "is lobbed",
        "is launched",
        "flies off",
    ),
}
# Whether it bounces where it lands.
BOUNCES: dict[bool, tuple[str, ...]] = {
    True: (
        "bounces",
        "bounces back",
        "bounces off",
        "bounces again",
        "rebounds",
        "springs back",
        "jumps back",
        "hops back",
    ),
    False: (
        "stays on the ground",
        "does not bounce",
        "comes to rest",
        "lands and stays",
        "stops on the ground",
        "rests on the ground",
        "remains on the ground",
        "lands without a bounce",
    ),
}
LANDS = "lands"  # states neither
# A collision with something that is at rest, or of which nothing is stated.
HITS: dict[str | None, tuple[str, ...]] = {
    None: (
        "hits",
        "strikes",
        "meets",
        "bumps into",
        "runs into",
        "crashes into",
        "knocks into",
        "collides with",
    ),
    "resting": (
        "hits the resting",
        "hits the waiting",
        "strikes the resting",
        "strikes the waiting",
        "bumps into the resting",
        "runs into the resting",
        "runs into the waiting",
        "collides with the resting",
    ),
}

_QUARTERS = ("", "a quarter", "a half", "three quarters")
_FORMS = (
    "after {}",
    "at {}",
    "after about {}",
    "at about {}",
    "{} later",
    "about {} later",
    "{} from the start",
    "about {} from the start",
)


def _seconds() -> Phrases:
    """Times from the start of a clip, in quarters of a second."""
    phrases: Phrases = {}
    for quarters in range(1, 17):
        whole, part = divmod(quarters, 4)
        number = NUMBERS[whole][0] if whole else ""
        span = f"{number} and {_QUARTERS[part]} seconds"
        if not part:
            span = f"{number} second{'s' * (whole > 1)}"
        elif not whole:
            span = "half a second" if part == 2 else f"{_QUARTERS[part]} of a second"
        time = quarters / 4
        phrases[time] = (*(form.format(span) for form in _FORMS), f"time: {time}")
    return phrases


SECONDS = _seconds()

# What begins the next shot.
CUTS = (
    "then elsewhere it",
    "then a cut and it",
    "cut to a place where it",
    "cut to a scene where it",
    "in the next shot it",
    "in the next scene it",
    "there is a cut and it",
    "then in another place it",
    "next shot:",
)
WAITS = (
    "waits",
    "only waits",
    "waits there",
    "keeps waiting",
    "keeps still",
    "waits in its place",
    "keeps still there",
    "does nothing",
    "motion: none",
)

# How a motion goes on.
TURNS: Phrases = {
    "back": (
        "and comes back",
        "and back again",
        "and returns",
        "and then returns",
        "and then comes back",
        "and turns back",
        "and then turns back",
        "and comes back again",
        "then: back",
    ),
    "twice": (
        "and back twice",
        "and comes back twice",
        "and returns twice",
        "and turns back twice",
        "and then back twice",
        "and comes back two times",
        "and returns two times",
        "and back two times",
        "then: back twice",
    ),
    "bounce": (
        "and bounces back at the edge",
        "and bounces off the edge",
        "and bounces at the edge",
        "and bounces off the frame",
        "and bounces off an edge",
        "and then bounces back at the edge",
        "and then bounces off the edge",
        "and then bounces at the edge",
        "then: bounce",
    ),
}


def _next_cameras() -> Phrases:
    phrases: Phrases = {}
    for name in CAMERAS[1:]:
        verb, way = name.split("-")
        phrases[name] = (
            f"then it {verb}s {way}",
            f"then {verb}s {way}",
            f"it then {verb}s {way}",
            f"next it {verb}s {way}",
            f"it starts to {verb} {way}",
            f"it begins to {verb} {way}",
            f"then it starts to {verb} {way}",
            f"then it begins to {verb} {way}",
            f"then: {verb} {way}",
        )
    return phrases


NEXT_CAMERA = _next_cameras()  # After another motion of the camera.
# What happens to a thing, by kind of event and what comes of it.
CHANGES: dict[tuple[str, str | None], tuple[str, ...]] = {
    ("grow", None): (
        "grows",
        "gets larger",
        "gets bigger",
        "becomes larger",
        "becomes bigger",
        "swells",
        "grows in size",
        "gains in size",
    ),
    ("shrink", None): (
        "shrinks",
        "gets smaller",
        "becomes smaller",
        "grows smaller",
        "contracts",
        "shrinks in size",
        "loses size",
        "gets tiny",
    ),
}
for _colour in PALETTE:
    CHANGES["recolour", _colour] = (
        f"turns {_colour}",
        f"becomes {_colour}",
        f"changes to {_colour}",
        f"gets {_colour}",
        f"turns to {_colour}",
        f"changes its colour to {_colour}",
        f"takes the colour {_colour}",
        f"goes {_colour}",
    )

# Words that fill templates without stating anything.
VERBS = ("moves", "goes", "travels", "slides", "glides", "heads", "shifts", "runs")
MOVING = (
    "moving",
    "going",
    "travelling",
    "sliding",
    "gliding",
    "heading",
    "shifting",
    "running",
)
RESTS = ("is", "sits", "stands", "lies", "rests", "stays", "is seen", "is placed")


def plural(noun: str) -> str:
    """The plural of a phrase whose last word is a regular noun."""
    return noun + ("es" if noun.endswith(("s", "x")) else "s")
