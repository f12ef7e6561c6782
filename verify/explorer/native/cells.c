/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Cells: the locations of memory, and the doorbells, locks and mailboxes, which lie below zero.
 *
 * A location that only one context has ever touched, or that none has ever written, is no scheduling point.  That is not
 * declared but found out: when a location turns out to be shared, `grown` says that the search begins anew, knowing it.
 */
#include "engine.h"

#define INDEX_SIZE_FIRST 4096u

static uint32_t slot_of(uint64_t key, uint32_t size) { return (uint32_t)pv_mix(0x5bd1e995u, key) & (size - 1); }

static int rehash(Engine *e, uint32_t size)
{
    int32_t *index = malloc(size * sizeof *index);
    if (index == NULL)
        return -1;
    memset(index, 0xff, size * sizeof *index);
    for (uint32_t i = 0; i < e->cell_count; i++) {
        uint32_t at = slot_of(e->cells[i].key, size);
        while (index[at] >= 0)
            at = (at + 1) & (size - 1);
        index[at] = (int32_t)i;
    }
    free(e->index);
    e->index = index;
    e->index_size = size;
    return 0;
}

static int grow_cells(Engine *e)
{
    uint32_t room = e->cell_room ? 2 * e->cell_room : 1024;
    cell_t *cells = realloc(e->cells, room * sizeof *cells);
    if (cells == NULL)
        return -1;
    e->cells = cells;
    for (int i = 0; i < CONTEXTS_MAX; i++) {
        uint32_t *coherent = realloc(e->contexts[i].coherent, room * sizeof *coherent);
        if (coherent == NULL)
            return -1;
        memset(coherent + e->cell_room, 0, (room - e->cell_room) * sizeof *coherent);
        e->contexts[i].coherent = coherent;
    }
    e->cell_room = room;
    return 0;
}

/* The cell of a key, made if need be; -1 without memory. */
int32_t pv_cell(Engine *e, uint64_t key)
{
    if (e->index == NULL && rehash(e, INDEX_SIZE_FIRST) < 0)
        goto no_memory;
    uint32_t at = slot_of(key, e->index_size);
    for (; e->index[at] >= 0; at = (at + 1) & (e->index_size - 1))
        if (e->cells[e->index[at]].key == key)
            return e->index[at];
    if (e->cell_count == e->cell_room && grow_cells(e) < 0)
        goto no_memory;
    e->cells[e->cell_count] = (cell_t){.key = key, .heap = -1};
    if ((int64_t)key >= 0)
        e->cells[e->cell_count].heap = e->memories[key >> 40].heap;
    e->index[at] = (int32_t)e->cell_count++;
    if (2 * e->cell_count > e->index_size && rehash(e, 2 * e->index_size) < 0)
        goto no_memory;
    return (int32_t)e->cell_count - 1;
no_memory:
    PyErr_NoMemory();
    return -1;
}

/* The cell of a doorbell, lock or mailbox by its number, which is negative; -1 and an error. */
int32_t pv_bell_cell(Engine *e, long long bell)
{
    if (bell >= 0 || -bell > (long long)e->bells) {
        PyErr_Format(PyExc_ValueError, "no doorbell, lock or mailbox %lld", bell);
        return -1;
    }
    return e->bell_cells[-bell - 1];
}

