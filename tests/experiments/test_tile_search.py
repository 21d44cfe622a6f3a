"""The search takes the fastest tile that fits, and passes other errors on."""

import jax
import pytest

from experiments import tile_search
from sora_jax.models import splash_attention


class Program:
    """Stands for a jitted function: too large a tile does not fit."""

    def __init__(self, tile, word="RESOURCE_EXHAUSTED"):
        self.tile, self.word = tile, word

    def lower(self, *qkv):
        return self

    def compile(self):
        if self.tile[0] * self.tile[1] > 2048 * 1024:
            raise jax.errors.JaxRuntimeError(f"{self.word}: vmem")
        return self.tile


def fake(monkeypatch, **options):
    def program(tiles, graded):
        return Program(tiles.gradient if graded else tiles.value, **options)

    monkeypatch.setattr(tile_search, "program", program)
    # The larger the better, and queries more than keys.
    cost = lambda tile, device, qkv: 1 / (tile[0] * tile[1] + tile[0])  # noqa: E731
    monkeypatch.setattr(tile_search, "seconds", cost)


def test_the_fastest_that_fits_is_found(monkeypatch, capsys):
    fake(monkeypatch)
    for graded in (False, True):
        best = tile_search.search(None, (), graded, splash_attention.Tiles())
        assert best == (4096, 512)
    assert "4096 x  1024: does not fit" in capsys.readouterr().out


def test_other_errors_are_not_taken_for_a_tile_that_does_not_fit(monkeypatch):
    fake(monkeypatch, word="INTERNAL")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        tile_search.search(None, (), False, splash_attention.Tiles())


@pytest.mark.parametrize("graded", [False, True])
def test_what_is_timed_can_be_traced(graded):
    qkv = [jax.ShapeDtypeStruct((1, 500, 1, 128), "bfloat16")] * 3
    tiles = splash_attention.Tiles((256, 256), (128, 256))
    text = str(jax.make_jaxpr(tile_search.program(tiles, graded))(*qkv))
    assert ("splash_mha_dkv" in text) == graded and "splash_mha_fwd" in text
