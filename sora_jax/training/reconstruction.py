"""The video VAE's loss: pixels, bands, LPIPS, KL, and later in the run a discriminator.

In the toy world the latents may have a second task (state_loss.py).

Letters: b batch, t time, h height, w width, c channels, n windows.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from sora_jax.core import config as configs
from sora_jax.core import sharding
from sora_jax.models import conv, discriminator, lpips, video_vae
from sora_jax.training import perceptual
from sora_jax.training import state as states
from sora_jax.training import state_loss as state_losses

_BAND_LEVELS = 3


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weight of each term of the loss; 0 leaves it out.

    Absolute error alone stalls at first: a flat grey video is the median of all videos,
    and its gradient does not lead away from there; that of squared error does. `bands`
    needs no network and no download: it weighs edges and motion at several scales (see
    `band_error`).

    adversarial: of the discriminator's judgement, as a share of the gradient of the
    other terms at the decoder's output (the adaptive weight of arXiv 2012.09841, which
    takes the last layer instead). adversarial_start: the share of the run after which
    that term starts. disc_learning: of the discriminator's own loss. lpips: of the
    perceptual distance, the mean over frames; `lpips_weights` is the file of its network.

    latent_noise: no weight, but up to which share of a channel's deviation noise is added
    to latents before they are decoded; each video has a share of its own. The decoder
    then forgives what a denoiser leaves, and what is needed is kept above the noise
    (compare arXiv 2507.15856).
    """

    l1: configs.Factor = 1.0
    mse: configs.Factor = 0.0
    bands: configs.Factor = 1.0
    kl: configs.Factor = 1e-6
    lpips: configs.Factor = 0.0
    lpips_weights: str = ""
    adversarial: configs.Factor = 0.0
    adversarial_start: configs.Share = 0.5
    disc_learning: configs.Factor = 1.0
    latent_noise: configs.Factor = 0.0

    def __post_init__(self):
        if not (self.l1 or self.mse or self.bands or self.lpips):
            raise ValueError(
                "l1, mse, bands and lpips are all 0: one of them is above 0"
            )
        if self.lpips and not self.lpips_weights:
            raise ValueError(
                f"lpips is {self.lpips:g}, but lpips_weights names no file of weights; "
                "they are not shipped: `python -m sora_jax.convert` makes the file, or "
                "set lpips to 0"
            )


def band_error(error_bthwc: jax.Array) -> jax.Array:
    """Mean absolute Haar details of an error, in time, height and width: float32 [b].

    At each scale these are the differences between neighbours along each axis; then
    height and width are averaged in pairs. Both are linear, so the details of the error
    are the differences between the details of the two videos.
    """
    total_b = jnp.zeros(error_bthwc.shape[0], jnp.float32)
    total_b = sharding.reshard(total_b, "batch")
    for _ in range(_BAND_LEVELS):
        _, t, h, w, _ = error_bthwc.shape
        for axis, size in ((1, t), (2, h), (3, w)):
            if size > 1:
                detail = jnp.abs(jnp.diff(error_bthwc, axis=axis))
                total_b = total_b + jnp.mean(detail, (1, 2, 3, 4))
        if min(h, w) < 2:
            break
        even = error_bthwc[:, :, : h - h % 2, : w - w % 2]
        error_bthwc = jnp.mean(conv.fold(even, time=1, space=2), axis=-1)
    return total_b


