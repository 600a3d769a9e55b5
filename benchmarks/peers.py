"""Updates of full rank, PEFT's LoRA and this project's forms of the linear layer, in turns, in one process on a CPU.

    python -m benchmarks.peers [--tokens 2048] [--hidden 1024] [--rank 64] [--layers 2] [--rounds 5]

fp32, ZeRO-2 over one rank, torch's fused AdamW, random tokens; embeddings, norms and head are trained in every way, and every way
trains on the same tokens. Each round does one update of every way, so that whatever else the machine does meets all of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MAIN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LENGTH, VOCABULARY = 256, 1024


def model(options: argparse.Namespace) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=options.hidden, intermediate_size=options.hidden * 43 // 16, use_cache=False,
        num_hidden_layers=options.layers, num_attention_heads=options.hidden // 64, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def with_peft(given: nn.Module, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(given, LoraConfig(r=rank, lora_alpha=32, target_modules=list(MAIN), bias="none"))
    for name, parameter in wrapped.named_parameters():
        if any(part in name for part in ("embed_tokens", "norm", "lm_head")):
            parameter.requires_grad_(True)
    return wrapped


def updates(options: argparse.Namespace) -> dict[str, Callable[[Tensor], Tensor]]:
    """One update of each way, from token ids to the loss."""
    import deepspeed

    import relora_ds
    from relora_ds.config import Optimizer
    from relora_ds.engine.initialize import adamw

    batch = options.tokens // LENGTH
    config = {"train_batch_size": batch, "gradient_clipping": 1.0, "zero_optimization": {"stage": 2}}
    config["timers"] = {"throughput": {"enabled": False}}
    optimizer = adamw(Optimizer(lr=1e-4))

    def plain(given: nn.Module) -> Any:
        trained = [p for p in given.parameters() if p.requires_grad]
        return deepspeed.initialize(model=given, model_parameters=trained, optimizer=optimizer, config=dict(config))[0]

    def relora(**settings: Any) -> Any:
        relora = {"rank": options.rank, "alpha": 32, "restart_every": 10**6, **settings}
        return relora_ds.initialize(model=model(options), optimizer=optimizer, config=dict(config), relora=relora)[0]

    def of(engine: Any) -> Callable[[Tensor], Tensor]:
        def update(ids: Tensor) -> Tensor:
            loss: Tensor = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            return loss.detach()

        return update

    return {
        "full rank, DeepSpeed ZeRO-2 as it comes": of(plain(model(options))),
        "PEFT LoRA, the same engine": of(plain(with_peft(model(options), options.rank))),
        "relora_ds, split": of(relora(linear="split")),
        "relora_ds, merged": of(relora(linear="merged")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 2048), ("hidden", 1024), ("rank", 64), ("layers", 2), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29_579}.items():
        os.environ[name] = str(value)
    ways = updates(options)
    times: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, float] = {}
    for number in range(options.rounds + 1):
        ids = torch.randint(VOCABULARY, (options.tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(number))
        for name, update in ways.items():
            started = time.perf_counter()
            losses[name] = float(update(ids))
            if number:
                times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(found) for name, found in times.items()}
    full, peft, *_ = medians.values()
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads, {vars(options)}\n")
    print("| way | s an update (min, median, max) | of full rank | of PEFT | loss of the last |\n|---|---|---|---|---|")
    for name, found in times.items():
        spread = f"{min(found):.3f}, {medians[name]:.3f}, {max(found):.3f}"
        print(f"| {name} | {spread} | {full / medians[name]:.2f} | {peft / medians[name]:.2f} | {losses[name]:.5f} |")


if __name__ == "__main__":
    main()
