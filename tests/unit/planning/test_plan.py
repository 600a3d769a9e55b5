"""What ``relora-ds plan`` says of recipes; that it is what engines do is tested in tests/distributed/test_plan.py."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from relora_ds.bandwidth.formulas import Bytes
from relora_ds.cli import main as cli
from relora_ds.cli import plan as cli_plan
from relora_ds.config import Frozen, Model, ReLoRA, load
from relora_ds.errors import ConfigError
from relora_ds.method import frozen_weights, lora
from relora_ds.method.reinit import principal_inputs
from relora_ds.models import cross_entropy
from relora_ds.models.build import build, hf_config, preset_config
from relora_ds.models.loss import attach
from relora_ds.planning import footprint, rehearsal
from relora_ds.planning.footprint import Engine
from relora_ds.planning.plan import Machine, Phase, Planner
from tests.memory import PeakMemory
from tests.products import counter

ROOT = Path(__file__).resolve().parents[3]
MODEL = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 1,
    "num_attention_heads": 4,
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    content: dict[str, Any] = {
        "run": {"dir": str(tmp_path / "run")}, "method": "relora", "model": {"config": MODEL},
        "data": {"path": str(tmp_path / "none"), "sequence_length": 32},
        "relora": {"rank": 4, "warm_start": 10, "restart_every": 10, "restart_warmup": 2},
        "train": {"updates": 100, "global_batch": 16, "micro_batch": 2},
        "deepspeed": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2, "reduce_bucket_size": 50000}},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.main(["plan", *words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def planner(recipe: Path, *overrides: str, **machine: Any) -> Planner:
    """For two GPUs of a node, or what ``machine`` says."""
    fields = {"gpus": 2, "gpus_per_node": 2, "link": 1e9, "memory": 80e9, "flops": 1e12, **machine}
    return Planner(load(recipe, overrides), recipe, Machine(**fields), None)


def test_both_phases_and_what_rules(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model.config.num_key_value_heads=2", "--gpus", "4", "--gpus-per-node", "2", "--link", "1Gbit"]
    answer = plan(capsys, str(recipe), *words)
    totals = {
        (phase, moment): sum(parts.values()) for phase, moments in answer["memory"].items() for moment, parts in moments.items()
    }
    peak = answer["peak"]
    assert {phase for phase, _ in totals} == {"full", "lora"}
    assert totals[peak["phase"], peak["moment"]] == peak["bytes"] == max(totals.values())
    assert answer["accumulation"] == 2
    slow, fast = answer["full_rank_by_defaults"], answer["update"]["lora"]
    assert slow["gradient_bytes"] == pytest.approx(4 * answer["update"]["full"]["gradient_bytes"]), "two all-reduces"
    assert fast["link_s"] == pytest.approx((fast["gradient_bytes"] + fast["parameter_bytes"] + fast["scalar_bytes"]) * 8 / 1e9)
    assert fast["at_most_s"] == fast["compute_s"] + fast["link_s"] and fast["overlapped_s"] == max(
        fast["compute_s"], fast["link_s"]
    )
    assert answer["restart"]["every"] == 10
    count, rank, of = (answer["restart"][key] for key in ("count", "rank", "of"))
    assert (count, rank, of) == (8, 36, 32), "keys and values are 32 wide"
    assert any("relora.restart_every=10 is 10% of the run" in hint for hint in answer["advice"]["hints"])


def test_gradients_of_an_older_deepspeed_are_counted_as_they_go_there(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(recipe), "--gpus", "4", "relora.warm_start=0"]
    short = plan(capsys, *words)["update"]["lora"]["gradient_bytes"]
    monkeypatch.delattr(DeepSpeedZeroOptimizer, "_buffered_reduce_fallback_preserving_fp32")
    assert plan(capsys, *words)["update"]["lora"]["gradient_bytes"] == pytest.approx(4 * short), "two all-reduces"


def test_figures_of_a_small_model_are_in_units_that_fit(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(recipe), "--gpus", "2"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^moments +\d[\d.]* kB +\d[\d.]* kB$", shown, re.MULTILINE)
    assert re.search(r"^computing( +\d[\d.]* µs){3}$", shown, re.MULTILINE)
    assert not re.search(r"\b0\.0+\b", shown), "no figure is too small to be seen"


@pytest.mark.parametrize(
    ("method", "phases"), [("full", {"full"}), ("control", {"full"}), ("low_rank", {"lora"}), ("lora", {"full", "lora"})]
)
def test_methods(method: str, phases: set[str], recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = plan(capsys, str(recipe), f"method={method}", "--gpus", "2", "--gpu-memory", "1GB")
    assert set(answer["memory"]) == phases
    assert answer["restart"] is None
    assert ("frozen weights" in str(answer["memory"])) == (method == "lora")


def test_what_can_get_no_factors_is_told(recipe: Path) -> None:
    few = "model.config={model_type: mixtral, vocab_size: 512, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, "
    mixture = f"{few}num_attention_heads: 4, num_key_value_heads: 4, num_local_experts: 4}}"
    hints = planner(recipe, mixture, "relora.warm_start=0").hints([])
    assert any("can get no factors and stay full-rank: 3-D parameters (model.layers.*.mlp.experts" in hint for hint in hints)
    assert not any("full-rank:" in hint for hint in planner(recipe).hints([]))


def test_restarts_that_come_often_or_at_a_large_rank_are_told(recipe: Path) -> None:
    def hints(*overrides: str) -> list[str]:
        return planner(recipe, *overrides).restart_hints()

    (often,) = hints()
    assert "relora.restart_every=10 is 10% of the run" in often
    assert "relora.restart_every=23 " in often, "a quarter of the 90 updates after the warm start"
    assert not hints("relora.restart_every=23")
    (large,) = hints("relora.restart_every=23", "relora.rank=12")
    assert "relora.rank=12 is 19% of the narrowest layer's 64" in large
    assert not hints("method=lora", "relora.rank=12"), "has no restarts"
    assert not hints("method=full", "relora.rank=12")


def test_a_model_that_cannot_be_rehearsed_is_one_line(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torch multiplies experts' tensors without data in bf16 alone."""
    mixture = "{model_type: mixtral, vocab_size: 512, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, "
    words = [
        f"model.config={mixture}num_attention_heads: 4, num_key_value_heads: 4, num_local_experts: 4}}",
        "deepspeed.bf16.enabled=false",
    ]
    assert cli.main(["plan", str(recipe), *words, "--gpus", "2"]) == 2
    told = capsys.readouterr().err
    assert re.fullmatch(r"relora-ds: error: model='mixtral': its pass on tensors without data fails \(.*\); measure .*\n", told)


