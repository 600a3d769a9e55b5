"""A tokenizer's files: all of them reach the token folder, the run and the export, and what they say is understood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from relora_ds.data import prepare as preparing
from relora_ds.data import tokenizer as module
from relora_ds.errors import ConfigError

DOCUMENTS = [f"Document {i}: the square of {i} is {i * i}." for i in range(30)]
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False},
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "additional_special_tokens": ["<|user|>"],
    "model_max_length": 77,
    "padding_side": "left",
}
TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}</s>{% endfor %}"


def trained(*special: str, size: int = 290) -> Tokenizer:
    encoder = preparing.train_tokenizer(DOCUMENTS, size)
    encoder.add_special_tokens(list(special))
    return encoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer with everything that one may have, among files of a model that are not its own."""
    folder = tmp_path / "given"
    (folder / "additional_chat_templates").mkdir(parents=True)
    trained("<s>", "</s>", "<unk>", "<pad>").save(str(folder / "tokenizer.json"))
    texts: dict[str, str] = {
        "tokenizer_config.json": json.dumps(CONFIG),
        "special_tokens_map.json": json.dumps({"bos_token": "<s>", "eos_token": "</s>"}),
        "added_tokens.json": json.dumps({"<|user|>": 300}),
        "chat_template.jinja": TEMPLATE,
        "additional_chat_templates/tools.jinja": "tools",
        "vocab.json": "{}",
        "merges.txt": "#",
        "tokenizer.model": "sentencepiece",
        "config.json": json.dumps({"model_type": "llama"}),
        "model.safetensors": "weights",
        "generation_config.json": "{}",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


def prepare(tmp_path: Path, name: Path | None, **settings: Any) -> dict[str, Any]:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    named = None if name is None else str(name)
    return preparing.prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", tokenizer=named, progress=False, **settings)


def test_all_that_was_given_is_handed_on_as_it_is(folder: Path, tmp_path: Path) -> None:
    index = prepare(tmp_path, folder)
    out, run = tmp_path / "out", tmp_path / "run"
    module.hand_on(out, run)  # as a run does, and an export with the run's
    mine = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    others = {Path("config.json"), Path("model.safetensors"), Path("generation_config.json")}
    for target in (out, run):
        for name in mine - others:
            assert (target / name).read_bytes() == (folder / name).read_bytes(), name
        assert not any((target / name).exists() for name in others)
    assert not any((run / name).exists() for name in ("index.json", "train.bin"))
    loaded = AutoTokenizer.from_pretrained(run)
    named = loaded.bos_token, loaded.eos_token, loaded.unk_token, loaded.pad_token, loaded.model_max_length, loaded.padding_side
    assert named == ("<s>", "</s>", "<unk>", "<pad>", 77, "left")
    assert loaded.apply_chat_template([{"content": "Hi"}], tokenize=False) == "<|user|>Hi</s>"
    assert index["tokenizer"]["eos_id"] == loaded.eos_token_id
    assert index["tokenizer"]["vocab_size"] == 301, "the added token that tokenizer.json lacks needs a row, too"
    assert index["tokenizer"]["encoder_size"] == 294, "but no document has it"


def test_a_tokenizer_json_stands_for_its_folder_and_another_name_for_itself(folder: Path, tmp_path: Path) -> None:
    assert module.load(str(folder / "tokenizer.json")).folder == folder
    bare = tmp_path / "bare" / "mine.json"
    bare.parent.mkdir()
    bare.write_bytes((folder / "tokenizer.json").read_bytes())
    prepare(tmp_path, bare)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == bare.read_bytes()
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (config["tokenizer_class"], config["eos_token"]) == ("PreTrainedTokenizerFast", "</s>")


@pytest.mark.parametrize("given", [None, "TokenizersBackend", "", "LlamaTokenizer"])
def test_the_class_is_one_that_transformers_4_and_5_know(folder: Path, tmp_path: Path, given: str | None) -> None:
    """A trained BPE, what transformers 5 saved, what names no class; and one that is named stays."""
    if given is not None:
        content = {key: value for key, value in CONFIG.items() if key != "additional_special_tokens"}
        content |= {"tokenizer_class": given or None, "extra_special_tokens": ["<|user|>"]}
        (folder / "tokenizer_config.json").write_text(json.dumps(content))
        (folder / "config.json").unlink()
    prepare(tmp_path, None if given is None else folder, **({"vocab_size": 290} if given is None else {}))
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == ("LlamaTokenizer" if given == "LlamaTokenizer" else "PreTrainedTokenizerFast")
    if given == "TokenizersBackend":  # transformers 4 fails on a list of these
        assert config["additional_special_tokens"] == ["<|user|>"] and "extra_special_tokens" not in config
        assert AutoTokenizer.from_pretrained(tmp_path / "out").extra_special_tokens == ["<|user|>"]


def test_a_run_folder_of_an_earlier_version_exports_a_class_that_all_know(tmp_path: Path) -> None:
    """As it was written then: by transformers 5 itself."""
    old = tmp_path / "old"
    old.mkdir()
    trained().save(str(old / "tokenizer.json"))
    (old / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend", "eos_token": "<|endoftext|>"}')
    module.hand_on(old, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 0


def test_what_a_models_kind_implies_is_written_down(tmp_path: Path) -> None:
    """GPT-2's folders name neither a class nor their special tokens."""
    trained().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    given = module.load(str(tmp_path))
    assert given.named == {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    module.write(given, tmp_path / "out")
    assert module.special_ids(tmp_path / "out") == {"bos": 0, "eos": 0, "pad": None}


def test_a_folder_without_a_tokenizer_json_is_converted(tmp_path: Path) -> None:
    encoder, folder = trained(), tmp_path / "slow"
    folder.mkdir()
    content = json.loads(encoder.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(content["vocab"]))
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in content["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}')
    prepare(tmp_path, folder)
    written = module.read_encoder(tmp_path / "out")
    assert written.encode(DOCUMENTS[7]).ids == encoder.encode(DOCUMENTS[7]).ids
    assert (tmp_path / "out" / "merges.txt").read_bytes() == (folder / "merges.txt").read_bytes()


def test_a_hub_name_without_network(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache; what is not there is nothing to compare with, and no crash."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached = tmp_path / "hub" / "models--someone--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    (cached / "snapshots").mkdir()
    folder.rename(cached / "snapshots" / ("a" * 40))
    given = module.load("someone/model")
    module.write(given, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja"} < names and "config.json" not in names
    assert (given.eos, module.find("someone/else")) == ("</s>", None)
    assert module.find("someone/model") is not None


def test_outputs_inside_the_source_are_not_read(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "in" / "out"
    out.parent.mkdir()
    (out.parent / "a.txt").write_text(DOCUMENTS[0])
    (folder / "vocab.txt").write_text("a word a line")
    module.hand_on(folder, out)
    found = preparing.local_files(str(out.parent), lambda file: preparing.is_written(file, out))
    assert found is not None and [path.name for path in found[0]] == ["a.txt"]


def test_documents_are_encoded_whole_whatever_the_file_says(folder: Path, tmp_path: Path) -> None:
    """Also by a preparation that goes on, which reads the file that was handed on as it was."""
    encoder = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoder.enable_truncation(3)
    encoder.enable_padding(length=99, pad_token="<pad>")
    encoder.save(str(folder / "tokenizer.json"))
    given = module.load(str(folder))
    module.write(given, tmp_path / "out")
    for found in (given.encoder, module.read_encoder(tmp_path / "out")):
        assert found.decode(found.encode(DOCUMENTS[7], add_special_tokens=False).ids) == DOCUMENTS[7]


# Whether two are one


def test_two_savings_of_one_tokenizer_are_the_same(folder: Path, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() != (folder / "tokenizer.json").read_bytes()
    one, other = module.find(str(folder)), module.find(str(tmp_path / "again"))
    assert one is not None and other is not None
    assert module.difference(one, other) is None


def test_added_tokens_may_be_there_in_one_alone() -> None:
    assert module.difference(trained(), trained("<pad>")) is None
    assert module.difference(trained("<pad>"), trained()) is None
    assert "'<pad>' (290 here and 291 there)" in str(module.difference(trained("<pad>"), trained("<x>", "<pad>")))


@pytest.mark.parametrize("swapped", [False, True])
def test_another_vocabulary_is_another_tokenizer(swapped: bool) -> None:
    """Also where one begins as the other does: it would cut words elsewhere."""
    small, large = trained(size=270), trained(size=290)
    assert set(small.get_vocab().items()) < set(large.get_vocab().items())
    problem = module.difference(*(large, small) if swapped else (small, large))
    assert problem is not None and problem.startswith("20 tokens differ, such as ")


@pytest.mark.parametrize("content", [None, "{", '{"model": {}}'])
def test_no_tokenizer_that_can_be_read(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ConfigError, match="cannot be loaded"):
            module.load(str(tmp_path))
    assert module.find(str(tmp_path)) is None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_file_is_named(folder: Path, name: str, text: str) -> None:
    """In the launching process, which asks for the ids before rank 0 copies the files while the others wait."""
    (folder / name).write_text(text)
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        module.special_ids(folder)
    assert (caught.value.key, caught.value.value) == (name, str(folder))
