"""Layouts by formula, which of them are compiled, and what is said where none fits."""

import dataclasses

import jax
import pytest

from configs import wan_1_3b
from sora_jax.forecast import chips, programs, search, step_time
from sora_jax.forecast.report import DoesNotFit, Forecast, KernelDoesNotFit


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


def test_adapters_need_less_memory_and_time_than_all_weights(formulas):
    """Weights in bfloat16, without gradients, average and moments."""
    c = config()
    c.lora.rank = 8
    adapted = search.Formulas(c, chips.CHIPS["v5e"])
    count = formulas.parameter_bytes / 4
    small = 4 * 2 * 4 * 8 * (512 + 512)  # of q, k, v and out, twice in four blocks
    assert adapted.parameter_bytes == small * 4
    of_adapters = adapted.state_bytes - 4 * 4 * small
    assert 2 * count < of_adapters < 2.2 * count
    assert formulas.state_bytes == pytest.approx(16 * count, rel=1e-3)
    one, all_ = (guess(f, fsdp=4) for f in (adapted, formulas))
    assert one.size < all_.size and one.seconds < all_.seconds


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
    assert [one.seconds for _, one in found.layouts] == [1.0, 2.0, 3.0]
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
        DoesNotFit, match="least excess is 2.00 GiB per device, with --mesh"
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

    def advised(*refused):
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


def test_nothing_that_a_search_saw_refused_is_proposed(monkeypatch):
    chip = chips.CHIPS["v5e"]
    seen = []

    def refuse(c, mesh):
        seen.append((c.model.dit.remat, c.data.batch_size, mesh))
        raise DoesNotFit("too large", chip.hbm * (1 + 0.1 / len(seen)))

    monkeypatch.setattr(programs, "train_step", refuse)
    monkeypatch.setattr(search, "_mesh", lambda layout, devices: layout.mesh)
    with pytest.raises(DoesNotFit) as caught:
        search.best(config(), [Device()] * 4, 1, 5, say=lambda text: None)
    said = str(caught.value)
    assert "least excess is 0.3" in said
    remat, rows, mesh = seen[-1]
    assert f"--mesh={mesh}, remat {remat}, {rows} rows;" in said
    for remat, rows, mesh in seen:
        assert not said.endswith(f"--mesh={mesh}, remat {remat}, {rows} rows")


def test_a_size_that_nothing_says_is_not_made_up(monkeypatch):
    def refuse(c, mesh):
        raise DoesNotFit("too large")

    monkeypatch.setattr(programs, "train_step", refuse)
    monkeypatch.setattr(search, "_mesh", lambda layout, devices: None)
    with pytest.raises(DoesNotFit, match="layouts; by formula it would fit with"):
        search.best(config(), [Device()] * 4, 1, 2, say=lambda text: None)


def test_a_kernel_that_does_not_fit_ends_no_search(monkeypatch):
    found = iter([KernelDoesNotFit("a kernel"), forecast(1.0, 2**30)] * 2)

    def compiled(c, mesh):
        one = next(found)
        if isinstance(one, Exception):
            raise one
        return one

    monkeypatch.setattr(programs, "train_step", compiled)
    monkeypatch.setattr(search, "_mesh", lambda layout, devices: None)
    said = []
    ranking = search.best(config(), [Device()] * 4, 1, 2, say=said.append)
    assert len(ranking.layouts) == 1 and "  a kernel" in said
    with pytest.raises(KernelDoesNotFit):
        search.best(config(), [Device()] * 4, 1, 1, say=said.append)


def test_keys_that_heads_share_are_less_to_exchange():
    c = config()
    whole = search.Formulas(c, chips.CHIPS["v5e"])
    c.model.dit.num_kv_heads = 2
    shared = search.Formulas(c, chips.CHIPS["v5e"])
    for axis in ("ring", "ulysses"):
        sizes = {"replica": 1, "fsdp": 1, "ring": 1, "ulysses": 1, "tensor": 1, axis: 2}
        # What is left of it when weights, which are fewer too, are taken away.
        moved = [
            one._links(sizes, 1e4, "full") - one._links(sizes, 0.0, "full")
            for one in (shared, whole)
        ]
        assert moved[0] == pytest.approx(
            {"ring": 0.5, "ulysses": 0.75}[axis] * moved[1]
        )


def test_what_xla_says_of_a_refused_program_is_read():
    class Kernel:
        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory"
            )

    with pytest.raises(KernelDoesNotFit, match=r"does not fit into VMEM \(tiles\)"):
        programs._finish(Kernel())

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
