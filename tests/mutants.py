"""`python -m tests.mutants`: draw mutants of the source, run the tests on each, print what survives.

mutmut makes the mutants. Its own runner would import torch anew for each, and its trampolines stop a compiler, so
here pytest collects once, and each mutant is a fork of that process in which one function has other code. What a
mutant meets: the fast tests that call the function, those of its own test file first, the cheapest first.
"""

from __future__ import annotations

import argparse
import ast
import functools
import gc
import importlib
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from types import CodeType, FrameType, FunctionType

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = str(ROOT / "resnet_func")
ROOMS = ("models", "optim", "per_sample")
SLOW = 1.0  # seconds of CPU that a test may take


@dataclass(frozen=True)
class Mutant:
    file: str
    function: str
    number: int
    line: int
    before: str
    after: str


@dataclass
class Outcome:
    mutant: Mutant
    killed_by: str
    tests: int
    seconds: float


@functools.cache
def mutations_of(path: Path):
    """What mutmut makes of a file: its tree, and with each mutation the name of the function it is in."""
    import libcst as cst
    from mutmut.mutation.file_mutation import create_mutations

    module, mutations, _, _ = create_mutations(str(path), path.read_text(encoding="utf-8"))
    names = {}
    for node in module.body:
        if isinstance(node, cst.FunctionDef):
            names[id(node)] = node.name.value
        if isinstance(node, cst.ClassDef):
            for part in node.body.body:
                if isinstance(part, cst.FunctionDef):
                    names[id(part)] = f"{node.name.value}.{part.name.value}"
    # as in mutmut's own runs, what is outside of functions stays
    named = [(names.get(id(one.contained_by_top_level_function)), one) for one in mutations]
    return module, [(name, one) for name, one in named if name]


def make(path: Path, number: int) -> tuple[Mutant, str]:
    """A mutant of a file, with the whole text of the mutated file."""
    from mutmut.mutation.file_mutation import deep_replace

    module, mutations = mutations_of(path)
    function, mutation = mutations[number]
    text = deep_replace(module, mutation.original_node, mutation.mutated_node).code
    lines = zip(module.code.splitlines(), text.splitlines(), strict=False)
    line, before, after = next((i, a, b) for i, (a, b) in enumerate(lines, 1) if a != b)
    return Mutant(path.relative_to(ROOT).as_posix(), function, number, line, before.strip(), after.strip()), text


