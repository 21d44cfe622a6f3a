"""Converts weights between diffusers and sora_jax, and those of feature networks.

    python -m sora_jax.convert --from Wan2.1-T2V-1.3B-Diffusers --out runs/wan_1_3b
    python -m sora_jax.convert --from runs/toy --out toy-diffusers --license apache-2.0 \\
        --name "Toy" --training_data "Eight thousand clips of the toy world."
    python -m sora_jax.convert --from runs/toy --layout run --dtype float16 --out toy
    python -m sora_jax.convert --from runs/toy_lora --out toy_lora.safetensors
    python -m sora_jax.convert --from runs/toy/shards --layout webdataset --out tars
    python -m sora_jax.convert --from i3d_pretrained_400.pt --eps 1e-5 --out weights/i3d
    python -m sora_jax.convert --from i3d_torchscript.pt --trust_torchscript \\
        --out weights/i3d
    python -m sora_jax.convert --from vgg16-397923af.pth --lpips_heads vgg.pth \\
        --out lpips.safetensors

The direction follows from --from. A folder in diffusers' layout becomes a run at step 0,
which can generate, be evaluated, and initialise other runs (`train --init`). A run
becomes a folder in diffusers' layout with a model card, or with --layout run a run that
has its averaged weights alone, for others to use. Adapters (LoRA) are merged into the
weights there, or written alone where --out is a .safetensors file. With --layout
webdataset, shards of videos become tar archives as WebDataset reads them; the same
command resumes an interrupted job. If the other
format cannot express something, the error names it and nothing is written. A file (.pt,
.pth, .pth.tar, .npz) holds a feature network for distances between videos; with
--lpips_heads, two PyTorch files become the one file that LPIPS is measured with.
"""

import contextlib
import dataclasses
import pathlib
import shutil

import jax
from absl import flags

from sora_jax.core import job, paths
from sora_jax.core import mesh as meshes
from sora_jax.data import shards, texts, webdataset
from sora_jax.evals.features import weight_folders
from sora_jax.generation import export, pipeline, runs, wan
from sora_jax.training import lora_files, perceptual, pretrained, torch_files

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "from", None, "Run, folder in diffusers' layout, or weight file.", required=True
)
flags.DEFINE_string(
    "out",
    None,
    "Folder to write; with --lpips_heads, or for the adapters of a run, a file.",
    required=True,
)
flags.DEFINE_enum(
    "layout",
    "diffusers",
    ["diffusers", "run", "webdataset"],
    "What a run is turned into; webdataset: of video shards.",
)
flags.DEFINE_integer(
    "tar_mib", 512, "WebDataset: size of a tar archive, in MiB.", lower_bound=1
)
flags.DEFINE_enum(
    "dtype",
    None,
    runs.STORED,
    "Type of the written run's weights; default: bfloat16, or float32 if read as such.",
)
flags.DEFINE_bool("strict", False, "Fail on unknown fields in diffusers' configs.")
flags.DEFINE_string("mesh", "fsdp=-1", job.MESH)
flags.DEFINE_string(
    "expert_2", None, "Run of a second expert, for noise levels below --boundary."
)
flags.DEFINE_float("boundary", None, "Noise level below which --expert_2 denoises.")
flags.DEFINE_string("license", None, "Model card: hub identifier, such as apache-2.0.")
flags.DEFINE_string("name", export.Card.name, "Model card: name of the model.")
flags.DEFINE_string("base_model", None, "Model card: hub name of the base model.")
flags.DEFINE_list("datasets", [], "Model card: hub names of the data sets.")
for _name in ("training_data", "intended_use", "limits"):
    flags.DEFINE_string(
        _name,
        getattr(export.Card, _name),
        f"Model card: {_name.replace('_', ' ')}, as text.",
    )
flags.DEFINE_string("lpips_heads", None, "vgg.pth or alex.pth of the lpips package.")
flags.DEFINE_string(
    "torch_python", str(torch_files.PEERS), "Python with PyTorch, to read its files."
)
flags.DEFINE_float("eps", None, "Feature network: epsilon of I3D, 1e-3 or 1e-5.")
flags.DEFINE_string("probe", None, "Feature network: JEDi's probe for V-JEPA.")
flags.DEFINE_bool(
    "trust_torchscript",
    False,
    "Feature network: run --from, which is a TorchScript program, to read its weights.",
)
flags.DEFINE_string(
    "sha256",
    weight_folders.STYLEGAN_V,
    "Feature network: SHA-256 of the TorchScript program that may run.",
)

_FILE_FLAGS = ("torch_python", "eps", "probe", "trust_torchscript", "sha256")
_CARD_FLAGS = [field.name for field in dataclasses.fields(export.Card)]
_RUN_FLAGS = ("expert_2", "boundary", *_CARD_FLAGS)


def refuse(names: tuple[str, ...], why: str) -> None:
    """Raises ValueError if one of these flags is given."""
    for name in names:
        if FLAGS[name].present:
            raise ValueError(f"--{name} has no meaning {why}")


def to_released(source: pathlib.Path, target: pathlib.Path) -> None:
    """Writes a run's averaged weights as a run of their own."""
    refuse((*_RUN_FLAGS, "strict"), "with --layout run")
    runs.release(source, target, FLAGS.dtype or "float32")


