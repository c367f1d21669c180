# SPDX-License-Identifier: Apache-2.0
"""Who holds a directory: claims as files with heartbeats, for any number of
processes on any number of hosts that see the same file system.

DIRECTORY/.claim/ has one file a claim, numbered 1, 2, 3, ... The highest number
is the claim that counts: whoever made it holds the directory until the file
says that it was let go or its holder is dead. Why two can never both hold it:

* A number is made with O_EXCL, so by one process alone, also on NFS.
* The next number is made only over one that was let go or has lapsed, and
  whoever made it holds the directory only if it then finds none higher.
* The highest file is never removed, lower ones are. So a slow process that
  makes a number which others have long passed always finds a higher one.
* A holder says that it lives (the time of its file), then looks for a higher
  number; a taker makes the higher number, then looks whether the holder lives.
  In whatever order these happen, one of the two sees the other and goes.
* A holder touches its own file through its open descriptor: what somebody else
  has made since, under the same name even, is out of its reach.

On one host a holder lives as long as its process does, by its id and the time
it was started: who dies is followed at once, who merely stands still (Ctrl-Z, a
laptop's lid) keeps its claim. Of another host's holder, and where the system
hides when the process was started, only the heartbeat tells: after
`LAPSE_SECONDS` without one its claim has lapsed. Ages are by the file system's
clock; those of hosts may differ. A holder that has been out for more than
`_DOUBT_SECONDS` makes sure before it writes (`check`).

What a claim is for is not known here.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import pathlib
import socket
import tempfile
import threading
import time
from typing import Any, Iterator

DIRECTORY = ".claim"  # in the directory that is claimed
LAPSE_SECONDS = 60.0
_BEAT_SECONDS = 10.0
_DOUBT_SECONDS = 20.0  # less than LAPSE_SECONDS by all that a write may take
_RELEASED = b"-"  # in place of the first byte, which is written at one go
_OFFSET_SECONDS = 30.0  # for so long the clocks' difference is taken as known


class BusyError(RuntimeError):
  """Another process holds the directory; `holder` is who."""

  def __init__(self, directory: pathlib.Path, holder: "Holder | None"):
    super().__init__(f"{directory} is held by {holder or 'another process'}")
    self.holder = holder


class LostError(RuntimeError):
  """This process held the directory, and another has taken it since."""


@dataclasses.dataclass(frozen=True)
class Holder:
  """A process that holds a directory; unknown is None."""

  host: str | None = None
  pid: int | None = None
  machine: str | None = None  # this boot of this host, as processes see it
  started: str | None = None  # by the host's own clock

  def __str__(self) -> str:
    if self.pid is None:
      return "another process"
    return f"process {self.pid} on {self.host}"


@contextlib.contextmanager
def hold(directory: str | os.PathLike[str]) -> Iterator[None]:
  """Holds an existing directory; lets go at the end.

  Raises:
    BusyError: another process, or another thread of this one, holds it.
  """
  directory = pathlib.Path(directory)
  lease = _Lease(directory)
  _leases[os.fspath(directory)] = lease
  lease.beat_on()
  try:
    yield
  finally:
    _leases.pop(os.fspath(directory), None)
    lease.release()


def check(directory: str | os.PathLike[str]) -> None:
  """Before something is written there: cheap, and nothing for who holds none.

  Raises:
    LostError: this process has held the directory and has lost it.
    OSError: the file system does not tell.
  """
  lease = _leases.get(os.fspath(directory))
  if lease is not None:
    lease.check()


def holder(directory: str | os.PathLike[str]) -> Holder | None:
  """Who holds the directory now; None: nobody that lives."""
  claim = _newest(pathlib.Path(directory) / DIRECTORY)
  return claim.holder if claim is not None and claim.is_held() else None


_leases: dict[str, "_Lease"] = {}  # of this process, by their directory


class _Lease:
  """A claim of this process, from its making to its end."""

  def __init__(self, directory: pathlib.Path):
    """Raises a BusyError where somebody holds the directory."""
    self._claims = directory / DIRECTORY
    self._claims.mkdir(exist_ok=True)
    self._lost: str | None = None
    self._closed = threading.Event()
    self._lock = threading.Lock()  # of what the descriptor is
    self._descriptor: int | None = None
    before = _newest(self._claims)
    if before is not None and before.is_held():
      raise BusyError(directory, before.holder)
    self._number = 1 + (0 if before is None else before.number)
    try:
      self._descriptor = os.open(
          self._claims / str(self._number), os.O_CREAT | os.O_EXCL | os.O_RDWR,
          0o644)
    except FileExistsError:
      raise BusyError(directory, holder(directory)) from None
    try:
      os.write(self._descriptor, json.dumps(dataclasses.asdict(
          _self())).encode())
    except OSError:  # a full disk: an empty claim would have to lapse
      with contextlib.suppress(OSError):
        os.unlink(self._claims / str(self._number))
      os.close(self._descriptor)
      raise
    self._sure_at = _clock()
    others = [number for number in _numbers(self._claims)
              if number != self._number]
    if any(number > self._number for number in others):
      self.release()
      raise BusyError(directory, holder(directory))
    # It has lived meanwhile: it, too, has looked or will look, and stop.
    again = None if before is None else _read(before.path)
    if again is not None and again.is_held():
      self.release()
      raise BusyError(directory, again.holder)
    for number in others:
      with contextlib.suppress(OSError):
        os.unlink(self._claims / str(number))

  def beat_on(self) -> None:
    """Says now and then that this process lives, from a thread of its own."""
    threading.Thread(target=self._beats, name="claim", daemon=True).start()

  def _beats(self) -> None:
    while not self._closed.wait(_BEAT_SECONDS) and self._lost is None:
      with contextlib.suppress(OSError):  # tried again; `check` tells of it
        self._beat()

  def _beat(self) -> None:
    now = _clock()  # before: what is told is at least as new
    with self._lock:
      if self._descriptor is None:
        return
      try:
        os.utime(self._descriptor)
        gone = os.fstat(self._descriptor).st_nlink == 0
      except OSError as error:
        if error.errno not in (errno.ESTALE, errno.ENOENT):
          raise
        gone = True
    # Others than the next number, too: those that lost were let go again.
    higher = [number for number in _numbers(self._claims)
              if number > self._number]
    if gone or higher:
      taker = _newest(self._claims)
      self._lost = str(taker.holder) if taker else "somebody who deleted it"
    else:
      self._sure_at = now

  def check(self) -> None:
    """See the function of this name."""
    if self._lost is None and _clock() - self._sure_at > _DOUBT_SECONDS:
      self._beat()
    if self._lost is not None:
      raise LostError(
          f"this process (pid {os.getpid()}) has lost {self._claims.parent} to "
          f"{self._lost}: it stood still, or could not reach the file system, "
          f"for more than {LAPSE_SECONDS:.0f} s; it writes nothing more there, "
          "and the other goes on from the newest checkpoint")

  def release(self) -> None:
    """Lets go; of what another has taken since nothing changes."""
    self._closed.set()
    with self._lock:
      descriptor, self._descriptor = self._descriptor, None
      if descriptor is not None:
        with contextlib.suppress(OSError):
          os.pwrite(descriptor, _RELEASED, 0)
        os.close(descriptor)


# --- Reading -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Claim:
  """A claim's file as it was read."""

  path: pathlib.Path
  number: int
  holder: Holder
  is_released: bool
  touched: float  # by the file system's clock

  def is_held(self) -> bool:
    """Whether it is a living process's."""
    if self.is_released:
      return False
    here = _self()
    if self.holder.machine == here.machine is not None:
      started = _started(self.holder.pid)
      if None not in (started, self.holder.started):
        return started == self.holder.started
      if not _exists(self.holder.pid):
        return False
    return _now(self.path.parent) - self.touched < LAPSE_SECONDS


