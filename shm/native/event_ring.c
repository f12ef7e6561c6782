/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The event ring of an open file.  Producers: the CPU processes of its domain (interrupt handler), under the producer lock.
 * Consumers: its users, each claiming entries by compare-exchange on C.  The file process grows and resets it, also under
 * the lock.  P (epoch, overflow, producer index) is authoritative in the machine's segment and copied to the page that the
 * users map; of what they can write, only C and the door are read, once each, and checked.
 *
 * The ring never signals.  It returns whether the reader must be woken; the caller does it.
 */
#include "core.h"

#include <errno.h>
#ifndef PVBUS_EXPLORED
#include <sched.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>
#endif

#define LOCK_SPINS_MAX 200u             /* a handler holds the lock for some 50 ns */
#define LOCK_WAIT_NS_MAX 5000000000ull  /* an heir takes a dead owner's lock back within this time, or the machine is broken */
#define TAKE_RETRIES_MAX 1000000u       /* each retry means that a rival or a RESET made progress */

#ifndef PVBUS_EXPLORED
#define EXIT_BROKEN 70 /* as in actors/runtime/process.py */

static _Noreturn void pv_broken(const char *what)
{
    fprintf(stderr, "pvbus: broken invariant: %s\n", what);
    _exit(EXIT_BROKEN);
}
#endif

/*
 * Take the producer lock.  1 = taken, 0 = the file is being released: nobody waits for a process of it that died with the lock.
 * The lock of a dead CPU is taken back by its heir; if that does not come, this process cannot keep what it promises and
 * ends, with its port still in service: an heir of ours repeats it.
 */
int64_t pv_ring_lock(MemoryObject *machine, uint32_t slot, uint32_t owner)
{
    uint64_t deadline = 0;
    for (uint32_t turn = 0;; turn++) {
        uint32_t seen = 0, state;
        int taken;
        /* SYNC(evr_lock): what the last owner did before its release is visible behind this exchange. */
        PV_CAS32(taken, machine, PV_FILE(slot, lock), seen, owner, "evr_lock");
        if (taken)
            return 1;
        PV_LOAD32(state, machine, PV_FILE(slot, state), PV_RELAXED, "evr.lock.state");
        if (state != PV_FILE_OPEN)
            return 0;
        PV_SPIN(machine, "evr.lock.spin");
#ifndef PVBUS_EXPLORED
        if (turn >= LOCK_SPINS_MAX) {
            if (deadline == 0)
                deadline = pv_now_ns() + LOCK_WAIT_NS_MAX;
            else if (pv_now_ns() > deadline)
                pv_broken("the producer lock of an open file was not given back in five seconds");
            struct timespec pause = {0, turn < 2 * LOCK_SPINS_MAX ? 0 : 100000};
            if (pause.tv_nsec == 0)
                sched_yield();
            else
                nanosleep(&pause, NULL);
        }
#else
        (void)deadline;
#endif
    }
}

int64_t pv_ring_unlock(MemoryObject *machine, uint32_t slot)
{
    /* SYNC(evr_lock): everything under the lock before the release; the next owner's compare-exchange is the partner. */
    PV_STORE32(machine, PV_FILE(slot, lock), 0, PV_RELEASE, "evr_lock");
    return 0;
}

static int64_t publish(MemoryObject *machine, uint32_t slot, MemoryObject *page, uint64_t prod)
{
    PV_STORE64(machine, PV_FILE(slot, prod), prod, PV_RELAXED, "evr.prod");
    PV_STORE64(page, PV_PAGE(prod), prod, PV_RELAXED, "evr.publish");
    return 0;
}

/* What the user wrote into C makes no sense: this file answers EIO from now on, nobody else notices. */
static int64_t poison(MemoryObject *machine, uint32_t slot, MemoryObject *page, uint64_t prod)
{
    int64_t r;
    PV_TRY(r, publish(machine, slot, page, prod | PV_POISONED));
    PV_COUNT64(machine, PV_FILE(slot, impossible), 1);
    PV_TRY(r, pv_door_raise(page));
    return PV_PUSH_POISONED | (r ? PV_PUSH_WAKE : 0);
}

