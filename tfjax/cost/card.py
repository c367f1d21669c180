# SPDX-License-Identifier: Apache-2.0
"""A model card of a run: Markdown that says what its record says.

Nothing is computed or measured here. What the record does not know is shown
as unknown, and what it shows against the model is among its limits.
"""

from collections.abc import Mapping, Sequence
import json
import math
import re
from typing import Any
import unicodedata

from tfjax import config as config_lib
from tfjax.cost import regions

UNKNOWN = "unknown"
Rows = Sequence[tuple[str, str]]  # what, and its value as Markdown


def model_card(record: Mapping[str, Any]) -> str:
  """The model card of a run, with the header that Hugging Face's hub reads.

  The header's fields are those of huggingface.co/docs/hub/model-cards and, of
  CO2e, in grams, of huggingface.co/docs/hub/model-cards-co2.

  Args:
    record: a run's result.json, or a RunRecord's fields; `checkpoint_step`,
      which is not among them, says of which step the weights are.

  Raises:
    ValueError: run_id or status is missing, or a field is of the wrong type
      or negative. The message names it.
  """
  facts = _Facts(record)
  for name in ("run_id", "status"):
    if not facts.string(name):
      raise ValueError(f"{name} is missing: this is no record of a run")
  sections: dict[str, Rows | Sequence[str]] = {
      "Model": _model(facts), "Data": _data(facts),
      "Training": _training(facts), "Compute": _compute(facts),
      "Hardware": _hardware(facts),
      "Cost, energy and CO2e": _footprint(facts),
      "Evaluation": _evaluation(facts), "Limits": _limits(facts),
      "Provenance": _provenance(facts)}
  parts = [_header(facts), f"# {_escaped(facts.string('run_id'))}", (
      "Made by tfjax in a scaling experiment; written from the run's record.")]
  for title, content in sections.items():
    parts += [f"## {title}", _listed(content)]
  return "\n\n".join(parts) + "\n"


class _Facts:
  """Fields of a record by their type; None where it does not know them."""

  def __init__(self, record: Mapping[str, Any]):
    self._record = record

  def says_none(self, name: str) -> bool:
    """Whether it knows that there is none; an older record does not say."""
    return name in self._record and not self.string(name)

  def string(self, name: str) -> str | None:
    return self._typed(name, str, "a text")

  def mapping(self, name: str) -> Mapping[str, Any]:
    return self._typed(name, Mapping, "a mapping") or {}

  def number(self, name: str) -> float | None:
    value = self._typed(name, (int, float), "a number")
    if isinstance(value, bool):
      raise ValueError(f"{name}: {value!r} is no number")
    if value is None or not math.isfinite(value):
      return None
    if value < 0:
      raise ValueError(f"{name}: {value!r} is negative")
    return value

  def _typed(self, name: str, kind: Any, what: str) -> Any:
    value = self._record.get(name)
    if value is not None and not isinstance(value, kind):
      raise ValueError(f"{name}: {value!r:.60} is not {what}")
    return value

  # --- As Markdown -----------------------------------------------------------

  def text(self, name: str) -> str:
    return _escaped(self.string(name) or UNKNOWN)

  def count(self, name: str, unit: str = "") -> str:
    value = self.number(name)
    return UNKNOWN if value is None else f"{round(value):,}{unit}"

  def amount(self, name: str, unit: str = "", digits: int = 4) -> str:
    value = self.number(name)
    return UNKNOWN if value is None else f"{value:.{digits}g}{unit}"


# --- Sections ----------------------------------------------------------------


def _model(facts: _Facts) -> Rows:
  return [
      ("Family", facts.text("family")),
      ("Parameters", facts.count("params_total")),
      ("of them in embeddings", facts.count("params_embedding")),
      ("of them elsewhere", facts.count("params_non_embedding")),
      ("of them in the head", facts.count("params_head")),
      ("used for each token", facts.count("params_active")),
      ("Attention", facts.text("attention"))]


