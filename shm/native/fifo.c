/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The FIFO event-channel ABI, the hypervisor's side: event words in the domain's event array, and for each vCPU a control
 * block with sixteen queues, linked through the words.  The CPU's side, which takes a queue's first word out, is upcall.c.
 *
 * Only the hypervisor process links, one port after the other, so the queue locks of Xen have nobody to keep out here.  Of
 * the lock protocol remains what the guest takes part in: a word whose LINK is being written is BUSY, and is not unmasked
 * meanwhile.  Queue heads, the guest's too, and tails lie in the domain's segment: an heir finds them (pv_fifo_rebuild).
 */
#include "core.h"

#include <stdlib.h>

#define LINK_TRIES_MAX 4 /* a guest can change a word that is BUSY: it masks it, or takes it out, and no more than that */
#define UNMASK_TRIES_MAX 1000000u

#define CONTROL(vcpu_control, field) ((size_t)(vcpu_control) + offsetof(struct pv_fifo_control, field))

/* Write the successor into a queue's last word.  1 = done, 0 = that word has left its queue: the queue is empty. */
static int64_t set_link(MemoryObject *domain, uint32_t tail, uint32_t port)
{
    uint32_t word, old;
    int64_t at;
    int done;
    PV_TRY(at, pv_fifo_word_at(domain, tail));
    if (at == 0)
        return 0;
    for (int turn = 0; turn <= LINK_TRIES_MAX; turn++) {
        if (turn == 1) /* the guest changed it under us: hold it still */
            PV_OR32(old, domain, at, PV_FIFO_BUSY, "fifo.busy");
        PV_LOAD32(word, domain, at, PV_RELAXED, "fifo.word");
        if (!(word & PV_FIFO_LINKED))
            break;
        /* SYNC(fifo_link): in one exchange, or the guest takes the word out as the queue's last one while we link behind it. */
        PV_CAS32(done, domain, at, word, (word & ~(PV_FIFO_LINK | PV_FIFO_BUSY)) | port, "fifo_link");
        if (done)
            return 1;
    }
    PV_AND32(old, domain, at, ~PV_FIFO_BUSY, "fifo.idle");
    (void)old;
    return 0;
}

/* Put a pending port, which is LINKED by now and in no queue, behind its queue on a vCPU that has a control block. */
static int64_t enqueue(MemoryObject *domain, uint32_t port, uint32_t vcpu, uint32_t control)
{
    uint64_t queue, chosen;
    uint32_t tail, ready;
    int64_t linked = 0;
    PV_LOAD64(queue, domain, PV_QUEUE_WORD(port), PV_RELAXED, "fifo.queue");
    uint32_t priority = PV_QUEUE_PRIORITY(queue) != 0 ? PV_QUEUE_PRIORITY(queue) - 1u : PV_FIFO_PRIORITY_DEFAULT;
    priority &= PV_FIFO_PRIORITIES - 1;
    size_t tail_at = PV_VCPU(vcpu, fifo_tail) + 4u * priority;
    chosen = (queue & ~PV_QUEUE_LAST) | PV_QUEUE_LINKED | (uint64_t)priority << 8 | vcpu;
    if (chosen != queue && queue & PV_QUEUE_LINKED) {
        /* It moves.  It may still be what its last queue takes for its tail: nothing may be linked behind it there any more. */
        size_t last_at = PV_VCPU(PV_QUEUE_VCPU(queue) & (PV_VCPUS_MAX - 1), fifo_tail) + 4u * PV_QUEUE_LAST_PRIORITY(queue);
        PV_LOAD32(tail, domain, last_at, PV_RELAXED, "fifo.tail");
        if (tail == port)
            PV_STORE32(domain, last_at, 0, PV_RELAXED, "fifo.tail");
    }
    if (chosen != queue)
        PV_STORE64(domain, PV_QUEUE_WORD(port), chosen, PV_RELAXED, "fifo.queue");
    PV_LOAD32(tail, domain, tail_at, PV_RELAXED, "fifo.tail");
    /* As its own tail it was the last one of this queue, and has left it: the queue is empty. */
    if (tail != 0 && tail != port && tail < PV_PORTS_FIFO)
        PV_TRY(linked, set_link(domain, tail, port));
    if (!linked)
        PV_STORE32(domain, CONTROL(control, head) + 4u * priority, port, PV_RELAXED, "fifo.head");
    PV_STORE32(domain, tail_at, port, PV_RELAXED, "fifo.tail");
    if (linked)
        return 0;
    /* SYNC(fifo_ready): the head before the bit that announces it (full barrier); the guest takes the bits, then reads the head. */
    PV_OR32(ready, domain, CONTROL(control, ready), 1u << priority, "fifo_ready");
    if (ready & 1u << priority)
        return 0;
    /* SYNC(fifo_upcall): the ready bit before the flag (full barriers); the CPU clears the flag before it takes the bits. */
    return pv_vcpu_mark(domain, vcpu);
}

