"""Evaluates a denoiser, its samples, a video VAE, or a folder of videos.

    python -m sora_jax.evaluate --model runs/toy --shards runs/shards --out runs/scores
    python -m sora_jax.evaluate --samples clips --shards runs/shards --out clips/scores
    python -m sora_jax.evaluate --vae runs/vae --shards runs/held_out --out runs/kept
    python -m sora_jax.evaluate --videos clips --reference real --out runs/clips

Writes OUT/scores.json (all scores with their intervals, the protocol and its digest),
OUT/clips.jsonl (the result for each clip) and OUT/report.html, and prints the tables. A
denoiser and samples are scored on prompts of the toy world, a VAE on any video shards;
videos are measured one by one and as a set.

With several checkpoints (--checkpoints=all, --checkpoints=1000,2000, or --follow) the
report shows the scores over training, and OUT/steps holds a report for each. Finished
parts are kept in OUT: the same command resumes an interrupted evaluation.
"""

import pathlib

import jax
from absl import flags

from sora_jax.core import job, paths
from sora_jax.core import mesh as meshes
from sora_jax.data import shards
from sora_jax.evals import vae_report
from sora_jax.evals.features import networks
from sora_jax.evals.prompts import checkpoints, results, run_scores, samples, toyworld
from sora_jax.evals.videos import folder_report, published
from sora_jax.generation import request as requests

FLAGS = flags.FLAGS
flags.DEFINE_string("model", None, "What to evaluate: run of a denoiser, or toy.")
flags.DEFINE_string("samples", None, "What to evaluate: folder that generate wrote.")
flags.DEFINE_string("vae", None, "What to evaluate: run or folder of a video VAE.")
flags.DEFINE_string("videos", None, "What to evaluate: folder of videos or arrays.")
flags.DEFINE_string("out", None, "Folder for scores and report.", required=True)
flags.DEFINE_string(
    "shards",
    None,
    "Video shards; with --model, those that it was trained on. Required except with --videos.",
)
flags.DEFINE_string("lpips", None, "VAE: LPIPS weights that convert wrote.")
flags.DEFINE_integer(
    "num_clips", 256, "VAE, videos: number of clips to use.", lower_bound=1
)
flags.DEFINE_string(
    "reference", None, "Videos: folder to compare with, or its saved statistics (.npz)."
)
flags.DEFINE_enum(
    "protocol", None, published.PRESETS, "Videos: protocol of a published score."
)
flags.DEFINE_enum(
    "features", None, networks.NAMES, "Videos: feature network of the distances."
)
flags.DEFINE_string("weights", None, "Videos: folder of --features' weights.")
flags.DEFINE_integer(
    "num_frames", None, "Videos: number of frames to use of each.", lower_bound=1
)
flags.DEFINE_integer("stride", None, "Videos: use every n-th frame.", lower_bound=1)
flags.DEFINE_string(
    "save_statistics", None, "Videos: file (.npz) for the statistics of --reference."
)
flags.DEFINE_bool(
    "force",
    False,
    "Videos: use saved statistics of other settings, and overwrite --save_statistics.",
)
flags.DEFINE_bool(
    "distances_only", False, "Videos: compare the sets, and measure no single clips."
)
flags.DEFINE_string(
    "clip", None, "Videos: folder of CLIP, for the agreement with captions."
)
flags.DEFINE_integer(
    "chunk_frames",
    None,
    "Videos: frames per generated chunk, to look for seams.",
    lower_bound=1,
)
flags.DEFINE_float(
    "fps",
    None,
    "Videos: frames per second of files that do not state it.",
    lower_bound=0.01,
)
flags.DEFINE_enum(
    "colour",
    None,
    ["bt601", "bt709", "bt2020"],
    "Videos: colour matrix of files that do not state it.",
)
flags.DEFINE_bool("controls", False, "Videos: also measure degraded copies of some.")
for _name, _size in toyworld.SIZES.items():
    flags.DEFINE_integer(
        _name, _size, f"Model: number of prompts of suite {_name}.", lower_bound=0
    )
flags.DEFINE_list("suites", [], "Model: more suites, such as camera_held_out:32.")
flags.DEFINE_list("seeds", ["0"], "Model: seeds; each makes a whole set of clips.")
flags.DEFINE_integer("prompt_seed", 0, "Model: seed of the prompts.")
for _name in samples.MAKING:
    job.DEFINE[requests.SHARED[_name].kind](_name, None, requests.SHARED[_name].help)
