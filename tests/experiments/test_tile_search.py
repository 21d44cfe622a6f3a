"""The search takes the fastest tile that fits, and passes other errors on."""

import dataclasses

import jax
import pytest

from experiments import tile_search
from sora_jax.models import splash_attention

WHOLE = ("whole",)


@dataclasses.dataclass
class Device:
    device_kind: str = "TPU v5 lite"


class Program:
    """Stands for a jitted function: too large a tile does not fit."""

    def __init__(self, tile, word="RESOURCE_EXHAUSTED"):
        self.tile, self.word = tile, word

    def lower(self, *qkv):
        self.whole = qkv == WHOLE
        return self

    def compile(self, options):
        # Whole tiles take a third more.
        most = int(options["xla_tpu_scoped_vmem_limit_kib"])
        if self.tile[0] * self.tile[1] * (4 if self.whole else 3) > most * 2**9:
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
        best = tile_search.search(Device(), (), WHOLE, graded, splash_attention.Tiles())
        assert best == (2048, 512)
    assert "1024 x  2048: does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given, said",
    [
        (("--tokens", "1000"), "tiles of 4096 need 8192 tokens"),
        (("--heads", "0"), "and one head or more"),
        (("--head_size", "64"), "invalid choice: 64"),
        (("--topology", "v6e:9x9"), "v6e:9x9"),
        ((), "this is not a TPU"),
    ],
)
def test_what_cannot_be_searched_is_refused(monkeypatch, capsys, given, said):
    monkeypatch.setattr("sys.argv", ["tile_search", *given])
    with pytest.raises(SystemExit) as ended:
        tile_search.main()
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and said in printed and "Traceback" not in printed


def test_other_compiler_errors_are_raised(monkeypatch):
    fake(monkeypatch, word="INTERNAL")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        tile_search.search(Device(), (), (), False, splash_attention.Tiles())


@pytest.mark.parametrize("graded", [False, True])
def test_what_is_timed_can_be_traced(graded):
    qkv = [jax.ShapeDtypeStruct((1, 500, 1, 128), "bfloat16")] * 3
    tiles = splash_attention.Tiles((256, 256), (128, 256))
    text = str(jax.make_jaxpr(tile_search.program(tiles, graded))(*qkv))
    assert ("splash_mha_dkv" in text) == graded and "splash_mha_fwd" in text
