"""The verdict tells the truth: runs built to fail, trained for real, get the right name and reason."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer

from tinyllm.base import read_json
from tinyllm.chat_format import IGNORE_INDEX, chat_format_of
from tinyllm.command_line import parse_settings
from tinyllm.data import Data
from tinyllm.examples import Examples
from tinyllm.ledger import Ledger
from tinyllm.lora import add_lora
from tinyllm.report.evidence import measure
from tinyllm.report.files import training_numbers
from tinyllm.report.texts import LEVELS, REASONS, verdict_line
from tinyllm.report.verdict import judge
from tinyllm.trainer import SftTrainer

# 12 towns, each with its own river: a question has one right answer.  The held-out questions join
# words that the training rows have, in pairs that they have not.
TOWNS = [f"{a}{b}" for a in "东西南北" for b in "山河湖"]
RIVERS = [f"{b}{a}江" for a in "红白青" for b in "长大清金"]
LEADS, ENDS = ("请问", "你知道", "告诉我"), ("有什么江？", "的江叫什么？", "的江是哪条？")
PAIRS = [(lead, end) for lead in LEADS for end in ENDS]


def rows(asks: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [
        (f"{lead}{town}{end}", f"{river}。")
        for lead, end in asks
        for town, river in zip(TOWNS, RIVERS, strict=True)
    ]


HELD_OUT = rows([PAIRS[0], PAIRS[4], PAIRS[8]])
TRAIN = rows([pair for place, pair in enumerate(PAIRS) if place not in (0, 4, 8)])


@dataclass
class Outcome:
    evidence: dict
    training: dict

    @property
    def verdict(self):
        return judge(self.evidence, self.training)

    @property
    def level(self) -> str:
        return self.verdict.level

    @property
    def reasons(self) -> list[str]:
        return [reason.name for reason in self.verdict.reasons]


@pytest.fixture(scope="module")
def speaker():
    """A tokenizer that knows these words, and its chat format."""
    tokenizer = make_tokenizer([f"{q}{a}" for q, a in TRAIN + HELD_OUT], 400)
    return tokenizer, chat_format_of(tokenizer)


def encode(pairs, chat_format) -> list[tuple[list[int], list[int]]]:
    found = []
    for question, answer in pairs:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        encoded = chat_format.encode(turns)
        found.append((encoded.input_ids, encoded.labels))
    return found


@pytest.fixture
def run(speaker, tmp_path):
    """Train a tiny model through the real Trainer, measure it, and give what is judged."""
    tokenizer, chat_format = speaker

    def train(train_rows, *words: str, held_out=None) -> Outcome:
        settings, _ = parse_settings([
            "--output_dir", str(tmp_path), "--use_cpu", "True", "--save_strategy", "no",
            "--eval_strategy", "epoch", "--disable_tqdm", "True", "--report_to", "none",
            "--per_device_train_batch_size", "12", "--gradient_accumulation_steps", "1",
            "--lora_r", "32", "--lora_alpha", "64", "--lora_dropout", "0", "--learning_rate", "2e-3",
            "--num_train_epochs", "15", "--report_replies", "0", "--lr_scheduler_type", "constant",
            "--system_prompt", "", *words,
        ])  # fmt: skip
        torch.manual_seed(0)
        examples = Examples.from_lists(train_rows)
        kept = Examples.from_lists(held_out or encode(HELD_OUT, chat_format))
        base = make_model(len(tokenizer), hidden_size=64, intermediate_size=128)
        base.save_pretrained(tmp_path / "base")
        settings.base.base_model_path = str(tmp_path / "base")
        trainer = SftTrainer(
            add_lora(base, settings.lora), settings.training, examples, kept, tokenizer, 64
        )
        before = trainer.evaluate()["eval_loss"]
        output = trainer.train()
        data = Data(examples, kept, Ledger([], 64), [])
        evidence = measure(trainer.model, tokenizer, chat_format, settings, data)
        history = trainer.state.log_history
        evaluated = [[e["step"], e["eval_loss"]] for e in history if "eval_loss" in e]
        results = {
            "num_steps": trainer.state.global_step, "epoch": trainer.state.epoch,
            "train_loss": output.training_loss, "eval_loss": evaluated[-1][1],
            "eval_loss_before": before,
        }  # fmt: skip
        numbers = training_numbers(
            {"results": results, "settings": {"learning_rate": settings.training.learning_rate}},
            {"eval_loss": evaluated},
        )
        return Outcome(evidence, numbers)

    return train


def test_a_good_run_learned(run, speaker):
    good = run(encode(TRAIN, speaker[1]), "--lr_scheduler_type", "cosine")
    assert good.level == "learned", good.verdict
    assert good.reasons[:2] == ["drop", "stops"]
    assert good.evidence["held_out"]["on"]["loss"] < 0.5 * good.evidence["held_out"]["off"]["loss"]
    assert good.evidence["question"]["on"]["low"] > 0
    assert good.evidence["held_out"]["on"]["stop_probability"] > 0.9


def test_learning_rate_zero(run, speaker):
    still = run(encode(TRAIN, speaker[1]), "--learning_rate", "0", "--num_train_epochs", "1")
    assert (still.level, still.reasons[0]) == ("not_at_all", "learning_rate_zero")
    held_out = still.evidence["held_out"]
    assert held_out["on"] == held_out["off"] and held_out["drop"]["mean"] == 0


@pytest.mark.parametrize(("rate", "level"), [("1e-5", "not_at_all"), ("1e-4", "barely")])
def test_far_too_few_steps(run, speaker, rate, level):
    short = run(encode(TRAIN, speaker[1]), "--max_steps", "2", "--learning_rate", rate)
    assert short.level == level, short.verdict
    reason = {"not_at_all": "no_drop", "barely": "small_drop"}[level]
    assert short.reasons == [reason, "few_steps"]


def test_shuffled_answers(run, speaker):
    """The answers' words are learned, not which answer belongs to which question."""
    wrong = np.random.default_rng(1).permutation(len(TRAIN))
    shuffled = [(q, TRAIN[i][1]) for (q, _), i in zip(TRAIN, wrong, strict=True)]
    mixed = run(encode(shuffled, speaker[1]), "--num_train_epochs", "4",
                "--learning_rate", "5e-3")  # fmt: skip
    assert mixed.evidence["held_out"]["drop"]["low"] > 0, "the loss falls all the same"
    assert mixed.level == "barely", mixed.verdict
    assert mixed.reasons[0] == "question_ignored"


