"""Loads a folder with diffusers, writes it anew, and prints its card's front matter.

Run by the peers' Python: `python load_and_save.py FOLDER OUT`. The card is read by the
hub's own library, which refuses front matter that it does not understand; what the hub
itself would say can only be asked over the network.
"""

import json
import pathlib
import sys

import diffusers
from huggingface_hub import ModelCard


def main(folder: str, out: str) -> None:
    pipe = diffusers.WanPipeline.from_pretrained(folder)
    pipe.save_pretrained(out)
    card = ModelCard.load(pathlib.Path(folder) / "README.md")
    print(json.dumps(card.data.to_dict()))


if __name__ == "__main__":
    main(*sys.argv[1:])
