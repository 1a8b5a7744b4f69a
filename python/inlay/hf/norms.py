"""The forward that norm modules are patched with: one for all, driven by what ``recognise`` found out."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from inlay import _load
from inlay.hf.binding import Plan, binding_of
from inlay.hf.recognise import NormSpec, Setting, recognise
from inlay.ops import norm as ops

OPS = ("rms_norm", "gated_rms_norm", "layer_norm")

_CUDA_LIBRARY = _load.cuda_library()  # looked up here: torch.compile cannot trace into it
_PLAIN = frozenset({Tensor, nn.Parameter})
_FUNCTIONS = {op: getattr(ops, op) for op in OPS}


def plan(module: nn.Module) -> Plan | str | None:
    """A plan for a norm over the last dimension; why not, for a module that looks like one; None for any other."""
    spec = recognise(module)
    return Plan(spec.op, forward, spec) if isinstance(spec, NormSpec) else spec


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    binding = binding_of(self)
    if binding is None:
        return type(self).forward(self, *args, **kwargs)
    spec: NormSpec = binding.plan.spec
    inputs = _positional(spec, args, kwargs) if kwargs else args
    if 1 <= len(inputs) <= len(spec.arguments):
        y = _fused(self, spec, *inputs)
    else:
        y = f"called with other arguments than {', '.join(spec.arguments)}"
    if isinstance(y, str):
        binding.count_fallback(y)
        return type(self).forward(self, *args, **kwargs)
    binding.count_call(y.device)
    return y


def vectors(module: nn.Module, spec: NormSpec) -> tuple[Tensor | None, Tensor | None]:
    """The module's weight and bias as they are now: parameters, or what stands in for them (FSDP, parametrisations)."""
    weight = _vector(module, "weight") if spec.has_weight else None
    return weight, _vector(module, "bias") if spec.has_bias else None


def _vector(module: nn.Module, name: str) -> Any:
    parameter = module._parameters.get(name)  # getattr gets there too, in eight times the time
    return getattr(module, name) if parameter is None else parameter


def setting_for(
    spec: NormSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None = None
) -> Setting | str:
    """How to compute this call, or why the module's own code has to."""
    if not is_plain(x):
        return f"x is a {type(x).__name__}"
    for tensor in (weight, bias, gate):
        if tensor is None:
            continue
        if not is_plain(tensor):
            return f"a weight, bias or gate is a {type(tensor).__name__}"
        if tensor.device != x.device:
            return f"a weight, bias or gate is on {tensor.device.type}, x on {x.device.type}"
    if gate is not None and (gate.dtype != x.dtype or gate.shape != x.shape):
        return "gate and x differ in shape or dtype"
    if bias is not None and (weight is None or bias.dtype != weight.dtype):
        return "weight and bias differ in dtype"
    if x.dim() == 0 or (spec.width is not None and x.shape[-1] != spec.width):
        return f"x is not {spec.width} wide"
    setting = spec.settings.get((x.dtype, None if weight is None else weight.dtype, gate is not None))
    if setting is None:
        dtypes = _name(x) if weight is None else f"{_name(x)} with a {_name(weight)} weight"
        return f"no op rounds as it does for {dtypes}"
    return device_reason(x) or context_reason(spec, x) or setting


def _positional(spec: NormSpec, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """All arguments in order; none if one of them is neither x nor the gate."""
    named = [kwargs[name] for name in spec.arguments[len(args) :] if name in kwargs]
    return (*args, *named) if len(named) == len(kwargs) else ()


def _fused(module: nn.Module, spec: NormSpec, x: Tensor, gate: Tensor | None = None) -> Tensor | str:
    """The module's result, or why its own code has to compute it."""
    weight, bias = vectors(module, spec)
    setting = setting_for(spec, x, weight, bias, gate)
    if isinstance(setting, str):
        return setting
    order = None
    if not x.is_contiguous():
        order = _memory_order(x)
        if order is None and spec.keeps_order:
            return "x is strided in its last dimension"
        if order is None:
            x = x.contiguous()  # as its own code does
        elif not spec.keeps_order or order == sorted(order):
            order = None
        else:
            x, gate = x.permute(order), gate if gate is None else gate.permute(order)
    if gate is not None and gate.stride(-1) != 1:
        gate = gate.contiguous()
    if setting.widen:
        x = x.float()
    eps = getattr(module, spec.eps)
    if gate is None:
        y = _FUNCTIONS[setting.op](x, weight, bias, eps=eps, **setting.options)
    else:
        y = _FUNCTIONS[setting.op](x, gate, weight, bias, eps=eps, **setting.options)
    return y if order is None else y.permute([order.index(dim) for dim in range(y.dim())])


def is_plain(tensor: Any) -> bool:
    """Whether it is a tensor or a parameter, and not one of a subclass: DTensor, a quantised or a fake tensor."""
    return type(tensor) in _PLAIN


def device_reason(x: Tensor) -> str | None:
    """Why there is no native kernel for a tensor like x."""
    if x.is_cpu:
        return None
    if not x.is_cuda:
        return f"no kernels for device {x.device.type}"
    if not _CUDA_LIBRARY.loaded:
        return f"no CUDA kernels: {_CUDA_LIBRARY.reason}"
    return "no CUDA kernels for float64" if x.dtype == torch.float64 else None


def call_reason(module: nn.Module, spec: NormSpec) -> str | None:
    """Why the norm has to be called as a module for all that belongs to it to run; None: another op may compute it."""
    if type(module) is not spec.cls:
        return f"it is a {type(module).__name__} now"
    # What torch.compile of torch 2.11 understands: neither getattr(method, "__func__", None) nor a function in a tuple.
    own = module.forward
    function = own.__func__ if isinstance(own, MethodType) else None
    if function is not forward and function is not spec.cls.forward:
        return "its forward is wrapped"
    return "it has hooks" if _has_hooks(module) else None


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def context_reason(spec: NormSpec, x: Tensor) -> str | None:
    """Why the surroundings of this call forbid a fused op."""
    if not spec.autocast_neutral and x.dtype != torch.float32 and torch.is_autocast_enabled(x.device.type):
        return "autocast changes what it computes"
    return transform_reason()


def transform_reason() -> str | None:
    """Why no custom op can take part in what surrounds this call."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a torch.func transform"
    if torch.autograd.forward_ad._current_level >= 0:
        return "inside forward-mode differentiation"
    if torch._C._len_torch_function_stack() and not all(
        isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack()
    ):
        return "a torch function mode is active"
    return None


def _memory_order(x: Tensor) -> list[int] | None:
    """The dimensions from the slowest to the fastest in memory, or None if the last one is not dense."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    return [*sorted(range(x.dim() - 1), key=x.stride, reverse=True), x.dim() - 1]


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
