"""One run on one rank: what an update, an evaluation and a checkpoint are."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from relora_ds import environment
from relora_ds.callbacks.callback import Callback, RunState
from relora_ds.callbacks.metrics_log import MetricsLog
from relora_ds.callbacks.progress_line import ProgressLine
from relora_ds.callbacks.starts_log import StartsLog
from relora_ds.callbacks.traffic import TrafficLog
from relora_ds.callbacks.wandb_run import WandbRun
from relora_ds.callbacks.watch import Watch
from relora_ds.checkpoint import reader as checkpoints
from relora_ds.checkpoint import universal
from relora_ds.checkpoint.writer import FencedError
from relora_ds.comm.counter import COUNTER, LOSS, START_UP
from relora_ds.console import say
from relora_ds.data.prefetch import Prefetch
from relora_ds.data.token_dataset import TokenDataset, rank_micro_batches
from relora_ds.errors import DivergedError
from relora_ds.launch.places import Place
from relora_ds.method.lora import LORA_GROUP, count_parameters
from relora_ds.models import compiling
from relora_ds.models.build import describe
from relora_ds.models.loss import attach as attach_loss
from relora_ds.models.packing import none_packed
from relora_ds.optimizer.wrapper import ReLoRAOptimizer
from relora_ds.run.folder import RunFolder
from relora_ds.run.lock import RunLock
from relora_ds.supervision.parts import BACKWARD, DATA, FORWARD, LOSS_ALL_REDUCE, STEP, part
from relora_ds.supervision.stragglers import OwnTime
from relora_ds.training import phases
from relora_ds.training.checkpoints import Checkpoints
from relora_ds.training.evaluate import evaluate
from relora_ds.training.finite import refuse_not_finite
from relora_ds.training.learning_rate import set_learning_rates
from relora_ds.training.linear_form import form_line, kept_line
from relora_ds.training.open_run import make_watchdog, open_run_folder
from relora_ds.training.preflight import Checked


@dataclass(frozen=True)
class Agreement:
    """What all ranks know after an update: the mean loss; whether any was asked to stop, failed to write or lost the folder."""

    loss: float
    is_asked_to_stop: bool
    has_failed_to_write: bool
    is_lost: bool


class Trainer(RunState):
    """A run on this rank: its engine, its data, and what hangs on it.

    Args:
        checked: the recipe, and what was found about it.
        place, device: of this rank.
        callbacks: more of them, behind the run's own.

    Raises:
        ConfigError: the run's folder cannot be used.
    """

    @COUNTER.serving(START_UP)
    def __init__(self, checked: Checked, place: Place, device: torch.device, callbacks: Iterable[Callback] = ()) -> None:
        config = checked.config
        super().__init__(config, RunFolder(Path(config.run.dir)), place, device)
        self.checked = checked
        self.lock = RunLock(self.folder.path, job=environment.attempt())
        self.resumes_from = open_run_folder(checked, self.folder, place, self.lock)
        try:
            self._prepare(callbacks)
        except BaseException:
            self.lock.release()  # or the next start would be refused, elsewhere for a minute more than this process lives
            raise

    def _prepare(self, callbacks: Iterable[Callback]) -> None:
        """All that a run has beside its folder."""
        checked, place, device, config = self.checked, self.place, self.device, self.config
        self.watchdog = make_watchdog(checked, self.folder, place)
        self.callbacks = [*self._own_callbacks(), *callbacks]
        self.own_time = OwnTime(place.rank, place.world_size, device)
        self.checkpoints = Checkpoints(self, self.lock, checked.index.digests)
        data, length, seed = Path(config.data.path), config.data.sequence_length, config.run.seed
        train_data = TokenDataset(data, "train", length, seed=seed)
        self.held_out = TokenDataset(data, "validation", length, shuffle=False) if checked.index.holds_out else None
        self.micro_batches = partial(
            rank_micro_batches, global_batch=config.train.global_batch, micro_batch=config.train.micro_batch,
            rank=place.rank, world_size=place.world_size,
        )  # fmt: skip
        self._say("building the model and its DeepSpeed engine")
        self._build()
        to_come = range(self.done.update + 1, config.total_updates + 1)
        self.train_data = Prefetch(train_data, chain.from_iterable(map(self.micro_batches, to_come)), device)

    def _own_callbacks(self) -> list[Callback]:
        """Traffic first, which adds to the records of those behind it; the log of starts last, which measures what they take."""
        traffic = TrafficLog(self.folder.traffic, self.place, self.watchdog.hosts, self.device, environment.attempt())
        watch = Watch(self.watchdog)
        if not self.place.is_main:
            return [traffic, watch]
        wandb = WandbRun(environment.process_environment(), self.tell)
        starts = StartsLog(self.folder.starts, self.watchdog.hosts, environment.attempt())
        return [traffic, MetricsLog(self), ProgressLine(self.config.total_updates), wandb, watch, starts]

    def _build(self) -> None:
        """Engine and progress: of the newest checkpoint, or of a new run."""
        content = checkpoints.read_manifest(self.resumes_from) if self.resumes_from else None
        self.phase = content.phase if content else self.config.phase_of(1)
        model = phases.initial_model(self.checked, self.device, self.phase, is_resumed=content is not None)
        tokens = self.config.train.micro_batch * self.config.data.sequence_length
        if remark := attach_loss(model, self.config.model.loss, tokens):
            self._say(remark)
        self.engine = (phases.full_engine if self.phase == "full" else phases.lora_engine)(model, self.checked)
        if content is None or self.resumes_from is None:
            return
        if content.world_size == self.place.world_size:
            self.done = checkpoints.load(self.engine, self.resumes_from)
        else:
            self.done = universal.load(self.engine, self.folder, self.resumes_from, self._say, trust=self.checked.trust)
        self.checkpoints.saver.base = content.base

    def begin(self) -> None:
        """The first update comes next."""
        for callback in self.callbacks:
            callback.begin(self)
        self._tell_size()
        for remark in self.checked.remarks:
            self.tell(remark)
        new = f"training {self.config.total_updates} updates into {self.folder.path}"
        self.tell(f"resuming from {self.resumes_from}" if self.resumes_from else new)

    @COUNTER.serving(START_UP)
    def enter_phase(self, update: int) -> None:
        """Changes to the LoRA phase when ``update`` is its first."""
        if self.phase == "full" and self.config.phase_of(update) == "lora":
            refuse_not_finite(self)
            self.tell(f"the full-rank phase is over after update {update - 1}: adding LoRA factors")
            self.beat("the full-rank phase")
            before = phases.end_full_rank(self.engine, self.checked, self.device)
            self.engine = None  # the last reference: nothing of it is to be there when the next one is built
            self.engine = phases.begin_lora(before, self.checked, self.device)
            self.phase = "lora"
            self._tell_size()
            self.beat("the change of phase")

    def update(self, update: int, stop_requested: bool) -> bool:
        """One optimizer update, with the restart that may follow it. Returns whether some rank was asked to stop.

        Raises:
            FencedError: another job has the run's folder.
            DivergedError: the weights are not finite any more, or too many updates in a row were skipped.
        """
        started = time.perf_counter()
        self.update_in_progress = update
        for callback in self.callbacks:
            callback.begin_update(self)
        set_learning_rates(self.engine.optimizer.param_groups, self.config, update)
        agreed = self._agree(update, self._train(update), stop_requested)
        if agreed.is_lost:
            raise FencedError(f"another job has taken over {self.folder.path}; this one writes no more")
        if not math.isfinite(agreed.loss):
            refuse_not_finite(self)
        self._account(update, agreed.loss, time.perf_counter() - started)
        self.beat("an update")
        if agreed.has_failed_to_write:
            self.checkpoints.finish()
        return agreed.is_asked_to_stop

    @none_packed()
    def _train(self, update: int) -> torch.Tensor:
        """Forward, backward and step of this rank's micro batches; their mean loss, () float64.

        On a GPU the host only launches: nothing before the last step waits for the device.
        """
        # Dropout is a function of (seed, update, rank): a resumed run draws the same without any saved generator state.
        # torch takes 64 bits of it, and large seeds make more.
        torch.manual_seed(((self.config.run.seed * 1_000_003 + update) * 65_537 + self.place.rank) % 2**64)
        micro_batches = self.micro_batches(update)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for samples in micro_batches:
            with part(DATA), self.own_time.batch():
                ids = self.train_data.batch(samples)
            with part(FORWARD), self.own_time.forward():
                micro_loss = self.engine(input_ids=ids, labels=ids).loss
            with part(BACKWARD):
                self.engine.backward(micro_loss)
            with part(STEP):
                self.engine.step()
            loss += micro_loss.detach()
            self.beat("a micro batch")
        return loss / len(micro_batches)

    def _agree(self, update: int, loss: torch.Tensor, stop_requested: bool) -> Agreement:
        """One all-reduce of 32 bytes. Now and then the ranks' own times go along, 8 bytes a rank."""
        self.lock.check()
        flags = torch.tensor(
            [stop_requested, self.checkpoints.saver.has_failed, self.lock.is_lost], dtype=torch.float64, device=self.device
        )
        shared = torch.cat([loss.view(1), flags, self.own_time.slots(update, self.config.total_updates)])
        with COUNTER.purpose(LOSS), part(LOSS_ALL_REDUCE):
            dist.all_reduce(shared)
            total, asked, failed, lost, *seconds = shared.tolist()
        self.own_time.end_update()
        if seconds:
            record = {"update": update, "hosts": self.watchdog.hosts, "forward_s": seconds}
            for callback in self.callbacks:
                callback.rank_times(self, record)
        return Agreement(total / self.place.world_size, asked > 0, failed > 0, lost > 0)

    def _account(self, update: int, loss: float, seconds: float) -> None:
        """Brings the progress up to date, tells the callbacks, and stops a run whose updates are skipped one after the other."""
        is_skipped = not self.engine.was_step_applied()
        tokens = self.config.train.global_batch * self.config.data.sequence_length
        self.done.update, self.done.tokens = update, self.done.tokens + tokens
        self.done.skipped += is_skipped
        self.done.skipped_in_a_row = self.done.skipped_in_a_row + 1 if is_skipped else 0
        record = self._record(update, loss, tokens / seconds, is_skipped)
        for callback in self.callbacks:
            callback.update(self, record)
        self._tell_of_restart()
        if self.done.skipped_in_a_row >= self.config.train.max_skipped:
            raise DivergedError(
                f"{self.done.skipped_in_a_row} updates in a row had a non-finite gradient (train.max_skipped="
                f"{self.config.train.max_skipped}); the newest checkpoint is {checkpoints.newest_in_words(self.folder)}"
            )

    def _record(self, update: int, loss: float, tokens_per_s: float, is_skipped: bool) -> dict[str, Any]:
        """The update's line in metrics.jsonl."""
        optimizer, restarts, reset = self.engine.optimizer, 0, None
        rates = {str(group["name"]): float(group["lr"]) for group in optimizer.param_groups}
        if isinstance(optimizer, ReLoRAOptimizer):
            rates, restarts = optimizer.last_lrs, optimizer.restarts
            reset, optimizer.last_reset = optimizer.last_reset, None
        norm = self.engine.get_global_grad_norm()
        record = {
            "update": update,
            "phase": self.phase,
            "loss": loss,
            "lr": next((rate for name, rate in rates.items() if name != LORA_GROUP), rates.get(LORA_GROUP)),
            "grad_norm": math.nan if norm is None else float(norm),
            "tokens": self.done.tokens,
            "tokens_per_s": tokens_per_s,
            "restarts": restarts,
        }
        if LORA_GROUP in rates:
            record["lora_lr"] = rates[LORA_GROUP]
        if is_skipped:
            record["skipped"] = True
        if reset is not None:
            record["pruned_fraction"] = reset
        return record

    def _tell_of_restart(self) -> None:
        """What happened to the factors in this update, and to replicas that a verification found to differ."""
        optimizer = self.engine.optimizer
        if not isinstance(optimizer, ReLoRAOptimizer):
            return
        for repair in optimizer.replicas.repairs:
            self.tell(f"replicas differed {repair}")
        optimizer.replicas.repairs.clear()
        restart, optimizer.last_restart = optimizer.last_restart, None
        if restart is not None:
            for callback in self.callbacks:
                callback.restart(self, restart)

    def evaluate(self) -> None:
        """The validation loss, if there is a validation split."""
        if self.held_out is None:
            return
        result = evaluate(
            self.engine.module, self.held_out, batch_size=self.config.train.micro_batch, device=self.device,
            max_tokens=self.config.train.eval_tokens, rank=self.place.rank, world_size=self.place.world_size,
            beat=partial(self.beat, "a batch of the evaluation"),
        )  # fmt: skip
        record = {
            "update": self.done.update,
            "phase": self.phase,
            "eval_loss": result.loss,
            "eval_perplexity": result.perplexity,
        }
        for callback in self.callbacks:
            callback.evaluation(self, record)

    def save(self, *, wait: bool) -> None:
        """See :meth:`Checkpoints.save`."""
        self.checkpoints.save(wait=wait)

    def close(self, exit_code: int) -> None:
        """The run is over on this rank."""
        self.watchdog.stop()  # first: what the others do at their end may take its time
        self.train_data.close()
        with ExitStack() as stack:  # whatever one raises, the others follow
            stack.callback(self.lock.release)
            for callback in reversed(self.callbacks):
                stack.callback(callback.end, exit_code)

    def _say(self, text: str) -> None:
        """Before the run begins."""
        if self.place.is_main:
            say(text)

    def _tell_size(self) -> None:
        trainable, everything = count_parameters(self.engine.module)
        self.tell(
            f"{describe(self.checked.architecture)}; {trainable:,} of {everything:,} parameters trainable in phase {self.phase!r}; "
            f"{self.place.world_size} rank(s) on {self.device.type}"
        )
        if self.place.is_main and self.phase == "lora":
            self._tell_linear_form()

    def _tell_linear_form(self) -> None:
        """How linear layers multiply, and what of the settings for it does nothing."""
        model, tokens = self.engine.module, self.config.train.micro_batch * self.config.data.sequence_length
        is_compiled = compiling.is_wanted(self.config.model.compile, self.device)
        asked = self.config.lora_settings.keep_merged is True
        lines = [
            "" if is_compiled else form_line(model, tokens),
            kept_line(model, tokens, is_compiled=is_compiled) if asked else "",
        ]
        for line in filter(None, lines):
            self.tell(line)
