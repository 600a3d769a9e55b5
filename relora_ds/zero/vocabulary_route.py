"""The way of the vocabulary's gradients, where the ``traffic`` section sends them more rarely, sparser or in 8 bits.

Embedding and head have optimizer groups of their own, the last ones. DeepSpeed never sees their gradients: a hook takes each away as
soon as it is there, and :class:`VocabularyRoute` sums them here, brings them to the owners of their rows with
:func:`relora_ds.zero.rows.sum_of_own`, and hands DeepSpeed the finished partition, or leaves the groups out of the update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from relora_ds.comm.counter import GRADIENT, LEDGER
from relora_ds.config import Traffic
from relora_ds.errors import ConfigError
from relora_ds.zero import versions as zero_versions
from relora_ds.zero.rows import encode, quantise_, row_bytes, sum_of_own
from relora_ds.zero.state import GradientRoute, ZeroState, data_parallel_group, unroutable
from relora_ds.zero.vocabulary import Words

STATE_KEY = "relora_ds_vocabulary"
BY_GROUP = ("bit16_groups", "bit16_groups_flat", "parallel_partitioned_bit16_groups")
"""DeepSpeed's lists that an update goes through, group by group."""
REPLACED = (
    "step", "scaled_global_norm", "has_overflow_partitioned_grads_serial", "process_gradients", "state_dict", "load_state_dict",
    "independent_gradient_partition_epilogue", "finalize_gradient_accumulation_boundary",
)  # fmt: skip
INTERNALS = (
    *BY_GROUP, *REPLACED, "averaged_gradients", "partition_size", "check_grad_overflow", "_hp_optimizer_states_linked",
    "communication_data_type", "gradient_accumulation_dtype", "gradient_average", "_grad_acc_hooks", "_has_inf_or_nan", "loss_scale",
)  # fmt: skip


def route_vocabulary(engine: Any, words: Words, settings: Traffic, route: GradientRoute | None) -> VocabularyRoute:
    """Gives a fresh engine's vocabulary the way that ``settings`` asks for.

    Args:
        engine: DeepSpeed's, of ZeRO stage 1 or 2, whose last optimizer groups hold these words and nothing else.
        words: the trained ones, not none.
        settings: the recipe's ``traffic`` section.
        route: the way of the other gradients; None when it is DeepSpeed's.

    Raises:
        ConfigError: the engine's optimizer is not one that this can serve.
    """
    zero = engine.optimizer
    problem = f"the engine's optimizer is {type(zero).__name__}"
    if type(zero) is DeepSpeedZeroOptimizer:
        missing = [name for name in INTERNALS if not hasattr(zero, name)]
        problem = f"DeepSpeed {deepspeed.__version__} has no {', '.join(missing)}" if missing else unroutable(zero, engine)
    if problem:
        way_out = f"leave traffic out, or take ZeRO stage 1 or 2 alone and {zero_versions.install()}"
        raise ConfigError("traffic", settings.model_dump(), f"cannot be served: {problem}", way_out)
    average = zero.gradient_average if route is None else route.average
    return VocabularyRoute(zero, words, settings, average=average)


