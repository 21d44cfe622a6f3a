"""Converts slots to sentences and back.

A template is a `str.format` pattern over the fields of `Writer`. Filling it also records
what it states, so that tests can compare the parse of a caption with exactly these slots.
The parser knows phrases, not templates, so it also reads free text ("a red circle moves
left").
"""

import dataclasses
import re

from sora_jax.toyworld import lexicon
from sora_jax.toyworld.scene import (
    CAMERAS,
    CONVERSE,
    DIRECTIONS,
    SPEEDS,
    Draws,
    Event,
    Slots,
    Subject,
)

CAPTION_TIERS = ("alt", "short", "medium", "dense", "structured")
_MISSING, _WRONG, _UNRELATED = 0.3, 0.1, 0.1

UNRELATED = (
    "a sunny day at the beach",
    "my cat asleep on the sofa",
    "untitled clip from my phone",
    "best moments of the summer",
    "watch until the end",
    "free stock footage",
    "how to cook rice at home",
    "holiday in the mountains",
)


@dataclasses.dataclass(frozen=True)
class Wording:
    """A family's templates: at least eight for each caption tier.

    A dense caption is one of `main` followed by one of each group of `extras`, in any
    order: the main facts come first, so that they survive when the text is cut. A
    structured caption joins the first entry of `structured` and then the others, in any
    order, and states a relation from the left or upper object. Fields are the methods of
    `Writer`, followed by the subject's number.
    """

    short: tuple[str, ...]
    medium: tuple[str, ...]
    main: tuple[str, ...]
    extras: tuple[tuple[str, ...], ...]
    structured: tuple[str, ...]
    alt: tuple[str, ...]


