"""PEFT, accelerate's and diffusers' hooks, and torch.compile, before and after patching."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import inlay
from tests.hf.compare import assert_same_values, gradients, relative_error
from tests.hf.models import language_model, tokens

pytest.importorskip("transformers")


def _same_logits(model: nn.Module, reference: nn.Module) -> None:
    ids = tokens(reference)
    assert_same_values(model(ids).logits, reference(ids).logits, "logits")


# --- PEFT ---


def _with_lora(model: nn.Module, **options: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    torch.manual_seed(3)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("modules_to_save", [None, ["norm", "post_attention_layernorm"]])
def test_lora(patch_first: bool, modules_to_save: list[str] | None, device: str) -> None:
    model = language_model("qwen3", device)
    reference = _with_lora(deepcopy(model), modules_to_save=modules_to_save)
    if patch_first:
        inlay.patch(model)
    model = _with_lora(model, modules_to_save=modules_to_save)
    inlay.patch(model)
    ids = tokens(model)
    assert_same_values(model(ids).logits, reference(ids).logits, "logits")
    expected = gradients(reference, ids)
    actual = gradients(model, ids)
    assert max(relative_error(actual, expected).values()) < 1e-3
    assert any(name.endswith("lora_A.default.weight") for name in actual)
    assert inlay.report(model).calls > 0
    merged, reference = model.merge_and_unload(), reference.merge_and_unload()
    _same_logits(merged, reference)
    inlay.unpatch(merged)
    assert not any("forward" in vars(module) for module in merged.modules())
    _same_logits(merged, reference)


# --- accelerate ---


def _offloaded(model: nn.Module) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
@pytest.mark.parametrize("patch_first", [True, False])
def test_offloaded_weights(family: str, patch_first: bool) -> None:
    model = language_model(family)
    reference = deepcopy(model)
    if patch_first:
        inlay.patch(model)
    model = _offloaded(model)
    assert model.model.norm.weight.is_meta
    inlay.patch(model)
    with torch.no_grad():
        _same_logits(model, reference)
    report = inlay.report(model)
    # A hook brings each norm's weight in for its own call only, so norms are fused and sums are not.
    norms = [entry for entry in report.patched if entry.op != "add_rms_norm"]
    assert all(entry.calls == 1 and not entry.fallbacks for entry in norms)
    assert report.fallbacks == {"post_attention_layernorm: its forward is wrapped": model.config.num_hidden_layers}
    inlay.unpatch(model)
    assert not inlay.report(model).calls
    with torch.no_grad():
        _same_logits(model, reference)


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("unpatch_first", [True, False])
def test_hooks_and_patches_come_and_go_in_any_order(patch_first: bool, unpatch_first: bool) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    norm = nn.RMSNorm(16)
    x = torch.randn(3, 16)
    expected = norm(x)
    seen = []

    class Hook(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(module)
            return args, kwargs

    if patch_first:
        inlay.patch(norm, strict=True)
    hooks.add_hook_to_module(norm, Hook())
    inlay.patch(norm, strict=True)
    assert_same_values(norm(x), expected, "patched and hooked")
    assert (len(seen), inlay.report(norm).calls) == (1, 1)
    if unpatch_first:
        inlay.unpatch(norm)
        assert torch.equal(norm(x), expected)
        assert len(seen) == 2
        hooks.remove_hook_from_module(norm)
    else:
        hooks.remove_hook_from_module(norm)
        norm(x)
        assert inlay.report(norm).calls == 2
        inlay.unpatch(norm)
    assert torch.equal(norm(x), expected)
    assert vars(norm).get("forward", norm.forward) == norm.forward == type(norm).forward.__get__(norm)
    assert not {"_inlay", "_old_forward", "_hf_hook"} & set(vars(norm))


def test_device_map(tmp_path: Path) -> None:
    import transformers

    pytest.importorskip("accelerate")
    reference = language_model("llama")
    reference.save_pretrained(tmp_path)
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    inlay.patch(model)
    with torch.no_grad():
        _same_logits(model, reference)
    assert inlay.report(model).calls > 0


# --- FSDP2 ---


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("torch was built without distributed")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("patch_first", [True, False])
def test_fsdp2(checkpointing: bool, patch_first: bool) -> None:
    """fully_shard swaps the layers' classes for derived ones, and these are what transformers 5.23 checkpoints."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))  # the default is a GPU where there is one
    model = language_model("qwen3").train()
    ids = tokens(model)
    expected = gradients(deepcopy(model), ids)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if patch_first:
        inlay.patch(model, strict=True)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    inlay.patch(model, strict=True)
    model(ids, labels=ids, use_cache=False).loss.backward()
    actual = {name: parameter.grad.full_tensor().double() for name, parameter in model.named_parameters()}
    assert max(relative_error(actual, expected).values()) < 1e-3
    layers = [entry for entry in inlay.report(model).patched if entry.op == "add_rms_norm"]
    assert [entry.calls for entry in layers] == [2 if checkpointing else 1] * 2


