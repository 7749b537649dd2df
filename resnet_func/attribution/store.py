"""Rows of a data set on the disk, such as its features: in zarr, by chunks that are there or not.

zarr writes a chunk under another name and renames it, so that a process killed at any moment leaves whole
chunks alone, and the next one goes on with those that are missing. Several processes may fill one store: each
writes chunks of its own, and none waits for another.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from resnet_func import tree
from resnet_func.files import make_folder
from resnet_func.types import Params

if TYPE_CHECKING:
    import zarr

FORMAT = "resnet_func.attribution.store 1"
CHUNK_ROWS = 512


class StoreError(ValueError):
    """A store cannot be used as asked; the message is one line with the way out."""


class Store(NamedTuple):
    """`rows [N, width]` in float32, in chunks of `chunk_rows`; make one with `open_store`."""

    path: Path
    array: zarr.Array[Any]

    @property
    def chunks(self) -> int:
        """How many chunks there are when all is written."""
        return -(-self.array.shape[0] // self.array.chunks[0])

    def row_range(self, chunk: int) -> tuple[int, int]:
        """The rows `start:stop` of a chunk."""
        rows, size = self.array.shape[0], self.array.chunks[0]
        return chunk * size, min(rows, (chunk + 1) * size)

    def missing(self, rank: int = 0, ranks: int = 1) -> list[int]:
        """The chunks that are not written yet, of those that fall to one of so many ranks."""
        return [chunk for chunk in range(rank, self.chunks, ranks) if not self._file(chunk).is_file()]

    def _file(self, chunk: int) -> Path:
        return self.path / self.array.metadata.encode_chunk_key((chunk, 0))

    def write(self, chunk: int, rows: Float[Tensor, "k width"]) -> None:
        """Write one chunk, whole.

        Raises:
            StoreError: the rows are not those of a chunk, or the disk refuses.
        """
        start, stop = self.row_range(chunk)
        if rows.shape != (stop - start, self.array.shape[1]):
            raise StoreError(
                f"chunk {chunk} of {self.path} takes rows [{stop - start}, {self.array.shape[1]}]; "
                f"got {list(rows.shape)}"
            )
        try:
            self.array[start:stop] = rows.detach().to("cpu", torch.float32).numpy()
        except OSError as error:
            raise StoreError(
                f"cannot write {self.path}: {error.strerror or error}. What was written is kept: free some "
                "space, then run the same command again"
            ) from error

    def fill(
        self,
        compute: Callable[[int, int], Float[Tensor, "k width"]],
        *,
        rank: int = 0,
        ranks: int = 1,
        done: Callable[[int], object] = lambda rows: None,
    ) -> None:
        """Compute and write what is missing.

        Args:
            compute: `compute(start, stop)` gives those rows.
            rank, ranks: Which of several processes this one is: each fills every `ranks`-th chunk.
            done: Is told the number of rows after each chunk.
        """
        for chunk in self.missing(rank, ranks):
            start, stop = self.row_range(chunk)
            self.write(chunk, compute(start, stop))
            done(stop - start)

    def remove_leftovers(self) -> None:
        """Remove what processes that were killed had begun to write; only where nobody writes any more."""
        for half in self.path.glob("c/**/*.partial"):
            half.unlink(missing_ok=True)
        for half in self.path.parent.glob(f"{self.path.name}.*.tmp"):
            shutil.rmtree(half, ignore_errors=True)

    def remove(self) -> None:
        """Remove the store from the disk; a process that is killed meanwhile leaves all of it, or none."""
        removed = _temporary(self.path)
        os.rename(self.path, removed)
        shutil.rmtree(removed, ignore_errors=True)

    def blocks(self) -> Iterator[Float[Tensor, "k width"]]:
        """All rows, chunk by chunk.

        Raises:
            StoreError: some are not written yet, or cannot be read.
        """
        missing = self.missing()
        if missing:
            raise StoreError(
                f"{self.path} lacks {len(missing)} of {self.chunks} chunks; fill it before it is read"
            )
        for chunk in range(self.chunks):
            start, stop = self.row_range(chunk)
            try:
                yield torch.from_numpy(np.asarray(self.array[start:stop]))
            except (OSError, ValueError, RuntimeError) as error:
                raise StoreError(
                    f"chunk {chunk} of {self.path} is damaged ({error}); delete {self._file(chunk)} and "
                    "run the same command again"
                ) from error


def open_store(
    path: Path, key: Mapping[str, Any], *, rows: int, width: int, chunk_rows: int = CHUNK_ROWS
) -> Store:
    """Open a store, or make an empty one.

    Args:
        path: Its folder.
        key: What the rows depend on, such as hashes of the checkpoint and the data, and the sketch: values
            that JSON holds.
        rows: N, the samples of the data set.
        width: Numbers in a row.
        chunk_rows: Rows of a chunk, of a new store.

    Raises:
        StoreError: there is a store with another key, or something else; the differences are named.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = open_store(Path(folder) / "s", {"seed": 0}, rows=3, width=2, chunk_rows=2)
    ...     store.fill(lambda start, stop: torch.ones(stop - start, 2))
    ...     [list(block.shape) for block in store.blocks()]
    [[2, 2], [1, 2]]
    """
    # as JSON gives it back: a tuple in the key is a list there
    described = json.loads(json.dumps({"format": FORMAT, "rows": rows, "width": width, **key}))
    if not path.exists():
        _create(path, described, rows, width, min(chunk_rows, max(rows, 1)))
    array, found = _open(path)
    names = [name for name in {**described, **found} if described.get(name) != found.get(name)]
    if names:
        shown = ", ".join(f"{n} {_short(found.get(n))}, not {_short(described.get(n))}" for n in names)
        raise StoreError(f"{path} was made for {shown}. Delete that folder, or give another one")
    if (array.shape, array.dtype) != ((rows, width), np.float32):
        raise StoreError(
            f"{path} is no store (it holds {array.dtype}{list(array.shape)}, not float32{[rows, width]}). "
            "Delete it, or give another folder"
        )
    return Store(path, array)


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def _create(path: Path, described: Mapping[str, Any], rows: int, width: int, chunk_rows: int) -> None:
    """Make it aside and rename it: of several processes one makes it, and none sees half of it."""
    zarr = _zarr()
    make_folder(path.parent)
    temporary = _temporary(path)
    try:
        zarr.create_array(
            str(temporary),
            shape=(rows, width),
            chunks=(chunk_rows, width),
            dtype="float32",
            compressors=None,  # sketches look random: there is nothing to gain
            fill_value=float("nan"),
            attributes=dict(described),
        )
        os.rename(temporary, path)
    except OSError as error:
        if not path.exists():
            raise StoreError(f"cannot make {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    """The array, and what it says of itself."""
    zarr = _zarr()
    try:
        array = zarr.open_array(str(path), mode="r+")
        # a chunk of one value is written, too
        return array.with_config({"write_empty_chunks": True}), dict(array.attrs)
    except Exception as error:  # zarr takes its metadata as they come: of damaged ones anything is raised
        raise StoreError(f"{path} is no store ({error}). Delete it, or give another folder") from error


def _zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise StoreError(
            "stores need zarr, which is not installed: pip install 'resnet-func[attribution]'"
        ) from error
    return zarr


# --------------------------------------------------------------------------- keys


def fingerprint(of: Params, *more: Params) -> str:
    """A SHA-256 of trees of tensors, such as `(params, state)`: paths, dtypes, shapes and bytes.

    >>> fingerprint({"w": torch.zeros(2)}) == fingerprint({"w": torch.zeros(3)})
    False
    """
    digest = hashlib.sha256()
    for part in (of, *more):
        for path, leaf in sorted(tree.flatten(part).items()):
            digest.update(f"{path} {leaf.dtype} {list(leaf.shape)}\n".encode())
            digest.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        digest.update(b"\n")
    return digest.hexdigest()
