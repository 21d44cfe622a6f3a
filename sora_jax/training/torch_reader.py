"""Converts a torch file to safetensors. Run by the peers' Python, not by ours.

    python torch_reader.py SOURCE OUT [PROBE]

SOURCE is a pickle of tensors, read with weights_only, so that it cannot run code; OUT
gets its tensors, with dots between the keys of nested dicts. With PROBE, SOURCE is a
TorchScript, which is a program: it is run on the clip in the file PROBE, and OUT also gets
the result as "probe". The caller has checked the file's hash.

No module imports this file; `torch_files.py` runs it.
"""

import sys

import safetensors.torch
import torch


def flatten(tree, name: str = ""):
    """Yields (dotted name, tensor) of nested dicts, skipping everything else."""
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from flatten(value, f"{name}.{key}" if name else str(key))


def main(source: str, out: str, probe: str | None = None) -> None:
    if probe is None:
        tree = torch.load(source, map_location="cpu", weights_only=True)
        tensors = dict(flatten(tree))
    else:
        script = torch.jit.load(source, map_location="cpu").eval()
        tensors = {**dict(script.named_parameters()), **dict(script.named_buffers())}
        video = safetensors.torch.load_file(probe)["video"]
        options = {"rescale": False, "resize": False, "return_features": True}
        with torch.inference_mode():
            tensors["probe"] = script(video, **options)
    # Copies, since safetensors refuses tensors that share memory.
    tensors = {name: x.detach().clone().contiguous() for name, x in tensors.items()}
    safetensors.torch.save_file(tensors, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
