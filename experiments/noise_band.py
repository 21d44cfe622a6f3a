"""Measures at which noise levels a caption's content is decided, and proposes a shift.

    python -m experiments.noise_band --latents runs/latents [--label direction]

Above some noise level the direction of motion, for example, cannot be read from the
noised latent; the denoiser can only take it from the text. Below another level the latent
already shows it, and the text is not needed. In between, the text decides, so training and
sampling must spend enough of their levels there.

For noised latents x = (1 - tau) x0 + tau noise of held-out clips, labels are classified in
two ways, of which the better one counts at each tau:

  linear     Gaussian classes of one covariance C (linear discriminant analysis), whose
             covariance at tau is (1 - tau)^2 C + tau^2 I in closed form;
  templates  Bayes' rule with the training clips as the only possible ones:
             p(class | x) ~ sum of exp(-|x - (1 - tau) x_i|^2 / (2 tau^2)) over its clips,
             the optimum if noise is larger than the distance between neighbours.

Both are lower bounds of what can be read. The band begins where the accuracy falls below
.9, and ends where nine tenths of the way from perfect accuracy to chance are lost.

Letters: n clips, d numbers in a latent, k classes.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.core import paths, rng
from sora_jax.data import latent_cache
from sora_jax.diffusion import timesteps
from sora_jax.toyworld import captions, scene

# Odds tau / (1 - tau) in equal ratios, from tau = .2 to .9975.
TAUS = tuple(float(odds / (1 + odds)) for odds in np.geomspace(0.25, 400, 25))
READERS = ("linear", "templates")
SHIFTS = tuple(range(1, 13))
_MOST_NUMBERS = 2048  # in a latent; larger ones are projected
_LEAST_CLIPS = 20  # per class
_READINGS = 2000  # per noise level, at least
_STEPS = 25  # of the sampler in the table of shifts


@dataclasses.dataclass(frozen=True)
class Task:
    """Clips with one label.

    Attributes:
      x_nd: normalized latents.
      class_n: index of the class.
      possible_nk: the classes that the rest of the caption leaves open.
      names: of the classes.
    """

    x_nd: np.ndarray
    class_n: np.ndarray
    possible_nk: np.ndarray
    names: tuple[str, ...]

    def part(self, rows: np.ndarray) -> "Task":
        return Task(
            self.x_nd[rows], self.class_n[rows], self.possible_nk[rows], self.names
        )


@dataclasses.dataclass(frozen=True)
class Linear:
    """Gaussian classes: means in the eigenbasis of their common covariance."""

    basis_dd: np.ndarray
    spread_d: np.ndarray  # eigenvalues
    means_kd: np.ndarray


def stated(slots: scene.Slots) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Returns {label: (value, values that the rest of the text leaves open)}.

    No values means any. If two objects are named, their colours are known, and the text
    decides which one is on the left, or above.
    """
    found = {}
    subjects = slots.subjects
    if len(subjects) == 1:
        for name in ("colour", "shape", "direction"):
            if value := getattr(subjects[0], name):
                found[name] = value, ()
    elif len(subjects) == 2 and slots.relation:
        first, second = (subject.colour for subject in subjects)
        sides = {"left": "left", "right": "left", "above": "top", "below": "top"}
        if first and second and first != second and slots.relation in sides:
            ahead = slots.relation in ("left", "above")
            value = first if ahead else second
            found[sides[slots.relation]] = value, (first, second)
    for name in ("camera", "count"):
        if value := getattr(slots, name):
            found[name] = str(value), ()
    return found


def labels_of(state_json: str | None, texts: dict[str, str]) -> dict:
    """Returns the labels of a clip, from its state or its captions (except "alt")."""
    if state_json is not None:
        return stated(scene.Scene.from_json(state_json).truth)
    found = {}
    for tier, text in texts.items():
        if tier != "alt":
            found = stated(captions.parse(text)) | found
    return found


