"""Wan's folders in diffusers' layout as pipelines and as runs.

A folder states the sizes of its networks and its scheduler, but not the size and frame
rate of the videos that it was trained on; these are the defaults of Wan's releases.
"""

import dataclasses
import pathlib

import jax
import numpy as np

from sora_jax.core import digests
from sora_jax.data import tokenizer
from sora_jax.generation import cache_calibration, request
from sora_jax.training import checkpoint, pretrained, run_folder

TEXT_LENGTH = 512  # tokens, zero-padded
_EXPERTS = {"transformer": "dit", "transformer_2": "dit_2"}


def settings(folder: pretrained.Folder) -> request.Settings:
    """The settings of Wan 2.1 T2V, Wan 2.2 TI2V-5B or T2V-A14B.

    Which of them it is follows from the experts and the scheduler, not from the sizes of
    the networks.
    """
    video = {"num_frames": 81, "height": 480, "width": 832, "fps": 16.0}
    guidance = {"guidance_scale": 5.0}
    if folder.takes_images:  # TI2V-5B
        video = {"num_frames": 121, "height": 704, "width": 1280, "fps": 24.0}
    elif folder.boundary is not None:  # T2V-A14B
        video |= {"height": 720, "width": 1280}
        guidance = {"guidance_scale": 4.0, "guidance_scale_2": 3.0}
    return request.Settings(
        **video,
        **guidance,
        text_length=TEXT_LENGTH,
        shift=folder.scheduler.shift,
        known_tau=0.0,
        num_inference_steps=40 if folder.boundary is not None else 50,
        sampler=folder.scheduler.sampler,
        batch_size=1,
        levels="diffusers",
        boundary=folder.boundary,
        takes_images=folder.takes_images,
        trained_patterns=("none", *["first_frame"] * folder.takes_images),
    )


def read_tokenizer(folder: pretrained.Folder) -> tokenizer.Tokenizer:
    """Reads the tokenizer; ValueError if the text encoder has a smaller vocabulary."""
    loaded = tokenizer.load(folder.tokenizer, clean_texts=True)
    size = folder.components["text_encoder"].config.vocab_size
    if loaded.vocab_size > size:
        raise ValueError(
            f"{folder.tokenizer} has {loaded.vocab_size} tokens, but the text encoder has "
            f"{size}"
        )
    return loaded


def parts(folder: pretrained.Folder, dtype: str | None) -> dict:
    """The arguments of a folder's `Pipeline`; see `Pipeline.from_pretrained`."""
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    experts = {
        ours: folder.components[name].computing(dtype).module()
        for name, ours in _EXPERTS.items()
        if name in folder.components
    }
    return experts | {
        "text_encoder": folder.components["text_encoder"].computing(dtype),
        # Decoding in less than float32 is visible, and decoding costs little.
        "vae": folder.components["vae"].computing("float32").module(),
        "tokenizer": read_tokenizer(folder),
        "settings": settings(folder),
        "source": {"model": folder.path.resolve().name, "weights": folder.digest()},
        "calibration": folder.path / cache_calibration.FILE,
    }


def run_config(folder: pretrained.Folder, dtype: str) -> dict:
    """The config of the run that a folder becomes: the fields needed to use it."""
    text = dataclasses.asdict(folder.components["text_encoder"].config)
    sample = dataclasses.asdict(settings(folder))
    del text["dim"]  # the denoiser's text_dim
    length, shift, known_tau, levels = (
        sample.pop(name)
        for name in ("text_length", "shift", "known_tau", "trained_levels")
    )
    transformer = dataclasses.asdict(folder.components["transformer"].config)
    return {
        "objective": "denoiser",
        "model": {
            "dit": transformer | {"dtype": dtype},
            "text_encoder": text | {"dtype": dtype},
        },
        "text": {"length": length, "clean": True, "frozen": True},
        "noise": {"shift": shift, "levels": levels},
        "known": {"known_tau": known_tau},
        "sample": sample,
        "weights": folder.digest(),  # identifies weights that no run has trained
    }


def to_run(
    folder: pretrained.Folder, target: pathlib.Path, dtype: str | None = None
) -> None:
    """Writes a folder as a run at step 0; the config is written last.

    The experts' weights pass through the current mesh; the other components are copied.

    Args:
      folder: checked.
      target: the run folder.
      dtype: of the experts' weights and of the run's computation; None: bfloat16, or
        float32 if the weights are stored so.
    """
    if dtype is None:
        stored = {v.dtype for v in folder.components["transformer"].tensors.values()}
        dtype = "float32" if stored == {np.dtype(np.float32)} else "bfloat16"
    read_tokenizer(folder)  # raises if the run could not be opened
    config = run_config(folder, dtype)
    params = {
        ours: folder.components[name].load(dtype)
        for name, ours in _EXPERTS.items()
        if name in folder.components
    }
    checkpoint.save_run(target, params)
    for name in ("text_encoder", "vae"):
        folder.components[name].copy_to(target / name)
    file = folder.tokenizer
    digests.copy(file, target / f"tokenizer{file.suffix}")
    run_folder.claim(target, config)
