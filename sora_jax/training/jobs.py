"""What each objective brings to the loop: networks and loss, batches, and its product.

A job is made from (config, run folder, mesh) and raises ValueError or FileNotFoundError
with one sentence where the recipe does not fit what it is given.
"""

import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from sora_jax.core import config as configs
from sora_jax.core import paths, sharding
from sora_jax.data import captions, loader, shards, tokenizer, transforms
from sora_jax.data import latents as cache
from sora_jax.models import video_vae
from sora_jax.training import checkpoint, cost, latents, objectives
from sora_jax.training import state as states


@dataclasses.dataclass(frozen=True)
class Job:
    """What one objective brings to the loop.

    batches: start step -> context manager and iterator. row_flops: of training on one
    row; 0 where not known. initial: parameters by network, in place of random ones.
    finish: writes what the run is for, given the state's averaged parameters.
    """

    objective: Any
    batches: Callable
    row_flops: float = 0.0
    initial: Mapping | None = None
    finish: Callable[[Mapping], None] | None = None


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def read_ahead(c, source, transform, start, num_steps):
    """Opens the loader for this process's rows of steps start, start + 1, ..."""
    return loader.make_loader(
        source,
        transform,
        seed=c.seed,
        batch_size=c.data.batch_size,
        start_step=start,
        num_steps=num_steps,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_workers=c.data.num_workers,
        max_corrupt_share=c.data.max_corrupt_share,
    )


def text_encoder(c, folder: pathlib.Path, mesh) -> Job:
    """A text encoder, from the captions of a latent cache."""
    source = cache.open_latents(c.data.latents)
    read = captions.CaptionSampler(dict(c.text.tiers))
    write = captions.CaptionSampler({c.text.target: 1.0})
    for sampler in (read, write):
        sampler.check(source.manifest["captions"])
    pieces = _tokenizer(
        folder, source, read.probabilities | write.probabilities, c.text.vocab_size
    )
    transform = transforms.TwoCaptions(
        transforms.Tokenize(read, pieces, c.text.length),
        transforms.Tokenize(write, pieces, c.text.target_length),
    )
    _, config = objectives.denoiser_configs(c, pieces.vocab_size)
    sharding.check_divisible(mesh, {"data.batch_size": ("batch", c.data.batch_size)})

    def batches(start):
        return read_ahead(c, source, transform, start, c.loop.num_steps - start)

    def finish(params):
        whole = states.gather(params["text_encoder"])
        if jax.process_index() == 0:
            checkpoint.save_weights(folder / "text_encoder", whole, config)

    return Job(objectives.Rewriting(config), batches, finish=finish)


def _tokenizer(folder, source, tiers, vocab_size: int) -> tokenizer.Tokenizer:
    """The run's tokenizer, trained on the captions of those tiers where it is new."""
    spiece = folder / "tokenizer.model"
    if jax.process_index() == 0 and not spiece.is_file():
        tokenizer.train(source.all_captions(tiers), spiece, vocab_size)
    barrier("tokenizer")
    return tokenizer.Tokenizer(spiece)


def _trained_text_encoder(c, folder: pathlib.Path):
    """The tokenizer and the parameters of another run's text encoder."""
    given = pathlib.Path(c.text.encoder)
    flat, fields = checkpoint.load_weights(given / "text_encoder")
    spiece = (given / "tokenizer.model").read_bytes()
    if jax.process_index() == 0:
        paths.write_atomically(folder / "tokenizer.model", spiece)
    barrier("tokenizer")
    pieces = tokenizer.Tokenizer(folder / "tokenizer.model")
    dit_config, wanted = objectives.denoiser_configs(c, pieces.vocab_size)
    found = configs.build(type(wanted), fields, f"{given}/text_encoder/config.json")
    if found != wanted:
        differ = configs.difference(
            dataclasses.asdict(found), dataclasses.asdict(wanted)
        )
        raise ValueError(
            f"the text encoder of {given} is another than model.text_encoder: "
            + "; ".join(differ)
        )
    networks = objectives.denoiser_networks(dit_config, wanted)
    like = networks.abstract()["text_encoder"]
    return pieces, {"text_encoder": checkpoint.unflatten(flat, like, str(given))}


def denoiser(c, folder: pathlib.Path, mesh) -> Job:
    """A denoiser, from a latent cache."""
    source = cache.open_latents(c.data.latents)
    t, h, w, channels = source.shape
    if channels != c.model.dit.in_channels:
        raise ValueError(
            f"the latents of {c.data.latents} have {channels} channels, but "
            f"model.dit.in_channels is {c.model.dit.in_channels}"
        )
    sampler = captions.CaptionSampler(dict(c.text.tiers))
    sampler.check(source.manifest["captions"])
    if jax.process_index() == 0:
        shutil.copytree(
            pathlib.Path(c.data.latents) / "vae", folder / "vae", dirs_exist_ok=True
        )
    if c.text.encoder:
        pieces, initial = _trained_text_encoder(c, folder)
    else:
        tiers = sampler.probabilities
        pieces = _tokenizer(folder, source, tiers, c.text.vocab_size)
        initial = None
    objective = objectives.denoiser(c, pieces, source.fps)
    dit_config = objective.dit_config
    transform = transforms.LatentsAndText(
        transforms.Tokenize(sampler, pieces, c.text.length)
    )
    pt, ph, pw = dit_config.patch
    tokens = (t // pt) * (h // ph) * (w // pw)
    sharding.check_divisible(
        mesh,
        {
            "data.batch_size": ("batch", c.data.batch_size // c.loop.accumulation),
            "the number of tokens": ("tokens", tokens),
            "model.dit.num_heads": ("heads", dit_config.num_heads),
            "model.dit.mlp_dim": ("mlp", dit_config.mlp_dim),
            "model.dit.dim": ("embed", dit_config.dim),
        },
    )
    flops = 3 * cost.dit_forward_flops(dit_config, tokens, c.text.length)

    def batches(start):
        steps = c.loop.num_steps - start
        return read_ahead(c, source, transform, start, steps)

    return Job(objective, batches, flops, initial)


def vae(c, folder: pathlib.Path, mesh) -> Job:
    """A video VAE, from video shards."""
    clips = shards.open(c.data.shards)
    sharding.check_divisible(mesh, {"data.batch_size": ("batch", c.data.batch_size)})
    objective = objectives.Reconstruction(
        configs.build(video_vae.Config, c.model.vae, "model.vae"),
        configs.build(
            objectives.ReconstructionWeights, c.reconstruction, "reconstruction"
        ),
    )
    stages = transforms.stages(c.data.crops, c.loop.num_steps)

    @contextlib.contextmanager
    def batches(start):
        def rows():
            for steps, crop in stages:
                first = max(start, steps.start)
                if first >= steps.stop:
                    continue
                transform = transforms.CropClips(crop)
                with read_ahead(c, clips, transform, first, steps.stop - first) as rows:
                    yield from map(transforms.join_crops, rows)

        with contextlib.closing(rows()) as iterator:
            yield iterator

    def finish(params):
        if not (folder / "vae" / "config.json").is_file():
            latents.finish(folder / "vae", params["vae"], objective.config, clips)

    return Job(objective, batches, finish=finish)


JOBS = {"denoiser": denoiser, "vae": vae, "text_encoder": text_encoder}