def test_a_model_without_attention_has_none_to_compute(recipe: Path) -> None:
    rwkv = "model.config={model_type: rwkv, vocab_size: 512, hidden_size: 32, attention_hidden_size: 32, num_hidden_layers: 2}"
    planned = planner(recipe, rwkv, "data.sequence_length=4")  # it goes through a sequence token by token
    assert planned.cost(planned.phase("lora"), "owner")["compute_s"] > 0
    assert planned.phase("lora").peaks(planned.engine(), 1)["backward pass"].total > 0


def test_ten_thousand_gpus_hold_less_each(recipe: Path) -> None:
    few, many = (
        planned.phase("full").peaks(planned.engine(), 1)["step"].parts
        for planned in (
            planner(recipe, "train.global_batch=10000", "train.micro_batch=1", "method=full", gpus=gpus) for gpus in (1, 10_000)
        )
    )
    for part in ("fp32 masters", "moments"):
        assert many[part] < few[part] / 1000


def test_advice_is_the_largest_that_fits(recipe: Path) -> None:
    """A GPU that is just large enough for four samples gets four, and one byte less, two."""
    words = ["relora.warm_start=0", "relora.frozen.dtype=int8"]
    peak = planner(recipe, *words).peak(4, 2, None, checkpointing=False)
    for memory, expected in ((peak / 0.9 * 1.0001, 4), (peak / 0.9 * 0.9999, 2)):
        choices = planner(recipe, *words, memory=memory).advice(peak)["choices"]
        assert next(c["micro_batch"] for c in choices if c["stage"] == 2 and not c["gradient_checkpointing"]) == expected


