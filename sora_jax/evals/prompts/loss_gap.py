"""How much of its captions a denoiser of the toy world reads: the loss gap.

The gap of an attribute is how much the loss of a clip grows if its caption states another
value of this attribute, with the same noise. It is 0 while the denoiser does not read the
attribute, and rises long before samples show it. It is measured in bands of the noise
level: below some level the noised clip itself shows the attribute and the caption is not
needed, so a gap that is there only at low levels comes too late for a sampler, which has
already chosen by then.

Letters: n clips of one attribute, k bands, b rows.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from sora_jax.core import sharding
from sora_jax.data import captions as clip_captions
from sora_jax.data import latent_cache, packing, samples
from sora_jax.data import tokenizer as tokenizers
from sora_jax.diffusion import timesteps
from sora_jax.toyworld import captions, scene
from sora_jax.training import loop, objectives

_SEARCHED = 4000  # clips of the cache, at most
_LEAST_SHARE = 0.05  # of the training levels: smaller bands are left out


@dataclasses.dataclass(frozen=True)
class Pair:
    """A clip with its caption and the same caption with another value."""

    latents_thwc: np.ndarray
    right: str
    wrong: str


def find_pairs(
    source: latent_cache.Latents | latent_cache.Joined,
    tiers: Mapping[str, float],
    clips: int,
) -> dict[str, list[Pair]]:
    """Finds clips of the toy world whose caption states each attribute.

    Args:
      source: the latents that the denoiser is trained on.
      tiers: weight of each caption tier in training; of the tiers that state an
        attribute, the one with the largest weight is used.
      clips: wanted of each attribute; attributes with fewer than two are left out.

    Returns:
      The pairs by attribute, all of one size; empty if the clips are not of the toy
      world.
    """
    order = sorted(tiers, key=lambda tier: -tiers[tier])
    # Not those that may be wrong already, or were worded by a model.
    order = [tier for tier in order if tier in captions.TIERS and tier != "alt"]
    found, shape = {name: [] for name in captions.ATTRIBUTES}, None
    for indices in itertools.batched(samples.evenly(len(source), _SEARCHED), 64):
        if all(len(pairs) == clips for pairs in found.values()):
            break
        for record in source.read(indices):
            text = getattr(record, "state_json", None)  # none of a damaged record
            if text is None:
                continue
            shape = shape or record.latents.shape
            if record.latents.shape != shape:
                continue
            try:
                drawn = scene.Scene.from_json(text)
            except ValueError:  # the state of another world
                continue
            for name, pairs in found.items():
                if len(pairs) < clips and (pair := _pair(record, drawn, name, order)):
                    pairs.append(pair)
    return {name: pairs for name, pairs in found.items() if len(pairs) > 1}


def _pair(record, drawn: scene.Scene, attribute: str, tiers) -> Pair | None:
    for tier in tiers:
        wrong = captions.exchanged(drawn, tier, attribute)
        if wrong is not None and record.captions.get(tier):
            return Pair(record.latents, captions.caption(drawn, tier), wrong)
    return None


class LossGap:
    """Measures the loss gaps of a denoiser; an evaluator of its training.

    Args:
      objective: of a denoiser whose text encoder is one of its networks.
      tokenizer: of the captions.
      length: tokens that captions are cut or padded to.
      pairs: by attribute, see `find_pairs`.
      mesh: that rows are split over.
      batch_size: rows at a time.
      seed: of the noise.
    """

    def __init__(
        self,
        objective: objectives.Denoiser,
        tokenizer: tokenizers.Tokenizer,
        length: int,
        pairs: Mapping[str, list[Pair]],
        *,
        mesh: jax.sharding.Mesh,
        batch_size: int,
        seed: int = 0,
    ):
        self._objective, self._mesh, self._seed = objective, mesh, seed
        self._batch_size, self._pairs = batch_size, dict(pairs)
        noise = objective.noise
        names = timesteps.band_names(noise.band_edges)
        bands = itertools.pairwise(noise.band_edges)
        self._bands = [
            (name, sum(band) / 2, share)
            for name, band in zip(names, bands, strict=True)
            if (share := timesteps.training_share(band, noise)) >= _LEAST_SHARE
        ]
        self._texts = {
            text: tuple(part[0] for part in tokenizer.encode([text], length))
            for some in self._pairs.values()
            for pair in some
            for text in (pair.right, pair.wrong)
        }

        @jax.jit
        def losses(params, batch):
            modules = objective.networks.bind(params)
            return sharding.replicate(objective.clip_losses(modules, batch))

        self._losses = losses

    def run(self, params: dict, step: int = 0) -> Iterator[tuple[str, float]]:
        """Yields ATTRIBUTE/BAND and ATTRIBUTE, the mean over the training levels.

        The mean is how much lower the training loss of clips with this attribute is
        because the denoiser reads it.
        """
        networks = self._objective.networks.abstract()
        params = {name: params[name] for name in networks}
        for name, pairs in self._pairs.items():
            gap_nk = self._gaps(params, pairs)
            shares_k = np.array([share for *_, share in self._bands])
            yield name, float(gap_nk.mean(0) @ shares_k)
            for (band, *_), gap in zip(self._bands, gap_nk.mean(0), strict=True):
                yield f"{name}/{band}", float(gap)

    def _gaps(self, params, pairs: list[Pair]) -> np.ndarray:
        """Loss with the wrong caption minus loss with the right one: [n, k]."""
        rows = [
            (number, pair.latents_thwc, text, level)
            for number, pair in enumerate(pairs)
            for _, level, _ in self._bands
            for text in (pair.wrong, pair.right)
        ]
        losses = []
        for chunk in itertools.batched(rows, self._batch_size):
            fill = self._batch_size - len(chunk)
            losses.extend(self._losses_of(params, [*chunk, *chunk[-1:] * fill]))
            losses = losses[: len(losses) - fill]
        loss_nk2 = np.reshape(losses, (len(pairs), len(self._bands), 2))
        return loss_nk2[..., 0] - loss_nk2[..., 1]

    def _losses_of(self, params, rows) -> np.ndarray:
        part, parts = sharding.process_rows(self._mesh)
        mine = len(rows) // parts
        rows = rows[part * mine : (part + 1) * mine]
        texts = [self._texts[text] for _, _, text, _ in rows]
        latents_bthwc = np.stack([latents for _, latents, _, _ in rows])
        count = packing.tokens_of(
            latents_bthwc.shape[1:], self._objective.dit_config.patch
        )
        batch = {
            "latents": latents_bthwc,
            "text_ids": np.stack([ids for ids, _ in texts]),
            "text_mask": np.stack([mask for _, mask in texts]),
            "tau": np.float32([[level] for *_, level in rows]),
            "noise": np.stack(
                [self._noise(number, latents) for number, latents, _, _ in rows]
            ),
            "known_tau": np.zeros((len(rows), 1), np.float32),
            "slots": np.zeros((len(rows), count), np.int8),
            "drop": np.zeros((len(rows), 1), bool),
        }
        with jax.set_mesh(self._mesh):
            rows = loop.to_device(batch, self._mesh)
            return np.asarray(self._losses(params, rows))[:, 0]

    def _noise(self, number: int, latents_thwc: np.ndarray) -> np.ndarray:
        """The noise of a clip, the same at all levels and for both captions."""
        words = np.random.default_rng([self._seed, number])
        return words.standard_normal(latents_thwc.shape, np.float32)


def of_run(
    c,
    objective: objectives.Denoiser,
    source: latent_cache.Latents | latent_cache.Joined,
    tokenizer: tokenizers.Tokenizer,
    mesh: jax.sharding.Mesh,
) -> LossGap | None:
    """The evaluator of a denoiser's run; None where there is nothing to measure.

    That is where `data.gap_clips` is 0, clips are not of the toy world, or the run reads
    stored text states and has no text encoder for other captions.

    Args:
      c: the run's config.
      objective: its objective.
      source: its latents.
      tokenizer: of its captions.
      mesh: of the run.
    """
    if not c.data.gap_clips or "text_encoder" not in objective.networks.abstract():
        return None
    tiers = clip_captions.CaptionSampler(dict(c.text.tiers)).probabilities
    pairs = find_pairs(source, tiers, c.data.gap_clips)
    if not pairs:
        return None
    alone = objective
    if objective.fps is None:  # of packed rows
        fps = source.entry(0)["fps"]
        alone = objectives.denoiser(c, tokenizer, fps=fps)
    return LossGap(
        alone,
        tokenizer,
        c.text.length,
        pairs,
        mesh=mesh,
        batch_size=c.data.batch_size,
        seed=c.seed,
    )
