/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The hypervisor as the one consumer of all submission rings: take entries, check them, raise ports, end interrupts.
 * Everything a user can write is read once and checked; an impossible index poisons that ring only.  What has to be signalled
 * is noted for the caller.
 */
#include "hv.h"

int pv_domain_index(PathObject *self, uint32_t domid)
{
    for (uint32_t i = 0; i < self->domain_count; i++)
        if (self->domain_ids[i] == domid)
            return (int)i;
    return -1;
}

MemoryObject *pv_domain_of(PathObject *self, uint32_t domid)
{
    for (uint32_t i = 0; i < self->domain_count; i++)
        if (self->domain_ids[i] == domid)
            return self->domains[i];
    return NULL;
}

/* Late EOIs whose time has come, in all domains. */
int64_t pv_expire(PathObject *self, drained *out)
{
    uint64_t next;
    int64_t now, kicked, asleep;
    for (uint32_t i = 0; i < self->domain_count; i++) {
        PV_LOAD64(next, self->domains[i], PV_HEADER(eoi_next_ns), PV_RELAXED, "eoi.next");
        if (next == 0)
            continue;
        PV_TRY(now, pv_machine_now(self->machine));
        if ((uint64_t)now < next)
            continue;
        PV_TRY(kicked, pv_eoi_expire(self->domains[i], (uint64_t)now));
        for (; kicked != 0; kicked &= kicked - 1) {
            uint32_t vcpu = (uint32_t)__builtin_ctzll((uint64_t)kicked);
            PV_TRY(asleep, pv_vcpu_kick(self->domains[i], vcpu));
            if (asleep && out->kick_count < KICKS_MAX)
                out->kicks[out->kick_count++] = self->domain_ids[i] << 8 | vcpu;
        }
        out->done++;
    }
    return 0;
}

/* How long until the next one is due, in ms rounded up; -1 = none waits. */
int64_t pv_expires_in(PathObject *self)
{
    uint64_t next, earliest = 0;
    int64_t now;
    for (uint32_t i = 0; i < self->domain_count; i++) {
        PV_LOAD64(next, self->domains[i], PV_HEADER(eoi_next_ns), PV_RELAXED, "eoi.next");
        if (next != 0 && (earliest == 0 || next < earliest))
            earliest = next;
    }
    if (earliest == 0)
        return -1;
    PV_TRY(now, pv_machine_now(self->machine));
    return earliest <= (uint64_t)now ? 0 : (int64_t)((earliest - (uint64_t)now + 999999) / 1000000);
}

static int64_t kick(PathObject *self, uint32_t domid, int64_t marked, drained *out)
{
    int64_t asleep;
    if (marked == 0)
        return 0;
    uint32_t vcpu = (uint32_t)marked - 1;
    PV_TRY(asleep, pv_vcpu_kick(pv_domain_of(self, domid), vcpu));
    if (asleep && out->kick_count < KICKS_MAX) /* one announcement, one kick: at most one a vCPU */
        out->kicks[out->kick_count++] = domid << 8 | vcpu;
    return 0;
}

#define SUB(i, field) PV_SUBMISSION(i, field)

/* Record what is about to be done: an heir compares the target's count of services with the one noted here. */
static int64_t claim(PathObject *self, uint32_t index, uint32_t head, MemoryObject *domain, uint32_t port)
{
    uint64_t irq;
    PV_LOAD64(irq, domain, PV_IRQ_WORD(port), PV_RELAXED, "irq");
    PV_STORE64(self->machine, SUB(index, claim), PV_CLAIM_VALID | (uint64_t)(head & 0x7fffffffu) << 32 | PV_IRQ_SERVED(irq),
               PV_RELAXED, "sub.claim");
    return 0;
}

