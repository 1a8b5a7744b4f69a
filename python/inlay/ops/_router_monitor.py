"""How well a router uses its experts: measures of its statistics, and a monitor that gathers them as a model runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from inlay.ops.moe import moe_router
from inlay.reference.moe import RouterStats

_DEAD_SHARE = 0.1  # of the mean load: an expert with less does hardly anything


@torch.no_grad()
def router_stats(stats: RouterStats) -> dict[str, Tensor]:
    """Measures of balance and specialisation. Scalars on the statistics' device: nothing waits for it.

    With p a token's probabilities, l an expert's load (how often it was chosen, by the number of choices), H an entropy
    divided by log E, so that it is from 0 to 1:

    - ``max_vio``: largest load over the mean load, less one (https://arxiv.org/abs/2408.15664); ``min_load`` and
      ``cv``: the smallest over the mean, and the standard deviation over the mean.
    - ``dead``: the share of experts with less than a tenth of the mean load.
    - ``entropy``: mean of H(p), how undecided tokens are; ``entropy_of_mean``: H(mean p), how even use is; ``gap``: the
      second less the first, the information that a token gives about its expert. Collapse has both low, and a router
      that says nothing both high.
    - ``effective_experts``: exp of the entropy of l, from 1 to E.
    - ``margin``: mean distance of a choice from another; ``max_logit``: the largest magnitude; ``z``: the mean squared
      logsumexp.
    """
    counts = stats.counts.to(stats.mean_probabilities.dtype)
    experts = counts.shape[0]
    load = counts / counts.sum().clamp(min=1)
    log_experts = torch.log(torch.tensor(float(max(experts, 2)), dtype=load.dtype, device=load.device))
    entropy = stats.entropy.mean() / log_experts
    entropy_of_mean = torch.special.entr(stats.mean_probabilities).sum() / log_experts
    return {
        "max_vio": load.max() * experts - 1,
        "min_load": load.min() * experts,
        "cv": (load * experts).std(unbiased=False),
        "dead": (load * experts < _DEAD_SHARE).to(load.dtype).mean(),
        "entropy": entropy,
        "entropy_of_mean": entropy_of_mean,
        "gap": entropy_of_mean - entropy,
        "effective_experts": torch.exp(torch.special.entr(load).sum()),
        "margin": stats.margin.mean(),
        "max_logit": stats.max_logit.max(),
        "z": stats.logsumexp.square().mean(),
    }


class RouterMonitor:
    """Gathers the statistics of every router of a transformers model, and gives them as scalars.

    ``monitor = RouterMonitor(model)`` puts a hook on each router: a module that returns logits, weights and indices,
    in this order. What it gathers stays on the routers' device until :meth:`scalars` is called, which describes the
    window since it was last called; an expert is dead if it was hardly used in all of that. Only training passes
    count, unless ``evaluating``; passes that activation checkpointing repeats do not.

    ``Trainer(..., callbacks=[monitor.callback()])`` adds the scalars to what the Trainer logs.
    """

    def __init__(self, model: nn.Module, evaluating: bool = False) -> None:
        self.evaluating = evaluating
        self._windows = {name: _Window() for name, _ in _routers(model)}
        self._hooks = [module.register_forward_hook(self._hook(name)) for name, module in _routers(model)]
        if not self._hooks:
            raise ValueError("RouterMonitor: model must have routers, of a class called ...Router, got none")

    def scalars(self) -> dict[str, float]:
        """By "router/<module's name>/<measure>", of the window that ends now, and "router/mean/<measure>"."""
        result: dict[str, float] = {}
        sums: dict[str, list[float]] = {}
        for name, window in self._windows.items():
            stats = window.take()
            for measure, value in {} if stats is None else router_stats(stats).items():
                result[f"router/{name}/{measure}"] = value.item()
                sums.setdefault(measure, []).append(value.item())
        return result | {f"router/mean/{measure}": sum(values) / len(values) for measure, values in sums.items()}

    def counts(self) -> dict[str, Tensor]:
        """By module name, how often each expert was chosen in the window: for :func:`inlay.update_router_bias`."""
        return {name: window.counts for name, window in self._windows.items() if window.counts is not None}

    def remove(self) -> None:
        """Takes the hooks off again."""
        for hook in self._hooks:
            hook.remove()

    def callback(self) -> Any:
        """A ``transformers.TrainerCallback``."""
        from transformers import TrainerCallback

        monitor = self

        class _Callback(TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any) -> None:
                if logs is not None:
                    logs.update(monitor.scalars())

        return _Callback()

    def _hook(self, name: str) -> Any:
        window = self._windows[name]

        def gather(module: nn.Module, _inputs: tuple, output: Any) -> None:
            if not (module.training or self.evaluating) or torch.compiler.is_compiling() or _in_backward():
                return
            if isinstance(output, tuple) and len(output) == 3 and not output[2].is_floating_point():
                window.add(_statistics(module, output[0].detach(), output[2]))

        return gather


class _Window:
    """Sums over the passes of a window."""

    def __init__(self) -> None:
        self.counts: Tensor | None = None
        self._clear()

    def _clear(self) -> None:
        self.counts = None
        self._tokens = 0
        self._probabilities: Any = 0.0
        self._sums: Any = 0.0  # entropy, margin, squared logsumexp
        self._max_logit: Any = 0.0

    @torch.no_grad()
    def add(self, stats: RouterStats) -> None:
        tokens = stats.entropy.shape[0]
        if tokens == 0:
            return
        self.counts = stats.counts if self.counts is None else self.counts + stats.counts
        self._probabilities = self._probabilities + stats.mean_probabilities * tokens
        # A router that may choose every expert has no margin.
        margin = torch.where(stats.margin.isfinite(), stats.margin, 0.0)
        self._sums = self._sums + torch.stack([stats.entropy.sum(), margin.sum(), stats.logsumexp.square().sum()])
        largest = stats.max_logit.max()
        self._max_logit = largest if self._tokens == 0 else torch.maximum(self._max_logit, largest)
        self._tokens += tokens

    def take(self) -> RouterStats | None:
        """The window as if it had been one token with its means; a new one starts."""
        if self.counts is None:
            return None
        entropy, margin, z = (self._sums / self._tokens)[:, None].unbind(0)
        stats = RouterStats(
            self.counts, self._probabilities / self._tokens, z.sqrt(), entropy, margin, self._max_logit[None]
        )
        self._clear()
        return stats


def _routers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if type(module).__name__.lower().endswith("router") and hasattr(module, "top_k"):
            yield name, module


def _statistics(module: nn.Module, logits: Tensor, indices: Tensor) -> RouterStats:
    bias = getattr(module, "e_score_correction_bias", None)
    logits, indices = logits.reshape(-1, logits.shape[-1]), indices.reshape(-1, indices.shape[-1])
    if bias is not None and bias.dtype != logits.dtype:
        bias = bias.float()
    scoring = "softmax" if bias is None else "sigmoid"
    _, _, stats = moe_router(  # type: ignore[misc]
        logits, indices.shape[-1], scoring=scoring, bias=bias, forced_indices=indices, stats=True
    )
    return stats


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
