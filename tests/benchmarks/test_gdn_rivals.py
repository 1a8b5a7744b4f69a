"""Are the gated delta rule's rivals given what they expect, and understood? Stand-ins with their signatures compute."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from benchmarks import gdn_rivals
from benchmarks.bench_gdn import Case
from inlay import reference


def chunk(q, k, v, g, beta, cu_seqlens, output_final_state, use_qk_l2norm_in_kernel, max_seqlen):
    """flashinfer's, of decays: packed rows in, transposed states out."""
    assert all(x.dim() == 3 and x.is_contiguous() for x in (q, k, v))
    assert {g.dtype, beta.dtype} == {torch.float32}
    assert max_seqlen == cu_seqlens.diff().max()
    batch = (x[None] for x in (q, k, v, g.log(), beta))
    o, state = reference.gated_delta_rule(
        *batch, l2norm_qk=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens, output_final_state=output_final_state
    )
    return o[0], state.mT.contiguous()


def decode(q, k, v, state, A_log, a, dt_bias, b, use_qk_l2norm):
    assert A_log.dtype == torch.float32
    assert {a.dtype, b.dtype} == {torch.bfloat16}
    gates = reference.gdn_gates(a, b, A_log, dt_bias)
    return reference.gated_delta_step(q, k, v, *gates, state, l2norm_qk=use_qk_l2norm), state


def decode_pretranspose(state: Tensor, **tensors):
    assert state.is_contiguous()
    return decode(state=state.mT.contiguous(), **tensors)


@pytest.fixture(params=[True, False], ids=["normalises", "ignores the flag"])
def flashinfer(request, monkeypatch):
    """The package, as it is or as releases were that take the flag to normalise and do not read it."""

    def rule(use_qk_l2norm_in_kernel, **tensors):
        assert use_qk_l2norm_in_kernel == request.param
        return chunk(use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **tensors)

    content = {
        "flashinfer": {},
        "flashinfer.gdn_kernels": {},
        "flashinfer.gdn_prefill": {"chunk_gated_delta_rule": rule},
        "flashinfer.gdn_decode": {
            "gated_delta_rule_decode": decode,
            "gated_delta_rule_decode_pretranspose": decode_pretranspose,
        },
    }
    for name, attributes in content.items():
        module = ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(gdn_rivals.importlib.util, "find_spec", lambda name: request.param or None)


def difference(case: Case, implementation: gdn_rivals.Implementation) -> str:
    tensors = case.tensors("cpu")
    exact = case.exact({name: tensor.clone() for name, tensor in tensors.items()})
    return case.difference(case.call(implementation[case.op], tensors)(), exact)


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize("gates", ["weak", "strong"])
def test_flashinfer(gates):
    case = Case("gated_delta_rule", "forward", 2, 70, 2, 4, gates=gates)
    assert difference(case, gdn_rivals.flashinfer()) == ""


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize("maker", [gdn_rivals.flashinfer, gdn_rivals.flashinfer_transposed])
def test_flashinfer_decoding(maker):
    assert difference(Case("gated_delta_step", "forward", 3, 1, 2, 4), maker()) == ""


@pytest.mark.usefixtures("flashinfer")
def test_flashinfer_has_no_backward():
    case = Case("gated_delta_rule", "backward", 1, 70, 2, 4)
    with pytest.raises(NotImplementedError, match="forward only"):
        difference(case, gdn_rivals.flashinfer())


def test_a_function_without_groups_gets_repeated_heads():
    def ungrouped(q, k, v, g, beta, **constants):
        return v + (q * k).sum(-1, keepdim=True), None

    q, v = torch.randn(1, 3, 2, 8), torch.zeros(1, 3, 4, 8)
    o, _ = gdn_rivals._grouped(ungrouped)(q, q, v, g=None, beta=None)
    assert torch.equal(o[..., 0], q.square().sum(-1).repeat_interleave(2, 2))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_another_rule_differs(direction):
    case = Case("gated_delta_rule", direction, 1, 70, 2, 4)
    ungated = lambda t: gdn_rivals.ours()["gated_delta_rule"]({**t, "g": 0 * t["g"]})  # noqa: E731
    assert difference(case, gdn_rivals.ours()) == ""
    assert "result 0 is off by" in difference(case, {"gated_delta_rule": ungated})
