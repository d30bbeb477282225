"""From extracted documents to a clean corpus: cleaned, deduplicated, split by document.

Writes `train.jsonl`, `heldout.jsonl` (one document a line) and `counts.json` into one folder.
"""

import hashlib
import json
import logging
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tinyllm.errors import UserError
from tinyllm.pretrain.extract import EXTRACTORS, Document, clean_line
from tinyllm.pretrain.own_text import (
    chat_documents,
    own_documents,
    pattern_documents,
    turn_documents,
)
from tinyllm.pretrain.sources import SOURCES

log = logging.getLogger(__name__)

HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
WEB_PAGES = {
    "libreoffice-help-zh-cn",
    "openclaw",
    "debian-handbook",
}  # with repeated page furniture
MIN_HAN_SHARE = 0.2  # of a line of fetched text, white space not counted
MIN_HAN = 20  # of a fetched document
REPEATED_LINE = 20  # pages on which a line may stand before it counts as furniture
HELDOUT_PER_MILLE = 25
SHINGLE, NUM_HASHES, BAND = 5, 64, 4  # near-duplicates: characters, minima, minima per band
SIMILAR = 0.8


def has_enough_han(line: str) -> bool:
    """Whether a line is Chinese prose rather than code, a path or another language."""
    return len(HAN.findall(line)) >= MIN_HAN_SHARE * len(line.replace(" ", ""))


def clean(documents: list[Document], source: str) -> list[Document]:
    """Documents with clean lines. Our own text keeps every line; fetched text only Chinese ones,
    and web pages lose the lines that stand on more than `REPEATED_LINE` pages.
    """
    own = source == "own"
    lines_of = [[clean_line(line) for line in d["text"].split("\n")] for d in documents]
    pages = Counter(line for lines in lines_of for line in set(lines))
    kept = []
    for doc, lines in zip(documents, lines_of, strict=True):
        if not own:
            lines = [line for line in lines if has_enough_han(line)]
        if source in WEB_PAGES:
            lines = [line for line in lines if pages[line] <= REPEATED_LINE]
        text = "\n".join(line for line in lines if line)
        if text and (own or source in EVALUATION or len(HAN.findall(text)) >= MIN_HAN):
            kept.append({**doc, "text": text})
    return kept


EVALUATION = {source.name for source in SOURCES if source.use == "evaluate"}


def minhash(text: str, seeds: np.ndarray) -> np.ndarray:
    """MinHash signature (NUM_HASHES,) of the character shingles (Broder 1997)."""
    shingles = {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}
    values = np.fromiter((zlib.crc32(s.encode()) for s in shingles), np.uint64, len(shingles))
    mixed = (values[:, None] * seeds[0] + seeds[1]) >> np.uint64(32)  # wraps modulo 2**64
    return mixed.min(axis=0)


def drop_duplicates(documents: Iterable[Document]) -> tuple[list[Document], int, int]:
    """(kept, number of exact duplicates, number of near-duplicates); the first one stays."""
    seeds = np.random.default_rng(0).integers(1, 2**63, (2, NUM_HASHES), dtype=np.uint64) | 1
    exact: set[str] = set()
    bands: dict[tuple[int, bytes], list[np.ndarray]] = defaultdict(list)
    kept, num_exact, num_near = [], 0, 0
    for doc in documents:
        text = re.sub(r"\s", "", doc["text"])
        if text in exact:
            num_exact += 1
            continue
        exact.add(text)
        signature = minhash(text, seeds)
        keys = [(i, signature[i : i + BAND].tobytes()) for i in range(0, NUM_HASHES, BAND)]
        if any(np.mean(signature == s) >= SIMILAR for key in keys for s in bands.get(key, ())):
            num_near += 1
            continue
        for key in keys:
            bands[key].append(signature)
        kept.append(doc)
    return kept, num_exact, num_near


def is_heldout(identity: str) -> bool:
    """A fixed share of the documents, chosen by a hash of the id alone."""
    return int(hashlib.sha256(identity.encode()).hexdigest()[:8], 16) % 1000 < HELDOUT_PER_MILLE


def split(documents: list[Document], source: str) -> tuple[list[Document], list[Document]]:
    """(train, held-out); sources for evaluation are held out whole."""
    if source in EVALUATION:
        return [], documents
    held = [d for d in documents if is_heldout(d["id"])]
    return [d for d in documents if not is_heldout(d["id"])], held


