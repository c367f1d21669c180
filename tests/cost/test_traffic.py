# SPDX-License-Identifier: Apache-2.0
"""Collectives and memory traffic, of programs written by hand and of compiled
ones whose traffic is known."""

from typing import Callable

import jax
from jax.sharding import Mesh, PartitionSpec as P
import jax.numpy as jnp
import numpy as np
import pytest

from tfjax.cost import hlo
from tfjax.cost import traffic

NESTED = """\
HloModule step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p: (s32[], f32[16])) -> (s32[], f32[16]) {
  %p = (s32[], f32[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[16]{0:T(128)} get-tuple-element(%p), index=1
  %r = f32[16]{0:T(128)} all-reduce(%x), channel_id=1, replica_groups=[4,2]<=[8], to_apply=%add
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %t = (s32[], f32[16]{0}) tuple(%next, %r)
}

%inner_condition (q: (s32[], f32[16])) -> pred[] {
  %q = (s32[], f32[16]{0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%q), index=0
  %three = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[] compare(%i.2, %three), direction=LT
}

%outer_body (p.1: (s32[], f32[16])) -> (s32[], f32[16]) {
  %p.1 = (s32[], f32[16]{0}) parameter(0)
  %w = (s32[], f32[16]{0}) while(%p.1), condition=%inner_condition, body=%inner_body
  %x.1 = f32[16]{0} get-tuple-element(%w), index=1
  %i.1 = s32[] get-tuple-element(%w), index=0
  %s = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%x.1), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %d = f32[16]{0} collective-permute-done(%s)
  ROOT %t.1 = (s32[], f32[16]{0}) tuple(%i.1, %d)
}

%outer_condition (q.1: (s32[], f32[16])) -> pred[] {
  %q.1 = (s32[], f32[16]{0}) parameter(0)
  ROOT %unread = pred[] custom-call(%q.1), custom_call_target="who_knows"
}

%all-reduce-scatter.7 (input: bf16[64,8]) -> bf16[8,8] {
  %input = bf16[64,8]{1,0} parameter(0)
  %whole = bf16[64,8]{1,0} all-reduce(%input), channel_id=3, replica_groups=mesh['a'=4,'b'=2] {'a','b'}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = bf16[8,8]{1,0} dynamic-slice(%whole, %zero, %zero), dynamic_slice_sizes={8,8}
}

%early (e: bf16[8,8]) -> bf16[32,8] {
  %e = bf16[8,8]{1,0} parameter(0)
  ROOT %g = bf16[32,8]{1,0} all-gather(%e), channel_id=4, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
}

%late (f: bf16[8,8]) -> bf16[32,8] {
  %f = bf16[8,8]{1,0} parameter(0)
  ROOT %g.1 = bf16[32,8]{1,0} all-gather(%f), channel_id=4, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
}

%cheap (c: f32[16]) -> f32[16] {
  ROOT %c = f32[16]{0} parameter(0)
}

%dear (h: f32[16]) -> f32[16] {
  %h = f32[16]{0} parameter(0)
  ROOT %l = f32[16]{0} all-to-all(%h), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

ENTRY %main (x.9: f32[16], y.9: bf16[64,8], n: s32[]) -> f32[16] {
  %x.9 = f32[16]{0} parameter(0)
  %y.9 = bf16[64,8]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %t.9 = (s32[], /*index=1*/f32[16]{0}) tuple(%n, %x.9)
  %loop = (s32[], f32[16]{0}) while(%t.9), condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"5"}}
  %kernel = f32[16]{0} custom-call(%x.9), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block_q": 128
}}, metadata={op_name="attention"}
  %part.9 = bf16[8,8]{1,0} fusion(%y.9), kind=kCustom, calls=%all-reduce-scatter.7
  %g.8 = bf16[32,8]{1,0} fusion(%part.9), kind=kLoop, calls=%early
  %g.9 = bf16[32,8]{1,0} fusion(%part.9), kind=kLoop, calls=%late
  %alone = f32[16]{0} all-reduce(%x.9), channel_id=6, replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  %x.10 = f32[16]{0} get-tuple-element(%loop), index=1
  ROOT %out = f32[16]{0} conditional(%n, %x.10, %x.10), branch_computations={%cheap, %dear}
}
"""


def by_kind(text: str) -> dict[str, traffic.Collective]:
  found, unknown = traffic.collectives(hlo.parse(text))
  assert not unknown
  assert len({one.kind for one in found}) == len(found), found
  return {one.kind: one for one in found}


def test_collectives_of_nested_loops_fusions_and_branches() -> None:
  found = by_kind(NESTED)
  # 5 rounds of 3; pairs: twice half of 64 bytes.
  assert found["all-reduce"] == traffic.Collective(
      "all-reduce", "f32[16]", 1, 2, 15, 64.0)
  assert found["collective-permute"] == traffic.Collective(
      "collective-permute", "f32[16]", 1, 2, 5, 64.0)
  # Seven eighths of 1024 bytes.
  assert found["reduce-scatter"] == traffic.Collective(
      "reduce-scatter", "bf16[64,8]", 1, 8, 1, 896.0)
  # One gather in two fusions: each of 4 sends its 128 bytes on three times.
  assert found["all-gather"] == traffic.Collective(
      "all-gather", "bf16[8,8]", 1, 4, 1, 384.0)
  # The branch that sends most: three quarters of 64 bytes.
  assert found["all-to-all"] == traffic.Collective(
      "all-to-all", "f32[16]", 1, 4, 1, 48.0)


