"""What the denoiser and its text encoder learn.

Letters: b rows, t, h, w latent time, height and width, c channels, l text tokens, d
text width; of packed rows n tokens, k clips, c numbers of a token.
"""

import functools

import jax
import jax.numpy as jnp

from sora_jax.core import config as configs
from sora_jax.core import sharding
from sora_jax.data import captions
from sora_jax.diffusion import flow, guidance, known, timesteps
from sora_jax.models import caption_decoder, dit, lora, text_encoder
from sora_jax.toyworld import tokens
from sora_jax.training import state as states
from sora_jax.training import state_loss as state_losses

_exactly = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _rows(*names_after) -> jax.P | None:
    return sharding.out_sharding("batch", *names_after)


def denoiser_configs(c, vocab_size: int) -> tuple[dit.Config, text_encoder.Config]:
    """Reads both networks of a denoiser from a run's config.

    The text encoder's width is the denoiser's text_dim, its vocabulary that of the
    tokenizer where the config names none.
    """
    dit_config = configs.build(dit.Config, c.model.dit, "model.dit")
    if dit_config.out_channels != dit_config.in_channels:
        raise ValueError(
            f"model.dit.out_channels is {dit_config.out_channels}, but a denoiser gives "
            f"as many as it takes: model.dit.in_channels is {dit_config.in_channels}"
        )
    text = dict(c.model.text_encoder)
    table = text.get("vocab_size") or vocab_size
    if table < vocab_size:
        raise ValueError(
            f"model.text_encoder.vocab_size is {table}, but the tokenizer has "
            f"{vocab_size} pieces"
        )
    text |= {"vocab_size": table, "dim": dit_config.text_dim}
    text_config = configs.build(text_encoder.Config, text, "model.text_encoder")
    return dit_config, text_config


def denoiser_networks(
    dit_config: dit.Config,
    text_config: text_encoder.Config | None,
    lora_config: lora.Config = lora.Config(),
    *,
    has_state_head: bool = False,
) -> states.Networks:
    """The networks "dit" and, with its sizes, "text_encoder"; if asked, `state_loss.NAME`.

    lora_config: the adapters of the denoiser, if any.
    """

    def make(rngs):
        denoiser = dit.DiT(dit_config, rngs=rngs)
        networks = {"dit": lora.adapt(denoiser, "dit", lora_config, rngs)}
        if text_config is not None:
            networks["text_encoder"] = text_encoder.TextEncoder(text_config, rngs=rngs)
        if has_state_head:
            networks[state_losses.NAME] = state_losses.head(dit_config.dim, rngs)
        return networks

    return states.Networks(make)


def denoiser(
    c,
    tokenizer,
    *,
    fps: float | None = None,
    most_frames: int = 0,
    null_states=None,
    state_loss: state_losses.Config | None = None,
) -> "Denoiser":
    """The objective of a denoiser's run.

    Args:
      c: the run's config.
      tokenizer: its tokenizer.
      fps: frames a second of the training clips, if rows are not packed.
      most_frames: frames of tokens of the longest clip, if rows are packed; else 0.
      null_states: see `Denoiser`.
      state_loss: the second task, if batches say what tokens show.

    Raises:
      ValueError: the config has adapters of layers that are not there, or would train
        the text encoder beside them.
    """
    if c.lora.rank and not c.text.frozen:
        raise ValueError(
            f"lora.rank is {c.lora.rank}, and adapters of the denoiser are all that a "
            "run with LoRA trains: add --config.text.frozen=True"
        )
    null_ids, _ = tokenizer.encode([""], c.text.length)
    kind, sizes = Denoiser, {"fps": fps}
    if most_frames:
        kind, sizes = PackedDenoiser, {"most_frames": most_frames}
    if state_loss:
        sizes["state_loss"] = state_loss
    return kind(
        *denoiser_configs(c, tokenizer.vocab_size),
        configs.build(timesteps.Config, c.noise, "noise"),
        configs.build(known.Config, c.known, "known"),
        text_dropout=c.text.dropout,
        null_ids=null_ids[0],
        null_states=null_states,
        lora_config=configs.build(lora.Config, c.lora, "lora"),
        **sizes,
    )


