# SPDX-License-Identifier: Apache-2.0
"""The scaling laws: one entry of `LAWS` a law, a new law is one entry.

What a law is made of is in `forms`. N is parameters, D tokens, C FLOPs, S
optimizer steps, M tokens per parameter, L loss in nats a token.
"""

import jax.numpy as jnp

from tfjax.scaling import forms
from tfjax.scaling.forms import FloatArray
from tfjax.scaling.forms import Law
from tfjax.scaling.forms import Parameter
from tfjax.scaling.forms import Term
from tfjax.scaling.forms import Values

_KAPLAN = "Kaplan et al. 2020, arXiv:2001.08361"
_HOFFMANN = "Hoffmann et al. 2022, arXiv:2203.15556"
_GEMSTONES = "McLeish et al. 2025 (Gemstones), arXiv:2502.06857"
_GADRE = "Gadre et al. 2024, arXiv:2403.08540"
_STEP_LAW = "Li et al. 2025 (Step Law), arXiv:2503.04715"

_E = Term("E")
_SIZE = Term("A", {"params": "alpha"})
_DATA = Term("B", {"tokens": "beta"})


def _scale(coefficient: str, exponent: str):
  """Kaplan's scale of a term (Xc / X)^alpha = A X^-alpha: Xc = A^(1/alpha)."""
  return lambda p: p[coefficient] ** (1 / p[exponent])


def _kaplan_joint(p: Values, x: Values) -> FloatArray:
  """Written at N of a million and D of a billion, where u and v are sizes of
  the terms; N_c and D_c follow."""
  size = p["u"] * (x["params"] / 1e6) ** (-p["alpha_N"] / p["alpha_D"])
  return (size + p["v"] * 1e9 / x["tokens"]) ** p["alpha_D"]


def compute_optimal_params(p: Values, tokens: FloatArray) -> FloatArray:
  """N for which D tokens are compute-optimal at C = 6 N D (Hoffmann et al.
  2022, equation 4): dL/dN N = dL/dD D, so alpha A / N^alpha = beta B / D^beta.
  """
  return (p["alpha"] * p["A"] / (p["beta"] * p["B"])
          * tokens ** p["beta"]) ** (1 / p["alpha"])


def _data_constrained(p: Values, x: Values) -> FloatArray:
  unique_params = jnp.minimum(
      x["params"], compute_optimal_params(p, x["unique_tokens"]))
  size = _diminished(unique_params, x["params"], p["R_N"])
  data = _diminished(x["unique_tokens"], x["tokens"], p["R_D"])
  return p["E"] + p["A"] / size ** p["alpha"] + p["B"] / data ** p["beta"]


def _diminished(unique: FloatArray, total: FloatArray,
                half_life: FloatArray) -> FloatArray:
  """Unique plus repeated, each repetition worth less: equations 5 and 6."""
  repeats = total / unique - 1
  return unique * (1 - half_life * jnp.expm1(-repeats / half_life))


def _smoothly_broken(p: Values, x: Values) -> FloatArray:
  ratio = (x["flops"] / p["break_at"]) ** (1 / p["sharpness"])
  bend = (1 + ratio) ** (-(p["c1"] - p["c0"]) * p["sharpness"])
  return p["E"] + p["A"] * (x["flops"] / p["break_at"]) ** -p["c0"] * bend


def _sigmoid(p: Values, x: Values) -> FloatArray:
  rise = 1 / (1 + jnp.exp(p["slope"] * (x["loss"] - p["middle"])))
  return p["floor"] + (p["ceiling"] - p["floor"]) * rise


_CHINCHILLA_FREE = (
    Parameter("E", 1e-3, 20.0, (1.0, 2.0), shape=False),
    Parameter("A", 1e-3, 1e9, (10.0, 1e3), log=True, shape=False),
    Parameter("B", 1e-3, 1e9, (10.0, 1e3), log=True, shape=False),
    Parameter("alpha", 1e-3, 3.0, (0.3, 0.6)),
    Parameter("beta", 1e-3, 3.0, (0.3, 0.6)),
)

