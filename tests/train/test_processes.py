# SPDX-License-Identifier: Apache-2.0
"""Several processes train as one: real ones, over loopback."""

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any, Callable, Iterator, Sequence

import jax
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax import objectives
from tfjax import train
from tfjax.train import checkpoints
from tfjax.train import records
from tfjax.train import sharding
from tfjax.train import step as step_lib

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
TIMEOUT = 120
STEPS, SAVED = 6, 3

# A process does not import all over again: a server has, and forks.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tfjax.train", __name__])


def train_noting(config: pathlib.Path, workdir: pathlib.Path, devices: int,
                 act: dict[str, Any], environment: dict[str, str],
                 log: pathlib.Path) -> None:
  """As scripts/train.py does, but notes the rows that it reads and the
  parameters that it saves and restores; `act` does something to a process
  before a step. In a process of its own."""
  with open(log, "a", encoding="utf-8") as file:
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
  os.environ.update(environment)
  jax.config.update("jax_num_cpu_devices", devices)
  logging.basicConfig(force=True)
  logging.getLogger("tfjax").setLevel(logging.INFO)
  reads, index = [], int(os.environ["JAX_PROCESS_ID"])
  put, save, restore = (step_lib.put, checkpoints.Checkpoints.save,
                        checkpoints.Checkpoints.restore)

  def noted_put(mesh, batch):
    reads.append(np.asarray(batch.targets))
    # The first is for the compiler.
    if act.get("process") == index and len(reads) - 1 == act["step"]:
      if act["what"] == "signal":
        os.kill(os.getpid(), signal.SIGTERM)
      while act["what"] == "hang" and not (workdir / "go").exists():
        time.sleep(0.05)
      if act["what"] == "spoil":  # its rows alone
        batch = dataclasses.replace(
            batch, weights=np.full_like(batch.weights, np.nan))
    return put(mesh, batch)

  def note(what, state):
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
      for number, shard in enumerate(leaf.addressable_shards):
        place = [list(part.indices(size)[:2]) for part, size in
                 zip(shard.index, leaf.shape)]
        key = json.dumps([jax.tree_util.keystr(path), place, number])
        found[key] = np.asarray(shard.data)
    np.savez(workdir / f"{what}-{index}.npz", **found)

  def noted_save(self, number, state, counters):
    note(f"saved-{number}", state)
    full = act.get("full") == [index, number]
    self.latest_step()  # waits for the one before
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000 if full else soft, hard))
    save(self, number, state, counters)
    if full:
      self.latest_step()  # waits for it
      del act["full"]  # once
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

  def noted_restore(self, *arguments):
    found = restore(self, *arguments)
    if found is not None:
      note("restored", found[0])
    return found

  step_lib.put = noted_put
  checkpoints.Checkpoints.save = noted_save
  checkpoints.Checkpoints.restore = noted_restore
  values = json.loads(config.read_text("utf-8"))
  record = train.run(config_lib.from_dict(values), workdir, run_id="run",
                     branch=act.get("branch"))
  np.save(workdir / f"reads-{index}.npy", np.stack(reads[1:1 + record.steps]))
  sys.exit({"complete": 0, "interrupted": 75}[record.status])


def free_address() -> str:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{probe.getsockname()[1]}"


class Forked:
  """`train_noting` in a process of the server; what Popen has that is used."""

  def __init__(self, *arguments: Any):
    self._process = FORKS.Process(target=train_noting, args=arguments)
    self._process.start()

  def poll(self) -> int | None:
    return self._process.exitcode

  def wait(self, timeout: float | None = None) -> int | None:
    self._process.join(timeout)
    return self._process.exitcode

  def kill(self) -> None:
    self._process.kill()


