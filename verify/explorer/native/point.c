/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scheduling points beside memory: doorbells, choices, the clock, locks, the shadow heap, deaths, mailboxes.
 *
 * They stand for what the kernel or the C library orders.  Locks, mailboxes and heirs pass on what was done before; so do
 * doorbells on arm.  Under tso a doorbell is rung past a store that still waits in the buffer, which is more than x86 does.
 */
#include "engine.h"

static context_t *at_point(Engine *e)
{
    if (e->over) {
        PyErr_SetNone(pv_context_died);
        return NULL;
    }
    if (e->running == NULL)
        PyErr_SetString(PyExc_RuntimeError, "only a running context can do this");
    return e->running;
}

static int put(Engine *e, context_t *c, int32_t cell, uint64_t value)
{
    pv_publish(e, c, cell);
    return pv_set(e, cell, value);
}

static const char *text(PyObject *site, const char *otherwise)
{
    return site == NULL ? otherwise : PyUnicode_AsUTF8AndSize(site, NULL);
}

/* (bell, site) of a call */
static int32_t parse(Engine *e, PyObject *const *args, Py_ssize_t n, Py_ssize_t before, const char *otherwise, const char **site)
{
    if (n < 1 + before || n > 2 + before) {
        PyErr_Format(PyExc_TypeError, "takes %zd argument(s) and perhaps a site", 1 + before);
        return -1;
    }
    *site = text(n > 1 + before ? args[1 + before] : NULL, otherwise);
    long long bell = PyLong_AsLongLong(args[0]);
    if (*site == NULL || (bell == -1 && PyErr_Occurred()))
        return -1;
    return pv_bell_cell(e, bell);
}

