/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The engine of the explorer: memory models, contexts and the search, in C.  All of it belongs to one Engine and one thread.
 *
 * An execution is a path of events; an event is a choice (agent, way).  Agents are the contexts, numbered from 0, and their
 * store buffers, numbered from CONTEXTS_MAX.  A context's event is the operation that it had announced when it stopped, and
 * whatever it does up to its next stop, or its death; a buffer's is the flush of one store.  Where the reduction runs under
 * arm, there is an agent for each location that a context stores to instead, numbered from LANES_FROM.
 */
#ifndef PVBUS_ENGINE_H
#define PVBUS_ENGINE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "model_api.h"

#define CONTEXTS_MAX 16
#define LANES_FROM (2 * CONTEXTS_MAX)
#define AGENTS_MAX 128
#define MEMORIES_MAX 256
#define BUFFER_MAX 192       /* stores that wait; hardware has 20 to 70 */
#define STEPS_MAX 4096       /* of one execution, whatever is asked for */
#define UNSEEN_MAX 100000    /* accesses of a context to what only it has touched, without a scheduling point */
#define NAME_MAX_BYTES 64
#define KINDS_MAX 512        /* different events of one scenario that the reduction tells apart */
#define SUMMARY_WORDS (KINDS_MAX / 64)
#define WAYS_MAX 64

enum model { SC, TSO, ARM };
enum order { RELAXED, ACQUIRE, RELEASE };
enum fence { MB, RMB, WMB };

/* What a context is about to do. */
enum kind {
    LOAD, STORE, RMW, CAS, FENCE, SPIN, RING, TAKE, WAIT, CHOOSE, CLOCK, LOCK, UNLOCK, INHERIT, ALLOCATE, FREE, BURY, POST,
    RECEIVE
};

/* What an event is to others: the relation of dependence is made of these. */
enum effect { E_NONE, E_READ, E_ADD, E_WRITE, E_MEMORY_WRITE, E_CAS_BARRED, E_INHERIT, E_SPIN, E_DEATH };

typedef unsigned __int128 agents_t; /* a set of agents, a bit each */
typedef struct { uint64_t a, b; } pair_t; /* 128 bits: what a history, or a state, is told apart by */

/*
 * arm: sets of cells, for the order between stores to different ones.  It matters only if some load ever compares their times:
 * what is not related may become visible in any order, and the search begins anew when a relation turns up.
 */
#define PLACES 128
typedef unsigned __int128 places_t;
typedef struct { places_t with[PLACES]; bool grown; } relation_t;

/* A time in the past, of which cells' stores it is one, and what had happened by then whatever the order of steps. */
typedef struct { uint32_t when; places_t of; uint16_t clock[AGENTS_MAX]; } view_t;

typedef struct { uint64_t value; uint32_t when; int32_t event; uint8_t agent; } message_t; /* arm: a store that has become visible */

typedef struct {
    uint64_t key, value, initial;
    uint32_t touched, owners; /* contexts that accessed it; that freed or allocated its memory: a bit each */
    bool written, shared;
    int32_t heap;             /* the cell that says whether its memory is allocated, -1 = it always is */
    uint32_t place;           /* in sets of cells; the last one is shared by all who find no other */
    view_t view;              /* arm, doorbells and the like: what who rang had seen */
    message_t *history;       /* arm, memory: oldest first; the last one is value */
    uint32_t messages, room;
    uint8_t lanes[CONTEXTS_MAX]; /* the agents that flush a context's stores to it, 0 = none yet */
} cell_t;

typedef struct { const void *object; char name[NAME_MAX_BYTES]; int32_t heap; } memory_t;

typedef struct {
    enum kind kind;
    int32_t cell;
    uint32_t ways;
    enum order order;
    const char *site;
    uint64_t expected;
} operation_t;

typedef struct {
    int32_t cell;
    uint64_t value;
    const char *site;  /* kept only for traces */
    uint32_t epoch;    /* arm: waits for every store of an earlier epoch */
    bool release;      /* arm: waits for every store before it */
    int32_t pushed_at; /* the event in which it was stored, -1 = before the first */
    uint32_t number;   /* of the context's stores */
    uint8_t lane;
} store_t;

typedef struct {
    PyObject *greenlet, *body;
    char name[NAME_MAX_BYTES];
    bool server, finished, dead, waiting; /* waiting: `op` is valid */
    operation_t op;
    store_t *buffer;
    uint32_t buffered;
    pair_t seen;       /* identity of the list of values it has observed */
    uint64_t mark;     /* version of memory when its turn of a spin loop began */
    bool marked, unfenced; /* unfenced: it has stored since its last full barrier */
    int32_t last;      /* its last event of this execution, -1 = none */
    uint32_t epoch, stores;
    view_t floor, latest, own;   /* arm: no load reads from before; latest time read; time of its last visible store */
    uint32_t *coherent;          /* arm: the same for each cell; indexed by cell */
    PyObject *error;
} context_t;

