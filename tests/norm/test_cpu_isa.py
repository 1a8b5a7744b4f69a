"""Is every instruction set tier of the CPU kernels right? This file's tests run once more for each of them.

The tier is chosen once per process, so `test_tier_in_a_process_of_its_own` runs this file again with INLAY_CPU_ISA set.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import inlay
from tests.norm.cases import BASIC, CASES, check_gradients, check_values
from tests.support.compare import assert_same_bits, ulp_distance
from tests.support.devices import random_like

native = pytest.importorskip("inlay._native", reason="the introspection module was not built")

TIERS = ["generic", "avx2", "avx512", "avx512_bf16", "amx_bf16"]
HALVES = [torch.bfloat16, torch.float16]
# Around the widths of all vectors and of their unrolled loops.
WIDTHS = [2, 3, 5, 8, 15, 16, 17, 31, 64, 67, 129, 1000]


def run_python(*arguments: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "INLAY_CPU_ISA": isa}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


PRINT_TIER = "import inlay; from inlay import _native; print(_native.cpu_isa())"


@pytest.mark.parametrize("tier", TIERS)
def test_tier_is_capped_by_the_environment(tier):
    available = native.cpu_isa_tiers()
    expected = [name for name in available if TIERS.index(name) <= TIERS.index(tier)][-1]
    result = run_python("-c", PRINT_TIER, isa=tier)
    assert result.stdout.split() == [expected], result.stderr


def test_tier_that_does_not_exist():
    result = run_python("-c", "import torch, inlay; inlay.rms_norm(torch.ones(2, 2))", isa="sse9")
    assert result.returncode != 0
    assert 'INLAY_CPU_ISA must be one of generic, avx2, avx512, avx512_bf16, amx_bf16, got "sse9"' in result.stderr


def test_tiers_start_with_generic_and_end_with_the_one_in_use():
    available = native.cpu_isa_tiers()
    assert available == TIERS[: len(available)]
    assert native.cpu_isa() in available


@pytest.mark.parametrize("tier", [name for name in native.cpu_isa_tiers() if name != native.cpu_isa()])
def test_tier_in_a_process_of_its_own(tier):
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not tier", __file__]
    result = run_python(*arguments, isa=tier)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_widths(case, width, dtype):
    tensors = case.inputs((9, width), dtype, "cpu")
    check_values(case, tensors)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_options(case, dtype):
    tensors = case.inputs((70, 131), dtype, "cpu")  # two groups of rows in the backward
    check_values(case, tensors)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_wide_rows(case, dtype):
    tensors = case.inputs((3, 65_537), dtype, "cpu")
    check_values(case, tensors)
    check_gradients(case, tensors, random_like(case.run(inlay, tensors)))


@pytest.mark.parametrize("case", BASIC, ids=str)
def test_misaligned_strided_rows(case):
    def lay_out(t: Tensor) -> Tensor:  # rows of 100 at a pitch of 203, starting one element into the storage
        storage = torch.zeros(t.shape[0] * 203 + 1, dtype=t.dtype)
        rows = storage[1:].view(t.shape[0], 203)[:, : t.shape[1]]
        return rows.copy_(t)

    tensors = case.inputs((40, 100), torch.bfloat16, "cpu")
    tensors = {name: lay_out(t) if t.dim() > 1 else t for name, t in tensors.items()}
    check_values(case, tensors)
    check_gradients(case, tensors, tuple(lay_out(dout) for dout in random_like(case.run(inlay, tensors))))


def every_half(dtype: torch.dtype) -> Tensor:
    """All 65,536 numbers of a 16-bit dtype, [256, 256]."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)


def awkward_floats() -> Tensor:
    """Float32 numbers of every exponent, many halfway between two numbers of a 16-bit dtype; [600, 256]."""
    bits = torch.randint(-(2**31), 2**31, (200, 256))
    halfway = {dtype: bits >> shift << shift | 1 << (shift - 1) for dtype, shift in {"bf16": 16, "f16": 13}.items()}
    return torch.cat([bits, *halfway.values()]).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_is_read_exactly(dtype):
    x = every_half(dtype)
    _, h = inlay.add_rms_norm(x, torch.zeros(x.shape), residual_dtype=torch.float32)
    assert_same_bits(h, x.float(), "x")


