"""The training loop."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from relora_ds import checkpoint as checkpoints
from relora_ds import phases
from relora_ds.checks import Checked
from relora_ds.config import dump
from relora_ds.data import TokenDataset, rank_micro_batches
from relora_ds.errors import EXIT_DONE, EXIT_STOPPED
from relora_ds.evaluate import evaluate
from relora_ds.launch import Place
from relora_ds.lora import LORA_GROUP
from relora_ds.metrics import Metrics, say
from relora_ds.model import describe
from relora_ds.optimizer import ReLoRAOptimizer
from relora_ds.run_folder import RunFolder, truncate_log, write_atomically
from relora_ds.schedule import lr_factor


class TrainingError(RuntimeError):
    """Training cannot go on; what is written stays."""


def train(checked: Checked, place: Place, device: torch.device) -> int:
    """Trains to the last update, or until a signal; resumes by itself. Returns the exit code, the same on all ranks."""
    config = checked.config
    stop = StopSignal()  # first: a signal that comes while the model is built stops the run after its first update
    trainer = Trainer(checked, place, device)
    total, every = config.total_updates, config.train
    code = EXIT_DONE
    try:
        for update in range(trainer.done.update + 1, total + 1):
            trainer.enter_phase(update)
            stopping = trainer.update(update, stop.requested)
            last = update == total
            if last or update == config.full_updates or (every.eval_every and update % every.eval_every == 0):
                trainer.evaluate()
            if last or stopping or (every.checkpoint_every and update % every.checkpoint_every == 0):
                trainer.save()
            if stopping and not last:
                trainer.tell(f"stopped by a signal after update {update}; a checkpoint is written: run the same command to go on")
                code = EXIT_STOPPED
                break
    except BaseException:
        trainer.close(exit_code=1)
        raise
    trainer.close(exit_code=code)
    return code


class StopSignal:
    """Remembers that SIGTERM or SIGINT came, so that the update in progress can be finished."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, _number: int, _frame: Any) -> None:
        self.requested = True


