"""Storyboards: a video of several shots, described in a YAML or JSON file.

    prompt: at night                      # of all shots, behind each one's own
    size: 32x32
    fps: 8
    seed: 1                               # of shot n: seed + n - 1
    cast:
      hero: hero.png                      # a picture,
      ball: {shot: 1, frame: 0}           # or a frame of an earlier shot
    shots:
      - {prompt: a red circle moves right, frames: 9}
      - {prompt: a thing rests, seconds: 2, cast: [ball]}
      - {prompt: a red circle moves left, frames: 8, continues: true}
      - {prompt: a blue square, frames: 9, pictures: {0: first.png, 8: last.png}}
      - {video: clip.mp4}

A shot is made from its text alone, with up to two members of the cast as references, with
pictures at frames of it, or as a continuation of the shot before, without a cut. A video is
taken as it is. Every shot has a file of its own, without loss. Only shots whose description,
or whose input from other shots, has changed are made again: all others stay as they are,
bit for bit.

Letters: t frames, h height, w width of a video.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from sora_jax.core import rng
from sora_jax.data import texts, video_io
from sora_jax.generation import recipes, task_files, tasks
from sora_jax.generation import request as requests

if TYPE_CHECKING:
    from sora_jax.generation import pipeline

_MOST_BYTES, _MOST_SHOTS, _MOST_DIGITS = 1 << 20, 1000, 40
_OF_GIVEN = ("given_scale", "anchor_tau")  # mean nothing for a shot from text alone
# Arguments of a call that a shot, or all of them, may set.
_OF_CALL = {"negative_prompt": str} | {
    name: argument.kind
    for name, argument in requests.SHARED.items()
    if name not in ("num_frames", "height", "width", "fps", "step_cache")
}


@dataclasses.dataclass(frozen=True)
class Member:
    """One of the cast: a picture, or a frame of an earlier shot."""

    line: int
    picture: pathlib.Path | None = None
    shot: int = 0
    frame: int = 0


@dataclasses.dataclass(frozen=True)
class Shot:
    """One shot.

    Attributes:
      line: of the file.
      prompt: its text, with that of all shots.
      frames: how many; 0: as many as the video has.
      video: a file, in place of all else.
      cast: names of what it shows.
      pictures: files by frame.
      continues: whether it goes on from the shot before.
      arguments: of the call, with the seed.
    """

    line: int
    prompt: str = ""
    frames: int = 0
    video: pathlib.Path | None = None
    cast: tuple[str, ...] = ()
    pictures: Mapping[int, pathlib.Path] = dataclasses.field(default_factory=dict)
    continues: bool = False
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Storyboard:
    """A file's shots and cast; size in pixels; fps None: the model's."""

    path: pathlib.Path
    shots: tuple[Shot, ...]
    cast: Mapping[str, Member]
    height: int | None = None
    width: int | None = None
    fps: float | None = None

    def files(self) -> list[pathlib.Path]:
        """The file itself, and all that it names."""
        found = [self.path, *(m.picture for m in self.cast.values() if m.picture)]
        for shot in self.shots:
            found += [*shot.pictures.values(), *([shot.video] if shot.video else [])]
        return found

    def error(self, line: int, reason: object) -> ValueError:
        """What is wrong with a line of the file."""
        return ValueError(f"{self.path}, {texts.BadLine(line, str(reason))}")


# -- reading --------------------------------------------------------------------------


def read(path: str | pathlib.Path) -> Storyboard:
    """Reads a storyboard; files that it names are relative to its folder.

    Raises:
      ValueError: one sentence with the line: what is wrong, and what would be right.
      OSError: it cannot be read.
    """
    path = pathlib.Path(path)
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path} is larger than {_MOST_BYTES} bytes: no storyboard")
    try:
        text = path.read_text("utf-8")
        if path.suffix.lower() == ".json":  # whose indents may be tabs
            text = re.sub("^\t+", lambda tabs: " " * len(tabs[0]), text, flags=re.M)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            raise texts.BadLine(1, "it is empty: give shots")
        return _board(path, root)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = 1 if mark is None else mark.line + 1
        reason = getattr(error, "problem", None) or "it cannot be read"
        reason = f"it is not YAML: {' '.join(reason.split())}"
        raise ValueError(f"{path}, {texts.BadLine(line, reason)}") from None
    except texts.BadLine as error:
        raise ValueError(f"{path}, {error}") from None
    except (ValueError, OverflowError):  # of a character that does not exist
        raise ValueError(
            f"{path} is not YAML: it has an escape of no character"
        ) from None


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _fields(node: yaml.Node, known: Sequence[str], what: str) -> dict[str, yaml.Node]:
    """The values of a mapping by key."""
    if not isinstance(node, yaml.MappingNode):
        raise texts.BadLine(_line(node), f"{what} is keys with values, such as a: b")
    found: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise texts.BadLine(_line(key), f"a key of {what} is a word or a number")
        name = key.value
        if known and name not in known:
            raise texts.BadLine(
                _line(key),
                f"{what} has no {name!r}; there are {', '.join(known)}",
            )
        if name in found:
            raise texts.BadLine(_line(key), f"{what} has {name!r} twice")
        found[name] = value
    return found


def _items(node: yaml.Node, what: str) -> list[yaml.Node]:
    if not isinstance(node, yaml.SequenceNode):
        raise texts.BadLine(_line(node), f"{what} is a list")
    return node.value


_SAID = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _value(node: yaml.Node, kind: type, name: str) -> Any:
    """A scalar of a type; a number may stand for text, and a whole one for a number."""
    what = f"{name} is {_SAID[kind]}"
    is_null = node.tag == "tag:yaml.org,2002:null"
    if not isinstance(node, yaml.ScalarNode) or (kind is str and is_null):
        raise texts.BadLine(_line(node), what)
    if kind is str:
        try:  # JSON writes some characters as two halves
            return node.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise texts.BadLine(_line(node), what) from None
    value = None
    if len(node.value) <= _MOST_DIGITS:
        with contextlib.suppress(Exception):  # of a tag that does not fit
            value = yaml.constructor.SafeConstructor().construct_object(node)
            if kind is float and type(value) is not bool:
                value = float(value)
    if type(value) is not kind or value != value:
        raise texts.BadLine(_line(node), f"{what}, not {node.value[:80]!r}")
    return value


def _count(node: yaml.Node, name: str, least: int, most: int = 10**9) -> int:
    value = _value(node, int, name)
    if not least <= value <= most:
        raise texts.BadLine(
            _line(node), f"{name} is from {least} to {most}, not {value}"
        )
    return value


def _seed(node: yaml.Node) -> int:
    return _count(node, "seed", 0, rng.SEEDS - 1)


def _board(path: pathlib.Path, root: yaml.Node) -> Storyboard:
    names = ("prompt", "size", "fps", "seed", "cast", "shots", *_OF_CALL)
    fields = _fields(root, names, "a storyboard")
    if "shots" not in fields:
        raise texts.BadLine(_line(root), "it has no shots: give shots, a list")
    size = {}
    if "size" in fields:
        size = _size(fields["size"])
    fps = None
    if "fps" in fields:
        fps = _value(fields["fps"], float, "fps")
        if not 0.01 <= fps <= 1000:
            raise texts.BadLine(
                _line(fields["fps"]), f"fps is from 0.01 to 1000, not {fps:g}"
            )
    folder, cast = path.parent, {}
    if "cast" in fields:
        for name, node in _fields(fields["cast"], (), "cast").items():
            cast[name] = _member(node, folder, f"cast {name!r}")
    arguments = {
        name: _value(fields[name], kind, name)
        for name, kind in _OF_CALL.items()
        if name in fields
    }
    arguments["seed"] = _seed(fields["seed"]) if "seed" in fields else 0
    about = _value(fields["prompt"], str, "prompt") if "prompt" in fields else ""
    nodes, shots = _items(fields["shots"], "shots"), []
    if not 1 <= len(nodes) <= _MOST_SHOTS:
        raise texts.BadLine(
            _line(fields["shots"]),
            f"there are {len(nodes)} shots; a storyboard has 1 to {_MOST_SHOTS}",
        )
    for number, node in enumerate(nodes, 1):
        own = arguments | {"seed": (arguments["seed"] + number - 1) % rng.SEEDS}
        shots.append(_shot(node, number, folder, about, fps, own, cast))
    for name, member in cast.items():
        if member.shot and member.shot > len(shots):
            raise texts.BadLine(
                member.line,
                f"cast {name!r} is of shot {member.shot}; there are {len(shots)} shots",
            )
    return Storyboard(path, tuple(shots), cast, fps=fps, **size)


def _size(node: yaml.Node) -> dict[str, int]:
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", _value(node, str, "size").lower())
    if not found:
        raise texts.BadLine(_line(node), "size is WIDTHxHEIGHT, such as 832x480")
    return {"height": int(found[2]), "width": int(found[1])}


def _member(node: yaml.Node, folder: pathlib.Path, what: str) -> Member:
    if isinstance(node, yaml.ScalarNode):
        return Member(_line(node), folder / _value(node, str, what))
    fields = _fields(node, ("shot", "frame"), what)
    if "shot" not in fields:
        raise texts.BadLine(
            _line(node), f"{what} is a picture, or {{shot: 1, frame: 0}}"
        )
    frame = _count(fields["frame"], "frame", 0) if "frame" in fields else 0
    return Member(_line(node), None, _count(fields["shot"], "shot", 1), frame)


def _shot(
    node: yaml.Node,
    number: int,
    folder: pathlib.Path,
    about: str,
    fps: float | None,
    arguments: dict[str, Any],
    cast: Mapping[str, Member],
) -> Shot:
    names = ("prompt", "frames", "seconds", "seed", "video", "cast", "pictures")
    fields = _fields(node, (*names, "continues", *_OF_CALL), f"shot {number}")
    line = _line(node)

    def refuse(reason: str) -> texts.BadLine:
        return texts.BadLine(line, f"shot {number} {reason}")

    if "video" in fields:
        if len(fields) > 1:
            raise refuse("is a video, which is taken as it is: give nothing else")
        return Shot(line, video=folder / _value(fields["video"], str, "video"))
    if "prompt" not in fields:
        raise refuse("has no prompt")
    if ("frames" in fields) == ("seconds" in fields):
        raise refuse("needs its length: frames, or seconds")
    if "frames" in fields:
        frames = _count(fields["frames"], "frames", 1)
    else:
        seconds = _value(fields["seconds"], float, "seconds")
        if fps is None:
            raise refuse("has seconds, so the storyboard needs fps")
        frames = round(seconds * fps) if abs(seconds) < 1e6 else 0
        if frames < 1:
            raise texts.BadLine(
                _line(fields["seconds"]),
                f"seconds is {seconds:g}, which is no frame at {fps:g} a second",
            )
    kinds = [name for name in ("cast", "pictures") if name in fields]
    continues = False
    if "continues" in fields:
        continues = _value(fields["continues"], bool, "continues")
        kinds += ["continues"] * continues
    if len(kinds) > 1:
        raise refuse(f"has {kinds[0]} and {kinds[1]}: give one of them")
    if continues and number == 1:
        raise refuse("continues the shot before, and there is none")
    pictures: dict[int, pathlib.Path] = {}
    if "pictures" in fields:
        for at, one in _fields(fields["pictures"], (), "pictures").items():
            if not re.fullmatch("[0-9]{1,9}", at) or int(at) >= frames:
                raise texts.BadLine(
                    _line(one),
                    f"a picture is at frame {at}; the shot has frames 0 to {frames - 1}",
                )
            if int(at) in pictures:
                raise texts.BadLine(_line(one), f"two pictures are at frame {int(at)}")
            pictures[int(at)] = folder / _value(one, str, "a picture")
        if not pictures:
            raise refuse(
                "has no pictures in pictures: give frame: file, or leave it out"
            )
    shown = ()
    if "cast" in fields:
        entries = _items(fields["cast"], "cast")
        shown = tuple(_value(one, str, "one of the cast") for one in entries)
        for name, one in zip(shown, entries, strict=True):
            if name not in cast:
                known = ", ".join(cast) or "nobody yet"
                raise texts.BadLine(
                    _line(one), f"{name!r} is not in the cast; there is {known}"
                )
            if cast[name].shot >= number:
                raise texts.BadLine(
                    _line(one),
                    f"{name!r} is of shot {cast[name].shot}, which is not before this one",
                )
    prompt = _value(fields["prompt"], str, "prompt")
    own = {
        name: _value(fields[name], kind, name)
        for name, kind in _OF_CALL.items()
        if name in fields
    }
    if not kinds:  # what all shots are told of what they are given
        arguments = {n: x for n, x in arguments.items() if n not in _OF_GIVEN}
    if "seed" in fields:
        own["seed"] = _seed(fields["seed"])
    return Shot(
        line,
        ", ".join(filter(None, (prompt, about))),
        frames,
        cast=shown,
        pictures=pictures,
        continues=continues,
        arguments=arguments | own,
    )


# -- making ---------------------------------------------------------------------------


# What tells kinds of shots apart, where a shot has none of it.
_OTHERS = {"task": None, "inputs": None, "video": None}


@dataclasses.dataclass(frozen=True)
class Made:
    """A shot that is there.

    Attributes:
      file: of its frames, without loss.
      frames: how many.
      recipe: how it was made; of a video the SHA-256 of its frames.
      is_new: whether it was made now.
    """

    file: pathlib.Path
    frames: int
    recipe: Mapping[str, Any]
    is_new: bool


class Maker:
    """Makes the shots of a storyboard with a model, one after the other.

    Everything is checked when it is created, before anything is computed.

    Args:
      pipe: the model.
      board: the storyboard.
      folder: of the shots' files.
      overwrite: whether files of other shots there may be replaced.

    Raises:
      ValueError: one sentence with the line.
    """

    def __init__(
        self,
        pipe: "pipeline.Pipeline",
        board: Storyboard,
        folder: pathlib.Path,
        overwrite: bool = False,
    ):
        self.pipe, self.board, self.folder = pipe, board, pathlib.Path(folder)
        self.overwrite = overwrite
        written = {
            path.resolve()
            for number in range(1, 1 + len(board.shots))
            for path in self._files_of(number)
        }
        if mine := [path for path in board.files() if path.resolve() in written]:
            raise ValueError(
                f"{mine[0]} is an input, and a shot would be written there: choose another "
                "folder"
            )
        settings = pipe.settings
        self.fps = settings.fps if board.fps is None else board.fps
        height, width = board.height, board.width
        self.height = settings.height if height is None else height
        self.width = settings.width if width is None else width
        if self.fps is None:
            raise board.error(1, "give fps: the model's config has no frame rate")
        if self.height % 2 or self.width % 2:
            raise board.error(
                1, f"size is {self.width}x{self.height}, and a .mp4 needs even ones"
            )
        try:
            requests.check_size(1, self.height, self.width, pipe.strides)
        except ValueError as error:
            raise board.error(1, error) from None
        self._lengths: list[int] = []
        self.steps: list[int] = []  # of the solver, for each shot
        for number, shot in enumerate(board.shots, 1):
            try:
                self._check(number, shot)
            except (ValueError, OSError) as error:
                raise board.error(shot.line, f"shot {number}: {error}") from None

    def _check(self, number: int, shot: Shot) -> None:
        if shot.video is not None:
            self._lengths.append(len(self._video(shot.video)))
            self.steps.append(0)
            return
        self._lengths.append(shot.frames)
        for name in shot.cast:  # pictures of earlier shots do not exist yet
            member = self.board.cast[name]
            if member.shot and member.frame >= self._lengths[member.shot - 1]:
                raise ValueError(
                    f"{name!r} is frame {member.frame} of shot {member.shot}, which has "
                    f"{self._lengths[member.shot - 1]} frames"
                )
        size = self.height, self.width, 3

        def blank(*frames: int) -> np.ndarray:  # without memory of its own
            return np.broadcast_to(np.uint8(0), (*frames, *size))

        task, inputs = self._inputs(
            number,
            shot,
            lambda member: blank(),
            lambda: blank(self._lengths[number - 2]),
        )
        request, windows = self._checked(task, inputs)
        self.steps.append(windows * request.num_inference_steps)

    def _checked(
        self, task: str | None, inputs: Mapping[str, Any]
    ) -> tuple[requests.Request, int]:
        """The request of a task, or of a plain call, and how many windows it makes."""
        if task is None:
            return self.pipe.check_inputs(**inputs), 1
        request, _, windows = self.pipe.check_task(task, **inputs)
        return request, windows

    def _inputs(
        self,
        number: int,
        shot: Shot,
        picture_of: Callable[[Member], np.ndarray],
        before: Callable[[], np.ndarray],
    ) -> tuple[str | None, dict[str, Any]]:
        """The task that makes a shot, None: a plain call; and what it is given."""
        stride = self.pipe.strides.time
        whole = 1 + stride * -(-(shot.frames - 1) // stride)
        call = {
            **shot.arguments,
            "prompt": shot.prompt,
            "fps": self.fps,
            "height": self.height,
            "width": self.width,
            "batch_size": 1,
        }
        if shot.continues:
            return "extend", call | {"video": before(), "frames": shot.frames}
        call["num_frames"] = whole
        if shot.pictures:
            images = [
                self._fitted(video_io.read_image(p)) for p in shot.pictures.values()
            ]
            return "keyframes", call | {"images": images, "at": [*shot.pictures]}
        if shot.cast:
            members = [self.board.cast[name] for name in shot.cast]
            images = [self._fitted(picture_of(member)) for member in members]
            return "reference", call | {"references": images}
        return None, call

    def _fitted(self, image_hwc: np.ndarray) -> np.ndarray:
        return tasks.fitted(image_hwc[None], self.height, self.width)[0]

    def _video(self, path: pathlib.Path) -> np.ndarray:
        film = video_io.decode(path)
        if abs(film.fps - self.fps) > 1e-3 * self.fps:
            raise ValueError(
                f"{path} has {film.fps:g} frames a second, and the storyboard {self.fps:g}"
            )
        return tasks.fitted(film.frames, self.height, self.width)

    def file_of(self, number: int) -> pathlib.Path:
        """The file of a shot, counted from 1."""
        return self.folder / f"{number:03d}.mp4"

    def _files_of(self, number: int) -> tuple[pathlib.Path, pathlib.Path]:
        return self.file_of(number), recipes.sidecar_of(self.file_of(number))

    def frames_of(self, number: int) -> np.ndarray:
        """The frames of a shot that is made, uint8 [t, h, w, 3]."""
        return video_io.decode(self.file_of(number)).frames

    def there(self) -> Iterator[Made]:
        """The shots from the first on that are there as described, up to one that is not."""
        for number, shot in enumerate(self.board.shots, 1):
            *_, recipe = self._described(number, shot)
            file = self.file_of(number)
            if not recipes.is_finished(file, recipe, self.overwrite):
                return
            yield Made(file, self._lengths[number - 1], recipe, False)

    def shots(
        self, progress: Callable[[int], None] = lambda steps: None, skip: int = 0
    ) -> Iterator[Made]:
        """Makes the shots that are not there yet, one after the other.

        Args:
          progress: called with the number of solver steps since its last call.
          skip: the first shots that are left out, since they are known to be there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, shot in enumerate(self.board.shots[skip:], 1 + skip):
            yield self._shot(number, shot, progress)

    def _described(self, number: int, shot: Shot):
        """The frames of a video, or the task and inputs of a shot to make; its recipe."""
        if shot.video is not None:
            frames = self._video(shot.video)
            recipe = _OTHERS | {"prompt": "", "seed": 0, "fps": self.fps}
            recipe["video"] = {"sha256": task_files.digest(frames, "video")}
            return frames, None, {}, recipe

        def picture_of(member: Member) -> np.ndarray:
            if member.picture is not None:
                return video_io.read_image(member.picture)
            return self.frames_of(member.shot)[member.frame]

        task, inputs = self._inputs(
            number, shot, picture_of, lambda: self.frames_of(number - 1)
        )
        recipe = _OTHERS | self.pipe.recipe(self._checked(task, inputs)[0], 0)
        if task is not None:
            recipe |= self.pipe.task_recipe(task, **inputs)
        recipe["shot_frames"] = shot.frames
        return None, task, inputs, recipe

    def _shot(self, number: int, shot: Shot, progress) -> Made:
        file = self.file_of(number)
        frames, task, inputs, recipe = self._described(number, shot)
        if recipes.is_finished(file, recipe, self.overwrite):
            return Made(file, self._lengths[number - 1], recipe, False)
        if frames is None:
            call = self.pipe if task is None else functools.partial(self.pipe.run, task)
            frames = call(**inputs, progress=progress).frames[0]
            # A shot has as many frames as it was given, and a window whole latents.
            new = frames[-shot.frames :] if shot.continues else frames[: shot.frames]
            frames = np.round(255 * new).astype(np.uint8)
        video = video_io.encode_lossless(frames, self.fps)
        recipes.store(file, recipe, lambda temporary: temporary.write_bytes(video))
        return Made(file, len(frames), recipe, True)


