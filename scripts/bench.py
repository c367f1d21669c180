# SPDX-License-Identifier: Apache-2.0
"""How fast this machine trains: tfjax beside transformers' GPT-2 in torch.

    scripts/bench.py [--shapes=i,ii,iii] [--rounds=3] [--cores=1] [--json=FILE]
    scripts/bench.py --generate
    scripts/bench.py --scale [--json=FILE]
    scripts/bench.py --fit [--json=FILE]
    scripts/bench.py --ensemble [--json=FILE]
    scripts/bench.py --peak [--json=FILE]
    scripts/bench.py --device=gpu [--shapes=124M,350M,1.3B] [--json=FILE]

Every contender is a process of its own, pinned to the same cores, with the
same GPT-2 shape, batch and float32; short bursts of steps are taken in turn,
so that a machine whose speed drifts is the same machine for all of them. Rates
are tokens a second of CPU time on one core, of wall time on several. The
`bench` extra brings torch and transformers; without them tfjax is measured
alone. Shape `loss` is the head and its cross-entropy by themselves, in tfjax's
chunked form and as written, values and gradients. Shapes `generate-...` are
greedy generation with a key-value cache (scripts/bench_generation.py): rates
are of new tokens, in the time of prompts and new tokens together. `--scale` is
what meshes, depth, restarts, input and checkpoints cost (bench_scale.py),
`--fit` how fast laws are fitted, beside scipy and vpnls (bench_fit.py),
`--ensemble` how fast runs train in one step (bench_ensemble.py),
`--peak` what the devices of this host reach in matrix products and memory
bandwidth, kept in ~/.cache/tfjax/peaks.json (or TFJAX_PEAKS) as the peak where
no vendor states one (bench_peak.py), and `--device` utilisation of an
accelerator (bench_device.py).
"""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# pylint: disable=wrong-import-position
from absl import app
from absl import flags

from tfjax import config as config_lib
from tfjax.cost import flops as flops_lib
from tfjax.cost import lengths as lengths_lib
from tfjax.train import tuning

_SHAPES = flags.DEFINE_list(
    "shapes", None, "which to measure; unset: all of training, or all of "
    "generation")
_GENERATE = flags.DEFINE_bool("generate", False, "measure generation")
_SCALE = flags.DEFINE_bool(
    "scale", False, "measure what scale costs, on simulated devices")
_FIT = flags.DEFINE_bool("fit", False, "measure fits of scaling laws")
_ENSEMBLE = flags.DEFINE_bool(
    "ensemble", False, "measure runs that train in one step")
_PEAK = flags.DEFINE_bool(
    "peak", False, "measure and keep what the devices of this host reach")
_DEVICE = flags.DEFINE_string(
    "device", "", "gpu or tpu: measure utilisation of the accelerators here")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "bursts of each contender")
_CORES = flags.DEFINE_integer("cores", 1, "cores that a contender may use")
_STEPS = flags.DEFINE_integer("steps", 0, "steps a burst; 0: by the shape")
_CONTENDERS = flags.DEFINE_list(
    "contenders", ["tfjax", "transformers"], "who is measured")
_JSON = flags.DEFINE_string("json", "", "also write the figures here")
_SERVE = flags.DEFINE_string("serve", "", "internal: CONTENDER:SHAPE")


@dataclasses.dataclass(frozen=True)
class Shape:
  """A GPT-2: width, layers, heads, length, batch, vocabulary; steps a burst.

  Without layers it is the head and the loss alone. With new tokens a step
  generates so many after a prompt of the length.
  """

  d_model: int
  num_layers: int
  num_heads: int
  context_length: int
  batch_size: int
  vocab_size: int
  burst_steps: int
  new_tokens: int = 0

  @property
  def batch_tokens(self) -> int:
    return self.batch_size * (self.new_tokens or self.context_length)


SHAPES = {
    "i": Shape(128, 4, 4, 256, 16, 512, 6),
    "ii": Shape(256, 6, 8, 256, 16, 8192, 2),
    "iii": Shape(384, 8, 6, 512, 8, 50257, 1),
    "loss": Shape(256, 0, 1, 512, 8, 50257, 1),
    "generate-small-1": Shape(256, 6, 8, 32, 1, 8192, 4, new_tokens=128),
    "generate-small-8": Shape(256, 6, 8, 32, 8, 8192, 2, new_tokens=128),
    "generate-gpt2-1": Shape(768, 12, 12, 32, 1, 50257, 1, new_tokens=64),
    "generate-gpt2-8": Shape(768, 12, 12, 32, 8, 50257, 1, new_tokens=64),
}
LOSSES = ("chunked", "plain")  # contenders at shape "loss"