typedef struct { pair_t *ids; PyObject **items; uint32_t count, room; } box_t;

/* A choice, as the search remembers it: agent, way, and whether the context dies instead. */
typedef struct { uint8_t agent, way; bool dies; } choice_t;

typedef struct {
    uint8_t agent;
    int16_t id;     /* kind of event, see reduce.c */
    uint32_t epoch, number; /* arm: of the store that is flushed */
    uint16_t clock[AGENTS_MAX]; /* for each agent, 1 + its last event that happened before this one's end */
} event_t;

typedef struct {
    agents_t steps, dying; /* agents that can take a step; contexts that can die */
    agents_t wanted, done, asleep;
    choice_t now;
    uint8_t ways[AGENTS_MAX];
    bool stored, ends; /* its state is in the table; nobody can go on but by dying, and that is not yet judged */
    pair_t state;
    uint64_t pending[SUMMARY_WORDS]; /* kinds of events that were about to happen here */
    uint64_t beyond[AGENTS_MAX][SUMMARY_WORDS]; /* kinds seen from here on, by who went first; of those done, asleep, under way */
} node_t;

typedef struct { uint8_t agent; enum effect effect; int32_t cell, heap; } event_kind_t;

enum strategy { FOLLOW, DEPTH_FIRST, RANDOM_WALK, PRIORITIES };
enum after { AFTER_STOP, AFTER_FIRST, AFTER_RANDOM };
enum outcome { RUNNING, QUIET, PRUNED, FAILED, STOPPED, MISFIT, LIVELOCK };

typedef struct { pair_t state, asleep; uint32_t summary; } visited_t; /* asleep: low and high half */

typedef struct {
    PyObject_HEAD
    struct pv_model_api api;
    PyObject *capsule;
    enum model model;
    char **dropped;       /* sites, sorted by nothing */
    bool *dropped_seen;
    uint32_t dropped_count;

    memory_t memories[MEMORIES_MAX];
    uint32_t memory_count;
    cell_t *cells;
    uint32_t cell_count, cell_room;
    int32_t *index;       /* open addressing: key to cell */
    uint32_t index_size;
    relation_t *relation;
    int32_t *shared;      /* cells that are scheduling points, and doorbells */
    uint32_t shared_count, shared_room;
    uint32_t bells;
    int32_t *bell_cells;
    char (*bell_names)[NAME_MAX_BYTES];
    box_t *boxes;         /* one a bell */
    int32_t clock_cell;
    uint64_t ticks[8];
    uint32_t tick_count, ticks_max, ticked;
    uint64_t *widths;     /* granule and width of each access, open addressing */
    uint32_t width_count, width_size;

    context_t contexts[CONTEXTS_MAX];
    uint32_t context_count, agent_count;
    uint8_t agent_context[AGENTS_MAX];
    context_t *running;
    PyObject *hub;
    bool over, starting, frozen, grown, broken, cut;
    uint64_t version;
    uint32_t now;         /* arm: time of the last visible store */
    uint8_t way;
    uint32_t dead, deaths, deaths_max;
    uint32_t mortal;      /* a bit a context */
    uint64_t steps;

    enum strategy strategy;
    enum after after;
    enum outcome outcome;
    uint32_t steps_max;
    choice_t *follow;
    uint32_t follow_count;
    choice_t *taken;      /* of this execution */
    event_t *events;
    node_t *nodes;
    uint32_t depth, node_count;
    int last_agent;
    uint32_t alone, fair_from, preempted, unseen;
    int32_t preemptions_max, delay_max;
    uint64_t random;
    uint32_t priority[AGENTS_MAX], change_points[16], change_count, change_next;

    bool hashing, reducing, sleeping;
    visited_t *visited;
    uint64_t visited_count, visited_size;
    uint64_t (*summaries)[SUMMARY_WORDS];
    uint32_t summary_count, summary_room, *summary_index, summary_index_size;
    event_kind_t kinds[KINDS_MAX];
    uint64_t depends[KINDS_MAX][SUMMARY_WORDS];
    int16_t kind_index[4096];
    uint32_t kind_count;

    PyObject *trace;      /* a list, or NULL */
    PyObject *sites;      /* names that traces point to */
} Engine;

extern PyObject *pv_context_died, *pv_use_after_free, *pv_lock_error, *pv_width_error, *pv_limit_error;
extern void **pv_greenlet;

static inline uint64_t pv_mix(uint64_t h, uint64_t v)
{
    h = (h ^ v) * 0x9E3779B97F4A7C15ull;
    h ^= h >> 32;
    h *= 0xD6E8FEB86659FD93ull;
    return h ^ h >> 29;
}

static inline pair_t pv_mix2(pair_t p, uint64_t v)
{
    return (pair_t){pv_mix(p.a, v), pv_mix(p.b + 0x632BE59BD9B4E019ull, v ^ 0xA0761D6478BD642Full)};
}

