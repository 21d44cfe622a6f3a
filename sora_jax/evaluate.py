"""Measures a denoiser, samples, a video VAE, or a folder of videos.

    python -m sora_jax.evaluate --model runs/toy --shards runs/shards --out runs/scores
    python -m sora_jax.evaluate --samples clips --shards runs/shards --out clips/scores
    python -m sora_jax.evaluate --vae runs/vae --shards runs/held_out --out runs/kept
    python -m sora_jax.evaluate --videos clips --reference real --out runs/clips

Writes OUT/scores.json (every row with its intervals, the protocol and its digest),
OUT/clips.jsonl (the verdict on each clip) and OUT/report.html, and prints the tables.
Of several checkpoints (--checkpoints all or 1000,2000; --follow: each as it appears,
until the run's last) the report shows the course, and OUT/steps has each one's own.
What an interrupted run has finished is kept in OUT and used again. A VAE takes any clips,
models and samples the toy world's; videos are measured one by one and as a set.
"""

import pathlib

import jax
from absl import flags

from sora_jax.core import job
from sora_jax.core import mesh as meshes
from sora_jax.data import shards
from sora_jax.evals import vae_report
from sora_jax.evals.features import networks
from sora_jax.evals.prompts import checkpoints, course, results, samples, toyworld
from sora_jax.evals.videos import folder_report, published
from sora_jax.generation import request as requests

FLAGS = flags.FLAGS
flags.DEFINE_string("model", None, "Run folder of a trained denoiser.")
flags.DEFINE_string("samples", None, "Folder of .mp4 files with .json recipes.")
flags.DEFINE_string("vae", None, "Run of a video VAE, or diffusers' folder of one.")
flags.DEFINE_string("lpips", None, "With --vae: weights that convert wrote.")
flags.DEFINE_integer("num_clips", 256, "With --vae, --videos: clips.", lower_bound=1)
flags.DEFINE_string("videos", None, "Folder of videos, frames or arrays.")
flags.DEFINE_string("reference", None, "With --videos: another, or saved statistics.")
flags.DEFINE_enum("protocol", None, published.PRESETS, "A published score's protocol.")
flags.DEFINE_enum("features", None, networks.NAMES, "With --videos: the network.")
flags.DEFINE_string("weights", None, "With --features: folder that convert wrote.")
flags.DEFINE_integer("num_frames", None, "With --videos: first frames.", lower_bound=1)
flags.DEFINE_integer("stride", None, "Uses one frame in so many.", lower_bound=1)
flags.DEFINE_string("save_statistics", None, "File (.npz) for those of --reference.")
flags.DEFINE_bool("force", False, "Uses statistics that were made otherwise.")
flags.DEFINE_bool("distances_only", False, "With --videos: skip single clips.")
flags.DEFINE_string("clip", None, "With --videos: CLIP's folder, to compare captions.")
flags.DEFINE_integer("chunk_frames", None, "Looks for seams there.", lower_bound=1)
flags.DEFINE_float("fps", None, "Of --videos that do not say theirs.", lower_bound=0.01)
flags.DEFINE_enum("colour", None, ["bt601", "bt709", "bt2020"], "Of untagged videos.")
flags.DEFINE_bool("controls", False, "With --videos: measures some spoilt, too.")
flags.DEFINE_string("shards", None, "Video shards: with --model, of its training.")
flags.DEFINE_string("out", None, "Folder for scores and report.", required=True)
for _name, _size in toyworld.SIZES.items():
    flags.DEFINE_integer(_name, _size, f"Prompts of suite {_name}.", lower_bound=0)
flags.DEFINE_list("suites", [], "More suites, such as count:64,camera_held_out:32.")
flags.DEFINE_list("seeds", ["0"], "Seeds; each makes a whole set of clips.")
flags.DEFINE_integer("prompt_seed", 0, "Another seed asks other prompts.")
_DEFINE = {
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
}
for _name in samples.MAKING:
    _DEFINE[requests.SHARED[_name].kind](_name, None, requests.SHARED[_name].help)
flags.DEFINE_list("checkpoints", [], "The run's steps, or all; by default the newest.")
flags.DEFINE_bool("follow", False, "Scores each checkpoint as it comes, to the last.")
flags.DEFINE_integer("batch_size", 32, "Clips that are computed at a time.")
flags.DEFINE_string("mesh", "fsdp=-1", job.MESH)
flags.DEFINE_list("also", [], "More runs, whose curves and other config are shown.")
OF_MODELS = (*toyworld.SIZES, "suites", "seeds", "prompt_seed", *samples.MAKING)
OF_MODELS += ("checkpoints", "follow", "mesh")
TAKEN_BY = dict.fromkeys(folder_report.OPTIONS, ["videos"]) | {"lpips": ["vae"]}
TAKEN_BY |= dict.fromkeys(OF_MODELS, ["model"])
TAKEN_BY |= {"also": ["model", "samples"], "shards": ["model", "samples", "vae"]}
TAKEN_BY |= {"num_clips": ["vae", "videos"], "batch_size": ["model", "videos"]}


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


