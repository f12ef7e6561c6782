# SPDX-License-Identifier: Apache-2.0
"""The configuration of a machine: a TOML file, its keys checked. Read by the supervisor; the defaults are the documented ones."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec

from pvbus.actors.runtime import rundir
from pvbus.shm.layout import DOMAINS_MAX, NR_VIRQS, PORTS_2L, PORTS_FIFO, VCPUS_MAX

PLATFORMS = ("xen", "hyperv")
VARIANTS = ("driver-wakeup-order",)
DOMID_FIRST_RESERVED = 0x7FF0
VIRQS_PER_VCPU = frozenset({0, 1, 7, 13})
VIRQS_PER_DOMAIN = frozenset({11})


class ConfigError(ValueError):
    """A configuration that makes no sense; the text names the key and says why."""


class DomainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One [[domain]]."""

    id: int
    cpus: int = 1
    platforms: tuple[str, ...] = ("xen",)
    abi: Literal["fifo", "2-level"] = "fifo"
    max_event_channels: int = 0  # 0: as many as the ABI has
    kernel_virqs: tuple[int, ...] = ()
    kernel_ports: int = 0
    affinity: Literal["vcpu0", "spread"] = "vcpu0"


class MachineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    name: str = "default"
    domain: tuple[DomainConfig, ...] = (
        DomainConfig(id=0, cpus=2, platforms=("xen", "hyperv")),
        DomainConfig(id=1, cpus=1, platforms=("xen",)),
    )
    variants: tuple[str, ...] = ()


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
        _check_domain(domain)
    for variant in config.variants:
        if variant not in VARIANTS:
            raise ConfigError(f"variants: {variant!r} is not one of {', '.join(VARIANTS)}")


def _check_domain(domain: DomainConfig) -> None:
    where = f"domain {domain.id}: "
    ports = PORTS_FIFO if domain.abi == "fifo" else PORTS_2L
    unknown = [platform for platform in domain.platforms if platform not in PLATFORMS]
    impossible = [virq for virq in domain.kernel_virqs if not 0 <= virq < NR_VIRQS]
    not_global = VIRQS_PER_VCPU | VIRQS_PER_DOMAIN
    foreign = [virq for virq in domain.kernel_virqs if domain.id != 0 and virq not in not_global]
    rules: tuple[tuple[bool, str, str], ...] = (
        (not 0 <= domain.id < DOMID_FIRST_RESERVED, "id", f"{domain.id} is not in 0..{DOMID_FIRST_RESERVED - 1}"),
        (not 1 <= domain.cpus <= VCPUS_MAX, "cpus", f"{domain.cpus} is not in 1..{VCPUS_MAX}"),
        (bool(unknown), "platforms", f"{unknown} not in {', '.join(PLATFORMS)}"),
        (not domain.platforms, "platforms", "a domain needs at least one"),
        (len(set(domain.platforms)) != len(domain.platforms), "platforms", "one is given twice"),
        (bool(impossible), "kernel_virqs", f"{impossible} not in 0..{NR_VIRQS - 1}"),
        (len(set(domain.kernel_virqs)) != len(domain.kernel_virqs), "kernel_virqs", "a VIRQ is given twice"),
        (bool(foreign), "kernel_virqs", f"global VIRQs {foreign} are handled by domain 0"),
        (not 0 <= domain.kernel_ports < ports, "kernel_ports", f"{domain.kernel_ports} is not in 0..{ports - 1}"),
        (not 0 <= domain.max_event_channels <= ports, "max_event_channels", f"{domain.max_event_channels} is not in 0..{ports}"),
    )
    for broken, key, why in rules:
        if broken:
            raise ConfigError(f"{where}{key}: {why}")
