"""Weights that come in unit by unit: what they are, and how much memory they take on the way."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from relora_ds.config import Model, parse
from relora_ds.errors import ConfigError
from relora_ds.method import frozen_weights
from relora_ds.method.lora import relora_layers
from relora_ds.models import build as models
from relora_ds.models.export import export_model
from relora_ds.models.weights import blank, materialise, pretrained
from relora_ds.training.phases import initial_model
from relora_ds.training.preflight import check
from tests.conftest import TINY_LLAMA
from tests.memory import PeakMemory

CPU = torch.device("cpu")
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": TINY_LLAMA,
    "tied llama": TINY_LLAMA | {"tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": TINY_LLAMA | {"model_type": "gpt_neox"},
    "opt": {"model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "qwen3": TINY_LLAMA | {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16},
}  # fmt: skip
EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES)


def configuration(architecture: str, **changes: Any) -> PretrainedConfig:
    return models.hf_config(Model(config=ARCHITECTURES[architecture] | changes), 101)


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    return models.skeleton(config, attention="eager", dtype=torch.float32, device=CPU).eval()


def build(architecture: str, **changes: Any) -> PreTrainedModel:
    return models.fill(skeleton(configuration(architecture, **changes)), dtype=torch.float32, device=CPU, seed=3)


def tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@EVERY
def test_a_skeleton_holds_no_weights_and_real_buffers(architecture: str) -> None:
    model = skeleton(configuration(architecture))
    reference = AutoModelForCausalLM.from_config(configuration(architecture))
    assert {param.device.type for param in model.parameters()} == {"meta"}
    assert tied(model) == tied(reference)
    buffers = dict(reference.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@EVERY
def test_random_weights_are_the_architectures_own(architecture: str) -> None:
    """Every parameter has the mean and the spread that transformers gives it, GPT-2's narrower residual projections included."""
    changes = {"hidden_size": 64, "num_hidden_layers": 3}
    model = build(architecture, **changes)
    reference = AutoModelForCausalLM.from_config(configuration(architecture, **changes), dtype=torch.float32)
    expected = dict(reference.named_parameters())
    assert [name for name, _ in model.named_parameters()] == list(expected)
    assert tied(model) == tied(reference)
    for name, param in model.named_parameters():
        assert param.dtype == torch.float32 and param.requires_grad
        assert float(param.detach().std()) == pytest.approx(float(expected[name].detach().std()), rel=0.1), name
        assert float(param.detach().mean()) == pytest.approx(float(expected[name].detach().mean()), abs=5e-3), name


def test_random_weights_do_not_depend_on_what_happens_in_between() -> None:
    plain, disturbed = build("llama"), skeleton(configuration("llama"))
    for _name, unit in materialise(disturbed, None, device=CPU, seed=3):
        torch.rand(7)
        unit.to(torch.float32)
    assert all(torch.equal(param, other) for param, other in zip(plain.parameters(), disturbed.parameters(), strict=True))


def test_a_tied_head_leaves_the_embedding_as_it_was_drawn() -> None:
    exact = build("tied llama")
    rounded = models.fill(skeleton(configuration("tied llama")), dtype=torch.bfloat16, device=CPU, seed=3)
    assert torch.equal(rounded.get_output_embeddings().weight, exact.get_input_embeddings().weight.to(torch.bfloat16))


def test_units_are_blocks_and_what_is_outside_them() -> None:
    names = [name for name, _ in materialise(skeleton(configuration("llama")), blank, device=CPU)]
    assert names == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]


@EVERY
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"], ids=["one file", "shards"])
@torch.no_grad()
def test_weights_of_a_folder(architecture: str, max_shard_size: str, tmp_path: Path) -> None:
    original = build(architecture).eval()
    original.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "20KB")
    loaded = skeleton(configuration(architecture))
    models.fill(loaded, dtype=torch.float32, device=CPU, weights=str(tmp_path))
    state = original.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(loaded(input_ids=ids).logits, original(input_ids=ids).logits)


