"""Writes a pipeline as a folder in diffusers' layout, with a model card.

    pipe.save_pretrained("out", export.Card(license="apache-2.0", ...))

If diffusers' classes cannot express something, the error names it and nothing is written.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

import sora_jax
from sora_jax.core import digests, paths
from sora_jax.data import tokenizer as tokenizers
from sora_jax.generation import request as requests
from sora_jax.training import pretrained

_CLASSES = {
    "transformer": ("diffusers", "WanTransformer3DModel"),
    "transformer_2": ("diffusers", "WanTransformer3DModel"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
}
# What transformers needs beside tokenizer.json.
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}


@dataclasses.dataclass(frozen=True)
class Card:
    """What a model card says, in the words of the publisher.

    Attributes:
      license: identifier on the hub, such as "apache-2.0".
      base_model, datasets: names on the hub, if any.
      training_data, intended_use, limits: sentences.
    """

    license: str
    name: str = "A text-to-video model"
    base_model: str | None = None
    datasets: Sequence[str] = ()
    training_data: str = "Not stated."
    intended_use: str = "Research on video generation."
    limits: str = (
        "It has not been checked for what it may show; it does not know what is true. "
        "Videos that it makes should be marked as made by a model."
    )

    def text(self, settings: requests.Settings, source: Mapping) -> str:
        """The card in Markdown, with the front matter that the hub reads."""
        front: dict[str, Any] = {
            "license": self.license,
            "library_name": "diffusers",
            "pipeline_tag": "text-to-video",
            "tags": ["text-to-video", "sora_jax"],
        }
        if self.base_model:
            front["base_model"] = self.base_model
        if self.datasets:
            front["datasets"] = list(self.datasets)
        # JSON values are YAML as well.
        lines = [f"{name}: {json.dumps(value)}" for name, value in front.items()]
        origin = ", ".join(f"{name} {value}" for name, value in source.items())
        return "\n".join(
            [
                "---",
                *lines,
                "---",
                "",
                f"# {self.name}",
                "",
                f"Written by sora_jax {sora_jax.__version__} from {origin}.",
                "",
                "```python",
                "from diffusers import WanPipeline",
                "",
                'pipe = WanPipeline.from_pretrained("PATH")',
                'video = pipe("...", num_frames='
                f"{settings.num_frames}, height={settings.height}, "
                f"width={settings.width}).frames",
                "```",
                "",
                "## Training data",
                "",
                self.training_data,
                "",
                "## Intended use",
                "",
                self.intended_use,
                "",
                "## Limits",
                "",
                self.limits,
                "",
            ]
        )


def write(
    folder: str | pathlib.Path,
    networks: Mapping[str, nnx.Module | pretrained.Component],
    tokenizer: tokenizers.Tokenizer,
    settings: requests.Settings,
    source: Mapping,
    card: Card,
) -> None:
    """Writes the folder, with `model_index.json` last.

    Args:
      folder: to write; it must be empty or absent.
      networks: by the components of `pretrained.KINDS`. Files are copied as they are.
      tokenizer: its file is copied.
      settings: for the scheduler, the boundary of two experts, and the card.
      source: origin of the weights.
      card: the model card.

    Raises:
      ValueError: diffusers cannot express the model (the message says what), or the
        folder is not empty.
    """
    folder = pathlib.Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another folder")
    parameters = {
        name: nnx.to_pure_dict(nnx.state(network, nnx.Param))
        for name, network in networks.items()
        if isinstance(network, nnx.Module)
    }
    beyond = [
        f"{pretrained.KINDS[name].peer.name}: {part}"
        for name, network in networks.items()
        for part in pretrained.KINDS[name].peer.inexpressible(
            parameters.get(name, {}), network.config
        )
    ]
    if beyond:
        raise ValueError(f"diffusers cannot express {'; '.join(beyond)}")
    for name, network in networks.items():
        if name not in parameters and not network.is_ours:
            # Without digests: others may change the files of such a folder.
            for file in network.files:
                digests.check(file, required=False)
                paths.copy_atomically(file, folder / name / file.name)
            continue
        params = parameters[name] if name in parameters else network.load()
        pretrained.write_component(folder / name, name, params, network.config)
    scheduler = _scheduler(settings)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    tokenizer.save(folder / "tokenizer")
    _write_json(
        folder / "tokenizer" / "tokenizer_config.json",
        TOKENIZER | {"model_max_length": settings.text_length},
    )
    paths.write_atomically(folder / "README.md", card.text(settings, source))
    index: dict[str, Any] = {
        "_class_name": "WanPipeline",
        "boundary_ratio": settings.boundary,
        "expand_timesteps": settings.levels == "diffusers" and settings.takes_images,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer_2": [None, None],
    }
    index |= {name: list(_CLASSES[name]) for name in networks}
    _write_json(folder / "model_index.json", index)


def _scheduler(settings: requests.Settings) -> dict:
    if settings.sampler == "unipc":
        return {
            "_class_name": "UniPCMultistepScheduler",
            "flow_shift": settings.shift,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
        }
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "shift": settings.shift,
    }


def _write_json(path: pathlib.Path, fields: Mapping) -> None:
    paths.write_atomically(path, json.dumps(fields, indent=2, sort_keys=True) + "\n")
