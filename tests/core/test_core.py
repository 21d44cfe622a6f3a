"""Keys, meshes, layouts, configs, progress and files."""

import dataclasses
import errno
import hashlib
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from sora_jax.core import config as configs
from sora_jax.core import job, paths, progress, rng, sharding, xla_flags
from sora_jax.core import mesh as meshes

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_keys_depend_on_every_part_and_on_nothing_else():
    keys = [
        rng.key(0, "noise"),
        rng.key(1, "noise"),
        rng.key(0, "text"),
        rng.key(0, "noise", 0),
        rng.key(0, "noise", 0, 1),
        rng.key(0, "noise", 1, 0),
    ]
    data = {tuple(jax.random.key_data(key).tolist()) for key in keys}
    assert len(data) == len(keys)
    traced = jax.jit(lambda i: jax.random.normal(rng.key(0, "noise", i), (3,)))
    np.testing.assert_array_equal(
        traced(7), jax.random.normal(rng.key(0, "noise", 7), (3,))
    )


def test_seeds_that_agree_modulo_a_power_of_two_have_keys_of_their_own():
    seeds = [5, 2**32 + 5, 2**33 + 5, 2**63 + 5, 0, 2**32, 2**64 - 1, 2**32 - 1]
    drawn = {
        tuple(jax.random.key_data(rng.key(seed, "noise")).tolist()) for seed in seeds
    }
    assert len(drawn) == len(seeds)
    # Below 2^32 they are JAX's own, so that what was made before is made again.
    name = int.from_bytes(hashlib.sha256(b"noise").digest()[:4], "big")
    for seed in (0, 5, 2**31, 2**32 - 1):
        own = jax.random.fold_in(jax.random.key(seed), name)
        np.testing.assert_array_equal(
            jax.random.key_data(rng.key(seed, "noise")), jax.random.key_data(own)
        )
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=r"in \[0, 2\^64\), not"):
            rng.key(seed, "noise")


def test_a_size_is_width_then_height():
    assert job.parse_size("832*480") == job.parse_size("832x480") == (480, 832)
    for text in ("64", "64x", "x64", "64 x 64", "-1x3", "1x2x3", "64X96", "1e3x2"):
        with pytest.raises(ValueError, match="--size is WIDTH"):
            job.parse_size(text)