static int remember(Engine *e, int32_t cell)
{
    if (e->shared_count == e->shared_room) {
        uint32_t room = e->shared_room ? 2 * e->shared_room : 64;
        int32_t *shared = realloc(e->shared, room * sizeof *shared);
        if (shared == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        e->shared = shared;
        e->shared_room = room;
    }
    e->cells[cell].place = e->shared_count < PLACES ? e->shared_count : PLACES - 1;
    e->shared[e->shared_count++] = cell;
    return 0;
}

int pv_share(Engine *e, int32_t cell)
{
    if (e->cells[cell].shared)
        return 0;
    e->cells[cell].shared = true;
    e->grown = true;
    return remember(e, cell) < 0 ? -1 : pv_set(e, cell, e->cells[cell].value);
}

/* Two accesses of different width to the same eight bytes are a mixed-size race, which no model here covers. */
int pv_check_width(Engine *e, uint64_t key)
{
    if (2 * e->width_count >= e->width_size) {
        uint32_t size = e->width_size ? 2 * e->width_size : 1024;
        uint64_t *widths = calloc(size, sizeof *widths), *old = e->widths;
        if (widths == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        for (uint32_t i = 0; i < e->width_size; i++) {
            if (old[i] == 0)
                continue;
            uint32_t at = slot_of(old[i] >> 7, size);
            while (widths[at] != 0)
                at = (at + 1) & (size - 1);
            widths[at] = old[i];
        }
        free(old);
        e->widths = widths;
        e->width_size = size;
    }
    uint64_t granule = key >> 7; /* offset / 8, above the width's four bits and the three that the division loses */
    uint32_t at = slot_of(granule, e->width_size);
    for (; e->widths[at] != 0; at = (at + 1) & (e->width_size - 1)) {
        if (e->widths[at] >> 7 != granule)
            continue;
        if ((e->widths[at] & 15) == (key & 15))
            return 0;
        PyErr_Format(pv_width_error, "%d and %d bytes wide, around offset 0x%llx of %s", (int)(e->widths[at] & 15), (int)(key & 15),
                     (unsigned long long)(key >> 4 & 0xFFFFFFFFF), e->memories[key >> 40].name);
        return -1;
    }
    e->widths[at] = granule << 7 | 64 | (key & 15); /* 64: not empty, whatever the granule */
    e->width_count++;
    return 0;
}

/*
 * Note an access; the location becomes shared once two contexts touch it and one of them writes.  So does one at which a context
 * goes round and round: it may wait there for somebody who has not come by yet.
 */
int pv_note(Engine *e, context_t *c, int32_t cell, bool writes)
{
    cell_t *at = &e->cells[cell];
    uint32_t bit = 1u << pv_number(e, c);
    if ((at->touched & bit) && (!writes || at->written))
        return ++e->unseen > UNSEEN_MAX ? pv_share(e, cell) : 0;
    if (at->touched == 0 && pv_check_width(e, at->key) < 0)
        return -1;
    at->touched |= bit;
    at->written |= writes;
    if (((at->touched & (at->touched - 1)) && at->written) || at->heap >= 0)
        return pv_share(e, cell);
    return 0;
}

/* Let a value be the newest of a cell. */
int pv_set(Engine *e, int32_t cell, uint64_t value)
{
    cell_t *at = &e->cells[cell];
    if (at->value != value)
        e->version++;
    at->value = value;
    if (e->model != ARM || (int64_t)at->key < 0)
        return 0;
    if (at->messages == at->room) {
        uint32_t room = at->room ? 2 * at->room : 8;
        message_t *history = realloc(at->history, room * sizeof *history);
        if (history == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        at->history = history;
        at->room = room;
    }
    int32_t event = (int32_t)e->depth - 1;
    at->history[at->messages++] = (message_t){value, e->now, event, event < 0 ? 0 : e->taken[event].agent};
    return 0;
}

uint32_t pv_attach(void *engine, const void *memory)
{
    Engine *e = engine;
    if (e->memory_count == MEMORIES_MAX)
        e->memory_count--; /* pv_access refuses the last number */
    memory_t *m = &e->memories[e->memory_count];
    m->object = memory;
    m->heap = -1;
    PyOS_snprintf(m->name, sizeof m->name, "memory%u", (unsigned)e->memory_count);
    return e->memory_count++;
}

/* Begin an execution: everything as preparation left it. */
int pv_reset(Engine *e)
{
    e->now = e->depth = 0;
    for (uint32_t i = 0; i < e->cell_count; i++) {
        cell_t *at = &e->cells[i];
        at->value = at->initial;
        at->messages = 0;
        if (at->view.of)
            memset(&at->view, 0, sizeof at->view);
        if (e->model == ARM && at->shared && pv_set(e, (int32_t)i, at->initial) < 0)
            return -1;
    }
    for (uint32_t i = 0; i < e->bells; i++) {
        for (uint32_t k = 0; k < e->boxes[i].count; k++)
            Py_CLEAR(e->boxes[i].items[k]);
        e->boxes[i].count = 0;
    }
    e->relation->grown = false;
    e->version = 0;
    e->ticked = e->dead = e->deaths = e->preempted = e->alone = 0;
    e->depth = e->change_next = 0;
    e->last_agent = -1;
    e->grown = e->over = e->broken = e->cut = false;
    e->outcome = RUNNING;
    return 0;
}
