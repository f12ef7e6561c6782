/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The upcall: how a virtual CPU finds out which of its ports are due.  2-level: selector, words, bits, round-robin behind the
 * last one served.  FIFO: the queues that are ready, the most urgent first.  Runs in the cpu processes.
 */
#include "core.h"

#define LOOP_TICKS_MAX 2u      /* an upcall loop that runs longer has its late EOIs put off */
#define LOOP_LOOK_EVENTS 256u  /* between two looks at the clock */

static int has_room(const pv_upcall_run *u)
{
    return u->left != 0 && u->wakes->count < sizeof u->wakes->slots / sizeof u->wakes->slots[0];
}

static int64_t serve(pv_upcall_run *u, uint32_t port)
{
    int64_t r;
    PV_TRY(r, pv_service(u, port));
    u->left--;
    return r;
}

/* ---- 2-level */

static int64_t serve_2l(pv_upcall_run *u, uint32_t port)
{
    int64_t r;
    PV_TRY(r, serve(u, port));
    if (r == PV_SERVICE_AGAIN)
        u->again = 1;
    return r;
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

/* What the hypervisor has raised, in its order.  1 when the log had something. */
static int64_t serve_arrivals(pv_upcall_run *u)
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
            PV_TRY(r, serve_2l(u, port));
        PV_STORE32(u->domain, PV_VCPU(u->vcpu, arrivals_head), head + 1, PV_RELEASE, "2l.arrival.head");
    }
    if (head != tail)
        u->again = 1;
    return 1;
}

/* The bits `among` of one word, lowest first; those not served for lack of budget stay pending. */
static int64_t serve_word(pv_upcall_run *u, uint32_t word, uint64_t among)
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
        PV_TRY(r, serve_2l(u, word * 64 + at));
        PV_STORE32(u->domain, PV_VCPU(u->vcpu, last_word), word, PV_RELAXED, "2l.last");
        PV_STORE32(u->domain, PV_VCPU(u->vcpu, last_bit), at + 1, PV_RELAXED, "2l.last");
    }
    return 0;
}

/* Round-robin over the selected words, from behind the last served bit.  65 turns: the first word's low bits come last. */
static int64_t scan(pv_upcall_run *u, uint64_t sel)
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
static int64_t serve_timer(pv_upcall_run *u)
{
    uint32_t port;
    int64_t due;
    PV_LOAD32(port, u->domain, PV_HEADER(virq) + u->vcpu * PV_NR_VIRQS * 4u, PV_RELAXED, "virq.timer");
    if (port == 0 || port >= PV_PORTS_2L)
        return 0;
    PV_TRY(due, is_due(u->domain, u->vcpu, port));
    return due ? serve_2l(u, port) : 0;
}

static int64_t handle_2l(pv_upcall_run *u)
{
    uint64_t sel, old;
    int64_t r;
    PV_XCHG64(sel, u->domain, PV_VCPU_INFO(u->vcpu, evtchn_pending_sel), 0, "2l.sel.take");
    if (sel != 0) {
        PV_TRY(r, serve_timer(u));
        PV_TRY(r, serve_arrivals(u));
        PV_TRY(r, scan(u, sel));
    }
    if (u->again) { /* every selected word again: those without anything left cost a look */
        PV_OR64(old, u->domain, PV_VCPU_INFO(u->vcpu, evtchn_pending_sel), sel, "2l.sel.back");
        (void)old;
    }
    return 0;
}

/* ---- FIFO */

#define CONTROL(control, field) ((size_t)(control) + offsetof(struct pv_fifo_control, field))

/* Add the queues that the hypervisor has announced to those that we know. */
static int64_t take_ready(pv_upcall_run *u, uint32_t control, uint32_t *known)
{
    uint32_t ready;
    PV_LOAD32(ready, u->domain, CONTROL(control, ready), PV_RELAXED, "fifo.ready.look");
    if (ready == 0)
        return 0;
    PV_XCHG32(ready, u->domain, CONTROL(control, ready), 0, "fifo.ready.take");
    *known |= ready;
    PV_STORE32(u->domain, PV_VCPU(u->vcpu, fifo_ready), *known, PV_RELAXED, "fifo.ready.known");
    return 0;
}

