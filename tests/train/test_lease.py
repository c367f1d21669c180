# SPDX-License-Identifier: Apache-2.0
"""Claims on directories: one holder at a time, whoever dies, sleeps, races."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any, Callable, Iterator

import pytest

from tfjax import train
from tfjax.train import claim
from tfjax.train import lease
from tfjax.train import records

ELSEWHERE = dict(host="elsewhere", pid=1, machine="elsewhere 1", started="1")


def start(directory: pathlib.Path, code: str = "time.sleep(60)",
          host: str = "") -> subprocess.Popen:
  """A process that holds the directory and then does what the code says; with
  a host, as if on another."""
  program = textwrap.dedent(f"""
      import importlib.util, sys, time
      spec = importlib.util.spec_from_file_location("lease", {lease.__file__!r})
      lease = importlib.util.module_from_spec(spec)
      sys.modules["lease"] = lease
      spec.loader.exec_module(lease)
      if {host!r}:
        lease._machine = lambda: {host!r}
      lease._BEAT_SECONDS = 0.2
      lease._DOUBT_SECONDS = 0.5
      lease.LAPSE_SECONDS = 1.0
      with lease.hold({str(directory)!r}):
        print("held", flush=True)
        {code}
      """)
  process = subprocess.Popen([sys.executable, "-c", program],
                             stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "held\n"
  return process


@pytest.fixture(name="others")
def _others() -> Iterator[list[subprocess.Popen]]:
  found: list[subprocess.Popen] = []
  yield found
  for process in found:
    process.kill()
    process.communicate()


def made_elsewhere(directory: pathlib.Path, age: float) -> pathlib.Path:
  """A claim of a process on another host, whose last heartbeat is so old."""
  path = directory / lease.DIRECTORY / "1"
  path.parent.mkdir()
  path.write_text(json.dumps(ELSEWHERE))
  then = lease.stamp(directory) - age
  os.utime(path, (then, then))
  return path


def test_one_holds_it_at_a_time(tmp_path: pathlib.Path) -> None:
  for _ in range(3):
    with lease.hold(tmp_path):
      assert lease.holder(tmp_path).pid == os.getpid()
      with pytest.raises(lease.BusyError, match=f"process {os.getpid()} on"):
        with lease.hold(tmp_path):
          pass
      lease.check(tmp_path)
    assert lease.holder(tmp_path) is None
  assert len(os.listdir(tmp_path / lease.DIRECTORY)) == 1  # nothing piles up


def test_the_dead_are_followed_at_once(
    tmp_path: pathlib.Path, others: list) -> None:
  others.append(start(tmp_path))
  assert lease.holder(tmp_path).pid == others[0].pid
  with pytest.raises(lease.BusyError):
    with lease.hold(tmp_path):
      pass
  others[0].kill()
  # Not even buried yet.
  stat = pathlib.Path(f"/proc/{others[0].pid}/stat")
  while stat.read_text().split()[2] != "Z":
    time.sleep(0.01)
  assert lease.holder(tmp_path) is None
  with lease.hold(tmp_path):
    pass


def test_a_process_id_that_is_used_again_is_another_process(
    tmp_path: pathlib.Path) -> None:
  with lease.hold(tmp_path):
    path, = (tmp_path / lease.DIRECTORY).iterdir()
    held = json.loads(path.read_text())
  path.write_text(json.dumps(held | dict(started="1")))
  assert lease.holder(tmp_path) is None
  path.write_text(json.dumps(held))
  assert lease.holder(tmp_path).pid == os.getpid()


def test_where_the_system_hides_processes_the_heartbeat_tells(
    tmp_path: pathlib.Path, others: list,
    monkeypatch: pytest.MonkeyPatch) -> None:
  """As /proc does of other users' with hidepid."""
  others.append(start(tmp_path))
  pid, real = others[0].pid, lease._started
  monkeypatch.setattr(
      lease, "_started", lambda one: None if one == pid else real(one))
  assert lease.holder(tmp_path).pid == pid
  with pytest.raises(lease.BusyError):
    with lease.hold(tmp_path):
      pass
  monkeypatch.setattr(lease, "LAPSE_SECONDS", 1.0)
  others[0].send_signal(signal.SIGSTOP)
  time.sleep(1.5)
  assert lease.holder(tmp_path) is None  # by its heartbeat
  monkeypatch.undo()
  assert lease.holder(tmp_path).pid == pid
  monkeypatch.setattr(lease, "_started", lambda one: None)
  others[0].kill()
  others[0].wait()
  assert lease.holder(tmp_path) is None  # there is no such process


