# SPDX-License-Identifier: Apache-2.0
"""A SLURM of one node for tests: munged, slurmctld and slurmd on loopback.

All of it lies in one directory with ports, key and socket of its own, needs no
systemd and runs as whoever asks for it. Nothing is installed: where the
programs are not there, Debian's packages are downloaded and unpacked into a
cache directory.
"""

import contextlib
import fcntl
import getpass
import os
import pathlib
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Iterator, Mapping

_PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmstepd", "sbatch", "srun",
             "squeue", "sinfo", "scancel", "scontrol")
_PACKAGES = ("slurm-wlm", "munge")
_SYSTEM = pathlib.Path("/")
_START_SECONDS = 30.0

# cgroups cannot be had in a container. What preempts, requeues at once.
_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={directory}/munge.socket
CryptoType=crypto/munge
CredType=cred/munge
PluginDir={plugins}
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
LaunchParameters=disable_send_gids
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=20
JobRequeue=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=4000 State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=60 DefaultTime=10 \
GraceTime=30 PriorityTier=1
PartitionName=urgent Nodes={host} MaxTime=60 DefaultTime=10 PriorityTier=2
"""


class Unavailable(RuntimeError):
  """No SLURM can be had here; the message says why."""


@contextlib.contextmanager
def running(directory: pathlib.Path, cache: pathlib.Path, cpus: int = 2
            ) -> Iterator[dict[str, str]]:
  """A cluster of this machine as long as the block lasts.

  Args:
    directory: a new one, with a short path, as a socket lies in it.
    cache: where packages are unpacked when SLURM is not installed.
    cpus: of the node, whatever there are.

  Yields:
    The environment variables with which sbatch and the others find it.

  Raises:
    Unavailable: the programs cannot be had or do not start.
  """
  root = _installed(cache)
  environment = {**os.environ, **_environment(root),
                 "SLURM_CONF": str(directory / "slurm.conf")}
  _configure(directory, root, cpus)
  processes: list[subprocess.Popen] = []
  try:
    for command in (
        ["munged", "--foreground", "--force", "--num-threads=2",
         *(f"--{name}-file={directory}/munge.{name}"
           for name in ("key", "pid", "log", "seed")),
         f"--socket={directory}/munge.socket"],
        ["slurmctld", "-D", "-i"],
        # Where it is compiled to look, it may not be.
        ["slurmd", "-D", "-N", _host(), "-d", str(
            shutil.which("slurmstepd", path=environment["PATH"]))]):
      with open(directory / f"{command[0]}.out", "wb") as output:
        processes.append(subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=output, process_group=0))
    _wait_until_idle(directory, environment, processes)
    yield {name: value for name, value in environment.items()
           if os.environ.get(name) != value}
  finally:
    for process in reversed(processes):
      process.terminate()
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    _kill_all(directory)


def _kill_all(directory: pathlib.Path) -> None:
  """What is left of the cluster, jobs too: all that were started with its
  slurm.conf in their environment."""
  marked = f"SLURM_CONF={directory}/slurm.conf".encode()
  for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
    with contextlib.suppress(OSError):
      if marked in path.read_bytes().split(b"\0") and (
          int(path.parent.name) != os.getpid()):
        os.kill(int(path.parent.name), signal.SIGKILL)


def _host() -> str:
  return platform.node().partition(".")[0]


def _configure(directory: pathlib.Path, root: pathlib.Path, cpus: int) -> None:
  for name in ("state", "spool"):
    (directory / name).mkdir()
  key = directory / "munge.key"
  key.write_bytes(os.urandom(128))
  key.chmod(0o400)
  (plugins,) = root.glob("usr/lib/*/slurm-wlm")
  (directory / "slurm.conf").write_text(_CONFIG.format(
      host=_host(), user=getpass.getuser(), directory=directory,
      plugins=plugins, cpus=cpus, ports=_free_ports(2)), encoding="utf-8")
  # Before 23.11 the plugin cannot be left out; version 1's does nothing here.
  version = _call(["slurmd", "-V"], {**os.environ, **_environment(root)})
  is_old = tuple(map(int, version.split()[1].split(".")[:2])) < (23, 11)
  (directory / "cgroup.conf").write_text(
      f"CgroupPlugin={'cgroup/v1' if is_old else 'disabled'}\n",
      encoding="utf-8")


def _free_ports(count: int) -> list[int]:
  with contextlib.ExitStack() as stack:
    sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
    for one in sockets:
      one.bind(("127.0.0.1", 0))
    return [one.getsockname()[1] for one in sockets]


def _wait_until_idle(directory: pathlib.Path, environment: Mapping[str, str],
                     processes: list[subprocess.Popen]) -> None:
  end = time.monotonic() + _START_SECONDS
  state = "no answer"
  while time.monotonic() < end:
    for process in processes:
      if process.poll() is not None:
        name = process.args[0]
        said = (directory / f"{name}.out").read_text(errors="replace")
        raise Unavailable(f"{name} ends with {process.returncode}: "
                          f"{said.strip().splitlines()[-1:]}")
    answer = subprocess.run(
        ["sinfo", "--noheader", "--format=%T"], env=environment, text=True,
        capture_output=True, timeout=30, check=False)
    state = answer.stdout.strip() or answer.stderr.strip()
    if state.splitlines()[:1] == ["idle"]:
      return
    time.sleep(0.2)
  raise Unavailable(f"the node is not idle within {_START_SECONDS:.0f} s: "
                    f"{state}")


# --- The programs ------------------------------------------------------------


def _environment(root: pathlib.Path) -> dict[str, str]:
  """The variables with which programs below `root` are found and run."""
  path = os.pathsep.join([os.environ.get("PATH", os.defpath),
                          "/usr/sbin", "/usr/bin"])
  if root == _SYSTEM:
    return {"PATH": path}
  programs = [str(root / "usr" / name) for name in ("bin", "sbin")]
  libraries = [str(path) for pattern in ("usr/lib/*-linux-gnu*",
                                         "usr/lib/*/slurm-wlm",
                                         "lib/*-linux-gnu*")
               for path in root.glob(pattern)]
  return {"PATH": os.pathsep.join([*programs, path]),
          "LD_LIBRARY_PATH": os.pathsep.join(
              [*libraries, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])}


def _installed(cache: pathlib.Path) -> pathlib.Path:
  """The root below which the programs are: / or one in the cache."""
  if not sys.platform.startswith("linux"):
    raise Unavailable("SLURM runs on Linux")
  if _missing(_SYSTEM) == [] and list(_SYSTEM.glob("usr/lib/*/slurm-wlm")):
    return _SYSTEM
  root = cache / "slurm"
  cache.mkdir(parents=True, exist_ok=True)
  with open(cache / "slurm.lock", "w", encoding="utf-8") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not root.exists():
      fresh = cache / "slurm.unfinished"
      shutil.rmtree(fresh, ignore_errors=True)
      _download(fresh)
      fresh.rename(root)
  if missing := _missing(root):
    raise Unavailable(f"Debian's packages {' and '.join(_PACKAGES)} bring no "
                      f"{', '.join(missing)}")
  return root


def _missing(root: pathlib.Path) -> list[str]:
  path = _environment(root)["PATH"]
  return [name for name in _PROGRAMS if shutil.which(name, path=path) is None]


def _download(root: pathlib.Path) -> None:
  """Unpacks the packages and what they need that is not installed.

  Needs no root and changes nothing on the machine: apt keeps its lists and
  its cache below `root`.
  """
  for name in ("apt-get", "dpkg"):
    if shutil.which(name) is None:
      raise Unavailable(f"no SLURM is installed, and without {name} Debian's "
                        "packages cannot be had")
  state = root / "apt"
  for name in ("lists/partial", "archives/partial"):
    (state / name).mkdir(parents=True)
  options = ["-o", f"Dir::State::Lists={state}/lists",
             "-o", f"Dir::Cache={state}", "-o", "APT::Sandbox::User=",
             "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20",
             "-qq"]
  _call(["apt-get", *options, "update"])
  listed = _call(["apt-get", *options, "install", "--print-uris", "--yes",
                  "--no-install-recommends", *_PACKAGES])
  names = [line.split()[1].partition("_")[0] for line in listed.splitlines()
           if line.startswith("'")]
  if not names:
    raise Unavailable(f"{' and '.join(_PACKAGES)} are installed, without "
                      f"{', '.join(_missing(_SYSTEM))}")
  _call(["apt-get", *options, "download", *names], directory=state)
  for package in state.glob("*.deb"):
    _call(["dpkg", "-x", str(package), str(root)])
  for path in root.glob("usr/sbin/*-wlm"):  # else named when it is installed
    path.with_name(path.name.removesuffix("-wlm")).symlink_to(path.name)
  shutil.rmtree(state)


def _call(command: list[str], environment: Mapping[str, str] | None = None,
          directory: pathlib.Path | None = None) -> str:
  try:
    return subprocess.run(
        command, env=environment, cwd=directory, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=180, check=True).stdout
  except subprocess.SubprocessError as error:
    text = str(getattr(error, "stderr", None) or error).strip()
    raise Unavailable("SLURM is not installed and cannot be downloaded: "
                      f"{text.splitlines()[-1]}") from error
