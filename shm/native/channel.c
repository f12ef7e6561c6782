/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Pending and mask of a port, whatever the ABI: a domain boots with the 2-level one and switches by EVTCHNOP_init_control.
 */
#include "core.h"

#include <time.h>

uint64_t pv_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int64_t pv_machine_now(MemoryObject *machine)
{
    uint64_t offset;
    PV_LOAD64(offset, machine, offsetof(struct pv_machine_header, clock_offset_ns), PV_RELAXED, "clock.offset");
#ifndef PVBUS_EXPLORED
    offset += pv_now_ns();
#endif
    return (int64_t)offset; /* explored: a scenario's clock is this word, and stands still */
}

int64_t pv_set_pending(MemoryObject *domain, uint32_t port, uint64_t now)
{
    int64_t fifo;
    PV_TRY(fifo, pv_is_fifo(domain));
    return fifo ? pv_fifo_set_pending(domain, port, now) : port < PV_PORTS_2L ? pv_2l_set_pending(domain, port, now) : 0;
}

int64_t pv_unmask(MemoryObject *domain, uint32_t port, int eoi)
{
    int64_t fifo;
    PV_TRY(fifo, pv_is_fifo(domain));
    return fifo ? pv_fifo_unmask(domain, port) : port < PV_PORTS_2L ? pv_2l_unmask(domain, port, eoi) : 0;
}

int64_t pv_mask(MemoryObject *domain, uint32_t port)
{
    int64_t fifo, at;
    PV_TRY(fifo, pv_is_fifo(domain));
    if (fifo) {
        uint32_t old;
        PV_TRY(at, pv_fifo_word_at(domain, port));
        if (at != 0)
            PV_OR32(old, domain, at, PV_FIFO_MASKED, "irq.mask");
        (void)old;
    } else if (port < PV_PORTS_2L) {
        uint64_t old;
        PV_OR64(old, domain, PV_SHARED(evtchn_mask) + 8u * (port / 64), 1ull << (port % 64), "irq.mask");
        (void)old;
    }
    return 0;
}

int64_t pv_clear_pending(MemoryObject *domain, uint32_t port)
{
    int64_t fifo, at;
    PV_TRY(fifo, pv_is_fifo(domain));
    if (fifo) {
        uint32_t old = 0;
        PV_TRY(at, pv_fifo_word_at(domain, port));
        if (at != 0) {
            PV_AND32(old, domain, at, ~PV_FIFO_PENDING, "irq.clear");
        } else { /* raised early: nothing is to be replayed */
            uint64_t queue;
            PV_AND64(queue, domain, PV_QUEUE_WORD(port), ~PV_QUEUE_PENDING, "irq.clear");
            (void)queue;
        }
        (void)old;
    } else if (port < PV_PORTS_2L) {
        uint64_t old;
        PV_AND64(old, domain, PV_SHARED(evtchn_pending) + 8u * (port / 64), ~(1ull << (port % 64)), "irq.clear");
        (void)old;
    }
    return 0;
}

/* Is an event pending, or noted for the time when the event array has a word for it?  Acquire: what is read behind it is not older. */
int64_t pv_is_pending(MemoryObject *domain, uint32_t port)
{
    int64_t fifo, at;
    uint64_t pending = 0;
    PV_TRY(fifo, pv_is_fifo(domain));
    if (fifo) {
        PV_TRY(at, pv_fifo_word_at(domain, port));
        if (at != 0) {
            uint32_t word;
            PV_LOAD32(word, domain, at, PV_ACQUIRE, "fifo.word");
            return (word & PV_FIFO_PENDING) != 0;
        }
        PV_LOAD64(pending, domain, PV_QUEUE_WORD(port), PV_ACQUIRE, "fifo.queue");
        return (pending & PV_QUEUE_PENDING) != 0;
    }
    if (port < PV_PORTS_2L)
        PV_LOAD64(pending, domain, PV_SHARED(evtchn_pending) + 8u * (port / 64), PV_ACQUIRE, "2l.is_pending");
    return (int64_t)(pending >> (port % 64) & 1);
}

int64_t pv_mask_and_clear(MemoryObject *domain, uint32_t port)
{
    int64_t fifo, at, r;
    PV_TRY(fifo, pv_is_fifo(domain));
    if (!fifo) {
        PV_TRY(r, pv_mask(domain, port));
        return pv_clear_pending(domain, port);
    }
    PV_TRY(at, pv_fifo_word_at(domain, port));
    if (at != 0) { /* bits of one word: one exchange */
        uint32_t word;
        int done = 0;
        PV_LOAD32(word, domain, at, PV_RELAXED, "fifo.word");
        while (!done)
            PV_CAS32(done, domain, at, word, (word | PV_FIFO_MASKED) & ~PV_FIFO_PENDING, "irq.ack");
    }
    return 0;
}

int64_t pv_vcpu_mark(MemoryObject *domain, uint32_t vcpu)
{
    uint8_t was;
    PV_XCHG8(was, domain, PV_VCPU_INFO(vcpu, evtchn_upcall_pending), 1, "upcall");
    return was ? 0 : 1 + (int64_t)vcpu;
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
