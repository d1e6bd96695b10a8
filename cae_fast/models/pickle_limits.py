"""What a pickle may cost, found out from its opcodes before anything is built.

Python's unpickler allocates a memo as large as a file asks for, and hashes nested tuples without a limit of depth or
of repetition: a few hundred bytes could fill the memory, overflow the C stack or run for ever.
"""

import pickle
import pickletools
from typing import IO, cast

MAX_DEPTH = 100
"""Of tuples in tuples."""
MAX_EXPANDED = 10**6
"""Items of a tuple and of the tuples in it, each counted as often as it stands there."""
MUTATING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
COMPOUND = {
    "TUPLE",
    "TUPLE1",
    "TUPLE2",
    "TUPLE3",
    "FROZENSET",
    "REDUCE",
    "NEWOBJ",
    "NEWOBJ_EX",
    "BINPERSID",
    "INST",
    "OBJ",
}
"""Opcodes that make what is hashed through to its last part, or what we build of such."""

Cost = tuple[int, int]
"""Depth and expanded items of a value on the stack."""
PLAIN: Cost = (0, 1)


class Bounded:
    """A file that never reads past its end: a length that a pickle states allocates nothing by itself."""

    def __init__(self, file: IO[bytes], size: int):
        self.file, self.left = file, size

    def read(self, count: int = -1) -> bytes:
        data = self.file.read(self.left if count < 0 else min(count, self.left))
        self.left -= len(data)
        return data

    def readline(self) -> bytes:
        data = self.file.readline(self.left)
        self.left -= len(data)
        return data


def check_pickle(file: IO[bytes], size: int) -> None:
    """Read one pickle of a file of `size` bytes up to its end. Raises UnpicklingError where it would cost too much.

    Other errors mean that it is damaged.
    """
    stack: list[Cost | None] = []  # None: a mark
    memo: dict[int, Cost] = {}
    for opcode, argument, _ in pickletools.genops(cast(IO[bytes], Bounded(file, size))):
        name = opcode.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            place = len(memo) if name == "MEMOIZE" else int(cast(int, argument))
            if not 0 <= place <= size:
                raise pickle.UnpicklingError(f"its memo has place {place}, more than the file has bytes")
            memo[place] = stack[-1] or PLAIN
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(cast(int, argument))])
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            _apply(opcode, stack)


def _apply(opcode: pickletools.OpcodeInfo, stack: list[Cost | None]) -> None:
    """Take from the stack what an opcode takes, and put there what it makes."""
    before, after = opcode.stack_before, opcode.stack_after
    if pickletools.markobject in before:
        mark = max(place for place, value in enumerate(stack) if value is None)
        taken = stack[mark + 1 :]
        del stack[mark:]
        before = before[: before.index(pickletools.markobject)]
    else:
        taken = []
    if before:
        taken = stack[-len(before) :] + taken
        if len(stack) < len(before):
            raise pickle.UnpicklingError("it takes more from its stack than there is")
        del stack[-len(before) :]

    if opcode.name in MUTATING:
        stack.append(taken[0])
        return
    cost = PLAIN
    if opcode.name in COMPOUND:
        parts = [part or PLAIN for part in taken]
        cost = 1 + max((depth for depth, _ in parts), default=0), 1 + sum(items for _, items in parts)
        if cost[0] > MAX_DEPTH or cost[1] > MAX_EXPANDED:
            raise pickle.UnpicklingError("its tuples are nested deeper, or hold more, than weights need")
    stack += [None if made is pickletools.markobject else cost for made in after]
