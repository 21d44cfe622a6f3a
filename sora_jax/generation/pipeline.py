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
from sora_jax.core import paths
from sora_jax.data import tokenizer as tokenizers
from sora_jax.diffusion import samplers, step_cache
from sora_jax.generation import (
    cache_calibration,
    compiled,
    export,
    placement,
    plans,
    recipes,
    runs,
    task_files,
    tasks,
    wan,
    windows,
)
from sora_jax.generation import given as givens
from sora_jax.generation import request as requests
from sora_jax.models import dit as dits
from sora_jax.models import rows as row_types
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


def _guided(
    row, less: Sequence, scale: float, given_scale: float = 1.0
) -> tuple[tuple, tuple]:
    """The branches of guidance and their weights; see `guidance.guided`.

    Args:
      row: with the text and what is given.
      less: without the text, and perhaps without either.
      scale: of the text.
      given_scale: of what is given.
    """
    if len(less) == 2:
        weights = np.float32(scale), np.float32(given_scale - scale)
        return (row, *less), weights
    if scale == 1:
        return (row,), ()
    return (row, *less), (np.float32(scale),)


def _rescale(request: requests.Request) -> np.float32 | None:
    """The share of guidance's rescaling; None where it is off."""
    share = request.guidance_rescale
    return np.float32(share) if share else None


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
            self.settings,
            boundary=boundary,
            trained_levels=(0.0, 1.0),
            trained_patterns=tuple(
                name
                for name in self.settings.trained_patterns
                if name in other.settings.trained_patterns
            ),
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
        given_scale: float | None = None,
        anchor_tau: float | None = None,
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
          given_scale: weight of what is given besides the prompt, such as the image; 1 is
            no guidance by it. Others take a third branch (arXiv 2211.09800, section 3.2).
          anchor_tau: noise level of what is given at the first step. Over the first tenth
            of the steps it falls to that of training. A picture that is sharp from the
            first step on may stay still; 0 is off.
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
            noise_bthwc, given = self.prepare_latents(request, rows)
            latents_bthwc = self.denoise(
                request,
                rows,
                text,
                null,
                noise_bthwc,
                given,
                callback_on_step_end,
                progress,
            )
            if output_type == "np":
                latents_bthwc = self.decode_latents(latents_bthwc)
            frames.append(placement.to_host(latents_bthwc)[: len(set(rows))])
        joined = np.concatenate(frames)
        placement.check_finite(joined)
        written = tuple(self.recipe(request, index) for index in range(len(request)))
        return Output(joined, written)

    def run(
        self,
        task: str,
        prompt: str | requests.Upsampled | Sequence[str | requests.Upsampled],
        *,
        progress: Callable[[int], None] | None = None,
        **arguments,
    ) -> Output:
        """Makes or edits videos in one of the ways of `tasks.TASKS`.

            pipe.run("extend", "a red circle moves left", video=frames, frames=8)

        Args:
          task: its name.
          prompt: as of a call.
          progress: as of a call.
          **arguments: the task's own inputs, and arguments of a call but image, latents
            and output_type. Videos are uint8 [t, h, w, 3], images [h, w, 3]. The size is
            that of the video, where there is one; it is scaled and cropped to another
            `height` and `width`. `fps` is its frame rate; default: the model's.

        Returns:
          The videos; what was given of them is in them as it was.

        Raises:
          ValueError: an input is wrong, or the denoiser was not trained for the task.
          FloatingPointError: as a call.
        """
        request, inputs, _ = self.check_task(task, prompt, **arguments)
        frames, batches = [], [*self.batches(request)]
        with self._with_text_encoder():
            encoded = [self.encode_prompt(request, rows) for rows in batches]
            if inputs.get("source"):  # batches are of one size
                inputs["source"] = self._encode_texts(
                    [inputs["source"]] * len(batches[0])
                )
        for rows, (text, null) in zip(batches, encoded, strict=True):
            make = windows.Windows(self, request, rows, text, null, progress)
            made = tasks.find(task).make(make, **inputs)
            frames.append(made[: len(set(rows))].astype(np.float32) / 255)
        of_task = self.task_recipe(task, **arguments)
        written = tuple(
            self.recipe(request, index) | of_task for index in range(len(request))
        )
        return Output(np.concatenate(frames), written)

    def check_task(
        self, task: str, prompt, **arguments
    ) -> tuple[requests.Request, dict, int]:
        """Resolves and checks a task's inputs: the request, the inputs, its windows."""
        kind = tasks.find(task)
        taken = {*kind.inputs, *kind.options}
        given = {n: x for n, x in arguments.items() if n in taken and x is not None}
        rest = {n: x for n, x in arguments.items() if n not in taken and x is not None}
        allowed = {*requests.SHARED, *requests.OF_CLIPS}
        if unknown := sorted(rest.keys() - allowed):
            raise ValueError(f"{unknown[0]} has no meaning for task {task!r}")
        videos = {n: tasks.pixels(given[n], n) for n in kind.inputs if n in given}
        tasks.check_mask(videos)
        names = ("num_frames", "height", "width", "fps")
        asked = {name: rest[name] for name in names if name in rest}
        size = {name: getattr(self.settings, name) for name in names} | asked
        first = videos.get("video")
        if kind.fits and first is not None and not asked.keys() & {"height", "width"}:
            size |= {"height": first.shape[1], "width": first.shape[2]}
        if kind.fixed:  # the task says it
            size["num_frames"] = 1
        sizes = size["num_frames"], size["height"], size["width"]
        requests.check_size(*sizes, self.strides)
        if kind.fits:
            videos = {n: tasks.fitted(x, *sizes[1:]) for n, x in videos.items()}
        found, size, count = tasks.check(
            task,
            given | videos,
            tasks.Size(**size),
            self.strides.time,
            self.settings.trained_patterns,
        )
        if kind.fixed and asked.get("num_frames", size.num_frames) != size.num_frames:
            raise ValueError(
                f"num_frames is {asked['num_frames']}, but what task {task!r} is given "
                f"makes windows of {size.num_frames}: leave it out"
            )
        trained = self.settings.trained_patterns
        is_given = bool(kind.needs(found, count)) or kind.may_give in trained
        request = self.check_inputs(
            prompt=prompt, is_given=is_given, **rest | dataclasses.asdict(size)
        )
        if request.step_cache:
            raise ValueError(
                "step_cache is for videos from text or an image, not tasks"
            )
        if found.get("source"):
            (found["source"],) = requests.checked_texts(
                found["source"], "source", False
            )
            self._check_lengths(
                dataclasses.replace(
                    request, prompts=(found["source"],), upsampled=(None,)
                )
            )
        return request, found, count

    @staticmethod
    def task_recipe(task: str, **arguments) -> dict:
        """The fields of a recipe that a task adds: digests stand for videos."""
        kind, inputs = tasks.find(task), {}
        for name in (*kind.inputs, *kind.options):
            value = arguments.get(name, kind.options.get(name))
            if name in kind.inputs:
                value = {"sha256": task_files.digest(value, name)}
            elif value is not None and not isinstance(value, str):
                value = np.asarray(value).tolist()  # what JSON can hold
            inputs[name] = value
        if arguments.get("fps") is not None:  # that of a video that was given
            inputs["fps"] = float(arguments["fps"])
        return {"task": task, "inputs": inputs}

    def check_inputs(self, **arguments) -> requests.Request:
        """Resolves and checks the arguments of a call, without computing anything."""
        request = requests.check(self.settings, self.strides, **arguments)
        self._check_lengths(request)
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

    def _check_lengths(self, request: requests.Request) -> None:
        requests.check_lengths(
            request,
            lambda text: len(self.tokenizer.ids(text)),
            self.settings.text_length,
        )

    def encode_prompt(
        self, request: requests.Request, rows: Sequence[int]
    ) -> tuple[dict, dict]:
        """Encodes prompts and negative prompts: {"states": bld, "mask": bl} each."""

        with self._with_text_encoder():
            return tuple(
                self._encode_texts([texts[row] for row in rows])
                for texts in (request.prompts, request.negative_prompts)
            )

    def _encode_texts(self, texts: Sequence[str]) -> dict:
        ids_bl, mask_bl = self.tokenizer.encode(texts, self.settings.text_length)
        ids_bl, mask_bl = map(placement.rows_to_device, (ids_bl, mask_bl))
        states_bld = compiled.encode_text(*self._text_encoder, ids_bl, mask_bl)
        return {"states": states_bld, "mask": mask_bl}

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
    ) -> tuple[jax.Array, givens.Given]:
        """Draws each clip's noise from its seed, and encodes the image, if any."""
        *grid, c = self.latent_shape(request.num_frames, request.height, request.width)
        if request.latents is not None:
            noise_bcthw = np.asarray(request.latents, np.float32)[list(rows)]
            noise_bthwc = placement.rows_to_device(noise_bcthw.transpose(0, 2, 3, 4, 1))
        else:
            noise_bthwc = compiled.draw_noise(request.keys(rows, "noise"), (*grid, c))
        if request.images is None:
            return noise_bthwc, givens.Given()
        images = [
            givens.fit_image(request.images[row], request.height, request.width)
            for row in rows
        ]
        latents_b1hwc = self.encode(np.stack(images)[:, None])
        return noise_bthwc, givens.image_to_video(latents_b1hwc, tuple(grid))

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """The latents [t, h, w, c] of a video of this size."""
        return self._vae_config.latent_shape(num_frames, height, width)

    @property
    def vae_strides(self) -> tuple[int, int]:
        """Pixels of a latent along a side, and frames of all but the first."""
        return self._vae_config.spatial_stride, self._vae_config.temporal_stride

    def encode(self, video_bthwc: np.ndarray) -> jax.Array:
        """The normalised latents of videos in [-1, 1]."""
        rows = placement.rows_to_device(np.asarray(video_bthwc, np.float32))
        return compiled.encode_video(*self._vae, rows)

    def denoise(
        self,
        request: requests.Request,
        rows: Sequence[int],
        text: dict,
        null: dict,
        noise_bthwc: jax.Array,
        given: givens.Given = givens.Given(),
        callback_on_step_end: Callable | None = None,
        progress: Callable[[int], None] | None = None,
        record: Callable[[int, dict], None] | None = None,
        latents_bthwc: jax.Array | None = None,
        first: float = 1.0,
        is_rolled: bool = False,
    ) -> jax.Array:
        """Solves from noise to clean latents, in compiled chunks of steps.

        Args:
          rows: the clips of the batch; the other arguments are those of a call, and the
            results of the stages before.
          record: called after each expert's steps with the number of guidance branches
            and the cache of `compiled.start_cache`, to calibrate the step cache.
          latents_bthwc: clean latents to start from, noised to the first level, instead of
            noise.
          first: the highest noise level.
          is_rolled: whether latents are rolled at every step, so that the first comes after
            the last.
        """
        stages = self._stages(request, first)
        size, padded = plans.sizes(request)
        beside_noises = tuple(
            compiled.draw_noise(
                request.keys(rows, "picture noise", *[number] * (number > 0)),
                one.latents_bthwc.shape[1:],
            )
            for number, one in enumerate(given.beside)
        )
        if size < padded:  # guidance pairs divide over the devices, clips do not
            text, null, noise_bthwc, beside_noises, latents_bthwc = (
                placement.first_rows(
                    (text, null, noise_bthwc, beside_noises, latents_bthwc), size
                )
            )
            given = given.of_clips(lambda arrays: placement.first_rows(arrays, size))
        chunk = 1 if callback_on_step_end else self.settings.chunk_steps
        real, done = len(set(rows)), 0

        taus = np.concatenate([part["tau"] for *_, part in stages])

        def start_of(condition: dict, known_tau: float) -> row_types.Rows:
            return compiled.start_rows(
                self._dit_config,
                noise_bthwc,
                condition,
                np.float32(request.fps),
                np.float32(known_tau),
                given,
                beside_noises,
                latents_bthwc,
                np.float32(taus[0]),
            )

        # Of each branch of guidance: the text, and the level of what is given in the end
        # and at the first step.
        known_tau, anchor_tau = self.settings.known_tau, request.anchor_tau
        kinds = [(text, known_tau, anchor_tau), (null, known_tau, anchor_tau)]
        if given.is_seen and request.given_scale != 1:
            kinds.append((null, 1.0, 1.0))
        start, *less = (start_of(condition, level) for condition, level, _ in kinds)
        anchors, until = (), taus[max(1, len(taus) // 10) :][:1]
        if given.is_seen and anchor_tau and len(until):
            anchors = tuple(start_of(condition, level) for condition, _, level in kinds)
        grid, x_bnc = noise_bthwc.shape[1:4], start.tokens_bnc
        path = None
        if given.known_bthw is not None and given.blended:
            path = compiled.path_of(self._dit_config, given, noise_bthwc)
        memory = samplers.init_memory(x_bnc, request.sampler)
        parts = [part for *_, part in stages]
        for stage, (network, scale, part) in enumerate(stages):
            branches, weights = _guided(start, less, scale, request.given_scale)
            anchor = None
            if anchors:
                anchor = compiled.Anchor(anchors[: len(branches)], until[0])
            cache, slots = None, 0
            if record:
                slots = int(samplers.evaluation_mask(request.sampler, part).sum())
                part |= step_cache.measurement_rows(
                    request.sampler, part, len(branches)
                )
            if record or request.step_cache:  # of this expert's own blocks
                cache = compiled.start_cache(
                    self._dit_config, len(branches) * len(x_bnc), x_bnc.shape[1], slots
                )
            for place in range(0, len(part["tau"]), chunk):
                plan = samplers.chunk(parts[stage], place, chunk)
                x_bnc, memory, cache = compiled.denoise_chunk(
                    *network,
                    x_bnc,
                    memory,
                    plan,
                    branches,
                    weights,
                    sampler=request.sampler,
                    cache=cache,
                    rescale=_rescale(request),
                    anchor=anchor,
                    path=path,
                    circle_frames=grid[0] if is_rolled else None,
                    done=np.int32(done),
                )
                if callback_on_step_end:
                    tau = float(plan["next"][0])
                    call = functools.partial(callback_on_step_end, self, done, tau)
                    shown = compiled.to_video(self._dit_config, x_bnc, grid)
                    edited = placement.edited(call, shown, real)
                    if edited is not None:
                        x_bnc = compiled.of_video(self._dit_config, start, edited)
                        memory = samplers.init_memory(x_bnc, request.sampler)
                        parts = plans.restart(request.sampler, parts, done + 1)
                step = min(chunk, len(part["tau"]) - place)
                done += step
                if progress:
                    jax.block_until_ready(x_bnc)
                    progress(real * step)
            if record:
                record(len(branches), cache)
        x_bthwc = compiled.to_video(self._dit_config, x_bnc, grid)
        if given.known_bthw is not None:  # themselves, without their slight noise
            known_bthw = given.known_bthw[..., None]
            x_bthwc = jnp.where(known_bthw, given.latents_bthwc, x_bthwc)
        return x_bthwc if size == padded else placement.fill_rows(x_bthwc, padded)

    def flow_edit(
        self,
        request: requests.Request,
        rows: Sequence[int],
        text: dict,
        null: dict,
        latents_bthwc: jax.Array,
        source: dict,
        source_guidance_scale: float,
        first: float,
        progress: Callable[[int], None] | None = None,
    ) -> jax.Array:
        """Turns latents from one text to another; see `compiled.edit_chunk`.

        Args:
          rows, text, null, progress: as of `denoise`.
          latents_bthwc: of the video.
          source: the encoded text that describes it.
          source_guidance_scale: of that text.
          first: the noise level at which the change begins.
        """
        size, padded = plans.sizes(request)
        keys = request.keys(rows, "edit noise")
        if size < padded:
            text, null, source, latents_bthwc, keys = placement.first_rows(
                (text, null, source, latents_bthwc, keys), size
            )
        level, fps = np.float32(0), np.float32(request.fps)
        new, old, none = (
            compiled.start_rows(self._dit_config, latents_bthwc, what, fps, level)
            for what in (text, source, null)
        )

        grid, source_bnc = latents_bthwc.shape[1:4], new.tokens_bnc
        z_bnc = source_bnc
        memory = samplers.init_memory(z_bnc, request.sampler)
        for network, scale, part in self._stages(request, first):
            for plan in samplers.chunks(part, self.settings.chunk_steps):
                z_bnc, memory = compiled.edit_chunk(
                    *network,
                    z_bnc,
                    memory,
                    plan,
                    source_bnc,
                    keys,
                    *_guided(new, [none], scale),
                    *_guided(old, [none], source_guidance_scale),
                    sampler=request.sampler,
                    rescale=_rescale(request),
                )
                if progress:
                    jax.block_until_ready(z_bnc)
                    progress(len(set(rows)) * int(np.sum(plan["tau"] > plan["next"])))
        edited = compiled.to_video(self._dit_config, z_bnc, grid)
        return edited if size == padded else placement.fill_rows(edited, padded)

    def _stages(self, request: requests.Request, first: float = 1.0) -> list[tuple]:
        """(network, guidance scale, plan of its steps) for each expert."""
        found = plans.plans(request, self.settings, self.calibration, first)
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
