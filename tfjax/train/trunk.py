# SPDX-License-Identifier: Apache-2.0
"""How a run begins at a step of another one, its trunk.

The trunk has the same config but for its duration, and both are in the
constant part of a warmup-stable-decay schedule (Hu et al. 2024, section 4;
Hägele et al. 2024) until that step: whoever goes on from there with numbers of
its own goes the very way that it would have gone alone. Which run is whose
trunk is `tfjax.sweep.branch`'s to say.
"""

import logging
import pathlib
from typing import Any, Mapping

import jax
import numpy as np

from tfjax.train import checkpoints as checkpoints_lib
from tfjax.train import claim
from tfjax.train import optimizers
from tfjax.train import parts as parts_lib
from tfjax.train import records
from tfjax.train import step as step_lib

_LOG = logging.getLogger("tfjax")

# Keys in which a run may differ from its trunk.
_OWN = ("duration.", "data.max_epochs")


def decay_start(schedule: optimizers.Schedule) -> int:
  """How many steps are done before the rate first falls."""
  return int(schedule.total_steps - schedule.decay_steps)


def restore(
    run_dir: pathlib.Path, branch: Mapping[str, Any], parts: parts_lib.Parts,
) -> tuple[step_lib.TrainState, dict[str, Any]] | None:
  """The trunk's state at the branch step, with this run's own numbers, and its
  counters; None, and a word in the log, where it has left none.

  Args:
    run_dir: of the run that branches off; the trunk's lies beside it.
    branch: run_id and step.
    parts: of the run that branches off.

  Raises:
    RecordError: that checkpoint is of a run that is no trunk of this one.
  """
  step = branch["step"]
  trunk = run_dir.parent / branch["run_id"]
  restored = checkpoints_lib.restore_of(
      trunk / "checkpoints" / str(step), parts.steps.abstract_state)
  if restored is None:
    _LOG.warning("%s: its trunk %s has left no checkpoint of step %d; it "
                 "trains alone, from step 0", run_dir.name, trunk.name, step)
    return None
  state, counters = restored
  _check(run_dir, trunk, state, counters, parts, step)
  values = jax.tree.map(
      # Copied, so that they can be donated: `parts` has the same numbers.
      lambda x, a: jax.device_put(np.asarray(x), a.sharding).copy(),
      parts.hyperparameters, parts.steps.abstract_state.hyperparameters)
  return state.replace(hyperparameters=values), counters


def origin(branch: Mapping[str, Any],
           counters: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of a record that tell where a run branched off, and what had
  been spent up to there, by the counters of the trunk's checkpoint."""
  return dict(
      branched_from=branch["run_id"], branch_step=branch["step"],
      shared_flops=counters["flops"], shared_device_seconds=sum(
          counters["occupied_device_seconds"].values()))


def rows(run_dir: pathlib.Path, branch: Mapping[str, Any],
         rollbacks: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """The trunk's rows up to the branch step, as this run has them: `shared`,
  and what they took apart from what this run will."""
  path = run_dir.parent / branch["run_id"] / "metrics.jsonl"
  found = records.read_metrics(path) if path.exists() else []
  return [
      {name: None if name in records.MEASURED else value
       for name, value in row.items()} | dict(
           shared=True, shared_device_seconds=row.get("device_seconds"))
      for row in found if row["step"] <= branch["step"] or row in rollbacks]


def _check(run_dir: pathlib.Path, trunk: pathlib.Path,
           state: step_lib.TrainState, counters: Mapping[str, Any],
           parts: parts_lib.Parts, step: int) -> None:
  """Raises a RecordError unless both go the same way up to `step`."""
  found = {key: values for key, values in claim.differences(
      counters["config"], parts.given).items() if not key.startswith(_OWN)}
  if found:
    raise records.RecordError("\n".join([
        f"{run_dir} cannot branch off {trunk.name}, which is another run:",
        *(f"  {key}: {there} there, {here} here"
          for key, (there, here) in found.items()),
        "runs that share a trunk differ in their duration alone"]))
  claim.refuse_other_store(run_dir, "'s trunk saved its checkpoint",
                           counters["store"], parts.store.path.name)
  ours, theirs = parts.hyperparameters.schedule, state.hyperparameters.schedule
  ends = [decay_start(schedule) for schedule in (ours, theirs)]
  if ours.kind != "wsd" or step > min(ends) or (
      float(ours.warmup_steps) != float(theirs.warmup_steps)):
    raise records.RecordError(
        f"{run_dir} cannot branch off {trunk.name} at step {step}: the "
        "learning rates of the two differ before it (optimizer.schedule "
        f"{ours.kind}; warmups of {float(ours.warmup_steps):g} and "
        f"{float(theirs.warmup_steps):g} steps; decays that begin after "
        f"{ends[0]} and {ends[1]})")
