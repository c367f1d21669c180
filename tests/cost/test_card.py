# SPDX-License-Identifier: Apache-2.0
"""A model card says what the record says, and nothing that it does not."""

import dataclasses
import html.parser
import json
import math
import re
from typing import Any

import pytest
import yaml

from tfjax import cost
from tfjax.cost import card
from tfjax.train import records

RECORD: dict[str, Any] = dict(
    run_id="gpt2-85M-1.7e9-tokens-0123", status="complete", family="gpt2",
    objective="causal", seed=3, params_total=123_550_464,
    params_embedding=38_500_000, params_non_embedding=85_050_464,
    params_head=0, params_active=123_550_464, tokens_seen=1_700_000_000,
    tokens_planned=1_700_000_000, unique_tokens=850_000_000, epochs=2.0,
    steps=3242, batch_tokens=524_288, flops_total=1.4567e18,
    flops_convention="matmul+attention_full",
    flops_by_component={"decoder/feed_forward": 5.5e17, "head": 3.9e17},
    flops_by_convention={"6N_total": 1.26e18}, loss=3.141593,
    loss_stderr=0.0021, bits_per_byte=1.0734, train_loss=3.05,
    loss_counts="every token", corpus="files", tokenizer="bpe",
    vocab_size=50_257, bytes_per_token=4.22, device_kind="NVIDIA H100",
    device_count=8, process_count=1, mesh={"data": 8}, mfu=0.4123,
    peak_flops_per_second=989.4e12, peak_source="a data sheet",
    tokens_per_second=2.5e6, wall_seconds=800.0, compile_seconds=40.0,
    step_seconds=680.0, goodput=0.85, device_seconds=5440.0,
    occupied_device_seconds=6400.0, hardware="h100", price_usd=5.33,
    price_source="chip-hours x 3 USD", energy_kwh=1.2444,
    energy_source="estimated: chip-hours x TDP 700 W", region="FRA", pue=1.2,
    co2e_kg=0.0837, co2e_source="energy x PUE x 0.056 kg/kWh", init_from=None,
    resumes=0, config_hash="0123", code_version="abcdef+",
    packages={"jax": "0.10.2", "flax": "0.12.8"}, python_version="3.11.2",
    started_at="2026-01-01T00:00:00+00:00",
    finished_at="2026-01-01T00:13:20+00:00")


def split(text: str) -> tuple[dict[str, Any], str]:
  """The header, read as YAML, and what follows it."""
  _, header, body = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
  return yaml.safe_load(header), body


def rows(text: str) -> dict[str, str]:
  """The tables' cells; of equal names the last."""
  found = {}
  for line in split(text)[1].splitlines():
    cells = re.split(r"(?<!\\)\|", line)
    if len(cells) == 4:
      found[cells[1].strip()] = cells[2].strip()
  return found


def changed(**fields: Any) -> str:
  return card.model_card({**RECORD, **fields})


def test_numbers_of_the_record_are_in_the_card() -> None:
  found = rows(card.model_card(RECORD))
  for name, value in {
      "Family": "gpt2", "Parameters": "123,550,464",
      "of them elsewhere": "85,050,464", "Corpus": "files",
      "Tokens read in training": "1,700,000,000",
      "Unique tokens": "850,000,000", "Epochs": "2", "Steps": "3,242",
      "Batch": "524,288 tokens", "Seed": "3",
      "Started from": "random weights", "Training FLOPs": "1.457e+18",
      "Convention": "matmul+attention_full",
      "by convention, 6N_total": "1.26e+18 FLOPs",
      "in decoder/feed_forward": "5.5e+17 FLOPs",
      "Model FLOPs utilisation (MFU)": "41.2%",
      "Peak that it is of": "9.894e+14 FLOP/s a device",
      "Wall time": "800 s", "in it, compiling": "40 s",
      "in it, waiting for data": "unknown",
      "Goodput (share of it in training steps)": "85%",
      "Devices": "8", "as JAX calls them": "NVIDIA H100", "Processes": "1",
      "Mesh": "data 8",
      "Price": "5.33 USD", "Energy": "1.244 kWh", "Region": "FRA",
      "CO2e": "0.0837 kg", "Loss on held-out text": "3.14159 nats a token",
      "its standard error": "0.0021 nats", "Bits a byte": "1.0734",
      "What counts": "every token", "Code": "abcdef+",
      "Packages": "jax 0.10.2, flax 0.12.8"}.items():
    assert found[name] == value, name
  text = card.model_card(RECORD)
  for source in ("peak", "price", "energy", "co2e"):
    assert f"| how it was obtained | {RECORD[f'{source}_source']} |" in text
  assert cost.model_card(RECORD) == text


