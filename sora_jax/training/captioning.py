"""What the captioner learns.

Letters: b clips, t frames, h height, w width, c channels, l tokens, v vocabulary, r tiers, s tiers of data.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.core import sharding
from sora_jax.data import captions
from sora_jax.models import captioner
from sora_jax.training import state as states


class Captioning:
    """Trains a captioner to write the captions of clips.

    The loss is the mean cross entropy, in nats, of a caption's tokens given the clip, the
    caption's tier and the preceding tokens.

    Args:
      config: sizes of the captioner.
      dropout: share of the preceding tokens that it does not see.

    Batches, where it reads videos: `video` uint8 [b, t, h, w, c]; `text_ids` int32 [b, l],
    padded with 0; and `tier` int32 [b], the index of one of `config.tiers`, or -1 for a
    clip without a caption. Where it reads texts: `text_ids` int32 [b, n], which is read,
    `target_ids` int32 [b, l], all 0 for a clip that lacks either, and `target_tier` int32
    [b], the place of its tier in `captions.REALISED`.
    """

    def __init__(self, config: captioner.Config, dropout: float = 0.0):
        self.config, self.dropout = config, dropout
        self.networks = states.Networks(
            lambda rngs: {"captioner": captioner.Captioner(config, rngs=rngs)}
        )
        tiers = config.tiers
        self._index_of_tier = np.array(
            [tiers.index(name) if name in tiers else -1 for name in captions.REALISED]
        )
        self.metric_names = {"loss_tier": config.tiers}

    def draw(self, key, batch, share):
        del share
        name = "text_ids" if self.config.reads == "video" else "target_ids"
        hidden_bl = jax.random.uniform(key, batch[name].shape) < self.dropout
        return dict(batch) | {"hidden": sharding.reshard(hidden_bl, "batch", None)}

    def loss(self, modules, batch):
        if self.config.reads == "video":
            read = batch["video"].astype(jnp.float32) / 127.5 - 1
            ids_bl, tier_b = batch["text_ids"], batch["tier"]
        else:
            read, ids_bl = batch["text_ids"], batch["target_ids"]
            realised_bs = jax.nn.one_hot(batch["target_tier"], len(captions.REALISED))
            tier_b = jnp.sum(realised_bs * self._index_of_tier, -1).astype(jnp.int32)
        logits_blv = modules["captioner"](
            read, jnp.maximum(tier_b, 0), ids_bl, batch["hidden"]
        )
        # Products with one-hot rows, which shard where a gather does not.
        chosen_blv = jax.nn.one_hot(ids_bl, self.config.vocab_size)
        nats_bl = -jnp.sum(jax.nn.log_softmax(logits_blv) * chosen_blv, -1)
        there_bl = (ids_bl != captioner.PAD) & (tier_b >= 0)[:, None]
        there_bl = there_bl.astype(jnp.float32)
        right_bl = (jnp.argmax(logits_blv, -1) == ids_bl) * there_bl
        tokens = jnp.maximum(jnp.sum(there_bl), 1)
        of_tier_br = jax.nn.one_hot(tier_b, len(self.config.tiers))

        def by_tier(x_bl):
            return jnp.sum(jnp.sum(x_bl, 1)[:, None] * of_tier_br, 0)

        return (
            jnp.sum(nats_bl * there_bl),
            tokens,
            {
                "right": (jnp.sum(right_bl), tokens),
                "loss_tier": (by_tier(nats_bl * there_bl), by_tier(there_bl)),
            },
        )
