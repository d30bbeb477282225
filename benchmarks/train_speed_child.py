"""One training by one tool, alone in its process: what train_speed.py starts, time after time.

python benchmarks/train_speed_child.py JOB.json

The job names the tool, base, rows and settings; the result is written beside it.  This file runs in
two environments, the project's and the peers', so the peers' half imports nothing of tinyllm.
"""

from __future__ import annotations

import contextlib
import json
import platform
import resource
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl")
LINUX_STATUS = Path("/proc/self/status")


class FirstStepReached(Exception):
    """Ends a run of which only the start-up is asked for."""


def main() -> int:
    job_file = Path(sys.argv[1])
    job = json.loads(job_file.read_text(encoding="utf-8"))
    result = TOOLS[job["tool"]](job)
    result |= {"versions": versions(), "python": platform.python_version()}
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")
    return 0


def mebibytes(field: str = "VmHWM") -> float:
    """Resident memory of this process: the most so far (VmHWM) or at present (VmRSS).

    Linux counts in ``ru_maxrss`` also what the parent held when it started us, hence its own file.
    """
    if LINUX_STATUS.exists():
        for line in LINUX_STATUS.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def versions() -> dict[str, str]:
    """Versions of the packages that compute, as far as they are installed here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def step_timer(job: dict):
    """A callback of transformers that notes when each step ends, its loss, and the peak memory.

    Times come from the callback, so imports and loading do not count; the first step begins with
    ``first_step``, counted from the moment in which the parent started this process.
    """
    from transformers import TrainerCallback

    class StepTimer(TrainerCallback):
        def __init__(self) -> None:
            self.start_up: float | None = None
            self.ends: list[float] = []
            self.losses: list[float] = []
            self.before = self.peak = 0.0

        def on_step_begin(self, args, state, control, **kwargs) -> None:
            if self.start_up is None:
                self.start_up = time.time() - job["started"]
                self.before = mebibytes("VmRSS")
                self.ends.append(time.perf_counter())
                if job.get("start_up_only"):
                    raise FirstStepReached

        def on_step_end(self, args, state, control, **kwargs) -> None:
            self.ends.append(time.perf_counter())
            self.peak = mebibytes()

        def on_log(self, args, state, control, **kwargs) -> None:
            if "loss" in state.log_history[-1]:
                self.losses.append(float(state.log_history[-1]["loss"]))

        def result(self) -> dict:
            seconds = [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]
            return {
                "start_up": self.start_up, "step_seconds": seconds, "losses": self.losses,
                "before_mib": self.before, "peak_mib": self.peak,
            }  # fmt: skip

    return StepTimer()


def train_ours(job: dict) -> dict:
    """``python sft_lora.py`` as a user types it, with the callback added to its Trainer."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import sft_lora
    from tinyllm.imports import without_collections

    with without_collections():  # as sft_lora.main() imports them; then they are there already
        from tinyllm import sft

        timer, build = step_timer(job), sft.build_trainer

    def build_and_watch(*args, **kwargs):
        trainer = build(*args, **kwargs)
        trainer.add_callback(timer)
        return trainer

    sft.build_trainer = build_and_watch
    with contextlib.suppress(FirstStepReached):
        if sft_lora.main(job["words"]) != 0:
            raise RuntimeError("sft_lora.py has failed")
    return timer.result()


def training_arguments(job: dict) -> dict:
    """The hyper-parameters that all tools share, by their Hugging Face names."""
    return {
        **job["hyper"], "output_dir": job["output_dir"], "max_steps": job["max_steps"],
        "num_train_epochs": job["epochs"], "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_nan_inf_filter": False,
    }  # fmt: skip


def lora_config(job: dict):
    """peft's LoRA with the shared hyper-parameters."""
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, **job["lora"])


def load_base(job: dict):
    """``(model, tokenizer)`` of the job's base; float32 unless the options say otherwise."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = getattr(torch, job["options"].get("base_dtype", "float32"))
    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=dtype)
    return model, AutoTokenizer.from_pretrained(job["base"])


def encoded_rows(job: dict):
    """The rows as ids and labels, so that every tool sees the same."""
    from datasets import Dataset

    rows = json.loads(Path(job["encoded"]).read_text(encoding="utf-8"))
    return Dataset.from_dict({name: rows[name] for name in ("input_ids", "labels")})


def train_trl(job: dict) -> dict:
    """TRL's SFTTrainer on the rows, with the candidate's own options."""
    from trl import SFTConfig, SFTTrainer

    timer, (model, tokenizer) = step_timer(job), load_base(job)
    settings = {"bf16": False, "gradient_checkpointing": False, "max_length": 512}
    settings |= training_arguments(job) | job["options"].get("config", {})
    trainer = SFTTrainer(
        model, args=SFTConfig(**settings), train_dataset=encoded_rows(job),
        processing_class=tokenizer, peft_config=lora_config(job), callbacks=[timer],
    )  # fmt: skip
    return train_and_save(trainer, timer, job)


def train_recipe(job: dict) -> dict:
    """The upstream recipe: every row padded to the limit, transformers' Trainer, peft."""
    import torch
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

    limit, (model, tokenizer) = job["options"]["pad_to"], load_base(job)

    def padded(row: dict) -> dict:
        ids, missing = row["input_ids"], limit - len(row["input_ids"])
        return {
            "input_ids": ids + [tokenizer.pad_token_id] * missing,
            "attention_mask": [1] * len(ids) + [0] * missing,
            "labels": row["labels"] + [-100] * missing,
        }

    timer = step_timer(job)
    set_seed(job["hyper"]["seed"])
    model = get_peft_model(model.to(torch.float32), lora_config(job))
    trainer = Trainer(
        model, TrainingArguments(**training_arguments(job)), callbacks=[timer],
        train_dataset=encoded_rows(job).map(padded), data_collator=default_data_collator,
    )  # fmt: skip
    return train_and_save(trainer, timer, job)


def train_and_save(trainer, timer, job: dict) -> dict:
    """Train, and leave the adapter in the output folder."""
    trainer.train()
    trainer.model.save_pretrained(job["output_dir"])
    return timer.result()


def import_and_load(job: dict) -> dict:
    """The least that any tool must do before its first step."""
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    load_base(job)
    return {"start_up": time.time() - job["started"]}


TOOLS = {
    "ours": train_ours, "trl": train_trl, "recipe": train_recipe, "import": import_and_load,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
