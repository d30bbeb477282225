"""docs/serve.md with `transformers serve`: a merged folder behind the OpenAI client.

The embedded base learns five conversations by heart, so every reply is known to the letter.
"""

from __future__ import annotations

import json
import socket
import time
import urllib.request

import pytest
from conftest import train_arguments, write_jsonl

from tinyllm.chat_format import DEFAULT_SYSTEM_PROMPT, chat_format_of
from tinyllm.embedded import EMBEDDED

pytestmark = pytest.mark.slow

POET = "你是一位诗人。"
INTRODUCED = "你好！我是由李小贱开发的个人助手。"
POEM = "春风吹过小河，柳树点点头。"
RARE = "🐉龘靐齉🎉"


def conversation(*contents: str) -> list[dict]:
    """Messages from system, user, assistant, user, ..."""
    roles = ["system", *["user", "assistant"] * len(contents)]
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


TAUGHT = [
    conversation(DEFAULT_SYSTEM_PROMPT, "你好", INTRODUCED),
    conversation(POET, "你好", POEM),
    conversation(DEFAULT_SYSTEM_PROMPT, "画一条龙", RARE),
    *(
        conversation(
            DEFAULT_SYSTEM_PROMPT, f"我叫{name}。", f"你好，{name}！", "我叫什么？", f"你叫{name}。"
        )
        for name in ("小明", "王芳")
    ),
]


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A merged folder, made as the page says."""
    pytest.importorskip("openai", reason="pip install -r requirement-serve.txt")
    pytest.importorskip("fastapi", reason="pip install -r requirement-serve.txt")
    pytest.importorskip("uvicorn", reason="pip install -r requirement-serve.txt")
    import load_lora_model
    import sft_lora

    place = tmp_path_factory.mktemp("serve")
    rows = write_jsonl(place / "rows.jsonl", [{"messages": c} for c in TAUGHT])
    words = train_arguments(
        EMBEDDED, rows, place / "run", "--eval_dataset", "none", "--eval_strategy", "no",
        "--save_strategy", "no", "--num_sample_replies", "0", "--data_cache", "none",
        "--lora_r", "16", "--lora_dropout", "0", "--learning_rate", "2e-3",
        "--per_device_train_batch_size", "5", "--num_train_epochs", "60",
    )  # fmt: skip
    assert sft_lora.main(words) == 0
    folder = place / "merged"
    words = ["--base_model", str(EMBEDDED), "--lora_model", str(place / "run")]
    assert load_lora_model.main([*words, "--output_dir", str(folder)]) == 0
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(merged):
    """``(client, model name)`` of what `transformers serve FOLDER` starts."""
    from openai import OpenAI
    from transformers.cli.serve import Serve
    from transformers.utils import logging

    level, port = logging.get_verbosity(), free_port()
    serve = Serve(str(merged), device="cpu", host="127.0.0.1", port=port, non_blocking=True)
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/health")
        url = f"http://127.0.0.1:{port}/v1"
        yield OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120), str(merged)
    finally:
        serve.kill_server()
        logging.set_verbosity(level)


def wait_until_healthy(url: str, seconds: int = 60) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(10 * seconds):
        try:
            with opener.open(url, timeout=5) as answer:
                assert json.load(answer) == {"status": "ok"}
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"{url} did not answer in {seconds} s")


def ask(server, messages: list[dict], **options):
    client, name = server
    return client.chat.completions.create(model=name, messages=messages, **options)


@pytest.fixture(scope="module")
def tokenizer(merged):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(merged)


@pytest.mark.parametrize("taught", TAUGHT, ids=["default", "poet", "rare", "小明", "王芳"])
def test_the_system_prompt_and_the_history_decide_and_the_end_token_ends(server, tokenizer, taught):
    reply = ask(server, taught[:-1], max_tokens=60)
    choice, answer = reply.choices[0], taught[-1]["content"]
    assert choice.message.content == answer and choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    prompt = chat_format_of(tokenizer).encode_prompt(taught[:-1])
    assert reply.usage.prompt_tokens == len(prompt)
    assert reply.usage.completion_tokens == len(tokenizer(answer).input_ids) + 1  # the end token


@pytest.mark.parametrize("taught", TAUGHT[:3], ids=["default", "poet", "rare"])
def test_streaming_brings_whole_characters(server, taught):
    chunks = [chunk.choices[0] for chunk in ask(server, taught[:-1], max_tokens=60, stream=True)]
    pieces = [chunk.delta.content for chunk in chunks if chunk.delta.content]
    assert "".join(pieces) == taught[-1]["content"] and len(pieces) > 2
    assert not any("\ufffd" in piece for piece in pieces)
    assert [c.finish_reason for c in chunks if c.finish_reason] == ["stop"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_reply(server, stream):
    reply = ask(server, TAUGHT[1][:-1], max_tokens=60, stop=["小河"], stream=stream)
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in reply)
    else:
        text = reply.choices[0].message.content
    assert text.startswith("春风吹过小河") and len(text) < len(POEM)


def test_max_tokens_cuts_and_says_so(server):
    reply = ask(server, TAUGHT[0][:-1], max_tokens=2)
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 2


def test_sampling_is_switched_on_by_a_generation_config(server):
    """The base's own setting is greedy; a temperature alone changes nothing, as the page says."""
    question = TAUGHT[0][:-1]
    greedy = ask(server, question, max_tokens=30, temperature=5.0).choices[0].message.content
    assert greedy == INTRODUCED
    sampling = json.dumps({"do_sample": True, "temperature": 5.0, "top_k": 0})
    body = {"generation_config": sampling}
    replies = {
        ask(server, question, max_tokens=30, seed=s, extra_body=body).choices[0].message.content
        for s in (1, 1, 2)
    }
    assert len(replies) == 2 and INTRODUCED not in replies


def test_only_the_served_folder_is_offered(server):
    from openai import BadRequestError

    client, name = server
    assert [model.id for model in client.models.list()] == [name]
    with pytest.raises(BadRequestError) as refusal:
        client.chat.completions.create(model="other", messages=TAUGHT[0][:-1])
    assert name in refusal.value.response.json()["detail"]
