"""Trains what the config names: denoiser, video VAE, text encoder, captioner, upsampler.

    python -m sora_jax.train --config=configs/toy.py --out=runs/toy \\
        --config.data.latents=runs/latents

    python -m sora_jax.train --config=configs/wan_1_3b.py --out=runs/tuned \\
        --config.data.latents=runs/latents --init Wan2.1-T2V-1.3B-Diffusers

The same command resumes the run. On SIGTERM, and on Ctrl-C in a run of one process, the
state is saved and the exit code is 75. The state is also saved before each evaluation. A
failing evaluation is reported and the run continues; at the last step the exit code is
then 1. configs/base.py lists the fields of the config.
"""

import json
import pathlib
import sys

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from sora_jax.core import config as configs
from sora_jax.core import digests, job, paths, versions
from sora_jax.core import mesh as meshes
from sora_jax.data import loader, records, samples, shards
from sora_jax.evals.metrics import reconstruction
from sora_jax.evals.prompts import loss_gap, sample_sheet
from sora_jax.generation import runs
from sora_jax.models import video_vae
from sora_jax.training import (
    checkpoint,
    cost,
    evaluation,
    initial,
    jobs,
    loop,
    recipe,
    run_folder,
    stopping,
)
from sora_jax.training import trackers as run_trackers

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe.", lock_config=True)
_OUT = flags.DEFINE_string("out", None, "Run folder.")
_INIT = flags.DEFINE_string(
    "init",
    None,
    "Initial weights: toy, which is shipped, a run, or a folder in diffusers' layout.",
)
_MESH = flags.DEFINE_string("mesh", None, f"{job.MESH} Default: config.mesh.")
_STRICT = flags.DEFINE_bool(
    "strict", False, "Fail on unknown fields in imported configs."
)
_TENSORBOARD = flags.DEFINE_bool(
    "tensorboard", False, "Also write metrics and sample videos to RUN/tensorboard."
)
_WANDB = flags.DEFINE_string(
    "wandb", None, "Project of Weights & Biases to log metrics and sample videos to."
)
_PROFILE = flags.DEFINE_list("profile", [], "First and last step to trace: 20,25.")


def trackers(c, folder: pathlib.Path) -> run_trackers.Trackers:
    """What the flags ask for; nothing on all processes but one."""
    found: dict[str, run_trackers.Tracker] = {}
    if jax.process_index() == 0:
        if _TENSORBOARD.value:
            step = max(checkpoint.steps(folder), default=0)
            found["tensorboard"] = run_trackers.TensorBoard(folder, step)
        if _WANDB.value:
            flat = configs.flatten(c)
            found["wandb"] = run_trackers.WandB(folder, _WANDB.value, flat)
    return run_trackers.Trackers(found)


def evaluators(
    c, folder: pathlib.Path, task: jobs.Job, mesh, tracked: run_trackers.Trackers
) -> dict[str, evaluation.Evaluator]:
    """The run's evaluators.

    A video VAE is evaluated on clips outside of its training. A denoiser of the toy world
    tells how much of its captions it reads. Any denoiser draws videos of prompts.
    """
    if c.objective == "denoiser":
        found = {
            "loss_gap": loss_gap.of_run(
                c, task.objective, task.latents, task.tokenizer, mesh
            ),
            "samples": sample_sheet.of_run(c, folder, tracked),
        }
        return {name: one for name, one in found.items() if one is not None}
    if c.objective != "vae" or not c.data.eval_shards:
        return {}
    clips = shards.open(c.data.eval_shards)
    if clips.manifest.get("shapes"):
        raise ValueError(
            f"data.eval_shards {c.data.eval_shards} has clips of several sizes, and a "
            "video VAE is evaluated on clips of one"
        )
    chosen = samples.evenly(len(clips), c.data.eval_clips)
    found = [
        clip for clip in clips.read(chosen) if isinstance(clip, records.ClipRecord)
    ]
    if not found:
        raise ValueError(f"data.eval_shards {c.data.eval_shards} has no whole clip")
    config = configs.build(video_vae.Config, c.model.vae, "model.vae")
    video_nthwc = np.stack([clip.frames() for clip in found])
    lpips = reconstruction.Lpips(task.lpips) if task.lpips else None
    measured = reconstruction.Reconstruction(config, video_nthwc, lpips=lpips)
    return {"reconstruction": measured}


