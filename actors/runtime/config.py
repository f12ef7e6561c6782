# SPDX-License-Identifier: Apache-2.0
"""The configuration of a machine: a TOML file, its keys checked. Read by the supervisor; the defaults are the documented ones."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec

from pvbus.actors.runtime import rundir
from pvbus.actors.runtime.vmbus_facts import HOST_DEVICES, SPOKEN, version_text
from pvbus.shm.layout import DOMAINS_MAX, NR_VIRQS, PORTS_2L, PORTS_FIFO, VCPUS_MAX, Machine

PLATFORMS = ("xen", "hyperv")
VMBUS_VERSIONS = {version_text(version): int(version) for version in SPOKEN}  # in the order in which a guest tries them
VARIANTS = {  # what is switched on -> its bit in the machine's header, where every room reads it
    "driver-wakeup-order": Machine.VARIANT_DRIVER_WAKEUP,
    "duplicate-drops-ports": Machine.VARIANT_DUPLICATE_DROPS,
    "leak-on-enomem": Machine.VARIANT_LEAK_ON_ENOMEM,
    "double-close": Machine.VARIANT_DOUBLE_CLOSE,
    "strict-static-restriction": Machine.VARIANT_STRICT_STATIC,
    "one-tasklet-pair": Machine.VARIANT_ONE_TASKLET_PAIR,
    "offers-stall": Machine.VARIANT_OFFERS_STALL,
    "leaves-dirty": Machine.VARIANT_LEAVES_DIRTY,
    "work-allocation-retries": Machine.VARIANT_WORK_ALLOCATION_RETRIES,
    "wrong-signal-word": Machine.VARIANT_WRONG_SIGNAL_WORD,
    "rescind-queue": Machine.VARIANT_RESCIND_QUEUE,
    "work-per-cpu": Machine.VARIANT_WORK_PER_CPU,
}
PROFILES = {
    "linux-6.12": (),  # the answers as they were recorded
    "seed": (
        "driver-wakeup-order", "duplicate-drops-ports", "leak-on-enomem", "double-close", "one-tasklet-pair", "offers-stall",
        "leaves-dirty", "work-allocation-retries", "wrong-signal-word", "rescind-queue", "work-per-cpu",
    ),
    "strict": ("strict-static-restriction",),
}
INJECT_MAX = PORTS_FIFO  # a file binds no more ports
DOMID_FIRST_RESERVED = 0x7FF0
VIRQS_PER_VCPU = frozenset({0, 1, 7, 13})
VIRQS_PER_DOMAIN = frozenset({11})
VMBUS_IRQ_MAX = 0xFF - 0x30  # its vector is 0x30 + irq


class ConfigError(ValueError):
    """A configuration that makes no sense; the text names the key and says why."""


class DomainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One [[domain]]."""

    id: int
    cpus: int = 1
    platforms: tuple[str, ...] = ("xen",)
    abi: Literal["fifo", "2-level"] = "fifo"
    max_event_channels: int = 0  # the highest port; 0: as many as the ABI has
    global_virqs: tuple[int, ...] = ()  # those that this domain handles; all others are domain 0's
    kernel_virqs: tuple[int, ...] = ()
    kernel_ports: int = 0
    affinity: Literal["vcpu0", "spread"] = "vcpu0"
    acpi_device: bool = True  # Hyper-V: is there a VMBUS device in ACPI?
    vmbus_irq: int = 7  # Hyper-V: the interrupt in its _CRS; 0 = none
    vmbus_versions: tuple[str, ...] = tuple(VMBUS_VERSIONS)  # Hyper-V: what the guest tries, in this order
    vmbus_cpu: int = 0  # Hyper-V: where the host's messages go (the versions before 3.0 have them on CPU 0)
    devices: tuple[str, ...] = ()  # Hyper-V: classes that the host offers from the start

    def as_arguments(self) -> dict[str, Any]:
        """Give what the hypervisor's process is told of it."""
        return {
            "id": self.id, "cpus": self.cpus, "affinity": self.affinity, "ports_max": self.max_event_channels,
            "abi": self.abi, "kernel_ports": self.kernel_ports, "kernel_virqs": self.kernel_virqs,
            "devices": self.devices,
        }  # fmt: skip

    @property
    def ports_max(self) -> int:
        """How many port numbers there are, 0 included."""
        ports = PORTS_FIFO if self.abi == "fifo" else PORTS_2L
        return min(self.max_event_channels + 1, ports) if self.max_event_channels else ports


class StaticEvtchnConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One [[static_evtchn]]: two ports that are connected before anything runs."""

    domain: int
    port: int
    remote_domain: int
    remote_port: int


class InjectConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[inject]: how many allocations of each open file fail."""

    record_allocation_failures: int = 0
    ring_growth_failures: int = 0

    def as_dict(self) -> dict[str, int]:
        """Give it as plain data."""
        return msgspec.structs.asdict(self)


class MachineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    name: str = "default"
    domain: tuple[DomainConfig, ...] = (
        DomainConfig(id=0, cpus=2, platforms=("xen", "hyperv"), devices=("heartbeat", "shutdown")),
        DomainConfig(id=1, cpus=1, platforms=("xen",)),
    )
    profile: str = "linux-6.12"
    variants: tuple[str, ...] = ()
    inject: InjectConfig = InjectConfig()
    static_evtchn: tuple[StaticEvtchnConfig, ...] = ()

    def handled_virqs(self, domid: int) -> frozenset[int]:
        """Give the global VIRQs that a domain handles: its own, and domain 0 what is nobody else's."""
        given = {virq: domain.id for domain in self.domain for virq in domain.global_virqs}
        return frozenset(
            virq for virq in range(NR_VIRQS) if virq not in VIRQS_PER_VCPU | VIRQS_PER_DOMAIN and given.get(virq, 0) == domid
        )

    def effective_variants(self) -> tuple[str, ...]:
        """Give what the profile switches on, and `variants` on top of it."""
        wanted = {*PROFILES[self.profile], *self.variants}
        return tuple(variant for variant in VARIANTS if variant in wanted)

    def variant_bits(self) -> int:
        """Give the effective variants as the machine's header has them."""
        return sum(VARIANTS[variant] for variant in self.effective_variants())


def load(path: Path | None, name: str | None = None) -> MachineConfig:
    """Read and check a configuration file, or take the default machine; `name` wins over the file's. Raises ConfigError."""
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not TOML: {error}") from None
    if name is not None:
        data["name"] = name
    try:
        config = msgspec.convert(data, MachineConfig, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path or 'configuration'}: {error}") from None
    check(config)
    return config


def check(config: MachineConfig) -> None:
    """Refuse what has the right types and makes no sense. Raises ConfigError."""
    try:
        rundir.run_directory(config.name)
    except ValueError as error:
        raise ConfigError(f"name: {error}") from None
    if not config.domain:
        raise ConfigError("domain: a machine needs at least one [[domain]]")
    if len(config.domain) > DOMAINS_MAX:
        raise ConfigError(f"domain: {len(config.domain)} domains, at most {DOMAINS_MAX}")
    seen: set[int] = set()
    for domain in config.domain:
        if domain.id in seen:
            raise ConfigError(f"domain.id: {domain.id} is given twice")
        seen.add(domain.id)
        _check_domain(domain, config.handled_virqs(domain.id))
    _check_handlers(config)
    if config.profile not in PROFILES:
        raise ConfigError(f"profile: {config.profile!r} is not one of {', '.join(PROFILES)}")
    for variant in config.variants:
        if variant not in VARIANTS:
            raise ConfigError(f"variants: {variant!r} is not one of {', '.join(VARIANTS)}")
    for key, number in config.inject.as_dict().items():
        if not 0 <= number <= INJECT_MAX:
            raise ConfigError(f"inject.{key}: {number} is not in 0..{INJECT_MAX}")
    _check_static(config)


def _check_handlers(config: MachineConfig) -> None:
    taken: dict[int, int] = {}
    for domain in config.domain:
        for virq in domain.global_virqs:
            if virq in taken:
                raise ConfigError(f"domain {domain.id}: global_virqs: {virq} is handled by domain {taken[virq]} already")
            taken[virq] = domain.id