/*
 * Decide whether the reader must be woken, after the entry is published (A3.5; the driver's order, with the lost wake-up of
 * the zoo's section 0, is PV_VARIANT_DRIVER_WAKEUP).
 */
static int64_t wake_after_publish(MemoryObject *machine, uint32_t slot, MemoryObject *page, int driver_order, int was_empty)
{
    int64_t raised;
    if (driver_order) {
        if (!was_empty)
            return 0;
        PV_TRY(raised, pv_door_raise(page));
        return PV_PUSH_WAKE;
    }
    /*
     * SYNC(evr_wake): P is visible before we look at the door.  Partner: pv_door_lower, which clears the door before it
     * looks at P.  Without it both may miss each other, and the reader sleeps on a non-empty ring.
     */
    PV_SMP_MB(page, "evr_wake");
    uint32_t door;
    PV_LOAD32(door, page, PV_PAGE(door), PV_RELAXED, "evr.door");
    if (door)
        return 0;
    PV_TRY(raised, pv_door_raise(page));
    if (raised)
        PV_COUNT64(machine, PV_FILE(slot, wakes), 1);
    return raised ? PV_PUSH_WAKE : 0;
}

/* evtchn_interrupt, the part under the ring's producer lock.  Ends the port's service (IN_SERVICE) under the same lock. */
static int64_t push_locked(MemoryObject *machine, uint32_t slot, MemoryObject *page, uint32_t port, MemoryObject *domain,
                           int driver_order, int *was_empty)
{
    uint64_t prod, cons;
    uint32_t size, door;
    int64_t r, result = 0;
    PV_LOAD64(prod, machine, PV_FILE(slot, prod), PV_RELAXED, "evr.prod");
    PV_LOAD32(door, page, PV_PAGE(door), PV_RELAXED, "evr.door");
    PV_LOAD64(cons, machine, PV_FILE(slot, cons_seen), PV_RELAXED, "evr.seen");
    PV_LOAD32(size, machine, PV_FILE(slot, size), PV_RELAXED, "evr.size");
    uint32_t used = (uint32_t)prod - (uint32_t)cons;
    /*
     * Look at C when what we last saw of it cannot tell that there is room, and when the reader has emptied the ring (the door
     * is down): a wake-up follows then, which costs more.  While entries stream, C's cache line stays the reader's.
     */
    if (driver_order || !door || used >= size) {
        /* SYNC(evr_room): the reader has copied an entry before it moves C (compare-exchange); only then may we overwrite it. */
        PV_LOAD64(cons, page, PV_PAGE(cons), PV_ACQUIRE, "evr_room");
        PV_STORE64(machine, PV_FILE(slot, cons_seen), cons, PV_RELAXED, "evr.seen");
        used = (uint32_t)prod - (uint32_t)cons;
    }
    *was_empty = used == 0;
    if (prod & PV_POISONED) {
        result = PV_PUSH_POISONED;
    } else if (PV_EPOCH(prod) != PV_EPOCH(cons) || used > size) {
        PV_TRY(result, poison(machine, slot, page, prod));
    } else if (used == size) {
        PV_TRY(r, publish(machine, slot, page, prod | PV_OVERFLOW));
        PV_COUNT64(machine, PV_FILE(slot, dropped), 1);
        result = PV_PUSH_OVERFLOW;
    } else {
        /* Claim before doing: an heir compares the index with P and knows whether the entry came out. */
        PV_STORE64(machine, PV_FILE(slot, claim), PV_CLAIM_VALID | (uint64_t)port << 32 | (uint32_t)prod, PV_RELAXED,
                   "evr.claim");
        uint32_t index = (uint32_t)prod & (size - 1);
        PV_STORE32(page, PV_PAGE_RING + 4u * (size_t)index, port, PV_RELAXED, "evr.entry");
        /* SYNC(evr_publish): the entry is visible before the index that covers it.  Partner: the barrier in pv_ring_take. */
        PV_SMP_WMB(page, "evr_publish");
        uint64_t next = (prod & ~0xffffffffull) | (uint32_t)(prod + 1);
        PV_TRY(r, publish(machine, slot, page, next));
        PV_COUNT64(machine, PV_FILE(slot, delivered), 1);
    }
    if (domain != NULL) {
        uint64_t old;
        PV_AND64(old, domain, PV_IRQ_WORD(port), ~PV_IRQ_IN_SERVICE, "irq.served");
        (void)old;
    }
    PV_STORE64(machine, PV_FILE(slot, claim), 0, PV_RELAXED, "evr.claim");
    return result;
}

