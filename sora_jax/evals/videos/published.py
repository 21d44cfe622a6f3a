"""Protocols of published scores by name, as their public code fixes them.

A preset is not a default: options beside it must agree with it, including weights and
numbers of clips, since a score measured otherwise is a different score.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sora_jax.evals.features import networks


class NotTheProtocol(ValueError):
    """An option or the weights contradict the named protocol."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How two folders of clips are compared.

    Attributes:
      features: the feature network's name, one of `networks.NAMES`.
      num_frames: frames of a clip; None: what the network takes.
      stride: every stride-th frame is used.
      reference_stride: stride of the reference; None: as `stride`.
      resize: one of `resize.NAMES`; None: the network's default.
      eps: of I3D's batch norms; None: that of the weights.
      num_clips: clips per set; None: all.
      same_size: whether all clips of both sets must have one size, because the public
        code resizes them to that of the data set first.
      score: the published score: "frechet" (covariances divided by n - 1), "frechet_n"
        (by n), or "jedi".
      reference_start: "first", or "random" for a window at a random position.
    """

    features: str = "toy"
    num_frames: int | None = None
    stride: int = 1
    reference_stride: int | None = None
    resize: str | None = None
    eps: float | None = None
    num_clips: int | None = None
    same_size: bool = False
    score: str = "frechet"
    reference_start: str = "first"


_STYLEGAN_V = Settings(
    "i3d",
    16,
    1,
    1,
    "half_pixel",
    1e-3,
    2048,
    score="frechet_n",
    same_size=True,
    reference_start="random",
)
_VIDEOGPT = Settings("i3d", 16, 1, 1, "half_pixel, cropped", 1e-5)
PRESETS = {
    # TensorFlow's own code, arXiv 1812.01717.
    "fvd": Settings("i3d", 16, 1, 1, "tf", 1e-3),
    # universome/stylegan-v: fvd2048_16f, fvd2048_128f, fvd2048_128f_subsample8f.
    "stylegan-v": _STYLEGAN_V,
    "stylegan-v-128f": dataclasses.replace(_STYLEGAN_V, num_frames=128),
    "stylegan-v-128f-subsample8f": dataclasses.replace(
        _STYLEGAN_V, stride=8, reference_stride=8
    ),
    # Vchitect/Latte: the same, with real clips at the frame interval of training (GitHub
    # issues 65, 94), which is 6 for Taichi-HD (GitHub issue 115).
    "latte": dataclasses.replace(_STYLEGAN_V, reference_stride=3),
    "latte-taichi": dataclasses.replace(_STYLEGAN_V, reference_stride=6),
    # VideoGPT's port of the network: short side resized, centre crop.
    "videogpt": _VIDEOGPT,
    "tats": dataclasses.replace(_VIDEOGPT, num_clips=2048),
    # songweige/content-debiased-fvd with either network; aspect ratio not kept.
    "cd-fvd": Settings(
        "videomae", 16, 1, 1, "half_pixel", None, 2048, score="frechet_n"
    ),
    "cd-fvd-i3d": Settings(
        "i3d", 16, 1, 1, "half_pixel", 1e-5, 2048, score="frechet_n"
    ),
    # arXiv 2410.05203: 100 times the biased kernel distance of degree 2.
    "jedi": Settings("vjepa", 16, 1, 1, "half_pixel", score="jedi"),
}


def resolve(name: str | None, given: Mapping[str, Any]) -> Settings:
    """Returns the settings of a preset, or defaults with the given fields.

    Args:
      name: of the preset; None: no published protocol.
      given: fields of `Settings`; None is not set.

    Raises:
      NotTheProtocol: a given field contradicts the preset.
      ValueError: unknown preset or features.
    """
    asked = {field: value for field, value in given.items() if value is not None}
    if name is None:
        settings = Settings(**asked)
        if settings.features not in networks.NAMES:
            raise ValueError(
                f"features are {settings.features!r}, they must be one of "
                f"{', '.join(networks.NAMES)}"
            )
        return settings
    if name not in PRESETS:
        raise ValueError(
            f"protocol is {name!r}, it must be one of {', '.join(PRESETS)}"
        )
    preset = PRESETS[name]
    for field, value in asked.items():
        if getattr(preset, field) != value:
            raise NotTheProtocol(
                f"protocol {name} has {field} {getattr(preset, field)}, but {value} is "
                "given: leave one of the two out"
            )
    return preset


def open_network(settings: Settings, name: str | None, folder, batch_size: int | None):
    """Opens the feature network with the settings of the protocol.

    Args:
      settings: the network, and how clips are passed to it.
      name: of the preset, for messages.
      folder: of the weights.
      batch_size: clips per batch; None: the network's default.

    Raises:
      NotTheProtocol: epsilon or number of frames of the weights contradicts the preset.
      ValueError: see `networks.open`.
    """
    options = {} if batch_size is None else {"batch_size": batch_size}
    if settings.features == "toy":
        if folder is not None or settings.resize is not None:
            raise ValueError("the toy state network has its own weights and resizing")
    else:
        options["resize"] = settings.resize
    if settings.features == "i3d":
        options["num_frames"] = settings.num_frames
    network = networks.open(settings.features, folder, **options)
    eps = getattr(network, "eps", None)
    if settings.eps is not None and eps != settings.eps:
        raise NotTheProtocol(
            f"protocol {name} has I3D's epsilon {settings.eps:g}, but {folder} has "
            f"{eps:g}: these weights come from another file"
        )
    if settings.features != "clip" and (
        settings.num_frames not in (None, network.num_frames)
    ):
        whose = f"protocol {name}" if name else "--num_frames"
        raise NotTheProtocol(
            f"{whose} has {settings.num_frames} frames, but the network of "
            f"{settings.features} takes {network.num_frames}"
        )
    return network
