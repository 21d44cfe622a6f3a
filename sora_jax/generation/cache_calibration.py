"""The calibration of a model's step cache: `step_cache.json` in its folder.

`evals/prompts/cached_sampling.py` measures it for one model and one way of sampling; a
call with `step_cache=0.1` takes its schedule from it (`diffusion/step_cache.py`).
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sora_jax.core import config as configs
from sora_jax.core import digests
from sora_jax.diffusion import samplers, step_cache
from sora_jax.generation import recipes
from sora_jax.generation import request as requests

FILE = "step_cache.json"
_DAMAGED = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    OverflowError,
    RecursionError,
)
_LARGEST_FILE = 1 << 24
_SAMPLING = (
    "sampler",
    "num_inference_steps",
    "shift",
    "guidance_scale",
    "guidance_scale_2",
    "guidance_rescale",
    "given_scale",
    "anchor_tau",
)
Table = tuple[tuple[tuple[float, ...], ...], ...]  # [expert][evaluation][branch]


@dataclasses.dataclass(frozen=True)
class Quality:
    """How similar the videos of a threshold are to those without a step cache.

    Attributes:
      computed: number of evaluations that are computed, of `evaluations`.
      psnr, ssim: means over the clips, psnr in dB.
      lowest_psnr: that of the worst clip.
    """

    threshold: float
    computed: int
    evaluations: int
    psnr: float
    lowest_psnr: float
    ssim: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Ratios of successive residuals of one model, for one way of sampling.

    Attributes:
      model: identifies its weights.
      sampling: the arguments on which the ratios depend.
      clips: the number and size of the measured clips: "clips", "num_frames", "height",
        "width".
      max_skips, retention: see `diffusion/step_cache.py`.
      ratio: of the norms of a token's residual, the mean over tokens and clips, by
        expert, evaluation and branch of guidance (with the text, without).
      deviation: its standard deviation over tokens.
      distance: the mean cosine distance of successive residuals.
      quality: by rising threshold.
    """

    model: Mapping[str, Any]
    sampling: Mapping[str, Any]
    clips: Mapping[str, int]
    max_skips: int
    retention: float
    ratio: Table
    deviation: Table
    distance: Table
    quality: tuple[Quality, ...] = ()

    def __post_init__(self):
        shapes = [
            [np.shape(expert) for expert in table]
            for table in (self.ratio, self.deviation, self.distance)
        ]
        if shapes[0] != shapes[1] or shapes[0] != shapes[2] or not shapes[0]:
            raise ValueError("its tables differ in shape")
        if any(len(shape) != 2 or shape[1] not in (1, 2) for shape in shapes[0]):
            raise ValueError("a table has a row an evaluation, a column a branch")
        for expert in self.ratio:
            ratio_er = np.asarray(expert, np.float64)
            if not (np.isfinite(ratio_er).all() and (ratio_er > 0).all()):
                raise ValueError("a ratio is a number above 0")
        if type(self.max_skips) is not int or self.max_skips < 1:
            raise ValueError(f"max_skips is at least 1, not {self.max_skips!r}")
        if not 0 <= self.retention <= 1:
            raise ValueError(f"retention is a share, not {self.retention!r}")

    def digest(self) -> str:
        """16 hex digits that identify all that determines a schedule."""
        content = [self.ratio, self.max_skips, self.retention]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def save(self, path: pathlib.Path) -> None:
        """Writes the file."""
        text = json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)
        digests.store(path, text + "\n")

    def schedules(self, threshold: float) -> list[tuple[np.ndarray, np.ndarray]]:
        """The schedule of each expert's evaluations; each begins with an empty cache."""
        policy = self.max_skips, self.retention
        return [step_cache.schedule(ratio, threshold, *policy) for ratio in self.ratio]

    def rows(
        self, request: requests.Request, plans: Sequence[samplers.Plan]
    ) -> list[samplers.Plan]:
        """What the step cache adds to the plan of each expert."""
        return [
            step_cache.plan_rows(request.sampler, plan, *schedule)
            for plan, schedule in zip(
                plans, self.schedules(request.step_cache), strict=True
            )
        ]

    def counts(self, threshold: float) -> tuple[int, int]:
        """The number of computed evaluations, and that of all."""
        reused = [reuse_e for reuse_e, _ in self.schedules(threshold)]
        total = sum(map(len, reused))
        return total - int(sum(np.sum(reuse_e) for reuse_e in reused)), total

    def alike(self, first: float, second: float) -> bool:
        """Whether two thresholds skip the same evaluations."""
        pairs = zip(self.schedules(first), self.schedules(second), strict=True)
        return all(np.array_equal(a, b) for (a, _), (b, _) in pairs)

    def check(self, request: requests.Request, source: Mapping[str, Any]) -> None:
        """Raises ValueError if it is of another model or another way of sampling."""
        _check_same(self.model, model_of(source))
        self.check_sampling(request)

    def check_sampling(self, request: requests.Request) -> None:
        """Raises ValueError if it is of another way of sampling."""
        _check_same(self.sampling, sampling_of(request))
        steps, experts = request.num_inference_steps, len(self.ratio)
        count = samplers.evaluations(request.sampler, steps, experts)
        scales = request.guidance_scale, request.guidance_scale_2
        shapes = [np.shape(expert) for expert in self.ratio]
        branches = [1 + (scale != 1) for scale in scales][:experts]
        if sum(e for e, _ in shapes) != count or [r for _, r in shapes] != branches:
            raise ValueError(
                f"the step cache's tables are not of {count} evaluations with "
                f"{branches} branches: calibrate it again (generate "
                "--calibrate_step_cache)"
            )

    def describe(self, threshold: float) -> str:
        """The speed-up and quality of a threshold, as text for the user."""
        computed, total = self.counts(threshold)
        n, t, h, w = (
            self.clips[name] for name in ("clips", "num_frames", "height", "width")
        )
        lines = [
            f"step cache {threshold:g}: {computed} of {total} evaluations are computed, "
            f"up to {total / computed:.2f} x as fast"
        ]
        same = [q for q in self.quality if self.alike(q.threshold, threshold)]
        shown = same[:1]
        if not same:
            shown = [q for q in self.quality if q.threshold < threshold][-1:]
            shown += [q for q in self.quality if q.threshold > threshold][:1]
        for q in shown:
            known = "" if same else f"{q.threshold:g} ({q.computed} computed): "
            lines.append(
                f"  {known}PSNR {q.psnr:.1f} dB (lowest {q.lowest_psnr:.1f}), SSIM "
                f"{q.ssim:.3f} against all computed, on the {n} clips of {t} frames of "
                f"{w} x {h} of its calibration"
            )
        return "\n".join(lines)


