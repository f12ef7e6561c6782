/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Hyper-V's interrupt on one virtual CPU: vmbus_isr, and the two tasklets that it schedules.  Runs in the cpu processes.
 *
 * The ISR looks at the event flag first, then at the message slot (B5).  The message tasklet copies the slot into the domain's
 * work ring, frees it by compare-exchange, and writes EOM only if the host has said that it waits for one (B4).  The event
 * tasklet takes the flags of its CPU and rings the doorbells of the channels that they name (X14).
 */
#include "hv.h"

#define MESSAGES_A_RUN 64u   /* a slot refilled as fast as it is emptied must not keep the CPU from its other work */
#define WORK_CLAIM_TRIES 1000u
#define WORK_RETRIES 10000u  /* variant work-allocation-retries: the driver of 2012 has no bound */

/* ---- the work ring */

/* Claim the entry at the tail.  Its index, or -1 when the ring is full.  Whoever finds it claimed moves the tail on. */
static int64_t claim_entry(MemoryObject *hv, uint32_t vp)
{
    uint32_t tail, state, seen;
    int claimed, moved;
    for (uint32_t turn = 0; turn < WORK_CLAIM_TRIES; turn++) {
        PV_LOAD32(tail, hv, PV_HV_HEADER(work_tail), PV_ACQUIRE, "work.tail");
        state = PV_HV_WORK_FREE_AT(tail);
        /* SYNC(work_room): the workqueue is done with an entry before it frees it (the exchange is a full barrier). */
        PV_CAS32(claimed, hv, PV_HV_WORK(tail, state), state, PV_HV_WORK_CLAIMED_BY(vp), "work_room");
        seen = tail;
        if (claimed || (state & 0xffu) == PV_HV_WORK_CLAIMED) {
            PV_CAS32(moved, hv, PV_HV_HEADER(work_tail), seen, tail + 1, "work.claim");
            moved = 1; /* by us, or by somebody else */
        } else {
            PV_LOAD32(seen, hv, PV_HV_HEADER(work_tail), PV_ACQUIRE, "work.tail");
            moved = seen != tail;
        }
        if (claimed)
            return tail;
        if (!moved)
            return -1; /* a lap behind us: not done yet */
    }
    return -1;
}

/*
 * Give a message to the workqueue.  0 = the ring is full: the message stays in its slot, and the tasklet stays scheduled (H5:
 * nothing is lost, and nobody spins).
 */
static int64_t queue_work(MemoryObject *hv, uint32_t vp, size_t slot, uint32_t number)
{
    uint32_t type, meta;
    uint64_t word;
    int64_t entry;
    PV_TRY(entry, claim_entry(hv, vp));
    if (entry < 0)
        return 0;
    size_t message = PV_HV_WORK(entry, message);
    PV_LOAD32(type, hv, slot + offsetof(struct pv_hv_slot, type), PV_ACQUIRE, "hv.slot.type");
    PV_STORE32(hv, message + offsetof(struct pv_hv_slot, type), type, PV_RELAXED, "work.entry");
    PV_LOAD32(meta, hv, slot + offsetof(struct pv_hv_slot, meta), PV_RELAXED, "hv.slot.meta");
    PV_STORE32(hv, message + offsetof(struct pv_hv_slot, meta), meta & PV_HV_META_SIZE, PV_RELAXED, "work.entry");
    for (size_t at = offsetof(struct pv_hv_slot, sender); at < sizeof(struct pv_hv_slot); at += 8) {
        PV_LOAD64(word, hv, slot + at, PV_RELAXED, "hv.slot.copy");
        PV_STORE64(hv, message + at, word, PV_RELAXED, "work.entry");
    }
    PV_STORE32(hv, PV_HV_WORK(entry, seq), (uint32_t)entry, PV_RELAXED, "work.seq");
    PV_STORE32(hv, PV_HV_WORK(entry, vp), vp, PV_RELAXED, "work.vp");
    PV_STORE32(hv, PV_HV_WORK(entry, number), number, PV_RELAXED, "work.number");
#ifndef PVBUS_EXPLORED
    PV_STORE64(hv, PV_HV_WORK(entry, when_ns), pv_now_ns(), PV_RELAXED, "work.when");
#endif
    /* SYNC(work_publish): the message before the state that says it is there. */
    PV_STORE32(hv, PV_HV_WORK(entry, state), PV_HV_WORK_FILLED, PV_RELEASE, "work_publish");
    return 1;
}