def tasks(x_nd: np.ndarray, labels_n: list[dict]) -> dict[str, Task]:
    """Returns a task for each label with at least two classes of enough clips."""
    result = {}
    for label in sorted({name for labels in labels_n for name in labels}):
        rows = [row for row, labels in enumerate(labels_n) if label in labels]
        values = [labels_n[row][label][0] for row in rows]
        names = [v for v in sorted(set(values)) if values.count(v) >= _LEAST_CLIPS]
        index = {name: k for k, name in enumerate(names)}
        kept = [
            row
            for row, value in zip(rows, values, strict=True)
            if value in index and all(v in index for v in labels_n[row][label][1])
        ]
        if len(names) < 2 or not kept:
            continue
        possible_nk = np.ones((len(kept), len(names)), bool)
        for place, row in enumerate(kept):
            if choices := labels_n[row][label][1]:
                possible_nk[place] = [name in choices for name in names]
        class_n = np.array([index[labels_n[row][label][0]] for row in kept])
        result[label] = Task(x_nd[kept], class_n, possible_nk, tuple(names))
    return result


def project(x_nd: np.ndarray) -> np.ndarray:
    """Projects large latents on their leading principal components.

    The projection is orthonormal, so that noise keeps its unit variance.
    """
    n, d = x_nd.shape
    if d <= _MOST_NUMBERS:
        return x_nd
    centred = x_nd - x_nd.mean(0)
    values, vectors = np.linalg.eigh(centred @ centred.T)
    leading = vectors[:, -min(n - 1, _MOST_NUMBERS) :]
    scale = np.sqrt(values[-leading.shape[1] :])
    return x_nd @ ((centred.T @ leading) / scale)


def fit(train: Task) -> Linear:
    """Fits class means and the covariance within classes, with slight shrinkage."""
    means_kd = np.stack(
        [train.x_nd[train.class_n == k].mean(0) for k in range(len(train.names))]
    )
    inner_nd = train.x_nd - means_kd[train.class_n]
    spread_d, basis_dd = np.linalg.eigh(inner_nd.T @ inner_nd / len(inner_nd))
    spread_d = np.maximum(spread_d, 0) + 1e-3 * spread_d.mean()
    return Linear(basis_dd, spread_d, means_kd @ basis_dd)


def linear_scores(model: Linear, noised_nd: jax.Array, tau: float) -> jax.Array:
    """log p(x | class) up to a constant, [n, k]."""
    variance_d = (1 - tau) ** 2 * model.spread_d + tau**2
    means_kd = (1 - tau) * model.means_kd
    weights_kd = means_kd / variance_d
    bias_k = 0.5 * (weights_kd * means_kd).sum(1)
    return noised_nd @ model.basis_dd @ weights_kd.T - bias_k[None]


@jax.jit
def template_scores(
    x_md: jax.Array, one_hot_mk: jax.Array, noised_nd: jax.Array, tau: jax.Array
) -> jax.Array:
    """log p(x | class) up to a constant, with m training clips as templates, [n, k]."""
    clean_md = (1 - tau) * x_md
    fit_nm = noised_nd @ clean_md.T - 0.5 * jnp.sum(clean_md**2, 1)[None]
    fit_nm = fit_nm / tau**2
    top_n1 = fit_nm.max(1, keepdims=True)
    mass_nk = jnp.exp(fit_nm - top_n1) @ (one_hot_mk / one_hot_mk.sum(0)[None])
    return jnp.log(mass_nk + 1e-30)


def accuracy(scores_nk: np.ndarray, task: Task) -> float:
    open_nk = np.where(task.possible_nk, scores_nk, -np.inf)
    return float((open_nk.argmax(1) == task.class_n).mean())


