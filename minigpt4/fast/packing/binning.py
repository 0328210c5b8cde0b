"""Which sequences of a batch go into the same micro-batch."""

ROW_MULTIPLE = 128


def divide(lengths: list[int], shared: int, tokens_per_micro_batch: int) -> list[list[int]]:
    """Sequences with so many rows of their own, by number, in groups of `tokens_per_micro_batch` at most, or of one that has more.

    A group costs multiples of ROW_MULTIPLE rows: each but the last takes the sequences that leave least of them empty.
    """
    groups, left, most = [], [*range(len(lengths))], max(tokens_per_micro_batch - shared - 1, 1)
    while left:
        own = [lengths[i] for i in left]
        count = min(-(-sum(own) // most), len(left))
        multiples = -(-(sum(own) + count * (shared + 1)) // ROW_MULTIPLE)
        room = min(-(-multiples // max(count, 1)) * ROW_MULTIPLE - shared - 1, most)
        chosen = (
            {*left} if count <= 1 else {left[n] for n in fullest(own, room)} or {max(left, key=lengths.__getitem__)}
        )
        groups.append(sorted(chosen))
        left = [i for i in left if i not in chosen]
    return groups


def fullest(lengths: list[int], room: int) -> list[int]:
    """The lengths, by number, that together come closest to `room` and do not exceed it."""
    sums = [1]  # bit s of sums[n]: some of the first n lengths add up to s
    for length in lengths:
        sums.append((sums[-1] | sums[-1] << length) & (2 << room) - 1)
    total, chosen = sums[-1].bit_length() - 1, []
    for n in reversed(range(len(lengths))):
        if not sums[n] >> total & 1:  # those before do not give it
            chosen.append(n)
            total -= lengths[n]
    return chosen


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
