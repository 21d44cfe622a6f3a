"""Clips that are related to others: written, read back, encoded and drawn."""

import json

import numpy as np
import pytest

from sora_jax.data import (
    latent_cache,
    records,
    shards,
    toy_clips,
    video_clips,
    video_io,
)


@pytest.fixture(scope="module", params=["groups", "loops", "rates"])
def made(request, tmp_path_factory):
    source = toy_clips.ToyClips("tw32", 6, kind=request.param)
    out = tmp_path_factory.mktemp(request.param)
    shards.write(out, source)
    return request.param, shards.open(out)


def test_relations_come_back_and_stand_in_the_index(made):
    kind, clips = made
    for index in range(6):
        clip, entry = clips[index], clips.entry(index)
        found = records.relations(clip)
        assert {n: entry[n] for n in records.RELATIONS & entry.keys()} == found
        assert {"groups": {"edit_of", "subject"}, "loops": {"period"}, "rates": set()}[
            kind
        ] >= found.keys()
        if kind == "loops":
            frames = clip.frames()
            assert (clip.num_frames - 1) == 2 * clip.period
            np.testing.assert_array_equal(frames[0], frames[clip.period])
    if kind == "groups":
        first, edit, *siblings = (clips[index] for index in range(4))
        assert first.edit_of == edit.id and edit.edit_of == first.id
        for sibling in siblings:
            assert first.subject == sibling.subject and not sibling.edit_of
            assert first.video != sibling.video
        assert not edit.subject  # where its thing is, that of the first is too
        thing = json.loads(first.state_json)["objects"][0]
        for clip in clips[0], *siblings:
            named, unnamed = records.variants(clip.captions["medium"])
            assert thing["shape"] not in unnamed and thing["colour"] not in unnamed
        same = (first.frames() == edit.frames()).all(-1).mean()
        assert 0.1 < same < 1 or first.frames().std(0).max() == 0
    if kind == "rates":
        sizes = {(clips[i].num_frames, clips[i].fps) for i in range(5)}
        assert sizes == {(5, 4), (17, 16), (9, 4), (17, 8), (33, 16)}


def test_latents_keep_relations(made, tmp_path):
    _, clips = made
    encode = lambda batch: np.zeros(  # noqa: E731
        (len(batch), 1 + (batch[0].num_frames - 1) // 4, 8, 8, 2), "f4"
    )
    latent_cache.write(
        tmp_path, clips, encode, vae_digest="v", preprocessing={}, batch_size=1
    )
    cache = latent_cache.open(tmp_path)
    by_id = {clips.entry(i)["id"]: clips.entry(i) for i in range(6)}
    for index in range(6):
        entry = cache.entry(index)
        for name in records.RELATIONS:
            assert entry.get(name) == by_id[entry["id"]].get(name)


def test_a_period_is_shorter_than_half_of_the_clip():
    fields = {
        "id": "a",
        "video": b"",
        "fps": 8.0,
        "height": 8,
        "width": 8,
        "captions": {},
    }
    records.ClipRecord(num_frames=17, period=8, **fields)
    for frames, period in ((13, 8), (17, 6), (17, -4)):
        with pytest.raises(ValueError, match="period"):
            records.ClipRecord(num_frames=frames, period=period, **fields)


def test_a_kind_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="kind is"):
        toy_clips.ToyClips("tw32", 3, kind="pairs")
    with pytest.raises(ValueError, match="train, val or test, not test_comp"):
        toy_clips.ToyClips("tw32", 3, "test_comp", kind="rates")
    with pytest.raises(ValueError, match="--families"):
        toy_clips.ToyClips("tw32", 3, families={"motion": 1.0}, kind="loops")


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_a_users_edits_and_subjects_are_read(form, tmp_path):
    """Two windows of each video, matched by their numbers."""
    random = np.random.default_rng(0)
    fields = {
        "a.mp4": {"caption": "a cat", "subject": "cat 7"},
        "b.mp4": {"caption": "a white cat", "subject": "cat 7", "edit_of": "a.mp4"},
    }
    for name in fields:
        frames = random.integers(0, 256, (10, 32, 32, 3), np.uint8)
        (tmp_path / name).write_bytes(video_io.encode_lossless(frames, 8.0))
        if form == "json":
            side = (tmp_path / name).with_suffix(".json")
            side.write_text(json.dumps(fields[name]))
    if form == "jsonl":
        lines = [json.dumps({"file": n} | more) for n, more in fields.items()]
        (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    source = video_clips.FolderClips(
        tmp_path, num_frames=(5,), size=(32, 32), fps=8.0, split_shots=False
    )
    shards.write(tmp_path / "shards", source)
    clips = shards.open(tmp_path / "shards")
    found = {
        clips.entry(i)["id"]: records.relations(clips[i]) for i in range(len(clips))
    }
    assert found == {
        "a.mp4#00000": {"subject": "cat 7"},
        "a.mp4#00001": {"subject": "cat 7"},
        "b.mp4#00000": {"subject": "cat 7", "edit_of": "a.mp4#00000"},
        "b.mp4#00001": {"subject": "cat 7", "edit_of": "a.mp4#00001"},
    }


def test_rates_of_another_split_are_other_scenes():
    def videos(split, seed=0):
        source = toy_clips.ToyClips("tw32", 5, split, seed=seed, kind="rates")
        return [clip.video for clip in source.clips([0, 5], lambda **_: None, {})]

    train, val, other = videos("train"), videos("val"), videos("train", 1)
    assert not set(train) & {*val, *other} and videos("train") == train
