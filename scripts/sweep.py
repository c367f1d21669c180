# SPDX-License-Identifier: Apache-2.0
"""Runs the sweep of an experiment file, and looks after its directory.

    scripts/sweep.py [run] --config=experiments/quickstart.py \
        --workdir=runs/quickstart [--config.key=value ...] [--sweep=NAME ...] \
        [--sweep_arg=name=value ...] [--overrides=FILE.json] [--workers=N] \
        [--launcher=slurm --launcher_option=partition=gpu ...] \
        [--dry_run [--timing]]
    scripts/sweep.py run|status|retry|clean|collect --workdir=runs/quickstart

  run      what is not done, with --config or of what was launched there before.
           The runs are get_sweep's of the experiment, which may give several
           sweeps by name, or with --overrides those of a file: a JSON list with
           an object of dotted config keys a run, such as [{"model.size": "55k",
           "duration.tokens": 1000000, "seed": 1}, ...]. A value given as
           --config.key=value holds for every run, over the experiment's own;
           --config.key=None unsets it. Runs that are complete are skipped,
           those that were interrupted resumed, those that failed tried again.
  status   where every run stands.
  retry    run what failed or was interrupted, and nothing else but what that
           waits for at a rung of sweep.halving.
  clean    remove checkpoints of runs that have ended and what killed processes
           have left; asks for --yes.
  collect  one table with a row a run: --out=FILE.parquet or FILE.csv.

Any number of these may go on in one directory at once. Exits with 0 when every
run has ended for good (or there was nothing to do), 1 when some have not, 2
when it cannot be done as asked, 130 when it was stopped.
"""

import logging
import math
import pathlib
import shlex
import sys
import time
from typing import Any, Callable, Mapping, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

# pylint: disable=wrong-import-position
from absl import app
from absl import flags
from absl import logging as absl_logging
import jax
from ml_collections import config_flags
from rich import console as console_lib

import sweep_end
import sweep_flags
from tfjax import commandline
from tfjax import config as config_lib
from tfjax import sweep
from tfjax.data import corpora
from tfjax.sweep import calibrate
from tfjax.sweep import cells as cells_lib
from tfjax.sweep import cleaning
from tfjax.sweep import collect
from tfjax.sweep import halving
from tfjax.sweep import preview
from tfjax.sweep import slurm_options
from tfjax.sweep import status
from tfjax.sweep.launch import check
from tfjax.sweep.specs import flat
from tfjax.train import records
from tfjax.train import tuning

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "experiment file; --config.key=value overrides a value")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "directory of the sweep; each run has its own below it")
_WORKERS = flags.DEFINE_integer(
    "workers", None, "worker processes; 0: none, in this process (--launcher "
    "local); unset: one a core, or as many as the GPUs suffice for",
    lower_bound=0)
_LAUNCHER = flags.DEFINE_enum(
    "launcher", "local", sorted(sweep.LAUNCHERS),
    "local: on this machine; slurm: as an array of jobs; print: the commands "
    "for any other scheduler")
_LAUNCHER_OPTION = flags.DEFINE_multi_string(
    "launcher_option", [], "name=value, for the launcher")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "show what would be done, and change nothing")
_TIMING = flags.DEFINE_bool(
    "timing", False, "--dry_run: train every model for a moment, for the hours")
_YES = flags.DEFINE_bool("yes", False, "clean: remove it")
_OUT = flags.DEFINE_multi_string(
    "out", [], "collect: file to write, .parquet or .csv; unset: runs.parquet "
    "in the workdir")
flags.mark_flag_as_required("workdir")

_PIPE_WIDTH = 160  # columns of a table that goes to a file or a pipe
# Flags that a command has beside --workdir.
_TAKES = {
    "run": ("config", "workers", "launcher", "launcher_option", "dry_run",
            "timing", *sweep_flags.NAMES),
    "status": ("sweep",),
    "retry": ("workers", "launcher", "launcher_option", "dry_run", "sweep"),
    "clean": ("dry_run", "yes"),
    "collect": ("out", "sweep"),
}


