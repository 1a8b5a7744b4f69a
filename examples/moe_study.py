"""Do a router's experts collapse, and what helps? Small decoders on real text, with and without balancing.

Five models learn the same batches of Python's documentation, a token a byte, step by step in turn, so that whatever
else the machine does meets all alike:

- ``unbalanced``: 8 experts, 2 of them a token, and nothing that keeps them in balance;
- ``losses``: the same with the load-balancing loss and the router's z-loss;
- ``bias``: the same with a bias that only chooses, moved against the load after every step, and no loss;
- ``dense (active)``: one FFN as wide as 2 experts, so with the FLOPs of the others;
- ``dense (total)``: one as wide as 8, so with their parameters.

``python examples/moe_study.py`` writes results, figures and a summary to ``examples/results`` and takes some minutes on
two cores; ``--quick`` takes seconds and shows nothing but that it runs; ``--steps`` and ``--device cuda`` scale it.
``--renormalize --output examples/results/renormalized`` is the second setting of the report.
``python examples/moe_report.py`` draws figures, summary and notebook again from results that are there.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import moe_report
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inlay
from inlay.demo.data import ByteTokenizer, documentation

RESULTS = Path(__file__).parent / "results"
WARM_UP_STEPS = 2
"""Not part of a median."""
MEASURES = ("effective_experts", "max_vio", "min_load", "dead", "entropy", "entropy_of_mean", "gap", "margin", "z")
"""Of :func:`inlay.router_stats`, those that are kept."""


@dataclass(frozen=True)
class Setting:
    """Everything that decides what is measured, but for the machine."""

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    experts: int = 8
    top_k: int = 2
    expert_width: int = 192
    batch: int = 8
    length: int = 128
    steps: int = 300
    learning_rate: float = 3e-3
    warm_up: int = 20
    """Steps over which the learning rate rises; it then falls to a tenth along a cosine."""
    router_scale: float = 1.0
    """Standard deviation of a router's logits at the start."""
    renormalize: bool = False
    """Whether a token's weights are made to add up to one, as in Mixtral; else they are probabilities, as in OLMoE."""
    balance_factor: float = 1e-2
    z_factor: float = 1e-3
    bias_rate: float = 1e-2
    window: int = 10
    """Steps that measures of routers are taken over."""
    seed: int = 0
    device: str = "cpu"


QUICK = Setting(hidden=32, heads=2, expert_width=16, batch=2, length=32, steps=12, warm_up=2, window=4)


@dataclass(frozen=True)
class Arm:
    """One of the models."""

    name: str
    dense_width: int | None = None
    losses: bool = False
    bias: bool = False


def arms(setting: Setting) -> list[Arm]:
    return [
        Arm("unbalanced"),
        Arm("losses", losses=True),
        Arm("bias", bias=True),
        Arm("dense (active)", dense_width=setting.top_k * setting.expert_width),
        Arm("dense (total)", dense_width=setting.experts * setting.expert_width),
    ]