def _data(facts: _Facts) -> Rows:
  return [
      ("Corpus", facts.text("corpus")),
      ("Tokenizer", facts.text("tokenizer")),
      ("Vocabulary", facts.count("vocab_size", " tokens")),
      ("Bytes a token", facts.amount("bytes_per_token")),
      ("Tokens read in training", facts.count("tokens_seen")),
      ("Tokens planned", facts.count("tokens_planned")),
      ("Unique tokens", facts.count("unique_tokens")),
      ("Epochs", facts.amount("epochs"))]


def _training(facts: _Facts) -> Rows:
  status = facts.text("status")
  if facts.string("status_reason"):
    status += f" ({facts.text('status_reason')})"
  rows = [
      ("Status", status),
      ("Objective", facts.text("objective")),
      ("Steps", facts.count("steps")),
      ("Batch", facts.count("batch_tokens", " tokens")),
      ("Number format of products", facts.text("dtype")),
      ("Seed", facts.count("seed")),
      ("Started from", "random weights" if facts.says_none("init_from")
       else facts.text("init_from"))]
  if facts.number("checkpoint_step") is not None:
    rows.append(("Weights of step", facts.count("checkpoint_step")))
  return rows


def _compute(facts: _Facts) -> Rows:
  rows = [("Training FLOPs", facts.amount("flops_total")),
          ("Convention", facts.text("flops_convention"))]
  rows += [(f"by convention, {_escaped(name)}", f"{value:.4g} FLOPs")
           for name, value in _numbers(facts, "flops_by_convention")]
  parts = _numbers(facts, "flops_by_component")
  if not parts:
    parts = [(name, facts.number(f"flops_{name}")) for name in (
        "matmul", "attention", "head", "recompute")]
  rows += [(f"in {_escaped(name)}", f"{value:.4g} FLOPs")
           for name, value in parts if value is not None]
  rows += [
      ("Model FLOPs utilisation (MFU)", _percent(facts.number("mfu"))),
      ("Peak that it is of",
       facts.amount("peak_flops_per_second", " FLOP/s a device")),
      ("how it was obtained", facts.text("peak_source")),
      ("Tokens a second", facts.amount("tokens_per_second")),
      ("Wall time", facts.amount("wall_seconds", " s"))]
  rows += [(f"in it, {what}", facts.amount(f"{name}_seconds", " s"))
           for name, what in (
               ("startup", "starting up"), ("compile", "compiling"),
               ("input", "waiting for data"), ("step", "training steps"),
               ("evaluation", "evaluation"), ("checkpoint", "checkpoints"),
               ("lost", "lost to interruptions"))]
  return rows + [("Goodput (share of it in training steps)",
                  _percent(facts.number("goodput")))]


def _hardware(facts: _Facts) -> Rows:
  mesh = " x ".join(f"{_escaped(str(axis))} {size}"
                    for axis, size in facts.mapping("mesh").items())
  return [
      ("Hardware", facts.text("hardware")),
      ("Devices", facts.count("device_count")),
      ("as JAX calls them", facts.text("device_kind")),
      ("Processes", facts.count("process_count")),
      ("Mesh", mesh or UNKNOWN),
      ("Host's CPU", facts.text("host_cpu")),
      ("Device time in training steps",
       facts.amount("device_seconds", " device-seconds")),
      ("Device time that was occupied",
       facts.amount("occupied_device_seconds", " device-seconds"))]


def _footprint(facts: _Facts) -> Rows:
  return [
      ("Price", facts.amount("price_usd", " USD")),
      ("how it was obtained", facts.text("price_source")),
      ("Energy", facts.amount("energy_kwh", " kWh")),
      ("how it was obtained", facts.text("energy_source")),
      ("Region", facts.text("region")),
      ("Power usage effectiveness (PUE)", facts.amount("pue")),
      ("CO2e", facts.amount("co2e_kg", " kg")),
      ("how it was obtained", facts.text("co2e_source"))]


