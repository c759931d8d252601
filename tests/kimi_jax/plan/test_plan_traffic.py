"""Messages and weight traffic in a compiled program's text: recorded pieces, and a program compiled here."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kimi_jax.plan.hbm import hbm_bytes
from kimi_jax.plan.hlo import nbytes, parse, small_cycles
from kimi_jax.plan.traffic import Collective, MovedWeight, collectives, moved_weights

MESH = {"data": 2, "expert": 1, "tensor": 2, "sequence": 2}
# Text of libtpu 0.0.42.1, shortened: an INT4 stack sliced into VMEM, weights gathered and copied, a loop, a
# conditional.
TEXT = """\
HloModule jit__step, is_scheduled=true, input_output_alias={ {1}: (2, {}, may-alias) }

%region_0.1 (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[]{:T(128)} parameter(0)
  %b.1 = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%a.1, %b.1)
}

%body.2 (arg.2: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %arg.2 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%arg.2), index=0
  %x.2 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%arg.2), index=1
  %ring.2 = f32[8,128]{1,0:T(8,128)} collective-permute(%x.2), channel_id=7, source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}
  ROOT %tuple.2 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%i.2, %ring.2)
}

%cond.2 (arg.3: (s32[], f32[8,128])) -> pred[] {
  %arg.3 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  ROOT %lt.3 = pred[]{:T(512)} constant(true)
}

%branch.4 (arg.4: f32[8,128]) -> f32[8,128] {
  %arg.4 = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %swap.4 = f32[8,128]{1,0:T(8,128)} all-to-all(%arg.4), channel_id=8, replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}
}

%branch.5 (arg.5: f32[8,128]) -> f32[8,128] {
  ROOT %arg.5 = f32[8,128]{1,0:T(8,128)} parameter(0)
}

