"""What is taken for a secret, and what is not."""

from __future__ import annotations

import pytest

from relora_ds.text.masking import masked, masked_values, masked_words


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("  comet: {enabled: true, api_key: abc}\n", "  comet: {enabled: true, api_key: ***}\n"),
        ("comet:\n  api_key:\n  enabled: true\n", "comet:\n  api_key:\n  enabled: true\n"),
        ("- api_key: a b,c\n  password: 'it''s: d'\n  keep: 2\n", "- api_key: ***\n  password: ***\n  keep: 2\n"),
        ('"api_key": "a b", "x": 1', '"api_key": ***, "x": 1'),
        ("relora-ds train deepspeed.comet.api_key=abc run.dir=r", "relora-ds train deepspeed.comet.api_key=*** run.dir=r"),
        ("train:\n  tokens: 5\n  eval_tokens: 7\nkeep: 2\n", "train:\n  tokens: 5\n  eval_tokens: 7\nkeep: 2\n"),
    ],
)  # fmt: skip
def test_a_value_whose_name_says_that_it_is_secret(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_settings_in_dictionaries() -> None:
    settings = {
        "comet": {"api_key": "x", "enabled": True},
        "runs": [{"my_password": 5}],
        "wandb_key": None,
        "tokens": 3,
        "key": "k",
    }
    shown = {
        "comet": {"api_key": "***", "enabled": True},
        "runs": [{"my_password": "***"}],
        "wandb_key": None,
        "tokens": 3,
        "key": "k",
    }
    assert masked_values(settings) == shown


def test_words_of_a_command_line() -> None:
    words = [
        "mine.py",
        "--wandb-key",
        "a b",
        "--hf_token=x y",
        "--fast",
        'deepspeed={"comet": {"api_key": "x"}}',
        "WANDB_API_KEY=z",
    ]
    shown = [
        "mine.py",
        "--wandb-key",
        "***",
        "--hf_token=***",
        "--fast",
        'deepspeed={"comet": {"api_key": ***}}',
        "WANDB_API_KEY=***",
    ]
    assert masked_words(words) == shown
    plain = ["train", "a.yaml", "train.tokens=5", "--allow-changed", "optimizer.lr", "key.sub=1"]
    assert masked_words(plain) == plain