class Launched:
  """Processes that were started together, and what they print."""

  def __init__(self, folder: pathlib.Path, count: int,
               start: Callable[[int, pathlib.Path], subprocess.Popen | Forked]
               ):
    folder.mkdir(exist_ok=True)
    number = len(list(folder.glob("log-*")))
    self.logs = [folder / f"log-{number}-{i}" for i in range(count)]
    self.processes = [start(i, log) for i, log in enumerate(self.logs)]

  def log(self, index: int) -> str:
    return self.logs[index].read_text("utf-8")

  def codes(self) -> list[int]:
    return [process.wait(timeout=TIMEOUT) for process in self.processes]

  def finish(self, code: int = 0) -> None:
    codes = self.codes()
    assert codes == [code] * len(codes), "\n\n".join(
        self.log(i)[-3000:] for i in range(len(codes)))

  def wait_for(self, text: str, index: int = 0) -> None:
    deadline = time.monotonic() + TIMEOUT
    while text not in self.log(index):
      assert self.processes[index].poll() is None, self.log(index)[-3000:]
      assert time.monotonic() < deadline, self.log(index)[-3000:]
      time.sleep(0.01)


@contextlib.contextmanager
def launched(*arguments: Any) -> Iterator[Launched]:
  these = Launched(*arguments)
  try:
    yield these
  finally:
    for process in these.processes:
      process.kill()
      process.wait()


def scripts(folder: pathlib.Path, commands: Sequence[Sequence[str]],
            ) -> contextlib.AbstractContextManager[Launched]:
  """Commands, with a CPU device for each process that they start."""
  def start(index: int, log: pathlib.Path) -> subprocess.Popen:
    with open(log, "w", encoding="utf-8") as file:
      return subprocess.Popen(
          commands[index], cwd=ROOT, stdout=file, stderr=file, env={
              **os.environ, "JAX_NUM_CPU_DEVICES": "1",
              "PYTHON": sys.executable})
  return launched(folder, len(commands), start)


