"""Every CUDA kernel of the family, for compute-sanitizer (``make sanitize``). Nothing is compared."""

from __future__ import annotations

import sys

import torch

import inlay
from tests.attention.cases import Case, gradients, random_like

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DIMS = ((32, 32), (40, 40), (64, 64), (80, 80), (96, 96), (128, 128), (160, 160), (192, 128), (192, 192), (256, 200))
FEATURES = ((), ("causal", "gate", "sinks"), ("lengths", "window"), ("ranges",), ("packed", "causal"), ("softcap",))
# Of the general kernels: widths that more and more warps share.
GENERAL_DIMS = ((24, 72), (64, 64), (128, 128), (256, 200), (512, 264))
GENERAL_FEATURES = (("mask", "causal", "gate"), ("bias", "dropout"), ("bias", "lengths", "softcap", "sinks"))
GENERAL_FEATURES += (("packed", "dropout", "window"), ("ranges", "dropout"))


def tiles(dtype: torch.dtype) -> int:
    """Hopper's, forwards and backwards."""
    count = 0
    for dim, value_dim in DIMS:
        for features in FEATURES:
            for queries, keys in ((1, 1), (150, 300), (1100, 200)):  # the last one has d64's other shape
                batch = 1 if "packed" in features else 2
                case = Case(queries, keys, batch, dim=dim, value_dim=value_dim, features=features)
                tensors = case.inputs(dtype, "cuda")
                douts = random_like(case.run(inlay, tensors))
                gradients(case, inlay, tensors, douts, deterministic=count % 2 == 0)
                if not features:  # rows that the copy engine cannot read
                    tensors["k"] = torch.nn.functional.pad(tensors["k"], (1, 0))[..., 1:]
                    case.run(inlay, tensors)
                    tensors["k"] = tensors["k"] * (torch.arange(keys, device="cuda") < keys // 2)[:, None, None]
                    case.run(inlay, {**tensors, "k": 900 * tensors["k"]})  # scores outgrow the first tile's
                count += 1
    return count


def general(dtype: torch.dtype) -> int:
    """Forwards and backwards."""
    count = 0
    for dim, value_dim in GENERAL_DIMS:
        for features in GENERAL_FEATURES:
            for queries, keys in ((1, 1), (150, 70), (40, 200)):
                batch = 1 if "packed" in features else 2
                case = Case(queries, keys, batch, dim=dim, value_dim=value_dim, features=features)
                tensors = case.inputs(dtype, "cuda")
                if "bias" in features and queries == 40:  # unaligned, and summed over queries and batch
                    tensors["bias"] = torch.nn.functional.pad(tensors["bias"][:, :, :1], (1, 0))[..., 1:]
                    tensors["q"] = torch.nn.functional.pad(tensors["q"], (1, 0))[..., 1:]
                if "mask" in features:  # tiles of which it hides everything, and nothing
                    for width, hidden in ((64, False), (32, True)):
                        tensors["mask"][..., :width] = hidden
                        gradients(case, inlay, tensors, random_like(case.run(inlay, tensors)))
                    tensors["mask"] = torch.nn.functional.pad(tensors["mask"], (3, 0))[..., 3:]
                gradients(case, inlay, tensors, random_like(case.run(inlay, tensors)))
                count += 1
    return count


def main(names: list[str]) -> None:
    """``names``: of the dtypes, all by default; one is enough where it is shared memory that is checked."""
    count = 0
    for name in names or DTYPES:
        dtype = DTYPES[name]
        if dtype != torch.float32:
            count += tiles(dtype)
        count += general(dtype)
        torch.cuda.synchronize()
        print(name, flush=True)
    print(f"{count} cases")


if __name__ == "__main__":
    main(sys.argv[1:])
