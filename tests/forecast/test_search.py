"""Layouts by formula, which of them are compiled, and what is said where none fits."""

import dataclasses

import jax
import pytest

from configs import wan_1_3b
from sora_jax.forecast import chips, programs, search, step_time
from sora_jax.forecast.report import DoesNotFit, Forecast


def config():
    c = wan_1_3b.get_config()
    dit = c.model.dit
    dit.dim, dit.num_heads, dit.num_layers, dit.mlp_dim = 512, 4, 4, 1024
    c.sample.num_frames, c.sample.height, c.sample.width = 33, 256, 256
    return c


@pytest.fixture(scope="module")
def formulas():
    return search.Formulas(config(), chips.CHIPS["v5e"])


def guess(formulas, remat="full", rows=8, **sizes):
    axes = ("replica", "fsdp", "ring", "ulysses", "tensor")
    layout = tuple((axis, sizes.get(axis, 1)) for axis in axes)
    return formulas.guess(search.Layout(layout, remat, rows))


def test_layouts_divide_and_are_all_there(formulas):
    found = [*formulas.layouts(4)]
    assert len(set(found)) == len(found)
    for layout in found:
        sizes = dict(layout.sizes)
        assert sizes["ulysses"] * sizes["tensor"] in (1, 2, 4)
        assert layout.rows % (sizes["replica"] * sizes["fsdp"]) == 0
    meshes = {layout.mesh for layout in found}
    assert {"fsdp=4", "ulysses=4", "ring=2,tensor=2", "replica=4"} <= meshes
    assert {layout.remat for layout in found} == set(search.REMAT)
    # 4 heads are not split over 8 devices.
    assert "ulysses=8" not in {layout.mesh for layout in formulas.layouts(8)}


def test_more_devices_hold_and_take_less(formulas):
    one, four = guess(formulas, fsdp=2), guess(formulas, fsdp=8)
    assert four.size < one.size and four.seconds < one.seconds
    assert guess(formulas, fsdp=8).size < guess(formulas, replica=8).size
    sizes = [guess(formulas, remat, fsdp=4).size for remat in search.REMAT]
    none, attention, offload, full = sizes
    assert none > attention > max(offload, full)
    seconds = {r: guess(formulas, r, fsdp=4).seconds for r in search.REMAT}
    assert seconds["none"] < seconds["attention"] < seconds["full"]


def forecast(seconds: float, size: float) -> Forecast:
    return Forecast(
        "a step", "v5e", {"all": size}, 1e12, 1e12, {}, step_time.Work(links=seconds),
        1.0, 1, 1, 1.0, 4,
    )  # fmt: skip


@dataclasses.dataclass
class Device:
    device_kind: str = "TPU v5 lite"


def test_what_is_compiled_is_ranked_by_it(monkeypatch):
    seconds = iter([3.0, 1.0, 2.0])
    given = []

    def compiled(c, mesh):
        given.append((c.model.dit.remat, c.data.batch_size))
        return forecast(next(seconds), 2**30)

    monkeypatch.setattr(programs, "train_step", compiled)
    monkeypatch.setattr(search, "_mesh", lambda layout, devices: None)
    said = []
    c = config()
    found = search.best(c, [Device()] * 4, 1, 3, say=said.append)
    assert [one.seconds for _, one in found.found] == [1.0, 2.0, 3.0]
    assert len(said) == 3 and len(given) == 3
    assert c.data.batch_size == 8  # the caller's is as it was
    rows = found.as_text().splitlines()
    assert rows[0].split()[:2] == ["mesh", "remat"] and " 1  " in rows[1]


def test_where_nothing_fits_the_least_excess_is_said(monkeypatch):
    hbm = chips.CHIPS["v5e"].hbm
    sizes = iter([hbm + 3 * 2**30, hbm + 2 * 2**30])
    monkeypatch.setattr(
        programs, "train_step", lambda c, mesh: forecast(1, next(sizes))
    )
    monkeypatch.setattr(search, "_mesh", lambda layout, devices: None)
    with pytest.raises(
        DoesNotFit, match="least excess is 2.00 GiB a device with --mesh"
    ):
        search.best(config(), [Device()] * 4, 1, 2, say=lambda text: None)


def test_advice_names_more_devices_where_it_takes_them():
    c = config()
    assert "would fit with --mesh=" in search.advice(c, [Device()] * 4)
    c.model.dit.dim, c.model.dit.num_layers, c.model.dit.num_heads = 4096, 40, 32
    assert "would fit on " in search.advice(c, [Device()] * 2)
    assert jax.sharding.get_mesh().empty


def test_advice_is_corrected_by_what_was_compiled():
    c, devices = config(), [Device()] * 4
    hbm = chips.CHIPS["v5e"].hbm
    formulas = search.Formulas(c, chips.CHIPS["v5e"])

    def advised(refused=None):
        said = search.advice(c, devices, 1, refused)
        return next(
            one
            for count in (4, 8, 16, 32, 64)
            for one in formulas.layouts(count)
            if said.endswith(f"with {one}")
        )

    # What was refused is never proposed, even where nothing says by how much.
    first = advised()
    assert advised((first, 0.0)) != first
    low = 2 * hbm / formulas.guess(first).size
    assert low > 2  # the formula had said that it fits
    found = formulas.guess(advised((first, 2 * hbm)))
    assert low * found.size <= hbm


def test_what_xla_says_of_a_refused_program_is_read():
    class Kernel:
        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory"
            )

    with pytest.raises(ValueError, match="tiles do not fit into VMEM") as caught:
        programs._finish(Kernel())
    assert not isinstance(caught.value, DoesNotFit)

    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on "
                "HBM, the total memory required for HLO temporaries (33.12G) exceeds "
                "available HBM (31.24G). HLO module: jit_train_step.\nSee more"
            )

    with pytest.raises(DoesNotFit, match="HLO module: jit_train_step.$") as caught:
        programs._finish(Lowered())
    assert caught.value.needed == 33.12 * 2**30
