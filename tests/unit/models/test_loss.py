"""A loss by chunks: torch's, to rounding, with its gradients; never all logits; and models as they were without labels."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from relora_ds.errors import ConfigError
from relora_ds.method import lora
from relora_ds.models import cross_entropy
from relora_ds.models import loss as model_loss
from relora_ds.models.compiling import compile_blocks
from relora_ds.models.cross_entropy import IGNORED, chunked_cross_entropy
from relora_ds.models.loss import attach, head_tokens, liger_obstacle
from relora_ds.training import preflight
from tests.distributed.common import VOCAB, WITH_VOCABULARY, tiny_gpt2, tiny_llama, tiny_neox
from tests.memory import PeakMemory
from tests.unit.test_config import judge, refusal

SAMPLES, LENGTH = 3, 17
"""51 tokens: no multiple of the chunks below."""


@pytest.fixture(autouse=True)
def chunks_of_seven_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK", 7 * VOCAB + 3)


def with_factors(model: nn.Module, **how: Any) -> nn.Module:
    """The head among the targets; factors that change something."""
    lora.wrap(model, rank=3, alpha=6.0, targets=WITH_VOCABULARY, **how)
    for _, layer in lora.relora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.02)
    return model


def with_a_bias(model: nn.Module) -> nn.Module:
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, VOCAB))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny_llama,
    "gpt2, tied": tiny_gpt2,
    "neox": tiny_neox,
    "a bias": lambda: with_a_bias(tiny_llama()),
    "factors": lambda: with_factors(tiny_llama()),
    "factors, int8": lambda: with_factors(tiny_llama(), frozen=lora.Frozen(dtype="int8", group_size=16)),
    "factors alone": lambda: with_factors(tiny_llama(), frozen=lora.Frozen(dtype="none")),
    "factors, trained scale": lambda: with_factors(tiny_llama(), trainable_scaling=True),
}


def batch() -> tuple[Tensor, Tensor]:
    """Tokens and labels, some of which do not count."""
    ids = torch.randint(0, VOCAB, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 4:9] = IGNORED
    return ids, labels


def passed(model: nn.Module, **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one pass."""
    ids, labels = batch()
    model.zero_grad()
    loss = model(input_ids=ids, labels=labels, **more).loss
    (3 * loss).backward()
    return loss.detach(), {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


def assert_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    """To 1e-6 of the norm; a single number, whose terms may cancel, to 1e-5."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert (found[1][name] - grad).norm() <= (1e-6 if grad.numel() > 1 else 1e-5) * grad.norm(), name


@pytest.mark.parametrize(
    "more", [{}, {"num_items_in_batch": 40}, {"num_items_in_batch": torch.tensor(40)}], ids=["mean", "n", "N"]
)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_torchs(name: str, more: dict[str, Any]) -> None:
    model = MODELS[name]()
    expected = passed(model, **more)
    assert attach(model, "chunked") is None
    assert_same(passed(model, **more), expected)


@pytest.mark.parametrize("model", [tiny_llama, lambda: with_factors(tiny_llama())], ids=["plain", "factors"])
def test_an_evaluation_and_a_frozen_part(model: Callable[[], nn.Module]) -> None:
    """Without gradients, and with those of the head or of the rest alone."""
    made = model()
    ids, labels = batch()
    with torch.no_grad():
        expected = made(input_ids=ids, labels=labels).loss
        attach(made, "chunked")
        found = made(input_ids=ids, labels=labels).loss
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    _, whole = passed(made)
    for part in ("lm_head", "model"):
        for param in made.parameters():
            param.requires_grad_(False)
        for name, param in made.named_parameters():
            param.requires_grad_(name.startswith(part))
        assert_same(passed(made), (passed(made)[0], {name: grad for name, grad in whole.items() if name.startswith(part)}))


def gradients(way: Callable[..., Tensor], hidden: Tensor, weight: Tensor, labels: Tensor, scale: float = 1.0) -> list[Tensor]:
    head = nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    head.weight.data, hidden = weight.clone(), hidden.clone().requires_grad_()
    (way(head, hidden, labels) * scale).backward()
    assert hidden.grad is not None and head.weight.grad is not None
    return [hidden.grad.double() / scale, head.weight.grad.double() / scale]


def whole(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = head(hidden)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels)


@pytest.mark.parametrize("chunks", [2, 64])
def test_gradients_in_bf16(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to exact ones as torch's, however many chunks: sums in fp32. Those of the head are rounded once more, in each chunk."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 32, generator=generator).bfloat16() for rows in (512, 128))
    labels = torch.randint(0, 128, (512,), generator=generator)
    monkeypatch.setattr(cross_entropy, "CHUNK", 128 * 512 // chunks)
    exact = gradients(whole, hidden.double(), weight.double(), labels)
    errors = [
        [
            float((grad - true).norm() / true.norm())
            for grad, true in zip(gradients(way, hidden, weight, labels), exact, strict=True)
        ]
        for way in (whole, chunked_cross_entropy)
    ]
    assert errors[1][0] <= 1.01 * errors[0][0]
    assert errors[1][1] <= 1.4 * errors[0][1]


def test_gradients_in_fp16_come_after_the_loss_scale() -> None:
    """Formed before it, most would vanish."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 8, generator=generator).half() for rows in (51, VOCAB))
    labels = torch.randint(0, VOCAB, (51,), generator=generator)
    expected, found = (gradients(way, hidden, weight, labels, 2.0**12) for way in (whole, chunked_cross_entropy))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 2e-3 * theirs.norm(), "two roundings of 16 bits"


def peak(way: Callable[..., Tensor], head: nn.Module, hidden: Tensor, labels: Tensor) -> int:
    with PeakMemory() as memory:
        way(head, hidden, labels).backward()
    return memory.peak


@pytest.mark.parametrize("is_plain", [True, False])
def test_logits_are_never_whole(is_plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside gradients, at most four chunks of logits in fp32."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 16 * 2048)
    head = nn.Linear(8, 2048, bias=not is_plain)
    hidden, labels = torch.randn(512, 8, requires_grad=True), torch.randint(0, 2048, (512,))
    kept = 4 * (2 * hidden.numel() + 3 * 2048 * 8)
    assert peak(chunked_cross_entropy, head, hidden, labels) < kept + 4 * 4 * 16 * 2048
    assert peak(whole, head, hidden, labels) > 2 * 4 * 512 * 2048


def test_without_labels_a_model_is_as_it_was() -> None:
    plain, model = tiny_llama().eval(), tiny_llama().eval()
    attach(model, "chunked")
    ids, labels = batch()
    assert model(input_ids=ids, labels=labels).get("logits") is None, "which would be hidden states"
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model.generate(ids, max_new_tokens=3), plain.generate(ids, max_new_tokens=3))


def test_a_pass_that_fails_leaves_the_head_as_it_was() -> None:
    model = tiny_llama()
    attach(model, "chunked")
    ids, labels = batch()
    for bad in (ids, ids + VOCAB):  # labels that are no tokens, then tokens that are none
        with pytest.raises((RuntimeError, IndexError)):
            model(input_ids=bad, labels=labels + VOCAB)
        assert "forward" not in vars(model.lm_head)
    assert model(input_ids=ids).logits.shape == (SAMPLES, LENGTH, VOCAB)


def test_nothing_is_kept_between_passes() -> None:
    model = tiny_llama()
    attach(model, "chunked")
    output = model(input_ids=batch()[0], labels=batch()[1])
    output.loss.backward()
    ended = weakref.ref(model.lm_head)
    assert vars(model.loss_function) == {"choice": "chunked", "head": None, "handed": None}
    lora.wrap(model, rank=3, alpha=6.0, targets="output-head")
    del output
    assert ended() is None, "a head that was replaced goes at once, by no collection"
    gc.collect()


def test_auto_is_by_the_size_of_the_logits() -> None:
    model = tiny_llama()
    assert attach(model, "auto", tokens=7) is None
    assert not isinstance(model.loss_function, model_loss.HeadAndLoss), "nothing to do"
    assert attach(model, "auto", tokens=8) is None
    assert [head_tokens(model, tokens) for tokens in (7, 8, 51)] == [7, 4, 7]
    ids = batch()[0]
    assert model(input_ids=ids[:1, :7], labels=ids[:1, :7]).logits.shape == (1, 7, VOCAB)
    assert "logits" not in model(input_ids=ids, labels=ids)
    other = tiny_llama()
    attach(other, "torch", tokens=8)
    assert head_tokens(other, 8) == 8


SIZES = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "ffn_dim": 24, "num_hidden_layers": 1, "word_embed_proj_dim": 16,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "output_router_logits": True,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def of_type(model_type: str, **changes: Any) -> nn.Module:
    default = AutoConfig.for_model(model_type)
    sizes = {key: value for key, value in SIZES.items() if key in default.to_dict() or key in default.attribute_map}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **changes}))


