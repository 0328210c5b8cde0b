"""Which sequences of a batch go into the same micro-batch."""

# A micro-batch is padded to a multiple of so many tokens, so that few different lengths occur.
TOKEN_MULTIPLE = 128


def divide(lengths: list[int], prefix_len: int, max_tokens: int) -> list[list[int]]:
    """Indices of sequences in groups of at most `max_tokens` tokens; a sequence that is longer is a group by itself.

    Each group has the `prefix_len` shared tokens once, and one token of padding at least. A group costs a multiple of
    TOKEN_MULTIPLE tokens: each but the last takes the sequences that leave least of it empty.

    Args:
        lengths: tokens of each sequence, the shared ones left out.
    """
    groups, remaining = [], [*range(len(lengths))]
    largest = max(max_tokens - prefix_len - 1, 1)
    while remaining:
        own = [lengths[i] for i in remaining]
        count = min(-(-sum(own) // largest), len(remaining))
        if count <= 1:
            groups.append(remaining)
            break
        multiples = -(-(sum(own) + count * (prefix_len + 1)) // TOKEN_MULTIPLE)
        room = min(-(-multiples // count) * TOKEN_MULTIPLE - prefix_len - 1, largest)
        chosen = {remaining[n] for n in fullest(own, room)} or {max(remaining, key=lengths.__getitem__)}
        groups.append(sorted(chosen))
        remaining = [i for i in remaining if i not in chosen]
    return groups


def fullest(lengths: list[int], room: int) -> list[int]:
    """Indices of the lengths whose sum comes closest to `room` without exceeding it."""
    reachable = [1]  # bit s of reachable[n]: some of the first n lengths add up to s
    for length in lengths:
        reachable.append((reachable[-1] | reachable[-1] << length) & (2 << room) - 1)
    total, chosen = reachable[-1].bit_length() - 1, []
    for n in reversed(range(len(lengths))):
        if not reachable[n] >> total & 1:  # the lengths before it do not add up to the total
            chosen.append(n)
            total -= lengths[n]
    return chosen


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