def main(arguments: Sequence[str]) -> int:
  command, *rest = [*arguments[1:], *([] if arguments[1:] else ["run"])]
  if command not in _TAKES or rest:
    return commandline.refuse(
        f"unknown command {' '.join(arguments[1:])!r}; there are: "
        f"{', '.join(_TAKES)}")
  if problem := _misplaced(command):
    return commandline.refuse(problem)
  if _WORKERS.value != 0:
    # This process plans; accelerators and their memory are the workers'.
    jax.config.update("jax_platforms", "cpu")
  # Of what happens in this process, tfjax's own words and others' warnings.
  absl_logging.set_verbosity(absl_logging.WARNING)
  logging.getLogger("tfjax").setLevel(logging.INFO)
  console = console_lib.Console()
  if not console.is_terminal:
    console = console_lib.Console(width=_PIPE_WIDTH)
  try:
    # Before anything is planned.
    _options()
    check(_LAUNCHER.value, _WORKERS.value)
    return _COMMANDS[command](console)
  except (config_lib.ConfigError, sweep.PlanError, corpora.DataError,
          sweep.LaunchError, records.RecordError, collect.CollectError,
          calibrate.CalibrationError,
          sweep.ledger.LaunchBusyError, OSError) as error:
    return commandline.refuse(error)
  except KeyboardInterrupt:  # before the launch, which handles its own
    return sweep_end.STOPPED


def _misplaced(command: str) -> str | None:
  """Why a flag that was given has no meaning here."""
  every = dict.fromkeys(name for names in _TAKES.values() for name in names)
  for name in every:
    if flags.FLAGS[name].present and name not in _TAKES[command]:
      return (f"--{name} is not for {command}, but for " + ", ".join(
          one for one, names in _TAKES.items() if name in names))
  if _TIMING.value and not _DRY_RUN.value:
    return "--timing is for --dry_run; give both"
  if _CONFIG.value is None:
    for name in ("sweep_arg", "overrides"):
      if flags.FLAGS[name].present:
        return f"--{name} is for the experiment of --config; give that, too"
  return None


# --- Commands ----------------------------------------------------------------


def _run(console: console_lib.Console) -> int:
  if _CONFIG.value is None:
    specs = _planned_before()
    _lay_out_specs(specs)
    if _DRY_RUN.value:
      return _preview(console, {cells_lib.ONLY: specs})
    undone = [spec.run_id for spec in specs if _state(spec).status
              not in records.FINISHED]
    sweep.ledger.ask(_WORKDIR.value, undone)
    return _launch(console, specs, _name_of(specs), planned=True)
  config, given = _CONFIG.value, commandline.overrides()
  config_lib.override(config, given)
  cells = sweep_flags.cells(config, given)
  base = flat(config.to_dict())
  _lay_out([base | cell for found in cells.values() for cell in found])
  with console.status("planning; data that is new is tokenised once"):
    planned = sweep.plan_all(config, cells)
  if _DRY_RUN.value:
    return _preview(console, planned)
  if len(planned) == 1:
    (name, specs), = planned.items()
    return _launch(console, specs, name or None)
  # The directory's own name stands for all of its sweeps.
  whole = pathlib.Path(_WORKDIR.value).absolute().name
  if whole in planned:
    raise sweep.PlanError(
        [f"the sweep {whole!r} has the name of the directory, which stands "
         "for all of its sweeps; rename one of the two"], 0)
  pathlib.Path(_WORKDIR.value).mkdir(parents=True, exist_ok=True)
  for name, specs in planned.items():
    sweep.ledger.write_plan(_WORKDIR.value, name, specs)
  return _launch(console, sweep_flags.together(planned), whole)


def _status(console: console_lib.Console) -> int:
  runs = status.show(console, _WORKDIR.value, _chosen())
  return (sweep_end.OK if all(map(status.is_done, runs))
          else sweep_end.FAILED)