/* An heir of a CPU: entries that its forerunner had claimed hold nothing; the messages still lie in their slots. */
int64_t pv_hv_recover(MemoryObject *hv, uint32_t vp)
{
    uint32_t state, tail;
    int moved;
    PV_LOAD32(tail, hv, PV_HV_HEADER(work_tail), PV_ACQUIRE, "work.tail");
    for (uint32_t entry = 0; entry < PV_HV_WORK_ENTRIES; entry++) {
        PV_LOAD32(state, hv, PV_HV_WORK(entry, state), PV_ACQUIRE, "work.state");
        if (state != PV_HV_WORK_CLAIMED_BY(vp))
            continue;
        /* Claimed, but the tail not moved: while it is filled nobody else would move it. */
        uint32_t seen = tail;
        if (tail % PV_HV_WORK_ENTRIES == entry) {
            PV_CAS32(moved, hv, PV_HV_HEADER(work_tail), seen, tail + 1, "work.claim");
            (void)moved; /* or another CPU has */
        }
        PV_STORE32(hv, PV_HV_WORK(entry, message) + offsetof(struct pv_hv_slot, type), 0, PV_RELAXED, "work.entry");
        /* SYNC(work_publish): as for a message. */
        PV_STORE32(hv, PV_HV_WORK(entry, state), PV_HV_WORK_FILLED, PV_RELEASE, "work_publish");
    }
    PV_STORE32(hv, PV_HV_VP(vp, tasklets), PV_HV_TASKLET_MESSAGE | PV_HV_TASKLET_EVENT, PV_RELAXED, "hv.tasklets");
    return 0;
}

/* ---- the message tasklet */

/*
 * vmbus_on_msg_dpc for one message.  Copied before the slot is freed; freed by compare-exchange (zoo 5), so that a second consumer
 * cannot erase what came next; then a full barrier, and only then a look whether the host waits for an EOM.
 */
static int64_t take_message(MemoryObject *hv, uint32_t vp, uint32_t retries, pv_hv_effects *out)
{
    uint64_t simp, eom;
    uint32_t type, meta, offered;
    int64_t queued;
    int freed;
    PV_LOAD64(simp, hv, PV_HV_VP(vp, simp), PV_RELAXED, "hv.simp");
    if (!PV_HV_ENABLED(simp) || PV_HV_FRAME(simp) >= PV_HV_FRAMES)
        return 0;
    size_t slot = PV_HV_SLOT(PV_HV_FRAME(simp), PV_HV_SINT_VMBUS, type);
    /* SYNC(syn_publish): the type before everything that it announces. */
    PV_LOAD32(type, hv, slot, PV_ACQUIRE, "syn_publish");
    if (type == 0)
        return 0;
    PV_LOAD32(offered, hv, PV_HV_VP(vp, offered) + 4u * PV_HV_SINT_VMBUS, PV_RELAXED, "hv.offered");
    PV_TRY(queued, queue_work(hv, vp, slot, offered));
    for (uint32_t again = 0; !queued && again < retries; again++)
        PV_TRY(queued, queue_work(hv, vp, slot, offered));
    if (!queued) {
        out->work_full = 1;
        return 0;
    }
    out->work = 1;
    PV_STORE32(hv, PV_HV_VP(vp, taken) + 4u * PV_HV_SINT_VMBUS, offered, PV_RELAXED, "hv.taken");
    /* SYNC(syn_taken): TAKEN before the slot is free (the exchange is locked); an heir of the host looks at them the other way. */
    PV_CAS32(freed, hv, slot, type, 0, "hv.slot.free");
    (void)freed; /* somebody else has freed it: what stands there now is another message */
    /* SYNC(syn_slot): the slot is free before we look at the pending flag; the host sets the flag before it looks at the slot. */
    PV_SMP_MB_AFTER_RMW(hv, "syn_slot");
    PV_LOAD32(meta, hv, PV_HV_SLOT(PV_HV_FRAME(simp), PV_HV_SINT_VMBUS, meta), PV_RELAXED, "hv.slot.pending");
    PV_COUNT64(hv, PV_HV_VP(vp, messages), 1);
    if (meta & PV_HV_META_PENDING) {
        PV_LOAD64(eom, hv, PV_HV_VP(vp, eom), PV_RELAXED, "hv.eom");
        PV_STORE64(hv, PV_HV_VP(vp, eom), eom + 1, PV_RELEASE, "hv.eom");
        PV_COUNT64(hv, PV_HV_VP(vp, eoms), 1);
        out->eom = 1;
    }
    return 1;
}

/* ---- the event tasklet */

/* The channels of one word of flags; relid 0 is nobody's. */
static void note_channels(uint32_t first, uint64_t bits, pv_hv_effects *out)
{
    for (; bits != 0; bits &= bits - 1)
        if (first + (uint32_t)__builtin_ctzll(bits) != 0)
            out->channels[out->channel_count++] = first + (uint32_t)__builtin_ctzll(bits);
}

