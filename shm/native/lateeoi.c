/* SPDX-License-Identifier: Apache-2.0 */
/*
 * xen_irq_lateeoi: the end of an interrupt, when its handler's user has written the port back.  At once, or later: a port that
 * was spurious too often, or that an upcall loop delivered which still runs and has run too long, waits (X3).  Runs in the
 * hypervisor process, on behalf of the domain's kernel; what waits is a bit and a time in the domain's segment, for an heir too.
 */
#include "core.h"

#define SPURIOUS_THRESHOLD 1u
#define SPURIOUS_MAX 0xffu
#define DELAY_NS_MAX 1000000000ull

/* What the port's EOI word tells after this one; *delay_ns when it has been spurious too often. */
static uint64_t count_spurious(uint64_t eoi, int spurious, uint64_t *delay_ns)
{
    uint32_t count = PV_EOI_SPURIOUS(eoi);
    *delay_ns = 0;
    if (!spurious)
        return eoi & ~0xffull;
    count += count < SPURIOUS_MAX;
    if (count > SPURIOUS_THRESHOLD) {
        *delay_ns = count - 2 < 20 ? PV_TICK_NS << (count - 2) : DELAY_NS_MAX;
        if (*delay_ns > DELAY_NS_MAX)
            *delay_ns = DELAY_NS_MAX;
    }
    return (eoi & ~0xffull) | count;
}

/* When this EOI has to take place: 0 = at once. */
static int64_t due_at(MemoryObject *machine, MemoryObject *domain, uint32_t port, uint64_t irq, int spurious)
{
    uint64_t eoi = 0, next, delay, at = 0;
    uint32_t epoch;
    int64_t now;
#ifdef PVBUS_EXPLORED
    if (!spurious && !(irq & PV_IRQ_DEFER))
        return 0; /* a count that nobody set needs no look */
#endif
    PV_LOAD64(eoi, domain, PV_EOI_WORD(port), PV_RELAXED, "eoi.word");
    next = count_spurious(eoi, spurious, &delay);
    if (next != eoi)
        PV_STORE64(domain, PV_EOI_WORD(port), next, PV_RELAXED, "eoi.word");
    if (delay == 0 && !(irq & PV_IRQ_DEFER))
        return 0;
    PV_TRY(now, pv_machine_now(machine));
    if (delay != 0) { /* whatever the loop that delivered it does */
        at = (uint64_t)now + delay;
    } else {
        PV_LOAD32(epoch, domain, PV_VCPU(PV_IRQ_CPU(irq) & (PV_VCPUS_MAX - 1), irq_epoch), PV_RELAXED, "loop.epoch");
        if (epoch == PV_EOI_EPOCH(eoi))
            PV_LOAD64(at, domain, PV_EOI_AT(port), PV_RELAXED, "eoi.at");
    }
    return at > (uint64_t)now ? (int64_t)at : 0;
}

/* Put a port on the list of those that wait.  Before its irq word says so: a bit too many costs a look. */
static int64_t put_off(MemoryObject *domain, uint32_t port, uint64_t irq, uint64_t at)
{
    uint64_t old, next;
    PV_COUNT64(domain, PV_VCPU(PV_IRQ_CPU(irq) & (PV_VCPUS_MAX - 1), eois_put_off), 1);
    PV_STORE64(domain, PV_EOI_AT(port), at, PV_RELAXED, "eoi.at");
    PV_OR64(old, domain, PV_DOMAIN_EOI_WAITING + 8u * (port / 64), 1ull << (port % 64), "eoi.waiting");
    (void)old;
    PV_LOAD64(next, domain, PV_HEADER(eoi_next_ns), PV_RELAXED, "eoi.next");
    if (next == 0 || at < next)
        PV_STORE64(domain, PV_HEADER(eoi_next_ns), at, PV_RELAXED, "eoi.next");
    return 0;
}

