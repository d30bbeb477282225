"""The record of its base that an adapter carries: made by a run, checked by every loader."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file, save_file

from load_lora_model import load_lora_model, load_lora_model_without_merge
from tinyllm.base_record import read_record
from tinyllm.chat_format import chat_format_of
from tinyllm.errors import UserError
from tinyllm.fingerprint import fingerprint, hash_weights
from tinyllm.golden import first_change, golden_examples
from tinyllm.run_folder import FINGERPRINT_FILE


@pytest.fixture
def adapter(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "adapter")


@pytest.fixture
def base(base_folder, tmp_path):
    return shutil.copytree(base_folder, tmp_path / "base")


def load(base, adapter, **options):
    return load_lora_model(str(base), str(adapter), device="cpu", **options)


def test_a_run_records_its_base_and_golden_ids(base_folder, finished_run):
    record = read_record(finished_run)
    tokenizer = make_tokenizer()
    chat_format = chat_format_of(tokenizer)
    assert record["base"] == fingerprint(base_folder, tokenizer)
    assert record["base_model_path"] == str(base_folder)
    assert len(record["golden"]) == 10
    for example in record["golden"]:
        encoded = chat_format.encode(example["messages"])
        assert encoded.input_ids == example["input_ids"]
        assert [int(s) for s in encoded.supervised] == example["supervised"]
        assert any(example["supervised"])


def test_its_checkpoints_are_checked_too(base_folder, finished_run, base):
    checkpoint = finished_run / "checkpoint-3"
    assert read_record(checkpoint) == read_record(finished_run)
    make_model(seed=5).save_pretrained(base)
    with pytest.raises(UserError, match="other weights"):
        load(base, checkpoint)


def test_the_same_base_elsewhere_and_in_other_formats_is_accepted(base, adapter, capsys):
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    torch.save(weights, base / "pytorch_model.bin")
    load(base, adapter)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("merged", [True, False])
def test_other_weights_stop_both_loaders(base, adapter, capsys, merged):
    make_model(seed=5).save_pretrained(base)
    loader = load_lora_model if merged else load_lora_model_without_merge
    with pytest.raises(UserError, match=r"other weights \(.* give the base it was trained on"):
        loader(str(base), str(adapter), device="cpu")
    loader(str(base), str(adapter), device="cpu", force=True)
    assert "other weights" in capsys.readouterr().err


def test_another_tokenizer_stops(base, adapter):
    make_tokenizer(["other words altogether 你好 一二三"], 480).save_pretrained(base)
    with pytest.raises(UserError, match="other tokenizer"):
        load(base, adapter)


def test_another_template_stops(base, adapter):
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(UserError, match="other chat template"):
        load(base, adapter)


def test_the_adapters_own_template_may_not_drift(base, adapter):
    path = adapter / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|user|>", "<|USER|>").replace("\\n", " "))
    with pytest.raises(UserError, match=r"adapter folder's own chat template \(.*\) was changed"):
        load(base, adapter)


def test_golden_ids_tell_what_hashes_cannot(base, adapter):
    """As when another version of a library encodes the same files differently."""
    path = adapter / FINGERPRINT_FILE
    record = json.loads(path.read_text())
    record["golden"][0]["prompt_ids"][2] += 1
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"golden ids: .*'你好' has another id at position 2"):
        load(base, adapter)


def test_golden_examples_notice_every_kind_of_change(tokenizer):
    chat_format = chat_format_of(tokenizer)
    examples = golden_examples(chat_format, "system")
    assert first_change(examples, chat_format) is None
    for part in ("prompt_ids", "input_ids", "supervised"):
        changed = json.loads(json.dumps(examples))
        changed[3][part] = changed[3][part][:-1]
        assert "nothing" in first_change(changed, chat_format)


def test_a_template_that_writes_the_date_has_no_golden_ids():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d') }}{{ messages[0].content }}"
    assert golden_examples(chat_format_of(tokenizer)) == []


def test_an_adapter_from_elsewhere_loads_and_says_so_once(base, adapter, capsys):
    (adapter / FINGERPRINT_FILE).unlink()
    load(base, adapter)
    err = capsys.readouterr().err
    assert err.count("carries no fingerprint") == 1 and err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read as JSON"), ('{"format": 9}', "format 9, this program knows 1"),
     ('{"format": 1, "base": {}}', "damaged")],
)  # fmt: skip
def test_a_damaged_record_is_one_clear_line(base, adapter, text, message):
    (adapter / FINGERPRINT_FILE).write_text(text)
    with pytest.raises(UserError, match=message):
        load(base, adapter)


def test_one_changed_column_changes_the_hash(base):
    """Samples wander over the columns of a large matrix."""
    before = hash_weights(base)
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"] = torch.zeros(8192, 32)
    save_file(weights, base / "model.safetensors")
    zero = hash_weights(base)
    weights["model.embed_tokens.weight"][:, 7] = 1
    save_file(weights, base / "model.safetensors")
    assert len({before, zero, hash_weights(base)}) == 3


def test_a_gguf_file_has_a_fingerprint_and_an_empty_folder_none(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF1")
    (tmp_path / "b.gguf").write_bytes(b"GGUF2")
    assert hash_weights(tmp_path / "a.gguf") != hash_weights(tmp_path / "b.gguf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no weights"):
        hash_weights(tmp_path / "empty")
