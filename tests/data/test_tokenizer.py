"""Ids in T5's habits, any text encoded, the same texts the same model."""

import io
import json
import pickle
import subprocess

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_jax.core import digests
from sora_jax.data import tokenizer
from sora_jax.generation import export

COLOURS, SHAPES = ("red", "green", "blue", "cyan"), ("circle", "square", "ring")
WAYS = ("left", "right", "up", "down", "slowly left", "slowly right")
TEXTS = [
    f"a {colour} {shape} moves {way}"
    for colour in COLOURS
    for shape in SHAPES
    for way in WAYS
]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tokenizer.train(TEXTS, tmp_path_factory.mktemp("t") / "t.model", 512)


def test_a_large_corpus_is_sampled_from_all_of_the_alphabet(tmp_path, monkeypatch):
    """A word that stands at the end of the alphabet is one piece all the same."""
    texts = [f"aardvark {k:04d}" for k in range(900)]
    texts += [f"zebra {k:03d}" for k in range(100)]
    monkeypatch.setattr(tokenizer, "_MOST_TEXTS", 100)
    model = tokenizer.train(texts, tmp_path / "t.model", 400)
    assert len(model.ids("zebra")) == len(model.ids("aardvark")) == 2


def test_ids_are_those_of_t5(tokens):
    assert (tokens.pad_id, tokens.eos_id, tokens.unk_id) == (0, 1, 2)
    ids_bl, mask_bl = tokens.encode(["a red circle moves up", ""], 24)
    assert ids_bl.shape == mask_bl.shape == (2, 24)
    assert (ids_bl.dtype, mask_bl.dtype) == (np.int32, bool)
    length = int(mask_bl[0].sum())
    assert mask_bl[0].tolist() == [True] * length + [False] * (24 - length)
    assert ids_bl[0, length - 1] == 1 and not ids_bl[0, length:].any()
    assert ids_bl[1, :2].tolist() == [1, 0] and mask_bl[1].sum() == 1
    assert 256 + 3 < tokens.vocab_size <= 512 and ids_bl.max() < tokens.vocab_size


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_encoded_without_unknown_pieces(tokens, text):
    (ids,), _ = tokens.encode([text], 400)
    assert tokens.unk_id not in ids


def test_decoding_returns_the_text(tokens):
    for text in (*TEXTS[:5], "wholly new words", "ein grüner Kreis: 漢字"):
        assert tokens.decode(tokens.encode([text], 100)[0][0]) == text


def test_a_long_text_is_cut_and_still_ends(tokens):
    whole, _ = tokens.encode([TEXTS[0]], 64)
    ids_bl, mask_bl = tokens.encode([TEXTS[0]], 6)
    assert ids_bl[0].tolist() == [*whole[0, :5], 1] and mask_bl.all()
    with pytest.raises(TypeError, match="list"):
        tokens.encode("a red circle", 8)


def test_training_depends_on_the_texts_alone(tokens, tmp_path):
    again = tokenizer.train(reversed(TEXTS), tmp_path / "other.model", 512)
    assert again.digest == tokens.digest
    other = tokenizer.train([*TEXTS, "something else"], tmp_path / "third.model", 512)
    assert other.digest != tokens.digest
    copy = pickle.loads(pickle.dumps(tokens))
    assert copy.digest == tokens.digest
    np.testing.assert_array_equal(
        copy.encode(TEXTS, 20)[0], tokens.encode(TEXTS, 20)[0]
    )


@pytest.mark.parametrize("texts", [["a"], ["!!!"], ["red circle"], ["x y"] * 3])
def test_a_tiny_corpus_gives_a_smaller_vocabulary(texts, tmp_path):
    tokens = tokenizer.train(texts, tmp_path / "t.model")
    assert 259 < tokens.vocab_size < 300
    assert tokens.decode(tokens.encode(texts, 20)[0][0]) == texts[0]


@pytest.mark.parametrize("texts", [[], ["", "  "]])
def test_no_text_is_an_error(texts, tmp_path):
    with pytest.raises(ValueError, match="no caption"):
        tokenizer.train(texts, tmp_path / "t.model")
    with pytest.raises(ValueError, match="at least 291 pieces"):
        tokenizer.train(["a b"], tmp_path / "t.model", 100)
    assert not list(tmp_path.iterdir())


def test_models_of_others_are_read(tmp_path):
    """UMT5's has the beginning of a text as piece 2 and the unknown one as 3."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    tokens = tokenizer.Tokenizer(tmp_path / "spiece.model")
    assert (tokens.pad_id, tokens.eos_id, tokens.unk_id) == (0, 1, 3)
    (ids,), (mask,) = tokens.encode(["a red circle"], 30)
    assert 2 not in ids[mask] and ids[mask][-1] == 1
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(ValueError, match="junk.model is not a sentencepiece model"):
        tokenizer.Tokenizer(tmp_path / "junk.model")


LOOKALIKES = [
    "A  zebra \u00e9\u00df \u4f60",
    " leading",
    "trailing  ",
    "",
    "a\nb\tc",
    "\ufb01ne \u00bd e\u0301",
]


# Without "<": the marks' own names are marks there, as in every tokenizer of T5's.
@given(st.text(alphabet="abcdelmorstv  \u2581\u00e9\u4f60>/\n", max_size=40))
@settings(max_examples=200, deadline=None)
def test_an_exported_sentencepiece_model_has_the_same_ids(
    tmp_path_factory, tokens, text
):
    folder = tmp_path_factory.getbasetemp() / "left"
    if not folder.exists():
        tokens.save(folder)
    found = tokenizer.load(folder)
    assert isinstance(found, tokenizer.JsonTokenizer)
    for one in (text, *TEXTS[:3], *LOOKALIKES):
        assert found.ids(one) == tokens.ids(one)
        assert found.decode(found.ids(one)) == tokens.decode(tokens.ids(one))


@pytest.mark.peers
def test_transformers_reads_an_exported_tokenizer(tokens, tmp_path, peers_python):
    """The folder that an export writes, in the library that its users have."""
    tokens.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(export.TOKENIZER))
    texts = [*TEXTS[:3], *LOOKALIKES]
    script = (
        "import json, sys, transformers\n"
        "read = transformers.AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(json.dumps(read(json.loads(sys.argv[2])).input_ids))"
    )
    run = subprocess.run(
        [peers_python, "-c", script, str(tmp_path), json.dumps(texts)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found == [list(tokens.ids(text)) for text in texts]


def test_texts_are_cleaned_where_that_is_asked_for(tokens, tmp_path):
    tokens.save(tmp_path)
    cleaned = tokenizer.load(tmp_path / "spiece.model", clean_texts=True)
    messy = " a red &amp;amp; \n blue  ring "
    assert cleaned.ids(messy) == tokens.ids("a red & blue ring")
    assert tokens.ids(messy) != tokens.ids("a red & blue ring")
    assert pickle.loads(pickle.dumps(cleaned)).ids(messy) == cleaned.ids(messy)


@pytest.mark.parametrize(
    "changes",
    [
        # The library panics at this one, which is no Exception of Python's.
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"normalizer": {"type": "Newer"}},
        {"newer": 1},
    ],
)
def test_a_json_that_the_library_does_not_read_is_refused(tmp_path, changes):
    tokenizer.train(["a red circle"], tmp_path / "spiece.model", 320).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    digests.store(file, json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match="newer than the tokenizers library, version"):
        tokenizer.load(file)
