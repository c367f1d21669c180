# SPDX-License-Identifier: Apache-2.0
"""The part of scripts/plan.py that compiles: for --topology and --devices.

The train step is compiled for a machine that is not here. Says whether it
fits, what takes a device's memory, what the devices send each other, how fast
a step could be at best, and what to change. No data is read.
"""

import collections
import dataclasses
from typing import Any, Sequence

from rich import console as console_lib

import plan_show as show
from tfjax import config as config_lib
from tfjax.cost import flops as flops_lib
from tfjax.cost import lengths as lengths_lib
from tfjax.cost import roofline as roofline_lib
from tfjax.models import transformer
from tfjax.train import ahead
from tfjax.train import remedies
from tfjax.train import sharding


def plan(console: console_lib.Console, config: config_lib.ExperimentConfig,
         devices: Sequence[Any], *, topology: str | None, memory: int | None,
         advice: bool) -> dict[str, Any]:
  """Compiles, shows and advises; returns all of it, ready for JSON.

  Args:
    topology: its name, None for simulated devices.
    memory: bytes of a device; None: the hardware's.
    advice: whether to compile what else could be done.
  """
  if config.mesh.data is None and config.runtime.num_devices is None:
    config = remedies.changed(config, {"runtime.num_devices": len(devices)})
  mesh = ahead.make_mesh(config, devices)
  result = size_of(config, mesh, topology)
  show_size(console, result)
  with console.status("compiling the train step"):
    outcome = ahead.compile_step(config, mesh, memory)
  result |= outcome_of(config, mesh, outcome)
  show_outcome(console, result)
  result |= dict(tries=[], remedy=None, largest_batch=None)
  if advice and outcome.fits is not None:
    result |= advise(console, config, devices, outcome, memory)
  result["verdict"] = verdict(result)
  show.line(console, result["verdict"])
  return result


# --- What is found -----------------------------------------------------------


def size_of(config: config_lib.ExperimentConfig, mesh: Any,
            topology: str | None) -> dict[str, Any]:
  """The model, the batch and the machine."""
  counts = transformer.count_parameters(config.model)
  device = ahead.describe(list(mesh.devices.flat), config.train.dtype)
  return dict(
      name=config.name, family=config.model.family,
      params_total=counts.total, params_embedding=counts.embedding,
      batch_size=config.train.batch_size,
      accumulation_steps=config.train.accumulation_steps,
      batch_tokens=(config.train.batch_size * lengths_lib.of(config).window),
      dtype=config.train.dtype, remat=config.model.remat,
      scan_layers=config.model.scan_layers, topology=topology,
      device_kind=mesh.devices.flat[0].device_kind, num_devices=mesh.size,
      mesh=dict(mesh.shape), device=dataclasses.asdict(device))


def outcome_of(config: config_lib.ExperimentConfig, mesh: Any,
               outcome: ahead.Outcome) -> dict[str, Any]:
  """What the compiler said, and the roofline."""
  lengths = lengths_lib.of(config)
  tokens = config.train.batch_size * lengths.window
  flops = flops_lib.training_flops_per_token(config.model, lengths) * tokens
  sent = None if outcome.collectives is None else float(sum(
      one.times * one.bytes_sent for one in outcome.collectives))
  bound = roofline_lib.roofline(
      roofline_lib.Work(flops.total / mesh.size, flops.recompute / mesh.size,
                        outcome.memory_bytes, sent),
      ahead.describe(list(mesh.devices.flat), config.train.dtype), tokens)
  return dict(
      fits=outcome.fits, needed_bytes=outcome.needed_bytes,
      available_bytes=outcome.available_bytes,
      compile_seconds=outcome.compile_seconds,
      memory=(None if outcome.memory is None else
              dataclasses.asdict(outcome.memory) |
              dict(total=outcome.memory.total)),
      collectives=_by_kind(outcome.collectives),
      loops_of_unknown_length=outcome.unknown_loops,
      flops=dict(model=flops.total, recompute=flops.recompute,
                 convention=flops_lib.CONVENTION),
      memory_bytes_moved=outcome.memory_bytes, link_bytes_sent=sent,
      roofline=dataclasses.asdict(bound))