def test_the_header_is_what_the_hub_reads() -> None:
  """huggingface.co/docs/hub/model-cards-co2: emissions are grams."""
  header, _ = split(card.model_card(RECORD))
  assert header == {
      "tags": ["tfjax", "scaling", "gpt2", "causal"],
      "co2_eq_emissions": {
          "emissions": 83.7,
          "source": "CO2e: energy x PUE x 0.056 kg/kWh; energy: estimated: "
                    "chip-hours x TDP 700 W",
          "training_type": "pre-training",
          "geographical_location": "France (FRA)",
          "hardware_used": "h100, 8 devices"}}
  again, _ = split(changed(init_from="/runs/other", region="gcp:gone"))
  assert again["co2_eq_emissions"]["training_type"] == "fine-tuning"
  assert again["co2_eq_emissions"]["geographical_location"] == "gcp:gone"
  assert "co2_eq_emissions" not in split(changed(co2e_kg=None))[0]


@pytest.mark.parametrize("kg", [0.0, 1e-10, 3.3e-7, 0.25, 539e3, 2.5e15])
def test_grams_are_a_number_whatever_their_size(kg: float) -> None:
  emissions = split(changed(co2e_kg=kg))[0]["co2_eq_emissions"]["emissions"]
  assert not isinstance(emissions, str)
  assert emissions == pytest.approx(1000 * kg, rel=1e-5)


@pytest.mark.parametrize("fields,sentence", [
    (dict(status="diverged", status_reason="loss of 20 at step 7"),
     "**The run is not complete but diverged**: loss of 20 at step 7."),
    (dict(status="interrupted", tokens_seen=100),
     "It has read 100 of 1,700,000,000 planned tokens."),
    (dict(epochs=2.0), "Text was repeated: 2 epochs."),
    (dict(bad_steps=3, rollbacks=1),
     "Bad steps were met: 3, rolled back: 1."),
    (dict(resumes=2), "It was interrupted and resumed: 2."),
    (dict(init_from="/runs/other"), "that it started from is not counted."),
    (dict(branched_from="longest", branch_step=2000),
     "It branched off longest after step 2,000: time, price, energy and CO2e "
     "are of the steps after that, tokens and FLOPs of all."),
    (dict(ensemble_members=8),
     "It trained in one step with others, 8 runs in all: times, device time, "
     "price, energy and CO2e are its share of what all took."),
    (dict(loss=None), "Its loss is unknown."),
    (dict(mfu=None), "Its MFU is unknown, as a peak or a rate is."),
    (dict(price_usd=None), "Its price is unknown."),
    (dict(energy_kwh=None), "Its energy is unknown."),
    (dict(energy_source="0.5 kWh measured; 2 device-hours estimated"),
     "Its energy was not measured, or not all of it."),
    (dict(co2e_kg=None), "Its CO2e is unknown."),
    (dict(pue=None), "Its CO2e is without what the building draws"),
    (dict(checkpoint_step=3000),
     "The weights are of step 3,000, the numbers above of step 3,242."),
])
def test_limits_are_what_the_record_shows(
    fields: dict[str, Any], sentence: str) -> None:
  flawless = dict(epochs=1.0, energy_source="measured: RAPL")
  assert sentence not in changed(**flawless)
  text = changed(**{**flawless, **fields})
  assert sentence in text[text.index("## Limits"):text.index("## Provenance")]