def _check_static(config: MachineConfig) -> None:
    """Each end of a static channel is a port that nobody else has, in a Xen domain that exists."""
    domains = {domain.id: domain for domain in config.domain}
    taken: dict[tuple[int, int], int] = {}
    for index, pair in enumerate(config.static_evtchn):
        where = f"static_evtchn[{index}]: "
        if (pair.domain, pair.port) == (pair.remote_domain, pair.remote_port):
            raise ConfigError(f"{where}port {pair.domain}:{pair.port} is connected to itself")
        ends = (
            ("domain", "port", pair.domain, pair.port),
            ("remote_domain", "remote_port", pair.remote_domain, pair.remote_port),
        )
        for domain_key, port_key, domid, port in ends:
            domain = domains.get(domid)
            if domain is None:
                raise ConfigError(f"{where}{domain_key}: there is no domain {domid}")
            kernels = max(domain.kernel_ports, len(domain.kernel_virqs))
            other = taken.setdefault((domid, port), index)
            rules: tuple[tuple[bool, str, str], ...] = (
                ("xen" not in domain.platforms, domain_key, f"domain {domid} is no Xen domain"),
                (not 1 <= port < domain.ports_max, port_key, f"{port} is not in 1..{domain.ports_max - 1}"),
                (port <= kernels, port_key, f"{port} is the kernel's: it holds ports 1 to {kernels} of domain {domid}"),
                (other != index, port_key, f"port {domid}:{port} is given twice, first in static_evtchn[{other}]"),
            )
            for broken, key, why in rules:
                if broken:
                    raise ConfigError(f"{where}{key}: {why}")


def _check_domain(domain: DomainConfig, handled: frozenset[int]) -> None:
    where = f"domain {domain.id}: "
    ports, last = PORTS_FIFO if domain.abi == "fifo" else PORTS_2L, domain.ports_max - 1
    unknown = [platform for platform in domain.platforms if platform not in PLATFORMS]
    impossible = [virq for virq in domain.kernel_virqs if not 0 <= virq < NR_VIRQS]
    not_global = VIRQS_PER_VCPU | VIRQS_PER_DOMAIN
    foreign = [virq for virq in domain.kernel_virqs if virq not in not_global and virq not in handled]
    local = [virq for virq in domain.global_virqs if not 0 <= virq < NR_VIRQS or virq in not_global]
    strange = [name for name in domain.devices if name not in HOST_DEVICES]
    unspoken = [version for version in domain.vmbus_versions if version not in VMBUS_VERSIONS]
    rules: tuple[tuple[bool, str, str], ...] = (
        (not 0 <= domain.id < DOMID_FIRST_RESERVED, "id", f"{domain.id} is not in 0..{DOMID_FIRST_RESERVED - 1}"),
        (not 1 <= domain.cpus <= VCPUS_MAX, "cpus", f"{domain.cpus} is not in 1..{VCPUS_MAX}"),
        (bool(unknown), "platforms", f"{unknown} not in {', '.join(PLATFORMS)}"),
        (not domain.platforms, "platforms", "a domain needs at least one"),
        (len(set(domain.platforms)) != len(domain.platforms), "platforms", "one is given twice"),
        (bool(unspoken), "vmbus_versions", f"{unspoken} not in {', '.join(VMBUS_VERSIONS)}"),
        (not 0 <= domain.vmbus_cpu < domain.cpus, "vmbus_cpu", f"{domain.vmbus_cpu} is not in 0..{domain.cpus - 1}"),
        (not domain.vmbus_versions, "vmbus_versions", "a guest needs at least one"),
        (len(set(domain.vmbus_versions)) != len(domain.vmbus_versions), "vmbus_versions", "one is given twice"),
        (bool(impossible), "kernel_virqs", f"{impossible} not in 0..{NR_VIRQS - 1}"),
        (len(set(domain.kernel_virqs)) != len(domain.kernel_virqs), "kernel_virqs", "a VIRQ is given twice"),
        (bool(foreign), "kernel_virqs", f"global VIRQs {foreign} are handled by another domain"),
        (bool(local), "global_virqs", f"{local} are no global VIRQs"),
        (not 0 <= domain.kernel_ports <= last, "kernel_ports", f"{domain.kernel_ports} is not in 0..{last}"),
        (not 0 <= domain.vmbus_irq <= VMBUS_IRQ_MAX, "vmbus_irq", f"{domain.vmbus_irq} is not in 0..{VMBUS_IRQ_MAX}"),
        (bool(strange), "devices", f"{', '.join(map(repr, strange))} not in {', '.join(HOST_DEVICES)}"),
        (len(set(domain.devices)) != len(domain.devices), "devices", "one is given twice"),
        (bool(domain.devices) and "hyperv" not in domain.platforms, "devices", "they need the platform hyperv"),
        (not 0 <= domain.max_event_channels <= ports, "max_event_channels", f"{domain.max_event_channels} is not in 0..{ports}"),
    )
    for broken, key, why in rules:
        if broken:
            raise ConfigError(f"{where}{key}: {why}")
