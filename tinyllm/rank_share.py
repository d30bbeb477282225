"""Rows → ranks: every optimizer step holds the rows that one process would take, cut into parts.

accelerate's own sharding repeats rows until all ranks have equally many, so that the last step of
an epoch and the held-out loss depend on the number of processes.  Here nothing is repeated: where
rows do not go round, ranks get uneven shares, down to none at all.
"""

from __future__ import annotations

from collections.abc import Iterator

from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler


class RankShare(Sampler[list[int]]):
    """The rows of one rank, step by step; a list may be shorter than the others', or empty.

    Args:
        steps: the rows of whole steps, the same on every rank.
        rank: whose part to give, from 0.
        num_ranks: how many parts there are.
    """

    def __init__(self, steps: BatchSampler, rank: int, num_ranks: int) -> None:
        self.batch_sampler, self.rank, self.num_ranks = steps, rank, num_ranks
        self.batch_size, self.drop_last = steps.batch_size // num_ranks, steps.drop_last

    @property
    def sampler(self) -> Sampler:
        """The order of the rows; accelerate looks for it here to set the epoch."""
        return self.batch_sampler.sampler

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.batch_sampler:
            first, last = (len(rows) * r // self.num_ranks for r in (self.rank, self.rank + 1))
            yield rows[first:last]


def share_rows(loader: DataLoader, order: Sampler, rows_per_rank: int, accelerator, data_seed):
    """A loader like ``loader`` that gives this rank its share of the rows.

    Args:
        loader: what the Trainer has made; its dataset and worker settings are kept.
        order: the Trainer's sampler; a random one is seeded as for one process.
        rows_per_rank: rows of a rank in a whole step.
    """
    if isinstance(order, RandomSampler):
        order = SeedableRandomSampler(order.data_source, data_seed=data_seed)
    ranks = accelerator.num_processes
    steps = BatchSampler(order, rows_per_rank * ranks, loader.drop_last)
    shared = DataLoader(
        loader.dataset,
        batch_sampler=RankShare(steps, accelerator.process_index, ranks),
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        persistent_workers=loader.persistent_workers,
        prefetch_factor=loader.prefetch_factor,
        multiprocessing_context=loader.multiprocessing_context,
        worker_init_fn=loader.worker_init_fn,
    )
    # as for one process: the shares are cut already
    return prepare_data_loader(
        shared, accelerator.device, num_processes=1, process_index=0, put_on_device=True
    )
