# SPDX-License-Identifier: Apache-2.0
"""The launcher for any other scheduler: prints the commands, runs nothing.

Each command joins the sweep, on whatever machine sees its directory: a second
terminal, a job of PBS, LSF or Grid Engine, a pod.
"""

import os
import pathlib
import shlex
import sys
from typing import Any, Mapping, Sequence

import tfjax
from tfjax.sweep import join
from tfjax.sweep import ledger
from tfjax.sweep.launch import Observer
from tfjax.sweep.launch import Outcome
from tfjax.sweep.launch import RUNNER
from tfjax.sweep.process import LaunchError
from tfjax.sweep.specs import RunSpec

# Of this environment, what the runs depend on; keys and tokens are not ours
# to print.
_PREFIXES = ("JAX_", "XLA_", "TFJAX_")


class PrintLauncher:
  """Prints one command a worker; the runs stay as they are."""

  def __init__(self, workdir: pathlib.Path, sweep: str, observer: Observer,
               runner: str, options: Mapping[str, Any]):
    if options:
      raise LaunchError(f"launcher 'print' has no options, and was given "
                        f"{', '.join(options)}")
    self.outcomes: dict[str, Outcome] = {}
    self.stopping = False
    self._workdir, self._sweep, self._runner = workdir, sweep, runner
    del observer  # nothing happens that it could be told

  def run(self, specs: Sequence[RunSpec], workers: int | None,
          num_runs: int) -> None:
    """Prints the commands to standard output, what they are to the other."""
    del num_runs
    count = workers or 1
    line = command(self._workdir, self._sweep, self._runner,
                   join.only_of(self._workdir, self._sweep, specs))
    for _ in range(count):
      print(line)
    sys.stdout.flush()
    print(_hint(count, len(specs)), file=sys.stderr)
    for spec in specs:
      state = ledger.run_state(self._workdir, spec.run_id)
      self.outcomes[spec.run_id] = Outcome(spec, state, skipped=True)


def command(workdir: pathlib.Path, sweep: str, runner: str = RUNNER,
            only: Sequence[str] = ()) -> str:
  """A line for a shell that joins the sweep with one worker.

  It holds on any machine with the same file system: paths are absolute, and
  it changes to this directory, which paths in configs may be relative to.
  """
  root = str(pathlib.Path(tfjax.__file__).absolute().parents[1])
  path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
  variables = {"PYTHONPATH": path, **{
      name: value for name, value in sorted(os.environ.items())
      if name.startswith(_PREFIXES)}}
  arguments = [
      "env", *(f"{name}={value}" for name, value in variables.items()),
      # -P: modules in the current directory shadow nothing.
      sys.executable, "-P", "-m", "tfjax.sweep.join", str(workdir),
      f"--sweep={sweep}", "--workers=1"]
  if runner != RUNNER:
    arguments.append(f"--runner={runner}")
  if only:
    arguments += ["--only", *only]
  return f"cd {shlex.quote(os.getcwd())} && {shlex.join(arguments)}"


def _hint(count: int, num_runs: int) -> str:
  return "\n".join([
      f"# {count} of {num_runs} that could work at once: the line above is "
      "the same for all (--workers=N prints N of them). Each takes",
      "# whichever run is free, until none is left; any number may be started, "
      "stopped with SIGTERM and started again. As one array:",
      "#   PBS: qsub -J 1-N    LSF: bsub -J 'sweep[1-N]'    Grid Engine: qsub "
      "-t 1-N    Kubernetes: a Job with parallelism: N"])