def experiment(shape: Shape) -> config_lib.ExperimentConfig:
  """The shape as a tfjax experiment: GPT-2 blocks, AdamW, no clipping."""
  config = config_lib.default()
  for name in ("d_model", "num_layers", "num_heads", "vocab_size"):
    config.model[name] = getattr(shape, name)
  config.model.context_length = shape.context_length + shape.new_tokens
  config.train.batch_size = shape.batch_size
  config.optimizer.schedule = "constant"
  config.optimizer.clip_norm = None
  config.duration.steps = 1000
  return config_lib.resolve(config)


# --- Contenders: each makes a function that takes one step on a batch ---------


def batches(shape: Shape) -> Iterator[Any]:
  """Token windows with a Zipf-like spread, the same for everybody."""
  import numpy as np
  rng = np.random.default_rng(0)
  weights = 1 / (np.arange(shape.vocab_size) + 10.0)
  while True:
    yield rng.choice(
        shape.vocab_size, (shape.batch_size, shape.context_length + 1),
        p=weights / weights.sum()).astype(np.int32)


def tfjax_step(shape: Shape) -> Callable[[Any], Callable[[], float]]:
  """The train step that `tfjax.train.run` uses."""
  import jax
  import numpy as np
  from tfjax.models import inputs as inputs_lib
  from tfjax.objectives import loss as loss_lib
  from tfjax.train import optimizers
  from tfjax.train import sharding
  from tfjax.train import step as step_lib
  config = experiment(shape)
  cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
  if cache:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  mesh = sharding.make_mesh(config)
  steps = step_lib.steps_for(config, mesh)
  state = steps.init(jax.random.key(0),
                     optimizers.make_hyperparameters(config.optimizer, 1000))
  weights = np.ones((shape.batch_size, shape.context_length), np.float32)

  def step(windows):
    nonlocal state
    batch = step_lib.put(mesh, loss_lib.Batch(
        inputs_lib.Inputs(windows[:, :-1]), windows[:, 1:], weights))
    state, metrics = steps.compiled_train(batch)(state, batch)
    return lambda: float(metrics["loss"])
  return step


def transformers_step(shape: Shape) -> Callable[[Any], Callable[[], float]]:
  """transformers' GPT2LMHeadModel with torch's AdamW."""
  os.environ["HF_HUB_OFFLINE"] = "1"
  import torch
  import transformers
  torch.set_num_threads(tuning.available_cores())
  torch.manual_seed(0)
  model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
      vocab_size=shape.vocab_size, n_positions=shape.context_length,
      n_embd=shape.d_model, n_layer=shape.num_layers, n_head=shape.num_heads,
      resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))
  model.train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3,
                                betas=(0.9, 0.95), weight_decay=0.1)

  def step(windows):
    tokens = torch.from_numpy(windows).long()
    logits = model(tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, shape.vocab_size), tokens[:, 1:].reshape(-1))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    value = loss.item()
    return lambda: value
  return step


def loss_step(form: str, shape: Shape) -> Callable[
    [Any], Callable[[], float]]:
  """The loss, and the gradients of hidden states and head."""
  import jax
  import numpy as np
  from tfjax.objectives import cross_entropy
  function = {
      "chunked": functools.partial(cross_entropy.loss_sum, "cpu"),
      "plain": lambda *x: cross_entropy.reference(*x).sum()}[form]
  rng = np.random.default_rng(0)
  rows = (shape.batch_size, shape.context_length)
  hidden = rng.standard_normal((*rows, shape.d_model), np.float32)
  head = 0.02 * rng.standard_normal(
      (shape.vocab_size, shape.d_model), np.float32)
  weights = np.ones(rows, np.float32)
  gradient = jax.jit(jax.value_and_grad(
      lambda hidden, head, targets: function(
          hidden, head, None, targets, weights), argnums=(0, 1)))

  def step(windows):
    loss, _ = jax.block_until_ready(gradient(hidden, head, windows[:, 1:]))
    return lambda: float(loss) / shape.batch_tokens
  return step


def gemm_step(shape: Shape) -> Callable[[Any], Callable[[], float]]:
  """No model: one float32 product of two 2048 x 2048 matrices a step."""
  del shape
  import jax
  import jax.numpy as jnp
  x = jax.random.normal(jax.random.key(0), (_GEMM, _GEMM))
  product = jax.jit(jnp.matmul)

  def step(windows):
    del windows
    result = product(x, x).block_until_ready()
    return lambda: float(result[0, 0])
  return step


_GEMM = 2048
_GEMM_STEPS = 20
MAKERS = {"tfjax": tfjax_step, "transformers": transformers_step,
          "gemm": gemm_step,
          **{form: functools.partial(loss_step, form) for form in LOSSES}}


