"""Lists the names and shapes of Wan 2.1 1.3B's parameters, without any weights.

Run by the peers' Python: `python names.py > tests/golden/wan_2_1_1_3b_names.json`.
"""

import diffusers
import torch
import transformers


def main() -> None:
    with torch.device("meta"):
        models = [
            diffusers.WanTransformer3DModel(
                num_attention_heads=12,
                attention_head_dim=128,
                in_channels=16,
                out_channels=16,
                text_dim=4096,
                freq_dim=256,
                ffn_dim=8960,
                num_layers=30,
                cross_attn_norm=True,
                qk_norm="rms_norm_across_heads",
            ),
            diffusers.AutoencoderKLWan(),
            transformers.UMT5EncoderModel(
                transformers.UMT5Config(
                    vocab_size=256384,
                    d_model=4096,
                    d_kv=64,
                    d_ff=10240,
                    num_layers=24,
                    num_heads=64,
                )
            ),
        ]
    listed = []
    for model in models:
        shapes = {name: list(p.shape) for name, p in model.named_parameters()}
        lines = [f'"{name}": {shape}' for name, shape in sorted(shapes.items())]
        listed.append(f'"{type(model).__name__}": {{\n' + ",\n".join(lines) + "\n}")
    print("{\n" + ",\n".join(listed) + "\n}")


if __name__ == "__main__":
    main()
