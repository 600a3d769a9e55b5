"""How a model forms its loss (``model.loss``): torch's over all its logits, (tokens, vocabulary), or a chunk of them at a time.

The latter serves every model of transformers whose head's output goes to its loss function as it is, and nowhere else. While labels
are given, the head hands its input through, and what stands in the place of the loss function goes on from these hidden states.
Without labels a model is as it was; its modules and their names always are.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

from relora_ds.config import Loss
from relora_ds.errors import ConfigError
from relora_ds.method import lora
from relora_ds.method.targets import in_role
from relora_ds.models.cross_entropy import IGNORED, chunk_tokens, chunked_cross_entropy, is_plain, num_chunks


def liger_obstacle(device: torch.device) -> tuple[str, str] | None:
    """Why Liger's kernel cannot run here, and what to do; None where it can. Starts no CUDA."""
    if device.type != "cuda":
        return "needs CUDA", "use chunked"
    return None if find_spec("liger_kernel") else ("needs the liger-kernel package", "install relora_ds[liger], or use chunked")


def attach(model: PreTrainedModel, choice: Loss, tokens: int | None = None) -> str | None:
    """Has a model form its loss as ``model.loss`` says. Its head may get factors later on.

    Args:
        model: on its device, and not compiled.
        choice: as in the recipe.
        tokens: of a micro batch, where they are known: if ``auto`` takes the logits of so many whole, nothing is done.

    Returns:
        A line for the user where ``auto`` has to take logits whole although they are many.

    Raises:
        ConfigError: the loss that was asked for by name would be wrong for this model.
    """
    is_small = tokens is not None and num_chunks(tokens, model.config.get_text_config().vocab_size) == 1
    if choice == "torch" or (choice == "auto" and is_small):
        return None
    problem = _obstacle(model)
    if problem is None and choice == "liger" and not is_plain(_head(model)):
        problem = "its output head is more than a matrix"
    if problem is None:
        loss = HeadAndLoss(choice)
        model.register_forward_pre_hook(loss.begin, with_kwargs=True)
        model.register_forward_hook(loss.end, always_call=True)
        model.loss_function = loss
        return None
    if choice != "auto":
        raise ConfigError("model.loss", choice, problem, "use torch")
    return f"model.loss: auto keeps all logits of a micro batch in memory, since {problem}"


class HeadAndLoss:
    """The loss function of a model, and what its head does meanwhile. Between two passes it holds nothing of the model.

    Args:
        choice: as in the recipe; ``auto`` takes logits whole that are one chunk.
    """

    def __init__(self, choice: Loss) -> None:
        self.choice = choice
        self.head: nn.Module | None = None
        self.handed: Tensor | None = None

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before a pass of the model."""
        labels, head = kwargs.get("labels"), _head(model)
        if labels is not None and self.serves(head, labels.numel()):
            self.head = head
            vars(head)["forward"] = self.hand_through

    def serves(self, head: Any, tokens: int) -> bool:
        """Whether the logits of a pass over so many tokens are not to be whole."""
        return self.choice != "auto" or num_chunks(tokens, head.out_features) > 1

    def hand_through(self, hidden: Tensor) -> Tensor:
        """What the head does in the place of its product."""
        self.handed = hidden
        return hidden

    def __call__(
        self, logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORED, shift_labels: Tensor | None = None, **others: Any,
    ) -> Tensor:  # fmt: skip
        """As transformers' ``ForCausalLMLoss``, but that ``logits`` are hidden states where the head handed them through."""
        if self.head is None:
            return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **others)
        assert self.handed is not None and logits.shape == self.handed.shape, "the head's output goes to the loss as it is"
        vars(self.head).pop("forward")  # the chunks want its product
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        target = shift_labels.reshape(-1).to(self.handed.device)
        target = target.masked_fill(target == ignore_index, IGNORED)
        loss = _liger if self.choice == "liger" else chunked_cross_entropy
        return loss(self.head, self.handed.reshape(len(target), -1), target, num_items_in_batch)

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After a pass, also one that failed. Hidden states are not returned for logits."""
        if self.head is None:
            return None
        vars(self.head).pop("forward", None)
        self.head = self.handed = None
        if isinstance(output, ModelOutput):
            return type(output)(**{name: value for name, value in output.items() if name != "logits"})
        return None


def head_tokens(model: PreTrainedModel, tokens: int) -> int:
    """How many the head multiplies at once in a pass over so many with their labels."""
    loss, head = model.loss_function, _head(model)
    return chunk_tokens(tokens, head.out_features) if isinstance(loss, HeadAndLoss) and loss.serves(head, tokens) else tokens


def _head(model: nn.Module) -> Any:
    return in_role(model, "output-head")


def _liger(head: Any, hidden: Tensor, labels: Tensor, divisor: Tensor | int | None = None) -> Tensor:
    """As :func:`chunked_cross_entropy`, for a plain head; not measured on a GPU."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    reduction = "mean" if divisor is None else "sum"
    loss: Tensor = liger_fused_linear_cross_entropy(hidden, head.weight, labels, ignore_index=IGNORED, reduction=reduction)
    return loss if divisor is None else loss / divisor


def _obstacle(model: PreTrainedModel) -> str | None:
    """Why the loss cannot go on from the head's input, in words; None where it can."""
    if not isinstance(_head(model), (nn.Linear, lora.ReLoRALinear)):
        return "the model tells of no linear output head"
    if model.loss_function is not ForCausalLMLoss or not _is_straight(model):
        return f"{model.config.model_type} does more with its logits than hand them to the usual loss"
    return None


class _NoLogits:
    """Stands for logits that nothing may be done with but what leaves them as they are."""

    def float(self) -> _NoLogits:
        return self

    def contiguous(self) -> _NoLogits:
        return self


@torch.no_grad()
def _is_straight(model: PreTrainedModel) -> bool:
    """Whether the head's output goes to the loss function, once, and nothing is done with it: then it need not be a tensor.

    Tried on two tokens. Losses are not compared: a resumed run has no weights yet, and soft-capping changes small logits by less than
    16 bits tell.
    """
    head, given, seen = _head(model), _NoLogits(), []

    def loss(logits: object, *others: Any, **named: Any) -> Tensor:
        seen.append(logits is given)
        return torch.zeros((), device=ids.device)

    was_training = model.training
    ids = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    vars(head)["forward"] = lambda hidden: given
    model.loss_function = loss
    try:
        model.eval()(input_ids=ids, labels=ids)
    except (AttributeError, TypeError):  # what anything raises that is not a tensor
        return False
    finally:
        model.train(was_training)
        del vars(head)["forward"], model._loss_function
    return seen == [True]