/*
 * evtchn_fifo_set_pending.  PENDING, and LINKED if the port is neither masked nor in a queue, by one exchange of the event word:
 * also when that changes nothing, as a full barrier behind what the sender has written.  Mask and pending are bits of one word,
 * so the 2-level ABI's barrier between them is not needed: whoever unmasks sees PENDING, or we see no MASKED.  With `again` nothing
 * is raised that is not pending any more.
 */
static int64_t set_pending(MemoryObject *domain, uint32_t port, uint64_t now, int again)
{
    uint64_t entry, queue;
    uint32_t word, control, linked;
    int64_t at;
    int done = 0;
    PV_TRY(at, pv_fifo_word_at(domain, port));
    if (at == 0) {
        PV_OR64(queue, domain, PV_QUEUE_WORD(port), PV_QUEUE_PENDING, "fifo.early");
        (void)queue;
        return 0;
    }
    PV_LOAD64(entry, domain, PV_PORT_WORD(port), PV_RELAXED, "port.vcpu");
    uint32_t vcpu = PV_PORT_VCPU(entry) & (PV_VCPUS_MAX - 1);
    PV_LOAD32(control, domain, PV_VCPU(vcpu, control), PV_RELAXED, "fifo.control");
    PV_LOAD32(word, domain, at, PV_RELAXED, "fifo.word");
    while (!done) {
        if (again && !(word & PV_FIFO_PENDING))
            return 0;
        linked = control != 0 && !(word & (PV_FIFO_MASKED | PV_FIFO_LINKED)) ? PV_FIFO_LINKED : 0;
        PV_CAS32(done, domain, at, word, word | PV_FIFO_PENDING | linked, "fifo.pending");
    }
    if (!(word & PV_FIFO_PENDING))
        PV_STAMP64(domain, PV_PENDING_SINCE(port), now);
    if (linked)
        return enqueue(domain, port, vcpu, control);
    if (control == 0 && !(word & (PV_FIFO_MASKED | PV_FIFO_LINKED)))
        PV_COUNT64(domain, PV_VCPU(vcpu, fifo_dropped), 1);
    return 0;
}

int64_t pv_fifo_set_pending(MemoryObject *domain, uint32_t port, uint64_t now)
{
    return set_pending(domain, port, now, 0);
}

/*
 * Unmask; a port that is pending is linked again (EVTCHNOP_unmask), and stays where it is if it is linked already.  One that a CPU
 * has taken out and served since is left alone: its event would come twice.
 */
int64_t pv_fifo_unmask(MemoryObject *domain, uint32_t port)
{
    uint32_t word = 0;
    int64_t at;
    int done = 0;
    PV_TRY(at, pv_fifo_word_at(domain, port));
    if (at == 0)
        return 0;
    for (uint32_t turn = 0; !done && turn < UNMASK_TRIES_MAX; turn++) {
        PV_LOAD32(word, domain, at, PV_RELAXED, "fifo.word");
        if (word & PV_FIFO_BUSY)
            PV_SPIN(domain, "fifo.unmask.busy");
        else
            PV_CAS32(done, domain, at, word, word & ~PV_FIFO_MASKED, "fifo.unmask");
    }
    return done && word & PV_FIFO_PENDING ? set_pending(domain, port, 0, 1) : 0;
}

/* Is the port in this queue, as far as its word and what we noted of it tell? */
static int64_t is_queued(MemoryObject *domain, uint32_t port, uint32_t vcpu, uint32_t priority, uint32_t *next)
{
    uint64_t queue;
    uint32_t word;
    int64_t at;
    PV_TRY(at, pv_fifo_word_at(domain, port));
    if (at == 0)
        return 0;
    PV_LOAD32(word, domain, at, PV_RELAXED, "fifo.word");
    PV_LOAD64(queue, domain, PV_QUEUE_WORD(port), PV_RELAXED, "fifo.queue");
    *next = word & PV_FIFO_LINK;
    return word & PV_FIFO_LINKED && queue & PV_QUEUE_LINKED && PV_QUEUE_VCPU(queue) == vcpu &&
           PV_QUEUE_LAST_PRIORITY(queue) == priority;
}

