/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One event on one virtual CPU: the late-EOI chip's ack and the driver's interrupt handler.  Called by the upcall (upcall.c),
 * in the cpu processes; the end of interrupt, when a user writes a port back, is lateeoi.c.
 *
 * Where a port stands is its irq word; each step is one atomic on it, so that an heir of a dead CPU can go on:
 *
 *   pending --claim--> ACTIVE|EOI_PENDING|IN_SERVICE --mask, clear pending, not ENABLED, into the ring--> ACTIVE --written back--> ENABLED
 */
#include "core.h"

#ifndef PVBUS_EXPLORED
#include <stdio.h>
#endif

#define LATE_EOI_TICKS 10u /* how long the late EOIs of an upcall loop that runs too long are put off */
#define WARNINGS_SAID_EACH 10u

static int64_t note_wake(pv_wakes *wakes, uint32_t slot)
{
    for (uint32_t i = 0; i < wakes->count; i++)
        if (wakes->slots[i] == slot)
            return 0;
    if (wakes->count < sizeof wakes->slots / sizeof wakes->slots[0])
        wakes->slots[wakes->count++] = slot;
    return 0;
}

/* From the claim on: mask, clear pending, not enabled, queue.  Also what an heir repeats for a port left in service. */
static int64_t handle_claimed(pv_upcall_run *u, uint32_t port, uint64_t irq)
{
    uint32_t slot = PV_IRQ_SLOT(irq) - 1;
    uint64_t old;
    int64_t pushed, r;
    /* SYNC(sub_resolve): the service was counted by the claim (locked exchange) before pending is cleared here. */
    /* SYNC(irq_unmask): claimed before the mask (locked, both): who unmasks meanwhile sees the claim behind that, and masks again. */
    PV_TRY(r, pv_mask_and_clear(u->domain, port));
    /*
     * Not enabled only now (A3.2): a user who writes the port back earlier is ignored, so nobody unmasks it between our
     * claim and our mask, where the unmask would be undone and the port stay masked for ever.
     */
    PV_AND64(old, u->domain, PV_IRQ_WORD(port), ~PV_IRQ_ENABLED, "irq.disable");
    (void)old;
    PV_STAMP64(u->domain, PV_SERVED_AT(port), u->now);
    if (slot < PV_FILES_MAX && u->pages[slot] != NULL)
        PV_TRY(pushed, pv_ring_push(u->machine, slot, u->pages[slot], port, 1 + u->vcpu, u->domain));
    else
        pushed = PV_PUSH_GONE;
    if (pushed & PV_PUSH_GONE)
        PV_AND64(old, u->domain, PV_IRQ_WORD(port), ~PV_IRQ_IN_SERVICE, "irq.served");
    if (pushed & PV_PUSH_WAKE)
        return note_wake(u->wakes, slot);
    return 0;
}

/* The loop runs too long: note until when, and for which loop, the port's late EOI has to wait. */
static int64_t note_defer(pv_upcall_run *u, uint32_t port)
{
    uint64_t eoi;
    PV_LOAD64(eoi, u->domain, PV_EOI_WORD(port), PV_RELAXED, "eoi.word");
    PV_STORE64(u->domain, PV_EOI_WORD(port), (uint64_t)u->epoch << 32 | PV_EOI_SPURIOUS(eoi), PV_RELAXED, "eoi.word");
    PV_STORE64(u->domain, PV_EOI_AT(port), u->clock + LATE_EOI_TICKS * PV_TICK_NS, PV_RELAXED, "eoi.at");
    return 0;
}

static int64_t handle_in_kernel(pv_upcall_run *u, uint32_t port, uint64_t irq)
{
    int64_t r;
    if (!(irq & PV_IRQ_KERNEL)) {
        PV_COUNT64(u->domain, PV_VCPU(u->vcpu, unhandled), 1);
        return PV_SERVICE_DONE; /* no handler: stays pending, as with a port that no irq is bound to */
    }
    PV_TRY(r, pv_clear_pending(u->domain, port));
    PV_COUNT64(u->domain, PV_VCPU(u->vcpu, events), 1);
    return PV_SERVICE_DONE;
}

/*
 * A3.1: count every one, and say it on the machine's standard error: the first ones, then each time their number has doubled,
 * so that a port that is stuck in this state cannot fill a disk.
 */