class Denoiser:
    """Rectified flow on latents, with text dropout and known tokens.

    The loss of a clip is the mean of (velocity - (noise - x0))^2 over its unknown
    voxels; clips weigh the same whatever their size (arXiv 2209.03003, 2403.03206).

    Args:
      dit_config, text_config: the networks; the train state says whether the text
        encoder is trained or fixed.
      noise: distribution of noise levels.
      known_config: how often which tokens are known.
      text_dropout: share of rows whose text is replaced by the null text.
      null_ids: token ids of the null text, [l].
      fps: frames a second of the training clips.
      null_states: the text encoder's states of the null text, [l, d], if batches hold
        cached states; the text encoder is then not one of the networks.
      state_loss: a second task on the exact state of the toy world.
      lora_config: adapters of the denoiser, which are trained in its place.

    Batches: `latents` float32 [b, t, h, w, c] normalised to unit variance, `text_mask`
    bool [b, l], and `text_ids` int32 [b, l] or `text_states` [b, l, d] in any type; with
    `state_loss` also what tokens show (`state_loss.loss`). With `text_tier` int32 [b],
    places in `captions.REALISED`, losses are also given by the tier of the caption.
    """

    def __init__(
        self,
        dit_config: dit.Config,
        text_config: text_encoder.Config,
        noise: timesteps.Config,
        known_config: known.Config,
        *,
        text_dropout: float,
        null_ids,
        fps: float | None,
        null_states=None,
        state_loss: state_losses.Config | None = None,
        lora_config: lora.Config = lora.Config(),
    ):
        self.dit_config, self.text_config, self.fps = dit_config, text_config, fps
        self.state_loss = state_loss
        self.noise, self.known = noise, known_config
        self.text_dropout = text_dropout
        self.null_ids_1l = jnp.asarray(null_ids, jnp.int32)[None]
        self.null_states_1ld = (
            None if null_states is None else jnp.asarray(null_states)[None]
        )
        held = text_config if null_states is None else None
        self.networks = denoiser_networks(
            dit_config, held, lora_config, has_state_head=state_loss is not None
        )
        if lora_config.rank:
            self.networks.abstract()  # raises where it names layers that are not there
        self.metric_names = {
            "loss_band": timesteps.band_names(noise.band_edges),
            "loss_tier": list(captions.REALISED),
        }

    def draw(self, key, batch, share):
        del share
        tau_key, noise_key, drop_key, known_key = jax.random.split(key, 4)
        b, *grid, c = batch["latents"].shape
        drawn = dict(batch)
        drawn["tau"] = sharding.reshard(
            timesteps.sample_tau(tau_key, b, self.noise), "batch"
        )
        drawn["noise"] = jax.random.normal(
            noise_key, (b, *grid, c), out_sharding=_rows(None, None, None, None)
        )
        drop_b = jax.random.uniform(drop_key, (b,)) < self.text_dropout
        drawn["drop"] = sharding.reshard(drop_b, "batch")
        drawn["known"] = sharding.reshard(
            known.sample_known(known_key, b, tuple(grid), self.known.probabilities),
            "batch",
            None,
            None,
            None,
        )
        return drawn

    def _text(self, modules, batch):
        """States [b, l, d] and mask [b, l] of each row's text, or of the null text."""
        stored = self.null_states_1ld is not None
        text = {"mask": batch["text_mask"]}
        null = {"mask": self.null_ids_1l != 0}
        if stored:
            text["states"], null["states"] = batch["text_states"], self.null_states_1ld
        else:
            text["ids"], null["ids"] = batch["text_ids"], self.null_ids_1l
        text = guidance.null_condition(text, null, batch["drop"])
        if stored:  # in the type that the text encoder would return
            return text["states"].astype(self.text_config.dtype), text["mask"]
        return modules["text_encoder"](text["ids"], text["mask"]), text["mask"]

    def loss(self, modules, batch):
        hidden_bnd = None
        if self.state_loss:
            after = self.state_loss.after(self.dit_config.num_layers)
            loss_b, hidden_bnd = self.row_losses(modules, batch, after)
        else:
            loss_b = self.row_losses(modules, batch)
        total, weight, metrics = self._summed(loss_b, jnp.ones_like(loss_b), batch)
        if hidden_bnd is not None:
            found_bnc = modules[state_losses.NAME](hidden_bnd.astype(jnp.float32))
            more, of_state = state_losses.loss(found_bnc, batch)
            total, metrics = total + self.state_loss.weight * more, metrics | of_state
        return total, weight, metrics

    def row_losses(self, modules, batch, hidden_after: int = 0):
        """The loss of each row, [b], of a batch that `draw` has completed.

        With `hidden_after` also the denoiser's hidden states, [b, n, d].
        """
        states_bld, text_mask_bl = self._text(modules, batch)
        x0, noise, is_known = batch["latents"], batch["noise"], batch["known"]
        tau_bthw = known.token_tau(batch["tau"], is_known, self.known.known_tau)
        levels_bk, _ = known.levels(batch["tau"], is_known, self.known.known_tau)
        velocity = modules["dit"].apply_video(
            flow.interpolate(x0, noise, tau_bthw),
            levels_bk,
            is_known.astype(jnp.float32),
            states_bld,
            text_mask_bl,
            self.fps,
            hidden_after=hidden_after,
        )
        velocity, *hidden_bnd = velocity if hidden_after else (velocity,)
        error_bthw = jnp.mean(jnp.square(velocity - flow.velocity(x0, noise)), -1)
        unknown_bthw = 1.0 - is_known
        if self.state_loss and "shown_shape" in batch:
            unknown_bthw = unknown_bthw * self._focus(batch["shown_shape"], x0.shape)
        loss_b = jnp.sum(error_bthw * unknown_bthw, (1, 2, 3)) / jnp.sum(
            unknown_bthw, (1, 2, 3)
        )
        return (loss_b, *hidden_bnd) if hidden_after else loss_b

    def _focus(self, shape_bn, size):
        """The weight of each voxel, [b, t, h, w]: more where a token shows a thing."""
        patch, (b, t, h, w, _) = self.dit_config.patch, size
        thing_bn = (shape_bn > tokens.NOTHING).astype(jnp.float32)
        weight_bn = 1 + (self.state_loss.focus - 1) * thing_bn
        grid = t // patch[0], h // patch[1], w // patch[2]
        weight = jnp.reshape(
            weight_bn, (b, *grid), out_sharding=_rows(None, None, None)
        )
        for axis, size in enumerate(patch, 1):
            weight = jnp.repeat(weight, size, axis=axis)
        return weight

    def _summed(self, loss_b, weight_b, batch):
        """Sums the losses of clips: in total, by band of noise level, by caption tier."""

        def by(kind_b, count):
            is_kind_bk = jax.nn.one_hot(kind_b, count) * weight_b[:, None]
            layout = sharding.out_sharding(None)
            sum_k = _exactly("b,bk->k", loss_b, is_kind_bk, out_sharding=layout)
            return sum_k, jnp.sum(is_kind_bk, 0)

        edges = self.noise.band_edges
        band_b = timesteps.band_index(batch["tau"], edges)
        metrics = {"loss_band": by(band_b, len(edges) - 1)}
        if "text_tier" in batch:
            none = captions.REALISED.index(captions.NO_CAPTION)
            tier_b = jnp.where(batch["drop"], none, batch["text_tier"])
            metrics["loss_tier"] = by(tier_b, len(captions.REALISED))
        return jnp.sum(loss_b * weight_b), jnp.sum(weight_b), metrics


