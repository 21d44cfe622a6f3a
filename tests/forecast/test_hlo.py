"""Compiled programs as text: loops, what devices exchange, what an operation takes."""

import math

from sora_jax.forecast import hlo

PROGRAM = """
%body.1 (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %all-to-all.1 = bf16[8,4]{1,0} all-to-all(%x), channel_id=3, replica_groups=mesh['fsdp'=2,'ulysses'=2] {'ulysses'}, dimensions={0}
  %async-collective-start = (bf16[2,4], bf16[8,4]) fusion(%w), kind=kCustom, calls=%fused.7
  %async-collective-done = bf16[8,4] fusion(%async-collective-start), kind=kCustom, calls=%fused.8
}

%fused.7 (p: bf16[2,4]) -> (bf16[2,4], bf16[8,4]) {
  %all-gather.5 = bf16[8,4]{1,0} all-gather(%p), channel_id=9, replica_groups=mesh['fsdp'=2,'ulysses'=2] {'fsdp','ulysses'}, dimensions={0}
}

%fused.8 (p: bf16[2,4]) -> bf16[8,4] {
  %all-gather.6 = bf16[8,4]{1,0} all-gather(%p), channel_id=9, replica_groups=mesh['fsdp'=2,'ulysses'=2] {'fsdp','ulysses'}, dimensions={0}
}

%condition.1 (p: (s32[], bf16[8,4])) -> pred[] {
  %constant.4 = s32[]{:T(128)} constant(30)
  ROOT %lt = pred[] compare(%i, %constant.4), direction=LT
}

ENTRY %main.2 (p: bf16[8,4]) -> bf16[8,4] {
  %while.1 = (s32[], bf16[8,4]) while(%t), condition=%condition.1, body=%body.1
  %all-reduce.3 = f32[16]{0} all-reduce(%g), channel_id=4, replica_groups=mesh['fsdp'=2,'ulysses'=2] {'fsdp'}, to_apply=%add
}
"""


def test_exchanges_count_by_axis_and_as_often_as_their_loop_runs():
    assert hlo.exchanges(hlo.parse(PROGRAM)) == {
        "all-to-all over ulysses": (30 * 64, 0),
        "all-gather over fsdp,ulysses": (30 * 64, 30 * 64),
        "all-reduce over fsdp": (64, 0),
    }


def test_operations_have_their_cycles_and_types():
    program = hlo.parse(
        """
%fused.1 (a: bf16[8,8]) -> bf16[8,8] {
  ROOT %convolution.1 = bf16[8,8]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

ENTRY %main.1 (a: bf16[8,8]) -> bf16[8,8] {
  %fusion.1 = (bf16[8,8]{1,0:T(8,128)(2,1)S(1)}, f32[2]) fusion(%a, /*index=1*/%b), kind=kOutput, calls=%fused.1, backend_config={"window_config":{"estimated_cycles":"123"}}
  ROOT %copy.2 = bf16[8,8]{1,0} copy(%fusion.1)
}
"""
    )
    fusion, copy = program.computations[program.entry]
    assert (fusion.kind, fusion.cycles, fusion.operands) == ("fusion", 123, ["a", "b"])
    assert hlo.largest(fusion.result) == 128 and hlo.total(fusion.result) == 136
    assert program.multiplies(fusion) and not program.multiplies(copy)
    assert copy.cycles is None


def test_how_many_devices_exchange_is_read_in_every_form():
    line = "  %r = f32[4] all-gather(%x), channel_id=1, replica_groups={}, x"
    forms = {
        "mesh['fsdp'=2,'ulysses'=4] {'fsdp','ulysses'}": 8,
        "{{0,1,2},{3,4,5}}": 3,
        "[2,6]<=[12]": 6,
    }
    for form, members in forms.items():
        program = hlo.parse("ENTRY %m (x: f32[1]) -> f32[4] {\n" + line.format(form))
        (one,) = program.computations["m"]
        assert program.exchange("m", one).members == members, form


def test_numbers_of_every_type_have_their_size():
    types = "(f8e4m3fn[3], f8e5m2[1,2]{1,0}, bf16[4], pred[5], s4[6], u32[], f32[7])"
    sizes = [width * math.prod(shape) for width, shape in hlo.arrays(types)]
    assert sizes == [3, 2, 8, 5, 3, 4, 28]


def test_a_ring_is_named_by_its_sends():
    text = """
ENTRY %m (x: f32[4]) -> f32[4] {
  %r = f32[4]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
}
"""
    assert hlo.exchanges(hlo.parse(text)) == {"collective-permute over ring": (16, 0)}
