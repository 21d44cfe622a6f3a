"""The job of each objective: networks and loss, batches, and what it writes at the end.

A job is made from (config, run folder, mesh). It raises ValueError or FileNotFoundError
with one sentence where the recipe does not fit its inputs. What it needs of other runs
is copied into the run folder once.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from sora_jax.core import config as configs
from sora_jax.core import digests, sharding, trees
from sora_jax.core import mesh as meshes
from sora_jax.data import (
    captions,
    conditions,
    latent_cache,
    loader,
    packing,
    records,
    samples,
    shards,
    transforms,
)
from sora_jax.data import tokenizer as tokenizers
from sora_jax.models import captioner as captioners
from sora_jax.models import discriminator, lpips, video_vae
from sora_jax.training import (
    captioning,
    checkpoint,
    cost,
    encode_text,
    initial,
    objectives,
    optim,
    perceptual,
    pretrained,
    principal,
    reconstruction,
    run_folder,
    state_loss,
    trained_captioner,
    trained_vae,
)
from sora_jax.training import state as states

_CLIPS_TO_BEGIN_WITH = 512  # from which a video VAE's linear path is computed
_CLIPS_COUNTED = 10_000  # whose captions are counted, to see whether they are cut
_LPIPS = "lpips.safetensors"  # a run's copy
# The scale of the latents of the video VAE that a run with a fixed encoder began with.
_SCALE, _OF_SCALE = "latent_scale.json", ("latent_mean", "latent_std")


@dataclasses.dataclass(frozen=True)
class Job:
    """What one objective gives to the loop.

    batches: start step -> context manager and iterator. row_flops: of training on one
    row; 0 if unknown. initial, fixed: read the parameters that a new run starts from,
    and those of networks that are not trained (`loop.train`). finish: writes the run's
    result, given the averaged parameters. For evaluation: lpips, weights; latents and
    tokenizer, those of a denoiser.
    """

    objective: Any
    batches: Callable
    row_flops: float = 0.0
    initial: Callable[[], Mapping] = dict
    fixed: Callable[[], dict] = dict
    finish: Callable[[Mapping], None] | None = None
    lpips: perceptual.Weights | None = None
    latents: latent_cache.Latents | latent_cache.Joined | None = None
    tokenizer: tokenizers.Tokenizer | None = None


def _required(path: str, option: str, what: str) -> pathlib.Path:
    """The path that an option must name."""
    if not path:
        raise ValueError(f"--config.{option} is missing: it names {what}")
    return pathlib.Path(path)


def _check_sizes(mesh, c, sizes: Mapping[str, tuple[str, int]]) -> None:
    """Raises ValueError naming a size that does not divide over the mesh."""
    rows, parts = c.data.batch_size, c.loop.accumulation
    if rows % parts:
        raise ValueError(
            f"data.batch_size is {rows}, which does not divide into "
            f"loop.accumulation, {parts}, parts"
        )
    batch = {"data.batch_size": ("batch", rows // parts)}
    sharding.check_divisible(mesh, batch | dict(sizes))


def _text_encoder_sizes(config) -> dict[str, tuple[str, int]]:
    sizes = {
        f"model.text_encoder.{name}": size
        for name, size in config.sharded_sizes.items()
    }
    return {"model.dit.text_dim": ("embed", config.dim)} | sizes


def read_ahead(c, mesh, source, transform, start, num_steps, planner=None):
    """Opens the loader for this process's rows of steps start, start + 1, ...

    With a planner, rows are packed: it says which clips share a row.
    """
    part, parts = sharding.process_rows(mesh)
    if planner is not None:
        patch = tuple(c.model.dit.patch)
        return loader.Loader(
            packing.Batches(
                source, transform, planner, patch, start, num_steps, part, parts
            ),
            num_workers=c.data.num_workers,
            max_corrupt_share=c.data.max_corrupt_share,
        )
    return loader.make_loader(
        source,
        transform,
        seed=c.seed,
        batch_size=c.data.batch_size,
        start_step=start,
        num_steps=num_steps,
        process_index=part,
        process_count=parts,
        num_workers=c.data.num_workers,
        max_corrupt_share=c.data.max_corrupt_share,
    )


def text_encoder(c, folder: pathlib.Path, mesh) -> Job:
    """A text encoder, from the captions of a latent cache."""
    source = _latents(c)
    read = _sampler(c, source)
    write = captions.CaptionSampler({c.text.target: 1.0})
    write.check(source.manifest["captions"], "text.target")
    tiers = read.probabilities | write.probabilities
    tokenizer = _tokenizer(c, folder, source, tiers, read.variation)
    target_length = c.text.target_length
    if read.probabilities.keys() == write.probabilities.keys():
        # The same text again: what was cut off of it cannot be written.
        target_length = min(target_length, c.text.length)
    _warn_of_cut(source, read, tokenizer, c.text.length, "text.length")
    _warn_of_cut(source, write, tokenizer, target_length, "text.target_length")
    transform = transforms.TwoCaptions(
        transforms.Tokenize(read, tokenizer, c.text.length),
        transforms.Tokenize(write, tokenizer, target_length),
    )
    _, config = objectives.denoiser_configs(c, tokenizer.vocab_size)
    _check_sizes(mesh, c, _text_encoder_sizes(config))
    run_folder.keep_data(folder, "data.latents", source.digests)

    def batches(start):
        steps = c.loop.num_steps - start
        return read_ahead(c, mesh, source, transform, start, steps)

    def finish(params):
        whole = states.gather(params["text_encoder"])
        if jax.process_index() == 0:
            checkpoint.save_weights(folder / "text_encoder", whole, config)

    return Job(objectives.Rewriting(config), batches, finish=finish)


def _latents(c) -> latent_cache.Latents | latent_cache.Joined:
    what = "a folder of latents that prepare wrote"
    _required(c.data.latents, "data.latents", what)
    folders = map(str.strip, c.data.latents.split(","))
    parts = [latent_cache.open(folder) for folder in folders]
    if len(parts) == 1:
        return parts[0]
    if not c.packing.shapes:
        raise ValueError(
            f"data.latents names {len(parts)} folders: rows of several need packing.shapes"
        )
    return latent_cache.Joined(parts)


def _sampler(c, source) -> captions.CaptionSampler:
    """Draws and varies captions as the config says; refuses data that lacks them."""
    varied = captions.variation(c.text.tags, c.text.tag_keep, c.text.shuffle)
    sampler = captions.CaptionSampler(dict(c.text.tiers), varied)
    sampler.check(source.manifest["captions"], "text.tiers")
    sampler.check_scores(source.manifest.get("scores", {}))
    return sampler


def _tokenizer(
    c, folder, source, tiers, variation=captions.Variation()
) -> tokenizers.Tokenizer:
    """The run's tokenizer; a new one is trained on captions of those tiers, and tags."""
    spiece = folder / "tokenizer.model"
    exists = run_folder.is_claimed(folder) and spiece.is_file()
    if jax.process_index() == 0 and not exists:
        texts = itertools.chain(
            source.all_captions(tiers),
            (
                tag
                for index in range(len(source) if variation.tags else 0)
                for tag in variation.tags_of(source.entry(index).get("scores", {}))
            ),
        )
        if c.text.clean:
            texts = map(tokenizers.clean, texts)
        tokenizers.train(texts, spiece, c.text.vocab_size)
    meshes.barrier("tokenizer")
    return tokenizers.Tokenizer(spiece, c.text.clean)


