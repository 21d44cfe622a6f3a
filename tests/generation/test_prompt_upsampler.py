"""Upsamplers of prompts, in the call and in the job's recipes."""

import pytest

from sora_jax.captioning import chat_api
from sora_jax.generation import prompt_upsampler
from sora_jax.toyworld import captions
from tests.captioning import server

FAST = chat_api.Limits(rate=1e4, concurrency=4, timeout=5.0, attempts=2, backoff=0.01)
LONG = (
    "A bright red circle with clean edges glides slowly to the left across a calm grey "
    "wall, while the camera stays still and soft light falls on the scene."
)


def test_rules_word_what_the_prompt_states_and_more():
    rules = prompt_upsampler.Rules("dense")
    (made,) = rules(["a red circle moves left"], [3])
    assert made.original == "a red circle moves left"
    assert made.upsampler == "rules:dense"
    (subject,) = captions.parse(made.text).subjects
    assert (subject.colour, subject.direction) == ("red", "left")
    assert len(made.text.split()) > 15
    with pytest.raises(
        ValueError, match="rules write short, medium, dense, structured"
    ):
        prompt_upsampler.Rules("alt")


def test_a_chat_model_is_asked_for_each_prompt(monkeypatch):
    def reply(asked, times):
        return server.Reply(text=f"{LONG} {'left' if 'a cat' in asked.text else ''}")

    prompts = ["a cat", "a red circle, $5"]
    with server.serve(reply) as served:
        chat = prompt_upsampler.Chat(served.url, "m", limits=FAST)
        made = chat(prompts, [7, 8])
    assert [m.text for m in made] == [f"{LONG} left", LONG]
    assert [m.original for m in made] == prompts
    assert made[0].upsampler.startswith("model:m prompt:")
    in_order = sorted(served.asked, key=lambda asked: asked.body["seed"])
    assert [asked.body["seed"] for asked in in_order] == [7, 8]
    for prompt, asked in zip(prompts, in_order, strict=True):
        assert f"\n{prompt}\n" in asked.text and asked.body["model"] == "m"


def test_answers_that_cannot_be_used_are_asked_for_again_and_then_refused():
    answers = iter(["", "I'm sorry, but I can't help with that.", LONG])
    with server.serve(lambda *_: server.Reply(text=next(answers))) as served:
        (made,) = prompt_upsampler.Chat(served.url, "m", limits=FAST)(["a cat"], [0])
    assert made.text == LONG
    assert [asked.body["seed"] for asked in served.asked] == [0, 1, 2]
    with server.serve(lambda *_: server.Reply(text="**Bold** words")) as served:
        with pytest.raises(ValueError, match="for 'a cat' can be used: .* has markup"):
            prompt_upsampler.Chat(served.url, "m", limits=FAST)(["a cat"], [0])
    with server.serve(lambda *_: server.Reply(status=500)) as served:
        with pytest.raises(OSError, match="'a cat' is not rewritten: HTTP 500"):
            prompt_upsampler.Chat(served.url, "m", limits=FAST)(["a cat"], [0])


def test_an_instruction_needs_the_prompt():
    for wrong in ("Write more.", "Rewrite $prompt for $model", "$prompt $"):
        with pytest.raises(ValueError, match=r"has the field \$prompt, and no other"):
            prompt_upsampler.Chat("http://localhost:1/v1", "m", wrong)
