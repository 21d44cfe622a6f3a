"""The reconstruction report: a perfect VAE, a useless one, and clips that cannot count."""

import json

import numpy as np
import pytest

from sora_jax.data import records, shards
from sora_jax.evals import protocol, vae_report
from sora_jax.evals.features import networks
from sora_jax.evals.metrics import reconstruction
from sora_jax.evals.prompts import scoring
from sora_jax.training import perceptual, trained_vae
from tests.data import clips as other_clips
from tests.evals import tiny_run
from tests.training import tiny_folder, tiny_lpips

NUMBER = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("vae_report")
    tiny_run.make_shards(base / "shards", NUMBER)
    shards.write(base / "small", other_clips.Clips(num=2))
    tiny_folder.write(base / "wan")
    tiny_lpips.write(base / "lpips.safetensors")
    return base


@pytest.fixture(scope="module")
def clips(folder):
    return shards.open(folder / "shards")


@pytest.fixture(scope="module")
def network():
    return networks.ToyFeatures(batch_size=16)


@pytest.fixture(scope="module")
def lpips(folder):
    return reconstruction.Lpips(perceptual.open_weights(folder / "lpips.safetensors"))


def coming_back(change):
    """In place of a VAE's round trip: what `change` makes of frames in [0, 1]."""

    def round_trip(config, batch_size):
        def all_batches(params, video_nthwc):
            frames = np.float32(change(video_nthwc.astype(np.float32) / 255))
            return frames, np.random.default_rng(0).normal(
                size=(len(frames), 3, 4, 4, 4)
            )

        return all_batches

    return round_trip


@pytest.fixture
def vae(folder):
    return trained_vae.load(folder / "wan")


def test_a_perfect_vae_has_the_ceiling(vae, clips, network, lpips, monkeypatch):
    monkeypatch.setattr(reconstruction, "round_trip", coming_back(lambda x: x))
    found = vae_report.measure(vae, clips, range(NUMBER), network, lpips)
    truth, back = found.rows()
    look = {name: estimate.value for name, estimate in back.look.items()}
    assert look[vae_report.PSNR] == 100
    assert look[vae_report.SSIM] == pytest.approx(1, abs=1e-6)
    assert look[vae_report.FLICKER] == 0
    assert look[vae_report.LPIPS] == pytest.approx(0, abs=1e-9)
    assert look[vae_report.RFVD] == pytest.approx(0, abs=1e-6)
    assert truth.shares == back.shares and truth.shares
    assert all(of["pass"].value == 1 for of in back.shares.values())
    assert not found.failures and not found.notes


def test_noise_and_blur_are_noticed_by_every_measure(
    vae, clips, network, lpips, monkeypatch
):
    def spoil(x):
        return np.clip(x + np.random.default_rng(1).normal(0, 0.2, x.shape), 0, 1)

    monkeypatch.setattr(reconstruction, "round_trip", coming_back(spoil))
    found = vae_report.measure(vae, clips, range(NUMBER), network, lpips)
    _, back = found.rows()
    look = back.look
    assert look[vae_report.PSNR].value < 20 and look[vae_report.SSIM].value < 0.9
    assert min(look[n].value for n in (vae_report.FLICKER, vae_report.LPIPS)) > 0.01
    assert look[vae_report.RFVD].value > 0.1
    for name, estimate in look.items():
        assert estimate.low <= estimate.value <= estimate.high, name
    assert any(of["pass"].value < 1 for of in back.shares.values())


def test_what_is_damaged_is_counted_and_not_averaged(vae, folder, network, monkeypatch):
    clips = shards.open(folder / "shards")
    read = clips.read

    def damaged(indices):
        return [
            records.CorruptRecord("shard", record.id, "a flipped byte")
            if index == 3
            else record
            for index, record in zip(indices, read(indices), strict=True)
        ]

    def broken(x):
        x[5] = np.nan  # the sixth that is left
        return x

    monkeypatch.setattr(clips, "read", damaged)
    monkeypatch.setattr(reconstruction, "round_trip", coming_back(broken))
    found = vae_report.measure(vae, clips, range(NUMBER), network)
    assert found.asked == NUMBER and found.protocol["num_clips"] == NUMBER - 2
    assert len(found.failures) == 2
    assert "flipped byte" in found.failures[0]
    assert "is not finite" in found.failures[1]
    gone = {clips.entry(index)["id"] for index in (3, 6)}
    for of in found.values.values():
        assert len(of) == NUMBER - 2 and not gone & of.keys()
        assert np.isfinite([*of.values()]).all()
    out = folder / "damaged"
    printed = vae_report.write(out, found, "title", {})
    assert "10 of 12 clips" in printed and "flipped byte" in printed
    scores = json.loads((out / "scores.json").read_text())
    assert scores["clips"] == {"asked": 12, "measured": 10, "failed": 2}
    monkeypatch.setattr(reconstruction, "round_trip", coming_back(lambda x: x * np.nan))
    with pytest.raises(ValueError, match="none of 12 clips can be measured"):
        vae_report.measure(vae, clips, range(NUMBER), network)


def test_clips_that_do_not_fit_are_named(vae, folder, network, lpips, monkeypatch):
    """Of 5 frames of 16 pixels, too few and too small for two of the measures."""
    small = shards.open(folder / "small")
    monkeypatch.setattr(vae_report, "_judge", lambda *_: {})  # of no toy world
    found = vae_report.measure(vae, small, range(2), network, lpips)
    assert {vae_report.LPIPS, vae_report.RFVD}.isdisjoint(found.rows()[1].look)
    assert any("31 pixels a side" in note for note in found.notes)
    assert any("needs 9 frames" in note for note in found.notes)
    entry = small.entry
    monkeypatch.setattr(small, "entry", lambda index: entry(index) | {"height": 12})
    with pytest.raises(ValueError, match="multiples of 8"):
        vae_report.measure(vae, small, range(2), network)


def test_a_diffusers_folder_is_reported(vae, folder, clips, network, lpips):
    found = vae_report.measure(vae, clips, range(NUMBER), network, lpips)
    out = folder / "report"
    printed = vae_report.write(out, found, "wan: reconstruction", {"Parameters": "few"})
    scores = json.loads((out / "scores.json").read_text())
    assert scores["digest"] == protocol.digest(scores["protocol"])
    assert lpips.weights.sha256 in scores["protocol"]["lpips"]
    assert scores["protocol"]["sizes"] == [[9, 32, 32]]
    back = scores["rows"][scoring.RECONSTRUCTION]
    assert set(back["look"]) == {"PSNR", "SSIM", "flicker", "LPIPS", "rFVD-toy"}
    assert back["look"]["LPIPS"]["low"] < back["look"]["LPIPS"]["high"]
    assert scores["scores"]["ground truth/motion/pass"] == 1
    assert scores["scores"]["VAE reconstruction/motion/pass"] < 1  # random weights
    assert scores["scores"]["latents/std_most"] > 0
    lines = [json.loads(x) for x in (out / "clips.jsonl").read_text().splitlines()]
    assert len(lines) == NUMBER
    mean = np.mean([line["PSNR"] for line in lines])
    assert scores["scores"]["VAE reconstruction/PSNR"] == pytest.approx(mean)
    page = (out / "report.html").read_text()
    assert page.count("<video") == 2 * (6 + 3) and scores["digest"] in page
    assert "Motion:" in printed and "12 of 12 clips" in printed
    other = vae_report.measure(vae, clips, range(NUMBER - 1), network)
    assert protocol.digest(other.protocol) != scores["digest"]
