"""FlexAttention's launches, from PyTorch's own templates and heuristics, with no GPU.

Dynamo wants tensors on a card, so FlexAttention's operator is traced on stand-ins for CPU tensors,
forward and backward, and the graph is then declared to live on a card. Inductor lowers it, told
that the card is of the target, and writes its program, which is never run: kernels, specialisation
and grids are read off it. It goes by Inductor's private names: checked with PyTorch 2.11, 2.13 and
2.14.
"""

import ast
import copy
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .capture import _CALLER_OPTIONS, LIMITS, Launch, as_target, capture_launches
from .model import cost, model
from .table import in_a_line

_INTEGERS = (torch.int32, torch.int64)


def flex_launches(
    target: str | int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[list[Launch], list[Launch]]:
    """What a call of the compiled FlexAttention launches on a card of the target.

    Of kernels that Inductor would choose by timing, the one that the model finds fastest is taken.

    Args:
        target: Such as ``"sm_90"``.
        query: (B, H, S, D) on the CPU; its contents do not matter.
        key: (B, H_kv, S_k, D), likewise.
        value: As ``key``.
        block_mask: Of CPU tensors; its tables give how often loops turn.
        scale: Default 1 / sqrt(D).
        enable_gqa: Whether H may be a multiple of H_kv.

    Returns:
        The launches of the forward and of the backward.

    Raises:
        RuntimeError: PyTorch cannot make the kernels here, and says why.
    """
    import torch._inductor.compile_fx  # noqa: F401  here once, not in every fork
    from torch.nn.attention import flex_attention as flex

    arch = as_target(target).arch
    if block_mask is None:
        block_mask = flex._create_empty_block_mask(query, key)  # as flex_attention itself does
    tables = {n: t for n, t in vars(block_mask).items() if isinstance(t, Tensor)}

    def write() -> tuple[str, list[str]]:
        _pretend(arch)
        options = {"scale": scale, "enable_gqa": enable_gqa}
        return _program(arch, (query, key, value), block_mask, list(tables), options)

    program, names = _in_a_fork(write)
    known = dict(zip(names[4:], tables.values(), strict=True))
    launches = [_chosen(candidates) for candidates in _launches(program, known, arch)]
    if not launches or not launches[0].name.startswith("triton_tem"):
        raise RuntimeError("Inductor's program does not begin with FlexAttention's forward")
    return launches[:1], launches[1:]


# --- a process that believes in a card ------------------------------------------------------------


def _in_a_fork(function: Callable[[], Any]) -> Any:
    """What a function gives in a process of its own, so that whatever it patches dies with it."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        try:
            answer = (function(), "")
        except BaseException as error:  # of PyTorch's, any kind: it is named in the report
            answer = (None, in_a_line(error))
        sender.send(answer)

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        found, error = receiver.recv()
    except EOFError:
        found, error = None, "the process ended without a word"
    process.join()
    if error:
        raise RuntimeError(f"Inductor: {error}")
    return found


def _pretend(arch: int) -> None:
    """Lets this process's PyTorch find one card of the target; for good."""
    from torch._dynamo import device_interface
    from torch._subclasses import fake_tensor

    shared, multiprocessors = LIMITS[arch]
    major, minor = divmod(arch, 10)
    card = SimpleNamespace(
        name=f"sm_{arch}",
        major=major,
        minor=minor,
        multi_processor_count=multiprocessors,
        shared_memory_per_block_optin=shared,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048 if arch in (80, 90, 100) else 1536,
        max_threads_per_block=1024,
        warp_size=32,
        gcnArchName="",  # of other makers: not there, but asked for
    )
    fakes: Any = fake_tensor
    fakes.init_gpu_context = lambda device: None  # it makes a tensor on the card
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_properties = lambda device=None: card
    cuda.get_device_capability = lambda device=None: (major, minor)

    class Worker:
        current_device = staticmethod(cuda.current_device)
        get_device_properties = staticmethod(cuda.get_device_properties)

    class Interface(device_interface.CudaInterface):
        current_device = staticmethod(cuda.current_device)
        device_count = staticmethod(cuda.device_count)
        get_device_properties = staticmethod(cuda.get_device_properties)

    Interface.Worker = Worker  # type: ignore[assignment, misc]
    list(device_interface.get_registered_device_interfaces())  # else they would replace it later
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, Interface)


# --- Inductor's program ---------------------------------------------------------------------------


