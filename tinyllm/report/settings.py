"""Settings of what a run measures and shows about itself."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from tinyllm.errors import UserError
from tinyllm.setting import setting

LOGGERS = ("tensorboard", "wandb", "swanlab", "trackio", "mlflow")
LANGUAGES = ("zh", "en")
# Settings that change nothing about the weights that come out.
REPORT_ONLY = {
    "dry_run", "report", "lang", "report_rows", "report_replies", "probe_prompts", "eval_replies",
}  # fmt: skip


@dataclass
class ReportSettings:
    """What a run says about itself, before, during and after the training."""

    dry_run: bool = setting(
        False,
        "Print the plan (steps, time, memory, files) and stop: nothing is trained or written.",
    )
    report: bool = setting(
        True, "Measure at the end what the training changed: report.html, metrics.json, model card."
    )
    lang: str = setting("zh", "Language of the report: zh or en.")
    report_rows: int = setting(
        200, "Held-out rows measured for the report; a fixed sample when there are more."
    )
    report_replies: int = setting(
        16, "Held-out questions answered for the report, without and with the training."
    )
    probe_prompts: str = setting(
        "", "File with your own questions for the report, one a line; '' for none."
    )
    eval_replies: int = setting(
        2, "Fixed held-out questions answered at every evaluation, to read along; 0 for none."
    )
    early_stopping_patience: int = setting(
        0,
        "Stop after this many evaluations in a row without a better held-out loss; 0 never stops.",
    )
    early_stopping_threshold: float = setting(
        0.0, "How much lower, in nats, a held-out loss must be to count as better."
    )

    def __post_init__(self) -> None:
        if self.lang not in LANGUAGES:
            raise UserError(f"--lang {self.lang}: expected {' or '.join(LANGUAGES)}")
        if self.report_rows < 2:
            raise UserError(f"--report_rows {self.report_rows}: must be 2 or more")
        for name in ("report_replies", "eval_replies", "early_stopping_patience"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)}: must be 0 or more")
        if self.early_stopping_threshold < 0:
            raise UserError(
                f"--early_stopping_threshold {self.early_stopping_threshold}: must be 0 or more"
            )
        if self.probe_prompts:
            read_prompts(self.probe_prompts)


def loggers(names: str | list[str] | None) -> list[str]:
    """The loggers asked for; ``auto`` is TensorBoard where it is installed.

    Raises:
        UserError: the package of one is missing.
    """
    names = [names] if isinstance(names, str) else list(names or [])
    names = [part.strip() for name in names for part in name.split(",") if part.strip()]
    if names == ["auto"]:
        names = ["tensorboard"] if importlib.util.find_spec("tensorboard") else ["none"]
    for name in names:
        if name not in (*INTEGRATION_TO_CALLBACK, "none", "all"):
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise UserError(f"--report_to {name}: unknown; expected none, all or some of {known}")
        if name in LOGGERS and importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name}: it is not installed; pip install {name}")
    return names or ["none"]


def read_prompts(path: str) -> list[str]:
    """The user's own questions: the lines of a UTF-8 file that are not empty.

    Raises:
        UserError: the file is missing, is no text, or has no question.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"--probe_prompts {path}: cannot be read: {reason}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--probe_prompts {path}: no question in it; write one a line")
    return prompts
