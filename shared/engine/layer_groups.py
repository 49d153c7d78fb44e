"""After which layers of a running prefill the pages computed so far are sent, and in which pieces. Pure."""

from __future__ import annotations

import math
from typing import NamedTuple

from phloem.shared.transfer.config import FIRST_PIECE_BYTES, LAST_PIECE_BYTES

# What a piece costs beyond its bytes: two small launches, a frame each way, and the threads that wait for
# them. 10% of the time is given to that.
PIECE_OVERHEAD_S = 0.000_05
_OVERHEAD_SHARE = 0.1
_UNKNOWN_BYTES_PER_S = 64e9  # until the first transfers were measured
_GROWTH = 3  # of pieces: pages are gathered some four times as fast as they cross, less a launch
_LAST_PART = 5  # of the last two pieces: pages are scattered as fast


class PrefillStep(NamedTuple):
    """A step whose KV will be sent. `bytes_per_layer`: of all its prompt tokens. The rates of prefill and of
    the channel are measured ones; zero: not yet."""

    num_layers: int
    bytes_per_layer: int
    num_tokens: int
    tokens_per_s: float
    bytes_per_s: float


def layer_groups(step: PrefillStep) -> list[int]:
    """The layer ends of the groups, ascending; the last is `num_layers`.

        layers   [ g | g | ... | rest | last ]        the last group computes while the one before it is sent

    A group has enough bytes for the channel's bandwidth (`PIECE_OVERHEAD_S` is a small share of its time).
    The last one is as small as may be, since its transfer is what no layer hides: just so large that its
    layers compute for as long as the group before it takes to send. A step that is hardly worth two groups is
    sent as one.
    """
    bytes_per_s = step.bytes_per_s or _UNKNOWN_BYTES_PER_S
    efficient = bytes_per_s * PIECE_OVERHEAD_S / _OVERHEAD_SHARE
    if step.num_layers * step.bytes_per_layer < 2 * efficient:
        return [step.num_layers]
    group = min(step.num_layers, math.ceil(efficient / step.bytes_per_layer))
    last = min(group, _layers_while_sending(step, group * step.bytes_per_layer / bytes_per_s))
    ends = [*range(group, step.num_layers - last, group), step.num_layers - last]
    return [end for end in ends if end > 0] + [step.num_layers]


def _layers_while_sending(step: PrefillStep, send_s: float) -> int:
    """Layers that compute while something is sent for `send_s`; at least one."""
    if not step.tokens_per_s:
        return 1
    layer_s = step.num_tokens / step.tokens_per_s / step.num_layers
    return max(1, math.ceil((send_s + PIECE_OVERHEAD_S) / layer_s))


def next_piece_bytes(num_bytes_left: int, slot_bytes: int, before: int) -> int:
    """The size of the next piece of `num_bytes_left` that may go now, behind one of `before` bytes (0: it is
    a hand-over's first).

        gather   | e |  3 e  |   slot   |  ..  | last |
        link         | e |    3 e   |   slot   |  ..  | last |
        scatter          | e |      |  3 e  |   slot   |  ..  | last |

    A piece costs NCCL some 10 us, so that they are as large as may be; but nothing crosses while the first
    one is gathered and while the last one is scattered, a piece is gathered while only the one before it
    crosses, and scattered while only the next one does.
    """
    first, last = FIRST_PIECE_BYTES, LAST_PIECE_BYTES
    if min(num_bytes_left, slot_bytes) <= first + last:
        return min(num_bytes_left, slot_bytes)
    most = min(slot_bytes, max(first, _GROWTH * before))
    if num_bytes_left - most >= last:
        return most
    return num_bytes_left - max(last, num_bytes_left // _LAST_PART)
