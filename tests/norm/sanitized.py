"""Every CUDA kernel of the family, forward and backward, for compute-sanitizer (``make sanitize``).

Under it the tests themselves would take hours, most of them in the references; here nothing is compared. Widths: one
for each row of the shape tables, rows that do not fill their threads, odd ones. Rows: enough for several turns of a
resident grid.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

import inlay

WIDTHS = (7, 64, 128, 200, 256, 512, 1000, 1024, 2048, 3072, 4096, 5120, 8192, 16384, 32768, 70001)
ELEMENTS = 3 * 10**6
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def calls(width: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    rows = min(20000, ELEMENTS // width) | 1

    def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)

    x, other, weight, bias = leaf(rows, width), leaf(rows, width), leaf(width), leaf(width)
    wide = leaf(width, dtype=torch.float32)
    strided = torch.randn(rows, 2 * width, device="cuda", dtype=dtype)[:, :width]
    return {
        "rms": lambda: inlay.rms_norm(x, weight, rounding="stepwise"),
        "rms with a float32 weight": lambda: inlay.rms_norm(x, wide, weight_offset=1.0),
        "rms of strided rows": lambda: inlay.rms_norm(strided, weight, bias),
        "layer": lambda: inlay.layer_norm(x, weight, bias),
        "add": lambda: inlay.add_rms_norm(x, other, weight),
        "add to a float32 residual": lambda: inlay.add_rms_norm(x, other, weight, residual_dtype=torch.float32),
        "gate after": lambda: inlay.gated_rms_norm(x, other, weight),
        "gate before": lambda: inlay.gated_rms_norm(x, other, weight, bias, norm_before_gate=False),
        "one row": lambda: inlay.add_rms_norm(x[:1], other[:1], weight),
    }


def main(names: list[str]) -> None:
    """``names``: of the dtypes, all by default; one is enough where it is shared memory that is checked."""
    count = 0
    for width in WIDTHS:
        for name in names or DTYPES:
            for call in calls(width, DTYPES[name]).values():
                results = call()
                outputs = results if isinstance(results, tuple) else (results,)
                torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
                count += 1
        torch.cuda.synchronize()
        print(f"width {width}", flush=True)
    print(f"{count} calls, forward and backward")


if __name__ == "__main__":
    main(sys.argv[1:])