/* From 2.4 on: the flags of this CPU are the channels' relids; flag 0 is nobody's. */
static int64_t take_flags(MemoryObject *hv, uint32_t vp, pv_hv_effects *out)
{
    uint64_t siefp, bits;
    PV_LOAD64(siefp, hv, PV_HV_VP(vp, siefp), PV_RELAXED, "hv.siefp");
    if (!PV_HV_ENABLED(siefp) || PV_HV_FRAME(siefp) >= PV_HV_FRAMES)
        return 0;
    for (uint32_t flag = 0; flag < PV_HV_FLAGS; flag += 64) {
        size_t at = PV_HV_FLAG_WORD(PV_HV_FRAME(siefp), PV_HV_SINT_VMBUS, flag);
        if (out->channel_count + 64 > PV_HV_CHANNELS_A_RUN) {
            out->channels_left = 1;
            return 0;
        }
        PV_LOAD64(bits, hv, at, PV_RELAXED, "hv.flags.look");
        if (bits == 0)
            continue;
        PV_XCHG64(bits, hv, at, 0, "hv.flags.take");
        note_channels(flag, bits, out);
    }
    return 0;
}

/* Below 2.4: flag 0 stands for all; which channels is in the host's half of the interrupt page, 256 of them (X14). */
static int64_t take_interrupt_page(MemoryObject *hv, pv_hv_effects *out)
{
    uint64_t bits;
    for (uint32_t relid = 0; relid < PV_HV_RELIDS_2012; relid += 64) {
        size_t at = PV_HV_AT(PV_HV_FRAME_INTERRUPT) + relid / 8u;
        PV_LOAD64(bits, hv, at, PV_RELAXED, "hv.interrupt.look");
        if (bits == 0)
            continue;
        PV_XCHG64(bits, hv, at, 0, "hv.interrupt.take");
        note_channels(relid, bits, out);
    }
    return 0;
}

/* ---- the interrupt */

/*
 * vmbus_isr: which tasklets it schedules.  Events before messages, the order that the host expects.  Below 2.4 one flag is
 * tested and cleared; from there on the tasklet takes the flags, and the ISR only looks whether there are any.
 */
static int64_t isr(MemoryObject *hv, uint32_t vp, int flags_are_relids)
{
    uint64_t siefp, simp, bits, old;
    uint32_t type, scheduled = 0;
    PV_LOAD64(siefp, hv, PV_HV_VP(vp, siefp), PV_RELAXED, "hv.siefp");
    if (PV_HV_ENABLED(siefp) && PV_HV_FRAME(siefp) < PV_HV_FRAMES) {
        for (uint32_t flag = 0; flag < (flags_are_relids ? PV_HV_FLAGS : 1u) && scheduled == 0; flag += 64) {
            size_t at = PV_HV_FLAG_WORD(PV_HV_FRAME(siefp), PV_HV_SINT_VMBUS, flag);
            PV_LOAD64(bits, hv, at, PV_RELAXED, "hv.isr.flags");
            if (!flags_are_relids && bits & 1) {
                PV_AND64(old, hv, at, ~1ull, "hv.isr.flag0");
                (void)old;
            }
            if (flags_are_relids ? bits != 0 : (bits & 1) != 0)
                scheduled |= PV_HV_TASKLET_EVENT;
        }
    }
    PV_LOAD64(simp, hv, PV_HV_VP(vp, simp), PV_RELAXED, "hv.simp");
    if (PV_HV_ENABLED(simp) && PV_HV_FRAME(simp) < PV_HV_FRAMES) {
        PV_LOAD32(type, hv, PV_HV_SLOT(PV_HV_FRAME(simp), PV_HV_SINT_VMBUS, type), PV_ACQUIRE, "hv.isr.type");
        if (type != 0)
            scheduled |= PV_HV_TASKLET_MESSAGE;
    }
    return scheduled;
}

/* Take the requested vectors; 1 when vmbus's was among them. */
static int64_t take_vectors(MemoryObject *hv, uint32_t vp, uint32_t vector)
{
    uint64_t bits, mine = 0;
    for (uint32_t word = 0; word < 4; word++) {
        PV_LOAD64(bits, hv, PV_HV_VP(vp, irr) + 8u * word, PV_RELAXED, "hv.irr.look");
        if (bits == 0)
            continue;
        /* SYNC(syn_irr): the request is taken before we look at flags and slot; the host sets those before it requests. */
        PV_XCHG64(bits, hv, PV_HV_VP(vp, irr) + 8u * word, 0, "syn_irr");
        if (vector / 64 == word)
            mine = bits >> (vector % 64) & 1;
    }
    return (int64_t)mine;
}

/*
 * Schedule: idempotent while it is scheduled (X19).  Each CPU has its own pair; the driver of 2012 had one for all (H10, zoo 4): a
 * second CPU's schedule is then a no-op, and its message waits until the next interrupt there.
 */
