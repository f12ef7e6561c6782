# SPDX-License-Identifier: Apache-2.0
"""A8, A9: what the eight ioctls answer, and in which order they look at things."""

from collections.abc import Callable
from typing import Any

import pytest

from pvbus.tests.contract.support import (
    BIND_INTERDOMAIN,
    BIND_STATIC,
    BIND_UNBOUND_PORT,
    BIND_VIRQ,
    DOMID_SELF,
    NOTIFY,
    PORTS_MAX,
    RESET,
    RESTRICT_DOMID,
    UNBIND,
    connect,
    connect_many,
    errno_of,
    pack,
    take,
)

Opened = Callable[..., Any]
WITH_ARGUMENT = [
    BIND_VIRQ, BIND_INTERDOMAIN, BIND_UNBOUND_PORT, UNBIND, NOTIFY, RESTRICT_DOMID, BIND_STATIC,
]  # fmt: skip


# Arguments -------------------------------------------------------------------------------------------


@pytest.mark.checklist("A9.1", "A9.2", "A9.3", "A9.4", "A9.5", "A9.6", "A9.8")
@pytest.mark.parametrize("request_number", WITH_ARGUMENT)
def test_a_bad_pointer_answers_efault(opened: Opened, request_number: int) -> None:
    assert errno_of(opened().ioctl, request_number, None) == "EFAULT"


@pytest.mark.checklist("A9.1", "A9.2", "A9.3", "A9.4", "A9.5", "A9.6", "A9.8")
@pytest.mark.parametrize("request_number", WITH_ARGUMENT)
def test_a_buffer_that_is_too_short_answers_efault(opened: Opened, request_number: int) -> None:
    size = request_number >> 16

    assert errno_of(opened().ioctl, request_number, bytearray(size - 1)) == "EFAULT"


@pytest.mark.checklist("A9.9")
@pytest.mark.parametrize(
    "request_number", [0, 0x00044508, 0x0000450F, 0x00044505, 0x00084500, 0x00044501, 0x80044504, 0x5401]
)
def test_an_unknown_request_answers_enosys(opened: Opened, request_number: int) -> None:
    assert errno_of(opened().ioctl, request_number, bytearray(16)) == "ENOSYS"
    assert errno_of(opened().ioctl, request_number, None) == "ENOSYS"


@pytest.mark.checklist("A1.4", "A9.3", "A9.6", "A9.4")
def test_requests_go_by_number_and_structure_too(opened: Opened) -> None:
    file = opened()

    port = file.ioctl(BIND_UNBOUND_PORT, bytearray(pack(0)))
    peer = file.ioctl(BIND_INTERDOMAIN, bytearray(pack(0, port)))

    assert 0 < port < peer
    assert file.ioctl(NOTIFY, bytearray(pack(peer))) == 0
    assert file.ioctl(UNBIND, bytearray(pack(port))) == 0


# BIND_VIRQ -------------------------------------------------------------------------------------------


@pytest.mark.checklist("A9.1")
def test_a_bound_virq_arrives_at_its_port(machine: Any, opened: Opened) -> None:
    file = opened()
    port = file.bind_virq(1)

    machine.raise_virq(1)

    assert port > 0
    assert take(machine, file) == [port]


@pytest.mark.checklist("A9.1", "X7")
@pytest.mark.parametrize("virq", [24, 99, 0xFFFFFFFF])
def test_a_virq_that_does_not_exist_answers_einval(opened: Opened, virq: int) -> None:
    assert errno_of(opened().bind_virq, virq) == "EINVAL"


@pytest.mark.checklist("A9.1", "X7")
def test_a_virq_that_is_bound_answers_eexist_until_it_is_unbound(opened: Opened) -> None:
    first, second = opened(), opened()
    port = first.bind_virq(3)

    refused = [errno_of(first.bind_virq, 3), errno_of(second.bind_virq, 3)]
    first.unbind(port)

    assert refused == ["EEXIST", "EEXIST"]
    assert second.bind_virq(3) == port


