"""Storyboards on random weights: what each shot is made of, and what stays when one changes."""

import dataclasses
import json
import re

import numpy as np
import PIL.Image
import pytest

from sora_jax.data import video_io
from sora_jax.generation import pipeline, recipes, storyboard
from tests.generation import tiny
from tests.generation.test_tasks import EVERYTHING, film

FIVE = """\
prompt: at night
size: 16x16
fps: 6
seed: 7
guidance_scale: 2
cast:
  hero: hero.png
  ball: {shot: 1, frame: 2}
shots:
  - {prompt: a cat, frames: 7}
  - {prompt: a dog, frames: 3, continues: true}
  - {prompt: a dog, seconds: 1, cast: [ball, hero]}
  - {prompt: a cow, frames: 9, pictures: {0: hero.png, 8: last.png}, seed: 3}
  - video: clip.mp4
"""


@pytest.fixture(scope="module")
def pipe():
    settings = dataclasses.replace(
        tiny.SETTINGS, trained_patterns=EVERYTHING, batch_size=1
    )
    return pipeline.Pipeline(
        **tiny.networks(), tokenizer=tiny.Letters(), settings=settings
    )


@pytest.fixture
def folder(tmp_path):
    frames = film(11, seed=4)
    PIL.Image.fromarray(frames[0]).save(tmp_path / "hero.png")
    PIL.Image.fromarray(frames[1]).save(tmp_path / "last.png")
    (tmp_path / "clip.mp4").write_bytes(video_io.encode_lossless(frames, 6.0))
    return tmp_path


def board_of(folder, text=FIVE, name="board.yaml"):
    (folder / name).write_text(text)
    return storyboard.read(folder / name)


def made(pipe, folder, text=FIVE, overwrite=True):
    steps, board = [], board_of(folder, text)
    maker = storyboard.Maker(pipe, board, folder / "shots", overwrite)
    shots = [*maker.shots(steps.append)]
    frames = [maker.frames_of(number + 1) for number in range(len(shots))]
    return maker, shots, frames, sum(steps)


def write(path, shots, maker):
    recipe = storyboard.film_recipe(shots, maker.board, maker.fps)
    storyboard.write(path, shots, recipe, maker.fps)
    return recipe


def as_bytes(output):
    return np.round(255 * output.frames[0]).astype(np.uint8)


def test_each_shot_is_what_its_task_gives(pipe, folder):
    maker, shots, frames, steps = made(pipe, folder)
    assert [shot.frames for shot in shots] == [7, 3, 6, 9, 11]
    assert all(shot.is_new for shot in shots)
    call = {"height": 16, "width": 16, "fps": 6.0, "guidance_scale": 2.0}
    hero, last = film(11, seed=4)[:2]
    first = as_bytes(pipe("a cat, at night", seed=7, num_frames=9, **call))
    np.testing.assert_array_equal(frames[0], first[:7])
    second = pipe.run(
        "extend", "a dog, at night", video=frames[0], frames=3, seed=8, **call
    )
    np.testing.assert_array_equal(frames[1], as_bytes(second)[7:])
    third = pipe.run(
        "reference", "a dog, at night", references=[first[2], hero], seed=9,
        num_frames=9, **call,
    )  # fmt: skip
    np.testing.assert_array_equal(frames[2], as_bytes(third)[:6])
    fourth = pipe.run(
        "keyframes", "a cow, at night", images=[hero, last], at=[0, 8], seed=3,
        num_frames=9, **call,
    )  # fmt: skip
    np.testing.assert_array_equal(frames[3], as_bytes(fourth))
    np.testing.assert_array_equal(frames[4], film(11, seed=4))
    assert steps == sum(maker.steps) > 0