static inline bool pv_is_bell(const Engine *e, int32_t cell) { return (int64_t)e->cells[cell].key < 0; }
static inline agents_t pv_bit(int agent) { return (agents_t)1 << agent; }
static inline int pv_first(agents_t set)
{
    return (uint64_t)set != 0 ? __builtin_ctzll((uint64_t)set) : 64 + __builtin_ctzll((uint64_t)(set >> 64));
}
static inline int pv_count(agents_t set) { return __builtin_popcountll((uint64_t)set) + __builtin_popcountll((uint64_t)(set >> 64)); }
static inline int pv_number(const Engine *e, const context_t *c) { return (int)(c - e->contexts); }
static inline places_t pv_place(const Engine *e, int32_t cell) { return (places_t)1 << e->cells[cell].place; }
static inline void pv_observe(context_t *c, uint64_t value) { c->seen = pv_mix2(c->seen, value); }
static inline bool pv_lanes(const Engine *e) { return e->reducing && e->model == ARM; }
#define PASSED 0x70617373u /* observed at a step that gives no value */

/* cells.c */
int32_t pv_cell(Engine *e, uint64_t key);
int32_t pv_bell_cell(Engine *e, long long bell);
int pv_note(Engine *e, context_t *c, int32_t cell, bool writes);
int pv_share(Engine *e, int32_t cell);
int pv_check_width(Engine *e, uint64_t key);
int pv_set(Engine *e, int32_t cell, uint64_t value);
uint32_t pv_attach(void *engine, const void *memory);
int pv_reset(Engine *e);

/* access.c, point.c */
extern const struct pv_model_api pv_access_table;
bool pv_is_dropped(Engine *e, const char *site, const context_t *c);
int pv_push(Engine *e, context_t *c, int32_t cell, uint64_t value, enum order order, const char *site);
int pv_check_heap(Engine *e, context_t *c, int32_t cell, const char *site);
extern PyMethodDef pv_point_methods[];

/* weak.c: what store buffers and arm's views allow */
uint32_t pv_readable(const Engine *e, const context_t *c, uint32_t way, uint32_t *which);
uint64_t pv_read(Engine *e, context_t *c, bool acquire, bool *latest);
void pv_read_latest(Engine *e, context_t *c, int32_t cell, bool acquire);
const store_t *pv_own_store(const context_t *c, int32_t cell);
uint32_t pv_flushable(const Engine *e, const context_t *c, uint32_t *which);
int pv_flush(Engine *e, context_t *c, uint32_t which);
void pv_publish(Engine *e, const context_t *c, int32_t cell);
void pv_synchronise(Engine *e, context_t *c, int32_t cell);
void pv_inherit_view(Engine *e, context_t *c, const context_t *dead);
void pv_own(Engine *e, context_t *c, int32_t cell);
void pv_load_barrier(context_t *c);
void pv_full_barrier(Engine *e, context_t *c);
pair_t pv_state(Engine *e);

/* schedule.c */
int pv_stop(Engine *e, context_t *c, enum kind kind, int32_t cell, const char *site, uint32_t ways);
uint32_t pv_step_ways(const Engine *e, const context_t *c);
PyObject *pv_execute(Engine *e, PyObject *starts);
void pv_clear(Engine *e);
uint64_t pv_draw(Engine *e);
void pv_options(const Engine *e, node_t *n);

/* reduce.c: which events depend on each other, and where another order has to be tried */
int pv_pending_kind(Engine *e, const context_t *c);
void pv_record(Engine *e, uint32_t depth, choice_t choice);
void pv_find_races(Engine *e, uint32_t depth);
void pv_races_beyond(Engine *e, uint32_t depth, const uint64_t *summary);
agents_t pv_asleep_after(Engine *e, uint32_t depth);
uint8_t pv_lane(Engine *e, const context_t *c, int32_t cell);
void pv_give_up_reducing(Engine *e);
void pv_forget_kinds(Engine *e);

/* search.c */
bool pv_choose(Engine *e, const node_t *options, choice_t *choice);
int pv_enter(Engine *e, const node_t *options);
bool pv_backtrack(Engine *e);
void pv_end_of_path(Engine *e);
void pv_forget(Engine *e);

/* describe.c */
void pv_where(const Engine *e, int32_t cell, char *out, size_t size);
void pv_describe(const Engine *e, const context_t *c, char *out, size_t size);
void pv_trace(Engine *e, const context_t *c, const char *format, ...);
const char *pv_kind_name(enum kind kind);
const char *pv_keep_site(Engine *e, const char *site);

/* engine_type.c, engine_module.c */
int pv_engine_setup(Engine *e, PyObject *args, PyObject *kwargs);
void pv_engine_teardown(Engine *e);
extern PyMethodDef pv_engine_methods[];

#endif /* PVBUS_ENGINE_H */