static PyObject *point_ring(Engine *e, PyObject *const *args, Py_ssize_t n)
{
    const char *site;
    int32_t cell = parse(e, args, n, 0, "ring", &site);
    context_t *c = e->running;
    if (cell < 0)
        return NULL;
    if (c != NULL || e->over) {
        if (at_point(e) == NULL || pv_stop(e, c, RING, cell, site, 1) < 0)
            return NULL;
        pv_observe(c, PASSED);
        if (put(e, c, cell, e->cells[cell].value + 1) < 0)
            return NULL;
        pv_trace(e, c, "* ring %W", cell);
    } else if (pv_set(e, cell, e->cells[cell].value + 1) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

#define DOOR_BYTES_MAX 64 /* what one door_take swallows, as in user_file.c */

static PyObject *point_take(Engine *e, PyObject *const *args, Py_ssize_t n)
{
    const char *site;
    int32_t cell = parse(e, args, n, 0, "take", &site);
    context_t *c = e->running;
    if (cell < 0 || ((c != NULL || e->over) && (at_point(e) == NULL || pv_stop(e, c, TAKE, cell, site, 1) < 0)))
        return NULL;
    uint64_t taken = e->cells[cell].value < DOOR_BYTES_MAX ? e->cells[cell].value : DOOR_BYTES_MAX;
    if (c != NULL) {
        pv_synchronise(e, c, cell);
        pv_observe(c, taken);
        pv_trace(e, c, "* take %W = %llu", cell, (unsigned long long)taken);
    }
    if (taken != 0 && (c != NULL ? put(e, c, cell, e->cells[cell].value - taken) : pv_set(e, cell, e->cells[cell].value - taken)) < 0)
        return NULL;
    return PyLong_FromUnsignedLongLong(taken);
}

static PyObject *point_wait(Engine *e, PyObject *const *args, Py_ssize_t n)
{
    const char *site;
    int32_t cell = parse(e, args, n, 0, "wait", &site);
    context_t *c;
    if (cell < 0 || (c = at_point(e)) == NULL || pv_stop(e, c, WAIT, cell, site, 1) < 0)
        return NULL;
    pv_synchronise(e, c, cell);
    pv_observe(c, PASSED);
    pv_trace(e, c, "* woken by %W", cell);
    return PyLong_FromLong(1);
}

static PyObject *point_choose(Engine *e, PyObject *const *args, Py_ssize_t n)
{
    long ways = n > 0 ? PyLong_AsLong(args[0]) : 0;
    const char *site = text(n > 1 ? args[1] : NULL, "choose");
    context_t *c;
    if (PyErr_Occurred() || site == NULL)
        return NULL;
    if (n < 1 || n > 2 || ways < 1 || ways > WAYS_MAX)
        return PyErr_Format(PyExc_ValueError, "a choice among %ld: 1 to %d", ways, WAYS_MAX);
    if ((c = at_point(e)) == NULL || pv_stop(e, c, CHOOSE, -1, site, (uint32_t)ways) < 0)
        return NULL;
    pv_observe(c, e->way);
    pv_trace(e, c, "? %s = %d of %d", site, e->way, (int)ways);
    return PyLong_FromLong(e->way);
}

static PyObject *point_clock(Engine *e, PyObject *const *args, Py_ssize_t n)
{
    const char *site = text(n > 0 ? args[0] : NULL, "clock");
    context_t *c;
    if (site == NULL || (c = at_point(e)) == NULL || pv_stop(e, c, CLOCK, e->clock_cell, site, 1) < 0)
        return NULL;
    if (e->way) {
        e->ticked++;
        if (put(e, c, e->clock_cell, e->cells[e->clock_cell].value + e->ticks[e->way - 1]) < 0)
            return NULL;
    }
    uint64_t now = e->cells[e->clock_cell].value;
    pv_observe(c, now);
    pv_trace(e, c, "? %s = %llu ns", site, (unsigned long long)now);
    return PyLong_FromUnsignedLongLong(now);
}

static PyObject *point_acquire(Engine *e, PyObject *const *args, Py_ssize_t n)
{
    const char *site;
    int32_t cell = parse(e, args, n, 0, "lock", &site);
    context_t *c;
    char where[NAME_MAX_BYTES];
    if (cell < 0 || (c = at_point(e)) == NULL)
        return NULL;
    pv_where(e, cell, where, sizeof where);
    if (e->cells[cell].value == 1u + (unsigned)pv_number(e, c))
        return PyErr_Format(pv_lock_error, "%s takes %s a second time (%s)", c->name, where, site);
    if (pv_stop(e, c, LOCK, cell, site, 1) < 0)
        return NULL;
    pv_synchronise(e, c, cell);
    pv_observe(c, PASSED);
    pv_trace(e, c, "[ %s %W", site, cell);
    if (put(e, c, cell, 1u + (unsigned)pv_number(e, c)) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *point_release(Engine *e, PyObject *const *args, Py_ssize_t n)
{
    const char *site;
    int32_t cell = parse(e, args, n, 0, "unlock", &site);
    context_t *c;
    char where[NAME_MAX_BYTES];
    if (cell < 0 || (c = at_point(e)) == NULL)
        return NULL;
    pv_where(e, cell, where, sizeof where);
    if (e->cells[cell].value != 1u + (unsigned)pv_number(e, c))
        return PyErr_Format(pv_lock_error, "%s releases %s and does not hold it (%s)", c->name, where, site);
    if (pv_stop(e, c, UNLOCK, cell, site, 1) < 0)
        return NULL;
    pv_observe(c, PASSED);
    pv_trace(e, c, "] %s %W", site, cell);
    if (put(e, c, cell, 0) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *point_inherit(Engine *e, PyObject *const *args, Py_ssize_t n)
{
    const char *site;
    int32_t cell = parse(e, args, n, 0, "inherit", &site);
    context_t *c;
    if (cell < 0 || (c = at_point(e)) == NULL || pv_stop(e, c, INHERIT, cell, site, 1) < 0)
        return NULL;
    uint64_t owner = e->cells[cell].value;
    bool left = owner > 0 && (e->dead >> (owner - 1) & 1);
    pv_synchronise(e, c, cell);
    pv_observe(c, left);
    pv_trace(e, c, "[ %s %W %s", site, cell, left ? "from the dead" : "(not left)");
    if (left && put(e, c, cell, 1u + (unsigned)pv_number(e, c)) < 0)
        return NULL;
    return PyBool_FromLong(left);
}

/* ---- the shadow heap: whole Memory objects ---- */

static memory_t *find_memory(Engine *e, PyObject *object)
{
    for (uint32_t i = e->memory_count; i-- > 0;)
        if (e->memories[i].object == (const void *)object)
            return &e->memories[i];
    PyErr_SetString(PyExc_KeyError, "this Memory belongs to another model");
    return NULL;
}

/* From now on every location of this memory is a scheduling point. */
static int watch(Engine *e, memory_t *m)
{
    if (m->heap >= 0)
        return 0;
    uint64_t number = (uint64_t)(m - e->memories);
    int32_t heap = pv_cell(e, (uint64_t)1 << 63 | (uint64_t)1 << 62 | number << 4);
    if (heap < 0 || pv_share(e, heap) < 0)
        return -1;
    m->heap = heap;
    for (uint32_t i = 0; i < e->cell_count; i++) {
        if ((int64_t)e->cells[i].key < 0 || e->cells[i].key >> 40 != number)
            continue;
        e->cells[i].heap = heap;
        if (e->cells[i].touched && pv_share(e, (int32_t)i) < 0)
            return -1;
    }
    return 0;
}

static PyObject *point_heap(Engine *e, PyObject *object, const char *site, bool may_fail, enum kind kind)
{
    memory_t *m = find_memory(e, object);
    context_t *c = e->running;
    if (m == NULL || watch(e, m) < 0)
        return NULL;
    if (c == NULL && !e->over && kind == ALLOCATE)
        return pv_set(e, m->heap, 1) < 0 ? NULL : PyBool_FromLong(1);
    if (at_point(e) == NULL || pv_stop(e, c, kind, m->heap, site, 1u + may_fail) < 0)
        return NULL;
    pv_observe(c, e->way);
    bool live = e->cells[m->heap].value != 0, wanted = kind == FREE;
    pv_trace(e, c, "%s %s %s%s", kind == FREE ? "-" : "+", site, m->name, e->way ? " fails" : "");
    if (e->way)
        return PyBool_FromLong(0);
    if (live != wanted)
        return PyErr_Format(pv_use_after_free, "%s %s %s twice (%s)", c->name, kind == FREE ? "frees" : "allocates", m->name, site);
    return put(e, c, m->heap, kind == ALLOCATE) < 0 ? NULL : PyBool_FromLong(1);
}

static PyObject *point_allocate(Engine *e, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"memory", "site", "may_fail", NULL};
    PyObject *memory;
    const char *site = "allocate";
    int may_fail = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|s$p", names, &memory, &site, &may_fail))
        return NULL;
    return point_heap(e, memory, site, may_fail, ALLOCATE);
}

static PyObject *point_free(Engine *e, PyObject *args)
{
    PyObject *memory;
    const char *site = "free";
    if (!PyArg_ParseTuple(args, "O|s", &memory, &site))
        return NULL;
    PyObject *done = point_heap(e, memory, site, false, FREE);
    Py_XDECREF(done);
    return done == NULL ? NULL : Py_NewRef(Py_None);
}

/* ---- deaths and messages ---- */

static PyObject *point_await_death(Engine *e, PyObject *args)
{
    const char *name, *site = "await death";
    context_t *c;
    if (!PyArg_ParseTuple(args, "s|s", &name, &site) || (c = at_point(e)) == NULL)
        return NULL;
    uint32_t who = 0;
    while (who < e->context_count && strcmp(e->contexts[who].name, name) != 0)
        who++;
    if (who == e->context_count)
        return PyErr_Format(PyExc_ValueError, "no context '%s'", name);
    if (pv_stop(e, c, BURY, (int32_t)who, site, 1) < 0)
        return NULL;
    pv_observe(c, PASSED);
    pv_inherit_view(e, c, &e->contexts[who]);
    pv_trace(e, c, "* %s is dead", name);
    Py_RETURN_NONE;
}

static PyObject *point_post(Engine *e, PyObject *const *args, Py_ssize_t n)
{
    const char *site;
    int32_t cell = parse(e, args, n, 1, "post", &site);
    context_t *c;
    if (cell < 0 || (c = at_point(e)) == NULL || pv_stop(e, c, POST, cell, site, 1) < 0)
        return NULL;
    box_t *box = &e->boxes[-1 - PyLong_AsLongLong(args[0])];
    if (box->count == box->room) {
        uint32_t room = box->room ? 2 * box->room : 16;
        pair_t *ids = realloc(box->ids, room * sizeof *ids);
        PyObject **items = ids == NULL ? NULL : realloc(box->items, room * sizeof *items);
        box->ids = ids == NULL ? box->ids : ids;
        if (items == NULL)
            return PyErr_NoMemory();
        box->items = items;
        box->room = room;
    }
    pv_observe(c, PASSED);
    box->ids[box->count] = pv_mix2(c->seen, (uint64_t)pv_number(e, c));
    box->items[box->count++] = Py_NewRef(args[1]);
    pv_trace(e, c, "> %s %W: %R", site, cell, args[1]);
    if (put(e, c, cell, box->count) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *point_receive(Engine *e, PyObject *const *args, Py_ssize_t n)
{
    const char *site;
    int32_t cell = parse(e, args, n, 0, "receive", &site);
    context_t *c;
    if (cell < 0 || (c = at_point(e)) == NULL || pv_stop(e, c, RECEIVE, cell, site, 1) < 0)
        return NULL;
    box_t *box = &e->boxes[-1 - PyLong_AsLongLong(args[0])];
    PyObject *message = box->items[0];
    pv_observe(c, box->ids[0].a);
    box->count--;
    memmove(box->ids, box->ids + 1, box->count * sizeof *box->ids);
    memmove(box->items, box->items + 1, box->count * sizeof *box->items);
    pv_synchronise(e, c, cell);
    pv_trace(e, c, "< %s %W: %R", site, cell, message);
    if (put(e, c, cell, box->count) < 0) {
        Py_DECREF(message);
        return NULL;
    }
    return message;
}

/* The turn of a spin loop that a scenario has in Python: see m_spin. */
static PyObject *point_spin(Engine *e, PyObject *args)
{
    const char *site;
    if (!PyArg_ParseTuple(args, "s:spin", &site) || pv_access_table.spin(e, site) < 0)
        return NULL;
    Py_RETURN_NONE;
}

#define FAST(name, doc) {#name, (PyCFunction)(void (*)(void))point_##name, METH_FASTCALL, doc}
PyMethodDef pv_point_methods[] = {
    FAST(ring, "ring(bell, site): put a byte into a doorbell."),
    FAST(take, "take(bell, site) -> bytes: take what lies in a doorbell, without waiting."),
    FAST(wait, "wait(bell, site) -> 1: wait until a byte lies in a doorbell, and leave it there."),
    FAST(choose, "choose(ways, site) -> int: a number from 0 to ways - 1; the search tries each."),
    FAST(clock, "clock(site) -> ns: it stands still, or has moved on by one of the ticks; it never goes back."),
    FAST(acquire, "acquire(lock, site): wait until nobody holds a lock, and take it."),
    FAST(release, "release(lock, site): give a lock back."),
    FAST(inherit, "inherit(lock, site) -> bool: take a lock over if its owner is dead; never waits."),
    FAST(post, "post(box, message, site): put a message into a mailbox; never waits."),
    FAST(receive, "receive(box, site) -> message: wait for a message, and take it."),
    {"allocate", (PyCFunction)(void (*)(void))point_allocate, METH_VARARGS | METH_KEYWORDS,
     "allocate(memory, site, *, may_fail=False) -> bool: take a Memory from the shadow heap; in preparation, for every execution."},
    {"free", (PyCFunction)point_free, METH_VARARGS, "free(memory, site): give a Memory back to the shadow heap."},
    {"await_death", (PyCFunction)point_await_death, METH_VARARGS, "await_death(name, site): wait until a context has died."},
    {"spin", (PyCFunction)point_spin, METH_VARARGS, "spin(site): a turn of a loop that waits until something changes."},
    {NULL, NULL, 0, NULL},
};
