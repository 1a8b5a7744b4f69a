"""Are the raw ops registered as torch wants them, and does the function compile, export and stay in one graph?"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import inlay
from tests.attention.cases import LEAVES, Case, gradients, random_like
from tests.support.compare import assert_same_bits

BF16, F32 = torch.bfloat16, torch.float32
_ARGUMENTS = (
    "q",
    "k",
    "v",
    "gate",
    "sinks",
    "bias",
    "mask",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "kv_lengths",
    "key_ranges",
)


def _inputs(device: str) -> Iterator[tuple[Any, ...]]:
    """Everything before the forward's options, and these."""
    for features, dtype in (
        ((), BF16),
        (("gate", "sinks", "bias"), F32),
        (("mask", "bias", "lengths", "ranges", "dropout"), BF16),
        (("packed", "gate"), BF16),
    ):
        case = Case(queries=20, keys=24, batch=1 if "packed" in features else 2, features=features)
        tensors = case.inputs(dtype, device)
        p = 0.2 if "dropout" in features else 0.0
        seed = torch.randint(2**62, (1,), device=device) if p else None
        yield *(tensors.get(name) for name in _ARGUMENTS), seed, 0.25, 9, -1, 0.0, p, False


def _forward_cases(device: str) -> Iterator[tuple[Any, ...]]:
    for arguments in _inputs(device):
        yield *arguments, arguments[3] is not None


def _backward_cases(device: str) -> Iterator[tuple[Any, ...]]:
    for arguments in _inputs(device):
        y, lse, o = torch.ops.inlay.attention_fwd(*arguments, arguments[3] is not None)
        o = y if arguments[3] is None else o
        needs_dbias = arguments[5] is not None
        dlse = torch.randn_like(lse) if needs_dbias else None
        yield torch.randn_like(y), dlse, o, lse, *arguments, needs_dbias, True


# Every raw op's argument lists, for opcheck; a test of the whole package holds its keys to the registered ops.
OPCHECK_CASES = {"attention": _inputs, "attention_fwd": _forward_cases, "attention_bwd": _backward_cases}


@pytest.mark.parametrize("op", OPCHECK_CASES)
def test_opcheck(op, device):
    """Schema against behaviour, autograd registration, fake against real, and tracing with dynamic shapes."""
    for arguments in OPCHECK_CASES[op](device):
        torch.library.opcheck(getattr(torch.ops.inlay, op).default, arguments)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = [
    (),
    ("causal", "gate", "sinks"),
    ("window", "softcap", "bias"),
    ("mask", "lengths", "ranges"),
    ("packed", "causal"),
]


@pytest.mark.usefixtures("fresh_dynamo")
@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("features", COMPILED, ids=str)
def test_compiles_in_one_graph_and_once_for_all_sizes(features, device):
    """Forward and backward of the traced graph, with a second and a third number of queries, keys and rows."""
    packed = "packed" in features

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(tensors):
        keywords = Case(features=features).keywords()
        return inlay.attention(**tensors, **keywords, return_lse=True)

    for queries, keys, batch in ((70, 90, 3), (9, 20, 2), (130, 131, 5)):
        case = Case(queries=queries, keys=keys, batch=1 if packed else batch, features=features)
        tensors = case.inputs(BF16, device)
        leaves = {name: t.requires_grad_(name in LEAVES) for name, t in tensors.items()}
        outputs, expected = compiled(leaves), case.run(inlay, leaves)
        for output, wanted in zip(outputs, expected, strict=True):
            assert_same_bits(output, wanted, "output")
        douts = random_like(outputs)
        wanted_grads = gradients(case, inlay, tensors, douts)
        grads = torch.autograd.grad(outputs, [leaves[name] for name in wanted_grads], douts)
        for (name, wanted), grad in zip(wanted_grads.items(), grads, strict=True):
            assert_same_bits(grad, wanted, f"d{name}")


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiles_with_dropout(device):
    """Forward and backward draw alike: the gradient of a sum over values is that of the probabilities kept."""
    case = Case()
    tensors = case.inputs(F32, device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q, k, v):
        return inlay.attention(q, k, v, dropout_p=0.5)

    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    torch.manual_seed(2)
    y = compiled(**leaves)
    (dv,) = torch.autograd.grad(y.sum(), leaves["v"])
    torch.manual_seed(2)
    (wanted,) = torch.autograd.grad(inlay.attention(**leaves, dropout_p=0.5).sum(), leaves["v"])
    assert_same_bits(dv, wanted, "dv")


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiles_with_inductor(device):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler")
    case = Case(features=("causal", "gate"))
    leaves = {name: t.requires_grad_() for name, t in case.inputs(BF16, device).items()}

    def block(q, k, v, gate):
        return inlay.attention(q * 2, k, v, gate=gate, causal=True).square()

    compiled = torch.compile(block, fullgraph=True)
    for _ in range(2):
        y, expected = compiled(**leaves), block(**leaves)
        torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
        grads, wanted = (torch.autograd.grad(out.sum(), list(leaves.values())) for out in (y, expected))
        for name, grad, want in zip(leaves, grads, wanted, strict=True):
            torch.testing.assert_close(grad, want, rtol=0.05, atol=0.05, msg=name)


class Layer(torch.nn.Module):
    def forward(self, q, k, v):
        return inlay.attention(q, k, v, causal=True, window=(40, None), return_lse=True)


def test_export(device):
    example = tuple(Case(queries=90).inputs(BF16, device).values())
    tokens = torch.export.Dim("tokens", min=2)
    with torch.no_grad():
        program = torch.export.export(Layer(), example, dynamic_shapes=({1: tokens},) * 3)
        if device == "cpu":
            assert any("inlay.attention" in str(node.target) for node in program.graph.nodes)
        inputs = tuple(Case(queries=77, keys=77).inputs(BF16, device).values())
        for actual, wanted in zip(program.module()(*inputs), Layer()(*inputs), strict=True):
            assert_same_bits(actual, wanted, "exported")


@pytest.mark.parametrize("features", COMPILED, ids=str)
def test_fake_tensors_have_the_real_form(features, device):
    case = Case(batch=1, value_dim=48, features=features)
    tensors = case.inputs(BF16, device)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = case.run(inlay, {name: mode.from_tensor(tensor) for name, tensor in tensors.items()})
    for fake, real in zip(fakes, case.run(inlay, tensors), strict=True):
        assert (fake.shape, fake.dtype, fake.stride(), fake.device) == (
            real.shape, real.dtype, real.stride(), real.device,
        )  # fmt: skip


def test_meta_tensors():
    tensors = {name: t.to("meta") for name, t in Case().inputs(BF16).items()}
    assert inlay.attention(**tensors).shape == (2, 70, 4, 32)


def test_functional_grad(device):
    tensors = Case(queries=20).inputs(F32, device)

    def loss(v):
        return inlay.attention(**{**tensors, "v": v}).sin().sum()

    leaf = tensors["v"].clone().requires_grad_()
    loss(leaf).backward()
    assert_same_bits(torch.func.grad(loss)(tensors["v"]), leaf.grad, "dv")