def test_one_who_stands_still_on_this_host_keeps_it(
    tmp_path: pathlib.Path, others: list,
    monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(lease, "LAPSE_SECONDS", 0.3)
  others.append(start(tmp_path))
  others[0].send_signal(signal.SIGSTOP)
  time.sleep(1)
  assert lease.holder(tmp_path).pid == others[0].pid


@pytest.mark.parametrize("age, is_held", [(50, True), (70, False)])
def test_of_another_host_the_heartbeat_tells(
    tmp_path: pathlib.Path, age: float, is_held: bool) -> None:
  path = made_elsewhere(tmp_path, age)
  assert (lease.holder(tmp_path) is not None) == is_held
  if is_held:
    with pytest.raises(lease.BusyError, match="process 1 on elsewhere"):
      with lease.hold(tmp_path):
        pass
  else:
    with lease.hold(tmp_path):
      assert lease.holder(tmp_path).pid == os.getpid()
    assert not path.exists()


def test_ages_are_by_the_clock_of_the_file_system(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  made_elsewhere(tmp_path, 50)
  real = time.time
  monkeypatch.setattr(lease, "_offsets", {})
  monkeypatch.setattr(time, "time", lambda: real() + 3600)
  assert lease.holder(tmp_path) is not None
  monkeypatch.setattr(lease, "_offsets", {})
  monkeypatch.setattr(time, "time", lambda: real() - 3600)
  assert lease.holder(tmp_path) is not None


def test_a_claim_that_is_being_written_counts(tmp_path: pathlib.Path) -> None:
  path = made_elsewhere(tmp_path, 0)
  path.write_text("")
  assert str(lease.holder(tmp_path)) == "another process"
  then = lease.stamp(tmp_path) - 70  # its writer was killed
  os.utime(path, (then, then))
  assert lease.holder(tmp_path) is None


def test_a_sleeper_that_was_overtaken_notices_before_it_writes(
    tmp_path: pathlib.Path, others: list,
    monkeypatch: pytest.MonkeyPatch) -> None:
  """On another host, where its heartbeat alone tells."""
  monkeypatch.setattr(lease, "LAPSE_SECONDS", 1.0)
  others.append(start(tmp_path, host="elsewhere", code="""
        while True:
          time.sleep(0.02)
          try:
            lease.check({!r})
            print("wrote", flush=True)
          except lease.LostError as error:
            print(error, flush=True)
            break
      """.format(str(tmp_path)).strip()))
  sleeper, = others
  assert sleeper.stdout.readline() == "wrote\n"
  time.sleep(1.5)
  assert lease.holder(tmp_path).machine == "elsewhere"  # it beats
  sleeper.send_signal(signal.SIGSTOP)
  time.sleep(0.2)
  os.set_blocking(sleeper.stdout.fileno(), False)
  sleeper.stdout.read()
  time.sleep(1.2)
  with lease.hold(tmp_path):
    sleeper.send_signal(signal.SIGCONT)
    assert sleeper.wait(10) == 0
    said = sleeper.stdout.read()
    assert said.startswith("this process") and f"process {os.getpid()}" in said
    assert lease.holder(tmp_path).pid == os.getpid()
    lease.check(tmp_path)
  assert lease.holder(tmp_path) is None


def test_one_who_lost_it_does_not_let_go_of_the_other_s(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  lost = lease._Lease(tmp_path)  # pylint: disable=protected-access
  monkeypatch.setattr(lease, "_machine", lambda: "elsewhere")
  lease._describe.cache_clear()
  monkeypatch.setattr(lease, "LAPSE_SECONDS", -1.0)
  with lease.hold(tmp_path):
    monkeypatch.undo()
    lost.release()
    assert lease.holder(tmp_path) is not None
  lease._describe.cache_clear()


def test_a_taker_that_finds_the_holder_alive_after_all_goes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """The holder beats between the taker's look and its claim."""
  path = made_elsewhere(tmp_path, 70)
  real = os.open

  def late(*args: Any, **kwargs: Any) -> int:
    monkeypatch.setattr(os, "open", real)
    os.utime(path)
    return real(*args, **kwargs)
  monkeypatch.setattr(os, "open", late)
  with pytest.raises(lease.BusyError, match="elsewhere"):
    with lease.hold(tmp_path):
      pass


def test_a_number_that_others_have_long_passed_is_no_claim(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """A taker sleeps before it makes its claim, and two others come and go."""
  made_elsewhere(tmp_path, 70)
  real = os.open

  def late(*args: Any, **kwargs: Any) -> int:
    monkeypatch.setattr(os, "open", real)
    with lease.hold(tmp_path):
      pass
    holding.__enter__()
    return real(*args, **kwargs)
  holding = lease.hold(tmp_path)
  monkeypatch.setattr(os, "open", late)
  with pytest.raises(lease.BusyError):
    with lease.hold(tmp_path):
      pass
  assert lease.holder(tmp_path).pid == os.getpid()
  lease.check(tmp_path)
  holding.__exit__(None, None, None)


def test_of_many_who_race_for_a_dead_one_s_one_wins(
    tmp_path: pathlib.Path) -> None:
  """Many times over; whoever holds it writes, and finds nobody's else."""
  made_elsewhere(tmp_path, 70)
  inside, wins, clashes = [], [], []

  def race(index: int) -> None:
    for _ in range(60):
      try:
        with lease.hold(tmp_path):
          inside.append(index)
          time.sleep(0.0005)
          clashes.extend(inside[1:])
          wins.append(index)
          inside.remove(index)
      except lease.BusyError:
        time.sleep(0.0003)
  threads = [threading.Thread(target=race, args=(i,)) for i in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not clashes and len(wins) > 20
  assert len(os.listdir(tmp_path / lease.DIRECTORY)) == 1
  assert lease.holder(tmp_path) is None


def test_training_that_lost_its_directory_stops_and_writes_no_result(
    make_config: Callable, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  config = make_config({"duration.steps": 40})
  run_dir = tmp_path / "run"

  def overtake(row: dict[str, Any]) -> None:
    if row["step"] == 3:
      claims = run_dir / lease.DIRECTORY
      newest = max(int(path.name) for path in claims.iterdir())
      (claims / str(newest + 1)).write_text(json.dumps(ELSEWHERE))
      records_before.append((run_dir / "metrics.jsonl").read_bytes())
      (run_dir / "result.json").write_text('{"status": "theirs"}')
      monkeypatch.setattr(lease, "_DOUBT_SECONDS", -1.0)  # it has slept
  records_before: list[bytes] = []
  with pytest.raises(lease.LostError, match="process 1 on elsewhere.*writes "
                     "nothing more"):
    train.run(config, tmp_path, run_id="run", on_row=overtake)
  assert (run_dir / "metrics.jsonl").read_bytes() == records_before[0]
  assert records.read_result(run_dir) == {"status": "theirs"}
  assert claim.is_held(run_dir)


def test_a_full_disk_at_the_claim_is_told_with_a_way_out(
    make_config: Callable, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  monkeypatch.setattr(lease.os, "write", full)
  with pytest.raises(records.WriteError, match=r"run/.claim cannot be written "
                     r"\(.*No space left on device\); make room"):
    train.run(make_config(), tmp_path, run_id="run")
  assert not list((tmp_path / "run" / lease.DIRECTORY).iterdir())


def test_a_claim_that_cannot_be_looked_at_is_a_file_that_cannot_be_written(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  def broken(*_: Any) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))
  with claim.directory(tmp_path):
    file = records.MetricsFile(tmp_path / "metrics.jsonl", 0)
    monkeypatch.setattr(lease, "_DOUBT_SECONDS", -1.0)
    monkeypatch.setattr(lease.os, "utime", broken)
    for name, act in (
        ("metrics.jsonl", lambda: file.write(dict(kind="train", step=1))),
        ("metrics.jsonl", file.sync), ("metrics.jsonl", lambda: file.cut(0)),
        ("a.json", lambda: records.write_json(tmp_path / "a.json", {}))):
      with pytest.raises(records.WriteError, match=f"{name} cannot be written"):
        act()
    monkeypatch.undo()
    file.close()


def test_the_script_says_in_a_line_that_its_run_is_another_s(
    tmp_path: pathlib.Path) -> None:
  program = textwrap.dedent("""
      import runpy, sys
      from tfjax import train
      from tfjax.train import lease

      def lost(*_, **__):
        raise lease.LostError("this process has lost runs/one")
      train.run = lost
      sys.argv = ["train.py", "--config=experiments/quickstart.py",
                  f"--workdir={sys.argv[1]}"]
      runpy.run_path("scripts/train.py", run_name="__main__")
      """)
  root = pathlib.Path(__file__).parents[2]
  ended = subprocess.run(
      [sys.executable, "-c", program, str(tmp_path)], cwd=root, check=False,
      capture_output=True, text=True, timeout=100)
  assert ended.returncode == 1, ended.stderr
  assert ended.stderr.strip().splitlines()[-1].endswith(
      "this process has lost runs/one")
  assert "Traceback" not in ended.stderr


def test_a_claim_costs_little(tmp_path: pathlib.Path) -> None:
  with lease.hold(tmp_path):
    begun = time.perf_counter()
    for _ in range(10_000):
      lease.check(tmp_path)
    assert time.perf_counter() - begun < 0.5  # 0.02 s as a rule
