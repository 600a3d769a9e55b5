"""The two forms of a wrapped linear layer, against the formula in fp64."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from relora_ds.config import Frozen, ReLoRA, parse_relora
from relora_ds.engine.initialize import wrapping
from relora_ds.errors import ConfigError
from relora_ds.launch import libraries
from relora_ds.method import linear, lora
from relora_ds.method.linear import Kept, choose, merged_weight
from relora_ds.method.lora import ReLoRALinear
from tests.products import counter

TOKENS, IN, OUT, RANK = 96, 40, 56, 8
FORMS = ["split", "merged"]


def layer(form: str, *, dtype: torch.dtype = torch.float32, bias: bool = True, **how: object) -> ReLoRALinear:
    """A wrapped layer whose factors are both away from zero."""
    torch.manual_seed(0)
    made = ReLoRALinear(nn.Linear(IN, OUT, bias=bias, dtype=dtype), RANK, 12.0, form=form, **how)  # type: ignore[arg-type]
    with torch.no_grad():
        for factor in (made.lora_A, made.lora_B):
            factor.copy_(torch.randn(factor.shape) * 0.1)
    return made


def gradients(made: ReLoRALinear, x: Tensor, towards: Tensor) -> dict[str, Tensor]:
    """y, and what reaches x and every parameter."""
    x = x.clone().requires_grad_(True)
    y = made(x)
    (y * towards).sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in made.named_parameters() if p.grad is not None}}


def formula(made: ReLoRALinear, x: Tensor, towards: Tensor) -> dict[str, Tensor]:
    """The same by autograd in fp64."""
    assert made.weight is not None or made.form == "split"
    given = {name: p.detach().double().requires_grad_(True) for name, p in made.named_parameters()}
    x = x.double().requires_grad_(True)
    scale = given["lora_scaling"].tanh() if "lora_scaling" in given else made.scaling
    y = scale * (x @ given["lora_A"].t() @ given["lora_B"].t())
    if made.weight is not None:
        y = y + x @ made.weight.read().double().t()
    if "bias" in given:
        y = y + given["bias"]
    (y * towards.double()).sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in given.items() if p.grad is not None}}


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def sample(shape: tuple[int, ...] = (4, TOKENS // 4)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, IN, generator=generator), torch.randn(*shape, OUT, generator=generator)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "how", [{}, {"bias": False}, {"frozen": Frozen(dtype="int8", group_size=32)}, {"frozen": Frozen(dtype="bf16")}]
)
def test_forms_are_the_formula(form: str, how: dict[str, object]) -> None:
    """To a few roundings of fp32, whatever the store."""
    made = layer(form, **how)  # type: ignore[arg-type]
    x, towards = sample()
    found, expected = gradients(made, x, towards), formula(made, x, towards)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert apart(value, expected[name]) < 1e-6, name


@pytest.mark.parametrize("how", [{"frozen": Frozen(dtype="none")}, {"trainable_scaling": True}])
def test_what_only_split_can_do_is_split(how: dict[str, object]) -> None:
    """Factors alone, and a scale that has a gradient."""
    made = layer("merged", **how)  # type: ignore[arg-type]
    x, towards = sample()
    found = gradients(made, x, towards)
    made.form = "split"
    expected = formula(made, x, towards)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert apart(value, expected[name]) < 1e-6, name


@pytest.mark.parametrize("form", FORMS)
def test_dropout_is_on_the_input_of_a_alone(form: str) -> None:
    made = layer(form, dropout=0.5).train()
    x, towards = sample()
    torch.manual_seed(3)
    found = gradients(made, x, towards)
    torch.manual_seed(3)
    x = x.double().requires_grad_(True)
    kept = nn.functional.dropout(torch.ones(TOKENS, IN), 0.5).view_as(x).double()
    assert made.weight is not None
    low = made.scaling * ((x * kept) @ made.lora_A.detach().double().t() @ made.lora_B.detach().double().t())
    y = x @ made.weight.read().double().t() + made.bias.detach().double() + low
    (y * towards.double()).sum().backward()
    assert x.grad is not None
    assert apart(found["y"], y.detach()) < 1e-6
    assert apart(found["x"], x.grad) < 1e-6
    made.eval()
    assert apart(made(sample()[0]).detach(), formula(layer("split"), *sample())["y"]) < 1e-6, "none in an evaluation"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stored", ["fp32", "bf16", "int8"])
def test_sixteen_bits(form: str, stored: str) -> None:
    """To a few roundings of bf16."""
    libraries.guard_bf16()
    made = layer(form, dtype=torch.bfloat16, frozen=Frozen(dtype=stored))  # type: ignore[arg-type]
    x, towards = (t.to(torch.bfloat16) for t in sample())
    found, expected = gradients(made, x, towards), formula(made, x, towards)
    for name, value in found.items():
        assert value.dtype == torch.bfloat16
        assert apart(value, expected[name]) < 1e-2, name


@pytest.mark.parametrize("form", FORMS)
def test_backward_keeps_no_converted_copy(form: str) -> None:
    """Beside x, what is stored and the factors, x Aᵀ at most."""
    made = layer(form, frozen=Frozen(dtype="int8"))
    x = sample((TOKENS,))[0].requires_grad_(True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made(x)
    known = {t.data_ptr() for t in (x, *made.buffers(), *made.parameters())}
    assert [t.shape for t in kept if t.data_ptr() not in known] == ([(TOKENS, RANK)] if form == "split" else [])


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("split", 2 * TOKENS * IN * OUT + TOKENS * RANK * (4 * IN + 6 * OUT)),
        ("merged", 2 * TOKENS * IN * OUT + 4 * TOKENS * RANK * (IN + OUT) + 2 * IN * OUT * RANK),
    ],
)
def test_no_gradient_of_x_is_formed_that_nobody_needs(form: str, expected: int) -> None:
    """As of the first layer after a frozen embedding."""
    made = layer(form)
    with counter() as counted:
        made(sample()[0]).sum().backward()
    assert counted.get_total_flops() == expected


def test_the_settings_reach_the_layers() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT))
    how = wrapping(ReLoRA(rank=RANK, linear="merged"), 0, "fp32")
    lora.wrap_layers(model, {"0": model[0]}, **how)
    assert model[0].form == "merged"


@pytest.mark.parametrize("other", [{"dropout": 0.1}, {"trainable_scaling": True}])
def test_merged_is_refused_where_it_could_do_nothing(other: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"^relora\.linear='merged': one product has neither"):
        parse_relora({"rank": RANK, "restart_every": 500, "linear": "merged", **other})


@pytest.mark.parametrize(("form", "expected"), [("split", 4 * TOKENS * IN * OUT + 6 * TOKENS * RANK * (IN + OUT)),
    ("merged", 4 * TOKENS * IN * OUT + 4 * TOKENS * RANK * (IN + OUT) + 4 * IN * OUT * RANK)])  # fmt: skip
def test_multiplications(form: str, expected: int) -> None:
    """What the module's table says, counted by torch."""
    made = layer(form)
    x, towards = sample()
    with counter() as counted:
        gradients(made, x, towards)
    assert counted.get_total_flops() == expected


