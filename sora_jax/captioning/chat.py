"""A captioner behind the chat completions API of OpenAI, vLLM, SGLang and others.

A request holds the instruction and some of the clip's frames as JPEG pictures; see
`chat_api` for how it is sent.
"""

import base64
import dataclasses
import hashlib
import io
import json
import math
import pathlib
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from sora_jax.captioning import captioner, chat_api
from sora_jax.data import records, samples, texts

PROMPTS = pathlib.Path(__file__).parent / "prompts"

_MOST_TOKENS = {"model_short": 80, "model_dense": 450}  # of an answer
_JPEG_QUALITY = 90


def read_prompts(names: Sequence[str]) -> dict[str, string.Template]:
    """Returns the instruction of each tier.

    Args:
      names: "dense" and "short", for the files of this package, or "dense=FILE".

    Raises:
      ValueError: an unknown name or field, or a file without text.
      OSError: the file cannot be read.
    """
    prompts = {}
    for name in names:
        kind, _, file = name.partition("=")
        tier = f"model_{kind}"
        if tier not in records.MODEL_TIERS or tier in prompts:
            kinds = [tier.removeprefix("model_") for tier in records.MODEL_TIERS]
            raise ValueError(
                f"--prompts names each of {', '.join(kinds)} once, or {kind}=FILE with an "
                f"instruction of your own; not {','.join(names)!r}"
            )
        path = pathlib.Path(file) if file else PROMPTS / f"{kind}.txt"
        text = texts.read_text(path).strip()
        template = string.Template(text)
        fields = set(template.get_identifiers())
        if not text or not template.is_valid() or fields - {"frames", "seconds"}:
            raise ValueError(
                f"{path} is no instruction: it needs text, and may have the fields "
                "$frames and $seconds; write $$ for a dollar sign"
            )
        prompts[tier] = template
    return prompts


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the answers, besides the prompts.

    Attributes:
      model: its name at the server.
      frames: of a clip that are sent, evenly spaced, the first and the last included.
      image_side: pixels of the longer side of a picture; smaller ones are enlarged.
      temperature: of the model's choices; above 0, so that another seed matters.
    """

    model: str
    frames: int = 8
    image_side: int = 448
    temperature: float = 0.3


class Chat:
    """A `captioner.Captioner` that asks a server.

    Args:
      url: up to and with the version, such as http://localhost:8000/v1.
      settings, limits: see there.
      prompts: the instruction of each tier; see `read_prompts`.

    Raises:
      ValueError: the URL cannot be used.
    """

    batch_size, is_assistant = 1, True

    def __init__(
        self,
        url: str,
        settings: Settings,
        prompts: Mapping[str, string.Template],
        limits: chat_api.Limits = chat_api.Limits(),
    ):
        self._client = chat_api.Client(url, limits)
        self.settings, self.templates = settings, dict(prompts)
        self.id, self.concurrency = settings.model, limits.concurrency
        self.prompts = {
            tier: hashlib.sha256(template.template.encode()).hexdigest()
            for tier, template in self.templates.items()
        }
        asked = [dataclasses.asdict(settings), _JPEG_QUALITY, _MOST_TOKENS]
        text = json.dumps(asked, sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def stop(self) -> None:
        """Ends all waiting: requests under way are the last ones."""
        self._client.stop()

    def caption(
        self, clips: Sequence[records.ClipRecord], tier: str, seed: int
    ) -> list[captioner.Answer | captioner.Failure]:
        """Asks for each clip; see `captioner.Captioner`."""
        return [self._caption(clip, tier, seed) for clip in clips]

    def _caption(self, clip, tier, seed) -> captioner.Answer | captioner.Failure:
        try:
            request = self.body(clip, tier, seed)
        except records.CorruptRecord as error:
            return captioner.Failure(str(error), requests=0, lasting=True)
        return self._client.ask(request)

    def body(self, clip: records.ClipRecord, tier: str, seed: int) -> dict[str, Any]:
        """Returns the body of the request for a clip.

        Raises:
          CorruptRecord: the clip does not decode.
        """
        frames_thwc = clip.frames()
        shown = samples.evenly(len(frames_thwc), self.settings.frames)
        seconds = f"{clip.num_frames / clip.fps:.1f}"
        text = self.templates[tier].substitute(frames=len(shown), seconds=seconds)
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        for index in shown:
            picture = _jpeg(frames_thwc[index], self.settings.image_side)
            url = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        return {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": content}],
            "max_completion_tokens": _MOST_TOKENS[tier],
            "temperature": self.settings.temperature,
            "seed": seed,
        }


# -- pictures ---------------------------------------------------------------------------


def picture_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Returns (height, width) of a picture whose longer side has `side` pixels."""
    scale = side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _jpeg(frame_hwc: np.ndarray, side: int) -> bytes:
    height, width = picture_size(*frame_hwc.shape[:2], side)
    image = PIL.Image.fromarray(frame_hwc)
    # Enlarged pixels keep their edges; a model would see a blur otherwise.
    larger = width > image.width
    filters = PIL.Image.Resampling
    image = image.resize(
        (width, height), filters.NEAREST if larger else filters.LANCZOS
    )
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return file.getvalue()


# -- what a job takes -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a number of requests takes, without repeated ones.

    Attributes:
      requests: of all tiers.
      image_tokens, text_tokens: that are sent: pictures, and instructions.
      output_tokens, most_output_tokens: usual, and at the limit.
    """

    requests: int
    image_tokens: int
    text_tokens: int
    output_tokens: int
    most_output_tokens: int


# A token of Qwen2.5-VL and its like is a square of this many pixels.
_PIXELS_OF_TOKEN = 28
_CHARACTERS_OF_TOKEN = 4.5  # of English
_USUAL_TOKENS = {"model_short": 15, "model_dense": 130}


def tokens_per_image(height: int, width: int, side: int) -> int:
    """Returns how many tokens a picture of a clip of that size takes, about."""
    sides = picture_size(height, width, side)
    return math.prod(max(1, round(pixels / _PIXELS_OF_TOKEN)) for pixels in sides)


def estimate(
    chat: Chat, questions: Mapping[str, int], frames: int, per_image: int
) -> Estimate:
    """Estimates what it takes to ask about clips.

    Args:
      chat: that is asked.
      questions: number of clips by tier.
      frames: of a clip; fewer may be sent.
      per_image: tokens of a picture.
    """
    sent = min(frames, chat.settings.frames)
    requests = sum(questions.values())
    text = sum(
        count * math.ceil(len(chat.templates[tier].template) / _CHARACTERS_OF_TOKEN)
        for tier, count in questions.items()
    )
    return Estimate(
        requests,
        requests * sent * per_image,
        text,
        sum(count * _USUAL_TOKENS[tier] for tier, count in questions.items()),
        sum(count * _MOST_TOKENS[tier] for tier, count in questions.items()),
    )
