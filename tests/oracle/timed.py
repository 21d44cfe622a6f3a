"""Operations of a peer library that are timed one at a time, as they are asked for.

Scripts here give `serve` what they can do. Each line of standard input names an
operation and how often it is done; the seconds for each time are written as a line, or
`error` and why there are none. `save` writes what the operations gave the first time to
FOLDER/peer.safetensors, `versions` says what they are made of.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping

import torch
from safetensors.torch import save_file

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def serve(folder, operations: Mapping[str, Callable[[], torch.Tensor]]) -> None:
    results = {}
    for line in sys.stdin:
        name, *count = line.split()
        if name == "save":
            save_file(results, folder / "peer.safetensors")
            print("saved", flush=True)
            continue
        if name == "versions":
            libraries = [sys.modules.get(n) for n in ("torch", "diffusers")]
            print(
                json.dumps({m.__name__: m.__version__ for m in libraries if m}),
                flush=True,
            )
            continue
        try:
            wait()
            began = time.perf_counter()
            for _ in range(int(count[0])):
                result = operations[name]()
            wait()
            seconds = (time.perf_counter() - began) / int(count[0])
        except Exception as error:  # the peer's own, of any kind: said, and survived
            first = (str(error).splitlines() or [""])[0]
            print(f"error {name}: {type(error).__name__}: {first}", flush=True)
            continue
        if name not in results:
            results[name] = result.detach().float().cpu().contiguous().clone()
        print(seconds, flush=True)
