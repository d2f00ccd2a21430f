"""What is special about sample: distribution, kept sets, ties, keys, special rows, errors."""

import math

import pytest
import torch

from fastlm.kernels import OPS, backend, explain, sample, sampling
from fastlm.kernels._dispatch import cpu_runner
from fastlm.kernels.sampling import kept_tokens, reference

OP = OPS["sample"]
pytestmark = pytest.mark.usefixtures("kernels")


def logits(B, V, dtype=torch.float32, scale=3.0):
    torch.manual_seed(0)
    return (scale * torch.randn(B, V)).to(dtype)


def agree(x, **settings):
    got = sample(x, **settings)
    assert got.dtype == torch.int64
    assert got.tolist() == reference(x, **settings).tolist()
    return got


def test_a_whole_number_may_come_as_a_float():
    x = logits(3, 50)
    assert agree(x, top_k=3.0, seed=1).tolist() == agree(x, top_k=3, seed=1).tolist()


# --- the draw -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_the_distribution_is_softmaxs(temperature):
    """Chi-squared over 40000 draws, of the reference, which draws the kernel's tokens."""
    x = torch.tensor([0.0, 1.0, -1.0, 2.0, -math.inf, 0.5, -4.0])
    draws = 40000
    got = reference(x.expand(draws, -1), temperature=temperature, seed=1)
    found = torch.bincount(got, minlength=7).double()
    expected = draws * (x.double() / temperature).softmax(0)
    assert found[4] == 0
    likely = expected > 0
    chi_squared = ((found - expected)[likely] ** 2 / expected[likely]).sum()
    assert chi_squared < 22.5  # one in a thousand of 5 degrees of freedom is above 20.5
    assert torch.equal(got[:6], sample(x.expand(6, -1), temperature=temperature, seed=1))


def test_steps_and_seeds_draw_afresh():
    """Of equal logits, each step, each row and each seed takes its own tokens, evenly."""
    x = torch.zeros(64, 1000)
    steps = [reference(x, seed=3, offset=i) for i in range(20)]
    tokens = torch.stack(steps).double()
    assert len(tokens.unique()) > 680  # 1280 draws of 1000 tokens take about 722
    assert abs(tokens.mean() - 499.5) < 5 * 289 / 1280**0.5
    correlation = torch.corrcoef(tokens).fill_diagonal_(0).abs().max()
    assert correlation < 0.6  # 4.5 standard deviations of 64 numbers
    agree(x[:3, :500], seed=3, offset=7)


@pytest.mark.parametrize("dtype", OP.dtypes)
@pytest.mark.parametrize("V", [1, 2, 3, 50257])
def test_any_vocabulary(V, dtype):
    agree(logits(1, V, dtype), seed=2**40 + 3, offset=2**31 - 1)


def test_a_row_does_not_depend_on_its_batch():
    x = logits(5, 2500)
    settings = {
        "temperature": torch.tensor([1.0, 0.0, 0.7, 2.0, 1.0]),
        "top_k": torch.tensor([0, 5, 30, 2500, 1]),
        "top_p": torch.tensor([1.0, 0.5, 0.9, 0.3, 1.0]),
        "min_p": torch.tensor([0.0, 0.0, 0.1, 0.0, 1.0]),
        "seed": torch.tensor([11, -5, 2**62, 11, 0]),
        "offset": torch.tensor([0, 1, 2, 3, 4]),
    }
    together = agree(x, **settings)
    for order in ([3], [4, 0], [2, 1]):
        alone = sample(x[order], **{name: t[order] for name, t in settings.items()})
        assert alone.tolist() == together[order].tolist()


def test_one_seed_stands_for_a_seed_a_row():
    x = logits(1, 300).expand(4, -1)
    got = sample(x, seed=40)
    assert got.tolist() == sample(x, seed=torch.arange(40, 44)).tolist()
    assert sample(x, seed=torch.tensor(40)).tolist() == got.tolist()
    assert len(set(got.tolist())) > 1


def test_no_seed_draws_from_pytorchs_generator():
    x = logits(4, 50)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(sample(x).tolist())
    assert runs[0] == runs[1] != runs[2]