class Written(TorchDispatchMode):
    """Notes the memory of new tensors as large as x or y."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given, self.wide = given, set[int]()
        self.kept: list[Tensor] = []  # or its address may be another's later

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        known = {tensor.data_ptr() for tensor in self.given}
        if isinstance(result, Tensor) and result.numel() in (TOKENS * IN, TOKENS * OUT) and result.data_ptr() not in known:
            self.kept.append(result)
            self.wide.add(result.data_ptr())
        return result


@pytest.mark.parametrize("form", FORMS)
def test_nothing_wide_is_written_twice(form: str) -> None:
    """y forward, the gradient of x backward."""
    made = layer(form)
    x, towards = sample((TOKENS,))
    x.requires_grad_(True)
    with Written(x, towards) as written:
        torch.autograd.grad(made(x), [x, made.lora_A, made.lora_B], towards)
    assert len(written.wide) == 2


@pytest.mark.parametrize("form", FORMS)
def test_under_gradient_checkpointing(form: str) -> None:
    made = layer(form, frozen=Frozen(dtype="int8"))
    x = sample((TOKENS,))[0].requires_grad_(True)
    plain = torch.autograd.grad(made(x).tanh().square().sum(), x)[0]
    again = torch.utils.checkpoint.checkpoint(lambda x: made(x).tanh(), x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.square().sum(), x)[0], plain)


def kept_layer(monkeypatch: pytest.MonkeyPatch, **how: object) -> tuple[ReLoRALinear, list[object]]:
    """A layer that keeps W + s·B·A for two passes, and what it was formed with so far."""
    formed: list[object] = []

    def form(*given: object, **where: object) -> Tensor:
        if "out" in where:  # to be kept
            formed.append(given)
        return merged_weight(*given, **where)  # type: ignore[arg-type]

    monkeypatch.setattr(linear, "merged_weight", form)
    made = layer("merged", **how)  # type: ignore[arg-type]
    made.kept = Kept(2)
    return made, formed


@pytest.mark.parametrize("stored", ["fp32", "int8"])
def test_what_is_kept_serves_all_passes_to_the_bit(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"frozen": Frozen(dtype=stored, group_size=32)}  # type: ignore[arg-type]
    made, formed = kept_layer(monkeypatch, **how)
    plain = layer("merged", **how)  # type: ignore[arg-type]
    x, towards = sample()
    for _ in range(2):
        found, expected = gradients(made, x, towards), gradients(plain, x, towards)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(formed) == 1


def test_what_is_kept_follows_the_factors_the_weight_and_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch changes in place is noticed; what goes through another tensor of the same memory is told."""
    made, formed = kept_layer(monkeypatch)
    x = sample()[0]
    assert made.weight is not None

    def is_right() -> bool:
        with torch.no_grad():
            expected = made(x)  # passes that do not train form their own
        return torch.equal(made(x), expected)

    assert is_right()
    room = made.kept._whole
    with torch.no_grad():
        made.lora_B.add_(0.5)
    assert is_right()
    made.weight.merge(made.change(made.lora_A.detach(), made.lora_B.detach()))
    assert is_right()
    made.load_state_dict({name: value * 2 for name, value in made.state_dict().items()})
    assert is_right()
    made.lora_A.data.mul_(3.0)  # as ZeRO's flat copy does it
    assert not is_right()
    made.kept.forget()
    assert is_right()
    assert made.kept._whole is room, "in the same place"
    made.to(torch.float64)
    x = x.double()
    assert is_right()
    assert len(formed) == 6


