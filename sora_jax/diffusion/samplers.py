"""Solvers of dx / dtau = velocity(x, tau) from noise (tau 1) to data (tau 0).

    video = samplers.sample(velocity, noise, timesteps.schedule(20, shift), sampler="unipc")

or in chunks, each one compiled scan, so that progress, previews and cancelling work
between them: `plan` computes on the host what each step needs, `init_memory` makes the
state that a solver keeps, and `sample_chunk` runs some steps. Nothing here knows of tasks
or text. A plan may have rows for a step cache (`step_cache.py`), which are passed to the
velocity function together with the cache.
"""

import enum
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Velocity = Callable[[jax.Array, jax.Array], jax.Array]
# (x, level, cache, that evaluation's rows) -> (velocity, cache)
CachedVelocity = Callable[
    [jax.Array, jax.Array, Any, dict[str, jax.Array]], tuple[jax.Array, Any]
]
Plan = dict[str, np.ndarray]


class Sampler(enum.StrEnum):
    """The solver: Euler is of first order, Heun of second order at twice the cost.

    UniPC is a multistep solver of second order at the cost of Euler.
    """

    EULER = "euler"
    HEUN = "heun"
    UNIPC = "unipc"


OF_CACHE = ("reuse", "gain", "slot")  # rows with one value for each evaluation
_HISTORY = 2  # the order of UniPC: the number of estimates of the data that it combines


def plan(sampler: str, taus: np.ndarray, levels: np.ndarray | None = None) -> Plan:
    """Computes what every step needs: arrays with one row per step.

    Args:
      sampler: the solver.
      taus: n + 1 levels that do not rise; a step between two equal ones does nothing.
        Or of each of k schedules, [n + 1, k], where entries of x follow different ones.
      levels: the n levels that the network gets, where they differ from taus.
    """
    taus = np.asarray(taus, np.float32)
    steps = {"tau": taus[:-1], "next": taus[1:]}
    steps["level"] = taus[:-1] if levels is None else np.asarray(levels, np.float32)
    if steps["level"].shape != steps["tau"].shape:
        raise ValueError(
            f"{len(taus) - 1} steps need as many levels, not {steps['level'].shape}"
        )
    if Sampler(sampler) is Sampler.HEUN:
        steps["second"] = np.float32(taus[1:] > 0)
    if Sampler(sampler) is Sampler.UNIPC:
        steps |= _unipc_weights(taus)
    return steps


def split(steps: Plan, first: int) -> tuple[Plan, Plan]:
    """Splits a plan in two where another network takes over after `first` steps.

    A Heun step that ends at a level of the other network becomes an Euler step, as the
    last one is: its second evaluation would be at a level that the network was not
    trained on. A single step of first order leaves the order of the solution at two.
    """
    before = {name: rows[:first] for name, rows in steps.items()}
    after = {name: rows[first:] for name, rows in steps.items()}
    if "second" in steps and first:
        before["second"] = before["second"].copy()
        before["second"][-1] = 0
    return before, after


def evaluations(sampler: str, num_steps: int, networks: int = 1) -> int:
    """Returns the number of network evaluations for one clip, without guidance.

    The plan ends at tau 0, and each network (see `split`) has at least one step.
    """
    if Sampler(sampler) is Sampler.HEUN:
        return 2 * num_steps - networks
    return num_steps


def evaluation_mask(sampler: str, steps: Plan) -> np.ndarray:
    """Returns which evaluations a plan needs: bool [steps, evaluations of a step]."""
    kinds = [steps["tau"] > steps["next"]]
    if Sampler(sampler) is Sampler.HEUN:
        kinds.append(kinds[0] & (steps["second"] > 0))
    # One is needed where any of the schedules needs it.
    return np.stack([k if k.ndim == 1 else k.any(1) for k in kinds], axis=1)


def chunks(steps: Plan, size: int) -> Iterator[Plan]:
    """Splits a plan into parts of `size` steps, the last one padded with idle steps."""
    for first in range(0, len(steps["tau"]), size):
        yield chunk(steps, first, size)


def chunk(steps: Plan, first: int, size: int) -> Plan:
    """Returns `size` steps of a plan from `first` on, padded with idle steps."""
    part = {name: rows[first : first + size] for name, rows in steps.items()}
    missing = size - len(part["tau"])
    if not missing:
        return part
    return {
        name: np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), "f4")])
        for name, rows in part.items()
    }


