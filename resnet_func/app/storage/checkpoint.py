"""Durable, verified checkpoints: a .safetensors file, and a JSON manifest that vouches for it.

A checkpoint "last" is `last.json` (SHA-256, size, leaf table, meta) and `last.<hash>.safetensors`, and, to
fall back on, `last.previous.json` and its tensors. Renaming `last.json` into place is the one commit point;
nothing is removed before that is durable. The same tree and meta give the same bytes. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import optree
import safetensors.torch
import torch
from torch import Tensor

from resnet_func import files
from resnet_func.app.errors import AppError

Tree = TypeVar("Tree")
# a name for files, which stays when the module moves
_KIND = {"format": "resnet_func.app.checkpoint", "version": 1}


class CheckpointError(AppError):
    """A checkpoint that cannot be written, read or used; the message is one line with the way out."""


class _DamagedError(Exception):
    """One generation is unusable, another may not be."""


def save(folder: Path, name: str, tree: Any, *, meta: dict[str, Any]) -> Path:
    """Write `tree` as the checkpoint `name`, atomically; the one it replaces stays as the fallback.

    Args:
        folder: The run folder; made if absent.
        name: "last", "best", ...: letters, digits, "_" and "-".
        tree: Nested dicts, NamedTuples, tuples and lists of tensors. A leaf's name is its dotted path (keys,
            field names, positions); None leaves vanish; aliased leaves are written once each.
        meta: What JSON holds. Tuples come back as lists; NaN and Infinity pass: a diverged run saves too.

    Returns:
        The manifest's path.

    Raises:
        CheckpointError: the disk is full or refuses; what could be loaded before still can be.
        TypeError: a leaf is no dense tensor of a dtype that safetensors knows, or meta is not JSON.
        ValueError: `name` is not a plain name, or two leaves share a path.

    Memory formats: the file holds values in row-major order, as readers of safetensors expect. The manifest
    holds strides, and `load` restores them: kernels, so the bits of a resumed run, depend on them. Views
    with gaps or overlaps become dense. One process at a time; needs three times the tree's size in memory.
    On the order of syncs and renames: Pillai et al., OSDI 2014, "All File Systems Are Not Created Equal".
    """
    current = _manifests(Path(folder), name)[0]
    leaves = _named_leaves(tree)[0]
    data = _serialize(leaves)
    digest = hashlib.sha256(data).hexdigest()
    tensors = current.with_name(f"{name}.{digest[:16]}.safetensors")
    table = {path: _describe(leaf) for path, leaf in leaves.items()}
    body = {"file": tensors.name, "sha256": digest, "size": len(data), "leaves": table, "meta": meta}
    try:
        _commit(current, _encode({**_KIND, **body}), tensors, data)
    except OSError as error:
        with suppress(OSError):
            _remove_unnamed(current.parent, name, only=tensors.name)
        raise CheckpointError(
            f"cannot save checkpoint {name!r} in {folder}: {error.strerror or error}. What was saved "
            f"before is kept: free {len(data) / 1e6:.1f} MB or repair the disk, then resume"
        ) from error
    return current


def load(
    folder: Path, name: str, like: Tree, *, device: torch.device | str | None = None
) -> tuple[Tree, dict[str, Any], str | None]:
    """Read the checkpoint `name`, every byte verified, into the structure of `like`.

    Args:
        folder: The run folder.
        name: As given to `save`.
        like: A tree of the structure, shapes and dtypes wanted; its values and strides do not matter.
        device: Where the tensors go; None means where `like`'s leaves are (for meta leaves, the CPU).

    Returns:
        `(tree, meta, warning)`: new tensors with the strides that were saved. The warning is None, or one
        line: the newest generation is damaged, how, and that the one before it was loaded.

    Raises:
        CheckpointError: no such checkpoint, none intact, an unknown format, or other leaves than `like`'s
            (the missing, unexpected and mis-shaped are named).
    """
    flat, manifest, warning = _newest(Path(folder), name)
    wanted, treespec = _named_leaves(like)
    table = manifest["leaves"]
    _check_fit(Path(folder) / f"{name}.json", wanted, table)
    devices = [device or ("cpu" if leaf.is_meta else leaf.device) for leaf in wanted.values()]
    placed = [_place(flat[p], table[p]["stride"], d) for p, d in zip(wanted, devices, strict=True)]
    tree: Any = optree.tree_unflatten(treespec, placed)
    return tree, manifest["meta"], warning


def load_flat(
    folder: Path, name: str, *, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any], str | None]:
    """`load` without a structure to check: `({dotted path: tensor}, meta, warning)`, paths sorted.

    `tree.unflatten` makes nested dicts of it; a TrainState gives "params", "state" and "opt_state".
    """
    flat, manifest, warning = _newest(Path(folder), name)
    placed = {path: _place(flat[path], leaf["stride"], device) for path, leaf in manifest["leaves"].items()}
    return placed, manifest["meta"], warning


def read_meta(folder: Path, name: str) -> dict[str, Any]:
    """The meta that `load` would return: same verification, same fallback, same errors."""
    return _newest(Path(folder), name)[1]["meta"]


def exists(folder: Path, name: str) -> bool:
    """Whether a generation of `name` is in `folder`, intact or not."""
    return any(path.exists() for path in _manifests(Path(folder), name))


def _named_leaves(tree: Any) -> tuple[dict[str, Tensor], Any]:
    accessors, leaves, treespec = optree.tree_flatten_with_accessor(tree)
    named: dict[str, Tensor] = {}
    for accessor, leaf in zip(accessors, leaves, strict=True):
        # A NamedTuple's entry is a position; its field is the name.
        path = ".".join(str(getattr(entry, "field", entry.entry)) for entry in accessor)
        if path in named or path == "__metadata__":
            raise ValueError(f"leaf path {path!r} is taken; rename a key (one with a dot in it, perhaps)")
        if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
            raise TypeError(
                f"leaf {path!r} must be a dense tensor, not {leaf!r:.40}; plain values go in meta"
            )
        named[path] = leaf
    return named, treespec


def _serialize(leaves: dict[str, Tensor]) -> bytes:
    # Fresh row-major copies: safetensors refuses shared memory, and would write a lazy conjugate's or
    # negative's memory for its values. It sorts its header, so the bytes do not depend on our order.
    copies = {
        path: torch.empty(t.shape, dtype=t.dtype, device="cpu").copy_(t.detach())
        for path, t in leaves.items()
    }
    try:
        return safetensors.torch.save(copies)
    except KeyError as error:
        raise TypeError(f"safetensors has no dtype {error}; convert the leaf first") from error


def _describe(leaf: Tensor) -> dict[str, Any]:
    dense = torch.empty_like(leaf, device="meta")  # keeps dense strides, drops gaps and overlaps
    dtype = str(leaf.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(leaf.shape), "stride": list(dense.stride())}


def _place(value: Tensor, stride: list[int], device: torch.device | str) -> Tensor:
    # Into memory of torch's own: the file's bytes lie where they fall, and alignment can choose the kernel.
    return torch.empty_strided(value.shape, stride, dtype=value.dtype, device=device).copy_(value)


def _check_fit(manifest: Path, wanted: dict[str, Tensor], table: dict[str, Any]) -> None:
    want = {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in wanted.items()}
    have = {path: f"torch.{leaf['dtype']}{leaf['shape']}" for path, leaf in table.items()}
    differences = {
        "missing": [p for p in want if p not in have],
        "unexpected": [p for p in have if p not in want],
        "mis-shaped": [f"{p}: wanted {w}, saved {have[p]}" for p, w in want.items() if w != have.get(p, w)],
    }
    firsts = {kind: "; ".join(paths[:3] + ["..."] * (len(paths) > 3)) for kind, paths in differences.items()}
    parts = [f"{len(paths)} {kind} ({firsts[kind]})" for kind, paths in differences.items() if paths]
    if parts:
        raise CheckpointError(
            f"{manifest} holds another network or optimizer: {', '.join(parts)}. "
            "Use the configuration it was saved with, or another folder"
        )


def _manifests(folder: Path, name: str) -> tuple[Path, Path]:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):  # no dots: what follows one is ours
        raise ValueError(f'a checkpoint\'s name is letters, digits, "_" and "-"; got {name!r}. Try "last"')
    return folder / f"{name}.json", folder / f"{name}.previous.json"


def _encode(manifest: dict[str, Any]) -> bytes:
    # By way of JSON: keys 9 and 10 sort one way as numbers, the other way when read back as strings.
    body = json.loads(json.dumps({key: value for key, value in manifest.items() if key != "manifest_sha256"}))
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "manifest_sha256": digest}, sort_keys=True) + "\n").encode()


def _newest(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any], str | None]:
    damages: list[str] = []
    for path in _manifests(folder, name):
        try:
            manifest, data = _read(path)
        except _DamagedError as damage:
            damages.append(str(damage))
            continue
        warning = f"checkpoint {name!r} is damaged ({'; '.join(damages)}): loaded the one before it"
        return safetensors.torch.load(data), manifest, warning if damages else None
    raise CheckpointError(
        f"no intact checkpoint {name!r} in {folder}: {'; '.join(damages)}. "
        "Check the folder; restore these files from a copy, or delete them and train anew"
    )


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """One generation, every byte verified: the manifest and the tensors' file."""
    raw = _read_bytes(path)
    manifest, intact = {}, False
    with suppress(ValueError, AttributeError, RecursionError):  # no JSON; JSON, but no object; only brackets
        manifest = json.loads(raw)
        intact = _encode(manifest) == raw
    if not intact:
        raise _DamagedError(f"{path.name} does not match its own checksum")
    kind = {key: manifest.get(key) for key in _KIND}
    if kind != _KIND:
        raise CheckpointError(f"{path} is {kind}, not {_KIND}; read it with the resnet_func that wrote it")
    file, size = manifest["file"], manifest["size"]
    data = _read_bytes(path.parent / Path(file).name)
    if len(data) != size:
        raise _DamagedError(f"{file} has {len(data)} bytes instead of {size}")
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise _DamagedError(f"{file} does not match its SHA-256")
    return manifest, data


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _DamagedError(f"{path.name}: {error.strerror or error}") from error


