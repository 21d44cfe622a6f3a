"""Encoding the captions of a latent cache, and which text states a run trains with.

Letters: b batch, l tokens, d width.
"""

import functools
import pathlib
from collections.abc import Collection, Mapping

import jax
import numpy as np

from sora_jax.core import config as configs
from sora_jax.core import mesh as meshes
from sora_jax.data import caches, captions, latent_cache, records, text_cache
from sora_jax.training import initial, pretrained, run_folder

# Tokens of captions in one batch.
TOKENS_AT_ONCE = 2**13
# For a folder in diffusers' layout: how Wan's pipelines read prompts.
_PEER_LENGTH, _PEER_CLEAN = 512, True


def cache_folder(latents_folder: str | pathlib.Path) -> pathlib.Path:
    """The folder of a latent cache's text states."""
    return pathlib.Path(latents_folder) / "text"


def encode(
    latents_folder: str | pathlib.Path,
    encoder_folder: str | pathlib.Path,
    tiers: Collection[str] | None = None,
    *,
    length: int | None = None,
    clean: bool | None = None,
    dtype: str = "bfloat16",
) -> Mapping:
    """Encodes the captions of a latent cache into a subfolder of it.

    Finished files are kept when the job is interrupted and started again. Several
    processes that share the folder share the work.

    Args:
      latents_folder: the cache.
      encoder_folder: a run with a text encoder, or a folder in diffusers' layout.
      tiers: of the captions, all by default.
      length: tokens that a caption is cut to; by default that of the run, or 512.
      clean: whether captions are cleaned as Wan does; by default as in the run, or true.
      dtype: of the states. The network computes in bfloat16 where the states are stored
        in it and the machine has an accelerator, else in float32.

    Returns:
      The cache's manifest.

    Raises:
      FileNotFoundError, ValueError: there is no text encoder, or it is damaged.
      ShardsError: the folder holds states of another encoder or other captions.
      OSError: the disk has no room for the states.
    """
    source, encoder = latent_cache.open(latents_folder), pathlib.Path(encoder_folder)
    if (encoder / "config.py.txt").is_file():
        text = configs.read(encoder).text
        default_length, default_clean = text.length, text.get("clean", False)
    else:
        default_length, default_clean = _PEER_LENGTH, _PEER_CLEAN
    length = default_length if length is None else length
    if length < 1:
        raise ValueError(f"the caption length must be 1 token or more, not {length}")
    clean = default_clean if clean is None else clean
    there = source.manifest["captions"]
    # A cache names all tiers that it was to hold; those of models where there are any,
    # so that caches of other clips stay valid.
    every = [t for t in records.TIERS if t in there or t not in records.MODEL_TIERS]
    asked = captions.CaptionSampler(dict.fromkeys(tiers or every, 1.0))
    asked.check(there, "text_tiers")
    tiers = [*asked.probabilities]
    opened = initial.open_text_encoder(encoder, "text_encoder")
    _, tokenizer = initial.read_tokenizer(encoder, clean)
    if tokenizer.vocab_size > opened.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {encoder} has {tokenizer.vocab_size} pieces, its text encoder "
            f"{opened.config.vocab_size}"
        )
    half = dtype == "bfloat16" and jax.default_backend() != "cpu"
    computing = opened.computing("bfloat16" if half else "float32")
    networks = computing.networks
    # Lazy: a finished cache needs no weights.
    params = functools.cache(lambda: computing.load(computing.config.dtype))

    @jax.jit
    def states(params, ids_bl, mask_bl):
        network = networks.bind({"component": params})["component"]
        return network(ids_bl, mask_bl).astype(dtype)

    return text_cache.write(
        cache_folder(latents_folder),
        source.all_captions(tiers),
        tokenizer,
        lambda ids_bl, mask_bl: np.asarray(states(params(), ids_bl, mask_bl)),
        length=length,
        dim=opened.config.dim,
        dtype=dtype,
        settings={
            "text_encoder": opened.digest(),
            "captions": source.manifest["digest"],
            "tiers": tiers,
            "clean": clean,
            "computed": computing.config.dtype,
        },
        batch_size=max(1, min(64, TOKENS_AT_ONCE // length)),
        processes=caches.Processes(
            jax.process_index(), jax.process_count(), meshes.barrier
        ),
    )


def states_of_run(
    c,
    folder: pathlib.Path,
    source: latent_cache.Latents,
    start: initial.Initial,
    tiers: Collection[str],
) -> text_cache.TextStates | None:
    """The text states that a run trains with; None: it runs its text encoder.

    A new run whose text encoder is frozen uses the states stored with its latents, if
    any; a resumed run does what it did before. A text encoder that another run trained
    with its denoiser has no stored states.

    Args:
      c, folder: the run's config and folder.
      source: its latents.
      start: its tokenizer and text encoder.
      tiers: of the captions that it reads.

    Raises:
      ShardsError: the states are unfinished or missing, or come from another text
        encoder, other captions or another preprocessing.
      ValueError: the run varies its captions, or reads several folders of latents.
    """
    place = cache_folder(source.folder)
    if run_folder.is_claimed(folder):
        used = (folder / text_cache.MANIFEST).is_file()
    else:
        has_files = start.text_encoder is not None
        used = c.text.frozen and has_files and place.is_dir()
    if not used:
        return None
    if c.text.tags or c.text.shuffle:
        raise ValueError(
            f"{place} holds the states of captions as they are, but text.tags and "
            "text.shuffle vary them: delete that folder to train without stored states"
        )
    if isinstance(source, latent_cache.Joined):
        raise ValueError(
            f"{place} holds text states, which work with a single folder of latents only"
        )
    component = pretrained.open_component(start.text_encoder, "text_encoder")
    return text_cache.open(
        place,
        tiers=[t for t in tiers if source.manifest["captions"].get(t)],
        text_encoder=component.digest(),
        tokenizer=start.tokenizer.digest,
        captions=source.manifest["digest"],
        length=c.text.length,
        clean=c.text.clean,
    )


def keep_manifest(folder: pathlib.Path, states: text_cache.TextStates | None) -> None:
    """Records in a new run's folder which states it trains with, if any."""
    if states is not None:
        run_folder.keep(
            folder, text_cache.MANIFEST, states.folder / text_cache.MANIFEST
        )
    elif not run_folder.is_claimed(folder) and jax.process_index() == 0:
        (folder / text_cache.MANIFEST).unlink(missing_ok=True)
