# SPDX-License-Identifier: Apache-2.0
"""The SLURM and print launchers and `join`, with commands that act as SLURM's.

What only a real SLURM shows is in test_slurm.py.
"""

import dataclasses
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time
from typing import Any, Callable

import ml_collections
import pytest

from tfjax import config as config_lib
from tfjax import sweep
from tfjax.sweep import join
from tfjax.sweep import slurm
from tfjax.sweep import slurm_options
from tfjax.train import lease
from tfjax.train import records

# Now: its log goes to what is standard output when it is imported first.
submitit = pytest.importorskip("submitit")


@pytest.fixture(name="specs")
def specs_fixture(base: ml_collections.ConfigDict,
                  cache_dir: pathlib.Path) -> list[sweep.RunSpec]:
  config_lib.override(base, {
      "tracking.wandb": "disabled", "data.cache_dir": str(cache_dir),
      "runtime.num_devices": 1, "sweep.ensemble": "off",
      "runtime.compilation_cache_dir": os.environ[
          "JAX_COMPILATION_CACHE_DIR"]})
  return sweep.plan(base, [{"seed": 1}, {"seed": 2}, {"seed": 3}])


@pytest.fixture(name="commands")
def commands_fixture(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
                     ) -> Callable[..., pathlib.Path]:
  """Puts shell scripts on the PATH in place of SLURM's commands.

  Each call is a line in the file that is returned.
  """
  calls = tmp_path / "calls"
  calls.touch()

  def put(**scripts: str) -> pathlib.Path:
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name, script in {
        "srun": "", "sbatch": "echo Submitted batch job 7",
        "squeue": "echo 'RUNNING|None'", "scancel": "", **scripts}.items():
      path = folder / name
      path.write_text(f'#!/bin/sh\necho "{name} $*" >> {calls}\n{script}\n')
      path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return calls
  return put


def finish(config: config_lib.ExperimentConfig, workdir: str, *, sweep: str,
           run_id: str) -> records.RunRecord:
  """In place of `tfjax.train.run`: the run is done at once."""
  record = records.RunRecord(
      run_id=run_id, status="complete", sweep=sweep, loss=1.0,
      config_hash=config_lib.config_hash(config), finished_at=records.now())
  records.write_result(pathlib.Path(workdir) / run_id,
                       dataclasses.asdict(record))
  return record


# --- Options -----------------------------------------------------------------


def test_options_become_what_sbatch_is_told(
    specs: list[sweep.RunSpec], tmp_path: pathlib.Path,
    commands: Callable) -> None:
  commands()
  outcomes = sweep.launch(
      specs, tmp_path / "w", launcher="slurm", workers=3, sweep="s", options={
          "partition": "gpu", "account": "me", "gpus_per_node": "1",
          "cpus_per_task": 4, "mem_gb": "1.5", "timeout_min": 90,
          "constraint": "a100", "array_parallelism": 2, "slurm_qos": "low",
          "slurm_signal_delay_s": "45", "slurm_setup": "module load cuda",
          "slurm_additional_parameters": '{"nice": 5}', "wait": "false"})
  assert [one.state.status for one in outcomes] == ["pending"] * 3
  text = (tmp_path / "w/.slurm/7_submission.sh").read_text(encoding="utf-8")
  lines = text.splitlines()
  options = {line.removeprefix("#SBATCH --") for line in lines
             if line.startswith("#SBATCH")}
  logs = tmp_path / "w/.slurm/%A_%a_0_log"
  assert options == {
      "partition=gpu", "account=me", "gpus-per-node=1", "cpus-per-task=4",
      "mem=1536MB", "time=90", "constraint=a100", "array=0-2%2", "qos=low",
      "signal=TERM@45", "nice=5", "requeue", "job-name=tfjax-s", "nodes=1",
      "open-mode=append", f"output={logs}.out", f"error={logs}.err"}
  assert "module load cuda" in lines
  assert subprocess.run(["bash", "-n"], input=text, text=True,
                        check=False).returncode == 0