def _evaluation(facts: _Facts) -> Rows:
  rows = [
      ("Loss on held-out text", facts.amount("loss", " nats a token", 6)),
      ("its standard error", facts.amount("loss_stderr", " nats")),
      ("Bits a byte", facts.amount("bits_per_byte", "", 6)),
      ("What counts", facts.text("loss_counts")),
      ("Loss in training", facts.amount("train_loss", " nats a token", 6))]
  if facts.number("entropy_rate") is not None:
    rows.append(("Entropy of the synthetic text, which no loss goes below",
                 facts.amount("entropy_rate", " nats a token", 6)))
  return rows


def _limits(facts: _Facts) -> list[str]:
  """Sentences: what holds for all of these models, and what the record has."""
  found = [
      "A research model of a scaling experiment, trained to measure how loss "
      "falls with size, data and compute; not meant to be used for anything "
      "else.",
      "Evaluated on held-out documents of its own corpus only: on no task, on "
      "no other text.",
      "Not aligned, not filtered, not tested for harm or bias; it repeats what "
      "its corpus says.",
      "Price, energy and CO2e are of this run alone: without other runs, "
      "making of the data, and manufacture of the machines."]
  status = facts.string("status")
  if status != "complete":
    reason = (f": {facts.text('status_reason')}"
              if facts.string("status_reason") else "")
    found.append(f"**The run is not complete but {facts.text('status')}**"
                 f"{reason}.")
  return found + [
      sentence for applies, sentence in _conditions(facts) if applies]


def _conditions(facts: _Facts) -> list[tuple[bool, str]]:
  """What limits a model, and whether the record shows it."""
  def more(name: str, than: float = 0) -> bool:
    return (facts.number(name) or 0) > than
  seen, planned = facts.number("tokens_seen"), facts.number("tokens_planned")
  step, steps = facts.number("checkpoint_step"), facts.number("steps")
  energy = facts.number("energy_kwh")
  measured = (facts.string("energy_source") or "").startswith("measured")
  return [
      (None not in (seen, planned) and seen < planned,
       f"It has read {facts.count('tokens_seen')} of "
       f"{facts.count('tokens_planned')} planned tokens."),
      (None not in (step, steps) and step != steps,
       f"The weights are of step {facts.count('checkpoint_step')}, the "
       f"numbers above of step {facts.count('steps')}."),
      (more("epochs", 1), "Text was repeated: "
       f"{facts.amount('epochs')} epochs."),
      (more("bad_steps"), f"Bad steps were met: {facts.count('bad_steps')}, "
       f"rolled back: {facts.count('rollbacks')}."),
      (more("resumes"),
       f"It was interrupted and resumed: {facts.count('resumes')}."),
      (bool(facts.string("init_from")),
       "What the weights cost that it started from is not counted."),
      (bool(facts.string("branched_from")),
       f"It branched off {facts.text('branched_from')} after step "
       f"{facts.count('branch_step')}: time, price, energy and CO2e are of the "
       "steps after that, tokens and FLOPs of all."),
      (more("ensemble_members", 1),
       f"It trained in one step with others, {facts.count('ensemble_members')} "
       "runs in all: times, device time, price, energy and CO2e are its share "
       "of what all took."),
      (facts.number("loss") is None, "Its loss is unknown."),
      (facts.number("mfu") is None,
       "Its MFU is unknown, as a peak or a rate is."),
      (facts.number("price_usd") is None, "Its price is unknown."),
      (energy is None, "Its energy is unknown."),
      (energy is not None and not measured,
       "Its energy was not measured, or not all of it."),
      (facts.number("co2e_kg") is None, "Its CO2e is unknown."),
      (facts.number("co2e_kg") is not None and facts.number("pue") is None,
       "Its CO2e is without what the building draws: the PUE is unknown.")]


