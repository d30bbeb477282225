"""What train_speed.py needs of the project's own code, in a process of its own.

python benchmarks/train_speed_project.py JOB.json

Rows are encoded and the held-out loss is computed here, once for all tools.  The parent imports no
torch: it stays small, and its memory never counts as a child's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tinyllm.errors import run_program

IGNORED = -100


def main() -> int:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    result = {"base": make_base, "encode": encode, "judge": judge}[job["what"]](job)
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")
    return 0


def make_base(job: dict) -> dict:
    """A base of the given shape with random weights, and a tokenizer with our chat template."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = Path(job["folder"])
    source = job["tokenizer"]
    tokenizer = AutoTokenizer.from_pretrained(source) if source else learn_tokenizer(job["texts"])
    torch.manual_seed(job["seed"])
    config = LlamaConfig(
        **job["shape"], bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"{len(tokenizer)} ids do not fit into {config.vocab_size}")
    scratch = folder.with_name(f"{folder.name}.tmp")
    LlamaForCausalLM(config).save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    scratch.rename(folder)
    return {}


def learn_tokenizer(files: list[str], vocab_size: int = 8192):
    """A byte-level BPE learned from text files, for a repository without its embedded base."""
    from tinyllm.pretrain.vocabulary import learn, wrap

    lines = [line for file in files for line in Path(file).read_text("utf-8").splitlines()]
    return wrap(learn({"own": lines}, vocab_size), 512)


def encode(job: dict) -> dict:
    """The rows as our own training sees them: ids and labels of every example."""
    from tinyllm import sft
    from tinyllm.command_line import parse_settings

    settings, _ = parse_settings(job["words"])
    model, _, chat_format = sft.load_model(settings)
    data, _ = sft.load_examples(settings, model, chat_format)
    examples = [data.train[i] for i in range(len(data.train))]
    return {name: [e[name].tolist() for e in examples] for name in ("input_ids", "labels")}


def judge(job: dict) -> dict:
    """Held-out loss per supervised token of every adapter, in float32, plainly, row by row."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    rows = json.loads(Path(job["encoded"]).read_text(encoding="utf-8"))
    losses = {}
    for name, adapter in job["adapters"].items():
        model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32)
        if adapter:
            model = PeftModel.from_pretrained(model, adapter)
        losses[name] = loss_per_token(model.eval(), rows["input_ids"], rows["labels"])
    return {"losses": losses}


def loss_per_token(model, input_ids: list[list[int]], labels: list[list[int]]) -> float:
    """Mean cross-entropy over all supervised tokens; each row alone, nothing padded."""
    import torch
    import torch.nn.functional as F

    total, count = 0.0, 0
    with torch.no_grad():
        for ids, targets in zip(input_ids, labels, strict=True):
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
            target = torch.tensor(targets[1:])
            total += F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum").item()
            count += int((target != IGNORED).sum())
    return total / count


if __name__ == "__main__":
    sys.exit(run_program(main))
