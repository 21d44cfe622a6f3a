"""Generates videos from prompts, and from images and videos, as MP4, WebM or GIF files.

    python -m sora_jax.generate --prompt "a red circle moves left" --out clip.mp4
    python -m sora_jax.generate --task edit --video clip.mp4 --out blue.mp4 \
        --prompt "a blue circle moves left"
    python -m sora_jax.generate --model runs/toy --prompts prompts.csv --out clips/
    python -m sora_jax.generate --model runs/toy --from clip.mp4 --out again.mp4

The model is the toy that is shipped, a run, or a folder of Wan 2.1 or 2.2 in diffusers'
layout; Wan's own flag names work too. Each video gets a recipe file (clip.json), from
which --from makes it again. --sheet shows all of a list in one picture. The same
command resumes an interrupted list. --task makes a video of others: see
sora_jax/generation/README.md. --storyboard makes a video of several shots. --upsample
rewrites short prompts. Several devices share the clips of a batch; with several
processes, each runs the same command.
--step_cache needs to be calibrated first, by --calibrate_step_cache in place of
--step_cache and --out.
"""

import pathlib

import jax
from absl import flags

from sora_jax.core import job, progress
from sora_jax.core import mesh as meshes
from sora_jax.evals.prompts import cached_sampling
from sora_jax.generation import (
    batches,
    cache_calibration,
    contact_sheet,
    estimate,
    gallery,
    pipeline,
    prompt_file,
    prompt_upsampler,
    recipes,
    storyboard,
    task_files,
    tasks,
)
from sora_jax.generation import request as requests
from sora_jax.training import pretrained

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "model", "toy", "Run, folder in diffusers' layout, or toy, which is shipped."
)
flags.DEFINE_string("lora", None, "LoRA file that is merged into the denoiser.")
flags.DEFINE_string("lora_2", None, "The same for the second of two experts.")
flags.DEFINE_string("prompt", None, "Description of the video.")
flags.DEFINE_string("prompts", None, "File of prompts: .txt, .csv or .jsonl.")
flags.DEFINE_string("from", None, "Video with a recipe, to be made again.")
flags.DEFINE_string(
    "out",
    None,
    "Video file (.mp4, .webm, .gif; .png of one frame); with --prompts, a folder.",
)
flags.DEFINE_enum(
    "upsample",
    None,
    ["rules", "network", "chat"],
    "Rewrite prompts in more detail: by rules (toy world), a network or a chat API.",
)
flags.DEFINE_string(
    "upsample_model",
    None,
    "Network: its run. Chat: the model's name at the server.",
)
flags.DEFINE_string(
    "upsample_url", None, "Chat: address, such as http://localhost:8000/v1."
)
flags.DEFINE_string(
    "upsample_tier",
    None,
    "Rules, network: tier of caption to write; default: structured; the network's last.",
)
flags.DEFINE_string(
    "sheet", None, "Picture (.png) to write: the prompts, and frames of their videos."
)
flags.DEFINE_string(
    "gallery", None, "Folder: write an example of each way of making a video instead."
)
flags.DEFINE_string(
    "storyboard",
    None,
    "File (.yaml, .json) of several shots. Again: only those that changed are made.",
)
flags.DEFINE_bool("overwrite", False, "Replace existing files.")
flags.DEFINE_enum(
    "format", None, recipes.FORMATS, "With --prompts: file format; default: mp4."
)
flags.DEFINE_bool("dry_run", False, "Only report the calls and their cost.")
flags.DEFINE_integer(
    "seed",
    0,
    "Seed; -1: random. Clip i of a list has seed + i unless its row sets one.",
)
flags.DEFINE_string("negative_prompt", None, "What guidance moves away from.")
flags.DEFINE_string("image", None, "Image file that becomes the first frame.")
flags.DEFINE_enum(
    "task",
    None,
    [*tasks.TASKS],
    "Way of making the video: "
    + "; ".join(f"{name}, {task.about}" for name, task in tasks.TASKS.items())
    + ".",
)
flags.DEFINE_string("video", None, "Task: video file.")
flags.DEFINE_string(
    "video_2", None, "Task connect, blend: video that it leads to, or becomes."
)
flags.DEFINE_string(
    "mask", None, "Task inpaint: picture or video, white where the video is made anew."
)
flags.DEFINE_list(
    "keyframes", None, "Task keyframes: FRAME=IMAGE, ..., such as 0=a.png,8=b.png."
)
flags.DEFINE_list(
    "references", None, "Task reference: one or two pictures of what the video shows."
)
flags.DEFINE_integer(
    "frames", None, "Task extend, extend_backwards, connect: frames to make."
)
flags.DEFINE_integer("factor", None, "Task fill: how many times the frame rate.")
flags.DEFINE_integer("first", None, "Task replace: first frame to make anew.")
flags.DEFINE_integer("last", None, "Task replace: last frame to make anew.")
flags.DEFINE_float(
    "strength", None, "Task vary, edit, blend: noise level to begin at, in (0, 1]."
)
flags.DEFINE_list(
    "curve", None, "Task blend: shares of --video_2, such as 0,0.5,1; default: 0,1."
)
flags.DEFINE_enum(
    "method",
    None,
    tasks.METHODS,
    "Task edit: context, if the denoiser learned it (the default then), or flowedit.",
)
flags.DEFINE_string(
    "source", None, "Task edit by flowedit: description of the video as it is."
)
flags.DEFINE_float(
    "source_guidance_scale", None, "Task edit: weight of that description."
)
for _name, (_kind, _help) in requests.SHARED.items():
    job.DEFINE[_kind](_name, None, _help)
