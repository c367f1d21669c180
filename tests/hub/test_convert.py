# SPDX-License-Identifier: Apache-2.0
"""scripts/convert.py and scripts/parity.py, from a shell."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any, Callable

import jax
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax import hub
from tfjax import train
from tfjax.hub import runs
from tfjax.models import inputs as inputs_lib
from tfjax.models import transformer

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"
MakeConfig = Callable[..., config_lib.ExperimentConfig]


def shell(script: str, *flags: Any) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
      [sys.executable, SCRIPTS / script, *map(str, flags)],
      capture_output=True, text=True, check=False,
      env={**os.environ, "HF_HUB_OFFLINE": "1"})


@pytest.fixture(scope="module")
def run_dir(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory
            ) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp("runs")
  record = train.run(make_config({"model.tie_embedding": False}), workdir)
  assert record.status == "complete"
  return workdir / record.run_id


def test_a_run_becomes_a_directory_that_transformers_loads(
    run_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  done = shell("convert.py", f"--source={run_dir}", f"--target={tmp_path}/hf")
  assert done.returncode == 0, done.stderr
  run = runs.load(run_dir)
  config, params = hub.load(tmp_path / "hf")
  assert jax.tree.all(jax.tree.map(np.array_equal, params, run.params))
  assert run.step == 6 and config.vocab_size == 257

  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
  assert model.config.eos_token_id == tokenizer.eos_token_id == 256
  tokens = np.array([tokenizer("abc")["input_ids"]], np.int32)
  with torch.no_grad():
    wanted = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
  found = transformer.create(config).apply(
      {"params": params}, inputs_lib.Inputs(tokens))
  np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_runs_parameters_are_those_of_its_last_step(
    run_dir: pathlib.Path) -> None:
  """Restored alone, they are as they are with the optimizer's state."""
  import orbax.checkpoint as ocp  # pylint: disable=import-outside-toplevel
  state = ocp.PyTreeCheckpointer().restore(
      (run_dir / "checkpoints" / "6" / "state").resolve())
  assert jax.tree.all(jax.tree.map(
      np.array_equal, state["params"], runs.load(run_dir).params))


def test_what_is_no_run_says_so(run_dir: pathlib.Path,
                                tmp_path: pathlib.Path) -> None:
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(hub.HubError, match="config.json is no run's"):
    runs.load(tmp_path)
  (tmp_path / "config.json").write_text(
      (run_dir / "config.json").read_text())
  with pytest.raises(hub.HubError, match="has no checkpoint that is whole"):
    runs.load(tmp_path)


def test_a_directory_is_resharded_and_described(
    run_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
  run = runs.load(run_dir)
  hub.save(run.config.model, run.params, tmp_path / "a",
           token_ids=run.token_ids())
  (tmp_path / "a" / "generation_config.json").write_text("{}")
  done = shell("convert.py", f"--source={tmp_path}/a",
               f"--target={tmp_path}/b", "--max_shard_bytes=9000")
  assert done.returncode == 0, done.stderr
  assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 1
  assert (tmp_path / "b" / "generation_config.json").is_file()
  assert json.loads((tmp_path / "b" / "config.json").read_text()) == (
      json.loads((tmp_path / "a" / "config.json").read_text()))
  told = shell("convert.py", f"--source={tmp_path}/b", "--info").stdout
  facts = dict(line.rsplit(maxsplit=1) for line in told.splitlines())
  assert facts["family"] == "gpt2" and facts["vocab_size"] == "257"
  total = transformer.count_parameters(run.config.model).total
  assert facts["parameters, total"] == f"{total:,}"


def test_refusals_are_a_line_and_exit_2(tmp_path: pathlib.Path) -> None:
  done = shell("convert.py", f"--source={tmp_path}", "--info")
  assert done.returncode == 2
  assert "config.json cannot be read" in done.stderr
  assert "Traceback" not in done.stderr
  done = shell("convert.py", f"--source={tmp_path}")
  assert done.returncode == 2 and "--target or --info" in done.stderr


def test_the_table_of_parity() -> None:
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  done = shell("parity.py", "--families=gpt2")
  assert done.returncode == 0, done.stderr
  rows = [line for line in done.stdout.splitlines()
          if line.startswith("gpt2")]
  assert len(rows) == 2 and "too far" not in done.stdout
  assert shell("parity.py", "--families=elmo").returncode == 2
