"""What a denoiser's run begins with: a trained text encoder, or a whole trained model.

A frozen text encoder (`text.frozen`), and the weights that a run with LoRA adapts
(`lora.rank`), are copied into the run folder once, as the video VAE is, and read from
there; the checkpoints do not hold them. Nothing is copied until everything has been
checked (`Initial.keep`).
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from sora_jax.core import config as configs
from sora_jax.core import mesh as meshes
from sora_jax.core import paths, trees
from sora_jax.data import tokenizer as tokenizers
from sora_jax.models import dit, exchange, identity, text_encoder
from sora_jax.training import (
    adapters,
    checkpoint,
    objectives,
    pretrained,
    run_folder,
    state_loss,
)
from sora_jax.training import state as states

_EXPERTS = ("transformer", "transformer_2")
# The networks that may be fixed, by the folder that then holds them.
_FIXED = {adapters.FOLDER: "dit", "text_encoder": "text_encoder"}
Read = Callable[[], Mapping[str, states.Params]]


@dataclasses.dataclass(frozen=True)
class Initial:
    """What a new run begins with.

    tokenizer: of the captions. text_encoder: the component folder of the trained text
    encoder, if any. params: reads the weights by network. keep: copies the files that
    the run needs into its folder.
    """

    tokenizer: tokenizers.Tokenizer
    text_encoder: pathlib.Path | None = None
    params: Read = dict
    keep: Callable[[], None] = lambda: None


def frozen_text_encoder(
    c, folder: pathlib.Path, config: text_encoder.Config, *, strict: bool = False
) -> pretrained.Component | None:
    """The frozen text encoder of a run; None if it trains its text encoder.

    Args:
      c: the config of the folder's run.
      folder: of the run.
      config: of the network that the weights are loaded into.
      strict: see `pretrained.open_component`.
    """
    if not c.text.get("frozen"):
        return None
    component = pretrained.open_component(
        folder / "text_encoder", "text_encoder", strict=strict
    )
    return component.fitted(config)


def fixed(
    c,
    folder: pathlib.Path,
    dit_config: dit.Config,
    text_config: text_encoder.Config | None,
) -> dict:
    """Reads the run's networks that are not trained, in the type that they compute in.

    Args:
      c, folder: the run's config and folder.
      dit_config, text_config: of its networks; None: it does not run its text encoder.
    """
    found = {}
    if adapters.config_of(c).rank:
        found["dit"] = adapters.base(folder, dit_config)
    if text_config is not None:
        found["text_encoder"] = frozen_text_encoder(c, folder, text_config)
    return {name: part.load(part.config.dtype) for name, part in found.items() if part}


def check_fields(c) -> None:
    """Raises ValueError where an imported config has unknown fields.

    Without this check they only cause a warning. It covers `init`, `text.encoder` and
    the video VAE in the folder of the latents.
    """
    latents = filter(None, map(str.strip, c.data.latents.split(",")))
    components = [(pathlib.Path(given) / "vae", "vae") for given in latents]
    for given in filter(None, (c.init, c.text.encoder)):
        path = paths.model(given)
        folder = path.parent if path.name in _EXPERTS else path
        if pretrained.is_folder(folder):
            pretrained.open_folder(folder, strict=True)
        else:
            components += [(folder / name, name) for name in _FIXED]
    for folder, name in components:
        if folder.is_dir():
            pretrained.open_component(folder, name, strict=True)


def from_text_encoder(c, folder: pathlib.Path) -> Initial:
    """Begins with a text encoder and its tokenizer (`text.encoder`).

    Both come from a run of objective text_encoder, or a folder in diffusers' layout.

    Raises:
      FileNotFoundError, ValueError: there is no text encoder, or it differs from the
        config's.
    """
    source = pathlib.Path(c.text.encoder)
    component = open_text_encoder(source, "text.encoder")
    file, tokenizer = read_tokenizer(source, c.text.clean)
    _, config = objectives.denoiser_configs(c, tokenizer.vocab_size)
    component = component.fitted(config)
    read = dict if c.text.frozen else lambda: {"text_encoder": component.load()}
    frozen = {"text_encoder": component} if c.text.frozen else {}
    keep = _keeper(folder, file, frozen)
    return Initial(tokenizer, component.folder, read, keep)


def open_text_encoder(folder: pathlib.Path, option: str) -> pretrained.Component:
    """The text encoder of a run, or of a folder in diffusers' layout.

    Args:
      folder: of the run, or in diffusers' layout.
      option: that names the folder, for the message.

    Raises:
      FileNotFoundError, ValueError: there is no text encoder, or it is damaged.
    """
    try:
        return pretrained.open_component(folder / "text_encoder", "text_encoder")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{option} {folder} is neither a finished run of objective text_encoder nor "
            f"a folder in diffusers' layout: {error}"
        ) from None


def read_tokenizer(
    folder: pathlib.Path, clean: bool
) -> tuple[pathlib.Path, tokenizers.Tokenizer]:
    """The tokenizer of a run, or of a folder in diffusers' layout, and its file."""
    inner = folder / "tokenizer"
    file = tokenizers.find(inner if inner.is_dir() else folder)
    return file, tokenizers.load(file, clean)