def _warn_of_cut(source, sampler, tokenizer, length: int, option: str) -> None:
    """Warns of how many captions, with all tags, are cut, by a sample of the clips."""
    if jax.process_index():
        return
    tokens = [
        len(tokenizer.ids(captions.tagged(text, tags)))
        for index in samples.evenly(len(source), _CLIPS_COUNTED)
        for entry in [source.entry(index)]
        for tags in [sampler.variation.tags_of(entry.get("scores", {}))]
        for text in records.captions_of(entry["captions"], sampler.probabilities)
    ]
    captions.warn_of_cut(tokens, length, f"--config.{option}")


def denoiser(c, folder: pathlib.Path, mesh) -> Job:
    """A denoiser, from a latent cache."""
    source = _latents(c)
    rows = _Rows(c, source)
    sampler = _sampler(c, source)
    initialization = _begin(c, folder, source, sampler)
    tokenizer = initialization.tokenizer
    _warn_of_cut(source, sampler, tokenizer, c.text.length, "text.length")
    cached = encode_text.states_of_run(
        c, folder, source, initialization, sampler.probabilities
    )
    null_states = None
    if cached is not None:
        null_states = cached.padded(
            *(a[0] for a in tokenizer.encode([""], c.text.length))
        )
    objective = objectives.denoiser(
        c,
        tokenizer,
        fps=rows.fps,
        null_states=null_states,
        state_loss=_state_loss(c, not c.lora.rank, "adapters (LoRA)"),
    )
    dit_config = objective.dit_config
    shown = None
    if objective.state_loss:
        shown = transforms.Shown(dit_config.temporal_stride)
    transform = transforms.LatentsAndText(
        transforms.Tokenize(sampler, tokenizer, c.text.length),
        cached,
        shown,
        rows.given,
        dit_config.patch,
        dit_config.temporal_stride,
    )
    check_denoiser(mesh, c, objective, rows.tokens if rows.packed else ())
    planner = None
    if rows.packed:
        planner = rows.planner(cost.packed_row_cost(dit_config), transform)
    # Everything has been checked; from here on, files are copied into the run folder.
    run_folder.keep_data(folder, "data.latents", source.digests)
    if c.sample.fps is None:
        c.sample.fps = rows.usual_fps
    for file in pretrained.open_component(source.folder / "vae", "vae").files:
        run_folder.keep(folder, f"vae/{file.name}", file)
    initialization.keep()
    encode_text.keep_manifest(folder, cached)
    flops = 0.0  # packed rows differ in it
    if not rows.packed:
        flops = cost.dit_train_flops(
            dit_config, rows.tokens[0], c.text.length, adapted=c.lora.rank > 0
        )

    def batches(start):
        steps = c.loop.num_steps - start
        return read_ahead(c, mesh, source, transform, start, steps, planner)

    def fixed():
        text_config = objective.text_config if cached is None else None
        return initial.fixed(c, folder, dit_config, text_config)

    return Job(
        objective,
        batches,
        flops,
        initialization.params,
        fixed,
        latents=source,
        tokenizer=tokenizer,
    )