@pytest.mark.parametrize("model_type", ["mistral", "qwen3", "mixtral", "opt", "gemma3_text"])
def test_models_that_hand_their_logits_to_the_loss(model_type: str) -> None:
    """OPT by way of ``contiguous()``; Mixtral adds another loss; Gemma 3 may cap, and does not unless it is told to."""
    model = of_type(model_type).eval()
    ids, labels = batch()
    expected = model(input_ids=ids, labels=labels).loss
    assert attach(model, "auto") is None
    found = model(input_ids=ids, labels=labels)
    assert "logits" not in found
    torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=0)


class OwnLoss(LlamaForCausalLM):
    """Forms its loss itself, of logits that it gives to nobody else."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class TwoLosses(LlamaForCausalLM):
    """Keeps large logits small, beside the usual loss."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        return self.loss_function(logits, labels, VOCAB) + 1e-4 * torch.logsumexp(logits, -1).square().mean()


class LossTwice(LlamaForCausalLM):
    """Foretells the token after the next one, too."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        return self.loss_function(logits, labels, VOCAB) + self.loss_function(logits, labels.roll(-1, 1), VOCAB)


TINY = LlamaConfig(vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)


@pytest.mark.parametrize(
    "build",
    [
        lambda: of_type("gemma2"),
        lambda: of_type("granite", logits_scaling=2.0),
        lambda: of_type("gemma3_text", final_logit_softcapping=30.0),
        lambda: OwnLoss(TINY),
        lambda: TwoLosses(TINY),
        lambda: LossTwice(TINY),
    ],
    ids=["caps", "scales", "told to cap", "own loss", "two losses", "the loss twice"],
)
def test_models_that_do_more_with_their_logits(build: Callable[[], Any]) -> None:
    """``auto`` leaves them alone and says so, ``chunked`` by name is refused."""
    model = build()
    before, own = set(vars(model)), model.loss_function
    line = attach(model, "auto")
    assert line is not None and line.startswith("model.loss: auto keeps all logits of a micro batch in memory, since ")
    assert "does more with its logits than hand them to the usual loss" in line
    with pytest.raises(ConfigError, match=r"^model\.loss='chunked': \w+ does more with its logits .*; use torch$"):
        attach(model, "chunked")
    assert set(vars(model)) == before and model.loss_function is own and "forward" not in vars(model.lm_head)
    assert model.training
    assert attach(model, "torch") is None and attach(model, "auto", tokens=7) is None


def test_a_model_without_a_linear_head_or_with_a_loss_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    model.loss_function = lambda logits, labels, **others: logits.sum()
    assert "the usual loss" in str(attach(model, "auto"))
    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda self: None)
    assert "tells of no linear output head" in str(attach(tiny_llama(), "auto"))


def test_with_checkpointed_and_compiled_blocks_and_a_change_of_phase() -> None:
    """Factors come in, at the head too, after a loss was attached: as at the end of a warm start."""
    found = []
    for choice in ("torch", "chunked"):
        model = tiny_llama().train()
        model.config.use_cache = False
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        attach(model, choice)
        full = passed(model)
        with_factors(model)
        compile_blocks(model, backend="aot_eager")
        found.append((full, passed(model)))
    for phase in range(2):
        assert_same(found[1][phase], found[0][phase])


# Liger's kernel, which cannot run here


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for the package: torch's loss, where its kernel's would be."""

    def linear_cross_entropy(
        hidden: Tensor, weight: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
    ) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), target, ignore_index=ignore_index, reduction=reduction)

    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.functional"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    functional: Any = sys.modules["liger_kernel.transformers.functional"]
    functional.liger_fused_linear_cross_entropy = linear_cross_entropy


