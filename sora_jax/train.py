"""Trains what the config names: the denoiser or the video VAE.

    python -m sora_jax.train --config=configs/toy.py --workdir=runs/toy \\
        --config.data.latents=runs/latents

The same command again goes on where the run was. SIGTERM saves and exits with code 75.
"""

import contextlib
import json
import pathlib
import shutil
import sys

import jax
from absl import app, flags, logging
from jax.experimental import multihost_utils
from ml_collections import config_flags

from sora_jax.core import config as configs
from sora_jax.core import environment, paths, sharding
from sora_jax.core import mesh as meshes
from sora_jax.data import captions, loader, shards, tokenizer, transforms
from sora_jax.data import latents as cache
from sora_jax.models import video_vae
from sora_jax.training import cost, latents, loop, objectives, optim

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "the recipe", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "the run folder")
_PROFILE = flags.DEFINE_list("profile", [], "first and last step to trace: 20,25")


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


def denoiser(c, folder: pathlib.Path, mesh):
    """Returns objective, batches and training FLOPs a row of a denoiser's run."""
    source = cache.open_latents(c.data.latents)
    t, h, w, channels = source.shape
    if channels != c.model.dit.in_channels:
        raise ValueError(
            f"the latents of {c.data.latents} have {channels} channels, but "
            f"model.dit.in_channels is {c.model.dit.in_channels}"
        )
    sampler = captions.CaptionSampler(dict(c.text.tiers))
    sampler.check(source.manifest["captions"])
    spiece = folder / "tokenizer.model"
    if jax.process_index() == 0:
        if not spiece.is_file():
            texts = source.all_captions(sampler.probabilities)
            tokenizer.train(texts, spiece, c.text.vocab_size)
        shutil.copytree(
            pathlib.Path(c.data.latents) / "vae", folder / "vae", dirs_exist_ok=True
        )
    _barrier("tokenizer")
    pieces = tokenizer.Tokenizer(spiece)
    objective = objectives.denoiser(c, pieces, source.fps)
    dit_config = objective.dit_config
    transform = transforms.Tokenize(sampler, pieces, c.text.length)
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

    return objective, batches, flops


def vae(c, folder: pathlib.Path, mesh):
    """Returns objective, batches and (unknown) FLOPs of a video VAE's run."""
    del folder
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

    return objective, batches, 0.0


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def main(arguments):
    if len(arguments) > 1:
        raise app.UsageError(f"unknown argument {arguments[1]!r}")
    logging.set_verbosity(logging.WARNING)
    meshes.initialize()
    c, folder = _CONFIG.value, pathlib.Path(_WORKDIR.value)
    jobs = {"denoiser": denoiser, "vae": vae}
    try:
        if c.objective not in jobs:
            raise ValueError(f"objective {c.objective!r}; there are {[*jobs]}")
        mesh = meshes.make_mesh(dict(c.mesh))
        jax.set_mesh(mesh)
        loop.check_config(folder, c)
        _barrier("config")
        if jax.process_index() == 0:
            text = json.dumps(environment.describe(), indent=2)
            paths.write_atomically(folder / "env.json", text + "\n")
        objective, batches, flops = jobs[c.objective](c, folder, mesh)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"train: {error}")
    try:
        state = loop.train(
            configs.build(loop.Config, c.loop, "loop"),
            configs.build(optim.Config, c.optim, "optim"),
            objective,
            batches,
            seed=c.seed,
            folder=folder,
            mesh=mesh,
            row_flops=flops,
            peak_flops=cost.matmul_peak() * mesh.size if flops else 0.0,
            profile=range(*map(int, _PROFILE.value)) if _PROFILE.value else None,
        )
    except loop.Preempted as stop:
        print(f"train: {stop}", file=sys.stderr)
        sys.exit(loop.PREEMPTED_EXIT_CODE)
    except FloatingPointError as error:
        sys.exit(f"train: {error}")
    if c.objective == "vae" and not (folder / "vae" / "config.json").is_file():
        clips = shards.open(c.data.shards)
        latents.finish(folder / "vae", state.ema["vae"], objective.config, clips)
        _barrier("vae")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    flags.register_validator(
        "profile",
        lambda steps: not steps or len(steps) == 2 and all(s.isdigit() for s in steps),
        "two step numbers, such as 20,25",
    )
    app.run(main)
