"""Files of weights that others wrote, and the state_dict inside them."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from resnet_func import tree

# Under which names checkpoints keep the network, by preference where several fit equally well.
USUAL = ("state_dict", "model_state_dict", "model", "net", "network", "params", "module", "weights")


def read_checkpoint(path: str | Path) -> Any:
    """What a file holds, on the CPU: `.safetensors`, or whatever `torch.save` wrote, by `weights_only=True`.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: it is cut short, not a file of weights, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file of weights at {path}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the file of weights in it")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" not in str(error):  # what is no pickle at all
            raise ValueError(f"{path} is no file of weights, or is cut short") from error
        raise ValueError(
            f"{path} holds Python objects beside tensors, which may run code when read. If you trust it, "
            "pass torch.load(path, weights_only=False)['...'], or save module.state_dict() alone"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, safetensors.SafetensorError) as error:
        why = "" if isinstance(error, KeyError) else f": {_first_line(error)}"  # a key says nothing
        raise ValueError(f"{path} is no file of weights, or is cut short{why}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def find_state_dict(checkpoint: Any, wanted: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The state_dict in a checkpoint that looks most like the wanted one, and where it was.

    Of the dicts of tensors in it, however deep, the one with the most tensors whose shape and last two names
    are wanted ones; where several are equal, the one under the most usual name.

    Args:
        checkpoint: A dict of tensors, or of such dicts and anything else.
        wanted: Tensors by name, for their shapes.

    Returns:
        The dict of tensors, and its place, such as "['ema']['model']"; "" where the checkpoint is it.

    Raises:
        TypeError: it is no dict. ValueError: there is no dict of tensors in it.
    """
    _check_mapping(checkpoint)
    candidates = _dicts_of_tensors(checkpoint, ())
    if not candidates:
        others = [str(key) for key, value in checkpoint.items() if not isinstance(value, Tensor)]
        raise ValueError(f"expected a dict of tensors; these are none: {', '.join(others) or 'it is empty'}")
    ends = _ends(wanted)

    def likeness(place: tuple[str, ...]) -> tuple[int, int, int]:
        tensors, name = candidates[place], place[-1] if place else USUAL[0]
        usual = USUAL.index(name) if name in USUAL else len(USUAL)
        return (_ends(tensors) & ends).total(), -len(tensors), -usual

    best = max(candidates, key=likeness)
    return candidates[best], "".join(f"[{key!r}]" for key in best)


def _check_mapping(checkpoint: Any) -> None:
    if isinstance(checkpoint, nn.Module):
        raise TypeError("expected a state_dict; got a module. Pass module.state_dict(), or use from_module")
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"expected a state_dict or the path of one; got {type(checkpoint).__name__}")


def _ends(tensors: Mapping[str, Tensor]) -> Counter[tuple[str, tuple[int, ...]]]:
    """How often the last two parts of a name come with a shape."""
    return Counter((".".join(key.split(".")[-2:]), tuple(leaf.shape)) for key, leaf in tensors.items())


def _dicts_of_tensors(found: Mapping[Any, Any], place: tuple[str, ...]) -> dict[tuple[str, ...], dict]:
    """Every dict in it, at any depth, that holds tensors by name and nothing else; flattened."""
    flat = tree.flatten({str(key): value for key, value in found.items()})
    named = all(isinstance(key, str) for key in found)
    candidates: dict[tuple[str, ...], dict] = {}
    if flat and named and all(isinstance(value, Tensor) for value in flat.values()):
        candidates[place] = flat
    for key, value in found.items():
        if isinstance(value, Mapping) and isinstance(key, str):
            candidates |= _dicts_of_tensors(value, (*place, key))
    return candidates