@pytest.mark.parametrize(
    ("old", "new", "again"),
    [
        ("a cow,", "a cow or two,", [4]),
        ("{prompt: a dog, frames: 3", "{seed: 1, prompt: a dog, frames: 3", [2]),
        # What shows the ball of shot 1, and what goes on from it.
        ("frames: 7}", "frames: 7, seed: 99}", [1, 2, 3]),
        ("seed: 3", "seed: 4", [4]),
        ("at night", "at noon", [1, 2, 3, 4]),
        ("a dog, frames: 3", "a dog, frames: 4", [2]),
        ("a cat", "a cat", []),
        # What a shot no longer has.
        (", cast: [ball, hero]", "", [3]),
        (", pictures: {0: hero.png, 8: last.png}", "", [4]),
    ],
)
def test_only_what_changes_is_made_again(pipe, folder, old, new, again):
    maker, shots, *_ = made(pipe, folder)
    write(folder / "film.mp4", shots, maker)
    before = video_io.decode(folder / "film.mp4").frames
    files = {shot.file: shot.file.read_bytes() for shot in shots}
    times = {shot.file: shot.file.stat().st_mtime_ns for shot in shots}
    maker, shots, frames, steps = made(pipe, folder, FIVE.replace(old, new, 1))
    assert [k for k, shot in enumerate(shots, 1) if shot.is_new] == again
    assert bool(steps) == bool(again)
    for number, shot in enumerate(shots, 1):
        if number not in again:
            assert shot.file.read_bytes() == files[shot.file]
            assert shot.file.stat().st_mtime_ns == times[shot.file]
    recipe = write(folder / "film.mp4", shots, maker)
    after = video_io.decode(folder / "film.mp4").frames
    old_starts = np.cumsum([0, 7, 3, 6, 9, 11])
    for number, entry in enumerate(recipe["shots"]):
        if number + 1 not in again:  # also in the file that joins them
            here = slice(entry["first_frame"], entry["first_frame"] + entry["frames"])
            there = slice(old_starts[number], old_starts[number + 1])
            np.testing.assert_array_equal(after[here], before[there])


def test_the_film_is_its_shots_and_says_where_they_begin(pipe, folder):
    maker, shots, frames, _ = made(pipe, folder)
    recipe = write(folder / "film.mp4", shots, maker)
    film_of = video_io.decode(folder / "film.mp4")
    assert film_of.fps == 6 and len(film_of.frames) == 7 + 3 + 6 + 9 + 11
    alone = [video_io.decode(video_io.encode_mp4(shot, 6.0)).frames for shot in frames]
    np.testing.assert_array_equal(film_of.frames, np.concatenate(alone))
    assert [shot["first_frame"] for shot in recipe["shots"]] == [0, 7, 10, 16, 25]
    assert [shot["cut"] for shot in recipe["shots"]] == [True, False, True, True, True]
    stored = json.loads((folder / "film.json").read_text())
    assert json.loads(video_io.read_comment(folder / "film.mp4")) == recipe
    assert stored.pop("video_sha256") and stored == recipe
    assert stored["shots"][3]["recipe"]["task"] == "keyframes"


def test_json_is_read_as_well(folder):
    board = {
        "size": "16x16",
        "fps": 6.0,
        "shots": [{"prompt": "a cat", "seconds": 0.5}, {"video": "clip.mp4"}],
    }
    found = board_of(folder, json.dumps(board, indent=1), "board.json")
    assert [shot.frames for shot in found.shots] == [3, 0]
    assert found.shots[1].video == folder / "clip.mp4"
    assert (found.height, found.width, found.fps) == (16, 16, 6.0)


def test_a_shot_that_was_damaged_is_made_again(pipe, folder):
    _, shots, frames, _ = made(pipe, folder)
    shots[3].file.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="004.mp4 was changed .* add --overwrite"):
        made(pipe, folder, overwrite=False)
    _, shots, again, _ = made(pipe, folder)
    assert [shot.is_new for shot in shots] == [False, False, False, True, False]
    np.testing.assert_array_equal(again[3], frames[3])


