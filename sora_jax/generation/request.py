"""The arguments of a call to the pipeline: their names, ranges, defaults and checks.

`Arguments` is the one list of those that all clips of a call share. Flags, columns of
prompt files, recipes and the section `sample` of a config follow from it. A wrong value
is refused before anything is computed, with the nearest right one.
"""

import dataclasses
import difflib
import hashlib
import secrets
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from sora_jax.core import config as configs
from sora_jax.core import rng
from sora_jax.data import texts
from sora_jax.diffusion import samplers
from sora_jax.models import dit as dits
from sora_jax.models import video_vae

_MOST = 10**6  # frames and pixels a side; see `configs.Size`
RANDOM = -1  # in place of a seed: draw one
# Arguments of a call that each clip may have its own of, and how many there are.
OF_CLIPS = ("negative_prompt", "seed", "num_videos_per_prompt", "batch_size")
_Scale = Annotated[float, configs.Range("[0, 100]")]


def _argument(help: str, default: object = dataclasses.MISSING):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """The arguments that all clips of a call share."""

    num_frames: configs.Size = _argument("Frames of each video.")
    height: configs.Size = _argument("Height in pixels.")
    width: configs.Size = _argument("Width in pixels.")
    fps: Annotated[float, configs.Range("[0.01, 1000]")] | None = _argument(
        "Frames per second."
    )
    num_inference_steps: Annotated[int, configs.Range("[1, 1000]")] = _argument(
        "Steps of the solver.", 20
    )
    guidance_scale: _Scale = _argument("Weight of the prompt; 1: no guidance.", 3.5)
    guidance_scale_2: _Scale | None = _argument(
        "Guidance scale of the second of two experts.", None
    )
    guidance_rescale: configs.Share = _argument(
        "Rescaling of guided velocities, from 0 (off) to 1; 0.7 suits high guidance.",
        0.0,
    )
    given_scale: _Scale = _argument(
        "Weight of what is given besides the prompt; 1: no guidance by it.", 1.0
    )
    anchor_tau: configs.Share = _argument(
        "Noise level of what is given at the first step, from which it falls over the "
        "first tenth of the steps; frees a still picture. 0: off.",
        0.0,
    )
    shift: Annotated[float, configs.Range("(0, 100]")] = _argument(
        "Shift of the noise levels towards noise; 1: none."
    )
    sampler: str = _argument("Solver: euler, heun or unipc.", "euler")
    step_cache: Annotated[float, configs.Range("[0, 100]")] = _argument(
        "Error up to which evaluations of the denoiser are skipped, such as 0.1; 0: off.",
        0.0,
    )


class Argument(NamedTuple):
    """Type and description of an argument, for flags and files."""

    kind: type
    help: str


def _kind(hint: object) -> type:
    """The int, float or str of a hint that may have a range or allow None."""
    while inner := typing.get_args(hint):
        hint = inner[0]
    return hint


