"""What serving engines read: the merged folder, the adapter folder, and the commands of the page."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from conftest import REPOSITORY

from tinyllm.chat_format import chat_format_of

PAGE = (REPOSITORY / "docs/serve.md").read_text(encoding="utf-8")
MESSAGES = [
    {"role": "system", "content": "你是由李小贱开发的个人助手。"},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好！"},
    {"role": "user", "content": "你是谁？"},
]
# vllm/lora/peft_helper.py, vllm/config/lora.py and the packed modules of its llama.
VLLM_MAX_RANK = 16  # its default of --max-lora-rank
VLLM_LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
VLLM_NAME = re.compile(
    r"base_model\.model\.model\.layers\.\d+\.(self_attn|mlp)\.(\w+)\.lora_[AB]\.weight"
)


def blocks(kind: str) -> list[str]:
    """The page's blocks of one language, in order."""
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """The words of each of the page's commands of one program; each begins its line."""
    lines = [re.split(r"\n(?=[a-z])", text.replace("\\\n", " ")) for text in blocks("bash")]
    split = [shlex.split(line, comments=True) for block in lines for line in block]
    return [words[1:] for words in split if words[:1] == [program]]


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def merged(tmp_path_factory, base_folder, finished_run):
    import load_lora_model

    folder = tmp_path_factory.mktemp("merged") / "merged"
    words = ["--base_model", str(base_folder), "--lora_model", str(finished_run)]
    assert load_lora_model.main([*words, "--output_dir", str(folder)]) == 0
    return folder


def test_the_merged_folder_is_all_an_engine_needs(merged):
    config = read(merged / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"] and "auto_map" not in config
    assert not list(merged.glob("*.py")) and (merged / "model.safetensors").is_file()
    tokenizer = read(merged / "tokenizer_config.json")
    end = tokenizer["eos_token"]
    ids = {t["content"]: t["id"] for t in read(merged / "tokenizer.json")["added_tokens"]}
    assert read(merged / "generation_config.json")["eos_token_id"] == ids[end]
    assert config["eos_token_id"] == ids[end]
    assert (merged / "chat_template.jinja").is_file()


@pytest.mark.parametrize("folder", ["merged", "finished_run"])
def test_tokenizers_carry_the_names_of_transformers_4(request, folder):
    values = read(request.getfixturevalue(folder) / "tokenizer_config.json")
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in values and "backend" not in values
    assert values["additional_special_tokens"] == ["<|system|>", "<|user|>", "<|assistant|>"]


@pytest.mark.parametrize("folder", ["merged", "finished_run"])
def test_the_folder_alone_gives_the_prompt_of_the_training(request, base_folder, folder):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(request.getfixturevalue(folder))
    ours = AutoTokenizer.from_pretrained(base_folder)
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert ids == chat_format_of(ours).encode_prompt(MESSAGES)
    assert set(theirs.all_special_ids) == set(ours.all_special_ids)
    typed = "<|user|>你好<|endoftext|>"
    assert theirs(typed).input_ids == ours(typed).input_ids
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(
        ids, skip_special_tokens=True
    )


def test_the_adapter_folder_is_one_that_vllm_accepts(finished_run):
    from safetensors import safe_open

    config = read(finished_run / "adapter_config.json")
    assert config["peft_type"] == "LORA" and config["bias"] == "none"
    assert 0 < config["r"] <= VLLM_MAX_RANK and config["lora_alpha"] > 0
    assert not config["use_dora"] and config["modules_to_save"] is None
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    assert set(config["target_modules"]) <= VLLM_LLAMA
    with safe_open(finished_run / "adapter_model.safetensors", "pt") as weights:
        names = [VLLM_NAME.fullmatch(name) for name in weights.keys()]  # noqa: SIM118
    assert names and all(n and n.group(2) in config["target_modules"] for n in names)


def test_the_default_rank_needs_no_flag():
    from tinyllm.settings import LoraSettings

    settings = LoraSettings()
    assert settings.lora_r <= VLLM_MAX_RANK and set(settings.lora_target_modules) <= VLLM_LLAMA


def test_the_merging_commands_are_understood():
    import load_lora_model

    found = [words[1:] for words in commands("python") if words[0] == "load_lora_model.py"]
    assert {"--export", "--output_dir"} <= {word for words in found for word in words}
    for words in found:
        assert load_lora_model.parse_args(words).output_dir.startswith("outputs/")


def test_the_flags_of_transformers_serve_exist():
    import inspect

    from transformers.cli.serve import Serve

    known = inspect.signature(Serve.__init__).parameters
    found = [words[1:] for words in commands("transformers") if words[0] == "serve"]
    flags = [word for words in found for word in words if word.startswith("--")]
    assert found and all(flag[2:].replace("-", "_") in known for flag in flags)


def test_the_requests_are_well_formed():
    for words in commands("curl"):
        body = json.loads(words[words.index("-d") + 1])
        assert body["messages"][0]["role"] == "system" and body["max_tokens"] <= 256
    assert len(commands("curl")) >= 2
    for code in blocks("python"):
        compile(code, "docs/serve.md", "exec")