def _by_kind(found: Sequence[Any] | None) -> list[dict[str, Any]] | None:
  """Per kind how many a step executes, what they send, and the largest."""
  if found is None:
    return None
  kinds = collections.defaultdict(list)
  for one in found:
    kinds[one.kind].append(one)
  rows = [dict(
      kind=kind, count=sum(one.times for one in group),
      bytes_sent=sum(one.times * one.bytes_sent for one in group),
      largest=dataclasses.asdict(max(group, key=lambda x: x.bytes_sent)))
          for kind, group in kinds.items()]
  return sorted(rows, key=lambda row: -row["bytes_sent"])


# --- What to do then ---------------------------------------------------------


def advise(console: console_lib.Console, config: config_lib.ExperimentConfig,
           devices: Sequence[Any], outcome: ahead.Outcome,
           memory: int | None) -> dict[str, Any]:
  """Tries what would fit, and how large a batch; says each as it is done."""
  tries = []

  def compiled(candidate: config_lib.ExperimentConfig) -> ahead.Outcome:
    mesh = ahead.make_mesh(candidate, devices)
    with console.status("compiling a candidate"):
      return ahead.compile_step(candidate, mesh, memory)

  def state_of(candidate: config_lib.ExperimentConfig) -> int:
    return ahead.state_bytes(candidate, ahead.make_mesh(candidate, devices))

  def report(one: remedies.Try) -> None:
    show.line(console, f"  {show.flags_of(one.changes)}: {_came_of(one)}")
    tries.append(dict(
        changes=one.changes, fits=one.fits, reason=one.reason,
        needed_bytes=one.outcome and one.outcome.needed_bytes))

  remedy = None
  if outcome.fits:
    show.line(console, "trying less recomputation, and a larger batch")
    if lighter := remedies.lighter(config):
      remedies.attempt(config, lighter, compiled, report)
  else:
    show.line(console, "trying what to change, and a smaller batch")
    remedy = remedies.search(config, len(devices), outcome, compiled, state_of,
                             report)
  rows = ahead.make_mesh(config, devices).shape
  largest = remedies.largest_batch(
      config, rows["data"] * rows["fsdp"] * config.train.accumulation_steps,
      outcome, compiled, report)
  return dict(tries=tries, remedy=remedy and remedy.changes,
              largest_batch=largest)


def _came_of(one: remedies.Try) -> str:
  if one.outcome is None:
    return f"not compiled: {one.reason}"
  needed = show.binary(one.outcome.needed_bytes)
  return (f"{'fits,' if one.fits else 'does not fit, at least'} {needed} of "
          f"{show.binary(one.outcome.available_bytes)} "
          f"({one.outcome.compile_seconds:.0f} s)")


def verdict(result: dict[str, Any]) -> str:
  """The answer, in one line."""
  have = f"of {show.binary(result['available_bytes'])} a device"
  machine = f"{result['num_devices']} {result['device_kind']}"
  if result["topology"]:
    machine += f" ({result['topology']})"
  if result["fits"] is None:
    text = (f"whether it fits is unknown: it takes "
            f"{show.binary(result['needed_bytes'])} on each of {machine}, "
            "whose memory is not known (--memory_gib)")
  elif result["fits"]:
    text = f"fits: {show.binary(result['needed_bytes'])} {have} on {machine}"
    step = result["roofline"]["step_seconds"]
    if step:
      text += (f"; at best {step:.3g} s a step, bound by "
               f"{result['roofline']['bottleneck']} (estimate)")
  else:
    text = ("does not fit: at least "
            f"{show.binary(result['needed_bytes'])} {have} on {machine}")
    if result["remedy"]:
      text += f"; it does with {show.flags_of(result['remedy'])}"
    elif result["tries"]:
      text += "; nothing that was tried does: take more devices"
  return text + _batch_words(result["largest_batch"])


def _batch_words(largest: dict[str, int | None] | None) -> str:
  if largest is None:
    return ""
  if largest["fits"] is None:
    return f"; as it is, not even a batch of {largest['does_not']:,} fits"
  return f"; as it is, batches of {largest['fits']:,} fit" + (
      f", of {largest['does_not']:,} do not" if largest["does_not"] else "")


