"""``patch``: fused ops in one model's modules, where they agree, and out of them again."""

import copy
import functools
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm.kernels import LayerNorm, PatchReport, patch
from fastlm.kernels._interpreter import interpreted


class HubRMSNorm(nn.Module):
    """As Hugging Face writes it for Llama, or, with an offset of 1, for Gemma."""

    def __init__(self, size, eps=1e-6, offset=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1 - offset))
        self.variance_epsilon, self.offset = eps, offset

    def forward(self, hidden_states):
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.offset + self.weight) * x.to(hidden_states.dtype)


class GatedMLP(nn.Module):
    def __init__(self, size, act_fn):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(size, 2 * size) for _ in range(2))
        self.down_proj = nn.Linear(2 * size, size)
        self.act_fn = act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class PackedMLP(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(size, 4 * size), nn.Linear(2 * size, size)
        self.activation_fn = nn.GELU("tanh")

    def forward(self, hidden_states):
        gate, up = self.gate_up_proj(hidden_states).chunk(2, -1)
        return self.down_proj(up * self.activation_fn(gate))


def whole_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(11, 16, padding_idx=3),
        nn.LayerNorm(16),
        nn.GELU(),
        nn.RMSNorm(16, eps=1e-5),
        nn.GELU("tanh"),
        HubRMSNorm(16),
        GatedMLP(16, nn.SiLU()),
        HubRMSNorm(16, offset=1.0),
        PackedMLP(16),
    )


OPS = {
    "0": "embedding",
    "1": "layer_norm",
    "2": "gelu",
    "3": "rms_norm",
    "4": 'gelu "tanh"',
    "5": "rms_norm",
    "6": "swiglu",
    "7": "rms_norm of 1 + weight",
    "8": 'geglu "tanh"',
}
NUMBERS = torch.tensor([[1, 3, 10, 0, 3]])


class Calls(TorchDispatchMode):
    """Notes which fastlm operators run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastlm":
            self.names.add(func.name().removeprefix("fastlm::"))
        return func(*args, **(kwargs or {}))


def results(model, *inputs, **more):
    """The output and every parameter's gradient."""
    model.zero_grad()
    y = model(*inputs, **more)
    y = getattr(y, "loss", y)
    y.float().square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(got, want, tolerance=1e-5):
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        scale = theirs.abs().max().item() or 1.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)


def test_every_kind_of_module_runs_its_kernel_and_agrees():
    model = whole_model()
    want = results(model, NUMBERS)
    with interpreted():
        report = patch(model)
        with Calls() as calls:
            got = results(model, NUMBERS)
    assert {s.name: s.op for s in report.swapped} == OPS
    assert report.skipped == []
    forwards = {"embedding", "layer_norm", "activation", "rms_norm", "glu"}
    assert calls.names == forwards | {f"{name}_backward" for name in forwards}
    assert_same(got, want)


def test_the_model_is_otherwise_the_same_and_undo_takes_it_all_back():
    model, other = whole_model(), whole_model()
    before = {name: (id(m), type(m), set(vars(m))) for name, m in model.named_modules()}
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    functions = dict(vars(F))
    torch.manual_seed(5)
    report = patch(model)
    assert torch.initial_seed() == 5
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters
    assert dict(vars(F)) == functions
    assert all("forward" not in vars(m) for m in other.modules())
    assert sum("forward" in vars(m) for m in model.modules()) == len(OPS)
    report.undo()
    report.undo()
    after = {name: (id(m), type(m), set(vars(m))) for name, m in model.named_modules()}
    assert after == before


def test_as_a_context_manager_it_ends_with_the_block():
    model = whole_model()
    with patch(model) as report:
        assert isinstance(report, PatchReport)
        assert "forward" in vars(model[1])
    assert "forward" not in vars(model[1])


def test_each_option_leaves_its_kind_alone():
    kinds = {"norm": "1357", "mlp": "68", "activation": "24", "embedding": "0"}
    for option, names in kinds.items():
        with patch(whole_model(), **{option: False}) as report:
            untouched = OPS.keys() - {s.name for s in report.swapped}
            assert untouched == set(names)
    with patch(whole_model(), mlp=False) as report:  # then the packed unit's own activation is one
        assert 'gelu "tanh"' in {s.op for s in report.swapped if s.name == "8.activation_fn"}


