/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A submission ring: one producer process (a user), one consumer (the hypervisor).  The user's side is here; the consumer,
 * which believes nothing, is event_path.c.  A full ring pushes back, it never drops.
 */
#include "core.h"

#define RING(field) offsetof(struct pv_submission_ring, field)

/*
 * 0 = queued, 1 = full.  *tail is the caller's own index: nobody else writes it.  *head is what it last saw of the machine's;
 * it is read again only when the ring seems full, since every look would take the cache line from the hypervisor.
 */
int64_t pv_submission_push(MemoryObject *ring, uint32_t *tail, uint32_t *head, uint32_t entry)
{
    if (*tail - *head >= PV_SUBMISSION_ENTRIES) {
        /* SYNC(sub_room): the machine is done with an entry before it moves head past it. */
        PV_LOAD32(*head, ring, RING(head), PV_ACQUIRE, "sub_room");
        if (*tail - *head >= PV_SUBMISSION_ENTRIES)
            return 1;
    }
    PV_STORE32(ring, PV_SUBMISSION_DATA + 4u * (size_t)(*tail & (PV_SUBMISSION_ENTRIES - 1)), entry, PV_RELAXED, "sub.entry");
    /* SYNC(sub_publish): the entry before the tail that covers it; the drain acquires the tail. */
    PV_STORE32(ring, RING(tail), *tail + 1, PV_RELEASE, "sub_publish");
    ++*tail;
    return 0;
}

/*
 * 1 = the hypervisor has announced that it may sleep (the word is odd, and counts), and we have not rung since: ring.  It may
 * take its time to run; ringing at every entry until then would cost a system call each.  *rung is the caller's own.
 */
int64_t pv_submission_must_kick(MemoryObject *public_page, uint32_t *rung)
{
    uint32_t sleeping;
    /* SYNC(sub_kick): the tail is visible before we look whether it sleeps; it announces, then looks at the tails. */
    PV_SMP_MB(public_page, "sub_kick");
    PV_LOAD32(sleeping, public_page, offsetof(struct pv_public_page, hypervisor_sleeping), PV_RELAXED, "sub.sleeping");
    if (!(sleeping & 1) || sleeping == *rung)
        return 0;
    *rung = sleeping;
    return 1;
}
