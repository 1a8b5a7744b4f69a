"""Every CUDA kernel of the family, for compute-sanitizer (``make sanitize``). Nothing is compared.

Shapes: head dimensions that fill their tiles and that do not, aligned and not, packed sequences, states of both dtypes.
"""

from __future__ import annotations

import dataclasses
import sys

import torch

import inlay
from tests.gdn.layer_cases import CASES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HEADS = ((8, 8), (64, 64), (96, 72), (128, 128), (256, 200))  # K, V


def main(names: list[str]) -> None:
    """``names``: of the dtypes, all by default; one is enough where it is shared memory that is checked."""
    count = 0
    for name in names or DTYPES:
        dtype = DTYPES[name]
        for key_dim, value_dim in HEADS:
            for tokens in (1, 20, 150):
                for shift in (0, 1):  # of all rows, out of alignment
                    sizes = ((2, key_dim), (2, key_dim), (4, value_dim), (4,), (4,))
                    q, k, v, a, b = (
                        torch.randn(1, tokens, *size[:-1], size[-1] + shift, device="cuda").to(dtype)[..., shift:]
                        for size in sizes
                    )
                    vectors = torch.randn(2, 4, device="cuda").requires_grad_().unbind()
                    g, beta = inlay.gdn_gates(a.detach().requires_grad_(), b, *vectors)
                    torch.autograd.backward([g, beta], [torch.ones_like(g), torch.ones_like(beta)])
                    g, beta = g.detach(), beta.detach()
                    offsets = torch.tensor([0, tokens // 2, tokens // 2, tokens], device="cuda")
                    for state_dtype in (torch.float32, torch.bfloat16):
                        state = torch.randn(1, 4, key_dim, value_dim, device="cuda").to(state_dtype)
                        states = torch.randn(3, 4, key_dim, value_dim, device="cuda").to(state_dtype)
                        inlay.gated_delta_rule(q, k, v, g, beta, l2norm_qk=True)
                        inlay.gated_delta_rule(
                            q, k, v, g, beta, initial_state=states, cu_seqlens=offsets, output_final_state=True
                        )
                        if dtype != torch.float32:  # else it is eager code
                            gradients(q, k, v, g, beta, states, offsets)
                        every = state.new_empty(1, min(tokens, 16), 4, key_dim, value_dim)
                        inlay.gated_delta_step(
                            q[:, :16], k[:, :16], v[:, :16], g[:, :16], beta[:, :16], state, states_out=every
                        )
                        count += 1
        count += layer_steps(dtype)
        torch.cuda.synchronize()
        print(name, flush=True)
    print(f"{count} calls")


def gradients(*inputs: torch.Tensor) -> None:
    *leaves, offsets = inputs
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    o, final_state = inlay.gated_delta_rule(
        *leaves[:5], initial_state=leaves[5], cu_seqlens=offsets, output_final_state=True, l2norm_qk=True
    )
    torch.autograd.backward([o, final_state], [torch.randn_like(o), torch.randn_like(final_state)])


def layer_steps(dtype: torch.dtype) -> int:
    for case in CASES:
        for tokens in (1, 16):
            for state_dtype in (torch.float32, torch.bfloat16):
                own = dataclasses.replace(case, tokens=tokens)
                tensors = own.inputs(dtype, "cuda", state_dtype)
                state = tensors["state"]
                every = state.new_empty(state.shape[0], tokens, *state.shape[1:])
                for states_out in (None, every):
                    own.run(inlay, tensors, states_out=states_out)
    for batch in (1, 100):  # few heads and many, whose tiles differ
        q, k, v = (torch.randn(batch, 3, 4, 128, device="cuda").to(dtype) for _ in range(3))
        g, beta = (torch.zeros(batch, 3, 4, device="cuda") for _ in range(2))
        inlay.gated_delta_step(q, k, v, g, beta, torch.randn(batch, 4, 128, 128, device="cuda"), l2norm_qk=True)
    return 8 * len(CASES) + 2


if __name__ == "__main__":
    main(sys.argv[1:])