/* Where a notify of this port goes: 1 and the target, or 0 when it is dropped (unbound peer, or not this file's port). */
static int64_t target_of(PathObject *self, MemoryObject *domain, uint32_t domid, uint32_t slot, uint32_t port,
                         MemoryObject **to, uint32_t *to_id, uint32_t *to_port)
{
    uint64_t irq, word;
    PV_LOAD64(irq, domain, PV_IRQ_WORD(port), PV_RELAXED, "irq");
    if (PV_IRQ_SLOT(irq) != slot + 1) {
        PV_COUNT64(self->machine, offsetof(struct pv_machine_header, refused), 1);
        return 0;
    }
    PV_LOAD64(word, domain, PV_PORT_WORD(port), PV_RELAXED, "port");
    if (PV_PORT_STATE(word) == PV_IPI) {
        *to = domain;
        *to_id = domid;
        *to_port = port;
        return 1;
    }
    if (PV_PORT_STATE(word) != PV_INTERDOMAIN)
        return 0;
    *to_id = PV_PORT_REMOTE_DOMAIN(word);
    *to_port = PV_PORT_REMOTE_PORT(word);
    *to = pv_domain_of(self, *to_id);
    return *to != NULL && *to_port < PV_PORTS_MAX;
}

static int64_t execute(PathObject *self, uint32_t index, uint32_t head, uint32_t slot, uint32_t entry, drained *out)
{
    uint32_t domid, port = PV_SUB_PORT(entry), to_id = 0, to_port = 0;
    int64_t r, marked;
    MemoryObject *to = NULL;
    PV_LOAD32(domid, self->machine, PV_FILE(slot, domain), PV_RELAXED, "file.domain");
    MemoryObject *domain = pv_domain_of(self, domid);
    if (PV_SUB_OP(entry) == PV_SUB_REARM) {
        /* One byte a ring is enough, however often it is asked for; so there is room for all. */
        if ((out->rearm_count == 0 || out->rearm[out->rearm_count - 1] != slot) && out->rearm_count < PV_SUBMISSIONS_MAX)
            out->rearm[out->rearm_count++] = slot;
        return 0;
    }
    if (domain == NULL || port == 0 || port >= PV_PORTS_MAX || PV_SUB_OP(entry) > PV_SUB_ENABLE) {
        PV_COUNT64(self->machine, offsetof(struct pv_machine_header, refused), 1);
        return 0;
    }
    if (PV_SUB_OP(entry) == PV_SUB_ENABLE) {
        PV_TRY(r, claim(self, index, head, domain, port));
        PV_TRY(marked, pv_eoi(self->machine, domain, port, slot, 0));
        PV_COUNT64(self->machine, offsetof(struct pv_machine_header, enables), 1);
        return kick(self, domid, marked, out);
    }
    PV_COUNT64(self->machine, offsetof(struct pv_machine_header, notifies), 1);
    PV_TRY(r, target_of(self, domain, domid, slot, port, &to, &to_id, &to_port));
    if (!r)
        return 0;
    PV_TRY(r, claim(self, index, head, to, to_port));
    PV_TRY(marked, pv_set_pending(to, to_port, out->now));
    return kick(self, to_id, marked, out);
}

