"""What a captioner is: it looks at clips and writes a text for each."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

from sora_jax.data import records


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a captioner wrote about a clip.

    Attributes:
      text: as it came; empty if it wrote nothing.
      stopped: why the text ends: "stop" where the captioner ended it; "length" where it
        was cut off at the limit; "abort" and "error" where the server broke it off;
        "refusal" and "content_filter" where it is withheld.
      input_tokens, output_tokens: that were used, as far as is known.
      requests: that it took, with those that failed.
    """

    text: str
    stopped: str = "stop"
    input_tokens: int = 0
    output_tokens: int = 0
    requests: int = 1


@dataclasses.dataclass(frozen=True)
class Failure:
    """No answer, and why.

    Attributes:
      reason: in words.
      requests: that failed.
      lasting: whether it lies in the clip, so that it would fail again.
    """

    reason: str
    requests: int = 1
    lasting: bool = False


class Captioner(Protocol):
    """Writes captions of clips; called from several threads.

    Attributes:
      id: the model's name, stored with each caption.
      prompts: of each tier that it writes, the hash of its instruction.
      digest: hash of all else that decides its answers, besides clip and seed.
      concurrency: calls of `caption` that it can serve at a time.
      batch_size: clips that a call may have.
      is_assistant: whether it follows an instruction, and so may refuse or add set phrases
        and markup; another one writes as its training captions are worded.
    """

    id: str
    prompts: Mapping[str, str]
    digest: str
    concurrency: int
    batch_size: int
    is_assistant: bool

    def caption(
        self, clips: Sequence[records.ClipRecord], tier: str, seed: int
    ) -> Sequence[Answer | Failure]:
        """Returns an answer for each clip, in order.

        Args:
          clips: up to `batch_size` of them.
          tier: one of `prompts`.
          seed: another one may give another answer.

        Raises:
          ValueError, OSError: no clip can be captioned, for the reason in the message;
            the job ends.
        """

    def stop(self) -> None:
        """Ends all waiting: calls under way return soon, and later ones fail."""
