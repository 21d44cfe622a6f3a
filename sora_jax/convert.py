"""Weights of diffusers to runs of ours and back; files of feature networks to folders.

    python -m sora_jax.convert --from Wan2.1-T2V-1.3B-Diffusers --out runs/wan_1_3b
    python -m sora_jax.convert --from runs/toy --out toy-diffusers --license apache-2.0 \\
        --name "Toy" --training_data "Eight thousand clips of the toy world."
    python -m sora_jax.convert --from i3d_pretrained_400.pt --eps 1e-5 --out weights/i3d
    python -m sora_jax.convert --from i3d_torchscript.pt --trust_torchscript \\
        --out weights/i3d
    python -m sora_jax.convert --from vgg16-397923af.pth --lpips_heads vgg.pth \\
        --out lpips.safetensors

The direction follows from what --from names: a folder in diffusers' layout becomes the
checkpoint of a run at step 0, which generates, is evaluated and begins other runs
(`train --init`); a run becomes a folder in diffusers' layout with a model card. What the
other side cannot express is named, and nothing is written. A file (.pt, .pth, .pth.tar,
.npz) is one of the feature networks that distances between videos use; with --lpips_heads
two files of torch's become the one that LPIPS is measured with.
"""

import contextlib
import pathlib
import shutil

import jax
from absl import flags

from sora_jax.core import job, paths
from sora_jax.core import mesh as meshes
from sora_jax.evals.features import weight_folders
from sora_jax.generation import export, pipeline, wan
from sora_jax.training import perceptual, pretrained, torch_files

FLAGS = flags.FLAGS
flags.DEFINE_string("from", None, "Run, or folder in diffusers' layout.", required=True)
flags.DEFINE_string("out", None, "The folder to write.", required=True)
flags.DEFINE_enum("dtype", None, pretrained.DTYPES, "Of the run's weights.")
flags.DEFINE_bool("strict", False, "Refuse diffusers' fields that are not known.")
flags.DEFINE_string("mesh", "fsdp=-1", job.MESH)
flags.DEFINE_string(
    "expert_2", None, "Run of the expert for levels below --boundary, beside --from."
)
flags.DEFINE_float("boundary", None, "Level at which --expert_2 takes over.")
flags.DEFINE_string("license", None, "Card: the hub's name of it, such as apache-2.0.")
flags.DEFINE_string("name", export.Card.name, "Card: what the model is called.")
flags.DEFINE_string("base_model", None, "Card: the hub's name of what it began with.")
flags.DEFINE_list("datasets", [], "Card: names on the hub.")
for _name in ("training_data", "intended_use", "limits"):
    flags.DEFINE_string(_name, getattr(export.Card, _name), "Card: sentences.")
flags.DEFINE_string("lpips_heads", None, "vgg.pth or alex.pth of the lpips package.")
flags.DEFINE_string(
    "torch_python", str(torch_files.PEERS), "Python that reads files of torch's."
)
flags.DEFINE_float("eps", None, "Features: epsilon of I3D's norms, 1e-3 or 1e-5.")
flags.DEFINE_string("probe", None, "Features: JEDi's probe, beside V-JEPA's encoder.")
flags.DEFINE_bool(
    "trust_torchscript", False, "Features: run --from, a program, to read its weights."
)
flags.DEFINE_string(
    "sha256",
    weight_folders.STYLEGAN_V,
    "Features: of the only TorchScript that is run.",
)

_OF_FILES = ("torch_python", "eps", "probe", "trust_torchscript", "sha256")
_OF_RUNS = ("expert_2", "boundary", "license", "name", "base_model", "datasets")
_OF_RUNS += ("training_data", "intended_use", "limits")


def refuse(names: tuple[str, ...], why: str) -> None:
    """Raises ValueError where one of these flags is given in vain."""
    for name in names:
        if FLAGS[name].present:
            raise ValueError(f"--{name} has no meaning {why}")


def to_diffusers(source: pathlib.Path, target: pathlib.Path) -> None:
    """Writes a run, or the runs of two experts, in diffusers' layout."""
    refuse(("dtype", "strict"), "for a run: its weights leave as they are")
    if not FLAGS.license:
        raise ValueError(
            "give --license, the hub's name of the licence under which the weights may "
            "be used, such as apache-2.0"
        )
    if (FLAGS.expert_2 is None) != (FLAGS.boundary is None):
        raise ValueError("--expert_2 and --boundary go together")
    load = pipeline.Pipeline.from_pretrained
    pipe = load(source, keep_text_encoder=False)
    if FLAGS.expert_2:
        other = load(FLAGS.expert_2, keep_text_encoder=False)
        pipe = pipe.with_expert(other, FLAGS.boundary)
    card = export.Card(
        license=FLAGS.license,
        name=FLAGS.name,
        base_model=FLAGS.base_model,
        datasets=tuple(FLAGS.datasets),
        training_data=FLAGS.training_data,
        intended_use=FLAGS.intended_use,
        limits=FLAGS.limits,
    )
    pipe.save_pretrained(target, card)


def lpips(trunk: pathlib.Path, target: pathlib.Path) -> None:
    """Makes one file of LPIPS's published two."""
    refuse((*_OF_RUNS, "dtype", "strict", "mesh"), "for weights of LPIPS")
    if target.exists():
        raise ValueError(f"{target} is there already: choose another file")
    paths.check_writable(target)
    heads, python = pathlib.Path(FLAGS.lpips_heads), FLAGS.torch_python
    made = perceptual.convert(trunk, heads, target, python)
    print(f"{target} written: {made.config.network}, SHA-256 {made.sha256[:16]}")


def to_features(source: pathlib.Path, target: pathlib.Path) -> None:
    """Turns a file of feature weights into a folder."""
    refuse(("dtype", "strict", *_OF_RUNS), "for a file of feature weights")
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
    source, target = pathlib.Path(FLAGS["from"].value), pathlib.Path(FLAGS.out)
    if FLAGS.lpips_heads:
        return lpips(source, target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: --out names the folder to write")
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty: choose another folder")
    # Under its own name only when it is whole; what an interruption left is made anew.
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
                refuse(_OF_FILES, "for a folder in diffusers' layout")
                refuse(
                    _OF_RUNS, "for a folder in diffusers' layout, which becomes a run"
                )
                folder = pretrained.open_folder(source, strict=FLAGS.strict)
                wan.to_run(folder, partial, FLAGS.dtype)
            else:
                refuse(_OF_FILES, "for a run")
                to_diffusers(source, partial)
            if target.is_dir():
                target.rmdir()
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    with contextlib.suppress(OSError):  # an interrupted job had made it
        work.rmdir()
    print(f"{target} written")


if __name__ == "__main__":
    job.run(main, "convert")
