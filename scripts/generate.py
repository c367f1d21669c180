# SPDX-License-Identifier: Apache-2.0
"""Continues prompts, answers sources, or fills masks with a trained model.

    scripts/generate.py --model=DIR --prompt="Once upon a time" \
        [--prompt=... ] [--temperature=0.8] [--top_p=0.95] [--num_beams=4]

DIR is a run directory of scripts/train.py (or what holds one), whose newest
checkpoint is taken, or a Hugging Face directory with tokenizer.json. Without
--prompt every line of standard input is one. In a prompt the names of special
tokens are these tokens: a masked model fills what has [MASK] (or the
tokenizer's own mask token), a run's sentinels are <extra_id_0>, <extra_id_1>,
... What a directory's generation_config.json asks for beside special tokens is
not applied: options are this command's. Exits with 2 where something cannot be
used.
"""

import dataclasses
import json
import pathlib
import sys
import time
from typing import Any, Callable, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

# pylint: disable=wrong-import-position
from absl import app
from absl import flags
from absl import logging as absl_logging
import jax
import tokenizers as hf

from tfjax import commandline
from tfjax import config as config_lib
from tfjax import hub
from tfjax.data import corpora
from tfjax.data import tokenizers
from tfjax.hub import huggingface
from tfjax.hub import runs
from tfjax.models import decoding
from tfjax.models import search
from tfjax.models import transformer

_MODEL = flags.DEFINE_string("model", None, "run or Hugging Face directory",
                             required=True)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "text; may be repeated")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "at most")
_NUM_BEAMS = flags.DEFINE_integer("num_beams", 1, "of beam search; 1: none")
_LENGTH_PENALTY = flags.DEFINE_float(
    "length_penalty", 1.0, "of beam search: above 1 favours long answers")
_TEMPERATURE = flags.DEFINE_float("temperature", None,
                                  "sample; unset: the likeliest token")
_TOP_K = flags.DEFINE_integer(
    "top_k", None, "sample from the k likeliest; answers shown for a mask")
_TOP_P = flags.DEFINE_float("top_p", None, "sample from this much probability")
_SEED = flags.DEFINE_integer("seed", 0, "of the sampling")
_JSON = flags.DEFINE_bool("json", False, "print one JSON object")


@dataclasses.dataclass(frozen=True)
class Model:
  """A model and its text.

  Attributes:
    encode, decode: text -> tokens, as the model was trained to see them, and
      back.
    stops, pad, start, mask: special tokens; start is a decoder's first.
    prefix_lm: the prompt is seen whole.
  """

  config: config_lib.ModelConfig
  params: dict
  encode: Callable[[str], list[int]]
  decode: Callable[[Sequence[int]], str]
  stops: tuple[int, ...]
  pad: int
  start: int | None
  mask: int | None
  prefix_lm: bool = False


def main(arguments: list[str]) -> int:
  if len(arguments) > 1:
    return commandline.refuse(f"unknown argument {arguments[1]!r}")
  absl_logging.set_verbosity(absl_logging.WARNING)
  _keep_compiled()
  try:
    directory = pathlib.Path(_MODEL.value)
    run_dir = runs.find(directory)
    model = _from_run(run_dir) if run_dir else _from_hub(directory)
    prompts = _PROMPT.value or [line.rstrip("\n") for line in sys.stdin]
    tokens = [model.encode(prompt) for prompt in prompts]
    module = transformer.create(model.config, jax.default_backend())
    answer = _fill if model.config.architecture == "encoder" else _generate
    results, figures = answer(model, module, tokens)
  except (hub.HubError, config_lib.ConfigError, corpora.DataError,
          search.GenerationError, OSError) as error:
    return commandline.refuse(error)
  results = [dict(prompt=prompt) | result
             for prompt, result in zip(prompts, results)]
  if _JSON.value:
    print(json.dumps(dict(results=results) | figures))
  else:
    _show(results, figures)
  return 0


def _keep_compiled() -> None:
  """Programs are kept where training keeps its own."""
  cache = config_lib.RuntimeConfig().compilation_cache_dir
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir",
                      str(pathlib.Path(cache).expanduser()))


# --- Models ------------------------------------------------------------------


def _from_run(directory: pathlib.Path) -> Model:
  run = runs.load(directory)
  vocabulary = run.vocabulary
  return _with_text(
      run.prompt_tokenizer().pipeline(), vocabulary.separator,
      config=run.config.model, params=run.params,
      stops=(vocabulary.separator,), pad=vocabulary.pad,
      start=vocabulary.start, mask=vocabulary.mask,
      prefix_lm=run.config.objective.prefix_lm)