def restart(sampler: str, steps: Plan) -> Plan:
    """Returns the rest of a plan for an x that a callback has changed.

    It needs a new memory (`init_memory`). UniPC's corrector computes x from earlier
    estimates of the data, which are of the old x, and so would undo the change (that of
    diffusers does). So it restarts from the new x, with a step of first order.
    """
    if Sampler(sampler) is not Sampler.UNIPC or not len(steps["tau"]):
        return steps
    return steps | _unipc_weights(np.append(steps["tau"], steps["next"][-1:], axis=0))


def init_memory(x: jax.Array, sampler: str) -> Any:
    """Returns a solver's memory of earlier steps before its first, for a state like x."""
    if Sampler(sampler) is not Sampler.UNIPC:
        return ()
    zeros = jnp.zeros_like(x, jnp.float32)
    return zeros, (zeros,) * _HISTORY


def _euler(evaluate, x, memory, cache, step, pick):
    """One step of Euler's method."""
    slope, cache = evaluate(x, step["level"], cache, 0)
    return x + pick(step["next"] - step["tau"]) * slope, memory, cache


def _heun(evaluate, x, memory, cache, step, pick):
    """One step of Heun's method; Euler's where the plan has no second evaluation.

    That is at tau 0, where the model would see clean data, on which it was hardly trained
    (Karras et al. 2022, arXiv:2206.00364, algorithm 1), and where another network takes
    over (`split`).
    """
    length = pick(step["next"] - step["tau"])
    slope, cache = evaluate(x, step["level"], cache, 0)
    guess = x + length * slope

    def corrected(guess, cache):
        second, cache = evaluate(guess, step["next"], cache, 1)
        better = x + length * ((slope + second) / 2)
        return jnp.where(pick(step["second"]) > 0, better, guess), cache

    x, cache = jax.lax.cond(
        jnp.any(step["second"] > 0), corrected, lambda *same: same, guess, cache
    )
    return x, memory, cache


def _unipc(evaluate, x, memory, cache, step, pick):
    """One step of UniPC (Zhao et al. 2023, arXiv:2302.04867), B(h) = e^h - 1, order 2.

    The estimate of the data at this level first corrects x, which the previous step
    predicted without it, and then predicts x at the next level. Both are weighted sums
    whose weights depend only on the levels: `_unipc_weights`.
    """
    last, history = memory
    slope, cache = evaluate(x, step["level"], cache, 0)
    data = x - pick(step["tau"]) * slope

    def weighted(weights, terms):
        return sum(pick(weights[i]) * term for i, term in enumerate(terms))

    x = weighted(step["correct"], (x, last, data, *history))
    history = (data, *history[:-1])
    return weighted(step["predict"], (x, *history)), (x, history), cache


def _unipc_weights(taus: np.ndarray) -> Plan:
    """Returns the weights of x, last x, new and older data; and those of x and data.

    With alpha = 1 - tau and lambda = log(alpha / tau), from level 0 to level t with
    h = lambda_t - lambda_0 (arXiv:2302.04867, equations 5 and 8, for data prediction):

        x_t = tau_t / tau_0 x_0 - alpha_t (e^-h - 1) (m_0 + sum_k c_k (m_k - m_0) / r_k)

    where m_k are estimates of the data at levels k and r_k = (lambda_k - lambda_0) / h.
    The last step is of first order, and ends in m_0 itself. Steps between equal levels,
    before or after the others, keep x.

    Args:
      taus: n + 1 levels; or of each of k schedules, [n + 1, k].

    Returns:
      `correct` and `predict`, [n, weights] or [n, weights, k].
    """
    if taus.ndim == 2:
        each = [_unipc_weights(one) for one in taus.T]
        return {name: np.stack([w[name] for w in each], -1) for name in each[0]}
    # At level 1 lambda is not finite.
    taus = np.minimum(taus, np.float32(1 - 1e-6)).astype(np.float64)
    moving = np.flatnonzero(taus[:-1] > taus[1:])
    with np.errstate(divide="ignore"):
        log_snr = np.log1p(-taus) - np.log(taus)
    correct = np.zeros((len(taus) - 1, 3 + _HISTORY))
    predict = np.zeros((len(taus) - 1, 1 + _HISTORY))
    correct[:, 0] = predict[:, 0] = 1.0
    order = 1
    for done, i in enumerate(moving):
        if done:  # from level i - 1 to i, with the estimate at i itself
            behind = log_snr[i] - log_snr[i - 1]
            ratios = [(log_snr[i - 2] - log_snr[i - 1]) / behind] * (order - 1)
            kept, gain = _drift(taus[i - 1], taus[i], behind)
            shares = _corrector(behind, ratios)
            data = -gain * np.array([*shares[:-1] / np.array(ratios), shares[-1]])
            correct[i, :3] = 0.0, kept, data[-1]
            correct[i, 3] = -gain - data.sum()
            correct[i, 4 : 3 + order] = data[:-1]
        order = min(_HISTORY, done + 1, len(moving) - done)
        ahead = log_snr[i + 1] - log_snr[i]
        kept, gain = _drift(taus[i], taus[i + 1], ahead)
        predict[i, :2] = kept, -gain
        if order == 2:
            ratio = (log_snr[i - 1] - log_snr[i]) / ahead
            predict[i, 2] = -gain * 0.5 / ratio
            predict[i, 1] -= predict[i, 2]
    return {"correct": np.float32(correct), "predict": np.float32(predict)}


