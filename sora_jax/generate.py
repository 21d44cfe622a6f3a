"""Makes videos: a prompt, and what else is given, to MP4 files.

    python -m sora_jax.generate --model runs/toy --prompt "a red circle moves left" \
        --seed 3 --out clip.mp4
    python -m sora_jax.generate --model runs/toy --prompts prompts.csv --out clips/

Beside each video stands its recipe (clip.json): prompt, seed, sizes, solver, weights. A
list that was interrupted goes on where it was. On several devices the clips of a batch
are split over them; on several processes the same command runs in each.
"""

import itertools
import json
import pathlib

import jax
from absl import app, flags, logging

from sora_jax.core import mesh as meshes
from sora_jax.core import progress
from sora_jax.data import video_io
from sora_jax.generation import pipeline, prompt_file

FLAGS = flags.FLAGS
flags.DEFINE_string("model", None, "Run folder of a trained denoiser.", required=True)
flags.DEFINE_string("prompt", None, "What the video shows.")
flags.DEFINE_string("prompts", None, "A .txt, .csv or .jsonl list of prompts.")
flags.DEFINE_string(
    "out", None, "Video file (.mp4); with --prompts a folder.", required=True
)
flags.DEFINE_integer(
    "seed", 0, "Seed; clip i of a list has seed + i where it names none.", lower_bound=0
)
flags.DEFINE_string("negative_prompt", None, "What the video should not be like.")
flags.DEFINE_string("image", None, "Picture file that becomes the first frame.")
flags.DEFINE_integer("num_frames", None, "Frames; default: as the model was trained.")
flags.DEFINE_integer("height", None, "Pixels.")
flags.DEFINE_integer("width", None, "Pixels.")
flags.DEFINE_float("fps", None, "Frames a second.")
flags.DEFINE_integer("num_inference_steps", None, "Solver steps.")
flags.DEFINE_float("guidance_scale", None, "Weight of the prompt; 1 is no guidance.")
flags.DEFINE_string("sampler", None, "euler or heun.")
flags.DEFINE_integer("batch_size", None, "Clips that are computed at a time.")
flags.DEFINE_string(
    "mesh", "replica=-1", "Devices on each mesh axis, such as fsdp=4,tensor=2."
)

# What one call of the pipeline shares; the rest is given for each clip.
SHARED = ("num_frames", "height", "width", "fps", "num_inference_steps")
SHARED += ("guidance_scale", "sampler")


def clips() -> list[dict]:
    """The clips that the flags ask for, with what each says about itself."""
    if (FLAGS.prompt is None) == (FLAGS.prompts is None):
        raise ValueError("give --prompt or --prompts, one of the two")
    out = pathlib.Path(FLAGS.out)
    if FLAGS.prompt is not None:
        if out.suffix != ".mp4":
            raise ValueError(f"--out is the video's file and ends in .mp4, not {out}")
        rows, files = [{"prompt": FLAGS.prompt}], [out]
    else:
        rows = prompt_file.read(FLAGS.prompts)
        files = [
            out / prompt_file.file_name(index, row) for index, row in enumerate(rows)
        ]
    defaults = {
        name: FLAGS[name].value
        for name in (*SHARED, "negative_prompt", "image")
        if FLAGS[name].value is not None
    }
    return [
        {"negative_prompt": "", "seed": FLAGS.seed + index}
        | defaults
        | row
        | {"file": f}
        for index, (row, f) in enumerate(zip(rows, files, strict=True))
    ]


def mesh_shape() -> dict[str, int]:
    """What --mesh says: by default every device has a copy of the weights."""
    shape = {}
    for part in FLAGS.mesh.split(","):
        axis, _, size = part.partition("=")
        if not size.removeprefix("-").isdigit():
            raise ValueError(f"--mesh is like fsdp=4,tensor=2, not {FLAGS.mesh!r}")
        shape[axis.strip()] = int(size)
    return shape


def shared(clip: dict) -> tuple:
    """What a clip must have in common with its neighbours to run in one call."""
    return tuple(clip.get(name) for name in SHARED) + ("image" in clip,)


def arguments(batch: list[dict]) -> dict:
    """The pipeline's arguments for clips that run together."""
    images = [video_io.read_image(clip["image"]) for clip in batch if "image" in clip]
    return {
        "prompt": [clip["prompt"] for clip in batch],
        "negative_prompt": [clip["negative_prompt"] for clip in batch],
        "seed": [clip["seed"] for clip in batch],
        "image": images or None,
        "batch_size": FLAGS.batch_size,
        **{name: batch[0].get(name) for name in SHARED},
    }


def is_finished(file: pathlib.Path, recipe: dict) -> bool:
    """Whether a clip was made before; refuses one that was made in another way."""
    sidecar = file.with_suffix(".json")
    if not (file.exists() and sidecar.exists()):
        return False
    found = json.loads(sidecar.read_text())
    other = [
        f"{name} was {found.get(name)!r} and is {value!r}"
        for name, value in recipe.items()
        if name != "versions" and found.get(name) != value
    ]
    if other:
        raise ValueError(
            f"{file} is there already, made in another way ({'; '.join(other)}): "
            "choose another --out, or remove it"
        )
    return True


def plan(pipe: pipeline.Pipeline, wanted: list[dict]) -> tuple[list[list[dict]], int]:
    """Batches of clips that are still to be made, and their solver steps in all.

    Everything is checked here, before anything is computed.
    """
    batches, steps = [], 0
    size = FLAGS.batch_size or pipe.settings.batch_size
    by_kind = sorted(wanted, key=lambda clip: repr(shared(clip)))
    for _, group in itertools.groupby(by_kind, key=shared):
        todo = []
        for clip in group:
            request = pipe.check_inputs(**arguments([clip]))
            recipe = pipe.recipe(request, 0)
            if not (FLAGS.prompts and is_finished(clip["file"], recipe)):
                todo.append(clip)
                steps += request.num_inference_steps
        batches += [todo[i : i + size] for i in range(0, len(todo), size)]
    return batches, steps


def make(pipe: pipeline.Pipeline, batches: list[list[dict]], steps: int) -> None:
    """Makes the clips, and writes each batch as soon as it is there."""
    process = jax.process_index()
    with progress.Progress(
        steps, "generate", "clip steps", process_index=process
    ) as bar:
        for batch in batches:
            output = pipe(**arguments(batch), progress=bar.update)
            for clip, frames, recipe in zip(
                batch, output.frames, output.recipes, strict=True
            ):
                if process == 0:
                    pipeline.save(frames, clip["file"], recipe)


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    try:
        meshes.initialize()
        wanted = clips()
        jax.set_mesh(meshes.make_mesh(mesh_shape()))
        pipe = pipeline.Pipeline.from_pretrained(FLAGS.model)
        batches, steps = plan(pipe, wanted)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"generate: {error}") from None
    todo = sum(len(batch) for batch in batches)
    first = jax.process_index() == 0
    if first and todo < len(wanted):
        print(f"{len(wanted) - todo} of {len(wanted)} clips were finished before")
    if todo:
        make(pipe, batches, steps)
    if first:
        print(f"{todo} clip{'s' * (todo != 1)} written: {FLAGS.out}")


if __name__ == "__main__":
    app.run(main)
