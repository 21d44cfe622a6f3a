"""Measures a denoiser, samples, a video VAE, or a folder of videos.

    python -m sora_jax.evaluate --model runs/toy --shards runs/shards --out runs/scores
    python -m sora_jax.evaluate --samples clips --shards runs/shards --out clips/scores
    python -m sora_jax.evaluate --vae runs/vae --shards runs/held_out --out runs/kept
    python -m sora_jax.evaluate --videos clips --reference real --out runs/clips

Writes OUT/scores.json (every row with its intervals, the protocol and its digest),
OUT/clips.jsonl (the verdict on each clip) and OUT/report.html, and prints the tables.
What an interrupted run has finished is kept in OUT/parts and used again. A VAE takes any
clips, models and samples the toy world's; videos are measured one by one and as a set.
"""

import dataclasses
import pathlib
import sys

import jax
from absl import app, flags, logging

from sora_jax.core import config as configs
from sora_jax.core import job, progress
from sora_jax.core import mesh as meshes
from sora_jax.data import shards
from sora_jax.evals import (
    features,
    folder_report,
    published,
    reconstruction,
    results,
    rows,
    samples,
    scoring,
    summary,
    toyworld,
    vae_report,
)
from sora_jax.generation import pipeline, runs
from sora_jax.training import checkpoint, latents, perceptual, state

FLAGS = flags.FLAGS
flags.DEFINE_string("model", None, "Run folder of a trained denoiser.")
flags.DEFINE_string("samples", None, "Folder of .mp4 files with .json recipes.")
flags.DEFINE_string("vae", None, "Run of a video VAE, or diffusers' folder of one.")
flags.DEFINE_string("lpips", None, "With --vae: weights that convert wrote.")
flags.DEFINE_integer("num_clips", 256, "With --vae, --videos: clips.", lower_bound=1)
flags.DEFINE_string("videos", None, "Folder of videos, .png frames or arrays.")
flags.DEFINE_string("reference", None, "With --videos: another, or saved statistics.")
flags.DEFINE_enum("protocol", None, published.PRESETS, "A published score's protocol.")
flags.DEFINE_enum("features", None, features.NAMES, "With --videos: the network.")
flags.DEFINE_string("weights", None, "With --features: folder that convert wrote.")
flags.DEFINE_integer("num_frames", None, "With --videos: first frames.", lower_bound=1)
flags.DEFINE_integer("stride", None, "Uses one frame in so many.", lower_bound=1)
flags.DEFINE_string("save_statistics", None, "File (.npz) for those of --reference.")
flags.DEFINE_bool("force", False, "Uses statistics that were made otherwise.")
flags.DEFINE_bool("temporal", True, "With --videos: measures each clip by itself.")
flags.DEFINE_string("clip", None, "With --videos: CLIP's folder, to compare captions.")
flags.DEFINE_integer("chunk_frames", None, "Looks for seams there.", lower_bound=1)
flags.DEFINE_float("fps", None, "Of --videos that do not say theirs.", lower_bound=0.01)
flags.DEFINE_bool("controls", False, "With --videos: measures some spoilt, too.")
flags.DEFINE_string("shards", None, "Video shards: with --model, of its training.")
flags.DEFINE_string("out", None, "Folder for scores and report.", required=True)
for _name, _size in toyworld.SIZES.items():
    flags.DEFINE_integer(_name, _size, f"Prompts of suite {_name}.", lower_bound=0)
flags.DEFINE_list("suites", [], "More suites, such as count:64,camera_held_out:32.")
flags.DEFINE_list("seeds", ["0"], "Seeds; each makes a whole set of clips.")
flags.DEFINE_integer("prompt_seed", 0, "Another seed asks other prompts.")
flags.DEFINE_integer("num_inference_steps", None, "Solver steps.")
flags.DEFINE_float("guidance_scale", None, "Weight of the prompt; 1 is no guidance.")
flags.DEFINE_string("sampler", None, "euler, heun or unipc.")
flags.DEFINE_float("shift", None, "Of the noise levels towards noise.")
flags.DEFINE_integer("checkpoint", None, "Step of the run's; by default the newest.")
flags.DEFINE_integer("batch_size", 32, "Clips that are computed at a time.")
flags.DEFINE_list("also", [], "More run folders whose training curves are shown.")


def asked_sizes(families) -> dict[str, int]:
    """Prompts by suite: those of the families in the shards, and what flags add."""
    sizes = {
        name: FLAGS[name].value
        for name in toyworld.SIZES
        if FLAGS[name].present
        or families == "all"
        or name.removesuffix(toyworld.HELD_OUT) in families
    }
    for item in FLAGS.suites:
        name, _, number = item.partition(":")
        if not number.isdigit():
            raise ValueError(f"--suites takes NAME:NUMBER such as count:64, not {item}")
        sizes[name] = int(number)
    return sizes


