"""Causal convolution over time, each channel by itself ("depthwise"), as in front of linear attention and Mamba.

For a sequence ``x`` of T tokens, channel c and W weights, in float32 (float64 for float64 input):

    z[t, c] = sum over k of weight[c, k] * x[t - (W - 1) + k, c] + bias[c]
    y[t, c] = z[t, c]  or  silu(z[t, c]) = z[t, c] / (1 + exp(-z[t, c]))

so that ``weight[:, W - 1]`` meets the token itself. The W - 1 inputs before the first token are the initial state, or
zeros. Where there is an activation, z is first rounded to the dtype that x and the weight promote to: the rounding of
``F.conv1d`` followed by ``F.silu``, which is what eager Hugging Face code runs.

**States** are [..., C, columns], one column a token, the last column the newest. A final state is what the next call
takes as its initial state: the last W - 1 inputs, the initial state counted in.

**Layouts.** x is [B, T, C], and either its channels lie side by side in memory (stride 1 in the last dimension) or its
tokens do (stride 1 in the one before it: ``x.transpose(1, 2)`` of a contiguous [B, C, T]). Both are read in place, with
any strides elsewhere. y and x's gradient are dense in the same order.

**Packed sequences.** ``cu_seqlens`` [N + 1] marks off N sequences in the only batch row: sequence n is tokens
``cu_seqlens[n]`` to ``cu_seqlens[n + 1] - 1``. It starts at 0, does not decrease, and ends at T; a sequence may be
empty. Values are checked on the CPU alone: elsewhere that would wait for the device, and wrong ones give wrong results
from within the tensors. Results equal those of separate calls bit for bit, but for the gradients of weight and bias,
which are sums over all tokens.

Sources: the function ``causal_conv1d_fn`` of ``transformers.models.qwen3_next.modeling_qwen3_next``, the package
https://github.com/Dao-AILab/causal-conv1d, Mamba https://arxiv.org/abs/2312.00752.

Dtypes: float32, bfloat16, float16 on CPU and CUDA, float64 on the CPU. The weight and the bias may be of any of these
dtypes (float64 goes with float64 alone), the states are of x's.

Raises ``TypeError`` for a non-tensor and ``ValueError`` for a wrong dtype, shape, device or stride, naming the
argument.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from inlay import _load
from inlay.ops import _checks as checks
from inlay.ops._autograd import Function, changed_in_place


class Activation(IntEnum):
    """Mirrors ``inlay::conv::Activation`` in csrc/conv/params.h."""

    NONE = 0
    SILU = 1


# Plain integers: torch takes 3 us longer to convert the members of an enum.
_ACTIVATION: dict[str | None, int] = {None: int(Activation.NONE), "silu": int(Activation.SILU)}
MIN_WIDTH, MAX_WIDTH = 2, 8  # as in csrc/conv/params.h

_ops = _load.namespace()
_conv = _ops.causal_conv1d.default
_conv_bwd = _ops.causal_conv1d_bwd.default
_conv_step = _ops.causal_conv1d_step.default


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution of whole sequences.

    Args:
        x: [B, T, C], see "Layouts" in the module's docstring.
        weight: [C, W] or, as ``nn.Conv1d`` has it, [C, 1, W]; contiguous; W from 2 to 8.
        bias: [C] or None.
        activation: None or ``"silu"``.
        initial_state: [N, C, W - 1] of any strides, in x's dtype: the inputs before each sequence, oldest first; None
            is zeros. N is the number of sequences, B without ``cu_seqlens``.
        return_final_state: whether to return the state after each sequence as well.
        cu_seqlens: [N + 1], int32 or int64, on x's device: sequences packed into one batch row, B = 1.

    Returns:
        y: [B, T, C] in x's dtype and order in memory. With ``return_final_state`` the tuple of y and the final state,
        [N, C, W - 1], contiguous, in x's dtype.

    Differentiable in x, weight, bias and initial_state, through y and through the final state.
    """
    try:
        arguments = (x, weight, bias, initial_state, cu_seqlens, _ACTIVATION[activation], return_final_state)
        needs_grad = checks.needs_grad(x, weight, bias, initial_state)
        results = _CausalConv1d.apply(*arguments) if needs_grad else _conv(*arguments)
    except Exception:
        _check_convolution("causal_conv1d", x, weight, bias, activation)
        _check_sequences("causal_conv1d", x, weight, initial_state, cu_seqlens)
        raise
    return results if return_final_state else results[0]


