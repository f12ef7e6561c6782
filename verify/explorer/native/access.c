/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The call-outs of pvbus.shm._core_explored: loads, stores, locked operations, barriers.
 *
 * sc    each access happens where it stands.
 * tso   a FIFO store buffer for each context; the flush of its oldest store is an event of its own.  Loads forward from the
 *       own buffer; locked operations and full barriers wait until it is empty.
 * arm   see weak.c.
 *
 * Without a running context (preparation, judgement) an access happens at once.
 */
#include "engine.h"

#define ENTER(e) \
    do { if ((e)->over) { PyErr_SetNone(pv_context_died); return -1; } } while (0)

static int32_t locate(Engine *e, uint32_t memory, uint64_t off, int width)
{
    if (memory >= MEMORIES_MAX - 1) {
        PyErr_Format(pv_limit_error, "more than %d memories", MEMORIES_MAX - 1);
        return -1;
    }
    return pv_cell(e, (uint64_t)memory << 40 | off << 4 | (uint64_t)width);
}

/* Is a barrier or an order left out, everywhere or in this context? */
bool pv_is_dropped(Engine *e, const char *site, const context_t *c)
{
    size_t length = strlen(site);
    bool found = false;
    for (uint32_t i = 0; i < e->dropped_count; i++) {
        const char *d = e->dropped[i];
        if (strncmp(d, site, length) == 0 && (d[length] == 0 || (d[length] == '@' && strcmp(d + length + 1, c->name) == 0)))
            found = e->dropped_seen[i] = true;
    }
    return found;
}

int pv_check_heap(Engine *e, context_t *c, int32_t cell, const char *site)
{
    int32_t heap = e->cells[cell].heap;
    if (heap < 0 || e->cells[heap].value)
        return 0;
    char where[2 * NAME_MAX_BYTES];
    pv_observe(c, (uint64_t)-1); /* it has seen an exception */
    pv_where(e, cell, where, sizeof where);
    PyErr_Format(pv_use_after_free, "%s accesses %s (%s), which is not allocated", c->name, where, site);
    return -1;
}

/* A scheduling point at a shared location, with everything that may be wrong there. */
static int point(Engine *e, context_t *c, enum kind kind, int32_t cell, const char *site)
{
    if (pv_stop(e, c, kind, cell, site, 1) < 0)
        return -1;
    return pv_check_heap(e, c, cell, site);
}

static int m_load(void *engine, uint32_t memory, uint64_t off, int width, int order, const char *site, uint64_t *out)
{
    Engine *e = engine;
    ENTER(e);
    int32_t cell = locate(e, memory, off, width);
    context_t *c = e->running;
    if (cell < 0)
        return -1;
    if (c == NULL || !e->cells[cell].shared) {
        *out = e->cells[cell].value;
        return c == NULL ? 0 : pv_note(e, c, cell, false);
    }
    if (point(e, c, LOAD, cell, site) < 0)
        return -1;
    bool acquire = order == ACQUIRE && !(e->dropped_count && pv_is_dropped(e, site, c)), latest = true;
    const store_t *own = pv_own_store(c, cell);
    *out = own != NULL ? own->value : e->model == ARM ? pv_read(e, c, acquire, &latest) : e->cells[cell].value;
    pv_observe(c, *out);
    if (e->trace != NULL)
        pv_trace(e, c, "%s %W = 0x%llx%s", site, cell, (unsigned long long)*out,
                 own != NULL || *out == e->cells[cell].value ? "" : " (stale)");
    return 0;
}

int pv_push(Engine *e, context_t *c, int32_t cell, uint64_t value, enum order order, const char *site)
{
    if (c->buffered == BUFFER_MAX) {
        PyErr_Format(pv_limit_error, "%s: more than %d stores wait in the buffer of %s", site, BUFFER_MAX, c->name);
        return -1;
    }
    c->buffer[c->buffered++] = (store_t){
        .cell = cell, .value = value, .site = e->trace != NULL ? pv_keep_site(e, site) : "",
        .epoch = c->epoch, .release = order == RELEASE, .pushed_at = (int32_t)e->depth - 1, .number = c->stores++,
        .lane = pv_lanes(e) ? pv_lane(e, c, cell) : 0,
    };
    c->unfenced = true;
    return 0;
}

static int m_store(void *engine, uint32_t memory, uint64_t off, int width, uint64_t value, int order, const char *site)
{
    Engine *e = engine;
    ENTER(e);
    int32_t cell = locate(e, memory, off, width);
    context_t *c = e->running;
    if (cell < 0)
        return -1;
    if (c == NULL || !e->cells[cell].shared) {
        if (c != NULL && pv_note(e, c, cell, true) < 0)
            return -1;
        e->cells[cell].value = value;
        return 0;
    }
    if (e->model == SC || e->cells[cell].heap >= 0) {
        if (point(e, c, STORE, cell, site) < 0)
            return -1;
        pv_observe(c, PASSED);
    }
    if (e->trace != NULL)
        pv_trace(e, c, "%s %W %s 0x%llx", site, cell, e->model == SC ? ":=" : "<-", (unsigned long long)value);
    if (e->model == SC)
        return pv_set(e, cell, value);
    if (order == RELEASE && e->dropped_count && pv_is_dropped(e, site, c))
        order = RELAXED;
    return pv_push(e, c, cell, value, order, site);
}

