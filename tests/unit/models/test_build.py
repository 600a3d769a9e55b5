"""The paper's sizes, other architectures, and how a model comes to its weights and its attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel

from relora_ds.config import Model
from relora_ds.errors import ConfigError
from relora_ds.method import lora
from relora_ds.method.targets import find_targets
from relora_ds.models import build as models
from tests.conftest import TINY_LLAMA, VOCAB_SIZE

CPU = torch.device("cpu")
PAPER_VOCABULARY = 32_100
PAPER = {  # hidden, MLP, heads, layers, parameters
    "llama_60m": (512, 1376, 8, 8, 60e6),
    "llama_130m": (768, 2048, 12, 12, 130e6),
    "llama_250m": (768, 2560, 16, 24, 250e6),
    "llama_350m": (1024, 2736, 16, 24, 350e6),
    "llama_1b": (2048, 5461, 32, 24, 1.3e9),
    "llama_3b": (2560, 6848, 32, 32, 2.7e9),
    "llama_7b": (4096, 11008, 32, 32, 6.7e9),
}


def tiny(**changes: Any) -> PretrainedConfig:
    return models.hf_config(Model(config=TINY_LLAMA | changes), VOCAB_SIZE)


def build(config: PretrainedConfig, **changes: Any) -> PreTrainedModel:
    return models.build(config, **({"attention": "sdpa", "dtype": torch.float32, "device": CPU} | changes))


def same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    weights, others = one.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weight, others[name]) for name, weight in weights.items())


def test_code_beside_a_configuration_is_neither_run_nor_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "y")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": {"AutoConfig": "code.Strange"}}))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass Strange: pass\n")
    with pytest.raises(ConfigError, match="model.path=.*contains custom code"):
        models.read_hf_config(tmp_path, "model.path")
    assert not asked and not (tmp_path / "marker").exists()


# Presets


def test_presets_are_those_of_the_paper() -> None:
    assert models.PRESETS.keys() == PAPER.keys()


@pytest.mark.parametrize("name", PAPER)
def test_preset_has_the_papers_shape_and_size(name: str) -> None:
    config = models.hf_config(Model(preset=name), PAPER_VOCABULARY)
    hidden, mlp, heads, layers, parameters = PAPER[name]
    assert (config.hidden_size, config.intermediate_size) == (hidden, mlp)
    assert (config.num_attention_heads, config.num_hidden_layers) == (heads, layers)
    assert config.num_key_value_heads == heads
    assert config.vocab_size == PAPER_VOCABULARY
    model = models.build_meta(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=0.06)


def test_1b_preset_has_between_1_2_and_1_4_billion_parameters() -> None:
    model = models.build_meta(models.preset_config("llama_1b", PAPER_VOCABULARY))
    assert 1.2e9 < sum(parameter.numel() for parameter in model.parameters()) < 1.4e9


def test_preset_is_an_untied_llama_of_the_tokenizers_vocabulary() -> None:
    config = models.preset_config("llama_60m", 1024)
    assert config.model_type == "llama"
    assert config.hidden_act == "silu"
    assert config.vocab_size == 1024
    model = models.build_meta(config)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"model\.preset='llama_350': unknown preset; did you mean 'llama_350m'\?"):
        models.hf_config(Model(preset="llama_350"), PAPER_VOCABULARY)


# The control


@pytest.mark.parametrize(
    ("name", "trainable", "hidden"),
    [("llama_60m", 43e6, 416), ("llama_130m", 72e6, 528), ("llama_250m", 99e6, 448), ("llama_350m", 125e6, 544)],
)
def test_control_has_the_papers_trainable_parameters(name: str, trainable: float, hidden: int) -> None:
    """At rank 128 the paper gives 43, 72, 99 and 125 million trainable parameters; the control has that many in all."""
    target = models.preset_config(name, PAPER_VOCABULARY)
    model = models.build_meta(target)
    wanted = lora.num_trainable(model, find_targets(model, "all-linear"), 128)
    assert wanted == pytest.approx(trainable, rel=0.01)
    control = models.control_config(target, wanted)
    assert models.num_parameters(control) == pytest.approx(wanted, rel=1e-3)
    assert (control.hidden_size, control.num_hidden_layers) == (hidden, target.num_hidden_layers)
    assert control.intermediate_size / control.hidden_size == pytest.approx(
        target.intermediate_size / target.hidden_size, rel=0.35
    )
    assert target.hidden_size == PAPER[name][0], "the target itself is left alone"


@pytest.mark.parametrize(
    "settings",
    [
        TINY_LLAMA | {"tie_word_embeddings": True},
        {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
        TINY_LLAMA | {"model_type": "gpt_neox", "hidden_size": 64},
        TINY_LLAMA | {"model_type": "qwen3", "hidden_size": 64, "num_key_value_heads": 2, "head_dim": 20},
    ],
    ids=["tied llama", "gpt2", "gpt_neox", "qwen3"],
)
@torch.no_grad()
def test_control_of_other_architectures_can_be_built_and_saved(settings: dict[str, Any], tmp_path: Path) -> None:
    target = models.hf_config(Model(config=settings), VOCAB_SIZE)
    wanted = round(0.7 * models.num_parameters(target))
    control = models.control_config(target, wanted)
    control.save_pretrained(tmp_path)
    model = build(models.read_hf_config(tmp_path, "RUN_DIR"))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(wanted, rel=0.02)
    assert torch.isfinite(model(input_ids=torch.arange(6).view(1, 6)).logits).all()


def test_a_tied_head_counts_once_whether_or_not_transformers_ties_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.0 does not on the meta device."""
    target = models.hf_config(Model(config={**TINY_LLAMA, "tie_word_embeddings": True}), VOCAB_SIZE)
    expected = models.num_parameters(target)
    from_config = models.AutoModelForCausalLM.from_config

    def untied(config: Any) -> Any:
        model = from_config(config)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        return model

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_config", untied)
    assert models.num_parameters(target) == expected


