"""The training loop."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from relora_ds import environment
from relora_ds.checkpoint import reader as checkpoints
from relora_ds.checkpoint import universal as elastic
from relora_ds.checkpoint.writer import FencedError, Saver
from relora_ds.comm.counter import CHECKPOINT, LEDGER, LOSS, START_UP
from relora_ds.config import dump
from relora_ds.console import say
from relora_ds.data import tokenizer
from relora_ds.data.token_dataset import TokenDataset, rank_micro_batches
from relora_ds.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, RestartError
from relora_ds.launch.places import Place
from relora_ds.method.lora import LORA_GROUP, count_parameters
from relora_ds.models import generation
from relora_ds.models.build import describe
from relora_ds.models.finite import not_finite
from relora_ds.optimizer.wrapper import ReLoRAOptimizer
from relora_ds.run.folder import RunFolder, truncate_log, write_atomically
from relora_ds.run.lock import RunLock
from relora_ds.supervision import faults
from relora_ds.supervision.stop import StopSignal
from relora_ds.supervision.stragglers import OwnTime
from relora_ds.supervision.watchdog import SAVE_S, Watchdog, stacks_folder
from relora_ds.training import phases
from relora_ds.training.evaluate import evaluate
from relora_ds.training.learning_rate import set_learning_rates
from relora_ds.training.metrics import Metrics
from relora_ds.training.preflight import Checked
from relora_ds.training.traffic_log import TrafficLog


class TrainingError(RuntimeError):
    """Training cannot go on; what is written stays."""


EXPECTED = (TrainingError, FencedError, elastic.ConversionError, ConfigError, RestartError)
"""Errors that end a run in order, on all ranks, with a line to the user: no faults of a rank."""


def train(checked: Checked, place: Place, device: torch.device, stop: StopSignal | None = None) -> int:
    """Trains to the last update, or until a signal; resumes by itself. Returns the exit code, the same on all ranks.

    A signal that comes while the model is built stops the run after its first update.
    """
    config = checked.config
    stop = stop or StopSignal(config.train.stop_signal)
    try:
        trainer = Trainer(checked, place, device)
    except BaseException as error:
        record_fault(error, checked, place, update=0)
        raise
    total, every = config.total_updates, config.train
    code = EXIT_DONE
    try:
        trainer.watchdog.start()
        trainer.traffic.begin(trainer.done.update + 1)
        for update in range(trainer.done.update + 1, total + 1):
            trainer.enter_phase(update)
            stopping = trainer.update(update, stop.requested)
            last = update == total
            if last or update == config.full_updates or (every.eval_every and update % every.eval_every == 0):
                trainer.evaluate()
            if last or stopping or (every.checkpoint_every and update % every.checkpoint_every == 0):
                trainer.save(wait=last or stopping)
            if stopping and not last:
                trainer.tell(f"stopped by a signal after update {update}; a checkpoint is written: run the same command to go on")
                code = EXIT_STOPPED
                break
    except BaseException as error:
        trainer.watchdog.stop()
        record_fault(error, checked, place, trainer.watchdog.update)  # at once: the other ranks' errors follow
        trainer.saver.abandon()
        trainer.close(exit_code=1)
        raise
    trainer.close(exit_code=code)
    return code


def record_fault(error: BaseException, checked: Checked, place: Place, update: int) -> None:
    """Notes an error that nobody foresaw in faults.jsonl."""
    if isinstance(error, Exception) and not isinstance(error, EXPECTED):
        faults.record(
            Path(checked.config.run.dir), kind="error", attempt=environment.attempt(), rank=place.rank, host=environment.node_name(),
            update=update, detail=faults.describe(error),
        )  # fmt: skip


class Trainer:
    """One run on one rank: its engine, its data and how far it has come.

    Attributes:
        engine: DeepSpeed's, of the current phase.
        phase: ``full`` or ``lora``.
        done: the progress that a checkpoint keeps.
    """

    @LEDGER.serving(START_UP)
    def __init__(self, checked: Checked, place: Place, device: torch.device) -> None:
        self.checked, self.place, self.device = checked, place, device
        self.config = config = checked.config
        self.folder = RunFolder(Path(config.run.dir))
        self.done = checkpoints.Progress()
        self.metrics: Metrics | None = None
        self.failed_saves = 0
        self.lock = RunLock(self.folder.path, job=environment.attempt())
        resume_from = self._open_run_folder()
        self.watchdog = self._make_watchdog()
        self.traffic = TrafficLog(self.folder.traffic, place, self.watchdog.hosts, device, environment.attempt())
        self.own_time = OwnTime(place.rank, place.world_size, device)
        self.saver = Saver(
            self.folder, place.rank, place.world_size, is_mine=self.lock.is_mine, self_contained=config.checkpoint.self_contained,
            rotate=lambda: checkpoints.rotate(self.folder, keep=config.train.keep, keep_every=config.train.keep_every),
        )  # fmt: skip
        data, length, seed = Path(config.data.path), config.data.sequence_length, config.run.seed
        self.train_data = TokenDataset(data, "train", length, seed=seed)
        self.held_out = TokenDataset(data, "validation", length, shuffle=False) if checked.index.holds_out else None
        if place.is_main:
            say("building the model and its DeepSpeed engine")
        self._build(resume_from)
        if place.is_main:
            for log in (self.folder.metrics, self.folder.restarts, self.folder.ranks):
                truncate_log(log, self.done.update)
            self.metrics = Metrics(config, self.folder)
            self._introduce(resume_from)

    def _build(self, resume_from: Path | None) -> None:
        """Engine and progress: of the newest checkpoint, or of a new run."""
        self.phase = checkpoints.read_manifest(resume_from).phase if resume_from else self.config.phase_of(1)
        model = phases.initial_model(self.checked, self.device, self.phase, is_resumed=resume_from is not None)
        self.engine = (phases.full_engine if self.phase == "full" else phases.lora_engine)(model, self.checked)
        if resume_from is None:
            return
        content = checkpoints.read_manifest(resume_from)
        if content.world_size == self.place.world_size:
            self.done = checkpoints.load(self.engine, resume_from)
        else:
            self.done = elastic.load(self.engine, self.folder, resume_from, self.say, trust=self.checked.trust)
        self.saver.base = content.base

    @LEDGER.serving(START_UP)
    def enter_phase(self, update: int) -> None:
        """Changes to the LoRA phase when ``update`` is its first."""
        if self.phase == "full" and self.config.phase_of(update) == "lora":
            self._refuse_not_finite()
            self.tell(f"the full-rank phase is over after update {update - 1}: adding LoRA factors")
            self.watchdog.beat("the full-rank phase")
            before = phases.end_full_rank(self.engine, self.checked, self.device)
            self.engine = None  # the last reference: nothing of it is to be there when the next one is built
            self.engine = phases.begin_lora(before, self.checked, self.device)
            self.phase = "lora"
            self._tell_size()
            self.watchdog.beat("the change of phase")

    def update(self, update: int, stop_requested: bool) -> bool:
        """One optimizer update, with the restart that may follow it. Returns whether some rank was asked to stop."""
        started, train = time.perf_counter(), self.config.train
        self.watchdog.update = update
        set_learning_rates(self.engine.optimizer.param_groups, self.config, update)
        # Dropout is a function of (seed, update, rank): a resumed run draws the same without any saved generator state.
        # torch takes 64 bits of it, and large seeds make more.
        torch.manual_seed(((self.config.run.seed * 1_000_003 + update) * 65_537 + self.place.rank) % 2**64)
        micro_batches = rank_micro_batches(
            update, global_batch=train.global_batch, micro_batch=train.micro_batch,
            rank=self.place.rank, world_size=self.place.world_size,
        )  # fmt: skip
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for samples in micro_batches:
            with self.own_time.batch():
                ids = self.train_data.batch(samples)
            ids = ids.to(self.device)
            with self.own_time.forward():
                micro_loss = self.engine(input_ids=ids, labels=ids).loss
            self.engine.backward(micro_loss)
            self.engine.step()
            loss += micro_loss.detach()
            self.watchdog.beat("a micro batch")
        mean_loss, stopping, save_failed, is_lost = self._agree(loss / len(micro_batches), stop_requested)
        if is_lost:
            raise FencedError(f"another job has taken over {self.folder.path}; this one writes no more")
        if not math.isfinite(mean_loss):
            self._refuse_not_finite()
        self._account(update, mean_loss, time.perf_counter() - started)
        self.watchdog.beat("an update")
        if save_failed:
            self._finish_save()
        return stopping

    def _agree(self, loss: torch.Tensor, stop_requested: bool) -> tuple[float, bool, bool, bool]:
        """The mean loss; whether any rank was asked to stop, failed to write or lost the folder: one all-reduce of 32 bytes.

        Now and then the ranks' own times go along, 8 bytes a rank.
        """
        self.lock.check()
        flags = torch.tensor([stop_requested, self.saver.has_failed, self.lock.is_lost], dtype=torch.float64, device=self.device)
        update = self.done.update + 1
        shared = torch.cat([loss.view(1), flags, self.own_time.slots(update, self.config.total_updates)])
        with LEDGER.purpose(LOSS):
            dist.all_reduce(shared)
        total, asked, failed, lost, *seconds = shared.tolist()
        self.own_time.end_update()
        if seconds and self.metrics is not None:
            self.metrics.ranks.append({"update": update, "hosts": self.watchdog.hosts, "forward_s": seconds})
        return total / self.place.world_size, asked > 0, failed > 0, lost > 0

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
            for repair in optimizer.replicas.repairs:
                self.tell(f"replicas differed {repair}")
            optimizer.replicas.repairs.clear()
        if self.metrics is not None:
            record = {
                "update": update,
                "phase": self.phase,
                "loss": loss,
                "lr": next(rate for name, rate in rates.items() if name != LORA_GROUP),
                "grad_norm": math.nan if (norm := self.engine.get_global_grad_norm()) is None else float(norm),
                "tokens": self.done.tokens,
                "tokens_per_s": tokens / seconds,
                "restarts": self.restarts,
                "sent_bytes": self.traffic.lap(),
            }
            if LORA_GROUP in rates:
                record["lora_lr"] = rates[LORA_GROUP]
            if skipped:
                record["skipped"] = True
            if reset is not None:
                record["pruned_fraction"] = reset
            self.metrics.update(record)
            if restart is not None:
                self.metrics.restart(update, restart)
        if self.done.skipped_in_a_row >= self.config.train.max_skipped:
            raise TrainingError(
                f"{self.done.skipped_in_a_row} updates in a row had a non-finite gradient (train.max_skipped="
                f"{self.config.train.max_skipped}); the newest checkpoint is {checkpoints.newest(self.folder) or 'none'}"
            )

    @property
    def restarts(self) -> int:
        return self.engine.optimizer.restarts if isinstance(self.engine.optimizer, ReLoRAOptimizer) else 0

    def evaluate(self) -> None:
        """The perplexity on what is held out, if anything is."""
        if self.held_out is None:
            return
        result = evaluate(
            self.engine.module, self.held_out, batch_size=self.config.train.micro_batch, device=self.device,
            max_tokens=self.config.train.eval_tokens, rank=self.place.rank, world_size=self.place.world_size,
            beat=partial(self.watchdog.beat, "a batch of the evaluation"),
        )  # fmt: skip
        if self.metrics is not None:
            record = {
                "update": self.done.update,
                "phase": self.phase,
                "eval_loss": result.loss,
                "eval_perplexity": result.perplexity,
            }
            self.metrics.evaluation(record)

    def save(self, *, wait: bool) -> None:
        """Begins to write a checkpoint, when the one before is complete; waits for it if asked, or if it is not asynchronous."""
        self._finish_save()
        self._refuse_not_finite()
        manifest = checkpoints.describe(self.engine, self.config, self.done, self.phase, self.checked.index.digests)
        self.saver.start(self.engine, manifest, asdict(self.done))
        self.traffic.write(self.done.update)
        if wait or not self.config.checkpoint.asynchronous:
            self._finish_save()
        if wait and self.failed_saves:
            raise TrainingError(
                f"the last checkpoint could not be written; the newest is {checkpoints.newest(self.folder) or 'none'}"
            )

    def _refuse_not_finite(self) -> None:
        """Stops a run whose weights are no numbers any more: it would neither recover nor say so, and no checkpoint may hold them."""
        broken = not_finite(self.engine.module)
        found = torch.tensor(broken is not None, dtype=torch.int32, device=self.device)
        with LEDGER.purpose(CHECKPOINT):
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        if found.item():
            raise TrainingError(
                f"the weights are not finite since update {self.done.update} ({broken or 'on another rank'}): lower optimizer.lr, or "
                f"clip gradients (optimizer.grad_clip={self.config.optimizer.grad_clip:g}); the newest checkpoint is "
                f"{checkpoints.newest(self.folder) or 'none'}"
            )

    def _finish_save(self) -> None:
        """Waits for the checkpoint on its way. One that could not be written is told of; too many in a row stop the run."""
        if not self.saver.is_busy:
            return
        self.watchdog.beat("all but the end of a checkpoint", allow_s=SAVE_S)  # a slow disk is no hang
        problem, limit = self.saver.finish(), self.config.checkpoint.max_failures
        self.watchdog.beat("a checkpoint")
        self.failed_saves = self.failed_saves + 1 if problem else 0
        if problem:
            newest = checkpoints.newest(self.folder)
            self.tell(
                f"a checkpoint could not be written ({self.failed_saves} in a row): {problem}; "
                f"going on, the newest is {newest or 'none'}"
            )
        if self.failed_saves >= limit:
            raise TrainingError(f"{limit} checkpoints in a row could not be written (checkpoint.max_failures={limit}): {problem}")

    def tell(self, text: str) -> None:
        if self.metrics is not None:
            self.metrics.note(text)

    def say(self, text: str) -> None:
        """Before the logs are open."""
        if self.place.is_main:
            say(text)

    def close(self, exit_code: int) -> None:
        self.watchdog.stop()
        if self.metrics is not None:
            self.metrics.close(exit_code)
        self.lock.release()

    def _make_watchdog(self) -> Watchdog:
        """The ranks learn each other's hosts, and rank 0's folder for the stacks."""
        attempt = environment.attempt()
        stacks = stacks_folder(self.folder.stacks, attempt) if self.place.is_main else None
        known: list[Any] = [None] * self.place.world_size
        dist.all_gather_object(known, (environment.node_name(), stacks))
        return Watchdog(
            self.folder.path, known[0][1], timeout_s=self.config.train.hang_timeout, rank=self.place.rank,
            hosts=[host for host, _ in known], attempt=attempt,
        )  # fmt: skip

    def _open_run_folder(self) -> Path | None:
        """Rank 0 locks the folder, looks for the checkpoint to go on from and writes the settings; all learn what it found.

        Raises:
            ConfigError: another job has the folder, it cannot be written, none of its checkpoints is whole, or the newest whole one
            could run something.
        """
        found: list[Any] = [None]
        if self.place.is_main:
            try:
                found = [self._lock_and_choose()]
            except ConfigError as error:
                found = [error]
            except OSError as error:
                found = [
                    ConfigError(
                        "run.dir", str(self.folder.path), str(error.strerror or error), "name a folder that can be written"
                    )
                ]
        dist.broadcast_object_list(found, src=0)
        if isinstance(found[0], ConfigError):
            self.lock.release()
            raise found[0]
        return found[0]

    def _lock_and_choose(self) -> Path | None:
        self.folder.path.mkdir(parents=True, exist_ok=True)
        taken_over = self.lock.acquire()
        if taken_over:
            self.say(f"taking over {self.folder.path} from {taken_over}")
        if self.folder.checkpoints.is_dir():
            self.say("verifying checkpoints")
        resume_from = checkpoints.choose(self.folder, self.say)
        if resume_from is not None:  # before any rank opens its own file: all are told, and none waits for one that refused
            checkpoints.check_pickles(resume_from, trust=self.checked.trust)
        checkpoints.tidy(self.folder, resume_from)
        self._write_run_folder(is_new=resume_from is None)
        return resume_from

    def _write_run_folder(self, is_new: bool) -> None:
        """Everything that later commands need: the folder stands for itself, wherever data and recipe go."""
        for path in (self.folder.checkpoints, self.folder.base, self.folder.model):
            path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder.config, dump(self.config))
        write_atomically(self.folder.deepspeed, json.dumps(self.checked.deepspeed, indent=2))
        self.checked.architecture.save_pretrained(self.folder.model)
        if is_new:  # later the model that it started from may be gone
            generation.keep_generation_config(self.config.model, self.folder.model)
        tokenizer.hand_on(Path(self.config.data.path), self.folder.model)

    def _tell_size(self) -> None:
        trainable, everything = count_parameters(self.engine.module)
        self.tell(
            f"{describe(self.checked.architecture)}; {trainable:,} of {everything:,} parameters trainable in phase {self.phase!r}; "
            f"{self.place.world_size} rank(s) on {self.device.type}"
        )

    def _introduce(self, resume_from: Path | None) -> None:
        self._tell_size()
        for remark in self.checked.remarks:
            self.tell(remark)
        self.tell(
            f"resuming from {resume_from}"
            if resume_from
            else f"training {self.config.total_updates} updates into {self.folder.path}"
        )
