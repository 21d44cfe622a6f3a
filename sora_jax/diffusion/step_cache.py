"""Which evaluations of a denoiser are computed, and which reuse what was computed last.

The blocks of a denoiser add a residual to their input. Along a solution it grows or
shrinks slowly, by ratios that depend on the model, the levels and the guidance, and
hardly on the prompt (MagCache, Ma et al. 2025, arXiv:2506.09045). So ratios that were
measured once say beforehand at which evaluations the last residual, times the ratios
since, stands for a new one. Such a schedule is a part of a sampler's plan.

Letters: e evaluations in order, r branches of guidance (with the text, without), n
steps, k evaluations a step, b rows, t tokens, d width.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.diffusion import samplers

MAX_SKIPS, RETENTION = 2, 0.2


def schedule(
    ratio_er: np.ndarray,
    threshold: float,
    max_skips: int = MAX_SKIPS,
    retention: float = RETENTION,
) -> tuple[np.ndarray, np.ndarray]:
    """Which evaluations reuse the last residual, bool [e], and times what, [e, r].

    Reused i times in a row it is off by about |1 - ratio_1 ... ratio_i| each time. It is
    reused until these errors add up to the threshold in one of the branches, which are
    evaluated together (arXiv:2506.09045, section 3.3).

    Args:
      ratio_er: size of each residual over that of the one before; the first is not read.
      threshold: of the errors' sum; 0 reuses none.
      max_skips: evaluations in a row that may reuse.
      retention: the share of evaluations, from the first, that are always computed.
    """
    ratio_er = np.asarray(ratio_er, np.float64)
    reuse_e, gain_er = np.zeros(len(ratio_er), bool), np.ones_like(ratio_er)
    since, error, in_a_row = 1.0, 0.0, 0
    for e in range(max(1, math.ceil(retention * len(ratio_er))), len(ratio_er)):
        since = since * ratio_er[e]
        error = error + np.abs(1 - since)
        if np.max(error) < threshold and in_a_row < max_skips:
            reuse_e[e], gain_er[e] = True, since
            in_a_row += 1
        else:
            since, error, in_a_row = 1.0, 0.0, 0
    return reuse_e, np.float32(gain_er)


def rows(
    sampler: str, steps: samplers.Plan, reuse_e: np.ndarray, gain_er: np.ndarray
) -> samplers.Plan:
    """A schedule as rows of a plan; its evaluations are those that the plan asks for."""
    asked_nk = samplers.asked(sampler, steps)
    reuse_nk = np.zeros(asked_nk.shape, np.float32)
    gain_nkr = np.ones((*asked_nk.shape, gain_er.shape[1]), np.float32)
    reuse_nk[asked_nk], gain_nkr[asked_nk] = reuse_e, gain_er
    return {"reuse": reuse_nk, "gain": gain_nkr}


def anew(sampler: str, steps: samplers.Plan) -> samplers.Plan:
    """The rest of a plan whose first evaluation is computed, as x was changed before it.

    Those after it that reuse take its residual, times the ratios since then.
    """
    asked_nk = samplers.asked(sampler, steps)
    reuse_e, gain_er = steps["reuse"][asked_nk], steps["gain"][asked_nk]
    if not np.any(reuse_e[:1]):
        return steps
    in_a_row = int(np.argmin(np.append(reuse_e, 0)))
    gain_er[:in_a_row] /= gain_er[0].copy()
    reuse_e[0] = 0
    return steps | rows(sampler, steps, reuse_e, gain_er)


def measuring(sampler: str, steps: samplers.Plan, branches: int) -> samplers.Plan:
    """Rows of a plan that computes everything and numbers its evaluations."""
    asked_nk = samplers.asked(sampler, steps)
    count = int(asked_nk.sum())
    found = rows(sampler, steps, np.zeros(count), np.ones((count, branches)))
    slot_nk = np.zeros(asked_nk.shape, np.float32)
    slot_nk[asked_nk] = np.arange(count)
    return found | {"slot": slot_nk}


def change(before_btd: jax.Array, now_btd: jax.Array) -> jax.Array:
    """How a residual has changed: float32 [b, 3].

    Of each token's vector, the ratio of norms |now| / |before|: its mean over the tokens
    and its standard deviation; and the mean cosine distance.
    """
    before_btd, now_btd = (x.astype(jnp.float32) for x in (before_btd, now_btd))
    before_bt, now_bt = (
        jnp.sqrt(jnp.sum(jnp.square(x), axis=-1)) + 1e-12 for x in (before_btd, now_btd)
    )
    ratio_bt = now_bt / before_bt
    cosine_bt = jnp.sum(before_btd * now_btd, axis=-1) / (before_bt * now_bt)
    found = ratio_bt.mean(axis=1), ratio_bt.std(axis=1), 1 - cosine_bt.mean(axis=1)
    return jnp.stack(found, axis=-1)
