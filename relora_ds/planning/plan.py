"""relora-ds plan: memory, traffic and time of a recipe on some number of GPUs, estimated before anything is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from relora_ds.bandwidth import estimates, formulas
from relora_ds.bandwidth.formulas import Bytes, Way
from relora_ds.config import Config, ReLoRA
from relora_ds.data.token_dataset import read_index
from relora_ds.ds_config import fit as ds_config
from relora_ds.errors import ConfigError
from relora_ds.method import lora
from relora_ds.method.full_rank import full_rank_line
from relora_ds.method.linear import Form, Kept
from relora_ds.method.targets import find_targets
from relora_ds.models import build as models
from relora_ds.models.cross_entropy import is_plain
from relora_ds.models.loss import head_tokens
from relora_ds.planning import footprint, rehearsal, restarts
from relora_ds.planning import phase_change as change_footprint
from relora_ds.planning.footprint import Engine, Peak
from relora_ds.units import human_bytes

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
FREE = 0.1
"""Share of a GPU's memory that advice leaves free: for CUDA's context, the buffers of NCCL, and gaps between allocations."""
BUCKET = 500_000_000
"""DeepSpeed's default for ``reduce_bucket_size``."""
SPARE = 0.025
"""Share of a GPU's memory that a smaller bucket must free to be worth a line."""
UNKNOWN = {
    "zero_optimization.offload_optimizer.device": ("cpu",),
    "zero_optimization.contiguous_gradients": (False,),
    "zero_optimization.reduce_scatter": (False,),
}
"""Settings whose memory is not estimated, beside sums of gradients in another dtype."""
NOTES = {
    "cuda": (
        "From the code, not measured on a GPU; against CPU engines see benchmarks/plan.md. CUDA's context, NCCL's buffers, what "
        "kernels take inside, and gaps between allocations come on top. Time: the given share of the GPU's peak, the link's rate."
    ),
    "cpu": "Measured against CPU engines in benchmarks/plan.md. What kernels and gloo take inside themselves comes on top.",
}


@dataclass(frozen=True)
class Machine:
    """What the recipe is to run on.

    Attributes:
        gpus: ranks N.
        gpus_per_node: of them on one node, whose network link they share.
        link: bytes per second of a node's link, each way.
        memory: bytes of one GPU.
        flops: operations per second that one GPU reaches: its peak times the share of it that training uses.
        on_cuda: False for ranks on CPUs, over gloo.
    """

    gpus: int
    gpus_per_node: int
    link: float
    memory: float
    flops: float
    on_cuda: bool = True

    def link_seconds(self, sent: Bytes, way: Way) -> float:
        """A ring over all ranks crosses each node's link once in and once out: it carries what one rank sends. 0 on one node.

        On a CPU gradients go straight to their owners: from each of a node's G ranks 1/N of them to each of the N - G elsewhere.
        """
        if self.gpus <= self.gpus_per_node:
            return 0.0
        carried = sent.total
        if way == "owner" and not self.on_cuda:
            carried += sent.gradient * (self.gpus_per_node * (self.gpus - self.gpus_per_node) / (self.gpus - 1) - 1)
        return carried / self.link


