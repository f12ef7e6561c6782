/* SPDX-License-Identifier: Apache-2.0 */
/* The module pvbus.verify.explorer._engine: the type Engine, its exceptions, and where greenlet is found. */
#include "engine.h"

PyObject *pv_context_died, *pv_use_after_free, *pv_lock_error, *pv_width_error, *pv_limit_error;
void **pv_greenlet;

static PyObject *get_native(Engine *e, void *closure)
{
    (void)closure;
    return Py_NewRef(e->capsule);
}

static PyObject *get_steps(Engine *e, void *closure)
{
    (void)closure;
    return PyLong_FromUnsignedLongLong(e->steps);
}

static PyObject *get_states(Engine *e, void *closure)
{
    (void)closure;
    return PyLong_FromUnsignedLongLong(e->visited_count);
}

/* What is left of a depth-first search, as far as it is known: choices along the path that are wanted and not done. */
static PyObject *get_waiting(Engine *e, void *closure)
{
    (void)closure;
    unsigned long long waiting = 0;
    for (uint32_t i = 0; i < e->node_count; i++) {
        const node_t *n = &e->nodes[i];
        waiting += (unsigned)pv_count(n->wanted & ~n->done & ~n->asleep & ~pv_bit(n->now.agent));
    }
    return PyLong_FromUnsignedLongLong(waiting);
}

static PyObject *get_depth(Engine *e, void *closure)
{
    (void)closure;
    return PyLong_FromUnsignedLong(e->depth);
}

static PyObject *get_alone(Engine *e, void *closure)
{
    (void)closure;
    return PyLong_FromUnsignedLong(e->alone);
}

static PyObject *get_grown(Engine *e, void *closure)
{
    (void)closure;
    return PyBool_FromLong(e->grown || e->relation->grown);
}

static PyObject *get_cut(Engine *e, void *closure)
{
    (void)closure;
    return PyBool_FromLong(e->cut);
}

static PyObject *get_reducing(Engine *e, void *closure)
{
    (void)closure;
    return PyBool_FromLong(e->reducing);
}

static PyObject *get_trace(Engine *e, void *closure)
{
    (void)closure;
    return Py_NewRef(e->trace != NULL ? e->trace : Py_None);
}

static int set_trace(Engine *e, PyObject *value, void *closure)
{
    (void)closure;
    if (value == NULL || (value != Py_None && !PyList_Check(value))) {
        PyErr_SetString(PyExc_TypeError, "a trace is a list, or None");
        return -1;
    }
    PyObject *old = e->trace;
    e->trace = value == Py_None ? NULL : Py_NewRef(value);
    Py_XDECREF(old);
    return 0;
}

static PyObject *get_shared(Engine *e, void *closure)
{
    (void)closure;
    PyObject *list = PyList_New(0);
    for (uint32_t i = 0; list != NULL && i < e->shared_count; i++) {
        if ((int64_t)e->cells[e->shared[i]].key < 0)
            continue;
        PyObject *key = PyLong_FromUnsignedLongLong(e->cells[e->shared[i]].key);
        if (key == NULL || PyList_Append(list, key) < 0)
            Py_CLEAR(list);
        Py_XDECREF(key);
    }
    return list;
}

static PyObject *get_dropped_seen(Engine *e, void *closure)
{
    (void)closure;
    PyObject *list = PyList_New(0);
    for (uint32_t i = 0; list != NULL && i < e->dropped_count; i++) {
        PyObject *site = e->dropped_seen[i] ? PyUnicode_FromString(e->dropped[i]) : NULL;
        if (e->dropped_seen[i] && (site == NULL || PyList_Append(list, site) < 0))
            Py_CLEAR(list);
        Py_XDECREF(site);
    }
    return list;
}

