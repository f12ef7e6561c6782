/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Partial order reduction: which events depend on each other, and where another order has to be tried.  Each event is compared
 * with the path before it.  One that it depends on, with nothing in between that orders the two, is a race; then one of those
 * who could begin the other order (an initial: source sets, Abdulla and others 2014) is wanted at the state before it.  Who
 * has to wait is compared, too, at each state: it might have come before what makes it wait.
 *
 * With the table of states (as Yang, Chen, Gopalakrishnan, Kirby 2008): each state keeps the kinds of events that were seen
 * from it on.  A path that ends in a known state is compared with those as if it had run into each of them, with none of
 * the happened-before that they may have had between them; so it wants more than necessary, and never less.  A state that was
 * left while some agents were asleep is known only to paths on which they are asleep, too.  That this leaves nothing out is
 * not proven; tests/verify/test_reduction.py compares it, program by program, with plain search.
 *
 * An event is a flush, or what a context does at one scheduling point, or its death.  What it does at locations that nobody
 * shares depends on nothing; neither does putting a store into a buffer, which others see as its flush.  On arm a buffer has
 * an agent, a lane, for each location, and stores to two locations that become visible depend on each other only if any load
 * compares their times: weak.c finds out.  A store that may not overtake an older one comes behind that; this is no race.
 *
 * A death is another way of its context's next step: it is tried wherever that step is, also where that has to wait and the
 * death is what a race asks for, and at the end for those who wait for ever.  Nobody sees it but who takes over a lock of the
 * dead, and a turn of a spin loop; who awaits it comes behind it and behind the last store of the dead, which is no race.
 * Two deaths do not depend on each other, although a bound on their number lets one prevent the other: whatever runs on after
 * a death is also tried without it, and there the other is found.  So a death is never the only thing that is tried at a
 * state where somebody can take a step that is not asleep.
 *
 * Bounds on preemptions and on the delay of flushes take away orders that this relies on: with them there is no reduction.
 */
#include "engine.h"

static bool writes(enum effect e) { return e != E_NONE && e != E_READ && e != E_SPIN && e != E_DEATH; }
static bool writes_memory(enum effect e) { return e == E_MEMORY_WRITE || e == E_CAS_BARRED; }

/* arm: has a load compared the times of stores to these two? */
static bool related(const Engine *e, int32_t a, int32_t b)
{
    uint32_t p = e->cells[a].place, q = e->cells[b].place;
    return p == PLACES - 1 || q == PLACES - 1 || (e->relation->with[p] >> q & 1) || (e->relation->with[q] >> p & 1);
}

static bool dependent(const Engine *e, const event_kind_t *a, const event_kind_t *b)
{
    if (a->agent == b->agent)
        return true;
    if ((a->heap >= 0 && a->heap == b->cell && writes(b->effect)) || (b->heap >= 0 && b->heap == a->cell && writes(a->effect)))
        return true;
    if (a->effect == E_NONE || b->effect == E_NONE)
        return false;
    if (a->effect == E_DEATH || b->effect == E_DEATH) {
        enum effect other = a->effect == E_DEATH ? b->effect : a->effect;
        return other == E_INHERIT || other == E_SPIN;
    }
    if (a->effect == E_SPIN || b->effect == E_SPIN)
        return writes(a->effect) || writes(b->effect);
    bool same = e->agent_context[a->agent] == e->agent_context[b->agent];
    if (e->model == ARM && writes_memory(a->effect) && writes_memory(b->effect) && a->cell != b->cell)
        return related(e, a->cell, b->cell);
    if (a->cell != b->cell || (a->effect == E_READ && b->effect == E_READ) || (a->effect == E_ADD && b->effect == E_ADD))
        return false;
    /* a load forwards what its own buffer's flush would write */
    return !(same && (a->effect == E_READ || b->effect == E_READ));
}

/* arm: is the one the flush of a store that keeps the other, a compare-exchange of the same context, from finding the newest? */
static bool lets_pass(const Engine *e, const event_kind_t *flush, const event_kind_t *cas)
{
    return cas->effect == E_CAS_BARRED && flush->agent >= LANES_FROM && flush->cell != cas->cell &&
           e->agent_context[flush->agent] == cas->agent;
}

/* There is more to be told apart than there is room for: begin anew without reduction. */
void pv_give_up_reducing(Engine *e)
{
    e->reducing = e->sleeping = false;
    e->grown = true;
}

