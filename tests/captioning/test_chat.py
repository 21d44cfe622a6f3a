"""What is sent to a server, what comes back, and what happens where it does not."""

import email.utils
import json
import os
import time

import numpy as np
import pytest

from sora_jax.captioning import captioner, chat, chat_api
from tests.captioning import moving, server

FAST = chat_api.Limits(rate=1e4, concurrency=4, timeout=5.0, attempts=4, backoff=0.01)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return list(moving.write(tmp_path_factory.mktemp("clips") / "in", 4))


def made(url, limits=FAST, prompts=("dense", "short"), **settings):
    settings = chat.Settings(**{"model": "m", "frames": 3, "image_side": 64} | settings)
    return chat.Chat(url, settings, chat.read_prompts(prompts), limits)


def always(**reply):
    return lambda asked, times: server.Reply(**reply)


def ask(writer, clip, tier="model_dense", seed=0):
    (answer,) = writer.caption([clip], tier, seed)
    return answer


def test_a_request_shows_the_clip(clips, monkeypatch):
    monkeypatch.setenv(chat_api.KEY, "sk-secret")
    with server.serve(always(text="a caption")) as served:
        answer = ask(made(served.url), clips[2], "model_short", seed=7)
    assert answer == captioner.Answer("a caption", "stop", 100, 10, requests=1)
    (asked,) = served.asked
    body = asked.body
    assert asked.headers["Authorization"] == "Bearer sk-secret"
    assert (body["model"], body["seed"], body["temperature"]) == ("m", 7, 0.3)
    assert 15 < body["max_completion_tokens"] < 200
    text = body["messages"][0]["content"][0]["text"]
    assert "3 frames" in text and "0.6 seconds" in text and "$" not in text
    shown = server.pictures(body)
    assert [picture.shape for picture in shown] == [(64, 64, 3)] * 3
    # The first, the middle and the last frame, enlarged without a blur.
    for picture, index in zip(shown, (0, 2, 4), strict=True):
        frame_hwc = moving.frames("up", 2)[index].repeat(2, 0).repeat(2, 1)
        assert np.abs(picture.astype(int) - frame_hwc).max() <= 12


def test_large_frames_are_reduced():
    frame_hwc = np.zeros((90, 200, 3), np.uint8)
    assert chat.picture_size(90, 200, 100) == (45, 100)
    assert len(chat._jpeg(frame_hwc, 100)) > 100
    assert chat.tokens_per_image(720, 1280, 448) == 16 * 9


def test_the_digest_covers_what_decides_and_nothing_else():
    one = made("http://localhost:1/v1")
    assert made("https://other/v1", chat_api.Limits()).digest == one.digest
    for other in (
        {"frames": 4},
        {"model": "n"},
        {"image_side": 65},
        {"temperature": 0},
    ):
        assert made("http://localhost:1/v1", **other).digest != one.digest
    assert set(one.prompts) == {"model_dense", "model_short"}