static void warn_not_enabled(MemoryObject *domain, uint32_t vcpu, uint32_t port, uint32_t slot)
{
    PV_COUNT64(domain, PV_VCPU(vcpu, warnings), 1);
#ifndef PVBUS_EXPLORED
    uint32_t domid;
    uint64_t count;
    PV_LOAD32(domid, domain, offsetof(struct pv_domain_header, domid), PV_RELAXED, "domain.domid");
    PV_LOAD64(count, domain, PV_VCPU(vcpu, warnings), PV_RELAXED, "vcpu.warnings");
    if (count <= WARNINGS_SAID_EACH || (count & (count - 1)) == 0)
        dprintf(2, "xen:evtchn: event on port %u of file/%u.%u, which is not enabled (warning %llu of cpu/%u.%u)\n", port, domid,
                slot, (unsigned long long)count, domid, vcpu);
#else
    (void)port, (void)slot;
#endif
}

/* One pending, unmasked port of this CPU: late-EOI ack (X3a), then the handler (A3). */
int64_t pv_service(pv_upcall_run *u, uint32_t port)
{
    uint64_t irq, next;
    int64_t r;
    int claimed = 0, noted = 0;
    PV_LOAD64(irq, u->domain, PV_IRQ_WORD(port), PV_ACQUIRE, "irq");
    while (!claimed) {
        if (PV_IRQ_SLOT(irq) == 0)
            return handle_in_kernel(u, port, irq);
        if (irq & PV_IRQ_IN_SERVICE)
            return PV_SERVICE_AGAIN;
        if (irq & (PV_IRQ_ACTIVE | PV_IRQ_EXPLICIT))
            return PV_SERVICE_DONE; /* already active (X3a), or disabled since we looked at the mask */
        if (u->defer && !noted) {
            PV_TRY(r, note_defer(u, port));
            noted = 1;
        }
        next = (irq | PV_IRQ_ACTIVE | PV_IRQ_EOI_PENDING | PV_IRQ_IN_SERVICE) & ~(PV_IRQ_CPU_BITS(0x3f) | PV_IRQ_DEFER);
        next = (next | PV_IRQ_CPU_BITS(u->vcpu) | (u->defer ? PV_IRQ_DEFER : 0)) + PV_IRQ_SERVED_ONE;
        PV_CAS64(claimed, u->domain, PV_IRQ_WORD(port), irq, next, "irq.claim");
    }
    if (!(next & PV_IRQ_ENABLED))
        warn_not_enabled(u->domain, u->vcpu, port, PV_IRQ_SLOT(next) - 1); /* and go on */
    PV_COUNT64(u->domain, PV_VCPU(u->vcpu, events), 1);
    return handle_claimed(u, port, next);
}

/*
 * An heir of vCPU's process: finish what it held, repeat what it had claimed, then look everywhere.  Returns the number of
 * ports that were in service.  Files whose ring holds something are woken in any case: the dead may have raised a door and
 * not sent the byte; one byte too many is only a look too many.
 */
int64_t pv_cpu_recover(MemoryObject *machine, MemoryObject *domain, MemoryObject **pages, uint32_t vcpu, pv_wakes *wakes)
{
    pv_upcall_run u = {machine, domain, pages, wakes, 0, 0, vcpu, 0, 0, 0, 0};
    int64_t r, fifo, found = 0;
    uint64_t irq, old;
    uint32_t end;
    uint8_t was;
    for (uint32_t slot = 0; slot < PV_FILES_MAX; slot++)
        if (pages[slot] != NULL)
            PV_TRY(r, pv_ring_recover(machine, slot, pages[slot], 1 + vcpu, domain));
    PV_TRY(r, pv_end_loop(domain, vcpu)); /* the dead one's has ended with it: ours must not count as one that has run too long */
    PV_LOAD32(end, domain, PV_HEADER(valid_evtchns), PV_RELAXED, "valid");
    for (uint32_t port = 1; port < end && port < PV_PORTS_MAX; port++) {
        PV_LOAD64(irq, domain, PV_IRQ_WORD(port), PV_ACQUIRE, "irq");
        if (!(irq & PV_IRQ_IN_SERVICE) || PV_IRQ_CPU(irq) != vcpu)
            continue;
        found++;
        PV_TRY(r, handle_claimed(&u, port, irq));
    }
    PV_TRY(fifo, pv_is_fifo(domain));
    if (!fifo) /* FIFO: the hypervisor has rebuilt the queues and announced them all (pv_fifo_rebuild) */
        PV_OR64(old, domain, PV_VCPU_INFO(vcpu, evtchn_pending_sel), ~0ull, "2l.sel.all");
    (void)old;
    PV_XCHG8(was, domain, PV_VCPU_INFO(vcpu, evtchn_upcall_pending), 1, "upcall.all");
    (void)was;
    return found;
}