def _drift(tau: float, tau_next: float, h: float) -> tuple[float, float]:
    """Returns the factor of x over a step, and alpha (e^-h - 1)."""
    return tau_next / tau, (1 - tau_next) * np.expm1(-h)


def _corrector(h: float, ratios: list[float]) -> np.ndarray:
    """Returns weights of the differences of estimates that cancel powers of h."""
    order = len(ratios) + 1
    if order == 1:
        return np.array([0.5])
    nodes = np.array([*ratios, 1.0])
    phi, factorial, targets = np.expm1(-h) / -h - 1, 1.0, []
    for power in range(1, order + 1):
        targets.append(phi * factorial / np.expm1(-h))
        factorial *= power + 1
        phi = phi / -h - 1 / factorial
    return np.linalg.solve(np.vander(nodes, order, increasing=True).T, targets)


_STEPS = {Sampler.EULER: _euler, Sampler.HEUN: _heun, Sampler.UNIPC: _unipc}


def sample_chunk(
    velocity_fn: Velocity | CachedVelocity,
    x: jax.Array,
    memory: Any,
    steps: Plan,
    sampler: str = Sampler.EULER,
    cache: Any = None,
    schedule_index: jax.Array | None = None,
) -> tuple[jax.Array, Any, Any]:
    """Runs the steps of a plan or of a part of it.

    Args:
      velocity_fn: (x, level) -> dx / dtau, the shape of x. The level is a scalar, or one
        for each schedule of the plan, [k]. With a cache it takes and returns that as well.
      x: the state at the first step's level.
      memory: from `init_memory`, or from the previous chunk.
      steps: (a part of) a plan. A step between equal levels costs nothing.
      sampler: that of the plan.
      cache: the step cache of velocity_fn, where the plan has rows for it.
      schedule_index: which schedule of a plan with several each entry follows, int; its
        shape is a prefix of x's.

    Returns:
      x at the last level, the memory and the cache.
    """
    take_step = _STEPS[Sampler(sampler)]
    pick = _picker(schedule_index, x)

    def body(carry, step):
        def evaluate(x, level, cache, number):
            if cache is None:
                return velocity_fn(x, level), None
            rows = {name: step[name][number] for name in OF_CACHE if name in step}
            return velocity_fn(x, level, cache, rows)

        moved = jax.lax.cond(
            jnp.any(step["tau"] > step["next"]),
            lambda carry: take_step(evaluate, *carry, step, pick),
            lambda carry: carry,
            carry,
        )
        return moved, None

    steps = {name: jnp.asarray(rows, jnp.float32) for name, rows in steps.items()}
    carry, _ = jax.lax.scan(body, (x, memory, cache), steps)
    return carry


def _picker(schedule_index: jax.Array | None, x: jax.Array):
    """A function from numbers of the schedules [k] to those of the entries of x."""
    if schedule_index is None:
        return lambda number: number
    ones = (1,) * (x.ndim - schedule_index.ndim)

    def pick(number_k):
        # A sum with one-hot rows, which shards where a gather does not. It is exact.
        is_k = jax.nn.one_hot(schedule_index, len(number_k))
        found = jnp.sum(jnp.where(is_k > 0, number_k, 0), axis=-1)
        return found.reshape(*schedule_index.shape, *ones)

    return pick


def sample(
    velocity_fn: Velocity,
    noise: jax.Array,
    taus: np.ndarray,
    sampler: str = Sampler.EULER,
    schedule_index: jax.Array | None = None,
) -> jax.Array:
    """Solves from taus[0] to taus[-1] in one scan; see `plan` and `sample_chunk`."""
    steps = plan(sampler, taus)
    memory = init_memory(noise, sampler)
    return sample_chunk(
        velocity_fn, noise, memory, steps, sampler, schedule_index=schedule_index
    )[0]