def test_an_instruction_of_ones_own(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("Say what $frames pictures cost: $$5.\n")
    (tier,) = prompts = chat.read_prompts([f"short={file}"])
    assert tier == "model_short"
    assert prompts[tier].substitute(frames=2) == "Say what 2 pictures cost: $5."
    for wrong in ("", "of $clips", "5$"):
        file.write_text(wrong)
        with pytest.raises(ValueError, match="is no instruction"):
            chat.read_prompts([f"short={file}"])
    for names in (["long"], ["dense", "dense"], [""]):
        with pytest.raises(ValueError, match="--prompts names each of short, dense"):
            chat.read_prompts(names)


@pytest.mark.parametrize(
    "reply, reason",
    [
        ({"status": 500, "raw": b"oops"}, "HTTP 500 Internal Server Error: oops"),
        ({"status": 429, "raw": b"{}"}, "HTTP 429 Too Many Requests"),
        ({"raw": b'{"choices": [{"mess'}, "the response is no chat completion"),
        ({"raw": b'{"choices": []}'}, "the response is no chat completion"),
        ({"raw": b'{"choices": [{"message": {"content": 5}}]}'}, "no chat completion"),
        ({"raw": b"[" * 100_000}, "the response is no chat completion"),
        ({"raw": b""}, "the response is no chat completion"),
    ],
)  # fmt: skip
def test_what_may_pass_is_tried_again_and_then_fails(clips, reply, reason):
    with server.serve(always(**reply)) as served:
        failure = ask(made(served.url), clips[0])
        assert reason in failure.reason and not failure.lasting
        assert failure.requests == len(served.asked) == 4
    good = server.Reply(text="a caption")
    bad = server.Reply(**reply)
    with server.serve(lambda asked, times: good if times > 2 else bad) as served:
        answer = ask(made(served.url), clips[0])
    assert (answer.text, answer.requests) == ("a caption", 3)


def test_a_server_that_is_late_or_absent(clips):
    limits = chat_api.Limits(rate=1e4, timeout=0.2, attempts=2, backoff=0.01)
    with server.serve(always(delay=0.6)) as served:
        late = ask(made(served.url, limits), clips[0])
    assert "timed out" in late.reason and late.requests == 2
    absent = ask(made(served.url, limits), clips[0])
    assert "refused" in absent.reason and absent.requests == 2


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_all_wait_as_long_as_the_server_says(clips, form):
    """A 429 names 1 s or more; the other threads wait too."""

    def reply(asked, times):
        if len(served.asked) > 1:
            return server.Reply()
        date = email.utils.formatdate(time.time() + 2.0)  # in whole seconds
        after = (("Retry-After", "1" if form == "seconds" else date),)
        return server.Reply(status=429, raw=b"", headers=after)

    with server.serve(reply) as served:
        writer = made(served.url)
        assert ask(writer, clips[0]).requests == 2
        first, second = (asked.time for asked in served.asked)
    assert second - first > 0.9


def test_the_rate_is_that_of_all_threads(clips):
    limits = chat_api.Limits(rate=20.0)
    with server.serve(always()) as served:
        writer = made(served.url, limits)
        for clip in clips:
            ask(writer, clip)
            ask(writer, clip)
    times = [asked.time for asked in served.asked]
    assert times[-1] - times[0] > 0.9 * 7 / 20


def test_backoff_grows_and_is_not_the_same_for_all(clips, monkeypatch):
    waits = []
    limits = chat_api.Limits(rate=1e4, attempts=5, backoff=1.0)
    with server.serve(always(status=503, raw=b"")) as served:
        for _ in range(2):
            writer = made(served.url, limits)
            monkeypatch.setattr(writer._client._stopped, "wait", waits.append)
            ask(writer, clips[0])
    backoff = [wait for wait in waits if wait > 0.1]
    for wait, most in zip(backoff, [1, 2, 4, 8] * 2, strict=True):
        assert most / 2 <= wait <= most
    assert backoff[:4] != backoff[4:]


def test_refusals_of_one_clip_and_of_all(clips):
    with server.serve(always(status=400, raw=b"the picture is too small")) as served:
        failure = ask(made(served.url), clips[0])
    assert failure.lasting and failure.requests == 1
    assert "HTTP 400 Bad Request: the picture is too small" in failure.reason
    with server.serve(always(status=404, raw=b"no such model")) as served:
        with pytest.raises(ValueError, match="refuses: HTTP 404.*check the address"):
            ask(made(served.url), clips[0])


def test_a_server_that_answers_nobody_ends_the_job(clips):
    limits = chat_api.Limits(rate=1e4, attempts=1)
    with server.serve(always(status=502, raw=b"")) as served:
        writer = made(served.url, limits)
        for _ in range(9):
            assert isinstance(ask(writer, clips[0]), captioner.Failure)
        with pytest.raises(
            OSError, match="no answer to 10 requests in a row: HTTP 502"
        ):
            ask(writer, clips[0])


def test_withheld_answers_and_parts(clips):
    with server.serve(always(text=None, refusal="I will not.")) as served:
        answer = ask(made(served.url), clips[0])
    assert (answer.text, answer.stopped) == ("I will not.", "refusal")
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "dog"}]
    raw = json.dumps({"choices": [{"message": {"content": parts}}]}).encode()
    with server.serve(always(raw=raw)) as served:
        answer = ask(made(served.url), clips[0])
    assert answer == captioner.Answer("a dog", "stop", 0, 0, 1)


def test_the_key_is_sent_and_never_told(clips, monkeypatch, capfd):
    monkeypatch.setenv(chat_api.KEY, "sk-secret")

    def echo(status):
        def reply(asked, times):
            said = f"bad key {asked.headers['Authorization']}".encode()
            return server.Reply(status=status, raw=said)

        return reply

    for status in (500, 400, 200):
        with server.serve(echo(status)) as served:
            failure = ask(made(served.url), clips[0])
        assert "***" in failure.reason and "secret" not in failure.reason
    with server.serve(echo(401)) as served:
        with pytest.raises(ValueError, match="bad key Bearer .*SORA_CHAT_KEY") as e:
            ask(made(served.url), clips[0])
    assert "secret" not in str(e.value)
    # A redirect would hand it to another server.
    with server.serve(always()) as other:
        target = (("Location", f"{other.url}/chat/completions"),)
        with server.serve(always(status=302, raw=b"", headers=target)) as served:
            with pytest.raises(ValueError, match="refuses: HTTP 302"):
                ask(made(served.url), clips[0])
    assert other.asked == []
    assert "secret" not in "".join(capfd.readouterr())


def test_addresses(monkeypatch, capsys):
    for url in ("localhost:8000", "ftp://host/v1", "https://me:pw@host/v1", "http://"):
        with pytest.raises(
            ValueError, match="a chat server has an address such as"
        ) as caught:
            made(url)
        assert "pw" not in str(caught.value)
    with pytest.raises(ValueError, match="without a user, a password or a query"):
        made("https://host/v1?key=x")
    for url in ("http://h/v1", "http://h/v1/", "http://h/v1/chat/completions"):
        assert made(url)._client._url == "http://h/v1/chat/completions"
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(os.environ, chat_api.KEY, "sk-secret")
    made("http://host/v1")
    assert "is not encrypted" in capsys.readouterr().err
    monkeypatch.setitem(os.environ, chat_api.KEY, "sk\nsecret")
    with pytest.raises(ValueError, match="is not one line of ASCII") as caught:
        made("https://host/v1")
    assert "secret" not in str(caught.value)