/* The agent that flushes a context's stores to a location. */
uint8_t pv_lane(Engine *e, const context_t *c, int32_t cell)
{
    uint8_t *lane = &e->cells[cell].lanes[pv_number(e, c)];
    if (*lane == 0 && e->agent_count == AGENTS_MAX) {
        pv_give_up_reducing(e);
    } else if (*lane == 0) {
        *lane = (uint8_t)e->agent_count++;
        e->agent_context[*lane] = (uint8_t)pv_number(e, c);
    }
    return *lane;
}

static int intern(Engine *e, event_kind_t kind)
{
    uint32_t at = (uint32_t)pv_mix(kind.agent << 8 | kind.effect, (uint64_t)(uint32_t)kind.cell << 32 | (uint32_t)kind.heap) & 4095;
    for (; e->kind_index[at] >= 0; at = (at + 1) & 4095) {
        const event_kind_t *k = &e->kinds[e->kind_index[at]];
        if (k->agent == kind.agent && k->effect == kind.effect && k->cell == kind.cell && k->heap == kind.heap)
            return e->kind_index[at];
    }
    if (e->kind_count == KINDS_MAX) {
        pv_give_up_reducing(e);
        return 0;
    }
    int id = (int)e->kind_count++;
    e->kind_index[at] = (int16_t)id;
    e->kinds[id] = kind;
    for (int i = 0; i <= id; i++) {
        if (!dependent(e, &e->kinds[i], &kind))
            continue;
        e->depends[id][i >> 6] |= 1ull << (i & 63);
        e->depends[i][id >> 6] |= 1ull << (id & 63);
    }
    for (int i = 0; i < id; i++) { /* of a path before a known state; races() knows more */
        if (lets_pass(e, &kind, &e->kinds[i]))
            e->depends[i][id >> 6] |= 1ull << (id & 63);
        if (lets_pass(e, &e->kinds[i], &kind))
            e->depends[id][i >> 6] |= 1ull << (i & 63);
    }
    return id;
}

void pv_forget_kinds(Engine *e)
{
    memset(e->kind_index, 0xff, sizeof e->kind_index);
    memset(e->depends, 0, sizeof e->depends);
    e->kind_count = 0;
}

static int kind_of(Engine *e, int agent, enum effect effect, int32_t cell)
{
    return intern(e, (event_kind_t){(uint8_t)agent, effect, cell, -1});
}

static int dying(Engine *e, int agent) { return kind_of(e, agent, E_DEATH, -1); }

int pv_pending_kind(Engine *e, const context_t *c)
{
    event_kind_t kind = {(uint8_t)pv_number(e, c), E_NONE, -1, -1};
    switch (c->op.kind) {
    case LOAD: case WAIT:
        kind.effect = E_READ;
        break;
    case RING:
        kind.effect = E_ADD;
        break;
    case STORE:
        kind.effect = e->model == SC ? E_MEMORY_WRITE : E_NONE;
        break;
    case RMW:
        kind.effect = E_MEMORY_WRITE;
        break;
    case CAS: /* arm: only the stores that wait keep it from what it would find */
        kind.effect = e->model == ARM && c->buffered && e->cells[c->op.cell].value == c->op.expected ? E_CAS_BARRED : E_MEMORY_WRITE;
        break;
    case SPIN:
        kind.effect = E_SPIN;
        break;
    case INHERIT:
        kind.effect = E_INHERIT;
        break;
    case FENCE: case CHOOSE: case BURY:
        return intern(e, kind);
    default:
        kind.effect = E_WRITE;
    }
    if (c->op.kind <= CAS)
        kind.heap = e->cells[c->op.cell].heap;
    if (kind.effect != E_NONE && kind.effect != E_SPIN)
        kind.cell = c->op.cell;
    return intern(e, kind);
}

static int flush_kind(Engine *e, const context_t *c, uint32_t which)
{
    int agent = e->model == ARM ? c->buffer[which].lane : CONTEXTS_MAX + pv_number(e, c);
    return kind_of(e, agent, E_MEMORY_WRITE, c->buffer[which].cell);
}

/* The store that an agent flushes next. */
static uint32_t next_flush(const Engine *e, const context_t *c, int agent)
{
    uint32_t which = 0;
    while (e->model == ARM && which + 1 < c->buffered && c->buffer[which].lane != agent)
        which++;
    return which;
}

static bool depends(const Engine *e, int a, int b) { return e->depends[a][b >> 6] >> (b & 63) & 1; }

