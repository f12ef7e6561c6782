/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What store buffers and views allow.
 *
 * arm   Multi-copy atomic: a store becomes visible to everybody at one moment.  Until then it waits in its context's buffer,
 *       which keeps the order of stores to one location, of those on both sides of a wmb or mb, and lets a release store wait
 *       for all before it; nothing else.  A load may be satisfied early: it reads any store of its location that had become
 *       visible at some time between `floor`, or the last access of this context to the location (coherence), and now.  An
 *       acquire load, and an rmb for all loads before it, raise the floor to the time of what was read; a full barrier waits
 *       for the own buffer, too, and raises the floor to the own last store.  Address, data and control dependencies order
 *       no loads (hardware keeps the first two: the model allows more).  A load never sees a store that comes after it in
 *       the order of any context's program (load buffering): not covered.  A load that reads its context's own store is the
 *       same before and behind the flush: it orders nothing, as if it had been forwarded from the buffer.  A locked operation
 *       takes the newest value, waits for the stores before it, is an acquire, and no full barrier for what comes after: loads
 *       behind it may have been done before its store.  Stores behind it may not: hardware lets them pass a locked store, the
 *       model does not cover it.
 */
#include "engine.h"

static uint32_t max32(uint32_t a, uint32_t b) { return a > b ? a : b; }

static void raise_view(view_t *view, const view_t *to)
{
    view->when = max32(view->when, to->when);
    view->of |= to->of;
    for (int i = 0; i < AGENTS_MAX; i++) /* a fixed number is faster than the right one */
        view->clock[i] = view->clock[i] > to->clock[i] ? view->clock[i] : to->clock[i];
}

/* The view of a store that has become visible in an event, -1 = before the first. */
static view_t view_of(const Engine *e, int32_t cell, uint32_t when, int32_t event)
{
    view_t view = {.when = when, .of = pv_place(e, cell)};
    if (event >= 0 && e->reducing)
        memcpy(view.clock, e->events[event].clock, sizeof view.clock);
    return view;
}

const store_t *pv_own_store(const context_t *c, int32_t cell)
{
    for (uint32_t i = c->buffered; i-- > 0;)
        if (c->buffer[i].cell == cell)
            return &c->buffer[i];
    return NULL;
}

/* Is there an older store with the same value that could be read instead?  Whatever follows this one may follow that one. */
static bool outdone(const cell_t *at, uint32_t i, uint32_t oldest)
{
    for (uint32_t k = oldest; k < i; k++)
        if (at->history[k].value == at->history[i].value)
            return true;
    return false;
}

/*
 * Could the load have come before the newest store became visible, for all that its context has gone through since?  Then an
 * older one need not be read here: the reduction tries that order, too, and it leads to the same state.
 */
static bool could_have_come_before(const Engine *e, const context_t *c, const message_t *newest)
{
    if (!e->reducing || newest->event < 0)
        return false;
    return c->last < 0 || e->events[c->last].clock[e->events[newest->event].agent] <= newest->event;
}

/* The cells whose part in a floor happened neither before nor after an event with this clock, whatever the order of steps. */
static places_t concurrent(const Engine *e, const view_t *floor, const uint16_t *clock)
{
    places_t found = 0, none = 0;
    if (floor->of == ~none)
        return floor->of;
    for (uint32_t k = 0; k < e->shared_count; k++) {
        const cell_t *at = &e->cells[e->shared[k]];
        if (!(floor->of >> at->place & 1))
            continue;
        for (uint32_t i = at->messages; i-- > 0 && at->history[i].event >= 0;) { /* the newest that the floor knows */
            const message_t *m = &at->history[i];
            int agent = e->events[m->event].agent;
            if (floor->clock[agent] <= m->event)
                continue;
            if (clock[agent] <= m->event)
                found |= (places_t)1 << at->place;
            break;
        }
    }
    return found;
}

/*
 * The time of a store is compared with a floor.  Unless every order of steps gives the same answer, the order between stores
 * to this cell and to those of the floor matters from now on.
 */
static void compare(const Engine *e, int32_t cell, const message_t *message, const view_t *floor)
{
    relation_t *relation = e->relation;
    places_t *known = &relation->with[e->cells[cell].place];
    if (!e->reducing || message->event < 0 || (*known | floor->of) == *known)
        return;
    if (floor->clock[e->events[message->event].agent] > message->event)
        return;
    places_t found = concurrent(e, floor, e->events[message->event].clock) & ~pv_place(e, cell);
    if ((*known | found) == *known)
        return;
    *known |= found;
    relation->grown = true;
}

