"""The networks again as plain modules, and the comparison to the bit.

torchvision has no CIFAR nets: these follow the articles, written independently of `resnet_func`. Their
attribute names are the parameters' names, so that a state_dict goes either way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from resnet_func import tree
from resnet_func.types import Model, Params, State

Norm = Callable[[int], nn.Module]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


# --------------------------------------------------------------------------- modules


class OptionA(nn.Module):
    """Every other pixel, and zero channels on both sides: He et al. 2015, section 4.2."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = c_out - c_in, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., :: self.stride, :: self.stride]
        n, _, h, w = x.shape
        before = x.new_zeros(n, self.extra // 2, h, w)
        after = x.new_zeros(n, self.extra - self.extra // 2, h, w)
        return torch.cat([before, x, after], 1)


class CifarBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, option: str, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = norm(c_out)
        self.downsample = None
        if stride == 2 and option == "A":
            self.downsample = OptionA(c_in, c_out, stride)
        elif stride == 2:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), norm(c_out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + identity)


class CifarResNet(nn.Module):
    """ResNet-(6n+2): three stages of n blocks with 16, 32, 64 channels."""

    def __init__(self, n: int, option: str = "A", norm: Norm = nn.BatchNorm2d, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = norm(16)

        def stage(c_in: int, c_out: int, stride: int) -> nn.Sequential:
            first = CifarBlock(c_in, c_out, stride, option, norm)
            return nn.Sequential(first, *(CifarBlock(c_out, c_out, 1, option, norm) for _ in range(n - 1)))

        self.layer1, self.layer2, self.layer3 = stage(16, 16, 1), stage(16, 32, 2), stage(32, 64, 2)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class WideBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.bn1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2 = norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.downsample = None
        if c_in != c_out or stride == 2:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(x))
        identity = x if self.downsample is None else self.downsample(out)
        return self.conv2(torch.relu(self.bn2(self.conv1(out)))) + identity


class WideResNet(nn.Module):
    """WRN-(6n+4)-k of Zagoruyko and Komodakis 2016, without dropout."""

    def __init__(self, n: int, k: int, norm: Norm = nn.BatchNorm2d, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)

        def stage(c_in: int, c_out: int, stride: int) -> nn.Sequential:
            first = WideBlock(c_in, c_out, stride, norm)
            return nn.Sequential(first, *(WideBlock(c_out, c_out, 1, norm) for _ in range(n - 1)))

        self.layer1 = stage(16, 16 * k, 1)
        self.layer2 = stage(16 * k, 32 * k, 2)
        self.layer3 = stage(32 * k, 64 * k, 2)
        self.bn1 = norm(64 * k)
        self.fc = nn.Linear(64 * k, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = torch.relu(self.bn1(x))
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


# --------------------------------------------------------------------------- the comparison


def perturbed(params: Params, state: State, seed: int) -> tuple[Params, State]:
    """Affine parameters and running statistics away from 0 and 1, where mistakes could hide."""
    draw = generator(seed)

    def shift(path: str, leaf: Tensor) -> Tensor:
        if leaf.ndim != 1:
            return leaf + 3 if path.endswith("num_batches_tracked") else leaf
        noise = torch.rand(leaf.shape, generator=draw).to(leaf.dtype)
        return leaf + 0.3 * noise

    return tree.map_with_path(shift, params), tree.map_with_path(shift, state)


def loaded(construct: Callable[[], nn.Module], params: Params, state: State) -> nn.Module:
    """The module with these parameters (shared) and this state (copied)."""
    with torch.device("meta"):
        module = construct()
    leaves = {**tree.flatten(params), **{name: leaf.clone() for name, leaf in tree.flatten(state).items()}}
    module.load_state_dict(leaves, strict=True, assign=True)
    return module.requires_grad_()


def module_step(module: nn.Module, x: Tensor, cotangent: Tensor, *, train: bool) -> dict[str, Tensor]:
    """Logits, all gradients of `<logits, cotangent>`, and the buffers afterwards, by plain autograd.

    The module's buffers are put back.
    """
    buffers = {name: leaf.clone() for name, leaf in module.named_buffers()}
    module.train(train)
    x = x.clone().requires_grad_()
    logits = module(x)
    params = dict(module.named_parameters())
    grads = torch.autograd.grad((logits * cotangent).sum(), [x, *params.values()])
    after = {f"buffer {name}": leaf.clone() for name, leaf in module.named_buffers()}
    module.load_state_dict(buffers, strict=False)
    named = {f"gradient {name}": grad for name, grad in zip(["x", *params], grads, strict=True)}
    return {"logits": logits.detach(), **named, **after}


def function_step(
    model: Model, params: Params, state: State, x: Tensor, cotangent: Tensor, *, train: bool
) -> dict[str, Tensor]:
    """The same by `torch.func.grad` of `apply`."""

    def loss(x: Tensor, params: Params) -> tuple[Tensor, tuple[Tensor, State]]:
        logits, after = model.apply(params, state, x, train=train)
        return (logits * cotangent).sum(), (logits, after)

    grads, (logits, after) = torch.func.grad(loss, argnums=(0, 1), has_aux=True)(x, params)
    named = {f"gradient {name}": grad for name, grad in {"x": grads[0], **tree.flatten(grads[1])}.items()}
    return {
        "logits": logits,
        **named,
        **{f"buffer {name}": leaf for name, leaf in tree.flatten(after).items()},
    }


def assert_bitwise(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """The same names, dtypes and bits, all finite; names the worst leaf."""
    assert set(got) == set(want)
    wrong = {}
    for name, leaf in want.items():
        assert leaf.isfinite().all(), f"{name} of the reference is not finite: nothing is proven"
        assert got[name].dtype == leaf.dtype, name
        if not torch.equal(got[name], leaf):
            wrong[name] = (
                (got[name] - leaf).abs().max().item() if got[name].shape == leaf.shape else float("inf")
            )
    worst = max(wrong, key=lambda name: wrong[name], default=None)
    assert worst is None, f"{len(wrong)} of {len(want)} differ, worst {worst} by {wrong[worst]:.3g}"


def assert_close(got: Mapping[str, Tensor], want: Mapping[str, Tensor], *, rtol: float = 1e-10) -> None:
    """Every leaf to `rtol` of its largest entry; names the worst leaf."""
    assert set(got) == set(want)
    errors = {}
    for name, leaf in want.items():
        assert got[name].shape == leaf.shape, name
        scale = leaf.abs().max().item() or 1.0
        errors[name] = (got[name] - leaf).abs().max().item() / scale
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= rtol, f"worst {worst}: relative error {errors[worst]:.3g}, allowed {rtol:.3g}"
