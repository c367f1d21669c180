# SPDX-License-Identifier: Apache-2.0
"""Run directories of a made-up study whose law is known."""

import json
import pathlib
from typing import Any, Callable

import numpy as np
import pytest

_REFDATA = (pathlib.Path(__file__).resolve().parents[2] / ".." / "shared"
            / "refdata")
TRUTH = {"E": 1.5, "A": 20.0, "B": 120.0, "alpha": 0.3, "beta": 0.4}
SIZES = tuple(np.geomspace(3e4, 1e6, 5).round().astype(int).tolist())
TOKENS = tuple(np.geomspace(2e5, 4e6, 4).round().astype(int).tolist())
CONVENTION = "6 N D + 12 L T d_model D"


def true_loss(params: float, tokens: float) -> float:
  return (TRUTH["E"] + TRUTH["A"] / params**TRUTH["alpha"]
          + TRUTH["B"] / tokens**TRUTH["beta"])


def flops(params: float, tokens: float) -> float:
  """Attention costs more a parameter in small models."""
  return (6 + 400 / params**0.5) * params * tokens


def write_run(directory: pathlib.Path, params: int, tokens: int,
              loss: float | None, **changes: Any) -> pathlib.Path:
  """One run's files, as training writes them."""
  directory.mkdir(parents=True)
  steps = 60
  fractions = np.geomspace(1 / steps, 1, steps)
  noise = np.random.default_rng(params + tokens)
  rows = [{
      "kind": "train", "step": k + 1, "tokens": float(tokens * f),
      "flops": float(flops(params, tokens) * f),
      "loss": float(true_loss(params, tokens * f)
                    + 0.02 * noise.standard_normal()),
      "learning_rate": 1e-3, "grad_norm": 1.0, "seconds": 0.1,
      "tokens_per_second": 1e4} for k, f in enumerate(fractions)]
  if loss is not None:
    rows.append({"kind": "evaluation", "step": steps, "tokens": tokens,
                 "flops": flops(params, tokens), "loss": loss,
                 "loss_stderr": 0.004, "bits_per_byte": loss / 2})
  (directory / "metrics.jsonl").write_text(
      "".join(json.dumps(row) + "\n" for row in rows))
  (directory / "config.json").write_text("{}")
  total = flops(params, tokens)
  record = {
      "run_id": directory.name, "sweep": "study", "status": "complete",
      "status_reason": None, "family": "decoder", "objective": "causal",
      "seed": 0, "params_total": params, "params_embedding": params // 4,
      "params_non_embedding": params - params // 4, "params_head": 0,
      "params_active": params, "tokens_seen": tokens,
      "unique_tokens": tokens, "epochs": 1.0, "steps": steps,
      "batch_tokens": tokens // steps, "flops_total": total,
      "flops_matmul": 6.0 * params * tokens,
      "flops_attention": total - 6.0 * params * tokens, "flops_head": 0.0,
      "flops_recompute": 0.0, "flops_convention": CONVENTION, "loss": loss,
      "loss_stderr": 0.004, "train_loss": loss, "bits_per_byte":
      None if loss is None else loss / 2, "tokenizer": "bpe-1024",
      "vocab_size": 1024, "bytes_per_token": 3.1, "corpus": "sotu",
      "entropy_rate": None, "device_kind": "cpu", "device_count": 1,
      "device_seconds": total / 2e10, "tokens_per_second": 1e4, "mfu": None,
      "energy_kwh": None, "energy_source": None, "co2e_kg": None,
      "co2e_source": None, "config_hash": "0123456789ab",
      "code_version": "abc1234", "packages": {"jax": "0.10.0"},
      "python_version": "3.11.9", "host_cpu": "a processor",
      "started_at": "2025-01-01T00:00:00+00:00",
      "finished_at": "2025-01-01T00:01:00+00:00"}
  (directory / "result.json").write_text(json.dumps(record | changes))
  return directory


@pytest.fixture
def write_ledger(
    tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
  """write_ledger(noise=0.0, sizes=..., tokens=..., seed=0, **changes)."""
  def write(noise: float = 0.0, sizes: tuple[int, ...] = SIZES,
            tokens: tuple[int, ...] = TOKENS, seed: int = 0,
            name: str = "study", **changes: Any) -> pathlib.Path:
    rng = np.random.default_rng(seed)
    for n in sizes:
      for d in tokens:
        loss = true_loss(n, d) * float(np.exp(noise * rng.standard_normal()))
        write_run(tmp_path / name / f"n{n}-d{d}", n, d, loss, **changes)
    return tmp_path / name
  return write


@pytest.fixture
def paid() -> dict[str, Any]:
  """What a record says of an hour on two devices; 300 s are accounted for by
  nothing."""
  return {
      "wall_seconds": 3600.0, "startup_seconds": 120.0,
      "compile_seconds": 180.0, "input_seconds": 60.0, "step_seconds": 2520.0,
      "evaluation_seconds": 240.0, "checkpoint_seconds": 90.0,
      "lost_seconds": 90.0, "goodput": 0.7, "device_count": 2,
      "occupied_device_seconds": 7200.0, "hardware": "a-chip",
      "peak_flops_per_second": 2e11, "peak_source": "its data sheet",
      "mfu": 0.25, "price_usd": 3.0, "price_source": "1.5 US$ an hour",
      "energy_kwh": 0.5, "energy_source": "TDP 250 W", "region": "a-land",
      "pue": 1.2, "co2e_kg": 0.12, "co2e_source": "0.2 kg a kWh"}


@pytest.fixture(name="write_run")
def write_run_fixture() -> Callable[..., pathlib.Path]:
  return write_run


@pytest.fixture
def truth() -> dict[str, float]:
  return TRUTH


@pytest.fixture(name="tables")
def tables_fixture() -> Callable[[str], pathlib.Path]:
  """The folder of a published study's tables; without them the test skips."""
  def find(study: str) -> pathlib.Path:
    directory = _REFDATA / study
    if not directory.is_dir():
      pytest.skip(f"the tables of {study} are not at {directory}")
    return directory
  return find