@pytest.mark.parametrize("more", [{}, {"num_items_in_batch": 40}], ids=["mean", "n"])
def test_ligers_kernel_gets_what_it_wants(more: dict[str, Any], liger: None) -> None:
    model = tiny_llama()
    expected = passed(model, **more)
    attach(model, "liger")
    assert_same(passed(model, **more), expected)


def test_where_ligers_kernel_cannot_be_had(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(recipe, "model.loss=liger") == "model.loss='liger': needs CUDA; use chunked"
    assert liger_obstacle(torch.device("cuda")) == (
        "needs the liger-kernel package",
        "install relora_ds[liger], or use chunked",
    )
    with pytest.raises(ConfigError, match=r"^model\.loss='liger': its output head is more than a matrix; use torch$"):
        attach(with_factors(tiny_llama()), "liger")
    monkeypatch.setattr(preflight.loss, "liger_obstacle", lambda device: None)
    head = "relora.targets=[all-linear, output-head]"
    line = "model.loss='liger': the output head gets factors (relora.targets); use chunked"
    assert refusal(recipe, "model.loss=liger", head) == line
    judge(recipe, "model.loss=liger", head, "method=full")
    with pytest.raises(
        ConfigError, match=r"^model\.loss='liger': forms gradients before fp16's loss scale is known; use chunked$"
    ):
        preflight._check_liger("fp16", None, False)


def test_second_derivatives_are_refused() -> None:
    head, hidden = nn.Linear(8, 40, bias=False), torch.randn(6, 8, requires_grad=True)
    labels = torch.arange(6)
    loss = cross_entropy.chunked_cross_entropy(head, hidden, labels)
    with pytest.raises(RuntimeError, match="second derivatives are not formed here; model.loss=torch forms them"):
        torch.autograd.grad(loss, [hidden, head.weight], create_graph=True)
