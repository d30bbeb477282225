"""Metrics → verdict: learned, barely, overfitted or not at all, with the reasons.

A pure function of the numbers; docs/report.md explains each threshold.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LEARNED, BARELY, OVERFITTED, NOT_AT_ALL, UNKNOWN = (
    "learned", "barely", "overfitted", "not_at_all", "unknown",
)  # fmt: skip

CLEAR_DROP = 0.05  # of the held-out loss, relative: below it, little was learned
ANY_DROP = 0.01  # below it, nothing was learned, however sure the measurement
MEMORISED_DROP = 0.1  # of the loss on training rows, while the held-out loss did not fall
PAST_BEST = 0.05  # how far the held-out loss may end above its best of the run
TRAIN_GAP = 0.15  # how far the training rows' loss must lie below the held-out one to blame it
LOW_STOP = 0.2  # mean probability of the end token after a right answer
FEW_STEPS = 30
FEW_ROWS = 20  # held-out rows, below which an interval means little
FORGOT = 0.15  # rise of the loss on general text, relative


@dataclass(frozen=True)
class Reason:
    """One reason: its name (texts are in ``texts.py``) and the numbers in it."""

    name: str
    values: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What became of a run; the first reason carries the verdict, the others add to it."""

    level: str
    reasons: list[Reason]

    def to_json(self) -> dict:
        return {
            "level": self.level,
            "reasons": [{"name": r.name, "values": r.values} for r in self.reasons],
        }


def judge(evidence: dict, training: dict) -> Verdict:
    """Draw the verdict.

    Args:
        evidence: what :func:`tinyllm.report.evidence.measure` gives.
        training: ``num_steps``, ``learning_rate``, ``eval_loss`` (of the final weights) and
            ``best_eval_loss``, the last two None where nothing was evaluated.
    """
    level, reasons = _level(evidence, training)
    return Verdict(level, reasons + _remarks(evidence, training, level, {r.name for r in reasons}))


def _level(evidence: dict, training: dict) -> tuple[str, list[Reason]]:
    held_out = evidence["held_out"]
    if not _changed(evidence):
        return NOT_AT_ALL, [_no_effect(training)]
    if _answers_masked(evidence["supervision"]):
        return NOT_AT_ALL, [Reason("answers_masked", _mask_values(evidence["supervision"]))]
    if held_out is None:
        return UNKNOWN, [Reason("no_held_out")]
    drop = held_out["drop"]
    relative = relative_drop(held_out)
    values = {"relative": relative, **drop}
    if evidence["supervision"]["with_stop"] < 0.5 and (endless := _never_stops(evidence)):
        # the missing end token alone can raise the loss: name it, not the loss
        fell = drop["low"] > 0
        return (BARELY if fell else NOT_AT_ALL), [
            endless, Reason("drop" if fell else "no_drop", values)
        ]  # fmt: skip
    if drop["low"] <= 0 or relative < ANY_DROP:
        return _without_gain(evidence, values)
    overfitted = _past_best(evidence, training)
    if overfitted:
        return OVERFITTED, [overfitted]
    if relative < CLEAR_DROP:
        return BARELY, [Reason("small_drop", values)]
    flaws = _flaws(evidence)
    return (
        (BARELY, [*flaws, Reason("drop", values)]) if flaws else (LEARNED, [Reason("drop", values)])
    )


def relative_drop(part: dict) -> float:
    """By which share the loss fell, below 0 where it rose."""
    return part["drop"]["mean"] / part["off"]["loss"]


def _changed(evidence: dict) -> bool:
    parts = [evidence[name] for name in ("held_out", "train", "general") if evidence[name]]
    return any(part["changed"] for part in parts)


def _no_effect(training: dict) -> Reason:
    if training["learning_rate"] == 0:
        return Reason("learning_rate_zero")
    if training["num_steps"] == 0:
        return Reason("no_steps")
    return Reason("no_effect")


def _answers_masked(supervision: dict) -> bool:
    """The prompts are learned and no end token is: the mask is the wrong way round."""
    return supervision["with_markers"] > 0.5 and supervision["with_stop"] == 0


def _mask_values(supervision: dict) -> dict:
    return {name: supervision[name] for name in ("with_markers", "with_stop")}


def _without_gain(evidence: dict, values: dict) -> tuple[str, list[Reason]]:
    """The held-out loss did not fall: memorised, made worse, or left as it was."""
    train = evidence["train"]
    if train and train["drop"]["low"] > 0 and relative_drop(train) >= MEMORISED_DROP:
        return OVERFITTED, [Reason("memorised", {"train": relative_drop(train), **values})]
    if values["high"] < 0:
        return NOT_AT_ALL, [Reason("worse", values)]
    return NOT_AT_ALL, [Reason("no_drop", values)]


def _past_best(evidence: dict, training: dict) -> Reason | None:
    best, last = training["best_eval_loss"], training["eval_loss"]
    if best is None or last is None or last <= best * (1 + PAST_BEST):
        return None
    train, held_out = evidence["train"]["on"]["loss"], evidence["held_out"]["on"]["loss"]
    if train > held_out * (1 - TRAIN_GAP):
        return None
    return Reason("past_best", {"best": best, "last": last, "train": train, "held_out": held_out})


def _flaws(evidence: dict) -> list[Reason]:
    """What keeps a run whose loss fell from having learned to answer."""
    flaws = []
    question = evidence["question"]
    if question and question["on"]["low"] <= 0:
        flaws.append(Reason("question_ignored", question["on"]))
    if endless := _never_stops(evidence):
        flaws.append(endless)
    return flaws


def _never_stops(evidence: dict) -> Reason | None:
    off, on = (evidence["held_out"][side]["stop_probability"] for side in ("off", "on"))
    if on >= LOW_STOP:
        return None
    taught = evidence["supervision"]["with_stop"]
    return Reason("never_stops", {"off": off, "on": on, "with_stop": taught})


def _remarks(evidence: dict, training: dict, level: str, said: set[str]) -> list[Reason]:
    """What a reader should know beside the verdict."""
    remarks = []
    if training["num_steps"] < FEW_STEPS and not said & {"learning_rate_zero", "no_steps"}:
        remarks.append(Reason("few_steps", {"steps": training["num_steps"]}))
    held_out = evidence["held_out"]
    if held_out and held_out["rows"] < FEW_ROWS and level != NOT_AT_ALL:
        remarks.append(Reason("few_rows", {"rows": held_out["rows"]}))
    if evidence.get("num_also_trained"):
        remarks.append(Reason("also_trained", {"rows": evidence["num_also_trained"]}))
    supervision = evidence["supervision"]
    if supervision["with_stop"] < 0.99 and not said & {"never_stops", "answers_masked"}:
        remarks.append(Reason("rows_without_stop", _mask_values(supervision)))
    if supervision["with_markers"] > 0 and "answers_masked" not in said:
        remarks.append(Reason("markers_learned", _mask_values(supervision)))
    general = evidence["general"]
    if general and _changed(evidence) and -relative_drop(general) > FORGOT:
        remarks.append(Reason("forgot", {"rise": -relative_drop(general)}))
    if level == LEARNED and evidence["held_out"]:
        stop = evidence["held_out"]["on"]["stop_probability"]
        remarks.insert(0, Reason("stops", {"on": stop}))
    return remarks