class Writer:
    """Fills templates with phrases for one set of slots, and records what it states.

    Fields: `a0 n0 the0` noun phrase of subject 0 with the indefinite, no, or the definite
    article; `s0` its plural; `dir0 way0` direction (`way` in one or two words); `speed0`,
    `place0`; `verb ing rest` fillers; `rel` relation of 0 to 1, `conv` of 1 to 0;
    `num`, `total`, `camera`, `tone`; `fall0` and where it is thrown, `bounce0`, and `hit1`
    with the noun phrase of 1; `shots`, `turn`, `moves` of the camera, `changes`. Brief
    texts have colours without adjectives.
    """

    def __init__(self, slots: Slots, draws: Draws, brief: bool = False):
        self.slots = slots
        self.draws = draws
        self.brief = brief
        self.said: dict[str, object] = {}
        self.said_of: list[dict[str, str]] = [{} for _ in slots.subjects]
        self.named: set[int] = set()
        self.events: tuple[Event, ...] = ()

    def __getitem__(self, field: str) -> str:
        if field[-1].isdigit():
            return getattr(self, "_" + field[:-1])(int(field[-1]))
        return getattr(self, "_" + field)()

    def fill(self, template: str) -> str:
        return " ".join(template.format_map(self).split())

    def stated(self) -> Slots:
        """The slots that the filled templates state."""
        subjects = tuple(Subject(**self.said_of[k]) for k in sorted(self.named))
        return Slots(subjects, **self.said, events=self.events)

    def _pick(self, phrases: tuple[str, ...]) -> str:
        return phrases[0] if self.draws.chance(0.5) else self.draws.choice(phrases)

    def _say_of(self, k: int, name: str, phrases: dict) -> str:
        value = getattr(self.slots.subjects[k], name)
        if value is None:
            return ""
        self.said_of[k][name] = value
        return self._pick(phrases[value])

    def _say(self, name: str, phrases: dict) -> str:
        value = getattr(self.slots, name)
        if value is None:
            return ""
        self.said[name] = value
        return self._pick(phrases[value])

    def _n(self, k: int) -> str:
        self.named.add(k)
        colour = self._say_of(k, "colour", lexicon.COLOURS)
        if self.brief and colour:
            colour = self.slots.subjects[k].colour
        shape = self._say_of(k, "shape", lexicon.SHAPES)
        return f"{colour} {shape or lexicon.THING[0]}".strip()

    def _a(self, k: int) -> str:
        noun = self._n(k)
        return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"

    def _the(self, k: int) -> str:
        return f"the {self._n(k)}"

    def _s(self, k: int) -> str:
        noun = self._n(k)
        return noun if self.slots.count == 1 else lexicon.plural(noun)

    def _dir(self, k: int) -> str:
        return self._say_of(k, "direction", lexicon.DIRECTION_PHRASES)

    def _way(self, k: int) -> str:
        value = self.slots.subjects[k].direction
        if value is None:
            return ""
        self.said_of[k]["direction"] = value
        return self._pick(lexicon.DIRECTION_PHRASES[value][:4])

    def _speed(self, k: int) -> str:
        return self._say_of(k, "speed", lexicon.SPEEDS)

    def _place(self, k: int) -> str:
        return self._say_of(k, "place", lexicon.PLACE_PHRASES)

    def _verb(self) -> str:
        return self._pick(lexicon.VERBS)

    def _ing(self) -> str:
        return self._pick(lexicon.MOVING)

    def _rest(self) -> str:
        return self._pick(lexicon.RESTS)

    def _rel(self) -> str:
        return self._say("relation", lexicon.RELATIONS)

    def _conv(self) -> str:
        value = self.slots.relation
        self.said["relation"] = value
        return self._pick(lexicon.RELATIONS[CONVERSE[value]])

    def _num(self) -> str:
        return self._say("count", lexicon.NUMBERS)

    def _total(self) -> str:
        number = self._say("total", lexicon.NUMBERS)
        noun = self._pick(lexicon.OBJECT)
        return f"{number} {noun if self.slots.total == 1 else lexicon.plural(noun)}"

    def _camera(self) -> str:
        phrases = {c: p[:-1] for c, p in lexicon.CAMERA_PHRASES.items()}
        return self._say("camera", phrases)

    def _tone(self) -> str:
        return self._say("tone", lexicon.TONES)

    def _event(self, kind: str) -> Event | None:
        """The event of that kind, which counts as said from now on."""
        event = next((e for e in self.slots.events if e.kind == kind), None)
        if event is not None and event not in self.events:
            self.events = (*self.events, event)
        return event

    def _fall(self, k: int) -> str:
        event = self._event("fall")
        phrase = self._pick(lexicon.FALLS[event.value if event else None])
        way = self._way(k) if self.brief else self._dir(k)
        return f"{phrase} {way}".strip()

    def _bounce(self, k: int) -> str:
        event = self._event("bounce")
        return self._pick(lexicon.BOUNCES[event.happens]) if event else lexicon.LANDS

    def _hit(self, k: int) -> str:
        """What the other subject does to subject k, which is named."""
        event = self._event("collide")
        phrase = self._pick(lexicon.HITS[event.value if event else None])
        if event is not None and event.value == "resting":
            return f"{phrase} {self._n(k)}"
        if self.slots.subjects[k].direction is None:
            return f"{phrase} {self._a(k)}"
        way = self._way(k) if self.brief else self._dir(k)
        return f"{phrase} {self._a(k)} {self._ing()} {way}"

    def _parts(self) -> tuple[Event, ...]:
        """The events, which all are stated; brief texts leave out their times."""
        self.events = self.slots.events
        if self.brief:
            self.events = tuple(
                dataclasses.replace(event, second=None) for event in self.events
            )
        return self.events

    def _second(self, event: Event) -> str:
        if event.second is None:
            return ""
        return self._pick(lexicon.SECONDS[event.second][:-1])

    def _act(self, value: str) -> str:
        if value == "rest":
            return self._pick(lexicon.WAITS[:-1])
        ways = lexicon.DIRECTION_PHRASES[value]
        return f"{self._verb()} {self._pick(ways[:4] if self.brief else ways)}"

    def _shots(self) -> str:
        first, *later = self._parts()
        parts = [self._act(first.value)]
        for event in later:
            cut = self._pick(lexicon.CUTS[: 2 if self.brief else -1])
            parts.append(f"{self._second(event)} {cut} {self._act(event.value)}")
        return ", ".join(parts)

    def _turn(self) -> str:
        return self._pick(lexicon.TURNS[self._parts()[0].value][:-1])

    def _moves(self) -> str:
        first, *later = self._parts()
        parts = [self._pick(lexicon.CAMERA_PHRASES[first.value][:-1])]
        for event in later:
            move = self._pick(lexicon.NEXT_CAMERA[event.value][:-1])
            parts.append(f"{self._second(event)} {move}")
        return ", ".join(parts)

    def _changes(self) -> str:
        (event,) = self._parts()
        return self._pick(lexicon.CHANGES[event.kind, event.value])

    # Values named as in a form, for structured captions.

    def _key_dir(self, k: int) -> str:
        self.said_of[k]["direction"] = value = self.slots.subjects[k].direction
        return lexicon.DIRECTION_PHRASES[value][0]

    def _key_speed(self, k: int) -> str:
        self.said_of[k]["speed"] = value = self.slots.subjects[k].speed
        return f"speed: {value}"

    def _key_camera(self) -> str:
        self.said["camera"] = self.slots.camera
        return lexicon.CAMERA_PHRASES[self.slots.camera][-1]

    def _key_second(self, event: Event) -> str:
        return "" if event.second is None else lexicon.SECONDS[event.second][-1] + ", "

    def _key_shots(self) -> str:
        self.events = self.slots.events
        parts = []
        for event in self.events:
            act = lexicon.WAITS[-1]
            if event.value != "rest":
                act = f"motion: {lexicon.DIRECTION_PHRASES[event.value][0]}"
            cut = f"{self._key_second(event)}{lexicon.CUTS[-1]} " if parts else ""
            parts.append(cut + act)
        return ", ".join(parts)

    def _key_turn(self) -> str:
        self.events = self.slots.events
        return lexicon.TURNS[self.events[0].value][-1]

    def _key_moves(self) -> str:
        self.events = self.slots.events
        first, *later = self.events
        parts = [lexicon.CAMERA_PHRASES[first.value][-1]]
        for event in later:
            move = lexicon.NEXT_CAMERA[event.value][-1]
            parts.append(self._key_second(event) + move)
        return ", ".join(parts)