def to_diffusers(source: pathlib.Path, target: pathlib.Path) -> None:
    """Writes a run, or the runs of two experts, in diffusers' layout."""
    refuse(("dtype", "strict"), "for a run, whose weights are written as they are")
    if not FLAGS.license:
        raise ValueError(
            "give --license, the hub's identifier of the weights' licence, such as "
            "apache-2.0"
        )
    if (FLAGS.expert_2 is None) != (FLAGS.boundary is None):
        raise ValueError("--expert_2 and --boundary go together")
    load = pipeline.Pipeline.from_pretrained
    pipe = load(source, keep_text_encoder=False)
    if FLAGS.expert_2:
        other = load(FLAGS.expert_2, keep_text_encoder=False)
        pipe = pipe.with_expert(other, FLAGS.boundary)
    card = export.Card(**{name: FLAGS[name].value for name in _CARD_FLAGS})
    pipe.save_pretrained(target, card)


def lpips(trunk: pathlib.Path, target: pathlib.Path) -> None:
    """Joins the two published files of LPIPS into one."""
    refuse((*_RUN_FLAGS, "dtype", "strict", "mesh"), "for weights of LPIPS")
    if target.exists():
        raise ValueError(f"{target} exists: choose another file")
    paths.check_writable(target)
    heads, python = pathlib.Path(FLAGS.lpips_heads), FLAGS.torch_python
    network = perceptual.convert(trunk, heads, target, python)
    print(f"{target} written: {network.config.network}, SHA-256 {network.sha256[:16]}")


def to_lora(run: pathlib.Path, target: pathlib.Path) -> None:
    """Writes the adapters of a run as a LoRA file."""
    refuse((*_RUN_FLAGS, *_FILE_FLAGS, "dtype", "strict", "mesh"), "for a LoRA file")
    if target.exists():
        raise ValueError(f"{target} exists: choose another file")
    paths.check_writable(target)
    lora_files.write_run(target, run)
    print(f"{target} written")


def to_webdataset(source: pathlib.Path, target: pathlib.Path) -> None:
    """Writes video shards as tar archives."""
    others = {*_RUN_FLAGS, *_FILE_FLAGS, "dtype", "strict", "mesh"}
    refuse(tuple(sorted(others)), "with --layout webdataset")
    opened = shards.open(source)
    paths.check_writable(target / "00000.tar.partial")
    job.lock_folder(target)
    manifest = webdataset.write(target, opened, FLAGS.tar_mib << 20)
    for damaged in manifest["damaged"]:
        print(f"skipped {texts.escaped(damaged)}")
    print(
        f"{target}: {len(opened) - len(manifest['damaged'])} clips in "
        f"{len(manifest['archives'])} archives"
    )


def to_features(source: pathlib.Path, target: pathlib.Path) -> None:
    """Turns a file of feature weights into a folder."""
    refuse(("dtype", "strict", *_RUN_FLAGS), "for a file of feature weights")
    if FLAGS["sha256"].present and not FLAGS.trust_torchscript:
        raise ValueError("--sha256 has no meaning without --trust_torchscript")
    weight_folders.convert(
        source,
        target,
        eps=FLAGS.eps,
        probe=FLAGS.probe and pathlib.Path(FLAGS.probe),
        trusted=FLAGS.sha256 if FLAGS.trust_torchscript else None,
        python=FLAGS.torch_python,
    )


def main() -> None:
    source, target = paths.model(FLAGS["from"].value), pathlib.Path(FLAGS.out)
    if FLAGS.lpips_heads:
        return lpips(source, target)
    if FLAGS.layout == "webdataset":
        return to_webdataset(source, target)
    refuse(("tar_mib",), "without --layout webdataset")
    if target.suffix == lora_files.SUFFIX:
        return to_lora(source, target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: --out names the folder to write")
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty: choose another folder")
    # Written under another name and renamed when whole; an interrupted job starts anew.
    work = target.with_name(target.name + ".partial")
    paths.check_writable(work / "README.md")
    jax.set_mesh(meshes.make_mesh(meshes.parse(FLAGS.mesh)))
    with paths.lock(work):
        partial = work / target.name
        shutil.rmtree(partial, ignore_errors=True)
        try:
            if source.is_file():
                to_features(source, partial)
            elif pretrained.is_folder(source):
                refuse(("layout",), "for a folder in diffusers' layout")
                if FLAGS.dtype == "float16":
                    raise ValueError("--dtype float16 is for --layout run")
                refuse(_FILE_FLAGS, "for a folder in diffusers' layout")
                refuse(
                    _RUN_FLAGS, "for a folder in diffusers' layout, which becomes a run"
                )
                folder = pretrained.open_folder(source, strict=FLAGS.strict)
                wan.to_run(folder, partial, FLAGS.dtype)
            else:
                refuse(_FILE_FLAGS, "for a run")
                if FLAGS.layout == "run":
                    to_released(source, partial)
                else:
                    to_diffusers(source, partial)
            if target.is_dir():
                target.rmdir()
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    with contextlib.suppress(OSError):  # left by an interrupted job
        work.rmdir()
    print(f"{target} written")


if __name__ == "__main__":
    job.run(main, "convert")
