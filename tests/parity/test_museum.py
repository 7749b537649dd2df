"""Every exhibit is killed, by a check that passes without it; nothing of a bug stays; survivors are told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from parity import museum
from parity.__main__ import main
from parity.cell import run
from parity.museum.exhibit import Exhibit, applied, both, checks, constant, edit
from parity.sections import bitwise
from resnet_func.models import blocks, layers

NAMES = pytest.mark.parametrize("name", list(museum.EXHIBITS))
KILLER = "bitwise/resnet20/fp32-eval-nchw"
# a sum of two terms is the same in either order: no bug, and no check may say so
HARMLESS = edit(blocks.basic_block, ("y + shortcut(layer, x)", "shortcut(layer, x) + y"))


def made_up(mutation: Callable[[], Any], killer: str = KILLER) -> Exhibit:
    return Exhibit("made-up", "none", "here", killer, mutation)


def library() -> dict[str, Any]:
    """The code of every function and the value of every constant of the library and of the suite."""
    found: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("resnet_func", "parity"):
            for key, value in vars(module).items():
                if key.startswith("__"):
                    continue
                found[f"{name}.{key}"] = getattr(value, "__code__", value)
                if isinstance(value, type):
                    for inner, method in vars(value).items():
                        found[f"{name}.{key}.{inner}"] = getattr(method, "__code__", None)
    return found


@NAMES
def test_every_exhibit_is_killed_and_leaves_nothing(name: str) -> None:
    checks()
    before = library()
    proof = museum.prove(museum.EXHIBITS[name])
    assert proof.killed, proof.said
    assert proof.said
    after = library()
    assert after.keys() == before.keys()
    assert not [key for key, value in after.items() if value is not before[key]]


def test_the_museum_has_the_bugs_it_was_built_for() -> None:
    assert len(museum.EXHIBITS) >= 30
    assert museum.EXHIBITS.keys() >= {
        "tolerances-by-position",
        "mean-for-sum",
        "groups-ignored",
        "accumulated-gradients-alias",
        "clipped-sums-alias",
        "ghost-norm-of-the-bias",
        "ghost-norm-with-the-bias-in-it",
        "clip-factor-with-epsilon",
        "silent-instance-norm",
        "batch-statistics-not-refused",
        "biased-running-variance",
        "unbiased-normalisation",
        "momentum-of-the-old-value",
        "misspelled-key",
    }
    for name, exhibit in museum.EXHIBITS.items():
        assert name == exhibit.name
        assert exhibit.bug
        assert exhibit.seen
        assert exhibit.killer in checks()


def test_no_two_exhibits_share_a_name() -> None:
    subjects = (
        museum.layers,
        museum.network,
        museum.training,
        museum.per_sample,
        museum.curvature,
        museum.privacy,
        museum.borders,
    )
    assert len(museum.EXHIBITS) == sum(len(subject.EXHIBITS) for subject in subjects)


# --------------------------------------------------------------------------- proofs that are none


def test_a_harmless_change_survives() -> None:
    proof = museum.prove(made_up(HARMLESS))
    assert (proof.killed, proof.said) == (False, "the check passes with the bug")


def test_a_crash_kills_nothing() -> None:
    """Neither in a cell nor in a property, which makes an assertion's of every error."""
    crash = edit(layers.batch_norm, ("y = F.batch_norm(x,", "y = F.batch_norm(x[0, 0],"))
    for killer in (KILLER, "properties/training-normalises-each-channel"):
        proof = museum.prove(made_up(crash, killer))
        assert not proof.killed
        assert proof.said.startswith(
            ("the check breaks, with ValueError: ", "the check breaks, with RuntimeError: ")
        )


def test_a_check_that_fails_anyway_kills_nothing() -> None:
    killer = "properties/running-statistics-move-by-a-tenth"
    wrong = made_up(museum.EXHIBITS["biased-running-variance"].mutation, killer)
    with applied(constant(layers, "BATCH_NORM_MOMENTUM", 0.2)):
        museum.exhibit._innocent.cache_clear()
        proof = museum.prove(wrong)
    museum.exhibit._innocent.cache_clear()
    assert not proof.killed
    assert proof.said.startswith("the check fails without the bug too: worst leaf: relative error")


def test_a_check_that_is_none_kills_nothing() -> None:
    proof = museum.prove(made_up(HARMLESS, "bitwise/resnet21"))
    assert (proof.killed, proof.said) == (False, "no quick check is called bitwise/resnet21")


@pytest.mark.parametrize(("old", "found"), [("no such line", 0), ("layer(", 5)])
def test_an_outdated_exhibit_says_so(old: str, found: int) -> None:
    before = blocks.basic_block.__code__
    stale = edit(blocks.basic_block, (old, "x"))
    with pytest.raises(LookupError, match=f"basic_block has .* {found} times, not once: renew the exhibit"):
        museum.prove(made_up(stale))
    assert blocks.basic_block.__code__ is before


# --------------------------------------------------------------------------- nothing stays


def test_a_network_built_without_the_bug_does_not_hide_it() -> None:
    """Strides are read when a network is built, and the matrix keeps the last one it built."""
    cell = checks()[KILLER]
    assert run(cell).outcome == "passed"
    assert bitwise.pair.cache_info().currsize == 1
    moved = museum.EXHIBITS["padding-moved-in-one-block"]
    with applied(moved.mutation):
        assert run(cell).outcome == "failed"
    assert run(cell).outcome == "passed"


def test_a_bug_is_gone_after_an_error() -> None:
    momentum, code = layers.BATCH_NORM_MOMENTUM, layers.conv2d.__code__
    two = both(
        constant(layers, "BATCH_NORM_MOMENTUM", 0.9),
        edit(layers.conv2d, ("spec.padding, spec.dilation", "0, spec.dilation")),
    )

    def interrupted() -> None:
        with applied(two):
            assert momentum != layers.BATCH_NORM_MOMENTUM
            assert code is not layers.conv2d.__code__
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert momentum == layers.BATCH_NORM_MOMENTUM
    assert code is layers.conv2d.__code__


# --------------------------------------------------------------------------- the command, and the cells


def test_the_tour_tells_bug_place_and_killer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["museum", "--only", "biased-"]) == 0
    out = capsys.readouterr().out
    for told in ("biased-running-variance", "running_var", "tinygrad", "1e-12"):
        assert told in out
    assert out.endswith("1 exhibits: 1 killed, 0 survived\n")


def test_a_survivor_fails_the_tour(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = museum.EXHIBITS["biased-running-variance"]
    pair = {"made-up": made_up(HARMLESS), "killed": replace(killed, name="killed")}
    monkeypatch.setattr(museum, "EXHIBITS", pair)
    assert main(["museum"]) == 1
    out = capsys.readouterr().out
    assert "SURVIVED" in out
    assert out.endswith("2 exhibits: 1 killed, 1 survived\n")
    outcomes = [run(cell) for cell in museum.cells(quick=True)]
    assert [(result.name, result.outcome) for result in outcomes] == [
        ("made-up", "failed"),
        ("killed", "passed"),
    ]
    assert outcomes[0].said == f"survived {KILLER}: the check passes with the bug"
    assert outcomes[1].said.startswith(f"killed by {killed.killer}: worst leaf: relative error")


def test_a_tour_of_nothing_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["museum", "--only", "nope"]) == 2
    assert capsys.readouterr().err.startswith("Error: no exhibit starts with 'nope'; ")


def test_an_unknown_option_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["museum", "--quick"])
    assert exit_.value.code == 2
    assert "museum" in capsys.readouterr().err
