"""What is special about embedding: runs of equal tokens, padding, PyTorch's options and errors."""

import pytest
import torch
import torch.nn.functional as F
from harness import check, outcome

from fastlm.kernels import OPS, Embedding, embedding, explain
from fastlm.kernels._interpreter import interpreted

OP = OPS["embedding"]
pytestmark = pytest.mark.usefixtures("kernels")


def table(V, N, dtype=torch.float32):
    return torch.randn(V, N, dtype=dtype).requires_grad_()


@pytest.mark.parametrize(
    "counts",
    [
        (64,),
        (65,),
        (63, 1, 1),
        (64, 64),
        (1, 64, 63, 1),
        (10, 300, 5),
        (54, 10, 64, 2, 62, 1),
        (0, 0, 200, 0, 1),
    ],
)
def test_runs_across_chunks(counts):
    """Runs that end, begin and lie around the chunks of 64 sorted tokens."""
    torch.manual_seed(0)
    numbers = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    numbers = numbers[torch.randperm(len(numbers))]
    check(OP, {"input": numbers, "weight": table(len(counts), 3)})


@pytest.mark.parametrize("dtype", OP.dtypes)
def test_a_frequent_token_is_summed_in_float32(dtype):
    """In half precision a sum of ones stops at 2048 or 256."""
    weight = torch.zeros(2, 4, dtype=dtype, requires_grad=True)
    embedding(torch.zeros(600, dtype=torch.int64), weight).sum().backward()
    assert torch.equal(weight.grad[0], torch.full((4,), 600).to(dtype))


@pytest.mark.parametrize("N", [1, 1000, 1024, 1100])
def test_widths(N):
    torch.manual_seed(0)
    check(OP, {"input": torch.tensor([[1, 2], [2, 0]]), "weight": table(3, N)})


@pytest.mark.parametrize("padding_idx", [0, 2, -1, -4])
def test_the_padding_row_gets_no_gradient(padding_idx):
    torch.manual_seed(0)
    found = {"input": torch.arange(100) % 4, "weight": table(4, 3), "padding_idx": padding_idx}
    check(OP, found)
    assert (outcome(OP.fused, found)["gradient of ['weight']"][padding_idx] == 0).all()


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3, 4)])
@pytest.mark.parametrize("N", [0, 3])
def test_shapes(shape, N):
    torch.manual_seed(0)
    check(OP, {"input": torch.randint(0, 5, shape), "weight": table(5, N)})


def test_numbers_outside_the_table():
    """They read nothing and write nothing: NaN forward, no gradient, and the others are right."""
    numbers = torch.tensor([1, 5, -1, 2**40, 0, 1])
    weight = table(5, 3)
    y = embedding(numbers, weight)
    assert y.isnan().all(-1).tolist() == [False, True, True, True, False, False]
    y.backward(torch.ones(6, 3))
    assert weight.grad[:, 0].tolist() == [1, 2, 0, 0, 0]


@pytest.mark.parametrize(
    "options", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}, {"sparse": True}]
)
def test_pytorchs_other_options_are_pytorchs(options):
    numbers = torch.tensor([1, 2, 1])
    ours = table(4, 3)
    theirs = ours.detach().clone().requires_grad_()
    assert "is given" in explain(embedding, numbers, ours, **options)
    for fn, weight in ((embedding, ours), (F.embedding, theirs)):
        with torch.no_grad():
            fn(numbers, weight, **options)
        if "max_norm" not in options:
            fn(numbers, weight, **options).sum().backward()
    torch.testing.assert_close(ours.detach(), theirs.detach())
    if "max_norm" not in options:
        torch.testing.assert_close(ours.grad.to_dense(), theirs.grad.to_dense())


@pytest.mark.parametrize(
    ("numbers", "weight", "options"),
    [
        (torch.zeros(2), torch.zeros(3, 4), {}),
        (torch.zeros(2).long(), torch.zeros(4), {}),
        (torch.zeros(2).long(), torch.zeros(3, 4), {"padding_idx": 3}),
        (torch.zeros(2).long(), torch.zeros(3, 4), {"padding_idx": -4}),
    ],
)
def test_refuses_what_pytorch_refuses_in_its_words(numbers, weight, options):
    with pytest.raises((RuntimeError, AssertionError)) as theirs:
        F.embedding(numbers, weight, **options)
    with pytest.raises((RuntimeError, AssertionError)) as ours:
        embedding(numbers, weight, **options)
    assert str(ours.value) == str(theirs.value)


def test_the_module_is_torchs_with_its_state_dict():
    torch.manual_seed(0)
    ours, theirs = Embedding(5, 3, padding_idx=1), torch.nn.Embedding(5, 3, padding_idx=1)
    ours.load_state_dict(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    numbers = torch.tensor([[1, 4], [0, 0]])
    grads = []
    for module in (ours, theirs):
        module(numbers).square().sum().backward()
        grads.append(module.weight.grad)
    torch.testing.assert_close(*grads)


def test_saved_for_backward_is_the_numbers():
    saved = []
    numbers = torch.tensor([1, 2])
    with (
        interpreted(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        embedding(numbers, table(3, 4))
    assert [t.data_ptr() for t in saved] == [numbers.data_ptr()]
