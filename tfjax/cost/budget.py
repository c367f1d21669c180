# SPDX-License-Identifier: Apache-2.0
"""What a config amounts to: parameters, steps, tokens, epochs and FLOPs.

Known before anything runs. What depends on how much text there is (unique
tokens, epochs) takes the training split's examples, which the token store
tells; without them it is unknown.
"""

import dataclasses
import math

from tfjax import config as config_lib
from tfjax.cost import flops as flops_lib
from tfjax.cost import lengths as lengths_lib
from tfjax.data import batches as batches_lib
from tfjax.models import transformer


@dataclasses.dataclass(frozen=True)
class Budget:
  """The size of a run. Tokens are training tokens that are read (of a masked
  model all of a window, not only the predicted), FLOPs training FLOPs.
  `predicted_tokens`: those whose loss counts, None where the text tells.
  `unique_tokens`, `epochs`: None where no data was looked at."""

  params_total: int
  params_embedding: int
  params_non_embedding: int
  params_head: int
  steps: int
  batch_tokens: int
  tokens: int
  predicted_tokens: float | None
  unique_tokens: int | None
  epochs: float | None
  tokens_per_parameter: float
  flops: flops_lib.Flops

  @property
  def flops_total(self) -> float:
    return self.flops.total

  @property
  def flops_per_token(self) -> float:
    return self.flops.total / self.tokens


def plan(config: config_lib.ExperimentConfig,
         windows: batches_lib.TextWindows | batches_lib.PairWindows | None
         ) -> Budget:
  """Derives a run's size from its config and the training split's examples.

  A duration given in anything but steps is rounded up to whole steps. Pairs
  differ in length: their tokens and epochs are worked out from the mean, and
  their FLOPs from the padded lengths that are computed.

  Args:
    windows: None: nothing is known of the data, nor of how often it is passed
      over.

  Raises:
    ConfigError: more tokens are asked for than data.max_epochs passes give,
      or data.unique_tokens is more than there is; or there are no windows and
      the config `needs_data`.
  """
  if windows is None and (needed := needs_data(config)):
    raise config_lib.ConfigError(*needed)
  counts = transformer.count_parameters(config.model)
  lengths = lengths_lib.of(config)
  length, unique = lengths.window, None
  if windows is not None:
    available = windows.num_tokens
    if available != lengths.window * len(windows):
      length = available / len(windows)
    unique = length * batches_lib.used_windows(windows,
                                               config.data.unique_tokens)
  per_token = flops_lib.training_flops_per_token(config.model, lengths) * (
      lengths.window / length)
  batch_tokens = config.train.batch_size * length
  wanted, key = _wanted_tokens(
      config.duration, batch_tokens, unique, counts.total, per_token.total)
  steps = max(1, math.ceil(wanted / batch_tokens))
  tokens = round(steps * batch_tokens)
  epochs = None if unique is None else tokens / unique
  if unique is not None:
    _check_epochs(config, key, wanted, tokens, unique)
  return Budget(
      params_total=counts.total,
      params_embedding=counts.embedding,
      params_non_embedding=counts.non_embedding,
      params_head=counts.head,
      steps=steps,
      batch_tokens=round(batch_tokens),
      tokens=tokens,
      predicted_tokens=(None if lengths.expected is None else
                        steps * config.train.batch_size * lengths.expected),
      unique_tokens=None if unique is None else min(round(unique), tokens),
      epochs=epochs,
      tokens_per_parameter=tokens / counts.total,
      flops=per_token * tokens,
  )


def needs_data(config: config_lib.ExperimentConfig) -> tuple[str, str] | None:
  """The key and the reason why the budget takes the data, or None.

  For a `ConfigError`: what stands where there is none.
  """
  if config.duration.epochs is not None:
    return ("duration.epochs", "is worth as many tokens as the data holds, and "
            "they were not looked at; set duration.tokens or duration.steps")
  if config.objective.corruption == "pairs" and config.data.target_field:
    return ("data.target_field", "pairs differ in length, so that their tokens "
            "follow from the data, which were not looked at")
  return None


def _check_epochs(config: config_lib.ExperimentConfig, key: str,
                  wanted: float, tokens: int, unique: float) -> None:
  """Raises where the data would be passed over too often."""
  epochs = tokens / unique
  # Rounding up to whole steps may pass the limit by less than one batch.
  if wanted > config.data.max_epochs * unique:
    raise config_lib.ConfigError(
        f"duration.{key}", f"asks for {tokens:,} tokens, {epochs:.3g} epochs "
        f"of the {round(unique):,} that there are; ask for at most "
        f"{int(config.data.max_epochs * unique):,} tokens, or allow the "
        f"repetition with data.max_epochs={math.ceil(epochs)}")


def with_vocabulary(
    config: config_lib.ExperimentConfig, vocab_size: int,
) -> config_lib.ExperimentConfig:
  """The config with the embedding's rows set from the vocabulary's size.

  Raises:
    ConfigError: model.vocab_size is set and too small.
  """
  given = config.model.vocab_size
  if given is not None and given < vocab_size:
    raise config_lib.ConfigError(
        "model.vocab_size", f"{given} is less than the {vocab_size} ids of the "
        "tokenizer and what the objective adds; leave it unset, or at least "
        f"{vocab_size}")
  return dataclasses.replace(config, model=dataclasses.replace(
      config.model, vocab_size=given or vocab_size))


def _wanted_tokens(
    duration: config_lib.DurationConfig, batch_tokens: float,
    unique: float | None, params: int, flops_per_token: float) -> tuple[float, str]:
  """The tokens that the one field that is set asks for, and its name."""
  tokens_of = {
      "steps": lambda value: value * batch_tokens,
      "tokens": lambda value: value,
      "epochs": lambda value: value * unique,
      "tokens_per_parameter": lambda value: value * params,
      "flops": lambda value: value / flops_per_token,
  }
  (key, value), = ((name, getattr(duration, name)) for name in tokens_of
                   if getattr(duration, name) is not None)
  wanted = tokens_of[key](value)
  # A quotient that another budget printed must not gain a step by rounding.
  whole = round(wanted)
  return (whole if math.isclose(wanted, whole, rel_tol=1e-12) else wanted), key
