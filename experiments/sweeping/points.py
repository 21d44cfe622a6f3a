"""The points of a sweep: what is varied, what is fixed, and their commands.

A point is a dict of settings, and a set of points is a list of them:

    product(axis("sampler", ["euler", "heun"]), axis("shift", [3, 6, 12]))  # 6 points
    zipped(axis("loop.num_steps", [500, 1000]), axis("optim.warmup_steps", [20, 40]))  # 2
    chain(axis("guidance_scale", [1, 2]), axis("sampler", ["heun"]))  # 3

The id of a point is a hash of its job and of all settings that it runs with.
"""

import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence

import ml_collections

from sora_jax.core import config as configs
from sora_jax.evals.prompts import toyworld
from sora_jax.training import checkpoint

Point = dict[str, object]

# Flags of sora_jax.evaluate that change how a model is used; these may be varied.
VARIED = (
    "model",
    "checkpoints",
    "guidance_scale",
    "num_inference_steps",
    "sampler",
    "shift",
    "step_cache",
    "seeds",
)
# Flags that decide what is measured; results with different ones cannot be compared.
SHARED = ("shards", "suites", "prompt_seed", "batch_size", *toyworld.SIZES)


def axis(key: str, values: Sequence) -> list[Point]:
    """Returns one point for each value of a key."""
    return [{key: value} for value in values]


def product(*parts: Sequence[Point]) -> list[Point]:
    """Returns every combination of points of the parts; the last varies fastest.

    Raises:
      ValueError: two parts set the same key.
    """
    return [_joined(points) for points in itertools.product(*parts)]


def zipped(*parts: Sequence[Point]) -> list[Point]:
    """Joins the first points of all parts, then the second points, and so on.

    Raises:
      ValueError: the parts have different lengths, or two set the same key.
    """
    if len({len(part) for part in parts}) > 1:
        raise ValueError(f"zipped parts have {[len(part) for part in parts]} points")
    return [_joined(points) for points in zip(*parts, strict=True)]


def chain(*parts: Sequence[Point]) -> list[Point]:
    """Returns the points of the first part, then those of the second, and so on."""
    return [dict(point) for part in parts for point in part]


def prompts(**sizes: int) -> Point:
    """Returns settings with these numbers of prompts by suite, and no other suites."""
    return dict.fromkeys(toyworld.SIZES, 0) | sizes