# --- greedy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", OP.dtypes)
def test_greedy_is_argmax(dtype):
    x = logits(3, 5000, dtype).round()  # many ties
    x[1, [7, 2048 + 7]] = 100  # in one lane, a block apart
    assert sample(x, temperature=0.0).tolist() == x.argmax(1).tolist()
    mixed = torch.tensor([0.0, 1.0, 0.0])
    got = agree(x, temperature=mixed, seed=1, top_p=0.5)
    assert got[::2].tolist() == x.argmax(1)[::2].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("filters", [{}, {"top_k": 2, "top_p": 0.5, "min_p": 0.5}])
def test_special_rows(temperature, filters):
    inf, nan = math.inf, math.nan
    x = torch.full((6, 2100), -inf)
    x[1, 2077] = -1e30  # the one finite logit
    x[2, :] = 0.0
    x[2, [5, 2050]] = nan
    x[3, [7, 2060]] = inf
    x[4, :] = -0.0
    x[4, 9] = 0.0
    x[5, 2099] = -nan
    got = agree(x, temperature=temperature, seed=0, **filters).tolist()
    assert (got[0], got[1], got[2], got[3], got[5]) == (0, 2077, 5, 7, 2099)
    if temperature == 0:
        assert got[4] == 0  # -0 and 0 are equal: the first


# --- filters ------------------------------------------------------------------------------------


def kept_by_kernel(x, **filters):
    """The tokens that the kernel can draw, from the cut that it stores."""
    from fastlm.kernels import sampling

    B = x.shape[0]
    cut = torch.empty(B, dtype=torch.int32)
    names = ("top_k", "top_p", "min_p")
    kinds = (torch.int32, torch.float32, torch.float32)
    given = [
        sampling._rows_setting(filters[name], kind, x) if name in filters else None
        for name, kind in zip(names, kinds, strict=True)
    ]
    sampling._cut_kernel[(B,)](
        x, sampling._rows_setting(filters["temperature"], torch.float32, x), *given, cut,
        x.stride(0), x.shape[1],
        HAS_TOP_K=given[0] is not None, HAS_TOP_P=given[1] is not None,
        HAS_MIN_P=given[2] is not None,
        LOWEST_BIT=sampling._LOWEST_BIT[x.dtype], BLOCK=1024,
    )  # fmt: skip
    bits = (x.float() + 0.0).view(torch.int32)
    return (bits ^ (bits >> 31 & 2**31 - 1)) >= cut[:, None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 7},
        {"top_k": 10**6},
        {"top_p": 0.8},
        {"top_p": 0.0},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"top_k": 40, "top_p": 0.6, "min_p": 0.01},
    ],
)
def test_the_kept_set_is_the_sorted_references(filters, dtype):
    x = logits(2, 1500, dtype)
    x[1] = x[1].round()  # ties, which stay or go together
    x[1, 100:] = -math.inf
    filters = {"temperature": 1.3} | filters
    got = kept_by_kernel(x, **filters)
    degrees = torch.full((2, 1), filters["temperature"])
    want = kept_tokens(
        x.float(), degrees, **{k: v for k, v in filters.items() if k != "temperature"}
    )
    assert torch.equal(got, want)
    if filters.get("top_k") == 7:
        assert got[0].sum() >= 7
        assert got[1].sum() >= 7


def test_filters_by_definition():
    """Against definitions that need no sort."""
    x = torch.tensor([[2.0, 1.0, 1.0, 0.0, -1.0]]).log_softmax(1)
    degrees = torch.ones(1, 1)
    p = x.exp()[0]
    assert kept_tokens(x, degrees, top_k=2)[0].tolist() == [True, True, True, False, False]
    just = (p[0] + 1e-3).item()
    assert kept_tokens(x, degrees, top_p=just)[0].tolist() == [True, True, True, False, False]
    assert kept_tokens(x, degrees, top_p=(p[0] - 1e-3).item())[0].sum() == 1
    share = (p[3] / p[0]).item()
    assert kept_tokens(x, degrees, min_p=share * 0.99)[0].sum() == 4
    assert kept_tokens(x, degrees, min_p=share * 1.01)[0].sum() == 3
    # top_p is of what top_k leaves: three tokens, the first of which has 58 % of their probability.
    assert kept_tokens(x, degrees, top_k=2, top_p=0.55)[0].sum() == 1


