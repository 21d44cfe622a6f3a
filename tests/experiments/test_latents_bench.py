"""What is timed is all of the files, and only that."""

import os
import time

import numpy as np
import pytest

from experiments.bench import latents, side_by_side
from sora_jax.data import latent_cache, shards
from tests.data import clips
from tests.data.test_latent_cache import STATED, encode


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    shards.write(folder / "shards", clips.Clips(num=130, per_part=130))
    source = shards.open(folder / "shards")
    latent_cache.write(folder / "out", source, encode, clips_per_file=65, **STATED)
    return latent_cache.open(folder / "out")


def test_a_raw_read_and_an_epoch_take_whole_files(cache):
    files, count = latents.whole_files(cache, 60)
    assert (len(files), count) == (1, 65)
    files, count = latents.whole_files(cache, 66)
    assert (len(files), count) == (2, 130)
    assert latents.raw_read(files) == sum(file.stat().st_size for file in files)
    latents.drop(files)
    assert latents.raw_read(files) == sum(file.stat().st_size for file in files)
    seen = []

    def transform(record, random):
        seen.append(record.id)
        return {"latents": record.latents}

    with latents.epochs(latents.Part(cache, 130), transform, 0) as epoch:
        epoch()
    # A batch before the epoch, two in it, and some that are read ahead.
    assert len(seen) >= 3 * 64 and len(set(seen[:130])) == 130


def test_what_comes_before_is_not_timed():
    seconds = latents.timed(lambda: time.sleep(0.01), lambda: time.sleep(0.05))(3)
    assert 0.01 <= seconds < 0.05


@pytest.mark.peers
def test_the_peer_reads_the_same_clips(cache, peers_python, tmp_path):
    records = cache.read(range(130))
    case = {
        "latents": np.stack([record.latents for record in records]),
        "text_ids": np.zeros((130, 4), np.int32),
    }
    config = {"batch_size": latents.BATCH}
    with side_by_side.Peer(
        peers_python, "timed_loader.py", tmp_path, case, config
    ) as peer:
        latents.check(peer, case["latents"], "files")
        latents.check(peer, case["latents"], "memory")
        with pytest.raises(ValueError, match="differs from the peer's"):
            latents.check(peer, 2 * case["latents"], "files")
        assert peer.seconds("files_0") > 0
        assert os.path.isdir(tmp_path / "clips")
