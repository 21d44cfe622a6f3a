"""Writes what transformers' CLIPTokenizer makes of texts, for a test to compare.

Run by the peers' Python: `python clip_tokens.py FOLDER TEXTS LENGTH OUT`, where TEXTS is
a JSON list and OUT becomes one of ids, cut and padded to LENGTH. Where FOLDER has no
tokenizer.json, OUT.whole is a folder with the one that transformers writes.
"""

import json
import pathlib
import sys

import transformers


def main(folder: str, texts: str, length: str, out: str) -> None:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    found = tokenizer(
        json.loads(pathlib.Path(texts).read_text()),
        padding="max_length",
        truncation=True,
        max_length=int(length),
    )
    pathlib.Path(out).write_text(json.dumps(found["input_ids"]))
    tokenizer.save_pretrained(f"{out}.whole")


if __name__ == "__main__":
    main(*sys.argv[1:])
