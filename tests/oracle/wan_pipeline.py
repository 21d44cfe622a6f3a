"""Makes tiny random folders of Wan's forms and runs diffusers' pipelines on them.

Run by the peers' Python: `python wan_pipeline.py OUT`. OUT/FORM is a folder in
diffusers' layout; OUT/FORM.safetensors holds the noise that every run began with, and
the latents and frames that came of each.
"""

import json
import pathlib
import sys

import diffusers
import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

SIZE = {"num_frames": 9, "height": 32, "width": 64}
PROMPTS = ["a red  fox &amp;amp; a hen jump", "two blue birds"]
NEGATIVE = "grey, blurred"
WORDS = "a red blue fox hen jump two birds grey blurred & , s".split()
# Weights are spread until each of them matters: see the tests' controls.
SPREAD = 0.25


def spread(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            scale = SPREAD if parameter.ndim > 1 else 0.1
            noise = torch.randn_like(parameter) / max(1, parameter[0].numel()) ** 0.5
            parameter.add_(scale * (4 * noise if parameter.ndim > 1 else noise))
    return model.eval()


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"\u2581{word}", -2.0) for word in WORDS]
    pieces += [(letter, -8.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz&,;"]
    made = Tokenizer(models.Unigram(pieces, unk_id=2))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    from tokenizers.processors import TemplateProcessing

    made.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def transformer(channels: int) -> diffusers.WanTransformer3DModel:
    return spread(
        diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=channels,
            out_channels=channels, text_dim=32, freq_dim=16, ffn_dim=48, num_layers=2,
        )
    )  # fmt: skip


def video_vae(form: str) -> diffusers.AutoencoderKLWan:
    sizes = {
        "z_dim": 4, "base_dim": 8, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1,
        "latents_mean": [0.1, -0.2, 0.0, 0.3], "latents_std": [1.5, 0.7, 1.0, 2.0],
    }  # fmt: skip
    if form == "ti2v":
        sizes |= {
            "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
            "decoder_base_dim": 8, "scale_factor_spatial": 16,
        }  # fmt: skip
    return spread(diffusers.AutoencoderKLWan(**sizes))


def text_encoder() -> transformers.UMT5EncoderModel:
    config = transformers.UMT5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return spread(transformers.UMT5EncoderModel(config))


def scheduler(kind: str):
    if kind == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )


FORMS = {  # form -> scheduler, pipeline's own settings
    "t2v": ("unipc", {}),
    "t2v_euler": ("euler", {}),
    "ti2v": ("unipc", {"expand_timesteps": True}),
    "a14b": ("unipc", {"boundary_ratio": 0.875}),
}


def make(form: str) -> diffusers.WanPipeline:
    torch.manual_seed(len(form))
    kind, settings = FORMS[form]
    return diffusers.WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=video_vae(form),
        scheduler=scheduler(kind),
        transformer=transformer(4),
        transformer_2=transformer(4) if form == "a14b" else None,
        **settings,
    )


def run(form: str, pipe, out: dict) -> None:
    stride = 16 if form == "ti2v" else 8
    noise = torch.randn(2, 4, 3, SIZE["height"] // stride, SIZE["width"] // stride)
    out["noise"] = noise
    more = {"guidance_scale_2": 2.0} if form == "a14b" else {}
    common = {
        "negative_prompt": [NEGATIVE] * 2, "num_inference_steps": 12,
        "guidance_scale": 4.0, "latents": noise, **SIZE, **more,
    }  # fmt: skip
    for name, changes in {
        "whole": {},
        "other_prompt": {"prompt": ["two grey hen", "a fox"]},
        "no_guidance": {"guidance_scale": 1.0},
    }.items():
        arguments = {"prompt": PROMPTS} | common | changes
        out[f"latents/{name}"] = pipe(**arguments, output_type="latent").frames
    frames = pipe(prompt=PROMPTS, **common, output_type="np").frames
    out["frames"] = torch.from_numpy(np.asarray(frames))
    if form != "ti2v":
        return
    image_pipe = diffusers.WanImageToVideoPipeline(
        **pipe.components | {"image_encoder": None, "image_processor": None},
        expand_timesteps=True,
    )
    image = torch.rand(1, 3, SIZE["height"], SIZE["width"])
    out["image"] = image[0].permute(1, 2, 0)
    pixels = image_pipe.video_processor.preprocess(
        image, height=SIZE["height"], width=SIZE["width"]
    )
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    encoded = pipe.vae.encode(pixels[:, :, None]).latent_dist.mode()
    out["first_latent"] = (encoded - mean) / std
    out["latents/image"] = image_pipe(
        image=image, prompt=PROMPTS, **common, output_type="latent"
    ).frames


def main(out: str) -> None:
    torch.set_grad_enabled(False)
    diffusers.utils.logging.disable_progress_bar()
    folder = pathlib.Path(out)
    for form in FORMS:
        pipe = make(form)
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(folder / form)
        found: dict[str, torch.Tensor] = {}
        run(form, pipe, found)
        arrays = {name: tensor.contiguous() for name, tensor in found.items()}
        save_file(arrays, folder / f"{form}.safetensors")
    print(json.dumps({"prompts": PROMPTS, "negative_prompt": NEGATIVE, **SIZE}))


if __name__ == "__main__":
    main(*sys.argv[1:])