def from_model(c, folder: pathlib.Path, vae: pathlib.Path) -> Initial:
    """Begins with the weights of `init`: a run, or a folder in diffusers' layout.

    Args:
      c: the run's config; the weights must fit its networks.
      folder: the run's folder.
      vae: the component folder of the video VAE that the latents come from.

    Raises:
      FileNotFoundError, ValueError: it is neither, or its networks or its video VAE
        differ.
    """
    if c.text.encoder:
        raise ValueError("init brings a text encoder: leave text.encoder empty")
    path = paths.model(c.init)
    if (path / "config.py.txt").is_file():
        return _from_run(c, folder, path, vae)
    source, name = _find_transformer(c, path)
    _check_vae(source.components["vae"], vae)
    file, tokenizer = read_tokenizer(source.path, c.text.clean)
    dit_config, text_config = objectives.denoiser_configs(c, tokenizer.vocab_size)
    transformer = source.components[name].fitted(dit_config)
    text = source.components["text_encoder"].fitted(text_config)
    components = {adapters.FOLDER: transformer, "text_encoder": text}
    frozen = {name: components[name] for name in _fixed_folders(c)}

    def read():
        trained = components.keys() - frozen.keys()
        return {_FIXED[name]: components[name].load() for name in trained}

    return Initial(tokenizer, text.folder, read, _keeper(folder, file, frozen))


def _fixed_folders(c) -> list[str]:
    """The folders of the networks that a run does not train."""
    is_fixed = {adapters.FOLDER: c.lora.rank > 0, "text_encoder": c.text.frozen}
    return [name for name in _FIXED if is_fixed[name]]


def _find_transformer(c, path: pathlib.Path) -> tuple[pretrained.Folder, str]:
    """`FOLDER`, or `FOLDER/transformer_2` for one of two experts."""
    name = "transformer"
    if path.name in _EXPERTS:
        path, name = path.parent, path.name
    if not pretrained.is_folder(path):
        raise FileNotFoundError(
            f"init {path} is neither a run nor a folder with a model_index.json"
        )
    source = pretrained.open_folder(path)
    if source.boundary is None:
        if name == "transformer_2":
            raise ValueError(f"init {path} has one transformer and no transformer_2")
        return source, name
    low, high = c.noise.levels
    wanted = (0.0, source.boundary) if name[-1] == "2" else (source.boundary, 1.0)
    if pathlib.Path(c.init).name != name or (low, high) != wanted:
        raise ValueError(
            f"init {path} has two experts, and a run trains one: name "
            f"{path}/transformer with noise.levels ({source.boundary:g}, 1.0), or "
            f"{path}/transformer_2 with (0.0, {source.boundary:g})"
        )
    return source, name


def _check_vae(own: pretrained.Component, vae: pathlib.Path) -> None:
    used = pretrained.open_component(vae, "vae")
    if pretrained.difference(used.config, own.config):
        raise ValueError(
            f"the latents were not made by the video VAE {own.folder}: prepare them "
            f"with --vae {own.folder}"
        )


