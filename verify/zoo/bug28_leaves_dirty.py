# SPDX-License-Identifier: Apache-2.0
"""Zoo 28: the driver leaves without telling its host."""

from pvbus.verify.scenarios.teardown import Teardown
from pvbus.verify.zoo import CAUGHT, Bug

BUG = Bug(
    number=28,
    name="leaves-dirty",
    sentence="the module is unloaded without UNLOAD: its channels are open for the host, which writes into freed rings",
    scenario=Teardown,
    parameters={"ends": "exit", "ticks": 1},
    variant="leaves-dirty",
    expected={"sc": CAUGHT, "tso": CAUGHT, "arm": CAUGHT},
    story=(
        "The exit path of 2012 frees the connection, the channels and their rings. It neither tells the host, nor switches "
        "the SynIC off, nor kills its tasklets. To the host every channel is open: the next thing that a device has to say "
        "is written into pages that have a new owner. A kernel that boots by kexec, or a crash kernel, inherits this. "
        "Leaving is a protocol: UNLOAD, its answer, then the pages."
    ),
    citation=(
        "Live in the driver of 2012. 'handle various crash scenarios', 2016, cd95aad55793; 'avoid wait_for_completion() on "
        "crash', 2016; 'kill tasklets on module unload', 2015."
    ),
)
