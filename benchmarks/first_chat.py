"""How well does the default run answer?  Asks held-out questions and counts.

    python benchmarks/first_chat.py --base_model BASE --lora_model RUN [--transcript FILE]
    … --questions benchmarks/first_lines.jsonl    300 others without expected words, for a reader to judge
    … --questions benchmarks/fresh_lines.jsonl    150 more, and 50 of them again as a second turn

A reply is right when it contains one string of ``any_of`` and none of ``none_of`` (spaces aside);
it stops when the model ends it by itself within 200 tokens; it repeats when a phrase of four or more
characters stands in it three times.  The questions lie in first_chat.jsonl, none of them is in the training
rows.  Replies are greedy, so the result is the same on every run.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tinyllm.chat_format import DEFAULT_SYSTEM_PROMPT, chat_format_of
from tinyllm.errors import UserError, run_program
from tinyllm.formats import RowError
from tinyllm.readers import read_rows

QUESTIONS = Path(__file__).with_name("first_chat.jsonl")
EXPECTED = '{"question": "...", "before": ["...", ...], "kind": "..."}, the last two if wanted'
MAX_NEW_TOKENS = 200
REPEATED = re.compile(r"(.{4,}?).*?\1.*?\1", re.DOTALL)


def is_right(reply: str, question: dict) -> bool:
    """Whether a reply holds what it should and nothing that it should not."""
    text = reply.replace(" ", "")
    wanted, unwanted = question.get("any_of", []), question.get("none_of", [])
    return (not wanted or any(w in text for w in wanted)) and not any(u in text for u in unwanted)


def ask(model, tokenizer, questions: list[dict]) -> list[dict]:
    """Answer every question greedily, each in a conversation of its own, after the turns ``before`` it if it has any."""
    from tinyllm.generate import generate_reply

    chat_format, answered = chat_format_of(tokenizer), []
    for number, question in enumerate(questions, 1):
        turns = [*question.get("before", []), question["question"]]
        messages = [{"role": "system", "content": DEFAULT_SYSTEM_PROMPT}]
        for said in turns:
            messages.append({"role": "user", "content": said})
            reply = generate_reply(
                model, tokenizer, chat_format, messages, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
            )  # fmt: skip
            messages.append({"role": "assistant", "content": reply.text})
        answered.append(
            {
                "kind": question["kind"], "question": " / ".join(turns), "reply": reply.text,
                "right": is_right(reply.text, question), "stopped": reply.stopped,
                "repeats": bool(REPEATED.search(reply.text)),
            }
        )  # fmt: skip
        print(f"\r{number} of {len(questions)}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return answered


def table(answered: list[dict]) -> str:
    """Counts by kind."""
    kinds = defaultdict(list)
    for answer in answered:
        kinds[answer["kind"]].append(answer)
    lines = [f"{'kind':12} {'right':>9} {'stopped':>9} {'repeats':>9}"]
    for kind, group in [*kinds.items(), ("all", answered)]:
        counts = [
            f"{sum(a[k] for a in group)}/{len(group)}" for k in ("right", "stopped", "repeats")
        ]
        lines.append(f"{kind:12} " + " ".join(f"{count:>9}" for count in counts))
    return "\n".join(lines)


def as_lines(answered: list[dict]) -> str:
    """One JSON object per reply."""
    return "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answered)


def as_markdown(answered: list[dict]) -> str:
    """The counts, then every question and reply; a mark says whether it counts as right."""
    rows = [
        f"| {a['kind']} | {a['question']} | {a['reply'].replace('|', '/')} | "
        f"{'yes' if a['right'] else 'no'} |".replace("\n", " ")
        for a in answered
    ]
    head = ["| kind | question | reply | right |", "|---|---|---|---|"]
    return "\n".join(["```", table(answered), "```", "", *head, *rows]) + "\n"


def is_question(row: object) -> bool:
    """Whether a row is a question: a text, as its kind and the turns before it."""
    if not isinstance(row, dict) or not isinstance(row.get("before", []), list):
        return False
    texts = [*row.get("before", []), row.get("question"), row.get("kind", "any")]
    return all(isinstance(text, str) and text.strip() for text in texts)


def read_questions(kinds: str | None, path: Path = QUESTIONS) -> list[dict]:
    """The questions of a file, all of them or those of some kinds; one without a kind is of the kind "any".

    Raises:
        UserError: the file cannot be read, a line that is no question, none at all, or a kind that none of them is of.
    """
    questions = []
    for line, row in read_rows(path):
        if isinstance(row, RowError) or not is_question(row):
            reason = row if isinstance(row, RowError) else f"expected {EXPECTED}"
            raise UserError(f"--questions {path}, line {line}: {reason}")
        questions.append({"kind": "any", **row})
    if not questions:
        raise UserError(f"--questions {path}: there is none in it")
    known = {q["kind"] for q in questions}
    chosen = known if kinds is None else set(kinds.split(","))
    if unknown := chosen - known:
        raise UserError(f"--kinds {min(unknown)}: expected some of {', '.join(sorted(known))}")
    return [q for q in questions if q["kind"] in chosen]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base_model", required=True)
    parser.add_argument("--lora_model", help="without it the base alone is asked")
    parser.add_argument(
        "--transcript", help="write questions and replies to this file: .jsonl, or .md"
    )
    parser.add_argument("--questions", type=Path, default=QUESTIONS, help="JSON lines of others")
    parser.add_argument("--kinds", help="only these, separated by commas, as identity,greeting")
    args = parser.parse_args()
    questions = read_questions(args.kinds, args.questions)  # refused before the model is loaded
    from tinyllm.quiet import quiet_libraries

    quiet_libraries()
    if args.lora_model:
        from load_lora_model import load_lora_model

        model, tokenizer = load_lora_model(args.base_model, args.lora_model)
    else:
        from tinyllm.base import load_base

        model, tokenizer = load_base(args.base_model)
    answered = ask(model, tokenizer, questions)
    if args.transcript:
        write = as_markdown if args.transcript.endswith(".md") else as_lines
        Path(args.transcript).write_text(write(answered), encoding="utf-8")
    print(table(answered))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