static PyGetSetDef getset[] = {
    {"native", (getter)get_native, NULL, "How the explored core calls it.", NULL},
    {"steps", (getter)get_steps, NULL, "Scheduling steps so far.", NULL},
    {"states", (getter)get_states, NULL, "States in the table.", NULL},
    {"depth", (getter)get_depth, NULL, "Events of this execution.", NULL},
    {"waiting", (getter)get_waiting, NULL, "Choices on the path that are left to be tried.", NULL},
    {"alone", (getter)get_alone, NULL, "Steps that the last context has gone with nobody else able to.", NULL},
    {"grown", (getter)get_grown, NULL, "A location turned out to be shared during this execution: its result does not count.", NULL},
    {"cut", (getter)get_cut, NULL, "The end of this execution was not searched.", NULL},
    {"reducing", (getter)get_reducing, NULL, "Partial order reduction is on.", NULL},
    {"trace", (getter)get_trace, (setter)set_trace, "A list that gets (context, what it did), or None.", NULL},
    {"shared", (getter)get_shared, NULL, "The locations that are scheduling points.", NULL},
    {"sites_dropped", (getter)get_dropped_seen, NULL, "Those of the dropped sites that a context came by.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef all_methods[64];

static PyType_Slot slots[] = {
    {Py_tp_init, pv_engine_setup},
    {Py_tp_dealloc, pv_engine_teardown},
    {Py_tp_methods, all_methods},
    {Py_tp_getset, getset},
    {Py_tp_doc, "Engine(model, dropped): a memory model, the contexts over it, and the search."},
    {0, NULL},
};
static PyType_Spec spec = {"pvbus.verify.explorer._engine.Engine", sizeof(Engine), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, slots};

static PyMethodDef none[] = {{NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_engine", "The explorer's engine.", -1, none, NULL, NULL, NULL, NULL};

static int add_exception(PyObject *module, PyObject **where, const char *name, PyObject *base, const char *doc)
{
    char full[96];
    PyOS_snprintf(full, sizeof full, "pvbus.verify.explorer.%s", name);
    *where = PyErr_NewExceptionWithDoc(full, doc, base, NULL);
    return *where == NULL ? -1 : PyModule_AddObjectRef(module, name, *where);
}

PyMODINIT_FUNC PyInit__engine(void)
{
    size_t n = 0;
    for (const PyMethodDef *m = pv_engine_methods; m->ml_name != NULL; m++)
        all_methods[n++] = *m;
    for (const PyMethodDef *m = pv_point_methods; m->ml_name != NULL; m++)
        all_methods[n++] = *m;
    PyObject *greenlet = PyImport_ImportModule("greenlet");
    if (greenlet == NULL)
        return NULL;
    Py_DECREF(greenlet);
    pv_greenlet = PyCapsule_Import("greenlet._C_API", 0);
    PyObject *module = pv_greenlet != NULL ? PyModule_Create(&definition) : NULL;
    if (module == NULL)
        return NULL;
    PyObject *type = PyType_FromSpec(&spec);
    if (type == NULL || PyModule_AddObjectRef(module, "Engine", type) < 0 ||
        add_exception(module, &pv_context_died, "ContextDied", PyExc_BaseException,
                      "Raised in a context that is dead or whose execution is over, at each access.") < 0 ||
        add_exception(module, &pv_use_after_free, "UseAfterFree", PyExc_AssertionError,
                      "An access to memory of the shadow heap that is not allocated.") < 0 ||
        add_exception(module, &pv_lock_error, "LockError", PyExc_AssertionError,
                      "A lock released by somebody who does not hold it, or taken twice.") < 0 ||
        add_exception(module, &pv_width_error, "WidthError", PyExc_AssertionError,
                      "Accesses of two widths to the same eight bytes, which no model here covers.") < 0 ||
        add_exception(module, &pv_limit_error, "LimitError", PyExc_ValueError,
                      "More than the engine has room for; it says nothing about the code under test.") < 0)
        Py_CLEAR(module);
    Py_XDECREF(type);
    return module;
}
