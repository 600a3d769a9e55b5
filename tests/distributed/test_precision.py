"""fp16 with its skipped updates, and the optimizer offloaded to the CPU: served as DeepSpeed serves them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import relora_ds
from relora_ds.ds_config import fit as ds_config
from relora_ds.errors import ConfigError
from relora_ds.method.lora import relora_layers
from tests.distributed import common
from tests.distributed.pool import run
from tests.fp16 import needs_fp16, overruled


def train(updates: int, **changes: Any) -> dict[str, Any]:
    scale_power = changes.pop("initial_scale_power", None)
    config = common.deepspeed_config(**changes)
    if scale_power is not None:
        config["fp16"]["initial_scale_power"] = scale_power
    engine, optimizer, _, _ = relora_ds.initialize(
        model=common.tiny_llama(), config=config, relora={"rank": 3, "restart_every": 4, "restart_warmup": 0}
    )
    losses, applied, restarts = [], [], []
    for _ in range(updates):
        losses.append(common.train_update(engine, 0))
        applied.append(engine.was_step_applied())
        restarts.append(optimizer.restarts)
    result = {"losses": losses, "applied": applied, "restarts": restarts, "scale": optimizer.cur_scale}
    common.end(engine)
    return result


@needs_fp16
def test_fp16_loss_scaling_skips_and_restarts() -> None:
    """The scale starts too high on purpose: the first updates overflow, are skipped on both ranks, and count for the restarts."""
    first, second = run(2, overflowing_fp16)
    assert first == second
    assert first["applied"][:3] == [False, False, False]
    assert sum(first["applied"][-9:]) >= 7, "once the scale fits, updates are applied, but for one now and then"
    assert first["scale"] < 2.0**22
    assert first["restarts"] == [update // 4 for update in range(1, 17)]
    assert first["losses"][2] == first["losses"][0], "skipped updates, and a restart after one, change nothing"
    assert first["losses"][-1] < first["losses"][0] - 0.3


def overflowing_fp16() -> dict[str, Any]:
    return train(16, dtype="fp16", initial_scale_power=22)


def fp16_by_torch() -> dict[str, Any]:
    """Two updates that overflow, and four that do not; a restart after every second one."""
    with overruled():
        config = common.deepspeed_config(dtype="fp16", accumulation=2)
        config["fp16"] |= {"initial_scale_power": 40, "hysteresis": 1, "loss_scale_window": 100}
        settings = {"rank": 3, "restart_every": 2, "restart_warmup": 0}
        engine, optimizer, *_ = relora_ds.initialize(model=common.tiny_llama(), config=config, relora=settings)
    losses, seen = [], []
    for update in range(6):
        if update == 2:
            optimizer.loss_scaler.cur_scale = 256.0  # or it would take thirty updates to come down to what fits
        losses.append(common.train_update(engine, 0))
        seen.append((engine.was_step_applied(), optimizer.restarts, optimizer.cur_scale))
    rounded = [torch.equal(optimizer.masters.gather(name).half(), param.data) for name, param in optimizer.masters.params.items()]
    result = {"losses": losses, "seen": seen, "copies are rounded masters": all(rounded)}
    result["precision"] = ds_config.precision_of(engine)
    common.end(engine)
    return result


def test_fp16_arithmetic_on_any_cpu() -> None:
    """A loss scale of 2^40 overflows: skipped on both ranks and halved each time. One of 2^8 fits, and is kept."""
    first, second = run(2, fp16_by_torch)
    assert first == second
    assert first["precision"] == "fp16"
    assert first["seen"][:2] == [(False, 0, 2.0**39), (False, 1, 2.0**38)]
    assert first["seen"][2:] == [(True, 1, 256.0), (True, 2, 256.0), (True, 2, 256.0), (True, 3, 256.0)]
    assert first["losses"][2] == first["losses"][1] == first["losses"][0], "skipped updates, and a restart, change nothing"
    assert first["losses"][-1] < first["losses"][2] - 0.1
    assert first["copies are rounded masters"]


def kept_stores(dtype: str) -> tuple[list[str], str]:
    """The dtypes of the stores of a model of which transformers keeps every q_proj in fp32, and what its manifest would say."""
    model = common.tiny_llama()
    model._keep_in_fp32_modules_strict = ["q_proj"]
    config = common.deepspeed_config(dtype="bf16")
    relora = {"rank": 3, "restart_every": 2, "restart_warmup": 0, "frozen": {"dtype": dtype}}
    engine, *_ = relora_ds.initialize(model=model, config=config, relora=relora)
    stores = sorted({str(layer.weight.values.dtype) for _, layer in relora_layers(engine.module)})
    precision = ds_config.precision_of(engine)
    common.end(engine)
    return stores, precision


@pytest.mark.parametrize("dtype", ["auto", "int8", "fp32"])
def test_stores_keep_their_dtype_whatever_a_model_has_on_its_list_for_fp32(dtype: str) -> None:
    stored = {"auto": "torch.bfloat16", "int8": "torch.int8", "fp32": "torch.float32"}[dtype]
    assert run(1, kept_stores, dtype) == [([stored], "bf16")]


def misread() -> str:
    """Should a reading of the file ever say other than the engine does."""
    original, ds_config.precision = ds_config.precision, lambda content: "bf16"
    try:
        relora = {"rank": 3, "restart_every": 2, "restart_warmup": 0}
        relora_ds.initialize(model=common.tiny_llama(), config=common.deepspeed_config(), relora=relora)
    except ConfigError as error:
        return str(error)
    finally:
        ds_config.precision = original
    return ""


def test_an_engine_of_another_precision_than_was_read_is_refused() -> None:
    assert "DeepSpeed made an engine in fp32 of it" in run(1, misread)[0]


def offloaded(device: str) -> dict[str, Any]:
    return train(10, offload_optimizer={"device": device, "pin_memory": False})


def test_cpu_offload_of_the_optimizer() -> None:
    there, here = run(2, offloaded, "cpu")[0], run(2, offloaded, "none")[0]
    assert there["losses"] == pytest.approx(here["losses"], rel=1e-5)
    assert there["restarts"][-1] == 2
