"""The documented lm-evaluation-harness commands run, offline, on a small task of our own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY, make_model, make_tokenizer, train_arguments

from load_lora_model import main as merge_main
from tinyllm.chat_format import chat_format_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None,
        reason="lm_eval is not installed: pip install -r requirement-eval.txt",
    ),
]


def evaluate(model_args: str, target) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", model_args,
         "--include_path", "benchmarks/lm_eval_task", "--tasks", "tinyllm_zh", "--apply_chat_template",
         "--device", "cpu", "--batch_size", "16", "--output_path", str(target), "--log_samples"],
        cwd=REPOSITORY, capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(target)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (samples,) = target.rglob("samples_tinyllm_zh*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    return {row["doc_id"]: [float(r[0][0]) for r in row["resps"]] for row in rows}


@pytest.fixture(scope="module")
def base_and_run(tmp_path_factory, data_file):
    """A base with one embedding row per token, as the built-in one, and a LoRA trained on it.

    With ``peft=`` lm_eval cuts rows beyond the tokenizer's tokens away, for a merged model it does
    not; the scores of a base with such rows differ by what these have of the probability.
    """
    import sft_lora

    place = tmp_path_factory.mktemp("lm_eval")
    tokenizer = make_tokenizer()
    chat_format_of(tokenizer)
    make_model(len(tokenizer)).save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    assert sft_lora.main(train_arguments(place / "base", data_file, place / "run")) == 0
    return place / "base", place / "run"


def test_adapter_and_merged_model_agree(base_and_run, tmp_path):
    base_folder, run = base_and_run
    merged = tmp_path / "merged"
    assert merge_main(["--base_model", str(base_folder), "--lora_model", str(run),
                       "--output_dir", str(merged)]) == 0  # fmt: skip
    beside = evaluate(f"pretrained={base_folder},peft={run}", tmp_path / "a")
    alone = evaluate(f"pretrained={merged}", tmp_path / "b")
    base = evaluate(f"pretrained={base_folder}", tmp_path / "c")
    assert len(beside) == 24
    for question, scores in beside.items():
        assert scores == pytest.approx(alone[question], abs=1e-3)
    assert any(abs(a - b) > 0.1 for q in beside for a, b in zip(beside[q], base[q], strict=True))
