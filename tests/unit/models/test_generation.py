"""bos, eos and pad of what a run exports: its tokenizer's, or those of the model that it started from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, GenerationConfig, LlamaConfig

from relora_ds import config
from relora_ds.data import tokenizer
from relora_ds.models import generation
from relora_ds.models.build import build_meta, skeleton
from relora_ds.run.folder import RunFolder
from relora_ds.training.preflight import check
from tests.conftest import TINY_LLAMA, VOCAB_SIZE

CPU = torch.device("cpu")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def ids(found: Any) -> tuple[Any, ...]:
    return tuple(getattr(found, key, None) for key in IDS)


def tokens_of(folder: Path, source: Path, **named: str) -> Path:
    """A tokenizer folder with ``source``'s vocabulary and these special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}))
    return folder


def export(recipe: Path, out: Path, *, architecture: Any = None, tokens: Path | None = None) -> Path:
    """What a run of the recipe would export, had it trained: its folder as it is made at the start, and random weights."""
    read = config.load(recipe)
    run = RunFolder(Path(read.run.dir))
    run.model.mkdir(parents=True)
    run.config.write_text(config.dump(read))
    (architecture or check(read, recipe, 1).architecture).save_pretrained(run.model)
    generation.keep_generation_config(read.model, run.model)
    tokenizer.hand_on(tokens or Path(read.data.path), run.model)
    model = skeleton(AutoConfig.from_pretrained(run.model), attention="sdpa", dtype=torch.float32, device=CPU).to_empty(
        device=CPU
    )
    for param in model.parameters():
        torch.nn.init.zeros_(param)
    generation.save(model, out, run)
    return out


def rewrite(recipe: Path, **sections: Any) -> None:
    content = config.read_yaml(recipe.read_text(), "recipe")
    recipe.write_text(json.dumps({**content, **sections}))  # YAML, too


@pytest.mark.parametrize(
    "model",
    [
        {"config": TINY_LLAMA},  # by default 1, 2 and none
        {"config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4}},  # by default 50256, out of this vocabulary
        {"config": {"model_type": "opt", "hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
                    "word_embed_proj_dim": 32}},  # by default 2, 2 and 1
    ],
    ids=["llama", "gpt2", "opt"],
)  # fmt: skip
def test_a_model_trained_from_scratch_stops_where_its_documents_end(recipe: Path, tmp_path: Path, model: dict[str, Any]) -> None:
    rewrite(recipe, model=model)
    out = export(recipe, tmp_path / "out")
    assert ids(AutoConfig.from_pretrained(out)) == (None, 0, None)
    assert ids(GenerationConfig.from_pretrained(out)) == (None, 0, None)
    assert "use_cache" not in json.loads((out / "generation_config.json").read_text())
    assert ids(AutoModelForCausalLM.from_pretrained(out).generation_config) == (None, 0, None)


def test_a_run_folder_of_an_earlier_version_exports_rightly(recipe: Path, tmp_path: Path) -> None:
    """Its config.json has the architecture's defaults."""
    out = export(recipe, tmp_path / "out", architecture=LlamaConfig(**{**TINY_LLAMA, "vocab_size": VOCAB_SIZE}))
    assert ids(LlamaConfig.from_pretrained(out)) == ids(GenerationConfig.from_pretrained(out)) == (None, 0, None)


def test_all_that_the_tokenizer_names(recipe: Path, tmp_path: Path, token_folder: Path) -> None:
    """But a token for which the model has no row: transformers would add it."""
    named = tokens_of(tmp_path / "tok", token_folder, eos_token="a", bos_token="b", pad_token="<|endoftext|>", unk_token="c")
    a, b = (tokenizer.vocabulary(named)[token] for token in "ab")
    out = export(recipe, tmp_path / "out", tokens=named)
    assert ids(LlamaConfig.from_pretrained(out)) == ids(GenerationConfig.from_pretrained(out)) == (b, a, 0)
    (tmp_path / "run").rename(tmp_path / "earlier")
    tokens_of(named, token_folder, eos_token="a", pad_token="[NEW]")
    out = export(recipe, tmp_path / "other", tokens=named)
    assert ids(LlamaConfig.from_pretrained(out)) == ids(GenerationConfig.from_pretrained(out)) == (None, a, None)


def test_no_row_of_a_new_models_embedding_is_left_untrained(recipe: Path) -> None:
    """OPT's default pad token is an ordinary one of this vocabulary: its row would never get a gradient."""
    sizes = {"hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "word_embed_proj_dim": 32}
    rewrite(recipe, model={"config": {"model_type": "opt", **sizes}})
    architecture = check(config.load(recipe), recipe, 1).architecture
    assert build_meta(architecture).get_input_embeddings().padding_idx is None


def others(folder: Path, tokens: Path, generates: dict[str, Any] | None, **named: Any) -> Path:
    """A model made elsewhere, with the tokenizer of ``tokens``."""
    LlamaConfig(**{**TINY_LLAMA, "vocab_size": VOCAB_SIZE, **named}).save_pretrained(folder)
    if generates is not None:
        (folder / "generation_config.json").write_text(json.dumps(generates))
    tokens_of(folder, tokens)
    return folder


@pytest.mark.parametrize(
    ("model", "generates", "expected", "expected_generation"),
    [
        # several ends, of which the documents' is one: kept, as is a bos that this tokenizer does not name
        ((5, [7, 0, 9], 11), {"eos_token_id": [0, 9], "temperature": 0.6}, (5, [7, 0, 9], 11), (None, [0, 9], None)),
        ((5, 0, None), None, (5, 0, None), (5, 0, None)),
        # an end that no document had: contradicts
        ((5, 2, None), {"eos_token_id": 2, "bos_token_id": 5}, (5, 0, None), (5, 0, None)),
        ((None, None, None), {"eos_token_id": [2, 3]}, (None, 0, None), (None, 0, None)),
    ],
)  # fmt: skip
def test_a_model_made_elsewhere_keeps_what_does_not_contradict(
    recipe: Path, tmp_path: Path, token_folder: Path, model: Any, generates: Any, expected: Any, expected_generation: Any
) -> None:
    folder = others(tmp_path / "hf", token_folder, generates, **dict(zip(IDS, model, strict=True)))
    rewrite(recipe, model={"path": str(folder)})
    out = export(recipe, tmp_path / "out")
    assert ids(LlamaConfig.from_pretrained(out)) == expected
    content = json.loads((out / "generation_config.json").read_text())
    assert tuple(content.get(key) for key in IDS) == expected_generation
    assert content.get("temperature") == (generates or {}).get("temperature"), "and everything else that it says"


def test_who_made_a_model_is_asked_through_earlier_runs(recipe: Path, tmp_path: Path, token_folder: Path) -> None:
    scratch = config.load(recipe)
    first = RunFolder(tmp_path / "first")
    first.checkpoints.mkdir(parents=True)
    first.config.write_text(config.dump(scratch))
    through = scratch.model.model_copy(update={"config": None, "path": str(first.path)})
    assert not generation.is_others(scratch.model) and not generation.is_others(through)
    elsewhere = through.model_copy(update={"path": str(token_folder)})
    assert generation.is_others(elsewhere)
    first.config.write_text(config.dump(scratch.model_copy(update={"model": elsewhere})))
    assert generation.is_others(through)


def test_a_text_model_inside_another_has_the_same_tokens(recipe: Path, token_folder: Path) -> None:
    text = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    outer = Gemma3Config(text_config=text, eos_token_id=[1, 106])
    generation.name_tokens(outer, config.load(recipe).model, token_folder)
    assert ids(outer) == ids(outer.get_text_config()) == (None, 0, None)