def test_a_control_that_cannot_be_is_told_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"method='control': no such llama is as small as 100 parameters; raise the rank"):
        models.control_config(tiny(), 100)


# Configurations


def test_inline_configuration_takes_the_tokenizers_vocabulary_unless_it_names_one() -> None:
    assert tiny().vocab_size == VOCAB_SIZE
    assert tiny(vocab_size=512).vocab_size == 512
    assert (tiny().hidden_size, tiny().num_hidden_layers) == (32, 2)


def test_inline_configuration_is_not_changed() -> None:
    settings = Model(config=dict(TINY_LLAMA))
    models.hf_config(settings, VOCAB_SIZE)
    assert settings.config == TINY_LLAMA


def test_inline_configuration_with_an_unknown_key() -> None:
    with pytest.raises(ConfigError, match=r"model\.config\.num_layer=2: unknown key; did you mean 'num_") as caught:
        tiny(num_layer=2)
    assert len(str(caught.value).splitlines()) == 1


def test_inline_configuration_without_an_architecture() -> None:
    with pytest.raises(ConfigError, match=r"model\.config\.model_type=None: is required"):
        models.hf_config(Model(config={"hidden_size": 32}), VOCAB_SIZE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "lama"},
            "model.config.model_type='lama': is no causal language model of transformers; did you mean 'llama'?",
        ),
        ({"model_type": "vit"}, "model.config.model_type='vit': is no causal language model"),
        ({"hidden_size": "wide"}, "cannot be built"),
        ({"hidden_size": 30}, "cannot be built"),
        ({"model_type": "mixtral"}, "model.config.num_key_value_heads=8: does not divide the 4 heads"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_told_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        models.build_meta(models.hf_config(Model(config={**TINY_LLAMA, **change}), VOCAB_SIZE))
    assert str(caught.value).startswith("model.config") and message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_inline_configuration_may_use_the_architectures_own_names_or_the_common_ones() -> None:
    own = models.hf_config(Model(config={"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4}), VOCAB_SIZE)
    settings = {"model_type": "gpt2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    common = models.hf_config(Model(config=settings), VOCAB_SIZE)
    assert own.to_dict() == common.to_dict()
    assert common.n_embd == 32


def test_inline_configuration_may_have_what_only_the_models_code_asks_for() -> None:
    """Configurations of Qwen3's MoE models name ``head_dim``, of which their class in transformers says nothing."""
    content = {"model_type": "qwen3_moe", "hidden_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    small = {"intermediate_size": 16, "moe_intermediate_size": 16, "num_experts": 2, "num_experts_per_tok": 1}
    config = models.hf_config(Model(config={**content, **heads, **small}), VOCAB_SIZE)
    attention = models.build_meta(config).model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (4 * 16, 32) and attention.k_proj.weight.shape == (2 * 16, 32)


def test_configuration_from_a_file_or_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA | {"vocab_size": 77}))
    for place in (tmp_path, tmp_path / "config.json"):
        config = models.hf_config(Model(config=str(place)), VOCAB_SIZE)
        assert (config.model_type, config.hidden_size, config.vocab_size) == ("llama", 32, 77)


@pytest.mark.parametrize("text", ["{broken", '{"hidden_size": 32}'], ids=["not JSON", "no architecture"])
def test_configuration_that_cannot_be_read_names_its_setting(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    for key in ("path", "config"):
        with pytest.raises(ConfigError) as caught:
            models.hf_config(Model.model_validate({key: str(tmp_path)}), VOCAB_SIZE)
        assert str(caught.value).startswith(f"model.{key}={str(tmp_path)!r}: cannot be loaded: ")
        assert len(str(caught.value).splitlines()) == 1


def test_earlier_run_is_read_from_its_model_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("run: {}")
    tiny(vocab_size=77).save_pretrained(tmp_path / "model")
    assert models.hf_config(Model(path=str(tmp_path)), VOCAB_SIZE).vocab_size == 77


def test_describe_is_one_line_for_people() -> None:
    assert models.describe(tiny()) == "llama: hidden 32, layers 2, heads 4, vocabulary 300"


# Attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auto_attention_on_a_cpu_is_sdpa(dtype: torch.dtype) -> None:
    assert models.attention_implementation("auto", tiny(), dtype=dtype, device=CPU) == "sdpa"
    assert build(tiny(), attention="auto", dtype=dtype).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("choice", ["sdpa", "eager"])
def test_attention_asked_for_by_name(choice: str) -> None:
    assert build(tiny(), attention=choice).config._attn_implementation == choice


@pytest.mark.parametrize(
    ("installed", "device", "dtype", "choice"),
    [
        (True, "cuda", torch.bfloat16, "flash_attention_2"),
        (True, "cuda", torch.float16, "flash_attention_2"),
        (True, "cuda", torch.float32, "sdpa"),
        (True, "cpu", torch.bfloat16, "sdpa"),
        (False, "cuda", torch.bfloat16, "sdpa"),
    ],
)
def test_auto_attention_is_flash_only_where_it_runs(
    monkeypatch: pytest.MonkeyPatch, installed: bool, device: str, dtype: torch.dtype, choice: str
) -> None:
    monkeypatch.setattr(models, "is_flash_attn_2_available", lambda: installed)
    assert models.attention_implementation("auto", tiny(), dtype=dtype, device=torch.device(device)) == choice


def gptj() -> PretrainedConfig:
    return models.hf_config(Model(config={"model_type": "gptj", "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8}), 300)


def test_auto_attention_is_what_the_architecture_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-J has no SDPA in transformers, but flash-attention 2; BLOOM has the eager one alone."""
    assert build(gptj(), attention="auto").config._attn_implementation == "eager"
    monkeypatch.setattr(models, "is_flash_attn_2_available", lambda: True)
    on_gpu = {"dtype": torch.bfloat16, "device": torch.device("cuda")}
    assert models.attention_implementation("auto", gptj(), **on_gpu) == "flash_attention_2"
    bloom = models.hf_config(Model(config={"model_type": "bloom", "hidden_size": 32, "n_layer": 1, "n_head": 4}), 300)
    assert models.attention_implementation("auto", bloom, **on_gpu) == "eager"


def test_attention_that_an_architecture_lacks_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"^model\.attention='sdpa': transformers has none for a gptj; use auto$"):
        models.attention_implementation("sdpa", gptj(), dtype=torch.float32, device=CPU)


def test_flash_attention_by_name_on_a_cpu_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError) as caught:
        build(tiny(), attention="flash_attention_2", dtype=torch.bfloat16)
    line = str(caught.value)
    assert line.startswith("model.attention='flash_attention_2': needs CUDA")
    assert "relora_ds[flash]" in line
    assert line.endswith("or use auto")


# Weights


def test_random_weights_depend_on_the_seed_alone() -> None:
    one = build(tiny(), seed=3)
    torch.rand(5)  # whatever was drawn before
    assert same_weights(build(tiny(), seed=3), one)
    assert not same_weights(build(tiny(), seed=4), one)


def test_random_weights_are_drawn_in_fp32_and_rounded() -> None:
    exact, rounded = build(tiny(), seed=3), build(tiny(), seed=3, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}
    assert same_weights(exact.to(torch.bfloat16), rounded)


def test_meta_model_has_the_same_names_and_shapes() -> None:
    shapes = {name: parameter.shape for name, parameter in models.build_meta(tiny()).named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in build(tiny()).named_parameters()}


@torch.no_grad()
def test_weights_from_a_local_folder(tmp_path: Path) -> None:
    original = build(tiny(), seed=3).eval()
    original.save_pretrained(tmp_path)
    config = models.hf_config(Model(path=str(tmp_path)), VOCAB_SIZE + 5)
    loaded = build(config, seed=4, weights=str(tmp_path)).eval()
    assert same_weights(loaded, original)
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(loaded(input_ids=ids).logits, original(input_ids=ids).logits)
    assert loaded.config.use_cache is False


def test_folder_without_weights(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot be built") as caught:
        build(tiny(), weights=str(tmp_path))
    assert len(str(caught.value).splitlines()) == 1


# Widths


def test_a_new_models_widths_are_rounded_up() -> None:
    config = models.hf_config(Model(preset="llama_1b", multiple_of=64), PAPER_VOCABULARY)
    assert (config.intermediate_size, config.vocab_size, config.hidden_size) == (5504, 32_128, 2048)
    inline = {"model_type": "gpt2", "n_embd": 32, "n_inner": 100, "vocab_size": 61}
    found = models.hf_config(Model(config=inline, multiple_of=16), 61)
    assert (found.n_inner, found.vocab_size) == (112, 64)
    assert models.hf_config(Model(config={"model_type": "gpt2"}, multiple_of=16), 61).n_inner is None, "four times the width"


def test_a_model_that_is_there_keeps_its_widths(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.multiple_of=64: is for a preset or keys of model\.config"):
        models.hf_config(Model(path=str(tmp_path), multiple_of=64), 61)


def test_slow_widths_are_named() -> None:
    line = models.slow_widths(models.preset_config("llama_1b", PAPER_VOCABULARY))
    assert line == (
        "intermediate_size 5,461, vocab_size 32,100: no multiple of 8, which GPUs multiply slowly; "
        "model.multiple_of=64 rounds a new model's up"
    )
    assert models.slow_widths(models.hf_config(Model(preset="llama_1b", multiple_of=8), PAPER_VOCABULARY)) is None
