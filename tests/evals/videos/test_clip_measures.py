"""Measures of single clips: against motion that is known, and what must not look good.

Clips have 17 frames at most, of 32 or 64 pixels a side: the motion of a pair of frames
is compiled for each size, and for each 16 pairs of a clip.
"""

import numpy as np
import PIL.Image
import pytest

from sora_jax.data import video_io
from sora_jax.evals.metrics import motion
from sora_jax.evals.videos import clip_files, clip_measures
from sora_jax.toyworld import families, render
from tests.evals.metrics import textures


def sliding(velocity, frames=9, size=64, wave=1.0):
    return textures.drifting(velocity, frames, size, wave)


def toy(count, seed=7):
    return np.stack(
        [
            render.render(families.scene("tw32", "test", i, {"motion": 1.0}, seed))
            for i in range(count)
        ]
    )


def measured(folder, **settings):
    found = clip_files.find(folder)
    return clip_measures.measure(found, clip_measures.Settings(**settings))


def write_clips(folder, **videos):
    folder.mkdir(exist_ok=True, parents=True)
    for name, video_thwc in videos.items():
        np.save(folder / f"{name}.npy", video_thwc)


def by_name(of):
    return {clip.name.partition(".")[0]: clip.values for clip in of.clips}


def test_a_translation_has_its_speed_and_no_warping_error(tmp_path, monkeypatch):
    """Whatever the size of the frames and the rate, and however the file says it."""
    monkeypatch.setattr(clip_measures, "SHORT_SIDE", 64)
    velocity = (1.6, -1.2)  # 2 pixels of 64 a frame
    write_clips(
        tmp_path,
        small=sliding(velocity),
        large=sliding((6.4, -4.8), size=256, wave=4.0),
        slow=sliding((0.4, -0.3)),
    )
    fast = video_io.encode_lossless(sliding(velocity), 24)
    (tmp_path / "fast.mp4").write_bytes(fast)
    found = measured(tmp_path, fps=8)
    values = by_name(found)
    for name, factor in (("small", 1), ("large", 1), ("slow", 0.25), ("fast", 3)):
        # The fastest twentieth of an estimate lies a little above its mean.
        expected = factor * 8 * 2 / 64
        degree = values[name]["dynamic degree"]
        assert degree == pytest.approx(expected, rel=0.12, abs=0.02), name
        assert values[name]["dynamic"] == (expected > motion.THRESHOLD), name
        # A translation between pixels loses what reading between them smooths away.
        assert values[name]["warping error"] < 2e-5, name
        assert values[name]["smoothness"] > 0.7, name
        assert values[name]["still"] == values[name]["cuts"] == 0
        assert values[name]["followed"] > 0.85, name
    steady = sliding(velocity)
    noise = np.random.default_rng(0).normal(0, 25, steady.shape)
    negative = np.concatenate([steady[:4], 255 - steady[4:]])
    write_clips(
        tmp_path / "wrong", noisy=(steady + noise).clip(0, 255).astype(np.uint8)
    )
    write_clips(tmp_path / "wrong", negative=negative)
    wrong = by_name(measured(tmp_path / "wrong"))
    assert wrong["noisy"]["warping error"] > 5e-3
    # Where nothing can be followed there is no error, but that shows.
    assert wrong["negative"]["followed"] < values["small"]["followed"] - 0.08
    assert found.estimate("warping error").count == 4
    notes = "\n".join(found.notes)
    assert "1 of 4 clips are measured at a short side of 64 pixels" in notes
    assert "3 of 4 clips have no stored frame rate: 8 is assumed" in notes


def test_still_and_shuffled_clips_are_named_and_win_nothing(tmp_path):
    video = toy(6)
    still = np.repeat(video[:1, :1], 9, axis=1)[0]
    shuffled = video[:2, [4, 0, 8, 2, 6, 1, 5, 3, 7]]
    write_clips(tmp_path / "good", **{f"c{i}": clip for i, clip in enumerate(video)})
    write_clips(
        tmp_path / "bad", still=still, s0=shuffled[0], s1=shuffled[1],
        **{f"c{i}": clip for i, clip in enumerate(video)},
    )  # fmt: skip
    (tmp_path / "bad" / "nowhere.mp4").symlink_to(tmp_path / "absent.mp4")
    (tmp_path / "bad" / "thesis.doc").touch()
    good, bad = measured(tmp_path / "good"), measured(tmp_path / "bad")
    assert good.estimate("still").value == 0
    assert bad.estimate("still").value == pytest.approx(1 / 9)
    assert bad.estimate("still").high > 0.3  # Wilson's, of 9 clips
    notes = "\n".join(bad.notes)
    assert "nowhere.mp4: it is a broken link" in notes
    assert "1 files of other kinds are not read (.doc)" in notes
    assert (
        "1 of 9 clips are still and left out of the means of steadiness: still.npy"
        in notes
    )
    assert (
        "2 of 9 clips move without continuity, as shuffled frames do: s0.npy, s1.npy"
        in notes
    )
    assert "still" not in "\n".join(good.notes)
    for name, measure in clip_measures.MEASURES.items():
        if measure.moving and (mean := bad.estimate(name)):
            assert mean.count == 8, name
    for name in ("warping error", "flicker"):
        assert bad.estimate(name).value > good.estimate(name).value
    assert bad.estimate("smoothness").value < good.estimate("smoothness").value
    gap = clip_measures.difference(bad, good, "smoothness")
    assert gap.low < gap.value < 0
    assert by_name(bad)["still"]["warping error"] == 0  # what the mean leaves out
    assert by_name(bad)["still"]["repetition"] == 1
    only = measured(tmp_path / "bad", num_clips=2)
    assert len(only.clips) == 2
    assert "2 clips were drawn, 7 are not measured" in only.notes


