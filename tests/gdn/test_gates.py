"""The gates: are they Hugging Face's, and are their gradients right?"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import inlay
from inlay import reference
from tests.support.compare import assert_matches_eager, assert_same_bits, assert_within_budget
from tests.support.devices import HALVES, each_dtype

NAMES = ("a", "b", "A_log", "dt_bias")
OPTIONS = [{}, {"beta_scale": 2.0}, {"beta_dtype": torch.float32}]
SHAPES = [(2, 5, 16), (70, 3), (200, 33), (4, 1), (64,)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str, vectors: torch.dtype | None = None) -> list[Tensor]:
    heads = shape[-1:]
    a, b = (3 * torch.randn(shape, device=device) for _ in range(2))
    log_decay, dt_bias = torch.rand(heads, device=device).mul(16).add(0.01).log(), torch.rand(heads, device=device)
    return [*(t.to(dtype) for t in (a, b)), *(t.to(vectors or dtype) for t in (log_decay, dt_bias))]


def options_for(options: dict, dtype: torch.dtype) -> dict:
    return {**options, "beta_dtype": torch.float64} if dtype == torch.float64 and "beta_dtype" in options else options


def check(tensors: list[Tensor], options: dict) -> None:
    def run(namespace, given, **changes):
        leaves = [t.detach().requires_grad_() for t in given]
        outputs = namespace.gdn_gates(*leaves, **{**options, **changes})
        return outputs, torch.autograd.grad(
            outputs, leaves, [d.to(o.dtype) for o, d in zip(outputs, douts, strict=True)]
        )

    douts = [torch.randn_like(tensors[0], dtype=torch.float32) for _ in range(2)]
    douts[1] = douts[1].to(options.get("beta_dtype", tensors[1].dtype))
    actual, eager = run(inlay, tensors), run(reference, tensors)
    exact = run(reference, [t.double() for t in tensors], beta_dtype=torch.float64)
    for names, *results in zip((("g", "beta"), NAMES), actual, eager, exact, strict=True):
        for name, *values in zip(names, *results, strict=True):
            assert_within_budget(*values, name, terms=values[2].abs().max().item() if values[2].numel() else 0.0)


@each_dtype()
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, options, device, dtype):
    check(inputs(shape, dtype, device), options_for(options, dtype))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_float32_parameters(options, device):
    check(inputs((3, 40, 16), torch.bfloat16, device, vectors=torch.float32), options)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_is_hugging_faces(dtype, device):
    """As written in Qwen3-Next and Qwen3.5: beta bit for bit, g to float32's rounding."""
    a, b, log_decay, dt_bias = inputs((2, 500, 32), dtype, device)
    g, beta = inlay.gdn_gates(a, b, log_decay, dt_bias)
    assert_matches_eager(beta, b.sigmoid(), "beta")
    expected = -log_decay.float().exp() * F.softplus(a.float() + dt_bias)
    torch.testing.assert_close(g, expected, rtol=1e-6, atol=0)


def test_extreme_values(device):
    a = torch.tensor(
        [-torch.inf, -1e30, -200.0, -100.0, -50.0, -20.0, -1e-6, 0.0, 1e-6, 19.9, 20.1, 90.0, 1e30, torch.inf]
    )
    a = a.to(device)[:, None]
    zero = torch.zeros(1, device=device)
    g, beta = inlay.gdn_gates(a, a, zero, zero)
    torch.testing.assert_close(g, -F.softplus(a.double()).float(), rtol=1e-6, atol=1e-43)
    torch.testing.assert_close(beta, torch.sigmoid(a), rtol=1e-6, atol=1e-37)


def test_nan_stays_in_its_place(device):
    tensors = inputs((6, 16), torch.float32, device)
    tensors[0][2, 3] = tensors[1][4, 5] = torch.nan
    g, beta = inlay.gdn_gates(*tensors)
    assert g.isnan().nonzero().tolist() == [[2, 3]]
    assert beta.isnan().nonzero().tolist() == [[4, 5]]


@pytest.mark.parametrize("options", [{}, {"beta_scale": 2.0}], ids=str)
def test_gradcheck(options):
    tensors = [t.requires_grad_() for t in inputs((3, 2, 5), torch.float64, "cpu")]
    assert torch.autograd.gradcheck(lambda *values: inlay.gdn_gates(*values, **options), tensors)


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_two_outputs_used(used, device):
    tensors = [t.requires_grad_() for t in inputs((3, 7, 16), torch.float32, device)]
    actual = torch.autograd.grad(inlay.gdn_gates(*tensors)[used].sum(), tensors)
    eager = torch.autograd.grad(reference.gdn_gates(*tensors)[used].sum(), tensors, materialize_grads=True)
    torch.testing.assert_close(actual, eager)


def test_strided_slices(device):
    """a and b as halves of one projection, and gradients of any strides."""
    packed = torch.randn(2, 9, 32, device=device)
    _, _, *vectors = inputs((16,), torch.float32, device)
    a, b = packed[..., :16], packed[..., 16:]
    for actual, expected in zip(
        inlay.gdn_gates(a, b, *vectors), inlay.gdn_gates(a.contiguous(), b.contiguous(), *vectors), strict=True
    ):
        assert actual.is_contiguous()
        assert_same_bits(actual, expected, "gate")
    check([a, b, *vectors], {})
    leaf = packed.requires_grad_()
    g, beta = inlay.gdn_gates(leaf[..., :16], leaf[..., 16:], *vectors)
    (g.transpose(1, 2).sum() + beta.sum()).backward()
    assert leaf.grad.isfinite().all()


def test_no_rows(device):
    tensors = [t.requires_grad_() for t in inputs((0, 16), torch.float32, device)]
    g, beta = inlay.gdn_gates(*tensors)
    (g.sum() + beta.sum()).backward()
    for vector in tensors[2:]:
        assert_same_bits(vector.grad, torch.zeros_like(vector), "gradient")


def test_sums_do_not_depend_on_threads():
    tensors = [t.requires_grad_() for t in inputs((3000, 16), torch.float32, "cpu")]
    threads = torch.get_num_threads()

    def grads(count: int) -> tuple[Tensor, ...]:
        torch.set_num_threads(count)
        g, beta = inlay.gdn_gates(*tensors)
        return torch.autograd.grad(g.sin().sum() + beta.sum(), tensors)

    try:
        first = grads(1)
        for count in (2, 3, 7):
            for name, actual, expected in zip(NAMES, grads(count), first, strict=True):
                assert_same_bits(actual, expected, f"d{name} with {count} threads")
    finally:
        torch.set_num_threads(threads)