class TopKRouter(nn.Module):
    """Softmax over all experts, of which the ``top_k`` best are used."""

    def __init__(self, setting: Setting, biased: bool) -> None:
        super().__init__()
        self.top_k, self.renormalize = setting.top_k, setting.renormalize
        self.weight = nn.Parameter(torch.randn(setting.experts, setting.hidden))
        self.weight.data *= setting.router_scale * setting.hidden**-0.5
        self.register_buffer("balance_bias", torch.zeros(setting.experts) if biased else None)
        self.stats: Any = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, weights and indices: what :class:`inlay.RouterMonitor` looks for."""
        logits = F.linear(x, self.weight)
        weights, indices, self.stats = inlay.moe_router(
            logits, self.top_k, bias=self.balance_bias, renormalize=self.renormalize, stats=True
        )
        return logits, weights, indices


class Experts(nn.Module):
    def __init__(self, setting: Setting, biased: bool) -> None:
        super().__init__()
        count, width, hidden = setting.experts, setting.expert_width, setting.hidden
        self.router = TopKRouter(setting, biased)
        self.gate_up_proj = nn.Parameter(torch.randn(count, 2 * width, hidden) * hidden**-0.5)
        self.down_proj = nn.Parameter(torch.randn(count, hidden, width) * (2 * setting.layers * width) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        _, weights, indices = self.router(flat)
        return inlay.moe_experts(flat, indices, weights, self.gate_up_proj, self.down_proj).view(x.shape)


class Dense(nn.Module):
    def __init__(self, setting: Setting, width: int) -> None:
        super().__init__()
        hidden = setting.hidden
        self.gate_up_proj = nn.Parameter(torch.randn(2 * width, hidden) * hidden**-0.5)
        self.down_proj = nn.Parameter(torch.randn(hidden, width) * (2 * setting.layers * width) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up_proj).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down_proj)


class Layer(nn.Module):
    def __init__(self, setting: Setting, arm: Arm) -> None:
        super().__init__()
        hidden = setting.hidden
        self.heads = setting.heads
        self.norms = nn.Parameter(torch.ones(2, hidden))
        self.head_norms = nn.Parameter(torch.ones(2, hidden // setting.heads))
        self.qkv = nn.Parameter(torch.randn(3 * hidden, hidden) * hidden**-0.5)
        self.out = nn.Parameter(torch.randn(hidden, hidden) * (2 * setting.layers * hidden) ** -0.5)
        self.ffn = Experts(setting, arm.bias) if arm.dense_width is None else Dense(setting, arm.dense_width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = inlay.rms_norm(x, self.norms[0], eps=1e-6)
        q, k, v = F.linear(h, self.qkv).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = inlay.qk_norm_rope(q, k, cos, sin, self.head_norms[0], self.head_norms[1], eps=1e-6)
        y = inlay.attention(q, k, v, causal=True)
        h, x = inlay.add_rms_norm(F.linear(y.flatten(2), self.out), x, self.norms[1], eps=1e-6)
        return x + self.ffn(h)


class Decoder(nn.Module):
    def __init__(self, setting: Setting, arm: Arm) -> None:
        super().__init__()
        vocabulary = ByteTokenizer.vocab_size
        self.embedding = nn.Parameter(torch.randn(vocabulary, setting.hidden) * 0.5)
        width = setting.hidden // setting.heads
        frequencies = 1e4 ** -(torch.arange(0, width, 2) / width)
        angles = (torch.arange(setting.length)[:, None] * frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.layers = nn.ModuleList(Layer(setting, arm) for _ in range(setting.layers))
        self.norm = nn.Parameter(torch.ones(setting.hidden))
        self.head = nn.Parameter(torch.randn(vocabulary, setting.hidden) * 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean cross-entropy of each next token."""
        inputs = tokens[:, :-1]
        x = F.embedding(inputs, self.embedding)
        for layer in self.layers:
            x = layer(x, self.cos[: inputs.shape[1]], self.sin[: inputs.shape[1]])
        logits = F.linear(inlay.rms_norm(x, self.norm, eps=1e-6), self.head)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Run:
    """One model on its way."""

    def __init__(self, arm: Arm, setting: Setting) -> None:
        torch.manual_seed(setting.seed)
        self.arm, self.setting = arm, setting
        self.model = Decoder(setting, arm).to(setting.device)
        routers = {path: module for path, module in self.model.named_modules() if isinstance(module, TopKRouter)}
        self.paths, self.routers = list(routers), list(routers.values())
        self.monitor = inlay.RouterMonitor(self.model) if self.routers else None
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.windows: list[dict[str, Any]] = []
        self.validation = 0.0

    def step(self, number: int, tokens: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, self.setting)
        start = now(self.setting)
        loss = self.model(tokens)
        total = loss
        stats = [router.stats for router in self.routers]
        if self.arm.losses:
            balance = inlay.load_balancing_loss(stats, self.setting.top_k, per_layer=True)
            total = loss + self.setting.balance_factor * balance + self.setting.z_factor * inlay.router_z_loss(stats)
        self.optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if self.arm.bias:
            for router in self.routers:
                inlay.update_router_bias(router.balance_bias, router.stats.counts, rate=self.setting.bias_rate)
        self.losses.append(loss.item())
        self.seconds.append(now(self.setting) - start)
        if self.monitor is not None and (number + 1) % self.setting.window == 0:
            loads = [counts.float() / counts.sum() for counts in self.monitor.counts().values()]
            measures = self.monitor.scalars()
            for layer, (load, path) in enumerate(zip(loads, self.paths, strict=True)):
                row: dict[str, Any] = {"arm": self.arm.name, "step": number + 1, "layer": layer}
                row |= {f"load_{expert}": share for expert, share in enumerate(load.tolist())}
                row |= {name: measures[f"router/{path}/{name}"] for name in MEASURES}
                self.windows.append(row)

    @torch.no_grad()
    def validate(self, batches: Tensor) -> None:
        self.model.eval()
        self.validation = torch.stack([self.model(batch) for batch in batches]).mean().item()

    def totals(self) -> dict[str, Any]:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        experts = sum(parameter.numel() for parameter in self.model.parameters() if parameter.dim() == 3)
        idle = experts * (self.setting.experts - self.setting.top_k) // self.setting.experts
        return {
            "name": self.arm.name,
            "parameters": parameters,
            "active_parameters": parameters - idle,
            "validation": self.validation,
            "step_seconds": median(self.seconds[WARM_UP_STEPS:]),
        }


