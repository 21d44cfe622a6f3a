"""Computes what the peer libraries compute, for the tests to compare with.

Run by the peers' Python, never by ours: `python golden.py OUT [CASE ...]` writes, for
each case of `cases.json`, random weights, inputs and the peer's outputs to
OUT/CASE.safetensors. Names in a file begin with weight/, in/ or out/.
"""

import json
import pathlib
import sys

import diffusers
import torch
import transformers
from safetensors.torch import save_file

CASES = pathlib.Path(__file__).with_name("cases.json")


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Moves every parameter off its initial value, as far as training might.

    Peers start norms at 1, biases at 0 and scale tables small: a port that ignored
    them, or mixed two up, would pass.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def autoencoder(case: dict) -> tuple[torch.nn.Module, dict, dict]:
    config = case["config"]
    model = randomize(diffusers.AutoencoderKLWan(**config))
    inputs, outputs = {}, {}
    for i, (b, t, h, w) in enumerate(case["videos"]):
        video = 2 * torch.rand(b, 3, t, h, w) - 1
        stride = config.get("scale_factor_spatial", 8)
        shape = (b, config["z_dim"], 1 + (t - 1) // 4, h // stride, w // stride)
        latents = torch.randn(shape)
        inputs[f"video{i}"], inputs[f"latents{i}"] = video, latents
        posterior = model.encode(video).latent_dist
        outputs[f"mean{i}"], outputs[f"logvar{i}"] = posterior.mean, posterior.logvar
        outputs[f"video{i}"] = model.decode(latents).sample
    return model, inputs, outputs


def text_encoder(case: dict) -> tuple[torch.nn.Module, dict, dict]:
    config = transformers.UMT5Config(**case["config"])
    model = randomize(transformers.UMT5EncoderModel(config))
    inputs, outputs = {}, {}
    for i, (b, length) in enumerate(case["texts"]):
        ids = torch.randint(config.vocab_size, (b, length))
        lengths = torch.randint(1, length + 1, (b,))
        lengths[0] = length
        mask = torch.arange(length)[None] < lengths[:, None]
        inputs[f"ids{i}"], inputs[f"mask{i}"] = ids, mask
        states = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        outputs[f"states{i}"] = states
    return model, inputs, outputs


def transformer(case: dict) -> tuple[torch.nn.Module, dict, dict]:
    config = case["config"]
    model = randomize(diffusers.WanTransformer3DModel(**config))
    inputs, outputs = {}, {}
    for i, (b, t, h, w) in enumerate(case["latents"]):
        latents = torch.randn(b, config["in_channels"], t, h, w)
        text = torch.randn(b, case["text_length"], config["text_dim"])
        text[-1, case["text_length"] // 2 :] = 0  # as Wan's pipeline pads
        timestep = torch.tensor([1000.0 * (j + 0.3) / b for j in range(b)])
        # Wan 2.2's form: one level for each token, here 0 for those of the first frame.
        pt, ph, pw = model.config.patch_size
        tokens = timestep[:, None].repeat(1, (t // pt) * (h // ph) * (w // pw))
        tokens[:, : (h // ph) * (w // pw)] = 0
        inputs |= {
            f"latents{i}": latents,
            f"text{i}": text,
            f"timestep{i}": timestep,
        }
        outputs[f"velocity{i}"] = model(latents, timestep, text).sample
        outputs[f"velocity_per_token{i}"] = model(latents, tokens, text).sample
    with torch.enable_grad():  # of the last size, with a level for each token
        weight = torch.randn_like(latents)
        inputs["weight"] = weight
        (model(latents, tokens, text).sample * weight).sum().backward()
    for name, parameter in model.named_parameters():
        outputs[f"gradient/{name}"] = parameter.grad
    return model, inputs, outputs


MAKERS = {
    "AutoencoderKLWan": autoencoder,
    "UMT5EncoderModel": text_encoder,
    "WanTransformer3DModel": transformer,
}


def main(out: str, *names: str) -> None:
    cases = json.loads(CASES.read_text())
    for name in names or cases:
        torch.manual_seed(0)
        with torch.no_grad():
            model, inputs, outputs = MAKERS[cases[name]["model"]](cases[name])
        groups = {"weight": model.named_parameters(), "in": inputs.items()}
        groups["out"] = outputs.items()
        tensors = {
            f"{group}/{key}": tensor.detach().contiguous()
            for group, items in groups.items()
            for key, tensor in items
        }
        save_file(tensors, pathlib.Path(out) / f"{name}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
