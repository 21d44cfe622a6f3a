"""torch's DataLoader over the tensors of clips, an epoch of it timed.

Run by the peers' Python: `python timed_loader.py FOLDER THREADS`; see timed.py.
FOLDER/case.safetensors has `latents` [n, ...] and `text_ids` [n, l], FOLDER/config.json
the batch size. `files` reads a file of each clip, as torch.save wrote it, in a random
order; `memory` has all of them in one tensor. A number behind the name is that of the
DataLoader's worker processes.
"""

import json
import pathlib
import sys

import timed
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset, TensorDataset


class Files(Dataset):
    """A file of a clip each: its latents and its token ids."""

    def __init__(self, folder: pathlib.Path, case: dict[str, torch.Tensor]):
        self.names = []
        folder.mkdir()
        for number, latents in enumerate(case["latents"]):
            name, ids = folder / f"{number:06d}.pt", case["text_ids"][number]
            # Copies: a view would be saved with all of its tensor.
            torch.save({"latents": latents.clone(), "text_ids": ids.clone()}, name)
            self.names.append(str(name))

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        found = torch.load(self.names[index], weights_only=True)
        return found["latents"], found["text_ids"]


def epoch(loader: DataLoader, tell: bool = False):
    """Reads all batches; with `tell`, returns the sum of each clip, sorted."""
    sums = []
    for latents, _ in loader:
        if tell:
            sums.append(latents.double().flatten(1).sum(1))
    return torch.cat(sums).sort().values if tell else torch.zeros(1)


def main(folder: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    folder = pathlib.Path(folder)
    case = load_file(folder / "case.safetensors")
    size = json.loads((folder / "config.json").read_text())["batch_size"]
    kinds = {
        "files": Files(folder / "clips", case),
        "memory": TensorDataset(case["latents"], case["text_ids"]),
    }
    operations = {}
    for kind, dataset in kinds.items():
        for workers in (0, int(threads)):
            loader = DataLoader(
                dataset,
                size,
                shuffle=True,
                num_workers=workers,
                persistent_workers=workers > 0,
            )
            operations[f"{kind}_{workers}"] = lambda one=loader: epoch(one)
        operations[f"{kind}_sums"] = lambda one=loader: epoch(one, tell=True)
    timed.serve(folder, operations)


if __name__ == "__main__":
    main(*sys.argv[1:])
