"""A cache of text states: what comes back, what is refused, what an interruption costs."""

import concurrent.futures
import pathlib
import pickle
import shutil
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.data import (
    caches,
    captions,
    latent_cache,
    loader,
    records,
    shards,
    text_cache,
    transforms,
)
from sora_jax.data import tokenizer as tokenizers
from tests.data import clips
from tests.data.test_latent_cache import STATED, damage_before_writing
from tests.data.test_latent_cache import encode as encode_clips

LENGTH, DIM = 24, 6
TEXTS = [f"clip number {index} of {'many ' * (index % 5)}" for index in range(40)]


def encode(ids_bl, mask_bl, dtype=np.float32):
    """A token's states: its id and its place, so that any mix-up is seen."""
    place_l1 = np.arange(ids_bl.shape[1])[:, None]
    states_bld = ids_bl[..., None] + place_l1 / 8 + np.arange(DIM) / 64
    return (states_bld * mask_bl[..., None]).astype(dtype)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("pieces") / "t.model"
    return tokenizers.train([*TEXTS, "é 0", "é 1", "é 2"], path, 320)


@pytest.fixture
def how(tokenizer):
    """What `write_text_states` takes behind the folder."""
    return {
        "texts": TEXTS, "tokenizer": tokenizer, "encode": encode, "length": LENGTH,
        "dim": DIM, "dtype": "float32", "batch_size": 3, "texts_per_file": 8,
        "settings": {"text_encoder": "e" * 16, "captions": "c" * 64, "tiers": ["alt"]},
    }  # fmt: skip


def test_states_come_back_without_padding(how, tokenizer, tmp_path):
    """Any order, the null text, equal texts once; zeros where there is no token."""
    texts = [*reversed(TEXTS), *TEXTS]
    manifest = text_cache.write(tmp_path / "out", **how | {"texts": texts})
    assert manifest["count"] == len(TEXTS) + 1
    cache = text_cache.open(tmp_path / "out")
    again = pickle.loads(pickle.dumps(cache))
    for text in ("", *TEXTS):
        ids_1l, mask_1l = tokenizer.encode([text], LENGTH)
        expected_ld = encode(ids_1l, mask_1l)[0]
        for found in (cache, again):
            found_ld = found.padded(ids_1l[0], mask_1l[0])
            np.testing.assert_array_equal(found_ld, expected_ld)
    for index in range(len(cache)):
        assert len(cache[index].states) <= LENGTH
    shortest = tokenizer.encode([""], LENGTH)
    assert cache[0].id == text_cache.key(shortest[0][shortest[1]])
    with pytest.raises(shards.ShardsError, match="has no states of the token ids"):
        cache.padded(*(a[0] for a in tokenizer.encode(["another"], LENGTH)))


def test_captions_that_are_cut_are_counted(how, tmp_path, capsys):
    text_cache.write(tmp_path / "whole", **how)
    assert "captions:" not in capsys.readouterr().err
    text_cache.write(tmp_path / "cut", **how | {"length": 4})
    assert "are cut; --text_length=" in capsys.readouterr().err


def test_bfloat16_is_stored_as_such(how, tmp_path):
    half = how | {"dtype": "bfloat16", "encode": lambda *a: encode(*a, jnp.bfloat16)}
    text_cache.write(tmp_path / "half", **half)
    text_cache.write(tmp_path / "whole", **how)
    one, other = (text_cache.open(tmp_path / n) for n in ("half", "whole"))
    assert one[3].states.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        one[3].states, other[3].states.astype(one[3].states.dtype)
    )
    assert 2 * one[3].states.nbytes == other[3].states.nbytes


def test_an_interrupted_cache_goes_on(how, tmp_path):
    text_cache.write(tmp_path / "whole", **how)
    calls = []

    def failing(ids_bl, mask_bl):
        if len(calls) == 8:
            raise OSError(28, "No space left on device")
        calls.append(1)
        return encode(ids_bl, mask_bl)

    out = tmp_path / "out"
    with pytest.raises(OSError, match="No space left"):
        text_cache.write(out, **how | {"encode": failing})
    with pytest.raises(shards.ShardsError, match="run it again"):
        text_cache.open(out)
    parts = {path.parent.name for path in (out / ".partial").glob("*/*.array_record")}
    assert parts == {"00000", "00001"}
    stamp = (out / ".partial" / "00000" / "part.array_record").stat().st_mtime_ns
    text_cache.write(out, **how)
    first = sorted(out.glob("text_states.array_record-*"))[0]
    assert first.stat().st_mtime_ns == stamp
    for path in (tmp_path / "whole").rglob("*.*"):
        same = out / path.relative_to(tmp_path / "whole")
        assert path.read_bytes() == same.read_bytes()
    text_cache.write(out, **how | {"encode": None})  # finished


def test_a_foreign_or_stale_cache_is_refused(how, tokenizer, tmp_path):
    out = tmp_path / "out"
    text_cache.write(out, **how)
    right = {
        "text_encoder": "e" * 16, "captions": "c" * 64, "tokenizer": tokenizer.digest,
        "length": LENGTH, "tiers": ["alt"],
    }  # fmt: skip
    text_cache.open(out, **right)
    for name, wrong, said in (
        ("text_encoder", "f" * 16, "come from text encoder eeeeeeeeeeee, not ffff"),
        ("captions", "d" * 64, "come from captions cccccccccccc, not dddd"),
        ("tokenizer", "0" * 64, "come from tokenizer .*, not 0000"),
        ("length", 12, "come from length 24, not 12"),
        ("tiers", ["alt", "dense"], r"without \['dense'\]"),
    ):
        with pytest.raises(shards.ShardsError, match=said):
            text_cache.open(out, **right | {name: wrong})
    for change in (
        {"length": 20},
        {"dtype": "bfloat16"},
        {"settings": how["settings"] | {"text_encoder": "f"}},
    ):
        with pytest.raises(shards.ShardsError, match=": was .*, is"):
            text_cache.write(out, **how | change)
    with pytest.raises(shards.ShardsError, match="no finished text states"):
        text_cache.open(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda states_bld: states_bld[..., 1:], "states of these texts are float32"),
        (lambda states_bld: states_bld.astype(np.float64), "encode returned float64"),
        (lambda states_bld: states_bld * np.float32(np.nan), "not finite"),
    ],
)
def test_wrong_states_are_refused(how, tmp_path, change, message):
    spoilt = how | {"encode": lambda *a: change(encode(*a)), "texts": []}
    with pytest.raises(ValueError, match=message):
        text_cache.write(tmp_path / "out", **spoilt)


