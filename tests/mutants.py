"""`python -m tests.mutants`: draw mutants of the source, run the tests on each, print what survives.

mutmut makes the mutants (`uv run --group mutation`). Its own runner imports torch anew for each, and its
trampolines stop a compiler; here pytest collects once, and a mutant is a fork of that process in which one
function has other code. It meets the tests that call the function: those of its own test file first, the
cheapest first. What a module computed on import stays as it was, so a survivor of a function that is called
there needs a fresh process.
"""

from __future__ import annotations

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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest
import tyro

ROOT = Path(__file__).parent.parent
ROOMS = ("models", "optim", "per_sample")
SLOW = 1.0  # seconds of CPU after which a test is stopped while it is watched; on mutants it runs last


@dataclass(frozen=True)
class Options:
    """Mutants of `models`, `optim` and `per_sample`, and which of them the fast tests kill."""

    seed: int = 0
    """Of the order in which mutants are drawn, stratified over the folders."""

    count: int = 300
    """Mutants to draw."""

    minutes: float = 60.0
    """When to stop before that."""

    seconds: float = 6.0
    """CPU time that the tests of one mutant may take together."""

    out: Path = Path("mutants.jsonl")
    """Where outcomes are appended."""

    watched: Path = Path("mutants_tests.jsonl")
    """Where it is kept what each test calls and costs."""

    again: Path | None = None
    """Outcomes of an earlier run: only their survivors are met, by new tests perhaps."""


@dataclass(frozen=True)
class Mutant:
    file: str
    function: str
    number: int
    line: int
    before: str
    after: str


@dataclass(frozen=True)
class Outcome:
    """`killed_by`: a test; "" for a survivor, also of the limit of time."""

    mutant: Mutant
    killed_by: str
    tests: int
    seconds: float


@dataclass(frozen=True)
class Watched:
    """What a test calls, as files and qualified names, and what it costs."""

    seconds: float
    passed: bool
    calls: list[list[str]] = field(default_factory=list)


# --------------------------------------------------------------------------- mutants


@functools.cache
def mutations_of(path: Path) -> tuple[Any, list[tuple[str, Any]]]:
    """A file's syntax tree, and what mutmut changes in it with the names of the functions around."""
    import libcst as cst
    from mutmut.mutation.file_mutation import create_mutations

    module, mutations, _, _ = create_mutations(str(path), path.read_text(encoding="utf-8"))
    names = {}
    for node in module.body:
        if isinstance(node, cst.FunctionDef):
            names[id(node)] = node.name.value
        if isinstance(node, cst.ClassDef):
            methods = [part for part in node.body.body if isinstance(part, cst.FunctionDef)]
            names |= {id(method): f"{node.name.value}.{method.name.value}" for method in methods}
    # as in mutmut's own runs, what is outside of functions stays
    named = [(names.get(id(one.contained_by_top_level_function)), one) for one in mutations]
    return module, [(name, one) for name, one in named if name]


def make(path: Path, number: int) -> tuple[Mutant, str]:
    """A mutant, with the text of the mutated file."""
    from mutmut.mutation.file_mutation import deep_replace

    module, mutations = mutations_of(path)
    function, mutation = mutations[number]
    text = deep_replace(module, mutation.original_node, mutation.mutated_node).code
    lines = zip(module.code.splitlines(), text.splitlines(), strict=False)
    line, before, after = next((i, a.strip(), b.strip()) for i, (a, b) in enumerate(lines, 1) if a != b)
    return Mutant(path.relative_to(ROOT).as_posix(), function, number, line, before, after), text


def draw(seed: int) -> list[tuple[Path, int]]:
    """All mutants in an order of which every beginning is a sample, stratified over the rooms."""
    generator = random.Random(seed)
    keyed = []
    for room in ROOMS:
        files = sorted((ROOT / "resnet_func" / room).rglob("*.py"))
        found = [(path, number) for path in files for number in range(len(mutations_of(path)[1]))]
        print(f"{room}: {len(found)} mutants")
        generator.shuffle(found)
        keyed += [((i + 0.5) / len(found), pair) for i, pair in enumerate(found)]
    return [pair for _, pair in sorted(keyed)]


