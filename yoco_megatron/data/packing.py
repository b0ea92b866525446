"""Whole documents packed into samples: best fit, longest first (Ding et al., "Fewer Truncations Improve Language
Modeling", arXiv 2404.10830), where the stream of documents would be cut every --seq-length tokens.

Lengths alone are packed: documents of the same length are interchangeable, and each epoch deals its own random ones.
"""

from bisect import bisect_left, insort

import numpy as np

Pattern = tuple[int, list[tuple[int, int]]]
"""So many samples, each of which holds documents of (length, so many)."""


def is_packed(packing: str | None, is_masked: bool) -> bool:
    """Whether samples of a dataset hold whole documents: as --sample-packing says, by default where it has a mask."""
    return is_masked if packing is None else packing == "documents"


def best_fit(lengths: np.ndarray, capacity: int) -> list[Pattern]:
    """Samples that hold all documents, each put where the least room is left; documents without tokens are left out.

    Args:
        lengths: tokens of each document, int32 [documents]; longer ones count as `capacity`.
        capacity: tokens of a sample.
    """
    number_of = np.bincount(np.minimum(lengths, capacity), minlength=1)
    number_of[0] = 0
    rooms: list[int] = []  # sorted: tokens that are free in samples which are not full
    samples: dict[int, list[Pattern]] = {}  # by room

    def put(room: int, count: int, held: list[tuple[int, int]]) -> None:
        if room and not samples.get(room):
            insort(rooms, room)
        samples.setdefault(room, []).append((count, held))

    for length in np.flatnonzero(number_of)[::-1].tolist():
        left = int(number_of[length])
        while left:
            held: list[tuple[int, int]]
            place = bisect_left(rooms, length)
            if place == len(rooms):
                room, count, held = capacity, left, []  # new ones, of which no more are kept than are used
            else:
                room = rooms[place]
                count, held = samples[room].pop()
                if not samples[room]:
                    del rooms[place]
            each = min(room // length, left)
            used = min(count, left // each)
            left -= used * each
            put(room - each * length, used, [*held, (length, each)])
            if held and used < count:
                put(room, count - used, held)
    return [pattern for patterns in samples.values() for pattern in patterns]


def number_of_samples(patterns: list[Pattern]) -> int:
    """In one epoch."""
    return sum(count for count, _ in patterns)


def pack(
    documents: np.ndarray, lengths: np.ndarray, capacity: int, samples: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Epochs of packed samples, one after the other, each with every document once and in an order of its own.

    The samples of an epoch do not depend on how many epochs there are.

    Args:
        documents: numbers, int32 [documents].
        lengths: their tokens, int32 [documents].
        capacity: tokens of a sample.
        samples: that are needed at least; None for one epoch.
    Returns:
        (document of each place int32 [places], first place of each sample and the end int64 [samples + 1]).
    """
    clipped = np.minimum(lengths, capacity)
    patterns = best_fit(clipped, capacity)
    of_one = number_of_samples(patterns)
    epochs = 1 if samples is None else -(-samples // of_one)
    order, sizes = [], []
    for epoch in range(epochs):
        random = np.random.RandomState([seed, epoch])  # whose numbers no version of numpy changes
        held, size = _epoch(documents, clipped, patterns, random)
        order.append(held)
        sizes.append(size)
    return np.concatenate(order), np.concatenate([[0], np.cumsum(np.concatenate(sizes), dtype=np.int64)])


def _epoch(
    documents: np.ndarray, lengths: np.ndarray, patterns: list[Pattern], random: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """(documents in the order of shuffled samples, number in each sample)."""
    shuffled = random.permutation(len(documents))
    by_length = documents[shuffled[np.argsort(lengths[shuffled], kind="stable")]]
    following = np.concatenate([[0], np.cumsum(np.bincount(lengths))])[:-1].tolist()  # the next of each length
    dealt, sizes = [], []
    for count, held in patterns:
        columns = []
        for length, each in held:
            end = following[length] + count * each
            columns.append(by_length[following[length] : end].reshape(count, each))
            following[length] = end
        rows = np.concatenate(columns, axis=1)
        dealt.append(rows.ravel())
        sizes.append(np.full(count, rows.shape[1]))
    size = np.concatenate(sizes)
    first = np.cumsum(size) - size
    samples = random.permutation(len(size))
    size = size[samples]
    # Sample after sample, place after place.
    places = np.repeat(first[samples] - (np.cumsum(size) - size), size) + np.arange(size.sum())
    return np.concatenate(dealt)[places], size
