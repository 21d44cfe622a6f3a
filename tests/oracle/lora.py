"""Loads our LoRA file with diffusers, and makes one with peft, on a tiny Wan transformer.

Run by the peers' Python: `python lora.py FOLDER FILE OUT`. FOLDER holds a transformer,
FILE is our LoRA file for it. OUT/theirs.safetensors is the file that diffusers writes of
adapters of several ranks and scales; OUT/found.safetensors holds the inputs and what the
transformer computes of them without adapters, with ours and with theirs.
"""

import pathlib
import sys

import diffusers
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

PEFT = {
    "r": 4, "lora_alpha": 6, "rank_pattern": {"attn2.to_k": 2, "ffn.net.2": 3},
    "alpha_pattern": {"attn2.to_k": 5, "ffn.net.2": 1},
    "target_modules": ["to_q", "attn2.to_k", "to_out.0", "ffn.net.2", "patch_embedding"],
}  # fmt: skip


def transformer(folder: pathlib.Path) -> diffusers.WanTransformer3DModel:
    return diffusers.WanTransformer3DModel.from_pretrained(folder).eval()


def pipeline(model: diffusers.WanTransformer3DModel) -> diffusers.WanPipeline:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler,
        transformer=model,
    )  # fmt: skip


def main(folder: str, file: str, out: str) -> None:
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    folder, out = pathlib.Path(folder), pathlib.Path(out)
    model = transformer(folder)
    config = model.config
    found = {
        "latents": torch.randn(2, config.in_channels, 2, 4, 4),
        "text": torch.randn(2, 6, config.text_dim),
        "timestep": torch.tensor([250.0, 800.0]),
    }

    def velocity(model):
        inputs = (found[name] for name in ("latents", "timestep", "text"))
        return model(*inputs).sample

    found["velocity/none"] = velocity(model)
    pipeline(model).load_lora_weights(file)
    found["velocity/ours"] = velocity(model)

    model = transformer(folder)
    model.add_adapter(LoraConfig(**PEFT))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.2 * torch.randn_like(parameter))
    found["velocity/theirs"] = velocity(model)
    diffusers.WanPipeline.save_lora_weights(
        out,
        get_peft_model_state_dict(model),
        weight_name="theirs.safetensors",
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    arrays = {name: tensor.contiguous() for name, tensor in found.items()}
    save_file(arrays, out / "found.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
