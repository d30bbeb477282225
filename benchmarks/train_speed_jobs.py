"""What is compared: base shapes, tools with their settings; and how one of them is run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tinyllm.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
BENCHMARKS = REPOSITORY / "benchmarks"
EMBEDDED = REPOSITORY / "models" / "ptm_tiny_llm_16m_epoch1"
SEED, MBS, GAS, MAX_LENGTH = 42, 4, 4, 512
ROWS_PER_STEP = MBS * GAS
HYPER = {
    "per_device_train_batch_size": MBS, "gradient_accumulation_steps": GAS, "learning_rate": 5e-4,
    "seed": SEED, "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "weight_decay": 0.0,
}  # fmt: skip
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1}


@dataclass(frozen=True)
class Shape:
    """A base model's shape.

    Attributes:
        steps: how many steps show its speed.
        recipe_steps: the same for the upstream recipe, whose steps all cost the same.
    """

    name: str
    config: dict
    steps: int
    recipe_steps: int

    @property
    def head(self) -> tuple[int, int]:
        """``(hidden, vocabulary)``."""
        return self.config["hidden_size"], self.config["vocab_size"]

    @property
    def linears(self) -> list[tuple[int, int]]:
        """``(in, out)`` of the seven projections of one layer."""
        c, head = self.config, self.config["head_dim"]
        hidden, inner = c["hidden_size"], c["intermediate_size"]
        queries, keys = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
        return [
            (hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden),
            (hidden, inner), (hidden, inner), (inner, hidden),
        ]  # fmt: skip


def _llama(hidden, inner, layers, heads, kv_heads, vocabulary, tied) -> dict:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": hidden // heads,
        "vocab_size": vocabulary, "tie_word_embeddings": tied, "max_position_embeddings": MAX_LENGTH,
    }  # fmt: skip


SHAPES = {
    "embedded": Shape("embedded", _llama(384, 1024, 8, 6, 3, 8192, True), 80, 2),
    "upstream_16m": Shape("upstream_16m", _llama(120, 384, 6, 6, 6, 64798, False), 80, 2),
    "llama_135m": Shape("llama_135m", _llama(576, 1536, 30, 9, 3, 49152, True), 8, 1),
}


@dataclass(frozen=True)
class Candidate:
    """One tool with one choice of settings.

    Attributes:
        family: candidates of one family compete, the fastest correct one is measured.
        tool: which function of train_speed_child.py trains.
        settings: what the table says about it.
        precision: of its matrix products.
        options: the child's options; for ours further words of the command line.
    """

    family: str
    tool: str
    settings: str
    precision: str
    options: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.family}: {self.settings}"


BF16 = {"base_dtype": "bfloat16"}
FREE = {"padding_free": True, "max_length": None}
WHOLE_STEP = {"per_device_train_batch_size": ROWS_PER_STEP, "gradient_accumulation_steps": 1}
OURS, TRL, RECIPE = "ours", "TRL", "upstream recipe"
FAMILIES = (OURS, TRL, RECIPE)
# Of each family the fastest one that computes the right loss is measured.  Not tried: TRL's packing,
# which puts other rows into a step; its loss_type, since 1.16 has one path for the plain loss (the
# head on supervised positions alone, in chunks); its defaults gradient_checkpointing and bf16, which
# cost time on a CPU; group_by_length, which changes the order of the rows.
CANDIDATES = [
    Candidate(OURS, "ours", "fp32 base", "float32", {"words": ["--torch_dtype", "float32"]}),
    Candidate(OURS, "ours", "bf16 base", "bfloat16", {"words": ["--torch_dtype", "bfloat16"]}),
    Candidate(TRL, "trl", "fp32", "float32"),
    Candidate(TRL, "trl", "fp32, padding_free", "float32", {"config": FREE}),
    Candidate(TRL, "trl", "fp32, 16 rows x 1", "float32", {"config": WHOLE_STEP}),
    Candidate(TRL, "trl", "bf16", "bfloat16", BF16 | {"config": {"bf16": True}}),
    Candidate(
        TRL, "trl", "bf16, padding_free", "bfloat16", BF16 | {"config": {"bf16": True} | FREE}
    ),
    Candidate(RECIPE, "recipe", "fp32, padded to 512", "float32", {"pad_to": MAX_LENGTH}),
]


@dataclass(frozen=True)
class Work:
    """What every tool is given for one shape: base, rows, length of the training."""

    base: Path
    dataset: Path
    encoded: Path
    dropout: float = LORA["lora_dropout"]


class Runner:
    """Starts children one after the other; each has a folder of its own under ``outputs``."""

    def __init__(self, outputs: Path, peers_python: Path) -> None:
        self.outputs, self.peers_python, self.count = outputs, peers_python, 0
        self.versions: dict[str, str] = {}

    def project(self, what: str, **job) -> dict:
        """A job of train_speed_project.py, in the project's environment."""
        return self._run(Path(sys.executable), "train_speed_project.py", job | {"what": what}, what)

    def limit(self, **job) -> dict:
        """A job of train_speed_limit.py, in the project's environment."""
        return self._run(Path(sys.executable), "train_speed_limit.py", job, "limit")

    def import_and_load(self, work: Work) -> float:
        """Seconds of importing torch, transformers and peft and loading the base."""
        job = {"tool": "import", "base": str(work.base), "options": {}}
        return self._run(Path(sys.executable), "train_speed_child.py", job, "import")["start_up"]

    def train(self, candidate: Candidate, work: Work, steps: int = -1, epochs: float = 1.0) -> dict:
        """Train once; returns the child's result with ``output_dir``."""
        self.count += 1
        output = self.outputs / "runs" / f"{self.count:03}"
        lora = LORA | {"lora_dropout": work.dropout}
        job = {
            "tool": candidate.tool, "base": str(work.base), "encoded": str(work.encoded),
            "options": candidate.options, "hyper": HYPER, "lora": lora, "max_steps": steps,
            "epochs": epochs, "output_dir": str(output),
        }  # fmt: skip
        python = self.peers_python
        if candidate.tool == "ours":
            python = Path(sys.executable)
            job["words"] = our_words(candidate, work, steps, epochs, output)
        result = self._run(python, "train_speed_child.py", job, candidate.name)
        self._note_versions({"python": result["python"]} | result["versions"])
        return result | {"output_dir": str(output)}

    def _note_versions(self, versions: dict[str, str]) -> None:
        """Keep the versions for the report; where the two environments differ, both."""
        for name, number in versions.items():
            known = self.versions.setdefault(name, number)
            if number not in known.split(" / "):
                self.versions[name] = f"{known} / {number}"

    def start_up_of_default_data(self, work: Work) -> float:
        """Seconds from the command to the first step, rows and all else as they come."""
        self.count += 1
        words = [
            "--base_model_path", str(work.base), "--use_cpu", "True", "--disable_tqdm", "True",
            "--output_dir", str(self.outputs / "runs" / f"{self.count:03}"),
        ]  # fmt: skip
        job = {"tool": "ours", "words": words, "start_up_only": True}
        return self._run(Path(sys.executable), "train_speed_child.py", job, "start-up")["start_up"]

    def _run(self, python: Path, script: str, job: dict, name: str) -> dict:
        folder = self.outputs / "jobs"
        folder.mkdir(parents=True, exist_ok=True)
        file, result, log = (folder / f"job.{end}" for end in ("json", "result.json", "log"))
        result.unlink(missing_ok=True)
        job |= {"result": str(result), "started": time.time()}
        file.write_text(json.dumps(job), encoding="utf-8")
        with log.open("w", encoding="utf-8") as out:
            code = subprocess.run(
                [str(python), str(BENCHMARKS / script), str(file)], cwd=REPOSITORY, stdout=out,
                stderr=subprocess.STDOUT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False,
            ).returncode  # fmt: skip
        if code != 0 or not result.is_file():
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            kept = log.with_name(f"failed-{self.count:03}.log")
            log.replace(kept)
            reason = lines[-1] if lines else f"exit code {code}"
            where = kept.relative_to(REPOSITORY) if kept.is_relative_to(REPOSITORY) else kept
            raise ChildError(f"{name} has failed: {reason}; all it said is in {where}")
        return json.loads(result.read_text(encoding="utf-8"))


