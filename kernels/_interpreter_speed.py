"""Triton's interpreter, quicker: what depends on types alone is worked out once.

A profile of this suite found two thirds of an interpreted kernel's time in Triton's own Python:
building types and shapes, promoting them, and patching `triton.language` on every call. Everything
here replaces a function by one of the same results that remembers; numbers are computed as before.
"""

import inspect
import types
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_BUILTIN = tl.core.builtin(lambda: None).__code__  # the wrapper that only checks for _semantic


def be_quick() -> None:
    """Installs all of it in this process; the compiler's own run of Triton's code keeps its."""
    _patch_once_a_launch()
    _find_builtins_once()
    stock_dtype, numpy_types = interpreter._get_np_dtype, {}

    def get_np_dtype(kind):
        if isinstance(kind, (tl.block_type, tl.pointer_type)):
            return stock_dtype(kind)
        if kind.name not in numpy_types:
            numpy_types[kind.name] = stock_dtype(kind)
        return numpy_types[kind.name]

    interpreter._get_np_dtype = get_np_dtype


def _patch_once_a_launch() -> None:
    """Patches triton.language once a launch, not on every nested call; restores it always."""
    stock_patch = interpreter._patch_lang
    everything = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    active: list[Any] = []
    replaced = [*_types_that_remember(), *_operations_that_remember()]

    class Scope:
        def __init__(self, inner: Any):
            self.inner = inner

        def restore(self) -> None:
            if self.inner is not None:
                self.inner.restore()
                active.pop()

    def patch_lang(function):
        if active:
            return Scope(None)
        scope = stock_patch(everything)
        for owner, name, quicker in replaced:
            scope.set_attr(owner, name, quicker)
        active.append(Scope(scope))
        return active[-1]

    def call(self, *args, **kwargs):
        scope = patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        finally:
            scope.restore()

    interpreter._patch_lang = patch_lang
    interpreter.InterpretedFunction.__call__ = call


def _find_builtins_once() -> None:
    """The functions of triton.language that a launch patches are the same each time."""
    found: dict[Any, list[tuple[str, Callable]]] = {}

    def patch_builtin(owner, _, scope):
        if owner not in found:
            builtins = inspect.getmembers(owner, tl.core.is_builtin)
            found[owner] = [(name, _with_semantic(member)) for name, member in builtins]
        for name, member in found[owner]:
            scope.set_attr(owner, name, member)

    interpreter._patch_builtin = patch_builtin


def _with_semantic(member: Callable) -> Callable:
    """A function of triton.language, given the interpreter's meaning of its operations."""
    semantic = TritonSemantic(interpreter.interpreter_builder)
    if getattr(member, "__code__", None) is _BUILTIN:
        member = vars(member)["__wrapped__"]

    def call(*args, **kwargs):
        kwargs["_semantic"] = semantic
        return member(*args, **kwargs)

    return call


def _types_that_remember() -> list[tuple[Any, str, Callable]]:
    """(owner, name, function): blocks and tensors take what depends on their type from the last."""
    constexpr, dtype, block_type, tensor = tl.constexpr, tl.dtype, tl.block_type, tl.tensor
    stock_block, stock_tensor = block_type.__init__, tensor.__init__
    stock_unwrap = tl.core._unwrap_if_constexpr
    plain = (int, float, bool, tensor, dtype, block_type, tl.pointer_type)
    blocks: dict[tuple, dict] = {}
    tensors: dict[str, dict] = {}

    def init_block(self, element_ty, shape):
        sizes = tuple([n.value if n.__class__ is constexpr else n for n in shape])
        known = blocks.get((element_ty.name, sizes))
        if known is None:
            stock_block(self, element_ty, shape)
            known = {name: value for name, value in vars(self).items() if name != "element_ty"}
            blocks[element_ty.name, sizes] = known
        else:
            self.__dict__.update(known)
            self.element_ty = element_ty

    def init_tensor(self, handle, type):
        known = tensors.get(type.name)
        if known is None:
            stock_tensor(self, handle, type)
            own = ("handle", "type", "dtype")
            tensors[type.name] = {n: value for n, value in vars(self).items() if n not in own}
        else:
            self.__dict__.update(known)
            self.handle, self.type, self.dtype = handle, type, type.scalar

    def equals(self, other):
        if other.__class__ is constexpr:
            other = other.value
        return isinstance(other, dtype) and self.name == other.name

    def unwrap_if_constexpr(value):
        kind = value.__class__
        if kind is constexpr:
            return value.value
        return value if kind in plain else stock_unwrap(value)

    return [
        (block_type, "__init__", init_block),
        (tensor, "__init__", init_tensor),
        (dtype, "__eq__", equals),
        (tl.core, "_unwrap_if_constexpr", unwrap_if_constexpr),
    ]


def _operations_that_remember() -> list[tuple[Any, str, Callable]]:
    """(owner, name, function): operands of one type pass at once, promotion is looked up."""
    dtype, block_type, tensor = tl.dtype, tl.block_type, tl.tensor
    stock_operands = TritonSemantic.binary_op_type_checking_impl
    stock_broadcast = TritonSemantic.broadcast_impl_value
    stock_promote = TritonSemantic.computation_type_impl
    stock_scalar = TritonSemantic.scalar_constant
    promotions: dict[tuple, Any] = {}
    integers: dict[tuple, Any] = {}

    def operands(self, left, right, left_ptr=False, right_ptr=False, check=True, division=False):
        alike = left.__class__ is right.__class__ is tensor and left.type.name == right.type.name
        if alike and not division and left.dtype.__class__ is dtype:  # a pointer has another class
            return left, right
        return stock_operands(self, left, right, left_ptr, right_ptr, check, division)

    def broadcast(self, left, right):
        a, b = left.type, right.type
        if a.__class__ is b.__class__ is block_type and a.shape.values == b.shape.values:
            return left, right
        return stock_broadcast(self, left, right)

    def promote(self, *types_and_flags):
        a, a_is_scalar, b, *rest = types_and_flags
        key = (a.name, a_is_scalar, b.name, *rest)
        if key not in promotions:
            promotions[key] = stock_promote(self, *types_and_flags)
        return promotions[key]

    def scalar_constant(self, value, dtype):
        if value.__class__ is not int:  # each NaN would be a key of its own
            return stock_scalar(self, value, dtype)
        key = (value, getattr(dtype, "name", None))
        if key not in integers:
            integers[key] = stock_scalar(self, value, dtype)
        return integers[key]

    return [
        (TritonSemantic, "binary_op_type_checking_impl", operands),
        (TritonSemantic, "broadcast_impl_value", broadcast),
        (TritonSemantic, "computation_type_impl", promote),
        (TritonSemantic, "scalar_constant", scalar_constant),
    ]
