"""The generator: prompts, and what else is given, to videos.

    pipe = pipeline.Pipeline.from_pretrained("runs/toy")
    frames = pipe("a red circle moves left", seed=3).frames  # [b, t, h, w, c] in [0, 1]

A call goes through the stages check_inputs, encode_prompt, prepare_latents, denoise and
decode_latents, and takes the argument names of diffusers. Clips are computed in batches
of one fixed size, filled up where there are fewer: a clip depends on its own prompt and
seed, not on its company, and everything is compiled once.

Letters: b clips of a batch, t, h, w time, height and width (of latents or of video), c
channels, l text tokens, d text width.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

import sora_jax
from sora_jax.core import config as configs
from sora_jax.core import paths, rng, sharding
from sora_jax.data import tokenizer as tokenizers
from sora_jax.data import video_io
from sora_jax.diffusion import flow, guidance, known, samplers, timesteps
from sora_jax.generation import request as requests
from sora_jax.generation import tasks
from sora_jax.models import dit as dits
from sora_jax.models import text_encoder as text_encoders
from sora_jax.models import video_vae
from sora_jax.training import checkpoint, latents, objectives
from sora_jax.training import state as states


@dataclasses.dataclass(frozen=True)
class Output:
    """What a call returns.

    frames: float32 [b, t, h, w, c] in [0, 1]; with output_type "latent" the latents as
    the denoiser sees them. recipes: for each clip, all that is needed to make it again.
    """

    frames: np.ndarray
    recipes: tuple[dict, ...]


@functools.partial(jax.jit, static_argnames="shape")
def _draw_noise(keys_b: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One clip's noise for each key: the values do not depend on batch or mesh."""
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys_b)
    return sharding.reshard(noise, "batch", *(None,) * len(shape))


@functools.partial(jax.jit, static_argnames="graph")
def _encode_text(graph, state, ids_bl, mask_bl) -> jax.Array:
    return nnx.merge(graph, state)(ids_bl, mask_bl)


@functools.partial(jax.jit, static_argnames="graph")
def _encode_video(graph, state, video_bthwc) -> jax.Array:
    vae = nnx.merge(graph, state)
    mean_bthwc, _ = vae.encode(video_bthwc)
    return vae.normalize(mean_bthwc)


@functools.partial(jax.jit, static_argnames="graph")
def _decode_video(graph, state, latents_bthwc) -> jax.Array:
    vae = nnx.merge(graph, state)
    video_bthwc = vae.decode(vae.denormalize(latents_bthwc))
    return jnp.clip(video_bthwc.astype(jnp.float32) / 2 + 0.5, 0, 1)


@functools.partial(jax.jit, static_argnames=("graph", "sampler", "guided"))
def _denoise_chunk(
    graph, state, x_bthwc, taus, text, null, given, scale, fps, known_tau,
    *, sampler: str, guided: bool,
) -> jax.Array:  # fmt: skip
    """Runs some solver steps; `given` is (known_bthw, values_bthwc) or None."""
    dit = nnx.merge(graph, state)
    known_bthw, values_bthwc = (None, None) if given is None else given
    condition, empty = text | {"known": known_bthw}, null | {"known": known_bthw}

    def velocity(x, tau, condition):
        tau_b = sharding.reshard(jnp.full(x.shape[:1], tau), "batch")
        is_known, levels_bk = condition["known"], tau_b[:, None]
        if is_known is not None:
            levels_bk, _ = known.levels(tau_b, is_known, known_tau)
            is_known = is_known.astype(jnp.float32)
        return dit.apply_video(
            x, levels_bk, is_known, condition["states"], condition["mask"], fps
        )

    velocity = guidance.guided(velocity, condition, empty, scale if guided else 1)
    return samplers.sample_chunk(
        velocity, x_bthwc, taus, known_bthw, values_bthwc, sampler
    )