def tell_changes(folder: pathlib.Path, changed: list[str]) -> None:
    """Prints which fields of the config have changed, and what depends on them."""
    if not changed:
        return
    print(
        f"train: resuming with a changed config: {'; '.join(changed)} "
        f"(recorded in {folder / run_folder.CHANGES})",
        file=sys.stderr,
    )
    if any(line.startswith("loop.num_steps:") for line in changed):
        print(
            "train: the learning rate, data.crops and reconstruction.adversarial_start "
            "follow the new number of steps from now on",
            file=sys.stderr,
        )


def main() -> None:
    c, folder = _CONFIG.value, pathlib.Path(_OUT.value)
    c.init = _INIT.value or c.init
    if _MESH.value:
        job.fill_mesh(c, _MESH.value)
    meshes.initialize()
    if c.objective not in jobs.JOBS:
        raise ValueError(f"objective {c.objective!r}; there are {[*jobs.JOBS]}")
    if c.init and c.objective == "text_encoder":
        raise ValueError(
            "init is for a denoiser, a video VAE or a captioner, not a text encoder"
        )
    built = configs.build(recipe.Recipe, c, "")
    if built.lora.rank and c.objective != "denoiser":
        raise ValueError(f"lora.rank is for a denoiser; the objective is {c.objective}")
    runs.settings(c)  # checks the section `sample`
    warmup = built.optim.warmup_steps
    if warmup >= built.loop.num_steps and jax.process_index() == 0:
        print(
            f"train: optim.warmup_steps ({warmup}) is not less than "
            f"loop.num_steps ({built.loop.num_steps}): the learning rate only rises",
            file=sys.stderr,
        )
    mesh = meshes.make_mesh(dict(c.mesh))
    jax.set_mesh(mesh)
    job.lock_folder(folder)
    run_folder.check(folder, c)
    if _STRICT.value:
        initial.check_fields(c)
    task = jobs.JOBS[c.objective](c, folder, mesh)
    tracked = trackers(c, folder)
    measured = evaluators(c, folder, task, mesh, tracked)
    tell_changes(folder, run_folder.claim(folder, c))
    meshes.barrier("config")
    if jax.process_index() == 0:
        text = json.dumps(versions.describe(), indent=2)
        paths.write_atomically(folder / "env.json", text + "\n")
    failed = None
    try:
        state = loop.train(
            built.loop,
            built.optim,
            task.objective,
            task.batches,
            seed=c.seed,
            folder=folder,
            mesh=mesh,
            initial=task.initial,
            fixed=task.fixed,
            row_flops=task.row_flops,
            peak_flops=cost.matmul_peak() * mesh.size if task.row_flops else 0.0,
            evaluators=measured,
            trackers=tracked,
            profile=range(*map(int, _PROFILE.value)) if _PROFILE.value else None,
        )
    except stopping.Preempted as stop:
        print(f"train: {stop}", file=sys.stderr)
        sys.exit(stopping.PREEMPTED_EXIT_CODE)
    except evaluation.Failed as error:
        failed, state = error, error.state
        if state is None:
            sys.exit(f"train: {error}")
    except loader.TooManyCorruptRecords as error:
        sys.exit(f"train: {error}")
    except digests.Damaged:
        raise
    except ValueError as error:  # not the user's mistake: it needs its traceback
        raise RuntimeError("training failed") from error
    if task.finish:
        task.finish(state.ema)
        meshes.barrier("finish")
    if failed:
        sys.exit(f"train: the run is finished and saved, but {failed}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "out"])
    flags.register_validator(
        "profile",
        lambda steps: (
            not steps
            or len(steps) == 2
            and all(s.isdigit() for s in steps)
            and 1 <= int(steps[0]) <= int(steps[1])
        ),
        "two step numbers, the first and the last, such as 20,25",
    )
    job.run(main, "train")
