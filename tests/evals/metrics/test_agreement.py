"""Agreement with captions: transformers' numbers, and what shuffled captions get."""

import json
import pathlib
import subprocess
import types

import numpy as np
import pytest
import safetensors.numpy

from sora_jax.data import clip_tokenizer
from sora_jax.evals.features import resize
from sora_jax.evals.metrics import agreement
from sora_jax.evals.videos import clip_files, clip_measures
from tests.data import test_clip_tokenizer

ORACLE = pathlib.Path(__file__).resolve().parents[2] / "oracle" / "clip_agreement.py"
TEXTS = ["a red circle", "Crème brûlée 🐕", "the blue square moves right " * 20]


@pytest.mark.peers
def test_scores_are_those_of_transformers(peers_python, tmp_path):
    """From files and captions to 100 times the cosine, one text being cut."""
    folder, videos = tmp_path / "clip", tmp_path / "videos"
    test_clip_tokenizer.write_clip(folder)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 5, 28, 28, 3), np.uint8)
    videos.mkdir()
    for number, (clip, text) in enumerate(zip(frames, TEXTS, strict=True)):
        np.save(videos / f"{number}.npy", clip)
        (videos / f"{number}.txt").write_text(text)
    np.save(videos / "silent.npy", frames[0])
    safetensors.numpy.save_file({"frames": frames}, tmp_path / "frames")
    (tmp_path / "texts").write_text(json.dumps([text.strip() for text in TEXTS]))
    paths = (folder, tmp_path / "frames", tmp_path / "texts", tmp_path / "out")
    subprocess.run(list(map(str, [peers_python, ORACLE, *paths])), check=True)
    wanted_nn = np.array(json.loads((tmp_path / "out").read_text()))
    clip = agreement.Agreement(folder)
    names = [source.name for source in clip_files.find(videos).sources]
    captions = agreement.read_captions(videos, names)
    found = clip_measures.measure(
        clip_files.find(videos), clip_measures.Settings(), captions=captions, clip=clip
    )
    own = found.values(clip_measures.AGREES)
    np.testing.assert_allclose(own, np.diagonal(wanted_nn), atol=2e-4)
    others = (wanted_nn.sum(1) - np.diagonal(wanted_nn)) / 2
    np.testing.assert_allclose(found.values(clip_measures.OTHERS), others, atol=2e-4)
    above = np.diagonal(wanted_nn) - others
    np.testing.assert_allclose(found.values(clip_measures.ABOVE), above, atol=2e-4)
    assert clip.too_long(TEXTS) == 1
    assert found.clips[3].values.get(clip_measures.AGREES) is None
    assert 0 <= found.clips[3].values[clip_measures.FRAMES_ALIKE] <= 1
    silent = "1 of 4 clips have no caption and are left out of the means of agreement: silent.npy"
    assert silent in found.notes
    settings = clip_measures.Settings().to_json(clip)
    assert settings["clip"]["tokenizer"] == clip.tokenizer.digest
    assert settings["clip"]["weights"] == clip.network.sha256
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab["more"] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(agreement.WrongWeights, match="the tokenizer has .* ids and"):
        agreement.Agreement(folder)
    (folder / "vocab.json").unlink()
    with pytest.raises(FileNotFoundError, match="nor vocab.json with merges.txt"):
        agreement.Agreement(folder)


def test_a_large_frame_has_the_size_of_the_network():
    """As the network's own resize makes it, but for rounding."""
    clip = object.__new__(agreement.Agreement)
    clip.network = types.SimpleNamespace(size=28)
    y, x = np.mgrid[:100, :131]
    frame = np.stack([x, y, 255 - x], -1).astype(np.uint8)
    for one in (frame, frame.swapaxes(0, 1)):
        wanted = resize.resize(np.float32(one)[None, None], 28, "bicubic, cropped")
        found = clip.fit(one)
        assert found.shape == (28, 28, 3)
        np.testing.assert_allclose(found, wanted[0, 0], atol=1)
    assert clip.fit(frame[:20]).shape == (20, 131, 3)


class Words:
    """A network for which a text points to the axis that its first word names."""

    class text_config:
        length = 5

    def texts(self, ids_bl):
        return np.eye(3)[ids_bl[:, 1] % 3] * 7


def words_of(tmp_path):
    test_clip_tokenizer.write_clip(tmp_path)
    found = object.__new__(agreement.Agreement)
    found.network = Words()
    found.tokenizer = clip_tokenizer.ClipTokenizer(tmp_path)
    return found


def test_the_control_is_what_other_captions_get(tmp_path):
    clip = words_of(tmp_path)
    texts = ["cat", "cat", "it", "a photo"]
    axes = clip.tokenizer.encode(texts, 5)[:, 1] % 3
    frames_nd = np.full((4, 3), 0.2)
    frames_nd[np.arange(4), axes] = 0.9
    own, others = clip.compare(frames_nd, texts)
    np.testing.assert_allclose(own, 90)
    for row, text in enumerate(texts):
        expected = [
            100 * frames_nd[row, axes[k]] for k in range(4) if texts[k] != text
        ]  # the same words are not another caption
        np.testing.assert_allclose(others[row], np.mean(expected))
    assert clip.compare(frames_nd[:2], texts[:2])[1] == [None, None]
    assert clip.compare(frames_nd[:0], []) == ([], [])


def test_captions_are_found_as_in_prepare(tmp_path):
    names = ["a.mp4", "b.npy", "c", "d/e.mp4", "f.mp4", "g.mp4"]
    (tmp_path / "d").mkdir()
    (tmp_path / "a.json").write_text('{"prompt": "a recipe", "seed": 3}')
    (tmp_path / "b.txt").write_text("beside\n")
    (tmp_path / "d" / "e.json").write_text('{"medium": "two", "short": "one"}')
    (tmp_path / "f.json").write_text("{")
    rows = [{"file": "c", "caption": "of frames"}, {"file": "gone.mp4", "text": "x"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = agreement.read_captions(tmp_path, names)
    assert found.texts == {
        "a.mp4": "a recipe", "b.npy": "beside", "c": "of frames", "d/e.mp4": "one",
    }  # fmt: skip
    # A file of many clips gives none of them its caption; a folder keeps its whole name.
    (tmp_path / "run.txt").write_text("not of run.v1")
    (tmp_path / "run.v2.txt").write_text("of run.v2")
    names += ["b.npy[0]", "run.npz/arr_0", "run.npz/arr_1[2]", "run.v1", "run.v2"]
    more = agreement.read_captions(tmp_path, names)
    assert more.texts == found.texts | {"run.v2": "of run.v2"}
    assert len(found.failures) == 2
    assert "'gone.mp4' is not a video of the folder" in found.failures[0]
    assert found.failures[1].startswith("f.json: ")