def _from_hub(directory: pathlib.Path) -> Model:
  config, params = hub.load(directory)
  try:
    pipeline = hf.Tokenizer.from_file(str(directory / "tokenizer.json"))
  except Exception as error:  # the library raises nothing narrower
    raise corpora.DataError(
        f"{directory / 'tokenizer.json'} cannot be read ({error}); text needs "
        "the model's tokenizer there") from error
  pipeline.no_padding()
  pipeline.no_truncation()
  settings = huggingface.read_settings(directory)
  if (directory / "generation_config.json").is_file():
    said = huggingface.read_settings(directory, "generation_config.json")
    settings |= {k: v for k, v in said.items() if v is not None}
  names = tokenizers.named_tokens(directory)

  def ids(role: str) -> list[int]:
    found = settings.get(f"{role}_id")
    if found is None:
      found = pipeline.token_to_id(names.get(role, ""))
    found = found if isinstance(found, list) else [found]
    found = [one for one in found if one is not None]
    if not all(type(one) is int for one in found):
      raise hub.HubError(f"{directory}: {role}_id is {found!r}; it must be "
                         "int, or a list of them")
    return found

  stops = tuple(ids("eos_token"))
  return _with_text(
      pipeline, *ids("bos_token"), config=config, params=params, stops=stops,
      pad=(*ids("pad_token"), *stops, 0)[0],
      start=(*ids("decoder_start_token"), None)[0],
      mask=(*ids("mask_token"), None)[0])


def _with_text(pipeline: hf.Tokenizer, *first: int, **fields: Any) -> Model:
  """The model, whose answers show special tokens but for stops, padding and
  what comes first."""
  special = {i for i, token in pipeline.get_added_tokens_decoder().items()
             if token.special}
  hidden = special & {*first, *fields["stops"], fields["pad"],
                      fields["start"]}

  def decode(ids: Sequence[int]) -> str:
    return pipeline.decode([i for i in ids if i not in hidden],
                           skip_special_tokens=False)
  return Model(encode=lambda text: pipeline.encode(text).ids, decode=decode,
               **fields)


# --- Answers -----------------------------------------------------------------


def _generate(model: Model, module: transformer.Transformer,
              prompts: list[list[int]]) -> tuple[list[dict], dict[str, Any]]:
  settings = search.Settings(
      max_new_tokens=_MAX_NEW_TOKENS.value, num_beams=_NUM_BEAMS.value,
      temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value,
      length_penalty=_LENGTH_PENALTY.value, seed=_SEED.value,
      stop_tokens=model.stops, pad_token=model.pad,
      start_token=(model.start if model.config.architecture ==
                   "encoder_decoder" else None),
      prefix_lm=model.prefix_lm)
  compiling = decoding.warm_up(module, model.params, prompts, settings)
  made = decoding.generate(module, model.params, prompts, settings)
  read = sum(map(len, prompts))
  # The first token of each row comes with the prompt.
  new = int(made.lengths.sum()) - len(prompts)
  results = [dict(text=model.decode(row), tokens=row, score=float(score))
             for row, score in zip(made.rows(), made.scores)]
  return results, dict(
      compile_seconds=compiling, prefill_tokens=read,
      prefill_seconds=made.prefill_seconds,
      prefill_tokens_per_second=read / made.prefill_seconds,
      decode_tokens=new, decode_seconds=made.decode_seconds,
      decode_tokens_per_second=new / made.decode_seconds)


def _fill(model: Model, module: transformer.Transformer,
          prompts: list[list[int]]) -> tuple[list[dict], dict[str, Any]]:
  if model.mask is None:
    raise search.GenerationError("model", "names no mask token")
  seconds = []
  for _ in range(2):  # the first compiles
    begin = time.perf_counter()
    filled = decoding.fill_mask(module, model.params, prompts, model.mask,
                                top_k=_TOP_K.value or 5)
    seconds.append(time.perf_counter() - begin)
  results = [dict(masks=[
      dict(position=one.position, answers=[
          dict(text=model.decode([token]), token=token, probability=p)
          for token, p in zip(one.tokens, one.probabilities)])
      for one in row]) for row in filled]
  return results, dict(compile_seconds=seconds[0] - seconds[1],
                       fill_seconds=seconds[1])


def _show(results: list[dict], figures: dict[str, Any]) -> None:
  for result in results:
    print(f"> {result['prompt']}")
    for mask in result.get("masks", ()):
      print("  ".join(f"{answer['text'].strip()} {answer['probability']:.3f}"
                      for answer in mask["answers"]))
    if "text" in result:
      print(result["text"])
    print()
  if "fill_seconds" in figures:
    print(f"filled in {figures['fill_seconds']:.3f} s", end="")
  else:
    print(*(f"{name}: {figures[f'{key}_tokens']} tokens in "
            f"{figures[f'{key}_seconds']:.3f} s, "
            f"{figures[f'{key}_tokens_per_second']:,.0f} tokens/s"
            for name, key in (("prompts", "prefill"),
                              ("generation", "decode"))), sep="; ", end="")
  print(f"; compiled before in {figures['compile_seconds']:.1f} s")


if __name__ == "__main__":
  app.run(main)
