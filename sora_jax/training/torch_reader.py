"""Turns a file that torch wrote into safetensors. Run by the peers' Python, not by ours.

    python torch_reader.py SOURCE OUT [PROBE]

SOURCE is a pickle of tensors, read with weights_only, so that it can run no code; OUT
gets its tensors, dots between the keys of nested dicts. Where PROBE is given, SOURCE is a
TorchScript, which is a program: it is run on the clip of the file PROBE, and OUT also gets
what it makes of it, under "probe". The caller has checked the file's hash by then.

Nobody imports this file; it stands here because `torch_files.py` starts it.
"""

import sys

import safetensors.torch
import torch


def flatten(tree, name: str = ""):
    """Yields (dotted name, tensor) of nested dicts; what is no tensor is left out."""
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from flatten(value, f"{name}.{key}" if name else str(key))


def main(source: str, out: str, probe: str | None = None) -> None:
    if probe is None:
        tree = torch.load(source, map_location="cpu", weights_only=True)
        found = dict(flatten(tree))
    else:
        script = torch.jit.load(source, map_location="cpu").eval()
        found = {**dict(script.named_parameters()), **dict(script.named_buffers())}
        video = safetensors.torch.load_file(probe)["video"]
        options = {"rescale": False, "resize": False, "return_features": True}
        with torch.inference_mode():
            found["probe"] = script(video, **options)
    # Copies: a tensor may share its memory with another, which a file cannot.
    found = {name: x.detach().clone().contiguous() for name, x in found.items()}
    safetensors.torch.save_file(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