/* Take at most `budget` entries of one ring. */
static int64_t drain_ring(PathObject *self, uint32_t index, uint32_t budget, drained *out)
{
    MemoryObject *ring = self->rings[index];
    uint32_t head, tail, entry, state;
    int64_t r;
    PV_LOAD32(head, self->machine, SUB(index, head), PV_RELAXED, "sub.head");
    /* SYNC(sub_publish): the tail before the entries that it covers. */
    PV_LOAD32(tail, ring, offsetof(struct pv_submission_ring, tail), PV_ACQUIRE, "sub_publish");
    if (tail == head)
        return 0;
    PV_LOAD32(state, self->machine, SUB(index, state), PV_RELAXED, "sub.state");
    if (state != 1)
        return 0;
    uint32_t count = tail - head;
    if (count > PV_SUBMISSION_ENTRIES) {
        PV_STORE32(self->machine, SUB(index, state), 2, PV_RELAXED, "sub.poison");
        PV_COUNT64(self->machine, offsetof(struct pv_machine_header, poisoned), 1);
        if (out->poisoned_count < PV_SUBMISSIONS_MAX)
            out->poisoned[out->poisoned_count++] = self->ring_slot[index];
        return 0;
    }
    if (count > budget)
        count = budget;
    if (out->now == 0) {
#ifndef PVBUS_EXPLORED
        out->now = pv_now_ns();
#else
        out->now = 1;
#endif
    }
#ifndef PVBUS_EXPLORED
    out->cores |= 1ull << (__atomic_load_n(PV_AT(uint32_t, ring, offsetof(struct pv_submission_ring, core)), __ATOMIC_RELAXED) & 63);
#endif
    for (uint32_t i = 0; i < count; i++, head++) {
        PV_LOAD32(entry, ring, PV_SUBMISSION_DATA + 4u * (size_t)(head & (PV_SUBMISSION_ENTRIES - 1)), PV_RELAXED, "sub.entry");
        PV_TRY(r, execute(self, index, head, self->ring_slot[index], entry, out));
        PV_STORE32(self->machine, SUB(index, head), head + 1, PV_RELAXED, "sub.head");
        out->done++;
    }
    PV_COUNT64(self->machine, SUB(index, taken), count);
    /* SYNC(sub_room): done with the entries before the user may overwrite them. */
    PV_STORE32(ring, offsetof(struct pv_submission_ring, head), head, PV_RELEASE, "sub_room");
    return 0;
}

int64_t pv_drain(PathObject *self, uint32_t first, uint32_t end, uint32_t budget, drained *out)
{
    int64_t r;
    for (uint32_t i = first; i < end; i++)
        if (self->rings[i] != NULL)
            PV_TRY(r, drain_ring(self, i, budget, out));
    return 0;
}

/* Announce that the hypervisor may sleep; 0 when work came in between, or 1. */
int64_t pv_hypervisor_may_sleep(PathObject *self, MemoryObject *public_page)
{
    uint32_t head, tail, word;
    int64_t r;
    PV_LOAD32(word, public_page, offsetof(struct pv_public_page, hypervisor_sleeping), PV_RELAXED, "sub.word");
    PV_STORE32(public_page, offsetof(struct pv_public_page, hypervisor_sleeping), word | 1, PV_RELAXED, "sub.announce");
    /* SYNC(sub_kick): announced before we look at the tails; the user publishes its tail before it looks at us. */
    PV_SMP_MB(public_page, "sub_kick");
    for (uint32_t i = 0; i < self->rings_end; i++) {
        if (self->rings[i] == NULL)
            continue;
        PV_LOAD32(head, self->machine, SUB(i, head), PV_RELAXED, "sub.head");
        PV_LOAD32(tail, self->rings[i], offsetof(struct pv_submission_ring, tail), PV_RELAXED, "sub.tail");
        uint32_t state = 1;
        if (head != tail)
            PV_LOAD32(state, self->machine, SUB(i, state), PV_RELAXED, "sub.state");
        if (head != tail && state == 1) {
            PV_TRY(r, pv_hypervisor_awake(public_page));
            return 0;
        }
    }
    return 1;
}

/* The next announcement is another number, so that everybody rings again. */
int64_t pv_hypervisor_awake(MemoryObject *public_page)
{
    uint32_t word;
    PV_LOAD32(word, public_page, offsetof(struct pv_public_page, hypervisor_sleeping), PV_RELAXED, "sub.word");
    PV_STORE32(public_page, offsetof(struct pv_public_page, hypervisor_sleeping), (word | 1) + 1, PV_RELAXED, "sub.awake");
    return 0;
}

