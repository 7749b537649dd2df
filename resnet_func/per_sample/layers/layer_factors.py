"""From a captured call and its cotangent to the factors of its leaves: what each kind of layer is.

Known: convolutions of one to three dimensions and their transposes, linear layers with any leading
dimensions, normalisation by running statistics, groups, instances, layers and root mean squares, embeddings,
attention. Any other call `f(x, p)` is differentiated by itself, one sample at a time, under `vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_func.autodiff import can_read, is_differentiated
from resnet_func.models import winograd
from resnet_func.per_sample.intercept import is_in_place, substitute
from resnet_func.per_sample.layers.contract import group_norm_grads
from resnet_func.per_sample.layers.factors import (
    CallFactors,
    ConvFactors,
    Direct,
    EmbeddingFactors,
    Factors,
    LinearFactors,
    split_views,
)
from resnet_func.per_sample.layers.ghost import ConvSpec


class Layer(NamedTuple):
    """A call whose tensors are those of the caller's level, with the cotangents of its outputs.

    Args:
        func, args, kwargs: The layer.
        parameters: The tensors among its arguments that hang on trainable leaves.
        batched: Those that carry samples.
        indices: Which of what it returns are tensors.
        cotangents: Of those.
        statistics: Of its input, where the forward pass kept them (`intercept.kept_statistics`).
        samples, views: Of the batch.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parameters: list[Tensor]
    batched: list[Tensor]
    indices: list[int]
    cotangents: list[Tensor]
    statistics: list[Tensor]
    samples: int
    views: int

    @property
    def cotangent(self) -> Tensor:
        """Of the only output."""
        return self.cotangents[0]

    @property
    def name(self) -> str:
        return getattr(self.func, "__name__", str(self.func))


Found: TypeAlias = dict[Tensor, Factors]
Rule: TypeAlias = Callable[..., Found | None]


def factors_of_layer(layer: Layer) -> Found:
    """The factors of every parameter of a call, by the tensor that the call was given.

    Raises:
        ValueError: the batch is not in front of what the call takes and returns.
    """
    rule = RULES.get(layer.func)
    known = (rule(layer, *layer.args, **layer.kwargs) if rule is not None else None) or {}
    found = {tensor: known[tensor] for tensor in layer.parameters if tensor in known}
    if len(found) < len(dict.fromkeys(layer.parameters)):  # a parameter where the layer has none, say
        found = {**_any_call(layer), **found}
    return found


def _is_one_of(tensor: Tensor, tensors: list[Tensor]) -> bool:
    return any(tensor is other for other in tensors)


def _leads(tensor: Tensor, layer: Layer) -> bool:
    """Whether a tensor carries the samples, in front."""
    return _is_one_of(tensor, layer.batched) and _in_front([tensor, *layer.cotangents], layer)


def _in_front(tensors: list[Tensor], layer: Layer) -> bool:
    total = layer.samples * layer.views
    return all(tensor.ndim > 0 and tensor.shape[0] == total for tensor in tensors)


# --------------------------------------------------------------------------- convolutions


def _convolution(
    layer: Layer,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    **_: Any,  # what `winograd.convolution` takes beyond
) -> Found | None:
    if not _leads(input, layer):
        return None  # a weight that meets the batch as the image of a convolution: not a layer
    rank = weight.ndim - 2
    dilation, stride = _each(dilation, rank), _each(stride, rank)
    if isinstance(padding, str):
        input, padding = _string_padding(padding, input, tuple(weight.shape[2:]), dilation)
    spec = ConvSpec(tuple(weight.shape), stride, _each(padding, rank), dilation, groups)
    return _conv_factors(layer, spec, weight, input, layer.cotangent) | _channel_bias(layer, bias)


