# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of the machine: every message that supervisor, rooms and users say to each other.

A call has a reply (`Done`, `Failure` or the message named); a tell has none. Calls run one way: user -> file
-> hypervisor -> cpu. A message is never on the path of an event; that way runs through shared memory.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

import msgspec

from pvbus.actors.runtime.wire import FDS_MAX, Message

# ---- user -> supervisor


class Hello(Message, frozen=True, kw_only=True):
    """Attach to the machine; the reply is Welcome."""

    fds_max: ClassVar[int | None] = 0
    version: int = 1


class Welcome(Message, frozen=True, kw_only=True):
    """Tell an attached user whom it talks to."""

    fds_max: ClassVar[int | None] = 0
    name: str
    run_id: str


class OpenEvtchn(Message, frozen=True, kw_only=True):
    """Open /dev/xen/evtchn of a domain; the reply is Opened. ENODEV without the xen platform, EMFILE when no
    slot is free. `pid` is whose open it is, where somebody else asks for it: a front end.
    """

    fds_max: ClassVar[int | None] = 0
    domain: int
    comm: str = ""
    mode: int = os.O_RDWR
    pid: int = 0


class Reopen(Message, frozen=True, kw_only=True):
    """Use an open file whose descriptor came from another process; fds: that descriptor. The reply is Opened. EINVAL if
    it is none of ours, EIO when the file's process has died.
    """

    fds_max: ClassVar[int | None] = 1


class Opened(Message, frozen=True, kw_only=True):
    """Answer OpenEvtchn and Reopen. fds: file page, public page (read-only), connection to the file process; for an open
    its doorbell, too. `mode` is the access mode of the open. The first Attach on the connection has been sent on the
    user's behalf.
    """

    fds_max: ClassVar[int | None] = 4
    slot: int
    ports_max: int
    mode: int = os.O_RDWR


class Status(Message, frozen=True, kw_only=True):
    """Ask for the state of the machine; the reply is Report."""

    fds_max: ClassVar[int | None] = 0
class Report(Message, frozen=True, kw_only=True):
    """Answer Status with plain data. fds of a report to an inspector: the machine's segments, in the order of
    `segments`.
    """

    fds_max: ClassVar[int | None] = FDS_MAX
    data: dict[str, Any]
    segments: list[str] = msgspec.field(default_factory=list)


class Inspect(Message, frozen=True, kw_only=True):
    """Ask for the machine's segments, to look at them while everything runs; the reply is Report with
    descriptors.
    """

    fds_max: ClassVar[int | None] = 0
class InspectFile(Message, frozen=True, kw_only=True):
    """Ask for the page of an open file, to look at its ring; the reply is Report with one descriptor. ENOENT without it."""

    fds_max: ClassVar[int | None] = 0
    slot: int


class Settle(Message, frozen=True, kw_only=True):
    """Ask that every submission ring is drained and every upcall done; Done once it was so."""

    fds_max: ClassVar[int | None] = 0
class RaiseVirq(Message, frozen=True, kw_only=True):
    """Raise a VIRQ. ENOENT when nobody has bound it, EINVAL for a bad one, ESRCH without the domain."""

    fds_max: ClassVar[int | None] = 0
    virq: int
    domain: int = 0
    vcpu: int = 0


class EventChannelOp(Message, frozen=True, kw_only=True):
    """Mirror HYPERVISOR_event_channel_op as `domain`'s kernel; `argument` None is a bad pointer. The reply is OpDone."""

    fds_max: ClassVar[int | None] = 0
    op: int
    argument: bytes | None
    domain: int = 0


class OpDone(Message, frozen=True, kw_only=True):
    """Answer EventChannelOp: the structure as the hypervisor leaves it."""

    fds_max: ClassVar[int | None] = 0
    argument: bytes


class SetVirqHandler(Message, frozen=True, kw_only=True):
    """Mirror XEN_DOMCTL_set_virq_handler: `domain` handles a global VIRQ from now on. EINVAL, ESRCH."""

    fds_max: ClassVar[int | None] = 0
    virq: int
    domain: int


