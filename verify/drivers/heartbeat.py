# SPDX-License-Identifier: Apache-2.0
"""The heartbeat driver: the host sends a number every two seconds, and gets back the next one. Prints a line a beat."""

from __future__ import annotations

import struct
import sys
from typing import TYPE_CHECKING

from pvbus.verify.drivers.integration import S_OK, IntegrationDriver, run

if TYPE_CHECKING:
    from pvbus.actors.client import VmbusDevice

SEQUENCE = struct.Struct("<Q")


class Heartbeat(IntegrationDriver):
    """Say that the guest lives."""

    name, id_table = "heartbeat", ("57164f39-9115-4e78-ab55-382f3bd5422d",)
    message_type, versions = 1, ((3, 0), (1, 0))

    def request(self, device: VmbusDevice, body: bytes) -> tuple[int, bytes]:
        """Answer with the number plus one; what stands behind it comes back as it is."""
        (sequence,) = SEQUENCE.unpack_from(body)
        print(f"{device.name} heartbeat {sequence}", flush=True)
        return S_OK, SEQUENCE.pack(sequence + 1) + body[SEQUENCE.size :]


if __name__ == "__main__":
    sys.exit(run(Heartbeat(), "The heartbeat driver of a domain's VMBus."))