def causal_conv1d_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """The next token, or the next few, of sequences that go on: decoding. **Updates ``state`` in place.**

    The same bits as :func:`causal_conv1d` over the whole sequences gives for these tokens.

    Args:
        x: [B, T, C] with a small T, or [B, C]; of any strides.
        state: [B, C, L], L at least W - 1, of any strides, in x's dtype: the last L inputs, oldest first. Caches of
            transformers hold L = W columns, final states of :func:`causal_conv1d` W - 1. The tokens of x are shifted
            in from the right.
        weight: [C, W] or [C, 1, W]; contiguous; W from 2 to 8.
        bias: [C] or None.
        activation: None or ``"silu"``.
        state_indices: [B], int32 or int64, on x's device: row b's state is ``state[state_indices[b]]``, and state may
            have any number of rows. No index may occur twice. An index outside of the state marks a row of padding:
            its y is zero.

    Returns:
        x's shape, contiguous, in x's dtype.

    Not differentiable: raises ``RuntimeError`` where gradients would be recorded.
    """
    try:
        if checks.needs_grad(x, weight, bias, state):
            raise RuntimeError(
                "causal_conv1d_step: x, state, weight and bias must not require gradients, which it does not compute;"
                " call it under torch.no_grad(), or use causal_conv1d"
            )
        y = _conv_step(x, state, weight, bias, state_indices, _ACTIVATION[activation])
    except Exception:
        _check_convolution("causal_conv1d_step", x, weight, bias, activation, step=True)
        _check_state("causal_conv1d_step", x, state, weight, state_indices)
        raise
    changed_in_place(state)
    return y


class _CausalConv1d(Function):
    """Saves the inputs alone; the preactivation is computed anew in the backward."""

    @staticmethod
    def forward(x, weight, bias, initial_state, cu_seqlens, activation, wants_final_state):  # type: ignore[override]
        return _conv(x, weight, bias, initial_state, cu_seqlens, activation, wants_final_state)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, initial_state, cu_seqlens, activation, wants_final_state = inputs
        ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)
        ctx.set_materialize_grads(False)
        if not wants_final_state:
            ctx.mark_non_differentiable(output[1])
        ctx.constants = activation, wants_final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None):  # type: ignore[override]
        x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
        activation, wants_final_state = ctx.constants
        _, needs_weight, needs_bias, needs_state, *_ = ctx.needs_input_grad
        if not wants_final_state:  # compiled code hands over zeros for it
            dfinal_state = None
        if dy is None and dfinal_state is None:
            return (None,) * 7
        dy = _zeros_like(x) if dy is None else _in_order_of(x, dy)
        dx, dweight, dbias, dinitial_state = _conv_bwd(
            dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, activation, needs_weight, needs_bias,
            needs_state,
        )  # fmt: skip
        return (
            dx,
            dweight if needs_weight else None,
            dbias if needs_bias else None,
            dinitial_state if needs_state else None,
            None,
            None,
            None,
        )


def _has_dense_channels(x: Tensor) -> bool:
    return x.shape[2] <= 1 or x.stride(2) == 1


def _has_dense_tokens(x: Tensor) -> bool:
    return x.shape[1] <= 1 or x.stride(1) == 1 or x.numel() == 0


def _empty_like(x: Tensor) -> Tensor:
    """Dense, with channels or tokens innermost as x has them."""
    if _has_dense_channels(x):
        return x.new_empty(x.shape)
    batch, time, channels = x.shape
    return x.new_empty((batch, channels, time)).transpose(1, 2)


def _zeros_like(x: Tensor) -> Tensor:
    return _empty_like(x).zero_()


