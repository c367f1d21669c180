# SPDX-License-Identifier: Apache-2.0
"""Converts a model to a Hugging Face directory that transformers loads.

    scripts/convert.py --source=DIR --target=DIR
    scripts/convert.py --source=DIR --info

The source is a Hugging Face directory (a pickle becomes safetensors, shards
change size), or a run directory of scripts/train.py (or what holds one), whose
newest checkpoint is taken with its tokenizer and the objective's tokens. The
model card comes along, README.md: of a run, what its record says. --info tells
what the source is and writes nothing. Exits 2 where something cannot be
converted.
"""

import pathlib
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

# pylint: disable=wrong-import-position
from absl import app
from absl import flags
from absl import logging

from tfjax import commandline
from tfjax import config as config_lib
from tfjax import hub
from tfjax.data import corpora
from tfjax.hub import huggingface
from tfjax.hub import runs
from tfjax.models import transformer

_SOURCE = flags.DEFINE_string("source", None, "what is converted",
                              required=True)
_TARGET = flags.DEFINE_string("target", None, "directory that is written")
_INFO = flags.DEFINE_bool("info", False, "describe the source")
_DTYPE = flags.DEFINE_enum("dtype", "float32",
                           ["float32", "bfloat16", "float16"],
                           "of the weights that are written")
_ALLOW_PICKLE = flags.DEFINE_bool(
    "allow_pickle", False, "read pytorch_model.bin (with torch's weights_only)")
_MAX_SHARD_BYTES = flags.DEFINE_integer(
    "max_shard_bytes", 5_000_000_000, "larger models are cut into files",
    lower_bound=1)


def main(arguments: list[str]) -> int:
  if len(arguments) > 1:
    return commandline.refuse(f"unknown argument {arguments[1]!r}")
  if _INFO.value == (_TARGET.value is not None):
    return commandline.refuse("give either --target or --info")
  logging.set_verbosity(logging.WARNING)
  source = pathlib.Path(_SOURCE.value)
  try:
    if _INFO.value:
      print("\n".join(_description(source)))
    else:
      _convert(source, pathlib.Path(_TARGET.value))
      print(f"written: {_TARGET.value}")
  except (hub.HubError, config_lib.ConfigError, corpora.DataError,
          OSError) as error:
    return commandline.refuse(error)
  return 0


def _convert(source: pathlib.Path, target: pathlib.Path) -> None:
  form = dict(dtype=_DTYPE.value, max_shard_bytes=_MAX_SHARD_BYTES.value)
  if run_dir := runs.find(source):
    runs.load(run_dir).save(target, **form)
    return
  config, params = hub.load(source, allow_pickle=_ALLOW_PICKLE.value)
  hub.save(config, params, target, tokenizer=source, token_ids={
      name: value for name, value in huggingface.read_settings(source).items()
      if name.endswith("_token_id")}, **form)
  if (source / "generation_config.json").is_file():
    shutil.copy(source / "generation_config.json", target)
  card = source / "README.md"
  if card.is_file() and not (target / card.name).exists():
    shutil.copy(card, target)


def _description(source: pathlib.Path) -> list[str]:
  """A line a fact."""
  if run_dir := runs.find(source):
    run = runs.load(run_dir)
    model, kind = run.config.model, f"run, checkpoint of step {run.step}"
  else:
    model = hub.read_config(source, allow_pickle=_ALLOW_PICKLE.value)
    kind = "Hugging Face directory"
  counts = transformer.count_parameters(model)
  layers = (f"{model.num_encoder_layers} + {model.num_layers}"
            if model.architecture == "encoder_decoder" else model.num_layers)
  lines = [("source", kind), ("family", model.family),
           ("architecture", model.architecture), ("layers", layers)]
  lines += [(name, getattr(model, name)) for name in (
      "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff",
      "vocab_size", "context_length", "tie_embedding")]
  lines += [(f"parameters, {name}", f"{count:,}") for name, count in (
      ("embedding", counts.embedding),
      ("non-embedding", counts.non_embedding), ("head", counts.head),
      ("total", counts.total))]
  return [f"{name:<28}{value}" for name, value in lines]


if __name__ == "__main__":
  app.run(main)
