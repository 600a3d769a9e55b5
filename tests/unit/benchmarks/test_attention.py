"""Which backends the device takes, which one PyTorch chooses, and the table of it."""

from __future__ import annotations

import pytest
import torch

from benchmarks import attention
from benchmarks.attention import CHOSEN, Shape
from benchmarks.rounds import Spread


def test_the_heads_of_the_papers_models() -> None:
    assert attention.shapes(["llama_350m", "llama_1b"], [512, 2048], 8192) == [
        Shape("llama_350m", 16, 16, 512, 64),
        Shape("llama_350m", 4, 16, 2048, 64),
        Shape("llama_1b", 16, 32, 512, 64),
        Shape("llama_1b", 4, 32, 2048, 64),
    ]


def test_tensors_lie_in_memory_as_a_model_has_them() -> None:
    given, gradient = attention.tensors(Shape("", 2, 3, 4, 8), torch.device("cpu"))
    for one in (*given, gradient):
        assert one.shape == (2, 3, 4, 8) and one.transpose(1, 2).is_contiguous() and one.dtype == torch.bfloat16
    assert [one.is_leaf and one.requires_grad for one in given] == [True] * 3 and not gradient.requires_grad


@pytest.mark.parametrize(
    ("names", "operator"),
    [
        (["aten::empty", "aten::_scaled_dot_product_cudnn_attention"], "_scaled_dot_product_cudnn_attention"),
        (
            ["aten::_scaled_dot_product_flash_attention_backward", "aten::_scaled_dot_product_efficient_attention"],
            "_scaled_dot_product_efficient_attention",
        ),
        (["aten::scaled_dot_product_attention", "aten::_fused_sdp_choice"], "unknown"),
    ],
)
def test_the_operator_that_did_it(names: list[str], operator: str) -> None:
    assert attention.operator_of(names) == operator


def test_a_cpu_takes_flash_and_math() -> None:
    options = attention.parse(["--tokens", "32", "--rounds", "2", "--warm-up", "1", "--repeats", "2", "--lengths", "16"])
    (shape,) = attention.shapes(["llama_60m"], options.lengths, options.tokens)
    found = attention.compare(shape, options, torch.device("cpu"))
    assert {name: way["operator"] for name, way in found["ways"].items()} == {
        CHOSEN: "_scaled_dot_product_flash_attention_for_cpu",
        "flash": "_scaled_dot_product_flash_attention_for_cpu",
        "math": "_scaled_dot_product_attention_math",
    }
    assert [len(way["ms"]) for way in found["ways"].values()] == [2] * 3
    assert list(found["refused"]) == ["efficient", "cuDNN"] and all(found["refused"].values())


def test_only_what_a_device_refuses_is_left_out() -> None:
    def broken() -> None:
        raise TypeError("not a refusal")

    with pytest.raises(TypeError):
        attention.refusal(broken, torch.device("cpu"))
    assert attention.refusal(lambda: None, torch.device("cpu")) is None


def test_the_table() -> None:
    spread = vars(Spread(1.0, 2.0, 3.0, 4.0, 5.0))
    way = {"operator": "one", "ms": [3.0], **spread, "as_fast": spread}
    shape = vars(Shape("llama_1b", 4, 32, 2048, 64))
    _, taken, refused = attention.rows([{**shape, "ways": {"flash": way}, "refused": {"cuDNN": "too old"}}])
    heads = "llama_1b: 4 x 32 x 2048 x 64"
    assert taken == [heads, "flash", "1.000", "2.000, 3.000, 4.000", "5.000", "3.00 (2.00 to 4.00)", "one"]
    assert refused == [heads, "cuDNN", "", "", "", "", "not taken: too old"]


def test_sequences_that_do_not_fill_the_tokens_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        attention.parse(["--tokens", "1000"])
    assert "--tokens 1000: must be a multiple of 512, which --lengths names" in capsys.readouterr().err