flags.DEFINE_bool(
    "calibrate_step_cache", False, "Calibrate the step cache, and make no videos."
)
flags.DEFINE_string("size", None, "WIDTHxHEIGHT, such as 832x480 (or 832*480).")
flags.DEFINE_enum(
    "dtype",
    None,
    pretrained.DTYPES,
    "Type of imported weights; default: float32 on CPU, else bfloat16.",
)
flags.DEFINE_bool(
    "free_text_encoder", False, "Free the text encoder's memory before sampling."
)
flags.DEFINE_bool("strict", False, "Fail on unknown fields in imported configs.")
flags.DEFINE_integer(
    "batch_size", None, "Clips computed at a time. Default: the model's."
)
flags.DEFINE_string("mesh", "replica=-1", job.MESH)

_NAMES_OF_WAN = {
    "frame_num": "num_frames",
    "base_seed": "seed",
    "save_file": "out",
    "sample_steps": "num_inference_steps",
    "sample_shift": "shift",
    "sample_guide_scale": "guidance_scale",
    "sample_solver": "sampler",
    "ckpt_dir": "model",
}
for _alias, _name in _NAMES_OF_WAN.items():
    flags.DEFINE_alias(_alias, _name)

_MOST_ON_SHEET = 64
_NOT_IN_CALIBRATION = ("out", "sheet", "step_cache", "overwrite", "format", "dry_run")


def clips(recipe: dict | None) -> list[dict]:
    """The clips that the flags, or the recipe of a video to be made again, describe."""
    ways = ("prompt", "prompts", "from")
    if sum(FLAGS[name].value is not None for name in ways) != 1:
        raise ValueError("give one of --prompt, --prompts and --from")
    if FLAGS.calibrate_step_cache:
        if unused := [name for name in _NOT_IN_CALIBRATION if FLAGS[name].value]:
            raise ValueError(
                f"--calibrate_step_cache makes no clips: leave out --{unused[0]}"
            )
    elif not (FLAGS.out or FLAGS.dry_run):
        raise ValueError("give --out: the video's file, or a folder with --prompts")
    out = pathlib.Path(FLAGS.out or "clip.mp4")
    if FLAGS.prompts is not None:
        rows = prompt_file.read(FLAGS.prompts)
        files = [
            out / prompt_file.file_name(index, row, f".{FLAGS.format or 'mp4'}")
            for index, row in enumerate(rows)
        ]
    else:
        if FLAGS.format:
            raise ValueError(
                "--format is for --prompts: one video's is what --out ends in"
            )
        recipes.format_of(out)
        rows, files = [{"prompt": FLAGS.prompt}], [out]
    defaults = named_arguments()
    if recipe is not None:
        # Flags override the recipe.
        defaults, rows = recipes.arguments(recipe, FLAGS.image) | defaults, [{}]
    step = FLAGS.seed != requests.RANDOM
    first = {"negative_prompt": ""}
    return [
        first | {"seed": FLAGS.seed + index * step} | defaults | row | {"file": file}
        for index, (row, file) in enumerate(zip(rows, files, strict=True))
    ]


def named_arguments() -> dict:
    """The arguments of the call that flags set."""
    names = (*requests.SHARED, "negative_prompt", "image")
    values = {n: FLAGS[n].value for n in names if FLAGS[n].value is not None}
    if FLAGS["from"].value is not None and FLAGS["seed"].present:
        values["seed"] = FLAGS.seed
    if FLAGS.size is None:
        return values
    if values.keys() & {"height", "width"}:
        raise ValueError("--size sets both: leave out --height and --width")
    height, width = job.parse_size(FLAGS.size)
    return values | {"height": height, "width": width}