ROUTED: dict[str, Any] = {
    "model_type": "deepseek_v3", "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip


@torch.no_grad()
def test_buffers_that_are_part_of_a_models_state_come_in_and_go_out(tmp_path: Path) -> None:
    """The biases by which DeepSeek-V3 chooses its experts: no parameters, and not what the configuration makes of them."""
    config, bias = models.hf_config(Model(config=ROUTED), 101), "model.layers.1.mlp.gate.e_score_correction_bias"
    original = models.fill(skeleton(config), dtype=torch.float32, device=CPU, seed=3)
    original.get_buffer(bias).copy_(torch.tensor([3.0, -2.0, 1.0, 0.5]))
    original.save_pretrained(tmp_path / "made")
    loaded = models.fill(skeleton(config), dtype=torch.float32, device=CPU, weights=str(tmp_path / "made"))
    exported = skeleton(config)
    models.fill(exported, dtype=torch.float32, device=CPU, weights=str(export_model(loaded, tmp_path / "exported")))
    assert loaded.get_buffer(bias).tolist() == exported.get_buffer(bias).tolist() == [3.0, -2.0, 1.0, 0.5]


@torch.no_grad()
def test_buffers_that_a_folder_has_or_lacks(tmp_path: Path) -> None:
    original, loaded = build("llama"), skeleton(configuration("llama"))
    for model, value in ((original, 2.0), (loaded, 1.0)):
        model.model.register_buffer("kept", torch.full((3,), value, dtype=torch.float64))
        model.model.register_buffer("made", torch.full((3,), value), persistent=False)
    original.save_pretrained(tmp_path)
    loaded.register_buffer("lacking", torch.ones(1))
    models.fill(loaded, dtype=torch.bfloat16, device=CPU, weights=str(tmp_path))
    found = {name: buffer.unique().item() for name, buffer in loaded.named_buffers() if "rotary" not in name}
    assert found == {"model.kept": 2.0, "model.made": 1.0, "lacking": 1.0}
    assert loaded.model.kept.dtype == torch.float64


def test_a_folder_without_all_weights_is_refused(tmp_path: Path) -> None:
    """Of a model without its head transformers makes a random one, another on each rank."""
    original = build("llama")
    original.model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^model\.path=.*: holds no lm_head\.weight; name a folder with all weights"):
        models.fill(skeleton(configuration("llama")), dtype=torch.float32, device=CPU, weights=str(tmp_path))


def test_names_without_the_inner_models_prefix(tmp_path: Path) -> None:
    """The published GPT-2 has ``h.0.attn…`` where the language model has ``transformer.h.0.attn…``."""
    original = build("gpt2")
    original.transformer.save_pretrained(tmp_path)
    loaded = skeleton(configuration("gpt2"))
    source = pretrained(str(tmp_path), loaded)
    param = loaded.get_parameter("transformer.h.1.mlp.c_fc.weight")
    assert torch.equal(source(["transformer.h.1.mlp.c_fc.weight"], param), original.transformer.h[1].mlp.c_fc.weight)


def test_pickled_weights_are_loaded_as_a_whole(tmp_path: Path) -> None:
    original = build("llama")
    original.config.save_pretrained(tmp_path)
    torch.save(original.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = models.fill(skeleton(configuration("llama")), dtype=torch.float32, device=CPU, weights=str(tmp_path))
    assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), original.parameters(), strict=True))


class Planted:
    """Its unpickling makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


def test_pickled_weights_that_would_run_something_are_refused(tmp_path: Path) -> None:
    original, marker = build("llama"), tmp_path / "marker"
    original.config.save_pretrained(tmp_path)
    torch.save({**original.state_dict(), "planted": Planted(marker)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ConfigError, match=r"model\.path=.*pytorch_model\.bin': is a pickle that wants .*; save it as safetensors"
    ):
        models.fill(skeleton(configuration("llama")), dtype=torch.float32, device=CPU, weights=str(tmp_path))
    assert not marker.exists()


def test_another_shape_is_told_in_one_line(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.path=.*embed_tokens.weight is \(101, 32\), the model wants \(101, 64\)"):
        models.fill(skeleton(configuration("llama", hidden_size=64)), dtype=torch.float32, device=CPU, weights=str(tmp_path))


def test_rotary_frequencies_stay_fp32_in_a_bf16_model() -> None:
    model = models.fill(skeleton(configuration("llama")), dtype=torch.bfloat16, device=CPU)
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("start", ["random", "folder"])
@pytest.mark.parametrize("stored", ["bf16", "int8"])
def test_loading_needs_one_block_in_fp32_beyond_what_is_stored(
    stored: str, start: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model of 6 blocks: at no time is there more than one of them in fp32, with what storing it takes."""
    sizes = TINY_LLAMA | {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 6}
    settings["model"] = {"config": sizes}
    if start == "folder":
        config = models.hf_config(Model(config=sizes), 300)
        models.build(config, attention="eager", dtype=torch.bfloat16, device=CPU).save_pretrained(tmp_path / "model")
        settings["model"] = {"path": str(tmp_path / "model")}
    settings["method"] = "lora"
    settings["relora"] |= {"frozen": {"dtype": stored}}
    settings["deepspeed"]["bf16"] = {"enabled": True}
    checked = check(parse(settings), Path("recipe.yaml"), 1)
    monkeypatch.setattr(frozen_weights, "PIECE", 1 << 12)  # else each layer is one piece here
    with PeakMemory() as memory:
        model = initial_model(checked, CPU, "lora")
    block = 4 * sum(math.prod(shape) for shape in [(128, 128)] * 4 + [(128, 320)] * 3)
    kept = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert len(list(relora_layers(model))) == 6 * 7
    assert memory.peak <= kept + 1.5 * block
    assert memory.peak < kept + 0.3 * 6 * block, "what building it whole would take is far above"