class Pipeline:
    """Text to video and image to video with one denoiser.

    Args:
      dit, text_encoder, vae: the networks, with their weights.
      tokenizer: turns prompts into ids for the text encoder.
      settings: what a call uses where it says nothing.
      source: what is known of the weights' origin, written into every recipe.

    Where a mesh is set (`jax.set_mesh`), the weights are laid out on it, the clips of a
    batch are split over it, and calls must be made under the same mesh.
    """

    def __init__(
        self,
        dit: dits.DiT,
        text_encoder: text_encoders.TextEncoder,
        vae: video_vae.VideoVAE,
        tokenizer: tokenizers.Tokenizer,
        settings: requests.Settings,
        source: Mapping | None = None,
    ):
        self.settings, self.tokenizer = settings, tokenizer
        self.source = dict(source or {})
        self._dit, self._text_encoder, self._vae = (
            _split(module) for module in (dit, text_encoder, vae)
        )
        self._vae_config, patch = vae.config, dit.config.patch
        stride = vae.config.spatial_stride
        self.strides = requests.Strides(
            time=vae.config.temporal_stride,
            patch_time=patch[0],
            height=stride * patch[1],
            width=stride * patch[2],
        )

    @classmethod
    def from_pretrained(cls, folder: str | pathlib.Path) -> "Pipeline":
        """Reads a run folder: its config, averaged weights, video VAE and tokenizer.

        Raises:
          FileNotFoundError, ValueError: the folder is not a finished denoiser's run.
        """
        return cls.from_run(checkpoint.load_run(folder))

    @classmethod
    def from_run(cls, run: checkpoint.LoadedRun) -> "Pipeline":
        """Makes the pipeline of a run; its parameters may be other than those saved."""
        config, folder = run.config, run.folder
        tokenizer = tokenizers.Tokenizer(folder / "tokenizer.model")
        vae = latents.load_vae(folder / "vae")
        networks = networks_of(config, tokenizer)
        sample = dict(config.sample) | {
            "text_length": config.text.length,
            "shift": config.noise.shift,
            "known_tau": config.known.known_tau,
        }
        return cls(
            **networks.bind(run.params),
            vae=vae.module(),
            tokenizer=tokenizer,
            settings=configs.build(requests.Settings, sample, "sample"),
            source={
                "model": folder.resolve().name,
                "step": run.step,
                "config_digest": configs.digest(config),
                "vae_digest": checkpoint.weights_digest(folder / "vae"),
            },
        )

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        image: np.ndarray | Sequence[np.ndarray] | None = None,
        output_type: str = "np",
        sampler: str | None = None,
        fps: float | None = None,
        batch_size: int | None = None,
        callback_on_step_end: Callable | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Output:
        """Makes videos. What is None is taken from `settings`.

        Args:
          prompt: what the video shows; one text or several.
          negative_prompt: what guidance moves away from; the empty text is what
            training drops captions to.
          height, width: pixels.
          num_frames: 1 + 4 n for a video VAE of time stride 4.
          num_inference_steps: steps of the solver.
          guidance_scale: 1 is none, and costs half.
          num_videos_per_prompt: clips of one prompt, neighbours in the result.
          seed: clip i of the call has seed + i; or one seed for each clip.
          image: the first frame, uint8 or float in [0, 1], [h, w, 3]; one for all
            prompts or one for each. It is scaled and cropped to the video's size.
          output_type: "np" or "latent".
          sampler: "euler" or "heun".
          fps: frames a second, which the denoiser is told where it counts seconds.
          batch_size: clips that are computed at a time.
          callback_on_step_end: called as (pipe, step, tau, {"latents": ...}) after every
            step of every batch, tau being the level that was reached; may return
            {"latents": ...} to go on from; an exception stops the call.
          progress: told how many clip steps have been done since it was last called.

        Raises:
          ValueError: an argument cannot be met; the message says what could be.
          FloatingPointError: the weights give numbers that are not finite.
        """
        request = self.check_inputs(
            prompt=prompt, negative_prompt=negative_prompt, height=height, width=width,
            num_frames=num_frames, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, seed=seed, image=image, sampler=sampler,
            num_videos_per_prompt=num_videos_per_prompt, output_type=output_type,
            fps=fps, batch_size=batch_size,
        )  # fmt: skip
        frames = []
        for rows in self._batches(request):
            text, null = self.encode_prompt(request, rows)
            noise_bthwc, given = self.prepare_latents(request, rows)
            latents_bthwc = self.denoise(
                request, rows, text, null, noise_bthwc, given,
                callback_on_step_end, progress,
            )  # fmt: skip
            if output_type == "np":
                latents_bthwc = self.decode_latents(latents_bthwc)
            frames.append(_to_host(latents_bthwc)[: len(set(rows))])
        joined = np.concatenate(frames)
        if not np.isfinite(joined).all():
            raise FloatingPointError(
                "the model's weights give numbers that are not finite"
            )
        recipes = tuple(self.recipe(request, index) for index in range(len(request)))
        return Output(joined, recipes)

    def check_inputs(self, **arguments) -> requests.Request:
        """Resolves and checks the arguments of a call, and computes nothing."""
        request = requests.check(self.settings, self.strides, **arguments)
        for prompts in (request.prompts, request.negative_prompts):
            requests.check_lengths(
                prompts,
                lambda text: len(self.tokenizer.pieces(text)),
                self.settings.text_length,
            )
        return request

    def encode_prompt(
        self, request: requests.Request, rows: Sequence[int]
    ) -> tuple[dict, dict]:
        """Encodes prompts and negative prompts: {"states": bld, "mask": bl} each."""

        def encode(texts: tuple[str, ...]) -> dict:
            ids_bl, mask_bl = self.tokenizer.encode(
                [texts[row] for row in rows], self.settings.text_length
            )
            ids_bl, mask_bl = _rows_to_device(ids_bl), _rows_to_device(mask_bl)
            states_bld = _encode_text(*self._text_encoder, ids_bl, mask_bl)
            return {"states": states_bld, "mask": mask_bl}

        return encode(request.prompts), encode(request.negative_prompts)

    def prepare_latents(
        self, request: requests.Request, rows: Sequence[int]
    ) -> tuple[jax.Array, tasks.Given | None]:
        """Draws every clip's noise from its own seed, and encodes what is given."""
        *grid, c = self._vae_config.latent_shape(
            request.num_frames, request.height, request.width
        )
        keys = jnp.stack([rng.key(request.seeds[row], "noise") for row in rows])
        noise_bthwc = _draw_noise(keys, (*grid, c))
        if request.images is None:
            return noise_bthwc, tasks.text_to_video()
        pictures = [
            tasks.fit_picture(request.images[row], request.height, request.width)
            for row in rows
        ]
        video_b1hwc = _rows_to_device(np.stack(pictures)[:, None])
        latents_b1hwc = _encode_video(*self._vae, video_b1hwc)
        return noise_bthwc, tasks.image_to_video(latents_b1hwc, tuple(grid))

    def denoise(
        self,
        request: requests.Request,
        rows: Sequence[int],
        text: dict,
        null: dict,
        noise_bthwc: jax.Array,
        given: tasks.Given | None,
        callback_on_step_end: Callable | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> jax.Array:
        """Solves from noise to clean latents, in compiled chunks of steps."""
        settings, steps = self.settings, request.num_inference_steps
        chunk = 1 if callback_on_step_end else settings.chunk_steps
        real = len(set(rows))
        taus = timesteps.schedule(steps, settings.shift)
        taus = np.append(taus, np.zeros(-steps % chunk, np.float32))
        held = None
        if given is not None:
            known_bthw = _rows_to_device(given.known_bthw)
            held = (
                known_bthw,
                flow.interpolate(given.latents_bthwc, noise_bthwc, settings.known_tau),
            )
        x_bthwc = noise_bthwc
        for start in range(0, steps, chunk):
            x_bthwc = _denoise_chunk(
                *self._dit, x_bthwc, taus[start : start + chunk + 1], text, null, held,
                np.float32(request.guidance_scale), np.float32(request.fps),
                np.float32(settings.known_tau), sampler=request.sampler,
                guided=request.guidance_scale != 1,
            )  # fmt: skip
            if callback_on_step_end:
                x_bthwc = self._call_back(
                    callback_on_step_end, start, float(taus[start + 1]), x_bthwc, real
                )
            if progress:
                jax.block_until_ready(x_bthwc)
                progress(real * min(chunk, steps - start))
        if given is not None:  # the given tokens themselves, without their slight noise
            x_bthwc = jnp.where(known_bthw[..., None], given.latents_bthwc, x_bthwc)
        return x_bthwc

    def _call_back(self, callback, step, tau, x_bthwc, real: int) -> jax.Array:
        shown = _to_host(x_bthwc)
        changed = (callback(self, step, tau, {"latents": shown[:real]}) or {}).get(
            "latents"
        )
        if changed is None:
            return x_bthwc
        changed = np.asarray(changed, np.float32)
        if changed.shape != shown[:real].shape:
            raise ValueError(
                f"callback_on_step_end returned latents of shape {changed.shape}, "
                f"not {shown[:real].shape}"
            )
        return _rows_to_device(np.concatenate([changed, shown[real:]]))

    def decode_latents(self, latents_bthwc: jax.Array) -> jax.Array:
        """Decodes to video, float32 [b, t, h, w, 3] in [0, 1]."""
        return _decode_video(*self._vae, latents_bthwc)

    def _batches(self, request: requests.Request) -> Iterator[list[int]]:
        """Yields rows of the request, the last one repeated to fill the batch."""
        mesh = jax.sharding.get_mesh()
        ways = 1
        if not mesh.empty:
            ways = math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])
        size = math.ceil(request.batch_size / ways) * ways
        for start in range(0, len(request), size):
            rows = list(range(start, min(start + size, len(request))))
            yield rows + rows[-1:] * (size - len(rows))

    def recipe(self, request: requests.Request, index: int) -> dict:
        """All that is needed to make one clip of a request again, as JSON holds it."""
        return request.recipe(index) | {
            "shift": self.settings.shift,
            "known_tau": self.settings.known_tau,
            **self.source,
            "versions": {"sora_jax": sora_jax.__version__, "jax": jax.__version__},
        }