def _joined(points: Sequence[Point]) -> Point:
    joined: Point = {}
    for point in points:
        if twice := joined.keys() & point.keys():
            raise ValueError(f"{', '.join(sorted(twice))} is set by two parts")
        joined |= point
    return joined


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """The definition of a sweep, returned by its file.

    Attributes:
      job: "evaluate", with settings named like the flags of sora_jax.evaluate; or
        "train", with `config` (the recipe's file), dotted fields of the config, and
        settings of a following evaluation prefixed by `evaluate.`.
      points: what is varied.
      quality: the measure to compare by: a share such as "motion/direction", a measure
        of video quality such as "FVD-toy", or, for training without evaluation, a column
        of metrics.jsonl.
      base: settings of all points; --set overrides them.
      lower_is_better: direction of the quality.
      cost: "evaluations" (of the network, per clip), "seconds" (of the point's jobs),
        or the key of a numeric setting.
      columns: more measures for the table.
    """

    job: str
    points: Sequence[Point]
    quality: str
    base: Mapping[str, object] = dataclasses.field(default_factory=dict)
    lower_is_better: bool = False
    cost: str = "evaluations"
    columns: Sequence[str] = ()

    @property
    def varied(self) -> list[str]:
        """The keys that points set, in order of first appearance."""
        return list(dict.fromkeys(key for point in self.points for key in point))


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A point with all settings that it runs with, its name and its id."""

    job: str
    settings: Mapping[str, object]
    name: str

    @property
    def id(self) -> str:
        """Ten hex digits of a hash of job and settings."""
        text = json.dumps([self.job, self.settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    def commands(self, folder: pathlib.Path) -> list[list[str]]:
        """Returns the commands of the jobs, as lists of arguments of Python.

        An evaluation writes `scores.json` to `folder`; a training run is `folder`/run.
        """
        settings = dict(self.settings)
        if self.job == "evaluate":
            return [_command("evaluate", settings | {"out": folder})]
        evaluated = _after(settings, "evaluate.")
        recipe = settings.pop("config")
        fields = {
            f"config.{name}": value
            for name, value in settings.items()
            if not name.startswith("evaluate.")
        }
        found = [_command("train", {"config": recipe, "out": folder / "run"} | fields)]
        if evaluated:
            places = {"model": folder / "run", "out": folder}
            found.append(_command("evaluate", places | evaluated))
        return found


def _command(job: str, flags: Mapping[str, object]) -> list[str]:
    return [
        "-m",
        f"sora_jax.{job}",
        *(f"--{n}={_text(n, v)}" for n, v in flags.items()),
    ]


def _text(flag: str, value: object) -> str:
    """Formats a value for a flag: lists with commas, tuples of a config as literals."""
    if isinstance(value, list | tuple) and not flag.startswith("config."):
        return ",".join(map(str, value))
    return str(value)


def load(path: str | pathlib.Path) -> Sweep:
    """Runs a sweep's file and returns the result of its `get_sweep()`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it has no `get_sweep` that returns a `Sweep`.
    """
    module = _module(path, "a sweep")
    sweep = module.get_sweep() if hasattr(module, "get_sweep") else None
    if not isinstance(sweep, Sweep):
        raise ValueError(f"{path} has no get_sweep() that returns a points.Sweep")
    return sweep


def _module(path: str | pathlib.Path, what: str):
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {what} is a Python file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def resolve(sweep: Sweep, given: Mapping[str, object]) -> list[Resolved]:
    """Returns the points with all their settings, in order and without duplicates.

    If an evaluation does not name a checkpoint and the run is on this machine, the newest
    step is filled in, so that the point keeps its meaning while training continues.

    Args:
      sweep: from a sweep's file.
      given: further settings of all points; they override the file's base.

    Raises:
      ValueError: a setting is unknown (with the nearest name), missing, both given and
        varied, or varied although results would not be comparable.
      FileNotFoundError: there is no such recipe.
    """
    if sweep.job not in ("train", "evaluate"):
        raise ValueError(f"a sweep's job is 'train' or 'evaluate', not {sweep.job!r}")
    if not sweep.points:
        raise ValueError("the sweep has no points")
    if both := [key for key in sweep.varied if key in given]:
        raise ValueError(f"{', '.join(both)}: varied by the sweep, cannot be set")
    found: dict[str, Resolved] = {}
    for point in sweep.points:
        everything = {**sweep.base, **given, **point}
        _check(sweep.job, everything, point)
        settings = _with_checkpoint(sweep.job, everything)
        named = [f"{key}={settings[key]}" for key in sweep.varied if key in settings]
        plain = {key: _plain(value) for key, value in settings.items()}
        resolved = Resolved(sweep.job, plain, " ".join(named))
        found.setdefault(resolved.id, resolved)
    return [*found.values()]


def _plain(value: object) -> object:
    """Normalizes a value for JSON: 4.0 becomes 4."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value


def _with_checkpoint(job: str, settings: Point) -> Point:
    if job != "evaluate" or "checkpoints" in settings:
        return settings
    steps = checkpoint.steps(settings["model"])
    return settings | ({"checkpoints": steps[-1]} if steps else {})


def _check(job: str, settings: Point, varied: Point) -> None:
    if job == "evaluate":
        _check_evaluation(settings, varied, "")
        return
    if "config" not in settings:
        raise ValueError("a recipe is missing: --set config=configs/toy.py")
    fields = _fields(str(settings["config"]))
    evaluation = tuple(f"evaluate.{name}" for name in (*VARIED, *SHARED))
    _check_known(settings, ("config", *fields, *evaluation), "the config")
    prefix = "evaluate."
    asked = _after(settings, prefix)
    if asked:
        _check_evaluation(asked | {"model": "run"}, _after(varied, prefix), prefix)


def _after(settings: Point, prefix: str) -> Point:
    return {
        k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)
    }


def _check_evaluation(settings: Point, varied: Point, prefix: str) -> None:
    _check_known(settings, (*VARIED, *SHARED), "sora_jax.evaluate")
    for name in ("model", "shards"):
        if name not in settings:
            raise ValueError(f"{prefix}{name} is missing: --set {prefix}{name}=...")
    if asked := [name for name in SHARED if name in varied]:
        raise ValueError(
            f"{prefix}{asked[0]} decides what is measured: points that differ in it "
            f"cannot be compared; only {', '.join(VARIED)} may be varied"
        )


def _check_known(settings: Point, known: Sequence[str], where: str) -> None:
    for name in settings:
        if name in known:
            continue
        # People often give the last part of a dotted key only.
        near = [key for key in known if key.split(".")[-1] == name]
        near = near or difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"{name!r} is not a setting of {where}; {hint}")


@functools.cache
def _fields(recipe: str) -> tuple[str, ...]:
    config = _module(recipe, "a recipe").get_config()
    assert isinstance(config, ml_collections.ConfigDict)
    return tuple(configs.flatten(config))