@dataclass
class Phase:
    """A phase's model, rehearsed for any micro batch.

    Attributes:
        settings: of the factors; None in the full-rank phase.
        rehearsed: the model.
    """

    settings: ReLoRA | None
    rehearsed: rehearsal.Rehearsed
    sequence_length: int

    def __post_init__(self) -> None:
        self.traces: dict[tuple[int, tuple[Form, ...], bool], rehearsal.Trace] = {}
        self.restart: Peak | None = None
        trained = [p for p in self.rehearsed.model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in trained)

    def trace(self, micro_batch: int, accumulation: int = 1) -> rehearsal.Trace:
        """On the line through micro batches of 2 and 3, where all do the same; one sample alone may do less."""
        tokens, extended = micro_batch * self.sequence_length, None
        forms, keeps = self._forms(tokens, accumulation), self._kept_passes(accumulation) > 0
        if micro_batch > 3 and head_tokens(self.rehearsed.model, tokens) == tokens:
            extended = self._rehearsed(2, forms, keeps).extended(self._rehearsed(3, forms, keeps), micro_batch - 2)
        return self._rehearsed(micro_batch, forms, keeps) if extended is None else extended

    def _rehearsed(self, micro_batch: int, forms: tuple[Form, ...], keeps: bool) -> rehearsal.Trace:
        """With each linear layer in its form, which more tokens than these may have chosen; what is kept is there before."""
        if (micro_batch, forms, keeps) not in self.traces:
            for layer, form in zip(self._linears(), forms, strict=True):
                layer.form = form
                layer.kept = Kept(int(keeps))
                if form == "merged":
                    with self.rehearsed.mode:
                        layer(torch.zeros(1, layer.in_features, dtype=layer.lora_A.dtype))
            self.traces[micro_batch, forms, keeps] = self.rehearsed.run(micro_batch, self.sequence_length)
        return self.traces[micro_batch, forms, keeps]

    def _forms(self, tokens: int, accumulation: int = 1) -> tuple[Form, ...]:
        """The linear layers' forms in a pass over so many tokens, one of so many in an update."""
        if self.settings is None:
            return ()
        head, of_head = self.rehearsed.model.get_output_embeddings(), head_tokens(self.rehearsed.model, tokens)
        linears = self._linears()
        for layer in linears:
            layer.kept = Kept(self._kept_passes(accumulation))
        return tuple(layer.form_for(of_head if layer is head else tokens, self.settings.linear) for layer in linears)

    def _kept_passes(self, accumulation: int) -> int:
        return 0 if self.settings is None else self.settings.kept_passes(accumulation)

    def _merged(self, tokens: int, accumulation: int) -> list[lora.ReLoRALinear]:
        """The layers that multiply with W + s·B·A."""
        return [x for x, form in zip(self._linears(), self._forms(tokens, accumulation), strict=True) if form == "merged"]

    def _linears(self) -> list[lora.ReLoRALinear]:
        return [module for _, module in lora.relora_layers(self.rehearsed.model) if isinstance(module, lora.ReLoRALinear)]

    def sides(self) -> list[int]:
        """The narrower side of each layer that has factors: the rank of its weights."""
        return [min(layer.lora_A.shape[1], layer.lora_B.shape[0]) for _, layer in lora.relora_layers(self.rehearsed.model)]

    def peaks(self, engine: Engine, micro_batch: int) -> dict[str, Peak]:
        frozen = None if self.settings is None else self.settings.frozen
        merges = self.settings is not None and self.settings.restart_every is not None
        found = footprint.peaks(
            self.rehearsed, engine, self.trace(micro_batch, engine.accumulation), frozen,
            restarts=merges and self.restart is None, from_residual=self.settings is not None and self.settings.init == "residual",
        )  # fmt: skip
        self.restart = found.get("restart", self.restart)
        all_found = found if self.restart is None else {**found, "restart": self.restart}
        return self._with_kept(all_found, micro_batch * self.sequence_length, engine)

    def _with_kept(self, peaks: dict[str, Peak], tokens: int, engine: Engine) -> dict[str, Peak]:
        """From the first pass on what is kept of W + s·B·A lies beside all else."""
        if not self._kept_passes(engine.accumulation):
            return peaks
        size = sum(x.in_features * x.out_features for x in self._merged(tokens, engine.accumulation)) * engine.width
        kept = {"kept W + s·B·A": size} if size else {}
        return {moment: peak if moment == "start" else Peak({**peak.parts, **kept}) for moment, peak in peaks.items()}

    def flops(self, tokens: int, *, per_pass: int, recomputes: bool, accumulation: int = 1) -> float:
        """Of an update of ``tokens``, over all ranks, ``per_pass`` of them in a micro batch of one rank, which has so many."""
        trained = frozen = head = 0
        output = self.rehearsed.model.get_output_embeddings()
        for module in self.rehearsed.model.modules():
            before = trained + frozen
            if isinstance(module, lora.ReLoRALayer):
                trained += module.lora_A.numel()
                if isinstance(module, lora.ReLoRAEmbedding):
                    continue  # W and B are looked up
                trained += module.lora_B.numel()
                frozen += 0 if module.weight is None else module.in_features * module.out_features
            elif isinstance(module, (nn.Linear, Conv1D)):
                trained += module.weight.numel()
            head += trained + frozen - before if module is output else 0
        is_chunked = head_tokens(self.rehearsed.model, per_pass) < per_pass
        again = head if is_chunked and not is_plain(output) else 0
        config = self.rehearsed.model.config
        heads = getattr(config, "num_attention_heads", 0)  # RWKV and others have none
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads) if heads else 0
        attention = config.num_hidden_layers * self.sequence_length * width
        merged, passes = self._merged(per_pass, accumulation), tokens // per_pass
        formed = passes // accumulation if self._kept_passes(accumulation) else passes * (3 if recomputes else 2)
        return formulas.update_flops(
            tokens, trained=trained, frozen=frozen, attention=attention,
            recomputed=again + (trained + frozen - head if recomputes else 0), recomputed_attention=attention if recomputes else 0,
        ) + formulas.merged_flops(
            tokens, formed, factors=sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in merged),
            entries=sum(layer.rank * layer.in_features * layer.out_features for layer in merged), recomputes=recomputes,
        )  # fmt: skip


