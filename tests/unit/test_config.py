"""Recipes: how they are read, what is refused, and how a refusal is worded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from relora_ds import config
from relora_ds.errors import ConfigError
from relora_ds.models.build import num_parameters
from relora_ds.schedule import Interval
from relora_ds.training.preflight import Checked, check

ROOT = Path(__file__).resolve().parents[2]


def judge(recipe: Path, *overrides: str, ranks: int = 1) -> Checked:
    """All that the command line does with a recipe before any process starts."""
    return check(config.load(recipe, overrides), recipe, ranks)


def refusal(recipe: Path, *overrides: str, ranks: int = 1) -> str:
    """The one line with which a recipe is refused."""
    with pytest.raises(ConfigError) as caught:
        judge(recipe, *overrides, ranks=ranks)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert caught.value.key in line
    return line


# Paths


PATHS = ("run.dir", "data.path", "model.path", "model.config", "model.weights", "deepspeed")


def at_key(content: Any, key: str) -> Any:
    for name in key.split("."):
        content = getattr(content, name)
    return content


@pytest.mark.parametrize("key", PATHS)
def test_home_and_variables_are_filled_in_wherever_a_path_is_read(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("UNSET", raising=False)
    free = ["model.config=null"] * (key == "model.path")
    for text, path in (("~/a", "/home/me/a"), ("$SCRATCH/a", "/scratch/me/a"), ("${SCRATCH}_2/a", "/scratch/me_2/a")):
        read = config.load(recipe, [*free, f"{key}={text}"])
        assert at_key(read, key) == path
        assert config.parse(yaml.safe_load(config.dump(read))) == read
    for text, name in (("$UNSET/a", "UNSET"), ("${UNSET}", "UNSET"), ("~nobody-of-this-name/a", "~nobody-of-this-name")):
        with pytest.raises(ConfigError, match=re.escape(name)) as caught:
            config.load(recipe, [*free, f"{key}={text}"])
        assert (caught.value.key, caught.value.value) == (key, text)


# Re-warmup


@pytest.mark.parametrize(
    ("overrides", "rewarmup"),
    [
        (["relora.restart_every=400"], 100),  # as it always was
        (["relora.restart_every=101"], 100),
        (["relora.restart_every=100"], 25),
        (["relora.restart_every=10"], 2),
        (["relora.restart_every=1"], 0),
        (["relora.restart_every=400", "relora.reset.every=12"], 3),
        (["relora.restart_every=10", "relora.restart_growth=2.0"], 2),
        (["method=lora", "relora.restart_every=10"], 100),  # which never restarts
        (["relora.restart_every=10", "relora.restart_warmup=7"], 7),
    ],
)
def test_a_rewarmup_that_is_left_out_fits_the_interval(recipe: Path, overrides: list[str], rewarmup: int) -> None:
    content = yaml.safe_load(recipe.read_text())
    del content["relora"]["restart_warmup"]
    recipe.write_text(yaml.safe_dump(content))
    read = config.load(recipe, ["train.updates=1000", *overrides])
    assert read.relora.restart_warmup == rewarmup
    assert yaml.safe_load(config.dump(read))["relora"]["restart_warmup"] == rewarmup, "config.yaml says what it was"


def test_a_rewarmup_that_is_left_out_in_a_script() -> None:
    assert config.parse_relora({"restart_every": 10}).rewarmup == 2
    with pytest.raises(ConfigError, match=r"^relora\.restart_warmup=10: not shorter than relora\.restart_every=10"):
        config.parse_relora({"restart_every": 10, "restart_warmup": 10})


# Overrides


def test_overrides_replace_single_settings(recipe: Path) -> None:
    changed = config.load(recipe, ["relora.rank=8", "relora.reset.kind=random", "optimizer.lr=1e-4", "run.seed=7"])
    assert (changed.relora.rank, changed.relora.reset.kind, changed.optimizer.lr, changed.run.seed) == (8, "random", 1e-4, 7)
    assert changed.relora.restart_every == 8  # their neighbours stay
    assert changed.relora.alpha == 8


def test_the_last_override_wins(recipe: Path) -> None:
    assert config.load(recipe, ["relora.rank=8", "relora.rank=2"]).relora.rank == 2


def test_override_makes_a_section_that_the_recipe_lacks(recipe: Path) -> None:
    assert config.load(recipe).wandb.mode == "auto"
    assert config.load(recipe, ["wandb.mode=disabled"]).wandb.mode == "disabled"


def test_override_values_are_yaml(recipe: Path) -> None:
    changed = config.load(recipe, ["relora.targets=[q_proj, v_proj]", "optimizer.betas=[0.9, .95]", "train.eval_every=null"])
    assert changed.relora.targets == ["q_proj", "v_proj"]
    assert changed.optimizer.betas == [0.9, 0.95]
    assert changed.train.eval_every is None
    assert config.load(recipe, ["run.dir=a=b"]).run.dir == "a=b"


@pytest.mark.parametrize("override", ["relora.rank", "=8", " =8"])
def test_override_of_a_bad_form(recipe: Path, override: str) -> None:
    line = refusal(recipe, override)
    assert line.startswith(f"override={override!r}: ")
    assert "key.sub=value" in line


def test_override_below_a_value(recipe: Path) -> None:
    assert refusal(recipe, "run.dir.name=x") == "run.dir.name='x': run.dir is a value, not a section"


# What is refused; every row: overrides, key and value as the line has them, further text such as the nearest valid name

UNKNOWN = [
    (["trian.updates=5"], "trian={'updates': 5}", "unknown key; did you mean 'train'?"),
    (["relora.rnak=16"], "relora.rnak=16", "unknown key; did you mean 'rank'?"),
    (["relora.reset.ratoi=0.5"], "relora.reset.ratoi=0.5", "unknown key; did you mean 'ratio'?"),
    (["optimizer.weight_deca=0.1"], "optimizer.weight_deca=0.1", "unknown key; did you mean 'weight_decay'?"),
    (["data.zzz=1"], "data.zzz=1", "unknown key; valid names: path, sequence_length"),
    (["run={}", "relora.rnak=4"], "relora.rnak=4", "did you mean 'rank'?"),  # told before what is missing
    (["model.config.hiden_size=32"], "model.config.hiden_size=32", "did you mean 'hidden_size'?"),
]
ILL_TYPED = [
    (["relora.rank='8'"], "relora.rank='8'", "valid integer"),
    (["relora.rank=8.0"], "relora.rank=8.0", "valid integer"),
    (["train.updates=true"], "train.updates=True", "valid integer"),
    (["optimizer.lr=fast"], "optimizer.lr='fast'", "valid number"),
    (["run.dir=3"], "run.dir=3", "valid string"),
    (["relora.targets=3"], "relora.targets=3", "valid string"),
    (["optimizer.betas=0.9"], "optimizer.betas=0.9", "valid list"),
    (["relora.reset.restart_bias_correction=yes please"], "relora.reset.restart_bias_correction='yes please'", "valid boolean"),
    (["relora=16"], "relora=16", "section"),
    (["train="], "train=None", "section"),
    (["model.config=3"], "model.config=3", "section"),
    (["deepspeed=2"], "deepspeed=2", "valid string"),
]
OUT_OF_RANGE = [
    (["relora.rank=0"], "relora.rank=0", "greater than 0"),
    (["relora.alpha=0"], "relora.alpha=0", "greater than 0"),
    (["relora.dropout=1.0"], "relora.dropout=1.0", "less than 1"),
    (["relora.reset.ratio=1.01"], "relora.reset.ratio=1.01", "less than or equal to 1"),
    (["relora.warm_start=-1"], "relora.warm_start=-1", "greater than or equal to 0"),
    (["relora.restart_every=0"], "relora.restart_every=0", "greater than 0"),
    (["optimizer.lr=-1e-3"], "optimizer.lr=-0.001", "greater than or equal to 0"),
    (["optimizer.lr=.nan"], "optimizer.lr=nan", "finite"),
    (["optimizer.betas=[0.9, 1.0]"], "optimizer.betas=1.0", "less than 1"),
    (["optimizer.betas=[0.9]"], "optimizer.betas=[0.9]", "at least 2 items"),
    (["optimizer.min_lr_ratio=.nan"], "optimizer.min_lr_ratio=nan", "less than or equal to 1"),
    (["train.micro_batch=0"], "train.micro_batch=0", "greater than 0"),
    (["train.keep=0"], "train.keep=0", "greater than 0"),
    (["train.hang_timeout=0"], "train.hang_timeout=0", "greater than 0"),
    (["train.hang_timeout=.inf"], "train.hang_timeout=inf", "finite"),
    (["train.hang_timeout=true"], "train.hang_timeout=True", "valid number"),
    (["data.sequence_length=1"], "data.sequence_length=1", "greater than or equal to 2"),
    (["run.seed=-1"], "run.seed=-1", "greater than or equal to 0"),
]
NOT_A_NAME = [
    (["method=rlora"], "method='rlora'", "did you mean 'relora'?"),
    (["optimizer.schedule=jaged"], "optimizer.schedule='jaged'", "did you mean 'jagged'?"),
    (["relora.reset.kind=magnitud"], "relora.reset.kind='magnitud'", "did you mean 'magnitude'?"),
    (["relora.reset.scope=1"], "relora.reset.scope=1", "valid names: global, tensor"),
    (["model.attention=flash"], "model.attention='flash'", "valid names: auto, eager, flash_attention_2, sdpa"),
    (["model={preset: llama_60}"], "model.preset='llama_60'", "did you mean 'llama_60m'?"),
    (
        ["relora.targets=[q_proj, k_prok]"],
        "relora.targets='k_prok'",
        "matches no linear layer or embedding of the model; did you mean 'k_proj'?",
    ),
    (["relora.targets=attention_block"], "relora.targets='attention_block'", "matches no linear layer"),
]
MISSING = [
    (["run={}"], "run.dir=None", "is required"),
    (["data={sequence_length: 16}"], "data.path=None", "is required"),
    (["train={updates: 5, micro_batch: 2}"], "train.global_batch=None", "is required"),
    (["model.config={hidden_size: 32}"], "model.config.model_type=None", "is required"),
    (["relora.restart_every=null"], "relora.restart_every=None", "ReLoRA needs restarts"),
]
CONTRADICTIONS = [
    (["train.updates=null"], "train.updates=None", "train.tokens"),
    (["train.tokens=4096"], "train.updates=20", "train.tokens (now 4096)"),
    (["model.preset=llama_60m"], "model={'preset': 'llama_60m'", "give exactly one of the three"),
    (["model.path=x"], "model={'preset': None, 'path': 'x'", "leave one out: model.path=null or model.config=null"),
    (["model={}"], "model={'preset': None", "give exactly one of the three"),
    (["train.micro_batch=3"], "train.global_batch=8", "not a multiple of train.micro_batch=3"),
    (["optimizer.warmup=20"], "optimizer.warmup=20", "not shorter than the run of 20 updates"),
    (["relora.warm_start=20"], "relora.warm_start=20", "not shorter than the run of 20 updates"),
    (
        ["train.keep_first_base=true", "checkpoint.self_contained=true"],
        "train.keep_first_base=True",
        "frozen weights are in every checkpoint; set train.keep_every",
    ),
    (
        ["train.keep_first_base=true", "relora.restart_every=1", "relora.restart_warmup=0"],
        "train.keep_first_base=True",
        "set relora.restart_every to 2 or more",
    ),
    (
        ["relora.rewarm=factors", "optimizer.schedule=cosine"],
        "relora.rewarm='factors'",
        "nothing re-warms with optimizer.schedule",
    ),
    (["relora.restart_warmup=8"], "relora.restart_warmup=8", "not shorter than relora.restart_every=8"),
    (["relora.reset.every=3"], "relora.restart_warmup=3", "not shorter than relora.reset.every=3"),
    (
        ["relora.frozen.dtype=none"],
        "relora.frozen.dtype='none'",
        "no frozen weight to merge into; leave relora.restart_every out",
    ),
    (
        ["method=lora", "relora.frozen={dtype: none, master: sharded}"],
        "relora.frozen.master='sharded'",
        "no frozen weight to keep exactly; set it to none",
    ),
    (
        ["relora.init=residual"],
        "relora.init='residual'",
        "needs the exact weights beside the stored ones; set relora.frozen.master",
    ),
    (["method=control", "model={path: gpt2}"], "model.path='gpt2'", "the control is a smaller model; name it as model.config"),
    (["relora.rank=33"], "relora.rank=33", "larger than layer 'model.layers.0.self_attn.q_proj' of (32, 32); use at most 32"),
    (["data.sequence_length=65"], "data.sequence_length=65", "longer than the model's 64 positions"),
]
DEEPSPEED = [
    (["deepspeed=nowhere.json"], "deepspeed='nowhere.json'", "no such file; name a DeepSpeed JSON file"),
    (["deepspeed={}"], "deepspeed.zero_optimization.stage=None", "ReLoRA runs on ZeRO stage 1 or 2; set it to 2"),
    (["deepspeed.zero_optimization.stage=3"], "deepspeed.zero_optimization.stage=3", "ReLoRA runs on ZeRO stage 1 or 2"),
    (["deepspeed.zero_optimization.stage=0"], "deepspeed.zero_optimization.stage=0", "ReLoRA runs on ZeRO stage 1 or 2"),
    (
        ["deepspeed.zero_optimization.offload_param={device: cpu}"],
        "deepspeed.zero_optimization.offload_param={'device': 'cpu'}",
        "needs ZeRO-3",
    ),
    (
        ["deepspeed.zero_optimization.offload_optimizer={device: nvme}"],
        "deepspeed.zero_optimization.offload_optimizer.device='nvme'",
        "use cpu or none",
    ),
    (["deepspeed.optimizer={type: AdamW}"], "deepspeed.optimizer='AdamW'", "the recipe's optimizer section decides this"),
    (["deepspeed.scheduler={type: WarmupLR}"], "deepspeed.scheduler='WarmupLR'", "leave it out"),
    (
        ["deepspeed.bf16={enabled: true}", "deepspeed.fp16={enabled: true}"],
        "deepspeed.bf16.enabled=True",
        "bf16 and fp16 are both enabled",
    ),
    (["deepspeed.sequence_parallel_size=2"], "deepspeed.sequence_parallel_size=2", "not supported"),
    (["deepspeed.checkpoint={load_universal: true}"], "deepspeed.checkpoint.load_universal=True", "by itself; leave"),
]
TABLE = [*UNKNOWN, *ILL_TYPED, *OUT_OF_RANGE, *NOT_A_NAME, *MISSING, *CONTRADICTIONS, *DEEPSPEED]


@pytest.mark.parametrize(("overrides", "key_and_value", "text"), TABLE, ids=[" ".join(row[0]) for row in TABLE])
def test_a_bad_configuration_is_refused_in_one_line(recipe: Path, overrides: list[str], key_and_value: str, text: str) -> None:
    line = refusal(recipe, *overrides)
    assert line.startswith(key_and_value)
    assert text in line[len(key_and_value) :]


def test_the_unspoilt_recipe_passes(recipe: Path, token_folder: Path) -> None:
    checked = judge(recipe, ranks=4)
    assert checked.index.folder == token_folder
    assert checked.architecture.vocab_size == checked.index.vocab_size
    assert checked.deepspeed["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize(
    "overrides", [["relora.warm_start=19"], ["relora.restart_warmup=7"], ["optimizer.warmup=19"], ["relora.rank=32"]]
)
def test_the_largest_allowed_value_passes(recipe: Path, overrides: list[str]) -> None:
    judge(recipe, *overrides)


@pytest.mark.parametrize("method", ["full", "control", "lora", "low_rank"])
def test_only_relora_needs_restarts(recipe: Path, method: str) -> None:
    judge(recipe, f"method={method}", "relora.restart_every=null")


@pytest.mark.parametrize(
    ("method", "full_updates", "restarts", "stored"),
    [
        ("full", 20, 8, "int8"),
        ("control", 20, 8, "int8"),
        ("lora", 5, 0, "int8"),
        ("low_rank", 0, 0, "none"),
        ("relora", 5, 8, "int8"),
    ],
)
def test_one_recipe_serves_all_methods(recipe: Path, method: str, full_updates: int, restarts: int, stored: str) -> None:
    """What a method does not use of a recipe for ReLoRA is ignored."""
    settings = [f"method={method}", "relora.warm_start=5", "relora.reset.every=4", "relora.frozen.dtype=int8"]
    settings += ["relora.frozen.master=sharded", "relora.init=residual"]
    judge(recipe, *settings)
    read = config.load(recipe, settings)
    assert read.full_updates == full_updates
    assert (read.lora_settings.restarts.every, read.lora_settings.frozen.dtype) == (restarts, stored)
    assert read.lora_settings.resets.every == (4 if restarts else 0)
    assert config.parse(config.read_yaml(config.dump(read), "config.yaml")) == read


def test_resets_go_with_restarts_unless_they_have_their_own_interval(recipe: Path) -> None:
    relora = config.load(recipe, ["relora.restart_growth=1.5"]).relora
    assert relora.resets == relora.restarts == Interval(8, 1.5)
    relora = config.load(recipe, ["relora.reset.every=5"]).relora
    assert (relora.restarts, relora.resets) == (Interval(8), Interval(5))
    relora = config.load(recipe, ["relora.reset.every=5", "relora.restart_every=null"]).relora
    assert (relora.restarts, relora.resets) == (Interval(0), Interval(5))


def test_the_control_is_as_large_as_what_relora_trains(recipe: Path) -> None:
    relora, control = judge(recipe), judge(recipe, "method=control")
    trained = 2 * 300 * 32 + 5 * 32 + 2 * 4 * (4 * 64 + 3 * 80)  # embedding and head, norms, rank 4 on seven layers of two blocks
    assert num_parameters(control.architecture) == pytest.approx(trained, rel=0.01)
    assert num_parameters(relora.architecture) > 1.4 * trained
    assert control.architecture.num_hidden_layers == relora.architecture.num_hidden_layers


def test_the_global_batch_must_divide_over_the_ranks(recipe: Path) -> None:
    for ranks in (1, 2, 4):
        fitted = judge(recipe, ranks=ranks).deepspeed
        assert fitted["train_batch_size"] == 8
        assert fitted["train_micro_batch_size_per_gpu"] == 2
        assert fitted["gradient_accumulation_steps"] == 4 // ranks
    line = refusal(recipe, ranks=3)
    assert line.startswith("train.global_batch=8: ")
    assert "2 x 3" in line
    assert "use 6 or 12" in line
    assert "use 16 or 32" in refusal(recipe, ranks=8)


# What needs files


def test_recipe_that_is_not_there_or_is_no_recipe(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.yaml").startswith(f"RECIPE={str(tmp_path / 'none.yaml')!r}: ")
    assert refusal(tmp_path).startswith(f"RECIPE={str(tmp_path)!r}: ")
    for text in ("", "just words", "- 1\n- 2"):
        (tmp_path / "recipe.yaml").write_text(text)
        assert "holds no settings" in refusal(tmp_path / "recipe.yaml")


def test_attention_that_cannot_run_here_is_refused_at_once(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.attention='flash_attention_2': needs CUDA"):
        check(config.load(recipe, ["model.attention=flash_attention_2"]), recipe, 1)


def test_recipe_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"run: {dir: caf\xe9}\n")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        config.load(path)


def test_a_date_that_does_not_exist(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.dir"):
        config.load(recipe, ["run.dir=2024-13-45"])


def test_recipe_with_a_syntax_error_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("run:\n  dir: [a, b\nmodel: {}\n")
    line = refusal(path)
    assert line.startswith(str(path))
    assert "is not valid YAML" in line
    assert "line 3" in line


def test_data_path_without_an_index(recipe: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        line = refusal(recipe, f"data.path={path}")
        assert line.startswith(f"data.path={str(path)!r}: ")
        assert "index.json" in line


def test_a_split_shorter_than_one_sample(recipe: Path) -> None:
    line = refusal(recipe, "data.sequence_length=60000", "model.config.max_position_embeddings=60000")
    assert line.startswith("data.sequence_length=60000: ")
    assert "less than one sample" in line


def test_tokenizer_larger_than_the_vocabulary(recipe: Path, token_folder: Path) -> None:
    judge(recipe, "model.config.vocab_size=300")
    line = refusal(recipe, "model.config.vocab_size=299")
    assert line.startswith(f"data.path={str(token_folder)!r}: ")
    assert "300" in line
    assert "299" in line


def test_deepspeed_file_is_looked_for_beside_the_recipe_and_above(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    moved = recipe.rename(folder / "recipe.yaml")
    (folder / "beside.json").write_text('{"zero_optimization": {"stage": 2}}')
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "above.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert judge(moved, "deepspeed=beside.json").deepspeed["zero_optimization"]["stage"] == 2
    assert judge(moved, "deepspeed=ds_configs/above.json").deepspeed["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [("{'stage': 2}", "is not valid JSON"), ("", "is not valid JSON"), ("[2]", "does not hold a JSON object")],
)
def test_deepspeed_file_that_is_no_json_object(recipe: Path, tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "broken.json").write_text(text)
    line = refusal(recipe, "deepspeed=broken.json")
    assert line.startswith(f"deepspeed={str(tmp_path / 'broken.json')!r}: ")
    assert problem in line


# What a configuration says


@pytest.mark.parametrize(("tokens", "updates"), [(1, 1), (128, 1), (129, 2), (1280, 10), (1281, 11)])
def test_tokens_round_up_to_whole_updates(recipe: Path, tokens: int, updates: int) -> None:
    """One update is 8 sequences of 16 tokens."""
    overrides = ["train.updates=null", f"train.tokens={tokens}", "optimizer.warmup=0"]
    assert config.load(recipe, overrides).total_updates == updates


def test_phases(recipe: Path) -> None:
    relora = config.load(recipe, ["relora.warm_start=5"])
    assert [relora.phase_of(update) for update in (1, 5, 6, 20)] == ["full", "full", "lora", "lora"]
    assert config.load(recipe).phase_of(1) == "lora"
    full = config.load(recipe, ["method=full"])
    assert {full.phase_of(update) for update in range(1, 21)} == {"full"}


def test_peak_learning_rates(recipe: Path) -> None:
    shared = config.load(recipe).optimizer
    assert (shared.peak_lr(lora=False), shared.peak_lr(lora=True)) == (0.002, 0.002)
    apart = config.load(recipe, ["optimizer.lora_lr=0.0"]).optimizer
    assert (apart.peak_lr(lora=False), apart.peak_lr(lora=True)) == (0.002, 0.0)


def test_dump_reads_back_to_the_same(recipe: Path, tmp_path: Path) -> None:
    overrides = ["optimizer.lr=1e-5", "optimizer.eps=1e-12", "run.dir=naïve/1e5", "relora.targets=[q_proj]", "train.eval_every=3"]
    original = config.load(recipe, overrides)
    (tmp_path / "dumped.yaml").write_text(config.dump(original), encoding="utf-8")
    assert config.load(tmp_path / "dumped.yaml") == original


def test_a_configuration_cannot_be_changed_afterwards(recipe: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        config.load(recipe).relora.rank = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["relora.restart_every=6"], "after update 18 of 20, is followed by 2 updates"),
        (["relora.restart_every=6", "relora.warm_start=1"], "after update 19 of 20, is followed by 1 updates"),
        (["relora.restart_every=3", "relora.restart_growth=2"], None),  # after 3 and 9; 21 is later than the end
        (
            ["relora.restart_every=3", "relora.restart_growth=2", "train.updates=23"],
            "after update 21 of 23, is followed by 2 updates",
        ),
        (["relora.restart_every=7"], None),  # 6 of 7
        (["relora.restart_every=6", "train.updates=21"], None),  # half
        (["relora.restart_every=5"], None),  # one follows the last update, and costs nothing
        (["relora.restart_every=19"], "after update 19 of 20, is followed by 1 updates"),
        (["relora.restart_every=30"], None),
        (["relora.restart_every=6", "method=lora"], None),
        (["relora.restart_every=6", "method=full"], None),
        (["relora.restart_every=null", "relora.reset.every=6"], None),
    ],
    ids=str,
)
def test_a_late_last_restart_is_told_of(recipe: Path, overrides: list[str], told: str | None) -> None:
    line = config.load(recipe, ["relora.restart_warmup=1", *overrides]).short_last_interval()
    assert line is None if told is None else line is not None and told in line


def test_the_relora_section_alone() -> None:
    """For users of ``relora_ds.initialize``: the same errors, under the section's name."""
    assert config.parse_relora({"rank": 8}) == config.ReLoRA(rank=8)
    with pytest.raises(ConfigError, match=re.escape("relora.reset.knid='full': unknown key; did you mean 'kind'?")):
        config.parse_relora({"reset": {"knid": "full"}})