/*
 * arm: how many stores the load, or compare-exchange, that a context is about to do may read; the newest is way 0.  `which`
 * is that of `way`.  A compare-exchange that finds what it expects needs the newest, and its buffer empty.
 */
uint32_t pv_readable(const Engine *e, const context_t *c, uint32_t way, uint32_t *which)
{
    const cell_t *at = &e->cells[c->op.cell];
    uint32_t count = 0, oldest = at->messages - 1;
    bool look = !could_have_come_before(e, c, &at->history[oldest]);
    while (look && oldest > 0 && at->history[oldest].when > c->coherent[c->op.cell]) {
        compare(e, c->op.cell, &at->history[oldest], &c->floor);
        if (at->history[oldest].when <= c->floor.when)
            break;
        oldest--;
    }
    for (uint32_t i = at->messages; i-- > oldest;) {
        bool takes = c->op.kind == CAS && at->history[i].value == c->op.expected;
        if (takes ? i + 1 < at->messages || c->buffered : outdone(at, i, oldest))
            continue;
        if (count == way && which != NULL)
            *which = i;
        count++;
    }
    return count;
}

static void see(Engine *e, context_t *c, int32_t cell, const message_t *message, bool acquire)
{
    c->coherent[cell] = max32(c->coherent[cell], message->when);
    if (c->op.kind == LOAD && message->event >= 0 && message->agent == CONTEXTS_MAX + pv_number(e, c))
        return; /* its own store: the same as if it had been forwarded from the buffer */
    view_t view = view_of(e, cell, message->when, message->event);
    raise_view(&c->latest, &view);
    if (acquire)
        raise_view(&c->floor, &view);
}

uint64_t pv_read(Engine *e, context_t *c, bool acquire, bool *latest)
{
    const cell_t *at = &e->cells[c->op.cell];
    uint32_t which = at->messages - 1;
    pv_readable(e, c, e->way, &which);
    *latest = which + 1 == at->messages;
    see(e, c, c->op.cell, &at->history[which], acquire);
    return at->history[which].value;
}

void pv_read_latest(Engine *e, context_t *c, int32_t cell, bool acquire)
{
    if (e->model == ARM)
        see(e, c, cell, &e->cells[cell].history[e->cells[cell].messages - 1], acquire);
}

/* A context's last store becomes visible, in the event that is under way. */
void pv_own(Engine *e, context_t *c, int32_t cell)
{
    e->now++;
    if (e->model != ARM)
        return;
    view_t view = view_of(e, cell, e->now, (int32_t)e->depth - 1);
    c->coherent[cell] = e->now;
    raise_view(&c->own, &view);
}

void pv_load_barrier(context_t *c) { raise_view(&c->floor, &c->latest); }

/* Behind a full barrier: whatever was seen or done before. */
void pv_full_barrier(Engine *e, context_t *c)
{
    if (e->model != ARM)
        return;
    raise_view(&c->floor, &c->latest);
    raise_view(&c->floor, &c->own);
}

/* arm: a doorbell, lock or mailbox passes on what who used it before had seen and done. */
void pv_publish(Engine *e, const context_t *c, int32_t cell)
{
    if (e->model != ARM)
        return;
    raise_view(&e->cells[cell].view, &c->floor);
    raise_view(&e->cells[cell].view, &c->latest);
    raise_view(&e->cells[cell].view, &c->own);
}

void pv_synchronise(Engine *e, context_t *c, int32_t cell)
{
    if (e->model != ARM)
        return;
    raise_view(&c->floor, &e->cells[cell].view);
    raise_view(&c->latest, &e->cells[cell].view);
}

void pv_inherit_view(Engine *e, context_t *c, const context_t *dead)
{
    if (e->model != ARM)
        return;
    raise_view(&c->floor, &dead->floor);
    raise_view(&c->floor, &dead->latest);
    raise_view(&c->floor, &dead->own);
}

/* The stores of a buffer that may become visible now: how many, and which (of the buffer, oldest first). */
uint32_t pv_flushable(const Engine *e, const context_t *c, uint32_t *which)
{
    uint32_t count = 0;
    if (e->model != ARM) {
        which[0] = 0;
        return c->buffered != 0;
    }
    for (uint32_t i = 0; i < c->buffered && count < WAYS_MAX; i++) {
        const store_t *s = &c->buffer[i];
        if ((s->release && i > 0) || (i > 0 && c->buffer[0].epoch < s->epoch))
            continue;
        uint32_t k = 0;
        while (k < i && c->buffer[k].cell != s->cell)
            k++;
        if (k == i)
            which[count++] = i;
    }
    return count;
}

