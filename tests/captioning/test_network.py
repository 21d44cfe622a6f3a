"""The trained captioner as one of the job's captioners."""

import jax
import pytest

from sora_jax.captioning import captioner, network
from sora_jax.data import records, shards, tokenizer, toy_clips
from sora_jax.models import captioner as captioners
from sora_jax.training import trained_captioner
from tests import conftest

JOB = []  # the module of the job


@pytest.fixture(scope="module", autouse=True)
def _job():
    with conftest.lone_job("recaption") as module:
        JOB.append(module)
        yield


def run(**given) -> None:
    conftest.run_with_flags(JOB[-1], **given)


def refusal(**given) -> str:
    return conftest.refusal(JOB[-1], **given)


CONFIG = captioners.Config(
    num_frames=5,
    size=16,
    frame_dim=8,
    dim=16,
    num_layers=1,
    decoder_layers=1,
    num_heads=2,
    mlp_dim=16,
    tiers=("short", "medium"),
    vocab_size=300,
    length=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips, and a captioner of random weights."""
    path = tmp_path_factory.mktemp("network")
    shards.write(path / "clips", toy_clips.ToyClips("tw16", 40))
    texts = shards.open(path / "clips").all_captions(["short", "dense"])
    tokenizer.train(texts, path / "tokenizer.model", 300)
    networks = trained_captioner.networks_of(CONFIG)
    params = jax.jit(networks.init)(jax.random.key(0))["captioner"]
    trained_captioner.save(
        path / "run" / "captioner", params, CONFIG, path / "tokenizer.model"
    )
    return path


def test_each_clip_has_the_answer_that_the_captioner_writes(folder):
    clips = shards.open(folder / "clips")
    batch = [clips[i] for i in range(3)]
    writer = network.Network(str(folder / "run"), ["short"])
    videos = [clip.frames() for clip in batch]
    wanted = trained_captioner.load(folder / "run").write(videos, "short")
    found = writer.caption(batch, "model_short", 0)
    assert [answer.text for answer in found] == [text for text, _ in wanted]
    # Random weights seldom end a caption within eight tokens.
    assert {(answer.text == "", answer.stopped) for answer in found} <= {
        (True, "length"),
        (False, "stop"),
    }
    drawn = [writer.caption(batch, "model_short", seed) for seed in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1]
    broken = records.ClipRecord(
        id="b", video=b"no video", fps=8, num_frames=5, height=16, width=16, captions={}
    )
    mixed = writer.caption([broken, batch[0]], "model_short", 0)
    assert isinstance(mixed[0], captioner.Failure) and mixed[0].lasting
    assert mixed[1] == found[0]


def test_the_job_accounts_for_every_clip(folder, capsys):
    out = folder / "out"
    run(shards=folder / "clips", out=out, captioner="network", model=folder / "run",
        prompts="short", retries=1, max_clips=12)  # fmt: skip
    said = capsys.readouterr().out
    assert "12 model_short by captioner-" in said
    assert "12 clips = " in said and "+ 0 failed" in said
    written = shards.open(out)
    assert len(written) == 12
    first = written[0]
    assert first.captions["short"] == shards.open(folder / "clips")[0].captions["short"]


def test_what_does_not_fit_is_refused(folder):
    given = {"shards": folder / "clips", "out": folder / "no", "captioner": "network"}
    assert "needs --model" in refusal(**given)
    model = {"model": folder / "run"}
    assert "writes short, medium, not dense" in refusal(**given, **model)
    said = refusal(**given, **model, prompts="alt")
    assert "--prompts names ['model_alt']; there are short, dense" in said
    assert "--rate has no meaning with --captioner network" in refusal(
        **given, **model, rate=3
    )
