# SPDX-License-Identifier: Apache-2.0
"""Runs that differ in values alone, as one ensemble: which runs those are, when
that pays, and their training.

They share every shape, the objective, the data and the number of steps; they
differ in numbers: of the optimizer, seeds, the order of the data, the scale of
initial weights. How they train in one step is `tfjax.train.ensemble_loop`.
"""

import dataclasses
import logging
import os
import pathlib
from typing import Sequence

import jax

from tfjax import config as config_lib
from tfjax.cost import cores as cores_lib
from tfjax.cost import memory as memory_lib
from tfjax.sweep.specs import RunSpec
from tfjax.train import claim
from tfjax.train import cluster
from tfjax.train import ensemble_loop
from tfjax.train import ensemble_step
from tfjax.train import interrupts
from tfjax.train import optimizers
from tfjax.train import parts as parts_lib
from tfjax.train import records
from tfjax.train import tuning

_LOG = logging.getLogger("tfjax")

# `auto`, where a device trains several members: training FLOPs of a run's step
# up to which it pays. That of accelerators is reckoned, ten milliseconds of
# one: no ensemble was timed there.
CPU_FLOPS = ensemble_step.CPU_VMAP_FLOPS
ACCELERATOR_FLOPS = 1e12
# The same where the members spread over a worker's cores, each of which would
# else compute a part of every batch. On 8 simulated devices of 2 cores members
# were 1.9 times as fast at 1.8e9 FLOPs, and no faster at 6.8e9.
CPU_SPREAD_FLOPS = 2e9
# Steps of all its members from which an ensemble on a CPU has won back what it
# takes to compile its step, some ten seconds that runs alone share with others.
CPU_STEPS = 20_000
# Of a device's memory, as the estimate is of no GPU that was measured.
_MEMORY_SHARE = 0.7


# --- Which runs --------------------------------------------------------------


def groups(specs: Sequence[RunSpec],
           workers: int) -> list[tuple[RunSpec, ...]]:
  """Partitions specs into what trains in one step, as config.sweep.ensemble
  says; most are alone.

  Runs of one kind become as many groups of about the same size as there are
  workers, each of at least two. `auto` makes them where that was found to be
  faster on CPUs, by scripts/bench.py --ensemble, or should be on accelerators,
  and says so in the log.

  Args:
    specs: runs that do not wait for each other.
    workers: that work at the same time; 0: this process.
  """
  kinds: dict[tuple[config_lib.ExperimentConfig, int], list[RunSpec]] = {}
  found = []
  for spec in specs:
    problem = (_switched_off(spec) or unfit(spec.config))
    if problem is None:
      kinds.setdefault(
          (kind(spec.config), spec.budget.steps), []).append(spec)
      continue
    if spec.config.sweep.ensemble == "on":
      _LOG.warning("%s trains alone: %s", spec.run_id, problem)
    found.append((spec,))
  for alike in kinds.values():
    found += _grouped(alike, max(1, workers))
  order = {spec.run_id: index for index, spec in enumerate(specs)}
  return sorted(found, key=lambda group: order[group[0].run_id])


def unfit(config: config_lib.ExperimentConfig) -> str | None:
  """Why a run can be no member of an ensemble, whatever it pays; None: it
  can."""
  mesh = config.mesh
  if config.recovery.action == "rollback":
    return ("recovery.action=rollback goes back alone; stop and skip are "
            "possible in an ensemble")
  if mesh.num_devices > 1:
    return ("its mesh cuts one run over devices; in an ensemble each device "
            "has runs of its own")
  if config.runtime.distributed == "on":
    return "runtime.distributed=on: an ensemble trains in one process"
  return None


def _switched_off(spec: RunSpec) -> str | None:
  return ("sweep.ensemble=off" if spec.config.sweep.ensemble == "off" else None)


