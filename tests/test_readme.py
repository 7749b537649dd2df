"""The README runs as it stands, links lead somewhere, and its figures are those of a result file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
PAGES = ("README.md", "CONTRIBUTING.md", "resnet_func/SHARP_EDGES.md", "benchmarks/RESULTS.md")


def test_there_is_code() -> None:
    assert len(BLOCKS) >= 5


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_runs(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert link.startswith("http") or ((ROOT / page).parent / link).exists(), link


def test_the_figures_are_those_of_the_result_file() -> None:
    (name,) = re.findall(r"benchmarks/results/(\S+)\.png", README)
    content = json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text(encoding="utf-8"))
    opacus = min(
        (name for name in content["figures"] if name.startswith("Opacus")),
        key=lambda name: content["figures"][name]["ratio"]["median"],
    )
    rows = {
        "the ordinary step once more (the noise)": "plain again",
        "`norms`": "norms",
        "`clipped_sum`": "clipped_sum",
        "`grads`": "grads",
        "the clipped sum by Opacus, fastest of three ways": opacus,
        "the clipped sum by `jit(vmap(grad))` in JAX": "JAX, vmap",
    }
    for what, variant in rows.items():
        figures = content["figures"][variant]
        median, low, high = (figures["ratio"][key] for key in ("median", "low", "high"))
        peak = "" if figures["peak_bytes"] is None else f" {figures['peak_bytes'] / 1e6:,.0f}"
        assert f"| {what} | {median:.2f} | {low:.2f}-{high:.2f} |{peak} |" in README