def _state_loss(c, can_have: bool, without: str) -> state_loss.Config | None:
    """The second task that the config asks for, where the run can have it."""
    config = configs.build(state_loss.Config, c.state_loss, "state_loss")
    if config.weight and not can_have and jax.process_index() == 0:
        print(
            f"train: state_loss is left out, which {without} do not have",
            file=sys.stderr,
        )
    return config if config.weight and can_have else None


def check_denoiser(mesh, c, objective: objectives.Denoiser, packed=()) -> None:
    """Checks that the networks, and packed rows of these lengths, divide over the mesh.

    The row of a single clip need not divide, since it is padded.

    Raises:
      ValueError: names what does not divide.
    """
    config = objective.dit_config
    _check_sizes(
        mesh,
        c,
        _text_encoder_sizes(objective.text_config)
        | {f"a row of {n} tokens": ("tokens", n) for n in packed}
        | {f"model.dit.{name}": size for name, size in config.sharded_sizes.items()}
        | {"model.dit.dim": ("embed", config.dim)},
    )


class _Rows:
    """The rows of a denoiser's run: one clip each, all of one size, or packed.

    Attributes:
      packed: whether several clips share a row.
      tokens: the lengths of rows.
      fps: of all clips, if rows are not packed.
      usual_fps: the most frequent one.
    """

    def __init__(self, c, source):
        self._c, self._source, patch = c, source, tuple(c.model.dit.patch)
        self.packed, self.fps = c.packing.shapes > 0, None
        entries, self._relations = [], {}
        for part in source.parts:  # clips are related within one
            own = [part.entry(index) for index in range(len(part))]
            self._relations |= conditions.related(own, len(entries))
            entries += own
        for place, more in self._relations.items():
            entries[place] = entries[place] | more
        if self.packed:
            shapes = [entry["shape"] for entry in entries]
            rates = collections.Counter(entry["fps"] for entry in entries)
            self.usual_fps = rates.most_common(1)[0][0]
        else:
            shapes, self.fps = [source.shape], source.fps
            self.usual_fps = self.fps
        for channels in {shape[-1] for shape in shapes} - {c.model.dit.in_channels}:
            raise ValueError(
                f"the latents of {c.data.latents} have {channels} channels, but "
                f"model.dit.in_channels is {c.model.dit.in_channels}"
            )
        try:
            self._lengths = [packing.tokens_of(shape, patch) for shape in shapes]
        except ValueError as error:
            raise ValueError(
                f"{c.data.latents}: {error}: choose another model.dit.patch, or prepare "
                "clips of another --size or, if it is native, of another --multiple_of"
            ) from None
        self.given = configs.build(conditions.Config, c.known, "known")
        self.given.check_source(entries, self.packed, patch)
        edits = [entry for entry in entries if entry.get("edit_of")]
        lost = sum("source" not in entry for entry in edits)
        is_asked = self.given.has(conditions.Pattern.EDIT)
        if lost and is_asked and jax.process_index() == 0:
            print(
                f"known: {lost} of {len(edits)} edits are trained without what they are "
                "edits of: no clip of the same latents has that id, size and frame rate",
                file=sys.stderr,
            )
        of_others = self.given.has(
            conditions.Pattern.REFERENCE, conditions.Pattern.EDIT
        )
        if of_others and not c.model.dit.context_embedding:
            raise ValueError(
                "known.probabilities.reference or edit is above 0, but the denoiser cannot "
                "tell what is given so from the rest: set model.dit.context_embedding=True"
            )
        self.tokens = self._lengths[:1]
        if self.packed:
            stride = c.model.dit.temporal_stride
            most = max(self.given.most_tokens(e, patch, stride) for e in entries)
            longest = c.packing.tokens or most
            if longest < most:
                raise ValueError(
                    f"packing.tokens is {longest}, but a clip with what is given may have "
                    f"{most} tokens"
                )
            self._shapes = packing.halved(
                longest, c.packing.shapes, unit=c.packing.unit, clips=c.packing.clips
            )
            self.tokens = [shape.tokens for shape in self._shapes]

    def planner(
        self, row_cost: packing.Cost, transform: transforms.LatentsAndText
    ) -> packing.Planner:
        """Plans packed rows and prints how well they are filled.

        Raises:
          ValueError: more of them is padding than the config allows.
        """
        packing_config, draw = self._c.packing, None
        if self.given.patterns != (conditions.Pattern.NONE,):
            draw = functools.partial(
                _condition_of, self._source, self._relations, transform
            )
        planner = packing.Planner(
            np.array(self._lengths),
            self._shapes,
            groups=self._c.data.batch_size,
            window=packing_config.window,
            seed=self._c.seed,
            cost=row_cost,
            draw=draw,
        )
        forecast = planner.forecast()
        if jax.process_index() == 0:
            shapes = ", ".join(f"{s.rows} x {s.tokens}" for s in self._shapes)
            print(
                f"packing: rows of {shapes} tokens a group; {forecast.clips} clips in "
                f"{forecast.steps} steps of {forecast.shapes} shapes, {forecast.padding:.2%} "
                f"padding, {forecast.imbalance:.2%} imbalance",
                file=sys.stderr,
            )
        if forecast.padding > packing_config.max_padding:
            raise ValueError(
                f"packed rows have {forecast.padding:.1%} padding, more than "
                f"packing.max_padding ({packing_config.max_padding:.1%}): longer rows "
                "(packing.tokens), other packing.shapes, more packing.clips or a larger "
                "packing.window may help"
            )
        return planner


