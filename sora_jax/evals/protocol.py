"""The protocol of a score: everything that must be equal for two scores to be compared.

Published scores of one model differ by factors because of resizing, stride, sample count
and code. A `Manifest` records all of these. Two results are compared only if the digests
of their manifests are equal, or if forced.
"""

import ast
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import sora_jax

# Sources that decide a score. Changes elsewhere do not change the digest.
_SCORING = (
    "evals/statistics.py",
    "evals/pixels.py",
    "evals/metrics/distances.py",
    "evals/metrics/temporal.py",
    "evals/features/networks.py",
    "evals/features/resize.py",
    "evals/prompts/toyworld.py",
    "models/feature_net.py",
    "models/i3d.py",
    "models/vit.py",
    # Prompts, rendering, and the oracle.
    "toyworld/*.py",
)


class Evaluator(Protocol):
    """A measurement that training runs every `eval_every` steps."""

    def run(self, subject: Any) -> Iterator[tuple[str, float]]:
        """Yields (name, value) for the parameters of a model."""


class UnequalProtocols(ValueError):
    """Two results have different protocols."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """How a set of scores was measured.

    Attributes:
      num_samples: clips per seed, by suite.
      num_frames, height, width, fps: of the clips.
      resize: how clips were resized for the feature network.
      feature_weights: SHA-256 of the feature network's weights.
      reference: SHA-256 over the reference clips of the Frechet distance.
      seeds: of the samples; each gives a complete set.
      prompts: SHA-256 over the prompts in order.
      sampler, num_inference_steps, guidance_scale, shift: of sampling; None if unknown.
      step_cache: error threshold of the step cache; 0 is no cache.
      codec: of the files from which clips were read; "none" without files.
      code: version and digest of the code that decides scores.
    """

    num_samples: Mapping[str, int]
    num_frames: int
    height: int
    width: int
    fps: float
    resize: str
    feature_weights: str
    reference: str
    seeds: tuple[int, ...]
    prompts: str
    sampler: str | None
    num_inference_steps: int | None
    guidance_scale: float | None
    shift: float | None
    step_cache: float | None = 0.0
    codec: str = "none"
    code: str = dataclasses.field(default_factory=lambda: code_version())

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON values, sorted by name."""
        fields = dataclasses.asdict(self) | {"seeds": list(self.seeds)}
        fields["num_samples"] = dict(sorted(self.num_samples.items()))
        if fields["step_cache"] == 0:  # as in results from before there was a cache
            del fields["step_cache"]
        return dict(sorted(fields.items()))

    def digest(self) -> str:
        """Returns the SHA-256 of the canonical JSON of all fields."""
        return digest(self.to_dict())


def digest(fields: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of the canonical JSON of a manifest's fields."""
    text = json.dumps(fields, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def text_digest(texts: Iterable[str]) -> str:
    """Returns one SHA-256 over texts in order, with their lengths."""
    result = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        result.update(len(encoded).to_bytes(8, "big") + encoded)
    return result.hexdigest()


def code_version(*more: str) -> str:
    """Returns the version and a digest of the code that decides scores.

    Comments, docstrings and layout do not change the digest.

    Args:
      *more: further files, relative to the package; patterns are allowed.

    Raises:
      FileNotFoundError: no file has such a path.
    """
    root = pathlib.Path(sora_jax.__file__).parent
    sources = []
    for pattern in (*_SCORING, *more):
        files = sorted(root.glob(pattern))
        if not files:
            raise FileNotFoundError(
                f"sora_jax/{pattern}, whose code decides scores, does not exist"
            )
        sources += [bare_code(file.read_text()) for file in files]
    return f"{sora_jax.__version__}+{text_digest(sources)[:12]}"


def compare(
    first: Mapping[str, Any], second: Mapping[str, Any], *, force: bool = False
) -> dict[str, float]:
    """Returns the differences second - first of two results' scores.

    Args:
      first, second: contents of two `scores.json`, with "protocol" (the fields of a
        manifest), "digest" and "scores" (name -> value).
      force: compare even if the protocols differ.

    Raises:
      UnequalProtocols: the digests differ and force is not set; the message names the
        fields.
      ValueError: a digest does not match its manifest.
    """
    for result in (first, second):
        if digest(result["protocol"]) != result["digest"]:
            raise ValueError(
                "the digest of a result does not match its protocol: it was edited"
            )
    if first["digest"] != second["digest"] and not force:
        protocols = first["protocol"], second["protocol"]
        fields = [
            f"{name}: {protocols[0].get(name)!r} and {protocols[1].get(name)!r}"
            for name in sorted(protocols[0].keys() | protocols[1].keys())
            if protocols[0].get(name) != protocols[1].get(name)
        ]
        raise UnequalProtocols(
            "the results have different protocols and cannot be compared ("
            + "; ".join(fields)
            + "); force=True compares them anyway"
        )
    common = first["scores"].keys() & second["scores"].keys()
    return {
        name: second["scores"][name] - first["scores"][name] for name in sorted(common)
    }


@functools.cache
def bare_code(source: str) -> str:
    """Returns Python source without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