def test_without_options_slurm_has_its_way(
    specs: list[sweep.RunSpec], tmp_path: pathlib.Path,
    commands: Callable) -> None:
  commands()
  sweep.launch(specs, tmp_path / "w", launcher="slurm",
               options={"wait": False})
  text = (tmp_path / "w/.slurm/7_submission.sh").read_text(encoding="utf-8")
  assert "#SBATCH --array=0-2%3" in text  # a job a run
  assert "#SBATCH --signal=TERM@90" in text
  for name in ("time", "wckey", "mem", "partition", "cpus-per-task"):
    assert f"--{name}=" not in text


@pytest.mark.parametrize("options, message", [
    ({"partiton": "x"}, "no launcher option 'partiton' for 'slurm'; did you "
     "mean 'partition'"),
    ({"slurm_qoss": "x"}, "did you mean 'slurm_qos'"),
    ({"qos": "x"}, "did you mean 'slurm_qos'"),
    ({"zzzz": 1}, "there are: partition, account"),
    ({"slurm_nodes": 2}, "one task on one node"),
    ({"timeout_min": "soon"}, "timeout_min=soon: must be a whole number"),
    ({"timeout_min": 1.5}, "timeout_min=1.5: must be a whole number"),
    ({"cpus_per_task": 0}, "must be a whole number above 0"),
    ({"mem_gb": "-1"}, "mem_gb=-1: must be a number above 0"),
    ({"wait": "perhaps"}, "wait=perhaps: must be true or false"),
    ({"timeout_min": 5, "slurm_time": "6"}, "give one of them"),
    ({"slurm_additional_parameters": "nice"}, "must be a JSON object"),
])
def test_bad_options_are_refused(options: dict[str, Any],
                                 message: str) -> None:
  with pytest.raises(sweep.LaunchError) as caught:
    slurm_options.read(options, "s")
  assert message in str(caught.value)


@pytest.mark.parametrize("options, devices, fits", [
    ({}, 64, True),  # not known
    ({"gpus_per_node": 0}, 8, True),  # CPUs, of which there are as many
    ({"gpus_per_node": 4}, 4, True),
    ({"gpus_per_node": 4}, 8, False),
    ({"slurm_gres": "gpu:a100:4"}, 8, False),
    ({"slurm_gres": "gpu:8"}, 8, True),
    ({"slurm_gpus_per_task": "a100:2"}, 4, False),
])
def test_a_mesh_larger_than_a_job_is_refused(
    base: ml_collections.ConfigDict, options: dict[str, Any], devices: int,
    fits: bool) -> None:
  config_lib.override(base, {"mesh.data": devices, "train.batch_size": 64,
                             "duration.steps": 2})
  specs = sweep.plan(base, [{"seed": 1}])
  request = slurm_options.read(options, "s")
  if fits:
    slurm_options.check_devices(specs, request)
    return
  with pytest.raises(sweep.LaunchError, match=f"ask for {devices} devices"):
    slurm_options.check_devices(specs, request)


# --- Jobs --------------------------------------------------------------------


def test_what_sbatch_says_is_the_error(
    specs: list[sweep.RunSpec], tmp_path: pathlib.Path,
    commands: Callable) -> None:
  commands(sbatch="echo sbatch: error: invalid partition >&2; exit 1")
  with pytest.raises(sweep.LaunchError, match="invalid partition"):
    sweep.launch(specs, tmp_path / "w", launcher="slurm")


def test_without_slurm_print_is_named(
    specs: list[sweep.RunSpec], tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(sweep.LaunchError, match="'print' gives commands"):
    sweep.launch(specs, tmp_path / "w", launcher="slurm")


def test_jobs_that_end_without_a_run_are_an_error_with_their_last_words(
    specs: list[sweep.RunSpec], tmp_path: pathlib.Path,
    commands: Callable) -> None:
  logs = tmp_path / "w/.slurm"
  commands(
      sbatch=f"echo no such module > {logs}/7_1_0_log.err\n"
             "echo Submitted batch job 7",
      squeue="echo slurm_load_jobs error: Invalid job id specified >&2\n"
             "exit 1")
  with pytest.raises(sweep.LaunchError) as caught:
    sweep.launch(specs, tmp_path / "w", launcher="slurm")
  assert "3 runs are not done" in str(caught.value)
  assert "no such module" in str(caught.value)


def test_a_silent_squeue_is_no_end(
    specs: list[sweep.RunSpec], tmp_path: pathlib.Path, commands: Callable,
    monkeypatch: pytest.MonkeyPatch) -> None:
  """The launcher goes on while SLURM does not answer, until the runs are done
  (here by hand)."""
  monkeypatch.setattr(slurm, "_LOOK_SECONDS", 0.1)
  monkeypatch.setattr(slurm, "_QUEUE_SECONDS", 0.1)
  calls = commands(squeue="echo Unable to contact slurm controller >&2; exit 1")
  done = threading.Thread(target=lambda: (
      wait_for(lambda: calls.read_text().count("squeue") > 2),
      join.join(tmp_path / "w", workers=1, runner="test_launchers:finish")),
      daemon=True)
  monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent))
  done.start()
  outcomes = sweep.launch(specs, tmp_path / "w", launcher="slurm")
  done.join()
  assert [(one.state.status, one.skipped) for one in outcomes] == [
      ("complete", False)] * 3


