"""docs/data.md: its commands are understood, its rows are read."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from conftest import REPOSITORY

from tinyllm.command_line import parse_settings
from tinyllm.formats import conversation_of
from tinyllm.readers import COMPRESSED, SUFFIXES

PAGE = (REPOSITORY / "docs/data.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return [
        line
        for text in re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)
        for line in text.splitlines()
    ]


@pytest.mark.parametrize("line", blocks("bash"))
def test_every_command_is_understood(line):
    program, script, *words = shlex.split(line)
    assert (program, script) == ("python", "sft_lora.py")
    settings, notes = parse_settings([*words, "--use_cpu", "True"])
    assert settings.data.dataset and not notes


@pytest.mark.parametrize("line", blocks("jsonl"))
def test_every_row_is_read(line):
    messages = conversation_of(json.loads(line))
    assert messages[-1]["role"] == "assistant"


def test_every_ending_is_named():
    assert all(f"`{suffix}`" in PAGE for suffix in (*SUFFIXES, *COMPRESSED))