def _string_padding(
    padding: str, x: Tensor, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """ "same" and "valid" in numbers; what is not the same on both sides is padded here."""
    totals = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
    if all(total % 2 == 0 for total in totals):
        return x, tuple([total // 2 for total in totals])
    sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return F.pad(x, sides), (0,) * len(kernel)


def _transposed(
    layer: Layer,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Found | None:
    """The weight's gradient is that of the convolution from the output to the input."""
    if not _leads(input, layer):
        return None
    rank = weight.ndim - 2
    spec = ConvSpec(
        tuple(weight.shape), _each(stride, rank), _each(padding, rank), _each(dilation, rank), groups
    )
    return _conv_factors(layer, spec, weight, layer.cotangent, input) | _channel_bias(layer, bias)


def _conv_factors(layer: Layer, spec: ConvSpec, weight: Tensor, inputs: Tensor, cotangents: Tensor) -> Found:
    if len(spec.kernel) == 1:  # as rows of images
        one = (1,)
        shape = (*spec.weight_shape[:2], 1, *spec.kernel)
        spec = ConvSpec(shape, one + spec.stride, (0, *spec.padding), one + spec.dilation, spec.groups)
        inputs, cotangents = inputs.unsqueeze(2), cotangents.unsqueeze(2)
    return {weight: ConvFactors(spec, weight, inputs, cotangents, layer.views)}


def _each(value: Any, rank: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * rank
    return tuple(value) * rank if len(value) == 1 else tuple(value)


def _channel_bias(layer: Layer, bias: Tensor | None) -> Found:
    if bias is None or not _is_one_of(bias, layer.parameters):
        return {}
    g = layer.cotangent
    by_view = g.flatten(2).sum(2) if g.ndim > 2 else g
    return {bias: _direct(by_view, bias, layer.views)}


# --------------------------------------------------------------------------- linear layers, embeddings


def _linear(layer: Layer, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Found | None:
    if not _leads(input, layer) or weight.ndim != 2:
        return None
    g = layer.cotangent
    found: Found = {}
    if _is_one_of(weight, layer.parameters):
        if input.ndim == 2:
            found[weight] = LinearFactors(weight, input, g, layer.views)
        else:  # positions are pixels of a convolution
            spec = ConvSpec((*weight.shape, 1, 1), (1, 1), (0, 0), (1, 1))
            a, g_pixels = (t.flatten(1, -2).transpose(1, 2).unsqueeze(2) for t in (input, g))
            found[weight] = ConvFactors(spec, weight, a, g_pixels, layer.views)
    if bias is not None and _is_one_of(bias, layer.parameters):
        by_view = g.flatten(1, -2).sum(1) if g.ndim > 2 else g
        found[bias] = _direct(by_view, bias, layer.views)
    return found


def _embedding(
    layer: Layer,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Found | None:
    if not _leads(input, layer):
        return None
    if max_norm is not None or scale_grad_by_freq:
        raise ValueError(
            "an embedding with max_norm or scale_grad_by_freq has no per-sample gradients: the first changes "
            "its weight in place, the second counts words over the batch. Leave them out"
        )
    indices = input.reshape(input.shape[0], -1)
    g = layer.cotangent.reshape(*indices.shape, -1)
    if padding_idx is not None:  # its row gets no gradient
        row = padding_idx % weight.shape[0]
        g = torch.where((indices == row).unsqueeze(2), 0, g)
    return {weight: EmbeddingFactors(weight, indices, g, layer.views)}


# --------------------------------------------------------------------------- normalisation


def _normalisation(*names: str, over: str) -> Rule:
    """The rule of a normalisation whose arguments have these names.

    The affine part is undone by calling the function without it. `over` says where the parameters lie:
    "channels" (dimension 1) or "last" (the normalised shape).
    """

    def rule(layer: Layer, *args: Any, **kwargs: Any) -> Found | None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, weight, bias = given["input"], given.get("weight"), given.get("bias")
        if not _leads(x, layer):
            return None
        g, found = layer.cotangent, {}
        kept = 2 if over == "channels" else g.ndim - len(given["normalized_shape"])

        def reduce(t: Tensor) -> Tensor:
            if over == "channels":
                return t.flatten(kept).sum(kept) if t.ndim > kept else t
            return t.flatten(1, kept - 1).sum(1) if kept > 1 else t

        if weight is not None and _is_one_of(weight, layer.parameters):
            plain = layer.func(**{**given, "weight": None, **({"bias": None} if "bias" in given else {})})
            found[weight] = _direct(reduce(g * plain.to(g.dtype)), weight, layer.views)
        if bias is not None and _is_one_of(bias, layer.parameters):
            found[bias] = _direct(reduce(g), bias, layer.views)
        return found

    return rule


_group_norm_by_layer = _normalisation("input", "num_groups", "weight", "bias", "eps", over="channels")


def _group_norm(
    layer: Layer,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Found | None:
    """From the statistics that the forward pass kept, where no transform looks on: no copy is normalised."""
    g = layer.cotangent
    tensors = [input, g, *layer.statistics]
    plain = not any(not can_read(tensor) or is_differentiated(tensor) for tensor in tensors)
    alike = layer.statistics and all(tensor.dtype == g.dtype for tensor in layer.statistics)
    if not (plain and alike and _leads(input, layer) and g.numel()):
        return _group_norm_by_layer(layer, input, num_groups, weight, bias, eps)
    grads = group_norm_grads(input.to(g.dtype), g, layer.statistics, num_groups)
    affine = zip((weight, bias), grads, strict=True)
    return {
        leaf: _direct(by_view, leaf, layer.views)
        for leaf, by_view in affine
        if leaf is not None and _is_one_of(leaf, layer.parameters)
    }


def _direct(by_view: Tensor, leaf: Tensor, views: int) -> Direct:
    return Direct(split_views(by_view, views).sum(0).to(leaf.dtype))


# --------------------------------------------------------------------------- any other call


def _any_call(layer: Layer) -> Found:
    """The call differentiated by itself, a sample at a time."""
    if not _in_front([*layer.batched, *layer.cotangents], layer):
        shapes = [list(tensor.shape) for tensor in (*layer.batched, *layer.cotangents)]
        raise ValueError(
            f"{layer.name} takes a trainable leaf, and tensors that do not all lead with the "
            f"{layer.samples * layer.views} samples of the batch: {', '.join(map(str, shapes))}. Keep the "
            "batch dimension in front, or use method='vmap'"
        )
    if not layer.batched:
        return {tensor: _expanded(layer, tensor) for tensor in layer.parameters}
    return _call_factors(layer, (0,) * len(layer.batched), (0,) * len(layer.cotangents))


def _attention(layer: Layer, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Found | None:
    """`F.multi_head_attention_forward`, whose batch is its second dimension."""
    ins = [1 if _is_one_of(tensor, [query, key, value]) else 0 for tensor in layer.batched]
    outs = [1 if index == 0 else 0 for index in layer.indices]
    return _call_factors(layer, tuple(ins), tuple(outs))


def _call_factors(layer: Layer, ins: tuple[int, ...], outs: tuple[int, ...]) -> Found:
    """The factors of a call whose inputs and outputs have their samples at these dimensions."""
    inputs = [x.movedim(dim, 0) for x, dim in zip(layer.batched, ins, strict=True)]
    cotangents = [g.movedim(dim, 0) for g, dim in zip(layer.cotangents, outs, strict=True)]
    if not _in_front([*inputs, *cotangents], layer):
        raise ValueError(f"{layer.name} has lost the batch dimension; use method='vmap'")
    return {
        tensor: CallFactors(
            _function(layer, tensor, ins, outs), tensor, tuple(inputs), tuple(cotangents), layer.views
        )
        for tensor in layer.parameters
    }


def _function(
    layer: Layer, parameter: Tensor, ins: tuple[int, ...], outs: tuple[int, ...]
) -> Callable[..., tuple[Tensor, ...]]:
    """The call as a function of one parameter and of the tensors that carry samples, these in front."""
    func = out_of_place(layer.func)

    def function(weight: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        moved = [x.movedim(0, dim) for x, dim in zip(inputs, ins, strict=True)]
        values: Mapping[Tensor, Tensor] = {parameter: weight, **dict(zip(layer.batched, moved, strict=True))}
        args, kwargs = substitute((layer.args, layer.kwargs), values)
        result = func(*args, **kwargs)
        outputs = [result] if isinstance(result, Tensor) else result
        chosen = zip(layer.indices, outs, strict=True)
        return tuple([outputs[index].movedim(dim, 0) for index, dim in chosen])

    return function


def _expanded(layer: Layer, parameter: Tensor) -> Direct:
    """A leaf that is expanded to a batch, as a class token is: every sample has its own copy."""
    function = _function(layer, parameter, (), (0,))
    pullback = torch.func.vjp(lambda weight: function(weight)[0][:1], parameter)[1]
    by_view = torch.vmap(lambda cotangent: pullback(cotangent.unsqueeze(0))[0])(layer.cotangent)
    return _direct(by_view, parameter, layer.views)


def out_of_place(func: Callable[..., Any]) -> Callable[..., Any]:
    """`add` for `add_` and `__iadd__`."""
    if not is_in_place(func):
        return func
    name = func.__name__
    return getattr(Tensor, f"__{name[3:-2]}__" if name.startswith("__i") else name[:-1])


RULES: dict[Callable[..., Any], Rule] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d, winograd.convolution), _convolution),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _transposed),
    F.linear: _linear,
    F.embedding: _embedding,
    F.multi_head_attention_forward: _attention,
    F.batch_norm: _normalisation(
        "input",
        "running_mean",
        "running_var",
        "weight",
        "bias",
        "training",
        "momentum",
        "eps",
        over="channels",
    ),
    F.instance_norm: _normalisation(
        *("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
        over="channels",
    ),
    F.group_norm: _group_norm,
    F.layer_norm: _normalisation("input", "normalized_shape", "weight", "bias", "eps", over="last"),
    F.rms_norm: _normalisation("input", "normalized_shape", "weight", "eps", over="last"),
}
