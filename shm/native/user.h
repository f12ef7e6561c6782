/* SPDX-License-Identifier: Apache-2.0 */
/* What the user's side shares between its files: the Context of one process, and the driver's calls on it. */
#ifndef PVBUS_USER_H
#define PVBUS_USER_H

#include "core.h"
#include "spin.h"

typedef struct {
    PyObject_HEAD
    MemoryObject *page, *ring, *public_page;
    int door, kick;
    uint32_t tail, head, rung, ports_max, fork_generation;
    uint32_t core;      /* what the ring says of us */
    pv_spinner spinner;
    int inflight;       /* calls under way: the last one to leave finishes a close, if one waits */
    int closing;
    PyObject *on_idle, *on_fork;
} ContextObject;

extern PyTypeObject *pv_context_type;
extern uint32_t pv_fork_generation;
int pv_context_init(PyObject *module);

/* user_path.c: each gives its value, -errno, or PV_DEAD with the Python error set. */
int64_t pv_file_read(ContextObject *c, uint32_t *out, uint32_t max);
int64_t pv_file_poll(ContextObject *c, unsigned events, int64_t timeout_ms);
int64_t pv_file_enable(ContextObject *c, const uint32_t *ports, size_t n);
int64_t pv_file_notify(ContextObject *c, const uint32_t *ports, size_t n);
int64_t pv_file_drain_door(ContextObject *c);

#endif /* PVBUS_USER_H */
