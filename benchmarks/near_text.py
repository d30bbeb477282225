"""Which exam sentences have a near neighbour in our own text?  Two sentences are near when half of
the pairs of neighbouring characters that either has are in both (the Jaccard index of their bigrams).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

NEAR = 0.5
USUAL = 3000  # pairs in more lines than that tell nothing, and cost most of the time
SENTENCE_END = re.compile(r"(?<=[。！？])")


def pairs(text: str) -> frozenset[str]:
    """Pairs of neighbouring characters, punctuation aside."""
    plain = "".join(c for c in text if c.isalnum())
    return frozenset(plain[i : i + 2] for i in range(len(plain) - 1))


class Neighbours:
    """Finds what is near among the sentences of text files."""

    def __init__(self, files: list[Path]) -> None:
        sentences: set[frozenset[str]] = set()
        for file in files:
            for line in file.read_text(encoding="utf-8").splitlines():
                sentences |= {pairs(part) for part in SENTENCE_END.split(line)}
        self.sentences = [s for s in sentences if s]
        self.holding: dict[str, list[int]] = defaultdict(list)
        for index, sentence in enumerate(self.sentences):
            for pair in sentence:
                self.holding[pair].append(index)

    def nearest(self, sentence: str) -> float:
        """The largest Jaccard index with any sentence of the files, 0 to 1."""
        wanted = pairs(sentence)
        shared: Counter[int] = Counter()
        for pair in wanted:
            if len(self.holding.get(pair, ())) <= USUAL:
                shared.update(self.holding.get(pair, ()))
        found = (len(wanted & self.sentences[i]) / len(wanted | self.sentences[i])
                 for i, _ in shared.most_common(60))  # fmt: skip
        return max(found, default=0.0)


def far_from(files: list[Path], sentences: list[str]) -> list[str]:
    """The sentences that have no near neighbour in the files."""
    neighbours = Neighbours(files)
    return [s for s in sentences if neighbours.nearest(s) < NEAR]
