import json
import math

import numpy as np
import pytest

from experiments import noise_band
from sora_jax.data import latent_cache, records
from sora_jax.toyworld import captions, scene


def two_points(energy=64.0, n=4000, d=16):
    """Two possible clips at distance 2 sqrt(energy): the matched filter is optimal."""
    class_n = np.arange(n) % 2
    x_nd = np.zeros((n, d), np.float32)
    x_nd[:, 3] = np.where(class_n == 0, -1, 1) * math.sqrt(energy)
    return noise_band.Task(x_nd, class_n, np.ones((n, 2), bool), ("a", "b"))


def matched_filter(tau, energy=64.0):
    """Phi((1 - tau) sqrt(energy) / tau)."""
    return 0.5 * (1 + math.erf((1 - tau) * math.sqrt(energy / 2) / tau))


def test_both_readers_reach_the_matched_filter():
    task, taus = two_points(), (0.5, 0.8, 0.85, 0.9, 0.95, 0.99)
    result = noise_band.read_out(task, taus)
    want = [matched_filter(tau) for tau in taus]
    np.testing.assert_allclose(result["linear"], want, atol=0.035)
    np.testing.assert_allclose(result["templates"], want, atol=0.035)
    assert result["chance"] == 0.5 and result["test"] == 1000


def test_the_band_is_where_the_matched_filter_falls():
    result = noise_band.read_out(two_points(), noise_band.TAUS)
    low, high = result["band"]
    assert abs(matched_filter(low) - 0.9) < 0.03
    assert abs(matched_filter(high) - 0.55) < 0.03


def test_templates_separate_what_is_not_linear():
    # the class is whether two numbers have the same sign
    rng = np.random.default_rng(0)
    signs = rng.choice([-1, 1], (2000, 2)).astype(np.float32)
    class_n = (signs.prod(1) > 0).astype(int)
    x_nd = np.pad(8 * signs, ((0, 0), (0, 6)))
    task = noise_band.Task(x_nd, class_n, np.ones((2000, 2), bool), ("a", "b"))
    result = noise_band.read_out(task, (0.5,))
    assert result["linear"][0] < 0.65 and result["templates"][0] > 0.99


def test_shuffled_labels_are_read_at_chance():
    task = two_points()
    class_n = np.random.default_rng(0).permutation(task.class_n)
    task = noise_band.Task(task.x_nd, class_n, task.possible_nk, task.names)
    result = noise_band.read_out(task, (0.3, 0.9))
    assert max(result["linear"] + result["templates"]) < 0.57
    assert result["band"] is None
    assert "no band: accuracy 0.5" in noise_band.describe("side", result)


def test_only_open_classes_count():
    scores = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    possible = np.array([[False, True, True], [True, True, True]])
    task = noise_band.Task(
        np.zeros((2, 1)), np.array([1, 1]), possible, ("a", "b", "c")
    )
    assert noise_band.accuracy(scores, task) == 0.5


def test_projection_keeps_distances():
    rng = np.random.default_rng(0)
    x_nd = rng.normal(size=(40, 3000)).astype(np.float32)
    small = noise_band.project(x_nd)
    assert small.shape == (40, 39)
    want = np.linalg.norm(x_nd[0] - x_nd[1])
    np.testing.assert_allclose(np.linalg.norm(small[0] - small[1]), want, rtol=1e-4)


@pytest.mark.parametrize(
    "accuracies, band",
    [
        ((1.0, 0.9, 0.5, 0.5), (0.5, 0.675)),
        ((0.8, 0.7, 0.5, 0.5), None),
        ((1.0, 1.0, 1.0, 0.9), None),
        ((1.0, 0.95, 0.5, 0.55), (0.525, 0.7)),
    ],
)
def test_band_edges(accuracies, band):
    found = noise_band.band((0.3, 0.5, 0.7, 0.9), accuracies, 0.5)
    assert found == (None if band is None else pytest.approx(band, abs=1e-6))


def test_labels_are_what_captions_state():
    read = noise_band.labels_of(None, {"short": "a red circle moves left"})
    assert read["direction"] == ("left", ()) and read["colour"] == ("red", ())
    text = "a red circle to the right of a blue square"
    assert noise_band.labels_of(None, {"short": text}) == {
        "left": ("blue", ("red", "blue"))
    }
    slots = scene.Slots(
        (scene.Subject(colour="red"), scene.Subject(colour="blue")), relation="above"
    )
    assert noise_band.stated(slots) == {"top": ("red", ("red", "blue"))}
    assert captions.parse(text).relation == "right"
    assert noise_band.labels_of(None, {"alt": "a red circle moves left"}) == {}


def test_tasks_leave_out_what_is_too_rare():
    labels = [{"colour": ("red", ())}] * 30 + [{"colour": ("blue", ())}] * 30
    labels += [{"colour": ("green", ())}] * 3 + [{}] * 5
    found = noise_band.tasks(np.zeros((68, 4)), labels)
    assert found["colour"].names == ("blue", "red")
    assert len(found["colour"].class_n) == 60 and set(found) == {"colour"}


class Clips:
    """Two hundred clips that say "left" or "right"."""

    manifest = {"digest": "x", "num_frames": 5, "height": 8, "width": 8}

    def __len__(self):
        return 200

    def entry(self, index):
        return {"id": str(index)}

    def read(self, indices):
        return [
            records.ClipRecord(
                id=str(i),
                video=b"",
                fps=8.0,
                num_frames=5,
                height=8,
                width=8,
                captions={"short": f"a red circle moves {('left', 'right')[i % 2]}"},
            )
            for i in indices
        ]


def test_the_job_reads_a_cache_and_proposes_a_shift(tmp_path, capsys):
    def encode(clips):
        sign_n = np.array([1 - 2 * (int(clip.id) % 2) for clip in clips])
        noise = np.random.default_rng(int(clips[0].id)).normal(size=(len(clips), 32))
        latents = 0.1 * noise + sign_n[:, None]
        return 3 + 5 * latents.reshape(-1, 2, 2, 2, 4)  # normalised by the job

    latent_cache.write(
        tmp_path / "cache", Clips(), encode, vae_digest="v", preprocessing={}
    )
    out = tmp_path / "band.json"
    cache = f"--latents={tmp_path / 'cache'}"
    noise_band.main([cache, "--label=direction", f"--out={out}"])
    result = json.loads(out.read_text())
    low, high = result["labels"]["direction"]["band"]
    # signs of 32 numbers of deviation one: energy 32
    assert abs(matched_filter(low, 32.0) - 0.9) < 0.05
    assert abs(matched_filter(high, 32.0) - 0.55) < 0.05
    assert f"proposed shift, in training and in sampling: {result['shift']:g}" in (
        capsys.readouterr().out
    )
    with pytest.raises(SystemExit, match=r"no label \['colour'\].*\['direction'\]"):
        noise_band.main([cache, "--label=colour"])
