/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The 2-level event-channel ABI on a domain's shared info page: pending, mask, per-vCPU selector and upcall flag.
 * Written by the hypervisor (set pending, unmask) and by the domain's CPU processes (selector, pending, mask).
 * No policy belongs here: who may send is decided in event_path.c, what is delivered in interrupt.c.
 */
#include "core.h"

#include <time.h>

uint64_t pv_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Set a selector bit of a vCPU and its upcall flag; 1 + vCPU if the flag was clear before. */
int64_t pv_vcpu_mark(MemoryObject *domain, uint32_t vcpu, uint32_t word)
{
    uint64_t old;
    uint8_t was;
    /* SYNC(2l_upcall): pending and selector are set before the flag; the CPU clears the flag before it takes the selector. */
    PV_OR64(old, domain, PV_VCPU_INFO(vcpu, evtchn_pending_sel), 1ull << word, "2l.sel");
    if (old & (1ull << word))
        return 0;
    PV_XCHG8(was, domain, PV_VCPU_INFO(vcpu, evtchn_upcall_pending), 1, "2l.upcall");
    return was ? 0 : 1 + (int64_t)vcpu;
}

/*
 * Mark a port for its vCPU, in order.  On hardware each raise is an upcall of its own and runs at once; ours run later, in
 * batches, and a bitmap has no order.  So the hypervisor notes in which order it raised; the CPU serves in that order, and
 * then scans for what is not noted.  Noted after pending is set and before the selector, see SYNC(2l_arrival).
 */
static int64_t mark(MemoryObject *domain, uint32_t port)
{
    uint64_t entry;
    uint32_t head, tail;
    PV_LOAD64(entry, domain, PV_PORT_WORD(port), PV_RELAXED, "port.vcpu");
    uint32_t vcpu = PV_PORT_VCPU(entry) & (PV_VCPUS_MAX - 1);
    PV_LOAD32(tail, domain, PV_VCPU(vcpu, arrivals_tail), PV_RELAXED, "2l.arrival.tail");
    PV_LOAD32(head, domain, PV_VCPU(vcpu, arrivals_head), PV_ACQUIRE, "2l.arrival.head");
    if (tail - head < PV_ARRIVALS) {
        PV_STORE32(domain, PV_ARRIVAL(vcpu, tail), port, PV_RELAXED, "2l.arrival.entry");
        /* SYNC(2l_arrival): pending and entry before the tail; the CPU looks at pending first, then at the tail. */
        PV_STORE32(domain, PV_VCPU(vcpu, arrivals_tail), tail + 1, PV_RELEASE, "2l_arrival");
    }
    return pv_vcpu_mark(domain, vcpu, port / 64);
}

/* evtchn_2l_set_pending: each step only if the one before found something new, all of them full barriers. */
int64_t pv_set_pending(MemoryObject *domain, uint32_t port, uint64_t now)
{
    uint32_t word = port / 64;
    uint64_t bit = 1ull << (port % 64), old, mask;
    PV_OR64(old, domain, PV_SHARED(evtchn_pending) + 8u * word, bit, "2l.pending");
    if (old & bit)
        return 0;
    PV_STAMP64(domain, PV_PENDING_SINCE(port), now);
    /* SYNC(2l_unmask): pending before we look at the mask; pv_unmask clears the mask before it looks at pending. */
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
int64_t pv_unmask(MemoryObject *domain, uint32_t port, int eoi)
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

/*
 * Ask whether the process of a vCPU sleeps.  The upcall flag was set before by a locked exchange, a full barrier: it is
 * SYNC(cpu_sleep), whose partner (announce, barrier, look at the flag) is drain.c: either we see the announcement, or
 * it sees the flag.
 */
int64_t pv_vcpu_kick(MemoryObject *domain, uint32_t vcpu)
{
    uint32_t sleeping;
    PV_SMP_MB_AFTER_RMW(domain, "cpu_sleep");
    PV_LOAD32(sleeping, domain, PV_VCPU(vcpu, sleeping), PV_RELAXED, "cpu.sleeping");
    if (!sleeping)
        return 0;
    PV_XCHG32(sleeping, domain, PV_VCPU(vcpu, sleeping), 0, "cpu.wake");
    return sleeping != 0;
}