def networks_of(config: Mapping, tokenizer: tokenizers.Tokenizer) -> states.Networks:
    """The networks {"dit", "text_encoder"} of a denoiser run's config."""
    return objectives.denoiser_networks(
        *objectives.denoiser_configs(config, tokenizer.vocab_size)
    )


def _split(module: nnx.Module):
    """A network as a static definition and arrays, the latter placed on the mesh."""
    graph, state = nnx.split(module)
    mesh = jax.sharding.get_mesh()

    def place(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        if mesh.empty:
            return variable.replace(jnp.asarray(value))
        axes = variable.get_metadata("axes")
        stacked = ("layers",) * (value.ndim - len(axes))
        layout = NamedSharding(mesh, sharding.partition(*stacked, *axes))
        return variable.replace(_to_device(value, layout))

    placed = jax.tree.map(
        place, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    return graph, placed


def _to_device(value, layout: NamedSharding) -> jax.Array:
    if isinstance(value, jax.Array):
        if jax.process_count() == 1 or not value.is_fully_addressable:
            return jax.device_put(value, layout)
        value = np.asarray(value)
    # Every process holds the whole value and gives its own devices their parts.
    return jax.make_array_from_callback(value.shape, layout, lambda part: value[part])


def _rows_to_device(x: np.ndarray) -> jax.Array:
    """A host array whose first axis is the clip, split over the mesh if there is one."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jnp.asarray(x)
    rest = (None,) * (x.ndim - 1)
    return _to_device(np.asarray(x), sharding.named(mesh, "batch", *rest))


def _to_host(x: jax.Array) -> np.ndarray:
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)


def save(frames_thwc: np.ndarray, path: str | pathlib.Path, recipe: Mapping) -> None:
    """Writes one clip as MP4, and its recipe inside and beside it (clip.mp4, .json).

    The recipe's file is written last, so where it stands the clip is whole.

    Args:
      frames_thwc: float in [0, 1].
      path: where to; ends in .mp4.
      recipe: from `Output.recipes`.
    """
    path = pathlib.Path(path)
    if path.suffix != ".mp4":
        raise ValueError(f"a clip is written as .mp4, not {path.name!r}")
    frames_u8 = np.round(np.clip(frames_thwc, 0, 1) * 255).astype(np.uint8)
    text = json.dumps(dict(recipe), sort_keys=True)
    video = video_io.encode_mp4(frames_u8, recipe["fps"], metadata={"comment": text})
    paths.write_atomically(path, video)
    sidecar = dict(recipe) | {"video_sha256": paths.sha256_file(path)}
    text = json.dumps(sidecar, indent=2, sort_keys=True) + "\n"
    paths.write_atomically(path.with_suffix(".json"), text)
