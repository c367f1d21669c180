# SPDX-License-Identifier: Apache-2.0
"""A checkpoint goes into its shards without being in memory whole."""

import json
import os
import pathlib
import subprocess
import sys

from flax import linen as nn
import jax
import numpy as np
import pytest

from tfjax import config as config_lib
from tfjax import hub
from tfjax.models import transformer

CONFIG = config_lib.complete_model(config_lib.ModelConfig(
    family="gpt2", d_model=512, num_layers=6, num_heads=8, vocab_size=48_000,
    context_length=64))
LARGEST = 48_000 * 512 * 4

# Anonymous memory: pages of the file that is mapped are the kernel's to drop.
MEASURE = """
import gc, json, sys, threading, time
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from flax import linen as nn
from tfjax import hub

def anonymous():
  with open("/proc/self/status") as file:
    return next(int(line.split()[1]) * 1024 for line in file
                if line.startswith("RssAnon"))

class Peak(threading.Thread):
  def run(self):
    self.bytes, self.on = anonymous(), True
    while self.on:
      self.bytes = max(self.bytes, anonymous())
      time.sleep(0.0005)

mesh = Mesh(np.array(jax.devices()), ("data",))

def shardings(boxed):
  def one(x):
    axis = max((i for i, n in enumerate(x.shape) if n % 8 == 0),
               key=lambda i: x.shape[i], default=None)
    return NamedSharding(mesh, P(*[
        "data" if i == axis else None for i in range(len(x.shape))]))
  return jax.tree.map(one, nn.meta.unbox(boxed))

OPTIONS = dict(sharded=dict(shardings=shardings), whole={},
               scanned=dict(shardings=shardings, scan_layers=True))
directory, name = sys.argv[1:]
hub.read_config(directory)  # what is traced and imported once
gc.collect()
before = anonymous()
peak = Peak()
peak.start()
config, params = hub.load(directory, **OPTIONS[name])
jax.block_until_ready(params)
peak.on = False
peak.join()
shards = [shard.data.nbytes for x in jax.tree.leaves(params)
          for shard in x.addressable_shards]
print(json.dumps(dict(extra=peak.bytes - before - sum(shards),
                      shards=sum(shards), largest=max(shards))))
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A checkpoint of random numbers, in files of at most 60 MB or a tensor."""
  random = np.random.default_rng(0)
  params = jax.tree.map(
      lambda x: random.random(x.shape, np.float32),
      nn.meta.unbox(transformer.abstract_parameters(
          transformer.create(CONFIG))))
  path = tmp_path_factory.mktemp("checkpoint")
  hub.save(CONFIG, params, path, max_shard_bytes=60_000_000)
  return path


@pytest.mark.parametrize("how", ["sharded", "scanned", "whole"])
def test_beside_the_shards_there_is_little_more_than_the_largest_tensor(
    directory: pathlib.Path, how: str) -> None:
  measured = json.loads(subprocess.run(
      [sys.executable, "-c", MEASURE, str(directory), how], check=True,
      stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(
          pathlib.Path(__file__).parents[2])}).stdout)
  total = transformer.count_parameters(CONFIG).total * 4
  assert measured["shards"] == total > 150e6
  # A device's part of the largest tensor is an eighth of it.
  assert measured["largest"] == (LARGEST if how == "whole" else LARGEST // 8)
  assert 0 < measured["extra"] < 1.3 * LARGEST, measured
