"""Bytes that are lost or changed on the way: every one is noticed, in one sentence.

The slow test damages a thousand files, one at a time; with `-s` it prints what became of
them.
"""

import collections
import contextlib
import io
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest

from sora_jax.core import config as configs
from sora_jax.core import digests
from sora_jax.data import latent_cache, records, shards, text_cache, tokenizer
from sora_jax.evals.features import networks
from sora_jax.evals.prompts import samples
from sora_jax.generation import cache_calibration
from sora_jax.training import checkpoint, intact, pretrained
from sora_jax.training import state as states
from tests.data import clips, test_latent_cache, test_text_cache
from tests.training import tiny_folder

WEIGHTS = pathlib.Path(networks.__file__).parent / "weights"
LONGEST = 700  # characters of what a user is told


def state(step: int) -> states.TrainState:
    def tree(seed):
        values = np.random.default_rng([step, seed]).normal(size=(64, 32))
        return {"dit": {"w": values.astype(np.float32)}}

    zero = np.zeros((), np.int32)
    now = np.array(step, np.int32)
    return states.TrainState(tree(0), tree(1), (tree(2),), now, zero, zero)


def save(folder, steps, keep=9):
    saver = checkpoint.Checkpointer(folder / "checkpoints", keep=keep)
    for step in steps:
        saver.save(step, state(step), {"seconds": {"step": 0.5}})
    saver.close()


def restore(folder) -> tuple:
    with contextlib.closing(
        checkpoint.Checkpointer(folder / "checkpoints", keep=9)
    ) as saver:
        if saver.latest() is None:
            return "a new run"
        return saver.restore(jax.tree.map(on_device, state(0)))


