/* SPDX-License-Identifier: Apache-2.0 */
/* Engine, the type: what verify/explorer/model.py and search.py see of all this. */
#include "engine.h"

int pv_engine_setup(Engine *e, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"model", "dropped", NULL};
    int model;
    PyObject *dropped;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iO!", names, &model, &PyTuple_Type, &dropped))
        return -1;
    if (model < SC || model > ARM || e->events != NULL) {
        PyErr_SetString(PyExc_ValueError, "a model is 0, 1 or 2, once");
        return -1;
    }
    e->model = (enum model)model;
    Py_ssize_t count = PyTuple_Size(dropped);
    e->dropped = calloc((size_t)count + 1, sizeof *e->dropped);
    e->dropped_seen = calloc((size_t)count + 1, sizeof *e->dropped_seen);
    e->events = calloc(STEPS_MAX + 2, sizeof *e->events);
    e->nodes = calloc(STEPS_MAX + 2, sizeof *e->nodes);
    e->taken = calloc(STEPS_MAX + 2, sizeof *e->taken);
    e->relation = calloc(1, sizeof *e->relation);
    e->sites = PyList_New(0);
    if (!e->dropped || !e->dropped_seen || !e->events || !e->nodes || !e->taken || !e->relation || !e->sites) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        const char *site = PyUnicode_AsUTF8AndSize(PyTuple_GetItem(dropped, i), NULL);
        if (site == NULL || (e->dropped[i] = malloc(strlen(site) + 1)) == NULL)
            return -1;
        memcpy(e->dropped[i], site, strlen(site) + 1);
        e->dropped_count++;
    }
    e->api = pv_access_table;
    e->api.engine = e;
    e->capsule = PyCapsule_New(&e->api, PV_MODEL_API, NULL);
    e->clock_cell = pv_cell(e, (uint64_t)3 << 62 | 0xFFFF0);
    e->preemptions_max = e->delay_max = -1;
    e->agent_count = LANES_FROM;
    for (int i = 0; i < LANES_FROM; i++)
        e->agent_context[i] = (uint8_t)(i % CONTEXTS_MAX);
    pv_forget_kinds(e);
    return e->capsule == NULL || e->clock_cell < 0 || pv_share(e, e->clock_cell) < 0 ? -1 : 0;
}

void pv_engine_teardown(Engine *e)
{
    pv_clear(e);
    for (uint32_t i = 0; i < e->dropped_count; i++)
        free(e->dropped[i]);
    for (uint32_t i = 0; i < e->cell_count; i++)
        free(e->cells[i].history);
    for (uint32_t i = 0; i < e->bells; i++) {
        for (uint32_t k = 0; k < e->boxes[i].count; k++)
            Py_CLEAR(e->boxes[i].items[k]);
        free(e->boxes[i].ids);
        free(e->boxes[i].items);
    }
    for (int i = 0; i < CONTEXTS_MAX; i++) {
        free(e->contexts[i].buffer);
        free(e->contexts[i].coherent);
        Py_CLEAR(e->contexts[i].error);
        Py_CLEAR(e->contexts[i].greenlet);
    }
    void *all[] = {e->dropped, e->dropped_seen, e->events, e->nodes, e->taken, e->relation, e->follow, e->cells, e->index, e->shared,
                   e->bell_cells, e->bell_names, e->boxes, e->widths, e->visited, e->summaries, e->summary_index};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        free(all[i]);
    Py_CLEAR(e->capsule);
    Py_CLEAR(e->trace);
    Py_CLEAR(e->sites);
    PyTypeObject *type = Py_TYPE((PyObject *)e);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(e);
    Py_DECREF(type);
}

/* ---- preparation ---- */