int64_t pv_cpu_may_sleep(MemoryObject *domain, MemoryObject *hv, uint32_t vcpu)
{
    uint8_t pending;
    int64_t idle = 1;
    PV_STORE32(domain, PV_VCPU(vcpu, sleeping), 1, PV_RELAXED, "cpu.announce");
    /* SYNC(cpu_sleep): announced before we look at the upcall flag; the sender sets the flag before it looks at us. */
    PV_SMP_MB(domain, "cpu_sleep");
    PV_LOAD8(pending, domain, PV_VCPU_INFO(vcpu, evtchn_upcall_pending), PV_RELAXED, "upcall.look");
    if (!pending && hv != NULL)
        PV_TRY(idle, pv_hv_is_idle(hv, vcpu));
    if (!pending && idle)
        return idle;
    /* SYNC(cpu_idle): awake before the exchange that takes the flag (full barrier); cpu_is_idle looks the other way round. */
    PV_STORE32(domain, PV_VCPU(vcpu, sleeping), 0, PV_RELAXED, "cpu.awake");
    return 0;
}

/*
 * An heir: was the entry that its forerunner had claimed executed?  Then it is behind us.  It was if its port has been served
 * since, or still shows it: pending after a notify, enabled after a write-back.  CPUs may be at work meanwhile, so executing
 * it once more to be sure is no way: what is served in between would come twice, or be written back unread.
 */
static int64_t resolve(PathObject *self, uint32_t index)
{
    uint32_t head, entry, domid, to_id = 0, to_port, slot = self->ring_slot[index];
    uint64_t noted, irq;
    int64_t r, shows = 0;
    PV_LOAD64(noted, self->machine, SUB(index, claim), PV_RELAXED, "sub.claim");
    PV_LOAD32(head, self->machine, SUB(index, head), PV_RELAXED, "sub.head");
    if (!(noted & PV_CLAIM_VALID) || (uint32_t)(noted >> 32 & 0x7fffffffu) != (head & 0x7fffffffu))
        return 0;
    PV_LOAD32(entry, self->rings[index], PV_SUBMISSION_DATA + 4u * (size_t)(head & (PV_SUBMISSION_ENTRIES - 1)), PV_RELAXED, "sub.entry");
    PV_LOAD32(domid, self->machine, PV_FILE(slot, domain), PV_RELAXED, "file.domain");
    MemoryObject *to = pv_domain_of(self, domid);
    to_port = PV_SUB_PORT(entry);
    if (to == NULL || to_port == 0 || to_port >= PV_PORTS_MAX)
        return 0;
    if (PV_SUB_OP(entry) == PV_SUB_NOTIFY) {
        PV_TRY(r, target_of(self, to, domid, slot, to_port, &to, &to_id, &to_port));
        if (!r)
            return 0;
        /* SYNC(sub_resolve): pending before the count (acquire); a CPU counts a service before it clears pending. */
        PV_TRY(shows, pv_is_pending(to, to_port));
    }
    PV_LOAD64(irq, to, PV_IRQ_WORD(to_port), PV_RELAXED, "irq");
    if (PV_SUB_OP(entry) == PV_SUB_ENABLE)
        shows = (irq & PV_IRQ_ENABLED) != 0;
    if (shows || PV_IRQ_SERVED(irq) != (uint32_t)noted)
        PV_STORE32(self->machine, SUB(index, head), head + 1, PV_RELAXED, "sub.head");
    return 0;
}


int64_t pv_resolve_claim(PathObject *self, uint32_t index)
{
    int64_t r;
    uint32_t head;
    PV_TRY(r, resolve(self, index));
    PV_LOAD32(head, self->machine, SUB(index, head), PV_RELAXED, "sub.head");
    /* SYNC(sub_room): a forerunner may have died before it gave the room back; its user would wait for it for ever. */
    PV_STORE32(self->rings[index], offsetof(struct pv_submission_ring, head), head, PV_RELEASE, "sub_room");
    return 0;
}
