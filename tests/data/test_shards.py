"""What is written is read back by us and by TFDS, and damage does not pass."""

import dataclasses
import json
import pathlib
import pickle
import random
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tensorflow_datasets as tfds

from sora_jax.data import loader, records, shards, video_io
from tests.data import clips

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "shards"
    shards.write(folder, clips.Clips(skipped=(5,)))
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return pathlib.Path(shutil.copytree(written, tmp_path / "shards"))


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_records_come_back_as_they_were(written):
    opened = shards.open(written)
    assert len(opened) == 11
    expected = [clips.clip(index) for index in range(12) if index != 5]
    assert list(opened) == expected
    assert opened.read([10, 0, 3]) == [expected[10], expected[0], expected[3]]
    assert opened.captions(5) == expected[5].captions
    assert sorted(opened.all_captions())[0] == "clip number 0"
    assert opened[2].frames()[0, 0, 0].tolist() == [2, 2, 2]
    with pytest.raises(IndexError):
        opened[11]
    assert pickle.loads(pickle.dumps(opened))[4] == expected[4]
    opened.close()
    assert opened[1] == expected[1]


def test_the_manifest_and_the_report_tell_what_is_there(written):
    manifest = shards.open(written).manifest
    assert manifest["num_clips"] == 11
    assert manifest["captions"] == {"short": 11, "dense": 11}
    assert (manifest["num_frames"], manifest["height"], manifest["fps"]) == (5, 16, 8)
    assert [file["count"] for file in manifest["files"]] == [4, 3, 4]
    report = json.loads((written / "report.json").read_text())
    assert report["skipped"] == [
        {"file": "notes.doc", "reason": "no video"},
        {"file": "item-5", "reason": "of no use"},
    ]
    assert not (written / ".partial").exists()


_TFDS = """
    import sys
    import tensorflow_datasets as tfds
    from sora_jax.data import loader, shards, video_io
    from tests.data import clips

    out = sys.argv[1] + "/shards"
    shards.write(out, clips.Clips())
    source = tfds.builder_from_directory(out).as_data_source()
    assert list(source) == ["train"] and len(source["train"]) == 12
    example = source["train"][7]
    clip = shards.open(out)[7]
    assert example["id"] == clip.id.encode() and example["video"] == clip.video
    assert example["captions"]["dense"].decode() == clip.captions["dense"]
    assert example["caption_sources"]["short"] == b"human"
    assert example["captions"]["alt"] == b""
    assert example["shots"].tolist() == [[0, 2], [2, 5]]
    assert (example["fps"], example["num_frames"], example["height"]) == (8.0, 5, 16)
    assert example["sha256"].decode() == clip.sha256
    assert video_io.decode(example["video"]).frames.shape == (5, 16, 16, 3)
    reader = source["train"].data_source._readers[0]
    reader = reader or source["train"].data_source._readers[1]
    assert "group_size:1," in reader.writer_options_string()
    transform = lambda clip, rng: {"video": clip.frames()}
    with loader.make_loader(
        shards.open(out), transform, seed=0, batch_size=4, num_steps=2
    ) as rows:
        assert [batch["video"].shape for batch in rows] == [(4, 5, 16, 16, 3)] * 2
    assert "tensorflow" not in sys.modules
"""


def of_models(index):
    """A clip, every second one with captions of a model."""
    clip = clips.clip(index)
    if index % 2:
        return clip
    return dataclasses.replace(
        clip,
        captions=clip.captions | {"model_dense": f"model {index}"},
        caption_sources=clip.caption_sources | {"model_dense": "model:m prompt:1"},
    )


def test_tiers_of_models_take_no_place_where_there_are_none(tmp_path, monkeypatch):
    """Old clips keep their bytes; TFDS reads a folder of both kinds."""
    monkeypatch.setattr(records, "TIERS", records.TIERS[:5])
    monkeypatch.setattr(records, "MODEL_TIERS", ())
    before = shards._to_example(clips.clip(3))
    monkeypatch.undo()
    assert shards._to_example(clips.clip(3)) == before
    assert shards._from_example(before) == clips.clip(3)

    class Both(clips.Clips):
        def clips(self, part, note, avoid):
            return map(of_models, range(*part))

    opened = (shards.write(tmp_path / "both", Both()), shards.open(tmp_path / "both"))[
        1
    ]
    assert list(opened) == [of_models(index) for index in range(12)]
    assert opened.manifest["captions"] == {"short": 12, "dense": 12, "model_dense": 6}
    read = tfds.builder_from_directory(tmp_path / "both").as_data_source()["train"]
    found = [example["captions"].get("model_dense") for example in read]
    assert found[::2] == [f"model {index}".encode() for index in range(0, 12, 2)]
    assert not any(found[1::2])
    shards.write(tmp_path / "old", clips.Clips())
    features = (tmp_path / "old" / "features.json").read_text()
    assert '"structured"' in features and "model_" not in features