def _newest(claims: pathlib.Path) -> _Claim | None:
  for _ in range(100):
    numbers = _numbers(claims)
    if not numbers:
      return None
    claim = _read(claims / str(max(numbers)))
    if claim is not None:
      return claim  # else it is no longer the highest: it was just removed
  return None


def _numbers(claims: pathlib.Path) -> list[int]:
  try:
    return [int(name) for name in os.listdir(claims) if name.isdigit()]
  except (FileNotFoundError, NotADirectoryError):
    return []


def _read(path: pathlib.Path) -> _Claim | None:
  try:
    # Opened, not only looked at: NFS then asks the server how it stands.
    with open(path, "rb") as file:
      content, touched = file.read(), os.fstat(file.fileno()).st_mtime
  except FileNotFoundError:
    return None
  found: dict[str, Any] = {}
  with contextlib.suppress(ValueError):  # it is being written: its age tells
    found = json.loads(content)
  return _Claim(path, int(path.name), Holder(**{
      entry.name: found.get(entry.name)
      for entry in dataclasses.fields(Holder)}),
                content.startswith(_RELEASED), touched)


# --- Processes and clocks ----------------------------------------------------


def _self() -> Holder:
  """This process; also after a fork."""
  return _describe(os.getpid())


@functools.lru_cache(maxsize=2)
def _describe(pid: int) -> Holder:
  return Holder(socket.gethostname(), pid, _machine(), _started(pid))


def _machine() -> str:
  """What processes have in common that see each other by their ids: the
  host, its boot, and within it the container."""
  parts = [socket.gethostname()]
  with contextlib.suppress(OSError):
    parts.append(pathlib.Path(
        "/proc/sys/kernel/random/boot_id").read_text().strip())
    parts.append(os.readlink("/proc/self/ns/pid"))
  return " ".join(parts)


def _started(pid: int) -> str | None:
  """When a process was started, in the kernel's ticks, or that it is dead;
  None where the system does not tell (of other users' processes: hidepid), or
  there is no such process."""
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_bytes()
  except OSError:
    return None
  # Its name may hold anything, but ends with the last parenthesis. After it
  # come the fields from the third on: the state, and as the 22nd the start.
  fields = stat.rpartition(b")")[2].split()
  return "dead" if fields[0] in (b"Z", b"X") else fields[19].decode()


def _exists(pid: int | None) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return True


def _clock() -> float:
  """Seconds that go on while the machine sleeps, too."""
  return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME",
                                    time.CLOCK_MONOTONIC))


_offsets: dict[int, tuple[float, float]] = {}  # by file system: when, how much


def stamp(directory: str | os.PathLike[str]) -> float:
  """The time that a file gets which is written there now; no earlier than
  that of any file written before.

  Raises:
    OSError: no file can be written there.
  """
  with tempfile.TemporaryFile(dir=directory) as file:
    file.write(b"t")
    file.flush()
    return os.fstat(file.fileno()).st_mtime


def _now(directory: pathlib.Path) -> float:
  device = os.stat(directory).st_dev
  known = _offsets.get(device)
  if known is None or _clock() - known[0] > _OFFSET_SECONDS:
    offset = 0.0
    with contextlib.suppress(OSError):  # who may only read takes its own clock
      offset = stamp(directory) - time.time()
    known = _offsets[device] = (_clock(), offset)
  return time.time() + known[1]
