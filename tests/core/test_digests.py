"""Digests: what is noticed, and what a crash in the middle of a write leaves."""

import subprocess

import pytest

from sora_jax.core import digests, paths


def test_what_was_stored_is_read_and_sha256sum_agrees(tmp_path):
    digests.store(tmp_path / "a.json", "{}")
    digests.store(tmp_path / "b.bin", b"\0" * 99)
    digests.store(tmp_path / "a.json", "[]")
    digests.copy(tmp_path / "b.bin", tmp_path / "copy" / "b.bin")
    assert digests.read(tmp_path / "a.json") == b"[]"
    digests.check_all([tmp_path / "b.bin", tmp_path / "copy" / "b.bin"])
    command = ["sha256sum", "--strict", "-c", digests.FILE]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0


@pytest.mark.parametrize("at", range(3))
def test_a_crash_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch, at):
    """Before any of the three writes: the list, the file, the list."""
    digests.store(tmp_path / "a", "old")
    write, left = paths.write_atomically, iter(range(at, -1, -1))

    def dies(path, content):
        if not next(left):
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(paths, "write_atomically", dies)
    with pytest.raises(KeyboardInterrupt):
        digests.store(tmp_path / "a", "new")
    monkeypatch.undo()
    assert digests.read(tmp_path / "a") == (b"new" if at == 2 else b"old")
    digests.store(tmp_path / "a", "newest")
    assert digests.read(tmp_path / "a") == b"newest"


@pytest.mark.parametrize("read", [digests.read, digests.check])
def test_a_file_that_is_replaced_while_it_is_read_is_not_damaged(
    tmp_path, monkeypatch, read
):
    digests.store(tmp_path / "a", "old")
    listed = digests._read_list

    def replaced(folder):
        found = listed(folder)
        monkeypatch.undo()
        digests.store(tmp_path / "a", "new")  # after its list was read
        return found

    monkeypatch.setattr(digests, "_read_list", replaced)
    assert read(tmp_path / "a") in (b"new", None)
    with pytest.raises(FileNotFoundError):
        digests.read(tmp_path / "missing")


def test_every_bit_of_a_file_and_of_its_list_counts(tmp_path):
    digests.store(tmp_path / "a", "some content")
    digests.store(tmp_path / "b", "other content")
    for file in (tmp_path / "a", tmp_path / digests.FILE):
        whole = file.read_bytes()
        changed = [bytes(_flipped(whole, bit)) for bit in range(8 * len(whole))]
        changed += [whole[:length] for length in range(len(whole) - 1)]
        for content in changed:
            file.write_bytes(content)
            with pytest.raises(digests.Damaged) as error:
                digests.read(tmp_path / "a"), digests.read(tmp_path / "b")
            assert len(str(error.value)) < 500
        file.write_bytes(whole)
    assert digests.read(tmp_path / "a") == b"some content"


def _flipped(content: bytes, bit: int) -> bytearray:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return changed


def test_without_a_digest_only_a_peers_file_is_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert digests.read(tmp_path / "config.json", required=False) == b"{}"
    with pytest.raises(
        digests.Damaged, match=r"config.json has no digest: there is no"
    ):
        digests.read(tmp_path / "config.json")
    digests.store(tmp_path / "other", "")
    with pytest.raises(digests.Damaged, match="does not name it; make it again"):
        digests.read(tmp_path / "config.json", required=False)


def test_a_damaged_file_is_not_copied(tmp_path):
    digests.store(tmp_path / "a", "good")
    (tmp_path / "a").write_text("bad")
    with pytest.raises(digests.Damaged, match="a is damaged: its SHA-256 is"):
        digests.copy(tmp_path / "a", tmp_path / "to" / "a")
    assert not (tmp_path / "to" / "a").exists()


def test_a_folder_holds_what_its_list_says(tmp_path):
    for name in ("x/one", "two"):
        paths.write_atomically(tmp_path / name, name)
    with pytest.raises(digests.Damaged, match="has no digests"):
        digests.check_folder(tmp_path)
    names = digests.files_in(tmp_path)
    digests.write_list(tmp_path, digests.hash_files(tmp_path, names))
    (tmp_path / "done").touch()
    digests.check_folder(tmp_path, besides="done")
    with pytest.raises(digests.Damaged, match="done has no digest"):
        digests.check_folder(tmp_path)
    (tmp_path / "done").unlink()
    (tmp_path / "two").write_text("2")
    digests.check_folder(tmp_path, 1, 2)  # of two processes, the other one's share
    with pytest.raises(digests.Damaged, match="two is damaged"):
        digests.check_folder(tmp_path, 0, 2)
    (tmp_path / "x" / "one").unlink()
    with pytest.raises(digests.Damaged, match="one is missing"):
        digests.check_folder(tmp_path)
