# SPDX-License-Identifier: Apache-2.0
"""One run of tfjax as one run of wandb.

The run's id is its own, row i is the i-th that wandb is given, and charts are
against columns of the row. So that wandb holds every row once, whatever was
resumed, rolled back or sent before:

Online, a run that wandb knows is resumed, and the rows that wandb has are not
sent again. wandb numbers them, which tells how many those are; what they were
is noted in wandb/sent.txt of the run's directory. Where the run has since
gone another way (after a rollback), wandb's history is rewound to the last row
that both have. A server that cannot rewind keeps the rows of the way that was
given up, and gets of the new way those of other steps.

Offline there is one directory a run, which holds all of it: it is written
anew from the first row.
"""

import contextlib
import logging
import os
import pathlib
import shutil
import sys
import time
from typing import Any, Mapping, Sequence

from tfjax.train.mirrors import columns

_LOG = logging.getLogger("tfjax")
FINISH_SECONDS = 20
# How a run has ended, for wandb's mark of it.
_WELL = ("complete", "stopped")


class WandbRun:
  """A run in wandb that is kept like a run directory.

  Attributes:
    mode: online or offline.
    notes: what could not be done as it should be.
  """

  def __init__(self, about: columns.About, run_dir: pathlib.Path, mode: str):
    self.mode = mode
    self.notes: list[str] = []
    self._about, self._run_dir = about, run_dir
    self._next = 0  # of the run's rows
    # Steps of rows that wandb holds and should not, where it cannot rewind.
    self._given_up: set[str] | None = None
    self._run = self._open()
    self._held = self._load_held()

  def update(self, rows: Sequence[Mapping[str, Any]], replaced: bool) -> None:
    """Sends what wandb has not got of `rows`, all that there are so far.

    Args:
      replaced: the rows before may have changed.
    """
    if replaced:
      self._next = 0
    sent = []
    while self._next < len(rows):
      row, number = rows[self._next], self._next
      name = columns.identity(row)
      self._next += 1
      if number < len(self._held) and self._held[number] in (None, name):
        continue
      if number < len(self._held) and self._given_up is None:
        self._note(sent)
        sent = []
        self._rewind(rows, number)
      if self._given_up and _step(name) in self._given_up:
        continue
      self._run.log(columns.of_row(row))
      self._held.append(name)
      sent.append(name)
    self._note(sent)

  def finish(self, rows: Sequence[Mapping[str, Any]],
             result: Mapping[str, Any] | None) -> None:
    """Hands over the result, of `rows` that have all been sent."""
    if len(self._held) > len(rows) and self._given_up is None:
      self._rewind(rows, len(rows))
    status = None if result is None else result["status"]
    if result is not None:
      self._run.summary.update(columns.summary(result))
      about = columns.about(self._run_dir)
      self._run.config.update({"derived": about.config["derived"]},
                              allow_val_change=True)
    begun = time.monotonic()
    self._run.finish(exit_code=0 if status in _WELL else 1)
    if (self.mode == "online" and
        time.monotonic() - begun >= FINISH_SECONDS):
      self.notes.append(f"wandb has not taken everything within "
                        f"{FINISH_SECONDS} s; scripts/track.py sync sends it")

  def where(self) -> str:
    """The run's page, or its offline directory."""
    return (self._run.url if self.mode == "online"
            else str(pathlib.Path(self._run.dir).parent))

  def _open(self, rewind_to: int | None = None) -> Any:
    if self.mode == "offline":
      discard_offline(self._run_dir, self._about.run_id)
      which = dict(id=self._about.run_id)
    elif rewind_to is None:
      which = dict(id=self._about.run_id, resume="allow")
    else:
      which = dict(resume_from=f"{self._about.run_id}?_step={rewind_to}")
    run = start(self._about.tracking, self._run_dir, self.mode,
                name=self._about.run_id, group=self._about.group,
                job_type="train", tags=list(self._about.tags),
                config=dict(self._about.config), **which)
    for axis in columns.AXES:
      run.define_metric(axis, hidden=True)
    for kind in columns.KINDS:
      run.define_metric(f"{kind}/*", step_metric="tokens")
    return run

  def _rewind(self, rows: Sequence[Mapping[str, Any]], number: int) -> None:
    """Makes wandb forget the rows from `number` on."""
    if self.mode == "offline":
      self._run.finish()
      self._run, self._held = self._open(), []
      for row in rows[:number]:
        self._run.log(columns.of_row(row))
        self._held.append(columns.identity(row))
      return
    try:
      if not number:
        raise ValueError("wandb cannot forget a run's first row")
      self._run.finish()
      self._run = self._open(rewind_to=number - 1)
      self._held = self._held[:number]
      self._write_held()
    except Exception as error:  # pylint: disable=broad-exception-caught
      self.notes.append(
          f"wandb holds {len(self._held) - number} rows that the run has "
          f"since done otherwise, and does not give them up ({error}); they "
          "stay, and of those steps nothing else is sent")
      _LOG.warning("%s: %s", self._about.run_id, self.notes[-1])
      self._run = self._open()
      self._given_up = {_step(name) for name in self._held if name}

  # --- What an online run holds ------------------------------------------

  @property
  def _sent_file(self) -> pathlib.Path:
    return self._run_dir / "wandb" / "sent.txt"

  def _load_held(self) -> list[str | None]:
    """What wandb has, by the identity of rows; None: what it is, is unknown."""
    if self.mode == "offline":
      return []
    count = self._run.starting_step
    try:
      to, *names = self._sent_file.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ValueError):
      to, names = "", []
    known = names[:count] if to == self._address() else []
    held = [*known, *[None] * (count - len(known))]
    self._held = held
    self._write_held()
    return held

  def _address(self) -> str:
    return self._run.url or ""

  def _write_held(self) -> None:
    names = self._held
    if None in names:
      names = names[:names.index(None)]
    text = "\n".join([self._address(), *names]) + "\n"
    temporary = self._sent_file.with_name(f".sent.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, self._sent_file)

  def _note(self, names: Sequence[str]) -> None:
    if self.mode == "online" and names and None not in self._held:
      with open(self._sent_file, "a", encoding="utf-8") as file:
        file.writelines(f"{name}\n" for name in names)


def _step(identity: str) -> str:
  return identity.rsplit(" ", 1)[0]


def start(tracking: Mapping[str, Any], directory: pathlib.Path, mode: str,
          **arguments: Any) -> Any:
  """A run of wandb; may raise, may take a while."""
  import wandb  # pylint: disable=import-outside-toplevel
  (directory / "wandb").mkdir(parents=True, exist_ok=True)
  return wandb.init(
      project=tracking["project"], entity=tracking["entity"] or None,
      dir=str(directory), mode=mode, reinit="create_new", **arguments,
      settings=wandb.Settings(
          init_timeout=tracking["init_timeout_seconds"],
          finish_timeout=FINISH_SECONDS, console="off", silent=True,
          disable_git=True, disable_code=True, x_disable_stats=True,
          x_disable_meta=True, x_save_requirements=False))


def teardown() -> None:
  """Returns when wandb has written what its runs were given: they may be
  finished a moment before their files are."""
  if "wandb" in sys.modules:
    import wandb  # pylint: disable=import-outside-toplevel
    with contextlib.suppress(Exception):
      wandb.teardown()


def discard_offline(directory: pathlib.Path, run_id: str) -> None:
  """Removes the offline directories of a run, which are all of one mirror."""
  for old in (directory / "wandb").glob(f"offline-run-*-{run_id}"):
    shutil.rmtree(old)


def mode_of(wanted: str) -> str:
  """What `auto` comes to: online with a key, which no server is asked for."""
  if wanted != "auto":
    return wanted
  if os.environ.get("WANDB_API_KEY"):
    return "online"
  netrc = pathlib.Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
  try:
    return "online" if "wandb" in netrc.read_text("utf-8") else "offline"
  except OSError:
    return "offline"
