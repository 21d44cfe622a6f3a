"""What a denoiser's run begins with: a trained text encoder, or a whole trained model.

A text encoder that is not trained along (`text.frozen`) is copied into the run folder
once, as the video VAE is, and read from there; the checkpoints do not hold it.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

import jax

from sora_jax.core import config as configs
from sora_jax.core import mesh as meshes
from sora_jax.data import tokenizer
from sora_jax.models import text_encoder
from sora_jax.training import checkpoint, objectives, pretrained, run_folder
from sora_jax.training import state as states


@dataclasses.dataclass(frozen=True)
class Initial:
    """The tokenizer, and what reads the weights by network when they are asked for."""

    pieces: tokenizer.Tokenizer
    params: Callable[[], Mapping[str, states.Params]] = dict


def fixed(c, folder: pathlib.Path, config: text_encoder.Config) -> dict:
    """Reads the networks that the run uses and does not train, in their compute type."""
    if not c.text.frozen:
        return {}
    component = pretrained.open_component(folder / "text_encoder", "text_encoder")
    return {"text_encoder": component.fitted(config).load(config.dtype)}


def from_text_encoder(c, folder: pathlib.Path) -> Initial:
    """Begins with another run's text encoder and tokenizer (`text.encoder`).

    Raises:
      FileNotFoundError, ValueError: there is none, or another than the config's.
    """
    given = pathlib.Path(c.text.encoder)
    try:
        component = pretrained.open_component(given / "text_encoder", "text_encoder")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"text.encoder {given} is no finished run of objective text_encoder: {error}"
        ) from None
    pieces = _keep_tokenizer(c, folder, given)
    _, config = objectives.denoiser_configs(c, pieces.vocab_size)
    return Initial(pieces, _take_text_encoder(c, folder, component.fitted(config)))


def from_model(c, folder: pathlib.Path, vae: pathlib.Path) -> Initial:
    """Begins with the weights of `init`: a run, or a folder in diffusers' layout.

    Args:
      c: the run's config, whose networks those weights must fit.
      folder: the run's folder.
      vae: the component folder of the video VAE that the latents come from.

    Raises:
      FileNotFoundError, ValueError: it is neither, its networks are others, or so is
        its video VAE.
    """
    if c.text.encoder:
        raise ValueError("init brings a text encoder: leave text.encoder empty")
    given = pathlib.Path(c.init)
    if (given / "config.py.txt").is_file():
        return _from_run(c, folder, given)
    source, name = _find_transformer(given)
    _check_vae(source, vae)
    pieces = _keep_tokenizer(c, folder, source.path / "tokenizer")
    dit_config, text_config = objectives.denoiser_configs(c, pieces.vocab_size)
    transformer = source.components[name].fitted(dit_config)
    text = source.components["text_encoder"].fitted(text_config)
    read_text = _take_text_encoder(c, folder, text)
    return Initial(pieces, lambda: {"dit": transformer.load()} | read_text())


def _find_transformer(given: pathlib.Path) -> tuple[pretrained.Folder, str]:
    """`FOLDER`, or `FOLDER/transformer_2` for one of two experts."""
    if given.name in ("transformer", "transformer_2"):
        if pretrained.is_folder(given.parent):
            return pretrained.open_folder(given.parent), given.name
    if not pretrained.is_folder(given):
        raise FileNotFoundError(
            f"init {given} is no run, and no folder with a model_index.json"
        )
    source = pretrained.open_folder(given)
    if source.boundary is not None:
        raise ValueError(
            f"init {given} has two experts, and a run trains one: name "
            f"{given}/transformer, for noise.levels ({source.boundary:g}, 1.0), or "
            f"{given}/transformer_2, for (0.0, {source.boundary:g})"
        )
    return source, "transformer"


def _check_vae(source: pretrained.Folder, vae: pathlib.Path) -> None:
    used = pretrained.open_component(vae, "vae").config
    own = dataclasses.replace(source.components["vae"].config, dtype=used.dtype)
    if used != own:
        raise ValueError(
            f"the latents were made by another video VAE than that of {source.path}: "
            f"prepare them with --vae {source.path}"
        )


def _from_run(c, folder: pathlib.Path, given: pathlib.Path) -> Initial:
    other = configs.read(given)
    pieces = _keep_tokenizer(c, folder, given)
    wanted = objectives.denoiser_configs(c, pieces.vocab_size)
    found = objectives.denoiser_configs(other, pieces.vocab_size)
    for theirs, ours in zip(found, wanted, strict=True):
        if differ := pretrained.difference(theirs, ours):
            raise ValueError(
                f"a network of {given} is another than the config's: {'; '.join(differ)}"
            )
    networks = objectives.denoiser_networks(*wanted)
    if not other.text.get("frozen"):
        if c.text.frozen:
            raise ValueError(
                f"text.frozen is set, but {given} trained its text encoder along: "
                "leave it unset here too"
            )

        def read():
            return checkpoint.load_run(given, layouts=networks.layouts()).params

        return Initial(pieces, read)
    component = pretrained.open_component(given / "text_encoder", "text_encoder")
    read_text = _take_text_encoder(c, folder, component.fitted(wanted[1]))

    def read_dit():
        layouts = {"dit": networks.layouts()["dit"]}
        return checkpoint.load_run(given, layouts=layouts).params | read_text()

    return Initial(pieces, read_dit)


def _take_text_encoder(
    c, folder: pathlib.Path, component: pretrained.Component
) -> Callable[[], Mapping[str, states.Params]]:
    """Copies it into the run if it is frozen; returns what reads it if it is trained."""
    if not c.text.frozen:
        return lambda: {"text_encoder": component.load()}
    target = folder / "text_encoder"
    begun = run_folder.is_claimed(folder) and (target / "config.json").is_file()
    if jax.process_index() == 0 and not begun:
        component.copy_to(target)
    meshes.barrier("text encoder")
    return dict


def _keep_tokenizer(c, folder: pathlib.Path, given: pathlib.Path):
    file = tokenizer.find(given)
    run_folder.keep(folder, "tokenizer" + file.suffix, file)
    meshes.barrier("tokenizer")
    return tokenizer.load(folder, c.text.clean)
