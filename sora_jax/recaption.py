"""Recaptions video shards: a model looks at each clip and writes new captions for it.

    python -m sora_jax.recaption --shards runs/mine/shards --out runs/mine/recaptioned \\
        --captioner chat --url http://localhost:8000/v1 --model Qwen/Qwen2.5-VL-7B-Instruct

OUT holds the same clips with all captions that they had, and those of the model in tiers
of their own: model_dense and model_short. OUT/captions.jsonl has each answer, also those
that were not kept, with the reason. `prepare --source shards:OUT` takes the result.

--captioner network runs a captioner that `train` made (configs/toy_captioner.py).
--captioner chat asks a server with the chat completions API, such as vLLM, SGLang or a
hosted one; its key, if it needs one, is read from the environment variable
SORA_CHAT_KEY. --dry_run says what the job would take, and asks nothing.

The same command resumes an interrupted job; no answer is asked for twice.
"""

import pathlib
import time

from absl import flags

from sora_jax.captioning import ask, chat, chat_api, journal, network, rewrite
from sora_jax.captioning import captioner as captioners
from sora_jax.core import job
from sora_jax.data import reports, shards

_SHARDS = flags.DEFINE_string("shards", None, "Video shards to read.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder to write.")
_CAPTIONER = flags.DEFINE_enum(
    "captioner", "chat", ["chat", "network"], "Who writes captions."
)
_URL = flags.DEFINE_string(
    "url", None, "Chat: the server's address, such as http://localhost:8000/v1."
)
_MODEL = flags.DEFINE_string(
    "model",
    None,
    "Chat: the model's name at the server. Network: a run of a captioner.",
)
_BEAMS = flags.DEFINE_integer(
    "beams", 1, "Network: beams of its search.", lower_bound=1, upper_bound=64
)
_PROMPTS = flags.DEFINE_list(
    "prompts",
    "dense,short",
    "Captions to ask for: dense and short, or dense=FILE with an instruction of your own.",
)
_FRAMES = flags.DEFINE_integer(
    "frames", 8, "Frames of a clip that are sent.", lower_bound=1, upper_bound=256
)
_IMAGE_SIDE = flags.DEFINE_integer(
    "image_side",
    448,
    "Pixels of a frame's longer side.",
    lower_bound=28,
    upper_bound=4096,
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.3, "Of the model.", lower_bound=0.0, upper_bound=2.0
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the first answer; a retry adds one.")
_RETRIES = flags.DEFINE_integer(
    "retries", 2, "Further answers where one is no caption.", lower_bound=0
)
_RATE = flags.DEFINE_float(
    "rate", 5.0, "Requests a second, at most.", lower_bound=0.001, upper_bound=1e4
)
_CONCURRENCY = flags.DEFINE_integer(
    "concurrency", 8, "Requests at a time.", lower_bound=1, upper_bound=1024
)
_TIMEOUT = flags.DEFINE_float(
    "timeout", 120.0, "Seconds for one request.", lower_bound=0.1, upper_bound=3600.0
)
_MAX_CLIPS = flags.DEFINE_integer(
    "max_clips", None, "Take the first clips only.", lower_bound=1
)
_LEAVE_FAILED = flags.DEFINE_boolean(
    "leave_failed", False, "Write OUT although some clips have no answer."
)
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print the estimate, ask nothing.")
_PRICE = flags.DEFINE_list(
    "price_per_million", None, "Price of a million tokens: sent,written."
)
_TOKENS_PER_IMAGE = flags.DEFINE_integer(
    "tokens_per_image",
    None,
    "For the estimate; default: a token per square of 28 pixels.",
    lower_bound=1,
)


# The flags that one captioner has and the other has not.
_OF_CHAT = ("url", "frames", "image_side", "rate", "concurrency", "timeout")
_OF_CHAT += ("price_per_million", "tokens_per_image")
_OF_NETWORK = ("beams",)


def captioner() -> captioners.Captioner:
    """The captioner that the flags name."""
    is_network = _CAPTIONER.value == "network"
    for name in _OF_CHAT if is_network else _OF_NETWORK:
        if flags.FLAGS[name].present:
            raise ValueError(
                f"--{name} has no meaning with --captioner {_CAPTIONER.value}"
            )
    for flag in (_MODEL,) if is_network else (_URL, _MODEL):
        if not flag.value:
            raise ValueError(f"--captioner {_CAPTIONER.value} needs --{flag.name}")
    if is_network:
        return network.Network(
            _MODEL.value,
            _PROMPTS.value,
            seed=_SEED.value,
            beams=_BEAMS.value,
            temperature=_TEMPERATURE.value,
        )
    return chat.Chat(
        _URL.value,
        chat.Settings(
            _MODEL.value, _FRAMES.value, _IMAGE_SIDE.value, _TEMPERATURE.value
        ),
        chat.read_prompts(_PROMPTS.value),
        chat_api.Limits(_RATE.value, _CONCURRENCY.value, _TIMEOUT.value),
    )


def prices() -> tuple[float, float] | None:
    """The prices of a token sent and of one written; None where they are not given."""
    if not _PRICE.value:
        return None
    try:
        sent, written = (float(price) / 1e6 for price in _PRICE.value)
        if not (0 <= sent < 1 and 0 <= written < 1):
            raise ValueError
    except ValueError:
        raise ValueError(
            "--price_per_million is two prices such as 0.20,0.80, not "
            f"{','.join(_PRICE.value)!r}"
        ) from None
    return sent, written


def estimate(
    clips: shards.Shards, questions: dict[str, int], writer: captioners.Captioner
) -> list[str]:
    """Says what the questions that are left take, by tier."""
    if not isinstance(writer, chat.Chat):
        by_tier = ", ".join(f"{count:,} {tier}" for tier, count in questions.items())
        return [f"{by_tier} by {writer.id}, in this process"]
    numbers = {n: clips.manifest[n] for n in ("height", "width", "num_frames")}
    height, width, frames = (
        max(n) if isinstance(n, list) else n for n in numbers.values()
    )
    per_image = _TOKENS_PER_IMAGE.value or chat.tokens_per_image(
        height, width, _IMAGE_SIDE.value
    )
    it = chat.estimate(writer, questions, frames, per_image)
    by_tier = ", ".join(f"{count:,} {tier}" for tier, count in questions.items())
    picture = chat.picture_size(height, width, _IMAGE_SIDE.value)
    lines = [
        f"{it.requests:,} requests ({by_tier}), and up to {_RETRIES.value} more for each "
        "answer that is no caption",
        f"about {it.image_tokens:,} tokens of images ({min(frames, _FRAMES.value)} of "
        f"{picture[1]}x{picture[0]}, {per_image} tokens each), {it.text_tokens:,} of "
        f"instructions, {it.output_tokens:,} written ({it.most_output_tokens:,} at most)",
    ]
    if (price := prices()) is not None:
        sent = (it.image_tokens + it.text_tokens) * price[0]
        cost, most = (
            sent + n * price[1] for n in (it.output_tokens, it.most_output_tokens)
        )
        lines.append(f"about {cost:,.2f}, {most:,.2f} at most, for one answer each")
    seconds = it.requests / _RATE.value
    lines.append(
        f"{seconds / 3600:,.1f} hours or more" * (seconds >= 7200)
        or f"{seconds:,.0f} s or more"
    )
    lines[-1] += f" at {_RATE.value:g} requests a second"
    return lines


def told(done: rewrite.Totals) -> list[str]:
    """Says what became of the clips."""
    lines = [
        f"{done.clips} clips = {done.captioned} captioned + {done.rejected} rejected + "
        f"{done.failed} failed"
    ]
    if done.reasons:
        lines.append("not kept or not answered:")
        lines += reports.kinds(
            [(reason, reason) for reason, n in done.reasons.items() for _ in range(n)]
        )
    lines.append(
        f"{done.requests:,} requests; {done.input_tokens:,} tokens sent, "
        f"{done.output_tokens:,} written"
    )
    if (price := prices()) is not None:
        cost = done.input_tokens * price[0] + done.output_tokens * price[1]
        lines.append(f"{cost:,.2f} for all answers")
    return lines


def main() -> None:
    began, writer = time.monotonic(), captioner()
    prices()
    clips, tiers = shards.open(_SHARDS.value), [*writer.prompts]
    count = min(_MAX_CLIPS.value or len(clips), len(clips))
    rewrite.check_new(clips, tiers)
    if _DRY_RUN.value:
        for line in estimate(clips, dict.fromkeys(tiers, count), writer):
            print(line)
        return
    if not _OUT.value:
        raise ValueError("give --out, the folder to write")
    out = pathlib.Path(_OUT.value)
    if out.resolve() == clips.folder.resolve():
        raise ValueError("--out is the folder of --shards, which is not overwritten")
    job.lock_folder(out)
    source = rewrite.Recaptioned(clips, count, writer)
    shards.claim(out, source)
    # Parts that are written have the captions of then: nothing more is asked.
    writing = shards.has_begun(out)
    with job.terminable(), journal.Journal(out / journal.NAME, writer) as entries:
        source = rewrite.Recaptioned(clips, count, writer, entries)
        if not writing:
            left = rewrite.open_questions(source, _RETRIES.value)
            for line in estimate(clips, left, writer) if any(left.values()) else []:
                print(line, flush=True)
            ask.ask(
                clips, count, writer, entries, retries=_RETRIES.value, seed=_SEED.value
            )
        done = rewrite.totals(clips, count, tiers, entries)
        for line in told(done):
            print(line)
        if done.again and not writing and not _LEAVE_FAILED.value:
            raise ValueError(
                f"{done.again} clips have no answer, and {out} is not finished: the same "
                "command asks for them again, and with --leave_failed leaves them as they "
                "are"
            )
        manifest = shards.write(out, source)
    for line in reports.summary(out, manifest, time.monotonic() - began):
        print(line)


if __name__ == "__main__":
    job.run(main, "recaption")
