"""Only results that were measured alike are compared."""

import dataclasses
import json
import pathlib

import pytest

from sora_jax.evals import protocol


def manifest(**changed) -> protocol.Manifest:
    fields = {
        "num_samples": {"motion": 256, "attribute": 96},
        "num_frames": 9,
        "height": 32,
        "width": 32,
        "fps": 8.0,
        "resize": "none",
        "feature_weights": "ab" * 32,
        "reference": "cd" * 32,
        "seeds": (0, 1),
        "prompts": protocol.text_digest(["a", "b"]),
        "sampler": "euler",
        "num_inference_steps": 20,
        "guidance_scale": 3.5,
        "shift": 5.0,
    }
    return protocol.Manifest(**fields | changed)


def result(scores, **changed):
    made = manifest(**changed)
    saved = {"protocol": made.to_dict(), "digest": made.digest(), "scores": scores}
    return json.loads(json.dumps(saved))


OTHER = {
    "num_samples": {"motion": 255, "attribute": 96},
    "num_frames": 17,
    "height": 64,
    "width": 64,
    "fps": 4.0,
    "resize": "bilinear",
    "feature_weights": "ef" * 32,
    "reference": "ef" * 32,
    "seeds": (0,),
    "prompts": "ef" * 32,
    "sampler": "heun",
    "num_inference_steps": 21,
    "guidance_scale": 3.0,
    "shift": 3.0,
    "step_cache": 0.1,
    "codec": "h264",
    "code": "another",
}


def test_every_field_changes_the_digest():
    assert OTHER.keys() == {
        field.name for field in dataclasses.fields(protocol.Manifest)
    }
    assert manifest().digest() == manifest().digest()
    # Results of before there was a step cache are like those without it.
    assert "step_cache" not in manifest(step_cache=0.0).to_dict()
    for name, value in OTHER.items():
        assert manifest(**{name: value}).digest() != manifest().digest(), name


def test_unequal_digests_are_not_compared_unless_forced():
    first, second = result({"a": 1.0, "b": 2.0}), result({"a": 1.5, "c": 3.0})
    assert protocol.compare(first, second) == {"a": 0.5}
    other = result({"a": 1.5}, guidance_scale=7.0)
    with pytest.raises(protocol.UnequalProtocols, match="guidance_scale: 3.5 and 7.0"):
        protocol.compare(first, other)
    assert protocol.compare(first, other, force=True) == {"a": 0.5}


def test_an_edited_protocol_is_noticed():
    edited = result({"a": 1.0})
    edited["protocol"]["num_frames"] = 16
    with pytest.raises(ValueError, match="does not match its protocol"):
        protocol.compare(edited, edited)


def test_text_digest_depends_on_where_texts_end():
    assert protocol.text_digest(["ab", "c"]) != protocol.text_digest(["a", "bc"])
    assert protocol.text_digest(["ab", "c"]) != protocol.text_digest(["c", "ab"])


def test_code_digest_ignores_comments_and_sees_numbers():
    code = '"""Doc."""\n\n\ndef f(x):\n    """Says."""\n    return x + 1  # why\n'
    reworded = '"""Other."""\ndef f(x):\n    return x + 1\n'
    assert protocol.bare_code(code) == protocol.bare_code(reworded)
    assert protocol.bare_code(code) != protocol.bare_code(code.replace("1", "2"))
    only_words = 'class A(Exception):\n    """Says."""\n'
    assert protocol.bare_code(only_words) == "class A(Exception):\n    pass"
    assert manifest().code.count("+") == 1


def test_a_list_of_scoring_code_names_files_that_exist():
    with pytest.raises(FileNotFoundError, match="evals/moved.py"):
        protocol.code_version("evals/moved.py")


def test_the_oracle_and_its_rules_are_scoring_code(monkeypatch):
    seen = []
    monkeypatch.setattr(protocol, "bare_code", lambda text: seen.append(text) or text)
    protocol.code_version()
    root = pathlib.Path(protocol.__file__).parents[1]
    for name in (
        "toyworld/rules.py",
        "toyworld/reading.py",
        "evals/metrics/temporal.py",
    ):
        assert (root / name).read_text() in seen, name
