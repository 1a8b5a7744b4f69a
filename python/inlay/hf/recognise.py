"""Finds out by experiment which op a norm module computes.

Class names say little (``LlamaRMSNorm`` and ``GptOssRMSNorm`` round differently), so a module that has a norm's
structure is run: its class's own ``forward``, on a stand-in with random weights, on the CPU, in every dtype. Each
result is compared with :mod:`inlay.reference` in every setting. The settings that agree are the ones the module is
patched with; in dtypes where none agrees it keeps its own code. The real weights are never read: they may be on meta.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from inlay import reference
from inlay.hf.stand_in import uninitialised

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HALF = (torch.bfloat16, torch.float16)
_MAX_WIDTH = 65536


@dataclass(frozen=True)
class Setting:
    """One way to compute a norm: the op's name, its options, and whether x is cast to float32 first."""

    op: str
    options: dict[str, Any] = field(default_factory=dict)
    widen: bool = False


@dataclass(frozen=True, eq=False)
class NormSpec:
    """What the norm modules of one class and width compute.

    Attributes:
        op: "rms_norm", "gated_rms_norm" or "layer_norm".
        settings: by (dtype of x, dtype of weight and bias or None, whether a gate is given).
        arguments: names of ``forward``'s arguments: x and, for some, the gate.
        eps: name of the attribute that holds it.
        width: of the rows; None if the module takes any.
        autocast_neutral: no autocast policy changes what the module computes.
        keeps_order: the result has x's memory order (True) or is contiguous (False).
    """

    cls: type[nn.Module]
    op: str
    settings: dict[tuple[torch.dtype, torch.dtype | None, bool], Setting]
    arguments: tuple[str, ...]
    eps: str
    width: int | None
    has_weight: bool
    has_bias: bool
    autocast_neutral: bool
    keeps_order: bool

    def __deepcopy__(self, memo: dict) -> NormSpec:
        return self


_UNGATED = [
    *(
        Setting("rms_norm", {"weight_offset": offset, "rounding": rounding}, widen)
        for widen, offset, rounding in product((False, True), (0.0, 1.0), ("once", "stepwise"))
    ),
    Setting("layer_norm"),
    Setting("layer_norm", widen=True),
]
_GATED = [
    Setting(
        "gated_rms_norm",
        {"weight_offset": offset, "rounding": rounding, "activation": activation, "norm_before_gate": norm_first},
    )
    for norm_first, activation, rounding, offset in product(
        (True, False), ("silu", "sigmoid"), ("stepwise", "once"), (0.0, 1.0)
    )
]

_known: dict[tuple, NormSpec | str] = {}


def recognise(module: nn.Module) -> NormSpec | str | None:
    """The module's spec; or why it has none although it looks like a norm; or None if it does not look like one."""
    eps_names = [name for name in vars(module) if "eps" in name.lower() and not name.startswith("_")]
    looks_like_norm = eps_names or "norm" in type(module).__name__.lower()
    if not looks_like_norm or any(True for _ in module.children()):
        return None
    reason = _structural_reason(module, eps_names)
    if reason is not None:
        return reason
    key = _key(module)
    try:
        spec = _known.get(key)
    except TypeError:  # an attribute that cannot be hashed: nothing to remember it by
        return _Probe(module).spec(eps_names)
    if spec is None:
        spec = _known[key] = _Probe(module).spec(eps_names)
    return spec


def _structural_reason(module: nn.Module, eps_names: list[str]) -> str | None:
    if not eps_names:
        return "it has no eps"
    if any(buffer is not None for buffer in module._buffers.values()):
        return "it has buffers"
    vectors = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    if not vectors.keys() <= {"weight", "bias"} or list(vectors) == ["bias"]:
        return f"its parameters are not a weight and an optional bias but {', '.join(vectors)}"
    dims = max([len(getattr(module, "normalized_shape", [1])), *(vector.dim() for vector in vectors.values())])
    if dims > 1:
        return f"its weight has {dims} dimensions; only norms over the last dimension are supported"
    if any(vector.shape[0] > _MAX_WIDTH for vector in vectors.values()):
        return f"it is wider than {_MAX_WIDTH}"
    for name, vector in vectors.items():
        if not vector.is_floating_point():
            return f"its {name} is {vector.dtype}"
    return None


