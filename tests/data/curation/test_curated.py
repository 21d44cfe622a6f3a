"""Curated folders: what is kept and why, after a kill the same bytes, removal on request."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy import ndimage

from sora_jax import prepare
from sora_jax.core import paths
from sora_jax.data import array_files, shards
from sora_jax.data.curation import curated, policy, stages
from sora_jax.evals.videos import curation_page
from tests import conftest
from tests.data.curation.folders import FPS, record, shifted, toy, write

ROOT = pathlib.Path(__file__).resolve().parents[3]
FREE = {"licence": "CC0-1.0"}


def clips():
    """Twelve clips: six scenes, two copies, a still, a dark, an unfree and a named one."""
    films = [
        record(f"film-{k}.mp4#00000", toy(k, family="motion"), **FREE) for k in range(6)
    ]
    soft = ndimage.gaussian_filter(toy(0, family="motion"), (0, 0.7, 0.7, 0))
    still = np.repeat(toy(40, family="motion")[:1], 9, axis=0)
    return [
        *films[:2],
        # Film 0 again, soft, and under a name that comes first; film 1 again, larger.
        record("a copy#00000", soft, crf=20, **FREE),
        record(
            "large#00000", toy(1, family="motion").repeat(2, 1).repeat(2, 2), **FREE
        ),
        *films[2:],
        record("still#00000", still, **FREE),
        record("dark#00000", toy(41, family="motion") // 8, **FREE),
        record("unfree#00000", toy(42, family="motion"), licence="all rights reserved"),
        record(
            "named#00000",
            toy(43, family="motion"),
            source="https://a.example/w/1",
            scores={"aesthetic": 5.5, "motion": 99.0},
            **FREE,
        ),
    ]


POLICY = """
licences = ["cc0-1.0"]
opt_out = ["source:https://a.example/w", "source:https://b.example"]
stages = ["motion", "brightness", "sharpness"]
[limits]
motion = {min = 0.01}
brightness = {min = 0.2}
[duplicates]
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return write(tmp_path_factory.mktemp("given") / "in", clips())


def source(given, out, text=POLICY, **fields):
    file = out.with_suffix(".toml")
    file.write_text(text)
    folders = given if isinstance(given, tuple) else (given,)
    return curated.CuratedClips(folders, policy.read(file), out, **fields)


def curate(given, out, text=POLICY, num_workers=0):
    made = source(given, out, text, num_workers=num_workers)
    shards.write(out, made, num_workers=num_workers)
    return shards.open(out)


def decisions(out):
    lines = (out / "decisions.jsonl").read_text().splitlines()
    return {line["id"]: line for line in map(json.loads, lines)}


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != paths.LOCK
    }


def test_related_clips_are_no_copies_of_one_another(tmp_path):
    """The same pixels as an edit, its source, two clips of a subject, and a stranger."""
    film = toy(0, family="motion")
    related = [
        record("a.mp4#00000", film, edit_of="b.mp4#00000", **FREE),
        record("b.mp4#00000", film, **FREE),
        record("c.mp4#00000", film, subject="cat", edit_of="b.mp4#00000", **FREE),
        record("d.mp4#00000", film, subject="cat", **FREE),
        record("e.mp4#00000", film, **FREE),
    ]
    given = write(tmp_path / "in", related)
    curate(given, tmp_path / "out")
    decided = decisions(tmp_path / "out")
    assert {id[0] for id, line in decided.items() if line["kept"]} == {*"abcd"}
    assert "duplicates" in decided["e.mp4#00000"]["why"]


def test_every_clip_is_kept_or_has_a_reason(given, tmp_path):
    kept = curate(given, tmp_path / "out")
    decided = decisions(tmp_path / "out")
    assert [*decided] == [clip.id for clip in given]
    why = {id: line["why"] for id, line in decided.items() if not line["kept"]}
    assert why.pop("a copy#00000") == {"duplicates": "it is a copy of film-0.mp4#00000"}
    assert why.pop("film-1.mp4#00000") == {"duplicates": "it is a copy of large#00000"}
    assert why.pop("still#00000") == {"limits.motion": "motion is 0, below 0.01"}
    [(rule, reason)] = why.pop("dark#00000").items()
    assert rule == "limits.brightness" and reason.endswith("below 0.2")
    assert why.pop("unfree#00000") == {
        "licence": "it has licence 'all rights reserved', which is not allowed"
    }
    named = why.pop("named#00000")
    assert named == {"opt_out": "source:https://a.example/w is in the list"}
    assert why == {}
    assert [clip.id for clip in kept] == [id for id in decided if decided[id]["kept"]]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["skipped"]) == 6 and report["clips"] == 6