def test_only_kept_tokens_are_drawn():
    x = logits(1, 1200, torch.bfloat16).expand(12, -1)
    got = agree(x, seed=5, top_k=3, temperature=5.0)
    assert set(got.tolist()) <= set(x[0].topk(3).indices.tolist())
    assert len(set(got.tolist())) > 1


# --- the rest -----------------------------------------------------------------------------------


def test_no_rows():
    assert sample(torch.empty(0, 5), seed=1).shape == (0,)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"logits": torch.zeros(3)}, r"logits must be \(B, V\) floating point; got \(3,\)"),
        ({"logits": torch.zeros(2, 3).long()}, "logits must be"),
        ({"temperature": -1.0}, "temperature must be a number from 0 on; got -1.0"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"top_k": -1}, "top_k must be a whole number from 0 on"),
        ({"top_p": 1.5}, "top_p must be a number from 0 to 1"),
        ({"min_p": -0.5}, "min_p must be a number from 0 to 1"),
        ({"offset": 2**31}, "offset must be a whole number"),
        ({"seed": torch.zeros(3).long()}, r"seed must be one value or \(2,\)"),
        ({"top_p": torch.zeros(3)}, r"top_p must be one value or \(2,\)"),
    ],
)
def test_refuses_what_does_not_fit(changed, words):
    for name in ("auto", "torch"):
        with backend(name), pytest.raises(ValueError, match=words):
            sample(**({"logits": torch.zeros(2, 3), "seed": 1} | changed))


def test_without_tokens_it_raises_what_argmax_raises():
    assert "no tokens" in explain(sample, torch.zeros(2, 0))
    with pytest.raises(IndexError, match="argmax"):
        sample(torch.zeros(2, 0))


def test_the_cpu_path_draws_the_kernels_tokens():
    x = logits(3, 400)
    settings = {"seed": 9, "top_p": 0.9, "temperature": 0.8}
    with cpu_runner(None):
        plain = sample(x, **settings)
    assert plain.tolist() == sample(x, **settings).tolist()


# --- large vocabularies on a CPU ----------------------------------------------------------------

ROWS = 16
FILTERS = [
    {"top_k": 50},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.01},
    {"top_k": torch.arange(1, ROWS + 1) * 50},
    {"top_p": torch.linspace(0.1, 0.9, ROWS)},
    {"min_p": torch.linspace(0.01, 0.9, ROWS)},
]


def draws_alike(x, **settings):
    want = reference(x, seed=3, offset=torch.arange(len(x)), **settings)
    with cpu_runner(None):
        got = sample(x, seed=3, offset=torch.arange(len(x)), **settings)
    assert got.dtype == torch.int64
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_the_likeliest_tokens_alone_the_same_is_drawn(filters, dtype, monkeypatch):
    x = logits(ROWS, 6001, dtype, scale=5.0)
    sorts = []
    honest = sampling._drawn
    monkeypatch.setattr(sampling, "_drawn", lambda *args: sorts.append(1) or honest(*args))
    with cpu_runner(None):
        got = sample(x, temperature=0.8, seed=3, **filters)
    assert not sorts
    assert got.tolist() == reference(x, temperature=0.8, seed=3, **filters).tolist()
    assert len(set(got.tolist())) > 1
    draws_alike(x, temperature=0.8, **filters)


def flat(x):
    return x / 100


def tied(x):
    return x.round()


def one_nan(x):
    x[1, 4000] = math.nan
    return x


def two_infinite(x):
    x[1, [3000, 4000]] = math.inf
    return x


def one_finite(x):
    x[1], x[1, 77] = -math.inf, 0.0
    x[2] = -math.inf
    return x


@pytest.mark.parametrize("change", [flat, tied, one_nan, two_infinite, one_finite])
@pytest.mark.parametrize("filters", [*FILTERS[:4], {"top_k": 3000}, {"top_p": 0.9999}])
def test_what_the_likeliest_do_not_decide_is_drawn_of_all(change, filters):
    x = change(logits(4, 6001, scale=1.0))
    draws_alike(x, **filters)
