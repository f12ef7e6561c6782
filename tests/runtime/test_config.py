# SPDX-License-Identifier: Apache-2.0
"""What a configuration may say, and the sentence for what it may not: profiles, variants, injected failures, static ports."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pvbus.actors.hypervisor.hyperv import SERVICES
from pvbus.actors.runtime import config as configuration
from pvbus.actors.runtime.config import PROFILES, VARIANTS, ConfigError, DomainConfig, MachineConfig
from pvbus.actors.runtime.vmbus_facts import DEVICE_CLASSES, HOST_DEVICES
from pvbus.shm.layout import Machine
from pvbus.view.pytest_plugin import environment

DOMAINS = """
[[domain]]
id = 0
kernel_virqs = [0, 2, 9]
kernel_ports = 2
[[domain]]
id = 1
kernel_ports = 4
[[domain]]
id = 2
platforms = ["hyperv"]
"""


def load(directory: Path, text: str) -> MachineConfig:
    path = directory / "machine.toml"
    path.write_text(text)
    return configuration.load(path)


def pair(domain: object, port: object, remote_domain: object, remote_port: object) -> str:
    return (
        f"[[static_evtchn]]\ndomain = {domain}\nport = {port}\n"
        f"remote_domain = {remote_domain}\nremote_port = {remote_port}\n"
    )


def test_a_machine_answers_as_recorded_unless_told_otherwise() -> None:
    default = configuration.load(None)

    assert default.profile == "linux-6.12"
    assert default.effective_variants() == ()
    assert default.variant_bits() == 0
    assert default.static_evtchn == ()
    assert set(default.inject.as_dict().values()) == {0}


@pytest.mark.checklist("H1", "H2", "H3", "H4")
@pytest.mark.parametrize(("profile", "variants", "bits"), [
    ("linux-6.12", [], 0),
    ("seed", [], 1 | 2 | 4 | 8 | 32 | 64 | 128 | 256 | 512 | 1024 | 2048),
    ("strict", [], 16),
    ("strict", ["driver-wakeup-order"], 17),
    ("seed", ["double-close", "strict-static-restriction", "double-close"], 4095),
])
def test_a_profile_is_a_set_of_variants_and_single_ones_come_on_top(
    tmp_path: Path, profile: str, variants: list[str], bits: int
) -> None:
    config = load(tmp_path, f'profile = "{profile}"\nvariants = {variants!r}\n')

    assert config.variant_bits() == bits
    assert sum(VARIANTS[name] for name in config.effective_variants()) == bits
    assert set(config.effective_variants()) == {*PROFILES[profile], *variants}


def test_each_variant_has_a_bit_of_its_own_and_each_profile_names_some_that_exist() -> None:
    bits = list(VARIANTS.values())

    assert sum(bits) == 2 ** len(bits) - 1
    assert len(set(bits)) == len(bits)
    assert bits == [value for name, value in vars(Machine).items() if name.startswith("VARIANT_")]
    assert {name for names in PROFILES.values() for name in names} == set(VARIANTS)


@pytest.mark.parametrize(("text", "said"), [
    ('profile = "linux-2.6"', "profile: 'linux-2.6' is not one of linux-6.12, seed, strict"),
    ('variants = ["lossy"]', f"variants: 'lossy' is not one of {', '.join(VARIANTS)}"),
    ("profile = 3", "profile"),
    ("[inject]\nrecord_allocation_failures = -1", "inject.record_allocation_failures: -1 is not in 0..131072"),
    ("[inject]\nring_growth_failures = 131073", "inject.ring_growth_failures: 131073 is not in 0..131072"),
    ("[inject]\nboom = 1", "boom"),
    ('[[domain]]\nid = 0\nvmbus_versions = ["6.0"]', "domain 0: vmbus_versions: ['6.0'] not in 5.3, 0.13"),
    ("[[domain]]\nid = 0\ncpus = 2\nvmbus_cpu = 2", "domain 0: vmbus_cpu: 2 is not in 0..1"),
    ("[[domain]]\nid = 0\nvmbus_versions = []", "domain 0: vmbus_versions: a guest needs at least one"),
    ('[[domain]]\nid = 0\nvmbus_versions = ["0.13", "0.13"]', "domain 0: vmbus_versions: one is given twice"),
    ("[inject]\nring_growth_failures = true", "inject.ring_growth_failures"),
])
def test_a_profile_variant_or_failure_that_is_none_is_refused_with_its_value(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, text)

    assert said in str(refused.value)


@pytest.mark.checklist("A9.5")
@pytest.mark.parametrize("port", [4, 4095])
def test_static_ports_connect_two_domains_or_two_ports_of_one(tmp_path: Path, port: int) -> None:
    config = load(tmp_path, DOMAINS + pair(0, port, 1, port if port > 4 else 5) + pair(1, 30, 1, 31))

    first, second = config.static_evtchn
    assert (first.domain, first.port, first.remote_domain) == (0, port, 1)
    assert (second.domain, second.port, second.remote_domain, second.remote_port) == (1, 30, 1, 31)


@pytest.mark.checklist("A9.5")
@pytest.mark.parametrize(("pairs", "said"), [
    (pair(0, 20, 7, 21), "static_evtchn[0]: remote_domain: there is no domain 7"),
    (pair(9, 20, 0, 21), "static_evtchn[0]: domain: there is no domain 9"),
    (pair(0, 20, 2, 21), "static_evtchn[0]: remote_domain: domain 2 is no Xen domain"),
    (pair(0, 0, 1, 21), "static_evtchn[0]: port: 0 is not in 1..131071"),
    (pair(0, 20, 1, 131072), "static_evtchn[0]: remote_port: 131072 is not in 1..131071"),
    (pair(0, -1, 1, 20), "static_evtchn[0]: port: -1 is not in 1..131071"),
    (pair(0, 3, 1, 20), "static_evtchn[0]: port: 3 is the kernel's: it holds ports 1 to 3 of domain 0"),
    (pair(0, 20, 1, 4), "static_evtchn[0]: remote_port: 4 is the kernel's: it holds ports 1 to 4 of domain 1"),
    (pair(0, 20, 0, 20), "static_evtchn[0]: port 0:20 is connected to itself"),
    (pair(0, 20, 1, 20) + pair(1, 22, 0, 20), "static_evtchn[1]: remote_port: port 0:20 is given twice, first in"),
    (pair(0, 20, 1, 20) * 2, "static_evtchn[1]: port: port 0:20 is given twice, first in static_evtchn[0]"),
    (pair('"0"', 20, 1, 20), "static_evtchn[0].domain"),
    (pair(0, 20.5, 1, 20), "static_evtchn[0].port"),
    (pair(0, "true", 1, 20), "static_evtchn[0].port"),
    ("[[static_evtchn]]\ndomain = 0\nport = 20\nremote_domain = 1\n", "remote_port"),
    (pair(0, 20, 1, 20) + "vcpu = 1\n", "vcpu"),
    ("[static_evtchn]\ndomain = 0\n", "static_evtchn"),
])
def test_static_ports_that_make_no_sense_are_refused_with_their_key(tmp_path: Path, pairs: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, DOMAINS + pairs)

    assert said in str(refused.value)


@pytest.mark.parametrize(("text", "said"), [
    ('devices = ["echo", "floppy"]', "domain 0: devices: 'floppy' not in echo, heartbeat, shutdown"),
    ('devices = ["network"]', "devices: 'network' not in echo"),
    ('devices = ["echo", "echo"]', "devices: one is given twice"),
    ("devices = [1]", "devices"),
    ('devices = "echo"', "devices"),
    ("vmbus_irq = 208", "vmbus_irq: 208 is not in 0..207"),
    ("vmbus_irq = -1", "vmbus_irq: -1 is not in 0..207"),
    ("acpi_device = 1", "acpi_device"),
])  # fmt: skip
def test_what_makes_no_sense_of_hyper_v_is_refused_with_its_value(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, f'[[domain]]\nid = 0\nplatforms = ["xen", "hyperv"]\n{text}\n')

    assert said in str(refused.value)


def test_an_unknown_class_of_device_ends_up_with_exit_code_2_and_its_value(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_text('[[domain]]\nid = 0\nplatforms = ["hyperv"]\ndevices = ["floppy"]\n')

    done = subprocess.run(
        [sys.executable, "-m", "pvbus.supervisor", "up", "--config", str(path)],
        capture_output=True, text=True, check=False, timeout=30, env=environment(),
    )

    assert done.returncode == 2
    assert done.stderr == "pvbus up: domain 0: devices: 'floppy' not in echo, heartbeat, shutdown\n"


def test_devices_need_the_hyper_v_platform(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="domain 0: devices: they need the platform hyperv"):
        load(tmp_path, '[[domain]]\nid = 0\ndevices = ["echo"]\n')


def test_a_domain_on_hyper_v_has_an_acpi_device_an_interrupt_and_what_it_names(tmp_path: Path) -> None:
    (default, _), (ours,) = configuration.load(None).domain, load(
        tmp_path, '[[domain]]\nid = 0\nplatforms = ["hyperv"]\nacpi_device = false\nvmbus_irq = 0\ndevices = ["echo"]\n'
    ).domain

    assert (default.acpi_device, default.vmbus_irq, default.devices) == (True, 7, ("heartbeat", "shutdown"))
    assert (ours.acpi_device, ours.vmbus_irq, ours.devices) == (False, 0, ("echo",))


def test_the_host_has_a_service_for_each_device_that_can_be_named() -> None:
    assert set(SERVICES) == {DEVICE_CLASSES[name] for name in HOST_DEVICES}
    assert len(set(HOST_DEVICES.values())) == len(HOST_DEVICES)


def test_the_documented_examples_load_and_every_name_is_documented(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "configuration.md").read_text()

    examples = re.findall(r"^```toml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)

    assert len(examples) >= 4
    assert {load(tmp_path, example).profile for example in examples} >= {"linux-6.12", "seed"}
    in_profile = {name: profile for profile, names in PROFILES.items() for name in names}
    for variant, profile in in_profile.items():
        assert re.search(rf'^\| `"{variant}"` \|.*\| `{profile}` \|$', text, re.MULTILINE), variant
    assert all(f"\n* `{profile}`: " in text for profile in PROFILES)
    assert all(f"| `{key}` |" in text for key in MachineConfig.__struct_fields__)
    assert all(f"| `{key}` |" in text for key in DomainConfig.__struct_fields__)
    assert all(str(instance) in text for instance in HOST_DEVICES.values())
