"""A folder of videos against another: every kind of fault, and the protocol around it."""

import dataclasses
import functools
import json

import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

from sora_jax.core import trees
from sora_jax.data import video_io
from sora_jax.evals import protocol
from sora_jax.evals.features import networks, weight_folders
from sora_jax.evals.metrics import distances, set_metrics
from sora_jax.evals.videos import (
    clip_files,
    clip_measures,
    feature_sets,
    folder_distances,
    folder_report,
    published,
)
from sora_jax.models import i3d, vit
from tests.evals.features import test_video_features

TINY = test_video_features.TINY


def moving(count: int, seed: int = 0, frames: int = 10, size: int = 32) -> np.ndarray:
    """Clips of a square on a background of one colour, uint8 [n, t, h, w, 3]."""
    rng = np.random.default_rng(seed)
    video = np.empty((count, frames, size, size, 3), np.uint8)
    for clip in video:
        clip[:] = rng.integers(60, 200, 3)
        colour, (x, y), (dx, dy) = (
            rng.integers(0, 256, 3),
            rng.integers(4, 20, 2),
            rng.integers(-2, 3, 2),
        )
        for t, frame in enumerate(clip):
            top, left = np.clip([y + dy * t, x + dx * t], 0, size - 8)
            frame[top : top + 8, left : left + 8] = colour
    return video


def write_frames(folder, video_thwc, first: int = 0) -> None:
    folder.mkdir(parents=True)
    for number, frame in enumerate(video_thwc, first):
        PIL.Image.fromarray(frame).save(folder / f"frame_{number:03}.png")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of twelve clips as arrays, and a tiny network's weights."""
    base = tmp_path_factory.mktemp("folders")
    for name, seed in (("real", 0), ("made", 1)):
        (base / name).mkdir()
        for number, clip in enumerate(moving(12, seed)):
            np.save(base / name / f"{number:02}.npy", clip)
    params = test_video_features.draw(vit.VisionTransformer, TINY)
    weight_folders.save(base / "weights", "videomae", TINY, params, {})
    return base


@functools.cache
def toy(batch_size: int = 4):
    return networks.ToyFeatures(batch_size=batch_size)


def measured(out, videos, reference, network=None, **given) -> dict:
    """What scores.json would have of the distances."""
    settings, network = published.Settings(**given), network or toy()
    found = folder_distances.measure(videos, reference, settings, network)
    report = folder_report.Report(
        {"videos": str(videos)}, clip_measures.Settings(), {}, found, None, found.protocol, found.failures,
        found.notes, 0.0,
    )  # fmt: skip
    printed = folder_report.write(out, report)
    written = json.loads((out / "scores.json").read_text())
    assert written["digest"][:16] in printed
    return written


def test_scores_are_those_of_the_features(folders, tmp_path):
    found = measured(tmp_path, folders / "made", folders / "real")
    sets = [toy()(moving(12, seed)) for seed in (1, 0)]
    scores = found["scores"]
    assert scores["frechet"] == pytest.approx(distances.frechet(*sets), rel=1e-4)
    limit = distances.frechet_extrapolated(*sets).limit
    assert scores["frechet_limit"] == pytest.approx(limit, rel=1e-3)
    ends = distances.frechet_estimate(*sets)
    low, high = ends.low, ends.high
    expected = [max(0.0, low), high]
    assert found["intervals"]["frechet"] == pytest.approx(expected, rel=1e-3)
    kernel = set_metrics.kernel_distance(*sets)
    assert scores["kernel_biased"] == pytest.approx(kernel.biased.value, rel=1e-4)
    assert scores["kernel_unbiased"] == pytest.approx(kernel.unbiased.value, rel=1e-4)
    near = set_metrics.neighbours(*sets)
    for name in ("precision", "recall", "density", "coverage"):
        assert scores[name] == pytest.approx(getattr(near, name).value)
    assert found["intervals"].keys() == scores.keys() - {"frechet_limit", "frechet_n"}
    for name, (low, high) in found["intervals"].items():
        assert low <= scores[name] <= high
        assert low >= 0 or name == "kernel_unbiased"
    assert found["digest"] == protocol.digest(found["protocol"])
    assert found["protocol"]["num_frames"] == 9
    assert found["counts"]["videos"] == {"found": 12, "used": 12, "failed": 0}
    notes = "\n".join(found["notes"])
    assert (
        "12 of 12 clips have more frames than the 9 that are used (start: first)"
        in notes
    )
    assert "fewer than the" in notes and protocol.compare(found, found)["frechet"] == 0


