/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The search: depth first by replay from scratch, with a table of states and the reduction of reduce.c; a random walk;
 * priorities (PCT, Burckhardt and others 2010), where each store buffer is an agent with a priority of its own.
 *
 * States are told apart by 128 bits that are mixed from all that a state consists of.
 */
#include "engine.h"

#define VISITED_SIZE_FIRST (1u << 14)
#define IN_PROGRESS UINT32_MAX

uint64_t pv_draw(Engine *e)
{
    uint64_t z = e->random += 0x9E3779B97F4A7C15ull; /* splitmix64 */
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
}

/* ---- the table of states ---- */

static visited_t *find(Engine *e, pair_t state)
{
    uint64_t at = state.a & (e->visited_size - 1);
    while (e->visited[at].state.a | e->visited[at].state.b) {
        if (e->visited[at].state.a == state.a && e->visited[at].state.b == state.b)
            break;
        at = (at + 1) & (e->visited_size - 1);
    }
    return &e->visited[at];
}

static int grow_visited(Engine *e)
{
    uint64_t size = e->visited_size, grown = size ? 2 * size : VISITED_SIZE_FIRST;
    visited_t *old = e->visited, *table = calloc(grown, sizeof *table);
    if (table == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    e->visited = table;
    e->visited_size = grown;
    for (uint64_t i = 0; i < size; i++)
        if (old[i].state.a | old[i].state.b)
            *find(e, old[i].state) = old[i];
    free(old);
    return 0;
}

/* Many states have the same summary: keep each once. */
static uint32_t keep_summary(Engine *e, const uint64_t *summary)
{
    if (2 * e->summary_count >= e->summary_index_size) {
        uint32_t size = e->summary_index_size ? 2 * e->summary_index_size : 4096;
        uint32_t *index = malloc(size * sizeof *index);
        uint64_t(*rows)[SUMMARY_WORDS] = realloc(e->summaries, size * sizeof *rows);
        e->summaries = rows != NULL ? rows : e->summaries;
        if (index == NULL || rows == NULL) {
            free(index);
            PyErr_NoMemory();
            return IN_PROGRESS;
        }
        memset(index, 0xff, size * sizeof *index);
        free(e->summary_index);
        e->summary_index = index;
        e->summary_index_size = size;
        for (uint32_t i = 0; i < e->summary_count; i++) {
            uint64_t h = 0;
            for (int w = 0; w < SUMMARY_WORDS; w++)
                h = pv_mix(h, e->summaries[i][w]);
            while (index[h & (size - 1)] != UINT32_MAX)
                h++;
            index[h & (size - 1)] = i;
        }
    }
    uint64_t h = 0;
    for (int w = 0; w < SUMMARY_WORDS; w++)
        h = pv_mix(h, summary[w]);
    for (;; h++) {
        uint32_t *slot = &e->summary_index[h & (e->summary_index_size - 1)];
        if (*slot == UINT32_MAX) {
            memcpy(e->summaries[e->summary_count], summary, sizeof e->summaries[0]);
            return *slot = e->summary_count++;
        }
        if (memcmp(e->summaries[*slot], summary, sizeof e->summaries[0]) == 0)
            return *slot;
    }
}

void pv_forget(Engine *e)
{
    if (e->visited != NULL)
        memset(e->visited, 0, e->visited_size * sizeof *e->visited);
    if (e->summary_index != NULL)
        memset(e->summary_index, 0xff, e->summary_index_size * sizeof *e->summary_index);
    e->visited_count = 0;
    e->summary_count = e->node_count = 0;
    pv_forget_kinds(e);
}

/* ---- depth first ---- */

static void merge(uint64_t *into, const uint64_t *summary)
{
    for (int w = 0; w < SUMMARY_WORDS; w++)
        into[w] |= summary[w];
}

static void first_choice(node_t *n, int agent)
{
    memset(n->beyond[agent], 0, sizeof n->beyond[agent]);
    n->now = (choice_t){(uint8_t)agent, 0, !(n->steps >> agent & 1)};
}

static void note_event(Engine *e, uint32_t depth)
{
    const event_t *event = &e->events[depth];
    uint64_t *summary = e->nodes[depth].beyond[e->nodes[depth].now.agent];
    if (!e->reducing || e->nodes[depth].ends)
        return;
    summary[event->id >> 6] |= 1ull << (event->id & 63);
}

/* What is about to happen, even if it never can, belongs to what is seen from here on. */
static void note_pending(Engine *e, node_t *n)
{
    for (uint32_t i = 0; i < e->context_count; i++) {
        const context_t *c = &e->contexts[i];
        if (!c->waiting || c->dead)
            continue;
        int id = pv_pending_kind(e, c);
        n->pending[id >> 6] |= 1ull << (id & 63);
    }
}

/* All that is seen from a state on; what is asleep there was seen by another way to the same. */
static void sum_up(const node_t *n, uint64_t *summary)
{
    memcpy(summary, n->pending, sizeof n->pending);
    for (agents_t left = n->done | n->asleep; left != 0; left &= left - 1)
        merge(summary, n->beyond[pv_first(left)]);
}

static pair_t halves(agents_t set) { return (pair_t){(uint64_t)set, (uint64_t)(set >> 64)}; }

/* Is the state known?  One that was left while some agents were asleep is known only to paths on which they are, too. */
static int look_up(Engine *e, node_t *n)
{
    uint64_t summary[SUMMARY_WORDS];
    if (10 * e->visited_count >= 6 * e->visited_size && grow_visited(e) < 0)
        return -1;
    n->state = pv_state(e);
    n->stored = true;
    visited_t *known = find(e, n->state);
    if ((known->state.a | known->state.b) == 0) {
        *known = (visited_t){n->state, halves(n->asleep), IN_PROGRESS};
        e->visited_count++;
        return 0;
    }
    if (!e->reducing)
        return 1;
    if (known->summary == IN_PROGRESS) { /* no path comes back to itself, as each step is remembered */
        PyErr_SetString(PyExc_AssertionError, "a path has met itself");
        return -1;
    }
    memcpy(summary, e->summaries[known->summary], sizeof summary);
    agents_t asleep = (agents_t)known->asleep.b << 64 | known->asleep.a;
    if ((asleep & ~n->asleep) == 0) {
        pv_races_beyond(e, e->depth, summary);
        if (e->depth > 0)
            merge(e->nodes[e->depth - 1].beyond[e->nodes[e->depth - 1].now.agent], summary);
        return 1;
    }
    merge(n->pending, summary);
    known->asleep = halves(asleep & n->asleep);
    known->summary = IN_PROGRESS;
    return 0;
}

/* Nobody can go on: those who wait for ever might have come first. */
void pv_end_of_path(Engine *e)
{
    uint64_t *summary = e->nodes[e->depth].pending;
    if (e->strategy != DEPTH_FIRST || !e->reducing || e->depth == 0 || e->depth != e->node_count)
        return;
    pv_find_races(e, e->depth);
    memset(summary, 0, sizeof e->nodes[0].pending);
    note_pending(e, &e->nodes[e->depth]);
    merge(e->nodes[e->depth - 1].beyond[e->nodes[e->depth - 1].now.agent], summary);
}

/* Put the state that was reached on the path; 1, or 0 if it is known, -1 and an error. */
int pv_enter(Engine *e, const node_t *options)
{
    uint32_t depth = e->depth;
    node_t *n = &e->nodes[depth];
    n->steps = options->steps;
    n->dying = options->dying;
    memcpy(n->ways, options->ways, sizeof n->ways);
    n->wanted = n->done = n->asleep = 0;
    n->stored = false;
    n->ends = options->steps == 0;
    memset(n->pending, 0, sizeof n->pending);
    if (e->reducing)
        pv_find_races(e, depth);
    if (e->sleeping && depth > 0) {
        n->asleep = pv_asleep_after(e, depth);
        for (agents_t left = n->asleep; left != 0; left &= left - 1)
            memcpy(n->beyond[pv_first(left)], n[-1].beyond[pv_first(left)], sizeof n->beyond[0]);
    }
    agents_t all = n->steps | n->dying;
    bool single = (all & (all - 1)) == 0 && !n->dying && n->ways[pv_first(all)] == 1;
    if (e->hashing && !single) {
        int known = look_up(e, n);
        if (known != 0)
            return known < 0 ? -1 : 0;
    } else if (!single) {
        n->state = pv_state(e); /* for a look whether another execution comes by here, too */
    }
    if (e->reducing)
        note_pending(e, n);
    agents_t awake = n->steps & ~n->asleep;
    if ((all & ~n->asleep) == 0 && !n->ends) {
        uint64_t summary[SUMMARY_WORDS];
        sum_up(n, summary);
        if (depth > 0)
            merge(n[-1].beyond[n[-1].now.agent], summary);
        if (n->stored)
            find(e, n->state)->summary = keep_summary(e, summary);
        return 0;
    }
    n->wanted = !e->reducing ? all : awake ? awake & -awake : n->dying & ~n->asleep;
    if (n->wanted)
        first_choice(n, pv_first(n->wanted));
    e->node_count = depth + 1;
    return 1;
}

static bool next_choice(node_t *n)
{
    choice_t *now = &n->now;
    agents_t bit = pv_bit(now->agent);
    if (n->ends) { /* it was judged; now for those who may die even so */
        n->ends = false;
        return n->wanted != 0;
    }
    if (!now->dies && now->way + 1 < n->ways[now->agent]) {
        now->way++;
        return true;
    }
    if (!now->dies && (n->dying & bit)) {
        *now = (choice_t){now->agent, 0, true};
        return true;
    }
    n->done |= bit;
    agents_t left = n->wanted & ~n->done & ~n->asleep;
    if (left == 0)
        return false;
    first_choice(n, pv_first(left));
    return true;
}

/* After an execution: go back to the last state where something is left to be tried; false when there is none. */
bool pv_backtrack(Engine *e)
{
    while (e->node_count > 0) {
        node_t *n = &e->nodes[e->node_count - 1];
        note_event(e, e->node_count - 1);
        if (next_choice(n))
            return true;
        uint64_t summary[SUMMARY_WORDS];
        sum_up(n, summary);
        if (n->stored && e->reducing)
            find(e, n->state)->summary = keep_summary(e, summary);
        if (--e->node_count > 0)
            merge(n[-1].beyond[n[-1].now.agent], summary);
    }
    return false;
}

/* ---- other ways to choose ---- */

static choice_t way_of(Engine *e, const node_t *o, int agent)
{
    return (choice_t){(uint8_t)agent, (uint8_t)(o->ways[agent] > 1 ? pv_draw(e) % o->ways[agent] : 0), false};
}

static choice_t at_random(Engine *e, const node_t *o)
{
    if (o->dying && pv_draw(e) % 32 == 0) {
        uint32_t skip = (uint32_t)(pv_draw(e) % (uint32_t)pv_count(o->dying));
        agents_t left = o->dying;
        while (skip-- > 0)
            left &= left - 1;
        return (choice_t){(uint8_t)pv_first(left), 0, true};
    }
    uint32_t total = 0, pick;
    for (agents_t left = o->steps; left != 0; left &= left - 1)
        total += o->ways[pv_first(left)];
    pick = (uint32_t)(pv_draw(e) % total);
    for (agents_t left = o->steps;; left &= left - 1) {
        int agent = pv_first(left);
        if (pick < o->ways[agent])
            return (choice_t){(uint8_t)agent, (uint8_t)pick, false};
        pick -= o->ways[agent];
    }
}

static choice_t by_priority(Engine *e, const node_t *o)
{
    int best = -1;
    for (agents_t left = o->steps; left != 0; left &= left - 1) {
        int agent = pv_first(left);
        if (best < 0 || e->priority[agent] > e->priority[best])
            best = agent;
    }
    if (e->change_next < e->change_count && e->depth >= e->change_points[e->change_next]) {
        e->priority[best] = e->change_count - e->change_next++;
        if (o->dying >> best & 1 && pv_draw(e) % 4 == 0)
            return (choice_t){(uint8_t)best, 0, true};
        return by_priority(e, o);
    }
    return way_of(e, o, best);
}

/* Whoever was not chosen for longest. */
static choice_t by_turns(const Engine *e, const node_t *o)
{
    int32_t when[AGENTS_MAX], best = -1, longest = INT32_MAX;
    memset(when, 0xff, sizeof when);
    for (uint32_t i = 0; i < e->depth; i++)
        when[e->taken[i].agent] = (int32_t)i;
    for (agents_t left = o->steps; left != 0; left &= left - 1) {
        int agent = pv_first(left), taken_as = agent < LANES_FROM ? agent : CONTEXTS_MAX + e->agent_context[agent];
        if (when[taken_as] >= longest)
            continue;
        longest = when[taken_as];
        best = agent;
    }
    return (choice_t){(uint8_t)best, 0, false};
}

static bool fits(Engine *e, const node_t *o, choice_t c)
{
    agents_t may = c.dies ? o->dying : o->steps;
    if ((may >> c.agent & 1) && (c.dies || c.way < o->ways[c.agent]))
        return true;
    e->outcome = MISFIT;
    return false;
}

/* Make the next choice; false if the execution ends here, because the state is known or the choices given do not fit. */
bool pv_choose(Engine *e, const node_t *o, choice_t *choice)
{
    if (e->strategy == DEPTH_FIRST && e->depth < e->node_count) {
        *choice = e->nodes[e->depth].now;
        if (e->depth + 1 == e->node_count) {
            if (e->reducing)
                pv_record(e, e->depth, *choice);
            pair_t state = pv_state(e), before = e->nodes[e->depth].state; /* the same choices lead to the same state */
            if (state.a != before.a || state.b != before.b) {
                e->outcome = MISFIT;
                return false;
            }
        }
        return fits(e, o, *choice);
    }
    if (e->strategy == FOLLOW && e->depth < e->follow_count) {
        *choice = e->follow[e->depth];
        return fits(e, o, *choice);
    }
    if (e->depth >= e->fair_from && o->steps != 0) {
        e->cut = true;
        *choice = by_turns(e, o);
    } else if (e->strategy == DEPTH_FIRST) {
        int entered = pv_enter(e, o);
        if (entered <= 0 || e->nodes[e->depth].ends) {
            e->outcome = entered < 0 ? FAILED : entered == 0 ? PRUNED : QUIET;
            return false;
        }
        *choice = e->nodes[e->depth].now;
        if (e->reducing)
            pv_record(e, e->depth, *choice);
    } else if (e->strategy == FOLLOW && e->after == AFTER_FIRST) {
        *choice = (choice_t){(uint8_t)pv_first(o->steps), 0, false};
    } else {
        *choice = e->strategy == PRIORITIES ? by_priority(e, o) : at_random(e, o);
    }
    return true;
}