@pytest.mark.checklist("A9.1", "X7")
def test_a_virq_of_the_kernel_answers_eexist(opened: Opened) -> None:
    assert errno_of(opened().bind_virq, 0) == "EEXIST"


# BIND_INTERDOMAIN ------------------------------------------------------------------------------------


@pytest.mark.checklist("A9.2", "X7")
def test_a_connected_port_is_born_with_an_event_and_its_peer_is_not(machine: Any, opened: Opened) -> None:
    rx, tx = opened(), opened()
    rx_port = rx.bind_unbound_port(remote_domain=0)

    tx_port = tx.bind_interdomain(0, rx_port)

    assert take(machine, tx) == [tx_port]
    assert take(machine, rx) == []


@pytest.mark.checklist("A9.2", "X7")
@pytest.mark.parametrize("domain", [5, 32751, 0x7FF1, 0xFFFF])
def test_a_domain_that_does_not_exist_answers_esrch_before_the_port_is_looked_at(
    opened: Opened, domain: int
) -> None:
    assert errno_of(opened().bind_interdomain, domain, 0xFFFFFFFF) == "ESRCH"


@pytest.mark.checklist("A9.2", "X7")
@pytest.mark.parametrize("port", [0, 1, 4095, 4096, 0xFFFFFFFF])
def test_a_remote_port_that_is_not_unbound_answers_einval(opened: Opened, port: int) -> None:
    assert errno_of(opened().bind_interdomain, 0, port) == "EINVAL"


@pytest.mark.checklist("A9.2", "X7")
def test_a_remote_port_can_be_connected_once(machine: Any, opened: Opened) -> None:
    pair, third = connect(machine, opened(), opened()), opened()

    refused = [errno_of(third.bind_interdomain, 0, port) for port in (pair.rx_port, pair.tx_port)]

    assert refused == ["EINVAL", "EINVAL"]


@pytest.mark.checklist("A9.2", "X7")
def test_a_port_reserved_for_another_domain_answers_einval(opened: Opened) -> None:
    port = opened().bind_unbound_port(remote_domain=1)

    assert errno_of(opened().bind_interdomain, 0, port) == "EINVAL"


@pytest.mark.checklist("A9.2", "A9.3")
@pytest.mark.parametrize("domain", [0, DOMID_SELF, 0x10000, 0x10000 + DOMID_SELF])
def test_domain_numbers_are_cut_to_sixteen_bits(machine: Any, opened: Opened, domain: int) -> None:
    rx, tx = opened(), opened()

    tx_port = tx.bind_interdomain(domain, rx.bind_unbound_port(remote_domain=domain))

    assert take(machine, tx) == [tx_port]


@pytest.mark.checklist("A9.2", "A9.3", "A9.6")
def test_events_go_between_domains_both_ways(machine: Any, opened: Opened) -> None:
    here, there = opened(domain=0), opened(domain=1)
    port = here.bind_unbound_port(remote_domain=1)
    peer = there.bind_interdomain(0, port)
    assert take(machine, there) == [peer]
    there.write(pack(peer))

    there.notify(peer)
    here.notify(port)

    assert take(machine, here) == [port]
    assert take(machine, there) == [peer]


# UNBIND ----------------------------------------------------------------------------------------------


@pytest.mark.checklist("A9.4", "A12.13", "X8")
def test_unbind_looks_at_the_range_before_the_owner(file_2level: Any) -> None:
    for port in (0, 1, PORTS_MAX - 1):
        assert errno_of(file_2level.unbind, port) == "ENOTCONN"
    for port in (PORTS_MAX, PORTS_MAX + 1, 0xFFFFFFFF):
        assert errno_of(file_2level.unbind, port) == "EINVAL"


@pytest.mark.checklist("A9.4", "A8.2")
def test_unbind_frees_the_port_and_only_its_owner_may(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())

    by_stranger = errno_of(pair.tx.unbind, pair.rx_port)
    pair.rx.unbind(pair.rx_port)
    again = errno_of(pair.rx.unbind, pair.rx_port)

    assert (by_stranger, again) == ("ENOTCONN", "ENOTCONN")
    assert pair.tx.bind_unbound_port(remote_domain=0) == pair.rx_port


