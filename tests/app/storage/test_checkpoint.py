"""Checkpoints: exact round trips, damage found, no step at which a crash or a full disk loses anything."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import optree
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from resnet_func import files, tree
from resnet_func.app.storage import checkpoint
from resnet_func.app.storage.checkpoint import CheckpointError
from resnet_func.types import TrainState
from tests.app.image_folder import global_defaults

DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
]


class Momentum(NamedTuple):
    count: Tensor
    trace: Any
    schedule: Any = None


def state_at(epoch: int) -> TrainState:
    """A small training state whose every value depends on `epoch`."""
    generator = torch.Generator().manual_seed(epoch)
    weight = torch.randn(4, 3, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
    params = {"conv1": {"weight": weight}, "fc": {"bias": torch.randn(5, generator=generator)}}
    state = {"bn1": {"num_batches_tracked": torch.tensor(epoch), "running_mean": torch.zeros(4)}}
    return TrainState(params, state, Momentum(torch.tensor(epoch), params), ema_params=params)


def assert_same(expected: Any, got: Any) -> None:
    """Same structure, dtypes, strides and bits, leaf by leaf."""
    assert optree.tree_structure(expected) == optree.tree_structure(got)
    for a, b in zip(tree.leaves(expected), tree.leaves(got), strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert bits(a) == bits(b)


def bits(x: Tensor) -> bytes:
    return (
        x.detach()
        .clone(memory_format=torch.contiguous_format)
        .reshape(-1)
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def save_epoch(folder: Path, epoch: int) -> None:
    checkpoint.save(folder, "last", state_at(epoch), meta={"epoch": epoch})


def load_epoch(folder: Path) -> tuple[int, str | None]:
    """Which epoch `last` holds; the tensors must be that epoch's to the bit."""
    got, meta, warning = checkpoint.load(folder, "last", state_at(0))
    assert_same(state_at(meta["epoch"]), got)
    return meta["epoch"], warning


def tensors_of(folder: Path, manifest: str = "last.json") -> Path:
    return folder / json.loads((folder / manifest).read_bytes())["file"]


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


# --- round trips ---


def random_leaf(generator: torch.Generator, dtype: torch.dtype, shape: list[int], layout: str) -> Tensor:
    """Random bits (NaNs, infinities and subnormals among them), in the strides that `layout` names."""
    if layout == "gaps":
        shape = [*shape[:-1], 2 * shape[-1]] if shape else shape
    if dtype == torch.bool:
        leaf = torch.randint(0, 2, shape, generator=generator).bool()
    else:
        count = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.randint(0, 256, (max(count, dtype.itemsize),), generator=generator, dtype=torch.uint8)
        leaf = raw.view(dtype)[: torch.Size(shape).numel()].reshape(shape)
    if layout == "permuted":
        return leaf.permute(torch.randperm(leaf.dim(), generator=generator).tolist())
    if layout == "channels_last" and leaf.dim() == 4:
        return leaf.contiguous(memory_format=torch.channels_last)
    if layout == "gaps" and leaf.dim():
        return leaf[..., ::2]
    return leaf.unsqueeze(0).expand(3, *leaf.shape) if layout == "expanded" else leaf


@st.composite
def leaves(draw: st.DrawFn) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    layout = draw(st.sampled_from(["dense", "permuted", "channels_last", "gaps", "expanded"]))
    return random_leaf(generator, draw(st.sampled_from(DTYPES)), shape, layout)


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = st.text(st.characters(exclude_characters=".", codec="utf-8"), max_size=4)
    return st.one_of(
        st.dictionaries(keys.filter(lambda key: key != "__metadata__"), children, max_size=3),
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.tuples(children, children, children).map(lambda fields: Momentum(*fields)),
    )