class SetAffinity(Message, frozen=True, kw_only=True):
    """Mirror a write to smp_affinity: have a vCPU serve a port. ESRCH, ENOENT, EINVAL for what cannot move."""

    fds_max: ClassVar[int | None] = 0
    domain: int
    port: int
    vcpu: int


class SoftReset(Message, frozen=True, kw_only=True):
    """Have a domain boot another kernel: its files end, its ports are closed, it is on its configured ABI again. ESRCH."""

    fds_max: ClassVar[int | None] = 0
    domain: int


class Advance(Message, frozen=True, kw_only=True):
    """Move the machine's clock forward."""

    fds_max: ClassVar[int | None] = 0
    ns: int


class Shutdown(Message, frozen=True, kw_only=True):
    """Stop the machine in order; Done is sent when it has begun."""

    fds_max: ClassVar[int | None] = 0


# ---- supervisor -> hypervisor


class CpuUp(Message, frozen=True, kw_only=True):
    """Connect a virtual CPU's process, first or reborn. fds: socket to it, its doorbell; on the Hyper-V platform the doorbell of
    its exits. Done once it has recovered.
    """

    fds_max: ClassVar[int | None] = 3
    domain: int
    vcpu: int


class FileUp(Message, frozen=True, kw_only=True):
    """Make an open file known. fds: socket to its process, file page, doorbell. Done once its CPUs know it."""

    fds_max: ClassVar[int | None] = 3
    slot: int
    domain: int
    reborn: bool = False


class FilesKnown(Message, frozen=True, kw_only=True):
    """Tell an heir that it has heard of every file that lives; what else its pages call open is released."""

    fds_max: ClassVar[int | None] = 0


class Rewire(Message, frozen=True, kw_only=True):
    """supervisor -> file: connect to the hypervisor's heir. fds: the socket."""

    fds_max: ClassVar[int | None] = 1


# ---- hypervisor -> cpu


class AttachFile(Message, frozen=True, kw_only=True):
    """Map an open file's page. fds: page, doorbell."""

    fds_max: ClassVar[int | None] = 2
    slot: int


class DetachFile(Message, frozen=True, kw_only=True):
    """Forget an open file; its doorbell is closed."""

    fds_max: ClassVar[int | None] = 0
    slot: int


class Go(Message, frozen=True, kw_only=True):
    """Begin to take upcalls; an heir first finishes what its forerunner held."""

    fds_max: ClassVar[int | None] = 0
class FlushUpcalls(Message, frozen=True, kw_only=True):
    """Deliver everything pending now; Done when it is in the rings."""

    fds_max: ClassVar[int | None] = 0


# ---- file -> hypervisor: the hypercalls of its domain, and the guest's irq layer


class AttachSubmission(Message, frozen=True, kw_only=True):
    """Add a user process's submission ring. fds: ring, doorbell. Done with its index. `index` >= 0 repeats
    after a rebirth.
    """

    fds_max: ClassVar[int | None] = 2
    pid: int
    index: int = -1


class DetachSubmission(Message, frozen=True, kw_only=True):
    """Drain and forget a submission ring: its process has gone."""

    fds_max: ClassVar[int | None] = 0
    index: int


class AllocUnbound(Message, frozen=True, kw_only=True):
    """Mirror EVTCHNOP_alloc_unbound with dom = DOMID_SELF; Done with the port."""

    fds_max: ClassVar[int | None] = 0
    remote_domain: int


class BindInterdomain(Message, frozen=True, kw_only=True):
    """Mirror EVTCHNOP_bind_interdomain; Done with the local port."""

    fds_max: ClassVar[int | None] = 0
    remote_domain: int
    remote_port: int


class BindVirq(Message, frozen=True, kw_only=True):
    """Mirror EVTCHNOP_bind_virq; Done with the port."""

    fds_max: ClassVar[int | None] = 0
    virq: int
    vcpu: int = 0