def test_a_folder_of_still_clips_has_no_steadiness(tmp_path):
    still = np.repeat(toy(2)[:, :1], 9, axis=1)
    write_clips(tmp_path, a=still[0], b=still[1])
    found = measured(tmp_path)
    assert found.estimate("warping error") is found.estimate("smoothness") is None
    assert found.estimate("still").value == 1 and found.estimate("dynamic").value == 0


def test_sizes_and_lengths_differ_and_damage_is_named(tmp_path):
    write_clips(
        tmp_path,
        a=sliding((1, 0), frames=5),
        b=sliding((1, 0), frames=12, size=32),
        long=sliding((1, 0), frames=40, size=32),
        short=sliding((1, 0), frames=3),
        tiny=sliding((1, 0), size=6),
        grey=sliding((1, 0))[..., 0],
    )
    (tmp_path / "damaged.mp4").write_bytes(b"\0\0\0\x18ftypdamaged")
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(sliding((0.7, 0), size=32)):
        PIL.Image.fromarray(frame).save(tmp_path / "frames" / f"{number}.png")
    found = measured(tmp_path, num_frames=17)
    assert [(c.name, c.frames, c.size) for c in found.clips] == [
        ("a.npy", 5, (64, 64)), ("b.npy", 12, (32, 32)), ("frames", 9, (32, 32)),
        ("long.npy", 17, (32, 32)),
    ]  # fmt: skip
    assert found.found == 8 and len(found.failures) == 4
    said = "\n".join(found.failures)
    for reason in (
        "short.npy: 3 frames, but 4 are needed",
        "tiny.npy: 6x6 pixels, but 8 per side are needed",
        "grey.npy: the array has shape",
        "damaged.mp4: ",
    ):
        assert reason in said
    notes = "\n".join(found.notes)
    assert "1 of 4 clips have more than the 17 frames that are measured" in notes
    (tmp_path / "only").mkdir()
    np.save(tmp_path / "only" / "short.npy", sliding((1, 0), frames=2))
    with pytest.raises(
        ValueError, match="no clip can be measured: short.npy: 2 frames"
    ):
        measured(tmp_path / "only")


def test_cuts_and_seams_have_their_times(tmp_path):
    one, other = toy(2)
    lighter = np.clip(other.astype(int) + 60, 0, 255).astype(np.uint8)
    write_clips(
        tmp_path,
        cut=np.concatenate([one, lighter[:8]]),
        skips=np.concatenate([sliding((1, 0), 30)[:8], sliding((1, 0), 30)[14:22]]),
        even=sliding((1, 0), 16),
        brief=sliding((1, 0), 6),
    )
    found = measured(tmp_path, chunk_frames=8, fps=4)
    cuts = {clip.name: clip.cuts for clip in found.clips}
    assert cuts["cut.npy"] == (9 / 4,) and cuts["even.npy"] == ()
    values = by_name(found)
    assert values["cut"]["cuts"] == 1
    assert values["skips"]["seam score"] > 5 > values["even"]["seam score"]
    assert "seam score" not in values["brief"]  # which ends before the first seam
    write_clips(tmp_path / "brief", brief=sliding((1, 0), 6))
    few = measured(tmp_path / "brief", chunk_frames=2)
    assert by_name(few)["brief"]["seam score"] is None  # 3 steps are no seam
    assert "1 of 1 clips have no seam score: brief.npy" in few.notes
    assert "seam score" not in by_name(measured(tmp_path))["skips"]
    with pytest.raises(ValueError, match="stride of 1 only"):
        clip_measures.Settings(chunk_frames=8, stride=2)
    with pytest.raises(ValueError, match="from 4 frames on, not 3: --distances_only"):
        clip_measures.Settings(num_frames=3)