class Reconstruction:
    """The losses of the video VAE and of the discriminator that judges it.

    Both are trained in the same step, each with the other treated as constant. Losses
    are float32.

    Args:
      config: of the VAE.
      weights: of the terms.
      judge: the discriminator's config; used if `weights.adversarial` is not 0.
      perception: LPIPS's config; used if `weights.lpips` is not 0. The network {"lpips"}
        must then be among the fixed ones.
      state_loss: a second task on the exact state of the toy world, for videos of one
        kind.

    Batches: an entry `video...` for each kind of video, uint8 or float32 [b, t, h, w, 3]
    with its own sizes; floats are in [-1, 1]. Every video weighs the same, whatever its
    kind. With `state_loss` also what each place of the latents shows
    (`state_loss.loss`).
    """

    def __init__(
        self,
        config: video_vae.Config,
        weights: Weights,
        judge: discriminator.Config = discriminator.Config(),
        perception: lpips.Config = lpips.Config(),
        state_loss: state_losses.Config | None = None,
    ):
        def make(rngs):
            made = {"vae": video_vae.VideoVAE(config, rngs=rngs)}
            if weights.adversarial:
                made["discriminator"] = discriminator.Discriminator(judge, rngs=rngs)
            if weights.lpips:
                made[perceptual.NAME] = lpips.LPIPS(perception, rngs)
            if state_loss is not None:
                made[state_losses.NAME] = state_losses.head(
                    config.latent_channels, rngs
                )
            return made

        self.config, self.weights, self.state_loss = config, weights, state_loss
        self.networks = states.Networks(make)
        self.metric_names = {}

    def draw(self, key, batch, share):
        drawn = dict(batch)
        for place, name in enumerate(_kinds(batch)):
            b, t, h, w, _ = batch[name].shape
            shape = (b, *self.config.latent_shape(t, h, w))
            layout = sharding.out_sharding("batch", None, None, None, None)
            # The first kind keeps the key, so that runs with one kind do not change.
            own = jax.random.fold_in(key, place) if place else key
            noise = jax.random.normal(own, shape, out_sharding=layout)
            judged = jnp.full(b, share >= self.weights.adversarial_start, jnp.float32)
            drawn[f"noise/{name}"] = noise
            drawn[f"judged/{name}"] = sharding.reshard(judged, "batch")
            if self.weights.latent_noise:
                drawn[f"added/{name}"] = self._added_noise(own, shape)
            if self.state_loss is not None:
                drawn["masking"] = jax.random.normal(
                    jax.random.fold_in(own, 1), shape, out_sharding=layout
                )
        return drawn

    def _added_noise(self, key, shape):
        """Noise on normalised latents, [b, t, h, w, c]."""
        share_key, noise_key = jax.random.split(jax.random.fold_in(key, 2))
        share_b1111 = jax.random.uniform(share_key, (shape[0], 1, 1, 1, 1))
        noise = jax.random.normal(noise_key, shape) * share_b1111
        noise = self.weights.latent_noise * noise
        return sharding.reshard(noise, "batch", None, None, None, None)

    def loss(self, modules, batch):
        each = [
            self._loss(
                modules,
                name,
                batch,
            )
            for name in _kinds(batch)
        ]
        return jax.tree.map(lambda *terms: sum(terms[1:], terms[0]), *each)

    def _loss(self, modules, name, batch):
        """Loss, weight and metrics of the videos of one kind, as sums over them."""
        video, noise, judged_b = (
            batch[f"{what}{name}"] for what in ("", "noise/", "judged/")
        )
        if video.dtype == jnp.uint8:
            video = video.astype(jnp.float32) / 127.5 - 1
        mean, logvar = modules["vae"].encode(video)
        mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
        latents = mean + jnp.exp(0.5 * logvar) * noise
        if self.weights.latent_noise:
            latents = latents + _deviation(mean) * batch[f"added/{name}"]
        decoded = modules["vae"].decode(latents).astype(jnp.float32)
        kl_b = jnp.square(mean) + jnp.exp(logvar) - 1 - logvar
        kl_b = 0.5 * jnp.sum(kl_b, (1, 2, 3, 4)) / math.prod(video.shape[1:4])

        weight = jnp.full((), video.shape[0], jnp.float32)
        error_sum, terms = self._errors(modules, decoded, video)
        metrics = {name: (jnp.sum(term_b), weight) for name, term_b in terms.items()}
        metrics["kl"] = jnp.sum(kl_b), weight
        total = error_sum + self.weights.kl * jnp.sum(kl_b)
        if self.state_loss is not None:
            more, of_state = self._state_loss(modules, mean, batch)
            total, metrics = total + self.state_loss.weight * more, metrics | of_state
        if self.weights.adversarial:
            judgement, judged = self._judge(modules, decoded, video, judged_b)
            total = total + judgement
            metrics |= {name: (value, weight) for name, value in judged.items()}
        return total, weight, metrics

    def _state_loss(self, modules, mean_bthwc, batch):
        """What latents tell under noise: loss and metrics.

        They are scaled by channel, as a denoiser gets them, so that only the share of
        their variance matters: behind the noise what is small cannot be seen.
        """
        centred = mean_bthwc - jnp.mean(mean_bthwc, (0, 1, 2, 3))
        scaled = centred / _deviation(mean_bthwc)
        masked = scaled + self.state_loss.noise * batch["masking"]
        found_bthwc = modules[state_losses.NAME](masked)
        b, *grid, c = found_bthwc.shape
        layout = sharding.out_sharding("batch", None, None)
        found_bnc = jnp.reshape(
            found_bthwc, (b, math.prod(grid), c), out_sharding=layout
        )
        return state_losses.loss(found_bnc, batch)

    def _errors(self, modules, decoded, video):
        """The sum over rows of the weighted errors, and each error by row."""
        error, per_row = decoded - video, (1, 2, 3, 4)
        mse_b = jnp.mean(jnp.square(error), per_row)
        terms = {
            "l1": jnp.mean(jnp.abs(error), per_row),
            "psnr": -10 * jnp.log10(jnp.maximum(mse_b / 4, 1e-10)),
        }
        loss_b = self.weights.l1 * terms["l1"] + self.weights.mse * mse_b
        if self.weights.bands:
            terms["bands"] = band_error(error)
            loss_b = loss_b + self.weights.bands * terms["bands"]
        if self.weights.lpips:
            # LPIPS takes whole frames, so only rows are sharded.
            pair = (
                sharding.reshard(x, "batch", *(None,) * 4) for x in (decoded, video)
            )
            terms["lpips"] = modules[perceptual.NAME](*pair)
            loss_b = loss_b + self.weights.lpips * terms["lpips"]
        return jnp.sum(loss_b), terms

    def _judge(self, modules, decoded, video, judged_b):
        """The hinge losses of both networks if the step is judged, else 0.

        The decoder gets the scaled gradient at its output; the value added to the loss is
        the scaled judgement itself.
        """
        judge = modules["discriminator"]

        def on():
            score_of = jax.lax.stop_gradient(decoded)
            errors = jax.grad(lambda x: self._errors(modules, x, video)[0])(score_of)
            praise, pull = jax.value_and_grad(lambda x: -_mean(judge(x)))(score_of)
            scale = self.weights.adversarial * _norm(errors) / (_norm(pull) + 1e-12)
            scale = jnp.minimum(scale, 1e4)
            return praise, scale * pull, scale

        def off():
            return jnp.zeros(()), jnp.zeros_like(decoded), jnp.zeros(())

        def learn():
            real = _mean(jax.nn.relu(1 - judge(video)))
            return real + _mean(jax.nn.relu(1 + judge(jax.lax.stop_gradient(decoded))))

        is_on = jnp.max(judged_b) > 0
        frozen = jax.lax.stop_gradient(jax.lax.cond(is_on, on, off))
        praise, pull, scale = frozen
        moved = jnp.sum(pull * decoded)
        judgement = moved - jax.lax.stop_gradient(moved) + scale * praise
        learned = jax.lax.cond(is_on, learn, lambda: jnp.zeros(()))
        return judgement + self.weights.disc_learning * learned, {
            "adversarial_weight": scale * video.shape[0],
            "discriminator": learned,
        }


def _kinds(batch) -> list[str]:
    """The entries of a batch that are videos, in a fixed order."""
    return sorted(name for name in batch if name.startswith("video"))


def _deviation(latents_bthwc: jax.Array) -> jax.Array:
    """The standard deviation of each channel over the rows of a micro-batch, [c]."""
    axes = (0, 1, 2, 3)
    centred = latents_bthwc - jnp.mean(latents_bthwc, axes)
    return jnp.sqrt(jnp.mean(jnp.square(centred), axes) + 1e-8)


def _mean(score_bthw: jax.Array) -> jax.Array:
    """The sum over rows of each row's mean."""
    return jnp.sum(jnp.mean(score_bthw, (1, 2, 3)))


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x)))