def _in_order_of(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient itself if it lies in memory as x does: autograd hands over any strides."""
    has_order = _has_dense_channels(gradient) if _has_dense_channels(x) else _has_dense_tokens(gradient)
    return gradient if has_order else _empty_like(x).copy_(gradient)


def _check_convolution(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, step: bool = False
) -> None:
    checks.supported(op, "x", x)
    shapes = "[B, T, C] or [B, C]" if step else "[B, T, C]"
    if x.dim() != 3 and not (step and x.dim() == 2):
        raise ValueError(f"{op}: x must have shape {shapes}, got {list(x.shape)}")
    if not step and not _has_dense_channels(x) and not _has_dense_tokens(x):
        raise ValueError(
            f"{op}: x must have stride 1 in its last dimension or in the one before it, got strides"
            f" {list(x.stride())}; call .contiguous() first"
        )
    if not isinstance(weight, Tensor):
        raise TypeError(f"{op}: weight must be a Tensor, got {type(weight).__name__}")
    channels = x.shape[-1]
    if tuple(weight.shape[:-1]) not in ((channels,), (channels, 1)):
        raise ValueError(
            f"{op}: weight must have shape [{channels}, W] or [{channels}, 1, W] (x's channels), got"
            f" {list(weight.shape)}"
        )
    if not MIN_WIDTH <= weight.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"{op}: weight must be {MIN_WIDTH} to {MAX_WIDTH} wide, got {weight.shape[-1]}")
    checks.parameter(op, "weight", weight, x)
    if not weight.is_contiguous():
        raise ValueError(f"{op}: weight must be contiguous, got strides {list(weight.stride())}")
    checks.vector(op, "bias", bias, x)
    checks.choice(op, "activation", activation, _ACTIVATION)


def _check_sequences(
    op: str, x: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    sequences = x.shape[0]
    if cu_seqlens is not None:
        checks.offsets(op, "cu_seqlens", cu_seqlens, x)
        sequences = cu_seqlens.shape[0] - 1
        if sequences < 1:
            raise ValueError(f"{op}: cu_seqlens must have at least 2 elements, got {sequences + 1}")
    if initial_state is not None:
        shape = [sequences, x.shape[2], weight.shape[-1] - 1]
        fits = isinstance(initial_state, Tensor) and list(initial_state.shape) == shape
        _check_state_tensor(op, "initial_state", initial_state, x, fits, shape)


def _check_state(op: str, x: Tensor, state: Tensor, weight: Tensor, state_indices: Tensor | None) -> None:
    channels, columns = x.shape[-1], weight.shape[-1] - 1
    shape = f"[B, {channels}, L] with L at least {columns}"
    fits = isinstance(state, Tensor) and state.dim() == 3 and state.shape[1] == channels and state.shape[2] >= columns
    _check_state_tensor(op, "state", state, x, fits, shape)
    checks.indices(op, "state_indices", state_indices, x)
    if state_indices is None and state.shape[0] != x.shape[0]:
        raise ValueError(f"{op}: state must have x's batch size {x.shape[0]}, got {state.shape[0]}")
    if state_indices is not None and state_indices.shape[0] != x.shape[0]:
        raise ValueError(
            f"{op}: state_indices must have shape [{x.shape[0]}] (x's batch size), got {list(state_indices.shape)}"
        )


def _check_state_tensor(op: str, argument: str, state: Tensor, x: Tensor, fits: bool, shape: object) -> None:
    if not isinstance(state, Tensor):
        raise TypeError(f"{op}: {argument} must be a Tensor, got {type(state).__name__}")
    if not fits:
        raise ValueError(f"{op}: {argument} must have shape {shape}, got {list(state.shape)}")
    if state.dtype != x.dtype:
        raise ValueError(f"{op}: {argument} must be {checks.names((x.dtype,))} as x is, got {state.dtype}")
    if state.device != x.device:
        raise ValueError(f"{op}: {argument} must be on x's device {x.device}, got {state.device}")


@torch.library.register_fake("inlay::causal_conv1d")
def _(x, weight, bias, initial_state, cu_seqlens, activation, wants_final_state):
    checks.same_device(x, weight, bias, initial_state, cu_seqlens)
    if not wants_final_state:
        return _empty_like(x), x.new_empty((0,))
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return _empty_like(x), x.new_empty((sequences, x.shape[2], weight.shape[-1] - 1))


@torch.library.register_fake("inlay::causal_conv1d_bwd")
def _(
    dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, activation, needs_dweight, needs_dbias,
    needs_dinitial_state,
):  # fmt: skip
    checks.same_device(x, dy, dfinal_state, weight, bias, initial_state, cu_seqlens)
    dweight = weight.new_empty(weight.shape if needs_dweight else (0,))
    dbias = (x if bias is None else bias).new_empty(bias.shape if needs_dbias else (0,))
    dinitial_state = x.new_empty(initial_state.shape if needs_dinitial_state else (0,))
    return _empty_like(x), dweight, dbias, dinitial_state


@torch.library.register_fake("inlay::causal_conv1d_step")
def _(x, state, weight, bias, state_indices, activation):
    checks.same_device(x, state, weight, bias, state_indices)
    return x.new_empty(x.shape)