def test_labels_masked_the_wrong_way_round(run, speaker):
    inverted = [
        (ids, [IGNORE_INDEX, *(i if old == IGNORE_INDEX else IGNORE_INDEX
                               for i, old in zip(ids[1:], labels[1:], strict=True))])
        for ids, labels in encode(TRAIN, speaker[1])
    ]  # fmt: skip
    masked = run(inverted, "--num_train_epochs", "3")
    assert (masked.level, masked.reasons[0]) == ("not_at_all", "answers_masked"), masked.verdict


def test_no_end_token(run, speaker):
    eos = speaker[0].eos_token_id
    endless = [
        (ids, [IGNORE_INDEX if label == eos else label for label in labels])
        for ids, labels in encode(TRAIN, speaker[1])
    ]
    run_on = run(endless)
    assert run_on.level == "barely", run_on.verdict
    assert run_on.reasons[0] == "never_stops"
    assert run_on.evidence["supervision"]["with_stop"] == 0


def test_overfitting_on_eight_rows(run, speaker):
    eight = run(encode(TRAIN[:8], speaker[1]), "--num_train_epochs", "80", "--learning_rate", "5e-3",
                "--eval_strategy", "steps", "--eval_steps", "10")  # fmt: skip
    assert eight.level == "overfitted", eight.verdict
    assert eight.reasons[0] in ("past_best", "memorised")
    assert eight.evidence["train"]["on"]["loss"] < 0.1


@pytest.fixture
def good() -> Outcome:
    """Metrics of a run that learned, to be changed one by one."""
    side = {"perplexity": 20.0, "token_accuracy": 0.4}
    part = {
        "rows": 100, "tokens": 2000, "changed": True,
        "off": {**side, "loss": 4.0, "stop_probability": 0.1},
        "on": {**side, "loss": 3.0, "stop_probability": 0.9},
        "drop": {"mean": 1.0, "low": 0.9, "high": 1.1},
    }  # fmt: skip
    gain = {"mean": 0.5, "low": 0.4, "high": 0.6}
    evidence = {
        "held_out": part, "train": copy.deepcopy(part), "general": copy.deepcopy(part),
        "question": {"rows": 60, "off": gain, "on": gain},
        "supervision": {"rows": 100, "share": 0.4, "with_stop": 1.0, "with_markers": 0.0},
    }  # fmt: skip
    training = {"num_steps": 450, "learning_rate": 5e-4, "eval_loss": 3.0, "best_eval_loss": 3.0}
    return Outcome(copy.deepcopy(evidence), training)


