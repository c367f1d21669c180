# SPDX-License-Identifier: Apache-2.0
"""Sweeps on real worker processes: failures, kills, signals, retries.

Most tests give the workers `act` below in place of `tfjax.train.run`: it
keeps the same records, and does to its process what the run's seed says.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any, Callable

import jax
import pytest

from tfjax import config as config_lib
from tfjax import sweep
from tfjax import train
from tfjax.sweep import failures
from tfjax.sweep import local
from tfjax.sweep import shares
from tfjax.train import claim
from tfjax.train import lease
from tfjax.train import out_of_memory
from tfjax.train import records
from tfjax.train import spent
from tfjax.train import tuning

RUNNER = "test_launch:act"
# Seeds; on the second attempt those that are or do something are good, but for
# the last four.
(GOOD, RAISES, IS_KILLED, IS_SLOW, IS_DEAF, IS_ALWAYS_KILLED,
 RUNS_OUT_OF_MEMORY, DIVERGES, TAKES_A_SECOND) = range(9)
REPOSITORY = pathlib.Path(__file__).resolve().parents[2]

print("a runner's module may print when a worker imports it")


@dataclasses.dataclass(frozen=True)
class Record:
  status: str


def act(config: config_lib.ExperimentConfig, workdir: str, *,
        sweep: str, run_id: str) -> Record:
  """Behaves as the seed says."""
  run_dir = pathlib.Path(workdir) / run_id
  run_dir.mkdir(exist_ok=True)
  (run_dir / "config.json").write_text("{}")
  (run_dir / "result.json").unlink(missing_ok=True)
  first = not (run_dir / "attempts").exists()
  with open(run_dir / "attempts", "a", encoding="utf-8") as file:
    cores = sorted(os.sched_getaffinity(0))
    file.write(json.dumps(dict(pid=os.getpid(), cores=cores)) + "\n")
  print('{"event": "finished"}', flush=True)  # must not reach the parent
  os.write(1, b"printed from C\n")
  with open(run_dir / "metrics.jsonl", "w", encoding="utf-8") as file:
    file.write(json.dumps(dict(kind="train", step=1, tokens=7, loss=1.0)))
    file.write("\n")
  if first and config.seed == RAISES:
    # What a library may leave behind, and what must hold up nobody.
    threading.Thread(target=time.sleep, args=(300,)).start()
    raise ValueError("a bad number\nat length")
  if config.seed == IS_ALWAYS_KILLED or first and config.seed == IS_KILLED:
    os.kill(os.getpid(), signal.SIGKILL)
  if config.seed == RUNS_OUT_OF_MEMORY:
    spent.Spent.start = _exhaust  # once the run is on record
    train.run(config, workdir, sweep=sweep, run_id=run_id)
  status = "diverged" if config.seed == DIVERGES else "complete"
  if config.seed == TAKES_A_SECOND:
    time.sleep(1.0)
  if first and config.seed in (IS_SLOW, IS_DEAF):
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: (
        told.set() if config.seed == IS_SLOW else None))
    (run_dir / "pid").write_text(str(os.getpid()))
    told.wait(60)
    status = "interrupted"
  records.write_result(run_dir, dict(
      run_id=run_id, sweep=sweep, status=status, status_reason=None,
      config_hash=config_lib.config_hash(config), loss=2.0, steps=1))
  return Record(status)


def _exhaust(*_: Any) -> None:
  raise jax.errors.JaxRuntimeError(
      "RESOURCE_EXHAUSTED: Out of memory allocating 9876543210 bytes.")


class Journal(sweep.Observer):
  """What was started, in order."""

  def __init__(self) -> None:
    self.started_ids: list[str] = []

  def started(self, spec: sweep.RunSpec) -> None:
    self.started_ids.append(spec.run_id)


@pytest.fixture(name="make_specs")
def make_specs_fixture(
    cache_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., list[sweep.RunSpec]]:
  """Specs of some overrides of a tiny config, and workers that know `act`."""
  monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent))
  config = config_lib.default()
  config_lib.override(config, {**_tiny(cache_dir), "duration.steps": 10})
  return lambda *cells: sweep.plan(config, cells)


def _tiny(cache_dir: pathlib.Path) -> dict[str, Any]:
  return {"data.corpus": "synthetic", "data.synthetic.num_bytes": 20_000,
          "data.synthetic.document_bytes": 1_000,
          "data.tokenizer.kind": "byte", "data.cache_dir": str(cache_dir),
          "model.size": "3k", "model.context_length": 32,
          "train.batch_size": 4, "tracking.wandb": "disabled",
          "runtime.compilation_cache_dir": os.environ[
              "JAX_COMPILATION_CACHE_DIR"]}


def _attempts(workdir: pathlib.Path, spec: sweep.RunSpec) -> list[dict]:
  lines = (workdir / spec.run_id / "attempts").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_failures_are_recorded_and_only_they_are_retried(
    make_specs: Callable, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(local, "_KILLS", 2)
  specs = make_specs(
      {"seed": RAISES}, {"seed": IS_KILLED}, {"seed": IS_ALWAYS_KILLED},
      {"seed": GOOD}, {"seed": 10})
  begun = time.monotonic()
  outcomes = sweep.launch(specs, tmp_path, workers=2, runner=RUNNER)
  assert time.monotonic() - begun < 90
  assert [one.spec for one in outcomes] == specs
  assert [one.state.status for one in outcomes] == [
      "failed", "complete", "failed", "complete", "complete"]
  raised, killed = outcomes[0].state, outcomes[2].state
  assert raised.reason == "ValueError: a bad number"
  assert "Traceback" in raised.result["log_tail"]
  assert re.search("killed by SIGKILL, 2 times in a row at checkpoint 0, which "
                   "the system sends when memory runs out: a step takes .* by "
                   "estimate", killed.reason)
  assert "2 workers share the host's memory" in killed.reason
  assert killed.result["loss"] is None and killed.result["tokens_seen"] == 7
  assert "printed from C" in killed.result["log_tail"]
  states = sweep.ledger.sweep_state(tmp_path)
  assert [state.status for state in states] == [
      one.state.status for one in outcomes]

  outcomes = sweep.launch(specs, tmp_path, workers=2, runner=RUNNER)
  assert [one.state.status for one in outcomes] == [
      "complete", "complete", "failed", "complete", "complete"]
  assert [one.skipped for one in outcomes] == [False, True, False, True, True]
  assert [len(_attempts(tmp_path, spec)) for spec in specs] == [2, 2, 4, 1, 1]


def test_who_diverges_is_recorded_with_the_end_of_its_log(
    make_specs: Callable, tmp_path: pathlib.Path) -> None:
  spec, = specs = make_specs({"seed": DIVERGES})
  outcome, = sweep.launch(specs, tmp_path, workers=1, runner=RUNNER)
  assert outcome.state.status == "diverged"
  assert outcome.state.result["loss"] == 2.0
  assert "printed from C" in outcome.state.result["log_tail"]
  # Of an ensemble one run has the log of all.
  other = tmp_path / "other"
  other.mkdir()
  records.write_result(other, dict(status="failed"))
  failures.add_log(other, tmp_path / spec.run_id)
  assert records.read_result(other)["log_tail"] == (
      outcome.state.result["log_tail"])


def test_no_log_is_added_to_a_run_that_was_taken_up_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  records.write_result(tmp_path, dict(status="failed"))
  directory = claim.directory

  def taken_up(run_dir: pathlib.Path) -> contextlib.AbstractContextManager:
    (run_dir / "result.json").unlink()  # since it was looked at
    return directory(run_dir)
  monkeypatch.setattr(claim, "directory", taken_up)
  failures.add_log(tmp_path, tmp_path)
  assert records.read_result(tmp_path) is None


def test_a_worker_that_alone_is_told_to_stop_is_replaced(
    make_specs: Callable, tmp_path: pathlib.Path) -> None:
  spec, other = specs = make_specs({"seed": IS_SLOW}, {"seed": GOOD})
  told = []

  def tell() -> None:
    told.append(int(_wait_for((tmp_path / spec.run_id / "pid").read_text)))
    os.kill(told[0], signal.SIGTERM)
  teller = threading.Thread(target=tell)
  teller.start()
  outcomes = sweep.launch(specs, tmp_path, workers=1, runner=RUNNER)
  teller.join()
  assert [one.state.status for one in outcomes] == ["complete"] * 2
  assert [one["pid"] == told[0] for one in _attempts(tmp_path, spec)] == [
      True, False]
  assert len(_attempts(tmp_path, other)) == 1


def test_a_worker_that_is_not_needed_any_more_has_not_failed_to_start(
    make_specs: Callable, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(local, "_KILLED_STARTS", 1)
  specs = make_specs({"seed": RAISES}, {"seed": TAKES_A_SECOND})
  outcomes = sweep.launch(specs, tmp_path, workers=2, runner=RUNNER)
  assert [one.state.status for one in outcomes] == ["failed", "complete"]


def test_out_of_memory_names_the_sizes_and_a_way_out(
    make_specs: Callable, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  """As XLA tells of it, by way of a worker that trains in earnest."""
  specs = make_specs({"seed": RUNS_OUT_OF_MEMORY}, {"seed": GOOD})
  outcome, other = sweep.launch(specs, tmp_path, workers=1, runner=RUNNER)
  assert (outcome.state.status, other.state.status) == ("failed", "complete")
  result = outcome.state.result
  assert re.match(
      r"out of memory: a step takes [\d.]+ KiB a device \(logits .*\), by "
      r"estimate; a device has [\d.]+ GiB, so that it should fit: other "
      "programs", result["status_reason"])
  assert "allocating 9876543210 bytes" in result["status_reason"]
  assert "RESOURCE_EXHAUSTED" in result["log_tail"]
  monkeypatch.setattr(out_of_memory, "host_bytes", lambda: 700_000)
  assert "cheapest way out: --config." in out_of_memory.on_host(
      specs[0].config)


def test_longest_first_on_one_process_with_its_own_log(
    make_specs: Callable, tmp_path: pathlib.Path) -> None:
  specs = make_specs({"duration.steps": 10}, {"duration.steps": 30},
                     {"duration.steps": 20})
  journal = Journal()
  sweep.launch(specs, tmp_path, workers=1, runner=RUNNER, observer=journal)
  assert journal.started_ids == [specs[i].run_id for i in (1, 2, 0)]
  assert len({_attempts(tmp_path, spec)[0]["pid"] for spec in specs}) == 1
  for spec in specs:
    log = (tmp_path / spec.run_id / sweep.ledger.LOG).read_text()
    assert log == '{"event": "finished"}\nprinted from C\n'


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores that processes can be pinned to")
def test_workers_share_the_cores_out(
    make_specs: Callable, tmp_path: pathlib.Path) -> None:
  before = os.sched_getaffinity(0)
  specs = make_specs({"seed": 10}, {"seed": 11}, {"seed": 12}, {"seed": 13})
  sweep.launch(specs, tmp_path, workers=2, runner=RUNNER)
  attempts = [_attempts(tmp_path, spec)[0] for spec in specs]
  shares = {one["pid"]: set(one["cores"]) for one in attempts}
  assert 1 <= len(shares) <= 2
  assert sum(map(len, shares.values())) == len(set().union(*shares.values()))
  assert all(len(share) <= len(before) / 2 + 0.5 for share in shares.values())
  assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores that processes can be pinned to")
def test_what_is_left_of_a_sweep_gets_no_more_cores(
    make_specs: Callable, tmp_path: pathlib.Path) -> None:
  """On more cores a run that is resumed would end with other bits."""
  specs = make_specs({"seed": RAISES}, {"seed": GOOD})
  sweep.launch(specs, tmp_path, workers=2, runner=RUNNER)
  sweep.launch(specs, tmp_path, workers=2, runner=RUNNER)
  first, second = _attempts(tmp_path, specs[0])
  assert len(first["cores"]) == len(second["cores"])


@pytest.mark.parametrize("gpus, workers, runs, needed, expected", [
    ("0,1,2,3", None, 8, 1, ["0", "1", "2", "3"]),
    ("4,5,6,7", None, 8, 2, ["4,5", "6,7"]),
    ("0,1,2,3", None, 1, 1, [None]),  # one run has them all
    ("0,1", 1, 8, 1, [None]),
    ("0", None, 8, 1, [None]),
    ("0,1", 4, 8, 1, ["0", "1", "0", "1"]),
])
def test_gpus_are_shared_out(
    make_specs: Callable, monkeypatch: pytest.MonkeyPatch, gpus: str,
    workers: int | None, runs: int, needed: int,
    expected: list[str | None]) -> None:
  monkeypatch.setattr(tuning, "has_accelerator", lambda: True)
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
  spec, = make_specs({"runtime.num_devices": needed})
  found = shares.of([spec.config] * runs, workers, runs)
  assert [share.environment.get("CUDA_VISIBLE_DEVICES")
          for share in found] == expected
  # Two workers on a GPU get less than half of its memory each.
  assert {share.environment.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
          for share in found} == {"0.450" if workers == 4 else None}


def test_a_directory_that_cannot_be_written_fails_its_run_alone(
    make_specs: Callable, tmp_path: pathlib.Path) -> None:
  specs = make_specs({"seed": GOOD, "duration.steps": 20}, {"seed": 10})
  (tmp_path / specs[0].run_id).write_text("not a directory")
  failed, other = sweep.launch(specs, tmp_path, workers=1, runner=RUNNER)
  assert failed.state.status == "failed" and "exists" in failed.state.reason
  assert other.state.status == "complete"


def test_a_damaged_record_stops_the_launch_and_is_named(
    make_specs: Callable, tmp_path: pathlib.Path) -> None:
  spec, = specs = make_specs({"seed": GOOD})
  path = tmp_path / spec.run_id / "result.json"
  path.parent.mkdir()
  path.write_text("{")
  with pytest.raises(records.RecordError, match=re.escape(str(path))):
    sweep.launch(specs, tmp_path, workers=1, runner=RUNNER)


def test_a_run_that_another_process_is_at_is_left_to_it(
    make_specs: Callable, tmp_path: pathlib.Path) -> None:
  """And waited for, and taken over when it comes to nothing."""
  theirs, own = specs = make_specs({"duration.steps": 20}, {})
  run_dir = tmp_path / theirs.run_id
  run_dir.mkdir()
  journal, holding = Journal(), contextlib.ExitStack()
  holding.enter_context(lease.hold(run_dir))

  def tick() -> None:
    if sweep.ledger.run_state(tmp_path, own.run_id).status == "complete":
      holding.close()
  journal.tick = tick
  outcomes = sweep.launch(
      specs, tmp_path, workers=1, runner=RUNNER, observer=journal)
  assert [one.state.status for one in outcomes] == ["complete", "complete"]
  assert journal.started_ids == [own.run_id, theirs.run_id]


def test_what_others_have_done_is_not_done_again(
    make_specs: Callable, tmp_path: pathlib.Path) -> None:
  theirs, own = specs = make_specs({"duration.steps": 20}, {})
  holding, journal = contextlib.ExitStack(), Journal()
  (tmp_path / theirs.run_id).mkdir()
  holding.enter_context(lease.hold(tmp_path / theirs.run_id))

  def tick() -> None:
    if sweep.ledger.run_state(tmp_path, own.run_id).status == "complete":
      records.write_result(tmp_path / theirs.run_id, dict(
          status="complete", config_hash=config_lib.config_hash(
              theirs.config), loss=3.0))
      holding.close()
  journal.tick = tick
  one, _ = sweep.launch(
      specs, tmp_path, workers=1, runner=RUNNER, observer=journal)
  assert (one.state.status, one.state.loss, one.skipped) == (
      "complete", 3.0, True)
  assert journal.started_ids == [own.run_id]


def test_in_this_process(
    make_specs: Callable, tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent))
  specs = make_specs({"seed": GOOD}, {"seed": 10})
  outcomes = sweep.launch(specs, tmp_path, workers=0, runner=RUNNER)
  assert [one.state.status for one in outcomes] == ["complete", "complete"]
  assert {_attempts(tmp_path, spec)[0]["pid"] for spec in specs} == {
      os.getpid()}


def test_workers_that_do_not_start_end_the_launch(
    make_specs: Callable, tmp_path: pathlib.Path) -> None:
  with pytest.raises(sweep.LaunchError, match="No module named 'nowhere'"):
    sweep.launch(make_specs({}), tmp_path, workers=1, runner="nowhere:run")


def test_bad_launches_are_refused(
    make_specs: Callable, tmp_path: pathlib.Path) -> None:
  with pytest.raises(sweep.LaunchError, match="'local'"):
    sweep.launch(make_specs({}), tmp_path, launcher="locl")
  with pytest.raises(sweep.LaunchError, match="at least 0"):
    sweep.launch(make_specs({}), tmp_path, workers=-1)
  with pytest.raises(sweep.LaunchError, match="no options.*time"):
    sweep.launch(make_specs({}), tmp_path, options={"time": 3})
  (tmp_path / "file").touch()
  with pytest.raises(sweep.LaunchError, match="cannot be used.*file"):
    sweep.launch(make_specs({}), tmp_path / "file", workers=1)
  with pytest.raises(config_lib.ConfigError, match="cpu_tuning"):
    sweep.launch(make_specs(
        {}, {"seed": 1, "runtime.cpu_tuning": "off"}), tmp_path, workers=1)


EXPERIMENT = textwrap.dedent("""
    import json
    from tfjax import config, sweep

    def get_config():
      result = config.default()
      config.override(result, json.loads('''{tiny}'''))
      return result

    def get_sweep(config):
      return sweep.axis("duration.steps", [20, 40, 30])
    """)


@pytest.fixture(name="script")
def script_fixture(
    tmp_path: pathlib.Path, cache_dir: pathlib.Path,
) -> Callable[..., subprocess.CompletedProcess]:
  """Runs scripts/sweep.py on three tiny runs in tmp_path/sweep."""
  experiment = tmp_path / "experiment.py"
  tiny = json.dumps(_tiny(cache_dir))
  experiment.write_text(EXPERIMENT.replace("{tiny}", tiny))
  command = [sys.executable, str(REPOSITORY / "scripts" / "sweep.py"),
             f"--config={experiment}", f"--workdir={tmp_path / 'sweep'}"]
  return lambda *arguments: subprocess.run(
      [*command, *arguments], capture_output=True, text=True, check=False)


def test_script_trains_goes_past_a_failure_and_retries_it(
    script: Callable, tmp_path: pathlib.Path) -> None:
  workdir = tmp_path / "sweep"
  planned = script("--dry_run")
  assert planned.returncode == 0, planned.stderr
  assert planned.stdout.count("pending") == 3 and not workdir.exists()
  # 20 + 40 + 30 steps of 4 x 32 tokens
  total, = re.findall("^ +3 runs .*", planned.stdout, re.M)
  assert "11.5k" in total

  run_ids = re.findall(r"^ *\d+  (\S+)", planned.stdout, re.M)
  obstacle = workdir / run_ids[0] / "checkpoints"
  obstacle.parent.mkdir(parents=True)
  obstacle.write_text("not a directory")
  begun = script()
  assert begun.returncode == 1
  failure, = re.findall("failed: (.*?): (.*)", begun.stderr)
  assert failure[0] == obstacle.parent.name and "Error" in failure[1]
  assert f"--workdir={workdir}" in begun.stderr  # the command that retries
  assert "3 runs: 1 failed, 2 complete" in begun.stdout
  assert "\033" not in begun.stdout
  kept = {path: path.stat().st_mtime_ns for path in
          workdir.glob("*/metrics.jsonl") if path.parent != obstacle.parent}
  assert len(kept) == 2
  for path in kept:
    assert "compiling: " in path.with_name("log.txt").read_text()

  obstacle.unlink()
  retried = script()
  assert retried.returncode == 0, retried.stderr
  assert "3 runs: 1 complete, 2 skipped" in retried.stdout
  assert {path: path.stat().st_mtime_ns for path in kept} == kept
  states = sweep.ledger.sweep_state(workdir)
  assert [state.result["steps"] for state in states] == [20, 40, 30]
  # ln(257) = 5.55 before training
  assert all(1 < state.loss < 5.5 for state in states)


@pytest.mark.parametrize("argument, expected", [
    ("--config.duration.stepz=3", "did you mean 'steps'"),
    ("--config.train.batch_size=0", "config.train.batch_size"),
    ("--config.model.remat=None", "config.model.remat"),
    ("-config.model.remat=None", "config.model.remat"),
    ("--config=nowhere.py", "no experiment file nowhere.py"),
    (f"--config={os.__file__}", "does not define get_config()"),
    ("--config.duration.tokens=9", "steps and tokens are set; set the others"),
])
def test_script_refuses_a_bad_command_line(
    script: Callable, tmp_path: pathlib.Path, argument: str, expected: str,
) -> None:
  done = script(argument)
  assert done.returncode == 2 and not (tmp_path / "sweep").exists()
  assert expected in done.stderr and "Traceback" not in done.stderr


def test_script_overrides_hold_for_every_run(script: Callable) -> None:
  done = script("--dry_run", "--config.seed=7", "--config.duration.steps=None",
                "--config.duration.tokens=999")
  # The cells differ in duration.steps only, which was unset.
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("pending") == 1
  assert "1.02k" in done.stdout  # 8 steps of 4 x 32 tokens


def test_script_runs_overrides_of_a_file(
    script: Callable, tmp_path: pathlib.Path) -> None:
  path = tmp_path / "cells.json"
  path.write_text(json.dumps(
      [{"duration.steps": None, "duration.tokens": 999, "seed": 3},
       {"duration.steps": 11}]))
  done = script("--dry_run", f"--overrides={path}")
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("pending") == 2
  assert "1.02k" in done.stdout  # 8 steps of 4 x 32 tokens
  assert "1.41k" in done.stdout


@pytest.mark.parametrize("text, arguments, expected", [
    (None, (), "cannot be read: .*No such file"),
    ("[{", (), "cannot be read: Expecting"),
    ("[1]", (), "must hold a list with an object of dotted config keys"),
    ('[{"seeds": 1}]', (), r"cell 1 \(seeds=1\): config.seeds: no such key"),
    ('[{"seed": 1}]', ("--sweep_arg=a=1",), "is for get_sweep, which"),
])
def test_script_refuses_bad_overrides(
    script: Callable, tmp_path: pathlib.Path, text: str | None,
    arguments: tuple[str, ...], expected: str) -> None:
  path = tmp_path / "cells.json"
  if text is not None:
    path.write_text(text)
  done = script(f"--overrides={path}", *arguments)
  assert done.returncode == 2 and not (tmp_path / "sweep").exists()
  assert re.search(expected, done.stderr), done.stderr
  assert "Traceback" not in done.stderr


LAUNCHER = textwrap.dedent("""
    import json, sys
    from tfjax import config, sweep
    base = config.from_dict(json.loads(sys.argv[1]))
    specs = sweep.plan(base, json.loads(sys.argv[2]))
    try:
      sweep.launch(specs, sys.argv[3], workers=1, runner="test_launch:act")
    except sweep.Interrupted as error:
      print(*(one.state.status for one in error.outcomes))
    """)


@pytest.mark.parametrize("seed, signals, said", [
    (IS_SLOW, [signal.SIGINT], "interrupted pending"),
    (IS_DEAF, [signal.SIGTERM, signal.SIGINT], "interrupted pending"),
    (IS_SLOW, [signal.SIGKILL], ""),
])
def test_a_signal_to_the_launcher_leaves_no_process(
    make_specs: Callable, tmp_path: pathlib.Path, seed: int,
    signals: list[int], said: str) -> None:
  cells = [{"seed": seed, "duration.steps": 20},
           {"seed": 10, "duration.steps": 10}]
  first, _ = make_specs(*cells)
  arguments = [json.dumps(config_lib.to_dict(first.config)),
               json.dumps(cells), str(tmp_path)]
  with subprocess.Popen([sys.executable, "-c", LAUNCHER, *arguments],
                        stdout=subprocess.PIPE, text=True) as launcher:
    pid = int(_wait_for((tmp_path / first.run_id / "pid").read_text))
    for signum in signals:
      launcher.send_signal(signum)
      time.sleep(0.5)
    assert launcher.communicate(timeout=30)[0].strip() == said
  _wait_for(lambda: not _is_alive(pid))
  states = sweep.ledger.sweep_state(tmp_path)
  assert [state.status for state in states] == ["interrupted", "pending"]


def _is_alive(pid: int) -> bool:
  """Whether the process runs; one that nobody has buried does not."""
  try:
    os.kill(pid, 0)
    status = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    return status.split()[0] != "Z"
  except (ProcessLookupError, FileNotFoundError):
    return False


def _wait_for(look: Callable[[], Any], seconds: float = 30.0) -> Any:
  """What `look` finds, once it finds something."""
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    try:
      if found := look():
        return found
    except FileNotFoundError:
      pass
    time.sleep(0.05)
  raise TimeoutError(f"nothing came within {seconds} s")
