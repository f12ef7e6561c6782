/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who goes on.  A context that reaches a scheduling point asks for the next choice itself, does flushes and deaths on the
 * spot, and goes on without a switch if it is chosen again; else it switches straight to the greenlet of the one chosen.
 * Only ends of contexts and of executions pass through the hub, the greenlet that called execute().
 */
#include "engine.h"

#define GREENLET_NEW (*(PyObject * (*)(PyObject *, PyObject *)) pv_greenlet[3])
#define GREENLET_CURRENT (*(PyObject * (*)(void)) pv_greenlet[4])
#define GREENLET_THROW (*(PyObject * (*)(PyObject *, PyObject *, PyObject *, PyObject *)) pv_greenlet[5])
#define GREENLET_SWITCH (*(PyObject * (*)(PyObject *, PyObject *, PyObject *)) pv_greenlet[6])

/* In how many ways a context can take its next step; 0 = it has to wait. */
uint32_t pv_step_ways(const Engine *e, const context_t *c)
{
    if (!c->waiting || c->dead)
        return 0;
    switch (c->op.kind) {
    case LOAD:
        return e->model == ARM && pv_own_store(c, c->op.cell) == NULL ? pv_readable(e, c, 0, NULL) : 1;
    case CAS:
        if (e->model == ARM) {
            const store_t *own = pv_own_store(c, c->op.cell);
            return own == NULL ? pv_readable(e, c, 0, NULL) : own->value != c->op.expected;
        }
        return c->buffered == 0;
    case RMW: case FENCE: case UNLOCK: case POST:
        return c->buffered == 0;
    case RING:
        return e->model != ARM || c->buffered == 0;
    case WAIT: case RECEIVE:
        return e->cells[c->op.cell].value > 0;
    case LOCK:
        return e->cells[c->op.cell].value == 0;
    case BURY:
        return (e->dead >> c->op.cell & 1) && e->contexts[c->op.cell].buffered == 0;
    case SPIN:
        return !c->marked || c->mark != e->version;
    case CLOCK:
        return 1 + (e->ticked < e->ticks_max ? e->tick_count : 0);
    default:
        return c->op.ways;
    }
}

/* Everything that may be chosen now. */
void pv_options(const Engine *e, node_t *n)
{
    uint32_t which[BUFFER_MAX];
    n->steps = n->dying = 0;
    bool preempts = e->preemptions_max >= 0 && (int32_t)e->preempted >= e->preemptions_max;
    for (uint32_t i = 0; i < e->context_count; i++) {
        const context_t *c = &e->contexts[i];
        uint32_t ways = pv_step_ways(e, c);
        n->ways[i] = (uint8_t)(ways < WAYS_MAX ? ways : WAYS_MAX);
        if (ways)
            n->steps |= pv_bit((int)i);
        if (c->buffered && pv_lanes(e)) {
            for (uint32_t k = pv_flushable(e, c, which); k-- > 0;) {
                n->steps |= pv_bit(c->buffer[which[k]].lane);
                n->ways[c->buffer[which[k]].lane] = 1;
            }
        } else if (c->buffered) {
            n->ways[CONTEXTS_MAX + i] = (uint8_t)pv_flushable(e, c, which);
            n->steps |= pv_bit((int)(CONTEXTS_MAX + i));
            if (e->delay_max >= 0 && (int32_t)e->depth - c->buffer[0].pushed_at > e->delay_max) { /* overdue: nothing else */
                n->steps = pv_bit((int)(CONTEXTS_MAX + i));
                n->dying = 0;
                return;
            }
        }
        if (e->deaths < e->deaths_max && !c->finished && !c->dead && (e->mortal >> i & 1))
            n->dying |= pv_bit((int)i);
    }
    if (preempts && e->last_agent >= 0 && (n->steps >> e->last_agent & 1))
        n->steps &= pv_bit(e->last_agent) | ~(agents_t)0 << CONTEXTS_MAX;
}

static int do_flush(Engine *e, choice_t choice)
{
    uint32_t which[BUFFER_MAX];
    context_t *c = &e->contexts[choice.agent - CONTEXTS_MAX];
    if (choice.way >= pv_flushable(e, c, which)) {
        e->outcome = MISFIT;
        return -1;
    }
    return pv_flush(e, c, which[choice.way]);
}

/* The same choice in terms of store buffers, which is what replays are made of. */
static choice_t of_buffer(const Engine *e, choice_t choice)
{
    uint32_t which[BUFFER_MAX];
    if (choice.agent < LANES_FROM)
        return choice;
    int number = e->agent_context[choice.agent];
    const context_t *c = &e->contexts[number];
    uint32_t count = pv_flushable(e, c, which), way = 0;
    while (way < count && c->buffer[which[way]].lane != choice.agent)
        way++;
    return (choice_t){(uint8_t)(CONTEXTS_MAX + number), (uint8_t)way, false};
}

