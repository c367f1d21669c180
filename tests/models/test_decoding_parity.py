# SPDX-License-Identifier: Apache-2.0
"""Generated tokens are those of transformers' `generate`, one by one."""

import dataclasses
import os
from typing import Any

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# pylint: disable=wrong-import-position
from tfjax import hub
from tfjax.models import decoding
from tfjax.models import search as search_lib
from tfjax.models import transformer

VOCAB, PAD, START = 61, 1, 2
NEW = 40
PROMPTS = [np.random.default_rng(n).integers(10, VOCAB, n).tolist()
           for n in (3, 17, 1, 30, 11)]
# (configuration class, model class, its settings, scale of the embeddings, of
# other weights): scales at which random models say something, not one token
# for ever.
MODELS = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", dict(
        n_embd=40, n_layer=2, n_head=4, n_positions=96), 0.3, 0.6),
    "llama": ("LlamaConfig", "LlamaForCausalLM", dict(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, intermediate_size=56,
        max_position_embeddings=96), 0.3, 0.6),
    "t5": ("T5Config", "T5ForConditionalGeneration", dict(
        d_model=40, num_layers=2, num_heads=4, d_kv=12, d_ff=56,
        relative_attention_num_buckets=8, relative_attention_max_distance=20),
           3.0, 0.2),
    "bart": ("BartConfig", "BartForConditionalGeneration", dict(
        d_model=40, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=56, decoder_ffn_dim=56, max_position_embeddings=96),
             1.0, 0.2),
}
SEARCHES = {
    "greedy": {},
    "greedy with stops": dict(stops=True),
    "beams": dict(num_beams=4, stops=True, length_penalty=0.8),
    "beams, early": dict(num_beams=3, stops=True, length_penalty=0.3,
                         early_stopping=True),
}
MORE_SEARCHES = {
    "beams without stops": dict(num_beams=4),
    "beams, short": dict(num_beams=3, stops=True, length_penalty=-0.5),
    "beams, patient": dict(num_beams=4, stops=True, length_penalty=0.5,
                           early_stopping="never"),
}


@dataclasses.dataclass(frozen=True)
class Pair:
  """A model of theirs, the same of ours, and tokens that both stop at."""

  theirs: Any
  ours: transformer.Transformer
  params: dict
  start: int | None
  stops: tuple[int, ...]


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory: pytest.TempPathFactory) -> Pair:
  torch.set_num_threads(1)
  config, model, fields, embedding, scale = MODELS[request.param]
  theirs = getattr(transformers, model)(getattr(transformers, config)(
      vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=START, eos_token_id=7,
      attn_implementation="eager", **fields)).eval()
  # Else theirs adds what this model is released with, such as BART's forced
  # last token.
  theirs.generation_config = transformers.GenerationConfig()
  if theirs.config.is_encoder_decoder:
    theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.clone())
    theirs.config.tie_word_embeddings = False
  generator = torch.Generator().manual_seed(4)
  with torch.no_grad():
    for name, weight in theirs.named_parameters():
      norm = "norm" in name or "ln_" in name
      if name.endswith(("shared.weight", "wte.weight", "embed_tokens.weight")):
        size = embedding
      elif "lm_head" in name:
        size = 0.4
      elif name.endswith("bias"):
        size = 0.05
      else:
        size = 1.0 if "position" in name or "wpe" in name else scale
      if "encoder_attn.out" in name or "EncDecAttention.o" in name:
        size *= 0.3  # the source must not decide alone
      weight.copy_(float(norm and name.endswith("weight")) +
                   size * torch.randn(weight.shape, generator=generator))
  directory = tmp_path_factory.mktemp(request.param)
  theirs.save_pretrained(directory)
  config, params = hub.load(directory)
  start = START if config.architecture == "encoder_decoder" else None
  rows, _ = generated(theirs, search_lib.Settings(
      max_new_tokens=NEW, pad_token=PAD, start_token=start))
  # Told apart by their prompts, and not one token for ever.
  assert len({tuple(row) for row in rows}) == len(PROMPTS)
  assert np.mean([len(set(row)) for row in rows]) > 6
  return Pair(theirs, transformer.create(config), params, start,
              (rows[1][20], rows[3][12]))


def generated(theirs: Any, settings: search_lib.Settings) -> tuple[
    list[list[int]], np.ndarray | None]:
  """Their new tokens, each row up to its stop token, and beams' scores."""
  decoder = settings.start_token is None
  longest = max(map(len, PROMPTS))
  rows = np.full((len(PROMPTS), longest), PAD)
  mask = np.zeros_like(rows)
  for row, prompt in enumerate(PROMPTS):
    place = (slice(longest - len(prompt), None) if decoder
             else slice(len(prompt)))
    rows[row, place], mask[row, place] = prompt, 1
  made = theirs.generate(
      torch.from_numpy(rows), attention_mask=torch.from_numpy(mask),
      generation_config=transformers.GenerationConfig(
          max_new_tokens=NEW, do_sample=False, num_beams=settings.num_beams,
          length_penalty=settings.length_penalty,
          early_stopping=settings.early_stopping, pad_token_id=PAD,
          eos_token_id=list(settings.stop_tokens) or None,
          decoder_start_token_id=settings.start_token,
          return_dict_in_generate=True, output_scores=True))
  new = made.sequences[:, longest if decoder else 1:].tolist()
  ends = [[i for i, token in enumerate(row) if token in settings.stop_tokens]
          for row in new]
  new = [row[:end[0] + 1] if end else row for row, end in zip(new, ends)]
  scores = getattr(made, "sequences_scores", None)
  return new, None if scores is None else scores.numpy()


def check(pair: Pair, how: dict[str, Any]) -> None:
  fields = {k: v for k, v in how.items() if k != "stops"}
  settings = search_lib.Settings(
      max_new_tokens=NEW, pad_token=PAD, start_token=pair.start,
      stop_tokens=pair.stops if how.get("stops") else (), **fields)
  made = decoding.generate(pair.ours, pair.params, PROMPTS, settings)
  rows, scores = generated(pair.theirs, settings)
  assert made.rows() == rows
  lengths = set(map(len, rows))
  assert len(lengths) > 1 if how.get("stops") else lengths == {NEW}
  if scores is not None:
    np.testing.assert_allclose(made.scores, scores, rtol=1e-4)


@pytest.mark.parametrize("search", SEARCHES)
def test_tokens_are_those_of_transformers(pair: Pair, search: str) -> None:
  check(pair, SEARCHES[search])


@pytest.mark.parametrize("pair", ["gpt2"], indirect=True)
@pytest.mark.parametrize("search", MORE_SEARCHES)
def test_beam_search_ends_as_that_of_transformers(
    pair: Pair, search: str) -> None:
  check(pair, MORE_SEARCHES[search])
