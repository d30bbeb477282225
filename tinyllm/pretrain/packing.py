"""From documents to packed rows: nothing is cut inside a sentence, nothing leaks between documents.

Row of 8 with the documents [5, 6, 1] and [7, 8, 9, 1] (1 ends a document, 0 pads, _ is ignored):

    input_ids     5  6  1 | 7  8  9  1 | 0
    position_ids  0  1  2 | 0  1  2  3 | 0
    labels        6  1  _ | 8  9  1  _ | _

Each document sees only itself: positions restart, and the block-diagonal mask follows from them.
"""

import random
from collections.abc import Iterable

import torch
from transformers import PreTrainedTokenizerFast

from tinyllm.errors import UserError
from tinyllm.pretrain.model import IGNORE_INDEX

Piece = list[int]  # token ids of one document, or of a part of a long one
SENTENCE_ENDS = tuple("。！？；\n”’）")
MAX_CARRIED = 32  # pieces that may wait for the next step because no row had room


def sentence_end_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Ids of the tokens whose text ends a sentence or a line."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return {i for i, text in enumerate(texts) if text.endswith(SENTENCE_ENDS)}


def cut(ids: Piece, max_length: int, ends: set[int]) -> list[Piece]:
    """Cut a long document into pieces of similar length, each at the sentence end nearest to its
    even share; a stretch without a sentence end is cut at `max_length`.

    >>> cut([5, 6, 9, 5, 6, 7, 9, 1], 5, {9})
    [[5, 6, 9], [5, 6, 7, 9, 1]]
    """
    pieces = []
    while len(ids) > max_length:
        share = len(ids) / -(-len(ids) // max_length)
        places = [i + 1 for i in range(max_length) if ids[i] in ends]
        # A place so early that it would only make more pieces is no help.
        places = [p for p in places if p >= max_length // 4] or [max_length]
        place = min(places, key=lambda p: abs(p - share))
        pieces.append(ids[:place])
        ids = ids[place:]
    return [*pieces, ids]


def encode_documents(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> list[Piece]:
    """Pieces of at most `max_length` ids; the end token closes a document, not a part of one."""
    ends, pieces = sentence_end_ids(tokenizer), []
    for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]:
        pieces += cut([*ids, tokenizer.eos_token_id], max_length, ends)
    return [piece for piece in pieces if len(piece) > 1]


class Mixture:
    """An endless stream of packed rows with fixed shares per source.

    The next piece comes from the source that is furthest behind its share of the tokens; inside a
    source every piece is seen once per epoch, in an order that depends on seed and epoch only.
    So the stream is a function of (pieces, weights, seed) and of the small state below.
    """

    def __init__(
        self, pieces: dict[str, list[Piece]], weights: dict[str, float], seed: int | str
    ) -> None:
        self.pieces = {s: p for s, p in sorted(pieces.items()) if p and weights.get(s, 0) > 0}
        if not self.pieces:
            raise UserError("no source with text has a positive weight")
        total = sum(weights[s] for s in self.pieces)
        self.shares = {s: weights[s] / total for s in self.pieces}
        self.seed = seed
        self.drawn = dict.fromkeys(self.pieces, 0)  # pieces taken from each source
        self.tokens = dict.fromkeys(self.pieces, 0)
        self.carried: list[tuple[str, int]] = []
        self.orders: dict[tuple[str, int], list[int]] = {}

    def state_dict(self) -> dict:
        """What is needed to go on exactly here (plain numbers and strings)."""
        return {"drawn": dict(self.drawn), "tokens": dict(self.tokens), "carried": self.carried[:]}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state` was taken."""
        self.drawn, self.tokens = dict(state["drawn"]), dict(state["tokens"])
        self.carried = [tuple(item) for item in state["carried"]]

    def draw(self) -> tuple[str, int]:
        """(source, index) of the next piece."""
        total = sum(self.tokens.values())
        source = max(self.pieces, key=lambda s: self.shares[s] * (total + 1) - self.tokens[s])
        epoch, place = divmod(self.drawn[source], len(self.pieces[source]))
        if (source, epoch) not in self.orders:
            self.orders = {k: v for k, v in self.orders.items() if k[0] != source}
            order = list(range(len(self.pieces[source])))
            random.Random(f"{self.seed}/{source}/{epoch}").shuffle(order)
            self.orders[source, epoch] = order
        index = self.orders[source, epoch][place]
        self.drawn[source] += 1
        self.tokens[source] += len(self.pieces[source][index])
        return source, index

    def next_rows(self, num_rows: int, row_length: int) -> list[list[Piece]]:
        """Rows for one step, each a list of pieces, filled best-fit."""
        rows: list[list[Piece]] = [[] for _ in range(num_rows)]
        room = [row_length] * num_rows
        waiting, self.carried = self.carried, []
        while len(self.carried) < MAX_CARRIED and max(room) > row_length // 16:
            source, index = waiting.pop(0) if waiting else self.draw()
            piece = self.pieces[source][index]
            fitting = [r for r in range(num_rows) if room[r] >= len(piece)]
            if not fitting:
                self.carried.append((source, index))
                continue
            best = min(fitting, key=lambda r: room[r])
            rows[best].append(piece)
            room[best] -= len(piece)
        self.carried += waiting
        return rows

    def epochs(self) -> dict[str, float]:
        """How often each source was seen."""
        return {s: self.drawn[s] / len(self.pieces[s]) for s in self.pieces}


def to_tensors(rows: list[list[Piece]], row_length: int, pad_id: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `position_ids` and shifted `labels`, each (B, T); see the module's drawing."""
    ids, positions, labels = [], [], []
    for row in rows:
        padding = [pad_id] * (row_length - sum(map(len, row)))
        ids.append([i for piece in [*row, padding] for i in piece])
        positions.append([p for piece in [*row, padding] for p in range(len(piece))])
        shifted = [i for piece in row for i in [*piece[1:], IGNORE_INDEX]]
        labels.append(shifted + [IGNORE_INDEX] * len(padding))
    return {
        "input_ids": torch.tensor(ids),
        "position_ids": torch.tensor(positions),
        "labels": torch.tensor(labels),
    }
