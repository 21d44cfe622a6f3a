"""LPIPS in plain torch, on random weights under the names of the published files.

Run by the peers' Python: `python perceptual.py NETWORK OUT` writes OUT/trunk.pth and
OUT/heads.pth, in the old format that the published files have, and OUT/case.safetensors:
two batches of pictures [b, c, h, w] in [-1, 1] and the distance of each pair.

The lpips package itself needs scipy and the torchvision of the same build as torch. With
its version 0.1.4 (its own heads, random trunks) ours was compared once: the relative
error was 7.0e-8 with VGG16 and 2.4e-7 with AlexNet.
"""

import pathlib
import sys

import torch
from safetensors.torch import save_file
from torch import nn

# Kernel, stride, padding and output channels of each convolution; M is a maximum.
VGG16 = [
    (3, 1, 1, c) if c != "M" else c
    for c in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M")
] + [(3, 1, 1, 512)] * 3
ALEXNET = [
    (11, 4, 2, 64), "M", (5, 1, 2, 192), "M", (3, 1, 1, 384), (3, 1, 1, 256),
    (3, 1, 1, 256),
]  # fmt: skip
# Window of the maxima, and after which modules features are taken.
NETWORKS = {
    "vgg16": (VGG16, 2, (3, 8, 15, 22, 29)),
    "alexnet": (ALEXNET, 3, (1, 4, 7, 9, 11)),
}


def make(plan, window: int) -> nn.Sequential:
    modules, before = [], 3
    for entry in plan:
        if entry == "M":
            modules.append(nn.MaxPool2d(window, 2))
            continue
        kernel, stride, padding, width = entry
        modules += [nn.Conv2d(before, width, kernel, stride, padding), nn.ReLU()]
        before = width
    return nn.Sequential(*modules)


def features(trunk: nn.Sequential, picture, taken):
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    x, found = (picture - shift) / scale, []
    for number, module in enumerate(trunk):
        x = module(x)
        if number in taken:
            found.append(x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10))
    return found


@torch.no_grad()
def main(network: str, out: str) -> None:
    torch.manual_seed(0)
    plan, window, taken = NETWORKS[network]
    trunk = make(plan, window)
    for parameter in trunk.parameters():
        if parameter.ndim == 1:
            parameter.normal_(0, 0.1)
        else:
            nn.init.kaiming_normal_(parameter)
    first = torch.rand(3, 3, 43, 50) * 2 - 1
    second = (first + torch.tensor([0.05, 0.3, 1.0])[:, None, None, None]
              * torch.randn(first.shape)).clamp(-1, 1)  # fmt: skip
    total, heads = 0, {}
    pairs = zip(
        features(trunk, first, taken), features(trunk, second, taken), strict=True
    )
    for number, (a, b) in enumerate(pairs):
        head = torch.rand(1, a.shape[1], 1, 1)
        heads[f"lin{number}.model.1.weight"] = head
        total = total + nn.functional.conv2d((a - b) ** 2, head).mean((1, 2, 3))
    named = {f"features.{name}": p.clone() for name, p in trunk.state_dict().items()}
    named["classifier.0.weight"] = torch.zeros(4, 4)  # there, and not needed
    folder = pathlib.Path(out)
    for name, tensors in (("trunk", named), ("heads", heads)):
        file = folder / f"{name}.pth"
        torch.save(tensors, file, _use_new_zipfile_serialization=False)
    case = {"first": first, "second": second, "distance": total}
    save_file(case, folder / "case.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
