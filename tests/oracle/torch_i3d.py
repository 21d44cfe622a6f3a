"""I3D in PyTorch, under the tensor names of either public port.

Run by the peers' Python. An independent rendering of the published architecture (arXiv
1705.07750, figures 2b and 3): it shares no code with ours nor with the ports, whose
names and registration orders it has ("piergiaj" for piergiaj/pytorch-i3d and what was
made from it, "hassony2" for hassony2/kinetics_i3d_pytorch). Pools are padded with
zeros, as both ports do.
"""

import torch
from torch import nn
from torch.nn import functional

BLOCKS = {
    "3b": (192, 64, 96, 128, 16, 32, 32),
    "3c": (256, 128, 128, 192, 32, 96, 64),
    "4b": (480, 192, 96, 208, 16, 48, 64),
    "4c": (512, 160, 112, 224, 24, 64, 64),
    "4d": (512, 128, 128, 256, 24, 64, 64),
    "4e": (512, 112, 144, 288, 32, 64, 64),
    "4f": (528, 256, 160, 320, 32, 128, 128),
    "5b": (832, 256, 160, 320, 32, 128, 128),
    "5c": (832, 384, 192, 384, 48, 128, 128),
}
NORM = {"piergiaj": "bn", "hassony2": "batch3d"}
STEM = {
    "piergiaj": ("Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3"),
    "hassony2": ("conv3d_1a_7x7", "conv3d_2b_1x1", "conv3d_2c_3x3"),
}
LOGITS = {"piergiaj": "logits", "hassony2": "conv3d_0c_1x1"}
MIXED = {"piergiaj": "Mixed_", "hassony2": "mixed_"}


def pad_same(x, kernel, stride):
    """Zeros around x so that a valid window operation gives ceil(size / stride)."""
    pads = []
    for size, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1], strict=True):
        missing = max(0, (k - s) if size % s == 0 else (k - size % s))
        pads += [missing // 2, missing - missing // 2]
    return functional.pad(x, pads)


class Unit(nn.Module):
    def __init__(self, i, o, k, stride, norm, eps):
        super().__init__()
        self.kernel, self.stride, self.norm = (k,) * 3, (stride,) * 3, norm
        self.conv3d = nn.Conv3d(i, o, k, stride, bias=norm is None)
        if norm:
            setattr(self, norm, nn.BatchNorm3d(o, eps=eps))

    def forward(self, x):
        x = self.conv3d(pad_same(x, self.kernel, self.stride))
        return torch.relu(getattr(self, self.norm)(x)) if self.norm else x


class Pool(nn.Module):
    def __init__(self, kernel, stride):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x):
        x = pad_same(x, self.kernel, self.stride)
        return functional.max_pool3d(x, self.kernel, self.stride)


class Block(nn.Module):
    """Four branches; only the names of their parts differ between the layouts."""

    def __init__(self, layout, i, o0, o1, p1, o2, p2, o3, eps):
        super().__init__()
        norm = NORM[layout]

        def unit(i, o, k):
            return Unit(i, o, k, 1, norm, eps)

        pool = Pool((3, 3, 3), (1, 1, 1))
        if layout == "piergiaj":
            self.b0 = unit(i, o0, 1)
            self.b1a, self.b1b = unit(i, o1, 1), unit(o1, p1, 3)
            self.b2a, self.b2b = unit(i, o2, 1), unit(o2, p2, 3)
            self.b3a, self.b3b = pool, unit(i, o3, 1)
        else:
            self.branch_0 = unit(i, o0, 1)
            self.branch_1 = nn.Sequential(unit(i, o1, 1), unit(o1, p1, 3))
            self.branch_2 = nn.Sequential(unit(i, o2, 1), unit(o2, p2, 3))
            self.branch_3 = nn.Sequential(pool, unit(i, o3, 1))

    def forward(self, x):
        if hasattr(self, "b0"):
            ways = [
                self.b0(x),
                self.b1b(self.b1a(x)),
                self.b2b(self.b2a(x)),
                self.b3b(self.b3a(x)),
            ]
        else:
            ways = [getattr(self, f"branch_{n}")(x) for n in range(4)]
        return torch.cat(ways, 1)


class I3D(nn.Module):
    """Clips [b, 3, t, 224, 224] in [-1, 1] to (logits [b, 400], pooled [b, 1024])."""

    def __init__(self, layout: str, eps: float):
        super().__init__()
        self.layout, norm = layout, NORM[layout]
        logits = Unit(1024, 400, 1, 1, None, eps)
        if layout == "piergiaj":  # registered first, which matters to who maps by order
            self.logits = logits
        first, second, third = STEM[layout]
        self.add_module(first, Unit(3, 64, 7, 2, norm, eps))
        self.add_module(second, Unit(64, 64, 1, 1, norm, eps))
        self.add_module(third, Unit(64, 192, 3, 1, norm, eps))
        for name, widths in BLOCKS.items():
            self.add_module(MIXED[layout] + name, Block(layout, *widths, eps))
        if layout == "hassony2":
            self.conv3d_0c_1x1 = logits
        self.flat_pool = Pool((1, 3, 3), (1, 2, 2))
        self.pools = {
            "4b": Pool((3, 3, 3), (2, 2, 2)),
            "5b": Pool((2, 2, 2), (2, 2, 2)),
        }

    def forward(self, x):
        first, second, third = (getattr(self, name) for name in STEM[self.layout])
        x = self.flat_pool(third(second(self.flat_pool(first(x)))))
        for name in BLOCKS:
            if name in self.pools:
                x = self.pools[name](x)
            x = getattr(self, MIXED[self.layout] + name)(x)
        pooled = functional.avg_pool3d(x, (2, 7, 7), (1, 1, 1))
        logits = getattr(self, LOGITS[self.layout])(pooled)
        return logits.mean((2, 3, 4)), pooled.mean((2, 3, 4))


def random_i3d(layout: str, eps: float, seed: int = 0) -> I3D:
    """An I3D whose activations neither vanish nor grow, all of it random.

    Variances reach down to where the two epsilons differ.
    """
    torch.manual_seed(seed)
    model = I3D(layout, eps).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    module.bias.normal_()
            if isinstance(module, nn.BatchNorm3d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.002, 2)
                module.weight.uniform_(0.5, 1.2).mul_(module.running_var.sqrt())
                module.bias.normal_(0, 0.1)
    return model
