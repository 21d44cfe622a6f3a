"""Time of a compiled program on a made-up chip: exact, operation by operation."""

import dataclasses

import pytest

from sora_jax.forecast import hlo, step_time
from sora_jax.forecast.chips import Chip, Reached

# A cycle takes a second, and so do a byte of memory, of a link and of the host.
CHIP = Chip(
    peak=100.0, clock=1.0, hbm=1.0, bandwidth=1.0, link=0.5, network=0.25, host=1.0,
    cores=1,
)  # fmt: skip
REACHED = Reached(1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0)


def cycles(name: str, count: int, operands: str = "%x") -> str:
    return (
        f"  %{name} = f32[1]{{0}} fusion({operands}), kind=kLoop, calls=%fused.0, "
        f'backend_config={{"window_config":{{"estimated_cycles":"{count}"}}}}\n'
    )


def work(body: str, rest: str = "", devices: int = 4, slices: int = 1):
    text = f"{rest}\nENTRY %main.1 (x: f32[1]) -> f32[1] {{\n{body}}}\n"
    return step_time.work_of(hlo.parse(text), CHIP, REACHED, devices, slices)


GATHER = (
    "channel_id=1, replica_groups=mesh['fsdp'=4,'ulysses'=2] {'fsdp'}, dimensions={0}\n"
)


def test_cycles_count_as_often_as_a_loop_runs_and_a_branch_at_most():
    rest = f"""
%body.1 (p: (s32[], f32[1])) -> (s32[], f32[1]) {{
{cycles("a", 5)}}}

%condition.1 (p: (s32[], f32[1])) -> pred[] {{
  %constant.4 = s32[]{{:T(128)}} constant(30)
}}

%left.1 (p: f32[1]) -> f32[1] {{
{cycles("b", 7)}}}

%right.1 (p: f32[1]) -> f32[1] {{
{cycles("c", 11)}}}
"""
    body = (
        "  %while.1 = (s32[], f32[1]) while(%t), condition=%condition.1, body=%body.1\n"
    )
    body += "  %c.1 = f32[1] conditional(%p, %x, %x), branch_computations={%left.1, %right.1}\n"
    found = work(body, rest)
    assert found == step_time.Work(moves=30 * 5 + 11)


def test_what_has_no_cycles_goes_through_memory_in_and_out():
    body = "  %s = f32[10]{0} slice(%x), slice={[0:10]}\n"
    body += "  %u = f32[4]{0} negate(%x)\n"
    body += "  %d = f32[100]{0} dynamic-update-slice(%x, %u, %i)\n"
    assert work(body).memory == 2 * (40 + 16 + 16)


def test_an_exchange_waits_unless_something_hides_it():
    # A ring of 4 of links with one byte a second both ways: 3/4 of 80 bytes.
    now = f"  %g = f32[20]{{0}} all-gather(%x), {GATHER}"
    assert work(now) == step_time.Work(links=60)
    begun = f"  %g = (f32[5], f32[20]) all-gather-start(%x), {GATHER}"
    ended = "  %e = f32[20]{0} all-gather-done(%g)\n"
    for beside, left in ((0, 60), (25, 35), (60, 0), (99, 0)):
        found = work(begun + cycles("a", beside) + ended)
        assert found == step_time.Work(moves=beside, links=left)


def test_a_fused_exchange_counts_once_and_its_end_waits():
    rest = f"""
%start.1 (p: f32[5]) -> f32[20] {{
  %g.1 = f32[20]{{0}} all-gather(%p), {GATHER}}}

%done.1 (p: f32[5]) -> f32[20] {{
  %g.2 = f32[20]{{0}} all-gather(%p), {GATHER}}}
"""
    body = "  %async-collective-start = f32[20] fusion(%x), calls=%start.1\n"
    body += cycles("a", 20).replace("fused.0", "start.1")  # computes, and moves a part
    body += "  %async-collective-done = f32[20] fusion(%a), calls=%done.1\n"
    assert work(body, rest) == step_time.Work(moves=20, links=40)


OFFLOADED = f"""
%called_computation.1 (p: f32[20]) -> f32[5] {{
  ROOT %scatter.1 = f32[5]{{0}} reduce-scatter(%p), {GATHER}}}, execution_thread="sparsecore"
"""


def test_what_another_core_exchanges_runs_beside_what_follows():
    start = (
        "  %s = ((), (), (s32[1])) call-start(), "
        'async_execution_thread="sparsecore", to_apply=%called_computation.1\n'
    )
    update = "  %u = ((f32[20]), f32[5]) call-update(%s, %x)\n"
    done = "  %d = f32[5] call-done(%u)\n"
    # It cannot begin before it is given what it scatters.
    for before, beside, left in ((30, 0, 60), (0, 25, 35), (30, 60, 0)):
        body = start + cycles("a", before) + update + cycles("b", beside) + done
        assert work(body, OFFLOADED) == step_time.Work(
            moves=before + beside, links=left
        )
    # What begins with its start is waited for by the name of its last step.
    given = start.replace("call-start()", "call-start(%x)")
    step = "  %u = ((f32[20]), f32[5]) call-update(%s)\n"
    body = given + cycles("a", 25) + step + done
    assert work(body, OFFLOADED) == step_time.Work(moves=25, links=35)
    text = f"{OFFLOADED}\nENTRY %main.1 (x: f32[1]) -> f32[1] {{\n{start + update + done}}}\n"
    assert hlo.exchanges(hlo.parse(text)) == {"reduce-scatter over fsdp": (20, 20)}