@pytest.mark.parametrize("columns", [256, 255, 3])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_is_torchs(dtype, columns):
    """To nearest, ties to even; overflow to infinity; NaN stays NaN, also the one with all bits set; subnormals."""
    wide = awkward_floats()[:, :columns]
    wide[0, :3] = torch.tensor([-1, 2**31 - 1, -(2**31)], dtype=torch.int32).view(torch.float32)
    _, h = inlay.add_rms_norm(torch.zeros(wide.shape, dtype=dtype), wide, residual_dtype=dtype)
    assert_same_bits(h, wide.to(dtype), "residual")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sums_of_halves_are_rounded_as_torchs(dtype):
    x = every_half(dtype)
    residual = x.flatten()[torch.randperm(x.numel())].view(x.shape)
    _, h = inlay.add_rms_norm(x, residual)
    assert_same_bits(h, x + residual, "h")


def gated_ones(z: Tensor, activation: str) -> Tensor:
    """act(z) as the kernel computes it: a row of ones with eps 0 is its own norm."""
    return inlay.gated_rms_norm(torch.ones_like(z), z, eps=0.0, rounding="once", activation=activation)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": lambda z: z * torch.sigmoid(z),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_accurate(activation):
    z = torch.cat([torch.linspace(-87, 100, 200_000), torch.randn(50_000), torch.randn(6_000) * 1e-6]).view(-1, 256)
    exact = ACTIVATIONS[activation](z.double()).float()
    assert ulp_distance(gated_ones(z, activation), exact).max() <= 3


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_their_limits(activation):
    z = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 200.0, -200.0, 89.0, -89.0, -104.0, 0.0, -0.0]])
    actual, expected = gated_ones(z, activation), ACTIVATIONS[activation](z)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=2e-36, equal_nan=True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 63, 99])
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_non_finite_values_spoil_their_row_alone(case, column, bad):
    tensors = case.inputs((4, 100), torch.bfloat16, "cpu")
    tensors["x"][1, column] = bad
    check_values(case, tensors)
    good = [0, 2, 3]
    rows = {name: t[good] if t.dim() > 1 else t for name, t in tensors.items()}
    for output, expected in zip(case.run(inlay, tensors), case.run(inlay, rows), strict=True):
        assert_same_bits(output[good], expected, "other rows")


@pytest.fixture
def all_threads() -> Iterator[int]:
    threads = torch.get_num_threads()
    yield max(threads, 4)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BASIC, ids=str)
def test_number_of_threads_has_no_say(case, dtype, all_threads):
    tensors = case.inputs((1003, 200), dtype, "cpu")
    douts = random_like(case.run(inlay, tensors))

    def results(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        outputs = case.run(inlay, leaves)
        return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), douts)]

    single = results(1)
    for threads in (all_threads, 3, 1):
        for actual, expected in zip(results(threads), single, strict=True):
            assert_same_bits(actual, expected, f"{threads} threads")


@pytest.mark.parametrize("width", [128, 4096, 4099])
@pytest.mark.parametrize("case", [BASIC[0], BASIC[3], BASIC[4]], ids=str)
def test_outputs_larger_than_the_caches(case, width):
    """These go to memory past the caches; the numbers must be those of a small call."""
    cache = os.sysconf("SC_LEVEL3_CACHE_SIZE") if "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names else 0
    elements = (cache or 32 * 2**20) // 4 + 2**20  # in bf16 just over half the cache
    if elements > 2**29:
        pytest.skip(f"a last-level cache of {cache >> 20} MiB takes too large a tensor")
    tensors = case.inputs((elements // width, width), torch.bfloat16, "cpu")
    few = torch.arange(0, elements // width, 97)[-500:]
    small = {name: t[few] if t.dim() > 1 else t for name, t in tensors.items()}
    douts = random_like(case.run(inlay, tensors))
    rows = [name for name in tensors if tensors[name].dim() > 1]

    def results(given: dict[str, Tensor], gradients: tuple[Tensor, ...]) -> list[Tensor]:
        leaves = {name: t.detach().requires_grad_(name in rows) for name, t in given.items()}
        outputs = case.run(inlay, leaves)
        return [*outputs, *torch.autograd.grad(outputs, [leaves[name] for name in rows], gradients)]

    large_results = results(tensors, douts)
    small_results = results(small, tuple(dout[few] for dout in douts))
    for large, expected in zip(large_results, small_results, strict=True):
        assert_same_bits(large[few], expected, f"{case} at width {width}")