SHOT = "shots:\n  - "


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 1, "it is empty: give shots"),
        ("size: 16x16\n", 1, "it has no shots: give shots, a list"),
        ("shots: []\n", 1, "there are 0 shots; a storyboard has 1 to 1000"),
        ("a\n", 1, "a storyboard is keys with values, such as a: b"),
        ("shots:\n  - a: [\n", 3, "it is not YAML: "),
        ("fps: 8\nfps: 9\n" + SHOT + "{}", 2, "a storyboard has 'fps' twice"),
        ("fps: fast\n" + SHOT + "{}", 1, "fps is a number, not 'fast'"),
        ("fps: .nan\n" + SHOT + "{}", 1, "fps is a number, not '.nan'"),
        ("fps: 0\n" + SHOT + "{}", 1, "fps is from 0.01 to 1000, not 0"),
        ("size: big\n" + SHOT + "{}", 1, "size is WIDTHxHEIGHT, such as 832x480"),
        ("seed: -1\n" + SHOT + "{}", 1, "seed is from 0 to 18446744073709551615, not -1"),
        ("seed: true\n" + SHOT + "{}", 1, "seed is a whole number, not 'true'"),
        (SHOT + "a cat", 2, "shot 1 is keys with values, such as a: b"),
        (SHOT + "{}", 2, "shot 1 has no prompt"),
        (SHOT + "{prompt: a}", 2, "shot 1 needs its length: frames, or seconds"),
        (SHOT + "{prompt: a, frames: 5, seconds: 1}", 2, "shot 1 needs its length: "),
        (SHOT + "{prompt: a, frames: 0}", 2, "frames is from 1 to 1000000000, not 0"),
        (SHOT + "{prompt: a, frames: 2.5}", 2, "frames is a whole number, not '2.5'"),
        (SHOT + "{prompt: a, seconds: 1}", 2, "has seconds, so the storyboard needs fps"),
        ("fps: 8\n" + SHOT + "{prompt: a, seconds: -1}", 3, "seconds is -1, which is no "),
        (SHOT + "{prompt: , frames: 5}", 2, "prompt is text"),
        (SHOT + "{prompt: a, frames: 5, colour: red}", 2, "shot 1 has no 'colour'; there"),
        (SHOT + "{prompt: a, frames: 5, continues: 1}", 2, "continues is true or false"),
        (SHOT + "{prompt: a, frames: 5, continues: true}", 2, "there is none"),
        (SHOT + "{video: clip.mp4, prompt: a}", 2, "taken as it is: give nothing else"),
        (SHOT + "{prompt: a, frames: 5, cast: hero}", 2, "cast is a list"),
        (SHOT + "{prompt: a, frames: 5, cast: [x]}", 2, "'x' is not in the cast; there is"),
        ("cast: {x: {frame: 1}}\n" + SHOT + "{}", 1, "cast 'x' is a picture, or {shot: 1"),
        ("cast: {x: {shot: 2}}\n" + SHOT + "{prompt: a, frames: 5}", 1, "of shot 2; there"),
        ("cast:\n  x: {shot: 1}\n" + SHOT + "{prompt: a, frames: 5, cast: [x]}", 4,
         "'x' is of shot 1, which is not before this one"),
        (SHOT + "{prompt: a, frames: 5, pictures: {5: hero.png}}", 2, "has frames 0 to 4"),
        (SHOT + "{prompt: a, frames: 5, pictures: {-1: a.png}}", 2, "has frames 0 to 4"),
        (SHOT + "{prompt: a, frames: 5, pictures: {}}", 2, "has no pictures in pictures"),
        ("cast: {x: a.png}\n" + SHOT + "{prompt: a, frames: 5, cast: [x], continues: true}",
         3, "shot 1 has cast and continues: give one of them"),
        (SHOT + "{prompt: a, frames: 5, guidance_scale: high}", 2, "guidance_scale is a "),
        ("fps: " + "9" * 400 + "\n" + SHOT + "{}", 1, "fps is a number"),
        (SHOT + "{prompt: a, frames: !!int ''}", 2, "frames is a whole number, not ''"),
        (SHOT + "{prompt: a, frames: 5, continues: !!bool maybe}", 2, "true or false, not"),
        (SHOT + "{prompt: a, frames: 0x" + "f" * 5000 + "}", 2, "frames is a whole number"),
        ("size: 123456x16\n" + SHOT + "{}", 1, "size is WIDTHxHEIGHT, such as 832x480"),
        (SHOT + "{? [0] : a}", 2, "a key of shot 1 is a word or a number"),
        (SHOT + "{prompt: a, frames: 5, pictures: {0: a.png, 00: b.png}}", 2,
         "two pictures are at frame 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said_with_its_line(folder, text, line, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        board_of(folder, text)
    said = str(error.value)
    assert (
        said.startswith(f"{folder / 'board.yaml'}, line {line}: ") and "\n" not in said
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{prompt: a, frames: 5, guidance_scale: -1}", "shot 1: guidance_scale"),
        ("{prompt: a, frames: 5, pictures: {0: no.png}}", "shot 1: .*no.png"),
        ("{prompt: a, frames: 5, pictures: {0: clip.mp4}}", "shot 1: .*clip.mp4"),
        ("{video: no.mp4}", "shot 1: .*no.mp4"),
        ("{video: hero.png}", "shot 1: "),
        ("{prompt: ' ', frames: 5}", "shot 1: .*prompt"),
    ],
)
def test_what_a_model_cannot_make_is_said_before_anything_is_made(
    pipe, folder, text, message
):
    board = board_of(folder, "size: 16x16\nfps: 6\n" + SHOT + text)
    with pytest.raises(ValueError, match=message) as error:
        storyboard.Maker(pipe, board, folder / "shots")
    said = str(error.value)
    assert said.startswith(f"{board.path}, line 4: ") and "\n" not in said
    assert not (folder / "shots").exists()