LAWS: dict[str, Law] = {law.name: law for law in (
    Law("kaplan_params", "L(N) = (N_c / N)^alpha_N", f"{_KAPLAN}, equation 1.1",
        (Term("A", {"params": "alpha_N"}),),
        derived={"N_c": _scale("A", "alpha_N")}),
    Law("kaplan_tokens", "L(D) = (D_c / D)^alpha_D", f"{_KAPLAN}, equation 1.2",
        (Term("B", {"tokens": "alpha_D"}),),
        derived={"D_c": _scale("B", "alpha_D")}),
    Law("kaplan_compute", "L(C) = (C_c / C)^alpha_C",
        f"{_KAPLAN}, equation 1.3",
        (Term("A", {"flops": "alpha_C"}),),
        derived={"C_c": _scale("A", "alpha_C")}),
    Law("kaplan", "L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D",
        f"{_KAPLAN}, equation 1.5", function=_kaplan_joint,
        function_axes=("params", "tokens"),
        free=(Parameter("u", 1e-12, 1e40, (1e2, 1e8, 1e14), True, False),
              Parameter("v", 1e-12, 1e40, (1e2, 1e8, 1e14), True, False),
              Parameter("alpha_N", 1e-3, 3.0, (0.05, 0.2, 0.5)),
              Parameter("alpha_D", 1e-3, 3.0, (0.05, 0.2, 0.5))),
        derived={
            "N_c": lambda p: 1e6 * p["u"] ** (p["alpha_D"] / p["alpha_N"]),
            "D_c": lambda p: 1e9 * p["v"]}),
    Law("kaplan_steps", "L(N, S) = (N_c / N)^alpha_N + (S_c / S)^alpha_S",
        f"{_KAPLAN}, equation 1.6; S is S_min",
        (Term("A", {"params": "alpha_N"}), Term("B", {"steps": "alpha_S"})),
        derived={"N_c": _scale("A", "alpha_N"),
                 "S_c": _scale("B", "alpha_S")}),
    Law("chinchilla", "L(N, D) = E + A / N^alpha + B / D^beta",
        f"{_HOFFMANN}, section 3.3", (_E, _SIZE, _DATA)),
    Law("chinchilla_tied", "L(N, D) = E + A / N^alpha + B / D^alpha",
        f"{_HOFFMANN}, section 3.3, one exponent; Muennighoff et al. 2023, "
        "arXiv:2305.16264, section 4",
        (_E, _SIZE, Term("B", {"tokens": "alpha"}))),
    Law("compute", "L(C) = E + A / C^alpha", "Henighan et al. 2020, "
        "arXiv:2010.14701, equation 1.1",
        (_E, Term("A", {"flops": "alpha"}))),
    Law("width_depth",
        "L(w, d, N, D) = E + A_w / w^a_w + A_d / d^a_d + A / N^alpha "
        "+ B / D^beta", f"{_GEMSTONES}, section 4",
        (_E, Term("A_w", {"width": "a_w"}), Term("A_d", {"depth": "a_d"}),
         _SIZE, _DATA)),
    Law("width_depth_tokens",
        "L(w, d, D) = E + A_w / w^a_w + A_d / d^a_d + B / D^beta",
        f"{_GEMSTONES}, section 4",
        (_E, Term("A_w", {"width": "a_w"}), Term("A_d", {"depth": "a_d"}),
         _DATA)),
    Law("overtraining", "L(C, M) = E + (a M^eta + b M^-eta) C^-eta",
        f"{_GADRE}, equation 4",
        (_E, Term("a", {"flops": "eta", "tokens_per_parameter": "eta"},
                  {"tokens_per_parameter": -1.0}),
         Term("b", {"flops": "eta", "tokens_per_parameter": "eta"}))),
    Law("downstream_error", "Err(L) = epsilon - k exp(-gamma L)",
        f"{_GADRE}, equation 5", target="error", space="linear",
        function=lambda p, x: p["epsilon"] - p["k"] * jnp.exp(
            -p["gamma"] * x["loss"]), function_axes=("loss",),
        free=(Parameter("epsilon", 1e-3, 1.5, (0.5, 0.8, 1.0), shape=False),
              Parameter("k", 1e-6, 1e4, (0.3, 2.0, 20.0), True, False),
              Parameter("gamma", 1e-3, 20.0, (0.3, 1.0, 3.0)))),
    Law("downstream_accuracy",
        "Acc(L) = floor + (ceiling - floor) / (1 + exp(slope (L - middle)))",
        "Bhagia et al. 2024, arXiv:2412.04403, the second step",
        target="accuracy", space="linear", function=_sigmoid,
        function_axes=("loss",),
        free=(Parameter("floor", 0.0, 1.0, (0.0, 0.25), shape=False),
              Parameter("ceiling", 0.0, 1.0, (0.6, 0.9), shape=False),
              Parameter("slope", 1e-3, 100.0, (1.0, 4.0), True),
              Parameter("middle", 1e-3, 20.0, (0.8, 2.0, 4.0)))),
    Law("data_constrained",
        "L = E + A / N'^alpha + B / D'^beta, with X' = U_X + U_X R_X "
        "(1 - exp(-(X / U_X - 1) / R_X)) for N and D, U_N = min(N, N*(U_D))",
        "Muennighoff et al. 2023, arXiv:2305.16264, section 3",
        function=_data_constrained,
        function_axes=("params", "tokens", "unique_tokens"),
        free=(*_CHINCHILLA_FREE,
              Parameter("R_D", 1e-2, 1e4, (1.0, 10.0, 100.0, 1e3), True),
              Parameter("R_N", 1e-2, 1e4, (1.0, 10.0, 100.0, 1e3), True))),
    Law("broken_power",
        "L(C) = E + A (C / break_at)^-c0 "
        "(1 + (C / break_at)^(1 / sharpness))^(-(c1 - c0) sharpness)",
        "Caballero et al. 2022, arXiv:2210.14891, one break",
        function=_smoothly_broken, function_axes=("flops",),
        free=(Parameter("E", 1e-6, 20.0, (0.1, 1.0, 2.0), shape=False),
              Parameter("A", 1e-6, 1e3, (0.3, 3.0), True, False),
              Parameter("c0", 1e-3, 3.0, (0.05, 0.3)),
              Parameter("c1", 1e-3, 3.0, (0.05, 0.3)),
              Parameter("break_at", 1e6, 1e30, (
                  1e12, 1e15, 1e18, 1e21), True),
              Parameter("sharpness", 1e-2, 10.0, (0.3,), True, False))),
    Law("critical_batch", "B_crit(L) = B* / L^(1 / alpha_B)",
        f"{_KAPLAN}, equation 5.3", (Term("B*", {"loss": "inverse_alpha_B"}),),
        target="critical_batch", exponent_bounds=(1e-2, 50.0),
        exponent_starts=(1.0, 5.0), share_bounds=(1e-6, 1e6),
        derived={"alpha_B": lambda p: 1 / p["inverse_alpha_B"]}),
    Law("batch_steps", "S(B) = S_min (1 + B_crit / B), steps to one loss",
        "McCandlish et al. 2018, arXiv:1812.06162",
        target="steps", function_axes=("batch_tokens",),
        function=lambda p, x: p["S_min"] * (
            1 + p["B_crit"] / x["batch_tokens"]),
        free=(Parameter("S_min", 1e-3, 1e12, (1e2, 1e5), True, False),
              Parameter("B_crit", 1.0, 1e12, (1e3, 1e5, 1e7), True, True))),
    Law("learning_rate", "lr(N, D) = c N^a D^b", f"{_STEP_LAW}; N without embeddings",
        (Term("c", {"params": "a", "tokens": "b"},
              {"params": -1.0, "tokens": -1.0}),),
        target="learning_rate", exponent_bounds=(-3.0, 3.0),
        exponent_starts=(-0.5, 0.5), share_bounds=(1e-6, 1e6)),
    Law("batch_size", "B(D) = c D^b tokens", _STEP_LAW,
        (Term("c", {"tokens": "b"}, {"tokens": -1.0}),), target="batch_tokens",
        exponent_bounds=(-3.0, 3.0), exponent_starts=(-0.5, 0.5),
        share_bounds=(1e-6, 1e6)),
    Law("transfer", "D_T(D_F, N) = k D_F^alpha N^beta",
        "Hernandez et al. 2021, arXiv:2102.01293, equation 1.1",
        (Term("k", {"finetuning_tokens": "alpha", "params": "beta"},
              {"finetuning_tokens": -1.0, "params": -1.0}),),
        target="transferred_tokens", exponent_bounds=(-3.0, 3.0),
        exponent_starts=(0.2, 0.5), share_bounds=(1e-6, 1e6)),
)}


def get(law: str | Law) -> Law:
  """The law of that name, or a ValueError that lists the known ones."""
  if isinstance(law, forms.Law):
    return law
  if law not in LAWS:
    raise ValueError(f"no scaling law {law!r}; known: {', '.join(LAWS)}")
  return LAWS[law]
