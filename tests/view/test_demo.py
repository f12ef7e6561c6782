# SPDX-License-Identifier: Apache-2.0
"""`pvbus demo`, run as a user does: both worlds at work, a cpu killed, everything accounted for."""

import json
import re

from pvbus.tests.view.support import pvbus


def test_the_demo_shows_both_worlds_and_nothing_is_lost() -> None:
    done = pvbus("demo", "--seconds", "3")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing lost, nothing twice (0 lost, 0 doubled)" in done.stdout
    assert re.search(r"ping-pong [\d,]+/s .* storm [\d,]+ notifies/s.* VMBus echo [\d,]+ packets/s, heartbeat \d", done.stdout)
    packets = r"^[\d,]+ packets to a VMBus device and back, [\d,]+ a second: vmbus_0_1  relid 1  echo"
    assert re.search(packets, done.stdout, re.MULTILINE)
    assert re.search(r"^the host's heartbeat is at [1-9]", done.stdout, re.MULTILINE)
    assert "$ pvbus explain port 0:" in done.stdout
    assert done.stdout.endswith("the machine is stopped\n")


def test_the_demo_as_json_is_one_object() -> None:
    done = pvbus("demo", "--seconds", "1", "--json")
    data = json.loads(done.stdout)

    assert (done.returncode, data["schema"], data["held"], data["lost"], data["doubled"]) == (0, 1, True, 0, 0)
    assert data["packets"] > 0
    assert data["round_trips"] > 0
    assert data["heartbeat"] >= 1
    assert data["device"].startswith("vmbus_0_1 ")