def make(pipe: pipeline.Pipeline, groups: list[list[dict]], steps: int) -> None:
    """Makes the clips, and writes each batch as soon as it is computed."""
    index = jax.process_index()
    with progress.Progress(
        steps, "generate", "clip steps", process_index=index, compiles=True
    ) as bar:
        for group in groups:
            output = pipe(**arguments(group), progress=bar.update)
            results = zip(group, output.frames, output.recipes, strict=True)
            for clip, frames, recipe in results:
                if index == 0:
                    recipes.save(frames, clip["file"], recipe)


def upsampler() -> prompt_upsampler.Upsampler | None:
    """What rewrites the prompts."""
    kind = FLAGS.upsample
    needed = {"network": ["model"], "chat": ["model", "url"]}.get(kind, [])
    allowed = needed + ["tier"] * (kind in ("rules", "network"))
    for name in ("model", "url", "tier"):
        value = FLAGS[f"upsample_{name}"].value
        if value and name not in allowed:
            what = f"--upsample {kind}" if kind else "no --upsample"
            raise ValueError(f"--upsample_{name} has no meaning with {what}")
        if not value and name in needed:
            raise ValueError(f"--upsample {kind} needs --upsample_{name}")
    if kind is None:
        return None
    if FLAGS["from"].value is not None:
        raise ValueError("--from makes a video again, with its prompt: no --upsample")
    if kind == "rules":
        return prompt_upsampler.Rules(FLAGS.upsample_tier or "structured")
    if kind == "network":
        return prompt_upsampler.Network(FLAGS.upsample_model, FLAGS.upsample_tier)
    return prompt_upsampler.Chat(FLAGS.upsample_url, FLAGS.upsample_model)


def check_sheet(clips: int) -> None:
    """Refuses a contact sheet that cannot be drawn."""
    if not FLAGS.sheet:
        return
    if not FLAGS.out or FLAGS.dry_run:
        raise ValueError("--sheet shows videos that are made: give --out")
    if not FLAGS.sheet.lower().endswith(".png"):
        raise ValueError(f"--sheet is a file .png to write, not {FLAGS.sheet}")
    if clips > _MOST_ON_SHEET:
        raise ValueError(
            f"--sheet shows up to {_MOST_ON_SHEET} videos, and there are {clips}"
        )
    job.check_writable(FLAGS.sheet)


_OF_TASKS = ("video", "video_2", "mask", "keyframes", "frames", "factor", "first")
_OF_TASKS += ("last", "strength", "source", "source_guidance_scale", "references")
_OF_TASKS += ("method", "curve")


def task_of(recipe: dict | None) -> str | None:
    """The way of making the video: that of --task, or of the recipe.

    Raises:
      ValueError: they differ, or flags do not go together.
    """
    task = FLAGS.task
    if recipe is not None and (stored := recipe.get("task")) is not None:
        if not isinstance(stored, str) or task not in (None, stored):
            raise ValueError(
                f"the video was made by task {stored!r}: leave out --task, or --from"
            )
        task = stored
    elif recipe is not None and task is not None:
        raise ValueError("--from is a video that no task made: leave out --task")
    if task is None:
        return None
    for name, why in (("prompts", "a list"), ("image", "an image")):
        if FLAGS[name].value is not None:
            raise ValueError(
                f"--task makes one video, not of {why}: leave out --{name}"
            )
    for name in ("dry_run", "upsample", "calibrate_step_cache", "sheet", "batch_size"):
        if FLAGS[name].value:
            raise ValueError(f"--task takes no --{name}")
    return task


def task_inputs(task: str | None, recipe: dict | None) -> dict:
    """What the flags, and the recipe of a video to be made again, give a task.

    Raises:
      ValueError: a flag does not belong to the task.
    """
    named = {n: FLAGS[n].value for n in _OF_TASKS if FLAGS[n].value is not None}
    if task is None:
        if named:
            raise ValueError(f"--{min(named)} has no meaning without --task")
        return {}
    task_files.check(task, named)
    found = task_files.read(named)
    if recipe is not None:
        found = task_files.again(recipe, found)
    if FLAGS.fps is not None:
        found["fps"] = FLAGS.fps
    return found


