"""Cells shared among processes, of which one dies."""

from __future__ import annotations

from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest

from parity import runner
from parity.cell import Cell, Result


class Pool:
    """Runs rows at once, in this process; the row of "deadly" ends it, and what was handed over after it."""

    def __init__(self, workers: int, **options: Any) -> None:
        self.broken = False

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, function: Any, quick: bool, paths: list[str]) -> Future[list[Result]]:
        future: Future[list[Result]] = Future()
        self.broken |= "deadly" in paths[0]
        if self.broken:
            future.set_exception(BrokenProcessPool())
        else:
            future.set_result([Result(*path.split("/", 1), "passed", "", 0.0) for path in paths])
        return future


def test_a_process_that_dies_costs_its_own_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "ProcessPoolExecutor", Pool)
    names = ["first/a", "deadly/a", "deadly/b", "third/a", "fourth/a"]
    cells = [Cell("section", name, lambda: "") for name in names]
    results = runner.run_all(cells, lambda tasks, **options: tasks, quick=True, jobs=2)
    assert [result.name for result in results] == names
    assert [result.outcome for result in results] == ["passed", "failed", "failed", "passed", "passed"]
    assert "was there too little memory?" in results[1].said
