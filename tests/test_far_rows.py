"""Tensors whose offsets pass 2^31 elements: every op over rows, in one process of its own."""

import subprocess
import sys
import textwrap


def test_rows_past_two_to_the_31_elements():
    """Rows 2^30 elements apart in lazily mapped memory: a 32-bit offset would fall outside it.

    A process apart, because such an offset ends it; one for all, because PyTorch starts slowly.
    """
    code = """
        import torch
        from fastlm.kernels import OPS
        from fastlm.kernels._interpreter import interpreted

        step = 2**30 + 64
        far = torch.empty(3 * step + 128, dtype=torch.bfloat16).as_strided((4, 96), (step, 1))
        far.copy_(torch.randn(4, 96))
        near, bias = far.contiguous(), torch.randn(96).bfloat16()
        cos, sin = torch.randn(2, 4, 8)
        heads = [x.view(1, 4, 6, 16) for x in (far, near)]
        halves = [(x[:, :48], x[:, 48:]) for x in (far, near)]
        cases = {
            "layer_norm": ((far, (96,)), (near, (96,))),
            "rms_norm": ((far, (96,)), (near, (96,))),
            "add_layer_norm": ((far, far, (96,)), (near, near, (96,))),
            "add_rms_norm": ((far, far, (96,)), (near, near, (96,))),
            "softmax": ((far,), (near,)),
            "log_softmax": ((far,), (near,)),
            "bias_gelu": ((far, bias), (near, bias)),
            "swiglu": halves,
            "geglu": halves,
            "rotary_embedding": [(x, cos, sin) for x in heads],
            "embedding": [(torch.tensor([3, 0]), x) for x in (far, near)],
        }
        for name, (distant, close) in cases.items():
            with interpreted():
                got, want = (OPS[name].fused(*arguments) for arguments in (distant, close))
            torch.testing.assert_close(got, want, rtol=0, atol=0, msg=name)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=240, cwd="/")