# --- diffusers ---


@pytest.mark.parametrize("patch_first", [True, False])
def test_diffusers_hooks(patch_first: bool) -> None:
    hooks = pytest.importorskip("diffusers.hooks.hooks")
    norm = nn.RMSNorm(16)
    x = torch.randn(3, 16)
    expected = norm(x)

    class Counting(hooks.ModelHook):
        count = 0

        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return self.fn_ref.original_forward(*args, **kwargs)

    hook = Counting()
    if patch_first:
        inlay.patch(norm)
    registry = hooks.HookRegistry.check_if_exists_or_initialize(norm)
    registry.register_hook(hook, "counting")
    inlay.patch(norm)
    assert_same_values(norm(x), expected, "patched and hooked")
    assert (hook.count, inlay.report(norm).calls) == (1, 1)
    inlay.unpatch(norm)
    assert torch.equal(norm(x), expected)
    assert hook.count == 2
    registry.remove_hook("counting")
    assert torch.equal(norm(x), expected)
    assert hook.count == 2


# --- torch.compile ---


_HYBRID = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
_DENSE = {"norm", "add_norm", "qk_norm_rope", "attention"}


@pytest.mark.parametrize(
    ("family", "options", "expected_ops"),
    [("qwen3", {}, _DENSE), ("qwen3_5", _HYBRID, {*_DENSE, "causal_conv1d", "gdn_gates", "gated_delta_rule"})],
)
def test_compile(family: str, options: dict[str, Any], expected_ops: set[str], device: str) -> None:
    """The whole model is one graph, with our ops in it; unpatching recompiles it."""
    model = language_model(family, device, **options)
    ids = tokens(model)
    expected = model(ids).logits
    ops: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        ops.extend(str(node.target) for node in graph.graph.nodes if "inlay" in str(node.target))
        return graph

    inlay.patch(model, strict=True)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert_same_values(compiled(ids).logits, expected, "logits")
        if device == "cuda":  # which may have no kernel for it
            expected_ops = expected_ops - {"attention"}
            ops = [op for op in ops if op != "inlay.attention.default"]
        assert set(ops) == {f"inlay.{op}.default" for op in expected_ops}
        assert inlay.report(model).calls == 0
        ops.clear()
        compiled(ids)
        assert not ops, "an equal call recompiled"
        inlay.unpatch(model)
        assert_same_values(compiled(ids).logits, expected, "logits")
        assert not ops


def test_compiled_training(device: str) -> None:
    model = language_model("qwen3", device).train()
    ids = tokens(model)
    expected = gradients(model, ids)
    inlay.patch(model, strict=True)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert max(relative_error(gradients(compiled, ids), _renamed(expected)).values()) < 1e-3


def _renamed(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"_orig_mod.{name}": value for name, value in gradients.items()}


def test_compiled_module_with_inductor(device: str) -> None:
    """Inductor itself, on one layer's worth of code."""
    norm = nn.RMSNorm(64, eps=1e-6).to(device)
    x = torch.randn(4, 64, device=device)
    expected = norm(x)
    inlay.patch(norm, strict=True)
    assert_same_values(torch.compile(norm, fullgraph=True)(x), expected, "rms_norm")


def test_export(device: str) -> None:
    """The exported program computes what the model does."""
    model = language_model("qwen3", device)
    ids = tokens(model)
    expected = model(ids, use_cache=False).logits
    inlay.patch(model)
    program = torch.export.export(model, (ids,), {"use_cache": False})
    assert_same_values(program.module()(ids, use_cache=False).logits, expected, "logits")