int64_t pv_ring_push(MemoryObject *machine, uint32_t slot, MemoryObject *page, uint32_t port, uint32_t owner,
                     MemoryObject *domain)
{
    int64_t locked, result, wake, r;
    int was_empty = 0;
    uint32_t variants;
    PV_TRY(locked, pv_ring_lock(machine, slot, owner));
    if (!locked)
        return PV_PUSH_GONE;
    PV_LOAD32(variants, machine, offsetof(struct pv_machine_header, variants), PV_RELAXED, "variants");
    int driver_order = (variants & PV_VARIANT_DRIVER_WAKEUP) != 0;
    PV_TRY(result, push_locked(machine, slot, page, port, domain, driver_order, &was_empty));
    PV_TRY(r, pv_ring_unlock(machine, slot));
    if (result != 0)
        return result;
    PV_TRY(wake, wake_after_publish(machine, slot, page, driver_order, was_empty));
    return wake;
}

/*
 * evtchn_read's middle: claim up to `max` entries.  Returns their number, 0 when empty, -EFBIG after an overflow (tested
 * before data), -EIO when the machine or the user broke the ring, -EFAULT without a buffer, and then C does not move (A4.9).
 * *emptied: nothing was left behind.
 */
int64_t pv_ring_take(MemoryObject *page, uint32_t *out, uint32_t max, int *emptied)
{
    *emptied = 0;
    for (uint32_t turn = 0; turn < TAKE_RETRIES_MAX; turn++) {
        uint64_t cons, prod, now;
        uint32_t size, grown;
        int claimed;
        PV_LOAD64(cons, page, PV_PAGE(cons), PV_ACQUIRE, "evr.take.cons");
        PV_LOAD64(prod, page, PV_PAGE(prod), PV_RELAXED, "evr.take.prod");
        /* SYNC(evr_publish): the index before the entries that it covers, and before the size that places them. */
        PV_SMP_RMB(page, "evr_publish");
        if (PV_EPOCH(prod) != PV_EPOCH(cons)) { /* a RESET is half way */
            PV_SPIN(page, "evr.take.reset");
            continue;
        }
        if (prod & PV_POISONED)
            return -EIO;
        if (prod & PV_OVERFLOW)
            return -EFBIG;
        uint32_t n = (uint32_t)prod - (uint32_t)cons;
        if (n == 0)
            return 0;
        /* SYNC(evr_grow): a doubled size comes with both halves filled. */
        PV_LOAD32(size, page, PV_PAGE(size), PV_ACQUIRE, "evr_grow");
        if (size == 0 || (size & (size - 1)) != 0 || n > size || PV_PAGE_RING + 4ull * size > page->size) {
            /* A rival that read, and entries that came in its room, between our two loads look impossible, too. */
            PV_LOAD64(now, page, PV_PAGE(cons), PV_ACQUIRE, "evr.take.cons");
            if (now != cons)
                continue;
            return -EIO;
        }
        if (out == NULL)
            return -EFAULT;
        uint32_t take = n < max ? n : max;
        for (uint32_t i = 0; i < take; i++)
            PV_LOAD32(out[i], page, PV_PAGE_RING + 4u * (size_t)((uint32_t)(cons + i) & (size - 1)), PV_RELAXED, "evr.take.entry");
        /*
         * SYNC(evr_grow): the copies before a second look at the size.  In a grown ring the producer may already have
         * used, for a new entry, a slot where the old size places an unread one; C does not tell.
         */
        PV_SMP_RMB(page, "evr_grow");
        PV_LOAD32(grown, page, PV_PAGE(size), PV_RELAXED, "evr.take.size");
        if (grown != size)
            continue;
        uint64_t next = (cons & ~0xffffffffull) | (uint32_t)(cons + take);
        /* SYNC(evr_room): the copies are done before C moves (the exchange is a full barrier). */
        PV_CAS64(claimed, page, PV_PAGE(cons), cons, next, "evr_room");
        if (claimed) {
            *emptied = take == n;
            return take;
        }
    }
    return -EIO;
}