# -- Composition -----------------------------------------------------------------------


def compose(
    slots: Slots, wording: Wording, tier: str, draws: Draws
) -> tuple[str, Slots]:
    """A caption of the tier and exactly what it states. ValueError: unknown tier."""
    if tier == "alt":
        return _alt(slots, wording, draws)
    if tier in ("short", "medium"):
        writer = Writer(slots, draws, brief=tier == "short")
        return writer.fill(draws.choice(getattr(wording, tier))), writer.stated()
    writer = Writer(slots.by_place() if tier == "structured" else slots, draws)
    if tier == "dense":
        templates = [draws.choice(group) for group in draws.shuffled(wording.extras)]
        templates.insert(0, draws.choice(wording.main))
        text = " ".join(writer.fill(template) + "." for template in templates)
    elif tier == "structured":
        rest = draws.shuffled(wording.structured[1:])
        text = "; ".join(writer.fill(t) for t in (wording.structured[0], *rest))
    else:
        tiers = ", ".join(CAPTION_TIERS)
        raise ValueError(f"no caption tier is called {tier!r}; there are {tiers}")
    return text, writer.stated()


def _alt(slots: Slots, wording: Wording, draws: Draws) -> tuple[str, Slots]:
    """Like captions of the web: attributes missing or wrong, or an unrelated text."""
    if draws.chance(_UNRELATED):
        return draws.choice(UNRELATED), Slots()
    subjects = list(slots.subjects)
    for k, subject in enumerate(subjects):
        others = subjects[:k] + subjects[k + 1 :]
        subjects[k] = _spoil(subject, others, slots.held_out(), draws)
    relation = slots.relation
    if relation is not None and draws.chance(_WRONG):
        relation = CONVERSE[relation]
    camera = slots.camera
    if camera is not None and draws.chance(_WRONG):
        camera = draws.choice([name for name in CAMERAS if name != camera])
    events = tuple(
        dataclasses.replace(event, happens=not event.happens)
        if event.kind == "bounce" and draws.chance(_WRONG)
        else event
        for event in slots.events
    )
    spoilt = dataclasses.replace(
        slots,
        subjects=tuple(subjects),
        relation=relation,
        camera=camera,
        events=events,
    )
    if spoilt.held_out() and not slots.held_out():  # a wrong colour, and an event
        subjects = [dataclasses.replace(s, colour=None) for s in subjects]
        spoilt = dataclasses.replace(spoilt, subjects=tuple(subjects))
    if _at_odds(spoilt) and not slots.held_out():
        spoilt = slots
    writer = Writer(spoilt, draws, brief=True)
    return writer.fill(draws.choice(wording.alt)), writer.stated()


def _at_odds(slots: Slots) -> bool:
    """Whether events leave a subject as it is, or make a held-out pair of it."""
    return bool(slots.events) and (
        slots.held_out()
        or any(
            event.value is not None and event.value == slots.subjects[event.of].colour
            for event in slots.events
        )
    )


