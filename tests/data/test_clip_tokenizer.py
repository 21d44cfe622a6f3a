"""CLIP's token ids are those of transformers, from either kind of file."""

import collections
import json
import pathlib
import subprocess

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from sora_jax.data import clip_tokenizer

ORACLE = pathlib.Path(__file__).resolve().parent.parent / "oracle" / "clip_tokens.py"
TEXTS = (
    "a photo of a cat",
    "A red circle moves left, then the blue square moves right.",
    "",
    "   leading, \t tabs\n\nand lines   ",
    "Crème brûlée à l'école, naïve façade",
    "Cre\u0300me bru\u0302le\u0301e",  # the same letters, composed by NFC
    "it's they're we've I'm you'll he'd CAN'T",
    "a dog 🐕 and a family 👨‍👩‍👧‍👦 in 🇫🇷!!",
    "1234 5.67 x3 ²½ ٣",
    "wow!!! ... ((what?)) #tag @you a/b a_b -- “quoted”",
    "猫が走る и кошка бежит, İstanbul ǅ ẞ",
    "\u200b zero\u00a0width \u2028 and nul\u0001",
    "word " * 120,
    "antidisestablishmentarianism" * 12,
    "🐕" * 60,
)


def write_clip(folder: pathlib.Path, num_merges: int = 300) -> None:
    """vocab.json and merges.txt in CLIP's layout, learned from the texts above."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = collections.Counter()
    for text in TEXTS:
        for word in text.lower().split():
            pieces, _ = zip(
                *pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(
                    word
                ),
                strict=True,
            )
            for piece in pieces:
                words[(*piece[:-1], f"{piece[-1]}</w>")] += 1
    merges = []
    for _ in range(num_merges):
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        merged = collections.Counter()
        for word, count in words.items():
            parts, at = [], 0
            while at < len(word):
                both = word[at : at + 2] == best
                parts.append("".join(best) if both else word[at])
                at += 1 + both
            merged[tuple(parts)] += count
        words = merged
    names = [*letters, *(f"{letter}</w>" for letter in letters)]
    names += ["".join(pair) for pair in merges]
    names = [*dict.fromkeys(names), clip_tokenizer.START, clip_tokenizer.END]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {name: number for number, name in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.peers
def test_ids_are_those_of_transformers(peers_python, tmp_path):
    """From vocab.json with merges.txt, and from tokenizer.json, to the last id."""
    folder, texts, out = tmp_path / "clip", tmp_path / "texts.json", tmp_path / "ids"
    write_clip(folder)
    texts.write_text(json.dumps(TEXTS))
    for source in (folder, tmp_path / "ids.whole"):
        command = [peers_python, ORACLE, source, texts, "77", out]
        subprocess.run(list(map(str, command)), check=True)
        tokenizer = clip_tokenizer.ClipTokenizer(source)
        wanted, found = json.loads(out.read_text()), tokenizer.encode(TEXTS, 77)
        for text, ours, theirs in zip(TEXTS, found.tolist(), wanted, strict=True):
            assert ours == theirs, text
        assert (tmp_path / "ids.whole" / "tokenizer.json").is_file()
    assert tokenizer.digest == clip_tokenizer.ClipTokenizer(folder).digest
    assert not (tmp_path / "ids.whole" / "merges.txt").is_file()


def test_a_text_begins_and_ends(tmp_path):
    write_clip(tmp_path)
    tokenizer = clip_tokenizer.ClipTokenizer(tmp_path)
    start, end = tokenizer.start_id, tokenizer.end_id
    assert (start, end) == (tokenizer.vocab_size - 2, tokenizer.vocab_size - 1)
    empty, long = tokenizer.encode(["", "a photo of a cat " * 20], 12)
    assert empty.tolist() == [start, *[end] * 11]
    assert long[0] == start and long[-1] == end and end not in long[:-1]
    assert len(tokenizer.ids("a photo of a cat " * 20)) > 12
    np.testing.assert_array_equal(
        *tokenizer.encode(["Crème  A", "cre\u0300me a"], 12), strict=True
    )


def test_files_without_a_tokenizer_are_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="has no tokenizer.json, nor vocab.json"
    ):
        clip_tokenizer.ClipTokenizer(tmp_path)
    write_clip(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    del vocab[clip_tokenizer.END]
    for file, content, reason in (
        ("vocab.json", json.dumps(vocab), "its vocabulary has no <.endoftext"),
        ("vocab.json", "{", "no tokenizer of a CLIP"),
        ("merges.txt", "x y z\n", "no tokenizer of a CLIP"),
        ("tokenizer.json", '{"model": {}}', "no tokenizer of a CLIP: 'vocab'"),
        ("tokenizer.json", "[]", "no tokenizer of a CLIP"),
    ):
        write_clip(tmp_path)
        (tmp_path / file).write_text(content)
        with pytest.raises(ValueError, match=reason):
            clip_tokenizer.ClipTokenizer(tmp_path)