def _check_same(was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differ = [
        f"{name} {was.get(name)!r} and not {now.get(name)!r}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]
    if differ:
        raise ValueError(
            f"the step cache was calibrated for {', '.join(differ)}: calibrate it again "
            "(generate --calibrate_step_cache)"
        )


def model_of(source: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a source that identify the weights of a pipeline's experts."""
    model = {n: source[n] for n in recipes.WEIGHTS if source.get(n) is not None}
    if "expert_2" in source:
        model["expert_2"] = json.dumps(model_of(source["expert_2"]), sort_keys=True)
    return model


def sampling_of(request: requests.Request) -> dict[str, Any]:
    """The arguments on which ratios depend."""
    return {name: getattr(request, name) for name in _SAMPLING}


def check_recipe(recipe: Mapping[str, Any], calibration: Any) -> None:
    """Raises ValueError if a video to be made again had another calibration."""
    was = recipe.get("step_cache_digest")
    if was and isinstance(calibration, Calibration) and calibration.digest() != was:
        raise ValueError(
            f"the video was made with the step cache's calibration {was}, the model's "
            f"is {calibration.digest()} now: add --step_cache 0 to compute everything"
        )


def read(source: Calibration | str | pathlib.Path | None) -> Calibration:
    """The calibration of a pipeline, read from its file if it is not loaded yet.

    Raises:
      FileNotFoundError: there is none.
      ValueError: the file is damaged.
    """
    if isinstance(source, Calibration):
        return source
    path = None if source is None else pathlib.Path(source)
    if path is None or not path.is_file():
        where = f": there is no {path}" if path else ""
        raise FileNotFoundError(
            f"the model's step cache is not calibrated{where}; calibrate it first "
            "(generate --calibrate_step_cache)"
        )
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ValueError(f"it is larger than {_LARGEST_FILE} bytes")
        content = json.loads(digests.read(path), parse_constant=_refuse)
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        quality = content.pop("quality", [])
        calibration = configs.build(Calibration, content, "step cache")
        measured = tuple(configs.build(Quality, one, "quality") for one in quality)
        calibration = dataclasses.replace(calibration, quality=measured)
        # Fails here, not later, if these are of another type.
        calibration.model.items(), calibration.sampling.items()
        calibration.describe(0.0)
        return calibration
    except _DAMAGED as error:
        raise ValueError(
            f"{path} is not a calibration of a step cache ({error}): calibrate it again "
            "(generate --calibrate_step_cache)"
        ) from None


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")
