"""A cache gives back what was encoded, goes on after a stop, refuses what is foreign."""

import concurrent.futures
import dataclasses
import errno
import json
import pathlib
import pickle
import shutil
import threading
import time
import types

import numpy as np
import pytest
import safetensors.numpy

from sora_jax.data import (
    array_files,
    caches,
    captions,
    latent_cache,
    loader,
    records,
    shards,
    tokenizer,
    transforms,
)
from tests.data import clips

STATED = {"vae_digest": "v" * 64, "preprocessing": {"scale": 127.5}}


def encode(batch):
    """Eight channels on 2 x 4 x 4, all of the clip's number."""
    first = [clip.frames()[0, 0, 0, 0] for clip in batch]
    steps = np.arange(2 * 4 * 4 * 8, dtype=np.float32).reshape(1, 2, 4, 4, 8)
    return np.array(first, np.float32)[:, None, None, None, None] + steps / 100


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "shards"
    shards.write(folder, clips.Clips(num=20))
    return shards.open(folder)


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "latents"
    latent_cache.write(out, source, encode, batch_size=3, clips_per_file=8, **STATED)
    return out


def test_latents_and_texts_come_back(source, written):
    cache = latent_cache.open(written)
    assert len(cache) == 20 and cache.shape == (2, 4, 4, 8) and cache.fps == 8.0
    expected = encode(list(source))
    for index in (0, 7, 19):
        record = cache[index]
        assert record.latents.dtype == np.float32
        np.testing.assert_array_equal(record.latents, expected[index])
        assert (record.id, record.fps) == (f"clip-{index}", 8.0)
        assert record.captions == cache.captions(index) == source.captions(index)
        assert json.loads(record.state_json) == {"index": index}
    mean_c, std_c = cache.mean_std
    np.testing.assert_allclose(mean_c, expected.mean((0, 1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std_c, expected.std((0, 1, 2, 3)), rtol=1e-5)
    again = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(again[4].latents, expected[4])


def test_a_caption_to_read_and_one_to_write(source):
    """Each from its own tiers; a clip that lacks either has nothing to write."""
    read, write = (
        transforms.Tokenize(captions.CaptionSampler({tier: 1}), Letters(), length)
        for tier, length in (("short", 4), ("dense", 6))
    )
    both = transforms.TwoCaptions(read, write)
    random = np.random.default_rng(0)

    def row(**texts):
        return both(types.SimpleNamespace(captions=texts), random)

    found = row(short="ab", dense="abc", alt="abcdefgh")
    assert found["text_ids"].tolist() == [2, 2, 0, 0]
    assert found["target_ids"].tolist() == [3, 3, 3, 0, 0, 0]
    assert row(short="ab")["target_ids"].tolist() == [0] * 6
    assert row(dense="abc")["target_ids"].tolist() == [0] * 6


class Letters:
    """As many ids as letters, all of the text's length."""

    pad_id = 0

    def encode(self, texts, length):
        ids_bl = np.zeros((len(texts), length), np.int32)
        for row, text in enumerate(texts):
            ids_bl[row, : len(text)] = len(text)
        return ids_bl, ids_bl != 0


class Retold(clips.Clips):
    """The same pixels with other captions."""

    def clips(self, *arguments):
        for clip in super().clips(*arguments):
            texts = {tier: f"{text}, told anew" for tier, text in clip.captions.items()}
            yield dataclasses.replace(clip, captions=texts)


def test_other_captions_are_another_cache(source, written, tmp_path):
    """The pixels are the same; what a denoiser learns from is not."""

    shards.write(tmp_path / "shards", Retold(num=20))
    retold = shards.open(tmp_path / "shards")
    assert retold.manifest["digest"] != source.manifest["digest"]
    copy = tmp_path / "latents"
    shutil.copytree(written, copy)
    with pytest.raises(shards.ShardsError, match="clips"):
        latent_cache.write(copy, retold, encode, clips_per_file=8, **STATED)


def test_an_interrupted_cache_goes_on(source, written, tmp_path):
    seen = []

    def failing(batch):
        seen.extend(clip.id for clip in batch)
        if "clip-17" in seen:
            raise KeyboardInterrupt
        return encode(batch)

    out, how = tmp_path / "latents", {"batch_size": 3, "clips_per_file": 8, **STATED}
    with pytest.raises(KeyboardInterrupt):
        latent_cache.write(out, source, failing, **how)
    with pytest.raises(shards.ShardsError, match="run it again"):
        latent_cache.open(out)
    seen.clear()

    def counting(batch):
        seen.extend(clip.id for clip in batch)
        return encode(batch)

    latent_cache.write(out, source, counting, **how)
    assert seen == [f"clip-{index}" for index in range(16, 20)]
    for path in written.rglob("*.*"):
        assert path.read_bytes() == (out / path.relative_to(written)).read_bytes()
    latent_cache.write(out, source, None, **how)  # finished: nothing is encoded


def test_a_foreign_or_stale_cache_is_refused(source, written, tmp_path):
    with pytest.raises(shards.ShardsError, match="come from vae vvvvvvvvvvvv, not www"):
        latent_cache.open(written, vae_digest="w" * 64)
    with pytest.raises(shards.ShardsError, match="come from clips .*, not ccc"):
        latent_cache.open(written, clips_digest="c" * 64)
    latent_cache.open(
        written, vae_digest="v" * 64, clips_digest=source.manifest["digest"]
    )
    how = {"clips_per_file": 8, **STATED}
    for change in ({"vae_digest": "w"}, {"preprocessing": {"scale": 255}}):
        with pytest.raises(shards.ShardsError, match=": was .*, is"):
            latent_cache.write(written, source, encode, **how | change)
    shards.write(tmp_path / "others", clips.Clips(num=4))
    others = shards.open(tmp_path / "others")
    with pytest.raises(shards.ShardsError, match="clips: was .*, is"):
        latent_cache.write(written, others, encode, **how)
    with pytest.raises(shards.ShardsError, match="no finished latents"):
        latent_cache.open(tmp_path)


def test_damaged_clips_are_left_out_and_listed(source, tmp_path):
    folder = pathlib.Path(shutil.copytree(source.folder, tmp_path / "shards"))
    file = sorted(folder.glob("clips-train*"))[0]
    for at in range(200, 4000, 97):
        damaged = bytearray(file.read_bytes())
        damaged[at] ^= 1
        file.write_bytes(damaged)
        if any(isinstance(r, ValueError) for r in shards.open(folder).read(range(4))):
            break
    hurt = shards.open(folder)
    bad = [r.id for r in hurt.read(range(20)) if isinstance(r, records.CorruptRecord)]
    manifest = latent_cache.write(tmp_path / "latents", hurt, encode, **STATED)
    assert bad and [item["id"] for item in manifest["dropped"]] == bad
    cache = latent_cache.open(tmp_path / "latents")
    assert len(cache) == 20 - len(bad)
    assert bad[0] not in {cache[index].id for index in range(len(cache))}


def test_a_damaged_latent_is_reported(written, tmp_path):
    folder = pathlib.Path(shutil.copytree(written, tmp_path / "latents"))
    file = folder / "latents.array_record-00001"
    for at in range(200, 20_000, 97):
        content = bytearray(file.read_bytes())
        content[at] ^= 1
        file.write_bytes(content)
        cache = latent_cache.open(folder)
        found = cache.read(range(20))
        if any(isinstance(r, records.CorruptRecord) for r in found):
            break
    (hurt,) = (r for r in found if isinstance(r, records.CorruptRecord))
    assert hurt.where == str(file) and hurt.id in {f"clip-{k}" for k in range(8, 16)}
    with pytest.raises(records.CorruptRecord):
        cache[int(hurt.id.removeprefix("clip-"))]


def damage_before_writing(monkeypatch):
    """Flips a bit of each record's tensor, after its checksum has been computed."""
    save = safetensors.numpy.save
    monkeypatch.setattr(
        safetensors.numpy,
        "save",
        lambda *a: bytes([*(raw := save(*a))[:-1], raw[-1] ^ 1]),
    )


def test_a_latent_that_changed_before_it_was_written_is_reported(
    source, tmp_path, monkeypatch
):
    """Every hash of the file is right; only the checksum of the latents is not."""
    damage_before_writing(monkeypatch)
    latent_cache.write(tmp_path / "out", source, encode, **STATED)
    with pytest.raises(records.CorruptRecord, match="clip-3.*SHA-256 of its latents"):
        latent_cache.open(tmp_path / "out")[3]


@pytest.mark.parametrize(
    "give, message",
    [
        (lambda batch: encode(batch)[:, 0], "\\[n, t, h, w, c\\]"),
        (lambda batch: encode(batch)[1:], "latents are"),
        (lambda batch: encode(batch) * np.nan, "not finite"),
    ],
)
def test_wrong_latents_are_refused(source, tmp_path, give, message):
    with pytest.raises(ValueError, match=message):
        latent_cache.write(tmp_path / "out", source, give, **STATED)


def test_memory_is_used_up_to_its_limit(written):
    first = latent_cache.open(written)[0]
    size = first.latents.nbytes + len(first.header)
    cache = latent_cache.open(written, memory_bytes=int(5.5 * size))
    cache.read(range(20))
    assert len(cache._kept) == 5
    first = cache[0].latents
    assert cache[0].latents is first and cache[19].latents is not cache[19].latents


def test_a_batch_of_latents_with_text_costs_little(source, tmp_path):
    """The bar is 3 ms of one core for 64 rows of 6 KB with their captions; from the
    second epoch on, when they are in memory, a third of that is measured."""

    def large(batch):
        return np.repeat(encode(batch), 6, -1)[..., :48]  # 6 KB each

    latent_cache.write(tmp_path / "out", source, large, **STATED)
    cache = latent_cache.open(tmp_path / "out")
    assert cache[0].latents.nbytes == 6144
    tokens = tokenizer.train(cache.all_captions(), tmp_path / "t.model", 512)
    transform = transforms.LatentsAndText(
        transforms.Tokenize(
            captions.CaptionSampler({"short": 0.5, "dense": 0.5}), tokens, 32
        )
    )
    batches = loader.Batches(cache, transform, 0, 64, 0, 1000, 0, 1)
    batches[0]
    best = np.inf
    for step in range(40):
        began = time.process_time()
        batch, _ = batches[step]
        best = min(best, time.process_time() - began)
    assert batch["latents"].shape == (64, 2, 4, 4, 48)
    assert batch["text_ids"].shape == (64, 32)
    assert best < 3e-3


def test_several_processes_share_the_work(source, written, tmp_path):
    """Each makes some of the files; together they are what one makes."""
    out, wall, made = tmp_path / "shared", threading.Barrier(3), {}

    def one(process):
        def counting(batch):
            made[process] = made.get(process, 0) + len(batch)
            return encode(batch)

        return latent_cache.write(
            out, source, counting, batch_size=3, clips_per_file=4, **STATED,
            processes=caches.Processes(process, 3, lambda name: wall.wait(60)),
        )  # fmt: skip

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        manifests = [*pool.map(one, range(3))]
    assert manifests[0] == manifests[1] == manifests[2]
    assert len(made) == 3 and sum(made.values()) == len(source)
    alone = latent_cache.write(
        tmp_path / "alone", source, encode, batch_size=3, clips_per_file=4, **STATED
    )
    assert manifests[0]["digest"] == alone["digest"]


def test_a_forecast_comes_first_and_a_full_disk_before_any_work(
    source, tmp_path, monkeypatch, capsys
):
    how = STATED | {"batch_size": 2, "clips_per_file": 4}
    latent_cache.write(tmp_path / "out", source, encode, **how)
    assert f"{len(source)} clips to go here, about " in capsys.readouterr().err
    little = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(caches.shutil, "disk_usage", lambda path: little)
    with pytest.raises(OSError, match=r"room for 0\.0 GiB"):
        latent_cache.write(tmp_path / "full", source, encode, **how)
    monkeypatch.undo()
    found = latent_cache.write(tmp_path / "full", source, encode, **how)
    assert found["count"] == len(source)


def test_a_disk_that_fills_up_on_the_way_costs_one_file(
    source, written, tmp_path, monkeypatch
):
    """A clean error; no file that is not whole; the same command goes on."""
    out, how = tmp_path / "out", STATED | {"batch_size": 4, "clips_per_file": 4}
    store, count = array_files.store_part, []

    def full(*arguments, **options):
        count.append(1)
        if len(count) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return store(*arguments, **options)

    monkeypatch.setattr(array_files, "store_part", full)
    with pytest.raises(OSError, match="No space left"):
        latent_cache.write(out, source, encode, **how)
    monkeypatch.undo()
    encoded = []

    def counting(batch):
        encoded.extend(clip.id for clip in batch)
        return encode(batch)

    manifest = latent_cache.write(out, source, counting, **how)
    assert manifest["count"] == len(source)
    assert len(encoded) == len(source) - 8
    whole = latent_cache.write(tmp_path / "whole", source, encode, **how)
    assert manifest["digest"] == whole["digest"]