def program(config: config_lib.ExperimentConfig, workdir: pathlib.Path,
            count: int, devices: int = 1, act: dict[str, Any] | None = None,
            ) -> contextlib.AbstractContextManager[Launched]:
  """`count` processes of `train_noting`."""
  workdir.mkdir(exist_ok=True)
  path = workdir / "config-of-test.json"
  path.write_text(json.dumps(config_lib.to_dict(config)), encoding="utf-8")
  address = free_address()

  def start(index: int, log: pathlib.Path) -> Forked:
    log.touch()
    return Forked(path, workdir, devices, act or {}, {
        "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index)}, log)
  return launched(workdir, count, start)


def on_devices(config: config_lib.ExperimentConfig,
               **mesh: int | None) -> config_lib.ExperimentConfig:
  """The same run on another mesh."""
  return dataclasses.replace(
      config, mesh=config_lib.MeshConfig(**mesh),
      runtime=dataclasses.replace(config.runtime, num_devices=None))


def rows(run_dir: pathlib.Path) -> list[dict[str, Any]]:
  return records.read_metrics(run_dir / "metrics.jsonl")


def losses(run_dir: pathlib.Path) -> np.ndarray:
  return np.array([row["loss"] for row in rows(run_dir)])


def steps(run_dir: pathlib.Path) -> list[tuple[str, int]]:
  return [(row["kind"], row["step"]) for row in rows(run_dir)]


def shards(path: pathlib.Path) -> dict[str, list[tuple[Any, np.ndarray]]]:
  """Parameter -> (place, values) of the shards that a process had."""
  found: dict[str, list[tuple[Any, np.ndarray]]] = {}
  with np.load(path) as file:
    for key in file:
      name, place, _ = json.loads(key)
      found.setdefault(name, []).append(
          (tuple(slice(*part) for part in place), file[key]))
  return found


def assert_shards_of(whole: dict[str, np.ndarray],
                     path: pathlib.Path) -> None:
  """What a process had of the parameters is bit by bit of `whole`."""
  held = shards(path)
  assert held.keys() == whole.keys()
  for name, parts in held.items():
    for place, values in parts:
      np.testing.assert_array_equal(values, whole[name][place], strict=True)


@pytest.fixture(scope="module", name="config")
def fixture_config(make_config) -> config_lib.ExperimentConfig:
  return make_config({
      "duration.steps": STEPS, "checkpoint.every_seconds": None,
      "optimizer.learning_rate": 1e-2, "model.vocab_size": 258,
      "model.d_model": 16, "model.num_layers": 1, "model.num_heads": 2})


@pytest.fixture(scope="module", name="one")
def fixture_one(config, tmp_path_factory) -> pathlib.Path:
  """The run in one process on one device."""
  workdir = tmp_path_factory.mktemp("one")
  train.run(config, workdir, run_id="run")
  return workdir / "run"


def test_two_processes_train_as_one(
    config, one: pathlib.Path, tmp_path: pathlib.Path) -> None:
  with program(on_devices(config, data=2), tmp_path, 2) as both:
    both.finish()
  got, expected = losses(tmp_path / "run"), losses(one)
  np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  # One writer: every row once, one result, nothing left over.
  assert steps(tmp_path / "run") == steps(one)
  assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted(
      p.name for p in one.iterdir())
  result = records.read_result(tmp_path / "run")
  assert (result["process_count"], result["device_count"]) == (2, 2)
  # Each reads half of every batch; no row twice, as no text is.
  halves = [np.load(tmp_path / f"reads-{i}.npy") for i in range(2)]
  assert halves[0].shape == halves[1].shape == (STEPS, 4, 16)
  whole = np.concatenate(halves, axis=1).reshape(STEPS * 8, 16)
  assert len(np.unique(whole, axis=0)) == STEPS * 8


def test_two_processes_roll_back_and_outlive_a_failed_save(
    config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """Process 1 alone has rows that are spoilt, and a disk that is full."""
  changed = dataclasses.replace(
      config, recovery=config_lib.RecoveryConfig(action="rollback"),
      checkpoint=dataclasses.replace(config.checkpoint, every_steps=2))
  begin = time.monotonic()
  with program(on_devices(changed, fsdp=2), tmp_path, 2, act=dict(
      what="spoil", process=1, step=5, full=[1, 4])) as both:
    both.finish()
  assert time.monotonic() - begin < 120  # nobody waited for a time limit
  result = records.read_result(tmp_path / "run")
  assert (result["status"], result["failed_saves"], result["bad_steps"],
          result["rollbacks"], result["tokens_undone"]) == (
              "complete", 1, 1, 1, 3 * 128)
  assert "process 1 could not write its part" in both.log(0)
  assert "the newest is of step 2" in both.log(1)
  # Step 5 is bad, 4 was not saved: batches 2 to 4 are left out at both.
  found = rows(tmp_path / "run")
  event, = (row for row in found if row["kind"] == "rollback")
  assert (event["step"], event["to_step"], event["batch_offset"]) == (5, 2, 3)
  read = objectives.TrainingBatches.__getitem__
  monkeypatch.setattr(
      objectives.TrainingBatches, "__getitem__", lambda self, index: read(
          self, index if index < 2 else index + 3))
  train.run(config, tmp_path / "other", run_id="run")
  np.testing.assert_allclose(
      [row["loss"] for row in found if row is not event],
      losses(tmp_path / "other" / "run"), rtol=1e-5)


def test_two_processes_branch_off_what_one_has_trained(
    config, tmp_path: pathlib.Path) -> None:
  """After 3 of 6 steps, with the parameters cut over the two."""
  changed = dataclasses.replace(config, optimizer=dataclasses.replace(
      config.optimizer, schedule="wsd", warmup_steps=1, decay_fraction=0.5))
  train.run(config_lib.replace(changed, duration__steps=8), tmp_path,
            run_id="trunk", keep_steps=[3])
  with program(on_devices(changed, fsdp=2), tmp_path, 2, act=dict(
      branch=dict(run_id="trunk", step=3))) as both:
    both.finish()
  train.run(changed, tmp_path / "alone", run_id="run")
  result = records.read_result(tmp_path / "run")
  assert (result["branched_from"], result["branch_step"],
          result["process_count"]) == ("trunk", 3, 2)
  assert steps(tmp_path / "run") == steps(tmp_path / "alone" / "run")
  np.testing.assert_allclose(
      losses(tmp_path / "run"), losses(tmp_path / "alone" / "run"), rtol=1e-5)


@pytest.fixture(scope="module", name="saved")
def fixture_saved(config, tmp_path_factory) -> pathlib.Path:
  """Stopped and saved by four processes, of which one was told to stop."""
  workdir = tmp_path_factory.mktemp("four")
  with program(on_devices(config, data=4), workdir, 4, act=dict(
      what="signal", process=2, step=SAVED - 1)) as four:
    four.finish(os.EX_TEMPFAIL)
  return workdir


def whole_parameters(saved: pathlib.Path) -> dict[str, np.ndarray]:
  """Replicated parameters, as process 0 had them when it saved."""
  return {name: parts[0][1] for name, parts in shards(
      saved / f"saved-{SAVED}-0.npz").items()}


def test_a_signal_to_one_stops_all_at_one_step(
    config, saved: pathlib.Path, one: pathlib.Path) -> None:
  result = records.read_result(saved / "run")
  assert (result["status"], result["steps"]) == ("interrupted", SAVED)
  assert [p.name for p in (saved / "run" / "checkpoints").iterdir()
          if p.name.isdigit()] == [str(SAVED)]
  np.testing.assert_allclose(
      losses(saved / "run"), losses(one)[:SAVED], rtol=1e-5)
  for index in range(4):  # the same step and parameters everywhere
    assert_shards_of(whole_parameters(saved),
                     saved / f"saved-{SAVED}-{index}.npz")


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_one_process_goes_on_from_what_four_saved(
    devices: int, config, saved: pathlib.Path, one: pathlib.Path,
    tmp_path: pathlib.Path) -> None:
  config = on_devices(config, data=devices)
  shutil.copytree(saved / "run", tmp_path / "run")
  mesh = sharding.make_mesh(config, jax.devices()[:devices])
  steps_ = step_lib.steps_for(config, mesh)
  with contextlib.closing(checkpoints.Checkpoints(
      tmp_path / "run" / "checkpoints", config.checkpoint)) as kept:
    state, _ = kept.restore(steps_.abstract_state)
  whole = whole_parameters(saved)
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
    assert len(leaf.sharding.device_set) == devices
    np.testing.assert_array_equal(
        np.asarray(leaf), whole[jax.tree_util.keystr(path)], strict=True)

  train.run(config, tmp_path, run_id="run")
  assert steps(tmp_path / "run") == steps(one)
  np.testing.assert_allclose(losses(tmp_path / "run"), losses(one), rtol=1e-5)


def test_two_processes_go_on_from_what_four_saved_with_parameters_cut(
    config, saved: pathlib.Path, one: pathlib.Path,
    tmp_path: pathlib.Path) -> None:
  shutil.copytree(saved / "run", tmp_path / "run")
  with program(on_devices(config, fsdp=2, tensor=2), tmp_path, 2, 2) as both:
    both.finish()
  # Columns of the embedding are cut over processes, its rows within one.
  for index in range(2):
    path = tmp_path / f"restored-{index}.npz"
    assert_shards_of(whole_parameters(saved), path)
    (embedding,) = (parts for parts in shards(path).values()
                    if parts[0][1].shape[0] == 258 // 2)
    assert [part.shape for _, part in embedding] == [(129, 8)] * 2
    assert {place[1].start for place, _ in embedding} == {8 * index}
  assert steps(tmp_path / "run") == steps(one)
  np.testing.assert_allclose(losses(tmp_path / "run"), losses(one), rtol=1e-5)


# --- With the launch scripts -------------------------------------------------


def flags(workdir: pathlib.Path, cache_dir: pathlib.Path,
          **changes: Any) -> list[str]:
  """Arguments of scripts/train.py."""
  values = {
      "model.size": "6k", "model.context_length": 16,
      "data.corpus": "synthetic", "data.synthetic.num_bytes": 30_000,
      "data.synthetic.document_bytes": 500, "data.cache_dir": cache_dir,
      "duration.tokens": None, "evaluation.tokens": 256,
      "train.log_every_steps": 1, "runtime.cpu_tuning": "off",
      "runtime.compilation_cache_dir": os.environ["JAX_COMPILATION_CACHE_DIR"],
      **{key.replace("__", "."): value for key, value in changes.items()}}
  return ["--config=experiments/quickstart.py", f"--workdir={workdir}",
          *(f"--config.{key}={value}" for key, value in values.items())]


def hosts(count: int, folder: pathlib.Path, arguments: list[str],
          ) -> contextlib.AbstractContextManager[Launched]:
  """scripts/launch/host.sh, as on `count` hosts."""
  address = free_address()
  return scripts(folder, [["scripts/launch/host.sh", address, str(count),
                           str(index), *arguments] for index in range(count)])


def test_a_stopped_launch_goes_on_with_another(
    cache_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
  total = 60
  arguments = flags(tmp_path, cache_dir, duration__steps=total)
  with hosts(2, tmp_path, arguments) as both:
    both.wait_for("step      10 ")
    both.processes[1].send_signal(signal.SIGTERM)
    both.finish(os.EX_TEMPFAIL)
  run_dir, = (path.parent for path in tmp_path.glob("*/config.json"))
  result = records.read_result(run_dir)
  done = result["steps"]
  assert result["status"] == "interrupted" and 10 < done < total
  for index in range(2):
    assert f"stopped after step {done} of {total}" in both.log(index)
  assert [p.name for p in (run_dir / "checkpoints").iterdir()
          if p.name.isdigit()] == [str(done)]

  with scripts(tmp_path, [["scripts/launch/local.sh", "2", *arguments]]
               ) as local:
    local.finish()
  assert f"[0] complete: {run_dir}" in local.log(0)
  assert f"[1] complete: {run_dir}" in local.log(0)
  assert "[1] train" not in local.log(0)  # one prints
  result = records.read_result(run_dir)
  assert (result["status"], result["resumes"], result["process_count"]) == (
      "complete", 1, 2)
  assert [step for kind, step in steps(run_dir) if kind == "train"] == list(
      range(1, total + 1))


def test_a_process_that_hangs_is_named_and_others_keep_out(
    config, tmp_path: pathlib.Path) -> None:
  config = on_devices(config, data=2)
  config = dataclasses.replace(config, runtime=dataclasses.replace(
      config.runtime, stall_seconds=3.0))
  with program(config, tmp_path, 2, act=dict(
      what="hang", process=1, step=3)) as both:
    both.wait_for("attention: ")
    # Meanwhile somebody starts the same run again.
    with program(config, tmp_path, 2) as again:
      assert again.codes() == [1, 1]
      for index in range(2):
        assert "RunDirectoryBusyError: another process is training in" in (
            again.log(index))
    both.wait_for("  step 3 in 'data' for ")
    (tmp_path / "go").touch()
    both.finish()
  report, = re.findall(
      r"where the 2 processes are, the last first:\n"
      r"  step 3 in 'data' for \d+ s: process 1 on .*\n"
      r"  step 4 in 'step' for \d+ s: process 0 on ", both.log(0))[:1]
  assert report
  stacks = (tmp_path / "run" / "stalls" / "process-1.txt").read_text("utf-8")
  assert "in noted_put" in stacks
  assert "moves again" in both.log(1)