def test_kept_clips_differ_by_their_scores_alone(given, tmp_path):
    before = {clip.id: clip for clip in given}
    kept = curate(given, tmp_path / "out")
    for index, clip in enumerate(kept):
        old = before[clip.id]
        names = ("motion", "brightness", "sharpness")
        truth = stages.run(names, old.frames(), FPS)
        assert clip.scores == {**old.scores, **truth}
        assert kept.entry(index)["scores"] == clip.scores
        same = ("video", "captions", "licence", "source", "shots", "fps", "sha256")
        assert all(getattr(clip, name) == getattr(old, name) for name in same)
    assert "scores" not in given.entry(0)


def test_the_summary_counts_what_was_refused(given, tmp_path):
    curate(given, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "curation.json").read_text())
    assert (summary["clips"], summary["kept"]) == (12, 6)
    counts = {rule: [*of.values()] for rule, of in summary["refused"].items()}
    assert counts == {
        "licence": [1, 1, 11],
        "opt_out": [1, 1, 10],
        "limits.brightness": [1, 1, 9],
        "limits.motion": [1, 1, 8],
        "duplicates": [2, 2, 6],
    }
    assert summary["licences_kept"] == {"CC0-1.0": 6}
    assert summary["without_a_clip"]["opt_out"] == ["source:https://b.example"]


def test_scores_alone_keep_every_clip(given, tmp_path):
    text = "filter = false\n[limits]\nmotion = {min = 0.01}\n[duplicates]\n"
    kept = curate(given, tmp_path / "out", text)
    assert [clip.id for clip in kept] == [clip.id for clip in given]
    assert all({*stages.scores_of(stages.STAGES)} <= {*clip.scores} for clip in kept)
    why = {id for id, line in decisions(tmp_path / "out").items() if line["why"]}
    assert why == {"a copy#00000", "film-1.mp4#00000", "still#00000"}
    # Scores of other origin stay; ours are replaced.
    named = next(clip for clip in kept if clip.id == "named#00000")
    assert named.scores["aesthetic"] == 5.5 and named.scores["motion"] < 9


SCRIPT = """
import sys
from sora_jax.data import shards
from sora_jax.data.curation import curated, policy
folder, file, out = sys.argv[1:]
import pathlib
made = curated.CuratedClips((shards.open(folder),), policy.read(file), pathlib.Path(out))
shards.write(out, made)
"""