def _key(module: nn.Module) -> tuple:
    """Everything that may change what ``forward`` computes, except for the vectors' values."""
    own = sorted((name, value) for name, value in vars(module).items() if not name.startswith("_"))
    attributes = tuple(item for item in own if item[0] not in ("training", "forward"))
    shapes = tuple((name, p if p is None else p.shape) for name, p in module._parameters.items())
    return type(module), type(module).forward, attributes, shapes


class _Probe:
    """Runs a stand-in for a module, which shares its plain attributes but none of its tensors, hooks or patches."""

    def __init__(self, module: nn.Module):
        self.cls = type(module)
        self.twin = uninitialised(self.cls)
        vars(self.twin).update({name: value for name, value in vars(module).items() if name != "forward"})
        vectors = {name: p for name, p in module._parameters.items() if p is not None}
        normalized_shape = getattr(module, "normalized_shape", None)
        self.has_weight, self.has_bias = "weight" in vectors, "bias" in vectors
        self.width: int | None = normalized_shape[0] if normalized_shape else None
        if self.has_weight:
            self.width = vectors["weight"].shape[0]
        width = self.width or 64

        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

        # Rows of very different size, so that eps (and a wrong one) shows; enough values to tell roundings apart.
        rows = 8 * max(1, 128 // width)
        sizes = torch.logspace(-6, 1, 8, dtype=torch.float64, device="cpu").repeat(rows // 8)
        self.x = random(2, rows, width) * sizes[:, None]
        self.gate = random(2, rows, width)
        self.vectors = {name: random(width) for name in vectors}

    def spec(self, eps_names: list[str]) -> NormSpec | str:
        arguments = _positional_arguments(self.cls)
        if len(arguments) not in (1, 2):
            return f"its forward takes {len(arguments)} arguments"
        with torch.no_grad(), torch.autocast("cpu", enabled=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about mixed dtypes and odd shapes, which are the point here
            for eps in eps_names:
                settings = self._settings(getattr(self.twin, eps), len(arguments))
                if settings:
                    break
            else:
                return "it computes something else than Inlay's norms"
            gated = any(gate for *_, gate in settings)
            if not self._depends_on_rows_only(gated):
                return "its result depends on more than each row"
            keeps_order = self._keeps_order(gated)
            if keeps_order is None:
                return "its result has an unexpected memory order"
            op = "gated_rms_norm" if gated else next(iter(settings.values())).op
            neutral = self._autocast_neutral(gated)
        return NormSpec(
            self.cls, op, settings, arguments, eps, self.width, self.has_weight, self.has_bias, neutral, keeps_order
        )

    def _settings(self, eps: Any, n_arguments: int) -> dict[tuple[torch.dtype, torch.dtype | None, bool], Setting]:
        settings: dict[tuple[torch.dtype, torch.dtype | None, bool], Setting] = {}
        if eps is not None and not isinstance(eps, (int, float)):
            return settings
        for x_dtype, gated in product(_DTYPES, (False, True)[:n_arguments]):
            for weight_dtype in _DTYPES if self.has_weight else (None,):
                if weight_dtype is not None and (weight_dtype == torch.float64) != (x_dtype == torch.float64):
                    continue  # the ops do not mix float64
                actual = self._run(self.x.to(x_dtype), weight_dtype, self.gate.to(x_dtype) if gated else None)
                if not isinstance(actual, Tensor):
                    continue
                for setting in _GATED if gated else _UNGATED:
                    if _agree(actual, self._expected(setting, x_dtype, weight_dtype, eps)):
                        settings[x_dtype, weight_dtype, gated] = setting
                        break
        return settings

    def _run(self, x: Tensor, weight_dtype: torch.dtype | None, gate: Tensor | None = None) -> Any:
        """What the class's own forward returns, or the exception it raises."""
        vectors = {name: nn.Parameter(vector.to(weight_dtype)) for name, vector in self.vectors.items()}
        vars(self.twin)["_parameters"] = {**dict.fromkeys(self.twin._parameters), **vectors}
        try:
            return self.cls.forward(self.twin, *((x,) if gate is None else (x, gate)))
        except Exception as error:  # whatever an unknown class raises, it is not a norm we know
            return error

    def _expected(self, setting: Setting, x_dtype: torch.dtype, weight_dtype: torch.dtype | None, eps: Any) -> Tensor:
        x = self.x.to(x_dtype)
        if setting.widen and x_dtype in _HALF:
            x = x.float()
        gate = (self.gate.to(x_dtype),) if setting.op == "gated_rms_norm" else ()
        vectors = {name: vector.to(weight_dtype) for name, vector in self.vectors.items()}
        return getattr(reference, setting.op)(x, *gate, **vectors, eps=eps, **setting.options)

    def _float32(self, gated: bool, reshape: Any) -> Any:
        x, gate = reshape(self.x.float()), reshape(self.gate.float())
        return self._run(x, torch.float32, gate if gated else None)

    def _depends_on_rows_only(self, gated: bool) -> bool:
        """Not on the number of leading dimensions, nor on training mode."""
        plain = self._float32(gated, lambda t: t)
        for training, shape in product((True, False), ((-1, self.x.shape[-1]), (1, *self.x.shape))):
            vars(self.twin)["training"] = training
            other = self._float32(gated, lambda t, shape=shape: t.reshape(shape))
            if not isinstance(other, Tensor) or not torch.equal(other.reshape_as(plain), plain):
                return False
        return True

    def _keeps_order(self, gated: bool) -> bool | None:
        permuted = self.x.float().transpose(0, 1).contiguous().transpose(0, 1)
        result = self._float32(gated, lambda t: t.float().transpose(0, 1).contiguous().transpose(0, 1))
        if result.stride() == permuted.stride():
            return True
        return False if result.is_contiguous() else None

    def _autocast_neutral(self, gated: bool) -> bool:
        """Whether 16-bit tensors only meet functions that autocast leaves alone on every device."""
        x, gate = self.x.bfloat16(), self.gate.bfloat16() if gated else None
        with _HalfPrecisionCalls() as calls:
            self._run(x, torch.bfloat16, gate)
        return calls.names <= _LEFT_ALONE_BY_AUTOCAST


_LEFT_ALONE_BY_AUTOCAST = {
    *("__get__", "to", "float", "type", "type_as"),
    *("mul", "__mul__", "__rmul__", "add", "__add__", "__radd__"),
}


class _HalfPrecisionCalls(TorchFunctionMode):
    """Records the names of the torch functions that are given 16-bit tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(value, Tensor) and value.dtype in _HALF for value in (*args, *(kwargs or {}).values())):
            self.names.add(function.__name__)
        return function(*args, **(kwargs or {}))


def _positional_arguments(cls: type[nn.Module]) -> tuple[str, ...]:
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)


def _agree(actual: Tensor, expected: Tensor) -> bool:
    """Equal but for the order of summation: 16-bit results may differ by a unit in the last place, and rarely do."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    if actual.dtype in _HALF:
        if (actual == expected).double().mean() < 0.99:
            return False
        tolerance = 2 * torch.finfo(actual.dtype).eps * expected.double().abs() + torch.finfo(actual.dtype).tiny
    else:
        tolerance = 16 * torch.finfo(actual.dtype).eps * expected.double().abs().amax(-1, keepdim=True)
    return bool(((actual.double() - expected.double()).abs() <= tolerance).all())