def test_passes_that_do_not_train_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made, formed = kept_layer(monkeypatch)
    with torch.inference_mode():
        made(sample()[0])
    assert not formed
    made(sample()[0]).sum().backward()


@pytest.mark.parametrize(("form", "stored"), [("split", "int8"), ("merged", "fp32")])
def test_under_compile_with_merges_between(form: str, stored: str) -> None:
    """The default compiler (where there is no C++ compiler, all but its last stage), forward and backward, in one graph; a merge
    changes the buffers in place and needs no new one."""
    torch.compiler.reset()
    backend = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"
    made, x = layer(form, frozen=Frozen(dtype=stored)), sample((TOKENS,))[0].requires_grad_(True)  # type: ignore[arg-type]
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(made, backend=counter, fullgraph=True)
    learned = [x, made.lora_A, made.lora_B]
    for _ in range(3):
        expected, result = made(x), compiled(x)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        gradients = [torch.autograd.grad(value.square().sum(), learned) for value in (expected, result)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
        assert made.weight is not None
        before = made.weight.read().clone()
        made.weight.merge(made.change(made.lora_A.detach(), made.lora_B.detach()))
        assert not torch.equal(made.weight.read(), before)
    assert counter.frame_count == 1


def test_the_choice() -> None:
    """Merged in fp32 where W + s·B·A is shared by enough tokens; never where 16 bits would round it."""
    assert choose(torch.float32, tokens=2048, inputs=1024, outputs=1024) == "merged"
    assert choose(torch.float32, tokens=1024, inputs=1024, outputs=1024) == "split"
    assert choose(torch.bfloat16, tokens=10**6, inputs=64, outputs=64) == "split"
    assert choose(torch.float32, tokens=512, inputs=1024, outputs=1024, formed=1 / 4) == "merged", "kept for four passes"


@pytest.mark.parametrize(
    "other", [{"linear": "split"}, {"dropout": 0.1}, {"trainable_scaling": True}, {"frozen": {"dtype": "none"}}]
)
def test_keeping_is_refused_where_nothing_is_merged(other: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"relora\.keep_merged"):
        parse_relora({"rank": RANK, "keep_merged": True, **other})


@pytest.mark.parametrize(("keep", "accumulation", "passes"), [("auto", 1, 0), ("auto", 4, 4), (True, 1, 1), (False, 4, 0)])
def test_when_it_is_kept(keep: bool | str, accumulation: int, passes: int) -> None:
    assert parse_relora({"rank": RANK, "keep_merged": keep}).kept_passes(accumulation) == passes


def test_sixteen_bits_hide_a_small_change_in_the_merged_form() -> None:
    """Why it is not the default there: a change of 2**-12 of W is below half a unit in the last place of bf16."""
    made = layer("merged", dtype=torch.bfloat16, bias=False)
    assert made.weight is not None
    weight, delta = made.weight.read(), made.delta(made.lora_A.detach(), made.lora_B.detach())
    small = float(weight.norm() / (2**12 * delta.norm()))
    with torch.no_grad():
        one = torch.eye(IN, dtype=torch.bfloat16)
        made.lora_B.mul_(small)
        arrived = made(one).t().float() - weight
    assert apart(arrived, small * delta.double()) > 0.5


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives_are_refused(form: str) -> None:
    """They would lack what goes through x Aᵀ, and through W + s·B·A that is kept."""
    made = layer(form)
    x = torch.randn(TOKENS, IN, requires_grad=True)
    with pytest.raises(RuntimeError, match="create_graph=True: second derivatives are not formed here"):
        torch.autograd.grad(made(x).square().sum(), [x, made.lora_A], create_graph=True)
    torch.autograd.grad(made(x).square().sum(), [x, made.lora_A])
