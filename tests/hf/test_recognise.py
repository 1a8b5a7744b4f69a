"""Which modules are taken for norms, and for which."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.hf.recognise import NormSpec, recognise
from tests.hf.compare import assert_same_rounding

HALF = (torch.bfloat16, torch.bfloat16, False)


class RMS(nn.Module):
    """Every rounding and placement of eps a norm may have, by attributes."""

    def __init__(self, width: int = 40, offset: float = 0.0, rounding: str = "once", eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.offset, self.rounding, self.epsilon = offset, rounding, eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        if self.rounding == "once":
            return (wide * (self.weight.float() + self.offset)).to(x.dtype)
        return (self.weight + self.offset) * wide.to(x.dtype)


class Gated(nn.Module):
    def __init__(self, activation: str = "silu", norm_first: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40))
        self.eps = 1e-6
        self.activation, self.norm_first = activation, norm_first

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        wide = hidden_states.float()
        factor = 1.0 if gate is None else getattr(torch, self.activation, F.silu)(gate.float())
        if not self.norm_first:
            wide = wide * factor
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        wide = self.weight * wide.to(hidden_states.dtype)
        return (wide * factor).to(hidden_states.dtype) if self.norm_first else wide


class EpsOutside(RMS):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight / (x.square().mean(-1, keepdim=True).sqrt() + self.epsilon)


class SumOfSquares(RMS):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1, eps=self.epsilon) * self.weight


class OnePercentOff(RMS):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.01


class Clamped(RMS):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-2, 2)


class FirstDimension(RMS):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, -1)).transpose(0, -1)


class HasBuffer(RMS):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))


class NeedsScale(RMS):
    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x) * scale + shift


class OnlyWhenTraining(RMS):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.training else 1)


class Raises(RMS):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError


class NormWithoutEps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm()


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("rounding", ["once", "stepwise"])
@pytest.mark.parametrize("width", [1, 7, 40, 1024])
def test_finds_the_rounding_and_the_offset(offset: float, rounding: str, width: int) -> None:
    if offset and rounding == "stepwise":
        pytest.skip("rounds weight + offset, which no op does")
    spec = recognise(RMS(width, offset, rounding))
    assert isinstance(spec, NormSpec)
    assert spec.op == "rms_norm"
    assert (spec.eps, spec.width) == ("epsilon", width)
    if width > 1:  # rows of one value are 1 or -1, which every rounding keeps
        assert spec.settings[HALF].options == {"weight_offset": offset, "rounding": rounding}


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_finds_the_gate(activation: str, norm_first: bool) -> None:
    spec = recognise(Gated(activation, norm_first))
    assert isinstance(spec, NormSpec)
    assert spec.op == "gated_rms_norm"
    options = spec.settings[torch.bfloat16, torch.bfloat16, True].options
    assert (options["activation"], options["norm_before_gate"]) == (activation, norm_first)
    assert spec.settings[HALF].op == "rms_norm"


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (EpsOutside(), "something else"),
        (SumOfSquares(), "something else"),
        (OnePercentOff(), "something else"),
        (Clamped(), "something else"),
        (FirstDimension(), "something else"),
        (Raises(), "something else"),
        (nn.GroupNorm(4, 40), "something else"),
        (nn.InstanceNorm1d(40), "more than each row"),
        (OnlyWhenTraining().eval(), "more than each row"),
        (HasBuffer(), "buffers"),
        (nn.BatchNorm1d(40), "buffers"),
        (nn.LayerNorm(100_000, device="meta"), "wider than 65536"),
        (NeedsScale(), "takes 3 arguments"),
        (NormWithoutEps(), "no eps"),
        (nn.LayerNorm((3, 40)), "has 2 dimensions"),
        (nn.RMSNorm((3, 40), elementwise_affine=False), "has 2 dimensions"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_leaves_alone_what_no_op_computes(module: nn.Module, reason: str) -> None:
    found = recognise(module)
    assert isinstance(found, str)
    assert reason in found
    report = inlay.patch(nn.Sequential(module))
    assert [entry.reason for entry in report.unpatched] == [found]
    assert not report.patched


@pytest.mark.parametrize("module", [nn.Linear(4, 4), nn.Identity(), nn.Sequential(nn.LayerNorm(4))])
def test_says_nothing_of_what_is_no_norm(module: nn.Module) -> None:
    assert recognise(module) is None


def test_reads_no_weight() -> None:
    with torch.device("meta"):
        module = RMS()
    assert isinstance(recognise(module), NormSpec)
    with torch.no_grad():
        broken = RMS()
        broken.weight.fill_(float("nan"))
    assert isinstance(recognise(broken), NormSpec)


def test_modules_of_one_class_with_other_attributes_are_told_apart() -> None:
    once, stepwise = recognise(RMS(rounding="once")), recognise(RMS(rounding="stepwise"))
    assert isinstance(once, NormSpec)
    assert isinstance(stepwise, NormSpec)
    assert once.settings[HALF] != stepwise.settings[HALF]
    assert recognise(RMS(rounding="once")) is once


def test_an_unhashable_attribute_is_no_obstacle() -> None:
    module = RMS()
    module.config = {"a": []}
    assert isinstance(recognise(module), NormSpec)


def _torch_norms() -> list[nn.Module]:
    modules = [
        nn.LayerNorm(40),
        nn.LayerNorm(40, bias=False),
        nn.LayerNorm(40, elementwise_affine=False),
        nn.RMSNorm(40),
        nn.RMSNorm(40, eps=1e-6),
        nn.RMSNorm(40, elementwise_affine=False),
    ]
    try:
        from diffusers.models import normalization
    except ImportError:
        return modules
    return [
        *modules,
        normalization.RMSNorm(40, 1e-6),
        normalization.RMSNorm(40, 1e-6, bias=True),
        normalization.RMSNorm(40, 1e-6, elementwise_affine=False),
        normalization.FP32LayerNorm(40),
        normalization.FP32LayerNorm(40, elementwise_affine=False),
        normalization.MochiRMSNorm(40, 1e-6),
    ]


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("module", _torch_norms(), ids=repr)
def test_mixed_dtypes_give_the_original_result(
    module: nn.Module, x_dtype: torch.dtype, weight_dtype: torch.dtype, device: str
) -> None:
    module = deepcopy(module).to(device, weight_dtype)
    with torch.no_grad():
        for vector in module.parameters():
            vector.normal_()
    x = torch.randn(3, 50, 40, device=device).to(x_dtype)
    try:
        expected = module(x)
    except RuntimeError as error:
        pytest.skip(f"the original does not take these dtypes: {error}")
    inlay.patch(module)
    assert_same_rounding(module(x), expected, repr(module))
    if x_dtype == weight_dtype:
        assert not inlay.report(module).fallbacks