/* A locked operation at a location that nobody else sees: only the buffer has to be empty, and on arm not even that. */
static int locked_alone(Engine *e, context_t *c, int32_t cell, const char *site)
{
    if (e->model == TSO && c->unfenced) {
        if (pv_stop(e, c, FENCE, -1, site, 1) < 0)
            return -1;
        pv_observe(c, PASSED);
        c->unfenced = false;
    }
    return pv_note(e, c, cell, true);
}

static int m_rmw(void *engine, uint32_t memory, uint64_t off, int width, int op, uint64_t value, const char *site, uint64_t *old)
{
    Engine *e = engine;
    ENTER(e);
    int32_t cell = locate(e, memory, off, width);
    context_t *c = e->running;
    if (cell < 0)
        return -1;
    bool shared = e->cells[cell].shared;
    if (c != NULL && (shared ? point(e, c, RMW, cell, site) : locked_alone(e, c, cell, site)) < 0)
        return -1;
    uint64_t was = e->cells[cell].value;
    uint64_t now = op == 0 ? was | value : op == 1 ? was & value : op == 2 ? value : was + value;
    if (width < 8)
        now &= ((uint64_t)1 << 8 * width) - 1;
    *old = was;
    if (c == NULL || !shared) {
        e->cells[cell].value = now;
        return 0;
    }
    pv_observe(c, was);
    pv_read_latest(e, c, cell, true);
    pv_own(e, c, cell);
    if (e->trace != NULL)
        pv_trace(e, c, "%s %W 0x%llx => 0x%llx", site, cell, (unsigned long long)was, (unsigned long long)now);
    return pv_set(e, cell, now);
}

/* One that fails is a load: on arm it may have read an older store, and it does not wait for the buffer. */
static int m_cas(void *engine, uint32_t memory, uint64_t off, int width, uint64_t expected, uint64_t desired, const char *site,
                 uint64_t *old)
{
    Engine *e = engine;
    ENTER(e);
    int32_t cell = locate(e, memory, off, width);
    context_t *c = e->running;
    if (cell < 0)
        return -1;
    bool shared = e->cells[cell].shared;
    if (c != NULL && shared)
        c->op.expected = expected;
    if (c != NULL && (shared ? point(e, c, CAS, cell, site) : locked_alone(e, c, cell, site)) < 0)
        return -1;
    bool latest = true;
    const store_t *own = c != NULL && shared && e->model == ARM ? pv_own_store(c, cell) : NULL;
    *old = own != NULL ? own->value : e->cells[cell].value;
    if (c == NULL || !shared) {
        if (*old == expected)
            e->cells[cell].value = desired;
        return 0;
    }
    if (own == NULL && e->model == ARM)
        *old = pv_read(e, c, true, &latest);
    pv_observe(c, *old);
    bool done = *old == expected && latest;
    if (e->trace != NULL)
        pv_trace(e, c, "%s %W 0x%llx => 0x%llx", site, cell, (unsigned long long)*old, (unsigned long long)(done ? desired : *old));
    if (!done)
        return 0;
    pv_own(e, c, cell);
    return pv_set(e, cell, desired);
}

static int m_fence(void *engine, int kind, const char *site)
{
    Engine *e = engine;
    ENTER(e);
    context_t *c = e->running;
    if (c == NULL || (e->dropped_count && pv_is_dropped(e, site, c)))
        return 0;
    if (kind == MB && c->unfenced) { /* a point whether or not the buffer is empty by now: a step is one in every order */
        if (pv_stop(e, c, FENCE, -1, site, 1) < 0)
            return -1;
        pv_observe(c, PASSED);
        c->unfenced = false;
    }
    if (kind == MB)
        pv_full_barrier(e, c);
    else if (kind == RMB)
        pv_load_barrier(c);
    else
        c->epoch++;
    if (e->trace != NULL)
        pv_trace(e, c, "-- %s %s", kind == MB ? "mb" : kind == RMB ? "rmb" : "wmb", site);
    return 0;
}

/*
 * A turn of a spin loop: whoever has seen nothing new since the last turn waits for a change.  A turn takes its time, so what
 * was visible before it is seen behind it; a loop that reads an old value for ever would be no news.
 */
static int m_spin(void *engine, const char *site)
{
    Engine *e = engine;
    ENTER(e);
    context_t *c = e->running;
    if (c == NULL) {
        PyErr_Format(PyExc_RuntimeError, "%s: spinning with nobody else to run", site);
        return -1;
    }
    if (pv_stop(e, c, SPIN, -1, site, 1) < 0)
        return -1;
    pv_observe(c, PASSED);
    if (e->model == ARM) {
        c->floor.when = e->now;
        c->floor.of = ~(places_t)0;
    }
    c->mark = e->version;
    c->marked = true;
    return 0;
}

const struct pv_model_api pv_access_table = {
    .attach = pv_attach, .load = m_load, .store = m_store, .rmw = m_rmw, .cas = m_cas, .fence = m_fence, .spin = m_spin,
};
