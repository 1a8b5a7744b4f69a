"""The forward that routers are patched with: the module's own projection, then :func:`inlay.moe_router`.

A router is a module with a weight [E, H] that gives logits, weights and indices. Which of the op's settings it computes
is found out by experiment: a stand-in with the module's attributes, but a small random weight, runs its class's own
``forward`` on the CPU in every dtype. The real weights are never read. What is returned first are the logits as the
class returns them, so that transformers' recorder (``output_router_logits``) and losses see what they saw.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay import reference
from inlay.hf.binding import Plan, binding_of
from inlay.hf.norms import device_reason, is_plain, transform_reason
from inlay.hf.stand_in import uninitialised
from inlay.ops import _checks as checks
from inlay.ops._moe_checks import MAX_ROUTED_EXPERTS, MAX_SLOTS
from inlay.ops.moe import moe_router

OPS = ("moe_router",)

_BIAS, _CORRECTION = "bias", "e_score_correction_bias"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HIDDEN = 16  # of a stand-in


@dataclass(frozen=True)
class Setting:
    """How a router computes in one dtype.

    Attributes:
        scoring, renormalize, softmax_after_topk: as of :func:`inlay.moe_router`.
        grouped: whether only experts of some groups are chosen.
        scaled: whether weights are multiplied by the module's ``routed_scaling_factor``.
        wide_logits: the projection is in float32.
        wide_weights: weights are float32; else they have the logits' dtype.
    """

    scoring: str
    renormalize: bool
    softmax_after_topk: bool
    grouped: bool
    scaled: bool
    wide_logits: bool
    wide_weights: bool


@dataclass(frozen=True, eq=False)
class RouterSpec:
    """What routers of one class compute, by the dtype of tokens and weight alike."""

    settings: dict[torch.dtype, Setting]

    def __deepcopy__(self, memo: dict) -> RouterSpec:
        return self


_known: dict[tuple, RouterSpec | str] = {}


def plan(module: nn.Module) -> Plan | str | None:
    """A plan for a router; why not, for a module that looks like one; None for any other."""
    if not type(module).__name__.lower().endswith("router") or not _looks_like_router(module):
        return None
    key = _key(module)
    try:
        spec = _known.get(key)
    except TypeError:  # an attribute that cannot be hashed: nothing to remember it by
        spec, key = None, ()
    if spec is None:
        spec = _by_experiment(module)
        if key:
            _known[key] = spec
    return Plan("moe_router", forward, spec) if isinstance(spec, RouterSpec) else spec


def _looks_like_router(module: Any) -> bool:
    weight = module._parameters.get("weight")
    top_k = getattr(module, "top_k", None)
    if not isinstance(top_k, int) or weight is None or weight.dim() != 2 or any(True for _ in module.children()):
        return False
    if module._parameters.keys() - {"weight", _BIAS} or module._buffers.keys() - {_CORRECTION}:
        return False
    return 1 <= weight.shape[0] <= MAX_ROUTED_EXPERTS and 1 <= top_k <= min(MAX_SLOTS, weight.shape[0])


def _key(module: Any) -> tuple:
    """Everything that may change what ``forward`` computes, except for the hidden size and weights."""
    own = sorted((name, value) for name, value in vars(module).items() if not name.startswith("_"))
    attributes = tuple(item for item in own if item[0] not in ("training", "forward", "hidden_dim", "config"))
    names = tuple(name for name in (_BIAS, _CORRECTION) if getattr(module, name, None) is not None)
    return type(module), type(module).forward, module.weight.shape[0], attributes, names


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    binding = binding_of(self)
    if binding is None:
        return type(self).forward(self, *args, **kwargs)
    x = args[0] if len(args) == 1 and not kwargs else kwargs.get("hidden_states") if len(kwargs) == 1 else None
    reason = _reason(self, binding.plan.spec, x) if isinstance(x, Tensor) else "called with other arguments than tokens"
    if reason is not None:
        binding.count_fallback(reason)
        return type(self).forward(self, *args, **kwargs)
    assert isinstance(x, Tensor)
    binding.count_call(x.device)
    return _run(self, binding.plan.spec.settings[x.dtype], x, moe_router)


def _run(router: Any, setting: Setting, x: Tensor, op: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = x.reshape(-1, x.shape[-1])
    weight, bias = router.weight, getattr(router, _BIAS, None)
    if setting.wide_logits:
        x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
    logits = F.linear(x, weight, bias)
    correction = getattr(router, _CORRECTION, None)
    weights, indices = op(
        logits, router.top_k, scoring=setting.scoring, renormalize=setting.renormalize,
        bias=None if correction is None else correction.float(),
        groups=(router.num_group, router.topk_group) if setting.grouped else None,
        scaling=float(router.routed_scaling_factor) if setting.scaled else 1.0,
        softmax_after_topk=setting.softmax_after_topk,
        weights_dtype=torch.float32 if setting.wide_weights else logits.dtype,
    )  # fmt: skip
    return logits, weights, indices


def _reason(router: Any, spec: RouterSpec, x: Tensor) -> str | None:
    """Why the module's own code has to compute this call, or None."""
    for name in ("weight", _BIAS, _CORRECTION):
        tensor = getattr(router, name, None)
        if tensor is None:
            continue
        if not (is_plain(tensor) or torch.compiler.is_compiling()):
            return f"its {name} is a {type(tensor).__name__}"
        if tensor.device != x.device:
            return f"its {name} is on {tensor.device.type}, x on {x.device.type}"
    if not (is_plain(x) or torch.compiler.is_compiling()):
        return f"x is a {type(x).__name__}"
    if x.dim() == 0 or x.shape[-1] != router.weight.shape[1]:
        return "x is not as wide as its weight"
    if x.dtype not in spec.settings or router.weight.dtype != x.dtype:
        return f"no op computes as it does for {checks.names((x.dtype,))} and a {router.weight.dtype} weight"
    bias = getattr(router, _BIAS, None)
    if bias is not None and bias.dtype != x.dtype:
        return "weight and bias differ in dtype"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast changes what it computes"
    return device_reason(x) or transform_reason()