/* Let a store of a buffer reach memory. */
int pv_flush(Engine *e, context_t *c, uint32_t which)
{
    store_t s = c->buffer[which];
    memmove(&c->buffer[which], &c->buffer[which + 1], (--c->buffered - which) * sizeof s);
    pv_own(e, c, s.cell);
    if (e->trace != NULL)
        pv_trace(e, c, "~ %s %W := 0x%llx", s.site, s.cell, (unsigned long long)s.value);
    return pv_set(e, s.cell, s.value);
}

/* ---- the identity of a state: everything that the future depends on ---- */

/* arm: times matter only by which of the stores that can still be read they lie before or after. */
#define TIMES_MAX 2048 /* of all stores that can still be read: 200 contexts' worth of buffers */

static pair_t view_state(Engine *e, pair_t h)
{
    uint32_t times[TIMES_MAX], count = 0;
    for (uint32_t k = 0; k < e->shared_count; k++) {
        const cell_t *at = &e->cells[e->shared[k]];
        if ((int64_t)at->key < 0)
            continue; /* its view is ranked below */
        uint32_t from = UINT32_MAX; /* what nobody can read any more, because of the floor or of coherence, is gone */
        for (uint32_t i = 0; i < e->context_count; i++) {
            const context_t *c = &e->contexts[i];
            uint32_t low = max32(c->floor.when, c->coherent[e->shared[k]]);
            if (!c->finished && !c->dead && low < from)
                from = low;
        }
        for (uint32_t i = at->messages; i-- > 0;) {
            h = pv_mix2(h, at->history[i].value);
            if (count < TIMES_MAX)
                times[count++] = at->history[i].when;
            if (at->history[i].when <= from)
                break;
        }
        h = pv_mix2(h, 0x6d657373u);
    }
    /* The rank of a time is how many of those times are not after it. */
#define RANK(t) ({ uint32_t r_ = 0; for (uint32_t n_ = 0; n_ < count; n_++) r_ += times[n_] <= (t); r_; })
    for (uint32_t n = 0; n < count; n++)
        h = pv_mix2(h, RANK(times[n]));
    for (uint32_t k = 0; k < e->shared_count; k++)
        if (e->cells[e->shared[k]].view.when)
            h = pv_mix2(h, (uint64_t)k << 32 | RANK(e->cells[e->shared[k]].view.when));
    for (uint32_t i = 0; i < e->context_count; i++) {
        const context_t *c = &e->contexts[i];
        if (c->finished && !e->deaths_max)
            continue;
        h = pv_mix2(h, (uint64_t)RANK(c->floor.when) << 40 | (uint64_t)RANK(c->latest.when) << 20 | RANK(c->own.when));
        for (uint32_t k = 0; k < e->shared_count; k++)
            if (c->coherent[e->shared[k]] > c->floor.when)
                h = pv_mix2(h, (uint64_t)k << 32 | RANK(c->coherent[e->shared[k]]));
    }
#undef RANK
    return h;
}

pair_t pv_state(Engine *e)
{
    pair_t h = {e->dead, (uint64_t)e->ticked};
    for (uint32_t k = 0; k < e->shared_count; k++)
        h = pv_mix2(h, e->cells[e->shared[k]].value);
    for (uint32_t i = 0; i < e->bells; i++)
        for (uint32_t k = 0; k < e->boxes[i].count; k++)
            h = pv_mix2(pv_mix2(h, e->boxes[i].ids[k].a), e->boxes[i].ids[k].b);
    for (uint32_t i = 0; i < e->context_count; i++) {
        const context_t *c = &e->contexts[i];
        h = pv_mix2(pv_mix2(h, c->seen.a), c->seen.b);
        h = pv_mix2(h, (uint64_t)c->buffered << 1 | (c->marked && c->mark != e->version));
        for (uint32_t k = 0; k < c->buffered; k++) {
            const store_t *s = &c->buffer[k];
            uint32_t epoch = s->epoch - c->buffer[0].epoch, age = e->delay_max < 0 ? 0 : e->depth - (uint32_t)s->pushed_at;
            h = pv_mix2(h, (uint64_t)(uint32_t)s->cell << 24 | epoch << 1 | s->release | (uint64_t)age << 48);
            h = pv_mix2(h, s->value);
        }
        if (e->model == ARM && c->buffered)
            h = pv_mix2(h, c->epoch - c->buffer[0].epoch);
    }
    if (e->preemptions_max >= 0)
        h = pv_mix2(h, (uint64_t)e->preempted << 32 | (uint32_t)e->last_agent);
    return e->model == ARM ? view_state(e, h) : h;
}