def test_a_recipe_fits_only_when_its_change_of_phase_does(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU, where what waits is in the same memory: with moments and exact rows to carry over, the change needs the most."""
    words = ["train.micro_batch=1", "data.sequence_length=4", "deepspeed.bf16.enabled=false", "relora.keep_moments=true"]
    words.append("relora.frozen={dtype: int8, master: sharded}")
    answer = plan(capsys, str(recipe), "--gpus", "1", "--device", "cpu", *words)
    peak = answer["peak"]
    assert (peak["phase"], peak["moment"]) == ("lora", "change of phase")
    others = max(
        sum(parts.values())
        for moments in answer["memory"].values()
        for moment, parts in moments.items()
        if moment != "change of phase"
    )
    assert others < peak["bytes"]
    for most, fits in ((others, False), (peak["bytes"], True)):
        planned = planner(recipe, *words, gpus=1, on_cuda=False, memory=most * 1.001 / 0.9)
        assert planned.advice(peak["bytes"])["fits"] == fits
        assert (planned.largest(2, None, checkpointing=False) is not None) == fits
    without = planner(recipe, *words, "relora.warm_start=0", gpus=1, on_cuda=False)
    assert without.peak(1, 2, None, checkpointing=False) < peak["bytes"]


def test_where_nothing_fits_it_says_what_to_change(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(recipe), "--gpus", "2", "--gpu-memory", "10KB"]) == 0
    out = capsys.readouterr().out
    assert "does not fit" in out and "nothing fits: more GPUs" in out and "gradient checkpointing" in out
    assert "not measured on a GPU" in out


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--gpus", "0"], "--gpus"),
        (["--gpus", "2", "--link", "fast"], "--link"),
        (["--gpus", "2", "--gpu-memory", "80"], "--gpu-memory"),
        (["--gpus", "2", "--gpu", "h1000"], "--gpu"),
        (["--gpus", "2", "--mfu", "40"], "--mfu"),
        (["--gpus", "3"], "train.global_batch"),
        (["--gpus", "2", "model.config=null", "model.preset=llama_60m"], "data.path"),
        (
            ["--gpus", "2", "deepspeed.zero_optimization.contiguous_gradients=false"],
            "deepspeed.zero_optimization.contiguous_gradients",
        ),
    ],
)
def test_bad_input_is_one_line(words: list[str], key: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(recipe), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"relora-ds: error: {key}=") and error.count("\n") == 1


def test_a_link_carries_what_one_rank_sends_and_gloo_more() -> None:
    sent = Bytes(gradient=700.0, parameters=300.0, norm=0.0, loss=0.0)
    machine = Machine(gpus=8, gpus_per_node=4, link=1000.0, memory=1.0, flops=1.0)
    assert machine.link_seconds(sent, "owner") == 1.0
    assert Machine(8, 8, 1000.0, 1.0, 1.0).link_seconds(sent, "owner") == 0.0, "one node"
    on_cpu = Machine(8, 4, 1000.0, 1.0, 1.0, on_cuda=False)
    assert on_cpu.link_seconds(sent, "owner") == pytest.approx((4 * 4 * 100 + 300) / 1000), "100 to each of 4 from each of 4"
    assert on_cpu.link_seconds(sent, "all-reduce") == 1.0


@pytest.mark.parametrize(
    "settings",
    [None, ReLoRA(rank=4, frozen=Frozen(dtype="bf16"), linear="split"), ReLoRA(rank=16, linear="merged")],
    ids=["full", "split", "merged"],
)
def test_operations_are_those_of_the_model(settings: ReLoRA | None) -> None:
    """PyTorch's own counter over the model's code, where attention is spelt out."""
    built = rehearsal.build(hf_config(Model(config=MODEL), 1), dtype=torch.float32, settings=settings, attention="eager")
    with counter() as counted:
        built.run(2, 32)
    estimated = Phase(settings, built, 32).flops(2 * 32, per_pass=2 * 32, recomputes=False)
    assert counted.get_total_flops() == pytest.approx(estimated, rel=0.02)


@pytest.mark.parametrize("micro_batch", [4, 7])
def test_the_form_of_a_linear_layer_is_that_of_the_micro_batch(micro_batch: int) -> None:
    """Merged from as many tokens on as pay for W + s·B·A, although micro batches of 2 and 3 stand for it."""
    built = rehearsal.build(hf_config(Model(config=MODEL), 1), dtype=torch.float32, settings=ReLoRA(rank=16), on_cuda=False)
    phase = Phase(ReLoRA(rank=16), built, 32)
    assert set(phase._forms(micro_batch * 32)) == ({"split", "merged"} if micro_batch == 4 else {"merged"})
    estimated = phase.trace(micro_batch)
    for layer in phase._linears():
        layer.form = "auto"
    assert estimated == built.run(micro_batch, 32)


def test_what_is_kept_is_foretold() -> None:
    """W + s·B·A of the merged layers lies beside all else from the first pass on, and no pass forms it."""
    settings = ReLoRA(rank=16, linear="merged", frozen=Frozen(dtype="fp32"))
    built = rehearsal.build(hf_config(Model(config=MODEL), 1), dtype=torch.float32, settings=settings, on_cuda=False)
    phase = Phase(settings, built, 32)
    engine = Engine(1, 2, accumulation=2, width=4, wire=4, bucket=1000, overlap=False, on_cuda=False)
    per_pass, kept = phase.peaks(dataclasses.replace(engine, accumulation=1), 2), phase.peaks(engine, 2)
    size = 4 * sum(layer.in_features * layer.out_features for layer in phase._linears())
    part = "kept W + s·B·A"
    assert [moment for moment, peak in kept.items() if peak.parts.get(part) == size] == [m for m in kept if m != "start"]
    assert all(part not in peak.parts for peak in per_pass.values())
    phase.trace(2, 2)
    assert sum(phase.trace(2, 2).sizes) < sum(phase.trace(2, 1).sizes) - size, "forward and backward"


@pytest.mark.parametrize("on_cuda", [False, True])
def test_a_merge_is_foretold_for_the_device_of_the_engine(on_cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows are merged at a time on a GPU, which a rehearsal knows nothing of."""
    monkeypatch.setattr(frozen_weights, "PIECE", 64)
    monkeypatch.setattr(frozen_weights, "PIECE_ON_GPU", 1024)
    settings = ReLoRA(rank=4, frozen=Frozen(dtype="bf16"))
    built = rehearsal.build(hf_config(Model(config=MODEL), 1), dtype=torch.float32, settings=settings, on_cuda=on_cuda)
    layer = dict(lora.relora_layers(built.model))["model.layers.0.mlp.up_proj"]
    assert isinstance(layer, lora.ReLoRALayer) and layer.weight is not None
    engine = Engine(1, 1, accumulation=1, width=4, wire=4, bucket=1000, overlap=False, on_cuda=on_cuda)
    foretold = built.peak_of(footprint._merge(built, layer, engine, settings.frozen))
    real = lora.ReLoRALinear(nn.Linear(layer.in_features, layer.out_features, bias=False), 4, 8.0, frozen=settings.frozen)
    assert real.weight is not None
    for piece, is_own in ((64, not on_cuda), (1024, on_cuda)):
        with PeakMemory() as memory:
            real.weight.merge(real.change(real.lora_A.detach(), real.lora_B.detach()), piece)
        assert (foretold == pytest.approx(memory.peak, rel=0.05)) is is_own


@pytest.mark.parametrize(("piece", "rank"), [(1 << 20, 4), (1 << 20, 32), (4096, 4), (4096, 32)])
def test_what_residual_factors_need_is_foretold(piece: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer whose rows go in one piece or in several; what a test over ranks is too small to see beside a merge."""
    monkeypatch.setattr(frozen_weights, "PIECE", piece)
    settings = ReLoRA(rank=rank, init="residual", frozen=Frozen(dtype="int8", master="sharded"))
    built = rehearsal.build(hf_config(Model(config=MODEL), 1), dtype=torch.float32, settings=settings, on_cuda=False)
    layer = dict(lora.relora_layers(built.model))["model.layers.0.mlp.up_proj"]
    assert isinstance(layer, lora.ReLoRALayer)
    engine = Engine(1, 2, accumulation=1, width=4, wire=4, bucket=1000, overlap=False, on_cuda=False)
    with PeakMemory() as memory:
        principal_inputs(torch.randn(layer.out_features, layer.in_features), torch.randn(rank, layer.in_features))
    assert footprint._residual_factors(built, layer, engine) == pytest.approx(memory.peak, rel=0.05)


def test_a_rehearsal_is_exact_and_a_line() -> None:
    """The peak of the real model to the byte; and micro batches of 2 and 3 estimate one of 7."""
    config = hf_config(Model(config=MODEL), 1)
    rehearsed = rehearsal.build(config, dtype=torch.float32, settings=None, on_cuda=False)
    phase, direct = Phase(None, rehearsed, 32), rehearsed.run(7, 32)
    assert phase.trace(7) == direct
    model = build(config, attention="sdpa", dtype=torch.float32, device=torch.device("cpu")).train()
    assert most(direct) == pytest.approx(measured(model), rel=0.001)


def measured(model: nn.Module) -> int:
    """The most bytes of live tensors in a pass of 7 samples of 32 tokens, each gradient taken when it is there."""
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with PeakMemory() as memory:
        ids = torch.zeros(7, 32, dtype=torch.int64)
        model(input_ids=ids, labels=ids).loss.backward()
    return memory.peak


def most(trace: rehearsal.Trace) -> int:
    live = peak = 0
    for step in trace.steps:
        if not isinstance(step, str):
            live += trace.sizes[step - 1] if step > 0 else -trace.sizes[-step - 1]
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("targets", [None, ["all-linear", "output-head"]], ids=["plain head", "head with factors"])
def test_a_rehearsal_forms_the_loss_as_the_run_does(targets: list[str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven samples in chunks, though two and three are one each: no line leads there. To the real model's peak."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 100 * MODEL["vocab_size"])
    config, settings = hf_config(Model(config=MODEL), 1), targets and ReLoRA(rank=4, targets=targets, linear="split")
    peaks = {}
    for loss in ("torch", "auto"):
        rehearsed = rehearsal.build(config, dtype=torch.float32, settings=settings, loss=loss, on_cuda=False)
        trace = Phase(settings, rehearsed, 32).trace(7)
        assert trace == rehearsed.run(7, 32)
        model = build(config, attention="sdpa", dtype=torch.float32, device=torch.device("cpu")).train()
        if targets:
            lora.wrap(model, rank=4, alpha=32.0, targets=targets, linear="split")
        attach(model, loss)
        peaks[loss] = most(trace)
        assert peaks[loss] == pytest.approx(measured(model), rel=0.001)
    logits = 4 * 7 * 32 * MODEL["vocab_size"]
    assert peaks["auto"] < peaks["torch"] - 0.5 * logits


def test_a_plan_without_all_logits(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits, fp32 and as a gradient they are most of a small model's activations."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 16 * MODEL["vocab_size"])
    words = ["relora.warm_start=0", "data.sequence_length=64"]
    whole, default = (
        planned.phase("lora").peaks(planned.engine(), 2)["backward pass"].parts["activations"]
        for planned in (planner(recipe, *words, "model.loss=torch"), planner(recipe, *words))
    )
    assert default < whole - (4 + 2) * 2 * 64 * MODEL["vocab_size"], "of a micro batch of 2"
    with pytest.raises(ConfigError, match="model.loss='chunked': gemma2 does more with its logits"):
        planner(recipe, *words, "model.loss=chunked", "model.config.model_type=gemma2").phase("lora")


def test_operations_of_a_loss_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain head's products are formed once; those of a head with factors again in the backward pass."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 16 * MODEL["vocab_size"])
    for targets in ("all-linear", ["all-linear", "output-head"]):
        settings = ReLoRA(rank=16, targets=targets, frozen=Frozen(dtype="fp32"), linear="split")
        built = rehearsal.build(
            hf_config(Model(config=MODEL), 1), dtype=torch.float32, settings=settings, attention="eager", loss="chunked"
        )
        with counter() as counted:
            built.run(2, 32)
        estimated = Phase(settings, built, 32).flops(2 * 32, per_pass=2 * 32, recomputes=False)
        assert counted.get_total_flops() == pytest.approx(estimated, rel=0.02), targets


def test_llama_7b_takes_no_memory_and_seconds() -> None:
    rehearsed = rehearsal.build(preset_config("llama_7b", 32100), dtype=torch.bfloat16, settings=None)
    weights = sum(p.numel() for p in rehearsed.model.parameters())
    assert 6.5e9 < weights < 7e9
    assert all(type(p.data).__name__ == "FakeTensor" for p in rehearsed.model.parameters())


def test_readmes_command_plans_in_a_fresh_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the token folder that its recipe names; the answer itself would take a while."""
    (words,) = re.findall(r"^    relora-ds (plan .*?) +#", (ROOT / "README.md").read_text(), re.M)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Planner, "answer", lambda planner: {"vocabulary": planner.target.vocab_size})
    assert cli.main([*words.split(), "--json"]) == 0


@pytest.mark.parametrize("name", ["demo", "llama_60m"])
def test_the_bucket_of_the_recipes_of_this_project_is_as_plan_advises(name: str) -> None:
    recipe = ROOT / "recipes" / f"{name}.yaml"
    machine = Machine(gpus=2, gpus_per_node=2, link=1.0, memory=80e9, flops=1.0, on_cuda=name != "demo")
    small = dataclasses.replace(machine, memory=0.5e9)
    for given in (machine, small):
        planner = Planner(load(str(recipe)), recipe, given, 32100)
        assert planner.hints([{"micro_batch": 1}]) == planner.restart_hints()
    larger = load(str(recipe), ["deepspeed={zero_optimization: {stage: 2, overlap_comm: true, reduce_bucket_size: 500000000}}"])
    assert any("reduce_bucket_size" in hint for hint in Planner(larger, recipe, small, 32100).hints([{"micro_batch": 1}]))


def test_what_is_not_estimated_is_said_where_it_fits() -> None:
    said = [cli_plan.advice_table({"fits": fits, "choices": [], "hints": []})[0] for fits in (True, False)]
    assert said[0] == "This recipe fits, as far as is estimated: evaluation, checkpoints and host memory are not."
    assert said[1] == "This recipe does not fit."