/* No longer active, EOI_PENDING gone; without a reason left the port is unmasked. */
static int64_t finish(MemoryObject *domain, uint32_t port, uint64_t irq, int delayed)
{
    uint64_t next;
    int done = 0;
    while (!done) {
        if (delayed && !(irq & PV_IRQ_DELAYED))
            return 0;
        next = irq & ~(PV_IRQ_ACTIVE | PV_IRQ_EOI_PENDING | PV_IRQ_DELAYED | PV_IRQ_DEFER);
        PV_CAS64(done, domain, PV_IRQ_WORD(port), irq, next, "irq.eoi");
    }
    return next & PV_IRQ_REASONS ? 0 : pv_unmask(domain, port, 1);
}

/*
 * A user's write of a port: the record is enabled, then its interrupt ends.  Ports that are not this file's, or already
 * enabled, are skipped (A5.4, A5.5).  Returns like pv_set_pending.
 */
int64_t pv_eoi(MemoryObject *machine, MemoryObject *domain, uint32_t port, uint32_t slot, int spurious)
{
    uint64_t irq, next;
    int64_t at = -1, r;
    int done = 0;
    PV_LOAD64(irq, domain, PV_IRQ_WORD(port), PV_ACQUIRE, "irq");
    while (!done) {
        if (PV_IRQ_SLOT(irq) != slot + 1 || (irq & PV_IRQ_ENABLED))
            return 0;
        if (at < 0) {
            PV_TRY(at, due_at(machine, domain, port, irq, spurious));
            if (at != 0)
                PV_TRY(r, put_off(domain, port, irq, (uint64_t)at));
        }
        /* Enabled and ended in one exchange: enabled first, and an heir would find a port that nobody ends any more. */
        next = irq | PV_IRQ_ENABLED;
        next = at != 0 ? next | PV_IRQ_DELAYED : next & ~(PV_IRQ_ACTIVE | PV_IRQ_EOI_PENDING | PV_IRQ_DEFER);
        PV_CAS64(done, domain, PV_IRQ_WORD(port), irq, next, "irq.eoi");
    }
    return next & (PV_IRQ_REASONS | PV_IRQ_DELAYED) ? 0 : pv_unmask(domain, port, 1);
}

int64_t pv_eoi_expire(MemoryObject *domain, uint64_t now)
{
    uint64_t waiting, old, at, irq, earliest = 0;
    uint32_t kicks = 0, end;
    int64_t marked;
    PV_LOAD32(end, domain, PV_HEADER(valid_evtchns), PV_RELAXED, "valid");
    PV_STORE64(domain, PV_HEADER(eoi_next_ns), 1, PV_RELAXED, "eoi.next"); /* who dies here leaves its heir a look to take */
    for (uint32_t word = 0; word * 64 < end && word < PV_PORTS_MAX / 64; word++) {
        PV_LOAD64(waiting, domain, PV_DOMAIN_EOI_WAITING + 8u * word, PV_RELAXED, "eoi.waiting");
        for (; waiting != 0; waiting &= waiting - 1) {
            uint32_t port = word * 64 + (uint32_t)__builtin_ctzll(waiting);
            PV_LOAD64(at, domain, PV_EOI_AT(port), PV_RELAXED, "eoi.at");
            if (at > now) {
                earliest = earliest == 0 || at < earliest ? at : earliest;
                continue;
            }
            PV_LOAD64(irq, domain, PV_IRQ_WORD(port), PV_ACQUIRE, "irq");
            PV_TRY(marked, finish(domain, port, irq, 1));
            PV_AND64(old, domain, PV_DOMAIN_EOI_WAITING + 8u * word, ~(1ull << (port % 64)), "eoi.waiting");
            (void)old;
            if (marked > 0)
                kicks |= 1u << (marked - 1);
        }
    }
    PV_STORE64(domain, PV_HEADER(eoi_next_ns), earliest, PV_RELAXED, "eoi.next");
    return kicks;
}