def _condition_of(
    source, relations, transform: transforms.LatentsAndText, index: int, random
):
    """Draws the condition of a clip; a function that worker processes can be given."""
    return transform.draw(source.entry(index) | relations.get(index, {}), random)


def _begin(c, folder: pathlib.Path, source, sampler) -> initial.Initial:
    """The tokenizer, and the weights that a new run starts from."""
    if checkpoint.has_any(folder):  # the run has everything else
        tokenizer = tokenizers.load(folder, c.text.clean)
        return initial.Initial(tokenizer, folder / "text_encoder")
    if c.init:
        return initial.from_model(c, folder, source.folder / "vae")
    if c.lora.rank:
        raise ValueError(
            f"lora.rank is {c.lora.rank}, but there are no weights to adapt: name them "
            "with --init"
        )
    if c.text.encoder:
        return initial.from_text_encoder(c, folder)
    _check_rate(c)
    if c.text.frozen:
        raise ValueError(
            "text.frozen needs a trained text encoder: text.encoder or init"
        )
    tiers, variation = sampler.probabilities, sampler.variation
    return initial.Initial(_tokenizer(c, folder, source, tiers, variation))


def _check_rate(c) -> None:
    """Refuses to train a random text encoder at the learning rate of a trained one."""
    factors = configs.build(optim.Config, c.optim, "optim")
    if factors.factor("text_encoder.embedding.table") < 1:
        raise ValueError(
            "text.encoder names no trained text encoder, and a random one does not "
            "learn at the rate that optim.learning_rate_factors sets for it: give "
            "--config.text.encoder, or --config.optim.learning_rate_factors='()'"
        )


