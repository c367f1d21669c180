# SPDX-License-Identifier: Apache-2.0
"""Many processes that train one model: how they meet, agree and part.

Who they are comes from the launcher's environment (tfjax.train.launches); JAX
then connects them. Numbers of the training go through collectives on the mesh,
as in one process; here are the few things beside it: a word of process 0 for
all, a wait for all, signals that reach one process and concern all, and what
happens to the others when one fails. Nothing here knows what is trained.
"""

import contextlib
import itertools
import json
import logging
import os
import socket
import sys
import threading
import time
from typing import Any, Iterator

import jax
from jax._src import distributed  # its key-value store has no public name
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from tfjax import config as config_lib
from tfjax.train import launches

_LOG = logging.getLogger("tfjax")

_CONNECT_SECONDS = 300  # hosts of one job may boot minutes apart
_LOST_SECONDS = 60  # a process that is silent for so long has died
_PARTING_SECONDS = 5
_POLL_MILLISECONDS = 1000
_FAILED = "tfjax/failed"

_names = itertools.count()  # of messages; all processes count alike


class CoordinatorError(ConnectionError):
  """The processes do not find each other. Names the address."""


class PeerError(RuntimeError):
  """Another process of this run has failed. Says which, and why."""


# --- Meeting -----------------------------------------------------------------


def initialize(runtime: config_lib.RuntimeConfig) -> None:
  """Connects this process to the others of its launch; before JAX is used.

  Again, or in a process that was started alone, it does nothing.

  Raises:
    ConfigError: the launch is incomplete, or `on` and there is none.
    CoordinatorError: the coordinator cannot be reached.
  """
  if runtime.distributed == "off" or jax.distributed.is_initialized():
    return
  launch = launches.find(os.environ)
  if launch is None and runtime.distributed == "auto":
    return
  # Its SIGTERM handler would swallow the signal before ours is in place.
  jax.config.update("jax_enable_preemption_service", False)
  if launch is None or launch.address is None:
    _let_jax_find(launch)
  else:
    _connect(launch)
  kinds = sorted({device.device_kind for device in jax.devices()})
  _LOG.info("process %d of %d on %s: %d of %d devices (%s)",
            jax.process_index(), jax.process_count(), socket.gethostname(),
            jax.local_device_count(), jax.device_count(), ", ".join(kinds))


def _let_jax_find(launch: launches.Launch | None) -> None:
  """For TPU pods, and for launchers that only JAX knows."""
  _LOG.info("%s: JAX looks for the other processes",
            launch.by if launch else "runtime.distributed=on")
  try:
    jax.distributed.initialize(
        initialization_timeout=_CONNECT_SECONDS,
        heartbeat_timeout_seconds=_LOST_SECONDS)
  except ValueError as error:
    raise config_lib.ConfigError(
        "runtime.distributed", f"on, but no launcher tells of other processes "
        f"({error}); start with srun, on a TPU pod, or set "
        "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and "
        "JAX_PROCESS_ID in every process") from error


def _connect(launch: launches.Launch) -> None:
  """Meets the others; JAX would end the process without a word in Python."""
  who = f"process {launch.process_id} of {launch.num_processes}"
  _LOG.info("%s (%s): coordinator at %s", who, launch.by, launch.address)
  host, port = launch.address.rsplit(":", 1)
  if launch.process_id == 0:
    _check_free(int(port), launch.address)
  else:
    _await_coordinator(host, int(port), who)
  late = threading.Timer(_CONNECT_SECONDS - 1, _LOG.error, args=(
      "%s: after %d s not all %d processes have come to %s; giving up. Are all "
      "started, with this address, one of them for each number?", who,
      _CONNECT_SECONDS, launch.num_processes, launch.address))
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(
        launch.address, launch.num_processes, launch.process_id,
        local_device_ids=launch.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=_CONNECT_SECONDS,
        heartbeat_timeout_seconds=_LOST_SECONDS)
  finally:
    late.cancel()


def _check_free(port: int, address: str) -> None:
  with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind(("", port))
    except OSError as error:
      raise CoordinatorError(
          f"process 0 cannot be the coordinator at {address}: {error}; choose "
          "another port, the same for all processes") from error