/* Take the first word out of its queue.  0, or the port if it is due; *next is the queue's new head. */
static int64_t take_word(pv_upcall_run *u, uint32_t port, uint32_t *next)
{
    uint32_t word;
    int64_t at;
    int done = 0;
    *next = 0;
    PV_TRY(at, port < PV_PORTS_FIFO ? pv_fifo_word_at(u->domain, port) : 0);
    if (at == 0)
        return 0;
    PV_LOAD32(word, u->domain, at, PV_RELAXED, "fifo.word");
    while (!done) {
        if (!(word & PV_FIFO_LINKED))
            return 0;
        /* SYNC(fifo_link): LINKED and LINK go in one exchange; a sender links behind us before it, or finds us gone. */
        PV_CAS32(done, u->domain, at, word, word & ~(PV_FIFO_LINKED | PV_FIFO_LINK), "fifo_link");
    }
    *next = word & PV_FIFO_LINK;
    return word & PV_FIFO_PENDING && !(word & PV_FIFO_MASKED) ? port : 0;
}

static int64_t consume(pv_upcall_run *u, uint32_t control, uint32_t priority, uint32_t *known)
{
    uint32_t head, next;
    int64_t port, r;
    size_t local = PV_VCPU(u->vcpu, fifo_head) + 4u * priority;
    PV_LOAD32(head, u->domain, local, PV_RELAXED, "fifo.local");
    if (head == 0) {
        /* SYNC(fifo_ready): the bit was taken before we read the head that it announces. */
        PV_SMP_RMB(u->domain, "fifo_ready");
        PV_LOAD32(head, u->domain, CONTROL(control, head) + 4u * priority, PV_RELAXED, "fifo.head");
    }
    PV_TRY(port, head != 0 ? take_word(u, head, &next) : (next = 0, 0));
    PV_STORE32(u->domain, local, next, PV_RELAXED, "fifo.local");
    if (next == 0) {
        *known &= ~(1u << priority);
        PV_STORE32(u->domain, PV_VCPU(u->vcpu, fifo_ready), *known, PV_RELAXED, "fifo.ready.known");
    }
    /* A port in service elsewhere (it moved) needs nothing more: masked and cleared there later than it was raised, it is merged. */
    if (port != 0)
        PV_TRY(r, serve(u, (uint32_t)port));
    return 0;
}

static int64_t handle_fifo(pv_upcall_run *u)
{
    uint32_t control, known;
    int64_t r;
    PV_LOAD32(control, u->domain, PV_VCPU(u->vcpu, control), PV_RELAXED, "fifo.control");
    if (control == 0)
        return 0;
    PV_LOAD32(known, u->domain, PV_VCPU(u->vcpu, fifo_ready), PV_RELAXED, "fifo.ready.known");
    PV_TRY(r, take_ready(u, control, &known));
    while (known != 0) {
        if (!has_room(u)) {
            u->again = 1;
            return 0;
        }
        PV_TRY(r, consume(u, control, (uint32_t)__builtin_ctz(known), &known));
        PV_TRY(r, take_ready(u, control, &known));
    }
    return 0;
}

/* ---- both */

/* The upcall loop has ended: late EOIs of what it delivered need not wait any more. */
int64_t pv_end_loop(MemoryObject *domain, uint32_t vcpu)
{
    uint64_t started;
    uint32_t epoch;
    PV_LOAD64(started, domain, PV_VCPU(vcpu, loop_started_ns), PV_RELAXED, "loop.started");
    if (started == 0)
        return 0;
    PV_LOAD32(epoch, domain, PV_VCPU(vcpu, irq_epoch), PV_RELAXED, "loop.epoch");
    PV_STORE32(domain, PV_VCPU(vcpu, irq_epoch), epoch + 1, PV_RELAXED, "loop.epoch");
    PV_STORE64(domain, PV_VCPU(vcpu, loop_started_ns), 0, PV_RELAXED, "loop.started");
    PV_STORE32(domain, PV_VCPU(vcpu, loop_events), 0, PV_RELAXED, "loop.events");
    return 0;
}

