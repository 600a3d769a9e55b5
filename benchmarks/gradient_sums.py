"""What a sum of micro-batches' gradients loses when it runs in bf16: the error that no communication adds to.

    python -c "from benchmarks.gradient_sums import main; main()"

Normal gradients of 1M entries, each rounded to bf16, added one after the other; root mean square of the error over that of the exact
sum.
"""

from __future__ import annotations

import torch


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    print("| micro-batches | summed in bf16 | summed in fp32, rounded once |")
    print("|---|---|---|")
    for count in (8, 32, 128):
        exact = torch.zeros(1_000_000, dtype=torch.float64)
        running, wide = torch.zeros(1_000_000, dtype=torch.bfloat16), torch.zeros(1_000_000)
        for _ in range(count):
            gradient = torch.randn(1_000_000, generator=generator).bfloat16()
            exact += gradient.double()
            running += gradient
            wide += gradient.float()
        errors = [float((total.double() - exact).norm() / exact.norm()) for total in (running, wide.bfloat16())]
        print(f"| {count} | {errors[0]:.2%} | {errors[1]:.2%} |")
