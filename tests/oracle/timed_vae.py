"""The peer's video autoencoder, timed one operation at a time as it is asked.

Run by the peers' Python: `python timed_vae.py FOLDER THREADS`; see timed.py.
FOLDER/config.json is the config of an AutoencoderKLWan and FOLDER/case.safetensors
holds its weights (weight/) and inputs (in/).
"""

import json
import pathlib
import sys

import diffusers
import timed
import torch
from safetensors.torch import load_file


class Operations:
    """Each method does one piece of work and returns what is compared."""

    def __init__(self, folder: pathlib.Path):
        case = load_file(folder / "case.safetensors")
        config = json.loads((folder / "config.json").read_text())
        self.model = diffusers.AutoencoderKLWan.from_config(config)
        weights = {
            k.removeprefix("weight/"): v for k, v in case.items() if "weight/" in k
        }
        self.model.load_state_dict(weights)
        self.inputs = {k.removeprefix("in/"): v for k, v in case.items() if "in/" in k}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    @torch.inference_mode()
    def encode(self):
        return self.model.encode(self.inputs["video"]).latent_dist.mean

    @torch.inference_mode()
    def decode(self):
        return self.model.decode(self.inputs["latents"]).sample

    def _conv3d(self, layout):
        x = self.inputs["x"].to(memory_format=layout)
        kernel = self.inputs["kernel"].to(memory_format=layout)
        return lambda: torch.nn.functional.conv3d(
            torch.nn.functional.pad(x, (1, 1, 1, 1, 2, 0)), kernel
        )

    @torch.inference_mode()
    def conv3d(self):
        return self._conv3d(torch.contiguous_format)()

    @torch.inference_mode()
    def conv3d_channels_last(self):
        return self._conv3d(torch.channels_last_3d)()

    def train(self):
        """Mean squared error of the decoded mean, backwards, and a step of AdamW."""
        video = self.inputs["video"]
        mean = self.model.encode(video).latent_dist.mean
        loss = torch.mean((self.model.decode(mean).sample - video) ** 2)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def main(folder: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    folder = pathlib.Path(folder)
    operations = Operations(folder)
    names = ("encode", "decode", "train", "conv3d", "conv3d_channels_last")
    timed.serve(folder, {name: getattr(operations, name) for name in names})


if __name__ == "__main__":
    main(*sys.argv[1:])