static void join(uint16_t *restrict clock, const uint16_t *restrict with)
{
    for (int i = 0; i < AGENTS_MAX; i++)
        clock[i] = clock[i] > with[i] ? clock[i] : with[i];
}

static int last_of(const Engine *e, uint32_t depth, int agent)
{
    for (uint32_t i = depth; i-- > 0;)
        if (e->events[i].agent == agent)
            return (int)i;
    return -1;
}

/*
 * What has happened before an agent's next event, as far as its own past, its buffer and its barriers say.  `drained`: after
 * every store of its context; `store`: after those that it does not overtake, as it is their turn before.
 */
static void clock_of(const Engine *e, uint32_t depth, int agent, const store_t *store, bool drained, uint16_t *clock)
{
    int own = last_of(e, depth, agent), pushed_at = store != NULL ? store->pushed_at : -1;
    memset(clock, 0, AGENTS_MAX * sizeof *clock);
    if (own >= 0)
        join(clock, e->events[own].clock);
    if (pushed_at >= 0)
        join(clock, e->events[pushed_at].clock);
    if (!drained && (store == NULL || e->model != ARM))
        return;
    agents_t found = 0;
    for (uint32_t i = depth; i-- > 0;) {
        const event_t *event = &e->events[i];
        if (event->agent < CONTEXTS_MAX || e->agent_context[event->agent] != e->agent_context[agent] || (found & pv_bit(event->agent)))
            continue;
        if (!drained && event->epoch >= store->epoch && !(store->release && event->number < store->number))
            continue;
        found |= pv_bit(event->agent);
        join(clock, event->clock);
    }
}

/* Does the operation come after all stores of its context have become visible? */
static bool drains(const Engine *e, const context_t *c, int way)
{
    switch (c->op.kind) {
    case RMW: case FENCE: case UNLOCK: case POST:
        return true;
    case CAS: /* arm: one that fails waits for nothing */
        return e->model != ARM || (c->buffered == 0 && way == 0 && e->cells[c->op.cell].value == c->op.expected);
    case RING:
        return e->model == ARM;
    default:
        return false;
    }
}

/*
 * Event i races with a later one of `agent`, which has `clock` before it.  What comes after i and not because of it, and then
 * that event, could have come before i.  One of those who could have begun that (its initials) has to be tried instead of i.
 * Of an event beyond the path only the beginning of that is known; where it is empty, everybody is tried.
 */
static void want(Engine *e, uint32_t i, uint32_t depth, int agent, int id, const uint16_t *clock)
{
    node_t *n = &e->nodes[i];
    uint32_t first[AGENTS_MAX];
    agents_t members = 0, initials = 0;
    const event_t *at = &e->events[i];
    for (uint32_t j = i + 1; j <= depth; j++) {
        const event_t *event = &e->events[j];
        const uint16_t *before = j < depth ? event->clock : clock;
        int who = j < depth ? event->agent : agent;
        if (who < 0 || (members >> who & 1) || (j < depth && event->clock[at->agent] > i))
            continue;
        bool initial = true;
        for (agents_t left = members; left != 0 && initial; left &= left - 1)
            initial = before[pv_first(left)] <= first[pv_first(left)];
        members |= pv_bit(who);
        first[who] = j;
        bool dies = e->kinds[j < depth ? event->id : id].effect == E_DEATH;
        if (initial)
            initials |= pv_bit(who) & (dies ? n->dying : n->steps);
    }
    if (initials & n->wanted)
        return;
    if (initials == 0)
        n->wanted |= n->steps | n->dying;
    else
        n->wanted |= agent >= 0 && (initials >> agent & 1) ? pv_bit(agent) : initials & -initials;
}

/*
 * Find the races of an event of kind `id` with the path; afterwards `clock` has all that happened before it.  `empties`: it
 * flushes the last store of a buffer, so that a compare-exchange that had to be content with an old value need not be.
 */
static void races(Engine *e, uint32_t depth, int agent, int id, bool empties, uint16_t *clock)
{
    const event_kind_t *kind = &e->kinds[id];
    for (uint32_t i = depth; i-- > 0;) {
        const event_t *before = &e->events[i];
        const event_kind_t *other = &e->kinds[before->id];
        if (before->agent == agent || clock[before->agent] > i || lets_pass(e, other, kind))
            continue;
        if (!depends(e, id, before->id) && !(empties && lets_pass(e, kind, other)))
            continue;
        want(e, i, depth, agent, id, clock);
        join(clock, before->clock);
    }
}

