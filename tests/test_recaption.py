"""The job: no caption is lost, no wrong one kept, no answer asked for twice."""

import collections
import functools
import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sora_jax.captioning import chat_api, journal
from sora_jax.data import captions, latent_cache, loader, shards, transforms
from tests import conftest
from tests.captioning import moving, server
from tests.training import tiny_job

ROOT = pathlib.Path(__file__).resolve().parents[1]
TIERS = ("model_dense", "model_short")

JOB = []  # the module of the job


@pytest.fixture(scope="module", autouse=True)
def _job():
    with conftest.lone_job("recaption") as module:
        JOB.append(module)
        yield


def run(**given) -> None:
    conftest.run_with_flags(JOB[-1], **given)


def refusal(**given) -> str:
    return conftest.refusal(JOB[-1], **given)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """The job as it is, but for the time that it waits before it asks again."""
    limits = functools.partial(chat_api.Limits, attempts=3, backoff=0.01)
    monkeypatch.setattr(chat_api, "Limits", limits)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "in"
    moving.write(folder, 12)
    return folder


def text(number: int, tier: str, way: str | None = None) -> str:
    way = way or moving.WAYS[number % 4]
    if tier == "model_short":
        return f"white square {number} moving {way}"
    return (
        f"A small white square with the number {number} moves {way}ward over a plain "
        "grey ground at an even pace."
    )


def rightly(asked: server.Asked) -> server.Reply:
    return server.Reply(text(moving.number_of(asked.first), asked.tier))


def flags(clips, served, **more):
    return {"shards": clips, "url": served.url, "model": "m", "rate": 1000} | more


def rows(out) -> list[dict]:
    lines = (out / journal.NAME).read_text().splitlines()
    last = {(row["clip"], row["tier"]): row for row in map(json.loads, lines)}
    return list(last.values())


class Trouble:
    """Clips 0 to 8 have one trouble each; `is_down` says whether clip 9 has one."""

    is_down = True
    wrong = {"left": "right", "right": "left", "up": "down", "down": "up"}

    def __call__(self, asked: server.Asked, times: int) -> server.Reply:
        number, seed = moving.number_of(asked.first), asked.body["seed"]
        other = self.wrong[moving.WAYS[number % 4]]
        bad = {
            (0, 0): server.Reply(text(0, asked.tier), delay=0.3),
            (4, 0): server.Reply(""),
            (5, 0): server.Reply("I'm sorry, but I cannot describe these pictures."),
            (5, 1): server.Reply("This video shows a square on a ground that is grey."),
            (7, 0): server.Reply(text(7, asked.tier, other)),
        }
        after = (("Retry-After", "0.2"),)
        first = {
            1: server.Reply(status=429, raw=b"", headers=after),
            2: server.Reply(status=500, raw=b"oops"),
            3: server.Reply(raw=b'{"choices": [{"message"'),
        }
        if number == 6:
            return server.Reply(text(6, asked.tier, other))
        if number == 8:
            return server.Reply(status=400, raw=b"not this one")
        if number == 9 and self.is_down:
            return server.Reply(status=503, raw=b"busy")
        if number in first and times == 1:
            return first[number]
        return bad.get((number, seed), rightly(asked))


def test_a_server_of_all_troubles(clips, tmp_path, capsys):
    out, trouble = tmp_path / "out", Trouble()
    with server.serve(trouble) as served:
        said = refusal(**flags(clips, served, out=out))
        assert "1 clips have no answer" in said and "--leave_failed" in said
        printed = capsys.readouterr().out
        assert "12 clips = 9 captioned + 1 rejected + 2 failed" in printed
        assert "HTTP 503 Service Unavailable: busy" in printed
        assert "HTTP 400 Bad Request: not this one" in printed
        assert "6: it says down, and what moves in the clip moves up" in printed
        found = rows(out)
        assert sum(row["requests"] for row in found) == len(served.asked)
        assert f"{len(served.asked)} requests; " in printed
        assert not (out / "manifest.json").exists()
        # Answers of clip 5: two that are none, with their reasons and seeds.
        (row,) = (
            row
            for row in found
            if row["clip"] == "5.mp4#00000" and row["tier"] == "model_dense"
        )
        assert [(r["seed"], r["reason"][:14]) for r in row["rejected"]] == [
            (0, "it refuses"),
            (1, "it has a set p"),
        ]
        assert (row["tries"], row["seed"], row["text"]) == (3, 2, text(5, row["tier"]))
        assert (row["input_tokens"], row["output_tokens"]) == (300, 30)
        assert row["model"] == "m" and len(row["prompt"]) == 64 and row["time"]
        # The same command asks for what has no answer, and for nothing else.
        trouble.is_down, before = False, len(served.asked)
        run(**flags(clips, served, out=out))
        later = {moving.number_of(one.first) for one in served.asked[before:]}
        assert later == {8, 9}
        printed = capsys.readouterr().out
        assert "12 clips = 10 captioned + 1 rejected + 1 failed" in printed
        assert "captions: 12 alt, 10 model_short, 10 model_dense" in printed
        asked = len(served.asked)
        run(**flags(clips, served, out=out))
        assert len(served.asked) == asked
    written, original = shards.open(out), shards.open(clips)
    assert len(written) == 12
    for number, (clip, before) in enumerate(zip(written, original, strict=True)):
        new = {} if number in (6, 8) else {tier: text(number, tier) for tier in TIERS}
        assert clip.captions == {**before.captions, **new}
        assert (clip.id, clip.video) == (before.id, before.video)
        prompts = {row["tier"]: row["prompt"][:12] for row in rows(out)}
        assert clip.caption_sources == before.caption_sources | {
            tier: f"model:m prompt:{prompts[tier]}" for tier in new
        }