static PyObject *engine_name(Engine *e, PyObject *args)
{
    PyObject *memory;
    const char *name;
    if (!PyArg_ParseTuple(args, "Os", &memory, &name))
        return NULL;
    for (uint32_t i = e->memory_count; i-- > 0;) {
        if (e->memories[i].object != (const void *)memory)
            continue;
        PyOS_snprintf(e->memories[i].name, NAME_MAX_BYTES, "%s", name);
        Py_RETURN_NONE;
    }
    return PyErr_Format(PyExc_KeyError, "%s is the Memory of another model", name);
}

static PyObject *engine_bell(Engine *e, PyObject *arg)
{
    const char *name = PyUnicode_AsUTF8AndSize(arg, NULL);
    if (name == NULL)
        return NULL;
    uint32_t n = e->bells + 1;
    int32_t *cells = realloc(e->bell_cells, n * sizeof *cells);
    e->bell_cells = cells != NULL ? cells : e->bell_cells;
    void *names = realloc(e->bell_names, n * sizeof *e->bell_names);
    e->bell_names = names != NULL ? names : e->bell_names;
    box_t *boxes = realloc(e->boxes, n * sizeof *boxes);
    e->boxes = boxes != NULL ? boxes : e->boxes;
    if (cells == NULL || names == NULL || boxes == NULL)
        return PyErr_NoMemory();
    e->boxes[e->bells] = (box_t){0};
    PyOS_snprintf(e->bell_names[e->bells], NAME_MAX_BYTES, "%s", name);
    int32_t cell = pv_cell(e, (uint64_t)1 << 63 | e->bells);
    if (cell < 0 || pv_share(e, cell) < 0)
        return NULL;
    e->bell_cells[e->bells++] = cell;
    return PyLong_FromLong(-(long)e->bells);
}

static PyObject *engine_ticks(Engine *e, PyObject *args)
{
    unsigned int at_most;
    PyObject *steps;
    if (!PyArg_ParseTuple(args, "O!I", &PyTuple_Type, &steps, &at_most))
        return NULL;
    Py_ssize_t count = PyTuple_Size(steps);
    if (count < 1 || count > 8)
        return PyErr_Format(PyExc_ValueError, "%zd ticks: 1 to 8", count);
    for (Py_ssize_t i = 0; i < count; i++)
        e->ticks[i] = PyLong_AsUnsignedLongLong(PyTuple_GetItem(steps, i));
    if (PyErr_Occurred())
        return NULL;
    e->tick_count = (uint32_t)count;
    e->ticks_max = at_most;
    Py_RETURN_NONE;
}

static PyObject *engine_freeze(Engine *e, PyObject *ignored)
{
    (void)ignored;
    for (uint32_t i = 0; i < e->cell_count; i++)
        e->cells[i].initial = e->cells[i].value;
    e->frozen = true;
    Py_RETURN_NONE;
}

/* configure(strategy, after, steps_max, fair_from, deaths, preemptions, delay, hashing, reducing, sleeping) */
static PyObject *engine_configure(Engine *e, PyObject *args)
{
    int strategy, after, preemptions, delay, hashing, reducing, sleeping;
    unsigned int steps, fair, deaths;
    if (!PyArg_ParseTuple(args, "iiIIIiippp", &strategy, &after, &steps, &fair, &deaths, &preemptions, &delay, &hashing, &reducing,
                          &sleeping))
        return NULL;
    if (steps > STEPS_MAX || strategy < FOLLOW || strategy > PRIORITIES || after < AFTER_STOP || after > AFTER_RANDOM)
        return PyErr_Format(PyExc_ValueError, "%u steps (at most %d), strategy %d, after %d", steps, STEPS_MAX, strategy, after);
    e->strategy = (enum strategy)strategy;
    e->after = (enum after)after;
    e->steps_max = steps;
    e->fair_from = fair;
    e->deaths_max = deaths;
    e->preemptions_max = preemptions;
    e->delay_max = delay;
    e->hashing = hashing;
    e->reducing = reducing;
    e->sleeping = sleeping;
    pv_forget(e);
    Py_RETURN_NONE;
}

/* ---- executions ---- */