/* Note the event that is about to happen: its kind, its races, and all that has happened before it. */
void pv_record(Engine *e, uint32_t depth, choice_t choice)
{
    event_t *event = &e->events[depth];
    bool empties = false;
    event->agent = choice.agent;
    if (choice.dies) {
        event->id = (int16_t)dying(e, choice.agent);
        clock_of(e, depth, choice.agent, NULL, false, event->clock);
    } else if (choice.agent < CONTEXTS_MAX) {
        const context_t *c = &e->contexts[choice.agent];
        event->id = (int16_t)pv_pending_kind(e, c);
        clock_of(e, depth, choice.agent, NULL, drains(e, c, choice.way), event->clock);
        if (c->op.kind == BURY) { /* never before the death and the last store of whom it waits for: that is no race */
            uint16_t passing[AGENTS_MAX];
            clock_of(e, depth, c->op.cell, NULL, true, passing);
            join(event->clock, passing);
        }
    } else {
        const context_t *c = &e->contexts[e->agent_context[choice.agent]];
        uint32_t which = next_flush(e, c, choice.agent);
        event->id = (int16_t)flush_kind(e, c, which);
        event->epoch = c->buffer[which].epoch;
        event->number = c->buffer[which].number;
        empties = c->buffered == 1;
        clock_of(e, depth, choice.agent, &c->buffer[which], false, event->clock);
    }
    races(e, depth, choice.agent, event->id, empties, event->clock);
    event->clock[choice.agent] = (uint16_t)(depth + 1);
}

/* A new state: those who have to wait might have come before what makes them wait. */
void pv_find_races(Engine *e, uint32_t depth)
{
    uint16_t clock[AGENTS_MAX];
    if (depth == 0)
        return;
    for (uint32_t i = 0; i < e->context_count; i++) {
        const context_t *c = &e->contexts[i];
        if (!c->waiting || c->dead || pv_step_ways(e, c) != 0)
            continue;
        clock_of(e, depth, (int)i, NULL, drains(e, c, 0), clock);
        races(e, depth, (int)i, pv_pending_kind(e, c), false, clock);
    }
}

/* The path has come to a state that is known: compare it with all that follows there. */
void pv_races_beyond(Engine *e, uint32_t depth, const uint64_t *summary)
{
    const uint16_t *clocks[AGENTS_MAX] = {NULL};
    for (uint32_t i = depth; i-- > 0;)
        if (clocks[e->events[i].agent] == NULL)
            clocks[e->events[i].agent] = e->events[i].clock;
    for (uint32_t i = depth; i-- > 0;) {
        const event_t *before = &e->events[i];
        bool raced = false;
        for (int w = 0; w < SUMMARY_WORDS && !raced; w++) {
            uint64_t hits = summary[w] & e->depends[before->id][w];
            for (; hits != 0 && !raced; hits &= hits - 1) {
                int agent = e->kinds[w * 64 + __builtin_ctzll(hits)].agent;
                raced = agent != before->agent && (clocks[agent] == NULL || clocks[agent][before->agent] <= i);
            }
        }
        if (raced)
            want(e, i, depth, -1, 0, NULL);
    }
}

/*
 * Sleep sets (Godefroid 1996): what was tried at the state before, and does not depend on what was done there instead.  Who has
 * got more ways to go on than it had, or any at all when only its death was tried, has something left to be tried.
 */
agents_t pv_asleep_after(Engine *e, uint32_t depth)
{
    const node_t *n = &e->nodes[depth - 1], *now = &e->nodes[depth];
    const event_t *event = &e->events[depth - 1];
    agents_t asleep = 0, candidates = (n->asleep | n->done) & ~pv_bit(event->agent);
    for (; candidates != 0; candidates &= candidates - 1) {
        int agent = pv_first(candidates);
        const context_t *c = &e->contexts[e->agent_context[agent]];
        bool awake = agent < CONTEXTS_MAX && (now->ways[agent] > n->ways[agent] || depends(e, pv_pending_kind(e, c), event->id));
        awake = awake || ((now->dying >> agent & 1) && depends(e, dying(e, agent), event->id));
        if (agent >= CONTEXTS_MAX)
            awake = depends(e, flush_kind(e, c, next_flush(e, c, agent)), event->id);
        if (!awake)
            asleep |= pv_bit(agent);
    }
    return asleep;
}
