"""Packed rows: no leak between documents, no cut inside a sentence, exact and resumable mixture."""

import pytest
import torch

from tinyllm.pretrain.model import IGNORE_INDEX, PackedLoss, build_model
from tinyllm.pretrain.packing import Mixture, cut, to_tensors
from tinyllm.pretrain.settings import ModelSettings

TINY = ModelSettings(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2,
    num_key_value_heads=1, head_dim=16, max_length=32,
)  # fmt: skip


def pieces_of(*lengths, first=2):
    return [[first + i] * (length - 1) + [1] for i, length in enumerate(lengths)]


def many_pieces(seed, number=50):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 20, (number,), generator=generator)
    return [torch.randint(2, 64, (int(n),), generator=generator).tolist() for n in lengths]


def test_rows_look_as_drawn_in_the_module():
    batch = to_tensors([[[5, 6, 1], [7, 8, 9, 1]]], 8, pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 1, 7, 8, 9, 1, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
    x = IGNORE_INDEX
    assert batch["labels"].tolist() == [[6, 1, x, 8, 9, 1, x, x]]


def test_packed_logits_equal_those_of_the_documents_alone():
    model = build_model(TINY, seed=1).eval()
    row = many_pieces(0)[:3]
    batch = to_tensors([row], 64, pad_id=0)
    with torch.no_grad():
        packed = model(
            batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        start = 0
        for piece in row:
            alone = model(torch.tensor([piece]), use_cache=False).logits[0]
            torch.testing.assert_close(
                packed[0, start : start + len(piece)], alone, atol=1e-5, rtol=0
            )
            start += len(piece)


def test_packed_loss_is_the_sum_over_documents():
    model = build_model(TINY, seed=1)
    row = many_pieces(3)[:3]
    packed = PackedLoss(model)(**to_tensors([row, row[:1]], 64, pad_id=0))
    alone = sum(
        model(ids, labels=ids, use_cache=False).loss * (ids.shape[1] - 1)
        for ids in (torch.tensor([piece]) for piece in [*row, row[0]])
    )
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("length", [5, 9, 10, 11, 37, 200])
def test_long_documents_are_cut_after_sentences_and_lose_nothing(length):
    ids = [9 if i % 4 == 3 else 5 for i in range(length)] + [1]
    parts = cut(ids, 10, ends={9})
    assert [i for part in parts for i in part] == ids
    assert all(len(part) <= 10 for part in parts)
    assert all(part[-1] == 9 for part in parts[:-1])


def test_a_stretch_without_sentence_ends_is_cut_at_the_limit():
    assert [len(part) for part in cut([5] * 25, 10, ends={9})] == [10, 10, 5]


def test_every_piece_is_seen_once_per_epoch():
    mixture = Mixture({"a": many_pieces(0)}, {"a": 1.0}, seed=0)
    drawn = [mixture.draw()[1] for _ in range(150)]
    for epoch in range(3):
        assert sorted(drawn[50 * epoch : 50 * (epoch + 1)]) == list(range(50))
    assert drawn[:50] != drawn[50:100]


def test_shares_of_the_tokens_follow_the_weights():
    pieces = {"a": many_pieces(0), "b": many_pieces(1), "unused": many_pieces(2)}
    mixture = Mixture(pieces, {"a": 30.0, "b": 10.0, "absent": 60.0}, seed=0)
    for _ in range(100):
        mixture.next_rows(4, 32)
    assert mixture.tokens["a"] / sum(mixture.tokens.values()) == pytest.approx(0.75, abs=0.01)
    assert set(mixture.tokens) == {"a", "b"}


def test_stream_resumes_exactly():
    pieces, weights = {"a": many_pieces(0), "b": many_pieces(1)}, {"a": 3.0, "b": 1.0}
    first = Mixture(pieces, weights, seed=7)
    for _ in range(40):
        first.next_rows(2, 32)
    second = Mixture(pieces, weights, seed=7)
    second.load_state_dict(first.state_dict())
    assert [first.next_rows(2, 32) for _ in range(40)] == [
        second.next_rows(2, 32) for _ in range(40)
    ]


def test_rows_are_full_never_too_long_and_drop_nothing():
    mixture = Mixture({"a": many_pieces(0), "b": pieces_of(32, 32)}, {"a": 1.0, "b": 1.0}, seed=0)
    taken = 0
    for _ in range(50):
        rows = mixture.next_rows(4, 32)
        assert all(0 < sum(map(len, row)) <= 32 for row in rows)
        taken += sum(len(row) for row in rows)
    assert taken + len(mixture.carried) == sum(mixture.drawn.values())
    fill = sum(mixture.tokens.values()) / (50 * 4 * 32)
    assert fill > 0.9


def test_no_source_with_weight_is_an_error():
    with pytest.raises(ValueError, match="positive weight"):
        Mixture({"a": many_pieces(0)}, {"b": 1.0}, seed=0)
