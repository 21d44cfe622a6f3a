"""A trained captioner: saved, loaded and run on clips.

Its folder holds `config.json`, `weights.safetensors` and `tokenizer.model`.

Letters: b clips, t frames, h height, w width, c channels, l tokens.
"""

import dataclasses
import functools
import hashlib
import pathlib
import zlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.core import config as configs
from sora_jax.core import digests, paths
from sora_jax.data import tokenizer as tokenizers
from sora_jax.data import transforms
from sora_jax.models import captioner
from sora_jax.training import checkpoint, weight_files
from sora_jax.training import state as states

_TOKENIZER = "tokenizer.model"


@dataclasses.dataclass(frozen=True)
class LoadedCaptioner:
    """A captioner ready to use.

    file: its tokenizer's. digest: of weights and tokenizer, 16 hex digits.
    """

    config: captioner.Config
    params: Mapping
    tokenizer: tokenizers.Tokenizer
    file: pathlib.Path
    digest: str

    @functools.cached_property
    def _programs(self):
        networks = networks_of(self.config)

        def read(given):
            is_video = self.config.reads == "video"
            return given.astype(jnp.float32) / 127.5 - 1 if is_video else given

        def bound(params):
            return networks.bind({"captioner": params})["captioner"]

        @functools.partial(jax.jit, static_argnames="beams")
        def search(params, given, tier_b, beams):
            return captioner.beam_search(
                bound(params), read(given), tier_b, beams=beams
            )

        @jax.jit
        def draw(params, given, tier_b, seed, of_row_b, temperature):
            key_b = jax.vmap(jax.random.fold_in, (None, 0))(
                jax.random.key(seed), of_row_b
            )
            return captioner.sample(
                bound(params), read(given), tier_b, key_b, temperature
            )

        return search, draw

    def prepare(self) -> None:
        """Makes the programs, so that threads do not make them twice."""
        _ = self._programs

    def write(
        self,
        given: Sequence[np.ndarray | str],
        tier: str,
        *,
        beams: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 32,
    ) -> list[tuple[str, float]]:
        """Returns a caption for each clip, and the mean log-probability of its tokens.

        A caption that does not end within the captioner's length is "".

        Args:
          given: videos, uint8 [t, h, w, c], of any length and size; or texts, where the
            captioner reads these.
          tier: one of the captioner's.
          beams: of the search for a likely caption.
          temperature: 0: search; above: draw captions instead.
          seed: of the draws; a caption also depends on its clip, and not on the others.
          batch_size: clips at a time; fewer are padded, so that one program is compiled.

        Raises:
          ValueError: the captioner does not write this tier.
        """
        if tier not in self.config.tiers:
            raise ValueError(
                f"the captioner writes {', '.join(self.config.tiers)}, not {tier!r}"
            )
        # All on one device, whatever mesh the caller has set.
        with jax.set_mesh(jax.sharding.Mesh(np.array(jax.local_devices()[0]), ())):
            return self._written(given, tier, beams, temperature, seed, batch_size)

    def _written(
        self, given, tier, beams, temperature, seed, batch_size
    ) -> list[tuple[str, float]]:
        search, draw = self._programs
        tier_b = jnp.full(batch_size, self.config.tiers.index(tier), jnp.int32)
        found = []
        for start in range(0, len(given), batch_size):
            part = self._rows(given[start : start + batch_size])
            rows = np.stack(part + [part[-1]] * (batch_size - len(part)))
            if temperature:
                # A caption depends on seed and clip, not on the other clips.
                of_row_b = np.array([zlib.crc32(row.tobytes()) for row in rows], "u4")
                ids_bl, total_b = draw(
                    self.params, rows, tier_b, seed, of_row_b, temperature
                )
            else:
                ids_bl, total_b = search(self.params, rows, tier_b, beams)
            rows = zip(np.asarray(ids_bl), np.asarray(total_b), strict=True)
            found += [self._told(*row) for row, _ in zip(rows, part, strict=False)]
        return found

    def _rows(self, given: Sequence[np.ndarray | str]) -> list[np.ndarray]:
        if self.config.reads == "text":
            return [*self.tokenizer.encode(list(given), self.config.read_length)[0]]
        return [transforms.resampled(video, self.config.shape) for video in given]

    def _told(self, ids_l: np.ndarray, total: float) -> tuple[str, float]:
        tokens = int(np.sum(ids_l != captioner.PAD))
        text = self.tokenizer.decode(ids_l.tolist()) if captioner.END in ids_l else ""
        return text, float(total) / max(1, tokens)


def networks_of(config: captioner.Config) -> states.Networks:
    """Returns the networks {"captioner"} of a config."""
    return states.Networks(
        lambda rngs: {"captioner": captioner.Captioner(config, rngs=rngs)}
    )


def save(
    folder: pathlib.Path,
    params: Mapping,
    config: captioner.Config,
    file: pathlib.Path,
    dtype: str = "float32",
) -> None:
    """Writes the folder of a captioner; `file` is its tokenizer's."""
    folder.mkdir(parents=True, exist_ok=True)
    digests.copy(file, folder / _TOKENIZER)
    checkpoint.save_weights(folder, jax.device_get(params), config, dtype)


def load(folder: str | pathlib.Path, reads: str = "video") -> LoadedCaptioner:
    """Loads a captioner: its folder, or a run or a model with one as `captioner/`.

    Args:
      folder: where it is.
      reads: what it must read, "video" or "text".

    Raises:
      FileNotFoundError, ValueError: it is missing, damaged, fits no captioner, or reads
        something else.
    """
    name, folder = str(folder), paths.model(folder)
    folder = folder / "captioner" if (folder / "captioner").is_dir() else folder
    file = folder / "config.json"
    config = configs.build(captioner.Config, weight_files.read_json(file), str(file))
    if config.reads != reads:
        raise ValueError(f"the captioner of {name} reads {config.reads}, not {reads}")
    files = weight_files.TensorFiles(folder, "weights")
    digests.check_all((file, *files.paths, folder / _TOKENIZER))
    shapes = networks_of(config).abstract()["captioner"]
    params = checkpoint.unflatten(files, shapes, str(folder))
    params = jax.tree.map(lambda view: jnp.asarray(view, jnp.float32), params)
    tokenizer = tokenizers.load(folder / _TOKENIZER)
    hashed = hashlib.sha256(tokenizer.digest.encode())
    for path in files.paths:
        hashed.update(path.read_bytes())
    digest = hashed.hexdigest()[:16]
    return LoadedCaptioner(config, params, tokenizer, folder / _TOKENIZER, digest)