def install(mutant: Mutant, text: str) -> None:
    """Gives the living function the mutant's code, wherever it has been imported to."""
    name = mutant.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    module = importlib.import_module(name)
    found: Any = module
    for part in mutant.function.split("."):
        found = vars(found)[part]
    function: FunctionType = getattr(found, "__func__", found)  # of a static method or a class method
    old = function.__code__
    whole = compile(text, old.co_filename, "exec", dont_inherit=True)
    new = [code for code in codes_in(whole) if code.co_qualname == mutant.function][-1]
    function.__code__ = new
    arguments = definition(text, mutant.function).args
    function.__defaults__ = tuple([evaluate(node, module) for node in arguments.defaults]) or None
    named = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    function.__kwdefaults__ = {one.arg: evaluate(node, module) for one, node in named if node} or None
    both = [(a, b) for a, b in zip(codes_in(old), codes_in(new), strict=False) if a.co_name == b.co_name]
    inner = {id(a): b for a, b in both if a.co_freevars == b.co_freevars}
    for thing in gc.get_objects():
        if type(thing) is FunctionType:  # a closure that was made on import
            thing.__code__ = inner.get(id(thing.__code__), thing.__code__)
        if type(thing) is functools._lru_cache_wrapper and str(thing.__module__).startswith("resnet_func"):
            thing.cache_clear()


def codes_in(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from codes_in(constant)


def definition(text: str, name: str) -> ast.FunctionDef:
    body: list[Any] = ast.parse(text).body
    *classes, last = name.split(".")
    for part in classes:
        body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == part).body
    return [node for node in body if isinstance(node, ast.FunctionDef) and node.name == last][-1]


def evaluate(default: ast.expr, module: object) -> Any:
    return eval(compile(ast.Expression(default), "default", "eval"), vars(module))


# --------------------------------------------------------------------------- tests


