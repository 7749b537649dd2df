"""Names of other projects: every prefix and word comes back, and no name the network has is touched."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

import resnet_func as rf
from resnet_func.models.interop.checkpoint_names import ATTRIBUTES, HEADS, SHORTCUTS, WRAPPERS, translate

MODEL = rf.resnet18(num_classes=5, depths=(1, 1, 1, 1))
EXPECTED = rf.to_state_dict(MODEL, *MODEL.init(torch.Generator()))


@given(
    st.lists(st.sampled_from(WRAPPERS), max_size=3),
    st.lists(st.sampled_from(ATTRIBUTES), max_size=2),
    st.sampled_from(HEADS),
    st.sampled_from(SHORTCUTS),
)
def test_whatever_was_put_before_and_instead_comes_off(
    wrappers: list[str], attributes: list[str], head: str, shortcut: str
) -> None:
    prefix = "".join(f"{part}." for part in (*wrappers, *attributes))
    theirs = {
        prefix + key.replace("fc.", f"{head}.").replace("downsample", shortcut): leaf
        for key, leaf in EXPECTED.items()
    }
    renamed, notes = translate(theirs, EXPECTED)
    assert set(renamed) == set(EXPECTED)
    assert all(renamed[key] is leaf for key, leaf in EXPECTED.items())
    assert bool(notes) == (list(theirs) != list(EXPECTED))
    text = "; ".join(notes)
    assert all(f"'{name}.'" in text for name in (*wrappers, *attributes))


def test_a_network_of_these_names_keeps_them() -> None:
    """A network whose own layers are called model, head, shortcut or module."""
    leaf = torch.zeros(2)
    own = {f"{name}.weight": leaf for name in ("model", "encoder.module", "net.shortcut.0", "head", "fc")}
    assert translate(own, own) == (own, [])


def test_a_head_of_another_size_is_another_layer() -> None:
    theirs = {**EXPECTED, "linear.weight": torch.zeros(7, 512)}
    theirs.pop("fc.weight")
    assert "linear.weight" in translate(theirs, EXPECTED)[0]
    assert "fc.weight" in translate(theirs, EXPECTED, any_head=True)[0]


def test_two_that_mean_the_same_stay_two() -> None:
    """Neither takes the other's place: the unexpected one is listed later."""
    theirs = {
        **EXPECTED,
        "module.fc.bias": torch.ones(5),
        "linear.bias": torch.ones(5),
        "net.fc.bias": torch.ones(5),
    }
    renamed, _ = translate(theirs, EXPECTED)
    assert renamed["fc.bias"] is EXPECTED["fc.bias"]
    assert len(renamed) == len(theirs)
