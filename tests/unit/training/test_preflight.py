"""What a recipe may change, and what not, when it goes on with a run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer, LlamaConfig

from relora_ds import config
from relora_ds.data.prepare import prepare, train_tokenizer
from relora_ds.data.token_dataset import read_index
from relora_ds.data.tokenizer import Given
from relora_ds.data.tokenizer import write as write_tokenizer
from relora_ds.errors import ConfigError
from relora_ds.run import manifest as manifests
from relora_ds.run.folder import RunFolder
from relora_ds.run.lock import RunLock
from relora_ds.run.manifest import Manifest
from relora_ds.training.preflight import check, refuse_busy
from tests.conftest import TINY_LLAMA
from tests.unit.test_config import judge, refusal


@pytest.fixture
def checkpointed(recipe: Path) -> Path:
    """``recipe``, of which two ranks have written a checkpoint."""
    started = config.load(recipe)
    Path(started.run.dir).mkdir()
    (Path(started.run.dir) / "config.yaml").write_text(config.dump(started))
    write_checkpoint(Path(started.run.dir), update=8, ranks=2)
    return recipe


def write_checkpoint(run: Path, *, update: int, ranks: int, **data: object) -> None:
    """As far as the checks before a start look at it."""
    folder = run / "checkpoints" / f"update_{update:07}"
    folder.mkdir(parents=True)
    content = Manifest(
        update=update, phase="lora", restarts=1, lora_updates=update, world_size=ranks, zero_stage=2, precision="fp32",
        config_sha256="", data=data, rng={}, progress={}, base=None, versions={},
    )  # fmt: skip
    manifests.write(folder, content)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.updates=40"],
        ["train.eval_every=5"],
        ["wandb.mode=disabled"],
        ["train.micro_batch=4"],
        ["model.gradient_checkpointing=true"],
        ["relora.frozen.verify_every=3"],
        ["checkpoint={async: false, self_contained: true}"],
    ],
)
def test_a_run_goes_on_with_what_may_change(checkpointed: Path, overrides: list[str]) -> None:
    judge(checkpointed, *overrides, ranks=2)


@pytest.mark.parametrize(
    ("override", "key_and_value", "before"),
    [
        ("run.seed=2", "run.seed=2", "has 1"),
        ("relora.rank=8", "relora.rank=8", "has 4"),
        ("relora.frozen.dtype=int8", "relora.frozen.dtype='int8'", "has 'auto'"),
        ("optimizer.lr=0.5", "optimizer.lr=0.5", "has 0.002"),
        ("train.global_batch=16", "train.global_batch=16", "has 8"),
        ("method=lora", "method='lora'", "has 'relora'"),
        ("deepspeed.bf16={enabled: true}", "deepspeed='bf16'", "has 'fp32'"),
    ],
)
def test_a_run_does_not_go_on_as_another_one(checkpointed: Path, override: str, key_and_value: str, before: str) -> None:
    line = refusal(checkpointed, override, ranks=2)
    key = key_and_value.partition("=")[0]
    assert line.startswith(f"{key_and_value}: ")
    assert before in line
    assert line.endswith(f"name another run.dir, or override: --allow-changed {key}")
    read = config.load(checkpointed, [override])
    assert check(read, checkpointed, 2, [key]).config == read
    assert check(read, checkpointed, 2, [key.partition(".")[0]]).config == read, "a section insists on all that is in it"


def test_all_the_differences_are_listed(checkpointed: Path) -> None:
    line = refusal(checkpointed, "relora.rank=8", "optimizer.lr=0.5", "train.eval_every=3", ranks=2)
    assert "relora.rank=8: the run in" in line and "; optimizer.lr was 0.002 and is 0.5;" in line
    assert line.endswith("override: --allow-changed relora.rank --allow-changed optimizer.lr")
    assert "eval_every" not in line
    with pytest.raises(ConfigError, match=r"^optimizer\.lr=0\.5: .*has 0\.002; name another"):
        check(config.load(checkpointed, ["relora.rank=8", "optimizer.lr=0.5"]), checkpointed, 2, ["relora.rank"])


def test_tokens_are_known_by_what_they_are_and_not_by_where_they_lie(checkpointed: Path, tmp_path: Path) -> None:
    started = config.load(checkpointed)
    moved = shutil.copytree(started.data.path, tmp_path / "moved")
    override = r"override: --allow-changed data\.path$"
    assert re.search(override, refusal(checkpointed, f"data.path={moved}", ranks=2)), (
        "a checkpoint that says nothing of its tokens"
    )
    write_checkpoint(Path(started.run.dir), update=9, ranks=2, sha256=read_index(moved).digests)
    judge(checkpointed, f"data.path={moved}", ranks=2)
    index = json.loads((moved / "index.json").read_text())
    index["splits"]["train"]["sha256"] = "0" * 64
    (moved / "index.json").write_text(json.dumps(index))
    line = refusal(checkpointed, f"data.path={moved}", ranks=2)
    assert "has 'other tokens'" in line and re.search(override, line)
    check(config.load(checkpointed, [f"data.path={moved}"]), checkpointed, 2, ["data.path"])


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 2), (2, 2), (4, 2), (8, 1)])
def test_a_run_goes_on_with_another_number_of_ranks(checkpointed: Path, ranks: int, micro_batch: int) -> None:
    """The global batch of 8 stays; the micro batch of 2 gives way where it must."""
    checked = judge(checkpointed, ranks=ranks)
    assert checked.config.train.micro_batch == micro_batch
    assert checked.deepspeed["train_batch_size"] == 8
    assert checked.deepspeed["gradient_accumulation_steps"] * micro_batch * ranks == 8
    write_checkpoint(Path(checked.config.run.dir), update=12, ranks=ranks)
    assert judge(checkpointed, ranks=ranks).config == checked.config, "and once more with as many, whose checkpoint is the newest"


@pytest.mark.parametrize("ranks", [3, 16])
def test_ranks_over_which_the_global_batch_does_not_divide(checkpointed: Path, ranks: int) -> None:
    line = refusal(checkpointed, ranks=ranks)
    assert line == f"--nproc={ranks}: train.global_batch=8 does not divide over so many ranks; resume on 1, 2, 4, 8"


# The tokenizer of the data, and the model's


def others_model(folder: Path, size: int) -> Path:
    """A model made elsewhere, with a tokenizer of its own."""
    LlamaConfig(**{**TINY_LLAMA, "vocab_size": size}).save_pretrained(folder)
    write_tokenizer(Given(train_tokenizer([f"{i} is the number {i}" for i in range(99)], size), "<|endoftext|>"), folder)
    return folder


def as_adapter(folder: Path, model: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    return folder


def as_run(folder: Path, model: Path) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text("")
    (folder / "checkpoints").mkdir()
    model.rename(folder / "model")
    return folder


@pytest.mark.parametrize("kind", ["model", "adapter", "run"])
def test_data_of_another_tokenizer_than_the_models(recipe: Path, tmp_path: Path, kind: str) -> None:
    """Although all of its ids are rows of the model."""
    model = others_model(tmp_path / "model", 310)
    start = {
        "model": lambda: model,
        "adapter": lambda: as_adapter(tmp_path / "lora", model),
        "run": lambda: as_run(tmp_path / "r", model),
    }
    path = start[kind]()
    line = refusal(recipe, "model.config=null", f"model.path={path}")
    own = path / "model" if kind == "run" else model
    assert re.match(rf"data\.path='.*': its tokenizer is not that of model\.path='{path}': \d+ tokens differ, such as ", line)
    assert line.endswith(f"prepare the data with --tokenizer {own}")


def test_data_of_the_models_tokenizer_or_of_a_model_that_has_none(recipe: Path, tmp_path: Path, token_folder: Path) -> None:
    model = others_model(tmp_path / "model", 310)
    overrides = ["model.config=null", f"model.path={model}"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    judge(recipe, *overrides)
    AutoTokenizer.from_pretrained(token_folder).save_pretrained(model)  # other bytes
    assert (model / "tokenizer.json").read_bytes() != (token_folder / "tokenizer.json").read_bytes()
    judge(recipe, *overrides)


def test_a_token_that_no_document_has_needs_no_row_of_the_models(recipe: Path, tmp_path: Path, token_folder: Path) -> None:
    """As of published models whose tokenizer names a pad token for which they have no row; a new model gets one."""
    data = tmp_path / "data"
    shutil.copytree(token_folder, data)
    index = json.loads((data / "index.json").read_text())
    index["tokenizer"]["vocab_size"] += 1
    (data / "index.json").write_text(json.dumps(index))
    (tmp_path / "model").mkdir()
    LlamaConfig(**{**TINY_LLAMA, "vocab_size": 300}).save_pretrained(tmp_path / "model")
    given = ["model.config=null", f"model.path={tmp_path / 'model'}", f"data.path={data}"]
    assert judge(recipe, *given).architecture.vocab_size == 300
    assert judge(recipe, f"data.path={data}").architecture.vocab_size == 301
    index["tokenizer"]["encoder_size"] += 1
    (data / "index.json").write_text(json.dumps(index))
    assert "its tokenizer has 301 entries, the model's vocabulary 300" in refusal(recipe, *given)


def test_a_run_that_goes_on_is_not_asked_for_its_tokenizer_again(checkpointed: Path, tmp_path: Path) -> None:
    overrides = ["model.config=null", f"model.path={others_model(tmp_path / 'model', 310)}"]
    read = config.load(checkpointed, overrides)
    check(read, checkpointed, 2, ["model"])


def test_what_is_left_of_an_earlier_start_of_this_job_does_not_keep_it_out(recipe: Path, run: RunFolder) -> None:
    """Its node was cut off and lives on: also where the command that starts the ranks looks, before rank 0 does."""
    run.path.mkdir(parents=True)
    settings = config.load(recipe)
    with RunLock(run.path, job="17.0"):
        refuse_busy(settings, "17.1")
        for attempt in ("", "18.0"):
            with pytest.raises(ConfigError, match="in use by"):
                refuse_busy(settings, attempt)


def test_widths_that_gpus_multiply_slowly_are_told_where_the_ranks_have_gpus(recipe: Path) -> None:
    read = config.load(recipe, ["model.config.intermediate_size=49"])
    on_gpus, on_cpus = (check(read, recipe, 1, on_cuda=on_cuda).remarks for on_cuda in (True, False))
    assert any(line.startswith("intermediate_size 49") for line in on_gpus)
    assert not any("intermediate_size" in line for line in on_cpus)
    rounded = config.load(recipe, ["model.config.intermediate_size=49", "model.multiple_of=8"])
    assert not any("multiply slowly" in line for line in check(rounded, recipe, 1, on_cuda=True).remarks)


@pytest.fixture
def nothing_held_out(tmp_path: Path, recipe: Path, token_folder: Path) -> Path:
    """``recipe`` with tokens of which none are held out."""
    prepare(str(token_folder.parent / "text.jsonl"), tmp_path / "all", vocab_size=300, holdout=0, progress=False)
    content = yaml.safe_load(recipe.read_text())
    content["data"]["path"] = str(tmp_path / "all")
    recipe.write_text(yaml.safe_dump(content))
    return recipe


def test_nothing_held_out_is_no_evaluation_and_said_so(nothing_held_out: Path, tmp_path: Path) -> None:
    checked = check(config.load(nothing_held_out), nothing_held_out, 1)
    assert f"no evaluation: {tmp_path / 'all'} holds out nothing (--holdout 0)" in checked.remarks


@pytest.mark.parametrize("override", ["train.eval_every=2", "train.eval_tokens=64"])
def test_an_evaluation_of_nothing_is_refused(nothing_held_out: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=f"{override}: .* holds out nothing .*; leave it out, or prepare with a holdout"):
        check(config.load(nothing_held_out, [override]), nothing_held_out, 1)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["relora.restart_every=19"], None),
        (
            ["relora.restart_every=20"],
            "relora.restart_every=20 does nothing: it is not shorter than the LoRA phase, which has 20 updates",
        ),
        (["relora.restart_every=15", "relora.warm_start=5"], "which has 15 updates"),
        (["relora.restart_every=30", "relora.reset.every=5"], "relora.restart_every=30 does nothing"),
        (["relora.restart_every=5", "relora.reset.every=30"], "relora.reset.every=30 does nothing"),
        (["relora.restart_every=null", "relora.reset.every=6"], None),
        (["relora.restart_every=30", "method=lora"], None),
        (["relora.restart_every=30", "method=full"], None),
    ],
    ids=str,
)
def test_restarts_that_never_come_are_told_of(recipe: Path, overrides: list[str], told: str | None) -> None:
    checked = judge(recipe, "relora.restart_warmup=1", *overrides)
    lines = [line for line in checked.remarks if "does nothing" in line]
    assert lines == [] if told is None else len(lines) == 1 and told in lines[0]


@pytest.mark.parametrize(
    ("overrides", "is_told"),
    [
        (["relora.restart_warmup=3"], False),
        (["relora.restart_warmup=3", "optimizer.schedule=cosine"], True),
        (["relora.restart_warmup=0", "optimizer.schedule=cosine"], False),
        (["relora.restart_warmup=null", "optimizer.schedule=cosine"], False),
        (["relora.restart_warmup=3", "optimizer.schedule=cosine", "relora.restart_every=null", "relora.reset.every=9"], True),
        (["relora.restart_warmup=3", "optimizer.schedule=cosine", "method=lora"], False),
        (["relora.restart_warmup=3", "optimizer.schedule=cosine", "method=full"], False),
    ],
    ids=str,
)
def test_a_re_warmup_that_the_schedule_does_not_have_is_told_of(recipe: Path, overrides: list[str], is_told: bool) -> None:
    lines = [line for line in judge(recipe, "relora.restart_every=9", *overrides).remarks if "restart_warmup" in line]
    assert len(lines) == is_told
    assert all(line.startswith("relora.restart_warmup=3 does nothing: optimizer.schedule=cosine has no") for line in lines)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["relora.warm_start=3", "optimizer.warmup=2"], ""),
        (["relora.warm_start=0", "optimizer.warmup=19"], ""),
        (["relora.warm_start=19", "optimizer.warmup=1", "method=full"], ""),
        (["relora.warm_start=2", "optimizer.warmup=2"], "is not shorter than the full-rank phase, which has 2 updates"),
        (["relora.warm_start=18", "optimizer.warmup=5"], "is not shorter than the LoRA phase, which has 2 updates"),
        (["relora.warm_start=10", "optimizer.warmup=12"], "which has 10 updates, and the LoRA phase, which has 10 updates"),
    ],
    ids=str,
)
def test_a_warmup_that_a_phase_is_too_short_for_is_told_of(recipe: Path, overrides: list[str], told: str) -> None:
    lines = [line for line in judge(recipe, *overrides).remarks if line.startswith("the learning rate does not reach its peak")]
    assert len(lines) == bool(told) and all(line.endswith(told) for line in lines)


@pytest.mark.parametrize(
    ("kept", "every", "words"),
    [
        ("300", "500", "with train.checkpoint_every=500 only multiples of 1,500 have a checkpoint to keep"),
        ("300", "null", "no checkpoint is written on the way without train.checkpoint_every"),
        ("600", "300", None),
        ("250", "500", None),
        ("null", "500", None),
    ],
)
def test_checkpoints_that_are_to_stay_and_never_written_are_told_of(
    recipe: Path, kept: str, every: str, words: str | None
) -> None:
    remarks = judge(recipe, f"train.keep_every={kept}", f"train.checkpoint_every={every}").remarks
    lines = [line for line in remarks if "keep_every" in line]
    assert lines == ([] if words is None else [f"train.keep_every={kept} does not keep what it says: {words}"])
