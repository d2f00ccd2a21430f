"""Float8 by the target: the tensor cores for 8 bits, or PyTorch where there are none."""

import pytest
import torch

from fastlm.bench.cases import cases_of
from fastlm.bench.compile import compile_all
from fastlm.kernels import OPS

SIZE = {"M": 128, "N": 128, "K": 256}


@pytest.mark.parametrize("op", ["fp8_linear", "quantize_fp8"])
def test_gpus_without_float8_run_pytorch(op):
    sizes = OPS[op].sizes[:1]
    assert not cases_of(OPS[op], "sm_80", sizes=sizes, dtypes=[torch.bfloat16])
    assert cases_of(OPS[op], "sm_89", sizes=sizes, dtypes=[torch.bfloat16])


@pytest.mark.parametrize(("target", "expected"), [(90, "QGMMA"), (100, "UTCQMMA"), (120, "QMMA")])
def test_products_run_on_the_tensor_cores_for_8_bits(target, expected):
    op = OPS["fp8_linear"]
    case, *_ = cases_of(op, target, sizes=[SIZE], dtypes=[torch.bfloat16])
    (result,) = compile_all([(case.launch, target)], processes=1)
    assert expected in result.code.tensor
