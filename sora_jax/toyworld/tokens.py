"""What each token of a clip's latents shows: a shape of a colour, and how it moves.

Letters: T video frames, t latent frames, h, w rows and columns of tokens, K objects,
p sample points of a token.
"""

import dataclasses

import numpy as np

from sora_jax.toyworld.scene import PALETTE, SHAPES, Scene

# The class of tokens without an object; shape k of SHAPES, and colour k of COLOURS, have
# class k + 1.
NOTHING = 0
COLOURS = tuple(PALETTE)
SHAPE_CLASSES, COLOUR_CLASSES = 1 + len(SHAPES), 1 + len(COLOURS)
_POINTS = 4  # along each side of a token
_LEAST = 0.15  # share of a token that an object covers, to be what the token shows


@dataclasses.dataclass(frozen=True)
class Shown:
    """What tokens show.

    shape_thw, colour_thw: int8, `NOTHING` or the class of the shape and of its colour.
    motion_thw2: float32, how what is shown moves on the screen, (x, y) in pixels per
    frame; nan at a cut.
    """

    shape_thw: np.ndarray
    colour_thw: np.ndarray
    motion_thw2: np.ndarray


def shown(scene: Scene, grid: tuple[int, int, int], temporal_stride: int) -> Shown:
    """Returns what the tokens of a clip show.

    An object counts as the disc of its radius; where several cover a token, the one that
    covers most of it is shown.

    Args:
      scene: of the clip.
      grid: tokens along time, height and width.
      temporal_stride: video frames per latent frame, except for the first, which has one.
        A token has one latent frame.

    Raises:
      ValueError: the clip has another number of latent frames.
    """
    frames, (t, h, w) = scene.num_frames, grid
    if frames != 1 + (t - 1) * temporal_stride:
        raise ValueError(
            f"a clip of {frames} frames has no {t} latent frames of {temporal_stride}"
        )
    of_latent_T = -(-np.arange(frames) // temporal_stride)  # 0 | 1 1 1 1 | 2 2 2 2
    # Points of all tokens, [h w p], on the screen.
    offsets = (np.arange(_POINTS) + 0.5) / _POINTS
    y_hp = (np.arange(h)[:, None] + offsets) * scene.size / h
    x_wp = (np.arange(w)[:, None] + offsets) * scene.size / w

    at_TK2 = _on_screen(scene, scene.pos)
    radius_TK = np.exp(scene.camera[:, 2:3]) * [o.radius for o in scene.objects]
    if scene.scale is not None:
        radius_TK = radius_TK * scene.scale
    dy_TKhp = y_hp - at_TK2[:, :, 1, None, None]
    dx_TKwp = x_wp - at_TK2[:, :, 0, None, None]
    far = (
        np.square(dy_TKhp)[:, :, :, None, :, None]
        + np.square(dx_TKwp)[:, :, None, :, None, :]
    )
    inside = far < np.square(radius_TK)[:, :, None, None, None, None]
    covered_TKhw = inside.mean((4, 5))
    covered_tKhw = np.stack([covered_TKhw[of_latent_T == i].mean(0) for i in range(t)])

    most_thw = covered_tKhw.argmax(1)
    seen_thw = covered_tKhw.max(1) >= _LEAST
    shapes_K = np.array([1 + SHAPES.index(o.shape) for o in scene.objects])
    colours_K = np.array([1 + COLOURS.index(o.colour) for o in scene.objects])
    shape_thw, colour_thw = (
        np.where(seen_thw, classes_K[most_thw], NOTHING).astype(np.int8)
        for classes_K in (shapes_K, colours_K)
    )

    is_cut_S = np.diff(scene.camera[:, 3]) != 0
    motion_tK2 = _by_latent(at_TK2, of_latent_T, is_cut_S)
    centre_2hw = np.stack(np.meshgrid(x_wp.mean(1), y_hp.mean(1)))
    motion_thw2 = np.zeros((*grid, 2))
    for i in range(t):
        # The background under a token's centre in the latent frame's first frame.
        first = int(np.argmax(of_latent_T == i))
        zoom = np.exp(scene.camera[first, 2])
        world_2hw = (centre_2hw - scene.size / 2) / zoom
        world_2hw = world_2hw + scene.camera[first, :2, None, None]
        points_TN2 = np.broadcast_to(world_2hw.reshape(2, -1).T, (frames, h * w, 2))
        back_tN2 = _by_latent(_on_screen(scene, points_TN2), of_latent_T, is_cut_S)
        of_object_hw2 = motion_tK2[i][most_thw[i]]
        motion_thw2[i] = np.where(
            seen_thw[i][..., None], of_object_hw2, back_tN2[i].reshape(h, w, 2)
        )
    return Shown(shape_thw, colour_thw, motion_thw2.astype(np.float32))


def _on_screen(scene: Scene, world_TN2: np.ndarray) -> np.ndarray:
    """Where points of the world are on the screen, in pixels."""
    zoom_T11 = np.exp(scene.camera[:, 2])[:, None, None]
    return (world_TN2 - scene.camera[:, None, :2]) * zoom_T11 + scene.size / 2


def _by_latent(
    at_TN2: np.ndarray, of_latent_T: np.ndarray, is_cut_S: np.ndarray
) -> np.ndarray:
    """The mean motion of points during each latent frame, in pixels per frame.

    The first latent frame has one video frame, and gets the motion to the next. Of a
    latent frame with a cut it is nan.
    """
    if len(at_TN2) == 1:
        return np.zeros_like(at_TN2)
    step_SN2 = np.diff(at_TN2, axis=0)  # step s leads to frame s + 1
    step_SN2[is_cut_S] = np.nan
    later = [
        step_SN2[of_latent_T[1:] == i].mean(0) for i in range(1, of_latent_T[-1] + 1)
    ]
    return np.stack([step_SN2[0], *later])
