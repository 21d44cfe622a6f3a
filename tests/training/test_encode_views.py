"""Frames and regions that are encoded beside a clip, and a run that is given them."""

import types

import numpy as np
import pytest

from configs import toy_mixture
from sora_jax.data import array_files, latent_cache, regions, shards, toy_clips
from sora_jax.training import encode_latents, jobs, metrics, trained_vae
from tests.training import test_train_job, tiny_job

PICTURES = 9


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """Clips, the video VAE's run, and their latents with views."""
    folder = tmp_path_factory.mktemp("views")
    vae = folder / "vae"
    tiny_job.write_vae(vae)
    shards.write(folder / "shards", toy_clips.ToyClips("tw32", 12, seed=3))
    manifest = encode_latents.encode(
        folder / "shards", vae, folder / "latents", pictures=PICTURES, with_regions=True
    )
    return folder, vae, manifest


def test_views_are_what_the_video_vae_gives_of_them_alone(encoded):
    folder, vae, _ = encoded
    loaded = trained_vae.load(trained_vae.component(vae))
    encode = trained_vae.video_encoder(loaded)
    assert not loaded.config.latent_mean  # latents are not scaled
    clips = {clip.id: clip for clip in shards.open(folder / "shards").read(range(12))}
    latents = latent_cache.open(folder / "latents")
    for record in latents.read(range(12)):
        frames = clips[record.id].frames()
        views = record.views
        assert views.frames == (*range(9),)
        for frame, picture in zip(views.frames, views.pictures, strict=True):
            alone = encode(frames[None, frame : frame + 1])[0, 0]
            np.testing.assert_allclose(picture, alone, atol=1e-4)
        np.testing.assert_allclose(views.pictures[0], record.latents[0], atol=1e-4)
        kept = regions.of_clip(record.id, frames.shape[:3])
        grey = frames.copy()
        grey[~kept] = regions.GREY
        np.testing.assert_allclose(views.kept, encode(grey[None])[0], atol=1e-4)
        strides = loaded.config.spatial_stride, loaded.config.temporal_stride
        np.testing.assert_array_equal(views.region, regions.of_latents(kept, *strides))
        assert np.abs(views.kept - record.latents).max() > 0.1
    assert all(
        latents.entry(index)["pictures"] == [*range(9)]
        and latents.entry(index)["region"] is True
        for index in range(12)
    )


def test_the_last_frames_are_always_among_the_pictures():
    assert encode_latents.picture_frames(9, 4) == (0, 2, 5, 6, 7, 8)
    assert encode_latents.picture_frames(17, 1) == (0, 14, 15, 16)
    assert encode_latents.picture_frames(1, 3) == (0,)
    assert encode_latents.picture_frames(9, 9) == (*range(9),)


def test_other_views_are_not_mixed_into_finished_latents(encoded):
    folder, vae, manifest = encoded
    assert manifest["settings"]["preprocessing"]["pictures"] == PICTURES
    with pytest.raises(array_files.ShardsError, match="pictures"):
        encode_latents.encode(folder / "shards", vae, folder / "latents", pictures=2)
    again = encode_latents.encode(
        folder / "shards", vae, folder / "latents", pictures=PICTURES, with_regions=True
    )
    assert again == manifest


def test_a_damaged_view_is_found(encoded):
    folder, _, _ = encoded
    latents = latent_cache.open(folder / "latents")
    (raw,) = latents._file_records.read([0])
    assert latents.parse(raw, latents.entry(0)).id == latents.entry(0)["id"]
    damaged = raw[:-1] + bytes([raw[-1] ^ 1])  # the last byte is of a view
    with pytest.raises(ValueError, match="SHA-256"):
        latents.parse(damaged, latents.entry(0))


def test_a_run_is_given_all_of_them(encoded):
    """The whole mixture, from the command line; losses are logged by pattern."""
    folder, _, _ = encoded
    shares = {"none": 0.1, "first_frame": 0.1, "head": 0.1, "tail": 0.1, "both": 0.1}
    shares |= {"keyframes": 0.1, "every": 0.1, "region": 0.15, "levels": 0.15}
    command = test_train_job.command(
        folder, folder / "run", loop__num_steps=12, loop__checkpoint_every=12,
        packing__shapes=1, packing__clips=3, packing__window=12, packing__max_padding=0.9,
        state_loss__weight=0.0, data__gap_clips=0, known__mid_clip=0.2,
        known__dropout=0.1, known__levels=((0.1, 0.5), (0.5, 0.2)),
        **{f"known__probabilities__{name}": share for name, share in shares.items()},
    )  # fmt: skip
    code, output = test_train_job.run_job(command)
    assert code == 0, output
    rows = metrics.read(folder / "run" / "metrics.jsonl")
    seen = {name for row in rows for name in row if name.startswith("loss_pattern/")}
    assert seen == {f"loss_pattern/{name}" for name in shares}
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"known__probabilities__every": 1.0}, "needs packed rows"),
        ({"known__mid_clip": 0.1}, "needs packed rows"),
    ],
)
def test_a_mixture_that_rows_cannot_hold_is_refused(encoded, changes, message):
    folder, _, _ = encoded
    shares = {"known__probabilities__none": 0.0} if "mid" not in str(changes) else {}
    given = {
        "known__probabilities__first_frame": 0.0,
        "known__probabilities__none": 1.0,
    }
    command = test_train_job.command(folder, folder / "no", **given | shares | changes)
    code, output = test_train_job.run_job(command)
    assert code and message in output and not (folder / "no" / "checkpoints").exists()


def test_edits_whose_source_is_not_there_are_counted(capsys):
    """One is of another length, and one names a clip that is gone."""
    short, long = [3, 2, 2, 24], [5, 2, 2, 24]
    entries = [
        {"id": "a", "shape": short, "fps": 8.0},
        {"id": "b", "shape": short, "fps": 8.0, "edit_of": "a"},
        {"id": "c", "shape": long, "fps": 8.0, "edit_of": "a"},
        {"id": "d", "shape": short, "fps": 8.0, "edit_of": "gone"},
    ]

    class Part:
        entry = staticmethod(entries.__getitem__)

        def __len__(self):
            return len(entries)

    c = toy_mixture.get_config()
    c.known.probabilities = {"none": 0.5, "edit": 0.5}
    c.known.images = c.known.mid_clip = 0.0
    jobs._Rows(c, types.SimpleNamespace(parts=[Part()]))
    said = capsys.readouterr().err
    assert said.startswith("known: 2 of 3 edits are trained without what they are")