class OwnForward(nn.LayerNorm):
    def forward(self, input):
        return super().forward(input.float())


class EpsOutsideRMSNorm(HubRMSNorm):
    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class CentredRMSNorm(HubRMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class GatedRMSNorm(HubRMSNorm):
    def forward(self, x, gate=None):
        return super().forward(x)


class DetachedRMSNorm(HubRMSNorm):
    def forward(self, x):
        return super().forward(x.detach())


class NoEpsRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class ScaledMLP(GatedMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 1.01)


class WeightReadingMLP(GatedMLP):
    def forward(self, x):
        return super().forward(x) + F.linear(x, self.gate_proj.weight).mean()


def replaced():
    module = nn.LayerNorm(4)
    module.forward = lambda x: x
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (OwnForward(4), "forward of its own"),
        (EpsOutsideRMSNorm(16, eps=1e-2), "off by"),
        (HubRMSNorm(16, offset=0.5), "off by"),
        (CentredRMSNorm(16), "off by"),
        (DetachedRMSNorm(16), "its gradient is off by"),
        (GatedRMSNorm(16), "other than one argument"),
        (NoEpsRMSNorm(), "no variance_epsilon or eps"),
        (QuickGELU(), "off by"),
        (nn.Embedding(5, 4, max_norm=1.0), "max_norm"),
        (replaced(), "already replaced"),
        (GatedMLP(8, nn.Mish()), "off by"),
        (ScaledMLP(8, nn.SiLU()), "off by"),
        (WeightReadingMLP(8, nn.SiLU()), "the probe failed: AttributeError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_does_not_agree_stays_and_is_named(module, reason):
    had = set(vars(module))
    report = patch(nn.Sequential(module))
    assert report.swapped == []
    (skip,) = report.skipped
    assert (skip.name, skip.kind) == ("0", type(module).__name__)
    assert reason in skip.reason
    assert set(vars(module)) == had
    assert f"stays: {skip.reason}" in str(report)


def test_eps_tells_two_norms_apart():
    """The class reads its eps from where the op does not look."""

    class AnotherEpsRMSNorm(HubRMSNorm):
        def __init__(self):
            super().__init__(16, eps=1e-6)
            self.variance_epsilon, self.true_eps = 1e-5, 1e-6

        def forward(self, x):
            return F.rms_norm(x, (16,), self.weight, self.true_eps)

    assert patch(AnotherEpsRMSNorm()).swapped == []


def test_the_report_groups_equal_modules():
    report = patch(nn.Sequential(*(nn.LayerNorm(4) for _ in range(3)), QuickGELU()))
    lines = str(report).splitlines()
    assert lines[0] == "3 modules run fused ops, 1 do not"
    assert lines[1] == "  LayerNorm runs layer_norm: 0 and 2 more"


def test_our_own_modules_and_patched_ones():
    model = nn.Sequential(LayerNorm(4), nn.LayerNorm(4))
    first = patch(model)
    assert [s.name for s in first.swapped] == ["1"]
    assert [s.reason for s in patch(model).skipped] == ["its forward is already replaced"]


def test_undo_refuses_to_drop_what_came_after():
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    report, wrapper = patch(model), nn.Identity()
    model[1].forward = wrapper.forward
    with pytest.raises(RuntimeError, match=r"undo: the forward of 1 \(LayerNorm\) was replaced"):
        report.undo()
    assert "forward" in vars(model[0])
    assert model[1].forward == wrapper.forward


@pytest.mark.parametrize("model", [None, torch.zeros(2), nn.LayerNorm])
def test_refuses_what_is_not_a_module(model):
    with pytest.raises(ValueError, match=r"patch: model must be a torch.nn.Module; got "):
        patch(model)


def test_group_norm():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.GroupNorm(2, 6), nn.Conv1d(6, 3, 1)), torch.randn(2, 6, 5)
    want = results(model, x)
    with interpreted(), patch(model) as report:
        assert [(s.name, s.op) for s in report.swapped] == [("0", "group_norm")]
        assert_same(results(model, x), want)


def test_half_precision_parameters():
    model = whole_model().bfloat16()
    want = results(model, NUMBERS)
    with patch(model) as report:
        assert {s.name: s.op for s in report.swapped} == OPS
        assert_same(results(model, NUMBERS), want, tolerance=0.05)


def test_another_dtype_than_the_weights_goes_to_the_class():
    """Hugging Face's norms give float32 for a float32 weight, whatever the input."""
    norm, x = HubRMSNorm(16), torch.randn(3, 16).bfloat16()
    want = norm(x)
    patch(norm)
    got = norm(hidden_states=x)
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_parameters_without_numbers_are_probed_elsewhere():
    with torch.device("meta"):
        model = whole_model()
    report = patch(model)
    assert {s.name: s.op for s in report.swapped} == OPS
    assert all(p.is_meta for p in model.parameters())
    assert model(NUMBERS.to("meta")).shape == (1, 5, 16)


def test_hooks_still_run_and_the_probe_runs_none():
    norm, seen = nn.LayerNorm(4), []
    norm.register_forward_hook(lambda *_: seen.append(1))
    norm.register_forward_pre_hook(lambda *_: seen.append(0))
    patch(norm)
    assert seen == []
    norm(torch.randn(2, 4))
    assert seen == [0, 1]


def test_copies_and_files():
    """A deep copy is patched as well, with its own parameters; what is saved whole is not."""
    model = whole_model()
    patch(model)
    twin = copy.deepcopy(model)
    twin[1].weight.data.zero_()
    twin[1].bias.data.fill_(7)
    assert (twin[1](torch.randn(2, 16)) == 7).all()
    assert (model[1](torch.randn(2, 16)) != 7).any()
    plain = nn.Sequential(nn.LayerNorm(4))
    patch(plain)
    file = io.BytesIO()
    torch.save(plain, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = torch.randn(2, 4)
    torch.testing.assert_close(loaded(x), F.layer_norm(x, (4,)))


def test_a_patched_model_compiles_without_a_graph_break():
    model = whole_model()
    patch(model)
    torch._dynamo.reset()
    with interpreted(), torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(NUMBERS), model(NUMBERS))


# --- functions that modules call ----------------------------------------------------------------


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    """As Hugging Face writes it for Llama."""

    def turned(x):
        one, two = x.chunk(2, -1)
        c, s = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return x * c + torch.cat((-two, one), -1) * s

    return turned(q), turned(k)


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class HubRotaryEmbedding(nn.Module):
    def __init__(self, interleaved=False):
        super().__init__()
        self.interleaved = interleaved

    def forward(self, x, position_ids):
        angles = position_ids[..., None] * torch.tensor([1.0, 0.3, 0.1])
        angles = angles.repeat_interleave(2, -1) if self.interleaved else angles.repeat(1, 1, 2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class HubAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(12, 36)

    @decorated
    def forward(self, x, tables):
        q, k, v = (t.unflatten(-1, (2, 6)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        q, k = apply_rotary_pos_emb(q, k, *tables)
        return F.scaled_dot_product_attention(q, k, v.to(q.dtype)).transpose(1, 2).flatten(2)


def _causal_loss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, **more):
    shifted = more.get("shift_labels")
    if shifted is None:
        shifted = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    kind = "mean" if num_items_in_batch is None else "sum"
    logits = logits.float().view(-1, vocab_size)
    loss = F.cross_entropy(logits, shifted.reshape(-1), ignore_index=ignore_index, reduction=kind)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


class HubForCausalLM(nn.Module):
    def __init__(self, interleaved=False):
        super().__init__()
        self.rotary_emb, self.attention = HubRotaryEmbedding(interleaved), HubAttention()

    @property
    def loss_function(self):
        return self.__dict__.get("_loss_function", _causal_loss)

    def forward(self, x, position_ids):
        logits = self.attention(x, self.rotary_emb(x, position_ids))
        labels = torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2]) % 12
        return self.loss_function(logits=logits, labels=labels, vocab_size=12)


@pytest.mark.parametrize(
    ("positions", "dtype"),
    [([[0, 1, 2, 3]], torch.bfloat16), ([[0, 1, 2, 3], [5, 6, 7, 8]], torch.float32)],
)
def test_rotations_and_losses_of_one_model(positions, dtype):
    torch.manual_seed(0)
    model, other = HubForCausalLM().to(dtype), HubForCausalLM()
    inputs = torch.randn(2, 4, 12, dtype=dtype), torch.tensor(positions)
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    want = results(model, *inputs)
    scope = dict(globals())
    with patch(model) as report:
        with interpreted(), Calls() as calls:
            got = results(model, *inputs)
        assert {s.name: s.op for s in report.swapped} == {
            "attention": "rotary_embedding",
            "": "cross_entropy",
        }
        assert [s.reason for s in patch(model).skipped] == [
            "its forward is already replaced",
            "its loss function is already replaced",
        ]
        assert patch(other, rotary=False, loss=False).swapped == []
    assert calls.names == {"rotary", "cross_entropy", "cross_entropy_backward"}
    assert dict(globals()) == scope
    assert {name: set(vars(m)) for name, m in model.named_modules()} == before
    assert_same(got, want, tolerance=1e-5 if dtype == torch.float32 else 0.03)


def test_other_rotations_and_losses_stay(monkeypatch):
    report = patch(HubForCausalLM(interleaved=True))
    assert "halves are equal" in report.skipped[0].reason
    monkeypatch.setitem(
        globals(), "_causal_loss", lambda logits, labels, **_: logits.float().mean()
    )
    monkeypatch.setitem(globals(), "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))
    report = patch(HubForCausalLM())
    assert report.swapped == []
    assert all("off by" in s.reason for s in report.skipped)


def test_tables_that_ours_would_not_take_go_to_the_function_itself():
    """Float32 tables beside half precision widen the result, and a narrow table does not fit."""
    model = HubForCausalLM().bfloat16()
    x, tables = torch.randn(1, 4, 12), model.rotary_emb(torch.zeros(1), torch.arange(4)[None])
    want = model.attention(x.bfloat16(), tables)
    with patch(model):
        got = model.attention(x.bfloat16(), tables)
        with pytest.raises(RuntimeError):
            model.attention(x.bfloat16(), [t[..., :4] for t in tables])
    assert torch.equal(got, want)


# --- Hugging Face -------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 16,
}
GPT2 = {"vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2}
GATED = {"embedding", "rms_norm", "swiglu", "rotary_embedding", "cross_entropy"}
GEMMA = {"rms_norm of 1 + weight", 'geglu "tanh"', "rotary_embedding", "cross_entropy"}


@pytest.mark.parametrize(
    ("family", "sizes", "norms", "ops"),
    [
        ("GPT2", GPT2, 3, {"embedding", "layer_norm", 'gelu "tanh"', "cross_entropy"}),
        ("Llama", SIZES, 3, GATED),
        ("Mistral", SIZES, 3, GATED),
        ("Qwen2", SIZES, 3, GATED),
        ("Qwen3", SIZES, 5, GATED),  # with the norms of each head's query and key
        ("Phi3", SIZES | {"pad_token_id": 0}, 3, GATED),
        ("Gemma", SIZES, 3, GEMMA),  # its embedding has a forward of its own
        ("Gemma2", SIZES, 5, GEMMA),
    ],
)
def test_models_of_hugging_face(family, sizes, norms, ops):
    """Tiny random models: the same loss and gradients, fused or not."""
    transformers = pytest.importorskip("transformers", reason="the peer is not installed")
    config = getattr(transformers, f"{family}Config")(**sizes)
    torch.manual_seed(0)
    name = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    for p in model.parameters():
        if p.dim() == 1:  # a norm's weight of just 1, or 0, would hide much
            nn.init.normal_(p)
    inputs = {"input_ids": torch.tensor([[3, 1, 49, 0, 7, 7, 2]])}
    inputs["labels"] = inputs["input_ids"]
    want = results(model, **inputs)
    runs_kernels = interpreted() if family in ("GPT2", "Qwen3") else torch.enable_grad()
    with runs_kernels, patch(model) as report:
        got = results(model, **inputs)
    assert sum("norm" in s.op for s in report.swapped) == norms
    assert {s.op for s in report.swapped} == ops
    assert [s.kind for s in report.skipped] == [
        f"{family}TextScaledWordEmbedding" for _ in range("Gemma" in family)
    ]
    assert_same(got, want, tolerance=3e-5)
