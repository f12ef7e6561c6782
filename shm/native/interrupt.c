/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The guest's interrupt path on one virtual CPU: the upcall loop, the late-EOI chip and the driver's interrupt handler.
 * Runs in the cpu processes (upcall) and in the hypervisor process (end of interrupt, when a user writes a port back).
 *
 * Where a port stands is its irq word; each step is one atomic on it, so that an heir of a dead CPU can go on:
 *
 *   pending --claim--> ACTIVE|EOI_PENDING|IN_SERVICE --mask, clear pending, not ENABLED, into the ring--> ACTIVE --written back--> ENABLED
 */
#include "core.h"

#ifndef PVBUS_EXPLORED
#include <stdio.h>
#define WARNINGS_SAID_EACH 10u
#define STAMP_NOW() pv_now_ns()
#else
#define STAMP_NOW() 0u
#endif

#define SERVICE_DONE 0
#define SERVICE_AGAIN (-1) /* another CPU has it in service (the port moved): look again */

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
static int64_t handle_claimed(MemoryObject *machine, MemoryObject *domain, MemoryObject **pages, uint32_t vcpu,
                              uint32_t port, uint64_t irq, uint64_t now, pv_wakes *wakes)
{
    uint32_t word = port / 64, slot = PV_IRQ_SLOT(irq) - 1;
    uint64_t bit = 1ull << (port % 64), old;
    int64_t pushed;
    PV_OR64(old, domain, PV_SHARED(evtchn_mask) + 8u * word, bit, "irq.mask");
    PV_AND64(old, domain, PV_SHARED(evtchn_pending) + 8u * word, ~bit, "irq.clear");
    /*
     * Not enabled only now (A3.2): a user who writes the port back earlier is ignored, so nobody unmasks it between our
     * claim and our mask, where the unmask would be undone and the port stay masked for ever.
     */
    PV_AND64(old, domain, PV_IRQ_WORD(port), ~PV_IRQ_ENABLED, "irq.disable");
    (void)old;
    PV_STAMP64(domain, PV_SERVED_AT(port), now);
    if (slot < PV_FILES_MAX && pages[slot] != NULL)
        PV_TRY(pushed, pv_ring_push(machine, slot, pages[slot], port, 1 + vcpu, domain));
    else
        pushed = PV_PUSH_GONE;
    if (pushed & PV_PUSH_GONE)
        PV_AND64(old, domain, PV_IRQ_WORD(port), ~PV_IRQ_IN_SERVICE, "irq.served");
    if (pushed & PV_PUSH_WAKE)
        return note_wake(wakes, slot);
    return 0;
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
static int64_t service(MemoryObject *machine, MemoryObject *domain, MemoryObject **pages, uint32_t vcpu, uint32_t port,
                       uint64_t now, pv_wakes *wakes)
{
    uint64_t irq, next, old;
    int claimed = 0;
    PV_LOAD64(irq, domain, PV_IRQ_WORD(port), PV_ACQUIRE, "irq");
    while (!claimed) {
        if (PV_IRQ_SLOT(irq) == 0) {
            if (!(irq & PV_IRQ_KERNEL)) {
                PV_COUNT64(domain, PV_VCPU(vcpu, unhandled), 1);
                return SERVICE_DONE; /* no handler: stays pending, as with a port that no irq is bound to */
            }
            PV_AND64(old, domain, PV_SHARED(evtchn_pending) + 8u * (port / 64), ~(1ull << (port % 64)), "irq.clear");
            (void)old;
            PV_COUNT64(domain, PV_VCPU(vcpu, events), 1);
            return SERVICE_DONE;
        }
        if (irq & PV_IRQ_IN_SERVICE)
            return SERVICE_AGAIN;
        if (irq & (PV_IRQ_ACTIVE | PV_IRQ_EXPLICIT))
            return SERVICE_DONE; /* already active (X3a), or disabled since we looked at the mask */
        next = (irq | PV_IRQ_ACTIVE | PV_IRQ_EOI_PENDING | PV_IRQ_IN_SERVICE) & ~PV_IRQ_CPU_BITS(0x3f);
        next = (next | PV_IRQ_CPU_BITS(vcpu)) + PV_IRQ_SERVED_ONE;
        PV_CAS64(claimed, domain, PV_IRQ_WORD(port), irq, next, "irq.claim");
    }
    if (!(next & PV_IRQ_ENABLED))
        warn_not_enabled(domain, vcpu, port, PV_IRQ_SLOT(next) - 1); /* and go on */
    PV_COUNT64(domain, PV_VCPU(vcpu, events), 1);
    return handle_claimed(machine, domain, pages, vcpu, port, next, now, wakes);
}

/* Is the port pending, unmasked, and this CPU's to serve? */
static int64_t is_due(MemoryObject *domain, uint32_t vcpu, uint32_t port)
{
    uint64_t pending, mine, mask, bit = 1ull << (port % 64);
    uint32_t word = port / 64;
    PV_LOAD64(pending, domain, PV_SHARED(evtchn_pending) + 8u * word, PV_ACQUIRE, "2l.scan.pending");
    PV_LOAD64(mine, domain, PV_VCPU(vcpu, evtchn_mask) + 8u * word, PV_RELAXED, "2l.scan.mine");
    PV_LOAD64(mask, domain, PV_SHARED(evtchn_mask) + 8u * word, PV_RELAXED, "2l.scan.mask");
    return (pending & mine & ~mask & bit) != 0;
}

typedef struct {
    MemoryObject *machine, *domain, **pages;
    pv_wakes *wakes;
    uint64_t now;
    uint32_t vcpu, left; /* events that may still be served */
    int again;           /* something was left behind: come back */
} upcall;

static int has_room(const upcall *u)
{
    return u->left != 0 && u->wakes->count < sizeof u->wakes->slots / sizeof u->wakes->slots[0];
}

static int64_t serve(upcall *u, uint32_t port)
{
    int64_t r;
    PV_TRY(r, service(u->machine, u->domain, u->pages, u->vcpu, port, u->now, u->wakes));
    if (r == SERVICE_AGAIN)
        u->again = 1;
    u->left--;
    return r;
}

/* What the hypervisor has raised, in its order.  1 when the log had something. */
static int64_t serve_arrivals(upcall *u)
{
    uint32_t head, tail, port;
    int64_t due, r;
    PV_LOAD32(head, u->domain, PV_VCPU(u->vcpu, arrivals_head), PV_RELAXED, "2l.arrival.head");
    /* SYNC(2l_arrival): a tail that we see covers everything raised before a pending bit that we saw. */
    PV_LOAD32(tail, u->domain, PV_VCPU(u->vcpu, arrivals_tail), PV_ACQUIRE, "2l_arrival");
    if (head == tail)
        return 0;
    for (; head != tail && has_room(u); head++) {
        PV_LOAD32(port, u->domain, PV_ARRIVAL(u->vcpu, head), PV_RELAXED, "2l.arrival.entry");
        PV_TRY(due, port < PV_PORTS_2L ? is_due(u->domain, u->vcpu, port) : 0);
        if (due)
            PV_TRY(r, serve(u, port));
        PV_STORE32(u->domain, PV_VCPU(u->vcpu, arrivals_head), head + 1, PV_RELEASE, "2l.arrival.head");
    }
    if (head != tail)
        u->again = 1;
    return 1;
}

/* The bits `among` of one word, lowest first; those not served for lack of budget stay pending. */
static int64_t serve_word(upcall *u, uint32_t word, uint64_t among)
{
    uint64_t pending, mine, mask;
    int64_t r, logged = 1;
    while (logged && !u->again) {
        /* Bits first, then the log: of what is in neither it nor served, at most one port was raised just now. */
        PV_LOAD64(pending, u->domain, PV_SHARED(evtchn_pending) + 8u * word, PV_ACQUIRE, "2l.scan.pending");
        PV_TRY(logged, serve_arrivals(u));
    }
    if (logged)
        return 0;
    PV_LOAD64(mine, u->domain, PV_VCPU(u->vcpu, evtchn_mask) + 8u * word, PV_RELAXED, "2l.scan.mine");
    PV_LOAD64(mask, u->domain, PV_SHARED(evtchn_mask) + 8u * word, PV_RELAXED, "2l.scan.mask");
    for (uint64_t bits = pending & mine & ~mask & among; bits != 0; bits &= bits - 1) {
        uint32_t at = (uint32_t)__builtin_ctzll(bits);
        if (!has_room(u)) {
            u->again = 1;
            return 0;
        }
        PV_TRY(r, serve(u, word * 64 + at));
        PV_STORE32(u->domain, PV_VCPU(u->vcpu, last_word), word, PV_RELAXED, "2l.last");
        PV_STORE32(u->domain, PV_VCPU(u->vcpu, last_bit), at + 1, PV_RELAXED, "2l.last");
    }
    return 0;
}

/* Round-robin over the selected words, from behind the last served bit.  65 turns: the first word's low bits come last. */
static int64_t scan(upcall *u, uint64_t sel)
{
    uint32_t first, bit;
    int64_t r;
    PV_LOAD32(first, u->domain, PV_VCPU(u->vcpu, last_word), PV_RELAXED, "2l.last");
    PV_LOAD32(bit, u->domain, PV_VCPU(u->vcpu, last_bit), PV_RELAXED, "2l.last");
    if (bit > 63) {
        bit = 0;
        first++;
    }
    uint64_t low = (1ull << bit) - 1;
    for (uint32_t turn = 0; turn <= 64 && !u->again; turn++) {
        uint64_t among = turn == 0 ? ~low : turn == 64 ? low : ~0ull;
        if ((sel >> ((first + turn) & 63) & 1) && among != 0)
            PV_TRY(r, serve_word(u, (first + turn) & 63, among));
    }
    return 0;
}

/* The timer VIRQ of this CPU comes before everything else. */
static int64_t serve_timer(upcall *u)
{
    uint32_t port;
    int64_t due;
    PV_LOAD32(port, u->domain, offsetof(struct pv_domain_header, virq) + u->vcpu * PV_NR_VIRQS * 4u, PV_RELAXED, "virq.timer");
    if (port == 0 || port >= PV_PORTS_2L)
        return 0;
    PV_TRY(due, is_due(u->domain, u->vcpu, port));
    return due ? serve(u, port) : 0;
}

/*
 * xen_evtchn_do_upcall on the 2-level ABI.  Serves at most `budget` events; returns how many, or PV_DEAD.  If something is
 * left, selector and upcall flag are set again, so that the caller only has to call again.
 */
int64_t pv_upcall(MemoryObject *machine, MemoryObject *domain, MemoryObject **pages, uint32_t vcpu, uint32_t budget,
                  pv_wakes *wakes)
{
    upcall u = {machine, domain, pages, wakes, 0, vcpu, budget, 0};
    uint64_t sel, old;
    uint8_t flag;
    int64_t r;
    PV_LOAD8(flag, domain, PV_VCPU_INFO(vcpu, evtchn_upcall_pending), PV_RELAXED, "2l.upcall.look");
    if (!flag)
        return 0;
    u.now = STAMP_NOW();
    PV_COUNT64(domain, PV_VCPU(vcpu, upcalls), 1);
    PV_STAMP64(domain, PV_VCPU(vcpu, heartbeat_ns), u.now);
    while (flag && has_room(&u) && !u.again) {
        PV_XCHG8(flag, domain, PV_VCPU_INFO(vcpu, evtchn_upcall_pending), 0, "2l.upcall.clear");
        /* SYNC(2l_upcall): the flag is clear before we take the selector (full barrier); the sender sets them the other way. */
        PV_SMP_MB_AFTER_RMW(domain, "2l_upcall");
        PV_XCHG64(sel, domain, PV_VCPU_INFO(vcpu, evtchn_pending_sel), 0, "2l.sel.take");
        if (sel != 0) {
            PV_TRY(r, serve_timer(&u));
            PV_TRY(r, serve_arrivals(&u));
            PV_TRY(r, scan(&u, sel));
        }
        if (u.again) { /* every selected word again: those without anything left cost a look */
            PV_OR64(old, domain, PV_VCPU_INFO(vcpu, evtchn_pending_sel), sel, "2l.sel.back");
            (void)old;
            PV_XCHG8(flag, domain, PV_VCPU_INFO(vcpu, evtchn_upcall_pending), 1, "2l.upcall.back");
        }
        PV_LOAD8(flag, domain, PV_VCPU_INFO(vcpu, evtchn_upcall_pending), PV_RELAXED, "2l.upcall.look");
    }
    return budget - u.left;
}

/*
 * xen_irq_lateeoi, not spurious: enabled, no longer active, EOI_PENDING gone; without a reason left the port is unmasked.
 * Ports that are not this file's, or already enabled, are skipped (A5.4, A5.5).  Returns like pv_set_pending.
 */
int64_t pv_eoi(MemoryObject *domain, uint32_t port, uint32_t slot)
{
    uint64_t irq, next;
    int done = 0;
    PV_LOAD64(irq, domain, PV_IRQ_WORD(port), PV_ACQUIRE, "irq");
    while (!done) {
        if (PV_IRQ_SLOT(irq) != slot + 1 || (irq & PV_IRQ_ENABLED))
            return 0;
        next = (irq | PV_IRQ_ENABLED) & ~(PV_IRQ_ACTIVE | PV_IRQ_EOI_PENDING);
        PV_CAS64(done, domain, PV_IRQ_WORD(port), irq, next, "irq.eoi");
    }
    if (next & PV_IRQ_REASONS)
        return 0;
    return pv_unmask(domain, port, 1);
}

/*
 * An heir of vCPU's process: finish what it held, repeat what it had claimed, then look everywhere.  Returns the number of
 * ports that were in service.  Files whose ring holds something are woken in any case: the dead may have raised a door and
 * not sent the byte; one byte too many is only a look too many.
 */
int64_t pv_cpu_recover(MemoryObject *machine, MemoryObject *domain, MemoryObject **pages, uint32_t vcpu, pv_wakes *wakes)
{
    int64_t r, found = 0;
    uint64_t irq, old, now = STAMP_NOW();
    uint8_t was;
    for (uint32_t slot = 0; slot < PV_FILES_MAX; slot++)
        if (pages[slot] != NULL)
            PV_TRY(r, pv_ring_recover(machine, slot, pages[slot], 1 + vcpu, domain));
    for (uint32_t port = 1; port < PV_PORTS_2L; port++) {
        PV_LOAD64(irq, domain, PV_IRQ_WORD(port), PV_ACQUIRE, "irq");
        if (!(irq & PV_IRQ_IN_SERVICE) || PV_IRQ_CPU(irq) != vcpu)
            continue;
        found++;
        PV_TRY(r, handle_claimed(machine, domain, pages, vcpu, port, irq, now, wakes));
    }
    PV_OR64(old, domain, PV_VCPU_INFO(vcpu, evtchn_pending_sel), ~0ull, "2l.sel.all");
    (void)old;
    PV_XCHG8(was, domain, PV_VCPU_INFO(vcpu, evtchn_upcall_pending), 1, "2l.upcall.all");
    (void)was;
    return found;
}