def test_a_branch_says_nothing_of_what_made_its_model() -> None:
  """In the header, which is of the model: its own CO2e is of its last steps."""
  assert "co2_eq_emissions" in changed()
  assert "co2_eq_emissions" not in changed(branched_from="longest")


def test_an_old_record_is_unknown_in_what_it_lacks() -> None:
  found = rows(card.model_card(dict(run_id="a", status="complete")))
  assert found.pop("Status") == "complete"
  assert set(found.values()) == {"unknown", "---", ""}
  old = {**RECORD, "flops_matmul": 1e18, "flops_attention": 2e17}
  for name in ("flops_by_component", "flops_by_convention"):
    del old[name]
  assert rows(card.model_card(old))["in attention"] == "2e+17 FLOPs"


def test_a_record_of_ours_in_every_field() -> None:
  """As the dataclass has it, and as result.json has it, NaN being null."""
  record = dataclasses.asdict(records.RunRecord(**{**RECORD, "loss": math.nan}))
  text = card.model_card(record)
  assert rows(text)["Loss on held-out text"] == "unknown"
  assert card.model_card(json.loads(json.dumps(
      records.finite(record)))) == text


@pytest.mark.parametrize("fields,name", [
    (dict(run_id=None), "run_id"), (dict(run_id=""), "run_id"),
    (dict(status=None), "status"), (dict(energy_kwh=-1.0), "energy_kwh"),
    (dict(co2e_kg="7"), "co2e_kg"), (dict(seed=True), "seed"),
    (dict(corpus=7), "corpus"), (dict(mesh="data"), "mesh"),
    (dict(flops_by_component={"head": -1.0}), "head")])
def test_what_is_no_record_is_refused(
    fields: dict[str, Any], name: str) -> None:
  with pytest.raises(ValueError, match=name):
    changed(**fields)


class Tags(html.parser.HTMLParser):
  """The tags that a browser would see."""

  def __init__(self) -> None:
    super().__init__()
    self.found: list[str] = []

  def handle_starttag(self, tag: str, attrs: Any) -> None:
    self.found.append(tag)


WICKED = ("a | b\n\n# c\r\n---\nx: y\u2028<script>alert(1)</script> [l](u) "
          "`d` **e** \\| _f_ $g$ ![h](i) \x00\x1b[31m \"j\" 'k' \ud800 "
          "\U0001f600")


@pytest.mark.parametrize("name", [
    "run_id", "status", "status_reason", "family", "objective", "corpus",
    "energy_source", "co2e_source", "region", "hardware", "peak_source",
    "host_cpu", "init_from", "sweep"])
def test_odd_names_stay_text(name: str) -> None:
  plain = changed(**{name: "plain"})
  text = changed(**{name: WICKED})
  text.encode("utf-8")
  header, body = split(text)
  # As many lines, headings, cells and columns as with a plain name.
  def shape(text: str) -> list[Any]:
    return [(line[:2], len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)))
            for line in split(text)[1].splitlines()]
  assert shape(text) == shape(plain)
  assert set(header) == {"tags", "co2_eq_emissions"}
  for mark in ("<script", "[l]", "`d`", "**e**", " _f_", "$g$", "![h]"):
    assert mark not in re.sub(r"\\.", "", body)
  parser = Tags()
  parser.feed(re.sub(r"\\.", "", body))
  assert parser.found == []
  if name in ("family", "objective", "region", "hardware"):
    assert "a | b # c --- x: y" in json.dumps(header)
  assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\ud800]", text)


def test_odd_keys_and_packages_stay_text() -> None:
  text = changed(flops_by_component={WICKED: 1.0}, packages={WICKED: WICKED},
                 mesh={WICKED: 8})
  assert "<script" not in re.sub(r"\\.", "", split(text)[1])
  assert len(text.splitlines()) == len(changed(
      flops_by_component={"a": 1.0}).splitlines())