class Planner:
    """What a recipe needs on a machine.

    Args:
        config: the recipe.
        recipe: its file; DeepSpeed's JSON is also looked for beside it and one folder up.
        machine: to run on.
        vocab_size: of the tokenizer; None for the token folder's.

    Raises:
        ConfigError: what cannot be trained, or not be estimated.
    """

    def __init__(self, config: Config, recipe: Path, machine: Machine, vocab_size: int | None) -> None:
        self.config, self.machine = config, machine
        content = ds_config.of_recipe(config, recipe.resolve().parent, recipe.resolve().parent.parent)
        unknown = [key for key, values in UNKNOWN.items() if ds_config.get(content, key) in values]
        unknown += ["data_types.grad_accum_dtype"] * ds_config.sums_apart(content)
        for key in unknown:
            problem = "its memory cannot be estimated"
            raise ConfigError(f"deepspeed.{key}", ds_config.get(content, key), problem, "leave it out, or measure")
        self.fitted = ds_config.fit(content, config, machine.gpus)
        self.precision = ds_config.precision(content)
        self.target = models.hf_config(config.model, _vocabulary(config, vocab_size))
        positions = getattr(self.target, "max_position_embeddings", None)
        if positions is not None and config.data.sequence_length > positions:
            raise ConfigError(
                "data.sequence_length", config.data.sequence_length, f"longer than the model's {positions} positions"
            )
        self.phases: dict[tuple[Any, ...], Phase] = {}
        self.changes: dict[tuple[Any, ...], Peak] = {}

    @property
    def compiles(self) -> bool:
        """Whether blocks are compiled, which keep no W + s·B·A."""
        choice = self.config.model.compile
        return self.machine.on_cuda if choice == "auto" else choice

    def architecture(self) -> PretrainedConfig:
        """Of the model that is trained: a narrower one for ``control``."""
        if self.config.method != "control":
            return self.target
        model = models.build_meta(self.target)
        layers = find_targets(model, self.config.relora.targets)
        return models.control_config(self.target, lora.num_trainable(model, layers, self.config.relora.rank))

    def names(self) -> list[str]:
        """Of the recipe's phases, in order."""
        return ["full"] * (self.config.full_updates > 0) + ["lora"] * self.config.has_lora_phase

    def phase(self, name: str, *, frozen: str | None = None, checkpointing: bool | None = None, target: bool = False) -> Phase:
        """A phase with the recipe's settings, or with another frozen dtype or gradient checkpointing.

        ``target`` stands for the recipe's model where the method trains a narrower one.
        """
        checkpointing = self.config.model.gradient_checkpointing if checkpointing is None else checkpointing
        settings = None
        if name == "lora":
            settings = self.config.lora_settings
            dtype = frozen or settings.frozen.dtype
            stored = settings.frozen.model_copy(update={"dtype": self.precision if dtype == "auto" else dtype})
            settings = settings.model_copy(update={"frozen": stored, **({"keep_merged": False} if self.compiles else {})})
        key = (name, settings and settings.frozen.dtype, checkpointing, target)
        if key not in self.phases:
            rehearsed = rehearsal.build(
                self.target if target else self.architecture(), dtype=ds_config.DTYPES[self.precision], settings=settings,
                attention=self.config.model.attention, gradient_checkpointing=checkpointing, loss=self.config.model.loss,
                on_cuda=self.machine.on_cuda,
            )  # fmt: skip
            self.phases[key] = Phase(settings, rehearsed, self.config.data.sequence_length)
        return self.phases[key]

    def engine(self, micro_batch: int | None = None) -> Engine:
        def zero(key: str, default: Any) -> Any:
            value = ds_config.get(self.fitted, f"zero_optimization.{key}")
            return default if value is None else value

        width = WIDTHS[self.precision]
        return Engine(
            world_size=self.machine.gpus,
            stage=zero("stage", 2),
            accumulation=self.config.train.global_batch // (self.machine.gpus * (micro_batch or self.config.train.micro_batch)),
            width=width,
            wire=WIDTHS.get(self.fitted.get("communication_data_type") or "", width),
            bucket=int(zero("reduce_bucket_size", BUCKET)),
            overlap=bool(zero("overlap_comm", False)),
            on_cuda=self.machine.on_cuda,
        )

    def cost(self, phase: Phase, way: Way) -> dict[str, Any]:
        """Bytes and seconds of one update."""
        engine, train = self.engine(), self.config.train
        sent = formulas.update_bytes(
            phase.trainable, world_size=engine.world_size, gradient_width=engine.wire, parameter_width=engine.width,
            stage=engine.stage, accumulation=engine.accumulation, way=way,
        )  # fmt: skip
        tokens = train.global_batch * self.config.data.sequence_length
        per_pass = train.micro_batch * self.config.data.sequence_length
        flops = phase.flops(
            tokens, per_pass=per_pass, recomputes=self.config.model.gradient_checkpointing, accumulation=engine.accumulation
        )
        compute, link = flops / self.machine.gpus / self.machine.flops, self.machine.link_seconds(sent, way)
        return {
            "trainable": phase.trainable,
            "gradient_bytes": sent.gradient,
            "parameter_bytes": sent.parameters,
            "scalar_bytes": sent.norm + sent.loss,
            "compute_s": compute,
            "link_s": link,
            "at_most_s": compute + link,
            "overlapped_s": max(compute, link),
        }

    def answer(self) -> dict[str, Any]:
        """Everything, as the JSON of ``--json`` has it; sizes in bytes, times in seconds."""
        engine, names = self.engine(), self.names()
        memory, update = {}, {}
        for name in names:
            peaks = self.phase(name).peaks(engine, self.config.train.micro_batch)
            if name == "lora" and "full" in names:
                peaks[change_footprint.MOMENT] = self.change(engine)
            memory[name] = {moment: dict(peak.parts) for moment, peak in peaks.items()}
            update[name] = self.cost(self.phase(name), estimates.way(self.fitted))
        baseline = self.cost(self.phase("full", target=self.config.method == "control"), "all-reduce")
        totals = {(name, moment): sum(parts.values()) for name in names for moment, parts in memory[name].items()}
        phase, moment = max(totals, key=lambda place: totals[place])
        return {
            "model": models.describe(self.architecture()),
            "method": self.config.method,
            "gpus": engine.world_size,
            "stage": engine.stage,
            "dtype": self.precision,
            "micro_batch": self.config.train.micro_batch,
            "accumulation": engine.accumulation,
            "memory": memory,
            "peak": {"phase": phase, "moment": moment, "bytes": totals[phase, moment]},
            "gpu_bytes": self.machine.memory,
            "update": update,
            "full_rank_by_defaults": baseline,
            "restart": self.restart(),
            "advice": self.advice(totals[phase, moment]),
            "note": NOTES["cuda" if self.machine.on_cuda else "cpu"],
        }

    def change(self, engine: Engine, *, frozen: str | None = None, checkpointing: bool | None = None) -> Peak:
        """The most at the change of phase; the phases are those of :meth:`phase` with the same choices."""
        before, after = (self.phase(name, frozen=frozen, checkpointing=checkpointing) for name in ("full", "lora"))
        assert after.settings is not None
        key = (id(before), id(after), engine.stage)
        if key not in self.changes:
            self.changes[key] = change_footprint.change_of_phase(
                before.rehearsed, after.rehearsed, engine, after.settings.frozen, keep_moments=after.settings.keep_moments
            )
        return self.changes[key]

    def restart(self) -> dict[str, float] | None:
        """Bytes, and seconds on the link; how many there are, the rank that all factors together can reach, and that of the
        narrowest layer."""
        settings = self.config.lora_settings
        if "lora" not in self.names() or settings.restart_every is None:
            return None
        phase = self.phase("lora")
        with phase.rehearsed.mode:
            sent = estimates.restart(phase.rehearsed.model, settings, self.machine.gpus)
        crosses = self.machine.gpus > self.machine.gpus_per_node
        count = settings.restarts.count(self.config.total_updates - self.config.full_updates)
        return {
            "bytes": sent, "link_s": sent / self.machine.link if crosses else 0.0, "every": settings.restart_every, "count": count,
            "rank": settings.rank_after(count), "of": min(phase.sides()),
        }  # fmt: skip

    def peak(self, micro_batch: int, stage: int, frozen: str | None, checkpointing: bool) -> int:
        engine = replace(self.engine(micro_batch), stage=stage)
        phases = [self.phase(name, frozen=frozen, checkpointing=checkpointing) for name in self.names()]
        most = max(peak.total for phase in phases for peak in phase.peaks(engine, micro_batch).values())
        return most if len(phases) == 1 else max(most, self.change(engine, frozen=frozen, checkpointing=checkpointing).total)

    def largest(self, stage: int, frozen: str | None, checkpointing: bool) -> tuple[int, int] | None:
        """The largest micro batch that fits, of those that divide what a rank has of the global batch, with its peak."""
        share = self.config.train.global_batch // self.machine.gpus
        sizes = [size for size in range(1, share + 1) if share % size == 0]
        found, low, high = None, 0, len(sizes) - 1
        while low <= high:
            middle = (low + high) // 2
            peak = self.peak(sizes[middle], stage, frozen, checkpointing)
            if peak <= (1 - FREE) * self.machine.memory:
                found, low = (sizes[middle], peak), middle + 1
            else:
                high = middle - 1
        return found

    def advice(self, peak: int) -> dict[str, Any]:
        """Which stage, micro batch and frozen dtype fit; gradient checkpointing only where nothing fits without it."""
        own = self.config.model.gradient_checkpointing
        dtypes: list[str | None] = [None]
        if "lora" in self.names() and self.config.lora_settings.frozen.dtype not in ("none", "int8"):
            dtypes.append("int8")
        choices: list[dict[str, Any]] = []
        for checkpointing in (own,) if own else (False, True):
            for frozen in dtypes:
                by_stage = {stage: self.largest(stage, frozen, checkpointing) for stage in (1, 2)}
                for stage, found in by_stage.items():
                    choices.append(
                        {
                            "stage": stage,
                            "frozen": self.frozen_dtype(frozen),
                            "gradient_checkpointing": checkpointing,
                            "micro_batch": found[0] if found else None,
                            "bytes": found[1] if found else None,
                        }
                    )
            if any(choice["micro_batch"] for choice in choices):
                break
        return {"fits": peak <= (1 - FREE) * self.machine.memory, "choices": choices, "hints": self.hints(choices)}

    def frozen_dtype(self, frozen: str | None) -> str | None:
        """As it is stored, where ``frozen`` stands for the recipe's if it is None; None where nothing is frozen."""
        if "lora" not in self.names():
            return None
        settings = self.phase("lora", frozen=frozen).settings
        return None if settings is None or settings.frozen.dtype == "none" else settings.frozen.dtype

    def restart_hints(self) -> list[str]:
        """What to change about restarts; nothing where there are none."""
        settings, updates = self.config.lora_settings, self.config.total_updates
        if "lora" not in self.names() or settings.restart_every is None:
            return []
        return restarts.hints(
            settings.restart_every, settings.rank, min(self.phase("lora").sides()),
            updates=updates, lora_updates=updates - self.config.full_updates,
        )  # fmt: skip

    def hints(self, choices: Sequence[Mapping[str, Any]]) -> list[str]:
        """What to change, in words."""
        engine, hints = self.engine(), []
        if "lora" in self.names() and (said := full_rank_line(models.build_meta(self.target))):
            hints.append(said)
        hints += self.restart_hints()
        most = max(self.phase(name).trainable for name in self.names())
        spare = (engine.bucket - most) * engine.width * (2 if engine.overlap else 1)
        if spare > SPARE * self.machine.memory:
            hints.append(
                f"reduce_bucket_size is {engine.bucket:,} entries for {most:,} gradients: "
                f"zero_optimization.reduce_bucket_size={most} frees {human_bytes(spare)}"
            )
        if not any(choice["micro_batch"] for choice in choices):
            held = "more GPUs (masters and moments are split over them), " if engine.world_size < 64 else ""
            hints.append(
                f"nothing fits: {held}a shorter data.sequence_length, a smaller reduce_bucket_size, overlap_comm: false, "
                "relora.warm_start=0 (no full-rank phase), or GPUs with more memory"
            )
        return hints


def _vocabulary(config: Config, vocab_size: int | None) -> int:
    """Of the option, else of the token folder; a model that names its own needs neither."""
    if vocab_size is not None:
        return vocab_size
    settings = config.model
    is_open = settings.preset is not None or (isinstance(settings.config, dict) and "vocab_size" not in settings.config)
    if not is_open:
        return 1
    try:
        return read_index(Path(config.data.path)).vocab_size
    except ConfigError:
        raise ConfigError(
            "data.path", config.data.path, "no token folder to take the vocabulary from", "say --vocab-size, e.g. 32100"
        ) from None
