/* SPDX-License-Identifier: Apache-2.0 */
/* Context, the type: what all references of one process share of an open file, and what a fork does to it. */
#include "user.h"

#ifndef PVBUS_EXPLORED
#include <pthread.h>
#endif

PyTypeObject *pv_context_type;
uint32_t pv_fork_generation;

#ifndef PVBUS_EXPLORED
static void after_fork_in_child(void) { pv_fork_generation++; }
#endif

static PyObject *context_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"page", "ring", "public_page", "door", "kick", "tail", "ports_max", NULL};
    PyObject *page, *ring, *public_page;
    int door, kick;
    unsigned int tail, ports_max;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOiiII", names, &page, &ring, &public_page, &door, &kick, &tail, &ports_max))
        return NULL;
    if (pv_memory_check(page, PV_PAGE_RING, "a file page") < 0 || pv_memory_check(ring, PV_SUBMISSION_BYTES, "a submission ring") < 0 ||
        pv_memory_check_readable(public_page, 4096, "the public page") < 0)
        return NULL;
    if (ports_max > 131072u)
        return PyErr_Format(PyExc_ValueError, "%u ports", ports_max);
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    ContextObject *c = (ContextObject *)alloc(type, 0);
    if (c == NULL)
        return NULL;
    Py_INCREF(page);
    Py_INCREF(ring);
    Py_INCREF(public_page);
    c->page = (MemoryObject *)page;
    c->ring = (MemoryObject *)ring;
    c->public_page = (MemoryObject *)public_page;
    c->door = door;
    c->kick = kick;
    c->tail = tail;
    c->head = tail;
    c->rung = 0;
    c->ports_max = ports_max;
#ifndef PVBUS_EXPLORED
    pv_spin_init(&c->spinner, PV_SPIN_SCORE_MAX);
#endif
    c->fork_generation = pv_fork_generation;
    return (PyObject *)c;
}

/* A forked child got its own submission ring: entries of the parent's are the parent's. */
static PyObject *context_rebind(ContextObject *c, PyObject *args)
{
    PyObject *ring;
    int kick;
    unsigned int tail;
    if (!PyArg_ParseTuple(args, "OiI", &ring, &kick, &tail) || pv_memory_check(ring, PV_SUBMISSION_BYTES, "a submission ring") < 0)
        return NULL;
    Py_INCREF(ring);
    Py_DECREF((PyObject *)c->ring);
    c->ring = (MemoryObject *)ring;
    c->kick = kick;
    c->tail = tail;
    c->head = tail;
    c->rung = c->core = 0;
    c->inflight = 0;
    c->fork_generation = pv_fork_generation;
    Py_RETURN_NONE;
}

static PyObject *context_drain_door(ContextObject *c, PyObject *ignored)
{
    (void)ignored;
    if (pv_file_drain_door(c) == PV_DEAD)
        return NULL;
    Py_RETURN_NONE;
}

static void context_dealloc(ContextObject *c)
{
    Py_CLEAR(c->page);
    Py_CLEAR(c->ring);
    Py_CLEAR(c->public_page);
    Py_CLEAR(c->on_idle);
    Py_CLEAR(c->on_fork);
    PyTypeObject *type = Py_TYPE((PyObject *)c);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(c);
    Py_DECREF(type);
}

static PyObject *context_hooks(ContextObject *c, PyObject *args)
{
    PyObject *idle, *forked;
    if (!PyArg_ParseTuple(args, "OO", &idle, &forked))
        return NULL;
    PyObject *old_idle = c->on_idle, *old_forked = c->on_fork;
    c->on_idle = idle == Py_None ? NULL : Py_NewRef(idle);
    c->on_fork = forked == Py_None ? NULL : Py_NewRef(forked);
    Py_XDECREF(old_idle);
    Py_XDECREF(old_forked);
    Py_RETURN_NONE;
}

/* In a forked child the threads that were in a call are not there. */
static PyObject *context_get_inflight(ContextObject *c, void *closure)
{
    (void)closure;
    return PyLong_FromLong(c->fork_generation == pv_fork_generation ? c->inflight : 0);
}

/* One step, so that a call cannot leave between the look and the request.  In a forked child the callers are not there. */
static PyObject *context_await_idle(ContextObject *c, PyObject *ignored)
{
    (void)ignored;
    c->closing = c->fork_generation == pv_fork_generation && c->inflight > 0;
    return PyBool_FromLong(c->closing);
}

static PyObject *context_get_stale(ContextObject *c, void *closure)
{
    (void)closure;
    return PyBool_FromLong(c->fork_generation != pv_fork_generation);
}

static PyMethodDef context_methods[] = {
    {"rebind", (PyCFunction)context_rebind, METH_VARARGS, "rebind(ring, kick, tail): a forked child's own submission ring."},
    {"await_idle", (PyCFunction)context_await_idle, METH_NOARGS, "await_idle() -> whether a call is under way: then on_idle is called when the last one leaves."},
    {"set_hooks", (PyCFunction)context_hooks, METH_VARARGS, "set_hooks(on_idle, on_fork): None for none; they are a cycle that nobody collects, so a close takes them back."},
    {"drain_door", (PyCFunction)context_drain_door, METH_NOARGS, "Take the byte out of the doorbell if the ring is empty (after a RESET)."},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef context_getset[] = {
    {"inflight", (getter)context_get_inflight, NULL, "Calls that are blocked right now.", NULL},
    {"stale", (getter)context_get_stale, NULL, "True in a forked child that has not got its own submission ring.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot context_slots[] = {
    {Py_tp_new, context_new},
    {Py_tp_dealloc, context_dealloc},
    {Py_tp_methods, context_methods},
    {Py_tp_getset, context_getset},
    {Py_tp_doc, "Context(page, ring, public_page, door, kick, tail, ports_max): what one process shares of an open file."},
    {0, NULL},
};
static PyType_Spec context_spec = {"pvbus.shm._core.Context", sizeof(ContextObject), 0, Py_TPFLAGS_DEFAULT, context_slots};


int pv_context_init(PyObject *module)
{
    pv_context_type = (PyTypeObject *)PyType_FromSpec(&context_spec);
    if (pv_context_type == NULL)
        return -1;
#ifndef PVBUS_EXPLORED
    if (pthread_atfork(NULL, NULL, after_fork_in_child) != 0)
        return -1;
#endif
    return PyModule_AddObjectRef(module, "Context", (PyObject *)pv_context_type);
}