trees = containers(st.recursive(st.none() | leaves(), containers, max_leaves=8))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def dense(leaf: Tensor) -> Tensor:
    """What a leaf comes back as: the same values, its own strides where those are dense."""
    return torch.empty_like(leaf).copy_(leaf)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trees, st.dictionaries(st.text(max_size=3), json_values, max_size=3))
def test_round_trip_is_exact(saved: Any, meta: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = checkpoint.save(folder, "last", saved, meta=meta)
        assert path == folder / "last.json"
        got, got_meta, warning = checkpoint.load(folder, "last", tree.map(torch.zeros_like, saved))
        assert_same(tree.map(dense, saved), got)
        assert (got_meta, warning, checkpoint.read_meta(folder, "last")) == (meta, None, meta)
        flat, flat_meta, _ = checkpoint.load_flat(folder, "last")
        assert flat_meta == meta
        assert sorted(map(bits, flat.values())) == sorted(map(bits, tree.leaves(saved)))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1,), (2, 3), (4, 3, 1, 1), (4, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    leaf = random_leaf(torch.Generator().manual_seed(0), dtype, list(shape), "dense")
    checkpoint.save(tmp_path, "last", {"x": leaf}, meta={})
    assert_same({"x": leaf}, checkpoint.load(tmp_path, "last", {"x": torch.zeros_like(leaf)})[0])


def test_channels_last_survives_and_the_file_is_row_major(tmp_path: Path) -> None:
    # (4, 3, 1, 1) is contiguous in both formats: only its strides, which torch.compile guards on, tell.
    saved = {str(k): torch.arange(12.0 * k * k).reshape(4, 3, k, k) for k in (1, 3)}
    saved = tree.map(lambda leaf: leaf.to(memory_format=torch.channels_last), saved)
    assert saved["1"].stride() != torch.zeros(4, 3, 1, 1).stride()
    checkpoint.save(tmp_path, "last", saved, meta={})
    like = {"1": torch.zeros(4, 3, 1, 1), "3": torch.zeros(4, 3, 3, 3)}
    assert_same(saved, checkpoint.load(tmp_path, "last", like)[0])
    assert_same(saved, checkpoint.load_flat(tmp_path, "last")[0])
    plain = safetensors.torch.load_file(tensors_of(tmp_path))
    assert torch.equal(plain["3"], torch.arange(108.0).reshape(4, 3, 3, 3))


def test_views_aliases_and_lazy_conjugates_keep_their_values(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    z = torch.complex(base, base + 1)
    saved = {"a": base, "b": base, "row": base[1], "t": base.t(), "conj": z.conj(), "neg": z.conj().imag}
    saved["param"] = torch.nn.Parameter(base)
    checkpoint.save(tmp_path, "last", saved, meta={})
    got = checkpoint.load(tmp_path, "last", saved)[0]
    assert all(torch.equal(saved[key], got[key]) for key in saved)
    assert not got["param"].requires_grad
    assert len({leaf.data_ptr() for leaf in got.values()} | {base.data_ptr()}) == len(saved) + 1


def test_paths_are_state_dict_keys_field_names_and_positions(tmp_path: Path) -> None:
    saved = TrainState({"layer1": {"0": {"weight": torch.ones(2)}}}, {}, (torch.zeros(()), None))
    checkpoint.save(tmp_path, "best", saved, meta={})
    flat, _, _ = checkpoint.load_flat(tmp_path, "best")
    assert list(flat) == ["opt_state.0", "params.layer1.0.weight"]


def test_none_stays_none_and_like_is_not_changed(tmp_path: Path) -> None:
    saved = TrainState({"w": torch.ones(2)}, {}, None)
    like = TrainState({"w": torch.zeros(2)}, {}, None)
    checkpoint.save(tmp_path, "last", saved, meta={})
    got, _, _ = checkpoint.load(tmp_path, "last", like)
    assert_same(saved, got)
    assert torch.equal(like.params["w"], torch.zeros(2))


def test_device_is_likes_unless_given_and_cpu_for_meta_leaves(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, "last", {"w": torch.ones(2)}, meta={})
    like = {"w": torch.zeros(2, device="meta")}
    assert_same({"w": torch.ones(2)}, checkpoint.load(tmp_path, "last", like)[0])
    assert checkpoint.load(tmp_path, "last", like, device="meta")[0]["w"].is_meta
    assert checkpoint.load_flat(tmp_path, "last", device="meta")[0]["w"].is_meta


def test_generator_state_round_trips(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator)
    checkpoint.save(tmp_path, "last", {"rng": generator.get_state()}, meta={})
    other = torch.Generator()
    other.set_state(checkpoint.load(tmp_path, "last", {"rng": other.get_state()})[0]["rng"])
    assert torch.equal(torch.rand(7, generator=generator), torch.rand(7, generator=other))


# --- bytes ---


def test_same_tree_same_bytes_whatever_the_order_of_keys_and_the_folder(tmp_path: Path) -> None:
    a, b = torch.ones(3), torch.zeros((), dtype=torch.int64)
    checkpoint.save(tmp_path / "x", "last", {"a": {"c": a, "d": b}, "b": a}, meta={"p": 1, "q": 2})
    checkpoint.save(tmp_path / "y", "last", {"b": a, "a": {"d": b, "c": a}}, meta={"q": 2, "p": 1})
    assert contents(tmp_path / "x") == contents(tmp_path / "y")


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_run_stopped_and_resumed_ends_in_the_same_bytes(tmp_path: Path, stop: int) -> None:
    def fresh() -> tuple[dict[str, Tensor], int]:
        rng = torch.Generator().manual_seed(7).get_state()
        return {"w": torch.ones(4, 3, 3, 3), "momentum": torch.zeros(4, 3, 3, 3), "rng": rng}, 0

    def run(folder: Path, start: tuple[dict[str, Tensor], int], until: int) -> None:
        state, done = start
        for epoch in range(done + 1, until + 1):
            generator = torch.Generator()
            generator.set_state(state["rng"])
            x = torch.randn(2, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last)
            momentum = 0.9 * state["momentum"] + torch.nn.grad.conv2d_weight(
                x, (4, 3, 3, 3), torch.ones(2, 4, 6, 6)
            )
            w = (state["w"] - 1e-2 * momentum).to(memory_format=torch.channels_last)
            state = {"w": w, "momentum": momentum, "rng": generator.get_state()}
            checkpoint.save(folder, "last", state, meta={"epoch": epoch, "loss": w.square().mean().item()})

    run(tmp_path / "whole", fresh(), 5)
    run(tmp_path / "parts", fresh(), stop)
    state, meta, _ = checkpoint.load(tmp_path / "parts", "last", fresh()[0])
    run(tmp_path / "parts", (state, meta["epoch"]), 5)
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


def test_meta_with_number_keys_tuples_and_infinities_can_be_read_back(tmp_path: Path) -> None:
    meta = {"per_class": {i: 0.1 * i for i in range(12)}, "best": float("inf"), "shape": (1, 2)}
    checkpoint.save(tmp_path, "last", {}, meta=meta)
    expected = {"per_class": {str(i): 0.1 * i for i in range(12)}, "best": float("inf"), "shape": [1, 2]}
    assert checkpoint.read_meta(tmp_path, "last") == expected


# --- generations ---


def test_two_generations_of_each_name_are_kept_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    for epoch in (1, 2, 3, 4):
        save_epoch(tmp_path, epoch)
        checkpoint.save(tmp_path, "last2", state_at(10 + epoch), meta={})
    checkpoint.save(tmp_path, "best", state_at(2), meta={"epoch": 2})
    kept = {
        tensors_of(tmp_path, f"{m}.json").name for m in ("last", "last.previous", "last2", "last2.previous")
    }
    manifests = {f"{m}.json" for m in ("last", "last.previous", "last2", "last2.previous", "best")}
    assert len(kept) == 4
    assert set(contents(tmp_path)) == {
        *kept,
        *manifests,
        tensors_of(tmp_path, "best.json").name,
        "metrics.jsonl",
    }
    assert json.loads((tmp_path / "last.previous.json").read_bytes())["meta"] == {"epoch": 3}
    assert load_epoch(tmp_path) == (4, None)
    assert checkpoint.read_meta(tmp_path, "best") == {"epoch": 2}


def test_saving_the_same_tensors_again_keeps_an_independent_fallback(tmp_path: Path) -> None:
    for epoch in (1, 2, 2):
        save_epoch(tmp_path, epoch)
    tensors_of(tmp_path).unlink()
    assert load_epoch(tmp_path)[0] == 1


def test_saving_after_damage_keeps_the_good_fallback(tmp_path: Path) -> None:
    save_epoch(tmp_path, 1)
    save_epoch(tmp_path, 2)
    flip(tensors_of(tmp_path), 999)
    save_epoch(tmp_path, 3)
    assert load_epoch(tmp_path) == (3, None)
    flip(tensors_of(tmp_path), 999)
    assert load_epoch(tmp_path)[0] == 1


def test_saving_again_heals_a_damaged_file_of_the_same_content(tmp_path: Path) -> None:
    save_epoch(tmp_path, 1)
    flip(tensors_of(tmp_path), 5000)
    save_epoch(tmp_path, 1)
    assert load_epoch(tmp_path) == (1, None)


# --- damage ---

DAMAGES: dict[str, Callable[[Path], object]] = {
    "tensors-truncated": lambda d: os.truncate(tensors_of(d), tensors_of(d).stat().st_size - 1),
    "tensors-empty": lambda d: tensors_of(d).write_bytes(b""),
    "tensors-longer": lambda d: tensors_of(d).write_bytes(tensors_of(d).read_bytes() + b"\0"),
    "tensors-bit-flipped": lambda d: flip(tensors_of(d), 8 * 1500),
    "tensors-missing": lambda d: tensors_of(d).unlink(),
    "tensors-a-folder": lambda d: (path := tensors_of(d), path.unlink(), path.mkdir()),
    "manifest-missing": lambda d: (d / "last.json").unlink(),
    "manifest-empty": lambda d: (d / "last.json").write_bytes(b""),
    "manifest-garbage": lambda d: (d / "last.json").write_bytes(bytes(range(256))),
    "manifest-truncated": lambda d: os.truncate(d / "last.json", 100),
    "manifest-list": lambda d: (d / "last.json").write_text("[1, 2]"),
    "manifest-brackets": lambda d: (d / "last.json").write_text("[" * 100_000),
    "manifest-edited": lambda d: edit(d / "last.json", '"epoch": 2', '"epoch": 3'),
}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_last_falls_back_and_says_so(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    save_epoch(tmp_path, 1)
    save_epoch(tmp_path, 2)
    blamed = {"last.json", tensors_of(tmp_path).name}
    damage(tmp_path)
    epoch, warning = load_epoch(tmp_path)
    assert epoch == 1
    assert warning is not None
    assert "checkpoint 'last' is damaged" in warning
    assert "loaded the one before it" in warning
    assert any(file in warning for file in blamed)
    assert "\n" not in warning
    assert checkpoint.read_meta(tmp_path, "last") == {"epoch": 1}
    flat, meta, flat_warning = checkpoint.load_flat(tmp_path, "last")
    assert (meta, flat_warning) == ({"epoch": 1}, warning)
    assert torch.equal(flat["params.fc.bias"], state_at(1).params["fc"]["bias"])


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with epochs 1 and 2, to copy from."""
    folder = tmp_path_factory.mktemp("two_epochs")
    save_epoch(folder, 1)
    save_epoch(folder, 2)
    return folder


@settings(max_examples=100, deadline=None)
@given(in_tensors=st.booleans(), bit=st.integers(0, 2**20))
def test_any_flipped_bit_is_found(two_epochs: Path, in_tensors: bool, bit: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(two_epochs, folder, dirs_exist_ok=True)
        flip(tensors_of(folder) if in_tensors else folder / "last.json", bit)
        epoch, warning = load_epoch(folder)
        assert epoch == 1
        assert warning is not None


def test_nothing_intact_names_the_files_and_the_way_out(tmp_path: Path) -> None:
    save_epoch(tmp_path, 1)
    save_epoch(tmp_path, 2)
    damaged = [tensors_of(tmp_path), tensors_of(tmp_path, "last.previous.json")]
    for path in damaged:
        flip(path, 77)
    for read in (
        load_epoch,
        lambda d: checkpoint.load_flat(d, "last"),
        lambda d: checkpoint.read_meta(d, "last"),
    ):
        with pytest.raises(
            CheckpointError, match=r"no intact checkpoint 'last'.*restore these files"
        ) as error:
            read(tmp_path)
        assert all(path.name in str(error.value) for path in damaged)
        assert "\n" not in str(error.value)


def test_absent_checkpoint(tmp_path: Path) -> None:
    assert not checkpoint.exists(tmp_path, "last")
    with pytest.raises(CheckpointError, match=r"last\.json: No such file.*Check the folder"):
        checkpoint.load(tmp_path / "nowhere", "last", {})
    save_epoch(tmp_path, 1)
    assert checkpoint.exists(tmp_path, "last")
    assert not checkpoint.exists(tmp_path, "best")


def test_a_newer_format_is_refused_and_not_taken_for_damage(tmp_path: Path) -> None:
    save_epoch(tmp_path, 1)
    save_epoch(tmp_path, 2)
    newer = {**json.loads((tmp_path / "last.json").read_bytes()), "version": 2}
    (tmp_path / "last.json").write_bytes(checkpoint._encode(newer))
    with pytest.raises(CheckpointError, match=r"'version': 2.*'version': 1.*the resnet_func that wrote it"):
        load_epoch(tmp_path)


def test_another_network_lists_every_kind_of_difference(tmp_path: Path) -> None:
    saved = {f"old{i}": torch.zeros(1) for i in range(5)} | {
        "fc": torch.zeros(10, 4),
        "bias": torch.zeros(10),
    }
    checkpoint.save(tmp_path, "last", saved, meta={})
    like = {"new": torch.zeros(1), "fc": torch.zeros(5, 4), "bias": torch.zeros(10, dtype=torch.float64)}
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(tmp_path, "last", like)
    message = str(error.value)
    assert "1 missing (new)" in message
    assert "5 unexpected (old0; old1; old2; ...)" in message
    assert "2 mis-shaped" in message
    assert "fc: wanted torch.float32[5, 4], saved torch.float32[10, 4]" in message
    assert "bias: wanted torch.float64[10], saved torch.float32[10]" in message
    assert "Use the configuration it was saved with" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "like", [{"a": torch.zeros(2)}, {"a": torch.zeros(2), "b": None, "c": torch.zeros(1)}]
)
def test_missing_and_unexpected_leaves_are_never_ignored(tmp_path: Path, like: dict[str, Any]) -> None:
    checkpoint.save(tmp_path, "last", {"a": torch.zeros(2), "b": torch.zeros(1)}, meta={})
    with pytest.raises(CheckpointError, match=r"unexpected \(b\)"):
        checkpoint.load(tmp_path, "last", like)


# --- callers' mistakes ---


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        ({"step": 3}, TypeError, "leaf 'step' must be a dense tensor, not 3; plain values go in meta"),
        ({"s": torch.eye(2).to_sparse()}, TypeError, "leaf 's' must be a dense tensor"),
        ({"z": torch.zeros(1, dtype=torch.complex128)}, TypeError, "no dtype torch.complex128"),
        ({"a.b": torch.zeros(1), "a": {"b": torch.zeros(1)}}, ValueError, "'a.b' is taken"),
        ({"__metadata__": torch.zeros(1)}, ValueError, "'__metadata__' is taken"),
    ],
    ids=["number", "sparse", "complex128", "dotted", "reserved"],
)
def test_trees_that_cannot_be_saved(tmp_path: Path, bad: Any, error: type[Exception], match: str) -> None:
    save_epoch(tmp_path, 1)
    before = contents(tmp_path)
    with pytest.raises(error, match=match):
        checkpoint.save(tmp_path, "last", bad, meta={})
    assert contents(tmp_path) == before


def test_meta_that_is_not_json_changes_nothing(tmp_path: Path) -> None:
    save_epoch(tmp_path, 1)
    before = contents(tmp_path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoint.save(tmp_path, "last", state_at(2), meta={"loss": torch.zeros(())})
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["", "last.previous", "../last", "a b", "last\n"])
def test_names_are_plain(tmp_path: Path, name: str) -> None:
    for call in (
        lambda: checkpoint.save(tmp_path, name, {}, meta={}),
        lambda: checkpoint.load(tmp_path, name, {}),
        lambda: checkpoint.exists(tmp_path, name),
    ):
        with pytest.raises(ValueError, match='Try "last"'):
            call()


# --- full disks, crashes, power cuts ---


class Crash(BaseException):
    """The process is gone: nothing of ours runs after this."""


class Disk:
    """The file-system steps of `save`, counted, so that a test can fail any one of them.

    `fail(step, when)` is called before ("before") and after ("after") each, and may raise.
    """

    def __init__(self, fail: Callable[[int, str], None] = lambda step, when: None) -> None:
        self.fail = fail
        self.steps: list[str] = []

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        number = len(self.steps)
        self.steps.append(what)
        self.fail(number, "before")
        yield
        self.fail(number, "after")

    def wrap(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.step(what):
                return function(*args, **kwargs)

        return wrapped

    def open(self, path: Path, mode: str) -> Any:
        with ExitStack() as undo, self.step("open"):
            file = undo.enter_context(open(path, mode, buffering=0))
            self.fail(len(self.steps) - 1, "after")
            undo.pop_all()
        return TornFile(file, self)

    def run(self, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(files, "open", self.open, raising=False)
            for name in ("fsync", "replace"):
                patch.setattr(os, name, self.wrap(name, getattr(os, name)))
            for name in ("unlink", "mkdir"):
                patch.setattr(Path, name, self.wrap(name, getattr(Path, name)))
            act()


class TornFile:
    """A file whose write is two steps, so that a failure can leave half of it."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self.file, self.disk = file, disk
        self.flush, self.fileno = file.flush, file.fileno

    def __enter__(self) -> TornFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> None:
        for part in (data[: len(data) // 2], data[len(data) // 2 :]):
            with self.disk.step("write"):
                self.file.write(part)


def one_generation(folder: Path) -> int:
    save_epoch(folder, 2)
    return 2


def two_generations(folder: Path) -> int:
    save_epoch(folder, 1)
    return one_generation(folder)


def damaged_last(folder: Path) -> int:
    two_generations(folder)
    flip(tensors_of(folder), 8 * 1000)
    return 1


HISTORIES = [one_generation, two_generations, damaged_last]
each_history = pytest.mark.parametrize("history", HISTORIES, ids=lambda history: history.__name__)


def each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, history: Callable[[Path], int]
) -> Iterator[tuple[Path, int, int, str]]:
    """For every step of saving epoch 3 on top of a history: a copy of it, its epoch, the step."""
    old = history(tmp_path / "history")
    shutil.copytree(tmp_path / "history", tmp_path / "count")
    disk = Disk()
    disk.run(monkeypatch, lambda: save_epoch(tmp_path / "count", 3))
    assert load_epoch(tmp_path / "count") == (3, None)
    assert {"open", "write", "fsync", "replace"} < set(disk.steps)
    for step, what in enumerate(disk.steps):
        folder = tmp_path / str(step)
        shutil.copytree(tmp_path / "history", folder)
        yield folder, old, step, what


def failing(at: Callable[[int, str], bool], error: BaseException) -> Disk:
    def fail(step: int, when: str) -> None:
        if at(step, when):
            raise error

    return Disk(fail)


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@each_history
def test_a_crash_between_any_two_steps_leaves_a_loadable_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, history: Callable[[Path], int]
) -> None:
    for folder, old, step, what in each_step(tmp_path, monkeypatch, history):
        # from then on every step fails: nothing that would tidy up runs in a process that is gone
        disk = failing(lambda now, when, step=step: now > step or (now, when) == (step, "after"), Crash())
        with pytest.raises(Crash):
            disk.run(monkeypatch, lambda folder=folder: save_epoch(folder, 3))
        assert load_epoch(folder)[0] in (old, 3), (step, what)
        save_epoch(folder, 4)
        assert load_epoch(folder) == (4, None)
        assert len(contents(folder)) == 4, "what the crash left lying about is gone"


@each_history
def test_a_full_disk_at_any_step_keeps_the_old_checkpoint_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, history: Callable[[Path], int]
) -> None:
    for folder, old, step, what in each_step(tmp_path, monkeypatch, history):
        before = contents(folder)
        disk = failing(lambda *now, step=step: now == (step, "before"), NO_SPACE)
        if what == "unlink":  # tidying up comes after the save, and its failure is not the save's
            disk.run(monkeypatch, lambda folder=folder: save_epoch(folder, 3))
            assert load_epoch(folder) == (3, None)
            continue
        with pytest.raises(CheckpointError) as error:
            disk.run(monkeypatch, lambda folder=folder: save_epoch(folder, 3))
        message = str(error.value)
        assert message.startswith(f"cannot save checkpoint 'last' in {folder}: No space left on device.")
        assert "What was saved before is kept: free" in message
        assert "\n" not in message
        if load_epoch(folder)[0] == old:
            assert contents(folder) == before, (step, what)  # the space is given back
        else:  # past the commit, the new generation stands beside the old ones' tensors
            assert load_epoch(folder) == (3, None), (step, what)
            assert set(before) < set(contents(folder)), (step, what)


def test_a_disk_full_for_good_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, _, step, _ in each_step(tmp_path, monkeypatch, two_generations):
        disk = failing(lambda now, when, step=step: now >= step, NO_SPACE)
        with suppress(CheckpointError):
            disk.run(monkeypatch, lambda folder=folder: save_epoch(folder, 3))
        epoch, warning = load_epoch(folder)
        assert epoch in (2, 3)
        assert warning is None


class PowerCut(Disk):
    """Also keeps what a power cut would leave: synced bytes only, and any subset of the unsynced renames.

    POSIX promises no more: without fsync a file may come back empty, and names may come back in any mixture.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(lambda step, when: self.record() if when == "after" else None)
        self.folder = folder
        self.synced_bytes = {path.stat().st_ino: path.read_bytes() for path in folder.iterdir()}
        self.synced_names = self.names()
        self.pending: list[tuple[str, str | None, int]] = []
        self.aftermaths: list[dict[str, bytes]] = []

    def names(self) -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in self.folder.iterdir()}

    def wrap(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            inode = args[0].stat().st_ino if what in ("replace", "unlink") else 0
            result = function(*args, **kwargs)
            if what == "fsync":
                self.note_sync(os.fstat(args[0]).st_ino)
            elif what in ("replace", "unlink"):
                self.pending.append((args[0].name, args[1].name if what == "replace" else None, inode))
            return result

        return super().wrap(what, noted)

    def note_sync(self, inode: int) -> None:
        if inode == self.folder.stat().st_ino:
            self.synced_names, self.pending = self.names(), []
        else:
            path = next(path for path in self.folder.iterdir() if path.stat().st_ino == inode)
            self.synced_bytes[inode] = path.read_bytes()

    def record(self) -> None:
        for kept in itertools.product([False, True], repeat=len(self.pending)):
            names = dict(self.synced_names)
            for source, target, inode in itertools.compress(self.pending, kept):
                names.pop(source, None)
                if target is not None:
                    names[target] = inode
            aftermath = {name: self.synced_bytes.get(inode, b"") for name, inode in names.items()}
            if aftermath not in self.aftermaths:
                self.aftermaths.append(aftermath)


@each_history
def test_a_power_cut_at_any_step_leaves_a_loadable_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, history: Callable[[Path], int]
) -> None:
    old = history(tmp_path / "run")
    disk = PowerCut(tmp_path / "run")
    disk.run(monkeypatch, lambda: save_epoch(tmp_path / "run", 3))
    epochs = []
    for number, aftermath in enumerate(disk.aftermaths):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, data in aftermath.items():
            (folder / name).write_bytes(data)
        epochs.append(load_epoch(folder)[0])
    assert set(epochs) == {old, 3}
    assert epochs[0] == old
    # Once `save` has returned, the new one is there whatever happens.
    disk.aftermaths = []
    disk.record()
    assert all(disk.aftermaths[0]["last.json"] == a["last.json"] for a in disk.aftermaths)
    assert json.loads(disk.aftermaths[0]["last.json"])["meta"] == {"epoch": 3}


def test_a_new_run_folder_is_itself_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), fsync(fd)))
    save_epoch(tmp_path / "runs" / "a", 1)
    assert {tmp_path.stat().st_ino, (tmp_path / "runs").stat().st_ino} < set(synced)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot save checkpoint 'last'.*File exists"):
        save_epoch(tmp_path / "run", 1)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_only_file_systems_that_cannot_sync_a_folder_are_excused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    fsync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino == tmp_path.stat().st_ino:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    if code == errno.EINVAL:
        save_epoch(tmp_path, 1)
        assert load_epoch(tmp_path) == (1, None)
    else:
        with pytest.raises(CheckpointError, match="Input/output error"):
            save_epoch(tmp_path, 1)


@pytest.mark.parametrize("step", [1, 4, 9])
def test_an_interrupt_in_the_middle_of_a_save_passes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    save_epoch(tmp_path, 1)
    disk = failing(lambda *now: now == (step, "after"), KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        disk.run(monkeypatch, lambda: save_epoch(tmp_path, 2))
    assert load_epoch(tmp_path) == (1, None)


def test_a_system_on_which_no_folder_can_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows: os.open of a folder is EACCES."""
    real_open = os.open

    def refuse_folders(path, flags, *args, **kwargs):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse_folders)
    save_epoch(tmp_path / "run", 1)
    assert load_epoch(tmp_path / "run") == (1, None)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_global_defaults_change_nothing(tmp_path: Path, device: str) -> None:
    saved = state_at(3)
    checkpoint.save(tmp_path / "plain", "last", saved, meta={})
    with global_defaults(torch.float64, device):
        checkpoint.save(tmp_path / "changed", "last", saved, meta={})
        got, _, _ = checkpoint.load(tmp_path / "plain", "last", saved)
    assert contents(tmp_path / "plain") == contents(tmp_path / "changed")
    assert_same(saved, got)


def test_the_format_is_called_the_same_wherever_the_module_lies(tmp_path: Path) -> None:
    """Or no run that was begun before a move could go on."""
    checkpoint.save(tmp_path, "last", state_at(1), meta={})
    written = json.loads((tmp_path / "last.json").read_text())
    assert (written["format"], written["version"]) == ("resnet_func.app.checkpoint", 1)