def write_jsonl(path: Path, documents: list[Document]) -> None:
    """One document a line, complete or not there at all."""
    text = "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def read_jsonl(path: Path) -> list[Document]:
    """The documents of a file written by `write_jsonl`."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def by_source(documents: list[Document]) -> dict[str, list[str]]:
    """Texts of each source, in the order of the file."""
    texts: dict[str, list[str]] = {}
    for doc in documents:
        texts.setdefault(doc["source"], []).append(doc["text"])
    return texts


def inputs_digest(own_folder: Path, paths: dict[str, Path]) -> str:
    """A hash of everything that the corpus is made from: our files, packages, this code's rules."""
    digest = hashlib.sha256()
    for path in sorted(own_folder.glob("*.txt")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for name in sorted(paths):
        digest.update(f"{name} {next(s.sha256 for s in SOURCES if s.name == name)}".encode())
    for module in ("corpus.py", "extract.py", "own_text.py", "patterns.py", "../chat_format.py"):
        digest.update(Path(__file__).parent.joinpath(module).read_bytes())
    return digest.hexdigest()[:16]


def build(own_folder: Path, paths: dict[str, Path], folder: Path) -> dict:
    """Build the corpus unless the folder already holds it; return its counts."""
    digest, counts_path = inputs_digest(own_folder, paths), folder / "counts.json"
    if counts_path.exists():
        counts = json.loads(counts_path.read_text(encoding="utf-8"))
        if counts["digest"] == digest:
            log.info("corpus %s: up to date", digest)
            return counts
        log.info("corpus: text changed, building again")
    chat_only = {"patterns": pattern_documents(own_folder), "turns": turn_documents(own_folder)}
    extracted = {"own": own_documents(own_folder)}
    extracted |= {name: list(EXTRACTORS[name](path)) for name, path in paths.items()}
    train, heldout, table = [], [], {}
    for source, documents in extracted.items():
        cleaned = clean(documents, source)
        kept, num_exact, num_near = drop_duplicates(cleaned)
        source_train, source_held = split(kept, source)
        train += source_train
        heldout += source_held
        table[source] = {
            "read": len(documents), "not_chinese": len(documents) - len(cleaned),
            "duplicates": num_exact, "near_duplicates": num_near,
            "train": len(source_train), "heldout": len(source_held),
            "train_characters": sum(len(d["text"]) for d in source_train),
            "heldout_characters": sum(len(d["text"]) for d in source_held),
        }  # fmt: skip
    train += add_chats(train, table)
    for source, documents in chat_only.items():
        train += add_chat_only(source, documents, table)
    if not train:
        raise UserError(f"no text: put *.txt files with some into {own_folder}")
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "heldout.jsonl", heldout)
    counts = {"digest": digest, "sources": table}
    counts_path.write_text(json.dumps(counts, indent=1, ensure_ascii=False), encoding="utf-8")
    log.info("corpus %s:\n%s", digest, format_counts(table))
    return counts


def add_chats(train: list[Document], table: dict[str, dict[str, int]]) -> list[Document]:
    """Our training question-and-answer text once more in the chat format, counted in the table."""
    chats = chat_documents([doc for doc in train if doc["source"] == "own"])
    table["chat"] = counts_of(chats, len(chats), table)
    return chats


def add_chat_only(
    source: str, read: list[Document], table: dict[str, dict[str, int]]
) -> list[Document]:
    """Conversations that are read in the chat format only, counted in the table; none of them is held out."""
    documents = list({doc["text"]: doc for doc in read}.values())
    table[source] = counts_of(documents, len(read), table)
    return documents


def counts_of(documents: list[Document], num_read: int, table: dict[str, dict[str, int]]) -> dict:
    """A row of the table for documents that are all trained on, of so many without their duplicates."""
    return dict.fromkeys(table["own"], 0) | {
        "read": num_read, "duplicates": num_read - len(documents), "train": len(documents),
        "train_characters": sum(len(doc["text"]) for doc in documents),
    }  # fmt: skip


def format_counts(table: dict[str, dict[str, int]]) -> str:
    """The counts as an aligned table, one source a line."""
    columns = list(next(iter(table.values())))
    head = f"{'source':24}" + "".join(f"{c.replace('_', ' '):>20}" for c in columns)
    rows = [f"{s:24}" + "".join(f"{row[c]:>20,}" for c in columns) for s, row in table.items()]
    return "\n".join([head, *rows])