def on_device(leaf):
    layout = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with one of everything that is stored to be read again."""
    base = tmp_path_factory.mktemp("whole")
    save(base / "run", [1, 2])
    configs.write(base / "run", {"seed": 0, "noise": {"shift": 3.0}})
    texts = test_text_cache.TEXTS
    pieces = tokenizer.train(texts, base / "run" / "tokenizer.model", 320)
    calibration().save(base / "run" / cache_calibration.FILE)
    folder = base / "run" / "text_encoder"
    params = tiny_folder.weights("text_encoder")
    checkpoint.save_weights(folder, params, tiny_folder.TEXT)
    peers = base / "peers"
    pretrained.write_component(peers, "text_encoder", params, tiny_folder.TEXT)
    opened = pretrained.open_component(peers, "text_encoder")
    opened.copy_to(base / "run" / "copied")
    shards.write(base / "shards", clips.Clips(num=8))
    latent_cache.write(
        base / "latents", shards.open(base / "shards"), test_latent_cache.encode,
        batch_size=3, clips_per_file=4, **test_latent_cache.STATED,
    )  # fmt: skip
    text_cache.write(
        base / "states", texts[:8], pieces, test_text_cache.encode, length=24, dim=6,
        dtype="float32", texts_per_file=4,
        settings={"text_encoder": "e", "captions": "c", "tiers": ["alt"]},
    )  # fmt: skip
    shutil.copytree(WEIGHTS, base / "weights")
    samples.Store(base / "parts").get("part", {"seed": 0}, lambda: PART)
    return base


PART = {"motion": np.arange(600, dtype=np.uint8).reshape(2, 5, 4, 5, 3) % 251}


def calibration() -> cache_calibration.Calibration:
    return cache_calibration.Calibration(
        model={"model": "m", "step": 7},
        sampling={"sampler": "euler", "num_inference_steps": 3},
        clips={"clips": 1, "num_frames": 5, "height": 16, "width": 16},
        max_skips=4,
        retention=0.2,
        ratio=(((0.5, 0.6), (0.25, 0.125), (0.3, 0.7)),),
        deviation=(((0.1, 0.1), (0.1, 0.1), (0.1, 0.1)),),
        distance=(((0.2, 0.2), (0.2, 0.2), (0.2, 0.2)),),
    )


def opened(open_cache):
    """All that is read of a cache, and how many of its records are told as damaged."""
    cache = open_cache()
    found = [cache[index] for index in range(len(cache))]
    return cache.manifest, [
        (vars(record), cache.entry(index)) for index, record in enumerate(found)
    ]


def component(folder):
    return pretrained.open_component(folder, "text_encoder").load()


def network(folder):
    made = networks.load(folder, networks.TOY)[0]
    return jax.tree.leaves(networks.nnx.state(made)), made.config


# What is read of each, and where it lies.
READ = {
    "checkpoints, to go on": ("run/checkpoints/2", lambda b: restore(b / "run")),
    "checkpoints, to generate": (
        "run/checkpoints/2/ema",
        lambda b: checkpoint.load_run(b / "run").params,
    ),
    "config": ("run/config.py.txt", lambda b: configs.read(b / "run").to_dict()),
    "tokenizer": ("run/tokenizer.model", lambda b: tokenizer.load(b / "run").digest),
    "calibration": (
        "run/step_cache.json",
        lambda b: vars(cache_calibration.read(b / "run" / cache_calibration.FILE)),
    ),
    "a run's list": (
        "run/digests.sha256",
        lambda b: (
            configs.read(b / "run").to_dict(),
            tokenizer.load(b / "run").digest,
            vars(cache_calibration.read(b / "run" / cache_calibration.FILE)),
        ),
    ),
    "weights": ("run/text_encoder", lambda b: component(b / "run" / "text_encoder")),
    "a peer's, copied": ("run/copied", lambda b: component(b / "run" / "copied")),
    "shards": ("shards", lambda b: opened(lambda: shards.open(b / "shards"))),
    "latents": (
        "latents",
        lambda b: opened(lambda: latent_cache.open(b / "latents")),
    ),
    "text states": (
        "states",
        lambda b: opened(lambda: text_cache.open(b / "states")),
    ),
    "shipped weights": ("weights", lambda b: network(b / "weights")),
    "evaluation's parts": (
        "parts",
        lambda b: samples.Store(b / "parts").find("part", {"seed": 0}),
    ),
}
# Written for others, and not read by us.
NOT_READ = ("report.json", "dataset_info.json", "features.json")


def same(found, wanted) -> bool:
    a, b = jax.tree.flatten(found), jax.tree.flatten(wanted)
    return a[1] == b[1] and all(
        np.array_equal(np.asarray(x), np.asarray(y))
        for x, y in zip(a[0], b[0], strict=True)
    )


def outcome(read, base, wanted, older) -> str:
    """What became of one damage: "noticed", "harmless", or what must not be."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            found = read(base)
        except (ValueError, records.CorruptRecord) as error:
            text = str(error)
            return "noticed" if len(text) < LONGEST else f"too long: {text[:200]}"
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:200]}"
    if "is not used" in said.getvalue():
        if len(said.getvalue()) > LONGEST:
            return f"too long: {said.getvalue()[:200]}"
        return "noticed" if same(found, older) else "another state after a sentence"
    if found is None:  # a part that is made again
        return "noticed"
    return "harmless" if same(found, wanted) else "silent"


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_damaged_byte_is_never_read_in_silence(whole, tmp_path, count):
    draw, counts = random.Random(0), {}
    base = shutil.copytree(whole, tmp_path / "copy")
    names = [*READ] * (count // len(READ) + 1)
    for name in names[:count]:
        place, read = READ[name]
        wanted = read(base)
        files = [base / place]
        if files[0].is_dir():
            files = sorted(p for p in files[0].rglob("*") if p.is_file())
        files = [file for file in files if file.name not in NOT_READ]
        # Half of them where most bytes are, half in any file.
        sizes = [file.stat().st_size for file in files]
        (file,) = draw.choices(files, sizes if draw.random() < 0.5 else None)
        content = bytearray(file.read_bytes())
        at = draw.randrange(len(content))
        if draw.random() < 0.25:
            del content[at:]
        else:
            content[at] ^= 1 << draw.randrange(8)
        good = file.read_bytes()
        file.write_bytes(content)
        older = None
        if "checkpoints" in name:
            # What is read of the older one.
            alone = shutil.copytree(base / "run", tmp_path / "older")
            shutil.rmtree(alone / "checkpoints" / "2")
            shutil.copytree(base / "run", tmp_path / "b" / "run")
            older = _in(tmp_path / "older", read)
            found = outcome(read, tmp_path / "b", wanted, older)
            shutil.rmtree(alone)
            shutil.rmtree(tmp_path / "b")
        else:
            found = outcome(read, base, wanted, older)
        file.write_bytes(good)
        counted = counts.setdefault(name, collections.Counter())
        counted[found] += 1
        where = f"{name}: {file.relative_to(base)} at {at}"
        assert found in ("noticed", "harmless"), f"{where}: {found}"
        if found == "harmless":
            print("harmless", where)
    for name, counted in counts.items():
        print(f"{name:28} {dict(counted)}")


def _in(run: pathlib.Path, read):
    """Reads a run that lies elsewhere, where the readers look for it."""
    base = run.parent / "elsewhere"
    base.mkdir()
    (base / "run").symlink_to(run)
    try:
        return read(base)
    finally:
        shutil.rmtree(base)


def damage(folder: pathlib.Path, content: bytes = b"x" * 99) -> None:
    """Cuts a checkpoint's largest file short."""
    files = (p for p in folder.rglob("*") if p.is_file())
    max(files, key=lambda file: file.stat().st_size).write_bytes(content)


def test_the_run_goes_on_from_the_newest_good_one(tmp_path, capsys):
    save(tmp_path, [1, 2, 3])
    damage(tmp_path / "checkpoints" / "2" / "state")
    damage(tmp_path / "checkpoints" / "3" / "meta")
    found, meta = restore(tmp_path)
    assert same(found, state(1)) and meta["seconds"] == {"step": 0.5}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(len(line) < LONGEST for line in said)
    assert "the checkpoint of step 3 is not used, that of step 1 is: " in said[0]
    assert "/3/meta/" in said[0] and said[0].endswith("; it is now 3.damaged")
    assert checkpoint.steps(tmp_path) == [1]
    save(tmp_path, [2, 3])  # their steps can be saved again
    assert same(restore(tmp_path)[0], state(3))
    assert not capsys.readouterr().err


def test_where_none_is_good_no_new_run_begins(tmp_path):
    save(tmp_path, [1, 2])
    damage(tmp_path / "checkpoints" / "1" / "ema")
    shutil.rmtree(
        tmp_path / "checkpoints" / "2" / "ema"
    )  # as before there were digests
    for _ in range(2):
        message = r"no checkpoint in .* is good, of \[1, 2\]: .* ema has no digests"
        with pytest.raises(digests.Damaged, match=message.replace(" ema", ".*ema")):
            restore(tmp_path)
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_readers_take_the_newest_good_one_and_move_nothing(tmp_path, capsys):
    configs.write(tmp_path, {"seed": 0})
    save(tmp_path, [1, 2])
    damage(tmp_path / "checkpoints" / "2" / "state")
    assert checkpoint.load_run(tmp_path).step == 2  # what it reads of it is good
    newest = checkpoint.read_state(tmp_path)
    assert newest["step"] == 1 and same(newest["ema"], state(1).ema)
    capsys.readouterr()
    damage(tmp_path / "checkpoints" / "2" / "ema")
    run = checkpoint.load_run(tmp_path)
    assert run.step == 1 and same(run.params, state(1).ema)
    assert "step 2 is not used, that of step 1 is" in capsys.readouterr().err
    with pytest.raises(digests.Damaged, match="2/ema/.* is damaged"):
        checkpoint.load_run(tmp_path, step=2)
    assert checkpoint.networks_in(tmp_path) == {"dit": 64 * 32 * 4}
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_a_checkpoint_deleted_meanwhile_is_not_damaged(tmp_path, monkeypatch, capsys):
    """Of the newest one a file is gone already, and a newer one is there."""
    configs.write(tmp_path, {"seed": 0})
    save(tmp_path, [1])
    check = digests.check_folder

    def deletes(folder, *arguments, **named):
        if folder.parent.name == "1":
            monkeypatch.undo()
            save(tmp_path, [2])
            damage(tmp_path / "checkpoints" / "1" / "ema")
        check(folder, *arguments, **named)

    monkeypatch.setattr(digests, "check_folder", deletes)
    assert checkpoint.load_run(tmp_path).step == 2
    assert not capsys.readouterr().err


def test_a_process_that_misses_a_checkpoint_still_agrees_with_the_others(
    tmp_path, monkeypatch
):
    """They would wait for it in the exchange of what each has found."""
    configs.write(tmp_path, {"seed": 0})
    save(tmp_path, [1])
    told = []
    monkeypatch.setattr(
        intact, "_of_any_process", lambda said: told.append(said) or said
    )
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 7, only of"):
        checkpoint.load_run(tmp_path, step=7)
    assert len(told) == 1 and "missing" in told[0]


def test_a_finished_checkpoint_has_all_digests(tmp_path, monkeypatch):
    """The list is in it before it gets its name."""
    listed = checkpoint._list_digests

    async def fails(folder):
        await listed(folder)
        assert ".orbax-checkpoint-tmp" in str(folder)
        if folder.name.startswith("state") or "/state" in str(folder):
            raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "_list_digests", fails)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, [1])
    assert checkpoint.steps(tmp_path) == []
    monkeypatch.undo()
    save(tmp_path, [1])
    intact.check(tmp_path / "checkpoints", 1, intact.PARTS)
