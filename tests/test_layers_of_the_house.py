# SPDX-License-Identifier: Apache-2.0
"""A file imports only from its own layer of the house or from below it."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Low to high; rooms of one layer may import each other. The families are plain
# data, which config reads: tfjax/models/families.py lies at config's layer,
# and so does the (empty) tfjax/models/__init__.py that comes with it.
LAYERS = (
    {"config", "schema", "families", "commandline"},
    {"data", "models", "cost"},
    {"objectives"},
    {"train"},
    {"sweep", "hub", "transfer"},
    {"scaling"},
)
HEIGHT = {room: i for i, rooms in enumerate(LAYERS) for room in rooms}
# What some rooms may import and no more: the families nothing of tfjax;
# scaling reads run records only, whoever made them.
CLOSED = {"families": set(),
          "scaling": {"scaling", "config", "schema", "families"}}
# Slow or optional: imported where they are used, never with the package.
LAZY = {"wandb", "torch", "transformers", "datasets", "codecarbon",
        "submitit", "tensorboardX", "wandb_workspaces"}

FILES = sorted((ROOT / "tfjax").rglob("*.py"))


def imported(tree: ast.AST) -> list[tuple[int, str]]:
  """(line, dotted name) of every import; `from a import b` gives a.b."""
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found += [(node.lineno, alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"line {node.lineno}: a relative import"
      found += [(node.lineno, f"{node.module}.{alias.name}")
                for alias in node.names]
  return found


def room(path: pathlib.Path) -> str:
  """`tfjax/data/store.py` -> data, `tfjax/config.py` -> config."""
  parts = path.relative_to(ROOT / "tfjax").with_suffix("").parts
  if parts in (("models", "families"), ("models", "__init__")):
    return "families"
  return parts[0]


def wrong(where: str, name: str) -> str | None:
  """What is wrong with a file of room `where` that imports `name`."""
  parts = name.split(".")
  if parts[0] in ("scripts", "experiments", "tests"):
    return f"{parts[0]}/ is never imported by tfjax"
  if parts[0] != "tfjax" or len(parts) == 1:
    return None
  target = "families" if parts[1:3] == ["models", "families"] else parts[1]
  if target not in HEIGHT:
    return f"{name} is in no known room"
  if where in CLOSED and target not in CLOSED[where]:
    return f"{where} imports {target}; it may import {sorted(CLOSED[where])}"
  if HEIGHT[target] > HEIGHT[where]:
    return f"{where} imports {target}, which is above it"
  return None


@pytest.mark.parametrize(
    "path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
def test_imports_come_from_the_same_layer_or_below(path: pathlib.Path) -> None:
  where = room(path)
  names = imported(ast.parse(path.read_text("utf-8")))
  if where == "__init__":
    assert not names, "importing tfjax imports none of its rooms"
    return
  assert where in HEIGHT, f"{where} is in no layer; add it to LAYERS"
  problems = [f"{path.relative_to(ROOT)}:{line}: {problem}"
              for line, name in names if (problem := wrong(where, name))]
  assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
def test_trackers_and_clouds_are_imported_late(path: pathlib.Path) -> None:
  tree = ast.parse(path.read_text("utf-8"))
  top = ast.Module([node for node in tree.body if isinstance(
      node, (ast.Import, ast.ImportFrom))], [])
  early = {name.split(".")[0] for _, name in imported(top)} & LAZY
  assert not early, f"{path}: import {early} in the function that needs it"


def test_the_rule_itself() -> None:
  assert wrong("models", "tfjax.config") is None
  assert wrong("models", "tfjax.cost.flops") is None
  assert wrong("models", "jax.numpy") is None
  assert "above" in wrong("models", "tfjax.train.step")
  assert "above" in wrong("config", "tfjax.models")
  assert "above" in wrong("config", "tfjax.models.transformer")
  assert wrong("config", "tfjax.models.families") is None
  assert wrong("schema", "tfjax.models.families.FAMILIES") is None
  assert "families imports config" in wrong("families", "tfjax.config")
  assert "families imports families" in wrong(
      "families", "tfjax.models.families")
  assert room(ROOT / "tfjax/models/families.py") == "families"
  assert room(ROOT / "tfjax/models/layers.py") == "models"
  assert "scaling imports train" in wrong("scaling", "tfjax.train")
  assert "no known room" in wrong("train", "tfjax.attic")
  assert "never" in wrong("train", "scripts.train")
