"""Every CUDA kernel of the family, forward and backward, for compute-sanitizer (``make sanitize``).

Nothing is compared. Experts: every layout, activation and option, in sizes that tiles serve and that only the general
kernels do, at the edges of tiles, with and without gradients; few tokens; choices in one block and in many. Routers:
every family's, and numbers of experts of each kernel.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

import inlay
from tests.moe.cases import MODELS, OPTIONS, Case, gradients
from tests.moe.router_cases import CASES as ROUTERS
from tests.moe.router_cases import DIFFERENTIABLE, RouterCase

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
EXPERTS = [
    *MODELS,
    *OPTIONS,
    *(replace(case, hidden=41, intermediate=23) for case in MODELS),
    *(replace(case, tokens=300, hidden=264, intermediate=136, experts=3, slots=1) for case in MODELS),
    *(
        Case(routing=routing, experts=40)
        for routing in ("one_takes_all", "half_unused", "sentinels", "nobody", "twice")
    ),
    Case(tokens=9000, hidden=8, intermediate=8, experts=300),
    Case(tokens=0),
]
FEW = [replace(case, tokens=3, experts=40, hidden=264, intermediate=72) for case in (*MODELS, *OPTIONS)]
MORE_ROUTERS = [RouterCase(experts=experts, k=2) for experts in (2, 33, 64, 128, 256, 300, 1000)]


def main(names: list[str]) -> None:
    """``names``: of the dtypes, all by default; one is enough where it is shared memory that is checked."""
    count = 0
    for name in names or DTYPES:
        dtype = DTYPES[name]
        for case in EXPERTS:
            tensors = case.inputs(dtype, "cuda")
            case.run(inlay, tensors)
            for recompute in (False, True):
                gradients(case, inlay, tensors, torch.randn_like(tensors["x"]), recompute=recompute)
            count += 3
        for case in FEW:
            case.run(inlay, case.inputs(dtype, "cuda"))
            count += 1
        for case in (*ROUTERS, *MORE_ROUTERS):
            tensors = case.inputs(dtype, "cuda")
            tensors["logits"].requires_grad_()
            results = case.run(inlay, tensors)
            sum(results[result].sum() for result in DIFFERENTIABLE).backward()
            count += 1
        torch.cuda.synchronize()
        print(name, flush=True)
    print(f"{count} calls")


if __name__ == "__main__":
    main(sys.argv[1:])