def test_the_model_the_clip_and_the_cast_must_fit(pipe, folder):
    head = "size: 16x16\n"
    wrong = [
        (head + "fps: 8\n" + SHOT + "video: clip.mp4", 4, "clip.mp4 has 6 frames a second"),
        ("size: 15x16\nfps: 6\n" + SHOT + "{prompt: a, frames: 5}", 1, "needs even ones"),
        (head + "fps: 6\ncast: {x: {shot: 1, frame: 5}}\n" + SHOT
         + "{prompt: a, frames: 5}\n  - {prompt: a, frames: 5, cast: [x]}",
         6, "'x' is frame 5 of shot 1, which has 5 frames"),
    ]  # fmt: skip
    for text, line, message in wrong:
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            storyboard.Maker(pipe, board_of(folder, text), folder / "shots")
        assert f", line {line}: " in str(error.value)
    plain = dataclasses.replace(pipe.settings, trained_patterns=("none",))
    untrained = pipeline.Pipeline(
        **tiny.networks(), tokenizer=tiny.Letters(), settings=plain
    )
    with pytest.raises(ValueError, match="line 11: shot 2: task 'extend' needs"):
        storyboard.Maker(untrained, board_of(folder), folder / "shots")


def test_a_file_that_is_no_text_is_refused(folder):
    (folder / "b.yaml").write_bytes(b"\xff\xfe\x00shots")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        storyboard.read(folder / "b.yaml")
    (folder / "b.yaml").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply|not YAML"):
        storyboard.read(folder / "b.yaml")
    (folder / "b.yaml").write_text("!!python/object:os.system {}")
    with pytest.raises(ValueError, match="line 1"):
        storyboard.read(folder / "b.yaml")


def test_other_files_are_neither_replaced_nor_read_and_written_at_once(pipe, folder):
    (folder / "shots").mkdir()
    (folder / "shots" / "001.mp4").write_bytes(b"mine")
    with pytest.raises(ValueError, match="001.mp4 exists and has no recipe"):
        made(pipe, folder, overwrite=False)
    text = "fps: 6\n" + SHOT + "{prompt: a, frames: 5}\n  - video: shots/001.mp4"
    with pytest.raises(ValueError, match="001.mp4 is an input, and a shot would be"):
        storyboard.Maker(pipe, board_of(folder, text), folder / "shots")
    assert (folder / "shots" / "001.mp4").read_bytes() == b"mine"


def test_what_is_given_is_weighed_for_shots_that_are_given_something(pipe, folder):
    text = "given_scale: 2\nsize: 16x16\nfps: 6\ncast: {x: hero.png}\n"
    text += SHOT + "{prompt: a, frames: 5}\n  - {prompt: a, frames: 5, cast: [x]}"
    plain, shown = board_of(folder, text).shots
    assert "given_scale" not in plain.arguments and shown.arguments["given_scale"] == 2
    storyboard.Maker(pipe, board_of(folder, text), folder / "shots")


def test_json_of_other_writers(folder):
    shots = [{"prompt": "\U0001f600 a", "frames": 5, "guidance_scale": 1e3}]
    text = json.dumps({"shots": shots}, indent="\t").replace("1000.0", "1e3")
    (shot,) = board_of(folder, text, "board.json").shots
    assert shot.prompt == "\U0001f600 a" and shot.arguments["guidance_scale"] == 1000
    for escape in ("UFFFFFFFF", "U00999999"):
        with pytest.raises(ValueError, match="escape of no character"):
            board_of(folder, 'shots: ["\\' + escape + '"]')


def test_recipes_of_shots_are_those_of_their_tasks(pipe, folder):
    _, shots, *_ = made(pipe, folder)
    stored = json.loads(recipes.sidecar_of(shots[2].file).read_text())
    assert stored["task"] == "reference" and stored["seed"] == 9
    assert stored["prompt"] == "a dog, at night" and stored["shot_frames"] == 6