def test_a_killed_curation_goes_on_and_gives_the_same_files(
    given, tmp_path, monkeypatch
):
    whole = curate(given, tmp_path / "whole", num_workers=2)
    out = tmp_path / "killed"
    made = source(given, out)
    arguments = [str(given.folder), str(out.with_suffix(".toml")), str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    first = out / ".partial" / "curation" / "00000" / "scored.jsonl"
    while not first.exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    # Interrupted again, after the decisions and before the first file of clips.
    with monkeypatch.context() as patched:
        patched.setattr(array_files, "store_part", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            shards.write(out, made)
    assert (out / "decisions.jsonl").exists()
    with monkeypatch.context() as patched:
        patched.setattr(stages, "run", lambda *args: 1 / 0)  # all is scored
        shards.write(out, made)
    assert contents(out) == contents(whole.folder)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    shards.write(out, made)
    assert stamps == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_a_removal_leaves_out_the_clip_and_its_copies(given, tmp_path, monkeypatch):
    """By content; nothing is decoded again, and a scored folder keeps its scores."""
    scored = curate(given, tmp_path / "scored", "filter = false")
    chosen = next(clip for clip in scored if clip.id == "film-0.mp4#00000")
    monkeypatch.setattr(stages, "run", lambda *args: 1 / 0)
    for entry in (
        f"sha256:{chosen.sha256}",
        f"hash:{decisions(scored.folder)[chosen.id]['hash']}",
    ):
        out = tmp_path / entry[:4]
        kept = curate(scored, out, f'opt_out = ["{entry}"]')
        left = {clip.id: clip.scores for clip in kept}
        gone = {"film-0.mp4#00000", "a copy#00000"}
        assert left == {c.id: c.scores for c in scored if c.id not in gone}
        why = {id: line["why"] for id, line in decisions(out).items() if line["why"]}
        assert {*why} == gone and all({*of} == {"opt_out"} for of in why.values())


def test_clips_that_were_scored_by_another_version_are_scored_again(
    given, tmp_path, monkeypatch
):
    scored = curate(given, tmp_path / "scored", 'stages = ["motion"]')
    run, calls = stages.run, []
    monkeypatch.setattr(stages, "run", lambda *a: calls.append(1) or run(*a))
    curate(scored, tmp_path / "same", 'stages = ["motion"]')
    assert not calls
    curate(scored, tmp_path / "more", 'stages = ["motion", "brightness"]')
    assert len(calls) == 12
    monkeypatch.setattr(stages.STAGES["motion"], "VERSION", 2)
    curate(scored, tmp_path / "newer", 'stages = ["motion"]')
    assert len(calls) == 24


def test_consent_keeps_what_is_named(given, tmp_path):
    kept = curate(given, tmp_path / "out", 'consent = ["source:https://a.example"]')
    assert [clip.id for clip in kept] == ["named#00000"]


def test_copies_are_found_across_folders(tmp_path):
    films = [toy(k) for k in range(3)]
    one = [record(f"one#{k}", films[k]) for k in range(3)]
    # A window that looks like another of its own video is no copy.
    one = write(tmp_path / "one", [*one, record("one#3", shifted(films[0], 9))])
    soft = ndimage.gaussian_filter(shifted(films[1], 20), (0, 0.5, 0.5, 0))
    two = write(tmp_path / "two", [record("a two#0", soft)])
    kept = curate((one, two), tmp_path / "out", "[duplicates]")
    assert [clip.id for clip in kept] == [f"one#{k}" for k in range(4)]
    with pytest.raises(shards.ShardsError, match="has a clip 'one#0', as a folder"):
        source((one, one), tmp_path / "twice")
    other = write(tmp_path / "test", [record("t#0", films[0])], split="test")
    with pytest.raises(shards.ShardsError, match="different splits"):
        source((one, other), tmp_path / "splits")


def test_a_damaged_clip_is_left_out_whatever_the_policy(tmp_path):
    clips = [record(f"c#{k}", toy(k)) for k in range(3)]
    clips[1] = record("c#1", toy(1)[:5])
    object.__setattr__(clips[1], "num_frames", 9)  # it says more than it has
    given = write(tmp_path / "in", clips)
    kept = curate(given, tmp_path / "out", "filter = false")
    assert [clip.id for clip in kept] == ["c#0", "c#2"]
    assert "frames, not" in decisions(tmp_path / "out")["c#1"]["why"]["damaged"]


def test_another_policy_or_input_is_refused(given, tmp_path):
    out = tmp_path / "out"
    curate(given, out, 'stages = ["motion"]')
    with pytest.raises(shards.ShardsError, match="policy.duplicates: was None, is 0.2"):
        curate(given, out, 'stages = ["motion"]\n[duplicates]')
    fewer = write(tmp_path / "fewer", clips()[:2])
    with pytest.raises(shards.ShardsError, match="inputs: was"):
        curate(fewer, out, 'stages = ["motion"]')
    with pytest.raises(shards.ShardsError, match="nothing usable .*below 1000"):
        curate(given, tmp_path / "none", "[limits]\nbrightness = {min = 1000}")
    # The same folder takes the policy that is mended.
    assert len(curate(given, tmp_path / "none", 'stages = ["motion"]')) == 12


def test_the_page_shows_both_sides(given, tmp_path):
    made = source(given, tmp_path / "out")
    shards.write(made.out, made)
    lines = curation_page.write(tmp_path / "page.html", made)
    assert lines[0] == "curation: 6 of 12 clips kept"
    assert "     2 against duplicates, 2 of them by it alone; 6 left" in lines
    text = (tmp_path / "page.html").read_text()
    for said in (
        "Against limits.motion",
        "a copy#00000: it is a copy of film-0.mp4#00000",
        "film-0.mp4#00000, the original",
        "opt_out: source:https://b.example names no clip",
        "kept (6)",
        "refused (6)",
    ):
        assert said in text
    # Six kept, one for each of six refusals, and the originals of two copies.
    assert text.count("<video") == 6 + 6 + 2


run = conftest.run_with_flags
refusal = conftest.refusal


def test_the_command(given, tmp_path, capsys):
    file, out = tmp_path / "policy.toml", tmp_path / "out"
    file.write_text(POLICY)
    asked = {"source": f"shards:{given.folder}", "curate": file, "workers": 0}
    run(prepare, **asked, out=out)
    said = capsys.readouterr().out
    assert "curation: 6 of 12 clips kept" in said
    assert "skipped still#00000: motion is 0, below 0.01" in said
    assert (out / "curation.html").exists() and len(shards.open(out)) == 6
    refused = refusal(prepare, **asked, out=out, vae="runs/vae")
    assert "--vae has no meaning for --source shards with --curate" in refused
    inside = refusal(prepare, **asked, out=given.folder / "out")
    assert "lies inside" in inside
    file.write_text("limit = 1")
    refused = refusal(prepare, **asked, out=tmp_path / "other")
    assert "limit is unknown; did you mean limits?" in refused
    toy_world = {"source": "toyworld:tw16", "out": out, "curate": file}
    assert "--curate has no meaning" in refusal(prepare, **toy_world)


def test_files_of_the_output_hold_enough_clips(tmp_path, monkeypatch):
    monkeypatch.setattr(curated, "_KEPT_PER_FILE", 5)
    films = [record(f"f#{k}", toy(k)) for k in range(14)]
    given = write(tmp_path / "in", films, per_part=2)
    kept = curate(given, tmp_path / "out", 'stages = ["brightness"]')
    assert [file["count"] for file in kept.manifest["files"]] == [6, 6, 2]
    assert [clip.id for clip in kept] == [clip.id for clip in films]