def test_runs_and_batch_sizes_give_the_same_scores(folders, tmp_path):
    first, again, other = (
        measured(tmp_path, folders / "made", folders / "real", toy(size))
        for size in (4, 4, 5)
    )
    for found in (first, again, other):
        assert found.pop("facts")["Measured"]
    assert first == again
    for name, value in first["scores"].items():
        assert other["scores"][name] == pytest.approx(value, rel=1e-6), name


def test_a_folder_compared_with_itself(folders, tmp_path):
    found = measured(tmp_path, folders / "real", folders / "real")
    assert found["scores"]["frechet"] == 0
    assert found["scores"]["coverage"] == found["scores"]["precision"] == 1
    assert "the clips are identical to the reference" in found["notes"]
    assert found["scores"]["frechet_limit"] == 0
    said = "reported as 0: 12 clips per set are too few to tell the sets apart by it"
    assert said in " ".join(found["notes"])


def test_covariances_are_divided_as_published(folders, tmp_path):
    report = measured(tmp_path, folders / "made", folders / "real")
    first, second = (toy()(moving(12, seed)).astype(float) for seed in (1, 0))
    means = np.square(first.mean(0) - second.mean(0)).sum()
    scores = report["scores"]
    # All of the distance but that of the means shrinks by (n - 1) / n.
    expected = means + (scores["frechet"] - means) * 11 / 12
    assert scores["frechet_n"] == pytest.approx(expected, rel=1e-4)


def test_a_set_may_mix_kinds_of_files(folders, tmp_path):
    """The same clips in files of every lossless kind have the same distance: zero."""
    clips, mixed = moving(12, 0), tmp_path / "mixed"
    (mixed / "inner").mkdir(parents=True)
    np.savez(mixed / "a.npz", videos=clips[:4], one=clips[4])
    np.save(mixed / "b.npy", clips[5:8])
    write_frames(mixed / "inner" / "c", clips[8], first=7)
    for number in (9, 10, 11):
        encoded = video_io.encode_lossless(clips[number], 8)
        (mixed / "inner" / f"{number}.mp4").write_bytes(encoded)
    (mixed / "readme.txt").write_text("no clip")
    found = measured(tmp_path / "out", mixed, folders / "real")
    assert found["counts"]["videos"] == {"found": 12, "used": 12, "failed": 0}
    assert found["scores"]["frechet"] == pytest.approx(0, abs=1e-5)
    assert found["protocol"]["kinds"] == [".mp4", ".npy", ".npz", ".png"]
    notes = "\n".join(found["notes"])
    assert "1 files of other kinds are not read (.txt)" in notes
    assert "compression changes a distance" in notes