def _commit(current: Path, manifest: bytes, tensors: Path, data: bytes) -> None:
    folder, previous = current.parent, current.with_suffix(".previous.json")
    files.make_folder(folder)
    demoted = _worth_keeping(current, tensors)
    # What needs space comes first, while every manifest still says what it said.
    renames = [(files.stage(tensors, data), tensors), (files.stage(current, manifest), current)]
    if demoted is not None:
        renames.append((files.stage(previous, demoted), previous))
    for temporary, path in renames:  # the second is the commit
        files.put_in_place(temporary, path)
    # Saved and durable: failing to tidy up is not failing to save, and the next save tidies again.
    with suppress(OSError):
        _remove_unnamed(folder, current.stem)


def _worth_keeping(current: Path, tensors: Path) -> bytes | None:
    """The manifest to demote to fallback; None if it is damaged, or has the tensors about to be written."""
    try:
        manifest, _ = _read(current)
    except (_DamagedError, CheckpointError):
        return None
    return None if manifest["file"] == tensors.name else _encode(manifest)


def _remove_unnamed(folder: Path, name: str, *, only: str | None = None) -> None:
    """Remove temporary files, and the tensors (all, or `only` those) that no manifest on disk names."""
    named = b"".join(path.read_bytes() for path in _manifests(folder, name) if path.exists())
    tensors = [folder / only] if only else folder.glob(f"{name}.{'[0-9a-f]' * 16}.safetensors")
    orphans = [path for path in tensors if path.name.encode() not in named]
    for path in [*orphans, *folder.glob(f"{name}.*.tmp")]:
        path.unlink(missing_ok=True)
