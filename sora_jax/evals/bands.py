"""At which noise levels does a model follow its text? Oracle accuracy by noise band.

Ground truth clips are noised to the middle of each band and finished from there with
their caption. In the low bands the input shows what the caption says, so the accuracy is
the decoder's; where it falls, the model does not take from the text what the input no
longer shows.

Letters: n clips, t, h, w latent time, height and width, c channels, l text tokens.
"""

from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.core import rng
from sora_jax.data import tokenizer as tokenizers
from sora_jax.diffusion import flow, samplers, timesteps
from sora_jax.evals import rows, toyworld
from sora_jax.training import latents
from sora_jax.training import state as states


class BandOracle:
    """An evaluator of a denoiser's parameters, for training and for `evaluate` alike.

    Args:
      networks: {"dit", "text_encoder"}.
      vae: the video VAE of the latents.
      tokenizer: of the run.
      tier: the toy world's tier.
      text_length: tokens a caption is cut or padded to.
      fps: frames a second of the clips.
      shift: of training and sampling; spaces the solver's steps.
      edges: noise levels between the bands.
      sizes: suite -> number of clips.
      num_steps: Euler steps from the noised clip to the finished one.
      seed: seed of prompts and noise.
    """

    def __init__(
        self,
        networks: states.Networks,
        vae: latents.LoadedVAE,
        tokenizer: tokenizers.Tokenizer,
        *,
        tier: str,
        text_length: int,
        fps: float,
        shift: float,
        edges: Sequence[float] = timesteps.BAND_EDGES,
        sizes: Mapping[str, int] | None = None,
        num_steps: int = 4,
        seed: int = 0,
    ):
        self._vae, self._shift, self._num_steps = vae, shift, num_steps
        self._suites = toyworld.make_suites(
            sizes or {"motion": 48, "relation": 32},
            tier=tier,
            exclude_texts=[],
            seed=seed,
        )
        drawn = {
            s.name: rows.matching_scenes(s, tier=tier, seed=2) for s in self._suites
        }
        video_nthwc = np.concatenate(list(rows.render_scenes(drawn).values()))
        texts = [text for suite in self._suites for text in suite.texts]
        ids_nl, mask_nl = tokenizer.encode(texts, text_length)
        module = vae.module()
        mean_nthwc, _ = jax.jit(lambda video: vae.module().encode(video))(
            video_nthwc.astype(np.float32) / 127.5 - 1
        )
        self._x0 = module.normalize(mean_nthwc)
        self._noise = jax.random.normal(rng.key(seed, "bands"), self._x0.shape)
        self._edges, self._names = edges, timesteps.band_names(edges)

        def finish(params, steps, x0_nthwc, noise_nthwc):
            modules = networks.bind(params)
            text = modules["text_encoder"](ids_nl, mask_nl)

            def velocity(x, tau):
                levels = jnp.full((len(x), 1), tau)
                return modules["dit"].apply_video(x, levels, None, text, mask_nl, fps)

            x_nthwc = flow.interpolate(x0_nthwc, noise_nthwc, steps["tau"][0])
            return samplers.sample_chunk(velocity, x_nthwc, (), steps)[0]

        self._finish = jax.jit(finish)
        self._decode = jax.jit(
            lambda x: vae.module().decode(vae.module().denormalize(x)) / 2 + 0.5
        )

    def run(self, params: states.Params) -> Iterator[tuple[str, float]]:
        """Yields ("motion direction/0.85-0.93", share of right clips) and so on."""
        for name, low, high in zip(
            self._names, self._edges[:-1], self._edges[1:], strict=True
        ):
            start = timesteps.unshift((low + high) / 2, self._shift)
            even = start * np.linspace(1, 0, self._num_steps + 1)
            taus = timesteps.shift(even, self._shift).astype(np.float32)
            steps = samplers.plan(samplers.Sampler.EULER, taus)
            finished = self._finish(params, steps, self._x0, self._noise)
            frames = rows.to_uint8(np.asarray(self._decode(finished), np.float32))
            begin = 0
            for suite in self._suites:
                clips = frames[begin : begin + len(suite)]
                begin += len(suite)
                shares = toyworld.summarize(toyworld.verdicts(suite, clips))
                for part, share in shares.items():
                    yield f"{suite.name} {part}/{name}", share.value