def _spoil(
    subject: Subject, others: list[Subject], held_out: bool, draws: Draws
) -> Subject:
    """Removes or changes attributes, but never creates a held-out pair."""
    values = {
        "colour": [c for c in lexicon.COLOURS if c not in {o.colour for o in others}],
        "shape": list(lexicon.SHAPES)[:4],
        "direction": list(DIRECTIONS)[:4],
        "speed": list(SPEEDS),
    }
    for name, choices in values.items():
        value = getattr(subject, name)
        fate = draws.unit()
        wrong = draws.choice([choice for choice in choices if choice != value])
        if value is None or fate > _MISSING + _WRONG:
            continue
        changed = dataclasses.replace(subject, **{name: wrong})
        mistaken = Slots((changed,)).held_out() and not held_out
        if fate < _MISSING or mistaken:
            changed = dataclasses.replace(subject, **{name: None})
        subject = changed
    return subject


# -- Parsing ---------------------------------------------------------------------------


def _vocabulary() -> dict[str, tuple[str, object]]:
    """Every phrase with its slot and value."""
    result: dict[str, tuple[str, object]] = {}

    def add(kind: str, phrases: dict) -> None:
        for value, synonyms in phrases.items():
            for phrase in synonyms:
                if result.setdefault(phrase, (kind, value)) != (kind, value):
                    raise ValueError(f"the phrase {phrase!r} has two meanings")

    add("colour", {name: (name,) for name in lexicon.COLOURS})
    add("shape", lexicon.SHAPES)
    for name, nouns in lexicon.SHAPES.items():
        add("shape", {name: tuple(lexicon.plural(noun) for noun in nouns)})
    add("thing", {None: lexicon.THING + ("things", "shapes")})
    add("object", {None: lexicon.OBJECT + ("objects", "items")})
    add("direction", lexicon.DIRECTION_PHRASES)
    add("speed", lexicon.SPEEDS)
    add("speed", {"slow": ("speed: slow",), "fast": ("speed: fast", "fast")})
    add("relation", lexicon.RELATIONS)
    add("number", lexicon.NUMBERS)
    add("number", {n: (str(n),) for n in lexicon.NUMBERS})
    add("camera", lexicon.CAMERA_PHRASES)
    add("tone", lexicon.TONES)
    add("place", lexicon.PLACE_PHRASES)
    add("fall", lexicon.FALLS)
    add("bounce", lexicon.BOUNCES)
    add("hit", lexicon.HITS)
    add("second", lexicon.SECONDS)
    add("cut", {None: lexicon.CUTS})
    add("wait", {"rest": lexicon.WAITS})
    add("turn", lexicon.TURNS)
    add("camera", lexicon.NEXT_CAMERA)
    add("change", lexicon.CHANGES)
    return result


VOCABULARY = _vocabulary()
_PATTERN = re.compile(
    r"(?<!\w)(?:"
    + "|".join(re.escape(p) for p in sorted(VOCABULARY, key=len, reverse=True))
    + r")(?!\w)"
)