def test_a_stopped_and_a_killed_job_ask_nothing_twice(clips, tmp_path, capsys):
    """SIGTERM keeps the answers under way; a kill loses those alone."""
    out = tmp_path / "out"

    def reply(asked, times):
        return server.Reply(rightly(asked).text, delay=0.15)

    def start_and_send(number, answers):
        arguments = {"out": out, "concurrency": 2, **flags(clips, served)}
        process = subprocess.Popen(
            [sys.executable, "-m", "sora_jax.recaption"]
            + [f"--{name}={value}" for name, value in arguments.items()],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        file = out / journal.NAME
        while process.poll() is None and (
            not file.exists() or file.read_bytes().count(b"\n") < answers
        ):
            time.sleep(0.01)
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
        return process.returncode, told

    with server.serve(reply) as served:
        code, told = start_and_send(signal.SIGTERM, 4)
        assert code == 130 and "the same command resumes" in told
        # All that was asked is in the journal.
        answered = len(rows(out))
        assert 4 <= answered < 24 and len(served.asked) == answered
        code, _ = start_and_send(signal.SIGKILL, answered + 4)
        assert code == -signal.SIGKILL
        kept = {(row["clip"], row["tier"]) for row in rows(out)}
        assert len(kept) >= answered + 4
        with open(out / journal.NAME, "ab") as file:
            file.write(b'{"clip": "11.mp4#0')  # as a crash leaves it
        run(**flags(clips, served, out=out))
    assert "12 clips = 12 captioned + 0 rejected + 0 failed" in capsys.readouterr().out
    assert len(rows(out)) == 24
    for (first, tier, _), times in served.times.items():
        if (f"{moving.number_of(first)}.mp4#00000", tier) in kept:
            assert times == 1
    assert sum(served.times.values()) <= 24 + 2


def test_what_a_job_takes_is_told_before(clips, tmp_path, capsys):
    out = tmp_path / "out"
    with server.serve(lambda asked, times: rightly(asked)) as served:
        asked = flags(clips, served, rate=5, frames=3, prompts="dense", max_clips=10)
        run(**asked, dry_run=True, tokens_per_image=100, price_per_million="2,8")
        said = capsys.readouterr().out.splitlines()
        assert served.asked == [] and not out.exists()
        assert said[0].startswith("10 requests (10 model_dense), and up to 2 more")
        # 10 clips of 3 pictures of 100 tokens.
        assert "about 3,000 tokens of images (3 of 448x448, 100 tokens each)" in said[1]
        sent, usual, most = 3000 + 10 * 249, 1300, 4500
        assert f"{usual:,} written ({most:,} at most)" in said[1]
        cost, at_most = (f"{(2 * sent + 8 * n) / 1e6:.2f}" for n in (usual, most))
        assert said[2] == f"about {cost}, {at_most} at most, for one answer each"
        assert said[3] == "2 s or more at 5 requests a second"
        run(**asked, out=out)
        assert len(served.asked) == 10 == len(shards.open(out))
        assert served.asked[-1].time - served.asked[0].time > 0.9 * 9 / 5
        assert len(server.pictures(served.asked[0].body)) == 3


def test_refusals_are_one_clear_sentence(clips, tmp_path):
    out = tmp_path / "out"
    with server.serve(lambda asked, times: rightly(asked)) as served:
        asked = flags(clips, served, out=out)
        run(**asked)
        assert "prompts.model_short: was" in refusal(**asked | {"prompts": "dense"})
        assert "model: was m, is n" in refusal(**asked | {"model": "n"})
        again = refusal(**asked | {"shards": out, "out": tmp_path / "again"})
        assert "has captions of the tiers model_dense, model_short" in again
        count = len(served.asked)
        assert "is the folder of --shards" in refusal(**asked | {"out": clips})
        for price in ("1", "a,b", "1,-1"):
            assert "two prices" in refusal(**asked | {"price_per_million": price})
        del asked["out"]
        assert "give --out" in refusal(**asked)
        del asked["model"]
        assert "needs --model" in refusal(**asked)
        assert len(served.asked) == count
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "holiday.jpg").touch()
        other = refusal(**flags(clips, served, out=tmp_path / "other"))
        assert "is not empty" in other


def test_the_result_is_encoded_like_other_shards(clips, tmp_path):
    """`prepare --source shards:OUT` reads it with `latent_cache.write`."""
    with server.serve(lambda asked, times: rightly(asked)) as served:
        run(**flags(clips, served, out=tmp_path / "out"))
    tiny_job.write_latents(tmp_path / "latents", tmp_path / "out", (2, 4, 4))
    latents = latent_cache.open(tmp_path / "latents")
    assert latents.manifest["captions"] == {
        "alt": 12, "model_short": 12, "model_dense": 12
    }  # fmt: skip
    assert latents[3].captions["model_dense"] == text(3, "model_dense")
    # 95 % of the examples of a run read captions of the model, and 5 % the original.
    sampler = captions.CaptionSampler({"model_dense": 0.95, "alt": 0.05})
    sampler.check(latents.manifest["captions"])
    transform = transforms.LatentsAndText(transforms.Tokenize(sampler, Letters(), 4))
    with loader.make_loader(
        latents, transform, seed=0, batch_size=500, num_steps=4
    ) as batches:
        found = np.concatenate([batch["text_tier"] for batch in batches])
    tiers = collections.Counter(captions.REALISED[place] for place in found)
    assert set(tiers) == {"model_dense", "alt"}
    assert abs(tiers["model_dense"] / 2000 - 0.95) < 0.02


class Letters:
    """A tokenizer; what it returns does not matter here."""

    pad_id = 0

    def encode(self, texts, length):
        ids_bl = np.ones((len(texts), length), np.int32)
        return ids_bl, ids_bl > 0