def test_a_loop_of_unknown_length_is_said_and_counts_once() -> None:
  text = NESTED.replace('"known_trip_count":{"n":"5"}', "")
  found, unknown = traffic.collectives(hlo.parse(text))
  assert unknown == 1
  assert {one.kind: one.times for one in found}["all-reduce"] == 3


def test_a_counter_may_go_in_larger_steps() -> None:
  text = NESTED.replace("constant(1)", "constant(2)")
  assert by_kind(text)["all-reduce"].times == 5 * 2  # 0 and 2 are below 3
  # Without a constant step the length is not known.
  text = text.replace("add(%i, %one)", "add(%i, %i)")
  assert traffic.collectives(hlo.parse(text))[1] == 1


def test_a_part_of_a_mesh_axis_is_a_group() -> None:
  text = NESTED.replace("{'a'}, dimensions", "{'a':(1)2,'b'}, dimensions")
  assert by_kind(text)["all-gather"].group == 4
  assert by_kind(text.replace("'b'}, dim", "}, dim"))["all-gather"].group == 2


@pytest.mark.parametrize("notation, size", [
    ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", 2),
    ("{}", 8), ("[2,4]<=[4,2]T(1,0)", 4), ("{{0,4},{1,5},{2,6},{3,7}}", 2)])
def test_groups_in_every_notation(notation: str, size: int) -> None:
  text = NESTED.replace("mesh['a'=4,'b'=2] {'a'}", notation)
  assert by_kind(text)["all-gather"].group == size


def test_groups_in_an_unknown_notation_are_not_guessed() -> None:
  with pytest.raises(ValueError, match="unknown notation"):
    by_kind(NESTED.replace("mesh['a'=4,'b'=2] {'a'}", "everybody"))


def test_text_that_is_no_program_is_refused() -> None:
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.parse("HloModule nothing")


def compiled(function: Callable, *arguments: jax.Array) -> hlo.Module:
  return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text())


def test_a_compiled_scans_collectives() -> None:
  """A psum of 4 KiB in a scan of 5, then an all-gather of 4 KiB."""
  mesh = Mesh(np.array(jax.devices()), ("x",))

  def step(x, weights):
    def body(carry, weight):
      return jax.lax.psum(carry * weight, "x") * 0.1, None
    carry, _ = jax.lax.scan(body, x, weights)
    return jax.lax.all_gather(carry, "x")

  found, unknown = traffic.collectives(compiled(
      jax.shard_map(step, mesh=mesh, in_specs=(P("x"), P()),
                    out_specs=P(None, "x"), check_vma=False),
      jnp.ones((8, 1024)), jnp.ones((5, 1, 1024))))
  assert not unknown
  assert {one.kind: (one.times, one.group, one.bytes_sent)
          for one in found} == {"all-reduce": (5, 8, 2 * 7 / 8 * 4096),
                                "all-gather": (1, 8, 7 * 4096)}


# --- Memory ------------------------------------------------------------------


def test_an_elementwise_program_reads_and_writes_once() -> None:
  moved, unknown = traffic.memory_bytes(compiled(
      lambda x: jnp.sin(x) + 1, jnp.ones(1000)))
  assert (moved, unknown) == (2 * 4000, 0)


def test_a_matrix_product_reads_both_and_writes_one() -> None:
  moved, _ = traffic.memory_bytes(compiled(
      jnp.matmul, jnp.ones((64, 256)), jnp.ones((256, 128))))
  assert moved == 4 * (64 * 256 + 256 * 128 + 64 * 128)


def test_a_scan_reads_of_its_stack_a_slice_a_round() -> None:
  """Ten rounds over a stack of 1 MB that read it once, not ten times."""
  rounds, size = 10, 25_000

  def step(x, stack):
    return jax.lax.scan(lambda c, w: (jnp.sin(c * w), None), x, stack)[0]
  moved, unknown = traffic.memory_bytes(compiled(
      step, jnp.ones(size), jnp.ones((rounds, size))))
  assert not unknown
  # A round reads the carry and a slice, and writes the carry: 3 arrays; the
  # carry may be copied once on the way in.
  least = 3 * rounds * 4 * size
  assert least <= moved <= least + 3 * 4 * size


SLICED = """\
HloModule step, num_partitions=1

%update (stack: f32[8,100], row: f32[1,100], at: s32[]) -> f32[8,100] {
  %stack = f32[8,100]{1,0} parameter(0)
  %row = f32[1,100]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %null = s32[] constant(0)
  ROOT %new = f32[8,100]{1,0} dynamic-update-slice(%stack, %row, %at, %null)
}

ENTRY %main (s: f32[8,100], r: f32[1,100], i: s32[]) -> f32[8,100] {
  %s = f32[8,100]{1,0} parameter(0)
  %r = f32[1,100]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %near = f32[1,100]{1,0:T(1,128)S(1)} negate(%r)
  ROOT %f = f32[8,100]{1,0} fusion(%s, %near, %i), kind=kLoop, calls=%update
}
"""


def test_in_place_updates_and_vector_memory() -> None:
  """`near` reads 400 bytes and stays in vector memory; the fusion reads the
  index, 4 bytes, and writes one row of eight."""
  moved, _ = traffic.memory_bytes(hlo.parse(SLICED))
  assert moved == 400 + 4 + 400
  away = SLICED.replace("S(1)", "")
  moved, _ = traffic.memory_bytes(hlo.parse(away))
  assert moved == 400 + 400 + 400 + 4 + 400
