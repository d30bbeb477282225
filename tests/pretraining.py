"""What the tests of the pretraining share: a tiny model, its text, a run of it."""

from pathlib import Path

from tinyllm.pretrain import __main__ as program
from tinyllm.pretrain.run import Run
from tinyllm.pretrain.settings import Settings

STORIES = [
    f"{name}今天去{place}，买了{number}个{fruit}。回家以后，{name}把{fruit}分给妈妈。"
    for name in ("小明", "小红", "阿姨") for place in ("商店", "市场", "超市")
    for number in ("三", "五") for fruit in ("苹果", "橘子")
]  # fmt: skip


def tiny_settings(tmp_path: Path) -> Settings:
    """Settings of a model that trains in seconds, and its text."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "stories.txt").write_text("\n\n".join(STORIES), encoding="utf-8")
    return Settings(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2,
        num_key_value_heads=1, head_dim=16, max_length=64, own_text=str(own),
        work=str(tmp_path / "work"), export_to=str(tmp_path / "model"), sources="none",
        max_steps=6, warmup_steps=1, rows_per_step=2, rows_per_forward=1, log_steps=1,
        evaluate_passages=2, precision="fp32",
    )  # fmt: skip


def run_of(settings) -> Run:
    return program.build_run(settings)[0]


def losses_of(run, num_steps):
    return [run.train_step() for _ in range(num_steps)]