def read_out(task: Task, taus: Iterable[float]) -> dict:
    """Returns accuracies of both readers at each tau, on a held-out quarter of clips."""
    order = np.random.default_rng(0).permutation(len(task.class_n))
    held_out = max(1, len(order) // 4)
    test, train = task.part(order[:held_out]), task.part(order[held_out:])
    # Few clips are repeated with different noise, which dominates near the chance level.
    test = test.part(np.tile(np.arange(held_out), -(-_READINGS // held_out)))
    model = fit(train)
    one_hot_mk = np.eye(len(task.names), dtype=np.float32)[train.class_n]
    result = {
        "classes": list(task.names),
        "train": len(train.class_n),
        "test": held_out,
        "chance": float((1 / test.possible_nk.sum(1)).mean()),
        "tau": list(taus),
        "linear": [],
        "templates": [],
    }
    for index, tau in enumerate(result["tau"]):
        noise_nd = jax.random.normal(rng.key(0, "band", index), test.x_nd.shape)
        noised_nd = (1 - tau) * test.x_nd + tau * noise_nd
        scores = linear_scores(model, noised_nd, tau)
        result["linear"].append(accuracy(np.asarray(scores), test))
        scores = template_scores(train.x_nd, one_hot_mk, noised_nd, tau)
        result["templates"].append(accuracy(np.asarray(scores), test))
    best = np.maximum(result["linear"], result["templates"])
    result["band"] = band(result["tau"], best, result["chance"])
    return result


def band(
    taus: Iterable[float], accuracies: Iterable[float], chance: float
) -> tuple[float, float] | None:
    """Returns between which taus the accuracy falls from .9 to nearly chance.

    None if it is below .9 at the smallest tau, or above that level at the largest.
    """
    taus = np.asarray(list(taus))
    falling = np.asarray(list(accuracies))
    falling = np.maximum.accumulate(falling[::-1])[::-1]  # monotone, despite noise
    nearly_chance = chance + 0.1 * (1 - chance)
    if falling[0] < 0.9 or falling[-1] > nearly_chance:
        return None

    def crossing(level: float) -> float:
        after = int(np.argmax(falling < level))
        pair = slice(after - 1, after + 1)
        return float(np.interp(-level, -falling[pair], taus[pair]))

    low, high = crossing(0.9), crossing(nearly_chance + 1e-9)
    return (low, high) if low < high else None


def describe(label: str, result: dict) -> str:
    """Returns the table of one label as text."""
    lines = [
        f"\n{label}: {len(result['classes'])} classes ({', '.join(result['classes'])}), "
        f"{result['train']} training clips, {result['test']} test clips, "
        f"chance {result['chance']:.2f}",
        "    tau  linear  templates",
    ]
    rows = zip(result["tau"], result["linear"], result["templates"], strict=True)
    lines += [f"  {tau:.3f}  {a:6.3f}  {b:9.3f}" for tau, a, b in rows]
    if result["band"] is None:
        first, last = (max(result[r][i] for r in READERS) for i in (0, -1))
        lines.append(
            f"  no band: accuracy {first:.2f} at the smallest tau and {last:.2f} at the "
            "largest; it must be .9 (more clips help) and nearly chance"
        )
    else:
        low, high = result["band"]
        lines.append(f"  band: tau {low:.3f} to {high:.3f}")
    return "\n".join(lines)


def steps_in_band(band: tuple[float, float], shift: float) -> int:
    """Returns how many of a sampler's 25 levels lie in the band."""
    taus = timesteps.schedule(_STEPS, shift)
    return int(((taus >= band[0]) & (taus <= band[1])).sum())


def describe_shifts(bands: dict[str, tuple[float, float]]) -> str:
    """Returns the share of training samples and the steps in each band, by shift."""
    lines = ["\nshare of logit-normal(0, 1) samples in the band / steps of 25 in it"]
    lines.append("  shift  " + "  ".join(f"{label:>12}" for label in bands))
    for shift in SHIFTS:
        cells = [
            f"{timesteps.band_share(band, shift):7.2f} /{steps_in_band(band, shift):3d}"
            for band in bands.values()
        ]
        lines.append(f"  {shift:5d}  " + "  ".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--latents", required=True, help="folder of a latent cache")
    add("--label", action="append", help="label to measure; by default all of them")
    add("--num_clips", type=int, default=8000, help="largest number of clips")
    add("--out", help="JSON file for the numbers")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    cache = latent_cache.open(args.latents)
    rows = cache.read(range(min(len(cache), args.num_clips)))
    rows = [row for row in rows if hasattr(row, "latents")]  # without damaged ones
    mean_c, std_c = cache.mean_std
    x_nd = np.stack([((r.latents - mean_c) / std_c).reshape(-1) for r in rows])
    found = tasks(project(x_nd), [labels_of(r.state_json, r.captions) for r in rows])
    unknown = sorted(set(args.label or []) - set(found))
    if unknown or not found:
        raise SystemExit(
            f"noise_band: the clips have no label {unknown or 'at all'}; "
            f"they have {sorted(found)}"
        )
    results = {}
    for label in args.label or found:
        results[label] = read_out(found[label], TAUS)
        print(describe(label, results[label]), flush=True)
    bands = {label: r["band"] for label, r in results.items() if r["band"]}
    proposal = None
    if bands:
        proposal = timesteps.propose_shift(list(bands.values()))
        print(describe_shifts(bands))
        print(f"\nproposed shift, in training and in sampling: {proposal:g}")
    if args.out:
        text = json.dumps({"labels": results, "shift": proposal}, indent=1)
        paths.write_atomically(pathlib.Path(args.out), text + "\n")


if __name__ == "__main__":
    main()