def test_two_exchanges_share_the_wires():
    one = f"  %g = (f32[5], f32[20]) all-gather-start(%x), {GATHER}"
    two = one.replace("%g", "%h").replace("channel_id=1", "channel_id=2")
    ends = "  %e = f32[20] all-gather-done(%g)\n  %f = f32[20] all-gather-done(%h)\n"
    assert work(one + two + ends).links == 120


@pytest.mark.parametrize(
    "kind, members, seconds",
    [
        ("all-gather", 4, 60),
        ("reduce-scatter", 4, 60),
        ("all-reduce", 4, 120),
        ("all-to-all", 4, 80),
        ("all-to-all", 2, 40),
        ("collective-permute", 0, 160),
        ("all-gather", 1, 0),
    ],
)
def test_exchanges_go_round_a_ring(kind, members, seconds):
    one = hlo.Exchange(kind, "fsdp", members, 80.0, 80.0)
    assert step_time.exchange_seconds(one, 4, CHIP, 1) == seconds
    assert step_time.exchange_seconds(one, 4, CHIP, 2) == seconds


def test_slices_exchange_over_the_network():
    one = hlo.Exchange("all-reduce", "replica,fsdp", 4, 80.0, 80.0)
    assert step_time.exchange_seconds(one, 4, CHIP, 2) == 4 * 120


def test_the_hosts_memory_is_behind_its_own_wires():
    body = "  %v = f32[10]{0} bitcast(%x)\n"
    body += (
        "  %s = ((f32[40,10]{1,0:S(5)}, f32[10]), f32[40,10]{1,0:S(5)}, u32[]{:S(2)}) "
        "dynamic-update-slice-start(%o, %v, %i)\n"
    )
    body += cycles("a", 30) + "  %d = f32[40,10] dynamic-update-slice-done(%s)\n"
    assert work(body) == step_time.Work(moves=30, host=10)
    body = (
        "  %s = ((f32[40,100]{1,0:S(5)}, s32[]), f32[1,100]{1,0}, u32[]{:S(2)}) "
        "dynamic-slice-start(%o, %i)\n  %d = f32[1,100] dynamic-slice-done(%s)\n"
    )
    assert work(body) == step_time.Work(host=400)


def test_kernels_count_products_scores_and_tiles():
    line = (
        "  %splash_mha{0}.1 = bf16[2,8,4] custom-call(%a, %q), "
        'custom_call_target="tpu_custom_call", operand_layout_constraints='
        "{{s8[1,4,3]{{2,1,0}}, bf16[2,8,4]{{2,1,0}}, bf16[2,6,4]{{2,1,0}}, s32[6]{{0}}}}, x\n"
    )
    for name, products in (("_fwd", 2), ("_dkv", 5)):
        assert work(line.format(name)) == step_time.Work(
            flops=2 * products * 2 * 8 * 6 * 4, scores=2 * 8 * 6, tiles=2 * 4 * 3
        )
    with pytest.raises(ValueError, match="what the kernel splash_mha.1 computes"):
        work(line.format(""))
    fusion = (
        "  %splash_mha_fwd.7 = bf16[2,8,4] fusion(%a, %q), kind=kCustom, calls=%inner\n"
    )
    inner = "%inner (a: s8[]) -> bf16[2,8,4] {\n" + line.format("_fwd") + "}\n"
    assert work(fusion, inner) == work(line.format("_fwd"))
    reached = dataclasses.replace(
        REACHED, peak=0.5, tile=0.25, vector=4096.0, kernels=0.5
    )
    found = step_time.Work(flops=100.0, scores=3.0, tiles=8.0)
    assert found.parts(CHIP, reached)["kernels"] == (2 + 3) / 0.5 + 2


def test_every_rate_makes_it_faster_and_all_work_makes_it_longer():
    whole = step_time.Work(*[float(n) for n in range(1, 9)])
    seconds = whole.seconds(CHIP, REACHED)
    for name in ("products", "moves", "memory", "flops", "tiles", "links", "host"):
        more = dataclasses.replace(whole, **{name: 100.0})
        slow = dataclasses.replace(REACHED, tile=0.1, vector=0.1)
        assert more.seconds(CHIP, slow) > whole.seconds(CHIP, slow), name
    for name in ("peak", "clock", "bandwidth"):
        faster = dataclasses.replace(CHIP, **{name: 1e6})
        assert whole.seconds(faster, REACHED) < seconds, name
