# SPDX-License-Identifier: Apache-2.0
"""What a run of ours has trained, read back from its directory."""

from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
from typing import Any
import warnings

from flax import linen as nn
import jax
import orbax.checkpoint as ocp

from tfjax import config as config_lib
from tfjax.cost import budget
from tfjax.cost import card
from tfjax.data import store as store_lib
from tfjax.data import tokenizers
from tfjax.data import vocabulary as vocabulary_lib
from tfjax.hub import errors
from tfjax.hub import huggingface
from tfjax.hub import settings as settings_lib
from tfjax.models import transformer
from tfjax.train import checkpoints
from tfjax.train import records


@dataclasses.dataclass(frozen=True)
class Run:
  """A run's model.

  Attributes:
    config: its config, with the vocabulary's size.
    step: the checkpoint's.
    params: on the first device.
    vocabulary: the roles of its tokens.
    tokenizer: of its corpus, without what the objective adds.
    record: what is known of the run, as result.json has it; of one that has
      not ended, what its config says.
  """

  config: config_lib.ExperimentConfig
  step: int
  params: dict
  vocabulary: vocabulary_lib.Vocabulary
  tokenizer: tokenizers.Tokenizer
  record: Mapping[str, Any]

  def token_ids(self) -> dict[str, int]:
    """Special tokens by the names that config.json has for them, but for
    those that follow from the model's config."""
    separator = self.vocabulary.separator
    ids = dict(bos_token_id=separator, eos_token_id=separator,
               pad_token_id=self.vocabulary.pad,
               decoder_start_token_id=self.vocabulary.start)
    fixed = settings_lib.fixed_token_ids(self.config.model)
    return {name: value for name, value in ids.items() if name not in fixed}

  def prompt_tokenizer(self) -> tokenizers.Tokenizer:
    """With the objective's tokens, and the separator where the model expects
    one: sources end with it, all else begins with it.

    Raises:
      DataError: the tokenizer cannot give the objective's tokens their ids.
    """
    return self.tokenizer.extended(
        self.vocabulary.mask, self.vocabulary.sentinels,
        separator_first=self.config.model.architecture != "encoder_decoder")

  def save(self, directory: str | os.PathLike[str], **options: Any) -> None:
    """Writes a Hugging Face directory; `options` are those of `hub.save`.

    Its README.md is the model card; one that is there already is kept.

    Raises:
      HubError, DataError: as `hub.save` and `prompt_tokenizer`; the record
        is damaged.
    """
    try:
      text = card.model_card({**self.record, "checkpoint_step": self.step})
    except ValueError as error:
      raise errors.HubError(f"the run's result.json is damaged ({error}); "
                            "without it the run can still be saved") from error
    tokenizer = self.prompt_tokenizer()
    huggingface.save(self.config.model, self.params, directory,
                     token_ids=self.token_ids(), **options)
    tokenizer.save(directory)
    readme = pathlib.Path(directory) / "README.md"
    if not readme.exists():
      readme.write_text(text, encoding="utf-8")
    fixed = settings_lib.fixed_token_ids(self.config.model)
    padding = fixed.get("pad_token_id", self.vocabulary.pad)
    if padding != self.vocabulary.pad:
      warnings.warn(
          f"transformers takes token {padding} for padding in models of the "
          f"family {self.config.model.family!r}, which is {self.vocabulary.pad}"
          " here: in texts that have this token it counts positions otherwise",
          stacklevel=2)
    if self.config.objective.prefix_lm:
      warnings.warn(
          "the run was trained to see a prefix whole (objective.prefix_lm), "
          "which config.json cannot say: transformers will read it causally",
          stacklevel=2)


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
    HubError: there is no checkpoint, config.json is none of ours, or the
      token store is gone and the corpus no longer gives the same one.
    ConfigError, DataError: the token store and the corpus are gone.
  """
  directory = pathlib.Path(directory)
  try:
    config = config_lib.from_dict(json.loads(
        (directory / "config.json").read_bytes()))
  except (OSError, ValueError) as error:
    raise errors.HubError(
        f"{directory / 'config.json'} is no run's config ({error})") from error
  step = checkpoints.newest_sound(directory / "checkpoints")
  if step is None:
    raise errors.HubError(f"{directory} has no checkpoint that is whole")
  checkpoint = directory / "checkpoints" / str(step)
  tokenizer = _store(config.data, checkpoint).tokenizer()
  vocabulary = vocabulary_lib.of(config, tokenizer)
  config = budget.with_vocabulary(config, vocabulary.size)
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  params = checkpoints.weights_of(checkpoint, jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
      nn.meta.unbox(transformer.abstract_parameters(
          transformer.create(config.model)))))
  return Run(config, step, params, vocabulary, tokenizer,
             _record(directory, config))


def _record(directory: pathlib.Path,
            config: config_lib.ExperimentConfig) -> dict[str, Any]:
  try:
    result = records.read_result(directory)
  except records.RecordError as error:  # the weights may be sound
    return unfinished(config, directory.resolve().name) | dict(
        status="unknown", status_reason=str(error))
  return result or unfinished(config, directory.resolve().name)


def unfinished(config: config_lib.ExperimentConfig,
               run_id: str) -> dict[str, Any]:
  """What is known of a run that has no result yet; config: complete."""
  counts = transformer.count_parameters(config.model)
  return dict(
      run_id=run_id, status="unfinished", family=config.model.family,
      objective=config.objective.name, seed=config.seed,
      params_total=counts.total, params_embedding=counts.embedding,
      params_non_embedding=counts.non_embedding, params_head=counts.head,
      params_active=counts.total, vocab_size=config.model.vocab_size,
      corpus=config.data.corpus, tokenizer=config.data.tokenizer.kind,
      init_from=config.init_from)


def _store(config: config_lib.DataConfig,
           checkpoint: pathlib.Path) -> store_lib.TokenStore:
  """The token store of a checkpoint, whatever the corpus is by now."""
  name = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(
      (checkpoint / "counters").resolve())["store"]
  path = pathlib.Path(config.cache_dir).expanduser() / name
  if path.exists():
    return store_lib.open_store(path)
  store = store_lib.build(config)
  if store.path.name != name:
    raise errors.HubError(
        f"the corpus has changed since {checkpoint} was saved: its token "
        f"store was {name}, and now it would be {store.path.name}; restore "
        f"the corpus, or the store as {path}")
  return store