class Trainer:
    """One run on one rank: its engine, its data and how far it has come.

    Attributes:
        engine: DeepSpeed's, of the current phase.
        phase: ``full`` or ``lora``.
        done: the progress that a checkpoint keeps.
    """

    def __init__(self, checked: Checked, place: Place, device: torch.device) -> None:
        self.checked, self.place, self.device = checked, place, device
        self.config = config = checked.config
        self.folder = RunFolder(Path(config.run.dir))
        self.done = checkpoints.Progress()
        resume_from = checkpoints.newest(self.folder)
        if place.is_main:
            self._write_run_folder()
        dist.barrier()
        data, length, seed = Path(config.data.path), config.data.sequence_length, config.run.seed
        self.train_data = TokenDataset(data, "train", length, seed=seed)
        self.held_out = TokenDataset(data, "validation", length, shuffle=False)
        self.metrics: Metrics | None = None
        if place.is_main:
            say("building the model and its DeepSpeed engine")
        self._build(resume_from)
        if place.is_main:
            for log in (self.folder.metrics, self.folder.restarts):
                truncate_log(log, self.done.update)
            self.metrics = Metrics(config, self.folder)
            self._introduce(resume_from)

    def _build(self, resume_from: Path | None) -> None:
        """Engine and progress: of the newest checkpoint, or of a new run."""
        self.phase = checkpoints.read_manifest(resume_from).phase if resume_from else self.config.phase_of(1)
        model = phases.initial_model(self.checked, self.device, self.phase, is_resumed=resume_from is not None)
        self.engine = (phases.full_engine if self.phase == "full" else phases.lora_engine)(model, self.checked)
        if resume_from is not None:
            self.done = checkpoints.load(self.engine, resume_from)

    def enter_phase(self, update: int) -> None:
        """Changes to the LoRA phase when ``update`` is its first."""
        if self.phase == "full" and self.config.phase_of(update) == "lora":
            self.tell(f"the full-rank phase is over after update {update - 1}: adding LoRA factors")
            self.engine = phases.change_phase(self.engine, self.checked, self.device)
            self.phase = "lora"

    def update(self, update: int, stop_requested: bool) -> bool:
        """One optimizer update, with the restart that may follow it. Returns whether some rank was asked to stop."""
        started, train = time.perf_counter(), self.config.train
        self._set_learning_rates(update)
        # Dropout is a function of (seed, update, rank): a resumed run draws the same without any saved generator state.
        torch.manual_seed((self.config.run.seed * 1_000_003 + update) * 65_537 + self.place.rank)
        micro_batches = rank_micro_batches(
            update, global_batch=train.global_batch, micro_batch=train.micro_batch,
            rank=self.place.rank, world_size=self.place.world_size,
        )  # fmt: skip
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for samples in micro_batches:
            ids = self.train_data.batch(samples).to(self.device)
            micro_loss = self.engine(input_ids=ids, labels=ids).loss
            self.engine.backward(micro_loss)
            self.engine.step()
            loss += micro_loss.detach()
        mean_loss, stopping = self._agree(loss / len(micro_batches), stop_requested)
        self._account(update, mean_loss, time.perf_counter() - started)
        return stopping

    def _set_learning_rates(self, update: int) -> None:
        settings = self.config.optimizer
        factor = lr_factor(
            settings.schedule, update, total=self.config.total_updates, warmup=settings.warmup, min_lr_ratio=settings.min_lr_ratio,
            phase_start=self.config.full_updates if self.phase == "lora" else 0,
        )  # fmt: skip
        for group in self.engine.optimizer.param_groups:
            group["lr"] = settings.peak_lr(lora=group["name"] == LORA_GROUP) * factor

    def _agree(self, loss: torch.Tensor, stop_requested: bool) -> tuple[float, bool]:
        """The mean loss over the ranks, and whether any rank was asked to stop: one all-reduce of 16 bytes."""
        pair = torch.stack([loss, torch.tensor(float(stop_requested), dtype=torch.float64, device=self.device)])
        dist.all_reduce(pair)
        total, asked = pair.tolist()
        return total / self.place.world_size, asked > 0

    def _account(self, update: int, loss: float, seconds: float) -> None:
        """Brings the progress up to date, writes the metrics, and stops a run whose updates are skipped one after the other."""
        skipped = not self.engine.was_step_applied()
        tokens = self.config.train.global_batch * self.config.data.sequence_length
        self.done.update, self.done.tokens = update, self.done.tokens + tokens
        self.done.skipped += skipped
        self.done.skipped_in_a_row = self.done.skipped_in_a_row + 1 if skipped else 0
        optimizer, restart, reset = self.engine.optimizer, None, None
        rates = {str(group["name"]): float(group["lr"]) for group in optimizer.param_groups}
        if isinstance(optimizer, ReLoRAOptimizer):
            rates = optimizer.last_lrs
            restart = optimizer.last_restart
            reset, optimizer.last_restart, optimizer.last_reset = optimizer.last_reset, None, None
            for repair in optimizer.repairs:
                self.tell(f"replicas differed {repair}")
            optimizer.repairs.clear()
        if self.metrics is not None:
            record = {
                "update": update,
                "phase": self.phase,
                "loss": loss if math.isfinite(loss) else None,
                "lr": next(rate for name, rate in rates.items() if name != LORA_GROUP),
                "grad_norm": _finite(self.engine.get_global_grad_norm()),
                "tokens": self.done.tokens,
                "tokens_per_s": tokens / seconds,
                "restarts": self.restarts,
            }
            if LORA_GROUP in rates:
                record["lora_lr"] = rates[LORA_GROUP]
            if skipped:
                record["skipped"] = True
            if reset is not None:
                record["pruned_fraction"] = reset
            self.metrics.update(record)
            if restart is not None:
                self.metrics.restart({"update": update, **restart.as_dict()})
        if self.done.skipped_in_a_row >= self.config.train.max_skipped:
            raise TrainingError(
                f"{self.done.skipped_in_a_row} updates in a row had a non-finite gradient (train.max_skipped="
                f"{self.config.train.max_skipped}); the newest checkpoint is {checkpoints.newest(self.folder) or 'none'}"
            )

    @property
    def restarts(self) -> int:
        return self.engine.optimizer.restarts if isinstance(self.engine.optimizer, ReLoRAOptimizer) else 0

    def evaluate(self) -> None:
        result = evaluate(
            self.engine.module, self.held_out, batch_size=self.config.train.micro_batch, device=self.device,
            max_tokens=self.config.train.eval_tokens, rank=self.place.rank, world_size=self.place.world_size,
        )  # fmt: skip
        if self.metrics is not None:
            record = {
                "update": self.done.update,
                "phase": self.phase,
                "eval_loss": result.loss,
                "eval_perplexity": result.perplexity,
            }
            self.metrics.evaluation(record)

    def save(self) -> None:
        checkpoints.save(
            self.engine, self.folder, self.done, phase=self.phase, restarts=self.restarts, keep=self.config.train.keep
        )

    def tell(self, text: str) -> None:
        if self.metrics is not None:
            self.metrics.note(text)

    def close(self, exit_code: int) -> None:
        if self.metrics is not None:
            self.metrics.close(exit_code)

    def _write_run_folder(self) -> None:
        """Everything that later commands need: the folder stands for itself, wherever data and recipe go."""
        for path in (self.folder.checkpoints, self.folder.model):
            path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder.config, dump(self.config))
        write_atomically(self.folder.deepspeed, json.dumps(self.checked.deepspeed, indent=2))
        self.checked.architecture.save_pretrained(self.folder.model)
        for source in Path(self.config.data.path).glob("*token*.json"):
            shutil.copyfile(source, self.folder.model / source.name)

    def _introduce(self, resume_from: Path | None) -> None:
        trainable = sum(p.numel() for p in self.engine.module.parameters() if p.requires_grad)
        everything = sum(p.numel() for p in self.engine.module.parameters())
        self.tell(
            f"{describe(self.checked.architecture)}; {trainable:,} of {everything:,} parameters trainable in phase {self.phase!r}; "
            f"{self.place.world_size} rank(s) on {self.device.type}"
        )
        self.tell(
            f"resuming from {resume_from}"
            if resume_from
            else f"training {self.config.total_updates} updates into {self.folder.path}"
        )


def _finite(value: Any) -> float | None:
    """A number that JSON can hold."""
    number = float("nan") if value is None else float(value)
    return number if math.isfinite(number) else None
