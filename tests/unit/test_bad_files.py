"""Bad files: DeepSpeed's JSON, documents, tokenizers, token folders, runs and their checkpoints."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import zstandard
from pyarrow import parquet

from relora_ds.run.lock import RunLock
from tests.unit.bad_inputs import (
    BASE,
    CHECKPOINT,
    INDEX,
    MANIFEST,
    NEW,
    OPTIMIZER,
    STATES,
    TRAIN,
    Bad,
    Spoil,
    become_file,
    become_folder,
    cut,
    drop,
    edit,
    flip,
    harm,
    judge,
    must_not_start,
    overridden,
    remove,
    run,
    spoilt,
    write,
)
from tests.unit.reports.run_folders import pages, start


def ds(override: str, *told: str) -> Bad:
    """One setting of DeepSpeed's."""
    return overridden(f"deepspeed.{override}", *told)


def ds_file(wording: str, text: str | bytes, *told: str) -> Bad:
    """DeepSpeed's JSON in a file."""
    return spoilt(f"ds.json: {wording}", write("ds.json", text), f"{NEW} deepspeed=ds.json", *told)


ZERO = "deepspeed.zero_optimization"
NO_SUCH = "DeepSpeed has no such setting; did you mean"
DEEPSPEED = [
    ds_file("empty", "", "deepspeed='ds.json'", "is not valid JSON"),
    ds_file("a list", "[]", "deepspeed='ds.json'", "a JSON object"),
    ds_file("a comma too many", '{"zero_optimization": {"stage": 2},}', "deepspeed='ds.json'", "column 36"),
    ds_file("a key twice", '{"zero_optimization": {"stage": 2, "stage": 1}}', "deepspeed='ds.json'", "'stage' is given twice"),
    ds_file("UTF-16", "{}".encode("utf-16"), "deepspeed='ds.json'", "is not valid JSON"),
    ds_file("deep nesting", "[" * 100_000, "deepspeed='ds.json'", "nests too deep"),
    ds_file("after comments", '// mine\n{"zero_optimization": {"stage": 3 /* all */}} # end', f"{ZERO}.stage=3", "set it to 2"),
    overridden("deepspeed=nowhere.json", "deepspeed='nowhere.json'", "no such file", "ds_configs/zero2_bf16.json"),
    overridden("deepspeed=tokens", "deepspeed='tokens'", "no such file"),
    overridden("deepspeed={}", f"{ZERO}.stage=None", "set it to 2"),
    ds("zero_optimization=true", f"{ZERO}=True", "is not a section", '{"stage": 2}'),
    ds("zero_optimization.stage=two", f"{ZERO}.stage='two'", "Input should be 0, 1, 2"),
    ds("zero_optimization.stage=3", f"{ZERO}.stage=3", "set it to 2"),
    ds("zero_optimization.stage=auto", f"{ZERO}.stage='auto'", "write a value"),
    ds("zero_optimization.overlap_com=true", f"{ZERO}.overlap_com=True", f"{NO_SUCH} 'overlap_comm'?"),
    ds("zero_optimization.overlap_comm=maybe", f"{ZERO}.overlap_comm='maybe'", "valid boolean"),
    ds("zero_optimization.cpu_offload=perhaps", f"{ZERO}.cpu_offload='perhaps'", "write true or false"),
    ds("zero_optimization.cpu_offload_param=true", f"{ZERO}.offload_param=", "leave it out"),
    ds("zero_optimization.reduce_bucket_size=-1", f"{ZERO}.reduce_bucket_size=-1", "greater than 0"),
    ds("zero_optimization.allgather_bucket_size=0", f"{ZERO}.allgather_bucket_size=0", "leave it out"),
    ds("zero_optimization.offload_optimizer=true", f"{ZERO}.offload_optimizer=True", "valid dictionary"),
    ds("zero_optimization.offload_optimizer.devise=cpu", f"{ZERO}.offload_optimizer.devise='cpu'", f"{NO_SUCH} 'device'?"),
    ds("zero_optimization.offload_optimizer.device=nvme", f"{ZERO}.offload_optimizer.device='nvme'", "use cpu or none"),
    ds("zero_optimization.zenflow={}", f"{ZERO}.zenflow={{}}", "leave it out"),
    ds("bf16=true", "deepspeed.bf16=True", '{"enabled": true}'),
    ds("bf16.enable=true", "deepspeed.bf16.enable=True", f"{NO_SUCH} 'enabled'?"),
    ds("bf16.enabled=auto", "deepspeed.bf16.enabled='auto'", "write true or false"),
    ds("fp16.loss_scale_window=0", "deepspeed.fp16.loss_scale_window=0", "leave it out"),
    ds("data_types.grad_acum_dtype=fp32", "deepspeed.data_types.grad_acum_dtype='fp32'", f"{NO_SUCH} 'grad_accum_dtype'?"),
    ds("data_types=fp32", "deepspeed.data_types='fp32'", "is not a section"),
    ds("optimizer.type=Adam", "deepspeed.optimizer='Adam'", "the recipe's optimizer section", "leave it out"),
    ds("optimiser.type=Adam", "deepspeed.optimiser=", f"{NO_SUCH} 'optimizer'?"),
    ds("gradient_accumulation_step=2", "deepspeed.gradient_accumulation_step=2", f"{NO_SUCH} 'gradient_accumulation_steps'?"),
    ds("wall_clock_breakdow=true", "deepspeed.wall_clock_breakdow=True", f"{NO_SUCH} 'wall_clock_breakdown'?"),
    ds("disable_allgather='false'", "deepspeed.disable_allgather='false'", "write true or false"),
    ds("prescale_gradients=maybe", "deepspeed.prescale_gradients='maybe'"),
    ds("steps_per_print=0", "deepspeed.steps_per_print=0", "leave it out"),
    ds("communication_data_type=float32", "deepspeed.communication_data_type='float32'", "'fp32'"),
    ds("activation_checkpointing=true", "deepspeed.activation_checkpointing=True", "is not a section"),
    ds("activation_checkpointing.partition_activation=true", "partition_activation=True", f"{NO_SUCH} 'partition_activations'?"),
    ds("aio.block_size=x", "deepspeed.aio.block_size='x'", "is no number"),
    ds("flops_profiler.enable=true", "deepspeed.flops_profiler.enable=True", f"{NO_SUCH} 'enabled'?"),
    ds("comms_logger.enable=true", "deepspeed.comms_logger.enable=True", f"{NO_SUCH} 'enabled'?"),
    ds("tensorboard.enable=true", "deepspeed.tensorboard.enable=True", f"{NO_SUCH} 'enabled'?"),
    ds("timers.throughput.enable=true", "deepspeed.timers.throughput.enable=True", f"{NO_SUCH} 'enabled'?"),
    ds("checkpoint.tag_validatio=Warn", "deepspeed.checkpoint.tag_validatio='Warn'", f"{NO_SUCH} 'tag_validation'?"),
    ds("autotuning.enabled=true", "deepspeed.autotuning.enabled=True", "leave it out"),
    ds("hybrid_engine.enabled=true", "deepspeed.hybrid_engine.enabled=True", "leave it out"),
    ds("amp.enabled=true", "deepspeed.amp=", "removed"),
    Bad("plan recipe.yaml --gpus 2 deepspeed.zero_optimization.overlap_com=true", [NO_SUCH, "'overlap_comm'"]),
]
LINES = '{"text": "hello there, world"}\n' * 30
CODECS, UNSUPPORTED = ("txt", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"), ("csv", "arrow", "jsonl.bz2", "zip")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5\n"
PACKED = zstandard.ZstdCompressor().compress(LINES.encode())
ZIPPED = gzip.compress(LINES.encode())


def documents(name: str, content: str | bytes, *told: str, wording: str = "") -> Bad:
    """A file of documents, prepared."""
    command = f"prepare {name} out --vocab-size 300"
    return Bad(command, told or [f"SOURCE='{name}'", "mend that file"], write(name, content), wording=f"{name}: {wording}")


def table(values: Any, *told: str, name: str = "text", wording: str = "") -> Bad:
    """A parquet file of one column."""

    def spoil(place: Path) -> None:
        parquet.write_table(pa.table({name: values}), place / "a.parquet")

    return Bad("prepare a.parquet out --vocab-size 300", told, spoil, wording=f"a.parquet: {wording}")


DOCUMENTS = [
    *(
        documents(f"a.{codec}", POINTER, f"SOURCE='a.{codec}'", "a pointer of Git LFS", "git lfs pull", wording="LFS pointer")
        for codec in ("txt", "txt.gz", "json", "jsonl", "jsonl.gz", "jsonl.zst", "parquet")
    ),
    *(documents(f"a.{codec}", b"\xff\xfe\x80" * 9, wording="noise") for codec in CODECS),
    *(documents(f"a.{codec}", "", f"SOURCE='a.{codec}'", wording="empty") for codec in CODECS),
    documents("a.jsonl.gz", ZIPPED[:-9], wording="cut off"),
    documents("a.jsonl.gz", LINES, wording="not packed"),
    documents("a.jsonl.gz", PACKED, wording="zstd"),
    documents("a.jsonl.zst", PACKED[:-3], wording="cut off"),
    documents("a.jsonl.zst", LINES, wording="not packed"),
    documents("a.jsonl", ZIPPED, wording="gzip"),
    documents("a.jsonl", LINES + "oops\n", "SOURCE='a.jsonl'", "line 31", wording="a bad line"),
    documents("a.jsonl", LINES + '{"text"', "SOURCE='a.jsonl'", "line 31", wording="cut off"),
    documents("a.jsonl", '"text"\n', "SOURCE='a.jsonl'", "line 1 is no object", wording="text"),
    documents("a.jsonl", "[" * 100_000, "SOURCE='a.jsonl'", "nests too deep", wording="deep nesting"),
    documents("a.json", '[{"text": "a"}, 5]', "SOURCE='a.json'", "entry 2 is no object", wording="a number in a list"),
    documents("a.jsonl", '{"txt": "a"}\n', "--text-column='text'", "its columns: txt", wording="another column"),
    documents("a.jsonl", '{"text": null}\n' * 3, "SOURCE='a.jsonl'", "3 without text", wording="nulls"),
    documents("a.jsonl", '{"text": ""}\n' * 3, "SOURCE='a.jsonl'", "3 empty", wording="empty texts"),
    documents("a.jsonl", LINES + '{"text": 5}\n', "--text-column='text'", "in a.jsonl", "int", "column of text", wording="5"),
    documents("a.jsonl", '{"text": ["a"]}\n', "--text-column='text'", "in a.jsonl", "list", wording="a list"),
    *(documents(f"a.{kind}", "text\nabc\n", f"SOURCE='a.{kind}'", "supported: .txt") for kind in UNSUPPORTED),
    table(["a"], "--text-column='text'", "its columns: body", name="body", wording="another column"),
    table([1, 2], "--text-column='text'", "int values", wording="numbers"),
    table(pa.array([None, None], pa.string()), "SOURCE='a.parquet'", "2 without text", wording="nulls"),
    table(pa.array([b"\xff"], pa.binary()), "--text-column='text'", "bytes values", wording="bytes"),
    table(pa.array([], pa.string()), "SOURCE='a.parquet'", "no documents", wording="no rows"),
    Bad("prepare nowhere.jsonl out", ["SOURCE='nowhere.jsonl'", "no such file", "name a file"]),
    Bad("prepare tokens out", ["SOURCE='tokens/index.json'", "mend that file"]),
    Bad("prepare '' out", ["SOURCE", "is empty"]),
    Bad("prepare text.jsonl ''", ["OUT", "is empty"]),
    Bad("prepare text.jsonl recipe.yaml", ["OUT='recipe.yaml'", "is not a folder"]),
    Bad("prepare text.jsonl recipe.yaml/x", ["OUT='recipe.yaml/x'", "is not a folder"]),
    Bad("prepare text.jsonl tokens", ["OUT='tokens'", "another preparation", "delete that folder"]),
    Bad("prepare text.jsonl out --vocab-size 256", ["--vocab-size=256", "257"]),
    Bad("prepare text.jsonl out --vocab-size 10000000000000000000000", ["--vocab-size=10000000000000000000000", "257 to"]),
    Bad("prepare text.jsonl out --holdout 0.9", ["--holdout=0.9", "[0, 0.5]"]),
    Bad("prepare text.jsonl out --holdout nan", ["--holdout=nan", "[0, 0.5]"]),
    Bad("prepare text.jsonl out --max-documents 0", ["--max-documents=0", "at least 1"]),
    Bad("prepare text.jsonl out --text-column body", ["--text-column='body'", "its columns: text"]),
    Bad("prepare text.jsonl out --split test", ["--split='test'", "data sets of the hub", "leave it out"]),
    Bad("prepare text.jsonl out --config-name en", ["--config-name='en'", "leave it out"]),
    spoilt("an index cut off", write("out/index.json", "{"), "prepare text.jsonl out", "OUT='out'", "index.json", "delete"),
    spoilt("progress of no text", write("out/progress.json", b"\xff"), "prepare text.jsonl out", "OUT='out'", "progress.json"),
    spoilt("an index that is a folder", become_folder("out/index.json"), "prepare text.jsonl out", "OUT='out'", "index.json"),
    spoilt("tokens of nobody", write("out/train.bin", "x"), "prepare text.jsonl out", "OUT='out'", "name another folder"),
]  # fmt: skip


def tokenizer(name: str, content: str | bytes | None, *told: str) -> Bad:
    """A tokenizer's folder with one file spoilt, or without it."""

    def spoil(place: Path) -> None:
        for unused in ("index.json", "train.bin", "validation.bin"):
            (place / "tokens" / unused).unlink()
        (remove if content is None else lambda file: write(file, content))(f"tokens/{name}")(place)

    wording = f"{name}: {content!r:.40}"
    return Bad("prepare text.jsonl out --tokenizer tokens", ["--tokenizer='tokens'", *told], spoil, wording=wording)


TOKENIZERS = [
    tokenizer("tokenizer.json", "", "cannot be loaded"),
    tokenizer("tokenizer.json", "{}", "cannot be loaded"),
    tokenizer("tokenizer.json", POINTER, "cannot be loaded"),
    tokenizer("tokenizer.json", None, "cannot be loaded"),
    tokenizer("tokenizer_config.json", "{", "tokenizer_config.json", "copy it anew"),
    tokenizer("tokenizer_config.json", "[]", "tokenizer_config.json", "no JSON object"),
    tokenizer("tokenizer_config.json", b"\xff", "tokenizer_config.json"),
    tokenizer("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json", "nests too deep"),
    tokenizer("tokenizer_config.json", '{"eos_token": 5}', "eos_token is 5"),
    tokenizer("tokenizer_config.json", '{"eos_token": {"content": 7}}', "eos_token is 7"),
    tokenizer("tokenizer_config.json", '{"added_tokens_decoder": 5}', "tokenizer_config.json"),
    tokenizer("tokenizer_config.json", '{"added_tokens_decoder": {"a": {"content": "b"}}}', "tokenizer_config.json"),
    tokenizer("tokenizer_config.json", '{"additional_special_tokens": 5}', "tokenizer_config.json"),
    tokenizer("tokenizer_config.json", '{"extra_special_tokens": [5]}', "special token 5"),
    tokenizer("added_tokens.json", "[1]", "added_tokens.json"),
    tokenizer("added_tokens.json", '{"<x>": "y"}', "added_tokens.json", "number"),
    tokenizer("special_tokens_map.json", "5", "special_tokens_map.json"),
    Bad("prepare text.jsonl out --tokenizer nowhere.json", ["--tokenizer='nowhere.json'", "no such file"]),
    Bad("prepare text.jsonl out --tokenizer recipe.yaml", ["--tokenizer='recipe.yaml'", "cannot be loaded"]),
]


def tokens(wording: str, spoil: Spoil, *told: str) -> Bad:
    return spoilt(f"tokens: {wording}", spoil, NEW, "data.path='tokens'", *told)


def of_token(number: int) -> Spoil:
    """Every token of the training split is this one."""
    return lambda place: (place / "tokens/train.bin").write_bytes(
        number.to_bytes(2, "little") * ((place / "tokens/train.bin").stat().st_size // 2)
    )


AGAIN = "relora-ds prepare"
TOKENS = [
    tokens("no folder", remove("tokens"), "no index.json", AGAIN),
    tokens("no index", remove(INDEX), "no index.json", AGAIN),
    tokens("unfinished", lambda place: (place / INDEX).rename(place / "tokens/progress.json"), "no finished preparation"),
    tokens("an index cut off", cut(INDEX, 40), "is not JSON", AGAIN),
    tokens("an index that is a folder", become_folder(INDEX), "index.json cannot be read", AGAIN),
    tokens("an index in UTF-16", write(INDEX, "{}".encode("utf-16")), "is not JSON"),
    tokens("an index nested too deep", write(INDEX, "[" * 100_000), "nests too deep"),
    tokens("an index that is a list", write(INDEX, "[]"), "entries of a preparation", AGAIN),
    tokens("a newer index", edit(INDEX, "format", 2), "has format 2, this version reads format 1", AGAIN),
    tokens("an index without format", drop(INDEX, "format"), "format: Field required", AGAIN),
    tokens("another dtype", edit(INDEX, "dtype", "uint32"), "train.bin has", AGAIN),
    tokens("no such dtype", edit(INDEX, "dtype", "int8"), "dtype", AGAIN),
    tokens("no splits", edit(INDEX, "splits", {}), "no split 'train'"),
    tokens("no validation", edit(INDEX, "splits.validation", None), "splits.validation", AGAIN),
    tokens("words for tokens", edit(INDEX, "splits.train.tokens", "x"), "splits.train.tokens", AGAIN),
    tokens("more tokens", edit(INDEX, "splits.train.tokens", 10**9), "train.bin has", AGAIN),
    tokens("another folder's file", edit(INDEX, "splits.train.file", "../x"), "splits.train.file", AGAIN),
    tokens("a number for a file", edit(INDEX, "splits.train.file", 5), "splits.train.file", AGAIN),
    tokens("a word for a vocabulary", edit(INDEX, "tokenizer.vocab_size", "x"), "tokenizer.vocab_size", AGAIN),
    tokens("no vocabulary", edit(INDEX, "tokenizer.vocab_size", 0), "tokenizer.vocab_size", AGAIN),
    tokens("no eos", edit(INDEX, "tokenizer.eos_id", None), "tokenizer.eos_id", AGAIN),
    tokens("a smaller vocabulary", edit(INDEX, "tokenizer.vocab_size", 10), "damaged", "prepare it again"),
    tokens("no tokens", remove("tokens/train.bin"), "train.bin has no file", AGAIN),
    tokens("tokens cut off", cut("tokens/train.bin", 3), "train.bin has", AGAIN),
    tokens("no tokens in the file", write("tokens/train.bin", ""), "train.bin has 0 bytes", AGAIN),
    tokens("changed bytes", of_token(0xFFFF), "id 65535", "prepare it again"),
    spoilt("tokens: tokenizer cut off", cut("tokens/tokenizer.json"), NEW, "tokenizer.json='tokens'", "copy it anew"),
    spoilt("tokens: configuration cut off", cut("tokens/tokenizer_config.json"), NEW, "tokenizer_config.json='tokens'"),
]
NONE_WHOLE = ("run.dir='run'", "none of its 1 checkpoint(s) is whole", "name another run.dir")


def checkpoint(wording: str, spoil: Spoil, told_by_train: str, told_by_export: str) -> list[Bad]:
    """A checkpoint, the only one of its run: neither gone on with nor exported."""
    return [
        spoilt(f"train: {wording}", spoil, TRAIN, *NONE_WHOLE, told_by_train),
        spoilt(f"export: {wording}", spoil, "export run out", told_by_export),
        spoilt(f"eval: {wording}", spoil, "eval run", told_by_export),
    ]


RANKS = '{"update": 1, "hosts": [{}, []], "forward_s": [1, 2]}\n'
NO_COMPLETE = "RUN_DIR='run': holds no complete checkpoint"
RUNS = [
    *checkpoint("manifest cut off", cut(MANIFEST), "manifest.json: is not whole", NO_COMPLETE),
    *checkpoint("manifest of nothing", write(MANIFEST, "{}"), "manifest.json", NO_COMPLETE),
    *checkpoint("manifest nested too deep", write(MANIFEST, "[" * 100_000), "manifest.json: is not whole", NO_COMPLETE),
    *checkpoint("newer manifest", edit(MANIFEST, "format", 9), "manifest of format 1", NO_COMPLETE),
    *checkpoint("a word for an update", edit(MANIFEST, "update", "x"), "update: Input should be", NO_COMPLETE),
    *checkpoint("no ranks", edit(MANIFEST, "world_size", 0), "world_size: Input should be", NO_COMPLETE),
    *checkpoint("no such phase", edit(MANIFEST, "phase", "x"), "phase: String should", NO_COMPLETE),
    *checkpoint("no phase", drop(MANIFEST, "phase"), "phase: Field required", NO_COMPLETE),
    *checkpoint("another entry", edit(MANIFEST, "nokey", 1), "nokey", NO_COMPLETE),
    *checkpoint("a number for files", edit(MANIFEST, "files", 5), "manifest of format 1", NO_COMPLETE),
    *checkpoint("files without sizes", edit(MANIFEST, "files", {"a": {}}), "manifest of format 1", NO_COMPLETE),
    *checkpoint("a number for a base", edit(MANIFEST, "base", 5), "base: Input should be", NO_COMPLETE),
    *checkpoint("a base without a name", edit(MANIFEST, "base", {}), "base: names no folder", NO_COMPLETE),
    *checkpoint("another base", edit(MANIFEST, "base", {"folder": "no", "sha256": "x"}), "no/manifest.json", "no/manifest.json"),
    *checkpoint("model cut off", cut(STATES), "model_states.pt: has", "model_states.pt: has"),
    *checkpoint("no model", remove(STATES), "model_states.pt: is missing", "model_states.pt: is missing"),
    *checkpoint("a rank's file is missing", remove(OPTIMIZER), "optim_states.pt: is missing", "optim_states.pt: is missing"),
    *checkpoint("base is missing", remove(BASE), "restart_0000/manifest.json", "restart_0000/manifest.json"),
    *checkpoint("base cut off", cut(f"{BASE}/rank_00000.safetensors"), "rank_00000.safetensors: has", "safetensors: has"),
    *checkpoint("base manifest cut off", cut(f"{BASE}/manifest.json"), "is not whole", "is not whole"),
    spoilt("model with another byte", flip(STATES), "export run out", "CHECKPOINT=", "holds other bytes", "another checkpoint"),
    spoilt("base with another byte", flip(f"{BASE}/rank_00000.safetensors"), "eval run", "CHECKPOINT=", "holds other bytes"),
    spoilt("no base is named", edit(MANIFEST, "base", None), "export run out", "CHECKPOINT=", "names no base", "another checkpoint"),
    spoilt("a pickle that runs something: export", harm, "export run out", "wants posix.system", "pass --trust"),
    spoilt("a pickle that runs something: eval", harm, "eval run", "wants posix.system", "pass --trust"),
    spoilt("a pickle that runs something: model.path", harm, f"{NEW} model.config=null model.path=run", "posix.system", "--trust"),
    Bad(f"export {CHECKPOINT}x out", [f"RUN_DIR='{CHECKPOINT}x'", "name a run's folder"]),
    Bad(f"{TRAIN} relora.rank=8", ["relora.rank=8", "the run in run has 4", "name another run.dir", "--allow-changed relora.rank"]),
    Bad(f"{TRAIN} run.seed=7 optimizer.lr=0.5", ["run.seed=7", "optimizer.lr was 0.002", "--allow-changed optimizer.lr"]),
    spoilt("spectrum: a model with another byte", flip(STATES), "spectrum run", "CHECKPOINT=", "holds other bytes"),
    spoilt("spectrum: a base with another byte", flip(f"{BASE}/rank_00000.safetensors"), "spectrum run", "RUN_DIR=", "other bytes"),
    spoilt("spectrum: a model cut off", cut(STATES), "spectrum run", "RUN_DIR='run'", "no complete checkpoint", "bytes"),
    spoilt("spectrum: no base is named", edit(MANIFEST, "base", None), "spectrum run", "CHECKPOINT=", "names no base"),
    spoilt("spectrum: no base", remove(BASE), "spectrum run", "RUN_DIR='run'", "no complete checkpoint", BASE.removeprefix("run/")),
    spoilt("spectrum: a pickle that runs something", harm, "spectrum run", "wants posix.system", "pass --trust"),
    spoilt("no config.yaml", remove("run/config.yaml"), "export run out", "RUN_DIR='", "holds no config.yaml", "run.dir"),
    spoilt("config.yaml of no text", write("run/config.yaml", b"\xff"), TRAIN, "RUN_DIR='run'", "config.yaml", "not UTF-8"),
    spoilt("empty config.yaml", write("run/config.yaml", ""), "eval run", "RUN_DIR='", "config.yaml", "restore it"),
    spoilt("config.yaml of another kind", write("run/config.yaml", "a: b"), TRAIN, "RUN_DIR='run'", "config.yaml", "restore it"),
    spoilt("no deepspeed.json", remove("run/deepspeed.json"), "export run out", "deepspeed.json", "no such file"),
    spoilt("deepspeed.json cut off", cut("run/deepspeed.json"), "export run out", "deepspeed.json", "is not valid JSON"),
    spoilt("no model/", remove("run/model"), "export run out", "RUN_DIR=", "config.json", "restore it"),
    spoilt("model/config.json cut off", cut("run/model/config.json"), "eval run", "RUN_DIR=", "cannot be loaded"),
    spoilt("another model", edit("run/model/config.json", "hidden_size", 64), "export run out", "CHECKPOINT=", "does not fit"),
    spoilt("a file for a run", become_file("run"), TRAIN, "run.dir='run'", "is not a folder", "name a folder"),
    spoilt("a file for checkpoints", become_file("run/checkpoints"), "export run out", "RUN_DIR='run'", "no complete checkpoint"),
    spoilt("metrics of nothing", write("run/metrics.jsonl", ""), "report run", "RUN_DIR='run'", "no update", "wait"),
    spoilt("metrics, a bad line", write("run/metrics.jsonl", "x\n" * 2), "report run", "RUN_DIR='run'", "line 1", "remove that line"),
    spoilt("metrics, a word for an update", write("run/metrics.jsonl", '{"update": "1"}\n' * 2), "report run", "line 1", "mend"),
    spoilt("metrics nested too deep", write("run/metrics.jsonl", "[" * 100_000), "report run", "RUN_DIR='run'", "no update"),
    spoilt("ranks without hosts", write("run/ranks.jsonl", '{"update": 1, "forward_s": 5}\n'), "report run", "ranks.jsonl", "mend"),
    spoilt("ranks on no hosts", write("run/ranks.jsonl", RANKS), "report run", "ranks.jsonl tells of update 1 without hosts"),
    spoilt("report: config.yaml cut off", write("run/config.yaml", "{"), "report run", "config.yaml", "is not valid YAML"),
    spoilt("report: config.yaml of no text", write("run/config.yaml", b"\xff"), "report run", "config.yaml", "is not UTF-8"),
]  # fmt: skip


def traffic(key: str, value: Any) -> Spoil:
    """traffic.json with one entry that tells something else than it should."""

    def spoil(place: Path) -> None:
        (place / "run/traffic.json").write_text(json.dumps({"starts": [start(**{key: value})]}))

    return spoil


TRAFFIC = [
    "nodes are a number",
    "nodes are numbers",
    "nodes without bytes",
    "no first update",
    "bytes are a list",
    "bytes are text",
]


@pytest.mark.parametrize("bad", [*DEEPSPEED, *DOCUMENTS, *TOKENIZERS, *TOKENS, *RUNS], ids=str)
def test_refused_in_one_line(bad: Bad, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    judge(bad, place, monkeypatch, capfd)


def test_a_run_that_another_job_has(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    lock = RunLock(place / "run", "77.0")
    lock.acquire()
    try:
        judge(Bad(TRAIN, ["run.dir='run'", "in use by"]), place, monkeypatch, capfd)
    finally:
        lock.release()


@pytest.mark.parametrize(
    ("spoil", "command", "told"),
    [
        (write("run/checkpoints/latest", "nowhere"), "eval run", "perplexity"),
        (write("text/._a.jsonl", "x"), "prepare text out --vocab-size 300", "passed over: 1 hidden"),
        (write("text/dataset_info.json", "{}"), "prepare text out --vocab-size 300", "passed over: 1"),
        (write("text/b.jsonl", '{"text": null}\n{"other": 1}\n'), "prepare text out --vocab-size 300", "2 without text"),
    ],
    ids=[
        "latest names nothing",
        "hidden file",
        "metadata",
        "rows without text",
    ],
)
def test_what_is_passed_over(
    spoil: Callable[[Path], object], command: str, told: str, place: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What nothing depends on spoils nothing, and what is left out of documents is told."""
    must_not_start(monkeypatch)
    monkeypatch.chdir(place)
    write("text/a.jsonl", LINES)(place)
    spoil(place)
    outcome = run(command, capfd)
    assert outcome.code == 0, outcome
    assert any(told in line for line in [*outcome.out, *outcome.errors]), outcome


@pytest.mark.parametrize(
    "spoil",
    [
        write("run/traffic.json", '{"starts": [5, {}]}'),
        traffic("nodes", 5),
        traffic("nodes", [5]),
        traffic("nodes", [{"host": "a"}]),
        traffic("first_update", None),
        traffic("wire_bytes", []),
        traffic("wire_bytes_per_update", "x"),
        write("run/restarts.jsonl", '{"update": 1, "restart": "x"}\n'),
        write("run/metrics.jsonl", f'{{"update": 1, "loss": {10**400}}}\n{{"update": 2, "loss": 1e308}}\n'),
        write("run/starts.jsonl", '{"update": 1, "seconds": 5, "hosts": {}, "hardware": "x"}\n'),
    ],
    ids=["traffic of nothing", *TRAFFIC, "restart of nothing", "numbers beyond measure", "starts of nothing"],
)
def test_what_a_report_passes_over(spoil: Callable[[Path], object], place: Path) -> None:
    """Its pages are written without it."""
    spoil(place)
    text, page = pages(place / "run")
    assert "## In short" in text and "<h2>In short</h2>" in page


def test_the_harm_is_real(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pickle of the table does it where it is opened as pickles are."""
    harm(place)
    monkeypatch.chdir(place)
    torch.load(place / STATES, weights_only=False)
    assert (place / "harm").exists()