static PyObject *engine_execute(Engine *e, PyObject *starts)
{
    if (!e->frozen || !PyList_Check(starts))
        return PyErr_Format(PyExc_RuntimeError, "freeze() first, and give a list of contexts");
    return pv_execute(e, starts);
}

static PyObject *engine_reset(Engine *e, PyObject *ignored)
{
    (void)ignored;
    return pv_reset(e) < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *engine_clear(Engine *e, PyObject *ignored)
{
    (void)ignored;
    pv_clear(e);
    Py_RETURN_NONE;
}

static PyObject *engine_backtrack(Engine *e, PyObject *ignored)
{
    (void)ignored;
    bool more = pv_backtrack(e);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(more);
}

static PyObject *engine_forget(Engine *e, PyObject *ignored)
{
    (void)ignored;
    pv_forget(e);
    Py_RETURN_NONE;
}

/* seed(number, change_points): for the next execution by chance or by priorities */
static PyObject *engine_seed(Engine *e, PyObject *args)
{
    unsigned long long seed;
    unsigned int points, length;
    if (!PyArg_ParseTuple(args, "KII", &seed, &points, &length))
        return NULL;
    e->random = seed;
    e->change_count = points < 16 ? points : 16;
    for (int i = 0; i < LANES_FROM; i++)
        e->priority[i] = 64 + (uint32_t)(pv_draw(e) >> 34);
    for (uint32_t i = 0; i < e->change_count; i++) { /* sorted as they are drawn */
        uint32_t at = (uint32_t)(pv_draw(e) % (length ? length : 1)), k = i;
        for (; k > 0 && e->change_points[k - 1] > at; k--)
            e->change_points[k] = e->change_points[k - 1];
        e->change_points[k] = at;
    }
    Py_RETURN_NONE;
}

static PyObject *engine_set_follow(Engine *e, PyObject *list)
{
    Py_ssize_t count = PyList_Size(list);
    if (count < 0 || count > STEPS_MAX)
        return PyErr_Format(PyExc_ValueError, "a list of up to %d choices", STEPS_MAX);
    choice_t *follow = realloc(e->follow, ((size_t)count + 1) * sizeof *follow);
    if (follow == NULL)
        return PyErr_NoMemory();
    e->follow = follow;
    e->follow_count = (uint32_t)count;
    for (Py_ssize_t i = 0; i < count; i++) {
        unsigned int agent, way;
        int dies;
        if (!PyArg_ParseTuple(PyList_GetItem(list, i), "IIp", &agent, &way, &dies))
            return NULL;
        if (agent >= LANES_FROM || way >= 256)
            return PyErr_Format(PyExc_ValueError, "choice %zd: agent %u, way %u", i, agent, way);
        follow[i] = (choice_t){(uint8_t)agent, (uint8_t)way, dies};
    }
    Py_RETURN_NONE;
}

static PyObject *add_choice(PyObject *list, unsigned int agent, unsigned int way, bool dies)
{
    PyObject *choice = Py_BuildValue("(IIO)", agent, way, dies ? Py_True : Py_False);
    if (choice == NULL || PyList_Append(list, choice) < 0)
        Py_CLEAR(list);
    Py_XDECREF(choice);
    return list;
}

static PyObject *engine_taken(Engine *e, PyObject *ignored)
{
    (void)ignored;
    PyObject *list = PyList_New(0);
    for (uint32_t i = 0; list != NULL && i < e->depth; i++)
        list = add_choice(list, e->taken[i].agent, e->taken[i].way, e->taken[i].dies);
    return list;
}

static PyObject *engine_open(Engine *e, PyObject *ignored)
{
    (void)ignored;
    node_t n;
    pv_options(e, &n);
    PyObject *list = PyList_New(0);
    for (unsigned int agent = 0; agent < LANES_FROM; agent++)
        for (unsigned int way = 0; list != NULL && (n.steps >> agent & 1) && way < n.ways[agent]; way++)
            list = add_choice(list, agent, way, false);
    for (unsigned int agent = 0; agent < CONTEXTS_MAX; agent++)
        if (list != NULL && (n.dying >> agent & 1))
            list = add_choice(list, agent, 0, true);
    return list;
}

/* (name, what it is about to do, number of the operation or -1, server, dead, error or None) of each context */
static PyObject *engine_standing(Engine *e, PyObject *ignored)
{
    (void)ignored;
    PyObject *list = PyList_New(0);
    for (uint32_t i = 0; list != NULL && i < e->context_count; i++) {
        const context_t *c = &e->contexts[i];
        char said[4 * NAME_MAX_BYTES];
        pv_describe(e, c, said, sizeof said);
        PyObject *row = Py_BuildValue("(ssiOOOO)", c->name, said, c->waiting ? (int)c->op.kind : -1, c->finished ? Py_True : Py_False,
                                      c->server ? Py_True : Py_False, c->dead ? Py_True : Py_False, c->error ? c->error : Py_None);
        if (row == NULL || PyList_Append(list, row) < 0)
            Py_CLEAR(list);
        Py_XDECREF(row);
    }
    return list;
}

static PyObject *engine_value(Engine *e, PyObject *arg)
{
    long long bell = PyLong_AsLongLong(arg);
    int32_t cell = PyErr_Occurred() ? -1 : pv_bell_cell(e, bell);
    return cell < 0 ? NULL : PyLong_FromUnsignedLongLong(e->cells[cell].value);
}

static PyObject *engine_set_mortal(Engine *e, PyObject *arg)
{
    e->mortal = (uint32_t)PyLong_AsUnsignedLong(arg);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

static PyObject *engine_share(Engine *e, PyObject *arg)
{
    uint64_t key = PyLong_AsUnsignedLongLong(arg);
    if (PyErr_Occurred() || (int64_t)key < 0 || key >> 40 >= e->memory_count)
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "no location %llu", (unsigned long long)key);
    int32_t cell = pv_cell(e, key);
    return cell < 0 || pv_share(e, cell) < 0 ? NULL : Py_NewRef(Py_None);
}

#define NOARGS(name, doc) {#name, (PyCFunction)engine_##name, METH_NOARGS, doc}
#define ARGS(name, doc) {#name, (PyCFunction)engine_##name, METH_VARARGS, doc}
#define ONE(name, doc) {#name, (PyCFunction)engine_##name, METH_O, doc}
PyMethodDef pv_engine_methods[] = {
    ARGS(name, "name(memory, name): how traces call a Memory."),
    ONE(bell, "bell(name) -> number: make a doorbell, a counter of bytes."),
    {"_ticks", (PyCFunction)engine_ticks, METH_VARARGS, "_ticks(steps, at_most)"},
    NOARGS(freeze, "Keep what preparation has written as the state in which each execution begins."),
    ARGS(configure, "configure(strategy, after, steps, fair, deaths, preemptions, delay, hashing, reducing, sleeping)"),
    NOARGS(reset, "Everything as freeze() kept it; before the contexts of an execution are made."),
    ONE(execute, "execute([(name, callable, server)]) -> outcome"),
    NOARGS(clear, "Clear the stacks of the contexts away."),
    NOARGS(backtrack, "Go back to where something is left to be tried -> whether there is."),
    NOARGS(forget, "Forget all states and the path."),
    ARGS(seed, "seed(number, change points, length of an execution)"),
    ONE(set_follow, "set_follow([(agent, way, dies)])"),
    NOARGS(taken, "taken() -> [(agent, way, dies)]: the choices of this execution."),
    NOARGS(open, "open() -> [(agent, way, dies)]: what may be chosen now."),
    NOARGS(standing, "standing() -> [(name, description, operation, finished, server, dead, error)]"),
    ONE(value, "value(bell) -> what lies in a doorbell, lock (1 + owner) or mailbox."),
    ONE(set_mortal, "set_mortal(bits): the contexts that may die."),
    ONE(share, "share(location): make it a scheduling point from the beginning."),
    {NULL, NULL, 0, NULL},
};
