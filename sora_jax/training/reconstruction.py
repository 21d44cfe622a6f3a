"""The video VAE's loss: pixels, bands, LPIPS, KL, and later in the run a discriminator.

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

    Batches: an entry for each kind of video, uint8 or float32 [b, t, h, w, 3] with its
    own sizes; floats are in [-1, 1]. Every video weighs the same, whatever its kind.
    """

    def __init__(
        self,
        config: video_vae.Config,
        weights: Weights,
        judge: discriminator.Config = discriminator.Config(),
        perception: lpips.Config = lpips.Config(),
    ):
        def make(rngs):
            made = {"vae": video_vae.VideoVAE(config, rngs=rngs)}
            if weights.adversarial:
                made["discriminator"] = discriminator.Discriminator(judge, rngs=rngs)
            if weights.lpips:
                made[perceptual.NAME] = lpips.LPIPS(perception, rngs)
            return made

        self.config, self.weights = config, weights
        self.networks = states.Networks(make)
        self.metric_names = {}

    def draw(self, key, batch, share):
        drawn = dict(batch)
        for place, name in enumerate(sorted(batch)):
            b, t, h, w, _ = batch[name].shape
            shape = (b, *self.config.latent_shape(t, h, w))
            layout = sharding.out_sharding("batch", None, None, None, None)
            # The first kind keeps the key, so that runs with one kind do not change.
            own = jax.random.fold_in(key, place) if place else key
            noise = jax.random.normal(own, shape, out_sharding=layout)
            judged = jnp.full(b, share >= self.weights.adversarial_start, jnp.float32)
            drawn[f"noise/{name}"] = noise
            drawn[f"judged/{name}"] = sharding.reshard(judged, "batch")
        return drawn

    def loss(self, modules, batch):
        kinds = [name for name in batch if f"noise/{name}" in batch]
        each = [
            self._loss(
                modules,
                *(batch[f"{what}{name}"] for what in ("", "noise/", "judged/")),
            )
            for name in sorted(kinds)
        ]
        return jax.tree.map(lambda *terms: sum(terms[1:], terms[0]), *each)

    def _loss(self, modules, video, noise, judged_b):
        """Loss, weight and metrics of the videos of one kind, as sums over them."""
        if video.dtype == jnp.uint8:
            video = video.astype(jnp.float32) / 127.5 - 1
        mean, logvar = modules["vae"].encode(video)
        mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
        latents = mean + jnp.exp(0.5 * logvar) * noise
        decoded = modules["vae"].decode(latents).astype(jnp.float32)
        kl_b = jnp.square(mean) + jnp.exp(logvar) - 1 - logvar
        kl_b = 0.5 * jnp.sum(kl_b, (1, 2, 3, 4)) / math.prod(video.shape[1:4])

        weight = jnp.full((), video.shape[0], jnp.float32)
        error_sum, terms = self._errors(modules, decoded, video)
        metrics = {name: (jnp.sum(term_b), weight) for name, term_b in terms.items()}
        metrics["kl"] = jnp.sum(kl_b), weight
        total = error_sum + self.weights.kl * jnp.sum(kl_b)
        if self.weights.adversarial:
            judgement, judged = self._judge(modules, decoded, video, judged_b)
            total = total + judgement
            metrics |= {name: (value, weight) for name, value in judged.items()}
        return total, weight, metrics

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


def _mean(score_bthw: jax.Array) -> jax.Array:
    """The sum over rows of each row's mean."""
    return jnp.sum(jnp.mean(score_bthw, (1, 2, 3)))


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x)))