def test_a_stride_slows_the_rate(tmp_path):
    write_clips(tmp_path, a=np.repeat(sliding((1.2, -0.9)), 2, axis=0))
    found = measured(tmp_path, stride=2, fps=16)
    assert found.clips[0].frames == 9 and found.clips[0].fps == 8
    degree = found.clips[0].values["dynamic degree"]
    assert degree == pytest.approx(8 * 1.5 / 64, rel=0.12)


def test_intervals_say_how_few_clips_there_are(tmp_path):
    write_clips(tmp_path, a=sliding((1, 0)))
    one = measured(tmp_path)
    mean = one.estimate("warping error")
    assert (mean.low, mean.high, mean.count) == (None, None, 1)
    assert clip_measures.difference(one, one, "warping error") is None
    write_clips(tmp_path, b=sliding((2, 0)), c=sliding((0.5, 0)))
    three = measured(tmp_path)
    values = three.values("dynamic degree")
    mean = three.estimate("dynamic degree")
    assert mean.value == pytest.approx(values.mean())
    assert values.min() <= mean.low < mean.value < mean.high <= values.max()
    worst = three.worst("warping error", 2)
    assert worst[0].values["warping error"] >= worst[1].values["warping error"]


def test_frames_are_made_smaller_and_never_larger():
    video = np.random.default_rng(0).integers(0, 256, (2, 300, 400, 3), np.uint8)
    small = np.stack([clip_measures.working_size(frame) for frame in video])
    assert small.shape == (2, 128, 171, 3) and small.dtype == np.uint8
    # Every pixel has its part: the mean stays, and noise is averaged away.
    assert abs(small.mean() - video.mean()) < 1 and small.std() < 0.6 * video.std()
    frame = small[0]
    assert clip_measures.working_size(frame) is frame


def test_memory_follows_the_working_size(tmp_path, monkeypatch):
    """A clip too large to be held as stored is read, whatever its file."""
    limits = video_io.Limits(max_total_pixels=9 * 64 * 64)
    monkeypatch.setattr(clip_files, "_LIMITS", limits)
    video = sliding((6.4, -4.8), size=256, wave=4.0)
    write_clips(tmp_path, array=video)
    (tmp_path / "video.mp4").write_bytes(video_io.encode_lossless(video, 8))
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(video):
        PIL.Image.fromarray(frame).save(tmp_path / "frames" / f"{number}.png")
    seen = []

    def shrink(frame_hwc):
        seen.append(frame_hwc.shape)
        return clip_measures.shrink(frame_hwc, 64)

    reader = clip_files.Reader(9, 1, shrink=shrink)
    array, frames, mp4 = map(reader, clip_files.find(tmp_path).sources)
    assert seen == [(256, 256, 3)] * 27
    assert mp4.video_thwc.shape == (9, 64, 64, 3)
    for clip in (array, frames, mp4):
        assert clip.size == (256, 256)
        np.testing.assert_array_equal(clip.video_thwc, mp4.video_thwc)
    for source in clip_files.find(tmp_path).sources[1:]:
        with pytest.raises(clip_files.UnusableClip, match="than 36864 pixels in total"):
            clip_files.Reader(9, 1)(source)


def test_as_many_clips_as_are_asked_for(tmp_path, monkeypatch):
    def measure(source, *arguments):
        values = dict.fromkeys((clip_measures.STILL, clip_measures.JUMPS), 0.0)
        return clip_measures.Measured(source, 4, (8, 8), 8.0, values, ())

    monkeypatch.setattr(clip_measures, "_measure", measure)
    monkeypatch.setattr(clip_measures, "MOST_CLIPS", 3)
    np.save(tmp_path / "many.npy", np.zeros((6, 4, 8, 8, 3), np.uint8))
    for asked, wanted in ((None, 3), (2, 2), (5, 5)):
        assert len(measured(tmp_path, num_clips=asked).clips) == wanted
        settings = clip_measures.Settings(num_clips=asked)
        assert settings.to_json(None)["most_clips"] == wanted


def test_shares_that_are_all_or_nothing_differ_by_an_interval():
    def of(*still):
        clips = tuple(
            clip_measures.Measured(None, 9, (8, 8), 8.0, {"still": float(x)}, ())
            for x in still
        )
        return clip_measures.Set(clips, len(clips), (), ())

    none, every = of(0, 0, 0, 0, 0), of(1, 1, 1, 1, 1)
    same = clip_measures.difference(none, none, "still")
    assert same.value == 0 and same.low < -0.4 and same.high > 0.4
    apart = clip_measures.difference(every, none, "still")
    assert apart.value == apart.high == 1 and 0.2 < apart.low < 0.6
    assert clip_measures.difference(of(1), none, "still") is None
