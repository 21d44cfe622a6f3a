"""Protocols of published scores, by name: what their public code fixes.

A preset is not a default. What is given beside one must be what it says, weights and
numbers of clips included; a score under its name is otherwise another score.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sora_jax.evals.features import networks


class NotTheProtocol(ValueError):
    """What is given differs from what the named protocol fixes."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How two folders of clips are compared.

    Attributes:
      features: the feature network's name, one of `networks.NAMES`.
      num_frames: frames of a clip, from its first on; None: what the network takes.
      stride: one frame in so many is used.
      reference_stride: the same of the reference; None: as `stride`.
      reference_start: "first", or "random" for a window somewhere in each clip.
      resize: one of `resize.NAMES`; None: the network's usual one.
      eps: of I3D's batch norms; None: what the weights say.
      num_clips: of each set; None: all that there are.
      score: the published one: "frechet" (covariances divided by n - 1), "frechet_n"
        (by n), or "jedi".
      same_size: whether all clips of both sets must be of one size, because the code
        brings them to the data set's size first.
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
    # Vchitect/Latte: the same, but real clips at the frame interval of training (issues
    # 65, 94), which is 6 for Taichi-HD (issue 115).
    "latte": dataclasses.replace(_STYLEGAN_V, reference_stride=3),
    "latte-taichi": dataclasses.replace(_STYLEGAN_V, reference_stride=6),
    # VideoGPT's port of the network, its short side resized, and its middle cut out.
    "videogpt": _VIDEOGPT,
    "tats": dataclasses.replace(_VIDEOGPT, num_clips=2048),
    # songweige/content-debiased-fvd with either network; frames are squeezed.
    "cd-fvd": Settings(
        "videomae", 16, 1, 1, "half_pixel", None, 2048, score="frechet_n"
    ),
    "cd-fvd-i3d": Settings(
        "i3d", 16, 1, 1, "half_pixel", 1e-5, 2048, score="frechet_n"
    ),
    # arXiv 2410.05203: 100 times the biased kernel distance of degree 2.
    "jedi": Settings("vjepa", 16, 1, 1, "half_pixel", score="jedi"),
}


def settle(name: str | None, given: Mapping[str, Any]) -> Settings:
    """Returns the settings of a preset, or those that are given.

    Args:
      name: of the preset; None: no published protocol.
      given: fields of `Settings` that a person asks for; None: not asked for.

    Raises:
      NotTheProtocol: a field is given that the preset has otherwise.
      ValueError: no such preset, or no such features.
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
                f"protocol {name} has {field} {getattr(preset, field)}, and {value} is "
                "given: leave one of the two out"
            )
    return preset


def open_network(settings: Settings, name: str | None, folder, batch_size: int | None):
    """Opens the feature network as the settings want it.

    Args:
      settings: which, and how clips are brought to it.
      name: of the preset, for what is said.
      folder: of the weights.
      batch_size: clips that are computed at a time; None: the network's own choice.

    Raises:
      NotTheProtocol: the weights' epsilon or number of frames is not the preset's.
      ValueError: see `features.open`.
    """
    options = {} if batch_size is None else {"batch_size": batch_size}
    if settings.features == "toy":
        if folder is not None or settings.resize is not None:
            raise ValueError(
                "the toy state network has weights and resizing of its own"
            )
    else:
        options["resize"] = settings.resize
    if settings.features == "i3d":
        options["num_frames"] = settings.num_frames
    network = networks.open(settings.features, folder, **options)
    eps = getattr(network, "eps", None)
    if settings.eps is not None and eps != settings.eps:
        raise NotTheProtocol(
            f"protocol {name} has I3D's epsilon {settings.eps:g}, and {folder} has "
            f"{eps:g}: these are another file's weights"
        )
    if settings.features != "clip" and (
        settings.num_frames not in (None, network.num_frames)
    ):
        whose = f"protocol {name}" if name else "--num_frames"
        raise NotTheProtocol(
            f"{whose} has {settings.num_frames} frames, and the network of "
            f"{settings.features} takes {network.num_frames}"
        )
    return network
