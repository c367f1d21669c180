# SPDX-License-Identifier: Apache-2.0
"""A compiled program, read from its text (XLA's HLO), and how often each
instruction is executed: XLA's own cost analysis counts a loop's body once.

Read are shapes, which computation calls which, and how often loops run;
nothing is simulated. What instructions move is in `tfjax.cost.traffic`.
"""

from collections.abc import Callable
import dataclasses
import math
import re


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    arguments: what is in the parentheses: operands, a constant's value, a
      parameter's number.
    operands: names of instructions of the same computation.
    attributes: what follows them.
  """

  name: str
  opcode: str
  shape: str
  arguments: str
  attributes: str
  is_root: bool = False

  @property
  def operands(self) -> list[str]:
    return _NAME.findall(self.arguments)


@dataclasses.dataclass(frozen=True)
class Module:
  """A program: computations by name, each instructions by name, in order."""

  computations: dict[str, dict[str, Instruction]]
  entry: str
  num_devices: int


@dataclasses.dataclass(frozen=True)
class Executed:
  """An instruction with how often a step executes it.

  Attributes:
    computation: the one that it is in.
    scope: the loop body, branch or entry that it runs in.
    fused: it is in a fusion or an asynchronous computation of that scope.
  """

  instruction: Instruction
  computation: str
  scope: str
  fused: bool
  times: int


# --- Reading -----------------------------------------------------------------

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{[^{}]*\})?")
_BITS = re.compile(r"[a-z]+(\d+)")
_INTEGER = re.compile(r"[su]32\[\]")
_PARTITIONS = re.compile(r"num_partitions=(\d+)")


def parse(text: str) -> Module:
  """The program of `compiled.as_text()`."""
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = "", None
  for line in text.splitlines():
    if header := _HEADER.match(line):
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif line == "}":  # A kernel's metadata has lines that start with one.
      current = None
    elif current is not None and (match := _LINE.match(line)):
      if one := _instruction(match[2], match[3], bool(match[1])):
        current[one.name] = one
  if not entry:
    raise ValueError("the text has no ENTRY computation; it is not HLO")
  partitions = _PARTITIONS.search(text)
  return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(name: str, rest: str, is_root: bool) -> Instruction | None:
  """`SHAPE opcode(operands), attributes`."""
  end = _closing(rest, 0) if rest.startswith("(") else rest.find(" ")
  opcode = _OPCODE.match(rest, end)
  if not opcode:
    return None
  close = _closing(rest, opcode.end() - 1)
  return Instruction(name, opcode[1], rest[:end],
                     rest[opcode.end():close - 1], rest[close:], is_root)


def _closing(text: str, start: int) -> int:
  """Behind the parenthesis that closes the one at `start`."""
  depth = 0
  for match in re.compile(r"[()]").finditer(text, start):
    depth += 1 if match[0] == "(" else -1
    if not depth:
      return match.end()
  return len(text)


def called(instruction: Instruction, key: str) -> list[str]:
  """The computations that an attribute names."""
  match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)",
                    instruction.attributes)
  return re.findall(r"[\w.\-]+", match[1]) if match else []


def arrays(shape: str) -> list[str]:
  """The arrays of "(f32[8,2]{1,0}, s32[])", or the one of "f32[8]"."""
  return [match[0] for match in _ARRAY.finditer(shape)]


def shape_bytes(shape: str) -> int:
  """Bytes of an array or of a tuple's arrays, without padding."""
  total = 0
  for dtype, dimensions in _ARRAY.findall(shape):
    bits = _BITS.match(dtype)
    size = int(bits[1]) if bits else {"pred": 8}.get(dtype, 0)
    total += -(-size * math.prod(
        int(d) for d in dimensions.split(",") if d) // 8)
  return total


# --- What is executed --------------------------------------------------------


def trip_count(module: Module, loop: Instruction) -> int | None:
  """How often a while instruction's body runs; None: the text does not tell.

  Where the compiler has not noted it: a counter from 0, to which the body adds
  a constant, and which the condition finds to be less than another. A scan's
  constant is 1, and 2 in the loops that overlap a product with a gather.
  """
  noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
  if noted:
    return int(noted[1])
  condition, body = (module.computations[called(loop, key)[0]]
                     for key in ("condition", "body"))
  limits = _constants(condition, list(condition))
  counters = [one for one in condition.values()
              if one.opcode == "get-tuple-element"
              and _INTEGER.match(one.shape)]
  if len(limits) != 1 or len(counters) != 1:
    return None
  index = int(re.search(r"index=(\d+)", counters[0].attributes)[1])
  (root,) = (one for one in body.values() if one.is_root)
  if root.opcode != "tuple":
    return None
  steps = _constants(body, body[root.operands[index]].operands)
  return -(-limits[0] // steps[0]) if len(steps) == 1 and steps[0] else None


def _constants(body: dict[str, Instruction], names: list[str]) -> list[int]:
  """Values of the integer constants among these."""
  return [int(body[name].arguments) for name in names
          if body[name].opcode == "constant"
          and _INTEGER.match(body[name].shape)]


def executed(module: Module, weigh: Callable[[Executed], float]) -> (
    tuple[list[Executed], int]):
  """Every instruction that a step executes, and how many loops run for a
  number of times that is not known (they count as one).

  Of a conditional's branches only the one that weighs most counts.
  """
  unknown = 0

  def inside(one: Instruction, scope: str, fused: bool) -> list[Executed]:
    nonlocal unknown
    if one.opcode == "while":
      times = trip_count(module, one)
      unknown += times is None
      (body,) = called(one, "body")
      return [dataclasses.replace(x, times=x.times * (times or 1))
              for x in visit(body, body, False)]
    if one.opcode == "conditional":
      branches = called(one, "branch_computations") or (
          called(one, "true_computation") + called(one, "false_computation"))
      return max((visit(name, name, False) for name in branches),
                 key=lambda found: sum(weigh(x) * x.times for x in found))
    if one.opcode == "call":
      return [x for name in called(one, "to_apply")
              for x in visit(name, scope, fused)]
    return [x for name in called(one, "calls")
            for x in visit(name, scope, True)]

  def visit(computation: str, scope: str, fused: bool) -> list[Executed]:
    found = []
    for one in module.computations[computation].values():
      found.append(Executed(one, computation, scope, fused, 1))
      found += inside(one, scope, fused)
    return found

  return visit(module.entry, module.entry, False), unknown
