"""PEFT adapters in and out, against peft itself; what a DeepSpeed checkpoint must look like (real ones: tests/distributed)."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from relora_ds.config import Frozen
from relora_ds.errors import ConfigError
from relora_ds.method import lora
from relora_ds.models import adapters
from relora_ds.models.build import build_meta, fill, skeleton
from relora_ds.models.weights import Source

CPU = torch.device("cpu")
KINDS = ["llama", "gpt2"]
UNTIED = ["llama", "gpt2 untied"]
VOCABULARY = ["all-linear", "output-head", "input-embedding"]


def tiny(kind: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind.startswith("gpt2"):
        changes = {"tie_word_embeddings": kind != "gpt2 untied", "resid_pdrop": 0.0, "embd_pdrop": 0.0, **changes}
        return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=32, n_embd=32, n_layer=2, n_head=2, **changes)).eval()
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **changes)).eval()


def source_of(model: PreTrainedModel) -> Source:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return lambda names, _param: state[names[0]]


def randomise(module: torch.nn.Module) -> None:
    """Factors of some size, so that every one of them matters for the output."""
    generator = torch.Generator().manual_seed(1)
    for name, param in module.named_parameters():
        if any(factor in name for factor in ("lora_A", "lora_B", "lora_embedding")):
            param.data = torch.randn(param.shape, generator=generator) * 0.2


def peft_adapter(folder: Path, kind: str, with_bases: bool = False, **settings: Any) -> tuple[Path, PreTrainedModel]:
    """An adapter with random factors that peft wrote, and the model into which peft merged it."""
    if "target_modules" not in settings:
        settings["target_modules"] = ["c_attn", "c_proj"] if kind == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=kind != "llama", **{"r": 4, "lora_alpha": 6, **settings})
    model = peft.get_peft_model(tiny(kind), config)
    randomise(model)
    model.save_pretrained(str(folder), save_embedding_layers=with_bases)
    return folder, model.merge_and_unload()


def filled(kind: str, folder: Path, base: Source | None = None) -> PreTrainedModel:
    """The tiny model, or another ``base`` of its kind, with the adapter merged in, the way that a run takes its first weights."""
    model = skeleton(tiny(kind).config, attention="eager", dtype=torch.float32, device=CPU)
    source = adapters.peft_weights(folder, base or source_of(tiny(kind)), model)
    return fill(model, dtype=torch.float32, device=CPU, weights=source).eval()


PATTERNS: dict[str, dict[str, Any]] = {
    "llama": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 5},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 11, "self_attn.[vk]_proj": 3, "own_proj": 50, "mlp": 50},
    },
    "gpt2": {
        "rank_pattern": {"c_attn": 3, r"h\.1\.mlp\.c_proj": 7},
        "alpha_pattern": {"h.0.attn.c_(attn|proj)": 1},
    },
}


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")  # two must not
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patterns", [False, True], ids=["one rank", "patterns"])
@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}], ids=["plain", "rslora", "gaussian"]
)
def test_merge_equals_pefts(tmp_path: Path, kind: str, patterns: bool, settings: dict[str, Any]) -> None:
    folder, expected = peft_adapter(tmp_path, kind, **settings, **(PATTERNS[kind] if patterns else {}))
    merged = filled(kind, folder).state_dict()
    base = tiny(kind).state_dict()
    assert merged.keys() == expected.state_dict().keys()
    changed = 0
    for name, value in expected.state_dict().items():
        assert merged[name].shape == value.shape
        # fp32 sums of up to 7 products in another order: a few units of 6e-8 of values below 2
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)
        changed += not torch.allclose(value, base[name], atol=1e-3)
    assert changed == 6, "the adapter must change something for this to mean anything"


def test_merge_takes_square_weights_the_right_way_round(tmp_path: Path) -> None:
    """Of a square weight no shape tells whether it is (in, out); the layer's type does, whatever the adapter's setting says."""
    folder, expected = peft_adapter(tmp_path, "gpt2", target_modules=[r"h.0.attn.c_proj"])
    rewrite(folder, fan_in_fan_out=False)
    name = "transformer.h.0.attn.c_proj.weight"
    torch.testing.assert_close(filled("gpt2", folder).state_dict()[name], expected.state_dict()[name], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True")  # which one setting cannot say of Conv1D and head both
@pytest.mark.parametrize("kind", UNTIED)
@pytest.mark.parametrize("with_bases", [False, True], ids=["factors alone", "with bases"])
def test_merge_takes_embeddings_and_head(tmp_path: Path, kind: str, with_bases: bool) -> None:
    """peft keeps an embedding's factors transposed. It may save the weights of both beside them, which then count, as for peft."""
    targets = ["embed_tokens", "q_proj", "lm_head"] if kind == "llama" else ["wte", "wpe", "c_attn", "lm_head"]
    rank_pattern = {targets[0]: 3}
    folder, expected = peft_adapter(
        tmp_path, kind, with_bases, target_modules=targets, rank_pattern=rank_pattern, use_rslora=True
    )
    plain = source_of(tiny(kind))
    brought = {key for key in load_file(folder / adapters.ADAPTER_WEIGHTS) if key.endswith("base_layer.weight")}
    assert bool(brought) == with_bases

    def other(names: Sequence[str], param: Tensor) -> Tensor:
        is_brought = f"base_model.model.{names[0].removesuffix('.weight')}.base_layer.weight" in brought
        return torch.zeros(param.shape) if is_brought else plain(names, param)

    merged, base, changed = filled(kind, folder, other).state_dict(), tiny(kind).state_dict(), 0
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)
        changed += not torch.allclose(value, base[name], atol=1e-3)
    assert changed == len(targets) + 1, "every layer of the two blocks, and each of the vocabulary's"


