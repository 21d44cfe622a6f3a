"""A captioner behind the chat completions API of OpenAI, vLLM, SGLang and others.

A request holds the instruction and some of the clip's frames as JPEG pictures. Requests
keep to a rate that all threads share. What may pass (a full or failing server, a timeout,
an answer that is no JSON) is tried again with exponential backoff and jitter, or when the
server says (Retry-After); what cannot pass ends the job.

The key comes from an environment variable. It is sent in the header and nowhere else: it
is removed from what servers say before that is shown or stored.
"""

import base64
import dataclasses
import email.utils
import hashlib
import http.client
import io
import json
import math
import os
import pathlib
import random
import string
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from sora_jax.captioning import captioner
from sora_jax.data import records, samples, texts

KEY = "SORA_CAPTIONER_KEY"  # environment variable
PROMPTS = pathlib.Path(__file__).parent / "prompts"

_MOST_TOKENS = {"model_short": 80, "model_dense": 450}  # of an answer
_JPEG_QUALITY = 90
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}
# Wrong key, address or model: the same for every clip. 403 may be about one picture.
_LASTING = {401, 402, 404, 405}
_MOST_BYTES = 1 << 22  # of a response
_LONGEST_WAIT = 60.0  # seconds of backoff
_TOLD = 20.0  # seconds; a longer wait that the server asks for is printed
_MOST_IN_A_ROW = 10  # clips without an answer, after which the job ends


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


@dataclasses.dataclass(frozen=True)
class Limits:
    """How the server is used.

    Attributes:
      rate: requests a second; those that fail count.
      concurrency: requests at a time.
      timeout: seconds until a request is given up.
      attempts: requests for one answer.
      backoff: seconds before the second attempt, doubled for each further one.
    """

    rate: float = 5.0
    concurrency: int = 8
    timeout: float = 120.0
    attempts: int = 6
    backoff: float = 1.0


class _Passing(Exception):
    """A request failed for a reason that may pass; `wait`: seconds that the server asks."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class _OfThisClip(Exception):
    """The server refuses this request, and perhaps no other."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: following it would hand the key to another server."""

    def redirect_request(self, *arguments) -> None:
        return None