def _by_experiment(module: Any) -> RouterSpec | str:
    cls = type(module)
    if len(inspect.signature(cls.forward).parameters) != 2:
        return "its forward takes other arguments than tokens"
    settings = {}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for dtype in _DTYPES:
            twin, x = _twin(module, dtype)
            try:
                expected = cls.forward(twin, x)
            except Exception as error:  # whatever an unknown class raises, it is not a router we know
                return f"its forward could not be tried out: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if not (isinstance(expected, tuple) and len(expected) == 3):
                return "it does not return logits, weights and indices"
            for setting in _candidates(twin):
                try:
                    actual = _run(twin, setting, x, reference.moe_router)
                except Exception:  # a setting that does not go with the module's numbers
                    continue
                if _agree(actual, expected):
                    settings[dtype] = setting
                    break
    return RouterSpec(settings) if settings else "it computes something else than Inlay's router"


def _twin(module: Any, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """A stand-in, and tokens for it whose logits are of size 1 and far from equal."""
    cls: Any = type(module)
    twin = uninitialised(cls)
    vars(twin).update({name: value for name, value in vars(module).items() if name != "forward"})
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    experts = module.weight.shape[0]
    parameters = {"weight": nn.Parameter((random(experts, _HIDDEN) * _HIDDEN**-0.5).to(dtype))}
    if module._parameters.get(_BIAS) is not None:
        parameters[_BIAS] = nn.Parameter(random(experts).to(dtype))
    buffers = {_CORRECTION: 0.1 * random(experts)} if getattr(module, _CORRECTION, None) is not None else {}
    vars(twin).update({"_parameters": parameters, "_buffers": buffers, "_modules": {}})
    if hasattr(module, "hidden_dim"):
        twin.hidden_dim = _HIDDEN
    return twin, 2 * random(64, _HIDDEN).to(dtype)


def _candidates(twin: Any) -> Iterator[Setting]:
    scaled = (False, True) if hasattr(twin, "routed_scaling_factor") else (False,)
    grouped = (False, True) if hasattr(twin, "num_group") and hasattr(twin, "topk_group") else (False,)
    scorings = (("softmax", False), ("softmax", True), ("sigmoid", False))
    for (scoring, chosen), renormalize, group, scale, logits, weights in product(
        scorings, (False, True), grouped, scaled, (False, True), (False, True)
    ):
        if not (chosen and renormalize):
            yield Setting(scoring, renormalize, chosen, group, scale, logits, weights)


def _agree(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """The same logits, and for nearly all tokens the same experts with the same weights, in any order.

    In 16 bits logits may be equal, of which either may be chosen.
    """
    for one, other in zip(actual, expected, strict=True):
        if not isinstance(other, Tensor) or one.dtype != other.dtype or one.shape != other.shape:
            return False
    if not torch.equal(actual[0], expected[0]):
        return False
    order, other_order = actual[2].argsort(-1), expected[2].argsort(-1)
    same = (actual[2].gather(1, order) == expected[2].gather(1, other_order)).all(-1)
    if same.double().mean() < 0.8:
        return False
    weights, other_weights = (
        actual[1].gather(1, order)[same].double(),
        expected[1].gather(1, other_order)[same].double(),
    )
    eps = torch.finfo(actual[1].dtype).eps
    return bool(((weights - other_weights).abs() <= 2 * eps * other_weights.abs() + 1e-30).all())
