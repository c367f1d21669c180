# SPDX-License-Identifier: Apache-2.0
"""scripts/sweep.py from the outside: its commands, what they say, exit codes.

To start Python for each of them would take a minute; one process takes the
command lines of a test one after another.
"""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import types
from typing import Any

import pandas as pd
import pytest

from tfjax import config as config_lib
from tfjax import sweep
from tfjax.sweep import cells
from tfjax.train import records

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
EXPERIMENT = '''
from tfjax import config as config_lib
from tfjax import sweep

def get_config():
  config = config_lib.default()
  config_lib.override(config, {values!r})
  return config

def get_sweep(config, rate=1e-3):
  del config
  return {{"seeds": sweep.axis("seed", [0, 1]),
           "rates": sweep.axis("optimizer.learning_rate", [rate, 3e-3])}}
'''
DRIVER = '''
import json, os, sys, tempfile
sys.path.insert(0, "scripts")
import sweep as script
from absl import app
from tfjax import commandline

results = []
for arguments in json.loads(sys.argv[1]):
  with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
    child = os.fork()  # of a process in which JAX has not begun yet
    if not child:
      os.dup2(out.fileno(), 1)
      os.dup2(err.fileno(), 2)
      sys.argv = ["sweep.py", *arguments]
      app.run(script.main, flags_parser=commandline.parse)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    results.append([code, *(
        os.pread(file.fileno(), 1 << 20, 0).decode() for file in (out, err))])
print("RESULTS " + json.dumps(results))
'''