def test_tfds_reads_the_folder_and_tensorflow_is_not_needed(tmp_path):
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_TFDS), str(tmp_path)],
        cwd=ROOT,
        check=True,
        timeout=120,
    )


def test_a_finished_folder_is_left_alone(folder):
    before = contents(folder)
    stamp = (folder / "manifest.json").stat().st_mtime_ns
    shards.write(folder, clips.Clips(skipped=(5,), fails_at=0))
    assert contents(folder) == before
    assert (folder / "manifest.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("where", ["finished", "interrupted"])
def test_other_settings_are_refused_with_the_difference(folder, tmp_path, where):
    if where == "interrupted":
        folder = tmp_path / "new"
        with pytest.raises(KeyError):
            shards.write(folder, clips.Clips(fails_at=6))
    before = contents(folder)
    with pytest.raises(shards.ShardsError) as caught:
        shards.write(folder, clips.Clips(num=8, per_part=2))
    assert "num: was 12, is 8" in str(caught.value)
    assert "more.per_part: was 4, is 2" in str(caught.value)
    assert contents(folder) == before


def test_a_foreign_folder_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(shards.ShardsError, match="not empty"):
        shards.write(tmp_path, clips.Clips())
    assert list(contents(tmp_path)) == ["thesis.txt"]


def test_an_interrupted_job_goes_on_and_gives_the_same_bytes(written, tmp_path):
    out = tmp_path / "out"
    for fails_at in (6, 9):
        with pytest.raises(KeyError):
            shards.write(out, clips.Clips(skipped=(5,), fails_at=fails_at))
        with pytest.raises(shards.ShardsError, match="interrupted; run it again"):
            shards.open(out)
    first = out / ".partial" / "00000" / "part.array_record"
    stamp = first.stat().st_mtime_ns
    (out / ".partial" / "00002").mkdir(exist_ok=True)
    half = out / ".partial" / "00002" / ".part.array_record.1234"
    half.write_bytes(b"half a file")
    shards.write(out, clips.Clips(skipped=(5,)))
    assert contents(out) == contents(written)
    kept = out / "clips-train.array_record-00000"
    assert kept.stat().st_mtime_ns == stamp  # not written again


def test_an_interruption_while_files_get_their_names_does_no_harm(
    written, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    monkeypatch.setattr(shards, "_write_tfds_metadata", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shards.write(out, clips.Clips(skipped=(5,)))
    monkeypatch.undo()
    shards.write(out, clips.Clips(skipped=(5,), fails_at=0))
    assert contents(out) == contents(written)


@pytest.mark.parametrize("skipped", [(5,), tuple(range(12))])
def test_a_job_that_is_killed_as_it_cleans_up_leaves_a_sound_folder(
    tmp_path, monkeypatch, skipped
):
    """Some of the files are removed when it dies, the digests among them."""
    out = tmp_path / "out"

    def half(folder, **options):
        if pathlib.Path(folder).exists():
            (pathlib.Path(folder) / "digests.sha256").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", half)
        with pytest.raises(KeyboardInterrupt):
            shards.write(out, clips.Clips(skipped=skipped))
    shards.write(out, clips.Clips(skipped=(5,)))
    left = {path.name for path in out.iterdir() if path.name.startswith(".")}
    assert len(shards.open(out)) == 11 and left == set()


def test_nothing_usable_is_an_error_and_can_be_repaired(tmp_path):
    with pytest.raises(shards.ShardsError, match="nothing usable .*item-0: of no use"):
        shards.write(tmp_path / "out", clips.Clips(num=2, skipped=(0, 1)))
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"report.json", "digests.sha256"}
    assert shards.write(tmp_path / "out", clips.Clips(num=2))["num_clips"] == 2


def test_an_id_that_occurs_twice_is_refused(tmp_path):
    class Twice(clips.Clips):
        def clips(self, part, note, avoid):
            yield clips.clip(1)

    with pytest.raises(shards.ShardsError, match="occurs twice"):
        shards.write(tmp_path / "out", Twice())


def flip(path, at, bit=0):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def test_a_flipped_byte_is_named_and_the_run_goes_on(folder):
    """The bar: detected on read, named by file and record, replaced by rule."""
    file = folder / "clips-train.array_record-00001"
    for at in range(100, 10_000, 97):  # until the byte is one of the third clip's
        flip(file, at)
        if [isinstance(r, ValueError) for r in shards.open(folder).read(range(11))] == [
            index == 5 for index in range(11)
        ]:
            break
        flip(file, at)
    opened = shards.open(folder)
    with pytest.raises(records.CorruptRecord) as caught:
        opened[5]
    assert (caught.value.where, caught.value.id) == (str(file), "clip-6")
    assert str(file) in str(caught.value) and "'clip-6'" in str(caught.value)
    assert opened.read([4, 6]) == [clips.clip(4), clips.clip(7)]

    def ids(max_corrupt_share):
        with loader.make_loader(
            opened,
            lambda clip, rng: {"first": clip.frames()[0, 0, 0, 0]},
            seed=1,
            batch_size=11,
            num_steps=3,
            max_corrupt_share=max_corrupt_share,
        ) as rows:
            found = [batch["first"].tolist() for batch in rows]
            return found, dict(rows.quarantine)

    found, quarantine = ids(0.1)
    assert list(quarantine) == ["clip-6"]
    assert found == ids(0.1)[0] and all(6 not in row for row in found)
    assert all(len(set(row)) == 10 for row in found)
    with pytest.raises(loader.TooManyCorruptRecords, match="clip-6"):
        ids(0.05)


def test_no_flipped_byte_passes(folder):
    """Wherever it is, a record is right or reported, and the others are still read."""
    file = folder / "clips-train.array_record-00000"
    whole = file.read_bytes()
    expected = [clips.clip(index) for index in range(4)]
    rng = random.Random(0)
    places = [at for at, byte in enumerate(whole) if byte]  # the rest is padding
    hurt = 0
    for _ in range(60):
        flip(file, rng.choice(places), rng.randrange(8))
        found = shards.open(folder).read(range(4))
        for record, right in zip(found, expected, strict=True):
            assert record == right or isinstance(record, records.CorruptRecord)
            hurt += record != right
        file.write_bytes(whole)
    assert hurt > 20


@pytest.mark.parametrize("length", [0, 10, 3000, -1])
def test_a_truncated_file_is_reported_record_by_record(folder, length):
    file = folder / "clips-train.array_record-00000"
    file.write_bytes(file.read_bytes()[:length])
    found = shards.open(folder).read(range(5))
    for record in found[:4]:
        assert isinstance(record, records.CorruptRecord)
        assert "the file has 0 records, not 4" in record.reason
    assert found[4] == clips.clip(4)


def test_a_record_that_is_whole_but_another_one_is_reported(folder):
    """Two files that have changed places: every hash of ArrayRecord is right."""
    first, third = (folder / f"clips-train.array_record-{k:05d}" for k in (0, 2))
    content = first.read_bytes()
    first.write_bytes(third.read_bytes())
    third.write_bytes(content)
    for record in shards.open(folder).read([0, 9]):
        assert isinstance(record, records.CorruptRecord)
        assert "not the one in the index" in record.reason


def test_a_video_that_changed_before_it_was_written_is_reported(tmp_path, monkeypatch):
    """Every hash of the file is right; only the clip's own checksum is not."""
    to_example = shards._to_example

    def changed(clip):
        video = bytearray(clip.video)
        video[-3] ^= clip.id == "clip-2"
        return to_example(dataclasses.replace(clip, video=bytes(video)))

    monkeypatch.setattr(shards, "_to_example", changed)
    shards.write(tmp_path / "out", clips.Clips(num=4))
    found = shards.open(tmp_path / "out").read(range(4))
    assert [isinstance(record, records.CorruptRecord) for record in found] == [
        index == 2 for index in range(4)
    ]
    assert "SHA-256" in found[2].reason


def test_the_checksum_is_of_the_video():
    clip = clips.clip(3)
    changed = bytearray(clip.video)
    changed[-3] ^= 1
    with pytest.raises(records.CorruptRecord, match="SHA-256"):
        records.verify(records.ClipRecord(**{**vars(clip), "video": bytes(changed)}))
    assert records.verify(clip) is clip


def test_missing_and_damaged_parts_of_the_folder_are_named(folder):
    flip(folder / "index" / "00001.jsonl", 40)
    with pytest.raises(
        shards.ShardsError, match="00001.jsonl has changed since it was written"
    ):
        shards.open(folder).captions(5)
    (folder / "clips-train.array_record-00002").unlink()
    with pytest.raises(shards.ShardsError, match="array_record-00002 is missing"):
        shards.open(folder)
    with pytest.raises(shards.ShardsError, match="no finished shards"):
        shards.open(folder / "index")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_frames": 6}, "1 \\+ 4n"),
        ({"captions": {"tiny": "x"}}, "tiny"),
        ({"caption_sources": {"tiny": "x"}}, "tiny"),
    ],
)
def test_an_invalid_record_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        records.ClipRecord(**{**vars(clips.clip(0)), **changes})


def test_frames_of_another_size_than_the_record_says_are_refused():
    clip = clips.clip(0)
    wrong = records.ClipRecord(**{**vars(clip), "height": 32})
    with pytest.raises(records.CorruptRecord, match="clip-0"):
        wrong.frames()
    junk = records.ClipRecord(**{**vars(clip), "video": b"junk", "sha256": ""})
    with pytest.raises(records.CorruptRecord, match="not an MP4"):
        junk.frames()
    assert np.array_equal(clip.frames(), video_io.decode(clip.video).frames)
