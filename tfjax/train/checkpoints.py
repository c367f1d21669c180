# SPDX-License-Identifier: Apache-2.0
"""What a killed run resumes from: train state and counters, by Orbax."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from tfjax import config as config_lib


class Checkpoints:
  """The checkpoints of one run; saving does not hold up training.

  `counters` are the host's numbers that a resume must carry on: seconds of
  training, resumes so far.
  """

  def __init__(self, directory: pathlib.Path,
               config: config_lib.CheckpointConfig):
    self._manager = ocp.CheckpointManager(
        directory.resolve(),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=config.keep, create=True,
            enable_async_checkpointing=True))

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state: Any, counters: dict[str, Any]) -> None:
    self._manager.save(step, args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        counters=ocp.args.JsonSave(counters)))

  def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    """The newest state, laid out as `abstract_state` says, and counters."""
    restored = self._manager.restore(
        self._manager.latest_step(), args=ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state),
            counters=ocp.args.JsonRestore()))
    # Copied: the step donates its state, and on a CPU a restored array may
    # share memory that XLA does not own.
    state = jax.tree.map(lambda x: x.copy(), restored.state)
    return state, restored.counters

  def close(self) -> None:
    """Returns when everything saved is on disk."""
    self._manager.wait_until_finished()
    self._manager.close()