def sampling_of(clips: shards.Shards, tier: str) -> checkpoints.Sampling:
    """What makes clips of the model's checkpoints, for prompts that are in no caption."""
    suites = toyworld.make_suites(
        asked_sizes(clips.manifest["settings"]["families"]),
        tier=tier,
        exclude_texts=clips.all_captions(),
        seed=FLAGS.prompt_seed,
    )
    return checkpoints.Sampling(
        pathlib.Path(FLAGS.model),
        suites,
        pathlib.Path(FLAGS.out) / "parts",
        seeds=checkpoints.read_seeds(FLAGS.seeds),
        batch_size=FLAGS.batch_size,
        mesh=meshes.make_mesh(meshes.parse(FLAGS.mesh)),
        asked={name: FLAGS[name].value for name in samples.MAKING},
    )


def score(sampling: checkpoints.Sampling, scorer: results.Scorer) -> None:
    """Scores the checkpoints that are asked for."""
    folder, out, asked = sampling.folder, pathlib.Path(FLAGS.out), FLAGS.checkpoints
    if not FLAGS.follow and len(asked) < 2 and asked != [checkpoints.ALL]:
        (step,) = checkpoints.chosen(folder, asked)
        return finish(scorer, sampling.material(step, out / "parts"))
    several = course.Course(out, sampling, scorer)
    if FLAGS.follow:
        steps = checkpoints.follow(folder, several.has, several.skip)
    else:
        steps = checkpoints.chosen(folder, asked)
        if asked != [checkpoints.ALL]:
            several.only = steps
        steps = [step for step in steps if not several.has(step)]
    several.score(steps)


def finish(scorer: results.Scorer, material: samples.Material) -> None:
    """Scores clips, writes what is found and prints it."""
    if jax.process_index() == 0:
        page, out = scorer.page(material), pathlib.Path(FLAGS.out)
        print(page.write(out))
        print("".join(f"\nnot used: {sentence}" for sentence in page.failures))
        files = f"{out / 'scores.json'}, {out / 'report.html'}"
        print(f"protocol {page.manifest.digest()[:16]}; {files}")


def compare() -> None:
    """Measures a folder of videos and writes the scores."""
    given = {n: FLAGS[n].value for n in folder_report.OPTIONS if FLAGS[n].present}
    print(folder_report.run(FLAGS.videos, FLAGS.out, folder_report.Options(**given)))


def check_flags() -> None:
    """Refuses what does not go together."""
    job.check_taken(FLAGS, ("model", "samples", "vae", "videos"), TAKEN_BY)
    if FLAGS.checkpoints and FLAGS.follow:
        raise ValueError("--follow scores every checkpoint: leave --checkpoints out")
    many = FLAGS.follow or len(FLAGS.checkpoints) > 1 or FLAGS.checkpoints == ["all"]
    if FLAGS.step_cache and many:
        raise ValueError("a step cache is calibrated for one checkpoint: name that one")
    if not FLAGS.shards and not FLAGS.videos:
        raise ValueError("give --shards: only --videos are measured without")
    if not FLAGS.out:
        raise ValueError("give --out: the folder for scores and report")


def main() -> None:
    meshes.initialize()
    check_flags()
    job.check_writable(f"{FLAGS.out}/scores.json", FLAGS.save_statistics)
    job.lock_folder(FLAGS.out)
    if FLAGS.videos:
        return compare() if jax.process_index() == 0 else None
    clips, network = shards.open(FLAGS.shards), networks.ToyFeatures()
    if FLAGS.vae:
        names = ("vae", "shards", "out", "lpips", "num_clips")
        given = [FLAGS[name].value for name in names]
        first = jax.process_index() == 0
        return print(vae_report.run(clips, network, *given)) if first else None
    tier = clips.manifest["settings"].get("tier")
    if tier is None:
        raise ValueError(
            f"{FLAGS.shards} are not toy-world shards: the oracle cannot read them"
        )
    source = pathlib.Path(FLAGS.model or FLAGS.samples)
    runs = results.Runs(source, bool(FLAGS.model), [*map(pathlib.Path, FLAGS.also)])
    runs.differences()  # a missing run is reported now, not after the work
    scorer = results.Scorer(clips, tier, network, runs)
    with job.terminable():
        if FLAGS.samples:
            finish(scorer, samples.read_material(source))
        else:
            score(sampling_of(clips, tier), scorer)


if __name__ == "__main__":
    job.run(main, "evaluate", any_batch=True)
