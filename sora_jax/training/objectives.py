"""What the denoiser and its text encoder learn.

Letters: b rows, t, h, w latent time, height and width, c channels, l text tokens, d
text width; of packed rows n tokens, k clips, c numbers of a token.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sora_jax.core import config as configs
from sora_jax.core import sharding
from sora_jax.data import captions, conditions
from sora_jax.diffusion import flow, guidance, timesteps
from sora_jax.models import caption_decoder, dit, lora, patches, rows, text_encoder
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
    null_states=None,
    state_loss: state_losses.Config | None = None,
) -> "Denoiser":
    """The objective of a denoiser's run.

    Args:
      c: the run's config.
      tokenizer: its tokenizer.
      fps, null_states: see `Denoiser`.
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
    return Denoiser(
        *denoiser_configs(c, tokenizer.vocab_size),
        configs.build(timesteps.Config, c.noise, "noise"),
        configs.build(conditions.Config, c.known, "known"),
        text_dropout=c.text.dropout,
        null_ids=null_ids[0],
        null_states=null_states,
        lora_config=configs.build(lora.Config, c.lora, "lora"),
        fps=fps,
        state_loss=state_loss,
    )


class Denoiser:
    """Rectified flow on latents, with text dropout and known tokens.

    The loss of a clip is the mean of (velocity - (noise - x0))^2 over its generated
    tokens; clips weigh the same whatever their size (arXiv 2209.03003, 2403.03206).

    Args:
      dit_config, text_config: the networks; the train state says whether the text
        encoder is trained or fixed.
      noise: distribution of noise levels.
      known_config: how noisy known tokens are; `data/conditions.py`.
      text_dropout: share of clips whose text is replaced by the null text.
      null_ids: token ids of the null text, [l].
      fps: frames a second of clips of one size.
      null_states: the text encoder's states of the null text, [l, d], if batches hold
        cached states; the text encoder is then not one of the networks.
      state_loss: a second task on the exact state of the toy world.
      lora_config: adapters of the denoiser, which are trained in its place.

    Batches of clips of one size: `latents` float32 [b, t, h, w, c] normalised to unit
    variance, `slots` int8 [b, n] and `pattern` int32 [b] (`data/conditions.py`),
    `text_mask` bool [b, l], and `text_ids` int32 [b, l] or `text_states` [b, l, d] in any
    type; with `state_loss` also what tokens show (`state_loss.loss`). With `text_tier`
    int32 [b], places in `captions.REALISED`, losses are also given by the tier of the
    caption.

    Batches of packed clips are those of `packing.Batches`: what belongs to a clip has the
    axes [b, k], such as `text_ids` [b, k, l]. Each clip has its own noise levels, and a
    row's text is the concatenation of its clips' texts.
    """

    def __init__(
        self,
        dit_config: dit.Config,
        text_config: text_encoder.Config,
        noise: timesteps.Config,
        known_config: conditions.Config,
        *,
        text_dropout: float,
        null_ids,
        fps: float | None = None,
        null_states=None,
        state_loss: state_losses.Config | None = None,
        lora_config: lora.Config = lora.Config(),
    ):
        self.dit_config, self.text_config = dit_config, text_config
        self.fps = fps
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
            "loss_pattern": [pattern.value for pattern in conditions.PATTERNS],
            "loss_tier": list(captions.REALISED),
        }

    def draw(self, key, batch, share):
        """Adds the noise levels of clips `tau` [b, k] and `known_tau` [b, k], those of
        `extra_tau` [b, k, levels] where some clips have more, `drop` [b, k] and `noise`.
        """
        del share
        tau_key, noise_key, drop_key, known_key = jax.random.split(key, 4)
        data = batch["latents" if "latents" in batch else "tokens"]
        b, k = batch["frames"].shape if "frames" in batch else (len(data), 1)
        tau_m = timesteps.sample_tau(tau_key, b * k, self.noise)
        drawn = {
            "tau": tau_m,
            "drop": jax.random.uniform(drop_key, (b * k,)) < self.text_dropout,
            "known_tau": self._known_tau(known_key, tau_m),
        }
        if more := self.known.extra_levels:
            extra_key = jax.random.fold_in(tau_key, 1)
            extra_m = timesteps.sample_tau(extra_key, b * k * more, self.noise)
            drawn["extra_tau"] = extra_m.reshape(b * k, more)
        drawn = {
            name: sharding.reshard(
                x.reshape(b, k, *x.shape[1:]), "batch", *(None,) * x.ndim
            )
            for name, x in drawn.items()
        }
        if more:  # sorted, so that the index of a frame's level says how noisy it is
            pattern_bk = batch["pattern"].reshape(b, k)
            is_sorted = pattern_bk == conditions.PATTERNS.index(
                conditions.Pattern.LEVELS
            )
            levels = [drawn["tau"][..., None], drawn["extra_tau"]]
            levels_bke = jnp.sort(jnp.concatenate(levels, -1), -1)
            drawn["tau"] = jnp.where(is_sorted, levels_bke[..., 0], drawn["tau"])
            drawn["extra_tau"] = levels_bke[..., 1:]  # of no other clip
        drawn["noise"] = jax.random.normal(
            noise_key, data.shape, out_sharding=_rows(*(None,) * (data.ndim - 1))
        )
        return dict(batch) | drawn

    def _known_tau(self, key, tau_m):
        """Draws the noise levels of what is known, of clips with these levels: [m]."""
        which_m, level_m, drop_m = jax.random.uniform(key, (3, len(tau_m)))
        found_m, first = jnp.full_like(tau_m, self.known.known_tau), 0.0
        for bound, share in self.known.levels:
            here_m = (which_m >= first) & (which_m < first + share)
            found_m = jnp.where(here_m, jnp.minimum(bound * level_m, tau_m), found_m)
            first += share
        return jnp.where(drop_m < self.known.dropout, 1.0, found_m)

    def _text(self, modules, batch):
        """States [b, k l, d] and mask [b, k l] of each row's texts, or of the null text."""
        stored = self.null_states_1ld is not None
        names = {"mask": "text_mask", "states": "text_states", "ids": "text_ids"}
        del names["ids" if stored else "states"]
        b, k = batch["drop"].shape
        text = {name: batch[key] for name, key in names.items()}
        is_packed = text["mask"].ndim == 3
        if is_packed:
            text = {name: _joined(x) for name, x in text.items()}
        null = {"mask": self.null_ids_1l != 0}
        null |= (
            {"states": self.null_states_1ld} if stored else {"ids": self.null_ids_1l}
        )
        text = guidance.null_condition(text, null, _joined(batch["drop"]))
        mask = text["mask"]
        if stored:  # in the type that the text encoder would return
            states = text["states"].astype(self.text_config.dtype)
        else:
            states = modules["text_encoder"](text["ids"], mask)
        if is_packed:
            l, d = states.shape[1:]
            states = jnp.reshape(states, (b, k * l, d), out_sharding=_rows(None, None))
            mask = jnp.reshape(mask, (b, k * l), out_sharding=_rows(None))
        return states, mask

    def clean_rows(self, modules, batch) -> tuple[rows.Rows, jax.Array | None]:
        """The rows of a batch that `draw` has completed: clean tokens, and their levels.

        Also which clip of its row each packed token belongs to, one-hot [b, n, k]; None
        where a row is one clip.
        """
        text = self._text(modules, batch)
        b, k = batch["tau"].shape
        slots_bn = batch["slots"].astype(jnp.int32)
        first_extra = conditions.Slot.EXTRA
        # Levels are those of generated tokens, of what is given, and extra ones.
        level_bn = jnp.where(
            slots_bn < first_extra, jnp.minimum(slots_bn, 1), slots_bn - first_extra + 2
        )
        roles_bn = jnp.where(slots_bn < first_extra, slots_bn, rows.Role.GENERATED)
        levels = [batch["tau"], batch["known_tau"]]
        if "extra_tau" in batch:
            levels += [
                batch["extra_tau"][..., i] for i in range(conditions.EXTRA_LEVELS)
            ]
        levels_bm = jnp.concatenate(levels, axis=1)
        if "latents" in batch:
            found = rows.of_video(
                self.dit_config, batch["latents"], levels_bm, *text, fps=self.fps
            )
            return dataclasses.replace(
                found, level_index_bn=level_bn, roles_bn=roles_bn
            ), None

        def of_rows(x_1m):
            x_bm = jnp.broadcast_to(x_1m, (b, x_1m.shape[1]))
            return sharding.reshard(x_bm, "batch", None)

        # Products with one-hot rows, which shard where a gather does not. At the highest
        # precision they select rates and losses exactly.
        segments_bn, of_clip_bnk = batch["segments"], _of_clips(batch)
        is_padding_bn = (segments_bn == 0).astype(jnp.float32)
        fps_bn = _exactly("bnk,bk->bn", of_clip_bnk, batch["fps"]) + is_padding_bn
        clip_1k = jnp.arange(1, k + 1)[None]
        period_bn = None
        if self.known.has(conditions.Pattern.LOOP):
            period_bn = rows.seconds(
                _exactly("bnk,bk->bn", of_clip_bnk, batch["period"]),
                self.dit_config,
                fps_bn,
            )
        return rows.Rows(
            batch["tokens"],
            rows.positions(batch["places"], self.dit_config, fps_bn),
            levels_bm,
            *text,
            level_index_bn=jnp.maximum(segments_bn - 1, 0) + k * level_bn,
            roles_bn=roles_bn,
            period_bn=period_bn,
            segments_bn=segments_bn,
            text_segments_bl=of_rows(
                jnp.repeat(clip_1k, text[0].shape[1] // k, axis=1)
            ),
            level_segments_bk=of_rows(jnp.tile(clip_1k, (1, len(levels)))),
        ), of_clip_bnk

    def clip_losses(self, modules, batch, hidden_after: int = 0):
        """The loss of each clip, [b, k], of a batch that `draw` has completed.

        With `hidden_after` also the denoiser's hidden states, [b, n, d].
        """
        clean, of_clip_bnk = self.clean_rows(modules, batch)
        x0, noise = clean.tokens_bnc, batch["noise"]
        if of_clip_bnk is None:
            noise = patches.patchify(noise, self.dit_config.patch)
        noised = flow.interpolate(x0, noise, clean.tau)
        found = modules["dit"](
            dataclasses.replace(clean, tokens_bnc=noised), hidden_after=hidden_after
        )
        velocity_bnc, *hidden_bnd = found if hidden_after else (found,)
        error_bn = jnp.mean(jnp.square(velocity_bnc - flow.velocity(x0, noise)), -1)
        weight_bn = 1.0 - clean.given_bn
        if self.state_loss and "shown_shape" in batch:  # more where it shows a thing
            is_thing_bn = (batch["shown_shape"] > tokens.NOTHING).astype(jnp.float32)
            weight_bn = weight_bn * (1 + (self.state_loss.focus - 1) * is_thing_bn)

        weight_bk = jnp.maximum(rows.by_clip(weight_bn, of_clip_bnk), 1)
        loss_bk = rows.by_clip(error_bn * weight_bn, of_clip_bnk) / weight_bk
        return (loss_bk, *hidden_bnd) if hidden_after else loss_bk

    def loss(self, modules, batch):
        hidden_after = 0
        if self.state_loss:
            hidden_after = self.state_loss.after(self.dit_config.num_layers)
        found = self.clip_losses(modules, batch, hidden_after)
        loss_bk, *hidden_bnd = found if hidden_after else (found,)
        weight_bk, more = jnp.ones_like(loss_bk), {}
        if "segments" in batch:
            weight_bk = (batch["frames"] > 0).astype(jnp.float32)
            padding_bn = (batch["segments"] == 0).astype(jnp.float32)
            count = jnp.full((), len(weight_bk), jnp.float32)
            more = {
                "padding": (jnp.sum(padding_bn), count * padding_bn.shape[1]),
                "clips_per_row": (jnp.sum(weight_bk), count),
            }
        clips = {
            name: batch[name].reshape(loss_bk.shape)
            for name in {"tau", "drop", "pattern", "text_tier"} & batch.keys()
        }
        total, weight, metrics = self._summed(loss_bk, weight_bk, clips)
        if hidden_bnd:
            features_bnd = state_losses.of_hidden(hidden_bnd[0])
            logits_bnc = modules[state_losses.NAME](features_bnd)
            of_state, shown = state_losses.loss(logits_bnc, batch, _of_clips(batch))
            total, metrics = total + self.state_loss.weight * of_state, metrics | shown
        return total, weight, metrics | more

    def _summed(self, loss_bk, weight_bk, clips):
        """Sums the losses of clips: in total, and by noise level, pattern and caption."""

        def by(kind_bk, count):
            is_kind_bkm = jax.nn.one_hot(kind_bk, count) * weight_bk[..., None]
            layout = sharding.out_sharding(None)
            sum_m = _exactly("bk,bkm->m", loss_bk, is_kind_bkm, out_sharding=layout)
            return sum_m, jnp.sum(is_kind_bkm, (0, 1))

        edges = self.noise.band_edges
        band_bk = timesteps.band_index(clips["tau"], edges)
        metrics = {"loss_band": by(band_bk, len(edges) - 1)}
        if "pattern" in clips:
            patterns = by(clips["pattern"], len(conditions.PATTERNS))
            metrics["loss_pattern"] = patterns
        if "text_tier" in clips:
            none = captions.REALISED.index(captions.NO_CAPTION)
            tier_bk = jnp.where(clips["drop"], none, clips["text_tier"])
            metrics["loss_tier"] = by(tier_bk, len(captions.REALISED))
        return jnp.sum(loss_bk * weight_bk), jnp.sum(weight_bk), metrics


def _of_clips(batch) -> jax.Array | None:
    """See `rows.of_clips`; None for a batch of clips of one size."""
    if "segments" not in batch:
        return None
    return rows.of_clips(batch["segments"], batch["frames"].shape[1])


def _joined(x: jax.Array) -> jax.Array:
    """[b, k, ...] -> [b k, ...]: what belongs to the clips of all rows."""
    layout = _rows(*(None,) * (x.ndim - 2))
    return jnp.reshape(x, (-1, *x.shape[2:]), out_sharding=layout)


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
