"""Every CUDA kernel of the family, forward and backward, for compute-sanitizer (``make sanitize``).

Nothing is compared. Shapes: both memory orders, every width, channels and tokens that fill their tiles and that do not,
packed sequences.
"""

from __future__ import annotations

import sys

import torch

import inlay

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHAPES = ((2, 1, 8), (2, 70, 64), (1, 300, 200), (1, 1000, 13), (3, 257, 1024))  # B, T, C


def main(names: list[str]) -> None:
    """``names``: of the dtypes, all by default; one is enough where it is shared memory that is checked."""
    count = 0
    for name in names or DTYPES:
        dtype = DTYPES[name]
        for batch, tokens, channels in SHAPES:
            for width in range(2, 9):
                weight, bias = (torch.randn(channels, *w, device="cuda", dtype=dtype) for w in ((width,), ()))
                state = torch.randn(batch, channels, width - 1, device="cuda", dtype=dtype)
                rows = torch.randn(batch, tokens, channels, device="cuda", dtype=dtype)
                offsets = torch.tensor([0, tokens // 3, tokens // 3, tokens], device="cuda")
                for x in (rows, rows.transpose(1, 2).contiguous().transpose(1, 2), rows[:, :, : channels - 1]):
                    leaves = [t.detach().requires_grad_() for t in (x, weight[: x.shape[2]], bias[: x.shape[2]])]
                    start = state[:, : x.shape[2]].detach().requires_grad_()
                    y, final = inlay.causal_conv1d(
                        *leaves, activation="silu", initial_state=start, return_final_state=True
                    )
                    torch.autograd.backward([y, final], [torch.ones_like(y), torch.ones_like(final)])
                    if batch == 1:
                        inlay.causal_conv1d(*leaves, cu_seqlens=offsets).sum().backward()
                    with torch.no_grad():
                        inlay.causal_conv1d_step(x[:, :4], start, *leaves[1:], activation="silu")
                        columns = torch.zeros(batch, x.shape[2], max(4, width), device="cuda", dtype=dtype)
                        inlay.causal_conv1d_step(x[:, :4], columns, *leaves[1:], activation="silu")
                    count += 1
        torch.cuda.synchronize()
        print(name, flush=True)
    print(f"{count} calls, forward and backward")


if __name__ == "__main__":
    main(sys.argv[1:])