/* What poll looks at, lock-free: unread entries, plus the overflow and poison marks. */
int64_t pv_ring_state(MemoryObject *page)
{
    for (uint32_t turn = 0; turn < TAKE_RETRIES_MAX; turn++) {
        uint64_t cons, prod;
        PV_LOAD64(cons, page, PV_PAGE(cons), PV_ACQUIRE, "evr.state.cons");
        PV_LOAD64(prod, page, PV_PAGE(prod), PV_ACQUIRE, "evr.state.prod");
        if (PV_EPOCH(prod) != PV_EPOCH(cons)) {
            PV_SPIN(page, "evr.state.reset");
            continue;
        }
        return (int64_t)((uint32_t)prod - (uint32_t)cons) | (prod & PV_OVERFLOW ? PV_RING_OVERFLOW : 0) |
               (prod & PV_POISONED ? PV_RING_POISONED : 0);
    }
    return PV_RING_POISONED;
}

/* Whoever took the byte out of the doorbell lowers the door, then looks again. */
int64_t pv_door_lower(MemoryObject *page)
{
    PV_STORE32(page, PV_PAGE(door), 0, PV_RELAXED, "evr.door.lower");
    /* SYNC(evr_wake): the door is down before we look at P; the producer publishes P before it looks at the door. */
    PV_SMP_MB(page, "evr_wake");
    int64_t state;
    PV_TRY(state, pv_ring_state(page));
    return state != 0;
}

int64_t pv_door_raise(MemoryObject *page)
{
    uint32_t old;
    PV_XCHG32(old, page, PV_PAGE(door), 1, "evr.door.raise");
    return old == 0;
}

/* evtchn_resize_ring: 64 slots, then double.  Old contents end up in both halves, so every index stays right. */
int64_t pv_ring_grow(MemoryObject *machine, uint32_t slot, MemoryObject *page)
{
    int64_t r;
    uint32_t size, entry;
    PV_TRY(r, pv_ring_lock(machine, slot, PV_LOCK_FILE));
    if (!r)
        return -EIO;
    PV_LOAD32(size, machine, PV_FILE(slot, size), PV_RELAXED, "evr.size");
    uint32_t larger = size == 0 ? PV_RING_SIZE_FIRST : 2 * size;
    if (PV_PAGE_RING + 4ull * larger > page->size) {
        PV_TRY(r, pv_ring_unlock(machine, slot));
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < size; i++) {
        PV_LOAD32(entry, page, PV_PAGE_RING + 4u * (size_t)i, PV_RELAXED, "evr.grow.load");
        PV_STORE32(page, PV_PAGE_RING + 4u * (size_t)(i + size), entry, PV_RELAXED, "evr.grow.store");
    }
    /* SYNC(evr_grow): the upper half is filled before the size that reaches it; the reader acquires the size. */
    PV_STORE32(page, PV_PAGE(size), larger, PV_RELEASE, "evr_grow");
    PV_STORE32(machine, PV_FILE(slot, size), larger, PV_RELAXED, "evr.size");
    PV_TRY(r, pv_ring_unlock(machine, slot));
    return larger;
}