%fused.6 (arg.6: f32[8,128]) -> f32[32,128] {
  %arg.6 = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %gather.6 = f32[32,128]{1,0:T(8,128)} all-gather(%arg.6), channel_id=10, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

ENTRY %main (param.0: bf16[1024,1024], param.1: s4[8,1024,512], param.2: f32[8,128], param.3: s32[]) -> (f32[8,128], f32[8,128]) {
  %param.0 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="arrays[0]"}
  %param.1 = s4[8,1024,512]{2,1,0:T(64,128)(8,1)E(4)} parameter(1), metadata={op_name="arrays[1]"}
  %param.2 = f32[8,128]{1,0:T(8,128)} parameter(2), metadata={op_name="state.layers[0].pages"}
  %param.3 = s32[]{:T(128)} parameter(3), metadata={op_name="tokens"}
  %bitcast.1 = s8[2097152]{0:T(1024)(128)(4,1)} bitcast(%param.1)
  %slice-start.1 = ((s8[2097152]{0:T(1024)(128)(4,1)}), s8[2097152]{0:T(1024)(128)(4,1)S(1)}, s32[]{:S(2)}) slice-start(%bitcast.1), slice={[0:2097152]}
  %slice-done.1 = s8[2097152]{0:T(1024)(128)(4,1)S(1)} slice-done(%slice-start.1)
  %transpose.1 = bf16[1024,1024]{1,0:T(8,128)(2,1)} transpose(%param.0), dimensions={1,0}
  %gather.1 = (bf16[1024,1024]{1,0:T(8,128)(2,1)}, bf16[2048,1024]{1,0:T(8,128)(2,1)}) all-gather-start(%transpose.1), channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}
  %gather-done.1 = bf16[2048,1024]{1,0:T(8,128)(2,1)} all-gather-done(%gather.1)
  %psum.1 = f32[8,128]{1,0:T(8,128)} all-reduce(%param.2), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%region_0.1
  %psum.2 = f32[8,128]{1,0:T(8,128)} all-reduce(%psum.1), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%region_0.1
  %all.1 = f32[8,128]{1,0:T(8,128)} all-reduce(%psum.2), channel_id=4, replica_groups={}, to_apply=%region_0.1
  %tuple.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, /*index=2*/s32[]{:T(128)}) tuple(%param.3, %all.1, %param.3)
  %while.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%tuple.1), condition=%cond.2, body=%body.2, backend_config={"known_trip_count":{"n":"3"}}
  %while.2 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%while.1), condition=%cond.2, body=%body.2
  %x.1 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%while.2), index=1
  %choice.1 = f32[8,128]{1,0:T(8,128)} conditional(%param.3, %x.1, %x.1), branch_computations={%branch.4, %branch.5}
  %scatter.1 = f32[2,128]{1,0:T(8,128)} reduce-scatter(%choice.1), channel_id=9, replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}, to_apply=%region_0.1
  %room.1 = f32[32,128]{1,0:T(8,128)} broadcast(%param.3), dimensions={}
  %at.1 = s32[4]{0:T(128)} broadcast(%param.3), dimensions={}
  %ragged.1 = f32[32,128]{1,0:T(8,128)} ragged-all-to-all(%choice.1, %room.1, %at.1, %at.1, %at.1, /*index=5*/%at.1), channel_id=11, replica_groups={{0,1,2,3},{4,5,6,7}}
  %started.1 = f32[32,128]{1,0:T(8,128)} fusion(%choice.1), kind=kCustom, calls=%fused.6
  ROOT %tuple.9 = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) tuple(%choice.1, %param.2)
}
"""  # noqa: E501 - as XLA writes it


def test_messages_have_their_axes_sizes_and_counts():
    found = set(collectives(parse(TEXT), MESH))
    block = 8 * 128 * 4
    assert found == {
        Collective("all-gather", ("data",), 2, 2**21, 1),
        Collective("all-gather", ("tensor", "sequence"), 4, block, 1),
        Collective("all-reduce", ("tensor", "sequence"), 4, block, 2),
        Collective("all-reduce", ("data", "tensor", "sequence"), 8, block, 1),
        Collective("collective-permute", ("sequence",), 2, block, 3),
        Collective("collective-permute", ("sequence",), 2, block, 1, in_loop=True),
        Collective("all-to-all", ("tensor",), 2, block, 1),
        Collective("reduce-scatter", ("tensor",), 2, block, 1),
        Collective("ragged-all-to-all", ("tensor", "sequence"), 4, block, 1),
    }


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("all-reduce", 1500), ("all-gather", 3000), ("reduce-scatter", 750), ("all-to-all", 750),
     ("collective-permute", 1000)],
)  # fmt: skip
def test_what_a_device_has_to_send(kind, sent):
    # of 1,000 bytes among four devices; an all-reduce is a reduce-scatter and an all-gather of quarters
    assert Collective(kind, ("tensor",), 4, 1000, 1).sent == sent
    assert Collective(kind, ("tensor",), 4, 1000, 5).sent == 5 * sent


@pytest.mark.parametrize("rows", [1, 8])
def test_a_ragged_source_of_one_row_goes_to_all(rows):
    # Given a ragged message whose source has so many rows
    text = re.sub(r"f32\[8,128\](.* conditional)", rf"f32[{rows},128]\1", TEXT)
    (found,) = [one for one in collectives(parse(text), MESH) if one.kind == "ragged-all-to-all"]
    assert found.nbytes == rows * 128 * 4
    assert found.sent == found.nbytes * (3 if rows == 1 else 3 / 4)


def test_weights_that_are_gathered_or_copied_are_found():
    assert moved_weights(parse(TEXT), r"arrays\[") == [
        MovedWeight("copy", "transpose.1", 2**21),
        MovedWeight("all-gather", "gather.1", 2**22),
    ]


@pytest.mark.parametrize(
    ("shape", "size"),
    [("f32[8,128]{1,0:T(8,128)}", 4096), ("s4[6,7168,2048]{2,1,0:T(64,128)(8,1)E(4)}", 6 * 7168 * 1024), ("pred[3]", 3),
     ("f8e4m3fn[4,4]", 16), ("bf16[]", 2), ("(f32[2]{0}, (s32[], token[]))", 12), ("u8[<=5]", 5)],
)  # fmt: skip
def test_bytes_of_a_shape(shape, size):
    assert nbytes(shape) == size


@pytest.mark.parametrize(
    ("groups", "axes"),
    [("{{0,1},{2,3},{4,5},{6,7}}", ("sequence",)), ("[4,2]<=[8]", ("sequence",)),
     ("[4,2]<=[4,2]", ("sequence",)), ("[2,4]<=[2,4]T(0,1)", ("tensor", "sequence")),
     ("[4,2]<=[2,4]T(1,0)", ("data",)), ("[2,4]<=[2,2,2]T(1,0,2)", ("data", "sequence")), ("[1,8]<=[8]",
      ("data", "tensor", "sequence")), ("mesh['data'=2,'tensor'=2,'sequence'=2] {'tensor'}", ("tensor",)),
     ("mesh['data'=2,'tensor'=2,'sequence'=2] {'data','sequence'}", ("data", "sequence")),
     ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", ("sequence",)),
     ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ("data", "tensor"))],
)  # fmt: skip
def test_every_way_to_write_groups(groups, axes):
    # Given one message
    lines = [line for line in TEXT.splitlines() if "channel_id" not in line or "%all.1" in line]
    text = "\n".join(lines).replace("%psum.2)", "%param.2)").replace("replica_groups={}", f"replica_groups={groups}")
    (found,) = collectives(parse(text), MESH)
    assert (found.axes, found.group) == (axes, 2 ** len(axes))


def test_only_what_lies_in_hbm():
    pair = "(bf16[512]{0:T(512)(128)(2,1)S(1)}, bf16[512]{0:T(512)(128)(2,1)}, u32[]{:S(2)})"
    assert (nbytes(pair), nbytes(pair, hbm_only=True)) == (2052, 1024)


def test_a_program_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule empty\n")
    unknown = TEXT.replace("replica_groups={}", "replica_groups=@mesh<a=2>")
    with pytest.raises(ValueError, match=r"unknown form: .*@mesh"):
        collectives(parse(unknown), MESH)


def test_a_program_compiled_here():
    # Given weights split over one axis, and a step that gathers one of them and sums over the other axis
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def place(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def part(arrays, x):
        whole = jax.lax.all_gather(arrays[0], "tensor", axis=0, tiled=True)
        y = jnp.dot(x, whole) @ arrays[1]

        def turn(_, y):
            return jnp.sin(jax.lax.ppermute(y, "data", [(0, 1), (1, 0)]))

        return jax.lax.psum(jax.lax.fori_loop(0, 5, turn, y), ("data", "tensor"))

    def step(arrays, x):
        specs = ([PartitionSpec("tensor"), PartitionSpec()], PartitionSpec("data"))
        return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)(arrays, x)

    arrays = [place((512, 1024), "tensor"), place((1024, 64))]
    program = parse(jax.jit(step).lower(arrays, place((16, 512), "data")).compile().as_text())

    # Then the analysis finds all of it
    found = collectives(program, dict(mesh.shape))
    assert Collective("all-gather", ("tensor",), 4, 512 * 1024, 1) in found
    assert Collective("all-reduce", ("data", "tensor"), 8, 8 * 64 * 4, 1) in found
    assert Collective("collective-permute", ("data",), 2, 8 * 64 * 4, 5) in found
    assert len(found) == 3
    (gathered,) = [moved for moved in moved_weights(program, r"arrays\[") if moved.how != "copy"]
    assert (gathered.how, gathered.nbytes) == ("all-gather", 2**21)


def test_what_goes_to_and_from_hbm():
    # the INT4 stack into VMEM; weights transposed, then gathered to twice as much; sums of a block; loops as they stand
    block, weights = 8 * 128 * 4, 2**21
    loops = 2 * 2 * (block + 4) + 4  # the first loop's tuple has one more number
    sums = 3 * 2 * block
    choice, scatter, fusion = 3 * block + 4, block + block // 4, 5 * block
    ragged = (4 * block + 4) + (4 * 4 + 4) + (9 * block + 4 * 4 * 4)  # its output and offsets too
    others = sums + loops + choice + scatter + ragged + fusion
    assert hbm_bytes(parse(TEXT)) == 2**21 + 2 * weights + 3 * weights + others


def test_what_a_fusion_only_picks_from_is_not_read_whole():
    text = """\