@pytest.mark.checklist("A9.4", "X9")
def test_the_peer_of_an_unbound_port_can_be_connected_anew(machine: Any, opened: Opened) -> None:
    pair, third = connect(machine, opened(), opened()), opened()
    pair.rx.unbind(pair.rx_port)

    pair.tx.notify(pair.tx_port)
    new_port = third.bind_interdomain(0, pair.tx_port)

    assert take(machine, third) == [new_port]
    third.write(pack(new_port))
    pair.tx.notify(pair.tx_port)
    assert take(machine, third) == [new_port]


# BIND_STATIC -----------------------------------------------------------------------------------------


@pytest.mark.checklist("A9.5", "A12.15")
def test_bind_static_of_a_free_number_answers_zero_and_makes_it_ours(opened: Opened) -> None:
    file = opened()

    value = file.ioctl(BIND_STATIC, bytearray(pack(100)))

    assert value == 0
    assert file.notify(100) in (0, None)
    assert errno_of(file.bind_static, 100) == "EISCONN"
    file.unbind(100)
    assert errno_of(file.unbind, 100) == "ENOTCONN"


@pytest.mark.checklist("A9.5", "A12.15", "X2")
def test_bind_static_beyond_the_last_port_answers_enomem(opened: Opened, file_2level: Any) -> None:
    for file, ports_max in ((opened(), 131072), (file_2level, PORTS_MAX)):
        for port in (ports_max, ports_max + 1, 0x7FFFFFFF, 0xFFFFFFFF):
            assert errno_of(file.bind_static, port) == "ENOMEM"
            assert errno_of(file.notify, port) == "ENOTCONN"


@pytest.mark.checklist("A9.5")
def test_bind_static_of_a_port_that_is_ours_answers_eisconn_and_leaves_it(
    machine: Any, opened: Opened
) -> None:
    pair = connect(machine, opened(), opened())

    assert errno_of(pair.rx.bind_static, pair.rx_port) == "EISCONN"

    pair.send()
    assert take(machine, pair.rx) == [pair.rx_port]


@pytest.mark.checklist("A9.5", "H2")
def test_bind_static_is_not_restricted(opened: Opened) -> None:
    file = opened()
    file.restrict_domid(1)

    assert file.ioctl(BIND_STATIC, bytearray(pack(200))) == 0


# NOTIFY ----------------------------------------------------------------------------------------------


@pytest.mark.checklist("A9.6")
@pytest.mark.parametrize("port", [0, 1, 4095, 4096, 0xFFFFFFFF])
def test_notify_of_a_port_that_is_not_ours_answers_enotconn(opened: Opened, port: int) -> None:
    assert errno_of(opened().notify, port) == "ENOTCONN"


@pytest.mark.checklist("A9.6", "X9")
def test_notify_says_nothing_of_what_the_hypervisor_said(machine: Any, opened: Opened) -> None:
    file = opened()
    unbound, virq = file.bind_unbound_port(remote_domain=0), file.bind_virq(3)

    values = [file.ioctl(NOTIFY, bytearray(pack(port))) for port in (unbound, virq)]

    assert values == [0, 0]
    assert take(machine, file) == []


@pytest.mark.checklist("A9.6")
def test_a_notify_before_an_unbind_is_not_lost(machine: Any, opened: Opened) -> None:
    pairs = connect_many(machine, opened(), opened(), 16)

    for pair in pairs:
        pair.tx.notify(pair.tx_port)
        pair.tx.unbind(pair.tx_port)

    assert sorted(take(machine, pairs[0].rx)) == [pair.rx_port for pair in pairs]


# RESET -----------------------------------------------------------------------------------------------


@pytest.mark.checklist("A9.7", "A9.10")
@pytest.mark.parametrize("argument", [None, bytearray(), bytearray(b"whatever")])
def test_reset_does_not_look_at_its_argument(opened: Opened, argument: bytearray | None) -> None:
    assert opened().ioctl(RESET, argument) == 0


