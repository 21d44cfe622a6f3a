"""Windows of clips: sizes, places, and that they are functions of the row alone."""

import numpy as np
import pytest

from sora_jax.data import loader, records, transforms, video_io

MIX = (transforms.Crop(5, 8, 8), transforms.Crop(1, 16, 16, 2))


def numbered(num_frames=9, size=16):
    """A clip whose pixels tell their frame, row and column."""
    frames_thwc = np.stack(np.indices((num_frames, size, size)), -1).astype(np.uint8)
    return records.ClipRecord(
        id="numbered",
        video=video_io.encode_lossless(frames_thwc, 8),
        fps=8.0,
        num_frames=num_frames,
        height=size,
        width=size,
        captions={},
        caption_sources={},
        shots=(),
        scores={},
        licence="CC0-1.0",
        source="test",
    )


def test_a_row_has_windows_of_every_kind_cut_anywhere_out_of_its_clip():
    clip, cut, begins = numbered(), transforms.CropClips(MIX), set()
    for seed in range(40):
        found = cut(clip, np.random.default_rng(seed))
        assert found.keys() == {"video0", "video1"}
        assert found["video0"].shape == (1, 5, 8, 8, 3)
        assert found["video1"].shape == (2, 1, 16, 16, 3)
        for window in (*found["video0"], *found["video1"]):
            start = window[0, 0, 0].astype(int)
            places = np.stack(np.indices(window.shape[:3]), -1) + start
            np.testing.assert_array_equal(window, places)
            begins.add((window.shape[0], start[0]))
    # Any first frame that leaves room, the middle of the clip included.
    wanted = {(5, t) for t in range(5)} | {(1, t) for t in range(9)}
    assert begins == wanted


class Source:
    def __init__(self):
        self.clips = [numbered(5 + 4 * i) for i in range(6)]

    def __len__(self):
        return len(self.clips)

    def read(self, indices):
        return [self.clips[i] for i in indices]


def test_rows_are_the_same_for_any_number_of_processes_and_any_start():
    def steps(start, count, process=0, processes=1):
        with loader.make_loader(
            Source(),
            transforms.CropClips(MIX),
            seed=3,
            batch_size=4,
            start_step=start,
            num_steps=count,
            process_index=process,
            process_count=processes,
        ) as rows:
            return [transforms.join_crops(batch) for batch in rows]

    whole = steps(0, 3)
    assert whole[0]["video1"].shape == (8, 1, 16, 16, 3)
    halves = [steps(2, 1, process, 2)[0] for process in range(2)]
    for name, videos in whole[2].items():
        parts = [half[name] for half in halves]
        np.testing.assert_array_equal(np.concatenate(parts), videos)
        assert np.any(videos != whole[1][name])


def test_stages_share_the_steps():
    images = (1, 0, 0, 2)
    found = transforms.stages(((0.25, ((5, 8, 8, 1), images)), (0.75, (images,))), 10)
    assert [steps for steps, _ in found] == [range(0, 2), range(2, 10)]
    assert [len(crops) for _, crops in found] == [2, 1]
    assert found[1][1][0] == transforms.Crop(1, count=2)


@pytest.mark.parametrize(
    "crops, message",
    [
        (((0.5, ((0, 0, 0, 1),)),), "sum to 0.5, not 1"),
        (((1.0, ()),), "the stage with share 1 has no windows"),
        (((1.0, ((5, 8, 8, 0),)),), "0 windows of 5 x 8 x 8: sizes must"),
        (((1.0, ((-1, 8, 8, 1),)),), "windows of -1 x 8 x 8: sizes must"),
        (((1.0, 5, 8, 8, 1),), r"a stage is \(share, kinds\)"),
        (((1.0, ((5, 8, 8),)),), r"a kind \(frames, height, width, windows a clip\)"),
    ],
)
def test_impossible_stages_are_refused(crops, message):
    with pytest.raises(ValueError, match=message) as refused:
        transforms.stages(crops, 10)
    assert "\n" not in str(refused.value)


def test_windows_must_fit_into_every_clip():
    clips = {"num_frames": [5, 9], "height": 16, "width": [16, 32]}
    assert transforms.window_size(transforms.Crop(5, 0, 8), clips) == (5, 16, 8)
    for crop, message in (
        (transforms.Crop(9, 8, 8), "9 x 8 x 8 is larger than a clip whose num_frames"),
        (transforms.Crop(5, 8, 32), "larger than a clip whose width is 16"),
        (transforms.Crop(0, 8, 8), "equal num_frames, but they have from 5 to 9"),
    ):
        with pytest.raises(ValueError, match=message):
            transforms.window_size(crop, clips)
