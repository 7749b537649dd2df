"""Other projects' names for the layers of a network, as the network's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

WRAPPERS = ("module", "_orig_mod", "_module")  # what DataParallel, torch.compile and Opacus put before names
# where a trainer's module keeps the network, and what we call its tensors
ATTRIBUTES = ("model", "net", "network", "encoder", "backbone", "params", "state")
HEADS = ("fc", "linear", "classifier", "head")
SHORTCUTS = ("downsample", "shortcut")
COUNTERS = ("n_averaged",)  # of torch.optim.swa_utils.AveragedModel


def translate(
    given: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, any_head: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the expected names, as far as that can be told, and what was done, in words.

    A name the network has stays. From others the wrappers' prefixes are dropped, then those of attributes
    that a trainer keeps the network in; then other words for the head and the shortcuts are exchanged, where
    the shape fits (`any_head`: the head's in any case).

    Args:
        given: Tensors by foreign name.
        expected: Tensors by the network's names, for their shapes.
    """
    notes = []
    counters = [key for key in given if key in COUNTERS and key not in expected]
    if counters:
        notes.append(f"left out {', '.join(counters)}")
    bare, dropped = _unwrap({key: leaf for key, leaf in given.items() if key not in counters}, expected)
    bare, attributes = _drop_attributes(bare, expected, any_head)
    dropped = [*dropped, *attributes]
    if dropped:
        notes.append(f"dropped {', '.join(repr(f'{name}.') for name in dropped)} from the names")
    renamed, exchanged = _exchange_words(bare, expected, any_head)
    notes += [f"read {theirs!r} as {ours!r}" for theirs, ours in exchanged]
    return renamed, notes


def _unwrap(
    given: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Names without what wrappers put into them, and which wrappers those were."""
    unwrapped: dict[str, Tensor] = {}
    found: set[str] = set()
    for key, leaf in given.items():
        parts = key.split(".")
        bare = ".".join(part for part in parts if part not in WRAPPERS)
        if key in expected or bare in given or bare in unwrapped:
            unwrapped[key] = leaf
        else:
            unwrapped[bare] = leaf
            found |= set(WRAPPERS) & set(parts)
    return unwrapped, [wrapper for wrapper in WRAPPERS if wrapper in found]


def _drop_attributes(
    given: Mapping[str, Tensor], expected: Mapping[str, Tensor], any_head: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """Names without the attributes before them, where what is left is expected."""
    result: dict[str, Tensor] = {}
    found: list[str] = []
    for key, leaf in given.items():
        parts = key.split(".")
        first = 0
        while first < len(parts) - 1 and parts[first] in ATTRIBUTES:
            first += 1
        name = key
        for start in range(1, first + 1):
            bare = ".".join(parts[start:])
            known = bare in expected or _other_words(bare, leaf, expected, any_head) is not None
            if key not in expected and known and bare not in given and bare not in result:
                name = bare
                found += [part for part in parts[:start] if part not in found]
                break
        result[name] = leaf
    return result, found


def _exchange_words(
    given: Mapping[str, Tensor], expected: Mapping[str, Tensor], any_head: bool
) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """Names with the network's words for head and shortcut, and the pairs of words exchanged."""
    result: dict[str, Tensor] = {}
    exchanged: dict[tuple[str, str], None] = {}
    for key, leaf in given.items():
        other = None if key in expected else _other_words(key, leaf, expected, any_head)
        if other is None or other[0] in given or other[0] in result:
            result[key] = leaf
        else:
            result[other[0]] = leaf
            exchanged[other[1:]] = None
    return result, list(exchanged)


def _other_words(
    key: str, leaf: Tensor, expected: Mapping[str, Tensor], any_head: bool
) -> tuple[str, str, str] | None:
    """The expected name that means the same with the same shape: (name, their word, our word)."""
    for name, theirs, ours in _spellings(key):
        fits = name in expected and (expected[name].shape == leaf.shape or (any_head and ours in HEADS))
        if fits:
            return name, theirs, ours
    return None


def _spellings(key: str) -> Iterator[tuple[str, str, str]]:
    parts = key.split(".")
    if len(parts) == 2 and parts[0] in HEADS:
        for head in HEADS:
            yield f"{head}.{parts[1]}", parts[0], head
    for index, part in enumerate(parts):
        if part in SHORTCUTS:
            for word in SHORTCUTS:
                yield ".".join([*parts[:index], word, *parts[index + 1 :]]), part, word