def vae(c, folder: pathlib.Path, mesh) -> Job:
    """A video VAE, from video shards."""
    what = "a folder of video shards that prepare wrote"
    clips = shards.open(_required(c.data.shards, "data.shards", what))
    _check_sizes(mesh, c, {})
    weights = configs.build(reconstruction.Weights, c.reconstruction, "reconstruction")
    stages = transforms.stages(c.data.crops, c.loop.num_steps)
    if c.loop.minutes and len(stages) > 1:
        raise ValueError(
            "data.crops has several stages, which are shares of loop.num_steps: leave "
            "loop.minutes at 0"
        )
    sizes = [
        transforms.window_size(crop, clips.manifest)
        for _, crops in stages
        for crop in crops
    ]
    lpips_weights = _lpips(c, folder, sizes) if weights.lpips_weights else None
    objective = reconstruction.Reconstruction(
        configs.build(video_vae.Config, c.model.vae, "model.vae"),
        weights,
        configs.build(
            discriminator.Config, c.model.discriminator, "model.discriminator"
        ),
        lpips_weights.config if lpips_weights else lpips.Config(),
        state_loss=_state_loss(
            c,
            all(crops == (transforms.Crop(),) for _, crops in stages),
            "windows smaller than a clip",
        ),
    )
    for size in sizes:
        _check_window(objective.config, size)
    shown, grid = None, objective.config.latent_shape(*sizes[0])[:3]
    if objective.state_loss:
        shown = transforms.Shown(objective.config.temporal_stride, causal=True)

    @contextlib.contextmanager
    def batches(start):
        def rows():
            for steps, crops in stages:
                first = max(start, steps.start)
                if first >= steps.stop:
                    continue
                transform = transforms.CropClips(crops, shown, grid)
                count = steps.stop - first
                with read_ahead(c, mesh, clips, transform, first, count) as rows:
                    yield from map(transforms.join_crops, rows)

        with contextlib.closing(rows()) as iterator:
            yield iterator

    init, scale, scaled = None, None, None
    if c.init and not checkpoint.has_any(folder):
        found = pretrained.open_component(trained_vae.component(c.init), "vae")
        scale = {name: getattr(found.config, name) for name in _OF_SCALE}
        init = found.fitted(dataclasses.replace(objective.config, **scale))
    if _encoder_is_fixed(c, objective):  # latents keep their scale
        if scale is None and not (folder / _SCALE).is_file():
            raise ValueError(
                "optim.learning_rate_factors keep the encoder as it is: name a video VAE "
                "with --init"
            )
        kept = json.loads(digests.read(folder / _SCALE)) if scale is None else scale
        scaled = dataclasses.replace(
            objective.config,
            **{n: kept[n] and tuple(kept[n]) for n in _OF_SCALE},
        )

    def begin():
        if init is not None:
            return {"vae": init.load()}
        if not objective.config.linear_channels:
            return {}
        sample = clips.read(samples.evenly(len(clips), _CLIPS_TO_BEGIN_WITH))
        videos = [c.frames() for c in sample if isinstance(c, records.ClipRecord)]
        return {"vae": {"linear": principal.linear_codec(videos, objective.config)}}

    ended = checkpoint.steps(folder)[-1:] == [c.loop.num_steps]

    def finish(params):
        if not ended or not (folder / "vae" / "config.json").is_file():
            trained_vae.gather_and_save(
                folder / "vae",
                params["vae"],
                scaled or objective.config,
                None if scaled else clips,
            )

    def fixed():
        return {perceptual.NAME: lpips_weights.load()} if weights.lpips else {}

    run_folder.keep_data(folder, "data.shards", [clips.manifest["digest"]])
    if scale and scaled and jax.process_index() == 0:
        digests.store(folder / _SCALE, json.dumps(scale))
    if lpips_weights:
        run_folder.keep(folder, _LPIPS, lpips_weights.file)
    return Job(
        objective,
        batches,
        initial=begin,
        fixed=fixed,
        finish=finish,
        lpips=lpips_weights,
    )


