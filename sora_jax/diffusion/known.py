"""Known tokens: which tokens of a latent grid the model is given, not asked to generate.

A pattern names the known latent frames. Known tokens enter the denoiser at a small noise
level of their own (`Config.known_tau`), and marked as known. Training draws a pattern for
each row; a task chooses one by name.

Letters: n rows, t latent frames, h and w latent height and width.
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.core import config as configs


class Pattern(enum.StrEnum):
    """Which latent frames are known."""

    NONE = "none"  # text to video
    FIRST_FRAME = "first_frame"  # image to video
    HEAD = "head"  # the first k: extension forwards
    TAIL = "tail"  # the last k: extension backwards
    BOTH = "both"  # some at each end: in-betweening, joins
    RANDOM = "random"  # any: infilling


# The fewest latent frames with which a pattern leaves at least one to generate.
_LEAST_FRAMES = {
    Pattern.NONE: 1,
    Pattern.FIRST_FRAME: 2,
    Pattern.HEAD: 2,
    Pattern.TAIL: 2,
    Pattern.BOTH: 3,
    Pattern.RANDOM: 2,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """How often each pattern is trained, and how clean known tokens are.

    known_tau is the noise level of known tokens in training and in sampling: slightly
    above 0, so that the model uses them without copying all of their flaws.
    """

    probabilities: Mapping[str, configs.Share] = dataclasses.field(
        default_factory=lambda: {"none": 1.0}
    )
    known_tau: Annotated[float, configs.Range("[0, 1)")] = 0.02

    def __post_init__(self):
        object.__setattr__(self, "probabilities", dict(self.probabilities))
        _checked(self.probabilities)
        if not 0 <= self.known_tau < 1:
            raise ValueError(f"known_tau must be in [0, 1), not {self.known_tau}")

    @property
    def takes_images(self) -> bool:
        """Whether some rows are trained with only the first latent frame known."""
        patterns = (Pattern.FIRST_FRAME, Pattern.HEAD)
        return any(self.probabilities.get(pattern, 0) > 0 for pattern in patterns)


def _checked(probabilities: Mapping[str, float]) -> dict[Pattern, float]:
    names = [p.value for p in Pattern]
    for name, probability in probabilities.items():
        if name not in names:
            raise ValueError(
                f"known-token pattern {name!r} is unknown; choose from {', '.join(names)}"
            )
        if probability < 0:
            raise ValueError(f"the probability of {name!r} is negative: {probability}")
    if abs(sum(probabilities.values()) - 1) > 1e-6:
        raise ValueError(
            "the probabilities of known-token patterns must sum to 1, not "
            f"{sum(probabilities.values()):g}: {dict(probabilities)}"
        )
    return {Pattern(name): p for name, p in probabilities.items() if p > 0}


def _check_room(pattern: Pattern, num_latent_frames: int) -> None:
    least = _LEAST_FRAMES[pattern]
    if num_latent_frames < least:
        raise ValueError(
            f"pattern {pattern.value!r} needs at least {least} latent frames, not "
            f"{num_latent_frames}: fewer leave nothing to generate"
        )


def mask(
    pattern: str, grid: tuple[int, int, int], head: int = 1, tail: int = 1
) -> np.ndarray:
    """Returns the known mask of a pattern, bool [t, h, w].

    Args:
      pattern: any but "random", which only `sample_known` can draw.
      grid: latent frames, height, width.
      head: known latent frames at the start, for "head" and "both".
      tail: known latent frames at the end, for "tail" and "both".
    """
    pattern = Pattern(pattern)
    if pattern is Pattern.RANDOM:
        raise ValueError('pattern "random" is drawn: use sample_known')
    num_frames = grid[0]
    _check_room(pattern, num_frames)
    heads = {Pattern.FIRST_FRAME: 1, Pattern.HEAD: head, Pattern.BOTH: head}
    tails = {Pattern.TAIL: tail, Pattern.BOTH: tail}
    first, last = heads.get(pattern, 0), tails.get(pattern, 0)
    if min(head, tail) < 1 or first + last >= num_frames and pattern != Pattern.NONE:
        raise ValueError(
            f"pattern {pattern.value!r} with head {head} and tail {tail} must leave at "
            f"least one of the {num_frames} latent frames unknown, and one known"
        )
    frame = np.arange(num_frames)
    known_t = (frame < first) | (frame >= num_frames - last)
    return np.broadcast_to(known_t[:, None, None], grid).copy()


def sample_known(
    key: jax.Array,
    n: int,
    grid: tuple[int, int, int],
    probabilities: Mapping[str, float],
) -> jax.Array:
    """Draws the known mask of n training rows, bool [n, t, h, w].

    Each row draws a pattern, then the number of known latent frames, uniformly from the
    counts that leave at least one frame unknown.

    Raises:
      ValueError: an unknown pattern, probabilities that do not sum to 1, or a grid
        with too few latent frames for a pattern that may be drawn.
    """
    for pattern in _checked(probabilities):
        _check_room(pattern, grid[0])
    frames_n = jnp.full((n,), grid[0])
    known_nt = sample_known_frames(key, frames_n, grid[0], probabilities)
    return jnp.broadcast_to(known_nt[:, :, None, None], (n, *grid))


def sample_known_frames(
    key: jax.Array, frames_n: jax.Array, most: int, probabilities: Mapping[str, float]
) -> jax.Array:
    """Draws which latent frames of clips of different lengths are known: bool [n, t].

    A clip that is too short for its pattern has no known frame.

    Args:
      key: random key.
      frames_n: latent frames of each clip; frames after its end are not known.
      most: t, the most latent frames of a clip.
      probabilities: of the patterns.
    """
    mix, n = _checked(probabilities), len(frames_n)
    pattern_key, count_key, share_key, order_key = jax.random.split(key, 4)
    names = list(mix)
    drawn = jax.random.choice(
        pattern_key, len(names), (n,), p=jnp.asarray(list(mix.values()), jnp.float32)
    )
    # counts in 1..t-1; "both" splits 2..t-1 between the two ends
    count = jax.random.randint(count_key, (n,), 1, jnp.maximum(frames_n, 2))
    pair_key = jax.random.fold_in(count_key, 1)
    pair = jax.random.randint(pair_key, (n,), 2, jnp.maximum(frames_n, 3))
    front = 1 + jnp.floor(jax.random.uniform(share_key, (n,)) * (pair - 1))

    frame_1t, frames_n1 = jnp.arange(most)[None], frames_n[:, None]
    inside_nt = frame_1t < frames_n1
    order_nt = jnp.where(inside_nt, jax.random.uniform(order_key, (n, most)), 2.0)
    rank_nt = jnp.argsort(order_nt, axis=1)
    count_n1, pair_n1, front_n1 = count[:, None], pair[:, None], front[:, None]
    masks_nt = {
        Pattern.NONE: jnp.zeros((1, most), bool),
        Pattern.FIRST_FRAME: frame_1t == 0,
        Pattern.HEAD: frame_1t < count_n1,
        Pattern.TAIL: frame_1t >= frames_n1 - count_n1,
        Pattern.BOTH: (frame_1t < front_n1)
        | (frame_1t >= frames_n1 - pair_n1 + front_n1),
        Pattern.RANDOM: rank_nt < count_n1,
    }
    known_nt = jnp.zeros((n, most), bool)
    for index, pattern in enumerate(names):
        chosen_n1 = (drawn == index)[:, None] & (frames_n1 >= _LEAST_FRAMES[pattern])
        known_nt = jnp.where(chosen_n1, masks_nt[pattern], known_nt)
    return known_nt & inside_nt


def levels(
    tau_n: jax.Array, known_nthw: jax.Array, known_tau: float
) -> tuple[jax.Array, jax.Array]:
    """Returns the noise levels of rows with known tokens, for the denoiser.

    Returns:
      levels_n2: float32 [n, 2], the row's level and the level of its known tokens.
      level_index_nthw: int32, which of the two each token has.
    """
    tau_n = tau_n.astype(jnp.float32)
    levels_n2 = jnp.stack([tau_n, jnp.full_like(tau_n, known_tau)], axis=-1)
    return levels_n2, known_nthw.astype(jnp.int32)


def token_tau(tau_n: jax.Array, known_nthw: jax.Array, known_tau: float) -> jax.Array:
    """Returns the noise level of every token, float32 [n, t, h, w]; see `levels`."""
    tau = tau_n[:, None, None, None].astype(jnp.float32)
    return jnp.where(known_nthw, known_tau, tau)
