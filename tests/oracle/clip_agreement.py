"""Writes a small random CLIP as transformers stores it, and how texts agree with frames.

Run by the peers' Python: `python clip_agreement.py FOLDER FRAMES TEXTS OUT`. FOLDER has
vocab.json and merges.txt, and gets the weights. FRAMES is a safetensors file with
uint8 frames [n, t, 28, 28, 3], TEXTS a JSON list; OUT becomes a list of 100 times the
mean over frames of the cosine, of each clip with each text.
"""

import json
import pathlib
import sys

import torch
import transformers
import vits
from safetensors.torch import load_file

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


@torch.inference_mode()
def main(folder: str, frames: str, texts: str, out: str) -> None:
    torch.manual_seed(0)
    size = len(json.loads((pathlib.Path(folder) / "vocab.json").read_text()))
    half = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    text = {"hidden_size": 24, "vocab_size": size, "eos_token_id": size - 1}
    config = transformers.CLIPConfig(
        text_config=half | text | {"bos_token_id": size - 2},
        vision_config=half | {"hidden_size": 32, "image_size": 28, "patch_size": 7},
        projection_dim=20,
    )
    model = vits.randomize(transformers.CLIPModel(config))
    model.save_pretrained(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    tokens = tokenizer(
        json.loads(pathlib.Path(texts).read_text()),
        padding="max_length",
        truncation=True,
        max_length=77,
        return_tensors="pt",
    )
    found = []
    for clip in load_file(frames)["frames"]:
        pixels = (clip.permute(0, 3, 1, 2) / 255 - MEAN) / DEVIATION
        result = model(**tokens, pixel_values=pixels)
        cosine = result.image_embeds @ result.text_embeds.T
        found.append((100 * cosine.mean(0)).tolist())
    pathlib.Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
