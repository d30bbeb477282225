"""The comparison on one base shape: which settings, then trainings in turn, then the numbers."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, replace
from statistics import median

from train_speed_jobs import (
    CANDIDATES,
    FAMILIES,
    LORA,
    OURS,
    RECIPE,
    ROWS_PER_STEP,
    TRL,
    Candidate,
    ChildError,
    Runner,
    Shape,
    Work,
)
from train_speed_limit import flops_of_step
from train_speed_setup import base_of, mean_lengths, prepare_work, say
from train_speed_table import Measured, is_correct, seconds_per_step, summarise

from tinyllm.errors import UserError

WORTH_TRYING = 0.75  # bf16 is tried where its products are at least this fast, relative to fp32
TRIAL_STEPS = 3  # the first one does not count


class ShapeRun:
    """The comparison on one shape.

    Attributes:
        reference: the loss of step 1, as TRL computes it in float32.
        notes: what else a reader of the table should know.
        limits: GFLOP/s by dtype, measured at the start and after each of our trainings.
    """

    def __init__(self, shape: Shape, arguments: Namespace, runner: Runner) -> None:
        self.arguments, self.runner = arguments, runner
        steps = arguments.steps or shape.steps
        self.shape = replace(shape, steps=steps, recipe_steps=min(steps, shape.recipe_steps))
        self.work = prepare_work(
            base_of(shape, arguments.embedded, runner), arguments.dataset,
            ROWS_PER_STEP * steps, arguments.dropout, runner, shape.name,
        )  # fmt: skip
        self.tokens, self.supervised = mean_lengths(self.work)
        self.reference: float | None = None
        self.notes: list[str] = []
        self.limits: list[dict] = []

    def measure(self) -> dict:
        """Limit, choice of settings, trainings in turn; everything for the table."""
        say(f"== {self.shape.name}: the machine's GEMM limit ...")
        self._measure_limit()
        chosen = self._choose(self.limits[0])
        results = self._train_in_turn(chosen)
        limit = middle_of(self.limits)
        rows = [self._summary(c, results[c.name], limit) for c in chosen]
        self._check(rows)
        return {
            "shape": self.shape.name, "base": self.work.base.name, "limit_gflops": limit,
            "steps": self.shape.steps, "warm_up": self.arguments.warm_up,
            "repeat": self.arguments.repeat, "dropout": self.arguments.dropout,
            "tokens_per_row": self.tokens, "supervised_per_row": self.supervised,
            "chosen": {c.family: c.name for c in chosen}, "rows": [asdict(row) for row in rows],
            "losses": {name: found[-1]["losses"] for name, found in results.items()},
            "notes": self.notes,
        }  # fmt: skip

    def _measure_limit(self) -> None:
        """Once more: a machine's speed wanders within minutes, and the trainings' with it."""
        found = self.runner.limit(
            linears=self.shape.linears, layers=self.shape.config["num_hidden_layers"],
            head=self.shape.head, tokens=round(self.tokens * ROWS_PER_STEP),
            supervised=round(self.supervised * ROWS_PER_STEP),
        )  # fmt: skip
        self.limits.append(found)

    def _choose(self, limit: dict) -> list[Candidate]:
        """The fastest correct candidate of each family; TRL first, whose loss is the reference."""
        slow = limit["bfloat16"]["own"] < WORTH_TRYING * limit["float32"]["own"]
        skip_bf16 = slow and not self.arguments.try_all
        if skip_bf16:
            self.notes.append("bf16 was not tried: its products are slower here than fp32's")
        best = {}
        for family in (TRL, OURS, RECIPE):
            candidates = [c for c in CANDIDATES if c.family == family]
            if skip_bf16:
                candidates = [c for c in candidates if c.precision != "bfloat16"]
            best[family] = candidates[0] if len(candidates) == 1 else self._fastest(candidates)
        return [best[family] for family in FAMILIES]

    def _fastest(self, candidates: list[Candidate]) -> Candidate:
        """Try each candidate for a moment.

        Raises:
            UserError: none of them trains correctly.
        """
        tried = [(self._try(candidate), candidate) for candidate in candidates]
        correct = [(seconds, candidate) for seconds, candidate in tried if seconds is not None]
        if not correct:
            raise UserError(f"{candidates[0].family} does not train here: {self.notes[-1]}")
        return min(correct, key=lambda pair: pair[0])[1]

    def _try(self, candidate: Candidate) -> float | None:
        """Seconds of a step, None when the candidate fails or its loss is wrong."""
        try:
            result = self.runner.train(candidate, self.work, TRIAL_STEPS)
        except ChildError as error:
            self._note(str(error))
            return None
        seconds, loss = seconds_per_step(result, 1), result["losses"][0]
        self.reference = loss if self.reference is None else self.reference
        right = is_correct(loss, self.reference, candidate.precision)
        self._note(
            f"tried {candidate.name}: {ROWS_PER_STEP / seconds:.2f} examples/s, loss at step 1 "
            f"{loss:.5f}" + ("" if right else f", WRONG ({self.reference:.5f} is right): not used")
        )
        return seconds if right else None

    def _train_in_turn(self, chosen: list[Candidate]) -> dict[str, list[dict]]:
        """Results by the candidate's name, one for each repeat."""
        results: dict[str, list[dict]] = {candidate.name: [] for candidate in chosen}
        for turn in range(1, self.arguments.repeat + 1):
            for candidate in chosen:
                if candidate.family == RECIPE and turn > 1:
                    continue  # 512 tokens a row, always: one training tells
                steps = self._steps(candidate) + self.arguments.warm_up
                result = self.runner.train(candidate, self.work, steps)
                results[candidate.name].append(result)
                rate = ROWS_PER_STEP / seconds_per_step(result, self.arguments.warm_up)
                say(f"   turn {turn}, {candidate.name}: {rate:.2f} examples/s")
                if candidate.family == OURS:
                    self._measure_limit()
        return results

    def _steps(self, candidate: Candidate) -> int:
        return self.shape.recipe_steps if candidate.family == RECIPE else self.shape.steps

    def _summary(self, candidate: Candidate, results: list[dict], limit: dict) -> Measured:
        flops = flops_of_step(
            self.shape.linears, self.shape.config["num_hidden_layers"], self.shape.head, LORA["r"],
            self.tokens * ROWS_PER_STEP, self.supervised * ROWS_PER_STEP,
        )  # fmt: skip
        return summarise(
            candidate, results, self.arguments.warm_up, ROWS_PER_STEP, self.supervised, flops,
            limit[candidate.precision]["own"], self.shape.steps + self.arguments.warm_up,
        )  # fmt: skip

    def _check(self, rows: list[Measured]) -> None:
        """Note a tool whose first loss is not the reference: it has done other work."""
        for row in rows:
            if not is_correct(row.first_loss, self.reference, row.precision):
                self._note(
                    f"WRONG: {row.family} has loss {row.first_loss:.5f} at step 1, "
                    f"TRL in fp32 {self.reference:.5f}: its speed does not count"
                )

    def _note(self, text: str) -> None:
        self.notes.append(text)
        say(f"   {text}")


def middle_of(limits: list[dict]) -> dict:
    """The median of each number of several measurements."""
    return {
        dtype: {kind: median(one[dtype][kind] for one in limits) for kind in limits[0][dtype]}
        for dtype in limits[0]
    }


def measure_start_up(work: Work, repeat: int, runner: Runner) -> dict:
    """Our default command up to its first step, beside what it cannot do without."""
    pairs = [
        (runner.import_and_load(work), runner.start_up_of_default_data(work)) for _ in range(repeat)
    ]
    return {
        "base": work.base.name, "import_and_load": median(pair[0] for pair in pairs),
        "default_command": median(pair[1] for pair in pairs),
    }  # fmt: skip