class Session:
    """A plugin of pytest: in place of its one run of the tests, one for each mutant."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.failed: list[str] = []

    def pytest_sessionstart(self) -> None:
        from hypothesis import Phase, settings

        suite = settings.get_profile("suite")
        more = {"phases": (Phase.explicit, Phase.generate), "database": None, "derandomize": True}
        settings.register_profile("mutants", suite, **more)  # a failure is enough, however large
        settings.load_profile("mutants")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        in_a_fork(self.watch_all, seconds=3600)
        rows = [json.loads(row) for row in self.options.watched.read_text().splitlines()]
        self.watched = {row.pop("name"): Watched(**row) for row in rows}
        for name in self.items:  # what the first call of anything imports is imported once, here
            if name.startswith("resnet_func/per_sample/transforms.py"):
                self.passes(name)
        chosen = draw(self.options.seed)[: self.options.count]
        if self.options.again is not None:
            earlier = [json.loads(row) for row in self.options.again.read_text().splitlines()]
            survivors = [row["mutant"] for row in earlier if not row["killed_by"]]
            chosen = [(ROOT / mutant["file"], mutant["number"]) for mutant in survivors]
        stop = time.monotonic() + 60 * self.options.minutes
        outcomes = []
        for path, number in chosen:
            if time.monotonic() < stop:
                outcomes.append(self.meet(*make(path, number)))
                with self.options.out.open("a") as out:
                    print(json.dumps(asdict(outcomes[-1])), file=out)
        report(outcomes)
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        """A test that is watched and slow fails; inside pytest the signal would break more than that."""

        def stop(number: int, frame: FrameType | None) -> None:
            sys.settrace(None)
            pytest.fail("slow")

        watched = sys.gettrace() is not None
        if watched:
            signal.signal(signal.SIGPROF, stop)
            signal.setitimer(signal.ITIMER_PROF, SLOW)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def passes(self, name: str, following: str | None = None) -> bool:
        self.failed.clear()
        item, after = self.items[name], self.items.get(following or "")
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        return not self.failed

    def watch_all(self) -> None:
        """Runs each test once that has not been watched yet."""
        kept = self.options.watched
        known = {json.loads(row)["name"] for row in (kept.read_text() if kept.is_file() else "").splitlines()}
        names = [name for name in self.items if name not in known]
        with kept.open("a") as out:
            for name, following in zip_longest(names, names[1:]):
                print(json.dumps({"name": name, **asdict(self.watch(name, following))}), file=out, flush=True)

    def watch(self, name: str, following: str | None) -> Watched:
        calls: set[tuple[str, str]] = set()

        def note(frame: FrameType, event: str, argument: object) -> None:
            if frame.f_code.co_filename.startswith(f"{ROOT}/resnet_func"):
                calls.add((frame.f_code.co_filename, frame.f_code.co_qualname))

        start = time.process_time()
        sys.settrace(note)
        passed = self.passes(name, following)
        sys.settrace(None)
        shown = {(file.removeprefix(f"{ROOT}/"), called.split(".<locals>")[0]) for file, called in calls}
        return Watched(round(time.process_time() - start, 3), passed, sorted(map(list, shown)))

    def tests_of(self, mutant: Mutant) -> list[str]:
        usable = {
            name: one
            for name, one in self.watched.items()
            if name in self.items and (one.passed or one.seconds >= SLOW)
        }
        called = [mutant.file, mutant.function]
        names = [name for name, one in usable.items() if called in one.calls]
        if not names:  # nothing is seen of what a compiler traces
            names = [name for name in usable if "compile" in name]
        *folders, file = mutant.file.split("/")[1:]
        own = "/".join(["tests", *folders, f"test_{file}"])
        return sorted(names, key=lambda n: (not n.startswith(own) or not usable[n].passed, usable[n].seconds))

    def meet(self, mutant: Mutant, text: str) -> Outcome:
        names = self.tests_of(mutant)

        def run() -> tuple[str, int]:
            install(mutant, text)
            start = time.process_time()
            for i, (name, following) in enumerate(zip_longest(names, names[1:]), 1):
                if not self.passes(name, following):
                    return name, i
                if time.process_time() - start > self.options.seconds:
                    return "", i
            return "", len(names)

        start = time.monotonic()
        killed_by, tests = in_a_fork(run, seconds=3 * self.options.seconds) or ("", 0)
        return Outcome(mutant, killed_by, tests, round(time.monotonic() - start, 2))


def in_a_fork(function: Callable[[], Any], seconds: float) -> Any:
    """What a function returns in a process of its own; None where that comes to its limit of CPU time.

    Raises:
        RuntimeError: the function raised, or its process died.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        try:
            answer: Any = [function(), None]
        except BaseException as error:
            answer = [None, repr(error)]
        with os.fdopen(writer, "w") as stream:
            stream.write(json.dumps(answer))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        written = stream.read()
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) == -signal.SIGXCPU:
        return None
    result, error = json.loads(written or '[null, "its process died"]')
    if error is not None:
        raise RuntimeError(error)
    return result


def report(outcomes: list[Outcome]) -> None:
    """Prints the survivors, and the share that was killed with its 95 % interval (Clopper-Pearson)."""
    from scipy.stats import binomtest

    survivors = [one.mutant for one in outcomes if not one.killed_by]
    for one in survivors:
        print(f"\n{one.file}:{one.line} {one.function}\n- {one.before}\n+ {one.after}")
    if outcomes:
        killed = len(outcomes) - len(survivors)
        interval = binomtest(killed, len(outcomes)).proportion_ci(method="exact")
        print(f"\n{killed} of {len(outcomes)} killed; 95 %: {interval.low:.1%} to {interval.high:.1%}")


def main() -> None:
    options = tyro.cli(Options, prog="python -m tests.mutants", description=Options.__doc__)
    folders = [f"{root}/{room}" for root in ("tests", "resnet_func") for room in ROOMS]
    plain = ["-o", "addopts=", "--doctest-modules", "-m", "not nightly", "-q", "-p", "no:cacheprovider"]
    plain += ["-s", "-W", "ignore:Module already imported"]
    pytest.main([*plain, *folders], plugins=[Session(options)])


if __name__ == "__main__":
    main()
