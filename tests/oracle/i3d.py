"""Writes what I3D in PyTorch computes on random weights, for the tests to compare.

Run by the peers' Python: `python i3d.py OUT` writes OUT/LAYOUT.safetensors with the
tensors of each layout under its names and OUT/LAYOUT.pt, the same as torch saves them;
OUT/features.safetensors with clips (clips/T, uint8) and what each network makes of them
at either epsilon (LAYOUT/EPS/T/logits and pooled, and LAYOUT/EPS/resized/logits for clips
of 64 x 64 resized as StyleGAN-V's code does); and OUT/scripted.pt, a TorchScript of the
first with the arguments that StyleGAN-V's has.
"""

import pathlib
import sys

import torch
import torch_i3d
from safetensors.torch import save_file
from torch.nn import functional

FRAMES = (16, 32, 9)


class Detector(torch.nn.Module):
    """The network behind the arguments of StyleGAN-V's file."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(
        self,
        x,
        rescale: bool = False,
        resize: bool = False,
        return_features: bool = True,
    ):
        return self.network(x)[0]


def main(out: str) -> None:
    out, found = pathlib.Path(out), {}
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    clips = {t: draw(1, 3, t, 224, 224) for t in FRAMES}
    small = draw(2, 3, 16, 64, 64)
    found = {f"clips/{t}": clip for t, clip in clips.items()} | {"clips/small": small}
    for layout in ("piergiaj", "hassony2"):
        for eps in (1e-3, 1e-5):
            model = torch_i3d.random_i3d(layout, eps)
            for t in FRAMES if eps == 1e-3 else (16, 32):
                logits, pooled = model(clips[t].float() * 2 / 255 - 1)
                found[f"{layout}/{eps}/{t}/logits"] = logits
                found[f"{layout}/{eps}/{t}/pooled"] = pooled
        frames = small.transpose(1, 2).flatten(0, 1).float()
        frames = functional.interpolate(
            frames, size=(224, 224), mode="bilinear", align_corners=False
        )
        resized = frames.view(2, 16, 3, 224, 224).transpose(1, 2) * 2 / 255 - 1
        found[f"{layout}/{eps}/resized/logits"] = model(resized)[0]
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(state, out / f"{layout}.safetensors")
        torch.save(state, out / f"{layout}.pt")
    model = torch_i3d.random_i3d("hassony2", 1e-3)
    traced = torch.jit.trace(model, clips[16].float(), check_trace=False)
    torch.jit.script(Detector(traced)).save(out / "scripted.pt")
    save_file(
        {k: v.contiguous() for k, v in found.items()}, out / "features.safetensors"
    )


if __name__ == "__main__":
    with torch.inference_mode():
        main(*sys.argv[1:])
