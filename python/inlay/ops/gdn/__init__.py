"""The gated delta rule of Gated DeltaNet layers, over whole sequences and token by token, and its gates.

Per sequence and value head, with a state S of [K, V] that starts from ``initial_state`` or zeros, in float32 (float64
for float64 input):

    S <- exp(g_t) S
    u  = beta_t (v_t - S^T k_t)          what the state lacks to answer v_t when asked for k_t
    S <- S + k_t u^T
    o_t = scale S^T q_t

Sequences are worked on in chunks of 64 tokens, as matrix products; only the state goes from chunk to chunk. Decays are
exponentials of differences of cumulated log decays, never ratios of exponentials, so that no gate overflows, however
strong; each chunk's triangular system is inverted by forward substitution, which keys that resemble each other do not
upset. A gate of -inf forgets everything. NaN in a gate, a key or a value makes its head's later outputs and final state
NaN, and may make earlier ones of its chunk NaN.

Value heads share key heads in groups: value head h uses key head ``h // (Hv / Hk)``.

Sources: Gated DeltaNet https://arxiv.org/abs/2412.06464, the chunked form https://arxiv.org/abs/2406.06484, and
``torch_chunk_gated_delta_rule`` and ``torch_recurrent_gated_delta_rule`` in transformers' Qwen3-Next and Qwen3.5.

Shapes: q and k [B, T, Hk, K], v [B, T, Hv, V], g and beta [B, T, Hv], states [N, Hv, K, V] with N sequences. Hv is a
multiple of Hk; K and V are multiples of 8 up to 256 and may differ. q, k and v may be strided (slices of a packed
projection are read in place); their last dimension must have stride 1. Outputs are contiguous.

Dtypes: q, k and v alike float32, bfloat16 or float16 (float64 on the CPU); g float32; beta float32 or q's; states
float32, or bfloat16 at half the memory. With float64 q everything is float64.

Raises ``TypeError`` for a non-tensor and ``ValueError`` for a wrong dtype, shape, device or stride, naming the
argument.
"""

from inlay.ops.gdn.gates import gdn_gates
from inlay.ops.gdn.layer_step import gdn_layer_step
from inlay.ops.gdn.rule import Mode, gated_delta_rule
from inlay.ops.gdn.step import MAX_STEP_TOKENS, gated_delta_step

__all__ = ["MAX_STEP_TOKENS", "Mode", "gated_delta_rule", "gated_delta_step", "gdn_gates", "gdn_layer_step"]
