"""Which parameters are the vocabulary: the weights of a model's embedding and of its head, as far as they are trained.

They are much of what a LoRA phase trains, and their gradients can be sent more rarely, sparser or coarser than those of the factors:
the ``traffic`` section of a recipe. :mod:`relora_ds.zero.vocabulary_route` does it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from relora_ds.errors import ConfigError

VOCABULARY_GROUP = "vocabulary"


@dataclass(frozen=True)
class Words:
    """The vocabulary of a model.

    Attributes:
        params: the trainable weights of the embedding and the head, (tokens, width) each.
        sparse: the one of them that has rows without a gradient: the embedding's, unless it is the head's as well, since a head has a
            gradient for every token. None: there is no such weight.
    """

    params: tuple[nn.Parameter, ...] = ()
    sparse: nn.Parameter | None = None

    def among(self, trained: Iterable[nn.Parameter]) -> Words:
        """Those that are trained."""
        ids = {id(p) for p in trained}
        kept = tuple(p for p in self.params if id(p) in ids)
        return Words(kept, self.sparse if id(self.sparse) in ids else None)


def words_of(model: nn.Module) -> Words:
    """The vocabulary of a model.

    Raises:
        ConfigError: the model does not say what it is.
    """
    if not (hasattr(model, "get_input_embeddings") and hasattr(model, "get_output_embeddings")):
        problem = "it has no get_input_embeddings and get_output_embeddings, which say what the vocabulary is"
        raise ConfigError("model", type(model).__name__, problem, "leave traffic out")
    embedding, head = (_weight(module) for module in (model.get_input_embeddings(), model.get_output_embeddings()))
    chosen = {id(weight): weight for weight in (embedding, head) if weight is not None}
    return Words(tuple(chosen.values()), embedding if embedding is not head else None)


def _weight(module: Any) -> nn.Parameter | None:
    weight = getattr(module, "weight", None)  # of a layer under LoRA it is a store, which is not trained
    return weight if isinstance(weight, nn.Parameter) and weight.requires_grad else None


def apart(groups: list[dict[str, Any]], params: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """Optimizer groups with these parameters in groups of their own, which come last and keep the settings.

    Raises:
        ConfigError: nothing else is trained.
    """
    chosen = {id(p) for p in params}
    rest = [{**group, "params": [p for p in group["params"] if id(p) not in chosen]} for group in groups]
    own = [{**group, "params": [p for p in group["params"] if id(p) in chosen], "name": VOCABULARY_GROUP} for group in groups]
    if not any(group["params"] for group in rest):
        raise ConfigError("traffic", VOCABULARY_GROUP, "nothing but the vocabulary is trained", "leave traffic out")
    return [group for group in (*rest, *own) if group["params"]]