def make_step(contender: str, shape: Shape) -> Callable[
    [Any], Callable[[], float]]:
  if shape.new_tokens and contender != "gemm":
    import bench_generation
    return getattr(bench_generation, f"{contender}_step")(
        experiment(shape).model, shape.new_tokens)
  return MAKERS[contender](shape)


# --- A contender's process ---------------------------------------------------


def serve(contender: str, shape: Shape) -> None:
  """Makes the step, then runs a burst for every line on standard input."""
  protocol = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  begin = time.perf_counter()
  step = make_step(contender, shape)
  source = batches(shape)
  step(next(source))()
  say(protocol, first_step_seconds=time.perf_counter() - begin)
  for line in sys.stdin:
    ready = [next(source) for _ in range(int(line))]
    wall, usage = time.perf_counter(), resource.getrusage(
        resource.RUSAGE_SELF)
    previous = None
    for windows in ready:
      result = step(windows)
      if previous:
        previous()
      previous = result
    loss = previous()
    after = resource.getrusage(resource.RUSAGE_SELF)
    say(protocol, wall=time.perf_counter() - wall, loss=loss,
        cpu=(after.ru_utime - usage.ru_utime +
             after.ru_stime - usage.ru_stime),
        faults=after.ru_minflt - usage.ru_minflt,
        peak_bytes=after.ru_maxrss * 1024)


def say(protocol: Any, **values: Any) -> None:
  protocol.write(json.dumps(values) + "\n")
  protocol.flush()


class Contender:
  """The driver's end of a contender's process."""

  def __init__(self, name: str, shape: str, cores: int,
               cache: str | None = None):
    environment = dict(os.environ)
    environment.update(tuning.process_environment(
        config_lib.RuntimeConfig(),
        cores=cores if name not in ("gemm", "transformers") else 1))
    environment["OMP_NUM_THREADS"] = str(cores)
    if cache is not None:
      environment["JAX_COMPILATION_CACHE_DIR"] = cache
    ours = sorted(os.sched_getaffinity(0))[:cores]
    self.begin = time.perf_counter()
    self.process = subprocess.Popen(
        [sys.executable, __file__, f"--serve={name}:{shape}"],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, ours))
    self.first = self._read()
    self.start_seconds = time.perf_counter() - self.begin

  def burst(self, steps: int) -> dict[str, Any]:
    self.process.stdin.write(f"{steps}\n")
    self.process.stdin.flush()
    return {**self._read(), "steps": steps}

  def close(self) -> None:
    self.process.stdin.close()
    self.process.wait()

  def _read(self) -> dict[str, Any]:
    line = self.process.stdout.readline()
    if not line:
      raise RuntimeError(f"{self.process.args[2]} died; run it by hand to see")
    return json.loads(line)


# --- The measurement ---------------------------------------------------------


def flops_per_token(shape: Shape) -> float:
  if not shape.num_layers:
    return 6.0 * shape.d_model * shape.vocab_size
  config = experiment(shape)
  training = flops_lib.training_flops_per_token(
      config.model, lengths_lib.of(config)).total
  return training / 3 if shape.new_tokens else training  # forward only


def measure(name: str, contenders: list[str], cores: int) -> dict[str, Any]:
  """All contenders at one shape, in turn, and the GEMM rate in between."""
  shape = SHAPES[name]
  running = {"gemm": Contender("gemm", name, cores)}
  with tempfile.TemporaryDirectory() as cache:
    starts = {}
    for who in contenders:
      running[who] = Contender(who, name, cores, cache)
      starts[who] = dict(cold=running[who].start_seconds)
    if "tfjax" in running:
      again = Contender("tfjax", name, cores, cache)
      starts["tfjax"]["cached"] = again.start_seconds
      again.close()
  bursts = {who: [] for who in running}
  for _ in range(_ROUNDS.value + 1):  # the first round warms up
    for who in random.sample(list(running), len(running)):
      steps = _GEMM_STEPS if who == "gemm" else (
          _STEPS.value or shape.burst_steps)
      bursts[who].append(running[who].burst(steps))
  for contender in running.values():
    contender.close()
  kind = "cpu" if cores == 1 else "wall"
  seconds = {who: [b[kind] / b["steps"] for b in rows[1:]]
             for who, rows in bursts.items()}
  gemm = 2 * _GEMM**3 / statistics.median(seconds["gemm"])
  flops = flops_per_token(shape)
  table = {}
  for who in contenders:
    median = statistics.median(seconds[who])
    rate = shape.batch_tokens / median
    table[who] = dict(
        tokens_per_second=rate, step_seconds=median,
        step_seconds_min=min(seconds[who]), step_seconds_max=max(seconds[who]),
        achieved_flops=rate * flops, share_of_gemm=rate * flops / gemm,
        first_step_cold_seconds=starts[who]["cold"],
        first_step_cached_seconds=starts[who].get("cached"),
        page_faults_per_step=statistics.median(
            b["faults"] / b["steps"] for b in bursts[who][1:]),
        peak_bytes=max(b["peak_bytes"] for b in bursts[who]))
  figures = dict(shape=dataclasses.asdict(shape), cores=cores, time=kind,
                 gemm_flops=gemm, contenders=table)
  if shape.new_tokens:
    # A burst's result is the last step's checksum of its tokens.
    figures["same_tokens"] = 1 == len(
        {tuple(b["loss"] for b in bursts[who]) for who in contenders})
  return figures


