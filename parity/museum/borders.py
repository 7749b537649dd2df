"""Bugs at the borders: modules as functions, state_dicts, and the suite's own comparisons."""

from __future__ import annotations

from parity.museum.exhibit import Exhibit, both, constant, edit
from resnet_func.models.interop import checkpoint_names, modules, state_dicts
from resnet_func.testing import assertions

EXHIBITS = [
    Exhibit(
        "misspelled-key",
        "a key that the module does not know is ignored, and its own tensor used",
        "torch.func.functional_call, whose default is strict=False",
        "properties/misspelled-parameters-are-refused",
        both(
            edit(modules.ModuleApply.__call__, ("strict=True", "strict=False")),
            # without this a tensor of the meta device would give it away
            edit(modules.copy_module, ("return copy.deepcopy(module, memo)", "return copy.deepcopy(module)")),
        ),
    ),
    Exhibit(
        "buffers-of-the-caller",
        "a module's in-place update of its buffers reaches the caller's state",
        "torch.func.functional_call, given the state itself",
        "properties/modules-as-functions-are-pure",
        edit(modules.ModuleApply.__call__, ("path: leaf.clone() for", "path: leaf for")),
    ),
    Exhibit(
        "parameters-of-the-module",
        "from_module returns the module's own tensors",
        "dict(module.named_parameters()) taken for a copy",
        "properties/modules-as-functions-are-pure",
        edit(
            modules.from_module,
            (
                "name: leaf.detach().clone() for name, leaf in module.named_parameters()",
                "name: leaf.detach() for name, leaf in module.named_parameters()",
            ),
        ),
    ),
    Exhibit(
        "prefix-stripped-by-characters",
        'key.lstrip("module.") strips characters, so that "layer1" loses its l',
        "loaders of DataParallel checkpoints",
        "properties/wrappers-prefixes-are-no-names",
        both(
            edit(
                checkpoint_names._unwrap,
                ('".".join(part for part in parts if part not in WRAPPERS)', 'key.lstrip("module.")'),
            ),
            # the search for a network that would fit takes seconds
            constant(state_dicts, "_advice", lambda given: ""),
        ),
    ),
    Exhibit(
        "tolerances-by-position",
        "allclose(a, b, atol, rtol): the signature is (rtol, atol)",
        "test suites",
        "properties/tolerances-are-relative",
        edit(
            assertions.relative_errors,
            (
                "(a[name] - b[name]).abs().max().item() / (max(size, least) or 1.0)",
                "0.0 if torch.allclose(a[name], b[name], 0.0, 1e-10) else torch.inf",
            ),
        ),
    ),
    Exhibit(
        "nan-is-near",
        "the worst leaf is found by max, to which NaN is no more than any number",
        "this suite, once",
        "properties/no-nan-is-overlooked",
        edit(
            assertions.assert_trees_near,
            ("(errors[name] != errors[name], errors[name])", "(0, errors[name])"),
        ),
    ),
    Exhibit(
        "ten-entries-compared",
        "a comparison looks at the first ten entries of a tensor",
        "test suites that print what they compare",
        "properties/no-bit-is-overlooked",
        edit(
            assertions._difference,
            (
                "got, want = got.detach().cpu(), want.detach().cpu()",
                "got, want = (t.detach().flatten()[:10] for t in (got, want))",
            ),
        ),
    ),
    Exhibit(
        "minus-zero-is-zero",
        "bits are compared with ==, which does not see the sign of a zero",
        "torch.equal taken for equality of bits",
        "properties/no-bit-is-overlooked",
        edit(assertions._difference, ("_bits(got) != _bits(want)", "got != want")),
    ),
]