class BindIrq(Message, frozen=True, kw_only=True):
    """Mirror bind_evtchn_to_irqhandler_lateeoi: handler, then unmask. ENOMEM beyond the ABI, EBUSY when it
    has a handler.
    """

    fds_max: ClassVar[int | None] = 0
    port: int
    static: bool = False


class Hypercalls(Message, frozen=True, kw_only=True):
    """Make several of the calls of this section, by name and fields, one after the other up to the first that fails; the reply
    is Values.
    """

    fds_max: ClassVar[int | None] = 0
    calls: list[tuple[str, dict[str, int | bool]]]


class Values(Message, frozen=True, kw_only=True):
    """Answer Hypercalls and Binds: what those that were made gave, and the errno of the one that failed, or 0."""

    fds_max: ClassVar[int | None] = 0
    values: list[int]
    errno: int = 0
    text: str = ""


class UnbindIrq(Message, frozen=True, kw_only=True):
    """Mirror disable_irq and unbind_from_irqhandler: nothing of the port enters the ring after Done."""

    fds_max: ClassVar[int | None] = 0
    port: int


class NrChannels(Message, frozen=True, kw_only=True):
    """Mirror xen_evtchn_nr_channels; Done with the number."""

    fds_max: ClassVar[int | None] = 0


class SendPort(Message, frozen=True, kw_only=True):
    """Mirror EVTCHNOP_send with its result dropped, for a NOTIFY that did not come through a submission ring."""

    fds_max: ClassVar[int | None] = 0
    port: int


class ClosePort(Message, frozen=True, kw_only=True):
    """Mirror EVTCHNOP_close of a port that no handler was bound to."""

    fds_max: ClassVar[int | None] = 0
    port: int


class ForgetPorts(Message, frozen=True, kw_only=True):
    """A defect of the driver, switched on: no record is left of the handlers of this file (H1), or of the
    channel `leaked` that was handed out to it (H3). Nobody closes them any more.
    """

    fds_max: ClassVar[int | None] = 0
    leaked: int = 0


class Barrier(Message, frozen=True, kw_only=True):
    """Done when everything notified before is in the rings: RESET must throw it away, as on the device."""

    fds_max: ClassVar[int | None] = 0
class Rejoined(Message, frozen=True, kw_only=True):
    """Tell a hypervisor's heir that all submission rings of the file are attached again: now its users may be missed."""

    fds_max: ClassVar[int | None] = 0


class ReleaseFile(Message, frozen=True, kw_only=True):
    """Mirror evtchn_release: unbind every port of the file, forget it; Done."""

    fds_max: ClassVar[int | None] = 0
class Released(Message, frozen=True, kw_only=True):
    """hypervisor -> file: the last reference has gone and the ports are free."""

    fds_max: ClassVar[int | None] = 0


# ---- user -> file


class Attach(Message, frozen=True, kw_only=True):
    """Ask for a submission ring; the reply is Attached. One a process."""

    fds_max: ClassVar[int | None] = 0
    pid: int


class Attached(Message, frozen=True, kw_only=True):
    """Answer Attach. fds: submission ring, its doorbell."""

    fds_max: ClassVar[int | None] = 2
    index: int


class Adopt(Message, frozen=True, kw_only=True):
    """One more process uses the file: a forked child's first word, a tell on the connection that it inherited; or from the
    supervisor, who waits for Done, on behalf of a process that was passed the descriptor. fds: a connection of its own.
    """

    fds_max: ClassVar[int | None] = 1


class Ioctl(Message, frozen=True, kw_only=True):
    """Mirror evtchn_ioctl; `argument` None is a bad pointer. Done with the driver's value."""

    fds_max: ClassVar[int | None] = 0
    request: int
    argument: bytes | None


class Binds(Message, frozen=True, kw_only=True):
    """Make one binding ioctl with each of `arguments`, in order, up to the first that fails; the reply is Values."""

    fds_max: ClassVar[int | None] = 0
    request: int
    arguments: list[bytes]


class Detach(Message, frozen=True, kw_only=True):
    """The process has closed its references; Done after the release, if these were the last."""

    fds_max: ClassVar[int | None] = 0
