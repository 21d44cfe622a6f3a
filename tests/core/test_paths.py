"""Files and folders on full disks, in folders of others, and through crashes."""

import errno
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from sora_jax.core import paths

HOLDER = (
    "import sys, time\n"
    "from sora_jax.core import paths\n"
    "with paths.lock(sys.argv[1]):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(100)\n"
)


def no_space(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    folder = tmp_path / "new" / "run"
    command = [sys.executable, "-c", HOLDER, folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(paths.InUse, match=f"in use by process {holder.pid} on "):
            with paths.lock(folder):
                pytest.fail("two processes have the lock")
        assert (folder / paths.LOCK).exists()  # of who still has it
        holder.send_signal(signal.SIGKILL)
    with paths.lock(folder):  # what it left behind locks nothing
        (folder / "row").touch()
    assert [path.name for path in folder.iterdir()] == ["row"]


def test_a_lock_leaves_no_folder_that_was_not_there(tmp_path):
    for made in (False, True):
        with pytest.raises(ValueError), paths.lock(tmp_path / "run"):
            raise ValueError("refused")
        assert (tmp_path / "run").exists() == made
        (tmp_path / "run").mkdir(exist_ok=True)


def test_a_lock_file_that_was_removed_meanwhile_locks_nothing(tmp_path, monkeypatch):
    file, flock, taken = tmp_path / paths.LOCK, paths.fcntl.flock, []

    def late(descriptor, operation):
        if not taken:  # who held it leaves between our open and our flock
            file.unlink()
        taken.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(paths.fcntl, "flock", late)
    with paths.lock(tmp_path):
        assert len(taken) == 2 and file.exists()
        with pytest.raises(paths.InUse), paths.lock(tmp_path):
            pass


@pytest.mark.parametrize(
    "module, function, code, said",
    [
        ("fcntl", "flock", errno.ENOLCK, "is on a file system without locks"),
        ("os", "open", errno.EROFS, ""),  # nothing will be written there
    ],
)
def test_where_there_are_no_locks_the_work_goes_on(
    module, function, code, said, tmp_path, monkeypatch, capsys
):
    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    entered = []
    with monkeypatch.context() as patched:
        patched.setattr(getattr(paths, module), function, fail)
        with paths.lock(tmp_path):
            entered.append(True)
    found = capsys.readouterr().err
    assert entered and (said in found if said else not found)


def write(path):
    paths.write_atomically(path, "new")


def copy(path):
    paths.copy_atomically(pathlib.Path(__file__), path)


@pytest.mark.parametrize(
    "put, module, function",
    [
        (write, "os", "fsync"), (write, "os", "replace"), (copy, "os", "replace"),
        (copy, "shutil", "copyfile"),
    ],
)  # fmt: skip
def test_an_error_names_the_file_and_leaves_what_was_there(
    put, module, function, tmp_path, monkeypatch
):
    file = tmp_path / "file"
    file.write_text("old")
    monkeypatch.setattr(getattr(paths, module), function, no_space)
    with pytest.raises(OSError, match="No space left") as raised:
        put(file)
    assert raised.value.filename == str(file) and raised.value.errno == errno.ENOSPC
    assert file.read_text() == "old" and [*tmp_path.iterdir()] == [file]


def test_a_missing_source_is_named_and_not_the_copy(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        paths.copy_atomically(tmp_path / "source", tmp_path / "copy")
    assert raised.value.filename == str(tmp_path / "source")


def test_what_libraries_say_in_words_becomes_an_error_with_a_number():
    said = "write() failed: No space left on device; writing .x; at byte 7; Failed"
    error = paths.error_of(said, "file")
    assert (error.errno, error.filename) == (errno.ENOSPC, "file")
    error = paths.error_of("something else\nand more", "file")
    assert error.errno is None and str(error) == "file: something else"