def _encoder_is_fixed(c, objective: reconstruction.Reconstruction) -> bool:
    """Whether the optimizer leaves all that makes latents as it is.

    Raises:
      ValueError: it leaves a part.
    """
    factors = configs.build(optim.Config, c.optim, "optim")
    if all(value for _, value in factors.learning_rate_factors):
        return False
    names = trees.flatten(objective.networks.abstract()["vae"])
    rates = {
        factors.factor(f"vae.{name}")
        for name in names
        if name.split(".")[0] in ("encoder", "quant_conv", "linear")
    }
    if 0 in rates and len(rates) > 1:
        raise ValueError(
            "optim.learning_rate_factors fix a part of what makes latents: fix encoder, "
            "quant_conv and linear, as in (('^vae.(encoder|quant_conv|linear)', 0.0),)"
        )
    return rates == {0}


def _lpips(c, folder: pathlib.Path, sizes) -> perceptual.Weights:
    """LPIPS's weights: the run's own copy, or for a new run the file that is named."""
    copy = folder / _LPIPS
    has_copy = run_folder.is_claimed(folder) and copy.is_file()
    weights = perceptual.open_weights(
        copy if has_copy else c.reconstruction.lpips_weights
    )
    for _, height, width in sizes:
        weights.config.check(height, width)
    return weights


def _check_window(config: video_vae.Config, size: tuple[int, int, int]) -> None:
    """Raises ValueError where the video VAE cannot take windows of this size."""
    try:
        config.latent_shape(*size)
    except ValueError as error:
        raise ValueError(f"data.crops: {error}") from None


def captioner(c, folder: pathlib.Path, mesh) -> Job:
    """A captioner, from video shards with captions."""
    what = "a folder of video shards that prepare wrote"
    clips = shards.open(_required(c.data.shards, "data.shards", what))
    sampler = captions.CaptionSampler(dict(c.text.tiers), _shuffling(c))
    sampler.check(clips.manifest["captions"], "text.tiers")
    # Its tokenizer is of all tiers, also those that a later stage learns.
    begun, tokenizer, config = _captioner_parts(
        c, folder, clips, c.model.captioner.tiers, "video"
    )
    if unknown := sampler.probabilities.keys() - set(config.tiers):
        raise ValueError(
            f"text.tiers gives weight to {sorted(unknown)}, which model.captioner.tiers "
            f"lacks: {', '.join(config.tiers)}"
        )
    _check_sizes(mesh, c, _captioner_sizes(config))
    _warn_of_cut(
        clips,
        sampler,
        tokenizer,
        config.length,
        "model.captioner.length",
    )
    transform = transforms.CaptionedClips(
        sampler,
        tokenizer,
        config.length,
        config.shape,
        config.tiers,
        c.data.mirror,
        c.data.shift,
        c.data.noise,
    )
    run_folder.keep_data(folder, "data.shards", [clips.manifest["digest"]])
    if begun:
        run_folder.keep(folder, "tokenizer.model", begun.file)

    def batches(start):
        return read_ahead(c, mesh, clips, transform, start, c.loop.num_steps - start)

    return Job(
        captioning.Captioning(config, c.text.dropout),
        batches,
        initial=lambda: {"captioner": begun.params} if begun else {},
        finish=functools.partial(_save_captioner, folder, config),
    )


