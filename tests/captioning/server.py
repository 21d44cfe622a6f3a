"""A server of chat completions in a thread, which answers as a test wants it to."""

import base64
import collections
import contextlib
import dataclasses
import http.server
import io
import json
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import PIL.Image


@dataclasses.dataclass(frozen=True)
class Reply:
    """One response; by default a caption. `raw`: a body in the place of a completion."""

    text: str | None = (
        "A red dot rests on a grey ground, and nothing else can be seen in it."
    )
    status: int = 200
    stopped: str = "stop"
    refusal: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    raw: bytes | None = None
    delay: float = 0.0


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request: when it came, its headers, its body, and the first pixel it shows.

    `first` is empty where it shows no picture.
    """

    time: float
    headers: dict[str, str]
    body: dict
    first: tuple[int, ...]

    @property
    def text(self) -> str:
        """The text that it holds."""
        content = self.body["messages"][0]["content"]
        return content if isinstance(content, str) else content[0]["text"]

    @property
    def tier(self) -> str:
        """Which of the package's prompts it holds."""
        return "model_short" if "in one phrase" in self.text else "model_dense"

    @property
    def question(self) -> tuple:
        """What is asked, whichever attempt it is."""
        return self.first or self.text, self.tier, self.body["seed"]


def pictures(body: dict) -> list[np.ndarray]:
    """The pictures of a request."""
    content = body["messages"][0]["content"]
    parts = [] if isinstance(content, str) else content[1:]
    urls = [part["image_url"]["url"] for part in parts]
    files = [base64.b64decode(url.partition("base64,")[2]) for url in urls]
    return [np.asarray(PIL.Image.open(io.BytesIO(file))) for file in files]


@dataclasses.dataclass
class Server:
    """Its address, and all that it was asked, in order.

    `times` counts the requests of each question, with this one.
    """

    url: str
    asked: list[Asked]
    times: collections.Counter


@contextlib.contextmanager
def serve(reply: Callable[[Asked, int], Reply]) -> Iterator[Server]:
    """Runs a server; `reply` is given each request, and how often its question came."""
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            first = tuple(int(v) for p in pictures(body)[:1] for v in p[2, 2])
            asked = Asked(time.monotonic(), dict(self.headers), body, first)
            with lock:
                server.asked.append(asked)
                server.times[asked.question] += 1
                made = reply(asked, server.times[asked.question])
            time.sleep(made.delay)
            content = made.raw
            if content is None:
                message = {"role": "assistant", "content": made.text}
                message["refusal"] = made.refusal
                choice = {"index": 0, "message": message, "finish_reason": made.stopped}
                usage = {
                    "prompt_tokens": 100,
                    "completion_tokens": 10,
                    "total_tokens": 110,
                }
                content = json.dumps(
                    {"id": "c", "object": "chat.completion", "created": 1,
                     "model": body["model"], "choices": [choice], "usage": usage}
                ).encode()  # fmt: skip
            with contextlib.suppress(OSError):  # a client that gave up
                self.send_response(made.status)
                for name, value in made.headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    class Quiet(http.server.ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

    with Quiet(("127.0.0.1", 0), Handler) as http_server:
        url = f"http://127.0.0.1:{http_server.server_address[1]}/v1"
        server = Server(url, [], collections.Counter())
        thread = threading.Thread(target=http_server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            http_server.shutdown()
            thread.join()