static void die(Engine *e, int who)
{
    e->contexts[who].dead = true;
    e->dead |= 1u << who;
    e->deaths++;
    e->version++;
    pv_trace(e, &e->contexts[who], "† dies");
}

static bool end(Engine *e, enum outcome outcome)
{
    e->outcome = outcome;
    return false;
}

/* Is the execution over? */
static bool goes_on(Engine *e, const node_t *options)
{
    if (e->broken || PyErr_Occurred())
        return end(e, FAILED);
    if (e->strategy == FOLLOW && e->depth == e->follow_count && e->after == AFTER_STOP)
        return end(e, options->steps ? STOPPED : QUIET);
    bool more = e->strategy == FOLLOW ? e->depth < e->follow_count : e->strategy == DEPTH_FIRST && e->depth < e->node_count;
    if (!options->steps && !more && !(e->strategy == DEPTH_FIRST && options->dying && e->depth < e->fair_from)) {
        pv_end_of_path(e);
        return end(e, QUIET);
    }
    if (e->depth < e->steps_max)
        return true;
    return end(e, LIVELOCK); /* everybody had a turn since fair_from, again and again */
}

/* Do what is chosen until a context has to run: give it; NULL at the end of the execution. */
static context_t *next(Engine *e)
{
    for (;;) {
        node_t options;
        choice_t choice;
        pv_options(e, &options);
        if (!goes_on(e, &options) || !pv_choose(e, &options, &choice))
            return NULL;
        choice = of_buffer(e, choice);
        agents_t only = pv_bit(choice.agent);
        e->alone = options.steps == only && e->last_agent == choice.agent ? e->alone + 1 : 0;
        if (choice.agent < CONTEXTS_MAX && e->last_agent >= 0 && e->last_agent != choice.agent)
            e->preempted += (options.steps >> e->last_agent & 1) != 0;
        e->taken[e->depth] = choice;
        e->depth++;
        e->steps++;
        if (choice.dies) {
            die(e, choice.agent);
            continue;
        }
        if (choice.agent >= CONTEXTS_MAX) {
            if (do_flush(e, choice) < 0) {
                e->outcome = e->outcome == RUNNING ? FAILED : e->outcome;
                return NULL;
            }
            continue;
        }
        e->last_agent = choice.agent;
        e->contexts[choice.agent].last = (int32_t)e->depth - 1;
        e->way = choice.way;
        return &e->contexts[choice.agent];
    }
}

static int switch_to(PyObject *greenlet)
{
    PyObject *result = GREENLET_SWITCH(greenlet, NULL, NULL);
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

/* A scheduling point: come back when the search has chosen this context, or with ContextDied. */
int pv_stop(Engine *e, context_t *c, enum kind kind, int32_t cell, const char *site, uint32_t ways)
{
    c->op.kind = kind;
    c->op.cell = cell;
    c->op.site = site;
    c->op.ways = ways;
    c->waiting = true;
    e->unseen = 0;
    context_t *chosen = NULL;
    if (!e->starting)
        chosen = next(e);
    if (PyErr_Occurred())
        return -1;
    if (chosen != c) {
        e->running = chosen;
        if (switch_to(chosen != NULL ? chosen->greenlet : e->hub) < 0)
            return -1; /* the engine is going away */
        if (e->over || e->running != c) {
            PyErr_SetNone(pv_context_died);
            return -1;
        }
    }
    c->waiting = false;
    return 0;
}

/* What a context has ended with. */
static void finish(Engine *e, context_t *c)
{
    c->finished = true;
    c->waiting = false;
    if (!PyErr_Occurred())
        return;
    if (e->over || PyErr_ExceptionMatches(pv_context_died)) {
        PyErr_Clear();
        return;
    }
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback != NULL)
        PyException_SetTraceback(value, traceback);
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    Py_XDECREF(c->error);
    c->error = value;
    e->broken = true;
}

/* Who may die may do so before its first step, and where it touches nothing that others are known to share yet. */
static int begins(Engine *e, context_t *c)
{
    if (e->deaths_max == 0 || !(e->mortal >> pv_number(e, c) & 1))
        return 0;
    if (pv_stop(e, c, CHOOSE, -1, "begin", 1) < 0)
        return -1;
    pv_observe(c, PASSED);
    return 0;
}