def upsampler(c, folder: pathlib.Path, mesh) -> Job:
    """A captioner that reads captions of text.tiers and writes others of the same clip."""
    what = "a folder of video shards that prepare wrote"
    source = shards.open(_required(c.data.shards, "data.shards", what))
    read = captions.CaptionSampler(dict(c.text.tiers))
    write = captions.CaptionSampler(
        dict.fromkeys(c.model.captioner.tiers, 1.0), _shuffling(c)
    )
    read.check(source.manifest["captions"], "text.tiers")
    write.check(source.manifest["captions"], "model.captioner.tiers")
    tiers = read.probabilities | write.probabilities
    begun, tokenizer, config = _captioner_parts(c, folder, source, tiers, "text")
    _check_sizes(mesh, c, _captioner_sizes(config))
    for sampler, length, option in (
        (read, config.read_length, "model.captioner.read_length"),
        (write, config.length, "model.captioner.length"),
    ):
        _warn_of_cut(source, sampler, tokenizer, length, option)
    transform = transforms.TwoCaptions(
        transforms.Tokenize(read, tokenizer, config.read_length),
        transforms.Tokenize(write, tokenizer, config.length),
    )
    run_folder.keep_data(folder, "data.shards", [source.manifest["digest"]])
    if begun:
        run_folder.keep(folder, "tokenizer.model", begun.file)

    def batches(start):
        steps = c.loop.num_steps - start
        return read_ahead(c, mesh, source, transform, start, steps)

    return Job(
        captioning.Captioning(config, c.text.dropout),
        batches,
        initial=lambda: {"captioner": begun.params} if begun else {},
        finish=functools.partial(_save_captioner, folder, config),
    )


def _shuffling(c) -> captions.Variation:
    """How a captioner's target varies.

    Raises:
      ValueError: the config has tags, which it would have to guess.
    """
    if c.text.tags:
        raise ValueError(
            f"text.tags is given, but objective {c.objective!r} writes no tags: leave it ()"
        )
    return captions.Variation(shuffle=c.text.shuffle)


def _captioner_parts(
    c, folder: pathlib.Path, clips: shards.Shards, tiers, reads: str
) -> tuple[
    trained_captioner.LoadedCaptioner | None, tokenizers.Tokenizer, captioners.Config
]:
    """What a captioner begins with, if `init` names it; its tokenizer and its config.

    Raises:
      ValueError: the config's captioner reads something else than `reads`, or differs
        from that of `init`.
    """
    begun = None
    if c.init and not checkpoint.has_any(folder):
        begun = trained_captioner.load(c.init, reads)
        tokenizer = tokenizers.load(begun.file, c.text.clean)
    else:
        tokenizer = _tokenizer(c, folder, clips, tiers)
    sizes = dict(c.model.captioner) | {"vocab_size": tokenizer.vocab_size}
    config = configs.build(captioners.Config, sizes, "model.captioner")
    if config.reads != reads:
        raise ValueError(
            f"model.captioner.reads is {config.reads!r}; objective {c.objective!r} trains "
            f"one that reads {reads!r}"
        )
    if begun and (differ := pretrained.difference(begun.config, config)):
        raise ValueError(
            f"the captioner of {c.init} differs from the config's: {'; '.join(differ)}"
        )
    return begun, tokenizer, config


def _captioner_sizes(config: captioners.Config) -> dict[str, tuple[str, int]]:
    """What a mesh shards of a captioner, by option."""
    sizes = {f"model.captioner.{n}": size for n, size in config.sharded_sizes.items()}
    return sizes | {"model.captioner.dim": ("embed", config.dim)}


def _save_captioner(folder: pathlib.Path, config: captioners.Config, params) -> None:
    whole = states.gather(params["captioner"])
    if jax.process_index() == 0:
        file = folder / "tokenizer.model"
        trained_captioner.save(folder / "captioner", whole, config, file)


JOBS = {
    "denoiser": denoiser,
    "vae": vae,
    "text_encoder": text_encoder,
    "captioner": captioner,
    "upsampler": upsampler,
}
