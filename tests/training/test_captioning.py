"""What the captioner learns, from shards to captions, and its files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import toy_captioner, toy_upsampler
from sora_jax.core import digests
from sora_jax.core import mesh as meshes
from sora_jax.data import shards, toy_clips, transforms
from sora_jax.generation import prompt_upsampler
from sora_jax.models import captioner
from sora_jax.toyworld import captions
from sora_jax.training import captioning, jobs, loop, optim, trained_captioner

SIZES = {
    "num_frames": 5, "size": 16, "frame_dim": 16, "dim": 48, "num_layers": 1,
    "decoder_layers": 1, "num_heads": 3, "mlp_dim": 64, "length": 64,
}  # fmt: skip
CLIPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("captioning")
    shards.write(path / "shards", toy_clips.ToyClips("tw16", CLIPS))
    return path


def config(folder, **changes):
    c = toy_captioner.get_config()
    c.data.shards, c.data.batch_size, c.data.mirror = str(folder / "shards"), CLIPS, 0.0
    c.data.shift, c.data.noise, c.text.dropout, c.text.shuffle = 0, 0.0, 0.0, 0.0
    c.text.vocab_size = 400
    c.text.tiers.short = c.text.tiers.medium = 0.5
    c.model.captioner.tiers = ("short", "medium", "dense", "structured")
    c.text.tiers.dense = c.text.tiers.structured = 0.0
    c.model.captioner.update(SIZES)
    c.optim.learning_rate, c.optim.muon_learning_rate = 6e-3, 0.02
    c.optim.ema_decay, c.loop.num_steps, c.loop.log_every = 0.9, 220, 20
    for name, value in changes.items():
        c[name] = value
    return c


@pytest.fixture(scope="module")
def mesh():
    return meshes.make_mesh(devices=jax.devices()[:1])


def train(job, c, out, mesh):
    """Runs a job to its end."""
    state = loop.train(
        loop.Config(num_steps=c.loop.num_steps, log_every=c.loop.log_every),
        optim.Config(**{**c.optim.to_dict(), "learning_rate_factors": ()}),
        job.objective,
        job.batches,
        seed=0,
        folder=out,
        mesh=mesh,
    )
    job.finish(state.ema)


@pytest.fixture(scope="module")
def trained(folder, mesh):
    """A captioner that has learned eight clips by heart, and its metrics."""
    c, out = config(folder), folder / "run"
    with jax.set_mesh(mesh):
        job = jobs.captioner(c, out, mesh)
        train(job, c, out, mesh)
    return out


def test_it_writes_the_captions_that_it_has_seen(folder, trained):
    clips, loaded = shards.open(folder / "shards"), trained_captioner.load(trained)
    records = [clips[i] for i in range(CLIPS)]
    videos = [record.frames() for record in records]
    for tier in ("short", "medium"):
        wanted = [record.captions[tier] for record in records]
        found = [text for text, _ in loaded.write(videos, tier, batch_size=4)]
        assert found == wanted
        best = [text for text, _ in loaded.write(videos, tier, beams=3, batch_size=8)]
        assert best == wanted
    drawn = loaded.write(videos, "short", temperature=1.0, seed=1, batch_size=8)
    wanted = [record.captions["short"] for record in records]
    assert np.mean([text for text, _ in drawn] == np.array(wanted)) > 0.5
    assert max(nats for _, nats in drawn) < 0
    alone = loaded.write(videos[5:6], "short", temperature=1.0, seed=1, batch_size=8)
    assert alone[0][0] == drawn[5][0]
    other = loaded.write(videos, "short", temperature=3.0, seed=2, batch_size=8)
    again = loaded.write(videos, "short", temperature=3.0, seed=3, batch_size=8)
    assert [text for text, _ in other] != [text for text, _ in again]
    with pytest.raises(ValueError, match="writes short, medium, dense, structured, no"):
        loaded.write(videos, "alt")


def test_untrained_it_writes_nothing_of_the_kind(folder, trained):
    loaded = trained_captioner.load(trained)
    networks = trained_captioner.networks_of(loaded.config)
    random = jax.jit(networks.init)(jax.random.key(3))
    other = trained_captioner.LoadedCaptioner(
        loaded.config, random["captioner"], loaded.tokenizer, loaded.file, ""
    )
    video = shards.open(folder / "shards")[0].frames()
    ((text, _),) = other.write([video], "short", batch_size=4)
    assert captions.parse(text) == captions.parse("")


def test_a_run_begins_with_the_weights_of_another(folder, trained, mesh):
    c = config(folder, init=str(trained))
    with jax.set_mesh(mesh):
        job = jobs.captioner(c, folder / "second", mesh)
        loaded = trained_captioner.load(trained)
        jax.tree.map(
            np.testing.assert_array_equal, job.initial()["captioner"], loaded.params
        )
        copied = (folder / "second" / "tokenizer.model").read_bytes()
        assert copied == (trained / "tokenizer.model").read_bytes()
        c.model.captioner.mlp_dim = 32
        with pytest.raises(ValueError, match="differs from the config's: mlp_dim"):
            jobs.captioner(c, folder / "third", mesh)


def test_tiers_that_it_cannot_write_are_refused(folder, mesh):
    c = config(folder)
    c.text.tiers.alt = 0.1
    with pytest.raises(ValueError, match=r"gives weight to \['alt'\], which"):
        jobs.captioner(c, folder / "alt", mesh)


def test_an_upsampler_rewrites_the_prompts_that_it_has_seen(folder, mesh):
    c, out = toy_upsampler.get_config(), folder / "upsampler"
    c.data.shards, c.data.batch_size = str(folder / "shards"), CLIPS
    c.text.vocab_size, c.loop.num_steps = 400, 150
    c.text.tiers.short = 0.0  # of which several clips have the same
    c.text.dropout = 0.0
    c.model.captioner.update({"dim": 48, "mlp_dim": 64, "num_layers": 1})
    c.model.captioner.decoder_layers, c.optim.ema_decay = 1, 0.9
    c.model.captioner.tiers = ("medium", "structured")
    with jax.set_mesh(mesh):
        job = jobs.upsampler(c, out, mesh)
        train(job, c, out, mesh)
        with pytest.raises(ValueError, match="trains one that reads 'video'"):
            jobs.captioner(c, folder / "reads", mesh)
    clips = [shards.open(folder / "shards")[i].captions for i in range(CLIPS)]
    for tier in ("medium", "structured"):
        network = prompt_upsampler.Network(out, tier)
        with jax.set_mesh(mesh):  # as generate does; the network takes one device
            made = network([clip["medium"] for clip in clips], [0] * CLIPS)
        assert [m.text for m in made] == [clip[tier] for clip in clips]
        assert [m.original for m in made] == [clip["medium"] for clip in clips]
        assert network.id.startswith("network-") and made[0].upsampler == network.id
    with pytest.raises(ValueError, match="writes medium, structured, not 'dense'"):
        prompt_upsampler.Network(out, "dense")
    with pytest.raises(ValueError, match="tokens; the upsampler reads 32"):
        network(["a red circle " * 20], [0])
    with pytest.raises(ValueError, match="reads text, not video"):
        trained_captioner.load(out)


def test_an_upsampler_is_no_captioner(folder, trained):
    with pytest.raises(ValueError, match="reads video, not text"):
        prompt_upsampler.Network(trained)


def test_a_damaged_file_is_named(trained):
    file = trained / "captioner" / "weights.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(digests.Damaged, match="weights.safetensors"):
        trained_captioner.load(trained)
    file.write_bytes(whole)


def test_the_loss_is_that_of_real_tokens_of_clips_with_a_caption():
    sizes = SIZES | {"tiers": ("short", "dense"), "vocab_size": 11, "length": 6}
    small = captioner.Config(**sizes)
    objective = captioning.Captioning(small)
    params = jax.jit(objective.networks.init)(jax.random.key(0))
    key = jax.random.key(1)
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(key, x.shape), params)
    modules = objective.networks.bind(params)
    rng = np.random.default_rng(0)
    batch = {
        "video": rng.integers(0, 256, (3, 5, 16, 16, 3)).astype(np.uint8),
        "text_ids": np.array(
            [[3, 4, 1, 0, 0, 0], [5, 1, 0, 0, 0, 0], [9, 9, 9, 9, 9, 1]]
        ),
        "tier": np.array([0, 1, -1], np.int32),
    }
    batch = objective.draw(jax.random.key(2), batch, None)
    assert not batch["hidden"].any()
    total, tokens, metrics = jax.jit(objective.loss)(modules, batch)
    video = jnp.asarray(batch["video"]) / 127.5 - 1
    logits = jax.jit(lambda m, *given: m(*given))(
        modules["captioner"], video, jnp.array([0, 1, 0]), batch["text_ids"]
    )
    nats = -np.asarray(jax.nn.log_softmax(logits))
    short = sum(nats[0, i, [3, 4, 1][i]] for i in range(3))
    dense = sum(nats[1, i, [5, 1][i]] for i in range(2))
    assert float(tokens) == 5
    assert float(total) == pytest.approx(short + dense, rel=1e-5)
    sums, weights = metrics["loss_tier"]
    np.testing.assert_allclose(sums, [short, dense], rtol=1e-5)
    np.testing.assert_array_equal(weights, [3, 2])


def test_clips_are_resampled_and_mirrored_with_their_captions(folder):
    clips = shards.open(folder / "shards")
    record = clips[0]

    class Sampler:
        def pick(self, captions, random):
            return "it moves left", "short"

    class Tokenizer:
        texts: list[str] = []

        def encode(self, texts, length):
            self.texts += texts
            return np.ones((1, length), np.int32), np.ones((1, length), bool)

    tokenizer = Tokenizer()
    whole = (5, 16, 16)
    example = transforms.CaptionedClips(
        Sampler(), tokenizer, 6, whole, ("dense", "short"), mirror=1.0
    )
    found = example(record, np.random.default_rng(0))
    np.testing.assert_array_equal(found["video"], record.frames()[:, :, ::-1])
    assert tokenizer.texts == ["it moves right"] and found["tier"] == 1
    plain = transforms.CaptionedClips(Sampler(), tokenizer, 6, whole, ("dense",))
    found = plain(record, np.random.default_rng(0))
    np.testing.assert_array_equal(found["video"], record.frames())
    assert tokenizer.texts[-1] == "it moves left" and found["tier"] == -1


def test_frames_are_shifted_alike_and_noise_has_its_deviation(folder):
    record = shards.open(folder / "shards")[0]
    frames = record.frames()

    class Sampler:
        def pick(self, captions, random):
            return "a dot", "short"

    class Tokenizer:
        def encode(self, texts, length):
            return np.ones((1, length), np.int32), np.ones((1, length), bool)

    def made(seed, **options):
        sizes = 6, frames.shape[:3], ("short",)
        change = transforms.CaptionedClips(Sampler(), Tokenizer(), *sizes, **options)
        return change(record, np.random.default_rng(seed))["video"]

    ways = set()
    for seed in range(60):
        video = made(seed, shift=1)
        for dy, dx in np.ndindex(3, 3):
            at = np.clip(np.arange(16) + dy - 1, 0, 15)
            across = np.clip(np.arange(16) + dx - 1, 0, 15)
            if np.array_equal(video, frames[:, at][:, :, across]):
                ways.add((dy, dx))
                break
        else:
            raise AssertionError("no shift gives this video")
    assert len(ways) == 9
    error = made(0, noise=5.0).astype(float) - frames
    assert 4.8 < error.std() < 5.2 and abs(error.mean()) < 0.2


def test_hidden_tokens_are_not_read():
    sizes = SIZES | {"tiers": ("short", "dense"), "vocab_size": 11, "length": 6}
    objective = captioning.Captioning(captioner.Config(**sizes), dropout=0.5)
    params = jax.jit(objective.networks.init)(jax.random.key(0))
    key = jax.random.key(1)
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(key, x.shape), params)
    ids = np.random.default_rng(0).integers(2, 11, (64, 6)).astype(np.int32)
    hidden = np.asarray(objective.draw(key, {"text_ids": ids}, None)["hidden"])
    assert 0.4 < hidden.mean() < 0.6
    module = objective.networks.bind(params)["captioner"]
    video, tier = jnp.zeros((64, 5, 16, 16, 3)), jnp.zeros(64, jnp.int32)
    call = jax.jit(lambda ids: module(video, tier, ids, hidden))
    other = np.where(hidden, 11 - 1 - (ids - 2), ids)
    np.testing.assert_array_equal(call(ids), call(other))
    shown = np.where(hidden, ids, 11 - 1 - (ids - 2))
    assert np.abs(call(ids) - call(shown)).max() > 0.01


def test_resampling_averages_repeats_and_keeps_the_ends():
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (9, 8, 8, 3)).astype(np.uint8)
    half = transforms.resampled(video, (5, 4, 4))
    wanted = video[::2].reshape(5, 4, 2, 4, 2, 3).mean((2, 4))
    np.testing.assert_allclose(half, wanted, atol=1)  # Pillow rounds twice
    double = transforms.resampled(video, (9, 16, 16))
    np.testing.assert_array_equal(double, video.repeat(2, 1).repeat(2, 2))
    more = transforms.resampled(video[:2], (4, 8, 8))
    np.testing.assert_array_equal(more, video[[0, 0, 1, 1]])