/*
 * What the greenlet of a context does: one execution's part of it after the other.  Making a greenlet costs more than an
 * execution of 50 steps does, so they are kept.  The capsule, not a reference, leads to the engine: it outlives them.
 */
static PyObject *work(PyObject *capsule, PyObject *ignored)
{
    (void)ignored;
    context_t *c = PyCapsule_GetPointer(capsule, NULL);
    Engine *e = PyCapsule_GetContext(capsule);
    for (;;) {
        PyObject *result = begins(e, c) < 0 ? NULL : PyObject_CallNoArgs(c->body);
        Py_XDECREF(result);
        finish(e, c);
        context_t *chosen = e->over || e->starting ? NULL : next(e);
        e->running = chosen;
        if (switch_to(chosen != NULL ? chosen->greenlet : e->hub) < 0)
            return NULL; /* the engine is going away */
    }
}

static PyMethodDef work_definition = {"work", work, METH_NOARGS, NULL};

static PyObject *worker(Engine *e, context_t *c)
{
    PyObject *capsule = PyCapsule_New(c, NULL, NULL), *run = NULL, *greenlet = NULL;
    if (capsule != NULL && PyCapsule_SetContext(capsule, e) == 0)
        run = PyCFunction_New(&work_definition, capsule);
    if (run != NULL)
        greenlet = GREENLET_NEW(run, NULL);
    Py_XDECREF(run);
    Py_XDECREF(capsule);
    return greenlet;
}

/* Run a context until the hub is reached again: when all have started, or at the end of the execution. */
static void run(Engine *e, context_t *c)
{
    e->running = c;
    PyObject *result = GREENLET_SWITCH(c->greenlet, NULL, NULL);
    Py_XDECREF(result);
    e->running = NULL;
}

static int start(Engine *e, PyObject *starts)
{
    Py_ssize_t count = PyList_Size(starts);
    if (count < 1 || count > CONTEXTS_MAX) {
        PyErr_Format(PyExc_ValueError, "%zd contexts: 1 to %d", count, CONTEXTS_MAX);
        return -1;
    }
    e->context_count = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        context_t *c = &e->contexts[i];
        const char *name;
        PyObject *body;
        int server;
        if (!PyArg_ParseTuple(PyList_GetItem(starts, i), "sOp", &name, &body, &server))
            return -1;
        PyOS_snprintf(c->name, sizeof c->name, "%s", name);
        c->server = server;
        c->last = -1;
        c->finished = c->dead = c->waiting = c->marked = c->unfenced = false;
        c->buffered = c->epoch = c->stores = 0;
        c->floor = c->latest = c->own = (view_t){0};
        c->seen = pv_mix2((pair_t){1, 2}, (uint64_t)i);
        if (e->model == ARM)
            memset(c->coherent, 0, e->cell_room * sizeof *c->coherent);
        Py_CLEAR(c->error);
        if (c->buffer == NULL && (c->buffer = malloc(BUFFER_MAX * sizeof *c->buffer)) == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        if (c->greenlet == NULL && (c->greenlet = worker(e, c)) == NULL)
            return -1;
        c->body = Py_NewRef(body);
        e->context_count++;
    }
    return 0;
}

/* Run one execution; give its outcome.  The greenlets stay until clear(). */
PyObject *pv_execute(Engine *e, PyObject *starts)
{
    if (e->hub != NULL)
        return PyErr_Format(PyExc_RuntimeError, "an execution is under way");
    e->hub = GREENLET_CURRENT();
    e->starting = true;
    if (e->hub == NULL || start(e, starts) < 0)
        goto failed;
    for (uint32_t i = 0; i < e->context_count && !PyErr_Occurred(); i++)
        run(e, &e->contexts[i]);
    e->starting = false;
    context_t *first = PyErr_Occurred() ? NULL : next(e);
    if (first != NULL)
        run(e, first);
    if (PyErr_Occurred())
        goto failed;
    return PyLong_FromLong(e->outcome);
failed:
    pv_clear(e);
    return NULL;
}

/* Clear the stacks away, behind a closed gate. */
void pv_clear(Engine *e)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    e->over = true;
    e->running = NULL;
    e->starting = false;
    for (uint32_t i = 0; e->hub != NULL && i < e->context_count; i++) {
        context_t *c = &e->contexts[i];
        if (!c->finished && c->waiting)
            run(e, c); /* pv_stop raises ContextDied */
        PyErr_Clear();
        Py_CLEAR(c->body);
        Py_CLEAR(c->error); /* its traceback leads to the whole scenario */
    }
    e->context_count = 0;
    e->over = false;
    Py_CLEAR(e->hub);
    PyErr_Restore(type, value, traceback);
}
