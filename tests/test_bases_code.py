"""Code in a base's folder: off by default, hashed, pinned, refused before it runs when it changed."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import train_arguments

from tinyllm.errors import UserError
from tinyllm.remote_code import hash_code, names_code

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
with open({trace!r}, "a") as out:
    out.write("ran\\n")
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def coded(tmp_path, base_folder, monkeypatch):
    """``(base folder with code, file that tells whether it ran)``."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    folder, trace = tmp_path / "coded", tmp_path / "trace.txt"
    shutil.copytree(base_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {
        "AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnForCausalLM"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own_model.py").write_text(CODE.format(trace=str(trace)))
    return folder, trace


def run(base, data, output, *more):
    import sft_lora

    return sft_lora.main(train_arguments(base, data, output, "--save_strategy", "no", *more))


def test_off_by_default(tmp_path, coded, data_file):
    folder, trace = coded
    with pytest.raises(UserError):
        run(folder, data_file, tmp_path / "run")
    assert not trace.exists() and not (tmp_path / "run").exists()


def test_hashed_pinned_and_refused_when_changed(tmp_path, coded, data_file, capsys):
    folder, trace = coded
    assert names_code(folder)
    digest, output = hash_code(folder), tmp_path / "run"
    assert run(folder, data_file, output, "--trust_remote_code", "True") == 0
    assert trace.exists()
    assert f"own_model.py will be run, sha256 {digest}" in capsys.readouterr().err
    identity = json.loads((output / "run.json").read_text())["identity"]
    assert identity["base"]["code"] == digest
    trace.unlink()
    with (folder / "own_model.py").open("a") as out:
        out.write("# changed\n")
    with pytest.raises(UserError, match="its code has changed"):
        run(folder, data_file, output, "--trust_remote_code", "True")
    with pytest.raises(UserError, match="--remote_code_hash says"):
        run(folder, data_file, tmp_path / "other", "--trust_remote_code", "True",
            "--remote_code_hash", digest)  # fmt: skip
    assert not trace.exists() and not (tmp_path / "other").exists()


def test_code_from_elsewhere_is_refused(tmp_path, coded, data_file):
    folder, trace = coded
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoConfig"] = "someone/place--own_model.OwnConfig"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="from another place"):
        run(folder, data_file, tmp_path / "run", "--trust_remote_code", "True")
    assert not trace.exists()


def test_every_file_counts(tmp_path):
    assert hash_code(tmp_path) == ""
    (tmp_path / "a.py").write_text("x")
    one = hash_code(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.py").write_text("y")
    two = hash_code(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "c.py")
    assert len({one, two, hash_code(tmp_path)}) == 3