def _await_coordinator(host: str, port: int, who: str) -> None:
  deadline = time.monotonic() + _CONNECT_SECONDS
  while True:
    try:
      socket.create_connection((host, port), timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() > deadline:
        raise CoordinatorError(
            f"{who} cannot reach the coordinator, process 0, at {host}:{port} "
            f"({error}), tried for {_CONNECT_SECONDS} s; is process 0 started "
            "there, and the port open to this host?") from error
    time.sleep(0.2)


# --- Agreeing ----------------------------------------------------------------


def is_main() -> bool:
  """Whether this is process 0, which alone writes records."""
  return jax.process_index() == 0


def broadcast(value: Any) -> Any:
  """Process 0's value, which JSON can hold, at every process.

  Takes as long as process 0 does: no collective, which would time out.

  Raises:
    PeerError: process 0 has failed meanwhile.
  """
  client = _client()
  if client is None:
    return value
  key = f"tfjax/broadcast/{next(_names)}"
  if is_main():
    client.key_value_set(key, json.dumps(value))
    return value
  return json.loads(_await_key(client, key))


def barrier() -> None:
  """Returns when every process has come here, however late.

  Before the first run of a program on CPUs, as gloo waits only half a minute
  for processes that still compile theirs.

  Raises:
    PeerError: another process has failed meanwhile.
  """
  client = _client()
  if client is None:
    return
  key = f"tfjax/barrier/{next(_names)}"
  client.key_value_set(f"{key}/{jax.process_index()}", "")
  if is_main():
    for index in range(jax.process_count()):
      _await_key(client, f"{key}/{index}")
    client.key_value_set(f"{key}/all", "")
  _await_key(client, f"{key}/all")


class SaveBarriers:
  """Orbax's barriers of a save, at which no process waits for one that failed.

  One whose save fails skips those of the writing, and comes to the next of
  `_END`, as all do. Orbax's own would wait for it for 20 minutes.
  """

  _END = "ThreadSaveMultiHostValueHolder:set_value"  # before and after a save

  def __init__(self) -> None:
    self._name = f"tfjax/save/{next(_names)}"
    self._round = 0

  def __call__(self, *, key: str, timeout_ms: int) -> None:
    """Returns when all have come.

    Raises:
      PeerError: one has skipped it, or has not come in time.
    """
    client = _client()
    if client is None:
      return
    own, deadline = jax.process_index(), time.monotonic() + timeout_ms / 1000
    if self._END in key:
      self._round += 1
      client.key_value_set(f"{self._name}/{self._round}/{own}", "")
    here = f"{self._name}/{self._round}/{key}"
    if not is_main():
      client.key_value_set(f"{here}/{own}", "")
      answer = self._await(client, f"{here}/all", 0, deadline)
    else:
      missing = [index for index in range(1, jax.process_count())
                 if self._await(client, f"{here}/{index}", index,
                                deadline) is None]
      answer = f"process {missing[0]}" if missing else ""
      client.key_value_set(f"{here}/all", answer)
    if answer != "":
      raise PeerError(f"{answer or 'process 0'} could not write its part")

  def _await(self, client: Any, key: str, index: int,
             deadline: float) -> str | None:
    """The value of a key; None once process `index` will not set it."""
    after = f"{self._name}/{self._round + 1}/{index}"
    while True:
      # Looked at first: who is there has set whatever it set before.
      if _try_get(client, after) is not None:
        return _try_get(client, key)
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        return client.blocking_key_value_get(key, _POLL_MILLISECONDS)
      if time.monotonic() > deadline or _failure(client):
        return None


def _client() -> Any | None:
  """The connection to the coordinator; None with one process."""
  if jax.process_count() == 1:
    return None
  client = distributed.global_state.client
  if client is None:
    raise config_lib.ConfigError(
        "runtime.distributed", f"this machine is one of {jax.process_count()} "
        "that no launcher has connected; set it to on")
  return client


def _await_key(client: Any, key: str) -> str:
  """Waits in short pieces, in which signals are heard."""
  while True:
    try:
      return client.blocking_key_value_get(key, _POLL_MILLISECONDS)
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise PeerError(f"process 0 is gone ({error})") from error
    if failure := _failure(client):
      raise PeerError(failure)


class Agreement:
  """Makes a flag of any process one of all, at the same step."""

  def __init__(self, mesh: Mesh):
    self._pending: jax.Array | None = None
    self._saving = False  # what the call before has answered
    self._flags: dict[tuple[bool, bool], jax.Array] = {}
    if jax.process_count() == 1:
      return
    rows = NamedSharding(mesh, P(mesh.axis_names))
    # Made once: what the loop then pays a step is one small dispatch.
    for stop, save in itertools.product((False, True), repeat=2):
      row = np.array([[stop, save]], np.int32)
      self._flags[stop, save] = jax.make_array_from_callback(
          (mesh.size, 2), rows, lambda _, row=row: row)
    self._any = jax.jit(lambda flags: flags.max(axis=0),
                        out_shardings=NamedSharding(mesh, P()))
    barrier()
    jax.block_until_ready(self._any(self._flags[False, False]))

  def exchange(self, stop: bool, save: bool) -> tuple[bool, bool]:
    """Whether any process wanted to stop, or to save; once a step, by all.

    With several processes the answer is that of the call before: nobody waits
    for the device to do more than the step before this one. A wish to save is
    repeated until it is granted; what was on its way by then counts as the
    same one.
    """
    if not self._flags:
      return stop, save
    before, self._pending = (
        self._pending, self._any(self._flags[bool(stop), bool(save)]))
    if before is None:
      return False, False
    stop, save = map(bool, np.asarray(before.addressable_data(0)))
    self._saving = save and not self._saving
    return stop, self._saving


# --- Parting -----------------------------------------------------------------


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Around what all processes do: one that fails alone ends, at once.

  Left to itself it would wait minutes in its exit for the others, which wait
  for it, and then abort. Where all fail alike, as over a bad config, each gets
  its exception. Where one does not, those in `broadcast` or `barrier` get a
  PeerError, those in a collective an error of theirs.
  """
  try:
    yield
  except BaseException as error:
    if jax.distributed.is_initialized():
      _part(error)
    raise


def _part(error: BaseException) -> None:
  state = distributed.global_state
  who = f"process {state.process_id} of {state.num_processes}"
  earlier = _failure(state.client)
  try:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first
      state.client.key_value_set(
          _FAILED, f"{who} has failed: {type(error).__name__}: {error}")
    state.client.wait_at_barrier("tfjax/parting", _PARTING_SECONDS * 1000)
  except jax.errors.JaxRuntimeError:
    _LOG.error("%s ends, without the others%s", who,
               f" ({earlier})" if earlier else "", exc_info=error)
    logging.shutdown()
    sys.stdout.flush()
    # Nothing less ends a process whose threads wait for the others.
    code = error.code if isinstance(error, SystemExit) else 1
    os._exit(code if isinstance(code, int) else 1)


def _failure(client: Any) -> str | None:
  """What the first process that failed said."""
  return _try_get(client, _FAILED)


def _try_get(client: Any, key: str) -> str | None:
  try:
    return client.key_value_try_get(key)
  except jax.errors.JaxRuntimeError:
    return None
