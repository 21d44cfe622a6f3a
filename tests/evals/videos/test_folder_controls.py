"""Control tables of folders: which clips are used, and what is written."""

import json

import numpy as np

from sora_jax.data import video_io
from sora_jax.evals.metrics import control_tables, controls, temporal_metrics
from sora_jax.evals.videos import clip_measures, folder_controls
from tests.evals.metrics.test_control_tables import clips


def test_a_folder_of_clips_and_what_is_written(tmp_path):
    for number, video_thwc in enumerate(clips("motion", 3, 0)):
        file = tmp_path / f"{number}.mp4"
        file.write_bytes(video_io.encode_mp4(video_thwc, 8))
    (tmp_path / "4.mp4").write_bytes(b"nothing")
    chosen = [
        m for m in temporal_metrics.METRICS if m.name in ("sharpness", "repetition")
    ]
    table, left_out = folder_controls.measure(
        tmp_path, clip_measures.Settings(), metrics=chosen
    )
    assert len(left_out) == 1 and left_out[0].startswith("4.mp4: ")
    control_tables.write([table], tmp_path / "out")
    (written,) = json.loads((tmp_path / "out" / "controls.json").read_text())
    assert written["count"] == 3 and set(written["cells"]) == {
        "repetition",
        "sharpness",
    }
    cell = written["cells"]["repetition"]["still"]
    assert cell == {"value": 1, "low": 1, "high": 1}
    assert (tmp_path / "out" / "controls.md").read_text() == table.as_text() + "\n"


def test_clips_of_few_frames_have_no_seam_score(tmp_path):
    """Everything else has its row; of six frames one is dropped, and three steps left."""
    video = clips("motion", 2, 0)
    for count in (4, 6):
        folder = tmp_path / str(count)
        folder.mkdir()
        for number, video_thwc in enumerate(video):
            np.save(folder / f"{number}.npy", video_thwc[:count])
        table, left_out = folder_controls.measure(folder, clip_measures.Settings())
        names = {metric.name for metric in temporal_metrics.METRICS}
        assert names - set(table.cells) == {"seam score"}
        assert any("but a seam score needs 7" in x for x in left_out)
    seven = control_tables.build(video[:, :7], fps=8, names=controls.CONTROLS)
    assert "seam score" in seven.cells


def test_clips_that_cannot_be_used_are_replaced(tmp_path):
    """Of a folder of mostly still or odd clips as many are found as are asked for."""
    video = clips("motion", 4, 0)
    still = np.repeat(video[:1, :1], 9, axis=1)[0]
    for number in range(12):
        one = video[number // 3] if number % 3 == 1 else still
        np.save(tmp_path / f"{number:02}.npy", one)
    chosen = [m for m in temporal_metrics.METRICS if m.name == "sharpness"]
    for wanted in (2, 3):
        settings = clip_measures.Settings(num_clips=wanted)
        table, left_out = folder_controls.measure(tmp_path, settings, metrics=chosen)
        assert table.count == wanted and "clips are still" in left_out[-1]
