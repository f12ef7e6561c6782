/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The baton gate, a debug switch (-DPVBUS_GATED, pvbus.shm._core_gated): real processes follow a trace of the explorer.
 *
 * A file that all of them map holds the steps of the trace: who makes which access, in one order.  A process that is about to
 * make the next step of its own waits until it is that step's turn; whatever is no step of the trace passes freely.  Behind
 * the last step all are free.  verify/bridge.py writes the file, and is the only one that changes its state.
 */
#ifndef PVBUS_GATE_H
#define PVBUS_GATE_H

#include <stddef.h>
#include <stdint.h>

#define PV_GATE_CONTEXTS_MAX 8
#define PV_GATE_NAME_BYTES 32
#define PV_GATE_SITE_BYTES 40
#define PV_GATE_WAIT_NS_MAX 20000000000ull /* a turn that does not come in twenty seconds never will: everybody is let go */
#define PV_GATE_LOOK_NS 50000000           /* between two looks, if the wake-up was for somebody else */

enum pv_gate_state { PV_GATE_OFF, PV_GATE_HELD, PV_GATE_PLAYING, PV_GATE_OVER };

struct pv_gate_step {
    uint32_t context;
    uint32_t spare;
    uint64_t size;   /* of the memory: which one it is; 0 for a doorbell */
    uint64_t offset;
    char site[PV_GATE_SITE_BYTES];
};

struct pv_gate {
    uint32_t state;
    uint32_t turn;     /* the step that may be made now */
    uint32_t steps;
    uint32_t schedule; /* counts the traces that were written: a new one begins at its first step */
    uint32_t changed;  /* what the waiting sleep on */
    uint32_t contexts;
    uint32_t spare[10];
    char names[PV_GATE_CONTEXTS_MAX][PV_GATE_NAME_BYTES];
    struct pv_gate_step step[];
};

/* Give the step that the caller is about to make, when its turn has come; -1 for an access that is none. */
int64_t pv_gate_enter(size_t size, size_t offset, const char *site);
/* The step is done: the next one's turn. */
void pv_gate_leave(int64_t step);

#endif /* PVBUS_GATE_H */