/* Note what is reachable in one queue, from where the guest goes on or from the control block's head; an empty queue has neither. */
static int64_t walk(MemoryObject *domain, uint32_t vcpu, uint32_t control, uint32_t priority, uint64_t *reachable)
{
    uint32_t port, next = 0, last = 0;
    int64_t in;
    PV_LOAD32(port, domain, PV_VCPU(vcpu, fifo_head) + 4u * priority, PV_RELAXED, "fifo.local");
    if (port == 0)
        PV_LOAD32(port, domain, CONTROL(control, head) + 4u * priority, PV_RELAXED, "fifo.head");
    while (port != 0 && port < PV_PORTS_FIFO && !(reachable[port / 64] >> (port % 64) & 1)) {
        PV_TRY(in, is_queued(domain, port, vcpu, priority, &next));
        if (!in)
            break;
        reachable[port / 64] |= 1ull << (port % 64);
        last = port;
        port = next;
    }
    PV_STORE32(domain, PV_VCPU(vcpu, fifo_tail) + 4u * priority, last, PV_RELAXED, "fifo.tail");
    if (last == 0) { /* a head that is left over may be linked elsewhere by now */
        PV_STORE32(domain, PV_VCPU(vcpu, fifo_head) + 4u * priority, 0, PV_RELAXED, "fifo.local");
        PV_STORE32(domain, CONTROL(control, head) + 4u * priority, 0, PV_RELAXED, "fifo.head");
    }
    return 0;
}

/* Take a word that no queue reaches out of its queue, and raise it again if it is pending. */
static int64_t relink(MemoryObject *domain, uint32_t vcpu, uint32_t port, const uint64_t *reachable, uint32_t *marked)
{
    uint64_t entry, queue;
    uint32_t word, old;
    int64_t at, r;
    PV_TRY(at, pv_fifo_word_at(domain, port));
    if (at == 0 || reachable[port / 64] >> (port % 64) & 1)
        return 0;
    PV_LOAD32(word, domain, at, PV_RELAXED, "fifo.word");
    PV_LOAD64(entry, domain, PV_PORT_WORD(port), PV_RELAXED, "port.vcpu");
    PV_LOAD64(queue, domain, PV_QUEUE_WORD(port), PV_RELAXED, "fifo.queue");
    /*
     * Whoever was linked on this vCPU last is ours, wherever it is bound now: its CPU may have died with the word just taken out.
     * Any other may be in the hands of a CPU that runs.  LINKED is set before the queue is chosen: it may have none yet.
     */
    uint32_t on = queue & PV_QUEUE_LINKED ? PV_QUEUE_VCPU(queue) : PV_PORT_VCPU(entry);
    if (on != vcpu || (!(word & (PV_FIFO_LINKED | PV_FIFO_BUSY)) && !(word & PV_FIFO_PENDING && !(word & PV_FIFO_MASKED))))
        return 0;
    PV_AND32(old, domain, at, ~(PV_FIFO_LINKED | PV_FIFO_BUSY | PV_FIFO_LINK), "fifo.unlink");
    (void)old;
    if (!(word & PV_FIFO_PENDING))
        return 0;
    PV_TRY(r, pv_fifo_set_pending(domain, port, 0));
    if (r > 0) /* it may have moved, to a CPU that runs, and sleeps */
        *marked |= 1u << (r - 1);
    return 0;
}

/*
 * What the heir of a hypervisor, or of a CPU's process, finds half done: a word taken out whose successor was not yet noted, a
 * word LINKED that was not yet queued, a BUSY word, a stale tail, a pending word that nobody linked.  The hypervisor calls it
 * while the CPU's process does not run, so nobody takes anything out meanwhile, and everything raised goes through the
 * caller.  Walks the vCPU's queues, and raises again what none of them reaches.  The vCPUs whose doorbell may have to be rung
 * for that, a bit each; -1 when memory is short.
 */
int64_t pv_fifo_rebuild(MemoryObject *domain, uint32_t vcpu)
{
    uint32_t control, pages, old, marked = 0;
    int64_t r;
    PV_LOAD32(control, domain, PV_VCPU(vcpu, control), PV_RELAXED, "fifo.control");
    PV_LOAD32(pages, domain, PV_HEADER(array_pages), PV_RELAXED, "fifo.pages");
    if (control == 0 || pages > PV_FIFO_PAGES_MAX)
        return 0;
    uint64_t *reachable = calloc(PV_PORTS_FIFO / 64, sizeof *reachable);
    if (reachable == NULL)
        return -1;
    for (uint32_t priority = 0; priority < PV_FIFO_PRIORITIES; priority++)
        if ((r = walk(domain, vcpu, control, priority, reachable)) == PV_DEAD)
            goto dead;
    for (uint32_t port = 1; port < pages * PV_FIFO_WORDS_A_PAGE; port++) {
        if ((r = relink(domain, vcpu, port, reachable, &marked)) == PV_DEAD)
            goto dead;
    }
    free(reachable);
    /* Every queue gets a look: of what was walked, the bit that announced it may have died with its taker. */
    PV_OR32(old, domain, PV_VCPU(vcpu, fifo_ready), (1u << PV_FIFO_PRIORITIES) - 1, "fifo.ready.all");
    (void)old;
    return marked;
dead:
    free(reachable);
    return PV_DEAD;
}
