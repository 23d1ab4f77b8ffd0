"""In which order does a run go through the items of a data set?

Each epoch goes through all items once, in an order that is a function of (seed, epoch). Items of one size may come in
any order (`shuffled`). Images of several sizes cannot lie in one batch; so with buckets (`training/buckets.py`) an
epoch is made of groups of items of one size (`BucketOrder`):

    bucket A   aaaa aaaa a     full groups             aaaa  cccc  bbbb  aaaa  cccc   shuffled among each other,
    bucket B   bbbb bb         and what is left                                       with the mixed ones
    bucket C   cccc cccc       over                    abb   mixed groups

A group has as many items as a step has samples, so most steps hold one size. An epoch rarely ends where a step ends:
the step goes on with the next epoch, and both halves of it are taken from what is left over. Every item comes exactly
once an epoch, however few items its bucket has.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from training.randomness import derive_seed


@lru_cache(maxsize=2)
def shuffled(seed: int, epoch: int, count: int) -> np.ndarray:
    """The numbers 0..count-1 in the order of the epoch: (count,) int64."""
    return np.random.default_rng(derive_seed("order", seed, epoch)).permutation(count)


@dataclass(eq=False)
class BucketOrder:
    """The order of items of several sizes. buckets: the bucket of each item, (count,) integers; group: how many items
    of one bucket follow each other, from sample 0 of the run on."""

    seed: int
    buckets: np.ndarray
    group: int

    def epoch(self, epoch: int) -> np.ndarray:
        """The numbers of all items in the order of the epoch: (count,) int64."""
        return _epoch(self, epoch)


@lru_cache(maxsize=2)
def _epoch(order: BucketOrder, epoch: int) -> np.ndarray:
    count, group = len(order.buckets), order.group
    rng = np.random.default_rng(derive_seed("order", order.seed, epoch))
    head = min(count, -epoch * count % group)  # samples that complete the group in which the epoch before ended
    tail = (count - head) % group  # samples of the group in which this epoch ends
    permutation = rng.permutation(count)
    groups, rest = [], []
    for bucket in rng.permutation(np.unique(order.buckets)):
        items = permutation[order.buckets[permutation] == bucket]
        full = len(items) // group * group
        groups += list(items[:full].reshape(-1, group))
        rest.append(items[full:])
    if sum(map(len, rest)) < head + tail:  # by less than a group, since both have the remainder of `count`
        rest.append(groups.pop(rng.integers(len(groups))))
    begin, mixed, end = np.split(np.concatenate(rest), [head, sum(map(len, rest)) - tail])
    groups += list(mixed.reshape(-1, group))
    return np.concatenate([begin, *(groups[k] for k in rng.permutation(len(groups))), end])
