"""The guide to the letter: its folders, its commands and its snippets, on the embedded base."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from tinyllm.embedded import EMBEDDED, materialise
from tinyllm.errors import UserError

BASE = "outputs/ckpt/ptm_tiny_llm_16m_epoch1/last_ptm_model"
RUN = "outputs/ckpt/sft_lora_tiny_llm_16m_epoch3"
MAX_BYTES = 45 * 1024 * 1024


def snippets(readme: str) -> list[str]:
    """The Python blocks of a README, in order."""
    text = (REPOSITORY / readme).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run(words: list[str], cwd: Path, text: str = "", code_on_path: bool = True):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if code_on_path:
        environment["PYTHONPATH"] = str(REPOSITORY)
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, input=text, capture_output=True, text=True,
        env=environment | {"PYTHONUTF8": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with the guide's base, and its run folder after a few steps."""
    folder = tmp_path_factory.mktemp("guide")
    assert materialise(folder / BASE)
    rows = folder / "rows.jsonl"
    rows.write_text('{"question": "你好", "answer": "你好！我是由李小贱开发的个人助手。"}\n' * 2)
    done = run(
        [str(REPOSITORY / "sft_lora.py"), "--use_cpu", "True", "--dataset", "rows.jsonl",
         "--eval_dataset", "none", "--eval_strategy", "no", "--num_sample_replies", "0",
         "--num_train_epochs", "30", "--base_model_path", BASE, "--output_dir", RUN],
        folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_the_chat_command_of_the_guide(workplace):
    done = run(
        [str(REPOSITORY / "inference_lora.py"), "--base_model", BASE, "--lora_model", RUN,
         "--system_prompt", "你是由李小贱开发的个人助手。", "--merge_weights"],
        workplace, "你好\nquit\n",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "用户: 助手: 你好！我是由李小贱开发的个人助手。\n用户: "


@pytest.mark.parametrize("readme", ["README.md", "README_en.md"])
def test_the_python_snippets_run_as_printed(workplace, readme):
    loading, peft_alone = snippets(readme)
    reply = """
messages = [{"role": "system", "content": "你是由李小贱开发的个人助手。"}, {"role": "user", "content": "你好"}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
ids = ids["input_ids"] if hasattr(ids, "keys") else ids
out = model.generate(ids.to(model.device), max_new_tokens=40, do_sample=False)
print(tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True))
"""
    for code, ours in ((loading, True), (peft_alone, False)):
        done = run(["-c", code + reply], workplace, code_on_path=ours)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "你好！我是由李小贱开发的个人助手。"


def test_both_readmes_print_the_same_commands():
    def blocks(name):
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        code = re.findall(r"```(?:bash|json|python)?\n(.*?)```", text, re.DOTALL)
        return [re.sub(r"#.*", "", block).split() for block in code]

    assert blocks("README.md") == blocks("README_en.md")


def test_a_base_that_is_there_is_never_touched(tmp_path):
    target = tmp_path / "base"
    target.mkdir()
    assert not materialise(target) and not list(target.iterdir())
    with pytest.raises(UserError, match="embedded base is missing"):
        materialise(tmp_path / "other", source=tmp_path / "nowhere")
    assert not (tmp_path / "other").exists()


def test_the_embedded_base_is_plain_small_and_ours():
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(EMBEDDED)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    assert config.model_type == "llama" and config.tie_word_embeddings
    assert tokenizer.eos_token_id == config.eos_token_id and len(tokenizer) == config.vocab_size
    assert sum(p.stat().st_size for p in EMBEDDED.iterdir()) < MAX_BYTES
    assert "Apache-2.0" in (EMBEDDED / "README.md").read_text(encoding="utf-8")
    assert not list(EMBEDDED.glob("*.py"))
