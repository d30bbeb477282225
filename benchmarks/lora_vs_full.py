"""LoRA against full fine-tuning on the same rows: rank x learning rate x target modules.

    python benchmarks/lora_vs_full.py                      the whole grid (hours on two cores)
    python benchmarks/lora_vs_full.py --ranks 4 16 --rates 5e-4 --targets all --epochs 1
    python benchmarks/lora_vs_full.py --ranks 4 --rates 5e-4 --targets all --max_steps 2    a quick look

Every cell is an ordinary run of sft_lora.py with one seed; full fine-tuning takes its own learning
rates, a tenth of LoRA's (Schulman and Thinking Machines Lab 2025, "LoRA Without Regret", find about
that ratio).  Finished runs are kept in outputs/bench/lora_vs_full and not trained again.  Writes
lora_vs_full.md there, and with matplotlib lora_vs_full.png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {
    "attention": "q_proj,k_proj,v_proj,o_proj",
    "mlp": "gate_proj,up_proj,down_proj",
    "all": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
}
FULL = "full"
HEAD = ("what", "rank", "learning rate", "trained parameters", "held-out before", "held-out after",
        "best held-out", "general text (rise)", "minutes")  # fmt: skip


def main() -> int:
    args = parse_args()
    cells = [(targets, rank, rate) for targets in args.targets for rank in args.ranks
             for rate in args.rates]  # fmt: skip
    cells += [(FULL, 0, f"{float(rate) / 10:g}") for rate in args.rates]
    results = []
    for number, cell in enumerate(cells, 1):
        print(f"{number} of {len(cells)}: {' '.join(map(str, cell))}", flush=True)
        results.append((cell, train(cell, args)))
    text = table(results)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "lora_vs_full.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    draw(results, args.output / "lora_vs_full.png")
    return 0


def train(cell: tuple, args: argparse.Namespace) -> dict:
    """Train one cell, unless it is done already; its metrics."""
    targets, rank, rate = cell
    length = f"steps{args.max_steps}" if args.max_steps > 0 else f"epochs{args.epochs:g}"
    folder = args.output / f"{targets}_r{rank}_lr{rate}_{length}"
    words = ["--use_lora", "False"] if targets == FULL else [
        "--lora_r", str(rank), "--lora_alpha", str(2 * rank), "--lora_target_modules", TARGETS[targets],
    ]  # fmt: skip
    command = [
        sys.executable, "sft_lora.py", "--base_model_path", args.base, "--dataset", args.dataset,
        "--output_dir", str(folder), "--learning_rate", rate, "--num_train_epochs", str(args.epochs),
        "--max_steps", str(args.max_steps), "--seed", str(args.seed), "--lora_dropout", "0",
        "--report_replies", "0", "--eval_replies", "0", "--num_sample_replies", "0",
        "--save_total_limit", "1", "--report_to", "none", "--disable_tqdm", "True", *words,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{folder.name}: the training failed:\n{done.stderr[-2000:]}")
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def table(results: list[tuple[tuple, dict]]) -> str:
    """One line a run, the lowest held-out loss in bold."""
    lowest = min(metrics["training"]["eval_loss"] for _, metrics in results)
    lines = [f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}"]
    for (targets, rank, rate), metrics in results:
        training, general = metrics["training"], metrics["evidence"]["general"]
        after = f"{training['eval_loss']:.4f}"
        best = training["best_eval_loss"]
        cells = (
            targets, str(rank or "–"), rate, f"{training['parameters']:,}",
            f"{training['eval_loss_before']:.4f}",
            f"**{after}**" if training["eval_loss"] == lowest else after,
            "–" if best is None else f"{best:.4f}", f"{-general['drop']['mean']:+.4f}",
            f"{training['seconds'] / 60:.1f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: list[tuple[tuple, dict]], path: Path) -> None:
    """Held-out loss over the learning rate, a line for each rank and set of layers."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is missing (pip install -r requirement-report.txt)")
        return
    lines: dict[str, list[tuple[float, float]]] = {}
    for (targets, rank, rate), metrics in results:
        name = targets if targets == FULL else f"{targets}, r {rank}"
        lines.setdefault(name, []).append((float(rate), metrics["training"]["eval_loss"]))
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=name, linewidth=1.5)
    axes.set(xscale="log", xlabel="learning rate", ylabel="held-out loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)
    print(path)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 8, 16, 64])
    parser.add_argument("--rates", nargs="+", default=["2e-4", "5e-4", "1e-3", "2e-3"],
                        help="learning rates of LoRA")  # fmt: skip
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--max_steps", type=int, default=-1, help="stop every run early")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--base", default="models/ptm_tiny_llm_16m_epoch1", help="base folder")
    parser.add_argument("--dataset", default="data/sft_train")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "bench" / "lora_vs_full")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
