"""``inlay demo``: dense, of experts, from a checkpoint; a patch that computes something else; the measuring tools."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import inlay
from inlay import cli
from inlay._console import Progress, spread
from inlay.demo import data
from inlay.demo.generate import Generated, Generation
from inlay.demo.measure import peak_growth
from inlay.demo.model import nudged
from inlay.demo.verdict import FACTOR, Check, worst
from inlay.hf.report import Report


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return request.param


@pytest.fixture
def demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Runs the quick demo: exit status, contents of demo.json, text printed."""

    def run(*arguments: str) -> tuple[int, dict[str, Any], str]:
        status = cli.main(["demo", "--quick", "--output", str(tmp_path / "out"), *arguments])
        results = json.loads((tmp_path / "out" / "demo.json").read_text())
        assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
        return status, results, capsys.readouterr().out

    return run


def test_trains_and_generates(demo: Any, device: str) -> None:
    status, results, text = demo("--device", device, "--seed", "3")
    assert status == 0, text
    training = results["training"]
    for run in ("unpatched", "patched", "nudged"):
        losses = training[run]["losses"]
        assert len(losses) == 6
        assert all(0 < loss < 8 for loss in losses)
    assert len(training["patched"]["seconds"]) == 4
    assert training["patched"]["step_bytes"] > 0
    assert [check["passed"] for check in results["checks"]] == [True] * 4
    assert len(results["generation"]["patched"]["tokens"]) == 16
    ops = {entry["op"]: entry for entry in training["report"]["entries"] if entry["op"]}
    assert {"rms_norm", "gated_rms_norm", "add_rms_norm", "gdn_layer"} <= set(ops)
    assert all(entry["calls"] > 0 and entry["backend"] == device for entry in ops.values())
    layer = results["gdn_layer"]
    assert layer["unpatched"].keys() == layer["patched"].keys()
    assert len(layer["patched"]) == 3
    assert all(seconds > 0 for side in layer.values() for seconds in side.values())
    for part in ("tokens/s", "peak memory", "prefill", "decode", "gdn_layer", "The numbers agree."):
        assert part in text


def test_a_mixture_of_experts(demo: Any) -> None:
    status, results, text = demo("--device", "cpu", "--moe")
    assert status == 0, text
    assert [check["passed"] for check in results["checks"]] == [True] * 4
    generation = results["generation"]
    assert generation["patched"]["tokens"] == generation["unpatched"]["tokens"]
    ops = {entry["op"]: entry for entry in results["training"]["report"]["entries"] if entry["op"]}
    assert {"moe_router", "moe_block", "gdn_layer", "attention_layer"} <= set(ops)
    assert not any(entry["fallbacks"] for entry in ops.values())
    assert ops["moe_block"]["calls"] == ops["moe_router"]["calls"] > 0
    for op in ("gdn_layer", "moe_block"):
        assert all(seconds > 0 for side in results[op].values() for seconds in side.values())
    for part in (
        "Qwen3_5MoeForCausalLM",
        "8 in each layer, 2 of them a token and a shared one",
        "One mixture of experts",
    ):
        assert part in text


