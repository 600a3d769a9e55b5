"""One forward and backward pass without any memory: what a model allocates and frees, in order, and when each gradient is there.

The model is built of fake tensors (shapes and dtypes without data) and runs its own code on them, so nothing is derived from what an
architecture is thought to do. The fake device is the CPU: there attention takes its fused kernel, as on a GPU, whereas the meta
device would take the sum of products. What a kernel allocates and frees inside itself is not seen.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from relora_ds.config import Loss, ReLoRA
from relora_ds.errors import ConfigError
from relora_ds.method import lora
from relora_ds.method.targets import check_rank, find_targets
from relora_ds.models import build as models
from relora_ds.models.loss import attach as attach_loss
from relora_ds.models.packing import none_packed

logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # what fails on them is told in one line
Mark = str
"""The name of a parameter whose gradient is complete, and about to be taken."""


class Recorder(TorchDispatchMode):
    """Notes the storages that operations make and free while it is entered; those that were there before do not count.

    Attributes:
        sizes: bytes of each storage, in the order in which they are made.
        steps: i + 1 for the making of storage i, -(i + 1) for its end, or a :data:`Mark`.
        live, peak: bytes now, and the most there were at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.steps: list[int | Mark] = []
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor.is_meta and tensor.untyped_storage()._cdata not in known:
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        self.sizes.append(storage.nbytes())
        number = len(self.sizes)
        self.steps.append(number)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._end, number)

    def _end(self, number: int) -> None:
        self.steps.append(-number)
        self.live -= self.sizes[number - 1]


@dataclass(frozen=True)
class Trace:
    """What one micro batch makes and frees; see :class:`Recorder`."""

    sizes: tuple[int, ...]
    steps: tuple[int | Mark, ...]

    def extended(self, other: Trace, share: float) -> Trace | None:
        """On the line through this trace and ``other``, ``share`` of the way from here; None where they do other things."""
        if self.steps != other.steps:
            return None
        return Trace(tuple(round(a + share * (b - a)) for a, b in zip(self.sizes, other.sizes, strict=True)), self.steps)


@dataclass(frozen=True)
class Rehearsed:
    """A model of fake tensors in the state in which an engine gets it.

    Attributes:
        mode: under which anything is done with the model.
        model: trainable parameters and buffers in their dtypes.
    """

    mode: FakeTensorMode
    model: PreTrainedModel

    def run(self, micro_batch: int, sequence_length: int) -> Trace:
        """Forward and backward of ``micro_batch`` samples of ``sequence_length`` tokens, each gradient taken when it is there.

        Raises:
            ConfigError: the model cannot compute on tensors without data.
        """
        names = {param: name for name, param in self.model.named_parameters() if param.requires_grad}
        collecting = gc.isenabled()
        gc.disable()  # what ends must end when it is let go, in every run alike
        recorder = Recorder()

        def take(param: nn.Parameter) -> None:
            recorder.steps.append(names[param])
            param.grad = None

        hooks = [param.register_post_accumulate_grad_hook(take) for param in names]
        try:
            with _explained(self.model), none_packed(), self.mode, recorder:
                ids = torch.zeros(micro_batch, sequence_length, dtype=torch.int64)
                self.model(input_ids=ids, labels=ids).loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
            if collecting:
                gc.enable()
        return Trace(tuple(recorder.sizes), tuple(recorder.steps))

    def peak_of(self, work: Callable[[], object]) -> int:
        """The most bytes that ``work`` makes at once."""
        with self.mode, Recorder() as recorder:
            work()
        return recorder.peak


@contextmanager
def _explained(model: PreTrainedModel) -> Iterator[None]:
    """Turns whatever a pass raises on tensors without data into one ConfigError: there are kernels that know no such tensors."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        problem = f"its pass on tensors without data fails ({said})"
        raise ConfigError("model", model.config.model_type, problem, "measure it in a short run") from None


class _FusedDropout(nn.Dropout):
    """Keeps a mask of one byte an entry, as a GPU's kernel does; on a CPU torch keeps one in the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, self.training)[0] if self.p > 0 else x


def build(
    architecture: PretrainedConfig,
    *,
    dtype: torch.dtype,
    settings: ReLoRA | None,
    attention: str = "auto",
    gradient_checkpointing: bool = False,
    loss: Loss = "auto",
    on_cuda: bool = True,
) -> Rehearsed:
    """The model of a phase, in fake tensors.

    Args:
        architecture: of the model.
        dtype: of the engine.
        settings: of the factors, with ``frozen.dtype`` as it is stored; None for the full-rank phase.
        attention: as in the recipe; flash-attention 2 keeps what the fused kernel of torch keeps, which stands for it.
        gradient_checkpointing: whether activations of blocks are formed again in the backward pass.
        loss: as in the recipe; Liger's is taken for ``chunked``.
        on_cuda: whether dropout works as on a GPU.

    Raises:
        ConfigError: as :func:`relora_ds.models.build.skeleton` and :func:`relora_ds.method.targets.find_targets` raise it, for too
        large a rank, and for a model that cannot compute on tensors without data.
    """
    implementation = "auto" if attention == "flash_attention_2" else attention
    model = models.skeleton(architecture, attention=implementation, dtype=dtype, device=torch.device("cpu")).train()
    layers = {} if settings is None else find_targets(model, settings.targets)
    mode = FakeTensorMode()
    with mode:
        _make_fake(model, dtype)
        if settings is not None:
            check_rank(layers, settings.rank)
            lora.wrap_layers(
                model, layers, rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout,
                frozen=settings.frozen, trainable_scaling=settings.trainable_scaling,
            )  # fmt: skip
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with _explained(model), none_packed():
            attach_loss(model, "chunked" if loss == "liger" else loss)
    if on_cuda:
        for module in model.modules():
            if type(module) is nn.Dropout:
                module.__class__ = _FusedDropout
    return Rehearsed(mode, model)


def _make_fake(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters and buffers without data in the place of those of a skeleton; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    metas: list[nn.Parameter] = []  # kept: an id is only unique while its owner lives
    for module in model.modules():
        for key, param in list(module._parameters.items()):
            if param is not None:
                metas.append(param)
                made.setdefault(id(param), nn.Parameter(torch.empty(param.shape, dtype=dtype), param.requires_grad))
                module._parameters[key] = made[id(param)]
        for key, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)


def num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