def film_recipe(made: Sequence[Made], board: Storyboard, fps: float) -> dict[str, Any]:
    """What is stored in and beside a film: its shots, their first frames, how each was made."""
    starts = np.cumsum([0, *(one.frames for one in made)]).tolist()
    recipe = {
        "storyboard": board.path.name,
        "prompt": "; ".join(shot.prompt for shot in board.shots if shot.prompt),
        "seed": board.shots[0].arguments.get("seed", 0),
        "fps": fps,
        "num_frames": starts[-1],
        "shots": [
            {
                "first_frame": start,
                "frames": one.frames,
                "cut": not board.shots[number].continues,
                "recipe": dict(one.recipe),
            }
            for number, (start, one) in enumerate(zip(starts, made, strict=False))
        ],
    }
    return json.loads(json.dumps(recipe))


def write(
    path: str | pathlib.Path,
    made: Sequence[Made],
    recipe: Mapping[str, Any],
    fps: float,
) -> None:
    """Joins shots to one .mp4; memory does not grow with their number.

    Each is encoded alone, so that a shot that stays as it was has the same frames in the
    new file as well.

    recipe: of `film_recipe`.
    """
    parts = (video_io.encode_mp4(video_io.decode(one.file).frames, fps) for one in made)
    comment = {"comment": json.dumps(recipe, sort_keys=True)}
    recipes.store(
        pathlib.Path(path),
        recipe,
        lambda temporary: video_io.join_mp4(parts, temporary, metadata=comment),
    )