@pytest.mark.checklist("A9.7")
def test_reset_throws_entries_away_and_leaves_their_ports_masked(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    pair.send()

    pair.rx.reset()
    pair.send()

    assert take(machine, pair.rx) == []
    pair.enable()
    assert take(machine, pair.rx) == [pair.rx_port]


@pytest.mark.checklist("A9.7")
def test_reset_makes_the_whole_ring_free_again(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())
    pair.overflow()

    pair.rx.reset()
    pair.enable()
    pair.queue(64)

    assert take(machine, pair.rx) == [pair.rx_port] * 64


# RESTRICT_DOMID --------------------------------------------------------------------------------------


@pytest.mark.checklist("A9.8")
@pytest.mark.parametrize("domid", [0, 0x7FF0, 0x7FF1, 0x7FFF, 0x8000, 0xFFFF])
def test_a_restriction_to_no_real_domain_answers_einval_and_restricts_nothing(
    opened: Opened, domid: int
) -> None:
    file = opened()

    assert errno_of(file.restrict_domid, domid) == "EINVAL"
    assert file.bind_unbound_port(remote_domain=0) > 0


@pytest.mark.checklist("A9.8")
def test_a_second_restriction_answers_eacces_before_its_argument_is_looked_at(opened: Opened) -> None:
    file = opened()
    file.restrict_domid(0x7FEF)

    refused = [errno_of(file.restrict_domid, domid) for domid in (0x7FEF, 5, 0, 0xFFFF)]

    assert refused == ["EACCES"] * 4
    assert errno_of(file.ioctl, RESTRICT_DOMID, None) == "EACCES"


@pytest.mark.checklist("A9.1", "A9.3")
@pytest.mark.parametrize("request_number", [BIND_VIRQ, BIND_UNBOUND_PORT])
@pytest.mark.parametrize("argument", [None, bytearray(pack(1)), bytearray(pack(99))])
def test_a_restricted_file_may_not_bind_and_says_so_before_it_looks_at_the_argument(
    opened: Opened, request_number: int, argument: bytearray | None
) -> None:
    file = opened()
    file.restrict_domid(1)

    assert errno_of(file.ioctl, request_number, argument) == "EACCES"


@pytest.mark.checklist("A9.2")
def test_bind_interdomain_looks_at_the_pointer_before_the_restriction(opened: Opened) -> None:
    file = opened()
    file.restrict_domid(5)

    answers = [errno_of(file.ioctl, BIND_INTERDOMAIN, argument) for argument in (
        None, bytearray(pack(0, 1)), bytearray(pack(0x10005, 1)), bytearray(pack(5, 1)),
    )]  # fmt: skip

    assert answers == ["EFAULT", "EACCES", "EACCES", "ESRCH"]


@pytest.mark.checklist("A9.2", "A9.8")
def test_a_restricted_file_may_connect_to_its_domain(machine: Any, opened: Opened) -> None:
    there, file = opened(domain=1), opened(domain=0)
    port = there.bind_unbound_port(remote_domain=0)
    file.restrict_domid(1)

    mine = file.bind_interdomain(1, port)

    assert take(machine, file) == [mine]


@pytest.mark.checklist("A9.8")
def test_a_restriction_leaves_earlier_bindings_and_other_files_alone(machine: Any, opened: Opened) -> None:
    pair = connect(machine, opened(), opened())

    pair.rx.restrict_domid(1)
    pair.send()

    assert take(machine, pair.rx) == [pair.rx_port]
    pair.rx.notify(pair.rx_port)
    assert take(machine, pair.tx) == [pair.tx_port]
    assert pair.tx.bind_unbound_port(remote_domain=0) > 0
    assert opened().bind_unbound_port(remote_domain=0) > 0
    assert pair.rx.ioctl(RESET, None) == 0
    assert errno_of(pair.rx.unbind, pair.rx_port) == ""


@pytest.mark.checklist("A9.8", "A1.1")
def test_a_restriction_holds_for_every_reference_to_the_open_file(opened: Opened) -> None:
    file = opened()
    other = file.dup()
    try:
        other.restrict_domid(1)

        assert errno_of(file.bind_unbound_port, 0) == "EACCES"
    finally:
        other.close()
