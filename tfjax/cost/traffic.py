# SPDX-License-Identifier: Apache-2.0
"""What a step moves, from the compiled program: between devices (collectives)
and between a device and its memory.
"""

import dataclasses
import math
import re

from tfjax.cost import hlo

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all",
         "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program.

  Attributes:
    kind: one of KINDS.
    shape: the largest array that a device puts in, such as "bf16[8,128]".
    arrays: how many it puts in.
    group: devices that take part together; of a collective-permute 2.
    times: how often a step executes it.
    bytes_sent: by a device, each time, by the ring algorithm: of what n
      devices hold together, (n - 1) / n for all-gather, reduce-scatter and
      all-to-all, twice that for all-reduce (Thakur et al. 2005).
  """

  kind: str
  shape: str
  arrays: int
  group: int
  times: int
  bytes_sent: float


def collectives(module: hlo.Module) -> tuple[list[Collective], int]:
  """All collectives of more than one device, and the loops of unknown length.

  A TPU's compiler writes one asynchronous collective several times, into each
  fusion that it overlaps with: what has the channel of another in the same
  loop body counts once.
  """
  def weigh(one: hlo.Executed) -> float:
    found = _collective(module, one)
    return found.bytes_sent if found else 0.0

  everything, unknown = hlo.executed(module, weigh)
  result, seen = [], set()
  for one in everything:
    found = _collective(module, one)
    if not found:
      continue
    channel = re.search(r"channel_id=(\d+)", one.instruction.attributes)
    if one.fused and channel:
      key = one.scope, found.kind, channel[1]
      if key in seen:
        continue
      seen.add(key)
    result.append(found)
  return result, unknown


def _collective(module: hlo.Module, one: hlo.Executed) -> Collective | None:
  instruction = one.instruction
  kind = instruction.opcode.removesuffix("-start").removeprefix("ragged-")
  if kind not in KINDS:
    return None
  # A TPU's reduce-scatter: an all-reduce and a slice of it, in one computation.
  if kind == "all-reduce" and one.computation.startswith("all-reduce-scatter"):
    kind = "reduce-scatter"
  group = _group_size(instruction.attributes, module.num_devices)
  if group == 1:
    return None
  inputs = module.computations[one.computation]
  shapes = [inputs[name].shape for name in instruction.operands]
  factor = {"all-gather": group - 1, "collective-permute": 1,
            "all-reduce": 2 * (group - 1) / group}.get(
                kind, (group - 1) / group)
  largest = max(shapes, key=hlo.shape_bytes)
  return Collective(kind, re.sub(r"\{[^{}]*\}", "", largest), len(shapes),
                    group, one.times,
                    factor * sum(map(hlo.shape_bytes, shapes)))


def _group_size(attributes: str, num_devices: int) -> int:
  """Devices that take part together, from any of the notations."""
  if "source_target_pairs=" in attributes:
    return 2
  # mesh['a'=4,'b'=2] {'a','b'}, with a part of an axis as 'a':(1)2; the order
  # of the devices may stand in between.
  if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}",
                        attributes):
    sizes = dict(re.findall(r"'([^']*)'=(\d+)", match[1]))
    return math.prod(
        int(part or sizes[name]) for name, part in
        re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", match[2]))
  # [2,4]<=[8]: 2 groups of 4.
  if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
    return int(match[1])
  if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
    return match[1].count(",") + 1
  if "replica_groups={}" in attributes:
    return num_devices
  raise ValueError(f"groups of devices in an unknown notation: {attributes}")


# --- Memory ------------------------------------------------------------------

# What moves nothing itself: names for what is there, and what has a body.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast",
         "while", "conditional", "call", "after-all", "partition-id",
         "replica-id", "opt-barrier"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_VIEWS = {"bitcast", "reshape", "transpose", "copy", "convert"}


def memory_bytes(module: hlo.Module) -> tuple[float, int]:
  """Bytes that a step reads from and writes to memory, and the loops of
  unknown length.

  What each instruction reads and writes, a fusion as one; of an array that is
  sliced, or updated in place, only that part. Nothing is assumed to stay in a
  cache, but what a layout puts into a TPU's vector memory is left out.
  """
  everything, unknown = hlo.executed(module, lambda one: _moved(module, one))
  return sum(one.times * _moved(module, one) for one in everything), unknown


def _moved(module: hlo.Module, one: hlo.Executed) -> int:
  instruction = one.instruction
  opcode = instruction.opcode
  if one.fused or opcode in _FREE:
    return 0
  inputs = module.computations[one.computation]
  shapes = [inputs[name].shape for name in instruction.operands
            if name in inputs]
  if opcode.endswith("-done"):
    return _in_memory(instruction.shape)
  if opcode.endswith("-start"):
    return sum(map(_in_memory, shapes))
  if opcode in _SLICES:
    return 2 * _in_memory(instruction.shape)
  if opcode == "dynamic-update-slice":
    return 2 * _in_memory(shapes[1])
  if opcode == "fusion":
    (name,) = hlo.called(instruction, "calls")
    read = sum(min(_in_memory(shape), _read(module, name, index))
               for index, shape in enumerate(shapes))
    return read + _written(module, name, hlo.arrays(instruction.shape))
  return _in_memory(instruction.shape) + sum(map(_in_memory, shapes))


def _in_memory(shape: str) -> int:
  """Bytes of those arrays that are in the device's main memory."""
  return sum(hlo.shape_bytes(array) for array in hlo.arrays(shape)
             if not re.search(r"S\([1-9]", array))


def _read(module: hlo.Module, computation: str, index: int) -> int:
  """Bytes that a fused computation reads of a parameter, at most."""
  body = module.computations[computation]

  def uses(name: str) -> int:
    return sum(use(one, name) for one in body.values()
               if name in one.operands)

  def use(one: hlo.Instruction, name: str) -> int:
    first = one.operands[0] == name
    if one.opcode in _SLICES and first:
      return hlo.shape_bytes(one.shape)
    if one.opcode == "dynamic-update-slice" and first:
      return 0
    if one.opcode in _VIEWS:
      return uses(one.name)
    if one.opcode == "fusion":
      (inner,) = hlo.called(one, "calls")
      return _read(module, inner, one.operands.index(name))
    return 0 if one.opcode == "tuple" else hlo.shape_bytes(body[name].shape)

  names = [one.name for one in body.values()
           if one.opcode == "parameter" and one.arguments == str(index)]
  return sum(map(uses, names))


def _written(module: hlo.Module, computation: str, outputs: list[str]) -> int:
  """Bytes that a fused computation writes of its outputs."""
  body = module.computations[computation]
  (root,) = (one for one in body.values() if one.is_root)
  results = ([body[name] for name in root.operands]
             if root.opcode == "tuple" else [root])
  if len(results) != len(outputs):  # nested tuples
    return sum(map(_in_memory, outputs))
  total = 0
  for result, output in zip(results, outputs):
    whole = _in_memory(output)
    while result.opcode in _VIEWS:
      result = body[result.operands[0]]
    if whole and result.opcode == "dynamic-update-slice":
      # The update is written, and what is not written stays where it is.
      whole = min(whole, hlo.shape_bytes(body[result.operands[1]].shape))
    elif whole and result.opcode == "fusion":
      (inner,) = hlo.called(result, "calls")
      whole = min(whole, _written(module, inner, [output]))
    total += whole
  return total
