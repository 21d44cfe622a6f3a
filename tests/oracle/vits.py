"""Writes what public video transformers compute, for the tests to compare.

Run by the peers' Python: `python vits.py OUT` writes OUT/NAME.safetensors for each case,
with names that begin with weight/, in/ or out/, and OUT/NAME.json, its config.
VideoMAE, V-JEPA 2 and CLIP are those of transformers. `videomae_v2` and `vjepa_1` are the
files that CD-FVD and JEDi load: their networks are rendered here from the published
architectures (arXiv 2303.16727, 2404.08471), independent of ours.
"""

import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional


def randomize(model: nn.Module) -> nn.Module:
    """Moves every parameter off its initial value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def videomae(mean_pooling: bool):
    config = transformers.VideoMAEConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3,
        intermediate_size=40, image_size=28, patch_size=14, num_frames=4,
        use_mean_pooling=mean_pooling, num_labels=5,
    )  # fmt: skip
    video = torch.randn(2, 4, 3, 28, 28)
    if not mean_pooling:
        model = randomize(transformers.VideoMAEModel(config))
        tokens = model(video).last_hidden_state
        return model, config, {"video": video}, {"tokens": tokens}
    model = randomize(transformers.VideoMAEForVideoClassification(config))
    tokens = model.videomae(video).last_hidden_state
    found = {"tokens": tokens, "features": model.fc_norm(tokens.mean(1))}
    return model, config, {"video": video}, found


def vjepa_2():
    config = transformers.VJEPA2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, crop_size=32,
        patch_size=8, frames_per_clip=8, num_pooler_layers=2, pred_hidden_size=12,
        pred_num_attention_heads=2, pred_num_hidden_layers=1, num_labels=5,
    )  # fmt: skip
    model = randomize(transformers.VJEPA2ForVideoClassification(config))
    video = torch.randn(2, 8, 3, 32, 32)
    tokens = model.vjepa2(video, skip_predictor=True).last_hidden_state
    found = {"tokens": tokens, "features": model.pooler(tokens)}
    return model, config, {"video": video}, found


def clip():
    half = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    config = transformers.CLIPConfig(
        text_config=half | {"hidden_size": 24, "vocab_size": 50, "eos_token_id": 49},
        vision_config=half | {"hidden_size": 32, "image_size": 28, "patch_size": 7},
        projection_dim=20,
    )
    model = randomize(transformers.CLIPModel(config))
    pixels, ids = torch.randn(3, 3, 28, 28), torch.randint(0, 49, (4, 12))
    for row, end in enumerate((3, 11, 0, 7)):
        ids[row, end] = 49
    out = model(input_ids=ids, pixel_values=pixels)
    # The model's own output is normalised; the features are what comes before.
    vision = model.vision_model(pixels).pooler_output
    text = model.text_model(ids).pooler_output
    found = {
        "vision": model.visual_projection(vision),
        "text": model.text_projection(text),
        "cosine": out.image_embeds @ out.text_embeds.T,
    }
    return model, config, {"pixels": pixels, "ids": ids}, found


def attend(q, k, v, heads: int):
    """Plain softmax attention of [b, n, d] queries and [b, m, d] keys and values."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Layers(nn.Module):
    """The parts of a block under the names of the original files."""

    def __init__(self, d: int, f: int, split_biases: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d, eps=1e-6), nn.LayerNorm(d, eps=1e-6)
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(d, 3 * d, bias=not split_biases)
        if split_biases:
            self.attn.q_bias = nn.Parameter(torch.zeros(d))
            self.attn.v_bias = nn.Parameter(torch.zeros(d))
        self.attn.proj = nn.Linear(d, d)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(d, f), nn.Linear(f, d)

    def forward(self, x, heads: int):
        qkv = self.attn.qkv(self.norm1(x))
        if hasattr(self.attn, "q_bias"):
            zero = torch.zeros_like(self.attn.q_bias)
            qkv = qkv + torch.cat([self.attn.q_bias, zero, self.attn.v_bias])
        x = x + self.attn.proj(attend(*qkv.chunk(3, -1), heads))
        hidden = functional.gelu(self.mlp.fc1(self.norm2(x)))
        return x + self.mlp.fc2(hidden)


