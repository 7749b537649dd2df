"""The house, beyond what import-linter holds (pyproject.toml): tests beside sources, promises kept."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import resnet_func as rf

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "resnet_func"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
ATEN = {"per_sample/layers/contract.py"}
# Only names, words and data; `python -m resnet_func`; what the folder as a whole is tested for.
UNTESTED = {"types.py", "__main__.py", "app/errors.py", "models/variants.py"}
TESTED_AS_A_WHOLE = {
    "per_sample",
    "per_sample/layers",
    "per_sample/quantities",
    "optim",
    "testing",
    "app/commands",
}

# What README.md and the design promise, and where from.
PROMISED = """
    Model ResNetConfig TrainState build from_module from_state_dict to_state_dict pretrained
    resnet18 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d resnext101_64x4d
    wide_resnet50_2 wide_resnet101_2 resnet10
    resnet20 resnet32 resnet44 resnet56 resnet110 wrn_10_2 wrn_16_4 wrn_28_10 wrn_40_4
    losses.cross_entropy losses.smoothed_cross_entropy losses.squared_error losses.logit losses.check_targets
    optim.sgd optim.adam optim.adamw optim.muon optim.partition optim.clipped optim.ema optim.Optimizer
    optim.apply_updates optim.clip_by_global_norm optim.constant optim.cosine optim.one_cycle optim.step
    train.make_train_step train.make_eval_step train.init_train_state train.fit train.evaluate
    train.autocast train.average_flips
    tree.map tree.leaves tree.flatten tree.unflatten tree.norm tree.dot tree.size
    per_sample.grads per_sample.norms per_sample.layer_norms per_sample.clipped_sum per_sample.gram
    per_sample.layer_grams per_sample.ntk per_sample.sketch per_sample.moments per_sample.plan
    per_sample.Quantity per_sample.sketch_quantity per_sample.detect_nonfinite
    attribution.score_dataset attribution.trak attribution.tracin attribution.influence attribution.lds
    winograd.wrap zoo.config zoo.by_name zoo.ZOO
""".split()  # noqa: SIM905


def test_imports_flow_one_way() -> None:
    """The contracts of pyproject.toml; in a process of its own, since its console keeps stdout."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", PROMISED)
def test_promised_names_are_where_they_were(name: str) -> None:
    found: object = rf
    for part in name.split("."):
        found = getattr(found, part)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_contractions_touch_aten(path: Path) -> None:
    assert "torch.ops.aten" not in path.read_text(encoding="utf-8") or str(path.relative_to(PACKAGE)) in ATEN


def test_every_source_file_has_its_test_file() -> None:
    missing = []
    for path in SOURCES:
        inner = path.relative_to(PACKAGE)
        if (
            path.name == "__init__.py"
            or str(inner) in UNTESTED
            or inner.parent.as_posix() in TESTED_AS_A_WHOLE
        ):
            continue
        if not (ROOT / "tests" / inner.parent / f"test_{path.name}").is_file():
            missing.append(str(inner))
    assert not missing


def test_no_test_tests_nothing() -> None:
    """An early `return` in a property test makes it vacuous without a word: `assume` counts."""
    for path in TESTS:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert not any(map(returns, node.body)), f"{path.name}: {node.name} returns early"


def returns(node: ast.AST) -> bool:
    """Whether a statement of a function makes it return; the functions defined in it do not count."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return False
    return isinstance(node, ast.Return) or any(map(returns, ast.iter_child_nodes(node)))


def test_no_machine_is_named() -> None:
    """No absolute path of a machine in what is shipped."""
    files = [*SOURCES, *TESTS, *ROOT.glob("*.md"), ROOT / "pyproject.toml"]
    pattern = re.compile(r"(?<![\w.])/(?:home|root|work|Users)/")
    named = [
        path.name
        for path in files
        if path.name != "test_house.py" and pattern.search(path.read_text("utf-8"))
    ]
    assert not named


PACKAGES = """
    losses optim per_sample privacy attribution curvature train tree testing models.winograd models.zoo
""".split()  # noqa: SIM905


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_function_has_an_example(name: str) -> None:
    """pytest runs them: `--doctest-modules`."""
    module = importlib.import_module(f"resnet_func.{name}")
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    functions = [value for name in names if inspect.isfunction(value := getattr(module, name))]
    ours = [function for function in functions if function.__module__.startswith("resnet_func.")]
    assert not [function.__name__ for function in ours if ">>>" not in (function.__doc__ or "")]
