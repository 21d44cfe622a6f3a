"""The job for folders of videos: with and without a reference, its files and its page."""

import dataclasses
import functools
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import safetensors.numpy

from sora_jax.data import video_io
from sora_jax.evals import protocol
from sora_jax.evals.html import page
from sora_jax.evals.videos import (
    clip_measures,
    folder_controls,
    folder_page,
    folder_report,
)
from tests import conftest
from tests.data import test_clip_tokenizer
from tests.evals import tiny_run
from tests.evals.metrics import test_agreement
from tests.evals.videos import test_clip_measures
from tests.evals.videos.test_clip_measures import sliding, toy, write_clips


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Twelve clips as videos with recipes, one still and one damaged; others as arrays."""
    base = tmp_path_factory.mktemp("folders")
    video = toy(12)
    video[3] = video[3, :1]
    (base / "made").mkdir()
    for number, clip in enumerate(video):
        file = base / "made" / f"{number:02}.mp4"
        file.write_bytes(video_io.encode_lossless(clip, 8))
        file.with_suffix(".json").write_text(json.dumps({"prompt": f"thing {number}"}))
    (base / "made" / "damaged.mp4").write_bytes(b"\0\0\0\x18ftypdamaged")
    write_clips(base / "real", **{f"r{i}": clip for i, clip in enumerate(toy(10, 8))})
    return base


def run(folder, out, **options):
    printed = folder_report.run(folder, out, folder_report.Options(**options))
    found = json.loads((out / "scores.json").read_text())
    assert found["digest"] == protocol.digest(found["protocol"])
    assert found["digest"][:16] in printed
    return printed, found


def test_without_a_reference_there_are_no_distances(folders, tmp_path):
    printed, found = run(folders / "made", tmp_path)
    assert found["counts"] == {
        "videos": {
            "found": 13, "failed": 1, "measured": 12, "still": 1,
            "motion_does_not_go_on": 0,
        }
    }  # fmt: skip
    assert {name.partition("/")[0] for name in found["scores"]} == {"videos"}
    assert found["scores"]["videos/still"] == pytest.approx(1 / 12)
    assert found["clips_in_mean"]["videos/warping_error"] == 11
    low, high = found["intervals"]["videos/smoothness"]
    assert low < found["scores"]["videos/smoothness"] < high
    assert found["failures"][0].startswith("videos: damaged.mp4: ")
    assert any(
        "still and left out of the means of steadiness: 03.mp4" in n
        for n in found["notes"]
    )
    lines = [json.loads(x) for x in (tmp_path / "clips.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and lines[3]["still"] == 1 and lines[3]["set"] == "videos"
    mean = np.mean([x["warping_error"] for x in lines if not x["still"]])
    assert found["scores"]["videos/warping_error"] == pytest.approx(mean)
    assert "videos: 12 of 13 clips are measured, 1 of them still" in printed
    assert "what it does not see" in printed and "a blurred clip wins" in printed
    _, again = run(folders / "made", tmp_path / "again")
    for content in (found, again):
        content.pop("facts")
    assert found == again
    _, other = run(folders / "made", tmp_path / "other", num_frames=8)
    assert other["digest"] != found["digest"]
    with pytest.raises(protocol.UnequalProtocols, match="most_frames"):
        protocol.compare(found, other)


def test_the_reference_stands_beside(folders, tmp_path):
    printed, found = run(folders / "made", tmp_path, reference=folders / "real")
    scores = found["scores"]
    assert {"frechet", "videos/smoothness", "reference/smoothness"} <= scores.keys()
    assert found["counts"]["videos"]["used"] == 12
    assert found["counts"]["reference"]["measured"] == 10
    assert found["failures"][0].startswith("videos: damaged.mp4")
    assert len(found["failures"]) == 1  # one sentence, although both read it
    sets = {"videos": [], "reference": []}
    for line in (tmp_path / "clips.jsonl").read_text().splitlines():
        one = json.loads(line)
        sets[one["set"]].append(one["dynamic_degree"])
    for side, values in sets.items():
        assert scores[f"{side}/dynamic_degree"] == pytest.approx(np.mean(values))
    assert "difference" in printed and "frechet" in printed
    _, alone = run(
        folders / "made",
        tmp_path / "alone",
        reference=folders / "real",
        distances_only=True,
    )
    assert not [name for name in alone["scores"] if "/" in name]
    assert "measures" not in alone["protocol"]


def test_a_file_of_statistics_has_no_clips_to_measure(folders, tmp_path):
    file, real = tmp_path / "real.npz", folders / "real"
    run(folders / "made", tmp_path / "a", reference=real, save_statistics=file)
    _, found = run(folders / "made", tmp_path / "b", reference=file)
    assert "reference: a file of statistics, without clips to measure" in found["notes"]
    assert "reference/still" not in found["scores"] and "frechet" in found["scores"]


def test_other_lengths_and_frame_rates_are_noted(folders, tmp_path):
    write_clips(
        tmp_path / "long",
        **{f"c{i}": np.tile(toy(1)[0], (2, 1, 1, 1))[:17] for i in "ab"},
    )
    _, found = run(
        folders / "made", tmp_path / "out", reference=tmp_path / "long", fps=16
    )
    notes = "\n".join(found["notes"])
    assert "the median clip has 9 frames, that of the reference 17" in notes
    assert "has 8 fps, that of the reference 16" in notes


def test_the_page_shows_clips_side_by_side(folders, tmp_path):
    still = np.repeat(sliding((1, 0), 1, 32), 9, axis=0)
    write_clips(tmp_path / "odd", **{"a<b": sliding((1, 0), 9, 32), "c": still})
    run(folders / "made", tmp_path, reference=tmp_path / "odd", controls=True)
    page = (tmp_path / "report.html").read_text()
    assert "http" not in re.sub(r'http-equiv="[^"]*"', "", page)
    assert page.count("<video") == page.count("data:video/mp4;base64,") >= 14
    assert "a&lt;b.npy" in page and "a<b" not in page
    for text in (
        "Clips", "Worst: warping error", "Worst: still", "what it does not see",
        "Measures of single clips", "Distances to the reference", "Controls", "damaged.mp4",
        "difference", "digest", "working_size",
    ):  # fmt: skip
        assert text in page, text
    assert page.count('<svg class="chart"') == 5
    # A file that has gone since is left out of the page.
    settings = clip_measures.Settings()
    clips = test_clip_measures.measured(tmp_path / "odd").clips
    (tmp_path / "odd" / "c.npy").unlink()
    shown = [folder_page._clip(one, settings, "repetition") for one in clips]
    assert shown[0] and shown[1] is None
    # A player takes no odd size: a pixel is cut off, and the rest shown twice as large.
    write_clips(tmp_path / "odd", **{"a<b": sliding((1, 0), 9, 33)})
    shown = folder_page._clip(clips[0], settings, "repetition")
    (tmp_path / "odd.mp4").write_bytes(shown.mp4)
    assert video_io.decode(tmp_path / "odd.mp4").frames.shape == (9, 64, 64, 3)


def test_strips_hold_every_clip_and_the_mean(folders):
    sets = {
        side: test_clip_measures.measured(folders / side) for side in ("made", "real")
    }
    charts = {chart.title: chart.svg for chart in folder_page._charts(sets)}
    degree = charts["Dynamic degree"]
    assert degree.count("<circle") == 22 and degree.count("<title>mean") == 2
    assert charts["Smoothness (more is better)"].count("<circle") == 21
    table = page.as_text([folder_page.measures_table({"videos": sets["made"]})])
    assert "difference" not in table and "a noised clip has more" in table


def test_controls_are_made_of_clips_of_one_shape_that_move(folders, tmp_path):
    (tmp_path / "mixed").mkdir()
    video = [*toy(4), np.repeat(toy(1)[0, :1], 9, axis=0), sliding((1, 0), 8, 32)]
    for number, clip in enumerate(video):
        np.save(tmp_path / "mixed" / f"{number}.npy", clip)
    printed, found = run(tmp_path / "mixed", tmp_path, controls=True)
    [table] = json.loads((tmp_path / "controls.json").read_text())
    assert table["count"] == 4 and "9 frames of 32x32" in table["title"]
    notes = "\n".join(found["notes"])
    assert "controls: 1 clips are still: 4.npy" in notes
    assert "the most common shape, 9 frames of 32x32 at 8 fps: 5" in notes
    assert (
        "| warping error |" in printed and "Metrics that expose each control" in printed
    )
    cells = table["cells"]["smoothness"]
    assert cells["frames shuffled"]["value"] < 0.5 * cells["as given"]["value"]
    assert (tmp_path / "controls.md").is_file()
    still = tmp_path / "still"
    write_clips(still, a=np.repeat(video[0][:1], 9, 0), b=np.repeat(video[1][:1], 9, 0))
    _, found = run(still, tmp_path / "none", controls=True)
    assert not (tmp_path / "none" / "controls.json").exists()
    assert any("left out: a control table" in n for n in found["notes"])
    with pytest.raises(ValueError, match="that move, but .* has 0"):
        folder_controls.measure(still, clip_measures.Settings())


@pytest.mark.peers
def test_captions_beside_those_of_other_clips(folders, tmp_path, peers_python):
    """Random weights: the agreement is there, and is said to be no better than chance."""
    clip = tmp_path / "clip"
    test_clip_tokenizer.write_clip(clip)
    frames = {"frames": np.zeros((1, 1, 28, 28, 3), np.uint8)}
    safetensors.numpy.save_file(frames, tmp_path / "frames")
    (tmp_path / "texts").write_text('["a"]')
    paths = (clip, tmp_path / "frames", tmp_path / "texts", tmp_path / "out.json")
    command = [peers_python, test_agreement.ORACLE, *paths]
    subprocess.run(list(map(str, command)), check=True)
    made = tmp_path / "made"
    made.mkdir()
    for file in sorted((folders / "made").glob("0[0-4].*")):
        shutil.copy(file, made)
    printed, found = run(made, tmp_path / "out", clip=clip)
    scores = found["scores"]
    assert scores["videos/agreement_above_that"] == pytest.approx(
        scores["videos/agreement_with_caption"]
        - scores["videos/agreement_with_other_captions"]
    )
    assert found["protocol"]["measures"]["clip"]["tokens"] == 77
    assert found["clips_in_mean"]["videos/agreement_with_caption"] == 5
    assert "agreement with other captions" in printed
    above = found["intervals"]["videos/agreement_above_that"]
    said = any(
        "not significantly above that with other captions" in n for n in found["notes"]
    )
    assert said == (above[0] <= 0)
    assert "thing 3" in (tmp_path / "out" / "report.html").read_text()
    (made / "00.json").write_text("{}")
    _, found = run(made, tmp_path / "out", clip=clip)
    assert found["clips_in_mean"]["videos/agreement_with_caption"] == 4
    notes = "\n".join(found["notes"])
    assert (
        "1 of 5 clips have no caption and are left out of the means of agreement: 00"
        in notes
    )
    assert any("00.json: it has no caption" in s for s in found["failures"])


def test_options_that_contradict_each_other_are_refused(folders, tmp_path):
    for options, sentence in (
        (
            {"features": "toy"},
            "--features need --reference",
        ),
        ({"save_statistics": "x"}, "--save_statistics need --reference"),
        (
            {"distances_only": True},
            "--distances_only leaves nothing to do without --reference",
        ),
        (
            {"distances_only": True, "reference": "x", "clip": "y"},
            "--clip concern single clips, which --distances_only leaves out",
        ),
        ({"chunk_frames": 4, "stride": 2}, "at a stride of 1 only"),
        ({"num_frames": 2}, "from 4 frames on, not 2"),
        ({"clip": tmp_path}, "agreement with texts needs weights"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run(folders / "made", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        run(tmp_path / "absent", tmp_path / "out")


def test_few_frames_without_measures_of_single_clips():
    given = {"reference": "x", "distances_only": True, "num_frames": 3}
    options = folder_report.Options(**given)
    assert options.measures() == clip_measures.Settings()
    with pytest.raises(ValueError, match="--distances_only without --controls"):
        dataclasses.replace(options, controls=True).measures()


def test_the_job(folders, tmp_path, capsys):
    out, file = tmp_path / "out", tmp_path / "statistics" / "real.npz"
    given = {"videos": folders / "made", "reference": folders / "real", "out": out}
    given |= {"save_statistics": file, "batch_size": 4, "num_frames": 9}
    with conftest.lone_job("evaluate") as job:
        run = functools.partial(tiny_run.evaluate, job)
        run(**given)
        assert "videos: 12 of 13 clips are used" in capsys.readouterr().out
        again = given | {"reference": file, "out": tmp_path / "again"}
        del again["save_statistics"]
        run(**again)
        first, second = (
            json.loads((of / "scores.json").read_text())
            for of in (out, tmp_path / "again")
        )
        kept = {n: x for n, x in first["scores"].items() if "reference/" not in n}
        assert kept == second["scores"] and len(kept) < len(first["scores"])
        for wrong, sentence in (
            ({"videos": folders / "made", "weights": "x"}, "need --reference"),
            ({"shards": folders / "made"}, "give one of --model"),
            ({"samples": folders / "made"}, "give --shards"),
            ({"vae": "x", "protocol": "stylegan-v"}, "--protocol.*need --videos"),
            ({"vae": "x", "stride": 2, "force": True}, "--force, --stride need"),
            (
                given | {"protocol": "stylegan-v"},
                "protocol stylegan-v has num_frames 16",
            ),
            (given | {"features": "i3d"}, "FVD needs weights that cannot be shipped"),
        ):
            with pytest.raises(SystemExit, match=f"evaluate: .*{sentence}"):
                run(**(wrong | {"out": tmp_path / "wrong"}))
        assert not (tmp_path / "wrong").exists()
        run(videos=folders / "made", out=tmp_path / "alone", fps=8)
        assert "12 of 13 clips are measured" in capsys.readouterr().out


def test_an_out_that_cannot_be_written_is_found_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("x")
    with conftest.lone_job("evaluate") as job:
        run = functools.partial(tiny_run.evaluate, job)
        given = {"videos": tmp_path / "missing", "out": tmp_path / "file"}
        with pytest.raises(
            SystemExit, match="scores.json cannot be written: .*file is a"
        ):
            run(**given)
        given |= {
            "out": tmp_path / "out",
            "save_statistics": tmp_path / "file" / "x.npz",
        }
        with pytest.raises(
            SystemExit, match="x.npz cannot be written: .*file is a file"
        ):
            run(**given)