/* A loop is all upcalls from the first until the flag is found clear: then its vCPU leaves interrupt context. */
static int64_t begin_run(pv_upcall_run *u)
{
    uint64_t started;
    uint32_t events;
    int64_t now;
    PV_TRY(now, pv_machine_now(u->machine));
    if (now == 0)
        return 0;
    u->now = pv_now_ns();
    u->clock = (uint64_t)now;
    PV_STAMP64(u->domain, PV_VCPU(u->vcpu, heartbeat_ns), u->now);
    PV_LOAD32(u->epoch, u->domain, PV_VCPU(u->vcpu, irq_epoch), PV_RELAXED, "loop.epoch");
    PV_LOAD64(started, u->domain, PV_VCPU(u->vcpu, loop_started_ns), PV_RELAXED, "loop.started");
    if (started == 0)
        PV_STORE64(u->domain, PV_VCPU(u->vcpu, loop_started_ns), u->clock, PV_RELAXED, "loop.started");
    PV_LOAD32(events, u->domain, PV_VCPU(u->vcpu, loop_events), PV_RELAXED, "loop.events");
    u->defer = started != 0 && events >= LOOP_LOOK_EVENTS && u->clock - started > LOOP_TICKS_MAX * PV_TICK_NS;
    return 0;
}

static int64_t end_run(pv_upcall_run *u, uint32_t served)
{
    uint32_t events;
    if (u->clock == 0)
        return 0;
    PV_LOAD32(events, u->domain, PV_VCPU(u->vcpu, loop_events), PV_RELAXED, "loop.events");
    PV_STORE32(u->domain, PV_VCPU(u->vcpu, loop_events), events + served, PV_RELAXED, "loop.events");
    return 0;
}

/*
 * xen_evtchn_do_upcall.  Serves at most `budget` events; returns how many, or PV_DEAD.  If something is left, the upcall flag
 * is set again, so that the caller only has to call again; a call that finds the flag clear ends the upcall loop.
 */
int64_t pv_upcall(MemoryObject *machine, MemoryObject *domain, MemoryObject **pages, uint32_t vcpu, uint32_t budget,
                  pv_wakes *wakes)
{
    pv_upcall_run u = {machine, domain, pages, wakes, 0, 0, vcpu, budget, 0, 0, 0};
    uint8_t flag;
    int64_t r, fifo;
    PV_LOAD8(flag, domain, PV_VCPU_INFO(vcpu, evtchn_upcall_pending), PV_RELAXED, "upcall.look");
    if (!flag)
        return pv_end_loop(domain, vcpu);
    PV_TRY(r, begin_run(&u));
    PV_COUNT64(domain, PV_VCPU(vcpu, upcalls), 1);
    PV_TRY(fifo, pv_is_fifo(domain));
    while (flag && has_room(&u) && !u.again) {
        PV_XCHG8(flag, domain, PV_VCPU_INFO(vcpu, evtchn_upcall_pending), 0, "upcall.clear");
        /*
         * SYNC(2l_upcall), SYNC(fifo_upcall): the flag is clear before we take selector or ready bits (full barrier); the
         * sender sets them the other way.
         */
        PV_SMP_MB_AFTER_RMW(domain, "2l_upcall");
        PV_TRY(r, fifo ? handle_fifo(&u) : handle_2l(&u));
        if (u.again)
            PV_XCHG8(flag, domain, PV_VCPU_INFO(vcpu, evtchn_upcall_pending), 1, "upcall.back");
        PV_LOAD8(flag, domain, PV_VCPU_INFO(vcpu, evtchn_upcall_pending), PV_RELAXED, "upcall.look");
    }
    PV_TRY(r, end_run(&u, budget - u.left));
    return budget - u.left;
}