class ChildError(UserError):
    """A child has failed; the message says why and where its output lies."""


def our_words(
    candidate: Candidate, work: Work, steps: int, epochs: float, output: Path
) -> list[str]:
    """The words after ``python sft_lora.py`` that ask for the same as the other tools get."""
    hyper = [word for name, value in HYPER.items() for word in (f"--{name}", str(value))]
    return [
        "--base_model_path", str(work.base), "--dataset", str(work.dataset),
        "--eval_dataset", "none", "--eval_strategy", "no", "--save_strategy", "no",
        "--logging_steps", "1", "--num_sample_replies", "0", "--disable_tqdm", "True",
        "--use_cpu", "True", "--max_length", str(MAX_LENGTH), "--output_dir", str(output),
        "--max_steps", str(steps), "--num_train_epochs", str(epochs),
        "--lora_r", str(LORA["r"]), "--lora_alpha", str(LORA["lora_alpha"]),
        "--lora_dropout", str(work.dropout), *hyper, *candidate.options.get("words", []),
    ]  # fmt: skip


def all_rows(dataset: list[Path]) -> list[str]:
    """Every line of .jsonl files, or of the .jsonl files in folders.

    Raises:
        UserError: a path is missing or no .jsonl.
    """
    lines = []
    for path in dataset:
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files or not all(f.is_file() and f.suffix == ".jsonl" for f in files):
            raise UserError(f"{path}: expected a .jsonl file or a folder of them")
        lines += [line for f in files for line in f.read_text("utf-8").splitlines() if line.strip()]
    return lines


def choose_rows(dataset: list[Path], number: int, seed: int = SEED) -> list[str]:
    """``number`` lines, chosen and ordered by the seed.

    Raises:
        UserError: as :func:`all_rows`, or there are too few rows.
    """
    lines = all_rows(dataset)
    if len(lines) < number:
        raise UserError(f"the data has {len(lines)} rows, {number} are needed; ask for fewer")
    return random.Random(seed).sample(lines, number)