def test_a_failure_that_is_asked_for_again_is_waited_for(
    specs: list[sweep.RunSpec], tmp_path: pathlib.Path) -> None:
  """As of an ensemble, whose runs go on alone."""
  sweep.ledger.write_plan(tmp_path, "some", specs)
  outcomes = {}
  watch = slurm._Watch(tmp_path, specs, sweep.Observer(), outcomes)
  for spec in specs[:2]:
    (tmp_path / spec.run_id).mkdir()
    records.write_result(tmp_path / spec.run_id, dict(
        status="failed", finished_at=records.now()))
  time.sleep(0.02)  # the kernel's clock for files goes by ticks
  sweep.ledger.ask(tmp_path, [specs[0].run_id])
  watch.look()
  assert set(watch.waiting) == {specs[0].run_id, specs[2].run_id}
  assert set(outcomes) == {specs[1].run_id}


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_leaves_the_jobs_and_again_cancels_them(
    specs: list[sweep.RunSpec], tmp_path: pathlib.Path, commands: Callable,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture,
    presses: int) -> None:
  monkeypatch.setattr(slurm, "_SECOND_SECONDS", 1.0)
  calls = commands()

  def press() -> None:
    wait_for(lambda: "sbatch" in calls.read_text())
    for _ in range(presses):
      time.sleep(0.4)
      os.kill(os.getpid(), signal.SIGINT)

  thread = threading.Thread(target=press)
  thread.start()
  with pytest.raises(sweep.Interrupted) as caught:
    sweep.launch(specs, tmp_path / "w", launcher="slurm")
  thread.join()
  assert [one.state.status for one in caught.value.outcomes] == [
      "pending"] * 3
  assert ("scancel 7" in calls.read_text()) == (presses == 2)
  said = capfd.readouterr().err
  assert "to cancel: scancel 7" in said
  assert "the jobs go on without this command" in said
  assert ("cancelled the jobs 7" in said) == (presses == 2)


@pytest.mark.parametrize("environment, number", [
    ({"SLURM_JOB_ID": "9"}, "9"),
    # The last task of an array has the array's own number, by which SLURM
    # would requeue them all.
    ({"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7",
      "SLURM_ARRAY_TASK_ID": "3"}, "7_3"),
])
def test_a_job_requeues_itself_alone(
    environment: dict[str, str], number: str, commands: Callable) -> None:
  calls = commands(squeue="echo RUNNING", scontrol="")
  # pylint: disable=protected-access
  slurm._requeue(slurm._own_number(environment))
  assert calls.read_text().splitlines()[-1] == f"scontrol requeue {number}"


def test_a_job_that_slurm_ends_is_not_requeued(commands: Callable) -> None:
  calls = commands(squeue="echo COMPLETING", scontrol="")
  slurm._requeue("7_3")  # pylint: disable=protected-access
  assert "scontrol" not in calls.read_text()


# --- Other schedulers, and joining -------------------------------------------


