"""PyTorch's own sample inputs and expected errors (OpInfo) for every op that PyTorch has too.

Each sample runs on the CPU path, where the answer is PyTorch's to the bit, and in the interpreter,
where results and gradients keep the numerics contract.
"""

import contextlib
import functools

import pytest
import torch
from harness import assert_bitwise_equal, assert_within_contract, doubled, outcome

from fastlm.kernels import (
    OPS,
    dropout,
    embedding,
    explain,
    gelu,
    group_norm,
    layer_norm,
    log_softmax,
    rms_norm,
    softmax,
)
from fastlm.kernels._interpreter import interpreted


def native_layer_norm(input, normalized_shape, weight, bias, eps):
    """The part of ``torch.native_layer_norm`` that ``layer_norm`` gives."""
    return layer_norm(input, normalized_shape, weight, bias, eps)


# Of each OpInfo: ours, the names of its positional arguments after the first, and its variant.
NORM = ("normalized_shape", "weight", "bias", "eps")
SAMPLES = {
    "nn.functional.layer_norm": (layer_norm, ("input", *NORM), ""),
    "native_layer_norm": (native_layer_norm, ("input", *NORM), ""),
    "nn.functional.rms_norm": (rms_norm, ("input", "normalized_shape", "weight", "eps"), ""),
    "nn.functional.group_norm": (group_norm, ("input", "num_groups", "weight", "bias", "eps"), ""),
    "softmax": (softmax, ("input", "dim"), ""),
    "softmax, with_dtype": (softmax, ("input", "dim"), "with_dtype"),
    "log_softmax": (log_softmax, ("input", "dim"), ""),
    "log_softmax, with_dtype": (log_softmax, ("input", "dim"), "with_dtype"),
    "nn.functional.gelu": (gelu, ("input",), ""),
    "nn.functional.dropout": (dropout, ("input", "p", "training"), ""),
    "nn.functional.embedding": (embedding, ("weight", "input", "padding_idx"), ""),
}
# Those that have expected errors, and how many at least.
ERRORS = {"native_layer_norm": 4, "nn.functional.rms_norm": 3, "nn.functional.gelu": 1}
PATHS = {"cpu": contextlib.nullcontext, "interpreter": interpreted}


@functools.cache
def info(name):
    from torch.testing._internal.common_methods_invocations import op_db

    name, _, variant = name.partition(", ")
    return next(i for i in op_db if (i.name, i.variant_test_name) == (name, variant))


def named(sample, names):
    """A sample's arguments by name; the draws of dropout by a seed, and no writing over leaves."""
    found = dict(zip(names, (sample.input, *sample.args), strict=False)) | sample.kwargs
    if "p" in names:
        found |= {"seed": 2, "inplace": False}
    return found


def declared(name):
    """Our op's declaration."""
    ours, _, _ = SAMPLES[name]
    return OPS[ours.__name__.removeprefix("native_")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SAMPLES)
def test_samples(name, dtype):
    ours, names, _ = SAMPLES[name]
    op = declared(name)
    samples = list(info(name).sample_inputs("cpu", dtype, requires_grad=True))
    assert samples
    for sample in samples:
        found = named(sample, names)
        want = outcome(op.reference, found)
        assert_bitwise_equal(outcome(ours, found), want)
        with interpreted():
            got = outcome(ours, found)
            if "runs PyTorch" in explain(op.fused, **found):
                assert_bitwise_equal(got, want)
            else:
                assert_within_contract(got, want, outcome(op.reference, doubled(found)))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("name", "how_many"), ERRORS.items())
def test_errors(name, how_many, path):
    """What PyTorch's own tests expect to be refused is refused, with the same words."""
    ours, names, _ = SAMPLES[name]
    errors = list(info(name).error_inputs("cpu"))
    assert len(errors) >= how_many
    for error in errors:
        with PATHS[path](), pytest.raises(error.error_type, match=error.error_regex):
            ours(**named(error.sample_input, names))