def _provenance(facts: _Facts) -> Rows:
  packages = ", ".join(f"{_escaped(str(name))} {_escaped(str(version))}"
                       for name, version in facts.mapping("packages").items())
  return [
      ("Sweep", facts.text("sweep")),
      ("Hash of the config", facts.text("config_hash")),
      ("Token store", facts.text("token_store")),
      ("Code", facts.text("code_version")),
      ("Python", facts.text("python_version")),
      ("Packages", packages or UNKNOWN),
      ("Started", facts.text("started_at")),
      ("Finished", facts.text("finished_at"))]


# --- Form --------------------------------------------------------------------


def _header(facts: _Facts) -> str:
  """YAML: JSON's strings are YAML's. What is unknown is left out."""
  tags = ["tfjax", "scaling", facts.string("family"),
          facts.string("objective")]
  lines = ["---", "tags:"]
  lines += [f"- {_quoted(tag)}" for tag in dict.fromkeys(filter(None, tags))]
  kg = facts.number("co2e_kg")
  # A branch's is of its last steps, not of all that made the model.
  if kg is not None and not facts.string("branched_from"):
    sources = [f"{name}: {facts.string(f'{key}_source') or UNKNOWN}"
               for name, key in (("CO2e", "co2e"), ("energy", "energy"))]
    fields = {
        "source": "; ".join(sources),
        "training_type": ("pre-training" if facts.says_none("init_from") else
                          facts.string("init_from") and "fine-tuning"),
        "geographical_location": _place(facts.string("region")),
        "hardware_used": _hardware_used(facts)}
    lines += ["co2_eq_emissions:", f"  emissions: {_yaml_number(1000 * kg)}"]
    lines += [f"  {key}: {_quoted(value)}"
              for key, value in fields.items() if value]
  return "\n".join([*lines, "---"])


def _place(region: str | None) -> str | None:
  if region is None:
    return None
  try:
    return f"{regions.find(region).place} ({region})"
  except config_lib.ConfigError:  # the table of another version has it
    return region


def _hardware_used(facts: _Facts) -> str | None:
  name = facts.string("hardware") or facts.string("device_kind")
  if name is None or facts.number("device_count") is None:
    return name
  return f"{name}, {facts.count('device_count')} devices"


def _numbers(facts: _Facts, name: str) -> list[tuple[str, float]]:
  values = _Facts(facts.mapping(name))
  found = [(str(key), values.number(key)) for key in facts.mapping(name)]
  return [(key, value) for key, value in found if value is not None]


def _percent(share: float | None) -> str:
  return UNKNOWN if share is None else f"{100 * share:.3g}%"


def _listed(content: Rows | Sequence[str]) -> str:
  """A table of rows, or a list of sentences."""
  if isinstance(content[0], str):
    return "\n".join(f"- {sentence}" for sentence in content)
  return "\n".join(["| | |", "| --- | --- |"] + [
      f"| {what} | {value} |" for what, value in content])


def _escaped(text: str) -> str:
  """Text that Markdown, a table's cell too, shows as it is."""
  text = re.sub(r"([\\`*\[\]<>|~$&#!])", r"\\\1", _plain(text))
  return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def _quoted(text: str) -> str:
  return json.dumps(_plain(text), ensure_ascii=False)


def _plain(text: str) -> str:
  """One line, without characters that control or are none."""
  text = "".join(" " if unicodedata.category(c) in (
      "Cc", "Cf", "Cs", "Cn", "Zl", "Zp") else c for c in text)
  return " ".join(text.split())


def _yaml_number(value: float) -> str:
  """YAML 1.1 takes 1e-07 for a text, and 1.0e-07 for a number."""
  text = f"{value:.6g}"
  digits, e, exponent = text.partition("e")
  return text if not e or "." in digits else f"{digits}.0e{exponent}"
