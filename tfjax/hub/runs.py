# SPDX-License-Identifier: Apache-2.0
"""What a run of ours has trained, read back from its directory."""

import dataclasses
import json
import os
import pathlib
from typing import Any

from flax import linen as nn
import jax
import orbax.checkpoint as ocp

from tfjax import config as config_lib
from tfjax.cost import budget
from tfjax.data import store as store_lib
from tfjax.data import vocabulary as vocabulary_lib
from tfjax.hub import errors
from tfjax.models import transformer


@dataclasses.dataclass(frozen=True)
class Run:
  """A run's model.

  Attributes:
    config: its config, with the vocabulary's size.
    step: the checkpoint's.
    params: on the first device.
    vocabulary: the roles of its tokens.
    tokenizer: the directory of its tokenizer.
  """

  config: config_lib.ExperimentConfig
  step: int
  params: dict
  vocabulary: vocabulary_lib.Vocabulary
  tokenizer: pathlib.Path

  def token_ids(self) -> dict[str, int]:
    """Special tokens by the names that config.json has for them."""
    separator = self.vocabulary.separator
    return dict(bos_token_id=separator, eos_token_id=separator,
                pad_token_id=self.vocabulary.pad,
                decoder_start_token_id=self.vocabulary.start)


def find(directory: str | os.PathLike[str]) -> pathlib.Path | None:
  """The run directory that this is, or the only one in it; None: it is none.

  Raises:
    HubError: there are several.
  """
  directory = pathlib.Path(directory)
  if (directory / "checkpoints").is_dir():
    return directory
  found = sorted(path.parent for path in directory.glob("*/checkpoints"))
  if len(found) > 1:
    raise errors.HubError(
        f"{directory} holds {len(found)} runs; name one of them, such as "
        f"{found[0]}")
  return found[0] if found else None


def load(directory: str | os.PathLike[str]) -> Run:
  """The model of a run directory's newest checkpoint.

  Raises:
    HubError: there is no checkpoint, or config.json is none of ours.
    ConfigError, DataError: the corpus, and with it the tokenizer, is gone.
  """
  directory = pathlib.Path(directory)
  try:
    config = config_lib.from_dict(json.loads(
        (directory / "config.json").read_bytes()))
  except (OSError, ValueError) as error:
    raise errors.HubError(
        f"{directory / 'config.json'} is no run's config ({error})") from error
  steps = [int(path.name) for path in (directory / "checkpoints").iterdir()
           if path.name.isdigit()]
  if not steps:
    raise errors.HubError(f"{directory} has no checkpoint yet")
  store = store_lib.build(config.data)
  vocabulary = vocabulary_lib.of(config, store.tokenizer())
  config = budget.with_vocabulary(config, vocabulary.size)
  params = _restore(directory / "checkpoints" / str(max(steps)) / "state",
                    config.model)
  return Run(config, max(steps), params, vocabulary,
             store.path / "tokenizer")


def _restore(path: pathlib.Path, model: config_lib.ModelConfig) -> Any:
  """The parameters alone, without the optimizer's state."""
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  target = {"params": jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
      nn.meta.unbox(transformer.abstract_parameters(
          transformer.create(model))))}
  return ocp.PyTreeCheckpointer().restore(
      path.resolve(), args=ocp.args.PyTreeRestore(
          item=target, partial_restore=True,
          restore_args=ocp.checkpoint_utils.construct_restore_args(target))
  )["params"]
