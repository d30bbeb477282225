"""docs/notebook.ipynb: its cells run on a tiny model, and what is kept in the file is fit to read."""

from __future__ import annotations

import base64
import json
import logging
import re
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

NOTEBOOK = REPOSITORY / "docs/notebook.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
MOST_IMAGE_BYTES = 100_000
ABSOLUTE = re.compile(r"(?<![\w./:])(/(home|root|work|tmp|usr|opt|var|Users|mnt)/|[A-Z]:\\)")


@pytest.fixture
def substituted(monkeypatch, base_folder, data_file, tmp_path) -> Path:
    """The tiny base and rows in the variables that the notebook reads; gives its output folder."""
    values = {
        "TINYLLM_BASE": base_folder, "TINYLLM_DATA": data_file, "TINYLLM_STEPS": 4,
        "TINYLLM_OUTPUT": tmp_path / "output", "TINYLLM_RUN": tmp_path / "nowhere",
        "TINYLLM_MAX_NEW_TOKENS": 8, "MPLBACKEND": "Agg", "PYTHONUTF8": 1,
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(logging.root.manager, "disable", 0)  # put back what a cell changes
    monkeypatch.chdir(NOTEBOOK.parent)
    return tmp_path / "output"


def test_the_cells_run_in_order(monkeypatch, substituted, finished_run, capsys):
    monkeypatch.setenv("TINYLLM_RUN", str(finished_run))
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(CODE):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert len(names["losses"]) == 4 and names["losses"][-1] < names["losses"][0]
    assert not (substituted / "first").exists()
    assert (substituted / "second/adapter_model.safetensors").is_file()
    assert set(names["model"].peft_config) == {"default", "poet"}
    assert names["difference"] < 1e-3 < names["effect"]
    assert capsys.readouterr().out.count("助手:") == len(names["QUESTIONS"])


@pytest.mark.slow
def test_jupyter_runs_it_without_an_adapter(substituted):
    """A kernel of its own; with no run folder the notebook trains the first adapter itself."""
    why = "pip install -r requirement-notebook.txt"
    nbclient = pytest.importorskip("nbclient", reason=why)
    nbformat = pytest.importorskip("nbformat", reason=why)
    pytest.importorskip("ipykernel", reason=why)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    client = nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3")
    client.resources = resources
    client.execute()
    assert (substituted / "first/adapter_model.safetensors").is_file()
    assert (substituted / "second/adapter_model.safetensors").is_file()


def outputs() -> list[dict]:
    return [output for cell in CODE for output in cell["outputs"]]


def test_every_cell_was_run_in_order_without_an_error():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert not [output for output in outputs() if output["output_type"] == "error"]


def test_the_kept_outputs_name_no_folder_of_a_machine():
    for output in outputs():
        text = json.dumps({k: v for k, v in output.items() if k != "data"}, ensure_ascii=False)
        text += "".join(output.get("data", {}).get("text/plain", []))
        assert not ABSOLUTE.search(text), text


def test_the_picture_is_kept_and_small():
    pictures = [o["data"]["image/png"] for o in outputs() if "image/png" in o.get("data", {})]
    assert len(pictures) == 1
    assert len(base64.b64decode("".join(pictures[0]))) < MOST_IMAGE_BYTES


def test_the_kept_replies_are_those_of_a_trained_adapter():
    text = "".join("".join(o.get("text", [])) for o in outputs())
    assert "李小贱" in text and "没有找到" not in text
