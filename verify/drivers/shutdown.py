# SPDX-License-Identifier: Apache-2.0
"""The shutdown driver: hears that its guest is to shut down, agrees, says so, and ends as the guest would."""

from __future__ import annotations

import struct
import sys
import time
from typing import TYPE_CHECKING

from pvbus.verify.drivers.integration import S_OK, IntegrationDriver, end, run

if TYPE_CHECKING:
    from pvbus.actors.client import VmbusDevice

BODY = struct.Struct("<III2048s")  # reason, time-out in seconds, flags, a text for the screen
FORCE = 1
E_FAIL = 0x80004005
PATIENCE_S, LOOK_S = 5.0, 0.001


class Shutdown(IntegrationDriver):
    """Shut the guest down when the host asks. A subclass says in `orderly` whether it will."""

    name, id_table = "shutdown", ("0e0b6031-5213-4934-818b-38d90ced39db",)
    message_type, versions = 3, ((3, 2), (3, 1), (3, 0), (1, 0))

    def __init__(self) -> None:
        super().__init__()
        self._agreed = False

    def orderly(self, reason: int, text: str, *, forced: bool) -> bool:
        """Whether the guest will."""
        print(f"shutdown, {'forced' if forced else 'in order'}: reason {reason:#x} {text}".rstrip(), flush=True)
        return True

    def request(self, device: VmbusDevice, body: bytes) -> tuple[int, bytes]:
        """Agree or refuse; the answer carries the request's body."""
        reason, _, flags, text = BODY.unpack_from(body)
        said = text.split(b"\0", 1)[0].decode(errors="replace")
        self._agreed = self.orderly(reason, said, forced=bool(flags & FORCE))
        return S_OK if self._agreed else E_FAIL, body

    def after(self, device: VmbusDevice) -> None:
        """Go, once the host has read the answer: with us the channel ends, and what lies in it."""
        if self._agreed:
            deadline_s = time.monotonic() + PATIENCE_S
            while device.channel.state()["out_read_bytes_avail"] and time.monotonic() < deadline_s:
                time.sleep(LOOK_S)
            end()


if __name__ == "__main__":
    sys.exit(run(Shutdown(), "The shutdown driver of a domain's VMBus."))
