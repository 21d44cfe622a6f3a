"""A client of the chat completions API of OpenAI, vLLM, SGLang and others.

Requests keep to a rate that all threads share. What may pass (a full or failing server, a
timeout, an answer that is no JSON) is tried again with exponential backoff and jitter, or
when the server says (Retry-After); what cannot pass raises an error.

The key comes from an environment variable. It is sent in the header and nowhere else: it
is removed from what servers say before that is shown or stored.
"""

import dataclasses
import email.utils
import http.client
import json
import math
import os
import random
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from sora_jax.captioning import captioner
from sora_jax.data import texts

KEY = "SORA_CHAT_KEY"  # environment variable

_PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}
# Wrong key, address or model: the same for every request. 403 may be about one picture.
_LASTING = {401, 402, 404, 405}
_MOST_BYTES = 1 << 22  # of a response
_LONGEST_WAIT = 60.0  # seconds of backoff
_TOLD = 20.0  # seconds; a longer wait that the server asks for is printed
_MOST_IN_A_ROW = 10  # requests without an answer, after which an error is raised


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


class _OfThisRequest(Exception):
    """The server refuses this request, and perhaps no other."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: following it would hand the key to another server."""

    def redirect_request(self, *arguments) -> None:
        return None


class Client:
    """Asks a server; may be used by several threads.

    Args:
      url: up to and with the version, such as http://localhost:8000/v1.
      limits: see there.

    Raises:
      ValueError: the URL or the key cannot be used.
    """

    def __init__(self, url: str, limits: Limits = Limits()):
        self._url = f"{_checked_url(url)}/chat/completions"
        self._key = os.environ.get(KEY, "").strip()
        if not self._key.isprintable() or not self._key.isascii():
            raise ValueError(f"the key in {KEY} is not one line of ASCII characters")
        self.limits = limits
        # A proxy of the environment is not asked for what is on this machine.
        own = [urllib.request.ProxyHandler({})] if _is_local(url) else []
        self._opener = urllib.request.build_opener(_NoRedirects, *own)
        self._lock, self._next = threading.Lock(), 0.0
        self._failed_in_a_row = 0
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Ends all waiting: requests under way are the last ones."""
        self._stopped.set()

    def ask(self, request: dict[str, Any]) -> captioner.Answer | captioner.Failure:
        """Sends the body of a request until it is answered or the attempts are used up.

        Raises:
          ValueError: the key, the address or the model is wrong.
          OSError: many requests in a row were not answered.
        """
        body = json.dumps(request).encode()
        reason, attempt, lasting = "the job was stopped", 0, False
        while attempt < self.limits.attempts and self._may_go():
            attempt += 1
            try:
                answer = dataclasses.replace(self._ask(body), requests=attempt)
            except _OfThisRequest as error:
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
                f"the server gave no answer to {count} requests in a row: {reason}; the same "
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

    def _ask(self, body: bytes) -> captioner.Answer:
        """Sends one request.

        Raises:
          _Passing, _OfThisRequest: it failed; the message says why.
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
            return ValueError(
                f"the server refuses: {text}; check the address, the model{key}"
            )
        return _OfThisRequest(text)

    def _clean(self, text: str) -> str:
        """Returns a text of the server without the key."""
        return text.replace(self._key, "***") if self._key else text


def _checked_url(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    is_web = parts.scheme in ("http", "https") and bool(parts.hostname)
    # The text of the URL is not repeated: it may hold a password.
    if not is_web or parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "a chat server has an address such as http://localhost:8000/v1, without a user, a "
            f"password or a query; a key belongs in the environment variable {KEY}"
        )
    if parts.scheme == "http" and os.environ.get(KEY) and not _is_local(url):
        print(
            f"the chat server's address is not encrypted: the key in {KEY} can be read on "
            "the way to it",
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