class Chat:
    """A `captioner.Captioner` that asks a server.

    Args:
      url: up to and with the version, such as http://localhost:8000/v1.
      settings, limits: see there.
      prompts: the instruction of each tier; see `read_prompts`.

    Raises:
      ValueError: the URL cannot be used.
    """

    batch_size = 1

    def __init__(
        self,
        url: str,
        settings: Settings,
        prompts: Mapping[str, string.Template],
        limits: Limits = Limits(),
    ):
        self._url = f"{_checked_url(url)}/chat/completions"
        self._key = os.environ.get(KEY, "").strip()
        if not self._key.isprintable() or not self._key.isascii():
            raise ValueError(f"the key in {KEY} is not one line of ASCII characters")
        self.settings, self.limits, self.templates = settings, limits, dict(prompts)
        self.id, self.concurrency = settings.model, limits.concurrency
        self.prompts = {
            tier: hashlib.sha256(template.template.encode()).hexdigest()
            for tier, template in self.templates.items()
        }
        asked = [dataclasses.asdict(settings), _JPEG_QUALITY, _MOST_TOKENS]
        text = json.dumps(asked, sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        # A proxy of the environment is not asked for what is on this machine.
        own = [urllib.request.ProxyHandler({})] if _is_local(url) else []
        self._opener = urllib.request.build_opener(_NoRedirects, *own)
        self._lock, self._next = threading.Lock(), 0.0
        self._failed_in_a_row = 0
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Ends all waiting: requests under way are the last ones."""
        self._stopped.set()

    def caption(
        self, clips: Sequence[records.ClipRecord], tier: str, seed: int
    ) -> list[captioner.Answer | captioner.Failure]:
        """Asks for each clip; see `captioner.Captioner`."""
        return [self._caption(clip, tier, seed) for clip in clips]

    def _caption(self, clip, tier, seed) -> captioner.Answer | captioner.Failure:
        try:
            body = json.dumps(self.body(clip, tier, seed)).encode()
        except records.CorruptRecord as error:
            return captioner.Failure(str(error), requests=0, lasting=True)
        reason, attempt, lasting = "the job was stopped", 0, False
        while attempt < self.limits.attempts and self._may_go():
            attempt += 1
            try:
                answer = dataclasses.replace(self._ask(body), requests=attempt)
            except _OfThisClip as error:
                reason, lasting = str(error), True
                break
            except _Passing as error:
                reason = str(error)
                longest = min(_LONGEST_WAIT, self.limits.backoff * 2 ** (attempt - 1))
                self._hold(error.wait)
                # Jitter, so that threads that failed together do not return together.
                if attempt < self.limits.attempts:
                    self._stopped.wait(longest * random.uniform(0.5, 1.0))
            else:
                self._failed_in_a_row = 0
                return answer
        if not self._stopped.is_set():
            self._count_failure(reason)
        return captioner.Failure(reason, attempt, lasting)

    def _count_failure(self, reason: str) -> None:
        with self._lock:
            self._failed_in_a_row += 1
            count = self._failed_in_a_row
        if count >= _MOST_IN_A_ROW:
            raise OSError(
                f"the server gave no answer to {count} clips in a row: {reason}; the same "
                "command goes on"
            )

    def _hold(self, seconds: float) -> None:
        """Lets no thread ask before so many seconds have passed."""
        until = time.monotonic() + seconds
        with self._lock:
            later = until > self._next + _TOLD
            self._next = max(self._next, until) if seconds else self._next
        if later and seconds > _TOLD:
            print(f"the server asks to wait {seconds:.0f} s", file=sys.stderr)

    def _may_go(self) -> bool:
        """Waits for this thread's turn under the rate; False if the job was stopped."""
        while not self._stopped.is_set():
            with self._lock:
                now = time.monotonic()
                if now >= self._next:
                    self._next = now + 1 / self.limits.rate
                    return True
                wait = self._next - now
            self._stopped.wait(wait)
        return False

    # -- one request --------------------------------------------------------------------

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

    def _ask(self, body: bytes) -> captioner.Answer:
        """Sends one request.

        Raises:
          _Passing, _OfThisClip: it failed; the message says why.
          ValueError: the key, the address or the model is wrong.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, body, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.limits.timeout) as response:
                content = self._read(response)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            text = f"{type(reason).__name__}: {reason}" if str(reason) else repr(reason)
            raise _Passing(self._clean(text)) from None
        try:
            return _parse(json.loads(content))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            shown = self._clean(content[:200].decode(errors="replace"))
            raise _Passing(f"the response is no chat completion: {shown!r}") from None

    def _read(self, response) -> bytes:
        """Reads a response; its parts may come slowly, but not for longer than the limit."""
        end, parts, size = time.monotonic() + self.limits.timeout, [], 0
        while part := response.read1(1 << 16):
            parts.append(part)
            size += len(part)
            if time.monotonic() > end:
                raise TimeoutError(f"the response took over {self.limits.timeout:g} s")
            if size > _MOST_BYTES:
                raise OSError(f"the response is larger than {_MOST_BYTES} bytes")
        return b"".join(parts)

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        try:
            said = error.read(2000).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            said = ""
        text = f"HTTP {error.code} {error.reason}: {said}".strip(" :")
        text = texts.normalise(self._clean(text))[:300]
        if error.code in _PASSING:
            return _Passing(text, _seconds_to_wait(error.headers.get("Retry-After")))
        if error.code in _LASTING or 300 <= error.code < 400:
            key = f" and the key in {KEY}" if error.code in (401, 402) else ""
            return ValueError(f"the server refuses: {text}; check --url, --model{key}")
        return _OfThisClip(text)

    def _clean(self, text: str) -> str:
        """Returns a text of the server without the key."""
        return text.replace(self._key, "***") if self._key else text


def _checked_url(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    is_web = parts.scheme in ("http", "https") and bool(parts.hostname)
    # The text of the URL is not repeated: it may hold a password.
    if not is_web or parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "--url is an address such as http://localhost:8000/v1, without a user, a "
            f"password or a query; a key belongs in the environment variable {KEY}"
        )
    if parts.scheme == "http" and os.environ.get(KEY) and not _is_local(url):
        print(
            f"--url is not encrypted: the key in {KEY} can be read on the way to the "
            "server",
            file=sys.stderr,
        )
    return url.rstrip("/").removesuffix("/chat/completions")


def _is_local(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname
    return host in ("localhost", "::1") or host.startswith("127.")


def _seconds_to_wait(header: str | None) -> float:
    """Reads Retry-After: seconds, or a date; 0 where there is none."""
    if not header:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = (
                email.utils.parsedate_to_datetime(header).timestamp() - time.time()
            )
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), 3600.0) if math.isfinite(seconds) else 0.0


def _parse(response: dict[str, Any]) -> captioner.Answer:
    """Reads a chat completion; raises LookupError, TypeError or the like if it is none."""
    choice = response["choices"][0]
    message, usage = choice["message"], response.get("usage") or {}
    text, stopped = message.get("content"), choice.get("finish_reason") or "stop"
    if isinstance(text, list):  # parts, as some servers answer
        text = "".join(part["text"] for part in text if part.get("type") == "text")
    if message.get("refusal"):
        text, stopped = message["refusal"], "refusal"
    if not isinstance(text or "", str):
        raise TypeError("the content is no text")
    return captioner.Answer(
        text or "",
        str(stopped),
        int(usage.get("prompt_tokens") or 0),
        int(usage.get("completion_tokens") or 0),
    )


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
