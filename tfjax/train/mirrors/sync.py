# SPDX-License-Identifier: Apache-2.0
"""Mirrors rebuilt from the records: a run's, and the sweep's report.

Any number of times, with the same result. How wandb is brought to hold what
the records hold is in `wandb_run`.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from typing import Iterator, Sequence

from tfjax.train.mirrors import columns
from tfjax.train.mirrors import follow
from tfjax.train.mirrors import wandb_run

# Of a sweep's directory: what its report consists of.
_REPORT_FILES = ("report.html", "fit.json", "figures")
_UPLOAD_SECONDS = 300
_LOCK_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Synced:
  """What became of a run's mirror.

  Attributes:
    where: its page, its offline directory, its TensorBoard files.
    problems: why it is not as it should be; empty where it is.
  """

  run_id: str
  num_rows: int
  where: tuple[str, ...]
  problems: tuple[str, ...]


def runs(workdir: pathlib.Path,
         names: Sequence[str] = ()) -> list[pathlib.Path]:
  """The run directories of a sweep, or those of the runs named.

  Raises:
    FileNotFoundError: a run that is named is not there, or there is none.
  """
  found = sorted(path.parent for path in workdir.glob("*/config.json"))
  if not found:
    raise FileNotFoundError(f"no runs in {workdir}: none of its directories "
                            "has a config.json")
  known = {path.name: path for path in found}
  for name in names:
    if name not in known:
      raise FileNotFoundError(
          f"no run {name!r} in {workdir}; it has {', '.join(known)}")
  return [known[name] for name in names] or found


def run(run_dir: pathlib.Path, mode: str = "auto") -> Synced:
  """Brings the run's mirrors to hold what its records hold.

  Args:
    mode: online, offline, or auto: what the run's config says, with `auto`
      where that says `disabled`.
  """
  try:
    wanted = columns.about(run_dir).tracking["wandb"]
  except (ValueError, KeyError) as error:
    return Synced(run_dir.name, 0, (), (f"its config.json or result.json is "
                                        f"damaged ({error!r})",))
  if mode == "auto" and wanted != "disabled":
    mode = wanted
  follower = follow.Follower(run_dir, wandb_run.mode_of(mode))
  follower.close(seconds=0)
  give_up = time.monotonic() + _LOCK_SECONDS
  try:
    follower.advance()
    # The mirror of a run that has just ended is about to let go of it.
    while (not follower.is_done and time.monotonic() < give_up and
           columns.read_result(run_dir)):
      time.sleep(0.2)
      follower.advance()
  except (ValueError, OSError) as error:  # a damaged row, a full disk
    follower.problems.append(str(error))
  else:
    if not follower.is_done:
      follower.problems.append(
          "another process is writing its mirrors; they follow the run")
  return Synced(run_dir.name, follower.num_rows, tuple(follower.where),
                tuple(follower.problems))


def report(workdir: pathlib.Path, mode: str = "auto") -> str | None:
  """Uploads the sweep's report and figures as an artifact of a run of their
  own, of job type `report`; returns where, or None where there is no report.

  Raises:
    Exception: whatever wandb raises.
  """
  files = [workdir / name for name in _REPORT_FILES
           if (workdir / name).exists()]
  if workdir / "report.html" not in files:
    return None
  about = columns.about(runs(workdir)[0])
  name = f"report-{about.group or workdir.absolute().name}"
  wanted = about.tracking["wandb"]
  mode = wandb_run.mode_of(
      wanted if mode == "auto" and wanted != "disabled" else mode)
  import wandb  # pylint: disable=import-outside-toplevel
  if mode == "offline":
    wandb_run.discard_offline(workdir, name)
  begun = wandb_run.start(
      about.tracking, workdir, mode, id=name, name=name, group=about.group,
      job_type="report", tags=["report"],
      **(dict(resume="allow") if mode == "online" else {}))
  with _finishing(begun):
    artifact = wandb.Artifact(name, type="report")
    for path in files:
      if path.is_dir():
        artifact.add_dir(str(path), name=path.name)
      else:
        artifact.add_file(str(path))
    logged = begun.log_artifact(artifact)
    if mode == "online":
      logged.wait(_UPLOAD_SECONDS)
    begun.summary.update(dict(runs=_count(workdir)))
  return begun.url if mode == "online" else str(
      pathlib.Path(begun.dir).parent)


@contextlib.contextmanager
def _finishing(begun: object) -> Iterator[None]:
  try:
    yield
  except BaseException:
    begun.finish(exit_code=1)
    raise
  begun.finish()


def _count(workdir: pathlib.Path) -> dict[str, int]:
  """How many runs have ended in which way."""
  tally: dict[str, int] = {}
  for run_dir in runs(workdir):
    try:
      result = columns.read_result(run_dir)
    except json.JSONDecodeError:
      result = {"status": "damaged"}
    status = "unfinished" if result is None else result["status"]
    tally[status] = tally.get(status, 0) + 1
  return tally
