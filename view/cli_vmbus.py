# SPDX-License-Identifier: Apache-2.0
"""The verbs of the command line that look at a domain's VMBus: offer, rescind, devices, channels.

As cli.py, which adds their parsers and carries them out: goes through the client, owns nothing.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from pvbus.actors.client import attach
from pvbus.actors.runtime.vmbus_facts import DEVICE_CLASSES, HOST_DEVICES
from pvbus.view.tables import print_json, table

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from pvbus.actors.client import Machine

DEVICE_COLUMNS = ("device", "relid", "class", "device_id", "driver", "opened")
CHANNEL_COLUMNS = ("relid", "class", "instance_id", "state", "target_vp", "monitor_id", "generation")
LATENCY_US_MIN, LATENCY_US_MAX = 0.1, 6553.5  # 16 bits of 100 ns
OPENED = "3\n"  # of the attribute state
_CLASS_NAMES = {str(class_id): name for name, class_id in DEVICE_CLASSES.items()}


def add_verbs(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the parsers; `verb(name, does)` makes one with --name and --json."""
    offer = verb("offer", "have the host offer a synthetic device; prints its relid")
    classes = f"{', '.join(HOST_DEVICES)}; one that nobody answers: network, scsi, …; or a GUID"
    offer.add_argument("device_class", metavar="CLASS", help=classes)
    offer.add_argument("--instance", metavar="GUID", help="the instance (default: a new one)")
    offer.add_argument(
        "--monitor-us", type=float, default=0, metavar="LATENCY",
        help="give it a monitor: its driver signals by a trigger, which the host looks at every so many microseconds (to 6553)",
    )  # fmt: skip
    rescind = verb("rescind", "have the host withdraw a device")
    rescind.add_argument("relid", type=int, metavar="RELID")
    devices = verb("devices", "list the devices of a domain's VMBus and their drivers")
    channels = verb("channels", "list the VMBus channels as the host sees them")
    for one in (offer, rescind, devices, channels):
        one.add_argument("--domain", type=int, default=0, metavar="D")


def offer(arguments: argparse.Namespace) -> int:
    """Offer a device; ValueError for a class or a GUID that is none."""
    class_id, instance, latency_us = _class(arguments.device_class), arguments.instance, arguments.monitor_us
    if not (latency_us == 0 or LATENCY_US_MIN <= latency_us <= LATENCY_US_MAX):
        raise ValueError(f"--monitor-us {latency_us:g}: {LATENCY_US_MIN} to {LATENCY_US_MAX} microseconds, or 0 for no monitor")
    if instance is not None:
        _guid("--instance", instance)
    with attach(arguments.name) as machine:
        _on_hyperv(machine, arguments.domain)
        try:
            relid = machine.offer(str(class_id), instance, arguments.domain, monitor_latency_us=latency_us)
        except FileExistsError:
            raise ValueError(f"--instance {instance}: it is offered already") from None
    if arguments.json:
        print_json({"domain": arguments.domain, "class_id": str(class_id), "relid": relid})
    else:
        print(relid)
    return 0


def rescind(arguments: argparse.Namespace) -> int:
    """Withdraw a device; ValueError for a relid that is not offered."""
    relid, domain = arguments.relid, arguments.domain
    with attach(arguments.name) as machine:
        _on_hyperv(machine, domain)
        try:
            machine.rescind(relid, domain)
        except FileNotFoundError:
            raise ValueError(f"relid {relid} is not offered in domain {domain}") from None
    if arguments.json:
        print_json({"domain": domain, "relid": relid, "state": "rescinded"})
    else:
        print(f"relid {relid} of domain {domain} is withdrawn")
    return 0


def devices(arguments: argparse.Namespace) -> int:
    """List what is on the bus."""
    with attach(arguments.name) as machine:
        _on_hyperv(machine, arguments.domain)
        found = machine.devices(arguments.domain)
    if arguments.json:
        print_json({"devices": found})
    else:
        print(table(map(device_row, found), DEVICE_COLUMNS) if found else "no device is on the bus")
    return 0


def channels(arguments: argparse.Namespace) -> int:
    """List what the host has offered."""
    with attach(arguments.name) as machine:
        _on_hyperv(machine, arguments.domain)
        found = machine.channels(arguments.domain)
    if arguments.json:
        print_json({"channels": found})
    else:
        print(table(found, CHANNEL_COLUMNS) if found else "the host offers no channel")
    return 0


VERBS = {"offer": offer, "rescind": rescind, "devices": devices, "channels": channels}


def device_row(device: dict[str, Any]) -> dict[str, Any]:
    """Give what people read of a device."""
    return {
        **device,
        "device": device["name"],
        "class": _CLASS_NAMES.get(device["class_id"], device["class_id"]),
        "opened": device["attributes"]["state"] == OPENED,
    }


def _class(text: str) -> uuid.UUID:
    """Read a class that the host knows."""
    class_id = DEVICE_CLASSES.get(text)
    class_id = _guid("class", text) if class_id is None else class_id
    if class_id not in DEVICE_CLASSES.values():
        raise ValueError(f"class {text!r}: the host knows {', '.join(DEVICE_CLASSES)} only")
    return class_id


def _guid(what: str, text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError:
        known = f"; the classes are {', '.join(DEVICE_CLASSES)}" if what == "class" else ""
        raise ValueError(f"{what} {text!r} is no GUID{known}") from None


def _on_hyperv(machine: Machine, domain: int) -> None:
    """ValueError for a domain that is not there, or has no VMBus."""
    found = {spec["id"]: "hyperv" in spec["platforms"] for spec in machine.status()["domains"]}
    if not found.get(domain, False):
        on = ", ".join(str(domid) for domid, is_on in found.items() if is_on) or "none"
        why = "is not on the Hyper-V platform" if domain in found else "is not there"
        raise ValueError(f"--domain {domain} {why}; on it in machine {machine.name!r}: {on}")