def leave_out(why: str, *names: tuple[str, ...]) -> None:
    """Raises ValueError if one of these flags is set."""
    for flag in (FLAGS[name] for some in names for name in some):
        if flag.present or flag.value != flag.default:
            raise ValueError(f"{why}: leave out --{flag.name}")


def open_gallery() -> pipeline.Pipeline:
    """Opens the model of a gallery, whose prompts and inputs are its own."""
    leave_out(
        "--gallery makes its own videos",
        ("prompt", "prompts", "from", "task", "out", "sheet", "image", "dry_run"),
        ("size", "calibrate_step_cache", "upsample", "storyboard"),
        (*_OF_TASKS, *requests.SHARED),
    )
    file = pathlib.Path(FLAGS.gallery) / "gallery.gif"
    if file.exists() and not FLAGS.overwrite:
        raise ValueError(f"{file} exists: give --overwrite, or another folder")
    job.check_writable(file)
    jax.set_mesh(meshes.make_mesh(meshes.parse(FLAGS.mesh)))
    return open_pipeline()


def open_pipeline() -> pipeline.Pipeline:
    """The model that the flags name."""
    return pipeline.Pipeline.from_pretrained(
        FLAGS.model,
        FLAGS.dtype,
        not FLAGS.free_text_encoder,
        lora=FLAGS.lora,
        lora_2=FLAGS.lora_2,
        strict=FLAGS.strict,
    )


def make_gallery(pipe: pipeline.Pipeline) -> str:
    """Makes an example of each task, and says which are left out."""
    folder = pathlib.Path(FLAGS.gallery)
    with progress.Progress(
        len(tasks.TASKS), "gallery", "tasks", process_index=jax.process_index()
    ) as bar:
        found, refused = gallery.examples(
            pipe, seed=FLAGS.seed, progress=lambda name: bar.update(1)
        )
    lines = [f"{name} is left out: {why}" for name, why in refused.items()]
    if jax.process_index() == 0:
        files = gallery.write(folder, found)
        lines.append(f"{len(found)} examples written: {files[-1]}")
    return "\n".join(lines)


def make_storyboard() -> str:
    """Makes the shots of a storyboard that are not there yet, and joins all of them."""
    leave_out(
        "--storyboard says all of a video",
        ("prompt", "prompts", "from", "task", "sheet", "image", "dry_run", "format"),
        ("calibrate_step_cache", "negative_prompt", "batch_size", "size", "seed"),
        ("upsample", "upsample_model", "upsample_url", "upsample_tier"),
        (*_OF_TASKS, *requests.SHARED),
    )
    if not FLAGS.out or not FLAGS.out.lower().endswith(".mp4"):
        raise ValueError("--storyboard needs --out, a file that ends in .mp4")
    if jax.process_count() > 1:
        raise ValueError("--storyboard is for one process")
    out, board = pathlib.Path(FLAGS.out), storyboard.read(FLAGS.storyboard)
    files = out, recipes.sidecar_of(out)
    for path in board.files():
        if path.resolve() in {file.resolve() for file in files}:
            raise ValueError(
                f"{path} is an input of the storyboard: choose another --out"
            )
    job.check_writable(*files)
    jax.set_mesh(meshes.make_mesh(meshes.parse(FLAGS.mesh)))
    pipe = open_pipeline()
    folder = out.with_name(f"{out.stem}_shots")
    maker = storyboard.Maker(pipe, board, folder, FLAGS.overwrite)
    made = [*maker.there()]
    if len(made) == len(board.shots):
        film = storyboard.film_recipe(made, board, maker.fps)
        if recipes.is_finished(out, film, FLAGS.overwrite):
            return f"{out} exists already"
    elif any(file.exists() for file in files) and not FLAGS.overwrite:
        raise ValueError(
            f"{out} exists, and shot {len(made) + 1} is not in {folder} as it is "
            "described: add --overwrite, or choose another --out"
        )
    job.lock_folder(folder)
    steps = sum(maker.steps[len(made) :])
    with progress.Progress(steps, "generate", "clip steps", compiles=True) as bar:
        made += maker.shots(bar.update, skip=len(made))
    film = storyboard.film_recipe(made, board, maker.fps)
    storyboard.write(out, made, film, maker.fps)
    new = [str(number) for number, shot in enumerate(made, 1) if shot.is_new]
    return (
        f"{len(new)} of {len(made)} shots made{': ' * bool(new)}{', '.join(new)}\n"
        f"1 clip of {film['num_frames']} frames written: {out}"
    )