class Encoder(nn.Module):
    def __init__(self, d, f, depth, patch, split_biases):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv3d(3, d, patch, patch)
        self.blocks = nn.ModuleList(Layers(d, f, split_biases) for _ in range(depth))

    def embed(self, video):
        return self.patch_embed.proj(video.transpose(1, 2)).flatten(2).transpose(1, 2)


def videomae_v2():
    model = Encoder(24, 40, 2, (2, 14, 14), True)
    model.fc_norm, model.head = nn.LayerNorm(24, eps=1e-6), nn.Linear(24, 5)
    randomize(model)
    video = torch.randn(2, 4, 3, 28, 28)
    x = model.embed(video)
    place = torch.arange(x.shape[1], dtype=torch.float64)[:, None]
    angle = place / 10000 ** (torch.arange(0, 24, 2, dtype=torch.float64) / 24)
    x = x + torch.stack([angle.sin(), angle.cos()], -1).flatten(1).float()
    for block in model.blocks:
        x = block(x, 3)
    config = {"dim": 24, "mlp_dim": 40, "num_layers": 2, "num_heads": 3}
    config |= {"num_frames": 4, "size": 28}
    return model, config, {"video": video}, {"features": model.fc_norm(x.mean(1))}


def vjepa_1():
    d, f = 32, 48
    encoder = Encoder(d, f, 2, (2, 8, 8), False)
    encoder.pos_embed = nn.Parameter(torch.randn(1, 2 * 9, d))
    encoder.norm = nn.LayerNorm(d, eps=1e-6)
    probe = nn.Module()
    probe.pooler = nn.Module()
    probe.pooler.query_tokens = nn.Parameter(torch.zeros(1, 1, d))
    block = nn.Module()
    block.norm1, block.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
    block.xattn = nn.Module()
    block.xattn.q, block.xattn.kv = nn.Linear(d, d), nn.Linear(d, 2 * d)
    block.xattn.proj = nn.Linear(d, d)
    block.mlp = nn.Module()
    block.mlp.fc1, block.mlp.fc2 = nn.Linear(d, f), nn.Linear(f, d)
    probe.pooler.cross_attention_block = block
    probe.linear = nn.Linear(d, 5)
    model = nn.ModuleDict({"encoder": encoder, "probe": probe})
    randomize(model)
    video = torch.randn(2, 4, 3, 24, 24)
    x = encoder.embed(video) + encoder.pos_embed
    for layer in encoder.blocks:
        x = layer(x, 4)
    x = encoder.norm(x)
    query = probe.pooler.query_tokens.expand(len(x), -1, -1)
    keys, values = block.xattn.kv(block.norm1(x)).chunk(2, -1)
    seen = attend(block.xattn.q(query), keys, values, 4)
    query = query + block.xattn.proj(seen)
    hidden = functional.gelu(block.mlp.fc1(block.norm2(query)))
    query = query + block.mlp.fc2(hidden)
    config = {"dim": d, "mlp_dim": f, "num_layers": 2, "num_heads": 4}
    config |= {"num_frames": 4, "size": 24, "patch": [2, 8, 8]}
    return model, config, {"video": video}, {"tokens": x, "features": query[:, 0]}


CASES = {
    "videomae": lambda: videomae(False),
    "videomae_mean": lambda: videomae(True),
    "vjepa_2": vjepa_2,
    "clip": clip,
    "videomae_v2": videomae_v2,
    "vjepa_1": vjepa_1,
}


def main(out: str) -> None:
    for name, make in CASES.items():
        torch.manual_seed(0)
        with torch.inference_mode():
            model, config, inputs, outputs = make()
        groups = {"weight": model.state_dict(), "in": inputs, "out": outputs}
        tensors = {
            f"{group}/{key}": tensor.detach().clone().contiguous()
            for group, items in groups.items()
            for key, tensor in items.items()
        }
        save_file(tensors, pathlib.Path(out) / f"{name}.safetensors")
        text = config if isinstance(config, dict) else config.to_dict()
        (pathlib.Path(out) / f"{name}.json").write_text(json.dumps(text))


if __name__ == "__main__":
    main(*sys.argv[1:])
