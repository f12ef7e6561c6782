/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The 2-level event-channel ABI on a domain's shared info page: pending, mask, per-vCPU selector and upcall flag.
 * Written by the hypervisor (set pending, unmask) and by the domain's CPU processes (selector, pending, mask).
 * No policy belongs here: who may send is decided in drain.c, what is delivered in interrupt.c.
 */
#include "core.h"

/*
 * Mark a port for its vCPU, in order.  On hardware each raise is an upcall of its own and runs at once; ours run later, in
 * batches, and a bitmap has no order.  So the hypervisor notes in which order it raised; the CPU serves in that order, and
 * then scans for what is not noted.  Noted after pending is set and before the selector, see SYNC(2l_arrival).
 */
static int64_t mark(MemoryObject *domain, uint32_t port)
{
    uint64_t entry, old, sel = 1ull << (port / 64);
    uint32_t seen, tail;
    PV_LOAD64(entry, domain, PV_PORT_WORD(port), PV_RELAXED, "port.vcpu");
    uint32_t vcpu = PV_PORT_VCPU(entry) & (PV_VCPUS_MAX - 1);
    PV_LOAD32(tail, domain, PV_VCPU(vcpu, arrivals_tail), PV_RELAXED, "2l.arrival.tail");
    PV_LOAD32(seen, domain, PV_VCPU(vcpu, arrivals_seen), PV_RELAXED, "2l.arrival.seen");
    if (tail - seen >= PV_ARRIVALS) { /* only now: while events stream, the line of the CPU's index stays the CPU's */
        PV_LOAD32(seen, domain, PV_VCPU(vcpu, arrivals_head), PV_ACQUIRE, "2l.arrival.head");
        PV_STORE32(domain, PV_VCPU(vcpu, arrivals_seen), seen, PV_RELAXED, "2l.arrival.seen");
    }
    if (tail - seen < PV_ARRIVALS) {
        PV_STORE32(domain, PV_ARRIVAL(vcpu, tail), port, PV_RELAXED, "2l.arrival.entry");
        /* SYNC(2l_arrival): pending and entry before the tail; the CPU looks at pending first, then at the tail. */
        PV_STORE32(domain, PV_VCPU(vcpu, arrivals_tail), tail + 1, PV_RELEASE, "2l_arrival");
    }
    /* SYNC(2l_upcall): pending and selector are set before the flag; the CPU clears the flag before it takes the selector. */
    PV_OR64(old, domain, PV_VCPU_INFO(vcpu, evtchn_pending_sel), sel, "2l.sel");
    return old & sel ? 0 : pv_vcpu_mark(domain, vcpu);
}

/* evtchn_2l_set_pending: each step only if the one before found something new, all of them full barriers. */
int64_t pv_2l_set_pending(MemoryObject *domain, uint32_t port, uint64_t now)
{
    uint32_t word = port / 64;
    uint64_t bit = 1ull << (port % 64), old, mask;
    PV_OR64(old, domain, PV_SHARED(evtchn_pending) + 8u * word, bit, "2l.pending");
    if (old & bit)
        return 0;
    PV_STAMP64(domain, PV_PENDING_SINCE(port), now);
    /* SYNC(2l_unmask): pending before we look at the mask; pv_2l_unmask clears the mask before it looks at pending. */
    PV_SMP_MB_AFTER_RMW(domain, "2l_unmask");
    PV_LOAD64(mask, domain, PV_SHARED(evtchn_mask) + 8u * word, PV_RELAXED, "2l.mask");
    if (mask & bit)
        return 0;
    return mark(domain, port);
}

/*
 * EVTCHNOP_unmask re-raises only if the port was masked.  The end of interrupt (eoi) does so in any case: then a mask that
 * an heir has already taken away cannot hide the pending bit.
 */
int64_t pv_2l_unmask(MemoryObject *domain, uint32_t port, int eoi)
{
    uint32_t word = port / 64;
    uint64_t bit = 1ull << (port % 64), old, pending;
    PV_AND64(old, domain, PV_SHARED(evtchn_mask) + 8u * word, ~bit, "2l.unmask");
    if (!(old & bit) && !eoi)
        return 0;
    /* SYNC(2l_unmask): the mask is clear before we look at pending; the sender does it the other way round. */
    PV_SMP_MB_AFTER_RMW(domain, "2l_unmask");
    PV_LOAD64(pending, domain, PV_SHARED(evtchn_pending) + 8u * word, PV_RELAXED, "2l.repending");
    if (!(pending & bit))
        return 0;
    return mark(domain, port);
}