class PackedDenoiser(Denoiser):
    """`Denoiser` for clips of any size that share rows, each with its own noise level.

    Batches are those of `packing.Batches`, with `text_mask` bool [b, k, l], and
    `text_ids` int32 [b, k, l] or `text_states` [b, k, l, d]. A row's text is the
    concatenation of its clips' texts. Patterns of known tokens cover frames of tokens; a
    clip too short for the pattern that it draws has no known tokens.

    Args:
      most_frames: frames of tokens of the longest clip.
      others: see `Denoiser`.
    """

    def __init__(self, *args, most_frames: int, **others):
        super().__init__(*args, fps=None, **others)
        self.most_frames = most_frames

    def draw(self, key, batch, share):
        del share
        tau_key, noise_key, drop_key, known_key = jax.random.split(key, 4)
        b, k = batch["frames"].shape
        tau_bk = timesteps.sample_tau(tau_key, b * k, self.noise).reshape(b, k)
        drop_bk = jax.random.uniform(drop_key, (b, k)) < self.text_dropout
        known_bkt = known.sample_known_frames(
            known_key,
            sharding.replicate(batch["frames"]).reshape(b * k),
            self.most_frames,
            self.known.probabilities,
        ).reshape(b, k, self.most_frames)
        noise_bnc = jax.random.normal(
            noise_key, batch["tokens"].shape, out_sharding=_rows(None, None)
        )
        return dict(batch) | {
            "tau": sharding.reshard(tau_bk, "batch", None),
            "drop": sharding.reshard(drop_bk, "batch", None),
            "known": sharding.reshard(known_bkt, "batch", None, None),
            "noise": noise_bnc,
        }

    def _texts(self, modules, batch):
        """States [b, k l, d] and mask [b, k l] of each row's texts."""

        def apart(x):  # [b, k, ...] -> [b k, ...]
            layout = _rows(*(None,) * (x.ndim - 2))
            return jnp.reshape(x, (-1, *x.shape[2:]), out_sharding=layout)

        names = {"text_ids", "text_states", "text_mask", "drop"} & batch.keys()
        clips = {name: apart(batch[name]) for name in names}
        states_gld, mask_gl = self._text(modules, clips)
        (b, k, l), d = batch["text_mask"].shape, states_gld.shape[-1]
        return (
            jnp.reshape(states_gld, (b, k * l, d), out_sharding=_rows(None, None)),
            jnp.reshape(mask_gl, (b, k * l), out_sharding=_rows(None)),
        )

    def loss(self, modules, batch):
        x0, noise, segments_bn = batch["tokens"], batch["noise"], batch["segments"]
        b, k = batch["frames"].shape
        states_bld, text_mask_bl = self._texts(modules, batch)

        def of_rows(x_1m):
            x_bm = jnp.broadcast_to(x_1m, (b, x_1m.shape[1]))
            return sharding.reshard(x_bm, "batch", None)

        # Products with one-hot rows, which shard where a gather does not. At the highest
        # precision they select levels, rates and losses exactly.
        of_clip_bnk = jax.nn.one_hot(segments_bn - 1, k)
        in_frame_bnt = jax.nn.one_hot(batch["places"][..., 0], self.most_frames)
        there_bn = (segments_bn > 0).astype(jnp.float32)
        known_bnt = _exactly(
            "bnk,bkt->bnt", of_clip_bnk, batch["known"].astype(jnp.float32)
        )
        known_bn = jnp.sum(known_bnt * in_frame_bnt, -1)
        tau_bn = _exactly("bnk,bk->bn", of_clip_bnk, batch["tau"])
        tau_bn = jnp.where(known_bn > 0, self.known.known_tau, tau_bn)
        fps_bn = _exactly("bnk,bk->bn", of_clip_bnk, batch["fps"]) + 1 - there_bn
        known_tau_bk = of_rows(jnp.full((1, k), self.known.known_tau))
        number_bn = jnp.maximum(segments_bn - 1, 0) + k * known_bn.astype(jnp.int32)
        clip_1k = jnp.arange(1, k + 1)[None]

        velocity_bnc = modules["dit"](
            flow.interpolate(x0, noise, tau_bn),
            jnp.concatenate([batch["tau"], known_tau_bk], 1),
            number_bn,
            known_bn,
            dit.positions(batch["places"], self.dit_config, fps_bn),
            states_bld,
            text_mask_bl,
            segments_bn,
            of_rows(jnp.repeat(clip_1k, states_bld.shape[1] // k, axis=1)),
            of_rows(jnp.tile(clip_1k, (1, 2))),
        )
        error_bn = jnp.mean(jnp.square(velocity_bnc - flow.velocity(x0, noise)), -1)
        unknown_bn = there_bn - known_bn

        def by_clip(x_bn):
            x_bn = sharding.reshard(x_bn, "batch", None)
            return _exactly("bn,bnk->bk", x_bn, of_clip_bnk)

        loss_bk = by_clip(error_bn * unknown_bn) / jnp.maximum(by_clip(unknown_bn), 1)
        weight_bk = (batch["frames"] > 0).astype(jnp.float32)

        def flat(x_bk):
            return jnp.reshape(x_bk, (b * k,), out_sharding=_rows())

        names = {"tau", "drop", "text_tier"} & batch.keys()
        clips = {name: flat(batch[name]) for name in names}
        total, weight, metrics = self._summed(flat(loss_bk), flat(weight_bk), clips)
        tokens = jnp.full((), there_bn.size, jnp.float32)
        return (
            total,
            weight,
            metrics
            | {
                "padding": (tokens - jnp.sum(there_bn), tokens),
                "clips_per_row": (weight, jnp.full((), b, jnp.float32)),
            },
        )


class Rewriting:
    """Trains a text encoder on captions alone: it reads one, and a decoder writes another.

    The loss is the mean cross entropy, in nats, of the second caption's tokens, given
    the preceding ones and the mean of the encoder's states. Both captions describe the
    same clip in different words, so synonyms get similar states, and the states must
    keep what a word does in its sentence.

    Args:
      config: sizes of the encoder; the decoder has the same.

    Batches: `text_ids` int32 [b, l], `text_mask` bool [b, l], `target_ids` int32 [b, m],
    padded with 0.
    """

    def __init__(self, config: text_encoder.Config):
        self.config = config
        self.networks = states.Networks(
            lambda rngs: {
                "text_encoder": text_encoder.TextEncoder(config, rngs=rngs),
                "caption_decoder": caption_decoder.CaptionDecoder(config, rngs=rngs),
            }
        )
        self.metric_names = {}

    def draw(self, key, batch, share):
        del key, share
        return batch

    def loss(self, modules, batch):
        mask, target_bm = batch["text_mask"], batch["target_ids"]
        states_bld = modules["text_encoder"](batch["text_ids"], mask)
        mean_bd = text_encoder.mean_state(states_bld, mask)
        logits_bmv = modules["caption_decoder"](mean_bd, target_bm)
        # Products with one-hot rows, which shard where a gather does not.
        chosen_bmv = jax.nn.one_hot(target_bm, self.config.vocab_size)
        nats_bm = -jnp.sum(jax.nn.log_softmax(logits_bmv) * chosen_bmv, -1)
        there_bm = (target_bm != 0).astype(jnp.float32)
        tokens = jnp.maximum(jnp.sum(there_bm), 1)
        right_bm = (jnp.argmax(logits_bmv, -1) == target_bm) * there_bm
        return (
            jnp.sum(nats_bm * there_bm),
            tokens,
            {"right": (jnp.sum(right_bm), tokens)},
        )