class VocabularyRoute:
    """What becomes of the vocabulary's gradients between the backward pass and the optimizer.

    Of every ``vocabulary_every`` updates the last sends the mean over all of them, steps these groups and gathers their parameters;
    in the others the groups are left out, so that moments, masters, step counts and parameters stay as they are. Norm and clipping
    are of what is reduced in an update.

    Whether an update is skipped is agreed before anything is sent, and the vocabulary's own gradients on each rank have a say in it,
    in every update. So a non-finite gradient is dropped with its update and never reaches a sum or a residual; sums that were to be
    sent with a skipped update wait for the next turn.

    Args:
        zero: DeepSpeed's optimizer.
        words: the members of its last groups.
        settings: the ``traffic`` section.
        average: False when gradients are summed over the ranks, not averaged.

    Attributes:
        updates: calls of :meth:`step` so far.
        gathered: updates whose gradients are in ``pending``, beside what 8 bits have lost.
        pending: (rows, width) float32 for each parameter: what this rank has gathered and not delivered, without loss scale.
            Only there while there is something to keep: 4 bytes for each entry, in 8 bits always.
        seen: (rows,) bool for ``sparse``: rows of it that had a gradient in what is gathered.
        fresh: this update's gradients, summed over its micro-batches as DeepSpeed would, with the loss scale.
    """

    def __init__(self, zero: Any, words: Words, settings: Traffic, *, average: bool) -> None:
        self.zero, self.settings, self.average = zero, settings, average
        members = {id(p) for p in words.params}
        self.first = next(index for index, group in enumerate(zero.bit16_groups) if id(group[0]) in members)
        self.params = [p for group in zero.bit16_groups[self.first :] for p in group]
        assert {id(p) for p in self.params} == members, "the vocabulary's groups are the last, and hold nothing else"
        self.sparse = words.sparse if settings.vocabulary_rows == "seen" else None
        self.num_sparse = 0 if self.sparse is None else self.sparse.shape[0]
        self.wire = torch.int8 if settings.vocabulary_dtype == "int8" else zero.communication_data_type
        self.updates = self.gathered = 0
        self.is_due = False
        self.fresh: dict[nn.Parameter, Tensor] = {}
        self.pending: dict[nn.Parameter, Tensor] = {}
        self.seen: Tensor | None = None
        self.comm = data_parallel_group(zero, self.params[0].device)
        names = {str(index): p for index, p in enumerate(self.params)}
        state = ZeroState(zero, names, self.comm)
        own = [state.own_slice(name) for name in names]
        by_rank: list[Any] = [None] * self.comm.world_size
        dist.all_gather_object(by_rank, own, group=self.comm.group)
        self.slices = {p: [slices[index] for slices in by_rank] for index, p in enumerate(self.params)}
        if isinstance(zero.optimizer, (torch.optim.Adam, torch.optim.AdamW)):  # a subclass in newer versions only
            for name in names:  # a checkpoint before their first step must hold moments, or it serves no other number of ranks
                state.start_adam_state(name, 0)
        self.theirs: dict[str, Callable[..., Any]] = {name: getattr(zero, name) for name in REPLACED}
        self._replace()

    def _replace(self) -> None:
        zero = self.zero
        zero.step, zero.scaled_global_norm = self.step, self.norm
        zero.has_overflow_partitioned_grads_serial = self.has_overflow
        zero.process_gradients = self.process
        zero.independent_gradient_partition_epilogue = self.without_vocabulary(zero.independent_gradient_partition_epilogue)
        zero.finalize_gradient_accumulation_boundary = self.without_vocabulary(zero.finalize_gradient_accumulation_boundary)
        zero.state_dict, zero.load_state_dict = self.state_dict, self.load_state_dict
        zero.check_grad_overflow = True  # asked before anything is sent; one scalar all-reduce
        zero.vocabulary = self
        for param in self.params:  # where DeepSpeed has hooks of its own, process() comes first
            zero._grad_acc_hooks.append(param.register_post_accumulate_grad_hook(self.take))

    # Gathering

    def process(self, param: nn.Parameter, group: int) -> None:
        """Stands for ``process_gradients``, called with every gradient that is ready."""
        if group >= self.first:
            self.take(param)
        else:
            self.theirs["process_gradients"](param, group)

    def take(self, param: nn.Parameter) -> None:
        """Moves a gradient out of DeepSpeed's sight; adds it to those of the update's earlier micro-batches."""
        if param.grad is not None:
            grad, param.grad = param.grad.to(self.zero.gradient_accumulation_dtype), None
            self.fresh[param] = self.fresh[param].add_(grad) if param in self.fresh else grad

    def gather(self, loss_scale: float) -> None:
        """Adds this update's gradients to what is pending."""
        for param in self.params:
            grad = self.fresh.pop(param, None)
            if param not in self.pending:
                self.pending[param] = torch.zeros(param.shape, dtype=torch.float32, device=param.device)
            if grad is not None:
                self.see(param, grad)
                self.pending[param].add_(grad, alpha=1 / loss_scale)
        self.gathered += 1

    def see(self, param: nn.Parameter, grad: Tensor) -> None:
        """Notes which rows have a gradient."""
        if param is self.sparse:
            rows = grad.ne(0).any(dim=1)
            self.seen = rows if self.seen is None else self.seen.logical_or_(rows)

    # The update

    def step(self, closure: None = None) -> None:
        """One update, of the vocabulary too when its turn has come."""
        self.updates += 1
        self.is_due = self.updates % self.settings.vocabulary_every == 0
        if self.is_due:
            for group in range(self.first, len(self.zero.bit16_groups)):
                self.zero.averaged_gradients[group] = []
            self.theirs["step"]()
        else:
            loss_scale = self.zero.loss_scale  # the step may change it
            with self.left_out():
                self.theirs["step"]()
            if not self.zero.overflow:
                self.gather(loss_scale)
        self.fresh.clear()

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Shortens DeepSpeed's lists by the vocabulary's groups, and puts them back."""
        zero, optimizer = self.zero, self.zero.optimizer
        kept = {name: getattr(zero, name) for name in BY_GROUP}
        groups, is_linked = optimizer.param_groups, zero._hp_optimizer_states_linked
        for name, content in kept.items():
            setattr(zero, name, content[: self.first])
        optimizer.param_groups = groups[: self.first]
        try:
            yield
        finally:
            for name, content in kept.items():
                setattr(zero, name, content)
            optimizer.param_groups = groups
            zero._hp_optimizer_states_linked = is_linked  # at the first step: of all groups, or not yet

    def without_vocabulary(self, function: Callable[[], None]) -> Callable[[], None]:
        """``function``, which DeepSpeed calls after a backward pass, with the vocabulary left out."""

        def call() -> None:
            with self.left_out():
                function()

        return call

    def has_overflow(self) -> Tensor:
        """Whether a gradient is not finite: of DeepSpeed's own partitions, or of this rank's vocabulary before it is sent."""
        found = self.theirs["has_overflow_partitioned_grads_serial"]()
        for grad in self.fresh.values():
            found = found | self.zero._has_inf_or_nan(grad).bool()
        return found

    def norm(self, *args: Any, **kwargs: Any) -> Tensor:
        """Stands for ``scaled_global_norm``, which DeepSpeed asks for once all ranks know that the update is not skipped."""
        if self.is_due:
            self.deliver()
        return self.theirs["scaled_global_norm"](*args, **kwargs)

    @LEDGER.serving(GRADIENT)
    def deliver(self) -> None:
        """Brings the mean over the gathered updates to its owners; keeps what 8 bits lost of it."""
        for group in range(self.first, len(self.zero.bit16_groups)):
            flat = torch.zeros(int(self.zero.partition_size[group]), dtype=torch.float32, device=self.comm.device)
            views = []
            for param in self.zero.bit16_groups[group]:
                own = self.slices[param][self.comm.rank]
                total, begin = self.reduce(param)
                if own.numel:
                    view = flat.narrow(0, param._hp_mapping.hp_fragment_address.start, own.numel)
                    views.append(view.copy_(total.view(-1).narrow(0, own.start - begin, own.numel)))
            self.zero.averaged_gradients[group] = zero_versions.finished_gradients(views, flat)
        self.gathered, self.seen = 0, None

    def reduce(self, param: nn.Parameter) -> tuple[Tensor, int]:
        """The rows that hold this rank's fragment of ``param``, averaged over updates and ranks; the entry at which they begin."""
        width = param.shape[1]
        owned = [range(s.start // width, -(-(s.start + s.numel) // width)) if s.numel else range(0) for s in self.slices[param]]
        coded = self.code(param)
        total = sum_of_own(coded, width, self.wire, owned, self.comm.group, seen=self.rows_to_send(param))
        return total.div_(self.comm.world_size if self.average else 1), owned[self.comm.rank].start * width

    def rows_to_send(self, param: nn.Parameter) -> Tensor | None:
        """(rows,) bool; None for all."""
        if param is not self.sparse:
            return None
        if self.seen is None:
            self.seen = torch.zeros(self.num_sparse, dtype=torch.bool, device=self.comm.device)
        return self.seen

    def code(self, param: nn.Parameter) -> Tensor:
        """What this rank sends of ``param``, for all ranks: (rows, row_bytes) uint8."""
        count, loss_scale = self.gathered + 1, self.zero.loss_scale
        grad, value = self.fresh.pop(param, None), self.pending.pop(param, None)
        if grad is not None:
            self.see(param, grad)
        if value is not None:
            value.mul_(loss_scale)
            value = value if grad is None else value.add_(grad)
        else:
            value = torch.zeros_like(param) if grad is None else grad
        if self.wire != torch.int8:
            return encode(value.div_(count), self.wire)
        value = value.float().div_(count)
        coded = self.quantise_rows_(value, self.rows_to_send(param))
        self.pending[param] = value.mul_(count / loss_scale)
        return coded

    @staticmethod
    def quantise_rows_(value: Tensor, rows: Tensor | None) -> Tensor:
        """:func:`relora_ds.zero.rows.quantise_`; rows that are not to be sent are zeros in what it returns, and keep their value."""
        if rows is None:
            return quantise_(value)
        coded = value.new_zeros(value.shape[0], row_bytes(value.shape[1], torch.int8), dtype=torch.uint8)
        sent = value[rows]
        coded[rows] = quantise_(sent)
        value[rows] = sent
        return coded

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """ZeRO's state of this rank, plus what it has not delivered: 4 bytes for each entry, where there is something."""
        own = {
            "updates": self.updates,
            "gathered": self.gathered,
            "pending": [self.pending.get(p) for p in self.params],
            "seen": self.seen,
        }
        return {**self.theirs["state_dict"](), STATE_KEY: own}

    def load_state_dict(self, state_dict_list: list[dict[str, Any]], *args: Any, **kwargs: Any) -> None:
        """The counterpart of :meth:`state_dict`; called by ``engine.load_checkpoint`` with the list of all ranks' states."""
        self.theirs["load_state_dict"](state_dict_list, *args, **kwargs)
        if state_dict_list:
            self.load_shares([state_dict_list[self.comm.rank]])

    def load_shares(self, states: Sequence[dict[str, Any]]) -> None:
        """Takes over what is pending.

        Args:
            states: :meth:`state_dict` of this rank; of all ranks that there were, where their number has changed: each rank then
                gets the mean, so that the mean over the ranks is what it was.
        """
        shares = [state[STATE_KEY] for state in states if STATE_KEY in state]
        self.fresh.clear()
        self.pending.clear()
        self.updates, self.gathered, self.seen = 0, 0, None
        if not shares:
            return
        self.updates, self.gathered = shares[0]["updates"], shares[0]["gathered"]
        for index, param in enumerate(self.params):
            parts = [share["pending"][index] for share in shares if share["pending"][index] is not None]
            if parts:
                self.pending[param] = torch.zeros(param.shape, dtype=torch.float32, device=param.device)
                for part in parts:
                    self.pending[param].add_(part.to(param.device), alpha=1 / len(shares))
        for rows in (share["seen"] for share in shares if share["seen"] is not None):
            rows = rows.to(self.comm.device)
            self.seen = rows if self.seen is None else self.seen.logical_or(rows)
