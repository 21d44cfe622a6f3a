"""What Wan's models use where a call says nothing: the defaults of their own releases.

A folder in diffusers' layout says how large its networks are and which scheduler it has,
but not for which size and rate of video it was trained.
"""

import html
import importlib
import importlib.util

from sora_jax.generation import request
from sora_jax.training import pretrained

TEXT_LENGTH = 512  # tokens, zero-padded


def settings(folder: pretrained.Folder) -> request.Settings:
    """The settings of Wan 2.1 T2V, Wan 2.2 TI2V-5B or T2V-A14B, told by their form.

    A pipeline of any size of network has them; tiny ones are asked for other videos.
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
        clean_prompts=True,
    )


def clean(prompt: str) -> str:
    """A prompt as Wan's pipelines clean it before the tokenizer sees it.

    Broken encodings are mended where ftfy is installed, HTML is unescaped twice, white
    space becomes single spaces.
    """
    if importlib.util.find_spec("ftfy"):
        prompt = importlib.import_module("ftfy").fix_text(prompt)
    return " ".join(html.unescape(html.unescape(prompt)).split())
