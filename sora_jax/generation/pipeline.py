"""The pipeline: generates videos from prompts, and from an image.

    pipe = pipeline.Pipeline.from_pretrained("runs/toy")
    out = pipe("a red circle moves left", seed=3)
    out.frames  # [b, t, h, w, c] in [0, 1]
    out.export_to_video("clip.mp4")

A call runs the stages check_inputs, encode_prompt, prepare_latents, denoise and
decode_latents; its arguments have the names of diffusers. Clips are computed in batches
of one fixed size, padded if there are fewer, so that a clip depends on its own prompt and
seed only, and everything is compiled once.

Letters: b clips of a batch, t, h, w time, height and width (of latents or of video), c
channels, l text tokens, d text width.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import sora_jax
from sora_jax.core import paths, rng
from sora_jax.data import tokenizer as tokenizers
from sora_jax.diffusion import flow, samplers, step_cache
from sora_jax.generation import (
    cache_calibration,
    compiled,
    export,
    placement,
    plans,
    recipes,
    runs,
    tasks,
    wan,
)
from sora_jax.generation import request as requests
from sora_jax.models import dit as dits
from sora_jax.models import text_encoder as text_encoders
from sora_jax.models import video_vae
from sora_jax.training import checkpoint, lora_files, pretrained, trained_vae


@dataclasses.dataclass(frozen=True)
class Output:
    """What a call returns.

    Attributes:
      frames: float32 [b, t, h, w, c] in [0, 1]; with output_type "latent" the normalised
        latents, [b, t, h, w, c] too.
      recipes: for each clip, all that is needed to make it again.
    """

    frames: np.ndarray
    recipes: tuple[dict, ...]

    def export_to_video(self, path: str | pathlib.Path, index: int = 0) -> None:
        """Writes one clip with its recipe inside and beside it; see `recipes.save`."""
        if self.frames.shape[-1] != 3:
            raise ValueError(
                f"frames of {self.frames.shape[-1]} channels are latents, not a video"
            )
        recipes.save(self.frames[index], path, self.recipes[index])


class Pipeline:
    """Text to video and image to video, with one denoiser or two experts.

    Args:
      dit, text_encoder, vae: the networks with their weights; the text encoder may be the
        files that it is read from.
      tokenizer: turns prompts into ids for the text encoder.
      settings: the defaults of a call.
      source: the origin of the weights, written into every recipe.
      dit_2: the expert for noise levels below `settings.boundary`, of the same sizes.
      keep_text_encoder: whether it stays on the device. Otherwise it is read from its
        files for the prompts of each call, and freed before the first step.
      calibration: of the step cache, or its file, which is read when needed.

    If a mesh is set (`jax.set_mesh`), the weights and the clips of a batch are sharded
    over it, and calls must be made under the same mesh.
    """

    def __init__(
        self,
        dit: dits.DiT,
        text_encoder: text_encoders.TextEncoder | pretrained.Component,
        vae: video_vae.VideoVAE,
        tokenizer: tokenizers.Tokenizer,
        settings: requests.Settings,
        source: Mapping | None = None,
        dit_2: dits.DiT | None = None,
        keep_text_encoder: bool = True,
        calibration: cache_calibration.Calibration | pathlib.Path | None = None,
    ):
        if (dit_2 is None) != (settings.boundary is None):
            raise ValueError("a second expert and settings.boundary go together")
        self.settings, self.tokenizer = settings, tokenizer
        self.source, self.calibration = dict(source or {}), calibration
        self._dit, self._vae = placement.split(dit), placement.split(vae)
        self._dit_2 = None if dit_2 is None else placement.split(dit_2)
        self._text_files, self._text_encoder = None, None
        if isinstance(text_encoder, pretrained.Component):
            self._text_files = text_encoder
        if self._text_files is None or keep_text_encoder:
            self._text_encoder = self._read_text_encoder(text_encoder)
        self._vae_config, self._dit_config = vae.config, dit.config
        self.strides = requests.strides_of(vae.config, dit.config)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | pathlib.Path,
        dtype: str | None = None,
        keep_text_encoder: bool = True,
        *,
        lora: str | pathlib.Path | None = None,
        lora_2: str | pathlib.Path | None = None,
        strict: bool = False,
    ) -> "Pipeline":
        """Loads a run, or a folder in diffusers' layout.

        Args:
          folder: "toy", the model that is shipped; a denoiser's run, whose EMA weights
            are loaded; or Wan 2.1 or 2.2 text to video as diffusers stores it (`training/pretrained.py`).
          dtype: of the weights and the computation of imported networks, except for the
            video VAE, which uses float32; None: float32 on CPU, else bfloat16. The dtype
            of a run is in its config.
          keep_text_encoder: see `Pipeline`; one that the run trained is always kept.
          lora: file in diffusers' layout whose adapters are merged into the denoiser.
          lora_2: the same for the second expert.
          strict: raise an error for unknown fields in imported configs, not a warning.

        Raises:
          FileNotFoundError, ValueError: it is neither, or it is damaged.
        """
        folder = paths.model(folder)
        if pretrained.is_folder(folder):
            parts = wan.parts(pretrained.open_folder(folder, strict=strict), dtype)
        elif dtype is not None:
            raise ValueError(
                f"dtype {dtype} is given, but {folder} is a run, whose dtype is in its "
                "config"
            )
        else:
            parts = runs.parts(runs.load(folder), strict=strict)
        for name, expert, file in (("lora", "dit", lora), ("lora_2", "dit_2", lora_2)):
            if file is None:
                continue
            if expert not in parts:
                raise ValueError(f"{name} is for a second expert, which {folder} lacks")
            parts[expert] = lora_files.merged(file, parts[expert])
            parts["source"] |= {name: lora_files.digest(file)}
        return cls(**parts, keep_text_encoder=keep_text_encoder)

    @classmethod
    def from_run(cls, run: checkpoint.LoadedRun) -> "Pipeline":
        """Makes the pipeline of a loaded run, whose parameters may have been changed."""
        return cls(**runs.parts(run))

    @staticmethod
    def _read_text_encoder(source: text_encoders.TextEncoder | pretrained.Component):
        is_read = isinstance(source, nnx.Module)
        return placement.split(source if is_read else source.module())

    def with_expert(self, other: "Pipeline", boundary: float) -> "Pipeline":
        """This pipeline with the denoiser of another for noise levels below `boundary`.

        Raises:
          ValueError: the two pipelines differ in sizes, or one has two experts already.
        """
        first, second = nnx.merge(*self._dit), nnx.merge(*other._dit)
        if self._dit_2 or other._dit_2:
            raise ValueError("each expert must be a single denoiser")
        if differ := pretrained.difference(first.config, second.config):
            raise ValueError(f"the experts differ in {'; '.join(differ)}")
        if (
            pretrained.difference(self._vae_config, other._vae_config)
            or self.tokenizer.digest != other.tokenizer.digest
        ):
            raise ValueError("the experts have different video VAEs or tokenizers")
        if not 0 < boundary < 1:
            raise ValueError(f"boundary is a noise level in (0, 1), not {boundary}")
        for pipe, wanted in ((self, (boundary, 1.0)), (other, (0.0, boundary))):
            if pipe.settings.trained_levels not in (wanted, (0.0, 1.0)):
                raise ValueError(
                    f"{pipe.source.get('model')} was trained on the levels "
                    f"{pipe.settings.trained_levels}, not on {wanted}"
                )
        settings = dataclasses.replace(
            self.settings, boundary=boundary, trained_levels=(0.0, 1.0)
        )
        text = self._text_files or nnx.merge(*self._text_encoder)
        source = self.source | {"expert_2": other.source}
        return Pipeline(
            first,
            text,
            nnx.merge(*self._vae),
            self.tokenizer,
            settings,
            source,
            second,
            keep_text_encoder=self._text_encoder is not None,
        )

    def save_pretrained(self, folder: str | pathlib.Path, card: export.Card) -> None:
        """Writes a folder in diffusers' layout, with a model card; see `export`.

        Raises:
          ValueError: diffusers cannot express this model; the message says what.
        """
        requests.check_whole(self.settings)
        parts = {"transformer": self._dit, "vae": self._vae}
        if self._dit_2 is not None:
            parts["transformer_2"] = self._dit_2
        networks = {name: nnx.merge(*part) for name, part in parts.items()}
        networks["text_encoder"] = self._text_files or nnx.merge(*self._text_encoder)
        export.write(folder, networks, self.tokenizer, self.settings, self.source, card)

    def __call__(
        self,
        prompt: str | requests.Upsampled | Sequence[str | requests.Upsampled],
        *,
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        guidance_rescale: float | None = None,
        shift: float | None = None,
        num_videos_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        image: np.ndarray | Sequence[np.ndarray] | None = None,
        latents: np.ndarray | None = None,
        output_type: str = "np",
        sampler: str | None = None,
        fps: float | None = None,
        batch_size: int | None = None,
        step_cache: float | None = None,
        callback_on_step_end: Callable | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Output:
        """Generates videos. An argument that is None is taken from `settings`.

        Args:
          prompt: description of the video; one or several. `prompt_upsampler` rewrites
            short ones; the recipe then has the original too.
          negative_prompt: what guidance moves away from. The default is the null text of
            training. It has no effect without guidance.
          height, width: in pixels.
          num_frames: 1 + 4 n for a video VAE with a time stride of 4.
          num_inference_steps: steps of the solver.
          guidance_scale: weight of the prompt; 1 is no guidance, at half the cost.
          guidance_scale_2: of the second of two experts; default: guidance_scale if that
            is given.
          guidance_rescale: share, in [0, 1], by which the standard deviation of a guided
            velocity is moved to that without guidance; 0 is off.
          shift: of the noise levels towards noise.
          num_videos_per_prompt: clips per prompt, adjacent in the result.
          seed: in [0, 2^64); clip i of the call has seed + i. Or one seed for each clip.
            -1 is a random one, which is written into the recipe.
          image: the first frame, uint8 or float in [0, 1], [h, w, 3]; one for all
            prompts or one for each. It is scaled and cropped to the video's size.
          latents: the initial noise of each clip, in diffusers' order [b, c, t, h, w];
            seeds then have no effect.
          output_type: "np" or "latent".
          sampler: "euler", "heun" or "unipc".
          fps: frames per second; a denoiser with a time_scale is conditioned on it.
          batch_size: clips computed at a time.
          step_cache: error up to which evaluations of the denoiser are skipped and reuse
            the last residual of its blocks, such as 0.1; 0 is off. It needs a calibration.
          callback_on_step_end: called as (pipe, step, tau, {"latents": ...}) after every
            step of every batch, where tau is the noise level that was reached. It may
            change the latents in place, or return new {"latents": ...}; known tokens are
            not changed. Changed latents restart the solver and the step cache: UniPC's
            next step is of first order. An exception stops the call.
          progress: called with the number of clip steps since its last call.

        Raises:
          ValueError: an argument is wrong; the message says what would be right.
          FloatingPointError: the weights give numbers that are not finite.
        """
        # All but these three are arguments of the request.
        arguments = locals().copy()
        for name in ("self", "callback_on_step_end", "progress"):
            del arguments[name]
        request = self.check_inputs(**arguments)
        frames, batches = [], [*self.batches(request)]
        with self._with_text_encoder():
            encoded = [self.encode_prompt(request, rows) for rows in batches]
        for rows, (text, null) in zip(batches, encoded, strict=True):
            noise_bthwc, known = self.prepare_latents(request, rows)
            latents_bthwc = self.denoise(
                request,
                rows,
                text,
                null,
                noise_bthwc,
                known,
                callback_on_step_end,
                progress,
            )
            if output_type == "np":
                latents_bthwc = self.decode_latents(latents_bthwc)
            frames.append(placement.to_host(latents_bthwc)[: len(set(rows))])
        joined = np.concatenate(frames)
        if not np.isfinite(joined).all():
            raise FloatingPointError(
                "the model's weights give numbers that are not finite"
            )
        written = tuple(self.recipe(request, index) for index in range(len(request)))
        return Output(joined, written)

    def check_inputs(self, **arguments) -> requests.Request:
        """Resolves and checks the arguments of a call, without computing anything."""
        request = requests.check(self.settings, self.strides, **arguments)
        requests.check_lengths(
            request,
            lambda text: len(self.tokenizer.ids(text)),
            self.settings.text_length,
        )
        if request.step_cache:
            self.calibration = cache_calibration.read(self.calibration)
            self.calibration.check(request, self.source)
        if request.latents is not None:
            *grid, c = self._vae_config.latent_shape(
                request.num_frames, request.height, request.width
            )
            wanted = (len(request), c, *grid)
            if np.shape(request.latents) != wanted:
                raise ValueError(
                    f"latents have shape {np.shape(request.latents)}; for these clips "
                    f"it is [b, c, t, h, w] = {wanted}"
                )
        return request

    def encode_prompt(
        self, request: requests.Request, rows: Sequence[int]
    ) -> tuple[dict, dict]:
        """Encodes prompts and negative prompts: {"states": bld, "mask": bl} each."""

        def encode(texts: tuple[str, ...]) -> dict:
            texts = [texts[row] for row in rows]
            ids_bl, mask_bl = self.tokenizer.encode(texts, self.settings.text_length)
            ids_bl, mask_bl = map(placement.rows_to_device, (ids_bl, mask_bl))
            states_bld = compiled.encode_text(*self._text_encoder, ids_bl, mask_bl)
            return {"states": states_bld, "mask": mask_bl}

        with self._with_text_encoder():
            return encode(request.prompts), encode(request.negative_prompts)

    @contextlib.contextmanager
    def _with_text_encoder(self):
        """Loads the text encoder if it is not kept, and frees it afterwards."""
        if self._text_encoder is not None:
            yield
            return
        self._text_encoder = self._read_text_encoder(self._text_files)
        try:
            yield
        finally:
            self._text_encoder = None

    def prepare_latents(
        self, request: requests.Request, rows: Sequence[int]
    ) -> tuple[jax.Array, tasks.KnownTokens | None]:
        """Draws each clip's noise from its seed, and encodes the image, if any."""
        *grid, c = self._vae_config.latent_shape(
            request.num_frames, request.height, request.width
        )
        if request.latents is not None:
            noise_bcthw = np.asarray(request.latents, np.float32)[list(rows)]
            noise_bthwc = placement.rows_to_device(noise_bcthw.transpose(0, 2, 3, 4, 1))
        else:
            keys = jnp.stack([rng.key(request.seeds[row], "noise") for row in rows])
            noise_bthwc = compiled.draw_noise(keys, (*grid, c))
        if request.images is None:
            return noise_bthwc, tasks.text_to_video()
        images = [
            tasks.fit_image(request.images[row], request.height, request.width)
            for row in rows
        ]
        video_b1hwc = placement.rows_to_device(np.stack(images)[:, None])
        latents_b1hwc = compiled.encode_video(*self._vae, video_b1hwc)
        return noise_bthwc, tasks.image_to_video(latents_b1hwc, tuple(grid))

    def denoise(
        self,
        request: requests.Request,
        rows: Sequence[int],
        text: dict,
        null: dict,
        noise_bthwc: jax.Array,
        known: tasks.KnownTokens | None,
        callback_on_step_end: Callable | None = None,
        progress: Callable[[int], None] | None = None,
        record: Callable[[int, dict], None] | None = None,
    ) -> jax.Array:
        """Solves from noise to clean latents, in compiled chunks of steps.

        Args:
          rows: the clips of the batch; the other arguments are those of a call, and the
            results of the stages before.
          record: called after each expert's steps with the number of guidance branches
            and the cache of `compiled.start_cache`, to calibrate the step cache.
        """
        settings, steps = self.settings, request.num_inference_steps
        size, padded = plans.sizes(request)
        if size < padded:  # guidance pairs divide over the devices, clips do not
            text, null, noise_bthwc, known = placement.first_rows(
                (text, null, noise_bthwc, known), size
            )
        chunk = 1 if callback_on_step_end else settings.chunk_steps
        real, done = len(set(rows)), 0
        fixed = None
        if known is not None:
            known_bthw = placement.rows_to_device(known.known_bthw)
            fixed = (
                known_bthw,
                flow.interpolate(known.latents_bthwc, noise_bthwc, settings.known_tau),
            )
        x_bthwc = noise_bthwc
        memory = samplers.init_memory(x_bthwc, request.sampler)
        stages = self._stages(request)
        parts = [part for *_, part in stages]
        for stage, (network, scale, part) in enumerate(stages):
            cache, slots, branches, rescale = None, 0, 1 + (scale != 1), None
            if request.guidance_rescale:
                rescale = np.float32(request.guidance_rescale)
            if record:
                slots = int(samplers.evaluation_mask(request.sampler, part).sum())
                part |= step_cache.measurement_rows(request.sampler, part, branches)
            if record or request.step_cache:  # of this expert's own blocks
                cache = compiled.start_cache(
                    self._dit_config, branches * len(x_bthwc), x_bthwc.shape[1:4], slots
                )
            for first in range(0, len(part["tau"]), chunk):
                plan = samplers.chunk(parts[stage], first, chunk)
                x_bthwc, memory, cache = compiled.denoise_chunk(
                    *network,
                    x_bthwc,
                    memory,
                    plan,
                    text,
                    null,
                    fixed,
                    np.float32(scale),
                    np.float32(request.fps),
                    np.float32(settings.known_tau),
                    sampler=request.sampler,
                    guided=scale != 1,
                    cache=cache,
                    rescale=rescale,
                )
                if callback_on_step_end:
                    tau = float(plan["next"][0])
                    call = functools.partial(callback_on_step_end, self, done, tau)
                    edited = placement.edited(call, x_bthwc, real)
                    if edited is not None:
                        x_bthwc = edited
                        memory = samplers.init_memory(x_bthwc, request.sampler)
                        parts = plans.restart(request.sampler, parts, done + 1)
                step = min(chunk, steps - done)
                done += step
                if progress:
                    jax.block_until_ready(x_bthwc)
                    progress(real * step)
            if record:
                record(branches, cache)
        if known is not None:  # the known tokens themselves, without their slight noise
            x_bthwc = jnp.where(known_bthw[..., None], known.latents_bthwc, x_bthwc)
        return x_bthwc if size == padded else placement.fill_rows(x_bthwc, padded)

    def _stages(self, request: requests.Request) -> list[tuple]:
        """(network, guidance scale, plan of its steps) for each expert."""
        found = plans.plans(request, self.settings, self.calibration)
        scales = request.guidance_scale, request.guidance_scale_2
        return [*zip((self._dit, self._dit_2), scales, found, strict=False)]

    def decode_latents(self, latents_bthwc: jax.Array) -> jax.Array | np.ndarray:
        """Decodes to video, float32 [b, t, h, w, 3] in [0, 1]; large ones in chunks."""
        b, t, h, w, _ = latents_bthwc.shape
        stride = self._vae_config.spatial_stride
        voxels = b * h * w * stride**2 * (1 + self.strides.time * (t - 1))
        if voxels <= trained_vae.VOXELS_AT_ONCE:
            return compiled.decode_video(*self._vae, latents_bthwc)
        return np.concatenate([*self.decode_stream(latents_bthwc)], axis=1)

    def decode_stream(self, latents) -> Iterator[np.ndarray]:
        """Yields the video of latents in chunks of frames, float32 in [0, 1].

        The memory of the device depends on the chunk, not on the length, so a minute of
        video can be written to a file while it is decoded.

        Args:
          latents: as `output_type="latent"` returns them, or an iterable of such parts.
        """
        vae = nnx.merge(*self._vae)
        parts = (latents,) if hasattr(latents, "shape") else latents
        raw = (np.asarray(vae.denormalize(placement.to_host(x))) for x in parts)
        for video_bthwc in vae.decode_stream(raw):
            yield np.clip(placement.to_host(video_bthwc) / 2 + 0.5, 0, 1)

    def batches(self, request: requests.Request) -> Iterator[list[int]]:
        """Yields the clips of each batch; the last clip is repeated to fill it."""
        size, padded = plans.sizes(request)
        for start in range(0, len(request), size):
            rows = list(range(start, min(start + size, len(request))))
            yield rows + rows[-1:] * (padded - len(rows))

    def recipe(self, request: requests.Request, index: int) -> dict:
        """All that is needed to make one clip of a request again, as JSON values."""
        return request.recipe(index) | {
            "known_tau": self.settings.known_tau,
            **(
                {"step_cache_digest": self.calibration.digest()}
                if request.step_cache
                else {}
            ),
            **self.source,
            "versions": {"sora_jax": sora_jax.__version__, "jax": jax.__version__},
        }