def _program(
    arch: int,
    given: tuple[Tensor, Tensor, Tensor],
    block_mask: Any,
    tables: list[str],
    options: dict[str, Any],
) -> tuple[str, list[str]]:
    """The program that Inductor writes for a forward and a backward, and its inputs' names."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode

    def on_the_card(tensor: Tensor) -> Tensor:
        shape, strides = tensor.shape, tensor.stride()
        return torch.empty_strided(shape, strides, dtype=tensor.dtype, device="cuda")

    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        inputs = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in given]
        gradient = torch.empty_like(inputs[0])
        masks = [torch.empty_like(getattr(block_mask, name)) for name in tables]
        inputs = [t.requires_grad_() for t in inputs]
        graph = _traced([*inputs, gradient, *masks], block_mask, tables, options)
        for module in graph.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                if "val" in node.meta:
                    node.meta["val"] = pytree.tree_map_only(Tensor, on_the_card, node.meta["val"])
        lowering = GraphLowering(graph)
        with (
            V.set_graph_handler(lowering),
            V.set_debug_handler(DebugContext()),
            V.set_fake_mode(fake),
            torch.no_grad(),
            capture_launches(arch),  # Inductor asks Triton's driver for the target
        ):
            lowering.run(*map(on_the_card, (*inputs, gradient, *masks)))
            code, *_ = lowering.codegen()
        return str(getattr(code, "value", code)), list(lowering.graph_input_names)


def _traced(
    inputs: list[Tensor], block_mask: Any, tables: list[str], options: dict[str, Any]
) -> torch.fx.GraphModule:
    """FlexAttention's forward and backward as one graph."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.nn.attention import flex_attention as flex

    def both(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, *masks: Tensor) -> Any:
        mask = copy.copy(block_mask)
        for name, table in zip(tables, masks, strict=True):
            setattr(mask, name, table)
        # As Dynamo would trace it; that it cannot differentiate on a CPU concerns its CPU kernels.
        with (
            mock.patch("torch.compiler.is_dynamo_compiling", return_value=True),
            mock.patch.object(flex, "_validate_device"),
        ):
            out = flex.flex_attention(q, k, v, block_mask=mask, **options)
        return out, *torch.autograd.grad(out, (q, k, v), gradient)

    trace = make_fx(both, decomposition_table=select_decomp_table(), tracing_mode="fake")
    graph = trace(*inputs)
    for node in graph.graph.nodes:  # on a card it keeps the log-sum-exp for the backward
        node.args = tuple(
            {**a, "OUTPUT_LOGSUMEXP": True} if isinstance(a, Mapping) else a for a in node.args
        )
    return graph


# --- its launches ---------------------------------------------------------------------------------


def _launches(program: str, tables: Mapping[str, Tensor], arch: int) -> Iterator[list[Launch]]:
    """For each launch of a program, in order, all that Inductor would choose from.

    Args:
        program: Python, as Inductor writes it.
        tables: Integers that the launches are given, by the program's names.
        arch: Of the target.
    """
    tree = ast.parse(program)
    kernels = {}
    for call in ast.walk(tree):
        if _calls(call, "triton") and len(call.args) > 1:  # type: ignore[attr-defined]
            name, source = (ast.literal_eval(a) for a in call.args[:2])  # type: ignore[attr-defined]
            kernels[name] = getattr(_loaded(source), name)
    runs = [call for call in ast.walk(tree) if _calls(call, "run")]
    for run in sorted(runs, key=lambda call: call.lineno):  # type: ignore[attr-defined]
        owner = run.func.value  # type: ignore[attr-defined]
        if isinstance(owner, ast.Name) and owner.id in kernels:
            given = [
                tables.get(a.id) if isinstance(a, ast.Name) else ast.literal_eval(a)
                for a in run.args  # type: ignore[attr-defined]
            ]
            kernel = kernels[owner.id]
            yield [_launch(kernel, config, given, arch) for config in kernel.configs]


def _calls(node: ast.AST, method: str) -> bool:
    """Whether a node of a program calls a method of this name."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == method
    )


def _loaded(source: str) -> Any:
    """The module of a kernel's source, which Inductor keeps in its cache."""
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime import triton_helpers

    with mock.patch.object(triton_helpers, "set_driver_to_gpu"):
        return PyCodeCache.load(source)


def _launch(kernel: Any, config: Any, given: list[Any], arch: int) -> Launch:
    """A launch of one of Inductor's kernels, with one of its configurations."""
    from torch._inductor.runtime.triton_heuristics import GridExpr

    compiled = kernel._create_compile_meta(config)
    options = kernel._create_compile_options(config, compiled)
    names = kernel.fn.arg_names
    constants = {names.index(n) if isinstance(n, str) else n: v for n, v in _constants(compiled)}
    runtime = [name for i, name in enumerate(names) if i not in constants]
    grid_arguments = kernel.inductor_meta.get("extra_launcher_args", ())
    values = dict(zip([*runtime, *grid_arguments], given, strict=True))
    grid = GridExpr.from_meta(kernel.inductor_meta, config).eval_slow({**values, **config.kwargs})
    return Launch(
        kernel.fn,
        dict(compiled["signature"]),
        {(i,): value for i, value in constants.items()},
        dict(compiled["configs"][0]),
        {n: v for n, v in options.items() if n in _CALLER_OPTIONS and v is not None},
        as_target(arch),
        grid=tuple(grid),  # type: ignore[arg-type]
        arguments={n: values[n] for n in runtime if _is_known(values[n])},
    )


def _constants(compiled: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    return [(n[0] if isinstance(n, tuple) else n, v) for n, v in compiled["constants"].items()]


def _is_known(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, Tensor) and value.dtype in _INTEGERS)


def _chosen(candidates: list[Launch]) -> Launch:
    """The fastest, by the model."""
    if len(candidates) == 1:
        return candidates[0]

    def microseconds(launch: Launch) -> float:
        compiled = launch.compile()
        return model(launch, compiled.asm["ttir"], cost(compiled)).microseconds[1]

    return min(candidates, key=microseconds)