def test_a_state_that_changed_before_it_was_written_is_reported(
    how, tmp_path, monkeypatch
):
    """Every hash of the file is right; only the checksum of the states is not."""
    damage_before_writing(monkeypatch)
    text_cache.write(tmp_path / "out", **how)
    with pytest.raises(records.CorruptRecord, match="SHA-256 of its states"):
        text_cache.open(tmp_path / "out")[3]


def test_several_processes_share_the_work(how, tmp_path):
    wall = threading.Barrier(3)

    def one(process):
        return text_cache.write(
            tmp_path / "shared", **how,
            processes=caches.Processes(process, 3, lambda name: wall.wait(60)),
        )  # fmt: skip

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        manifests = [*pool.map(one, range(3))]
    alone = text_cache.write(tmp_path / "alone", **how)
    assert manifests == [alone] * 3


def test_a_forecast_comes_first_and_a_full_disk_before_any_work(
    how, tmp_path, monkeypatch, capsys
):
    """The size is exact: every token is counted before any is encoded."""
    said = []
    monkeypatch.setattr(caches, "_announce", lambda *a: said.append(a))
    text_cache.write(tmp_path / "out", **how)
    monkeypatch.undo()
    cache = text_cache.open(tmp_path / "out")
    stored = sum(cache[index].states.nbytes for index in range(len(cache)))
    assert said[0][4:] == (stored, stored)
    little = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(caches.shutil, "disk_usage", lambda path: little)
    with pytest.raises(OSError, match=r"room for 0\.0 GiB, and the text states"):
        text_cache.write(tmp_path / "full", **how)
    assert "41 captions to go here, about " in capsys.readouterr().err
    monkeypatch.undo()
    assert text_cache.write(tmp_path / "full", **how)["count"] == 41


@pytest.fixture(scope="module")
def both(tokenizer, tmp_path_factory):
    """Latents, and the states of their captions in bfloat16."""
    base = tmp_path_factory.mktemp("both")
    shards.write(base / "shards", clips.Clips(num=20))
    source = shards.open(base / "shards")
    latent_cache.write(base / "latents", source, encode_clips, **STATED)
    latents = latent_cache.open(base / "latents")
    text_cache.write(
        base / "text", latents.all_captions(), tokenizer,
        lambda *a: encode(*a, jnp.bfloat16), length=LENGTH, dim=DIM, dtype="bfloat16",
        settings={},
    )  # fmt: skip
    return latents, text_cache.open(base / "text")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_states_change_no_order_and_no_caption(both, tokenizer, num_workers):
    """Row by row the same clip and the same of its captions, by their ids or states."""
    latents, cache = both
    sampler = captions.CaptionSampler({"short": 0.5, "dense": 0.5})
    text = transforms.Tokenize(sampler, tokenizer, LENGTH)
    how = {"seed": 3, "batch_size": 8, "num_steps": 6, "start_step": 2}
    with (
        loader.make_loader(latents, transforms.LatentsAndText(text), **how) as plain,
        loader.make_loader(
            latents,
            transforms.LatentsAndText(text, cache),
            num_workers=num_workers,
            **how,
        ) as cached,
    ):
        for by_ids, by_states in zip(plain, cached, strict=True):
            ids_bl, mask_bl = by_ids["text_ids"], by_ids["text_mask"]
            np.testing.assert_array_equal(by_states["latents"], by_ids["latents"])
            np.testing.assert_array_equal(by_states["text_mask"], mask_bl)
            assert by_states["text_states"].dtype == jnp.bfloat16
            np.testing.assert_array_equal(
                by_states["text_states"], encode(ids_bl, mask_bl, jnp.bfloat16)
            )
            assert "text_ids" not in by_states


def test_a_clip_with_damaged_states_is_replaced(both, tokenizer, tmp_path):
    """As a damaged clip: named, counted, and the next one takes its place."""
    latents, cache = both
    folder = pathlib.Path(shutil.copytree(cache.folder, tmp_path / "text"))
    (file,) = folder.glob("text_states.array_record-*")
    whole, ids = file.read_bytes(), map(tokenizer.ids, latents.all_captions({"short"}))
    names = {*map(text_cache.key, ids)}
    for at in range(200, len(whole), 97):
        content = bytearray(whole)
        content[at] ^= 1
        file.write_bytes(content)
        hurt = text_cache.open(folder)
        found = hurt.read(range(len(hurt)))
        bad = [r.id for r in found if isinstance(r, records.CorruptRecord)]
        if len(bad) == 1 and bad[0] in names:
            break
    text = transforms.Tokenize(captions.CaptionSampler({"short": 1}), tokenizer, LENGTH)
    transform = transforms.LatentsAndText(text, hurt)
    batch, damaged = loader.Batches(latents, transform, 0, 20, 0, 1, 0, 1)[0]
    assert len(damaged) == 1 and str(file) in damaged[0][1]
    assert batch["text_states"].shape == (20, LENGTH, DIM)