# --- What is shown -----------------------------------------------------------


def show_size(console: console_lib.Console, result: dict[str, Any]) -> None:
  axes = sharding.product(result["mesh"])
  show.line(
      console, f"{result['name']}: {result['params_total']:,} parameters, "
      f"{result['batch_size']:,} sequences = {result['batch_tokens']:,} "
      f"tokens a step, {result['dtype']}, remat {result['remat']}, layers "
      f"{'scanned' if result['scan_layers'] else 'unrolled'}")
  machine = f"({result['topology']})" if result["topology"] else ", simulated"
  show.line(console, f"{result['num_devices']} x {result['device_kind']}"
            f"{' ' * bool(result['topology'])}{machine}: {axes}")


def show_outcome(console: console_lib.Console,
                 result: dict[str, Any]) -> None:
  seconds = result["compile_seconds"]
  if result["memory"] is None:
    show.line(
        console, f"the compiler refuses it ({seconds:.0f} s): it needs at "
        f"least {show.binary(result['needed_bytes'])} of "
        f"{show.binary(result['available_bytes'])} a device")
    return
  memory = result["memory"]
  total = memory["total"]
  show.table(console, f"memory of a device (compiled in {seconds:.0f} s)",
             ["kind", "bytes", "share"], [
                 [_KINDS.get(kind, kind), show.binary(size),
                  f"{size / total:.1%}"]
                 for kind, size in memory.items() if size is not None] + [
                     ["available", show.binary(result["available_bytes"]), ""]])
  if result["collectives"]:
    show.table(console, "collectives of a step", [
        "kind", "count", "sent by a device", "largest", "among", "times"], [
            [row["kind"], f"{row['count']:,}", show.si(row["bytes_sent"], "B"),
             row["largest"]["shape"] + (
                 f" + {row['largest']['arrays'] - 1}"
                 if row["largest"]["arrays"] > 1 else ""),
             str(row["largest"]["group"]), f"{row['largest']['times']:,}"]
            for row in result["collectives"]])
  else:
    show.line(console, "no collectives: the devices send each other nothing")
  if result["loops_of_unknown_length"]:
    show.line(console, f"{result['loops_of_unknown_length']} loops of unknown "
         "length count as one round: the true figures are higher")
  show_roofline(console, result)


_KINDS = {"optimizer": "optimizer state", "padding": "padding and hyperparameters",
          "temporary": "temporary: activations, gradients, workspace",
          "code": "program", "peak": "of these at once, at most",
          "total": "sum"}


def show_roofline(console: console_lib.Console,
                  result: dict[str, Any]) -> None:
  bound, device, flops = (result["roofline"], result["device"],
                          result["flops"])
  count = result["num_devices"]
  rows = [
      ["compute",
       show.si((flops["model"] + flops["recompute"]) / count, "FLOP"),
       show.si(device["flops"], "FLOP/s"), bound["compute_seconds"]],
      ["memory", show.si(result["memory_bytes_moved"], "B"),
       show.si(device["memory_bandwidth"], "B/s"), bound["memory_seconds"]],
      ["links", show.si(result["link_bytes_sent"], "B"),
       show.si(device["link_bandwidth"], "B/s"), bound["link_seconds"]]]
  show.table(console, "roofline of a step, one device (estimate)",
             ["", "work", "peak", "seconds"],
             [[*row[:3], "unknown" if row[3] is None else f"{row[3]:.4g}"]
              for row in rows])
  show.line(console, f"{show.si(flops['model'], 'FLOP')} of the model "
            f"({flops['convention']}), {show.si(flops['recompute'], 'FLOP')} "
            "recomputed; links: all of a chip's at once")
  if bound["step_seconds"]:
    mfu = "" if bound["mfu"] is None else f", MFU at most {bound['mfu']:.1%}"
    show.line(console, f"at best {bound['step_seconds']:.4g} s a step, "
         f"{bound['tokens_per_second']:,.0f} tokens/s{mfu}, bound by "
         f"{bound['bottleneck']}: an estimate, and an upper bound")