def test_a_checkpoint_or_a_mixture_of_experts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["demo", "--moe", "--model", "some/model"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_every_weight_is_nudged_by_one_unit() -> None:
    model = torch.nn.Linear(8, 8).to(torch.bfloat16)
    for weight, moved in zip(model.parameters(), nudged(model, 0).parameters(), strict=True):
        distance = (moved.double() / weight.double() - 1).abs()
        assert distance.min() > 0
        assert distance.max() <= 2 * torch.finfo(torch.bfloat16).eps


def test_bfloat16_and_chosen_ops(demo: Any) -> None:
    status, results, text = demo("--device", "cpu", "--dtype", "bfloat16", "--ops", "rms_norm")
    assert status == 0, text
    assert {entry["op"] for entry in results["training"]["report"]["entries"]} - {""} == {"rms_norm"}
    assert "gdn_layer" not in results


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_op_is_found(demo: Any, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first half of the patched model's last norm is too large by a hundred units in the last place."""
    scale = torch.ones(64, dtype=getattr(torch, dtype))
    scale[:32] += 100 * torch.finfo(scale.dtype).eps
    right_patch = inlay.patch

    def wrong_patch(model: Any, ops: Any = None) -> Any:
        model.model.norm.register_forward_hook(lambda module, inputs, output: output * scale)
        return right_patch(model, ops)

    monkeypatch.setattr(inlay, "patch", wrong_patch)
    status, results, text = demo("--device", "cpu", "--dtype", dtype)
    assert status == 1
    assert not results["checks"][0]["passed"]
    assert "The numbers do NOT agree." in text


def tiny_llama(folder: Path, vocab_size: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def test_generates_with_a_checkpoint(demo: Any, tmp_path: Path) -> None:
    words = {word: index for index, word in enumerate(["[UNK]", "the", "statement", "is", "used"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path / "model")
    tiny_llama(tmp_path / "model", vocab_size=len(words))

    status, results, text = demo("--device", "cpu", "--model", str(tmp_path / "model"), "--prompt", "the statement is")
    assert status == 0, text
    assert "training" not in results
    assert results["generation"]["prompt_length"] == 3
    assert set(results["generation"]["texts"][0].split()) <= set(words)
    assert results["generation"]["texts"][0] == results["generation"]["texts"][1]


def test_generates_with_bytes_where_there_is_no_tokenizer(demo: Any, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model", vocab_size=300)
    status, results, _ = demo(
        "--device", "cpu", "--model", str(tmp_path / "model"), "--prompt", "the", "--new-tokens", "5"
    )
    assert status == 0
    assert results["generation"]["prompt_length"] == 3
    assert len(results["generation"]["unpatched"]["tokens"]) == 5


def test_no_tokenizer_and_a_vocabulary_too_small_for_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama(tmp_path / "model", vocab_size=100)
    assert cli.main(["demo", "--device", "cpu", "--output", str(tmp_path), "--model", str(tmp_path / "model")]) == 2
    assert "too small for bytes" in capsys.readouterr().err


def test_peak_growth_on_the_cpu_counts_every_tensor(capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        first = torch.zeros(1000)
        second = first + 1
        del first
        kept.append(second * 2)

    kept: list[torch.Tensor] = []
    assert 2 * 4000 <= peak_growth(work, torch.device("cpu")) < 2 * 4000 + 64
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nudged_moves_every_weight_by_a_rounding_step(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64).to(dtype)
    moved = nudged(model, seed=1)
    ratio = moved.weight.double() / model.weight.double() - 1
    eps = torch.finfo(dtype).eps
    assert ratio.abs().min() >= eps / 2
    assert ratio.abs().max() <= 2 * eps
    assert 0.4 < (ratio > 0).double().mean() < 0.6


def test_check() -> None:
    assert Check("", FACTOR, 1.0).passed
    assert not Check("", FACTOR * 1.01, 1.0).passed
    assert Check("", 0.0, 0.0).passed
    assert not Check("", 1e-30, 0.0).passed
    assert not Check("", math.nan, 1.0).passed
    assert worst([Check("a", 1.0, 1.0), Check("b", math.nan, 1.0), Check("c", 5.0, 1.0)]).name == "b"


def test_tokens_are_compared_up_to_the_first_that_differs() -> None:
    def generation(patched: list[int]) -> Generation:
        unpatched = Generated(tokens=[5, 6, 7], margins=[3.0, 2.0, 1.0])
        logits = Check("logits", difference=0.1, rounding=0.1)
        return Generation(unpatched, Generated(tokens=patched), 1, logits, Report([]))

    assert generation([5, 6, 7]).tokens_in_common == 3
    assert generation([5, 6, 7]).margin == 0.0
    parted = generation([5, 9, 7])
    assert parted.tokens_in_common == 1
    assert parted.margin == 2.0
    assert not parted.checks()[1].passed
    assert generation([5, 6, 8]).checks()[1].passed


def test_data() -> None:
    batches = data.training_batches(steps=3, batch_size=2, sequence_length=16, seed=5)
    assert batches.shape == (3, 2, 16)
    assert torch.equal(batches, data.training_batches(steps=3, batch_size=2, sequence_length=16, seed=5))
    tokenizer = data.ByteTokenizer()
    assert tokenizer.decode(batches[1, 0].tolist()) in data.documentation()
    assert tokenizer.decode([*tokenizer.encode("naïve"), tokenizer.eos_token_id]) == "naïve"
    assert data.prompt_text(100).startswith('The "if" statement')


def test_progress_without_a_terminal_prints_ten_lines(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("counting", "step", 95)
    for index in progress:
        progress.note(f"square {index**2}")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[0] == "  counting: step 1 of 95, square 0"
    assert lines[-1] == "  counting: step 95 of 95, square 8836"


@pytest.mark.parametrize(("total", "count"), [(1, 9), (9, 9), (10, 9), (1000, 9)])
def test_spread(total: int, count: int) -> None:
    indices = spread(total, count)
    assert len(indices) == min(total, count)
    assert indices == sorted(set(indices))
    assert (indices[0], indices[-1]) == (0, total - 1)
