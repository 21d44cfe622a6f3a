"""The captioner that this project trains, as a `captioner.Captioner`."""

import hashlib
from collections.abc import Sequence

from sora_jax.captioning import captioner
from sora_jax.data import records
from sora_jax.training import trained_captioner


class Network:
    """Runs a trained captioner in this process.

    Its first answer is the likeliest caption that it finds; further ones are drawn.

    Args:
      model: the captioner; see `trained_captioner.load`.
      kinds: of the captions: "dense", "short".
      seed: of the first answer.
      beams: of the search for the first answer.
      temperature: of further answers.

    Raises:
      FileNotFoundError, ValueError: the captioner is missing or damaged, or does not
        write these kinds.
    """

    # Two: one call checks its answers while the other computes.
    concurrency, batch_size, is_assistant = 2, 32, False

    def __init__(
        self,
        model: str,
        kinds: Sequence[str],
        *,
        seed: int = 0,
        beams: int = 1,
        temperature: float = 0.3,
    ):
        self._loaded = trained_captioner.load(model)
        self._loaded.prepare()  # before threads use it
        self._seed, self._beams, self._temperature = seed, beams, temperature
        names = {f"model_{kind}": kind for kind in kinds}
        if unknown := sorted(set(names) - set(records.MODEL_TIERS)):
            known = [tier.removeprefix("model_") for tier in records.MODEL_TIERS]
            raise ValueError(f"--prompts names {unknown}; there are {', '.join(known)}")
        if unknown := sorted(set(kinds) - set(self._loaded.config.tiers)):
            raise ValueError(
                f"{model} writes {', '.join(self._loaded.config.tiers)}, not "
                f"{', '.join(unknown)}"
            )
        self._kinds = names
        self.id = f"captioner-{self._loaded.digest}"
        self.prompts = {
            tier: hashlib.sha256(kind.encode()).hexdigest()
            for tier, kind in names.items()
        }
        decides = f"{self._loaded.digest} {beams} {temperature}"
        self.digest = hashlib.sha256(decides.encode()).hexdigest()

    def caption(
        self, clips: Sequence[records.ClipRecord], tier: str, seed: int
    ) -> list[captioner.Answer | captioner.Failure]:
        """Writes a caption for each clip; see `captioner.Captioner`."""
        found: dict[int, captioner.Answer | captioner.Failure] = {}
        videos = {}
        for place, clip in enumerate(clips):
            try:
                videos[place] = clip.frames()
            except records.CorruptRecord as error:
                found[place] = captioner.Failure(str(error), requests=0, lasting=True)
        written = self._loaded.write(
            [*videos.values()],
            self._kinds[tier],
            beams=self._beams,
            temperature=0.0 if seed == self._seed else self._temperature,
            seed=seed,
            batch_size=self.batch_size,
        )
        for place, (text, _) in zip(videos, written, strict=True):
            found[place] = captioner.Answer(text, "stop" if text else "length")
        return [found[place] for place in range(len(clips))]

    def stop(self) -> None:
        """Nothing waits."""