/* IOCTL_EVTCHN_RESET: empty, no overflow, a new epoch; a reader from before it fails its compare-exchange. */
int64_t pv_ring_reset(MemoryObject *machine, uint32_t slot, MemoryObject *page)
{
    int64_t r;
    uint64_t prod;
    PV_TRY(r, pv_ring_lock(machine, slot, PV_LOCK_FILE));
    if (!r)
        return -EIO;
    PV_LOAD64(prod, machine, PV_FILE(slot, prod), PV_RELAXED, "evr.prod");
    uint64_t next = ((PV_EPOCH(prod) + 1) & 0x3fffffffull) << PV_EPOCH_SHIFT;
    uint64_t poisoned = prod & PV_POISONED; /* a broken file stays broken */
    PV_STORE64(machine, PV_FILE(slot, cons_seen), next, PV_RELAXED, "evr.seen");
    PV_XCHG64(prod, page, PV_PAGE(cons), next, "evr.reset.cons");
    PV_TRY(r, publish(machine, slot, page, next | poisoned));
    PV_TRY(r, pv_ring_unlock(machine, slot));
    return 0;
}

/* A user process wrote nonsense into its submission ring: the file answers EIO from now on. */
int64_t pv_ring_poison(MemoryObject *machine, uint32_t slot, MemoryObject *page)
{
    int64_t r, result;
    uint64_t prod;
    PV_TRY(r, pv_ring_lock(machine, slot, PV_LOCK_FILE));
    if (!r)
        return 0;
    PV_LOAD64(prod, machine, PV_FILE(slot, prod), PV_RELAXED, "evr.prod");
    PV_TRY(result, poison(machine, slot, page, prod));
    PV_TRY(r, pv_ring_unlock(machine, slot));
    return result & PV_PUSH_WAKE;
}

/* An heir of `owner` finishes what the dead left under the lock: publish the entry, or see that it came out. */
int64_t pv_ring_recover(MemoryObject *machine, uint32_t slot, MemoryObject *page, uint32_t owner, MemoryObject *domain)
{
    uint32_t lock, size;
    uint64_t claim, prod, old;
    int64_t r;
    PV_LOAD32(lock, machine, PV_FILE(slot, lock), PV_ACQUIRE, "evr.lock");
    if (lock != owner)
        return 0;
    PV_LOAD64(claim, machine, PV_FILE(slot, claim), PV_RELAXED, "evr.claim");
    PV_LOAD64(prod, machine, PV_FILE(slot, prod), PV_RELAXED, "evr.prod");
    PV_LOAD32(size, machine, PV_FILE(slot, size), PV_RELAXED, "evr.size");
    if (claim & PV_CLAIM_VALID) {
        uint32_t port = (uint32_t)(claim >> 32) & 0x1ffffu;
        if ((uint32_t)claim == (uint32_t)prod) {
            PV_STORE32(page, PV_PAGE_RING + 4u * (size_t)((uint32_t)prod & (size - 1)), port, PV_RELAXED, "evr.entry");
            /* SYNC(evr_publish): as in push_locked, whose work this finishes. */
            PV_SMP_WMB(page, "evr_publish");
            prod = (prod & ~0xffffffffull) | (uint32_t)(prod + 1);
        }
        PV_TRY(r, publish(machine, slot, page, prod));
        PV_LOAD64(old, domain, PV_IRQ_WORD(port), PV_RELAXED, "irq");
        if ((old & PV_IRQ_IN_SERVICE) && PV_IRQ_CPU(old) == owner - 1)
            PV_AND64(old, domain, PV_IRQ_WORD(port), ~PV_IRQ_IN_SERVICE, "irq.served");
        PV_STORE64(machine, PV_FILE(slot, claim), 0, PV_RELAXED, "evr.claim");
    } else {
        PV_TRY(r, publish(machine, slot, page, prod));
    }
    PV_TRY(r, pv_ring_unlock(machine, slot));
    return 1;
}