def from_model(clips: shards.Shards, tier: str) -> samples.Material:
    """Makes the model's clips for each seed, and some of untrained weights."""
    suites = toyworld.make_suites(
        asked_sizes(clips.manifest["settings"]["families"]),
        tier=tier,
        exclude_texts=clips.all_captions(),
        seed=FLAGS.prompt_seed,
    )
    run = checkpoint.load_run(FLAGS.model, step=FLAGS.checkpoint)
    pipe = pipeline.Pipeline.from_run(run)
    asked = {name: FLAGS[name].value for name in samples.MAKING}
    making = {n: asked.get(n) or getattr(pipe.settings, n) for n in samples.MAKING}
    seeds = tuple(map(int, FLAGS.seeds))
    few = [suite.head(rows.UNTRAINED) for suite in suites if not suite.held_out]
    networks = runs.networks_of(run.config, pipe.tokenizer)
    jobs = [(f"{scoring.MODEL}, seed {s}", run.params, s, suites) for s in seeds]
    untrained = jax.jit(networks.init)(jax.random.key(0))
    jobs.append((scoring.UNTRAINED, untrained, seeds[0], few))
    store = samples.Store(pathlib.Path(FLAGS.out) / "parts")
    count = sum(len(suite) for *_, chosen in jobs for suite in chosen)
    videos = {}
    with progress.Progress(
        count * making["num_inference_steps"], "sample", "clip steps"
    ) as bar:
        for row, params, seed, chosen in jobs:
            if params is not run.params:
                other = dataclasses.replace(run, params=params)
                pipe = pipeline.Pipeline.from_run(other)
            videos[row] = rows.sample(
                store, pipe, row, chosen, seed, progress=bar.update,
                batch_size=FLAGS.batch_size, **asked,
            )  # fmt: skip
    facts = {
        "Model": run.folder,
        "Step": f"{run.step:,}",
        "Parameters": f"{state.count(run.params) / 1e6:.2f} M",
        "Config": configs.digest(run.config),
        "Sampler": "{sampler}, {num_inference_steps} steps, guidance "
        "{guidance_scale:g}, shift {shift:g}".format(**making),
        "Seeds": ", ".join(map(str, seeds)),
    }
    return samples.Material(suites, videos, making, facts, seeds=seeds)


def reconstruct(clips: shards.Shards, network: features.ToyFeatures) -> None:
    """Measures a video VAE on some of the clips and writes its report."""
    vae, folder = latents.load_vae(FLAGS.vae), pathlib.Path(FLAGS.vae)
    lpips = FLAGS.lpips and reconstruction.Lpips(perceptual.open_weights(FLAGS.lpips))
    count = min(FLAGS.num_clips, len(clips))
    chosen = [number * len(clips) // count for number in range(count)]
    found = vae_report.measure(vae, clips, chosen, network, lpips)
    facts = {
        "Video VAE": FLAGS.vae,
        "Parameters": f"{state.count(vae.params) / 1e6:.2f} M",
        "Shards": FLAGS.shards,
    } | results.facts()
    title = f"{folder.resolve().name}: reconstruction"
    out, charts = pathlib.Path(FLAGS.out), summary.charts(folder)
    print(vae_report.write(out, found, title, facts, charts))


def compare() -> None:
    """Measures a folder of videos and writes the scores."""
    given = {n: FLAGS[n].value for n in folder_report.OPTIONS if FLAGS[n].present}
    print(folder_report.run(FLAGS.videos, FLAGS.out, folder_report.Options(**given)))


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    try:
        meshes.initialize()
        if sum(map(bool, (FLAGS.model, FLAGS.samples, FLAGS.vae, FLAGS.videos))) != 1:
            raise ValueError("give one of --model, --samples, --vae and --videos")
        if FLAGS.videos:
            return compare() if jax.process_index() == 0 else None
        of_videos = set(folder_report.OPTIONS) - {"num_clips", "batch_size"}
        if vain := sorted(f"--{name}" for name in of_videos if FLAGS[name].present):
            raise ValueError(f"{', '.join(vain)} need --videos")
        if not FLAGS.shards:
            raise ValueError("give --shards: only --videos are measured without")
        if FLAGS.lpips and not FLAGS.vae:
            raise ValueError("--lpips compares with an original: give --vae")
        clips, network = shards.open(FLAGS.shards), features.ToyFeatures()
        if FLAGS.vae:
            return reconstruct(clips, network) if jax.process_index() == 0 else None
        tier = clips.manifest["settings"].get("tier")
        if tier is None:
            raise ValueError(
                f"{FLAGS.shards} are not toy-world shards: the oracle cannot read them"
            )
        with jax.set_mesh(meshes.make_mesh()):
            read = FLAGS.samples and samples.read_material(pathlib.Path(FLAGS.samples))
            material = read or from_model(clips, tier)
        vae = latents.load_vae(FLAGS.model) if FLAGS.model else None
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"evaluate: {error}")
    if jax.process_index() == 0:
        result = scoring.score(material, clips, tier, network, vae)
        manifest = scoring.manifest(material, result, network, clips.manifest["fps"])
        out, source = pathlib.Path(FLAGS.out), FLAGS.model or FLAGS.samples
        results.write(out, material, result, manifest, source, FLAGS.model, FLAGS.also)


if __name__ == "__main__":
    job.run(main, "evaluate")
