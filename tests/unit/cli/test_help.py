"""What ``--help`` says: full sentences, defaults, an example of each command that can be typed as it stands, no internal command."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from relora_ds.cli.main import build_parser
from relora_ds.slurm.script import Settings, option_name

ROOT = Path(__file__).resolve().parents[3]
INTERNAL = ("before", "after", "torchrun")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser and those of the commands under it, but for what the batch scripts call."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                if not (name in INTERNAL and parser.prog.endswith(" slurm")):
                    yield from commands(command)


PUBLIC = {command.prog: command for command in commands(build_parser())}


def examples(text: str) -> list[str]:
    return re.findall(r"^ {2,}(relora-ds .+)$", text, re.MULTILINE)


def parse(line: str) -> argparse.Namespace:
    """A command line as a shell takes it. Exits where the command has no such option; what is left over must replace a setting."""
    words = shlex.split(line, comments=True)
    for end in (">", "|", "&&"):
        words = words[: words.index(end)] if end in words else words
    options, rest = build_parser().parse_known_args(words[1:])
    overrides = [*rest, *getattr(options, "overrides", [])]
    assert all(re.fullmatch(r"[a-z_.]+=\S+", word) for word in overrides), overrides
    return options


@pytest.mark.parametrize("prog", PUBLIC)
def test_every_text_is_a_sentence(prog: str) -> None:
    for action in PUBLIC[prog]._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts = [choice.help for choice in action._choices_actions]
        elif action.help == argparse.SUPPRESS:
            continue
        else:
            texts = [action.help]
            assert action.nargs == 0 or action.choices or action.metavar or not action.option_strings, action
        for text in texts:
            assert text and text[0].isupper() and text.endswith("."), f"{prog}: {action.dest}: {text!r}"


@pytest.mark.parametrize("prog", PUBLIC)
def test_defaults_are_shown(prog: str) -> None:
    for action in PUBLIC[prog]._actions:
        if action.option_strings and action.nargs != 0 and action.default not in (None, [], argparse.SUPPRESS):
            assert "Default: %(default)" in str(action.help), f"{prog}: {action.dest}"


def test_defaults_of_jobs_are_shown() -> None:
    texts = {option: action.help for action in PUBLIC["relora-ds slurm submit"]._actions for option in action.option_strings}
    for name, field in Settings.model_fields.items():
        if isinstance(field.default, str | int) and name != "signal":
            assert texts[option_name(name)].endswith(f"Default: {field.default}.")
    assert texts["--signal"].endswith("Default: the recipe's train.stop_signal.")


@pytest.mark.parametrize("prog", PUBLIC)
def test_every_command_has_an_example_that_can_be_typed(prog: str) -> None:
    text = PUBLIC[prog].format_help()
    assert text.isascii()  # it is printed on terminals of any encoding
    lines = examples(text.partition("Examples:\n")[2])
    assert lines and all(line.startswith(prog) for line in lines)
    for line in lines:
        parse(line)


def test_train_says_that_it_resumes_its_exit_codes_and_its_launchers() -> None:
    text = PUBLIC["relora-ds train"].format_help()
    assert "resumes from the newest whole one by\nitself" in text
    assert re.findall(r"^ +(\d+)  \w", text, re.MULTILINE) == ["0", "1", "2", "75"]
    assert all(f"  {launcher} " in text for launcher in ("torchrun", "deepspeed", "srun", "mpirun"))


def test_internal_commands_work_and_are_not_listed(capsys: pytest.CaptureFixture[str]) -> None:
    text = PUBLIC["relora-ds slurm"].format_help()
    with pytest.raises(SystemExit):
        build_parser().parse_args(["slurm", "sumbit"])
    assert capsys.readouterr().err == (
        "relora-ds: error: argument COMMAND: invalid choice: 'sumbit' (try relora-ds slurm --help)\n"
    )
    assert "submit" in text and not any(re.search(rf"^ +{name}\b", text, re.MULTILINE) for name in INTERNAL)
    for line in ("before r.yaml --tasks-per-node 2 --trust", "after r.yaml --code 75", "torchrun r.yaml --tasks-per-node 2"):
        assert callable(parse(f"relora-ds slurm {line}").run)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_pages_can_be_typed(page: Path) -> None:
    for line in examples(page.read_text(encoding="utf-8")):
        if not re.search(r"[…\[]|RECIPE|OUT", line.partition("#")[0]):  # shows a form, not a command
            parse(line)