%picks.1 (table: bf16[20480,7168], rows: s32[8]) -> bf16[8,7168] {
  %table.1 = bf16[20480,7168]{1,0} parameter(0)
  %rows.1 = s32[8]{0} parameter(1)
  ROOT %gather.1 = bf16[8,7168]{1,0} gather(%table.1, %rows.1), slice_sizes={1,7168}
}

ENTRY %main.1 (table: bf16[20480,7168], rows: s32[8], pages: bf16[512,576,128]) -> (bf16[8,7168], bf16[1]) {
  %table.2 = bf16[20480,7168]{1,0} parameter(0)
  %rows.2 = s32[8]{0} parameter(1)
  %pages.2 = bf16[512,576,128]{2,1,0} parameter(2)
  %picked.2 = bf16[8,7168]{1,0} fusion(%table.2, %rows.2), kind=kLoop, calls=%picks.1
  %write.2 = bf16[512,576,128] custom-call(%picked.2, %rows.2, %pages.2), output_to_operand_aliasing={{}: (2, {})}
  %out.2 = bf16[512,576,128]{2,1,0:S(1)} copy-start(%write.2)
  ROOT %tuple.2 = (bf16[8,7168]{1,0}, bf16[512,576,128]{2,1,0}) tuple(%picked.2, %write.2)
}
"""
    rows, pages = 8 * 7168 * 2, 512 * 576 * 128 * 2
    picked, written, fetched = 2 * rows + 32, rows + 32, pages
    assert hbm_bytes(parse(text)) == picked + written + fetched


def test_a_slice_is_written_in_place():
    text = """\
