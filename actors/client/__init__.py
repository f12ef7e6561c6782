# SPDX-License-Identifier: Apache-2.0
"""What a user process imports: `attach()` gives a running machine, `machine.open_evtchn()` an open event-channel file."""

from pvbus.actors.client.evtchn import EvtchnFile
from pvbus.actors.client.machine import Machine, MachineNotFoundError, attach
from pvbus.actors.client.vmbus import VmbusChannel, VmbusDevice, VmbusDriver

__all__ = [
    "EvtchnFile", "Machine", "MachineNotFoundError", "VmbusChannel", "VmbusDevice", "VmbusDriver", "attach",
]  # fmt: skip
