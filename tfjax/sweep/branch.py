# SPDX-License-Identifier: Apache-2.0
"""Which runs of a sweep share a trunk, and where they branch off.

With a warmup-stable-decay schedule (Hu et al. 2024, section 4) all durations
of one config go the same way until the shortest one's decay begins. The
longest run of such a group is the trunk and keeps a checkpoint wherever a
shorter one's decay begins; that one goes on from there, and ends as it would
have ended alone. How a run begins at another's step is `tfjax.train.trunk`'s.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any, Collection, Mapping, Sequence

from tfjax import config as config_lib
from tfjax.sweep import ledger
from tfjax.sweep.specs import RunSpec
from tfjax.train import checkpoints
from tfjax.train import optimizers
from tfjax.train import records
from tfjax.train import trunk as trunk_lib


def align(specs: Sequence[RunSpec]) -> list[RunSpec]:
  """The specs as they can share trunks: those of a group have the warmup of
  its shortest, in steps, as a trunk has one warmup.

  Runs that share nothing, or are not asked to, stay as they are, and so do
  those with optimizer.warmup_steps.

  Raises:
    ConfigError: the runs of a group cannot share a trunk; it names the key.
  """
  aligned = {}
  for group in _groups(specs):
    _check(group)
    shortest = group[-1]
    warmup = int(_schedule(shortest).warmup_steps)
    for spec in group:
      aligned[spec.run_id] = _with_warmup(spec, warmup)
  return [aligned.get(spec.run_id, spec) for spec in specs]


def options(specs: Sequence[RunSpec]) -> dict[str, dict[str, Any]]:
  """By run_id, for trunks and branches alone: options of `tfjax.train.run`.

  A branch has the option `branch`, a trunk `keep_steps`.

  Args:
    specs: aligned.
  """
  found: dict[str, dict[str, Any]] = {}
  for trunk, *others in _groups(specs):
    steps = {spec.run_id: step for spec in others
             if (step := _branch_step(spec, trunk))}
    if steps:
      found[trunk.run_id] = dict(keep_steps=sorted(set(steps.values())))
    for run_id, step in steps.items():
      found[run_id] = dict(branch=dict(run_id=trunk.run_id, step=step))
  return found


def shared_flops(specs: Sequence[RunSpec],
                 alone: Collection[str] = ()) -> dict[str, float]:
  """By run_id, for branches only: the FLOPs of their way that the trunk spends
  for them. `alone`: as for `own_parts`."""
  return {whole.run_id: whole.budget.flops_total - own.budget.flops_total
          for whole, own in zip(specs, own_parts(specs, alone))
          if own is not whole}


def own_parts(specs: Sequence[RunSpec],
              alone: Collection[str] = ()) -> list[RunSpec]:
  """The specs with the budgets of what each run does itself: of a branch, from
  where it leaves its trunk. Sums over them count nothing twice.

  Args:
    alone: ids of runs that do all themselves, whatever was planned.
  """
  steps = {run_id: given["branch"]["step"]
           for run_id, given in options(specs).items()
           if "branch" in given and run_id not in alone}
  return [_after(spec, steps[spec.run_id]) if spec.run_id in steps else spec
          for spec in specs]


def is_ready(workdir: str | os.PathLike[str],
             given: Mapping[str, Any]) -> bool:
  """Whether a run with these options can begin: it has a checkpoint of its
  trunk to begin with, or its trunk has ended or is past it, and leaves none."""
  if "branch" not in given or _has_left(workdir, given) is not None:
    return True
  result = records.read_result(
      pathlib.Path(workdir) / given["branch"]["run_id"])
  # One that is interrupted is gone on with, and comes there yet.
  return result is not None and result["status"] != "interrupted"


def is_alone(workdir: str | os.PathLike[str],
             given: Mapping[str, Any]) -> bool:
  """Whether a run with these options that has yet to begin does all of its
  steps itself: its trunk has ended for good or is past where it would branch
  off (that was asked for later), and left it no checkpoint."""
  if "branch" not in given:
    return False
  has_left = _has_left(workdir, given)
  return has_left is False or has_left is None and ledger.is_finished(
      pathlib.Path(workdir) / given["branch"]["run_id"])


def clean(workdir: str | os.PathLike[str],
          specs: Sequence[RunSpec]) -> list[pathlib.Path]:
  """Deletes what trunks have kept for branches that have all ended for good.

  Anybody may call it at any time. Of a trunk that has not ended itself
  nothing is deleted, nor what it would have kept without branches.

  Returns:
    The checkpoints that are gone.
  """
  workdir, given = pathlib.Path(workdir), options(specs)
  configs = {spec.run_id: spec.config for spec in specs}
  deleted = []
  for run_id, kept in given.items():
    if "keep_steps" not in kept or not ledger.is_finished(workdir / run_id):
      continue
    waiting = {other["branch"]["step"] for name, other in given.items()
               if other.get("branch", {}).get("run_id") == run_id
               and not ledger.is_finished(workdir / name)}
    deleted += checkpoints.delete(
        workdir / run_id / "checkpoints", configs[run_id].checkpoint,
        set(kept["keep_steps"]) - waiting)
  return deleted


# --- Details -----------------------------------------------------------------


def _groups(specs: Sequence[RunSpec]) -> list[list[RunSpec]]:
  """Runs that are to share a trunk: the longest first, two at least."""
  found: dict[str, list[RunSpec]] = {}
  for spec in specs:
    if spec.config.sweep.share_trunk:
      found.setdefault(_key(spec.config), []).append(spec)
  return [sorted(group, key=lambda spec: (-spec.budget.steps, spec.run_id))
          for group in found.values() if len(group) > 1]


def _key(config: config_lib.ExperimentConfig) -> str:
  """The same for configs that differ in their duration alone."""
  config = dataclasses.replace(
      config, name="", duration=config_lib.DurationConfig(steps=1),
      data=dataclasses.replace(config.data, max_epochs=1.0))
  return json.dumps(config_lib.to_dict(config), sort_keys=True)


def _check(group: Sequence[RunSpec]) -> None:
  config = group[0].config
  if config.optimizer.schedule != "wsd":
    raise config_lib.ConfigError(
        "optimizer.schedule", f"is {config.optimizer.schedule}, but runs share "
        "a trunk (sweep.share_trunk) as long as their learning rates are the "
        "same, which those of wsd alone are; set "
        "--config.optimizer.schedule=wsd, or --config.sweep.share_trunk=False")
  if config.sweep.halving is not None:
    raise config_lib.ConfigError(
        "sweep.halving", "cannot be together with sweep.share_trunk: what was "
        "stopped would be the trunk of others; set "
        "--config.sweep.share_trunk=False, or leave halving unset")


def _schedule(spec: RunSpec) -> optimizers.Schedule:
  return optimizers.make_schedule(spec.config.optimizer, spec.budget.steps)


def _branch_step(spec: RunSpec, trunk: RunSpec) -> int | None:
  """After how many steps a run leaves its trunk; None: they share none, or the
  run is so short that no step of its own is left."""
  own, long = _schedule(spec), _schedule(trunk)
  step = min(trunk_lib.decay_start(own), trunk_lib.decay_start(long))
  same = int(own.warmup_steps) == int(long.warmup_steps)
  return step if same and 0 < step < spec.budget.steps else None


def _with_warmup(spec: RunSpec, steps: int) -> RunSpec:
  config = dataclasses.replace(spec.config, optimizer=dataclasses.replace(
      spec.config.optimizer, warmup_steps=steps))
  return dataclasses.replace(
      spec, config=config, run_id=records.run_id(config))


def _after(spec: RunSpec, step: int) -> RunSpec:
  """The spec with the budget that is left after `step`."""
  whole = spec.budget
  left = whole.steps - step
  share = left / whole.steps
  unique, epochs = whole.unique_tokens, whole.epochs
  return dataclasses.replace(spec, budget=dataclasses.replace(
      whole, steps=left, tokens=round(whole.tokens * share),
      predicted_tokens=(None if whole.predicted_tokens is None
                        else whole.predicted_tokens * share),
      unique_tokens=None if unique is None else min(
          unique, round(whole.tokens * share)),
      epochs=None if epochs is None else epochs * share,
      tokens_per_parameter=whole.tokens_per_parameter * share,
      flops=whole.flops * share))


def _has_left(workdir: str | os.PathLike[str],
              given: Mapping[str, Any]) -> bool | None:
  """Whether the trunk has left its checkpoint of the branch step; None: by its
  checkpoints, it has not come there."""
  trunk, step = (pathlib.Path(workdir) / given["branch"]["run_id"],
                 given["branch"]["step"])
  # Looked up once: two looks at a file system over a network may disagree.
  there = checkpoints.steps_in(trunk / "checkpoints")
  if step in there:
    return True
  return False if max(there, default=0) > step else None
