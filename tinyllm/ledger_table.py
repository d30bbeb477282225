"""The ledger as the lines that are printed before step 1."""

from __future__ import annotations

from collections import Counter

from tinyllm.ledger import FileLedger, Ledger, total

COUNTS = {
    "read": "num_read", "kept": "num_kept", "refused": "refused", "dropped": "dropped",
    "shortened": "shortened", "duplicates": "num_duplicates", "held out": "num_held_out",
}  # fmt: skip
WEIGHT_COUNTS = {"left out": "num_left_out", "examples": "num_examples"}
SHOWN_FILES = 20
SHOWN_PATH = 50
SHOWN_NAMES = 10
SHOWN_REASONS = 10


def table(ledger: Ledger) -> str:
    """Counts by file, sizes, refused rows by reason, and what else is worth a look."""
    lines = _aligned(_rows(ledger.files))
    for name, part in (("train", ledger.train), ("held-out", ledger.held_out)):
        lines.append(f"{name}: {part.line if part else 'none'}")
    lines += _refusals(ledger.files) + _remarks(ledger)
    return "\n".join(f"  {line}" for line in lines)


def _rows(files: list[FileLedger]) -> list[list[str]]:
    """Header and one row a file; columns about weights only where a file has one."""
    weighted = any(file.weight != 1 for file in files)
    rows = [["file", *COUNTS] + ["weight", *WEIGHT_COUNTS] * weighted]
    shown = files if len(files) <= SHOWN_FILES else files[: SHOWN_FILES - 1]
    rest = files[len(shown) :]
    for file in shown:
        rows.append(_cells(_tail(file.file), [file], f"{file.weight:g}", weighted))
    if rest:
        rows.append(_cells(f"{len(rest):,} more files", rest, "", weighted))
    if len(files) > 1:
        rows.append(_cells("all", files, "", weighted))
    return rows


def _refusals(files: list[FileLedger]) -> list[str]:
    """Refused rows by reason, each with the first place."""
    reasons = Counter(why for file in files for _, why in file.refused)
    first = {why: f"{file.file}:{line}"
             for file in reversed(files) for line, why in reversed(file.refused)}  # fmt: skip
    lines = [f"refused {number:,} x: {why} (first {first[why]})"
             for why, number in reasons.most_common(SHOWN_REASONS)]  # fmt: skip
    if len(reasons) > SHOWN_REASONS:
        lines.append(f"refused for {len(reasons) - SHOWN_REASONS:,} more reasons")
    return lines + ["every refused row: data_report.json"] * bool(reasons)


def _remarks(ledger: Ledger) -> list[str]:
    remarks = []
    repeated, asked, known = ledger.duplicates, ledger.conflicts, ledger.overlap
    if repeated.number:
        what = _number(repeated.number, "row repeats", "rows repeat")
        remarks.append(f"{what} an earlier one, first {repeated.first[0]}")
    if asked.number:
        what = _number(asked.number, "question has", "questions have")
        remarks.append(f"{what} several different answers, first {asked.first[0]}")
    if known.number:
        what = _number(known.number, "held-out row asks", "held-out rows ask")
        remarks.append(f"warning: {what} what is also trained on, first {known.first[0]}: "
                       "the held-out loss flatters")  # fmt: skip
    unused = sorted({name for file in ledger.files for name in file.unused_columns})
    if unused:
        remarks.append(f"columns not used: {_some(unused)}")
    if ledger.other_files:
        remarks.append(f"files not read: {_some(ledger.other_files)}")
    return remarks


def _cells(name: str, files: list[FileLedger], weight: str, weighted: bool) -> list[str]:
    """One row of the table: sums over some files."""
    cells = [name, *(f"{total(files, count):,}" for count in COUNTS.values())]
    more = [weight, *(f"{total(files, count):,}" for count in WEIGHT_COUNTS.values())]
    return cells + more * weighted


def _tail(path: str) -> str:
    return path if len(path) <= SHOWN_PATH else f"…{path[1 - SHOWN_PATH :]}"


def _some(names: list[str]) -> str:
    more = f", and {len(names) - SHOWN_NAMES:,} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


def _number(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Columns side by side, the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