def _retry(console: console_lib.Console) -> int:
  planned = _planned_before()
  specs = [spec for spec in planned
           if _state(spec).status in ("failed", "interrupted")]
  if not specs:
    pending = [spec for spec in planned if _state(spec).status == "pending"]
    console.print("nothing has failed or was interrupted" + (
        f"; to begin what is pending ({status.num_runs(len(pending))}): "
        + sweep.display.retry_command(_WORKDIR.value, "run")
        if pending else ""), markup=False, highlight=False, soft_wrap=True)
    return sweep_end.OK
  specs += _halved_with(specs)
  if _DRY_RUN.value:
    for spec in specs:
      state = _state(spec)
      why = ("others wait for it at a rung of sweep.halving"
             if state.status == "pending" else sweep_end.reason(state))
      console.print(
          f"{state.status}: {spec.run_id} at step {state.step or 0:,} of "
          f"{spec.budget.steps:,}: {why}", markup=False, highlight=False,
          soft_wrap=True)
    return sweep_end.OK
  _lay_out_specs(specs)
  sweep.ledger.ask(_WORKDIR.value, [spec.run_id for spec in specs])
  return _launch(console, specs, _name_of(specs), planned=True)


def _clean(console: console_lib.Console) -> int:
  found = cleaning.find(_WORKDIR.value)
  for one in found:
    console.print(f"{one.num_bytes:>15,} B  {one.path}  ({one.what})",
                  markup=False, highlight=False, soft_wrap=True)
  total = sum(one.num_bytes for one in found)
  if not found:
    console.print("there is nothing to remove")
  elif _DRY_RUN.value:
    console.print(f"{total:>15,} B in all; nothing was removed")
  elif not _YES.value:
    return commandline.refuse(
        f"{total:,} B would be removed, and with checkpoints the weights of "
        "their runs; --yes removes them, --dry_run only looks")
  else:
    gone = cleaning.remove(found)
    console.print(f"{sum(one.num_bytes for one in gone):>15,} B removed")
    for one in found:
      if one not in gone:
        console.print(f"left, as somebody is at it: {one.path}",
                      markup=False, soft_wrap=True)
  return sweep_end.OK


def _collect(console: console_lib.Console) -> int:
  paths = _OUT.value or [str(pathlib.Path(_WORKDIR.value) / "runs.parquet")]
  for path in paths:
    collect.check_ending(path)
  frame = collect.table(_WORKDIR.value, _chosen())
  for path in paths:
    collect.write(frame, path)
    console.print(f"{frame.num_rows} runs, {frame.num_columns} columns: "
                  f"{path}", markup=False, highlight=False, soft_wrap=True)
  return sweep_end.OK


_COMMANDS: dict[str, Callable[[console_lib.Console], int]] = {
    "run": _run, "status": _status, "retry": _retry, "clean": _clean,
    "collect": _collect}


# --- Details -----------------------------------------------------------------


def _chosen() -> list[str] | None:
  """The planned runs of the sweeps that --sweep names; None: of all."""
  if not sweep_flags.SWEEP.value:
    return None
  plan = sweep.ledger.read_plan(_WORKDIR.value)
  for name in sweep_flags.SWEEP.value:
    if name not in plan["sweeps"]:
      raise sweep.LaunchError(cells_lib.no_such_sweep(name, plan["sweeps"]))
  return list(dict.fromkeys(
      run_id for name in sweep_flags.SWEEP.value
      for run_id in plan["sweeps"][name]))


def _planned_before() -> list[sweep.RunSpec]:
  """The runs that were launched in the workdir, or those of --sweep."""
  chosen = _chosen()
  return [spec for spec in sweep.ledger.read_specs(_WORKDIR.value)
          if chosen is None or spec.run_id in chosen]


def _halved_with(specs: Sequence[sweep.RunSpec]) -> list[sweep.RunSpec]:
  """What is not done, nor at work, of the groups that these are halved in:
  without it they would wait at a rung in vain."""
  chosen = {spec.run_id for spec in specs}
  return [spec for group in halving.groups(
              sweep.ledger.read_specs(_WORKDIR.value))
          if chosen & {one.run_id for one in group}
          for spec in group if spec.run_id not in chosen
          and _state(spec).status in ("pending", "interrupted")]


