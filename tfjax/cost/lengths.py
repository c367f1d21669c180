# SPDX-License-Identifier: Apache-2.0
"""How many tokens an objective reads, computes on and predicts.

All follow from the config alone: shapes are fixed, so that nothing compiles
twice and FLOPs are known before a run.
"""

import dataclasses

from tfjax import config as config_lib


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Tokens of one example.

  Attributes:
    window: what is read: raw text, or at most so much of a pair.
    encoder, decoder: inputs of the stacks, padding included; 0: no such stack.
    predicted: positions on which the head runs.
    expected: the mean number of those whose loss counts; None where that
      depends on the text.
    prefix: the decoder sees a prefix of 1 to window - 1 tokens whole, each
      length of it as likely.

  Raises:
    ValueError: a length is no length.
  """

  window: int
  encoder: int
  decoder: int
  predicted: int
  expected: float | None
  prefix: bool = False

  def __post_init__(self) -> None:
    for field, least in (("window", 1), ("encoder", 0), ("decoder", 0),
                         ("predicted", 0)):
      if not least <= getattr(self, field) < float("inf"):
        raise ValueError(f"lengths.{field} is {getattr(self, field)}; it must "
                         f"be at least {least}, and finite")


def of(config: config_lib.ExperimentConfig) -> Lengths:
  """The lengths of a config's examples.

  Raises:
    ConfigError: the window is too short for the objective, or learned
      positions do not reach as far as it needs.
  """
  objective, length = config.objective, config.model.context_length
  if objective.name == "causal":
    return _causal(objective, length)
  if objective.name == "masked":
    count = max(1, round(objective.mask_rate * length))
    return Lengths(length, length, 0, count,
                   None if objective.whole_words else count)
  if objective.corruption == "pairs":
    source = objective.source_length or length
    return _within_positions(
        Lengths(source + length, source, length, length, None), config,
        "objective.source_length", "set it to that or less")
  if objective.corruption == "spans":
    noise, spans = noise_spans(objective, length)
    return _within_positions(
        Lengths(length, length - noise + spans + 1, noise + spans + 1,
                noise + spans + 1, noise + spans + 1), config,
        "objective.mean_span", "use longer spans, so that the text shrinks by "
        "more than the sentinels and the end add")
  return Lengths(length, length, length, length, length)


def noise_spans(objective: config_lib.ObjectiveConfig,
                length: int) -> tuple[int, int]:
  """Tokens that span corruption takes from a window, and in how many spans.

  As `random_spans_noise_mask` of the code released with Raffel et al. 2020
  has it: 568 tokens give 85 in 28 spans, which makes inputs of 512 and targets
  of 114 with their ends.

  Raises:
    ConfigError: not every span would have a token, and one before it that is
      kept.
  """
  noise = min(max(round(length * objective.noise_density), 1), length - 1)
  spans = max(round(noise / objective.mean_span), 1)
  if spans > min(noise, length - noise):
    raise config_lib.ConfigError(
        "objective.noise_density", f"{objective.noise_density:g} of a window "
        f"of {length} tokens is {noise} in {spans} spans, and {length - noise} "
        "tokens are left to be kept between those; lower it, or raise "
        "objective.mean_span or model.context_length")
  return noise, spans


def _causal(objective: config_lib.ObjectiveConfig, length: int) -> Lengths:
  if not objective.prefix_lm:
    return Lengths(length, 0, length, length, length)
  if length < 2:
    raise config_lib.ConfigError(
        "objective.prefix_lm", "splits a window in two; raise "
        "model.context_length to 2 or more")
  # A prefix of p tokens, 1 <= p < length, leaves length + 1 - p to predict.
  return Lengths(length, 0, length, length, length / 2 + 1, prefix=True)


def _within_positions(lengths: Lengths, config: config_lib.ExperimentConfig,
                      key: str, remedy: str) -> Lengths:
  most = config.model.context_length
  longest = max(lengths.encoder, lengths.decoder)
  if config.model.positions == "learned" and longest > most:
    raise config_lib.ConfigError(
        key, f"makes a stack's input {longest} tokens long, and the model has "
        f"learned positions for model.context_length={most}; {remedy}, or "
        "choose other positions")
  return lengths
