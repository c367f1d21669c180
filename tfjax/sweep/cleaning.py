# SPDX-License-Identifier: Apache-2.0
"""What a sweep's directory can do without: found, shown, then removed.

Checkpoints of runs that have ended for good, unless another run begins with
them, and what killed processes have left. Records stay, whatever happens, and
a run that somebody is at is not touched. Claims of dead processes need no
removal: they lapse, and the next one that is made takes their place
(`tfjax.train.lease`).
"""

import dataclasses
import os
import pathlib
import re
import shutil
import time
from typing import Sequence

from tfjax.sweep import branch
from tfjax.sweep import ledger
from tfjax.sweep.specs import RunSpec
from tfjax.train import claim

_CHECKPOINTS = "checkpoints"
# A directory on its way out: a part of a checkpoint would be a damaged one.
_DOOMED = ".checkpoints.deleted"
_UNFINISHED = "*.orbax-checkpoint-tmp*"  # saves that a kill cut short
# Files that were to be renamed, as `records.write_text` names them.
_TEMPORARY = re.compile(r"\..+\.(json|jsonl|md|html|parquet|csv)\.\d+")
_OLD_SECONDS = 3600.0  # no file takes so long to write, nor differ clocks so


@dataclasses.dataclass(frozen=True)
class Leftover:
  """A file or directory that can go.

  Attributes:
    what: it is, in words.
    run_dir: whose, or None: the sweep's.
    is_checkpoints: of a run that has ended, to be removed while it has.
  """

  path: pathlib.Path
  what: str
  run_dir: pathlib.Path | None
  num_bytes: int
  is_checkpoints: bool = False


def find(workdir: str | os.PathLike[str]) -> list[Leftover]:
  """What can be removed, without the runs that somebody is at.

  Raises:
    RecordError: a result is damaged.
  """
  workdir = pathlib.Path(workdir)
  if not workdir.is_dir():
    raise FileNotFoundError(f"there is no directory {workdir}")
  needed = _needed(workdir)
  found = []
  for run_dir in sorted(path.parent for path in workdir.glob("*/config.json")):
    if claim.is_held(run_dir):
      continue
    saved = run_dir / _CHECKPOINTS
    if (ledger.is_finished(run_dir) and run_dir.resolve() not in needed
        and saved.is_dir()):
      found.append(_leftover(saved, "checkpoints of a run that has ended",
                             run_dir, is_checkpoints=True))
    else:
      found += [_leftover(path, "an unfinished checkpoint", run_dir)
                for path in sorted(saved.glob(_UNFINISHED))]
    found += [_leftover(path, "an unfinished file", run_dir)
              for path in sorted(run_dir.iterdir())
              if _TEMPORARY.fullmatch(path.name) or path.name == _DOOMED]
  # Who writes here holds nothing, so that age has to tell.
  now = time.time()
  found += [_leftover(path, "an unfinished file", None)
            for path in sorted(workdir.iterdir())
            if _TEMPORARY.fullmatch(path.name)
            and now - path.stat().st_mtime > _OLD_SECONDS]
  return found


def remove(found: Sequence[Leftover]) -> list[Leftover]:
  """Removes what was found; returns what is gone.

  Not that of a run that somebody has taken up since.

  Raises:
    OSError: something cannot be removed.
  """
  return [one for one in found if _remove(one)]


def _remove(one: Leftover) -> bool:
  if one.run_dir is None:
    one.path.unlink(missing_ok=True)
    return True
  try:
    with claim.directory(one.run_dir):
      if one.is_checkpoints:
        if not ledger.is_finished(one.run_dir):
          return False
        doomed = one.run_dir / _DOOMED
        _delete(doomed)  # of a clean that was killed
        one.path.rename(doomed)
        _delete(doomed)
      else:
        _delete(one.path)
  except claim.RunDirectoryBusyError:
    return False
  return True


def _delete(path: pathlib.Path) -> None:
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def _needed(workdir: pathlib.Path) -> set[pathlib.Path]:
  """Directories of runs whose checkpoints another run has yet to begin with:
  trunks, and what init_from names."""
  try:
    specs = ledger.read_specs(workdir)
  except FileNotFoundError:
    return set()  # Runs may have been trained one by one.
  waiting = [spec for spec in specs
             if not ledger.is_finished(workdir / spec.run_id)]
  given = branch.options(specs)
  trunks = {(workdir / given[spec.run_id]["branch"]["run_id"]).resolve()
            for spec in waiting if "branch" in given.get(spec.run_id, {})}
  return trunks | {_init_from(spec) for spec in waiting
                   if spec.config.init_from}


def _init_from(spec: RunSpec) -> pathlib.Path:
  path = pathlib.Path(spec.config.init_from).expanduser().resolve()
  return path.parent if path.name == _CHECKPOINTS else path


def _leftover(path: pathlib.Path, what: str, run_dir: pathlib.Path | None,
              is_checkpoints: bool = False) -> Leftover:
  files = path.rglob("*") if path.is_dir() else [path]
  size = sum(file.lstat().st_size for file in files if file.is_file())
  return Leftover(path, what, run_dir, size, is_checkpoints)
