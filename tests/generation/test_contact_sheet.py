"""Contact sheets: every frame where it belongs, enlarged without blur."""

import numpy as np
import PIL.Image
import pytest

from sora_jax.generation import contact_sheet


def blocks(sheet, video, indices):
    """Where each frame is found in the sheet, enlarged by its factor."""
    places = []
    for index in indices:
        frame = video[index]
        factor = -(-96 // max(frame.shape[:2]))
        large = frame.repeat(factor, 0).repeat(factor, 1)
        windows = np.lib.stride_tricks.sliding_window_view(sheet[..., 0], (1, 8))
        starts = np.argwhere((windows[:, :, 0] == large[0, :8, 0]).all(-1))
        h, w = large.shape[:2]
        places.append(
            next(
                (y, x)
                for y, x in starts.tolist()
                if np.array_equal(sheet[y : y + h, x : x + w], large)
            )
        )
    return places


def test_videos_are_rows_of_frames_in_order(tmp_path):
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (11, 16, 24, 3), np.uint8)
    large = random.integers(0, 256, (2, 100, 40, 3), np.uint8)
    out = tmp_path / "sheet.png"
    contact_sheet.write(out, [small, large], ["a short caption", "a long one " * 80])
    sheet = np.asarray(PIL.Image.open(out))
    first = blocks(sheet, small, [0, 2, 4, 6, 8, 10])
    assert len({y for y, _ in first}) == 1
    assert [x for _, x in first] == [16 + 100 * k for k in range(6)]
    second = blocks(sheet, large, [0, 1])
    assert [x for _, x in second] == [16, 60] and second[0][0] > first[0][0] + 64
    # The long caption ends where the sheet does.
    assert sheet.shape[1] == 2 * 16 + 6 * 100 - 4
    above = sheet[first[0][0] + 64 : second[0][0]]
    assert (above != 255).any() and (above[:, -16:] == 255).all()


@pytest.mark.parametrize("caption", ["", "\n", "日本語"])
def test_any_text_is_a_caption(caption, tmp_path):
    video = np.zeros((1, 8, 8, 3), np.uint8)
    contact_sheet.write(tmp_path / "sheet.png", [video], [caption])
    with PIL.Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (128, 22 + 96 + 2 * 16)