def print_table(name: str, figures: dict[str, Any]) -> None:
  """One shape as a table on the terminal."""
  import rich.console
  import rich.table
  shape = figures["shape"]
  title = (f"{name}: d {shape['d_model']}, {shape['num_layers']} layers, "
           f"length {shape['context_length']}, batch {shape['batch_size']}, "
           f"vocabulary {shape['vocab_size']}; {figures['cores']} core(s), "
           f"{figures['time']} time; GEMM "
           f"{figures['gemm_flops'] / 1e9:.0f} GFLOP/s")
  table = rich.table.Table(title=title, title_justify="left")
  for heading in ("", "tokens/s", "ms/step", "GFLOP/s", "of GEMM",
                  "first step", "cached", "faults/step", "peak MB"):
    table.add_column(heading, justify="right" if heading else "left")
  for who, row in figures["contenders"].items():
    cached = row["first_step_cached_seconds"]
    table.add_row(
        who, f"{row['tokens_per_second']:.0f}",
        f"{row['step_seconds'] * 1e3:.0f}",
        f"{row['achieved_flops'] / 1e9:.1f}", f"{row['share_of_gemm']:.0%}",
        f"{row['first_step_cold_seconds']:.1f} s",
        f"{cached:.1f} s" if cached else "",
        f"{row['page_faults_per_step']:.0f}",
        f"{row['peak_bytes'] / 1e6:.0f}")
  console = rich.console.Console(width=110)
  console.print(table)
  rates = {who: row["tokens_per_second"]
           for who, row in figures["contenders"].items()}
  ours = next(iter(rates))
  for who, rate in rates.items():
    if who != ours:
      console.print(f"{ours} / {who}: {rates[ours] / rate:.2f}" + (
          "" if figures.get("same_tokens", True) else
          " (their tokens differ)"))


def write_json(figures: dict[str, Any]) -> None:
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(json.dumps(figures, indent=1) + "\n")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  if _SERVE.value:
    contender, shape = _SERVE.value.split(":")
    serve(contender, SHAPES[shape])
  elif _DEVICE.value:
    measure_device()
  elif _SCALE.value:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    tuning.restart_tuned(config_lib.RuntimeConfig())
    import bench_scale
    write_json(bench_scale.main(_ROUNDS.value))
  elif _PEAK.value:
    tuning.restart_tuned(config_lib.RuntimeConfig())
    import bench_peak
    write_json(bench_peak.main())
  elif _ENSEMBLE.value:
    import bench_ensemble
    write_json(bench_ensemble.main(_ROUNDS.value))
  elif _FIT.value:
    import bench_fit
    write_json(bench_fit.main(_ROUNDS.value))
  else:
    compare()


def measure_device() -> None:
  import jax
  import bench_device
  if jax.default_backend() != _DEVICE.value:
    sys.exit(f"JAX has no {_DEVICE.value} here, but {jax.default_backend()}; "
             "is the extra for it installed?")
  models = _SHAPES.value or [name for name, (_, goal) in
                             bench_device.MODELS.items() if goal]
  write_json(bench_device.main(models, _ROUNDS.value))


def compare() -> None:
  """tfjax beside the other contenders, shape by shape."""
  contenders = list(_CONTENDERS.value)
  if "transformers" in contenders and not all(
      importlib.util.find_spec(m) for m in ("torch", "transformers")):
    print("torch or transformers is not installed (pip install -e '.[bench]');"
          " measuring tfjax alone")
    contenders.remove("transformers")
  load = os.getloadavg()[0]
  print(f"{platform.processor() or platform.machine()}, "
        f"{tuning.available_cores()} cores, load {load:.2f} at the start")
  results = {}
  for name in _SHAPES.value or [
      name for name in SHAPES if bool(SHAPES[name].new_tokens) ==
      _GENERATE.value]:
    who = contenders if SHAPES[name].num_layers else list(LOSSES)
    results[name] = measure(name, who, _CORES.value)
    print_table(name, results[name])
  write_json(dict(load=load, shapes=results))


if __name__ == "__main__":
  app.run(main)
