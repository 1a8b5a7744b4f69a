"""Mixtures of experts trained by two processes on the CPU: with Inlay they learn what they learn without.

DDP, FSDP2 (of layers, and of experts by themselves, whose class it changes), and transformers' expert parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf import moe_processes
from tests.hf.moe_models import MOE_MODELS, moe_model
from tests.hf.moe_processes import STEPS, Outcome
from tests.support.processes import Processes

transformers: Any = pytest.importorskip("transformers")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

families = pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])  # without and with a shared expert


@pytest.fixture(scope="module")
def pair() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.close()


def assert_learnt_alike(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        assert max(outcome.losses) < 1e-5
        assert outcome.gradient < 1e-4
        assert outcome.change < 1e-4


def layers_of(family: str) -> int:
    return MOE_MODELS[family][1].get("num_hidden_layers", 2)


@families
@pytest.mark.parametrize("way", ["unpatched", "patched", "patched afterwards", "registered"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "fsdp2 of experts"])
def test_data_parallel(pair: Processes, family: str, wrapper: str, way: str) -> None:
    if wrapper != "ddp":
        reason = pair.run(moe_processes.fsdp2_missing)[0]
        if reason is not None:
            pytest.skip(f"this torch has no FSDP2 on the CPU: {reason}")
    outcomes = pair.run(moe_processes.data_parallel, family, wrapper, way)
    assert_learnt_alike(outcomes)
    every = STEPS * layers_of(family)
    for outcome in outcomes:
        assert outcome.sentinels == 0
        if way == "unpatched":
            assert not +outcome.calls
        elif way == "registered":
            assert outcome.calls["moe_experts"] == every
            assert not outcome.fallbacks
        else:
            assert outcome.calls["moe_router"] == every
            # A block leaves experts alone that FSDP2 has to gather.
            by_block = MOE_MODELS[family][2] and wrapper != "fsdp2 of experts"
            assert outcome.calls["moe_block" if by_block else "moe_experts"] == every
            given_way = MOE_MODELS[family][2] and not by_block
            assert sum(outcome.fallbacks.values()) == (every if given_way else 0)
            assert all(reason.startswith("its experts") for reason in outcome.fallbacks)


EXPERT_PARALLEL = {
    "sentinels": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
    "all to all": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
    "all to all with FSDP2": {"fsdp_size": 2, "ep_size": 2},
}


@families
@pytest.mark.parametrize("way", ["unpatched", "registered", "patched"])
@pytest.mark.parametrize("kind", EXPERT_PARALLEL)
def test_expert_parallel(pair: Processes, tmp_path: Path, family: str, kind: str, way: str) -> None:
    """Two experts on each rank; loaded with the name in the registry, and its routers and blocks patched too."""
    settings = EXPERT_PARALLEL[kind]
    missing = settings.keys() - set(pair.run(moe_processes.distributed_settings)[0])
    if missing:
        pytest.skip(f"this transformers' DistributedConfig has no {', '.join(sorted(missing))}")
    moe_model(family).save_pretrained(tmp_path)
    outcomes = pair.run(moe_processes.expert_parallel, str(tmp_path), settings, way)
    assert_learnt_alike(outcomes)
    every = STEPS * layers_of(family)
    for outcome in outcomes:
        assert outcome.local_experts == 2
        assert (outcome.sentinels > 0) == (way != "unpatched" and kind == "sentinels")
        assert outcome.calls["moe_experts"] == (0 if way == "unpatched" else every)
        assert outcome.calls["moe_router"] == (every if way == "patched" else 0)
        by_blocks = every if way == "patched" and MOE_MODELS[family][2] else 0
        assert outcome.fallbacks == ({"its experts' forward is wrapped": by_blocks} if by_blocks else {})


@families
@pytest.mark.parametrize("way", ["unpatched", "registered", "patched"])
def test_expert_parallel_of_older_releases(pair: Processes, tmp_path: Path, family: str, way: str) -> None:
    """Of the first step the loss alone: their gradients are not those of the whole model, with Inlay or without."""
    known = pair.run(moe_processes.distributed_settings)[0]
    if "enable_expert_parallel" not in known or "ep_size" in known:
        pytest.skip("this transformers has ep_size, or no expert parallelism at all")
    moe_model(family).save_pretrained(tmp_path)
    settings = {"tp_size": 2, "enable_expert_parallel": True}
    for outcome in pair.run(moe_processes.expert_parallel, str(tmp_path), settings, way):
        assert outcome.losses[0] < 1e-5
        assert outcome.local_experts == 2
        assert (outcome.sentinels > 0) == (way != "unpatched")
        assert outcome.calls["moe_experts"] == (0 if way == "unpatched" else STEPS * layers_of(family))