class _Reader:
    """Assembles phrases, in order, into slots."""

    def __init__(self):
        self.subjects: list[dict[str, str]] = []
        self.values: dict[str, object] = {}
        self.before: dict[str, str] = {}  # Stated before the subject that it describes.
        self.colour: str | None = None
        self.number: int | None = None
        self.current: dict[str, str] | None = None
        self.inverted = False
        self.events: list[Event] = []
        self.second: float | None = None  # Of the event that follows.
        self.waits: str | None = None
        self.shots: list[Event] = []
        self.turns: list[Event] = []
        self.moves: list[Event] = []

    def colour_(self, value: str) -> None:
        self.colour = value

    def number_(self, value: int) -> None:
        self.number = value

    def thing_(self, value: None) -> None:
        self.shape_(value)

    def shape_(self, value: str | None) -> None:
        noun = {"colour": self.colour, "shape": value}
        noun = {name: said for name, said in noun.items() if said is not None}
        known = [
            subject
            for subject in self.subjects
            if self.colour and noun.items() <= subject.items()
        ]
        if known:
            self.current = known[0]
        else:
            self.current = noun
            self.subjects.append(noun)
        if self.number is not None:
            self.values.setdefault("count", self.number)
        for name, said in self.before.items():
            self.current.setdefault(name, said)
        self.before, self.colour, self.number = {}, None, None

    def object_(self, value: None) -> None:
        if self.number is not None and self.colour is None:
            self.values.setdefault("total", self.number)
            self.number = None
        else:
            self.shape_(value)

    def _about(self, name: str, value: str) -> None:
        current = self.current
        if current is None or current.get(name, value) != value:
            self.before[name] = value
        else:
            current[name] = value

    def direction_(self, value: str) -> None:
        if self.shots:
            self._in_shot(value)
        else:
            self._about("direction", value)

    def second_(self, value: float) -> None:
        self.second = value

    def _event(self, kind: str, value: str | None) -> Event:
        event = Event(kind, value=value, second=self.second)
        self.second = None
        return event

    def cut_(self, value: None) -> None:
        if not self.shots:  # What has been said is of the first shot.
            said = self.before if self.current is None else self.current
            self.shots.append(Event("shot", value=said.pop("direction", self.waits)))
        self.shots.append(self._event("shot", None))

    def _in_shot(self, value: str) -> None:
        if self.shots[-1].value is None:
            self.shots[-1] = dataclasses.replace(self.shots[-1], value=value)

    def wait_(self, value: str) -> None:
        if self.shots:
            self._in_shot(value)
        else:
            self.waits = value

    def turn_(self, value: str) -> None:
        if not self.turns:
            self.turns.append(self._event("turn", value))

    def change_(self, value: tuple[str, str | None]) -> None:
        for k, subject in enumerate(self.subjects):
            if subject is self.current:
                self.events.append(Event(value[0], of=k, value=value[1]))

    def speed_(self, value: str) -> None:
        self._about("speed", value)

    def place_(self, value: str) -> None:
        self._about("place", value)

    def relation_(self, value: str) -> None:
        self.inverted |= "relation" not in self.values and not self.subjects
        self.values.setdefault("relation", value)

    def camera_(self, value: str) -> None:
        self.values.setdefault("camera", value)
        if not self.moves or self.moves[-1].value != value:
            self.moves.append(self._event("camera", value))

    def tone_(self, value: str) -> None:
        self.values.setdefault("tone", value)

    def _happens(self, event: Event) -> None:
        """Adds what is stated of an event to what is known of it."""
        for k, known in enumerate(self.events):
            if (known.kind, known.of) == (event.kind, event.of):
                self.events[k] = known if event.value is None else event
                return
        self.events.append(event)

    def _current(self) -> int:
        """The place of the subject that was named last."""
        found = (k for k, s in enumerate(self.subjects) if s is self.current)
        return next(found, 0)

    def fall_(self, value: str | None) -> None:
        self._happens(Event("fall", of=self._current(), value=value))

    def bounce_(self, value: bool) -> None:
        self._happens(Event("bounce", of=self._current(), happens=value))

    def hit_(self, value: str | None) -> None:
        by = self._current()
        self._happens(Event("collide", of=1 - min(by, 1), by=by, value=value))

    def slots(self) -> Slots:
        if self.colour is not None:  # A colour without a noun: "something red".
            if self.current is None or {"colour", "shape"} & self.current.keys():
                self.shape_(None)
            else:
                self.current["colour"] = self.colour
        subjects = [Subject(**subject) for subject in self.subjects]
        if self.inverted:  # "to the left of a yellow cross is a blue square"
            subjects = subjects[1::-1] + subjects[2:]
            self.events = [event.exchanged() for event in self.events]
        # Something falls before it bounces, whichever is said first.
        events = sorted(self.events, key=lambda event: event.kind == "bounce")
        events += [*self.shots, *self.turns]
        if len(self.moves) > 1:
            events += self.moves
            del self.values["camera"]
        return Slots(tuple(subjects), **self.values, events=tuple(events))


def parse(text: str) -> Slots:
    """The slots that a text states, as far as the toy world has words for them.

    The inverse of captioning: parsing a caption gives exactly what it states. Unknown
    words are skipped; a text without any known phrase gives `Slots()`.
    """
    reader = _Reader()
    for match in _PATTERN.finditer(" ".join(text.lower().split())):
        kind, value = VOCABULARY[match.group()]
        getattr(reader, kind + "_")(value)
    return reader.slots()


def unread(text: str) -> list[str]:
    """The words of a text that `parse` skips."""
    return re.findall(r"\w+", _PATTERN.sub(" ", " ".join(text.lower().split())))