def _name_of(specs: Sequence[sweep.RunSpec]) -> str:
  """The smallest planned sweep that has all of these runs; where none has, the
  directory's own name comes to stand for all of them."""
  plan, wanted = (sweep.ledger.read_plan(_WORKDIR.value),
                  {spec.run_id for spec in specs})
  found = [name for name, run_ids in plan["sweeps"].items()
           if wanted <= set(run_ids)]
  if not found:
    whole = pathlib.Path(_WORKDIR.value).absolute().name
    if sweep_flags.SWEEP.value or whole in plan["sweeps"]:
      raise sweep.LaunchError(
          "the runs are of several sweeps, none of which has them all; choose "
          f"one with --sweep: {', '.join(plan['sweeps'])}")
    sweep.ledger.write_plan(_WORKDIR.value, whole,
                            sweep.ledger.read_specs(_WORKDIR.value))
    return whole
  return min(found, key=lambda name: len(plan["sweeps"][name]))


def _state(spec: sweep.RunSpec) -> sweep.ledger.RunState:
  return sweep.ledger.run_state(_WORKDIR.value, spec.run_id)


def _lay_out(cells: Sequence[Mapping[str, Any]]) -> None:
  """As many devices as a run may have on a CPU, before JAX begins, where this
  process plans with them or trains: as many as a worker has.

  Args:
    cells: whole configs by dotted keys, which may be wrong in any way yet.
  """
  trains = _WORKERS.value == 0 and not any(
      cell["runtime.cpu_tuning"] == "off" for cell in cells)
  if tuning.has_accelerator() or not (_DRY_RUN.value or trains):
    return

  def number(cell: Mapping[str, Any], key: str) -> int:
    return cell[key] if isinstance(cell[key], int) else 1

  jax.config.update("jax_num_cpu_devices", max([
      tuning.available_cores(), *(
          max(number(cell, "runtime.num_devices"),
              math.prod(number(cell, key) for key in cell
                        if key.startswith("mesh."))) for cell in cells)]))


def _lay_out_specs(specs: Sequence[sweep.RunSpec]) -> None:
  _lay_out([flat(config_lib.to_dict(spec.config)) for spec in specs])


def _preview(console: console_lib.Console,
             planned: dict[str, list[sweep.RunSpec]]) -> int:
  if len(planned) > 1:
    for name, specs in planned.items():
      console.print(f"sweep {name}: {len(specs)} runs", highlight=False)
  specs, calibration = sweep_flags.together(planned), None
  if _TIMING.value:
    with console.status("timing the real step of every model"):
      calibration = calibrate.measure(specs, _WORKERS.value)
  found = preview.look(specs, _WORKDIR.value, _WORKERS.value, calibration)
  preview.show(console, found)
  return sweep_end.OK


def _options() -> dict[str, str]:
  """Those of --launcher_option by name."""
  options = {}
  for given in _LAUNCHER_OPTION.value:
    name, equals, value = given.partition("=")
    if not (name and equals):
      raise sweep.LaunchError(
          f"--launcher_option={given}: not of the form name=value")
    if name in options:
      raise sweep.LaunchError(f"--launcher_option={name} is given twice")
    options[name] = value
  return options


def _launch(console: console_lib.Console, specs: Sequence[sweep.RunSpec],
            name: str | None, planned: bool = False) -> int:
  begun = time.monotonic()
  stopped = False
  observer = sweep.display.make(console, specs, _WORKDIR.value)
  try:
    outcomes = sweep.launch(
        specs, _WORKDIR.value, launcher=_LAUNCHER.value, sweep=name,
        workers=_WORKERS.value, options=_options(), observer=observer,
        planned=planned)
  except sweep.Interrupted as error:
    outcomes, stopped = error.outcomes, True
  if _LAUNCHER.value == "print":
    if all(one.state.status in records.FINISHED for one in outcomes):
      print(f"# nothing is left to run: all {len(outcomes)} runs are done",
            file=sys.stderr)
    return sweep_end.OK  # nothing was to be run here
  if _LAUNCHER.value == "slurm" and not slurm_options.read(
      _options(), name or "").wait:
    print("the jobs go on by themselves; how they stand: " + shlex.join(
        [sys.executable, sys.argv[0], "status", f"--workdir={_WORKDIR.value}"]))
    return sweep_end.OK
  return sweep_end.say(console, outcomes, time.monotonic() - begun,
                       _WORKDIR.value, stopped)


if __name__ == "__main__":
  app.run(main, flags_parser=commandline.parse)