def test_what_cannot_be_used_is_named_and_counted(folders, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    clips = moving(8, 3)
    for number in range(7):
        np.save(bad / f"{number}.npy", clips[number])
    np.save(bad / "short.npy", clips[7][:5])
    np.save(bad / "grey.npy", clips[7][..., 0])
    np.save(bad / "float.npy", clips[7] / 255)
    np.save(bad / "objects.npy", np.array([{}], object), allow_pickle=True)
    (bad / "damaged.mp4").write_bytes(b"\0\0\0\x18ftypdamaged")
    (bad / "none.npz").write_bytes(b"PK")
    write_frames(bad / "gap", clips[7])
    (bad / "gap" / "frame_003.png").unlink()
    (bad / "gap" / "frame_004.png").unlink()
    write_frames(bad / "unreadable", clips[7])
    (bad / "unreadable" / "frame_002.png").write_bytes(b"nothing")
    write_frames(bad / "unnumbered", clips[7])
    (bad / "unnumbered" / "frame_000.png").rename(bad / "unnumbered" / "first.png")
    found = measured(tmp_path / "out", bad, folders / "real")
    assert found["counts"]["videos"] == {"found": 16, "used": 7, "failed": 9}
    sentences = found["failures"]
    for name, reason in {
        "short.npy": "5 frames, but 9 are needed",
        "grey.npy": r"shape [10, 32, 32], a clip has [t, h, w, 3]",
        "float.npy": "float64, only uint8",
        "objects.npy": "shape [1]",
        "damaged.mp4": "",
        "none.npz": "the array cannot be read",
        "gap": "2 of the frames 0 to 9 are missing, the first of them 3",
        "unreadable": "unreadable: frame_002.png: it is not a PNG",
        "unnumbered": "the frame first.png has no number",
    }.items():
        match = [s for s in sentences if s.startswith(f"videos: {name}")]
        assert len(match) == 1 and reason in match[0], (name, sentences)
    expected = distances.frechet(toy()(clips[:7]), toy()(moving(12, 0)))
    assert found["scores"]["frechet"] == pytest.approx(expected, rel=1e-4)


def test_a_random_start_follows_from_the_name(tmp_path):
    """Of every kind of file; frame t holds the value t."""
    video = np.broadcast_to(
        np.arange(60, dtype=np.uint8)[:, None, None, None], (60, 4, 4, 3)
    )
    np.save(tmp_path / "a.npy", np.stack([video] * 40))
    write_frames(tmp_path / "b", video, first=3)
    (tmp_path / "c.mp4").write_bytes(video_io.encode_lossless(video, 8))
    sources = clip_files.find(tmp_path).sources
    firsts = {}
    for start in ("first", "random"):
        read = clip_files.Reader(5, 4, start)
        found = [read(source).video_thwc[:, 0, 0, 0].astype(int) for source in sources]
        assert all(
            (np.diff(values) == 4).all() and len(values) == 5 for values in found
        )
        firsts[start] = [values[0] for values in found]
    assert set(firsts["first"]) == {0}
    assert min(firsts["random"]) < 8 and 35 < max(firsts["random"]) <= 43
    assert firsts["random"][40] > 0 or firsts["random"][41] > 0
    again = [
        clip_files.Reader(5, 4, "random")(s).video_thwc[0, 0, 0, 0] for s in sources
    ]
    assert again == firsts["random"]


def test_other_frame_rates_are_noted(folders, tmp_path):
    """Frames a second count after the stride; arrays have none."""
    for name, fps in (("slow", 8), ("fast", 16), ("both", 8)):
        (tmp_path / name).mkdir()
        for number, clip in enumerate(np.repeat(moving(3, 0), 2, axis=1)):
            encoded = video_io.encode_lossless(clip, fps * (1 + (number > 1)))
            if name != "both":
                encoded = video_io.encode_lossless(clip, fps)
            (tmp_path / name / f"{number}.mp4").write_bytes(encoded)
    slow, fast = tmp_path / "slow", tmp_path / "fast"
    found = measured(tmp_path, fast, slow)
    assert (found["protocol"]["fps"], found["protocol"]["reference_fps"]) == ([16], [8])
    sentence = "the clips are used at 16 fps, the reference at 8 fps: the frame rate"
    assert any(note.startswith(sentence) for note in found["notes"])
    for pair in ((slow, slow, 1), (fast, slow, 2), (fast, folders / "real", 1)):
        same = measured(tmp_path, *pair[:2], stride=pair[2], reference_stride=1)
        assert not any("the frame rate" in note for note in same["notes"])
    both = measured(tmp_path, tmp_path / "both", slow)
    assert "videos: the clips have 2 frame rates and are not resampled" in both["notes"]


def test_pictures_beside_clips_are_ignored(folders, tmp_path):
    for number, clip in enumerate(moving(3, 0)):
        np.save(tmp_path / f"{number}.npy", clip)
        PIL.Image.fromarray(clip[0]).save(tmp_path / f"{number}.png")
    found = clip_files.find(tmp_path)
    assert len(found.sources) == 3 and not found.failures
    assert found.notes == ("3 files of other kinds are not read (.png)",)


def test_linked_folders_are_read_and_loops_named(tmp_path):
    np.save(tmp_path / "a.npy", moving(1, 0)[0])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.npy").symlink_to(tmp_path / "a.npy")
    (tmp_path / "in" / "disk").symlink_to(tmp_path)
    (tmp_path / "in" / "turn").symlink_to(tmp_path / "in" / "turn")
    found = clip_files.find(tmp_path / "in")
    assert [source.name for source in found.sources] == ["b.npy", "disk/a.npy"]
    assert found.failures == () and len(found.notes) == 2
    assert found.notes[0] == "disk/in: it is a folder that is already listed"
    assert found.notes[1].startswith("turn: it is a broken link")


def test_few_clips_wait_for_their_batch():
    """Whatever the sizes, at most two batches of clips are kept."""

    class Mean:
        def __call__(self, video_bthwc):
            return video_bthwc.mean(axis=(1, 2, 3))

    batches = feature_sets._Batches(Mean(), 3)
    for index in range(12):
        batches.add(index, np.full((2, 4 + index % 7, 4, 3), index, np.uint8))
        assert sum(map(len, batches._waiting.values())) < 6
    found = batches.finish()
    assert [found[index][0] for index in range(12)] == list(range(12))


def test_folders_without_clips(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty is empty"):
        measured(tmp_path, tmp_path / "empty", folders / "real")
    (tmp_path / "empty" / "a.mp4").symlink_to(tmp_path / "absent.mp4")
    with pytest.raises(ValueError, match="be read: a.mp4: it is a broken link"):
        measured(tmp_path, tmp_path / "empty", folders / "real")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        measured(tmp_path, tmp_path / "absent", folders / "real")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").touch()
    with pytest.raises(ValueError, match=r"only files of other kinds \(.txt\)"):
        measured(tmp_path, tmp_path / "texts", folders / "real")
    write_frames(tmp_path / "frames", moving(1)[0])
    with pytest.raises(ValueError, match="name the folder that holds the clips"):
        measured(tmp_path, tmp_path / "frames", folders / "real")
    (tmp_path / "one").mkdir()
    np.save(tmp_path / "one" / "a.npy", moving(1)[0])
    with pytest.raises(ValueError, match="2 clips or more are needed, but 1 can be"):
        measured(tmp_path, tmp_path / "one", folders / "real")


def test_a_stride_skips_frames(folders, tmp_path):
    """Slow clips at half their frames are the clips themselves."""
    slow = tmp_path / "slow"
    slow.mkdir()
    for number, clip in enumerate(moving(12, 0)):
        np.save(slow / f"{number:02}.npy", np.repeat(clip, 2, axis=0))
    found = measured(tmp_path, slow, folders / "real", stride=2, reference_stride=1)
    assert found["scores"]["frechet"] == 0
    assert (found["protocol"]["stride"], found["protocol"]["reference_stride"]) == (
        2,
        1,
    )
    with pytest.raises(
        ValueError, match="10 frames, but 17 are needed at a stride of 2"
    ):
        measured(tmp_path, slow, folders / "real", stride=2)


def test_clips_that_fail_are_replaced_by_others(folders, tmp_path):
    some = tmp_path / "some"
    some.mkdir()
    for number, clip in enumerate(moving(12, 0)):
        np.save(some / f"{number:02}.npy", clip[: 3 if number < 4 else 10])
    found = measured(tmp_path, some, folders / "real", num_clips=8)
    assert found["counts"]["videos"]["used"] == 8
    assert found["counts"]["reference"]["used"] == 8
    with pytest.raises(ValueError, match="9 clips or more are needed, but 8 can be"):
        measured(tmp_path, some, folders / "real", num_clips=9)


def test_statistics_replace_their_folder(folders, tmp_path):
    file = tmp_path / "real.npz"
    made, real = folders / "made", folders / "real"
    report = folder_distances.measure(made, real, published.Settings(), toy())
    feature_sets.save(file, report.reference)
    first, second = (measured(tmp_path, made, of) for of in (real, file))
    for name in ("scores", "intervals", "digest", "protocol"):
        assert first[name] == second[name]
    with pytest.raises(protocol.UnequalProtocols, match="stride: 1 and 2.*--force"):
        folder_distances.measure(
            made, file, published.Settings(stride=1, reference_stride=2), toy()
        )
    forced = folder_distances.measure(
        made, file, published.Settings(reference_stride=2), toy(), force=True
    )
    assert any("stride: 1 and 2" in note for note in forced.notes)
    assert forced.protocol["reference_stride"] == 1  # what was really used
    more = dataclasses.replace(
        report.reference, manifest=report.reference.manifest | {"resize": "tf"}
    )
    feature_sets.save(file, more, force=True)
    forced = folder_distances.measure(
        made, file, published.Settings(), toy(), force=True
    )
    assert forced.protocol["reference_resize"] == "tf"
    other = folder_distances.measure(real, made, published.Settings(), toy())
    with pytest.raises(protocol.UnequalProtocols, match="--force replaces them"):
        feature_sets.save(file, other.reference)
    feature_sets.save(file, other.reference, force=True)
    kept = feature_sets.load(file)
    np.testing.assert_array_equal(kept.features_nd, other.reference.features_nd)


def test_modified_statistics_are_refused(folders, tmp_path):
    file = tmp_path / "real.npz"
    report = folder_distances.measure(
        folders / "made", folders / "real", published.Settings(), toy()
    )
    feature_sets.save(file, report.reference)
    arrays = dict(np.load(file, allow_pickle=False))
    for name, value, reason in (
        ("mean_d", arrays["mean_d"] + 1, "the moments do not match"),
        (
            "manifest",
            str(arrays["manifest"]).replace("12", "13"),
            "the digest does not",
        ),
        ("features_nd", arrays["features_nd"] * np.nan, "NaN"),
    ):
        np.savez(file, **(arrays | {name: value}))
        with pytest.raises(ValueError, match=reason):
            feature_sets.load(file)
    np.savez(file, mu=arrays["mean_d"])
    with pytest.raises(ValueError, match="not a file that --save_statistics wrote.*mu"):
        feature_sets.load(file)


@pytest.mark.parametrize("name", published.PRESETS)
def test_presets_cannot_be_changed(name):
    settings = published.resolve(name, {})
    assert settings == published.resolve(name, {"features": settings.features})
    assert settings.features in networks.NAMES and settings.num_frames
    assert (settings.eps is None) == (settings.features != "i3d")
    with pytest.raises(published.NotTheProtocol, match=f"{name} has stride .*, but 5"):
        published.resolve(name, {"stride": 5})


def test_presets_differ_as_published():
    stylegan, latte = published.PRESETS["stylegan-v"], published.PRESETS["latte"]
    assert (stylegan.num_clips, stylegan.eps, stylegan.score) == (
        2048,
        1e-3,
        "frechet_n",
    )
    assert (latte.stride, latte.reference_stride) == (1, 3)
    assert latte.reference_start == stylegan.reference_start == "random"
    assert published.PRESETS["cd-fvd-i3d"].eps == 1e-5
    assert published.PRESETS["tats"].resize == "half_pixel, cropped"
    assert published.PRESETS["jedi"].score == "jedi"


def test_a_protocol_is_kept_or_refused(folders, tmp_path, monkeypatch):
    """A preset of few clips, with a tiny network, held to everything that it says."""
    preset = published.Settings(
        "videomae", 4, 1, 1, "half_pixel", None, 10, True, "frechet_n"
    )
    monkeypatch.setitem(published.PRESETS, "tiny", preset)

    def run(videos="made", name="tiny", **given):
        out = tmp_path / "out"
        options = folder_report.Options(
            reference=folders / "real", protocol=name, weights=folders / "weights",
            distances_only=True, **given,
        )  # fmt: skip
        printed = folder_report.run(folders / videos, out, options)
        return printed, json.loads((out / "scores.json").read_text())

    printed, found = run(features="videomae", num_clips=10)
    assert found["published"] == {"protocol": "tiny", "score": "frechet_n"}
    assert found["counts"]["videos"]["used"] == 10
    assert found["protocol"]["published"] == "tiny"
    line = next(line for line in printed.splitlines() if "<- tiny" in line)
    assert line.startswith("frechet_n")
    with pytest.raises(published.NotTheProtocol, match="num_clips 10, but 12 is given"):
        run(num_clips=12)
    with pytest.raises(published.NotTheProtocol, match="features videomae, but toy"):
        run(features="toy")
    sized = folders / "sized"
    sized.mkdir(exist_ok=True)
    for number, clip in enumerate(moving(12, 5, size=40)):
        np.save(sized / f"{number:02}.npy", clip)
    with pytest.raises(published.NotTheProtocol, match="40x40, the reference has 32"):
        run("sized")
    _, free = run("sized", None, features="videomae")
    assert any("resizing alone changes a distance" in note for note in free["notes"])
    assert free["published"] is None
    monkeypatch.setitem(
        published.PRESETS, "tiny", dataclasses.replace(preset, num_frames=16)
    )
    with pytest.raises(published.NotTheProtocol, match="16 frames, but the network"):
        run()
    monkeypatch.setitem(
        published.PRESETS, "tiny", dataclasses.replace(preset, num_clips=20)
    )
    with pytest.raises(ValueError, match="20 clips or more are needed, but 12 can be"):
        run()


class Colours:
    """Six features of the pixels, said to be another network's."""

    sha256, resize, num_frames, batch_size = "0", "none", 9, 8

    def __call__(self, video_bthwc):
        pixels = video_bthwc.reshape(len(video_bthwc), -1, 3) / 64
        return np.concatenate([pixels.mean(1), pixels.std(1)], axis=1)


def test_scores_that_only_some_networks_have(tmp_path):
    sets = []
    for name, seed in (("real", 0), ("made", 1)):
        (tmp_path / name).mkdir()
        clips = moving(22, seed)
        np.save(tmp_path / name / "all.npy", clips)
        sets.insert(0, Colours()(clips[:, :9]))
    made, real, network = tmp_path / "made", tmp_path / "real", Colours()
    jedi = measured(tmp_path, made, real, network, features="vjepa")
    distance = set_metrics.kernel_distance(*sets, set_metrics.JEDI)
    assert jedi["scores"]["jedi"] == pytest.approx(
        100 * distance.biased.value, rel=1e-4
    )
    assert "jedi_unbiased" in jedi["scores"] and "kernel_biased" in jedi["scores"]
    fvd = measured(tmp_path, made, real, network, features="i3d")
    expected, _ = set_metrics.inception_score(sets[0], 10)
    found = fvd["scores"]["inception_score_i3d"]
    assert found == pytest.approx(expected, rel=1e-4)
    assert "jedi" not in fvd["scores"]
    assert not any("fewer than" in note for note in fvd["notes"])
    few = measured(tmp_path, made, real, network, features="i3d", num_clips=3)
    assert set(few["scores"]) == {
        "frechet", "frechet_n", "kernel_biased", "kernel_unbiased"
    }  # fmt: skip
    notes = "\n".join(few["notes"])
    assert (
        "inception score needs 20 clips" in notes and "coverage needs 6 clips" in notes
    )
    assert "extrapolated Frechet distance needs 8 clips per set, there are 3" in notes


def test_i3d_with_its_epsilon(tmp_path):
    config = i3d.Config(num_classes=4, eps=1e-5)
    params = test_video_features.draw(i3d.I3D, config)
    params = trees.map_paths(
        lambda name, array: abs(array) if name.endswith("variance") else array, params
    )
    weight_folders.save(tmp_path / "i3d", "i3d", config, params, {})
    settings = published.resolve("stylegan-v", {})
    with pytest.raises(published.NotTheProtocol, match="epsilon 0.001, but .* 1e-05"):
        published.open_network(settings, "stylegan-v", tmp_path / "i3d", None)
    settings = published.resolve("cd-fvd-i3d", {})
    network = published.open_network(settings, "cd-fvd-i3d", tmp_path / "i3d", 3)
    assert (network.num_frames, network.batch_size, network.eps) == (16, 3, 1e-5)
    for name in ("made", "real"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "all.npy", moving(2, name == "made"))
    options = folder_report.Options(
        reference=tmp_path / "real", features="i3d", num_frames=9,
        weights=tmp_path / "i3d", distances_only=True,
    )  # fmt: skip
    folder_report.run(tmp_path / "made", tmp_path / "out", options)
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert found["scores"]["frechet"] > 0
    assert found["protocol"]["resize"].endswith("i3d logits, epsilon 1e-05")


def test_wrong_and_broken_weights_are_refused(folders, tmp_path):
    kept = published.resolve(None, {"features": "vjepa"})
    with pytest.raises(weight_folders.WrongWeights, match="holds videomae, not vjepa"):
        published.open_network(kept, None, folders / "weights", None)
    params = test_video_features.draw(vit.VisionTransformer, TINY)
    flat = dict(trees.flatten(params))
    name = next(iter(flat))
    flat[name][...] = np.nan
    weight_folders.save(tmp_path / "nan", "videomae", TINY, params, {})
    with pytest.raises(weight_folders.WrongWeights, match=f"1 of .* NaN .*{name}"):
        networks.open("videomae", tmp_path / "nan")
    assert safetensors.numpy.load_file(tmp_path / "nan" / "weights.safetensors")


def test_features_that_are_not_finite_are_left_out(folders, tmp_path):
    class Sometimes:
        """Gives NaN for the clips whose first pixel is the last clip's."""

        sha256, resize, num_frames, batch_size = "0", "none", 9, 4

        def __call__(self, video_bthwc):
            rows = toy()(video_bthwc).copy()
            rows[video_bthwc[:, 0, 0, 0, 0] == moving(12, 1)[-1, 0, 0, 0, 0]] = np.nan
            return rows

    found = measured(tmp_path, folders / "made", folders / "real", Sometimes())
    assert found["counts"]["videos"]["used"] == 11
    assert found["failures"] == ["videos: 11.npy: the features hold NaN or infinity"]
