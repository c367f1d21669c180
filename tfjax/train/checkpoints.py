# SPDX-License-Identifier: Apache-2.0
"""What a killed run resumes from: train state and counters, by Orbax.

A checkpoint is a directory, named by its step, that Orbax renames into place
when all of it is written. In it lies `manifest.json`, the size and checksum of
every file, written before the rename: a kill at any moment leaves either a
whole checkpoint with its manifest, or a temporary directory that the next
start removes. So one without a manifest is not ours or has lost files; like
any other that does not agree with its manifest it is set aside under
`damaged/`, not deleted, and the one before it is used.

What is in the counters, and when to save, is the loop's.
"""

import contextlib
import errno
import logging
import os
import pathlib
import shutil
import sys
import threading
import time
from typing import Any, Collection, Sequence

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from tfjax import config as config_lib
from tfjax.train import cluster
from tfjax.train import manifest

_LOG = logging.getLogger("tfjax")

_UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax's, after the step
# What ends a save most often; TensorStore quotes them within long texts.
_FILE_SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_QUIET_SECONDS, _QUIET_TRIES = 0.2, 20


class Checkpoints:
  """The checkpoints of one run; saving does not hold up training.

  `counters` are the host's numbers that a resume must carry on. With several
  processes every one calls every method, at the same point of its program.

  Attributes:
    failed_saves: how many could not be written, by a full disk for example.
  """

  def __init__(self, directory: pathlib.Path,
               config: config_lib.CheckpointConfig,
               keep_steps: Sequence[int] = ()):
    """`keep_steps` stay, however many are saved after them."""
    self.failed_saves = 0
    self._directory = directory.resolve()
    self._step = None  # the one being saved
    self._watcher: threading.Thread | None = None
    self._failed = False  # since the manager was last told
    self._remove_unfinished()
    keep = [checkpoint_managers.LatestN(config.keep),
            checkpoint_managers.CustomSteps(keep_steps)]
    if config.keep_every_steps:
      keep.append(checkpoint_managers.EveryNSteps(config.keep_every_steps))
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handler = _state_handler()
    registry.add("state", ocp.args.PyTreeSave, handler)
    registry.add("state", ocp.args.PyTreeRestore, handler)
    registry.add("counters", ocp.args.JsonSave)
    registry.add("counters", ocp.args.JsonRestore)
    self._manager = ocp.CheckpointManager(
        self._directory, handler_registry=registry,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
            lightweight_initialize=True,  # reads no step's metadata
            async_options=ocp.AsyncOptions(
                # Despite its name it is called when all is written, by process
                # 0 alone, in the saving thread, just before the rename.
                post_finalization_callback=self._write_manifest,
                barrier_sync_fn=cluster.SaveBarriers(),
                # Else a save that could not begin may hang the next one.
                create_directories_asynchronously=False)))

  def latest_step(self) -> int | None:
    """The newest checkpoint on disk; `restore` looks whether it is sound."""
    self._settle()
    return self._manager.latest_step()

  def save(self, step: int, state: Any, counters: dict[str, Any]) -> None:
    """Starts to save; `state` may be donated at once.

    Waits for the save before it. What fails is logged and counted, and its
    remains are removed; it never raises.
    """
    self._settle()
    self._step = step
    if problem := self._problem():
      self._report(step, OSError(problem))
      return
    try:
      self._manager.save(step, args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(state),
          counters=ocp.args.JsonSave(counters)))
    except Exception as error:  # pylint: disable=broad-exception-caught
      self._report(step, error)
      return
    self._watcher = threading.Thread(target=self._watch, args=(step,))
    self._watcher.start()

  def restore(self, abstract_state: Any, suspect: int | None = None,
              ) -> tuple[Any, dict[str, Any]] | None:
    """The newest sound checkpoint's state and counters, or None.

    The state is laid out as `abstract_state` says, whatever devices and
    processes it was saved from. Damaged checkpoints that are newer, and that
    of the step `suspect`, are set aside, so that their steps can be saved
    again.
    """
    self._settle()
    step = newest_sound(self._directory, set_aside=True, suspect=suspect)
    self._manager.reload()
    if step is None:
      return None
    restored = self._manager.restore(step, args=ocp.args.Composite(
        state=_restore_args(abstract_state),
        counters=ocp.args.JsonRestore()))
    return _owned(restored.state), restored.counters

  def close(self) -> None:
    """Returns when everything saved is on disk; never raises."""
    self._settle()
    self._manager.close()

  def _problem(self) -> str | None:
    """Why process 0, which makes the directories, cannot; at all processes.

    In its save the others would wait for it in a collective.
    """
    if jax.process_count() == 1:
      return None
    problem, probe = None, self._directory / ".probe"
    if cluster.is_main():
      try:
        probe.mkdir(exist_ok=True)
        (probe / "file").write_bytes(bytes(1 << 12))
      except OSError as error:
        problem = str(error)
      shutil.rmtree(probe, ignore_errors=True)
    return cluster.broadcast(problem)

  def _watch(self, step: int) -> None:
    """In a thread of its own: the end of a save, told when it comes."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:  # pylint: disable=broad-exception-caught
      self._report(step, error)

  def _settle(self) -> None:
    """Waits for the save in progress; after it the manager is ours alone."""
    if self._watcher is not None:
      self._watcher.join()
      self._watcher = None
    if self._failed:
      self._failed = False
      # It raises once more, here, and has forgotten those it meant to delete.
      with contextlib.suppress(Exception):
        self._manager.wait_until_finished()
      self._manager.reload()

  def _report(self, step: int, error: Exception) -> None:
    """Logs and counts a failed save, and frees what it took of the disk."""
    self._failed = True
    self.failed_saves += 1
    # Until nothing comes back: writes of it that are still on their way make
    # the directory anew.
    for _ in range(_QUIET_TRIES):
      self._remove_unfinished()
      time.sleep(_QUIET_SECONDS)
      if not self._unfinished():
        break
    kept = steps_in(self._directory)
    _LOG.error(
        "%s: the checkpoint of step %d could not be saved (%s); %s; training "
        "goes on, and the next save is tried afresh", self._directory, step,
        _reason(error), f"the newest is of step {kept[-1]}" if kept else
        "there is none yet")

  def _remove_unfinished(self) -> None:
    """Removes what a killed or failed save has left."""
    if cluster.is_main():
      for path in self._unfinished():
        shutil.rmtree(path, ignore_errors=True)

  def _unfinished(self) -> list[pathlib.Path]:
    return list(self._directory.glob(f"*{_UNFINISHED}*"))

  def _write_manifest(self) -> None:
    manifest.write(self._directory / f"{self._step}{_UNFINISHED}")


def restore_of(checkpoint: pathlib.Path, abstract_state: Any,
               ) -> tuple[Any, dict[str, Any]] | None:
  """State and counters of one checkpoint, the directory of its step, which
  may be another run's: nothing in it is changed. None: it is not there, or
  damaged, which is logged.
  """
  checkpoint = checkpoint.resolve()
  sound = False
  if cluster.is_main() and checkpoint.is_dir():
    damage = manifest.damage(checkpoint)
    if damage:
      _LOG.warning("checkpoint %s is damaged (%s)", checkpoint,
                   "; ".join(damage))
    sound = not damage
  if not cluster.broadcast(sound):
    return None
  state = _state_handler().restore(
      checkpoint / "state", args=_restore_args(abstract_state))
  counters = ocp.JsonCheckpointHandler().restore(checkpoint / "counters")
  return _owned(state), dict(counters)


def steps_in(directory: pathlib.Path) -> list[int]:
  """Of all finished checkpoints in a directory, in order."""
  if not directory.is_dir():
    return []
  return sorted(int(path.name) for path in directory.iterdir()
                if path.name.isdigit())


def delete(directory: pathlib.Path, config: config_lib.CheckpointConfig,
           steps: Collection[int]) -> list[pathlib.Path]:
  """Deletes checkpoints of these steps, but those that the config keeps, of a
  run at which nobody is; returns what it has deleted."""
  every, there = config.keep_every_steps, steps_in(directory)
  gone = []
  for step in set(steps) & set(there[:-config.keep]):
    if every and step % every == 0:
      continue
    path = directory / str(step)
    # Out of the way at once: a part of a checkpoint would be a damaged one.
    doomed = path.with_name(f"{step}{_UNFINISHED}-deleted-{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):  # somebody was faster
      path.rename(doomed)
      shutil.rmtree(doomed, ignore_errors=True)
      gone.append(path)
  return gone


def weights(directory: pathlib.Path, abstract_params: Any) -> Any:
  """The parameters of a run's newest sound checkpoint, and nothing else.

  Args:
    directory: the run's, or its checkpoints'; nothing in it is changed.
    abstract_params: shapes, types and shardings to restore them into.

  Raises:
    ConfigError: there is no sound checkpoint, or its parameters are others;
      all that are missing, extra or of another shape are named.
  """
  directory = directory.expanduser().resolve()
  if (directory / "checkpoints").is_dir():
    directory = directory / "checkpoints"
  step = newest_sound(directory)
  if step is None:
    raise config_lib.ConfigError(
        "init_from", f"{directory} has no checkpoint that is whole; name the "
        "directory of a run that has saved one")
  return weights_of(directory / str(step), abstract_params)


def weights_of(checkpoint: pathlib.Path, abstract_params: Any) -> Any:
  """The same of one checkpoint, the directory of its step."""
  path = checkpoint.resolve() / "state"
  handler = _state_handler()
  saved = handler.metadata(path).tree["params"]
  if different := _differences(saved, abstract_params):
    raise config_lib.ConfigError(
        "init_from", f"the parameters in {path} are not this model's:\n  " +
        "\n  ".join(different))
  restored = handler.restore(path, args=_restore_args(
      {"params": abstract_params}, partial_restore=True))
  return _owned(restored["params"])


def _state_handler() -> ocp.PyTreeCheckpointHandler:
  """Orbax's, but that each array is written from one of its replicas.

  To share it among the replicas Orbax would cut and compile for every shape:
  seconds in the first save. Between a TPU's hosts that pays.
  """
  arrays = ocp.type_handlers.ArrayHandler(
      use_replica_parallel=jax.default_backend() == "tpu")
  return ocp.PyTreeCheckpointHandler(
      type_handler_registry=ocp.type_handlers.create_type_handler_registry(
          (jax.Array, arrays)))


def _restore_args(abstract: Any, **options: Any) -> ocp.args.PyTreeRestore:
  return ocp.args.PyTreeRestore(
      abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(
          abstract), **options)


def _differences(saved: Any, wanted: Any) -> list[str]:
  """In words, by parameter: what one tree has and the other has not."""
  saved, wanted = ({
      jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
                   for tree in (saved, wanted))
  return [
      f"{name}: " + (
          f"missing there, {wanted[name]} here" if name not in saved else
          f"{saved[name]} there, none here" if name not in wanted else
          f"{saved[name]} there, {wanted[name]} here")
      for name in sorted(saved.keys() | wanted.keys())
      if saved.get(name) != wanted.get(name)]


def _owned(tree: Any) -> Any:
  """The same arrays in memory that XLA owns, so that they can be donated.

  On a CPU a restored array may share memory with whoever read the file.
  """
  if jax.default_backend() != "cpu":
    return tree
  return jax.tree.map(lambda x: x.copy(), tree)


def newest_sound(directory: pathlib.Path,
                 set_aside: bool = False,
                 suspect: int | None = None) -> int | None:
  """The newest step whose files agree with their manifest; None: there is none.

  Process 0 looks, and all processes get its answer. Of each damaged one it
  warns, and moves it out of the way if asked; `suspect` is taken for one.
  """
  found = None
  if cluster.is_main():
    steps = steps_in(directory)
    for step in reversed(steps):
      damage = (["training cannot go on from it"] if step == suspect
                else manifest.damage(directory / str(step)))
      if not damage:
        found = step
        break
      where = _set_aside(directory / str(step)) if set_aside else None
      _LOG.warning(
          "checkpoint %s is damaged (%s)%s; %s", directory / str(step),
          "; ".join(damage), f" and now lies in {where}" if where else "",
          "there is none before it" if step == steps[0] else
          "the one before it is used")
  return cluster.broadcast(found)


def _set_aside(checkpoint: pathlib.Path) -> pathlib.Path:
  """Moves it where it is no checkpoint any more, and says where that is."""
  directory = checkpoint.parent / "damaged"
  directory.mkdir(exist_ok=True)
  target, count = directory / checkpoint.name, 1
  while target.exists():
    count += 1
    target = directory / f"{checkpoint.name}.{count}"
  return checkpoint.rename(target)


def _reason(error: Exception) -> str:
  """The error in a line; what the file system says, where it is quoted."""
  said = (os.strerror(code) for code in _FILE_SYSTEM)
  text = next((words for words in said if words in str(error)),
              str(error).split("\n", maxsplit=1)[0][:200])
  return f"{type(error).__name__}: {text}"


def _without_tracebacks(record: logging.LogRecord) -> bool:
  """Not those of one failed save, by Orbax or of its tasks, of hundreds of
  lines, in which the line of ours would drown."""
  return not (record.exc_info and
              "orbax" in record.pathname + record.getMessage())


def _without_late_writes(
    unraisable: Any, before: Any = sys.unraisablehook) -> None:
  """Nor of writes that end after their save has failed."""
  if str(unraisable.exc_value) != "Event loop is closed":
    before(unraisable)


for _name in ("absl", "asyncio"):
  logging.getLogger(_name).addFilter(_without_tracebacks)
sys.unraisablehook = _without_late_writes
