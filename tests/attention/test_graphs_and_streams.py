"""Are results the same in a CUDA graph, on another stream, and beside other launches?"""

from __future__ import annotations

import pytest
import torch

import inlay
from tests.attention.cases import BASIC, Case
from tests.support.compare import assert_same_bits

pytestmark = pytest.mark.cuda

CASES = [case for case in BASIC if "mask" not in case.features]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_graph_replays_with_new_values(case):
    first, second = (case.inputs(torch.bfloat16, "cuda") for _ in range(2))
    static = {name: tensor.clone() for name, tensor in first.items()}
    case.run(inlay, static)  # looks up what only the first launch does
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = case.run(inlay, static)
    for tensors in (second, first):
        for name, tensor in tensors.items():
            static[name].copy_(tensor)
        for output in replayed:
            output.fill_(torch.nan)
        graph.replay()
        for actual, expected in zip(replayed, case.run(inlay, tensors), strict=True):
            assert_same_bits(actual, expected, str(case))


def test_launches_on_two_streams_share_nothing():
    """Causal blocks take tiles from a counter; each launch has its own."""
    case = Case(features=("causal",), queries=1500, keys=1500, heads=8, dim=64, value_dim=64)
    inputs = [case.inputs(torch.bfloat16, "cuda") for _ in range(2)]
    expected = [case.run(inlay, tensors) for tensors in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results: list[list[tuple]] = [[], []]
    for _ in range(10):
        for stream, tensors, outputs in zip(streams, inputs, results, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(case.run(inlay, tensors))
    torch.cuda.synchronize()
    for outputs, wanted in zip(results, expected, strict=True):
        for output in outputs:
            for actual, exact in zip(output, wanted, strict=True):
                assert_same_bits(actual, exact, "beside another launch")