def test_a_printed_command_joins_from_anywhere(
    specs: list[sweep.RunSpec], tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
  monkeypatch.setenv("JAX_FLAG_OF_MINE", "a b'c")
  monkeypatch.setenv("WANDB_API_KEY", "secret")
  monkeypatch.chdir(tmp_path)
  outcomes = sweep.launch(specs, "it's mine", launcher="print", workers=2,
                          sweep="the sweep")
  assert [one.state.status for one in outcomes] == ["pending"] * 3
  out, hint = capfd.readouterr()
  first, second = out.splitlines()
  assert first == second and "secret" not in out
  assert "qsub" in hint and "#" not in out
  environment = {name: value for name, value in os.environ.items()
                 if not name.startswith(("JAX_", "XLA_", "PYTHON"))}
  done = subprocess.run(["sh", "-c", first], cwd="/", env=environment,
                        capture_output=True, text=True, timeout=120,
                        check=False)
  assert done.returncode == join.OK, done.stderr
  assert "3 runs, 0 not done" in done.stdout
  assert {sweep.ledger.run_state("it's mine", spec.run_id).status
          for spec in specs} == {"complete"}
  words = shlex.split(first)
  assert "JAX_FLAG_OF_MINE=a b'c" in words
  assert str(tmp_path / "it's mine") in words and sys.executable in words


def test_of_a_part_of_a_sweep_no_other_run_is_done(
    specs: list[sweep.RunSpec], tmp_path: pathlib.Path, commands: Callable,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
  """As a retry has it; what is pending besides stays so."""
  calls = []
  commands()
  monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent))
  sweep.ledger.write_plan(tmp_path, "s", specs)
  given = dict(sweep="s", planned=True, runner="test_launchers:finish")
  sweep.launch(specs[1:2], tmp_path, launcher="print", **given)
  line, = capfd.readouterr().out.splitlines()
  words = shlex.split(line)
  arguments = words[words.index("tfjax.sweep.join") + 1:]
  assert arguments[-2:] == ["--only", specs[1].run_id]
  # A job is called with the same.
  sweep.launch(specs[1:2], tmp_path, launcher="slurm",
               options={"wait": False}, **given)
  job, = (tmp_path / ".slurm").glob("*_submitted.pkl")
  delayed = submitit.core.utils.DelayedSubmission.load(job)
  monkeypatch.setattr(slurm.signal, "signal", lambda *_: None)
  with monkeypatch.context() as patch:
    patch.setattr(join, "main", lambda given: calls.append(given) or join.OK)
    delayed.function(*delayed.args)
  assert calls[0][-2:] == ["--only", specs[1].run_id]

  workers = arguments.index("--workers=1")
  arguments[workers] = "--workers=0"
  assert join.main(arguments) == join.OK
  assert [sweep.ledger.run_state(tmp_path, spec.run_id).status
          for spec in specs] == ["pending", "complete", "pending"]
  # Where it is all that is left, the line says no more than the sweep.
  sweep.launch([specs[0], specs[2]], tmp_path, launcher="print", **given)
  assert "--only" not in capfd.readouterr().out
  assert join.main([str(tmp_path), "--only", "absent"]) == join.REFUSED
  assert "absent is not, or no longer, planned" in capfd.readouterr().err


@pytest.mark.parametrize("launcher", ["print", "slurm"])
def test_this_process_is_no_worker_of_another_launcher(
    specs: list[sweep.RunSpec], tmp_path: pathlib.Path, commands: Callable,
    launcher: str) -> None:
  calls = commands()
  with pytest.raises(sweep.LaunchError, match="runs nothing here; give at"):
    sweep.launch(specs, tmp_path / "w", launcher=launcher, workers=0,
                 options={"wait": False} if launcher == "slurm" else {})
  assert calls.read_text() == "" and not (tmp_path / "w").exists()


def test_who_joins_leaves_when_others_are_at_all_that_is_left(
    specs: list[sweep.RunSpec], tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent))
  sweep.ledger.write_plan(tmp_path, "s", specs)
  (tmp_path / specs[1].run_id).mkdir()
  with lease.hold(tmp_path / specs[1].run_id):
    outcomes = join.join(tmp_path, linger=1.0, workers=0,
                         runner="test_launchers:finish")
  assert [one.spec.run_id for one in outcomes] == [
      spec.run_id for spec in specs]
  assert [one.state.status for one in outcomes] == [
      "complete", "running", "complete"]


def test_joining_nothing_is_refused(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture) -> None:
  assert join.main([str(tmp_path)]) == join.REFUSED
  assert "no sweep was launched" in capfd.readouterr().err


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.1)
