# SPDX-License-Identifier: Apache-2.0
"""Runs the sweep of an experiment file.

    scripts/sweep.py --config=experiments/quickstart.py \
        --workdir=runs/quickstart [--config.key=value ...] [--workers=N] \
        [--sweep_arg=name=value ...] [--overrides=FILE.json] [--dry_run]

The runs are get_sweep's of the experiment, or with --overrides those of a
file: a JSON list with an object of dotted config keys a run, such as
[{"model.size": "55k", "duration.tokens": 1000000, "seed": 1}, ...]. A value
given as --config.key=value holds for every run, over the experiment's own;
--config.key=None unsets it. Started again, it skips the runs that are complete,
resumes those that were interrupted and retries those that failed.

Exits with 0 when every run is complete or diverged, 1 when some are not, 2 when
the config cannot be run, 130 when it was stopped.
"""

import collections
import pathlib
import shlex
import sys
import time
from typing import Any, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app
from absl import flags
import jax
import ml_collections
from ml_collections import config_flags
from rich import console as console_lib

from tfjax import commandline
from tfjax import config as config_lib
from tfjax import sweep
from tfjax.data import corpora
from tfjax.sweep import cells
from tfjax.train import records

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "experiment file; --config.key=value overrides a value")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "directory of the sweep; each run has its own below it")
_WORKERS = flags.DEFINE_integer(
    "workers", None, "worker processes; unset: one a core, or one when there "
    "is an accelerator", lower_bound=1)
_SWEEP_ARG = flags.DEFINE_multi_string(
    "sweep_arg", [], "name=value, passed to get_sweep(config, name=value); "
    "value is a Python literal")
_OVERRIDES = flags.DEFINE_string(
    "overrides", None, "JSON file with the list of overrides to run, in place "
    "of get_sweep's")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "print every run with its size and state, run nothing")
flags.mark_flags_as_required(["config", "workdir"])

_PIPE_WIDTH = 160  # columns of a table that goes to a file or a pipe
_OK, _FAILED, _STOPPED = 0, 1, 130


def main(arguments: Sequence[str]) -> int:
  if len(arguments) > 1:
    return commandline.refuse(f"unknown argument {arguments[1]!r}")
  # This process plans; accelerators and their memory are the workers'.
  jax.config.update("jax_platforms", "cpu")
  console = console_lib.Console()
  if not console.is_terminal:
    console = console_lib.Console(width=_PIPE_WIDTH)
  try:
    with console.status("planning; data that is new is tokenised once"):
      specs = _plan()
    if _DRY_RUN.value:
      states = {spec.run_id: sweep.ledger.run_state(_WORKDIR.value,
                                                    spec.run_id)
                for spec in specs}
      console.print(sweep.display.plan_table(specs, states))
      return _OK
    return _launch(console, specs)
  except (config_lib.ConfigError, sweep.PlanError, corpora.DataError,
          sweep.LaunchError, records.RecordError) as error:
    return commandline.refuse(error)
  except KeyboardInterrupt:  # before the launch, which handles its own
    return _STOPPED


def _plan() -> list[sweep.RunSpec]:
  config = _CONFIG.value
  given = commandline.overrides()
  config_lib.override(config, given)
  return sweep.plan(config, [{**cell, **given} for cell in _cells(config)])


def _cells(config: ml_collections.ConfigDict) -> list[dict[str, Any]]:
  """What is to be run: the experiment's own sweep, or --overrides."""
  if _OVERRIDES.value is None:
    path = flags.FLAGS["config"].config_filename
    return cells.of_experiment(
        config_lib.module(path), config, _SWEEP_ARG.value)
  if _SWEEP_ARG.value:
    raise sweep.PlanError(
        [f"--sweep_arg={_SWEEP_ARG.value[0]} is for get_sweep, which "
         "--overrides replaces; give one of them"], 0)
  return cells.of_file(pathlib.Path(_OVERRIDES.value))


def _launch(console: console_lib.Console,
            specs: Sequence[sweep.RunSpec]) -> int:
  begun = time.monotonic()
  stopped = False
  observer = sweep.display.make(console, specs, _WORKDIR.value)
  try:
    outcomes = sweep.launch(specs, _WORKDIR.value, workers=_WORKERS.value,
                            observer=observer)
  except sweep.Interrupted as error:
    outcomes, stopped = error.outcomes, True
  console.print(_summary(outcomes, time.monotonic() - begun), markup=False,
                highlight=False, soft_wrap=True)
  undone = [one for one in outcomes
            if one.state.status not in records.FINISHED]
  for one in [] if stopped else undone:
    reason = one.state.reason or (
        "another process is at it" if one.state.status == "running" else
        "no reason is known")
    print(f"{one.state.status}: {one.spec.run_id}: {reason.splitlines()[0]}\n"
          f"  log: {pathlib.Path(_WORKDIR.value) / one.spec.run_id}/"
          f"{sweep.ledger.LOG}", file=sys.stderr)
  if undone:
    print(f"{'stopped; ' if stopped else ''}to run what is not done: "
          f"{shlex.join([sys.executable, *sys.argv])}", file=sys.stderr)
  return _STOPPED if stopped else _FAILED if undone else _OK


def _summary(outcomes: Sequence[sweep.Outcome], seconds: float) -> str:
  """One line: runs by how they ended, wall time, tokens and FLOPs trained."""
  tally = collections.Counter(
      "skipped (done before)"
      if one.skipped and one.state.status in records.FINISHED
      else one.state.status for one in outcomes)
  done = [one.spec.budget for one in outcomes
          if one.state.status == "complete" and not one.skipped]
  si = sweep.display.si
  runs = ", ".join(f"{count} {name}" for name, count in tally.items())
  return (f"{len(outcomes)} runs: {runs}; {sweep.display.clock(seconds)}; "
          f"{si(sum(one.tokens for one in done))} tokens, "
          f"{si(sum(one.flops_total for one in done))} FLOPs in completed runs")


if __name__ == "__main__":
  app.run(main, flags_parser=commandline.parse)