flags.DEFINE_list("checkpoints", [], "Model: steps, or all; default: the newest.")
flags.DEFINE_bool(
    "follow", False, "Model: score each new checkpoint until the run's last."
)
flags.DEFINE_integer("batch_size", 32, "Model, videos: clips computed at a time.")
flags.DEFINE_string("mesh", "fsdp=-1", job.MESH)
flags.DEFINE_list("also", [], "Model, samples: more runs to show in the report.")
OF_MODELS = (*toyworld.SIZES, "suites", "seeds", "prompt_seed", *samples.MAKING)
OF_MODELS += ("checkpoints", "follow", "mesh")
TAKEN_BY = dict.fromkeys(folder_report.OPTIONS, ["videos"]) | {"lpips": ["vae"]}
TAKEN_BY |= dict.fromkeys(OF_MODELS, ["model"])
TAKEN_BY |= {"also": ["model", "samples"], "shards": ["model", "samples", "vae"]}
TAKEN_BY |= {"num_clips": ["vae", "videos"], "batch_size": ["model", "videos"]}


def asked_sizes(families) -> dict[str, int]:
    """Number of prompts by suite: those of the shards' families, and those of flags."""
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
            raise ValueError(
                f"--suites takes NAME:NUMBER such as camera_held_out:32, not {item}"
            )
        sizes[name] = int(number)
    return sizes


def sampling_of(clips: shards.Shards, tier: str) -> checkpoints.Sampling:
    """Samples the model's checkpoints, for prompts that occur in no caption."""
    suites = toyworld.make_suites(
        asked_sizes(clips.manifest["settings"]["families"]),
        tier=tier,
        exclude_texts=clips.all_captions(),
        seed=FLAGS.prompt_seed,
    )
    return checkpoints.Sampling(
        paths.model(FLAGS.model),
        suites,
        pathlib.Path(FLAGS.out) / "parts",
        seeds=checkpoints.read_seeds(FLAGS.seeds),
        batch_size=FLAGS.batch_size,
        mesh=meshes.make_mesh(meshes.parse(FLAGS.mesh)),
        asked={name: FLAGS[name].value for name in samples.MAKING},
    )


def score(sampling: checkpoints.Sampling, scorer: results.Scorer) -> None:
    """Scores the checkpoints that the flags name."""
    folder, out, asked = sampling.folder, pathlib.Path(FLAGS.out), FLAGS.checkpoints
    if not FLAGS.follow and len(asked) < 2 and asked != [checkpoints.ALL]:
        (step,) = checkpoints.chosen(folder, asked)
        return finish(scorer, sampling.material(step, out / "parts"))
    several = run_scores.RunScores(out, sampling, scorer)
    if FLAGS.follow:
        steps = checkpoints.follow(folder, several.has, several.skip)
    else:
        steps = checkpoints.chosen(folder, asked)
        if asked != [checkpoints.ALL]:
            several.only = steps
        steps = [step for step in steps if not several.has(step)]
    several.score(steps)


def finish(scorer: results.Scorer, material: samples.Material) -> None:
    """Scores clips, writes the report and prints it."""
    if jax.process_index() == 0:
        evaluation, out = scorer.score(material), pathlib.Path(FLAGS.out)
        print(evaluation.write(out))
        print("".join(f"\nnot used: {sentence}" for sentence in evaluation.failures))
        files = f"{out / 'scores.json'}, {out / 'report.html'}"
        print(f"protocol {evaluation.manifest.digest()[:16]}; {files}")


def compare() -> None:
    """Measures a folder of videos and writes the scores."""
    given = {n: FLAGS[n].value for n in folder_report.OPTIONS if FLAGS[n].present}
    print(folder_report.run(FLAGS.videos, FLAGS.out, folder_report.Options(**given)))


def check_flags() -> None:
    """Refuses combinations of flags that make no sense."""
    job.check_taken(FLAGS, ("model", "samples", "vae", "videos"), TAKEN_BY)
    if FLAGS.checkpoints and FLAGS.follow:
        raise ValueError("--follow scores every checkpoint: leave --checkpoints out")
    many = FLAGS.follow or len(FLAGS.checkpoints) > 1 or FLAGS.checkpoints == ["all"]
    if FLAGS.step_cache and many:
        raise ValueError("a step cache is calibrated for one checkpoint: name that one")
    if not FLAGS.shards and not FLAGS.videos:
        raise ValueError("give --shards: only --videos works without them")
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
    source = paths.model(FLAGS.model or FLAGS.samples)
    runs = results.Runs(source, bool(FLAGS.model), [*map(paths.model, FLAGS.also)])
    runs.differences()  # a missing run is reported now, not after the work
    scorer = results.Scorer(clips, tier, network, runs)
    with job.terminable():
        if FLAGS.samples:
            finish(scorer, samples.read_material(source))
        else:
            score(sampling_of(clips, tier), scorer)


if __name__ == "__main__":
    job.run(main, "evaluate", any_batch=True)
