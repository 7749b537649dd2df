"""Cells one after another, or in processes that share them row by row."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from typing import Any

import torch

from parity import suite
from parity.cell import Cell, Result, row_of, run

# Shows that something is under way: `rich.progress.track` with its options.
Bar = Callable[..., Iterable[Any]]


def run_all(cells: list[Cell], bar: Bar, *, quick: bool, jobs: int, threads: int = 0) -> list[Result]:
    """What came of every cell, in their order.

    A process takes a row of the report at a time, since its cells share a network, and computes with
    `threads`, one where that is 0. With one job the cells are run here, with the threads that there are.
    """
    if jobs == 1:
        return [run(cell) for cell in bar(cells)]
    rows: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        rows.setdefault((cell.section, row_of(cell.name)), []).append(cell.path)
    done: list[Result] = []
    left, workers = list(rows.values()), jobs
    while left:
        found, lost = _share(left, workers, bar, quick=quick, threads=threads or 1)
        done += found
        if lost and workers == 1:  # the first of them was under way
            done += [_ended(path) for path in lost.pop(0)]
        left, workers = lost, 1
    place = {cell.path: index for index, cell in enumerate(cells)}
    return sorted(done, key=lambda result: place[result.path])


def _share(
    rows: list[list[str]], workers: int, bar: Bar, *, quick: bool, threads: int
) -> tuple[list[Result], list[list[str]]]:
    """What came of the rows, and those that went with a process that died: it takes the others' with it."""
    done: list[Result] = []
    lost: list[list[str]] = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        tasks = {pool.submit(_run_row, quick, paths): paths for paths in rows}
        for task in bar(as_completed(tasks), total=len(tasks)):
            try:
                done += task.result()
            except BrokenProcessPool:
                lost.append(tasks[task])
    return done, sorted(lost, key=rows.index)


def _ended(path: str) -> Result:
    section, name = path.split("/", 1)
    return Result(section, name, "failed", "its process was ended: was there too little memory?", 0.0)


def _run_row(quick: bool, paths: list[str]) -> list[Result]:
    return [run(_by_path(quick)[path]) for path in paths]


@cache
def _by_path(quick: bool) -> dict[str, Cell]:
    return {cell.path: cell for cell in suite.cells(quick=quick)}