def make_task(pipe: pipeline.Pipeline, task: str, clip: dict, inputs: dict) -> str:
    """Makes one video of others, and writes it; says what was done."""
    call = {n: v for n, v in clip.items() if n not in ("prompt", "file")} | inputs
    request, _, windows = pipe.check_task(task, clip["prompt"], **call)
    file, first = clip["file"], jax.process_index() == 0
    recipe = pipe.recipe(request, 0) | pipe.task_recipe(task, **call)
    if recipes.is_finished(file, recipe, FLAGS.overwrite):
        return f"{file} exists already"
    note = recipes.check_format(file, request.num_frames, request.fps)
    steps = windows * request.num_inference_steps
    with progress.Progress(
        steps, "generate", "clip steps", process_index=not first, compiles=True
    ) as bar:
        output = pipe.run(
            task, clip["prompt"], progress=bar.update, batch_size=1, **call
        )
    frames = output.frames[0]
    if first:
        recipes.save(frames, file, recipe)
    return "\n".join(
        filter(None, [note, f"1 clip of {len(frames)} frames written: {file}"])
    )


def arguments(group: list[dict]) -> dict:
    """The pipeline's arguments for clips that run together."""
    return batches.arguments(group, FLAGS.batch_size)


def main() -> None:
    meshes.initialize()
    source = FLAGS["from"].value
    if FLAGS.gallery:
        return print(make_gallery(open_gallery()))
    if FLAGS.storyboard:
        return print(make_storyboard())
    recipe = recipes.read(source) if source else None
    task = task_of(recipe)
    wanted = clips(recipe)
    inputs = task_inputs(task, recipe)
    if FLAGS.out:
        batches.check_files(wanted)
    check_sheet(len(wanted))
    jax.set_mesh(meshes.make_mesh(meshes.parse(FLAGS.mesh)))
    rewriter = upsampler()
    if FLAGS.dry_run:
        calls = [arguments([clip]) for clip in wanted]
        loras = [*filter(None, (FLAGS.lora, FLAGS.lora_2))]
        report = estimate.report(FLAGS.model, calls, loras=loras, strict=FLAGS.strict)
        if rewriter is not None:
            report += "\nthese are the prompts as given: they will be rewritten first"
        return print(report)
    if FLAGS.prompts and not FLAGS.calibrate_step_cache:
        job.lock_folder(FLAGS.out)
    resume = bool(FLAGS.prompts) and not FLAGS.overwrite
    batches.draw_seeds(wanted, resume)
    pipe = open_pipeline()
    if recipe is not None:
        recipes.check_weights(recipe, pipe.source)
    if task:
        return print(make_task(pipe, task, wanted[0], inputs))
    if rewriter is not None:
        for clip in wanted:  # before anyone is paid
            pipe.check_inputs(**arguments([clip]))
        listed = FLAGS.prompts and FLAGS.out
        kept = pathlib.Path(FLAGS.out) / "upsampled.jsonl" if listed else None
        if kept and FLAGS.overwrite and jax.process_index() == 0:
            kept.unlink(missing_ok=True)
        batches.upsample(wanted, rewriter, kept)
    if FLAGS.calibrate_step_cache:
        job.lock_folder(FLAGS.model)  # the calibration is written there
        kinds = len(set(map(batches.shared, wanted)))
        return print(cached_sampling.run(pipe, kinds, **arguments(wanted)))
    groups, steps, notes = batches.plan(
        pipe, wanted, batch_size=FLAGS.batch_size, overwrite=FLAGS.overwrite
    )
    cache_calibration.check_recipe(recipe or {}, pipe.calibration)
    todo = sum(map(len, groups))
    if todo < len(wanted):
        notes.append(f"{len(wanted) - todo} of {len(wanted)} clips exist already")
    errors = {clip.get("step_cache", pipe.settings.step_cache) for clip in wanted}
    notes += [pipe.calibration.describe(error) for error in sorted(errors - {0})]
    first = jax.process_index() == 0
    if rewriter is not None:
        notes += batches.rewritten([clip for group in groups for clip in group])
    print("".join(f"{note}\n" for note in notes if first), end="", flush=True)
    if todo:
        make(pipe, groups, steps)
    if first and FLAGS.sheet:
        videos = [recipes.frames_of(clip["file"]) for clip in wanted]
        prompts = [getattr(c["prompt"], "text", c["prompt"]) for c in wanted]
        contact_sheet.write(pathlib.Path(FLAGS.sheet), videos, prompts)
    if first:
        print(f"{todo} clip{'s' * (todo != 1)} written: {FLAGS.out}")


if __name__ == "__main__":
    job.run(main, "generate")
