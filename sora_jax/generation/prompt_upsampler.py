"""Rewrites short prompts as the detailed captions that a denoiser was trained on.

A model that learned from long captions follows short prompts less well (DALL-E 3, section
3.5), so a short prompt is rewritten first. Three upsamplers do it: `Rules` for the toy
world, `Network` for one that was trained on pairs of captions
(configs/toy_upsampler.py), and `Chat` for a language model behind a chat API.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
import string
from collections.abc import Sequence
from typing import Protocol

import jax

from sora_jax.captioning import captioner, chat_api, checks
from sora_jax.core import mesh as meshes
from sora_jax.data import texts
from sora_jax.generation.request import Upsampled
from sora_jax.toyworld import captions, upsampling
from sora_jax.training import trained_captioner

INSTRUCTION = pathlib.Path(__file__).parent / "upsample.txt"
_MOST_TOKENS = 400  # of an answer
_TRIES = 3  # answers for one prompt, until one can be used


class Upsampler(Protocol):
    """Rewrites prompts; `id` is stored with each video."""

    id: str

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Upsampled]:
        """Rewrites each prompt; another seed may give another text.

        Raises:
          ValueError, OSError: a prompt cannot be rewritten; the message says why.
        """


class Rules:
    """Fills in what a prompt of the toy world leaves open; see `toyworld/upsampling`.

    Args:
      tier: of caption that it writes.

    Raises:
      ValueError: an unknown tier.
    """

    def __init__(self, tier: str = "structured"):
        if tier not in captions.TIERS or tier == "alt":
            known = [name for name in captions.TIERS if name != "alt"]
            raise ValueError(f"rules write {', '.join(known)}, not {tier!r}")
        self.tier, self.id = tier, f"rules:{tier}"

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Upsampled]:
        """See `Upsampler`. A prompt that states nothing of the toy world stays as it is."""
        return [
            Upsampled(upsampling.upsample(prompt, self.tier, seed), prompt, self.id)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]


class Network:
    """A network that was trained to rewrite captions, as objective "upsampler".

    Args:
      model: its run, or folder.
      tier: of caption that it writes; None: the last one that it learned.
      beams: of the search for a likely text. The result does not depend on the seed.

    Raises:
      FileNotFoundError, ValueError: it is missing or damaged, reads videos, or does not
        write this tier.
    """

    def __init__(
        self, model: str | pathlib.Path, tier: str | None = None, beams: int = 1
    ):
        self._loaded, self._beams = trained_captioner.load(model, "text"), beams
        config = self._loaded.config
        self.tier = config.tiers[-1] if tier is None else tier
        if self.tier not in config.tiers:
            raise ValueError(f"{model} writes {', '.join(config.tiers)}, not {tier!r}")
        self.id = f"network-{self._loaded.digest}:{self.tier}"

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Upsampled]:
        """See `Upsampler`. A text that does not end leaves its prompt as it is.

        Raises:
          ValueError: a prompt is longer than those that the network reads.
        """
        del seeds
        most = self._loaded.config.read_length
        for prompt in prompts:
            if (count := len(self._loaded.tokenizer.ids(prompt))) > most:
                raise ValueError(
                    f"{prompt!r} has {count} tokens; the upsampler reads {most}"
                )
        written = self._loaded.write(list(prompts), self.tier, beams=self._beams)
        return [
            Upsampled(text or prompt, prompt, self.id)
            for prompt, (text, _) in zip(prompts, written, strict=True)
        ]


class Chat:
    """A language model behind the chat completions API.

    Args:
      url: up to and with the version, such as http://localhost:8000/v1.
      model: its name at the server.
      instruction: a text with the field $prompt; by default, upsample.txt beside this file.
      limits: of the requests.

    Raises:
      ValueError: the address or the instruction cannot be used.
    """

    def __init__(
        self,
        url: str,
        model: str,
        instruction: str | None = None,
        limits: chat_api.Limits = chat_api.Limits(),
    ):
        text = texts.read_text(INSTRUCTION) if instruction is None else instruction
        self._template = string.Template(text.strip())
        if not self._template.is_valid() or (
            set(self._template.get_identifiers()) != {"prompt"}
        ):
            raise ValueError(
                "the instruction of an upsampler has the field $prompt, and no other"
            )
        self._client, self._model = chat_api.Client(url, limits), model
        self._threads = limits.concurrency
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.id = f"model:{model} prompt:{digest}"

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Upsampled]:
        """See `Upsampler`."""
        with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
            try:
                return [*pool.map(self._upsampled, prompts, seeds)]
            except BaseException:
                self._client.stop()  # so that the other threads do not wait
                pool.shutdown(cancel_futures=True)
                raise

    def _upsampled(self, prompt: str, seed: int) -> Upsampled:
        reason = ""
        for number in range(_TRIES):
            answer = self._client.ask(
                {
                    "model": self._model,
                    "messages": [
                        {
                            "role": "user",
                            "content": self._template.substitute(prompt=prompt),
                        }
                    ],
                    "max_completion_tokens": _MOST_TOKENS,
                    "temperature": 0.7,
                    "seed": (seed + number) % 2**31,
                }
            )
            if isinstance(answer, captioner.Failure):
                raise OSError(
                    f"the prompt {prompt!r} is not rewritten: {answer.reason}"
                )
            reason = checks.problem_of_text(answer, "model_dense")
            if reason is None:
                return Upsampled(checks.cleaned(answer.text), prompt, self.id)
        raise ValueError(
            f"no answer of {self._model} for {prompt!r} can be used: the last one, {reason}"
        )


def shared(
    upsampler: Upsampler, prompts: Sequence[str], seeds: Sequence[int]
) -> list[Upsampled]:
    """Rewrites prompts in the first process, and hands the texts to the others."""
    if jax.process_count() == 1:
        return upsampler(prompts, seeds)
    written, error = "", ""
    if jax.process_index() == 0:
        try:
            made = upsampler(prompts, seeds)
            written = json.dumps([dataclasses.astuple(prompt) for prompt in made])
        except (OSError, ValueError) as failure:
            error = str(failure) or type(failure).__name__
    if error := meshes.broadcast_text(error):
        raise ValueError(error)
    return [Upsampled(*values) for values in json.loads(meshes.broadcast_text(written))]