def _from_run(c, folder: pathlib.Path, path: pathlib.Path, vae: pathlib.Path):
    other = configs.read(path)
    if other.objective != "denoiser" or not checkpoint.has_any(path):
        raise ValueError(f"init {path} is not a denoiser's run with a checkpoint")
    if other.sample.get("boundary") is not None:
        raise ValueError(
            f"init {path} has two experts, and a run trains one: name one expert in "
            "the folder in diffusers' layout"
        )
    _check_vae(pretrained.open_component(path / "vae", "vae"), vae)
    file, tokenizer = read_tokenizer(path, c.text.clean)
    wanted = objectives.denoiser_configs(c, tokenizer.vocab_size)
    stored = objectives.denoiser_configs(other, tokenizer.vocab_size)
    # Added parts start at zero, as they do where a peer's weights are read.
    added = [n for n in exchange.TRANSFORMER.added if not getattr(stored[0], n)]
    for theirs, ours in zip(stored, wanted, strict=True):
        if differ := pretrained.difference(theirs, ours, added):
            raise ValueError(
                f"a network of {path} differs from the config's: {'; '.join(differ)}"
            )
    text = frozen_text_encoder(other, path, wanted[1])
    has_head = state_loss.NAME in checkpoint.networks_in(path)
    has_head &= c.state_loss.weight > 0
    networks = (
        objectives.denoiser_networks(*sizes, has_state_head=has_head)
        for sizes in (stored, wanted)
    )
    read_all = _reader(path, stored[0], *networks)
    fixed_folders = _fixed_folders(c)
    copied = {"text_encoder": text} if text and c.text.frozen else {}
    sizes = dict(zip(_FIXED, wanted, strict=True))
    written = {n: sizes[n] for n in fixed_folders if n not in copied}

    def read():
        trained = {_FIXED[name] for name in _FIXED if name not in fixed_folders}
        if has_head:
            trained.add(state_loss.NAME)
        params = read_all() if trained else {}
        if text is not None and not c.text.frozen:
            params |= {"text_encoder": text.load()}
        return {name: params[name] for name in params.keys() & trained}

    where = None if text is None else text.folder
    keep = _keeper(folder, file, copied, written, read_all)
    return Initial(tokenizer, where, read, keep)


def _reader(
    run: pathlib.Path,
    config: dit.Config,
    stored: states.Networks,
    wanted: states.Networks,
) -> Read:
    """Returns a function that reads the weights in a run's checkpoint.

    Args:
      run: its folder.
      config: of its denoiser.
      stored, wanted: its networks, and those to read them for; what these have beyond
        the run's is zero.
    """

    def read():
        there = stored.layouts()
        names = checkpoint.networks_in(run).keys() & there.keys()
        layouts = {name: there[name] for name in names}
        params = adapters.load_run(run, config, layouts).params
        flat = trees.flatten(params)
        like = {name: wanted.abstract()[name] for name in params}
        places = trees.flatten({name: wanted.layouts()[name] for name in params})

        def one(path, leaf):
            if path in flat:
                return flat[path]
            return jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), places[path])

        return trees.map_paths(one, like)

    return read


def _keeper(
    folder: pathlib.Path,
    file: pathlib.Path,
    copied: Mapping[str, pretrained.Component],
    written: Mapping[str, identity.Config] | None = None,
    read: Read = dict,
) -> Callable[[], None]:
    """Returns a function that puts the tokenizer and the fixed networks into a run.

    Args:
      folder: of the run.
      file: of the tokenizer.
      copied: components whose files are copied, by the folder that they get.
      written: configs of networks of another run, likewise.
      read: reads that run's weights.
    """
    written = written or {}

    def keep():
        run_folder.keep(folder, f"tokenizer{file.suffix}", file)
        claimed, first = run_folder.is_claimed(folder), jax.process_index() == 0

        def is_missing(name) -> bool:
            return not (claimed and (folder / name / "config.json").is_file())

        if first:
            for name in filter(is_missing, copied):
                copied[name].copy_to(folder / name)
        if missing := [*filter(is_missing, written)]:
            params = read()
            for name in missing:
                whole = states.gather(params[_FIXED[name]])
                if first:
                    checkpoint.save_weights(folder / name, whole, written[name])
        meshes.barrier("fixed networks")
        if (existing := tokenizers.find(folder)).suffix != file.suffix:
            raise ValueError(
                f"{existing} belongs to another model: remove it, or choose another --out"
            )

    return keep