def learning_rate(step: int, setting: Setting) -> float:
    rise = min(1.0, (step + 1) / setting.warm_up)
    fall = 0.55 + 0.45 * torch.cos(torch.tensor(torch.pi * step / setting.steps)).item()
    return setting.learning_rate * rise * fall


def now(setting: Setting) -> float:
    """Seconds: of the processor, all threads' together, so that other work on the machine is not measured; of a GPU."""
    if setting.device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def batches(setting: Setting) -> tuple[Tensor, Tensor]:
    """[steps, batch, length + 1] for training, from the first nine tenths of the text; for validation from the rest."""
    text = torch.tensor(ByteTokenizer().encode(documentation()))
    split = len(text) * 9 // 10
    generator = torch.Generator().manual_seed(setting.seed)

    def passages(part: Tensor, count: int) -> Tensor:
        starts = torch.randint(len(part) - setting.length - 1, (count, setting.batch, 1), generator=generator)
        return part[starts + torch.arange(setting.length + 1)]

    return passages(text[:split], setting.steps), passages(text[split:], max(2, setting.steps // 15))


def study(setting: Setting) -> list[Run]:
    """All arms, trained and validated."""
    training, validation = (each.to(setting.device) for each in batches(setting))
    runs = [Run(arm, setting) for arm in arms(setting)]
    for number, tokens in enumerate(training):
        for run in runs:
            run.step(number, tokens)
        if (number + 1) % max(1, setting.steps // 10) == 0:
            losses = ", ".join(f"{run.losses[-1]:.3f} {run.arm.name}" for run in runs)
            print(f"  step {number + 1} of {setting.steps}: loss {losses}", flush=True)
    for run in runs:
        run.validate(validation)
    return runs


def save(runs: list[Run], setting: Setting, folder: Path) -> None:
    """``moe_study.json``: setting, machine and totals; a table of every step, and one of every window and layer."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "setting": asdict(setting),
        "machine": {
            "device": torch.cuda.get_device_name() if setting.device == "cuda" else inlay.info().cpu,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "arms": [run.totals() for run in runs],
    }
    (folder / "moe_study.json").write_text(json.dumps(_rounded(about), indent=2) + "\n")
    steps: list[dict[str, Any]] = [
        {"arm": run.arm.name, "step": number + 1, "loss": loss, "seconds": seconds}
        for run in runs
        for number, (loss, seconds) in enumerate(zip(run.losses, run.seconds, strict=True))
    ]
    for name, rows in (("steps", steps), ("windows", [row for run in runs for row in run.windows])):
        with (folder / f"moe_study_{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(_rounded(rows))


def _rounded(value: Any) -> Any:
    """Five digits: more would be the machine's noise."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Trains five small decoders and compares how they use their experts.")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--renormalize", action="store_true", help="weights of a token's experts add up to one")
    parser.add_argument("--quick", action="store_true", help="tiny models, a few steps")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for what is written")
    options = parser.parse_args(arguments)
    setting = replace(QUICK if options.quick else Setting(), seed=options.seed, device=options.device)
    setting = replace(setting, renormalize=options.renormalize)
    if options.steps is not None:
        setting = replace(setting, steps=options.steps)
    print(f"{len(arms(setting))} models of {setting.layers} layers, {setting.steps} steps each, on {setting.device}")
    save(study(setting), setting, options.output)
    if find_spec("matplotlib"):
        moe_report.write(options.output)
    print(f"  results: {options.output}")


if __name__ == "__main__":
    main()
