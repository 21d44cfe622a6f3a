"""diffusers' WanTransformer3DModel: forward, gradient, train step and sampling, timed.

Run by the peers' Python: `python timed_dit.py FOLDER THREADS`; see timed.py.
FOLDER/transformer is its folder, FOLDER/case.safetensors has the inputs, and
FOLDER/config.json says dtype, sampling, and of which weights gradients are compared.
"""

import json
import pathlib
import sys

import diffusers
import timed
import torch
from safetensors.torch import load_file


class Operations:
    """Each method does one piece of work; `compiled` ones go through torch.compile."""

    def __init__(self, folder: pathlib.Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.dtype = getattr(torch, self.config["dtype"])
        self.model = diffusers.WanTransformer3DModel.from_pretrained(
            folder / "transformer", torch_dtype=self.dtype
        ).to(timed.DEVICE)
        given = load_file(folder / "case.safetensors", device=timed.DEVICE)
        self.inputs = {name: x.to(self.dtype) for name, x in given.items()}
        self.level = given["level"]
        # The fastest form of each device; the default one is a loop over parameters.
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, weight_decay=0.01, fused=True
        )
        self.compiled = torch.compile(self.model)

    def velocity(self, model, x, level, text):
        return model(
            hidden_states=x,
            timestep=level * 1000,
            encoder_hidden_states=text,
            return_dict=False,
        )[0]

    @torch.inference_mode()
    def forward(self, model):
        given = self.inputs
        return self.velocity(model, given["x"], self.level, given["text"])

    def _backward(self, model):
        given = self.inputs
        found = self.velocity(model, given["x"], self.level, given["text"])
        loss = torch.mean((found.float() - given["target"].float()) ** 2)
        self.optimizer.zero_grad()
        loss.backward()
        return loss.detach()

    def gradient(self, model):
        self._backward(model)
        named = dict(self.model.named_parameters())
        return torch.cat(
            [named[name].grad.float().flatten() for name in self.config["gradients"]]
        )

    def train(self, model):
        loss = self._backward(model)
        self.optimizer.step()
        return loss

    def _checkpointed(self, work):
        self.model.enable_gradient_checkpointing()
        try:
            return work(self.model)
        finally:
            self.model.disable_gradient_checkpointing()

    @torch.inference_mode()
    def sample(self, model):
        """As WanPipeline does: two calls a step."""
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
            shift=self.config["shift"]
        )
        scheduler.set_timesteps(self.config["steps"], device=timed.DEVICE)
        x = self.inputs["x"].float()
        for timestep in scheduler.timesteps:
            level = (timestep / 1000).expand(x.shape[0])
            given = x.to(self.dtype)
            text = self.velocity(model, given, level, self.inputs["text"])
            null = self.velocity(model, given, level, self.inputs["null"])
            guided = null + self.config["guidance"] * (text - null)
            x = scheduler.step(guided, timestep, x, return_dict=False)[0]
        return x

    def named(self):
        """The operations by name."""
        found = {}
        for name in ("forward", "gradient", "train", "sample"):
            work = getattr(self, name)
            found[name] = lambda work=work: work(self.model)
            found[f"{name}_compiled"] = lambda work=work: work(self.compiled)
        for name in ("gradient", "train"):
            work = getattr(self, name)
            label = f"{name}_checkpointed"
            found[label] = lambda work=work: self._checkpointed(work)
        return found


def main(folder: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    folder = pathlib.Path(folder)
    timed.serve(folder, Operations(folder).named())


if __name__ == "__main__":
    main(*sys.argv[1:])
