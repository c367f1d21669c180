# SPDX-License-Identifier: Apache-2.0
"""The mirror of a run's records in wandb: never slows or stops a run.

A thread of its own feeds wandb from a bounded queue. When wandb raises, hangs
or falls behind, rows are dropped from the mirror; the run's own files hold
them all.
"""

import contextlib
import logging
import os
import pathlib
import queue
import threading
from typing import Any

from tfjax import config as config_lib

_LOG = logging.getLogger("tfjax")
_QUEUE_ROWS = 10_000
# Close waits this long for the mirror to catch up, then leaves it.
_CLOSE_SECONDS = 20.0
# wandb's own steps must rise and drop what was redone after a crash; charts
# use these columns instead.
_X_AXES = ("step", "tokens", "flops", "seconds", "device_seconds",
           "energy_kwh")

_STOP = object()


class Mirror:
  """Takes the run's rows and result; `wandb` alone sees them."""

  def __init__(self, config: config_lib.ExperimentConfig,
               run_dir: pathlib.Path, sweep: str | None):
    self._queue: queue.Queue = queue.Queue(_QUEUE_ROWS)
    self._thread = None
    if config.tracking.wandb != "disabled":
      self._thread = threading.Thread(
          target=self._feed, args=(config, run_dir, sweep), daemon=True)
      self._thread.start()

  def log(self, row: dict[str, Any]) -> None:
    self._put(row)

  def finish(self, result: dict[str, Any]) -> None:
    """Hands over the result and waits a bounded time for the mirror."""
    if self._thread is None:
      return
    self._put((_STOP, result))
    self._thread.join(_CLOSE_SECONDS)
    if self._thread.is_alive():
      _LOG.warning("wandb did not finish within %.0f s; the run goes on "
                      "without it", _CLOSE_SECONDS)

  def _put(self, item: Any) -> None:
    if self._thread is not None:
      with contextlib.suppress(queue.Full):
        self._queue.put_nowait(item)

  def _feed(self, config, run_dir, sweep) -> None:
    try:
      run = _start(config, run_dir, sweep)
      while True:
        item = self._queue.get()
        if isinstance(item, tuple) and item[0] is _STOP:
          run.summary.update(
              {k: v for k, v in item[1].items() if v is not None})
          run.finish()
          return
        kind = item["kind"]
        run.log({(k if k in _X_AXES else f"{kind}/{k}"): v
                 for k, v in item.items() if k != "kind" and v is not None})
    except Exception as error:  # pylint: disable=broad-except
      # Whatever goes wrong in wandb is wandb's: the run must not notice.
      _LOG.warning("wandb stopped mirroring this run: %r", error)


def _start(config: config_lib.ExperimentConfig, run_dir: pathlib.Path,
           sweep: str | None):
  """A wandb run, offline where there is no key or no network."""
  import wandb  # pylint: disable=import-outside-toplevel
  tracking = config.tracking
  mode = tracking.wandb
  if mode == "auto":
    mode = "online" if _has_key() else "offline"

  def init(mode: str):
    return wandb.init(
        project=tracking.project, entity=tracking.entity or None,
        id=run_dir.name, name=run_dir.name, group=sweep, dir=str(run_dir),
        config=config_lib.to_dict(config), resume="allow", mode=mode,
        settings=wandb.Settings(
            init_timeout=tracking.init_timeout_seconds, finish_timeout=10,
            console="off", silent=True, disable_git=True,
            x_disable_stats=True))
  try:
    run = init(mode)
  except Exception as error:  # pylint: disable=broad-except
    if mode == "offline":
      raise
    _LOG.warning("wandb is not reachable (%r); tracking offline", error)
    run = init("offline")
  for axis in _X_AXES:
    run.define_metric(axis, hidden=True)
  run.define_metric("train/*", step_metric="tokens")
  run.define_metric("evaluation/*", step_metric="tokens")
  return run


def _has_key() -> bool:
  """A key in the environment or in netrc; asks no server."""
  if os.environ.get("WANDB_API_KEY"):
    return True
  netrc = pathlib.Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
  try:
    return "wandb" in netrc.read_text(encoding="utf-8")
  except OSError:
    return False
