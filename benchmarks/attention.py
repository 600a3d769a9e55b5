"""Attention alone, forward and backward: every backend of PyTorch that the device takes, in turns, and the one that PyTorch chooses.

    python -m benchmarks.attention [--models llama_350m llama_1b] [--lengths 512 2048] [--tokens 8192] [--repeats 20] [--rounds 5]
                                   [--json FILE] [--markdown FILE]

bf16, causal, without another mask; queries, keys and values lie in memory as transformers' LLaMA has them. In its turn a way goes
forward and backward ``--repeats`` times; what is told is the time of one of these.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from benchmarks import rounds
from benchmarks.gpu_steps import wait
from relora_ds.models.build import PRESETS

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
CHOSEN = "PyTorch's choice"
OPERATOR = "aten::_scaled_dot_product_"


@dataclass(frozen=True)
class Shape:
    """Of queries, keys and values alike.

    Attributes:
        model: whose heads they are.
        batch, heads, length, width: sequences, heads, tokens of a sequence, numbers of a head.
    """

    model: str
    batch: int
    heads: int
    length: int
    width: int


def shapes(models: Sequence[str], lengths: Sequence[int], tokens: int) -> list[Shape]:
    """Every model at every length, in batches of ``tokens``."""
    found = []
    for model in models:
        hidden, _, heads, *_ = PRESETS[model]
        found += [Shape(model, tokens // length, heads, length, hidden // heads) for length in lengths]
    return found


def tensors(shape: Shape, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values, and the gradient of the result: each (batch, heads, length, width), a token's heads in one row."""
    generator = torch.Generator(device).manual_seed(0)
    size = (shape.batch, shape.length, shape.heads, shape.width)
    *given, gradient = (torch.randn(size, device=device, generator=generator).bfloat16().transpose(1, 2) for _ in range(4))
    return [one.requires_grad_() for one in given], gradient


def way(given: Sequence[Tensor], gradient: Tensor, repeats: int, backend: SDPBackend | None) -> Callable[[int], None]:
    """Goes forward and backward ``repeats`` times; without a backend by the one that PyTorch chooses."""

    def work(_number: int = 0) -> None:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            for _ in range(repeats):
                torch.autograd.grad(scaled_dot_product_attention(*given, is_causal=True), given, gradient)

    return work


def refusal(work: Callable[[], object], device: torch.device) -> str | None:
    """Why the device does not do it; None where it does."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            work()
            wait(device)
        except RuntimeError as error:
            reasons = [str(error), *(str(one.message) for one in said)]
            return "; ".join(reason.splitlines()[0].partition(" (Triggered internally")[0] for reason in reasons)
    return None


def operator_of(names: Iterable[str]) -> str:
    """Which of the operators of a profile has done the attention, forward."""
    return next(
        (name.removeprefix("aten::") for name in names if name.startswith(OPERATOR) and "backward" not in name), "unknown"
    )


def operator(work: Callable[[], object]) -> str:
    """The operator that does it, as the profiler sees it."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    return operator_of(event.name for event in seen.events())


def compare(shape: Shape, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Times every backend on one shape; everything that is reported."""
    given, gradient = tensors(shape, device)
    ways = {name: way(given, gradient, options.repeats, backend) for name, backend in {CHOSEN: None, **BACKENDS}.items()}
    problems = {name: refusal(work, device) for name, work in ways.items()}
    taken = {name: work for name, work in ways.items() if problems[name] is None}
    times = rounds.in_turns(taken, options.rounds, warm_up=options.warm_up, settle=partial(wait, device))
    found = {}
    for name, work in taken.items():
        ms = [1e3 * seconds / options.repeats for seconds in times.seconds[name]]
        found[name] = {
            "operator": operator(work), "ms": ms, **asdict(rounds.Spread.of(ms)), "as_fast": asdict(times.as_fast(name, CHOSEN)),
        }  # fmt: skip
    return {**asdict(shape), "ways": found, "refused": {name: problem for name, problem in problems.items() if problem}}


def rows(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A table of what was measured and of what was refused."""
    table = [["heads", "backend", "ms: least", "quartiles", "most", f"times as fast as {CHOSEN}", "operator"]]
    for one in found:
        heads = f"{one['model']}: {one['batch']} x {one['heads']} x {one['length']} x {one['width']}"
        for name, own in one["ways"].items():
            fast, quartiles = own["as_fast"], ", ".join(f"{own[key]:.3f}" for key in ("lower", "median", "upper"))
            spread = f"{fast['median']:.2f} ({fast['lower']:.2f} to {fast['upper']:.2f})"
            table.append([heads, name, f"{own['least']:.3f}", quartiles, f"{own['most']:.3f}", spread, own["operator"]])
        table += [[heads, name, "", "", "", "", f"not taken: {problem}"] for name, problem in one["refused"].items()]
    return table


def measure(options: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = [compare(shape, options, device) for shape in shapes(options.models, options.lengths, options.tokens)]
    rounds.write(options, {"shapes": found, "passes in a turn": options.repeats}, [rows(found)])


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=PRESETS, default=["llama_350m", "llama_1b"], metavar="MODEL")
    parser.add_argument(
        "--lengths", nargs="+", type=rounds.positive, default=[512, 2048], metavar="N", help="tokens of a sequence"
    )
    rounds.add_options(parser, tokens=8192, repeats=20)
    options = parser.parse_args(words)
    for length in options.lengths:
        if options.tokens % length:
            parser.error(f"--tokens {options.tokens}: must be a multiple of {length}, which --lengths names")
    return options


if __name__ == "__main__":
    measure(parse())
