"""The functions of https://github.com/Dao-AILab/causal-conv1d: ``from inlay.compat.causal_conv1d import ...``.

Tensors are [B, C, T], as in that package, with channels or tokens innermost in memory. Differences: the CPU works as
well, kernels may be 2 to 8 wide, either order in memory has final states, tokens with a negative ``seq_idx`` are
convolved like others, and a 16-bit result is rounded before the activation too, as eager Hugging Face code rounds it.
See :mod:`inlay.ops.conv` for the maths, dtypes and errors.
"""

from __future__ import annotations

from torch import Tensor

from inlay.ops._packing import sequence_offsets
from inlay.ops.conv import causal_conv1d, causal_conv1d_step

_ACTIVATIONS = {None: None, "silu": "silu", "swish": "silu"}


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution of whole sequences, differentiable.

    Args:
        x: [B, C, T].
        weight: [C, W].
        bias: [C] or None.
        seq_idx: [B, T] or None, an integer a token: a sequence starts wherever it differs from the token before.
        initial_states: [B, C, W - 1] or None; not together with ``seq_idx``.
        return_final_states: whether to return the states after the sequences; not together with ``seq_idx``.
        final_states_out: [B, C, W - 1] or None: written to, and returned as the final states.
        activation: None, ``"silu"`` or ``"swish"``, which are the same.

    Returns:
        [B, C, T], and with ``return_final_states`` the tuple of that and the final states [B, C, W - 1].

    Raises:
        NotImplementedError: for an activation not named above, and for ``initial_states`` or ``return_final_states``
            together with ``seq_idx``.
    """
    tokens, cu_seqlens = x.transpose(1, 2), None
    if seq_idx is not None:
        if initial_states is not None:
            raise NotImplementedError("causal_conv1d_fn: initial_states must be None with seq_idx")
        if return_final_states:
            raise NotImplementedError("causal_conv1d_fn: return_final_states must be False with seq_idx")
        if seq_idx.shape != (x.shape[0], x.shape[2]):
            raise ValueError(
                f"causal_conv1d_fn: seq_idx must have shape [{x.shape[0]}, {x.shape[2]}], got {list(seq_idx.shape)}"
            )
        tokens, cu_seqlens = tokens.reshape(1, -1, x.shape[1]), sequence_offsets(seq_idx)
    results = causal_conv1d(
        tokens,
        weight,
        bias,
        activation=_activation("causal_conv1d_fn", activation),
        initial_state=initial_states,
        return_final_state=return_final_states,
        cu_seqlens=cu_seqlens,
    )
    if isinstance(results, Tensor):
        return results.view(x.shape[0], x.shape[2], x.shape[1]).transpose(1, 2)
    y, final_states = results
    return y.transpose(1, 2), final_states if final_states_out is None else final_states_out.copy_(final_states)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The next tokens of sequences that go on. **Updates ``conv_state`` in place.**

    Args:
        x: [B, C] or [B, C, T].
        conv_state: [B, C, L], L at least W - 1, the newest input in the last column.
        weight: [C, W].
        bias: [C] or None.
        activation: None, ``"silu"`` or ``"swish"``, which are the same.
        cache_seqlens: must be None.
        conv_state_indices: [B] or None: row b's state is ``conv_state[conv_state_indices[b]]``; a negative index marks
            padding, whose result is zero.

    Returns:
        x's shape.

    Raises:
        NotImplementedError: for an activation not named above, and for ``cache_seqlens``, which would make the state a
            circular buffer.
    """
    if cache_seqlens is not None:
        raise NotImplementedError("causal_conv1d_update: cache_seqlens must be None: no circular states")
    y = causal_conv1d_step(
        x.transpose(1, 2) if x.dim() == 3 else x,
        conv_state,
        weight,
        bias,
        activation=_activation("causal_conv1d_update", activation),
        state_indices=conv_state_indices,
    )
    return y.transpose(1, 2) if x.dim() == 3 else y


def _activation(op: str, activation: str | None) -> str | None:
    if activation not in _ACTIVATIONS:
        raise NotImplementedError(f"{op}: activation must be None, 'silu' or 'swish', got {activation!r}")
    return _ACTIVATIONS[activation]
