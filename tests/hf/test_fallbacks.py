"""Calls that no op takes: the original runs, its result is returned, and the report says why."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import inlay
from inlay import _load
from tests.hf.compare import assert_same_rounding
from tests.hf.test_recognise import RMS, Gated


class Subclass(torch.Tensor):
    pass


class Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def _fell_back(module: nn.Module, *args: Tensor, **kwargs: Tensor) -> str:
    """Runs a patched copy, compares it with the original, and gives the one reason why it fell back."""
    patched = deepcopy(module)
    inlay.patch(patched)
    with torch.no_grad():
        actual, expected = patched(*args, **kwargs), module(*args, **kwargs)
    assert torch.equal(actual.to("cpu"), expected.to("cpu")) if not actual.is_meta else expected.is_meta
    report = inlay.report(patched)
    assert report.calls == 0
    ((reason, count),) = report.fallbacks.items()
    assert count == 1
    inlay.patch(patched, strict=True)
    with pytest.raises(RuntimeError, match="fell back"):
        patched(*args, **kwargs)
    return reason


def test_tensor_subclass() -> None:
    assert _fell_back(RMS(), torch.randn(3, 40).as_subclass(Subclass)) == "x is a Subclass"


def test_subclass_weight() -> None:
    module = RMS()
    del module.weight
    module.weight = torch.randn(40).as_subclass(Subclass)
    patched = RMS()
    inlay.patch(patched)
    del patched.weight
    patched.weight = module.weight
    x = torch.randn(3, 40)
    assert torch.equal(patched(x), module(x))
    assert inlay.report(patched).fallbacks == {"a weight, bias or gate is a Subclass": 1}


def test_meta_tensors() -> None:
    assert _fell_back(RMS().to("meta"), torch.randn(3, 40, device="meta")) == "no kernels for device meta"


def test_weight_on_another_device() -> None:
    module = nn.RMSNorm(40)
    inlay.patch(module)
    module.to("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        module(torch.randn(3, 40))
    assert inlay.report(module).fallbacks == {"a weight, bias or gate is on meta, x on cpu": 1}


def test_dtypes_the_original_computes_otherwise() -> None:
    assert "no op rounds as it does for float64" in _fell_back(RMS().double(), torch.randn(3, 40).double())


def test_width() -> None:
    class AnyWidth(RMS):
        pass

    module = AnyWidth(1)
    assert _fell_back(module, torch.randn(3, 40)) == "x is not 1 wide"


def test_rows_strided_in_the_last_dimension() -> None:
    x = torch.randn(40, 3).t()
    assert _fell_back(RMS(), x) == "x is strided in its last dimension"


def test_layer_norm_copies_strided_rows_as_torch_does() -> None:
    module = nn.LayerNorm(40)
    x = torch.randn(2, 40, 3).transpose(1, 2)
    expected = module(x)
    inlay.patch(module, strict=True)
    actual = module(x)
    assert_same_rounding(actual, expected, "layer_norm")
    assert actual.stride() == expected.stride()


@pytest.mark.parametrize("module", [RMS(), nn.RMSNorm(40, eps=1e-6), Gated()], ids=lambda m: type(m).__name__)
def test_results_keep_the_original_memory_order(module: nn.Module) -> None:
    module = deepcopy(module)
    packed = torch.randn(2, 5, 3, 120)
    views = {
        "heads before positions": packed[..., :40].contiguous().transpose(1, 2),
        "slice": packed[..., 40:80],
        "slice, heads first": packed[..., 40:80].transpose(1, 2),
        "expanded": torch.randn(1, 1, 40).expand(2, 3, 40),
        "one row": torch.randn(1, 40, 1).transpose(1, 2),
    }
    inputs = {name: (x, torch.randn(x.shape)) if isinstance(module, Gated) else (x,) for name, x in views.items()}
    expected = {name: module(*arguments) for name, arguments in inputs.items()}
    inlay.patch(module, strict=True)
    for name, arguments in inputs.items():
        actual = module(*arguments)
        assert_same_rounding(actual, expected[name], name)
        if name != "one row":  # the stride of a dimension of one element means nothing
            assert actual.stride() == expected[name].stride(), name


def test_gate_of_another_dtype() -> None:
    reason = _fell_back(Gated(), torch.randn(3, 40), torch.randn(3, 40, dtype=torch.bfloat16))
    assert reason == "gate and x differ in shape or dtype"


def test_arguments_by_name() -> None:
    module = Gated()
    x, gate = torch.randn(3, 40), torch.randn(3, 40)
    expected = module(x, gate)
    inlay.patch(module, strict=True)
    assert_same_rounding(module(x, gate=gate), expected, "gate by name")
    assert_same_rounding(module(gate=gate, hidden_states=x), expected, "both by name")


def test_wrong_arguments_raise_as_the_original_does() -> None:
    module = RMS()
    inlay.patch(module)
    with pytest.raises(TypeError):
        module()
    with pytest.raises(TypeError):
        module(torch.randn(3, 40), residual=torch.randn(3, 40))


def test_function_modes() -> None:
    with Mode():
        assert _fell_back(RMS(), torch.randn(3, 40)) == "a torch function mode is active"
    module = RMS()
    inlay.patch(module, strict=True)
    with torch.device("cpu"):  # torch.set_default_device is such a mode too, and changes nothing
        module(torch.randn(3, 40))


def test_function_transforms() -> None:
    module = RMS()
    x = torch.randn(4, 3, 40)
    expected = torch.vmap(module)(x)
    inlay.patch(module)
    assert_same_rounding(torch.vmap(module)(x), expected, "vmap")
    _, tangent = torch.func.jvp(module, (x,), (torch.ones_like(x),))
    assert tangent.isfinite().all()
    assert set(inlay.report(module).fallbacks) == {"inside a torch.func transform"}


def test_forward_mode_differentiation() -> None:
    from torch.autograd import forward_ad

    module = RMS()
    inlay.patch(module)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.randn(3, 40), torch.randn(3, 40))
        assert forward_ad.unpack_dual(module(dual)).tangent is not None
    assert set(inlay.report(module).fallbacks) == {"inside forward-mode differentiation"}


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("module", [nn.LayerNorm(40), nn.RMSNorm(40, eps=1e-6), RMS()], ids=lambda m: type(m).__name__)
def test_autocast_gives_the_original_result(module: nn.Module, x_dtype: torch.dtype, device: str) -> None:
    module = deepcopy(module).to(device)
    x = torch.randn(3, 40, device=device, dtype=x_dtype)
    with torch.autocast(device, torch.bfloat16):
        expected = module(x)
        inlay.patch(module)
        assert_same_rounding(module(x), expected, "autocast")
    left_alone = x_dtype == torch.bfloat16 and not isinstance(module, RMS)
    assert set(inlay.report(module).fallbacks) == ({"autocast changes what it computes"} if left_alone else set())


def test_no_cuda_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from inlay.hf import norms

    missing = _load.Library("libinlay_cuda.so", False, "not built")
    monkeypatch.setattr(norms, "_CUDA_LIBRARY", missing)

    class OnCuda:
        is_cpu, is_cuda = False, True

    assert norms.device_reason(OnCuda()) == "no CUDA kernels: not built"


def test_a_module_with_a_foreign_forward_is_left_alone() -> None:
    module = RMS()
    module.forward = lambda x: x
    report = inlay.patch(module)
    assert not report.patched
    assert report.unpatched[0].reason.startswith("its forward was replaced by tests.hf.test_fallbacks")
    x = torch.randn(3, 40)
    assert module(x) is x


def test_eps_is_read_at_every_call() -> None:
    module = RMS()
    inlay.patch(module, strict=True)
    x = torch.randn(3, 40)
    module.epsilon = 10.0
    actual = module(x)
    inlay.unpatch(module)
    assert_same_rounding(actual, module(x), "eps")


def test_reparametrised_weight_is_used() -> None:
    module = RMS()
    inlay.patch(module, strict=True)
    x = torch.randn(3, 40)
    swapped = {"weight": torch.randn(40)}
    actual = torch.func.functional_call(module, swapped, (x,))
    inlay.unpatch(module)
    assert_same_rounding(actual, torch.func.functional_call(module, swapped, (x,)), "functional_call")