static int64_t schedule(MemoryObject *machine, MemoryObject *hv, uint32_t vp, uint32_t tasklets, uint32_t wanted)
{
    uint32_t variants, old = tasklets;
    PV_LOAD32(variants, machine, offsetof(struct pv_machine_header, variants), PV_RELAXED, "variants");
    if (variants & PV_VARIANT_ONE_TASKLET_PAIR)
        PV_OR32(old, hv, PV_HV_HEADER(global_tasklets), wanted, "hv.tasklets.global");
    if (old & wanted)
        PV_COUNT64(hv, PV_HV_VP(vp, coalesced), 1);
    tasklets |= wanted & ~old;
    PV_STORE32(hv, PV_HV_VP(vp, tasklets), tasklets, PV_RELAXED, "hv.tasklets");
    return tasklets;
}

/* The tasklets of this CPU that are scheduled; which of them stay so, for what is left. */
static int64_t run_tasklets(MemoryObject *machine, MemoryObject *hv, uint32_t vp, uint32_t tasklets, uint32_t flags_are_relids,
                            pv_hv_effects *out)
{
    uint32_t variants;
    uint32_t old, taken = 0, left = 0;
    int64_t r = 1;
    PV_AND32(old, hv, PV_HV_HEADER(global_tasklets), ~tasklets, "hv.tasklets.global");
    (void)old;
    if (tasklets & PV_HV_TASKLET_EVENT) {
        PV_TRY(r, flags_are_relids ? take_flags(hv, vp, out) : take_interrupt_page(hv, out));
        PV_COUNT64(hv, PV_HV_VP(vp, events), out->channel_count);
        left |= out->channels_left ? PV_HV_TASKLET_EVENT : 0u;
    }
    if (tasklets & PV_HV_TASKLET_MESSAGE) {
        PV_LOAD32(variants, machine, offsetof(struct pv_machine_header, variants), PV_RELAXED, "variants");
        for (r = 1; r && taken < MESSAGES_A_RUN; taken++)
            PV_TRY(r, take_message(hv, vp, variants & PV_VARIANT_WORK_ALLOCATION_RETRIES ? WORK_RETRIES : 0, out));
        left |= out->work_full || r ? PV_HV_TASKLET_MESSAGE : 0u;
    }
    PV_STORE32(hv, PV_HV_VP(vp, tasklets), left, PV_RELAXED, "hv.tasklets");
    return left;
}

/* Take interrupts and run tasklets of one virtual CPU; what is to be signalled is in *out.  1 when something was done. */
int64_t pv_hv_run(MemoryObject *machine, MemoryObject *hv, uint32_t vp, pv_hv_effects *out)
{
    uint32_t vector, tasklets, flags_are_relids;
    int64_t requested, wanted, now, left;
    PV_LOAD32(vector, hv, PV_HV_VP(vp, vector), PV_RELAXED, "hv.vector");
    PV_LOAD32(tasklets, hv, PV_HV_VP(vp, tasklets), PV_RELAXED, "hv.tasklets");
    PV_TRY(requested, take_vectors(hv, vp, vector & 0xffu));
    if (!requested && tasklets == 0)
        return 0;
    PV_LOAD32(flags_are_relids, hv, PV_HV_HEADER(flags_are_relids), PV_RELAXED, "hv.signalling");
    now = tasklets;
    if (requested && vector != 0) { /* B6.9: the handler is live before SynIC is; then it finds nothing */
        PV_COUNT64(hv, PV_HV_VP(vp, irqs), 1);
        PV_TRY(wanted, isr(hv, vp, flags_are_relids != 0));
        if (wanted == 0)
            PV_COUNT64(hv, PV_HV_VP(vp, irq_none), 1); /* B5.4 */
        else
            PV_TRY(now, schedule(machine, hv, vp, tasklets, (uint32_t)wanted));
    }
    left = 0;
    if (now != 0)
        PV_TRY(left, run_tasklets(machine, hv, vp, (uint32_t)now, flags_are_relids, out));
    return requested || left != now;
}

/* After the announcement of sleep, see SYNC(cpu_sleep). */
int64_t pv_hv_is_idle(MemoryObject *hv, uint32_t vp)
{
    uint64_t bits;
    uint32_t tasklets;
    for (uint32_t word = 0; word < 4; word++) {
        PV_LOAD64(bits, hv, PV_HV_VP(vp, irr) + 8u * word, PV_RELAXED, "hv.irr.look");
        if (bits != 0)
            return 0;
    }
    PV_LOAD32(tasklets, hv, PV_HV_VP(vp, tasklets), PV_RELAXED, "hv.tasklets");
    return tasklets & PV_HV_TASKLET_EVENT ? 0 : tasklets & PV_HV_TASKLET_MESSAGE ? 2 : 1;
}
