"""The step cache: which evaluations of a denoiser reuse the last computed residual.

The blocks of a denoiser add a residual to their input. Along a solution its size changes
slowly, by ratios that depend on the model, the levels and the guidance, and hardly on the
prompt (MagCache, Ma et al. 2025, arXiv:2506.09045). So ratios that were measured once
decide beforehand at which evaluations the last residual, times the ratios since, replaces
a new one. Such a schedule is part of a sampler's plan.

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
    """Returns which evaluations reuse the last residual, bool [e], and its factor, [e, r].

    At the i-th reuse in a row the error is about |1 - ratio_1 ... ratio_i|. The residual
    is reused until these errors add up to the threshold in one of the branches, which
    are evaluated together (arXiv:2506.09045, section 3.3).

    Args:
      ratio_er: norm of each residual over that of the previous one; the first is unused.
      threshold: the most that the sum of errors may reach; 0 reuses none.
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


def plan_rows(
    sampler: str, steps: samplers.Plan, reuse_e: np.ndarray, gain_er: np.ndarray
) -> samplers.Plan:
    """Returns a schedule as rows of the plan whose evaluations it is for."""
    mask_nk = samplers.evaluation_mask(sampler, steps)
    reuse_nk = np.zeros(mask_nk.shape, np.float32)
    gain_nkr = np.ones((*mask_nk.shape, gain_er.shape[1]), np.float32)
    reuse_nk[mask_nk], gain_nkr[mask_nk] = reuse_e, gain_er
    return {"reuse": reuse_nk, "gain": gain_nkr}


def restart(sampler: str, steps: samplers.Plan) -> samplers.Plan:
    """Returns the rest of a plan for a changed x: its first evaluation is computed.

    Evaluations after it reuse that residual, times the ratios since then.
    """
    mask_nk = samplers.evaluation_mask(sampler, steps)
    reuse_e, gain_er = steps["reuse"][mask_nk], steps["gain"][mask_nk]
    if not np.any(reuse_e[:1]):
        return steps
    in_a_row = int(np.argmin(np.append(reuse_e, 0)))
    gain_er[:in_a_row] /= gain_er[0].copy()
    reuse_e[0] = 0
    return steps | plan_rows(sampler, steps, reuse_e, gain_er)


def measurement_rows(
    sampler: str, steps: samplers.Plan, branches: int
) -> samplers.Plan:
    """Returns rows of a plan that computes and numbers all of its evaluations."""
    mask_nk = samplers.evaluation_mask(sampler, steps)
    count = int(mask_nk.sum())
    rows = plan_rows(sampler, steps, np.zeros(count), np.ones((count, branches)))
    slot_nk = np.zeros(mask_nk.shape, np.float32)
    slot_nk[mask_nk] = np.arange(count)
    return rows | {"slot": slot_nk}


def change(before_btd: jax.Array, now_btd: jax.Array) -> jax.Array:
    """Measures how a residual has changed: float32 [b, 3].

    Mean and standard deviation over the tokens of the ratio of norms |now| / |before|,
    and the mean cosine distance.
    """
    before_btd, now_btd = (x.astype(jnp.float32) for x in (before_btd, now_btd))
    before_bt, now_bt = (
        jnp.sqrt(jnp.sum(jnp.square(x), axis=-1)) + 1e-12 for x in (before_btd, now_btd)
    )
    ratio_bt = now_bt / before_bt
    cosine_bt = jnp.sum(before_btd * now_btd, axis=-1) / (before_bt * now_bt)
    figures = ratio_bt.mean(axis=1), ratio_bt.std(axis=1), 1 - cosine_bt.mean(axis=1)
    return jnp.stack(figures, axis=-1)