SHARED = {
    field.name: Argument(
        _kind(typing.get_type_hints(Arguments)[field.name]),
        f"{field.metadata['help']} Default: the model's.",
    )
    for field in dataclasses.fields(Arguments)
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Arguments):
    """A model's defaults of a call, and how it computes; they come from the run's config.

    shift and known_tau are those of training. fps is None if no data was seen yet; a call
    must then give it.

    Attributes:
      text_length: tokens that prompts are padded to.
      known_tau: noise level of known tokens.
      batch_size: clips that are computed at a time, always that many, so that a clip does
        not depend on the others of its call.
      chunk_steps: solver steps of one compiled program.
      levels: "even" steps before the shift, or those of the schedulers of "diffusers".
      boundary: noise level below which the second of two experts denoises.
      takes_images: whether an image can be given.
      trained_patterns: what the denoiser was given in training, by names of
        `conditions.Pattern`, "mid_clip" for windows that start mid-clip, and "images";
        tasks that give something else are refused.
      trained_levels: noise levels that the denoiser was trained on; one of two experts
        cannot make a video alone.
    """

    text_length: configs.Size
    known_tau: Annotated[float, configs.Range("[0, 1)")] = 0.02
    batch_size: configs.Size = 8
    chunk_steps: configs.Size = 5
    levels: str = "even"
    boundary: configs.Share | None = None
    takes_images: bool = True
    trained_patterns: tuple[str, ...] = ()
    trained_levels: tuple[configs.Share, configs.Share] = (0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Upsampled:
    """A prompt that was rewritten; see `prompt_upsampler`.

    Attributes:
      text: what the model is given.
      original: what the user wrote.
      upsampler: who rewrote it.
    """

    text: str
    original: str
    upsampler: str


@dataclasses.dataclass(frozen=True)
class Strides:
    """Which video sizes a model can make.

    Frames number 1 + time * n, where 1 + n latent frames are a multiple of
    patch_time; height and width are multiples of height and width.
    """

    time: int
    patch_time: int
    height: int
    width: int


def strides_of(vae: video_vae.Config, dit: dits.Config) -> Strides:
    """Which video sizes a video VAE and a denoiser can make together."""
    return Strides(
        time=vae.temporal_stride,
        patch_time=dit.patch[0],
        height=vae.spatial_stride * dit.patch[1],
        width=vae.spatial_stride * dit.patch[2],
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request(Arguments):
    """A checked call: one prompt, negative prompt, seed and image for each clip.

    upsampled has for each clip how its prompt was rewritten; None where it was not.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    images: tuple[np.ndarray, ...] | None
    batch_size: configs.Size
    upsampled: tuple[Upsampled | None, ...]
    latents: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def keys(self, rows: Sequence[int], stream: str, *indices: int) -> jax.Array:
        """The random keys of these clips, see `rng.key`."""
        return jnp.stack([rng.key(self.seeds[row], stream, *indices) for row in rows])

    def recipe(self, index: int) -> dict:
        """The arguments of this call for one clip, as JSON can hold them."""
        values = {
            "prompt": self.prompts[index],
            "negative_prompt": self.negative_prompts[index],
            "seed": self.seeds[index],
            "image_sha256": None,
        }
        if (rewritten := self.upsampled[index]) is not None:
            values["original_prompt"] = rewritten.original
            values["upsampler"] = rewritten.upsampler
        if self.images is not None:
            pixels = np.ascontiguousarray(self.images[index])
            values["image_sha256"] = hashlib.sha256(pixels.tobytes()).hexdigest()
        if self.latents is not None:
            digest = hashlib.sha256(np.ascontiguousarray(self.latents[index]).tobytes())
            values["latents_sha256"] = digest.hexdigest()
        return values | {name: getattr(self, name) for name in SHARED}


def _nearest(value: int, possible: Sequence[int]) -> str:
    """ "81", or "77 or 81": the possible values on both sides of an impossible one."""
    below = [p for p in possible if p < value][-1:]
    above = [p for p in possible if p > value][:1]
    return " or ".join(str(p) for p in below + above)


def check_size(num_frames: int, height: int, width: int, strides: Strides) -> None:
    """Raises ValueError, with the nearest possible value, for an impossible size."""
    for name, value in (
        ("num_frames", num_frames),
        ("height", height),
        ("width", width),
    ):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise ValueError(f"{name} is a whole number, not {value!r}")
        if value > _MOST:
            raise ValueError(f"{name} is at most {_MOST}, not {value}")
    period = strides.time * strides.patch_time
    first = 1 + strides.time * (strides.patch_time - 1)
    if num_frames < first or (num_frames - first) % period:
        lowest = first + max(0, (num_frames - first) // period) * period
        raise ValueError(
            f"num_frames is {num_frames}; this model makes {first} + {period} n frames: "
            f"the nearest is {_nearest(num_frames, [lowest, lowest + period])}"
        )
    for name, value, stride in (
        ("height", height, strides.height),
        ("width", width, strides.width),
    ):
        if value < stride or value % stride:
            lowest = max(1, value // stride) * stride
            raise ValueError(
                f"{name} is {value}; this model makes multiples of {stride}: the "
                f"nearest is {_nearest(value, [lowest, lowest + stride])}"
            )


def checked_texts(
    value: str | Sequence[str], name: str, empty_allowed: bool
) -> list[str]:
    """The texts, normalised as captions are."""
    normal = [value] if isinstance(value, str) else list(value)
    for index, text in enumerate(normal):
        where = name if len(normal) == 1 else f"{name} {index}"
        if not isinstance(text, str):
            raise ValueError(f"{where} is text, not {type(text).__name__}")
        text = normal[index] = texts.normalise(text)
        if not empty_allowed and not text:
            raise ValueError(f"{where} is empty: describe the video")
        if len(text) > texts.MAX_CHARACTERS:
            raise ValueError(
                f"{where} has {len(text)} characters; at most "
                f"{texts.MAX_CHARACTERS} are read"
            )
    return normal


def check_lengths(
    request: Request, count: Callable[[str], int], text_length: int
) -> None:
    """Raises ValueError for a text with more tokens than the model was trained on."""
    for text in dict.fromkeys(request.prompts + request.negative_prompts):
        if (tokens := count(text)) <= text_length:
            continue
        for rewritten in request.upsampled:
            if rewritten is not None and rewritten.text == text:
                raise ValueError(
                    f"{rewritten.upsampler} rewrote {rewritten.original[:60]!r} in "
                    f"{tokens} tokens; this model reads {text_length}: {text!r}"
                )
        raise ValueError(
            f"a prompt has {tokens} tokens; this model reads {text_length}: "
            f"shorten {text[:60]!r}"
        )


def check_whole(settings: Settings) -> None:
    """Raises ValueError for one of two experts, which is trained on some levels only."""
    low, high = settings.trained_levels
    if (low, high) != (0.0, 1.0):
        raise ValueError(
            f"the model is one of two experts, trained on the levels from {low:g} to "
            f"{high:g} alone: join both with `convert --expert_2`"
        )


def _per_clip(values: list, count: int, name: str) -> tuple:
    """One value per clip, from one for all or one for each."""
    if len(values) == 1:
        values = values * count
    if len(values) != count:
        raise ValueError(f"there are {len(values)} {name} for {count} clips")
    return tuple(values)


def random_seed() -> int:
    """Draws a seed in [0, 2^32), the same one in all processes."""
    drawn = np.uint32(secrets.randbits(32))
    if jax.process_count() > 1:
        drawn = multihost_utils.broadcast_one_to_all(drawn)
    return int(drawn)


def _seeds(seed: int | Sequence[int], count: int) -> tuple[int, ...]:
    if isinstance(seed, int | np.integer) and not isinstance(seed, bool):
        first = random_seed() if seed == RANDOM else int(seed)
        seeds = [first + index for index in range(count)]
    elif isinstance(seed, str) or not isinstance(seed, Sequence | np.ndarray):
        raise ValueError(f"seed is a whole number or one for each clip, not {seed!r}")
    else:
        seeds = list(seed)
        if len(seeds) != count:
            raise ValueError(f"there are {len(seeds)} seeds for {count} clips")
    for value in seeds:
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or not (0 <= value < rng.SEEDS or value == RANDOM):
            raise ValueError(
                "a seed is a whole number in [0, 2^64), or -1 for a random one, not "
                f"{value!r}"
            )
    return tuple(random_seed() if s == RANDOM else int(s) for s in seeds)


def _images(image, count: int) -> tuple[np.ndarray, ...] | None:
    if image is None:
        return None
    if isinstance(image, np.ndarray) and image.ndim == 3:
        image = [image]
    elif not isinstance(image, list | tuple | np.ndarray):
        raise ValueError(
            "image is an array [height, width, 3] or one for each clip, "
            f"not {type(image).__name__}"
        )
    return _per_clip([np.asarray(picture) for picture in image], count, "images")


def check(
    settings: Settings,
    strides: Strides,
    *,
    prompt: str | Upsampled | Sequence[str | Upsampled],
    negative_prompt: str | Sequence[str] = "",
    num_videos_per_prompt: int = 1,
    seed: int | Sequence[int] = 0,
    image: np.ndarray | Sequence[np.ndarray] | None = None,
    latents: np.ndarray | None = None,
    batch_size: int | None = None,
    output_type: str = "np",
    is_given: bool | None = None,
    **shared: int | float | str | None,
) -> Request:
    """Resolves and checks the arguments of a call; see `Pipeline.__call__`.

    Args:
      is_given: whether the denoiser is given something besides text; None: if there is
        an image.
      shared: by the names of `SHARED`; None is the model's setting.

    Raises:
      ValueError: one sentence: which argument, what it was, what would be right.
    """
    if unknown := shared.keys() - SHARED.keys():
        raise TypeError(f"unknown argument {min(unknown)!r}")
    check_whole(settings)
    named = {name: value for name, value in shared.items() if value is not None}
    named |= {n: v.item() for n, v in named.items() if isinstance(v, np.generic)}
    values = {name: getattr(settings, name) for name in SHARED} | named
    values["guidance_scale_2"] = _second_scale(settings, named)
    given = [prompt] if isinstance(prompt, str | Upsampled) else list(prompt)
    rewritten = [value if isinstance(value, Upsampled) else None for value in given]
    plain = [value.text if isinstance(value, Upsampled) else value for value in given]
    prompts = checked_texts(plain, "prompt", empty_allowed=False)
    if not prompts:
        raise ValueError("there is no prompt: give at least one")
    if not isinstance(num_videos_per_prompt, int) or num_videos_per_prompt < 1:
        raise ValueError(
            f"num_videos_per_prompt is at least 1, not {num_videos_per_prompt!r}"
        )
    negatives = checked_texts(negative_prompt, "negative_prompt", empty_allowed=True)
    negatives = _per_clip(negatives, len(prompts), "negative prompts")
    images = _images(image, len(prompts))

    def repeated(values):
        return tuple(v for v in values for _ in range(num_videos_per_prompt))

    count = len(prompts) * num_videos_per_prompt
    request = Request(
        prompts=repeated(prompts),
        upsampled=repeated(rewritten),
        negative_prompts=repeated(negatives),
        seeds=_seeds(seed, count),
        images=None if images is None else repeated(images),
        latents=latents,
        batch_size=settings.batch_size if batch_size is None else batch_size,
        **values,
    )
    check_size(request.num_frames, request.height, request.width, strides)
    if images is not None and request.num_frames == 1:
        raise ValueError(
            "num_frames is 1: with an image given, nothing is left to make"
        )
    if request.fps is None:
        raise ValueError("give fps: the model's config has no frame rate")
    configs.check(request)
    if {request.guidance_scale, request.guidance_scale_2} <= {1, None}:
        of_guidance = {
            "negative_prompt": any(negatives),
            "guidance_rescale": named.get("guidance_rescale"),
        }
        for name in (n for n, value in of_guidance.items() if value):
            raise ValueError(
                f"{name} is given, but guidance_scale is 1, where it does nothing: "
                "give another guidance_scale, such as 3.5, or leave it out"
            )
    if not (images is not None if is_given is None else is_given):
        neutral = {"given_scale": 1, "anchor_tau": 0}
        for name in (n for n, x in neutral.items() if named.get(n, x) != x):
            raise ValueError(
                f"{name} is for what the denoiser is given besides the prompt, and here "
                "that is nothing: leave it out"
            )
    if request.step_cache and request.given_scale != 1:
        raise ValueError(
            "step_cache is not for guidance by what is given: leave out one of step_cache "
            "and given_scale"
        )
    if images is not None and not settings.takes_images:
        raise ValueError(
            "image is given, but this model makes videos from text alone: Wan 2.2 "
            "TI2V-5B and models trained here with first frames take images"
        )
    _one_of("sampler", request.sampler, [s.value for s in samplers.Sampler])
    _one_of("output_type", output_type, ["np", "latent"])
    return request


def _second_scale(settings: Settings, named: dict) -> float | None:
    """The second expert's scale: as called, else as the first's, else the default."""
    if settings.boundary is None:
        if "guidance_scale_2" in named:
            raise ValueError("guidance_scale_2 is given, but this model has one expert")
        return None
    if "guidance_scale_2" in named:
        return named["guidance_scale_2"]
    if "guidance_scale" in named:
        return named["guidance_scale"]
    second = settings.guidance_scale_2
    return settings.guidance_scale if second is None else second


def _one_of(name: str, value: str, possible: list[str]) -> None:
    if value not in possible:
        near = difflib.get_close_matches(str(value), possible, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} {value!r} is unknown; there are {possible}{hint}")
