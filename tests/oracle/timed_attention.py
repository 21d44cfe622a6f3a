"""torch's scaled_dot_product_attention, forward and with gradients, timed.

Run by the peers' Python: `python timed_attention.py FOLDER THREADS`; see timed.py.
FOLDER/case.safetensors has q, k and v [batch, tokens, heads, head size],
FOLDER/config.json their dtype.
"""

import json
import pathlib
import sys

import timed
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


def attend(qkv):
    heads_first = [x.transpose(1, 2) for x in qkv]
    return scaled_dot_product_attention(*heads_first).transpose(1, 2)


def forward(qkv):
    with torch.inference_mode():
        return attend(qkv)


def gradient(qkv):
    qkv = [x.detach().requires_grad_() for x in qkv]
    loss = torch.sum(torch.sin(attend(qkv).float()))
    return torch.cat([x.flatten() for x in torch.autograd.grad(loss, qkv)])


def with_cudnn(work, qkv):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return work(qkv)


def main(folder: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    folder = pathlib.Path(folder)
    dtype = getattr(torch, json.loads((folder / "config.json").read_text())["dtype"])
    given = load_file(folder / "case.safetensors", device=timed.DEVICE)
    qkv = [given[name].to(dtype) for name in "qkv"]
    operations = {}
    for name, work in (("forward", forward), ("gradient", gradient)):
        operations[name] = lambda work=work: work(qkv)
        operations[f"{name}_cudnn"] = lambda work=work: with_cudnn(work, qkv)
    timed.serve(folder, operations)


if __name__ == "__main__":
    main(*sys.argv[1:])