def test_what_cannot_be_written_is_found_beforehand(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.mp4").mkdir()
    before = sorted(tmp_path.rglob("*"))
    paths.check_writable(tmp_path / "new" / "er" / "clip.mp4")
    paths.check_writable(tmp_path / "file")
    for name, reason in {
        "file/clip.mp4": "file is a file, not a folder",
        "file/a/b/clip.mp4": "file is a file, not a folder",
        "folder.mp4": "it is a folder",
        f"{'x' * 250}.mp4": "File name too long",
    }.items():
        with pytest.raises(OSError, match=f"cannot be written: .*{reason}"):
            paths.check_writable(tmp_path / name)
    with pytest.raises(OSError, match="/proc/new/clip.mp4 cannot be written"):
        paths.check_writable("/proc/new/clip.mp4")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text()


def test_key_is_the_same_in_another_process():
    code = (
        "import jax; from sora_jax.core import rng;"
        "print(jax.random.key_data(rng.key(3, 'noise', 5)).tolist())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == str(
        jax.random.key_data(rng.key(3, "noise", 5)).tolist()
    )


def test_meshes_have_all_axes_and_say_what_does_not_fit():
    mesh = meshes.make_mesh({"replica": 2, "fsdp": -1, "tensor": 2})
    assert mesh.axis_names == meshes.AXES
    assert tuple(mesh.shape.values()) == (2, 2, 1, 1, 2)
    for shape, message in (
        ({"data": 8}, "unknown"),
        ({"fsdp": 3}, "has room for 3 devices, but there are 8"),
        ({"fsdp": -1, "tensor": -1}, "at most one"),
        ({"fsdp": 0}, "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            meshes.make_mesh(shape)


def test_layouts():
    assert sharding.partition_spec("batch", "tokens", None, "heads") == jax.P(
        ("replica", "fsdp"), ("ring", "ulysses"), None, "tensor"
    )
    assert sharding.out_sharding("batch") is None  # no mesh is set
    with pytest.raises(ValueError, match="twice"):
        sharding.partition_spec("heads", "mlp")
    with pytest.raises(ValueError, match="unknown"):
        sharding.partition_spec("width")
    mesh = meshes.make_mesh({"fsdp": 4, "tensor": 2})
    sharding.check_divisible(mesh, {"rows": ("batch", 8)})
    with pytest.raises(ValueError, match="rows is 6, which does not divide over the 4"):
        sharding.check_divisible(mesh, {"rows": ("batch", 6)})
    with jax.set_mesh(mesh):
        x = sharding.reshard(jnp.ones((8, 4)), "batch", "heads")
        assert sharding.is_sharded(x, [0]) and sharding.is_sharded(x, [1])
        assert sharding.replicate(x).sharding.is_fully_replicated
        assert sharding.spec_like(x, None) == jax.P(("replica", "fsdp"), None)


@dataclasses.dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Outer:
    width: int
    rate: float = 0.5
    inner: Inner = Inner()
    shares: dict[str, float] = dataclasses.field(default_factory=dict)


def test_sections_become_dataclasses():
    section = ml_collections.ConfigDict(
        {"width": 3, "inner": {"sizes": [4, 5]}, "shares": {"a": 0.5}}
    )
    assert configs.build(Outer, section) == Outer(
        3, inner=Inner((4, 5)), shares={"a": 0.5}
    )
    with pytest.raises(
        ValueError, match="model.widht is unknown; did you mean 'width'"
    ):
        configs.build(Outer, {"widht": 3}, "model")
    with pytest.raises(ValueError, match="model lacks width"):
        configs.build(Outer, {}, "model")
    with pytest.raises(ValueError, match="model.inner.size is unknown"):
        configs.build(Outer, {"width": 1, "inner": {"size": 2}}, "model")


def test_config_text_comes_back_and_runs_nothing():
    config = ml_collections.ConfigDict(
        {"a": {"b": (1, 2.5, ("x", None))}, "c": "it's", "d": True, "e": 1e-6}
    )
    text = configs.to_text(config)
    assert "a.b = (1, 2.5, ('x', None))\n" in text
    assert configs.to_text(configs.from_text(text)) == text
    changed = configs.from_text(text)
    changed.e = 2e-6
    assert configs.difference(config, changed) == ["e: 1e-06, now 2e-06"]
    assert configs.digest(config) != configs.digest(changed)
    for line in ("a = __import__('os').getcwd()", "just words", "a = (1"):
        with pytest.raises(ValueError, match="line 1 of the config"):
            configs.from_text(line)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, (1.0, (math.inf,))])
def test_numbers_that_would_not_come_back_are_not_written(value):
    with pytest.raises(ValueError, match=r"optim\.clip_norm is .* finite"):
        configs.to_text({"optim": {"clip_norm": value}})


def test_progress_tells_the_time_left(capsys, monkeypatch):
    now = [0.0]
    for name in ("time", "monotonic"):
        monkeypatch.setattr(progress.time, name, lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with progress.Progress(100, "encode", "clips", start=20) as bar:
        now[0] = 3600.0  # of which most is compiling
        bar.update(4)
        bar.set_postfix(loss=1.0, refresh=False)
        assert "24/100 [1:00:00<?, ? clips/s, loss=1]" in str(bar)
        now[0] = 3610.0
        bar.update(8)  # too early for a line
        now[0] = 3618.0
        bar.set_postfix(loss="0.1235", refresh=False)
        bar.update(28)
    started, compiled, done = capsys.readouterr().err.splitlines()
    assert "| 20/100 [00:00<?, ? clips/s]" in started
    assert "| 24/100 [1:00:00<?, ? clips/s]" in compiled
    assert done.startswith("encode:  60%|")
    assert done.endswith("| 60/100 [1:00:18<00:20,  2.00 clips/s, loss=0.1235]")


def test_progress_prints_in_one_process_and_survives_a_full_disk(capsys, monkeypatch):
    with progress.Progress(1, "x", "clips", process_index=1) as bar:
        bar.update()
    assert capsys.readouterr().err == ""

    def full(text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys.stderr, "write", full)
    with progress.Progress(1, "x", "clips") as bar:
        bar.update()
        bar.refresh()
    assert bar.n == 1


def test_progress_is_rewritten_in_place_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with progress.Progress(2, "x", "clips") as bar:
        bar.update(2)
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and shown.count("\r") > 1


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    file = tmp_path / "new" / "file"
    paths.write_atomically(file, "one")
    assert paths.sha256_file(file).startswith("7692c3ad")

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(paths.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        paths.write_atomically(file, "two")
    assert file.read_text() == "one" and list(file.parent.iterdir()) == [file]


SLICES = """
from sora_jax.core import mesh
one, two = mesh.compile_only("v6e:4x4"), mesh.compile_only("v5e:2x2", 2)
made = mesh.make_mesh({"ring": 2, "ulysses": 8}, one)
print(sorted(d.id for d in made.devices.flat) == list(range(16)))
made = mesh.make_mesh({"replica": 2, "ulysses": 4}, two)
print([{d.slice_index for d in part.flat} for part in made.devices])
try:
    mesh.make_mesh({"fsdp": 8}, two)
except ValueError as error:
    print(error)
"""


@pytest.mark.tpu
def test_axes_take_parts_of_a_slices_and_replicas_are_slices(libtpu):
    done = subprocess.run(
        [sys.executable, "-c", SLICES],
        env=os.environ | {"TPU_LIBRARY_PATH": libtpu},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    whole, parts, refused = done.stdout.splitlines()
    assert whole == "True" and parts == "[{0}, {1}]"
    assert "spans 2 slices, and replica is 1" in refused


@pytest.mark.parametrize("profile", xla_flags.PROFILES)
def test_flags_of_the_environment_come_before_ours(profile):
    flags = xla_flags.PROFILES[profile]
    ours = [f"--{name}={value}" for name, value in flags.items()]
    other = f"--{next(iter(flags))}_of_another_name=1"
    empty, given = {}, {"LIBTPU_INIT_ARGS": other}
    for environment in (empty, given):
        xla_flags.set_defaults(profile, environment)
    assert empty["LIBTPU_INIT_ARGS"].split() == ours
    assert given["LIBTPU_INIT_ARGS"].split() == [other, *ours]
    first = next(iter(flags))
    chosen = {"LIBTPU_INIT_ARGS": f"--{first}=false"}
    xla_flags.set_defaults(profile, chosen)
    assert chosen["LIBTPU_INIT_ARGS"].split() == [f"--{first}=false", *ours[1:]]
    assert "XLA_FLAGS" not in empty | given | chosen


def test_flags_of_any_batch_leave_what_is_given():
    ((name, value),) = xla_flags.ANY_BATCH.items()
    for given, expected in {
        "": f"--{name}={value}",
        "--xla_dump_to=x": f"--xla_dump_to=x --{name}={value}",
        f"--{name}=LIBRARY_FUSION_TYPE_DOT": f"--{name}=LIBRARY_FUSION_TYPE_DOT",
        "flags.txt": "flags.txt",  # XLA reads them from a file
    }.items():
        environment = {"XLA_FLAGS": given} if given else {}
        xla_flags.set_defaults(environment=environment, any_batch=True)
        assert environment["XLA_FLAGS"] == expected