def test_merge_forms_a_coarse_base_in_fp32_and_leaves_it_alone(tmp_path: Path) -> None:
    folder, _ = peft_adapter(tmp_path, "llama")
    model = tiny("llama").bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    source = adapters.peft_weights(folder, lambda names, _param: model.state_dict()[names[0]], model)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(folder / adapters.ADAPTER_WEIGHTS)
    A, B = (tensors[f"base_model.model.{name.removesuffix('weight')}lora_{factor}.weight"] for factor in "AB")
    merged = source([name], model.get_parameter(name))
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged, before[name].float() + 1.5 * (B @ A), rtol=0, atol=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / adapters.ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def retensor(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / adapters.ADAPTER_WEIGHTS)
        change(tensors)
        save_file(tensors, folder / adapters.ADAPTER_WEIGHTS)

    return apply


def pickled(folder: Path) -> None:
    (folder / adapters.ADAPTER_WEIGHTS).rename(folder / adapters.PICKLED_ADAPTER)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSALS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "type": (lambda folder: rewrite(folder, peft_type="IA3"), "type 'IA3', not LORA"),
    "dora": (lambda folder: rewrite(folder, use_dora=True), "use_dora=True"),
    "bias": (lambda folder: rewrite(folder, bias="lora_only"), "bias='lora_only'"),
    "modules": (lambda folder: rewrite(folder, modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\]"),
    "bias of B": (lambda folder: rewrite(folder, lora_bias=True), "lora_bias=True"),
    "tokens": (lambda folder: rewrite(folder, trainable_token_indices=[1, 2]), "trainable_token_indices"),
    "replication": (lambda folder: rewrite(folder, layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    "setting of tomorrow": (lambda folder: rewrite(folder, use_novelty=True), "use_novelty=True"),
    "pissa": (lambda folder: rewrite(folder, init_lora_weights="pissa_niter_4"), "pissa_niter_4"),
    "rank": (lambda folder: rewrite(folder, r=3), r"lora_A.weight is \[4, 48\], the model and r want \[3, 48\]"),
    "no config": (lambda folder: (folder / adapters.ADAPTER_CONFIG).write_text("{"), "cannot be read"),
    "a list": (lambda folder: (folder / adapters.ADAPTER_CONFIG).write_text("[]"), "no JSON object"),
    "pickle": (pickled, "adapter_model.bin is a pickle .*; save it as safetensors"),
    "no tensors": (lambda folder: (folder / adapters.ADAPTER_WEIGHTS).unlink(), "holds no adapter_model.safetensors"),
    "torn": (lambda folder: (folder / adapters.ADAPTER_WEIGHTS).write_bytes(b"torn"), "cannot be read"),
    "foreign": (
        retensor(lambda tensors: tensors.update({f"{Q[:-6]}x_proj.lora_A.weight": torch.zeros(4, 32)})),
        "self_attn.x_proj.lora_A.weight matches no parameter of the model",
    ),
    "embedding as a linear layer": (
        retensor(lambda tensors: tensors.update({"base_model.model.model.embed_tokens.lora_A.weight": torch.zeros(4, 61)})),
        "lora_A.weight cannot adapt model.embed_tokens, a Embedding",
    ),
    "linear layer as an embedding": (
        retensor(lambda tensors: tensors.update({f"{Q}.lora_embedding_A": torch.zeros(4, 32)})),
        r"lora_embedding_A cannot adapt model\.layers\.0\.self_attn\.q_proj, a Linear",
    ),
    "norm": (
        retensor(lambda tensors: tensors.update({"base_model.model.model.norm.base_layer.weight": torch.zeros(32)})),
        "base_layer.weight cannot adapt model.norm, a LlamaRMSNorm",
    ),
    "base of another shape": (
        retensor(lambda tensors: tensors.update({f"{Q}.base_layer.weight": torch.zeros(32, 31)})),
        r"base_layer.weight is \[32, 31\], the model and r want \[32, 32\]",
    ),
    "magnitude": (retensor(lambda tensors: tensors.update({f"{Q}.lora_magnitude_vector": torch.zeros(32)})), "magnitude_vector"),
    "base alone": (
        retensor(lambda tensors: tensors.update({"base_model.model.lm_head.base_layer.weight": torch.zeros(61, 32)})),
        "lm_head.base_layer.weight has no counterpart",
    ),
    "half": (retensor(lambda tensors: tensors.pop(f"{Q}.lora_B.weight")), "lora_A.weight has no counterpart"),
    "shape": (
        retensor(lambda tensors: tensors.update({f"{Q}.lora_B.weight": torch.zeros(31, 4)})),
        r"lora_B.weight is \[31, 4\], the model and r want \[32, 4\]",
    ),
}


@pytest.fixture(scope="module")
def llama_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peft_adapter(tmp_path_factory.mktemp("adapter"), "llama")[0]


@pytest.mark.parametrize(("spoil", "problem"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refuses_what_cannot_be_merged(tmp_path: Path, llama_adapter: Path, spoil: Callable[[Path], Any], problem: str) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in (adapters.ADAPTER_CONFIG, adapters.ADAPTER_WEIGHTS):
        (folder / name).write_bytes((llama_adapter / name).read_bytes())
    model = build_meta(tiny("llama").config)
    adapters.peft_weights(folder, source_of(tiny("llama")), model)
    spoil(folder)
    with pytest.raises(ConfigError, match=problem) as raised:
        adapters.peft_weights(folder, source_of(tiny("llama")), model)
    text = str(raised.value)
    assert text.startswith(f"model.path={str(folder)!r}: ") and "\n" not in text


def test_refuses_a_weight_that_two_modules_share(tmp_path: Path) -> None:
    folder, _ = peft_adapter(tmp_path, "llama", target_modules=["lm_head"])
    adapters.peft_weights(folder, source_of(tiny("llama")), tiny("llama"))
    tied = skeleton(tiny("llama", tie_word_embeddings=True).config, attention="eager", dtype=torch.float32, device=CPU)
    with pytest.raises(ConfigError, match=r"adapts lm_head, whose weight is model\.embed_tokens\.weight, too"):
        adapters.peft_weights(folder, source_of(tiny("llama")), tied)


def test_is_peft(tmp_path: Path, llama_adapter: Path) -> None:
    assert adapters.is_peft(llama_adapter) and adapters.is_peft(str(llama_adapter))
    assert not adapters.is_peft(tmp_path) and not adapters.is_peft("gpt2") and not adapters.is_peft("owner/name")


def test_base_of_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, here = tmp_path / "adapter", tmp_path / "here"
    for folder in (adapter, here):
        folder.mkdir()
    monkeypatch.chdir(here)

    def base(**config: Any) -> str:
        (adapter / adapters.ADAPTER_CONFIG).write_text(json.dumps(config))
        return adapters.peft_base(adapter)

    assert base(base_model_name_or_path="owner/name", revision=None) == "owner/name"
    (adapter / "base").mkdir()
    assert base(base_model_name_or_path="base") == str(adapter / "base")
    (here / "base").mkdir()
    assert base(base_model_name_or_path="base") == "base"
    assert base(base_model_name_or_path="./base") == str(adapter / "base"), "as exports name it: whatever lies here beside"
    assert base(base_model_name_or_path=str(here / "base"), revision="v2") == str(here / "base")
    for config in ({}, {"base_model_name_or_path": None}, {"base_model_name_or_path": ""}):
        with pytest.raises(ConfigError, match="names no base model"):
            base(**config)
    with pytest.raises(ConfigError, match="adapts revision 'v2' of owner/name"):
        base(base_model_name_or_path="owner/name", revision="v2")


def wrapped(kind: str, **how: Any) -> PreTrainedModel:
    """The tiny model, wrapped, with random factors (and scales)."""
    model = tiny(kind)
    lora.wrap(model, rank=4, alpha=6.0, **how)
    randomise(model)
    for index, (_, layer) in enumerate(lora.relora_layers(model)):
        if layer.lora_scaling is not None:
            layer.lora_scaling.data.fill_(0.3 + 0.1 * index)
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    ids = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(2))
    return model(input_ids=ids).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["all-linear", ["mlp"]], ids=["all", "mlp"])
@pytest.mark.parametrize("trainable_scaling", [False, True], ids=["fixed", "trainable"])
def test_peft_computes_the_same_from_a_saved_adapter(
    tmp_path: Path, kind: str, targets: str | Sequence[str], trainable_scaling: bool
) -> None:
    model, base = wrapped(kind, targets=targets, trainable_scaling=trainable_scaling), tiny(kind)
    base.save_pretrained(tmp_path / "base")
    expected, plain = logits(model), logits(base)
    layers = dict(lora.relora_layers(model))
    adapters.save_adapter(tmp_path / "adapter", layers.items(), base_name=str(tmp_path / "base"), rank=4, alpha=6.0)
    # fp32 through two layers, the scale folded in elsewhere: 1e-6 or so of logits near 1
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    adapted = {
        name.removeprefix("base_model.model.") for name, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    assert adapted == layers.keys()
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=1e-5)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(filled(kind, tmp_path / "adapter")), expected, rtol=0, atol=1e-5)
    assert float((expected - plain).abs().max()) > 1e-2, "the factors must matter for this to mean anything"
    assert adapters.peft_base(tmp_path / "adapter") == str(tmp_path / "base")


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True")  # which one setting cannot say of Conv1D and head both
@pytest.mark.parametrize("kind", UNTIED)
@pytest.mark.parametrize("trainable_scaling", [False, True], ids=["fixed", "trainable"])
def test_peft_computes_the_same_with_embeddings_and_head(tmp_path: Path, kind: str, trainable_scaling: bool) -> None:
    targets = [*VOCABULARY, *(["wpe"] if kind == "gpt2 untied" else [])]
    model, base = wrapped(kind, targets=targets, trainable_scaling=trainable_scaling), tiny(kind)
    expected, plain = logits(model), logits(base)
    layers = dict(lora.relora_layers(model))
    adapters.save_adapter(tmp_path / "adapter", layers.items(), base_name="base", rank=4, alpha=6.0)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    found = [name for name, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert {name.removeprefix("base_model.model.") for name in found} == layers.keys()
    # fp32, the scale folded in elsewhere: a few units of 1e-6 of logits up to 10, from embeddings of size 1
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(logits(filled(kind, tmp_path / "adapter")), expected, rtol=1e-5, atol=2e-5)
    assert float((expected - plain).abs().max()) > 0.1, "the factors must matter for this to mean anything"
    tensors = load_file(tmp_path / "adapter" / adapters.ADAPTER_WEIGHTS)
    embedded = "transformer.wte" if kind == "gpt2 untied" else "model.embed_tokens"
    shapes = [tuple(tensors[f"base_model.model.{embedded}.lora_embedding_{letter}"].shape) for letter in "AB"]
    assert shapes == [(4, 61), (32, 4)]


def test_saved_factors_keep_their_dtype(tmp_path: Path) -> None:
    model = wrapped("llama").bfloat16()
    adapters.save_adapter(tmp_path, lora.relora_layers(model), base_name="base", rank=4, alpha=6.0)
    tensors = load_file(tmp_path / adapters.ADAPTER_WEIGHTS)
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    layers = dict(lora.relora_layers(model))
    assert tensors.keys() == {f"base_model.model.{name}.lora_{factor}.weight" for name in layers for factor in "AB"}
    assert torch.equal(tensors[f"{Q}.lora_B.weight"], layers["model.layers.0.self_attn.q_proj"].lora_B)
    config = json.loads((tmp_path / adapters.ADAPTER_CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 6, list(layers))
    assert not config["fan_in_fan_out"]


def test_a_saved_adapter_can_be_read_by_others(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        adapters.save_adapter(tmp_path, lora.relora_layers(wrapped("llama")), base_name="base", rank=4, alpha=6.0)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o644}


def test_saved_adapter_tells_conv1d(tmp_path: Path) -> None:
    """peft goes by the layer and warns; readers without the model have the setting alone."""
    adapters.save_adapter(tmp_path, lora.relora_layers(wrapped("gpt2")), base_name="base", rank=4, alpha=6.0)
    assert json.loads((tmp_path / adapters.ADAPTER_CONFIG).read_text())["fan_in_fan_out"]


def test_nothing_to_adapt(tmp_path: Path) -> None:
    model = wrapped("llama", frozen=Frozen(dtype="none"))
    with pytest.raises(ConfigError, match=r"method='low_rank': layer model\.layers\.0\.\S+ has no frozen weight to adapt"):
        adapters.save_adapter(tmp_path / "out", lora.relora_layers(model), base_name="base", rank=4, alpha=6.0)
    with pytest.raises(ConfigError, match="has no LoRA factors"):
        adapters.save_adapter(tmp_path / "out", lora.relora_layers(tiny("llama")), base_name="base", rank=4, alpha=6.0)
    assert not (tmp_path / "out").exists()


def checkpoint(folder: Path, state: dict[str, Tensor], buffers: Sequence[str] = (), **more: Any) -> Path:
    """The part of a DeepSpeed checkpoint without ZeRO that matters here, and ``more``, as a user's client_state."""
    tag = folder / "global_step3"
    tag.mkdir(parents=True)
    (folder / adapters.LATEST).write_text("global_step3\n")
    torch.save({"module": state, "buffer_names": list(buffers), "param_shapes": None, **more}, tag / adapters.MODEL_STATES)
    return folder


def test_deepspeed_states_with_a_wrappers_prefix_and_old_buffers(tmp_path: Path) -> None:
    model = tiny("llama").bfloat16()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    old = "module.model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = checkpoint(tmp_path / "run", {**state, old: torch.zeros(8)}, [old])
    source = adapters.deepspeed_weights(folder, build_meta(tiny("llama").config), trust=True)
    for name, param in model.named_parameters():
        value = source([name], param)
        assert value.dtype == torch.bfloat16 and torch.equal(value, param)


def test_deepspeed_states_must_be_the_models(tmp_path: Path) -> None:
    good = tiny("llama").state_dict()
    head = "lm_head.weight"
    cases = {
        r"lacks model\.layers\.1\.mlp\.up_proj\.weight": {name: v for name, v in good.items() if "1.mlp.up" not in name},
        r"lm_head\.weight is \(60, 32\), the model wants \(61, 32\)": {**good, head: good[head][:60]},
        r"holds model\.layers\.2\.mlp\.x, which the model has not": {**good, "model.layers.2.mlp.x": good[head]},
    }
    for index, (problem, state) in enumerate(cases.items()):
        folder = checkpoint(tmp_path / str(index), state)
        with pytest.raises(ConfigError, match=problem) as raised:
            adapters.deepspeed_weights(folder, build_meta(tiny("llama").config), trust=True)
        assert str(raised.value).startswith(f"model.weights={str(folder)!r}: ") and "\n" not in str(raised.value)


def test_deepspeed_tied_weights_come_under_either_name(tmp_path: Path) -> None:
    tied = tiny("llama", tie_word_embeddings=True)
    state = {name: value for name, value in tied.state_dict().items() if name != "model.embed_tokens.weight"}
    model = skeleton(tied.config, attention="eager", dtype=torch.float32, device=CPU)
    source = adapters.deepspeed_weights(checkpoint(tmp_path / "run", state), model, trust=True)
    model = fill(model, dtype=torch.float32, device=CPU, weights=source)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tied.lm_head.weight)


def test_deepspeed_states_with_a_class_of_the_users_need_trust(tmp_path: Path) -> None:
    """argparse's namespace is what many training scripts keep beside their weights."""
    model = build_meta(tiny("llama").config)
    folder = checkpoint(tmp_path / "run", tiny("llama").state_dict(), args=argparse.Namespace(lr=0.1))
    problem = r"model\.weights='.*/mp_rank_00_model_states\.pt': is a pickle that wants argparse\.Namespace, .*; pass --trust"
    for read in (partial(adapters.deepspeed_weights, folder, model), partial(adapters.check_deepspeed, folder)):
        with pytest.raises(ConfigError, match=problem):
            read(trust=False)
        read(trust=True)


def test_deepspeed_layouts(tmp_path: Path) -> None:
    model = build_meta(tiny("llama").config)
    folder = checkpoint(tmp_path / "run", tiny("llama").state_dict())
    tag = folder / "global_step3"

    def refused(problem: str, place: Path = folder) -> None:
        with pytest.raises(ConfigError, match=problem):
            adapters.deepspeed_weights(place, model, trust=True)

    refused(r"holds no mp_rank_00_model_states\.pt", tmp_path)
    (tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"torn")
    refused("cannot be read")
    (tag / "mp_rank_01_model_states.pt").touch()
    refused("is of ZeRO 3, or of a model split over tensor")
    (folder / adapters.LATEST).write_text("global_step9")
    refused("latest names global_step9, which holds no mp_rank_00_model_states.pt")
