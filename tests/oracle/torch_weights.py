"""Writes files of feature weights as torch does, for the tests of reading them.

Run by the peers' Python: `python torch_weights.py OUT` writes I3D under the names of each
port (LAYOUT.pt, and LAYOUT.safetensors to compare with); TorchScripts with StyleGAN-V's
arguments, one whose names are a port's (named.pt), one whose names say nothing
(ordered.pt), one that computes twice what it should (other.pt); a pickle that runs code
(code.pt); and small files under the names of V-JEPA and VideoMAE-v2.
"""

import pathlib
import sys

import torch
import torch_i3d
from safetensors.torch import save_file


class Detector(torch.nn.Module):
    """The network behind the arguments of StyleGAN-V's file."""

    def __init__(self, network, gain: float = 1.0):
        super().__init__()
        self.network, self.gain = network, gain

    def forward(
        self,
        x,
        rescale: bool = False,
        resize: bool = False,
        return_features: bool = True,
    ):
        return self.network(x)[0] * self.gain


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def forget_names(model: torch.nn.Module) -> torch.nn.Module:
    """Renames every convolution and norm, so that only their order tells which is which."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            kinds = {torch.nn.Conv3d: "c", torch.nn.BatchNorm3d: "n"}
            if type(child) in kinds:
                setattr(module, kinds[type(child)], child)
                delattr(module, name)
                if name == "conv3d":
                    object.__setattr__(module, "conv3d", child)
                else:
                    module.norm = "n"
    return model


def main(out: str) -> None:
    out = pathlib.Path(out)
    models = {
        layout: torch_i3d.random_i3d(layout, eps)
        for layout, eps in (("piergiaj", 1e-5), ("hassony2", 1e-3))
    }
    for layout, model in models.items():
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(state, out / f"{layout}.safetensors")
        torch.save(state, out / f"{layout}.pt")
    video = torch.rand(1, 3, 16, 224, 224) * 2 - 1

    def script(model, gain: float = 1.0):
        traced = torch.jit.trace(model, video, check_trace=False)
        return torch.jit.script(Detector(traced, gain))

    script(models["hassony2"]).save(out / "named.pt")
    script(models["hassony2"], 2.0).save(out / "other.pt")
    script(forget_names(models["hassony2"])).save(out / "ordered.pt")
    torch.save({"a.weight": torch.zeros(2)}, out / "unknown.pt")
    torch.save({"a": Code(out / "code_was_run")}, out / "code.pt")
    small = {"module.backbone.pos_embed": torch.zeros(1, 2, 4)}
    jepa = {"encoder": small, "target_encoder": small, "epoch": 3}
    torch.save(jepa, out / "vjepa.pth.tar")
    probe = {"module.pooler.query_tokens": torch.zeros(1, 1, 4)}
    torch.save({"classifier": probe, "epoch": 3}, out / "probe.pth.tar")
    videomae = {"blocks.0.attn.q_bias": torch.zeros(4)}
    torch.save({"module": videomae}, out / "videomae.pth")


if __name__ == "__main__":
    with torch.inference_mode():
        main(*sys.argv[1:])