def call(*commands: str) -> list[tuple[int, str, str]]:
  """Exit code, standard output and error of each command."""
  done = subprocess.run(
      [sys.executable, "-c", DRIVER,
       json.dumps([command.split() for command in commands])],
      cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
  assert "RESULTS " in done.stdout, done.stdout + done.stderr
  return [tuple(one) for one in json.loads(
      done.stdout.rpartition("RESULTS ")[2])]


def experiment(directory: pathlib.Path, cache_dir: pathlib.Path,
               **changes: Any) -> pathlib.Path:
  values = {
      "model.size": "3k", "model.context_length": 16,
      "data.corpus": "synthetic", "data.synthetic.num_bytes": 30_000,
      "data.synthetic.document_bytes": 500, "data.tokenizer.kind": "byte",
      "data.cache_dir": str(cache_dir), "duration.steps": 4,
      "train.batch_size": 8, "train.log_every_steps": 1,
      "evaluation.tokens": 256, "tracking.wandb": "disabled",
      "sweep.ensemble": "off", "runtime.num_devices": 1,
      "runtime.compilation_cache_dir": os.environ["JAX_COMPILATION_CACHE_DIR"]}
  path = directory / "tiny.py"
  path.write_text(EXPERIMENT.format(values=values | changes))
  return path


def test_a_sweep_from_its_plan_to_its_table(
    tmp_path: pathlib.Path, cache_dir: pathlib.Path) -> None:
  file, workdir = experiment(tmp_path, cache_dir), tmp_path / "w"
  (planned, before, ran, dry, status, retry, cleaned, collected, again,
   printed) = call(
      f"--config={file} --workdir={workdir} --dry_run",
      f"status --workdir={workdir}",
      f"run --config={file} --workdir={workdir} --workers=0 "
      "--config.duration.steps=3",
      f"--workdir={workdir} --dry_run",
      f"status --workdir={workdir} --sweep=rates",
      f"retry --workdir={workdir}",
      f"clean --workdir={workdir} --dry_run",
      f"collect --workdir={workdir} --out={workdir}/t.csv "
      f"--out={workdir}/t.parquet",
      f"run --workdir={workdir} --workers=0",
      f"run --workdir={workdir} --launcher=print")
  code, out, err = planned
  assert (code, err) == (0, "")
  assert "sweep seeds: 2 runs" in out and "sweep rates: 2 runs" in out
  # Seed 0 at 1e-3 is in both; 4 steps x 8 x 16 tokens, 46,176 FLOPs each.
  assert "3 runs" in out and out.count("pending") == 3
  assert "left: 70.9M FLOPs, - h of runs" in out
  code, _, err = before
  assert code == 2 and "no sweep was launched" in err
  code, out, err = ran
  assert code == 0, err
  assert "3 runs: 3 complete" in out
  code, out, _ = dry
  assert code == 0 and out.count("complete") >= 3 and "3 done" in out
  assert "left: 0 FLOPs" in out and "the pace of 3 complete runs" in out
  code, out, _ = status
  assert code == 0 and out.count("3/3") == 2
  assert "2 runs: 2 complete\n100% of" in out
  assert retry[:2] == (0, "nothing has failed or was interrupted\n")
  assert cleaned[0] == 0 and "nothing was removed" in cleaned[1]
  assert len(list(workdir.glob("*/checkpoints"))) == 3
  assert collected[0] == 0 and "3 runs, " in collected[1]
  frame = pd.read_parquet(workdir / "t.parquet")
  assert list(frame["config.seed"]) == [0, 1, 0]
  assert list(frame["tokens_seen"]) == [3 * 8 * 16] * 3
  assert pd.read_csv(workdir / "t.csv").shape == frame.shape
  assert again[0] == 0 and "3 runs: 3 skipped (done before)" in again[1]
  assert printed == (0, "", "# nothing is left to run: all 3 runs are done\n")


def test_sweeps_that_came_one_by_one_go_on_together(
    tmp_path: pathlib.Path, cache_dir: pathlib.Path) -> None:
  file, workdir = experiment(tmp_path, cache_dir), tmp_path / "w"
  *_, both, again = call(
      f"--config={file} --workdir={workdir} --sweep=seeds --launcher=print",
      f"--config={file} --workdir={workdir} --sweep=rates --launcher=print",
      *[f"--workdir={workdir} --launcher=print"] * 2)
  for code, out, err in both, again:
    assert code == 0 and "--sweep=w " in out, err
  plan = sweep.ledger.read_plan(workdir)
  assert [len(ids) for ids in plan["sweeps"].values()] == [2, 2, 3]


def test_jobs_that_are_not_waited_for_are_no_failure(
    tmp_path: pathlib.Path, cache_dir: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  for name, script in {"srun": "", "sbatch": "echo Submitted batch job 7",
                       "squeue": "echo PENDING"}.items():
    path = tmp_path / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
  (code, out, _), = call(
      f"--config={experiment(tmp_path, cache_dir)} --workdir={tmp_path}/w "
      "--launcher=slurm --launcher_option=wait=false")
  assert code == 0 and f"status --workdir={tmp_path}/w" in out


def test_what_fails_is_told_and_retried_alone(
    tmp_path: pathlib.Path, cache_dir: pathlib.Path) -> None:
  absent = tmp_path / "checkpoint"
  file = experiment(tmp_path, cache_dir)
  overrides = tmp_path / "cells.json"
  overrides.write_text(json.dumps([{"seed": 0}, {
      "seed": 1, "init_from": str(absent)}]))
  workdir = tmp_path / "w"
  run = (f"--config={file} --workdir={workdir} --overrides={overrides} "
         "--workers=0")
  planned, early, pending, ran, shown, status, retried, printed = call(
      f"{run[:-len(' --workers=0')]} --launcher=print",
      f"retry --workdir={workdir}", f"status --workdir={workdir}",
      run, f"retry --workdir={workdir} --dry_run",
      f"status --workdir={workdir}",
      f"retry --workdir={workdir} --workers=0",
      f"retry --workdir={workdir} --launcher=print")
  assert planned[0] == 0
  # What has not begun is not retry's, which says whose it is.
  assert early[0] == 0 and "pending (2 runs): " in early[1]
  assert f"run --workdir={workdir}" in early[1]
  assert f"run --workdir={workdir}" in pending[1].splitlines()[-1]
  assert ran[0] == 1 and "2 runs: 1 complete, 1 failed" in ran[1]
  assert "failed: gpt2-3k-4-steps-" in ran[2] and "checkpoint" in ran[2]
  # In this process there is no log to be pointed to.
  assert "log:" not in ran[2]
  assert f"retry --workdir={workdir}" in ran[2].splitlines()[-1]
  assert shown[0] == 0 and shown[1].startswith("failed: gpt2-3k-4-steps-")
  assert shown[1].count("\n") == 1
  assert status[0] == 1 and "2 runs: 1 complete, 1 failed" in status[1]
  assert "device-hours and those of 1 run without a record" in status[1]
  assert "retry --workdir=" in status[1].splitlines()[-1]
  assert retried[0] == 1 and "1 run: 1 failed" in retried[1]
  assert printed[0] == 0 and "tfjax.sweep.join" in printed[1]


def test_a_retry_goes_on_with_those_that_are_halved_together(
    tmp_path: pathlib.Path, cache_dir: pathlib.Path) -> None:
  file = experiment(tmp_path, cache_dir, **{
      "sweep.halving": 2, "duration.steps": 8})
  overrides = tmp_path / "cells.json"
  overrides.write_text(json.dumps([
      {"seed": seed, "optimizer.learning_rate": rate}
      for seed in (0, 1) for rate in (1e-3, 2e-3, 4e-3)]))
  workdir = tmp_path / "w"
  call(f"--config={file} --workdir={workdir} --overrides={overrides} "
       "--launcher=print")
  specs = sweep.ledger.read_specs(workdir)
  (workdir / specs[1].run_id).mkdir()
  records.write_result(workdir / specs[1].run_id, dict(
      run_id=specs[1].run_id, status="interrupted", status_reason="a signal",
      steps=1))
  (code, dry, _), printed = call(
      f"retry --workdir={workdir} --dry_run",
      f"retry --workdir={workdir} --launcher=print")
  ids = [specs[index].run_id for index in (1, 0, 2)]
  assert code == 0 and [line.split()[1] for line in dry.splitlines()] == ids
  assert dry.splitlines()[0].endswith("at step 1 of 8: a signal")
  assert dry.splitlines()[2].endswith(
      "at step 0 of 8: others wait for it at a rung of sweep.halving")
  # Of the other seed nothing.
  assert printed[0] == 0
  assert printed[1].rstrip().endswith(" ".join(["--only", *ids]))


def test_this_process_trains_as_a_worker_does(
    tmp_path: pathlib.Path, cache_dir: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch) -> None:
  """On as many devices as a mesh asks for, and one run at a time."""
  monkeypatch.delenv("JAX_NUM_CPU_DEVICES")
  file = experiment(tmp_path, cache_dir, **{"runtime.num_devices": None})
  overrides = tmp_path / "cells.json"
  overrides.write_text(json.dumps([
      {"mesh.data": 2, "duration.steps": 2}, {"seed": 1, "mesh.data": 4}]))
  given = (f"--workdir={tmp_path}/w --workers=0")
  planned, ran, again = call(
      f"{given} --config={file} --overrides={overrides} --dry_run",
      f"{given} --config={file} --overrides={overrides} "
      "--config.duration.steps=1",
      f"{given} run")
  assert planned[0] == 0 and "h with 1 at a time" in planned[1]
  assert ran[0] == 0 and "2 runs: 2 complete" in ran[1], ran[2]
  assert again[0] == 0
  meshes = [record["device_count"] for record in map(
      records.read_result, sorted((tmp_path / "w").glob("gpt2-*")))]
  assert sorted(meshes) == [2, 4]
  first = next((tmp_path / "w").glob("gpt2-*/result.json"))
  first.unlink()
  (resumed,) = call(f"retry {given}")
  assert resumed[0] == 0 and "1 run: 1 complete" in resumed[1], resumed[2]


def test_mistakes_are_one_line(tmp_path: pathlib.Path,
                               cache_dir: pathlib.Path) -> None:
  file = experiment(tmp_path, cache_dir)
  given = f"--config={file} --workdir={tmp_path}/w"
  empty = tmp_path / "empty.json"
  empty.write_text("[]")
  cases = {
      f"{given} --overrides={empty} --dry_run": "is empty",
      f"{given} --sweep_arg=rate=fast": "quoted twice, as in --sweep_arg=",
      "bogus --workdir=w": "there are: run, status, retry, clean, collect",
      "status extra --workdir=w": "unknown command 'status extra'",
      "status --workdir=w --workers=2": "--workers is not for status, but for "
                                        "run, retry",
      "run --workdir=w --sweep_arg=a=1": "is for the experiment of --config",
      f"{given} --sweep=seed": "did you mean 'seeds'? there are: seeds, rates",
      f"{given} --sweep_arg=size=1": "get_sweep takes no 'size'; it takes rate",
      f"{given} --sweep_arg=rate='fast'": "config.optimizer.learning_rate",
      f"{given} --launcher_option=partition": "not of the form name=value",
      f"{given} --launcher=pbs": "<local|print|slurm>",
      f"{given} --launcher=slurm --workers=0": "launcher 'slurm' runs nothing "
                                               "here",
      f"{given} --overrides=x.json --sweep=seeds": "--sweep=seeds is for "
                                                   "get_sweep",
      "collect --workdir=w --out=runs.xlsx": "'.xlsx' is not known",
      f"collect --workdir={tmp_path}/w": "there are no runs in",
      f"clean --workdir={tmp_path}/absent": "there is no directory"}
  for (command, words), (code, _, err) in zip(cases.items(), call(*cases)):
    assert code == 2 and words in err, (command, code, err)
    assert err.startswith("error: ")
  assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("made, said", [
    ([], "is empty"), ("seed", "must be a list of overrides"),
    ({"a b": []}, "'a b' is not a name for a sweep"),
    ({"a": {"seed": 1}}, "sweep 'a' must be a list of overrides")])
def test_a_get_sweep_that_gives_no_cells(made: Any, said: str) -> None:
  module = types.ModuleType("module")
  module.get_sweep = lambda config: made
  config = config_lib.default()
  with pytest.raises(sweep.PlanError, match=said):
    sweep.plan_all(config, cells.of_experiment(module, config))


def test_a_get_sweep_that_raises_is_named_with_its_line(
    tmp_path: pathlib.Path) -> None:
  path = tmp_path / "mine.py"
  path.write_text("def get_config():\n  pass\n\ndef get_sweep(config):\n"
                  "  return {}['size']\n")
  with pytest.raises(sweep.PlanError, match=(
      r"get_sweep of .*mine\.py, line 5: KeyError: 'size'")):
    cells.of_experiment(config_lib.module(path), config_lib.default())
  module = types.ModuleType("module")
  module.get_sweep = lambda: [{}]
  with pytest.raises(sweep.PlanError, match="must take the config as its"):
    cells.of_experiment(module, config_lib.default())


def test_what_a_trunk_has_done_is_not_counted_for_its_branches(
    monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.syspath_prepend(REPOSITORY / "scripts")
  end = importlib.import_module("sweep_end")
  def outcome(flops: float, shared: float | None) -> sweep.Outcome:
    spec = types.SimpleNamespace(budget=types.SimpleNamespace(
        tokens=round(flops / 2), flops_total=flops))
    state = sweep.ledger.RunState("run", "complete", result=dict(
        shared_flops=shared))
    return sweep.Outcome(spec, state, skipped=False)
  said = end._summary([outcome(4e6, None), outcome(2e6, 1.5e6)], 1.0)
  assert "2 runs: 2 complete; " in said
  # The trunk's 4 million and a quarter of the branch's 2.
  assert "2.25M tokens, 4.5M FLOPs in completed runs" in said
