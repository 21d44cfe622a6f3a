"""A full disk is one error that names the file, whichever library wrote to it."""

import errno
import os

import numpy as np
import pytest
import safetensors

from sora_jax.data import array_files, shards, workers
from sora_jax.training import weight_files
from tests.data import clips

FULL = os.strerror(errno.ENOSPC)


def no_space(part, note, avoid):
    raise OSError(errno.ENOSPC, FULL, "parts/00001")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_a_worker_is_that_of_its_file(num_workers):
    with pytest.raises(OSError) as raised:
        list(workers.run(no_space, [0], num_workers=num_workers))
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, "parts/00001")


@pytest.mark.parametrize("when", ["open", "write", "close"])
def test_shards_on_a_full_disk_keep_what_is_whole(when, tmp_path, monkeypatch):
    source = clips.Clips(num=4, per_part=2)
    real, opened = array_files.array_record_module.ArrayRecordWriter, []

    class Writer:
        """The second file is the one that does not fit."""

        def __init__(self, *arguments):
            opened.append(self)
            self.check("open")
            self._writer = real(*arguments)

        def check(self, moment):
            if len(opened) == 2 and moment == when:
                raise RuntimeError(f"write() failed: {FULL}; writing x; at byte 7")

        def write(self, raw):
            self.check("write")
            self._writer.write(raw)

        def close(self):
            self._writer.close()
            self.check("close")

    with monkeypatch.context() as patched:
        patched.setattr(array_files.array_record_module, "ArrayRecordWriter", Writer)
        with pytest.raises(OSError, match=FULL) as raised:
            shards.write(tmp_path / "out", source)
    partial = tmp_path / "out" / ".partial"
    assert raised.value.filename == str(partial / "00001" / "part.array_record")
    files = {p.relative_to(partial).as_posix() for p in partial.rglob("*.*")}
    assert files == {
        "00000/part.array_record", "00000/part.json", "00000/digests.sha256",
        "plan.json", "settings.json", "digests.sha256",
    }  # fmt: skip
    manifest = shards.write(tmp_path / "out", source)
    assert manifest["digest"] == shards.write(tmp_path / "whole", source)["digest"]


def test_weights_on_a_full_disk(tmp_path, monkeypatch):
    def save(tensors, file, metadata):
        file.touch()
        raise safetensors.SafetensorError(f"Error: I/O error: {FULL} (os error 28)")

    monkeypatch.setattr(weight_files.safetensors.numpy, "save_file", save)
    with pytest.raises(OSError) as raised:
        weight_files.write(tmp_path, "weights", {"a": np.ones(3, np.float32)})
    file = tmp_path / "weights.safetensors"
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(file))
    assert not [*tmp_path.iterdir()]