ENTRY %main.1 (pages: s8[64,8192,128], token: s8[64,1,128], at: s32[]) -> s8[64,8192,128] {
  %pages.1 = s8[64,8192,128]{2,1,0} parameter(0)
  %token.1 = s8[64,1,128]{2,1,0} parameter(1)
  %at.1 = s32[] parameter(2)
  %near.1 = s8[64,1,128]{2,1,0:S(1)} copy-start(%token.1)
  %first.1 = s8[64,8192,128]{2,1,0} dynamic-update-slice(%pages.1, %token.1, %at.1, %at.1, %at.1)
  ROOT %second.1 = s8[64,8192,128]{2,1,0} dynamic-update-slice(%first.1, %near.1, %at.1, %at.1, %at.1)
}
"""
    token = 64 * 128
    assert hbm_bytes(parse(text)) == token + 2 * token + token  # fetched; read and written; written out of VMEM


def test_small_cycles_are_those_of_the_entry_that_are_known():
    text = """\
%body.1 (x: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  ROOT %double.1 = f32[8]{0} add(%x.1, %x.1), backend_config={"estimated_cycles":"100"}
}

ENTRY %main.1 (x: f32[8]) -> f32[8] {
  %x.2 = f32[8]{0} parameter(0)
  %a.2 = f32[8]{0} fusion(%x.2), kind=kLoop, calls=%body.1, backend_config={"flags":[],"estimated_cycles":"2124"}
  %b.2 = f32[8]{0} custom-call(%a.2), custom_call_target="tpu_custom_call"
  %c.2 = f32[8]{0} fusion(%b.2), kind=kLoop, calls=%body.1, backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %d.2 = f32[8]{0} fusion(%c.2), kind=kLoop, calls=%body.1, backend_config={"estimated_cycles":"76","x":"1"}
}
"""
    assert small_cycles(parse(text)) == 2200
