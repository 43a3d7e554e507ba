"""The blocks of one input with its digest at their end, whatever its reader raises on the way."""

from collections.abc import Callable, Iterator

from meshgpt.data.blocks import Origin
from meshgpt.data.documents import Block
from meshgpt.data.failures import BadInputError, explain
from meshgpt.data.streams import FileDigest

# A block, the digest of the input if it ends with it, and how much of the input's `size` was read up to here.
Piece = tuple[Block, FileDigest | None, int]


def pieces(
    blocks: Iterator[Block], origin: Origin, read: Callable[[Block], int], finish: Callable[[], FileDigest]
) -> Iterator[Piece]:
    """What `sources.Input.read` gives, made of an input's blocks.

    Where reading breaks off because of what is in the input, the rest of it is one bad record.

    Args:
        read: how much of the input's size was read when this block was cut.
        finish: called at the end.

    Raises:
        UserError: it cannot be read for another reason than what is in it.
        MachineError: a disk or a network fails.
    """
    held: Block | None = None
    done = 0
    while True:
        try:
            block = next(blocks, None)
        except Exception as error:
            problem = explain(error, origin.name)
            within = held is not None and held.fragment is not None and not held.fragment.closes
            if within or not isinstance(problem, BadInputError):
                raise problem from error
            block, blocks = origin.block("bad", str(problem).encode()), iter(())
        if held is not None and block is not None:
            yield held, None, done
        if block is None:
            break
        held, done = block, read(block)
    digest = finish()
    yield held or origin.block("text", b""), digest, digest.size
