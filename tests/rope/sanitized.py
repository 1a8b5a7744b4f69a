"""Every CUDA kernel of the family, forward and backward, for compute-sanitizer (``make sanitize``).

Nothing is compared. Shapes: every width's kernel and the general one, head counts that fill warps and that do not, both
kinds of pairs, partial rotation, tables of both forms and dtypes.
"""

from __future__ import annotations

import sys

import torch

import inlay

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHAPES = ((1, 1, 1, 1, 64), (2, 37, 5, 2, 128), (1, 300, 16, 2, 256), (2, 5, 33, 9, 512), (2, 70, 3, 1, 100))


def main(names: list[str]) -> None:
    """``names``: of the dtypes, all by default; one is enough where it is shared memory that is checked."""
    count = 0
    for name in names or DTYPES:
        dtype = DTYPES[name]
        for batch, tokens, q_heads, k_heads, width in SHAPES:
            packed = torch.randn(batch, tokens, q_heads + k_heads, width, device="cuda", dtype=dtype)
            weights = [torch.ones(width, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2)]
            wide = [weight.detach().float().requires_grad_() for weight in weights]
            for rotary in (width, width // 8 * 4):
                for angles_dtype in {dtype, torch.float32}:
                    for interleaved in (False, True):
                        for columns in (rotary, rotary // 2):
                            angles = torch.randn(tokens, columns, device="cuda").to(angles_dtype)
                            for norm, options in (
                                ((None, None), {}),
                                (weights, {}),
                                (weights, {"rounding": "once", "weight_offset": 1.0}),
                                (wide, {"rotary_rounding": "once"}),
                            ):
                                leaf = packed.detach().requires_grad_()
                                q, k = leaf.split([q_heads, k_heads], dim=2)
                                outputs = inlay.qk_norm_rope(
                                    q, k, angles, angles, *norm, rotary_dim=rotary, interleaved=interleaved, **options
                                )
                                torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
                                count += 1
        torch.cuda.synchronize()
        print(name, flush=True)
    print(f"{count} calls, forward and backward")


if __name__ == "__main__":
    main(sys.argv[1:])
