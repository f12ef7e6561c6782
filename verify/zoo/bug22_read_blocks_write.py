# SPDX-License-Identifier: Apache-2.0
"""Zoo 22: read and write of one open file take the same lock, and read sleeps with it."""

from pvbus.shm._core_explored import UserFile
from pvbus.verify.explorer.model import Model
from pvbus.verify.scenarios.one_reference import OneReference
from pvbus.verify.zoo import CAUGHT, Bug


class PositionLock(OneReference):
    """Each call holds the lock of the file's position, as a file without stream_open does."""

    def prepare(self, model: Model, variants: int) -> None:
        """Make the pages and the lock."""
        super().prepare(model, variants)
        self.position = model.lock("position")

    def do_read(self, model: Model, file: UserFile) -> list[int]:
        """Read with the lock held."""
        model.acquire(self.position, "read.lock")
        ports = super().do_read(model, file)
        model.release(self.position, "read.unlock")
        return ports

    def do_write(self, model: Model, file: UserFile) -> None:
        """Write with the lock held."""
        model.acquire(self.position, "write.lock")
        super().do_write(model, file)
        model.release(self.position, "write.unlock")


BUG = Bug(
    number=22,
    name="read-blocks-write",
    sentence="read sleeps with the file's position lock, and the write that would unmask its port waits for it",
    scenario=OneReference,
    handler=PositionLock,
    parameters={"handed": True},
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "Since 2014 the kernel holds a lock of the file's position during read and write. The event-channel file has no "
        "position, but had the lock: one thread sleeps in read and holds it; the thread that writes the port back, so that "
        "it is unmasked and can fire, waits for it. Within one process, with nobody else at fault, nothing ever moves "
        "again. A file of this kind has to say at open that it is a stream."
    ),
    citation="'fs: stream_open', Kirill Smelkov, 2019, 10dce8af3422.",
)