def set_drop(part: dict, mean: float) -> None:
    part["on"]["loss"] = part["off"]["loss"] - mean
    part["drop"] = {"mean": mean, "low": mean - 0.01, "high": mean + 0.01}


def worse_general(o):
    set_drop(o.evidence["general"], -1.0)


CHANGES = {
    "no end token": (
        lambda o: (set_drop(o.evidence["held_out"], -0.2),
                   o.evidence["held_out"]["on"].update(stop_probability=0.01),
                   o.evidence["supervision"].update(with_stop=0.0)),
        "not_at_all", "never_stops",
    ),
    "never stops": (
        lambda o: o.evidence["held_out"]["on"].update(stop_probability=0.01),
        "barely", "never_stops",
    ),
    "answers do not depend on questions": (
        lambda o: o.evidence["question"].update(on={"mean": 0.0, "low": -0.1, "high": 0.1}),
        "barely", "question_ignored",
    ),
    "nothing": (lambda o: None, "learned", "drop"),
    "small drop": (lambda o: set_drop(o.evidence["held_out"], 0.1), "barely", "small_drop"),
    "memorised": (lambda o: set_drop(o.evidence["held_out"], -0.2), "overfitted", "memorised"),
    "worse": (
        lambda o: (set_drop(o.evidence["held_out"], -0.2), set_drop(o.evidence["train"], -0.2)),
        "not_at_all", "worse",
    ),
    "uncertain": (
        lambda o: (set_drop(o.evidence["train"], 0.02),
                   o.evidence["held_out"].update(drop={"mean": 0.3, "low": -0.1, "high": 0.7})),
        "not_at_all", "no_drop",
    ),
    "not held out": (lambda o: o.evidence.update(held_out=None), "unknown", "no_held_out"),
    "no effect": (
        lambda o: [o.evidence[n].update(changed=False) for n in ("held_out", "train", "general")],
        "not_at_all", "no_effect",
    ),
    "past best": (
        lambda o: (o.training.update(eval_loss=3.0, best_eval_loss=2.5),
                   set_drop(o.evidence["train"], 3.0)),
        "overfitted", "past_best",
    ),
    "past best, not by memory": (
        lambda o: o.training.update(eval_loss=3.0, best_eval_loss=2.5), "learned", "drop",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_verdict_of_changed_metrics(good, name):
    change, level, reason = CHANGES[name]
    change(good)
    assert (good.level, good.reasons[0]) == (level, reason)


def test_remarks(good):
    worse_general(good)
    good.training["num_steps"] = 3
    good.evidence["supervision"].update(with_stop=0.5, with_markers=0.2)
    good.evidence["held_out"]["rows"], good.evidence["num_also_trained"] = 5, 2
    assert {
        "few_rows",
        "also_trained",
        "forgot",
        "few_steps",
        "rows_without_stop",
        "markers_learned",
    } <= set(good.reasons)


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_every_reason_has_words(good, lang):
    said = set()
    for change, _, _ in CHANGES.values():
        outcome = Outcome(copy.deepcopy(good.evidence), dict(good.training))
        change(outcome)
        line = verdict_line(outcome.verdict.to_json(), lang)
        assert line.startswith(LEVELS[lang][outcome.level]) and "{" not in line
        said |= set(outcome.reasons)
    assert said <= REASONS[lang].keys()
    assert REASONS["zh"].keys() == REASONS["en"].keys()


def test_judging_is_pure(good):
    before = copy.deepcopy((good.evidence, good.training))
    assert judge(good.evidence, good.training) == judge(good.evidence, good.training)
    assert before == (good.evidence, good.training)


def test_the_run_folder_has_the_verdict_of_its_metrics(finished_run):
    metrics = read_json(finished_run / "metrics.json")
    assert metrics["verdict"] == judge(metrics["evidence"], metrics["training"]).to_json()