def install(mutant: Mutant, text: str) -> None:
    """Gives the living function the mutant's code, wherever it has been imported to."""
    module = importlib.import_module(mutant.file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    found: object = module
    for part in mutant.function.split("."):
        found = vars(found)[part]
    function = found.__func__ if isinstance(found, staticmethod | classmethod) else found
    assert isinstance(function, FunctionType)
    old = function.__code__
    code = compile(text, old.co_filename, "exec", dont_inherit=True)
    new = [one for one in codes_in(code) if one.co_qualname == mutant.function][-1]
    function.__code__ = new
    inner = pairs(old, new)
    for closure in [one for one in gc.get_objects() if type(one) is FunctionType]:  # made before, as on import
        changed = inner.get(id(closure.__code__))
        if changed is not None and changed.co_freevars == closure.__code__.co_freevars:
            closure.__code__ = changed
    arguments = definition(text, mutant.function).args
    function.__defaults__ = tuple(evaluate(node, module) for node in arguments.defaults) or None
    keywords = {
        a.arg: evaluate(node, module)
        for a, node in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if node is not None
    }
    function.__kwdefaults__ = keywords or None
    for cached in gc.get_objects():
        if type(cached) is functools._lru_cache_wrapper and str(cached.__module__).startswith("resnet_func"):
            cached.cache_clear()


def codes_in(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from codes_in(constant)


def pairs(old: CodeType, new: CodeType) -> dict[int, CodeType]:
    """The code of what is defined inside of a function, before and after."""
    inner = zip_longest(codes_in(old), codes_in(new))
    return {id(a): b for a, b in inner if a is not None and b is not None and a.co_name == b.co_name}


def definition(text: str, name: str) -> ast.FunctionDef:
    body = ast.parse(text).body
    *classes, last = name.split(".")
    for part in classes:
        body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == part).body
    return [node for node in body if isinstance(node, ast.FunctionDef) and node.name == last][-1]


def evaluate(node: ast.expr, module: object) -> object:
    return eval(compile(ast.Expression(node), "default", "eval"), vars(module))


def draw(seed: int) -> tuple[list[tuple[Path, int]], dict[str, int]]:
    """All mutants in an order of which every beginning is a sample, stratified over the rooms."""
    generator = random.Random(seed)
    keyed, totals = [], {}
    for room in ROOMS:
        files = sorted((ROOT / "resnet_func" / room).rglob("*.py"))
        found = [(path, number) for path in files for number in range(len(mutations_of(path)[1]))]
        totals[room] = len(found)
        generator.shuffle(found)
        keyed += [((i + 0.5) / len(found), pair) for i, pair in enumerate(found)]
    return [pair for _, pair in sorted(keyed)], totals


@dataclass
class Seen:
    """What a test calls and costs."""

    seconds: float = 0.0
    passed: bool = True
    calls: list[tuple[str, str]] = field(default_factory=list)


class Session:
    """A plugin of pytest: in place of the tests' one run, a run for each mutant."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.failed: list[str] = []

    def pytest_sessionstart(self) -> None:
        from hypothesis import Phase, settings

        settings.register_profile(
            "mutants",
            settings.get_profile("suite"),
            phases=(Phase.explicit, Phase.generate),
            database=None,
            derandomize=True,
        )
        settings.load_profile("mutants")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        kept = Path(self.options.seen)
        in_a_fork(lambda: self.look(session, kept), seconds=3600)
        rows = map(json.loads, kept.read_text().splitlines())
        self.seen = {row.pop("name"): Seen(**row) for row in rows}
        self.items = {item.nodeid: item for item in session.items}
        for item in session.items:  # what the first call of anything imports is imported once, here
            if item.nodeid.startswith("resnet_func/per_sample/transforms.py"):
                self.passes(item)
        drawn, totals = draw(self.options.seed)
        print(json.dumps(totals), flush=True)
        chosen = drawn[self.options.skip : self.options.skip + self.options.count]
        if self.options.again:
            chosen = [(ROOT / file, number) for file, number in json.loads(Path(self.options.again).read_text())]
        stop = time.monotonic() + 60 * self.options.minutes
        with Path(self.options.out).open("a") as out:
            for path, number in chosen:
                if time.monotonic() > stop:
                    break
                outcome = self.meet(*make(path, number))
                print(json.dumps(asdict(outcome)), file=out, flush=True)
        return True

    def look(self, session: pytest.Session, kept: Path) -> None:
        """Runs each test once, and notes which functions it calls and how long it takes."""
        known = kept.read_text() if kept.is_file() else ""
        known = {json.loads(row)["name"] for row in known.splitlines()}
        items = [item for item in session.items if item.nodeid not in known]
        with kept.open("a") as out:
            for item, following in zip_longest(items, items[1:]):
                print(json.dumps({"name": item.nodeid, **asdict(self.watch(item, following))}), file=out, flush=True)

    def watch(self, item: pytest.Item, following: pytest.Item | None) -> Seen:
        calls: set[tuple[str, str]] = set()

        def note(frame: FrameType, event: str, argument: object) -> None:
            code = frame.f_code
            if code.co_filename.startswith(SOURCE):
                calls.add((code.co_filename, code.co_qualname))

        start = time.process_time()
        signal.signal(signal.SIGPROF, lambda *_: sys.settrace(None) or pytest.fail("slow"))
        signal.setitimer(signal.ITIMER_PROF, SLOW)
        sys.settrace(note)
        passed = self.passes(item, following)
        sys.settrace(None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        shown = {(file.removeprefix(f"{ROOT}/"), name.split(".<locals>")[0]) for file, name in calls}
        return Seen(round(time.process_time() - start, 3), passed, sorted(shown))

    def passes(self, item: pytest.Item, following: pytest.Item | None = None) -> bool:
        self.failed.clear()
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        return not self.failed

    def meet(self, mutant: Mutant, text: str) -> Outcome:
        own = "/".join(["tests", *mutant.file.split("/")[1:-1], f"test_{mutant.file.split('/')[-1]}"])
        called = [mutant.file, mutant.function]
        usable = {n: s for n, s in self.seen.items() if n in self.items and (s.passed or s.seconds >= SLOW)}
        names = [n for n, s in usable.items() if called in s.calls]
        if not names:  # nothing is seen of what a compiler traces
            names = [name for name in usable if "compile" in name]
        names.sort(key=lambda name: (not name.startswith(own) or not self.seen[name].passed, self.seen[name].seconds))

        def run() -> dict[str, object]:
            try:
                install(mutant, text)
            except BaseException as error:
                return {"killed_by": f"ERROR {error!r}", "tests": 0}
            start = time.process_time()
            for i, name in enumerate(names):
                if not self.passes(self.items[name], self.items[names[i + 1]] if i + 1 < len(names) else None):
                    return {"killed_by": name, "tests": i + 1}
                if time.process_time() - start > self.options.seconds:
                    return {"killed_by": "", "tests": i + 1}
            return {"killed_by": "", "tests": len(names)}

        start = time.monotonic()
        answer = in_a_fork(run, seconds=3 * self.options.seconds) or {"killed_by": "the end of its process", "tests": 0}
        return Outcome(mutant, seconds=round(time.monotonic() - start, 2), **answer)


def in_a_fork(function, seconds: float):
    """What a function returns in a process of its own; None where that died, or took too long."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        try:
            answer = json.dumps(function())
        except BaseException:
            answer = ""
            if "MUTANTS_DEBUG" in os.environ:
                import traceback

                Path(os.environ["MUTANTS_DEBUG"]).write_text(traceback.format_exc())
        with os.fdopen(writer, "w") as stream:
            stream.write(answer)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        answer = stream.read()
    os.waitpid(child, 0)
    return json.loads(answer) if answer else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seconds", type=float, default=20, help="of CPU that the tests of a mutant may take")
    parser.add_argument("--out", default="mutants.jsonl")
    parser.add_argument("--seen", default="mutants_seen.json")
    parser.add_argument("--again", default="")
    options = parser.parse_args()
    paths = [f"tests/{room}" for room in ROOMS] + [f"resnet_func/{room}" for room in ROOMS]
    pytest.main(
        ["-o", "addopts=", "--doctest-modules", "-m", "not nightly", "-q", "-p", "no:cacheprovider", "-n0", *paths],
        plugins=[Session(options)],
    )


if __name__ == "__main__":
    main()