def _grouped(alike: Sequence[RunSpec],
             workers: int) -> list[tuple[RunSpec, ...]]:
  """Runs of one kind, in groups of about the same size, or alone."""
  asked = alike[0].config.sweep.ensemble
  count = min(workers, len(alike) // 2)
  why = "sweep.ensemble=on"
  if count and asked == "auto":
    why = _pays(alike[0], len(alike), workers)
  if not count or why is None:
    return [(spec,) for spec in alike]
  size, more = divmod(len(alike), count)
  made, first = [], 0
  for index in range(count):
    last = first + size + (index < more)
    made.append(tuple(alike[first:last]))
    first = last
  _LOG.info("%d runs like %s train in %d ensemble(s): %s", len(alike),
            alike[0].run_id, count, why)
  return made


def _pays(spec: RunSpec, count: int, workers: int) -> str | None:
  """Why runs of a kind are faster in ensembles; None: they are not."""
  flops = spec.budget.batch_tokens * spec.budget.flops_per_token
  if tuning.has_accelerator():
    if flops > ACCELERATOR_FLOPS:
      return None
    return (f"a step of {flops:.2g} FLOPs does not fill an accelerator")
  if count < 2 * workers:
    return None  # each worker has its own cores, and some would stand idle
  if count // workers * spec.budget.steps < CPU_STEPS:
    return None
  cores = len(cores_lib.usable()) // workers
  spread = cores > 1 and spec.config.runtime.num_devices != 1
  if spread and flops <= CPU_SPREAD_FLOPS:
    return f"each of a worker's {cores} cores trains runs of its own"
  if flops > CPU_FLOPS:
    return None
  return f"a step of {flops:.2g} FLOPs is mostly overhead"


def kind(config: config_lib.ExperimentConfig) -> config_lib.ExperimentConfig:
  """The config without what members may differ in; the same for all of them.

  (Their numbers of steps must be the same too, however they are given.)
  """
  default = config_lib.ExperimentConfig()
  return dataclasses.replace(
      config, name="", seed=0, init_from="", duration=default.duration,
      optimizer=optimizers.structure(config.optimizer),
      model=dataclasses.replace(
          config.model, size=None, init_std=default.model.init_std),
      data=dataclasses.replace(config.data, shuffle_seed=0, max_epochs=1.0),
      train=dataclasses.replace(config.train, log_every_steps=1),
      evaluation=dataclasses.replace(config.evaluation, every_steps=None),
      checkpoint=default.checkpoint, tracking=default.tracking)


# --- Their training ----------------------------------------------------------


def run(
    configs: Sequence[config_lib.ExperimentConfig],
    workdir: str | os.PathLike[str],
    *,
    sweep: str | None = None,
    run_ids: Sequence[str | None] | None = None,
) -> list[records.RunRecord]:
  """Trains `configs` in one step and returns their records.

  Each run has its directory, rows, checkpoints and record as it would have
  alone, and can be gone on with alone or in an ensemble. One that is finished
  is not run again; one that another process is at is left to it, and has no
  record here. As many train at a time as the devices' memory allows. One that
  diverges or fails leaves the others to go on. Time, energy and price of a run
  are its share of what all have spent.

  Args:
    configs: which differ in values alone.
    sweep: its name, for the records.
    run_ids: unset: by the configs.

  Raises:
    ValueError: the configs do not fit together.
    ConfigError: a config cannot be trained so.
    RunDirectoryBusyError: all runs are at work elsewhere.
    Exception: whatever ended all runs, after it was recorded as `failed`.
  """
  _check(configs)
  cluster.initialize(configs[0].runtime)
  if jax.process_count() > 1:
    raise config_lib.ConfigError(
        "sweep.ensemble", f"an ensemble trains in one process, and this is one "
        f"of {jax.process_count()}; set it to off")
  ids = [run_id or records.run_id(config) for config, run_id in zip(
      configs, run_ids or [None] * len(configs))]
  devices = jax.devices()[:configs[0].runtime.num_devices]
  size = _at_a_time(configs[0], len(configs), devices)
  if size < len(configs):
    _LOG.info("memory allows %d of %d runs at a time", size, len(configs))
  members: list[ensemble_loop.Member] = []
  for first in range(0, len(configs), size):
    # Clocks begin, and directories are claimed, when it is their turn.
    turn = list(zip(configs, ids))[first:first + size]
    some = [ensemble_loop.Member(config, pathlib.Path(workdir) / run_id, sweep,
                                 1 / len(turn)) for config, run_id in turn]
    members += some
    if _train(some, devices):
      break  # the rest has not begun
  found = [member.record for member in members if member.record is not None]
  errors = [member.error for member in members if member.error is not None]
  if not found and errors:
    raise errors[0]
  return found


def _train(members: Sequence[ensemble_loop.Member],
           devices: Sequence[jax.Device]) -> bool:
  """To their ends; whether a signal came before."""
  try:
    for member in members:
      with member.guard():
        member.claim()
    with interrupts.stop_requested() as stop:
      ensemble_loop.train(members, devices, stop)
    return stop.is_set()
  finally:
    for member in members:
      member.close()


def _check(configs: Sequence[config_lib.ExperimentConfig]) -> None:
  for config in configs:
    if problem := unfit(config):
      raise config_lib.ConfigError("sweep.ensemble", problem)
  first = kind(configs[0])
  for config in configs[1:]:
    if kind(config) != first:
      keys = claim.differences(config_lib.to_dict(first), kind(config))
      raise ValueError(
          "the runs of an ensemble may differ in values alone; these differ "
          f"in {', '.join(keys) or 'how they are to run'}")


def _at_a_time(config: config_lib.ExperimentConfig, count: int,
               devices: Sequence[jax.Device]) -> int:
  """How many of `count` members train at once, in groups of about the same
  size, as far as the devices tell of their memory."""
  limits = [(device.memory_stats() or {}).get("bytes_limit")
            for device in devices]
  if None in limits:
    return count
  alone = dataclasses.replace(config, runtime=dataclasses.replace(
      config.runtime, num_devices=1))
  needed = memory_lib.estimate(
      parts_lib.make(alone).config, {}, devices[0].platform).total
  most = max(1, int(_MEMORY_SHARE * min(limits) / needed)) * len(devices)
  return -(-count // -(-count // most))
