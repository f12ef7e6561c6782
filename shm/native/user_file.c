/* SPDX-License-Identifier: Apache-2.0 */
/*
 * UserFile, the type: one reference to an open event-channel file, with its access mode.  Arguments and errno live here; the
 * driver's calls are in user_path.c.
 */
#include "user.h"

#include <errno.h>
#include <poll.h>
#include <string.h>

#define PORTS_A_CALL 1024u                    /* a page (A4.2, A5.2) */

typedef struct {
    PyObject_HEAD
    ContextObject *context;
    int readable, writable, closed;
} FileObject;

static PyObject *failed(int64_t error)
{
    if (error == PV_DEAD)
        return NULL;
    errno = (int)-error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* Every call starts here: closed, wrong mode, forked since.  0, or -1 with the error set. */
static int enter(FileObject *f, int mode_ok)
{
    if (f->closed || !mode_ok) {
        errno = EBADF;
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    if (f->context->fork_generation != pv_fork_generation) {
        PyObject *r = f->context->on_fork == NULL ? PyErr_Format(PyExc_RuntimeError, "no fork hook")
                                                  : PyObject_CallFunctionObjArgs(f->context->on_fork, NULL);
        if (r == NULL)
            return -1;
        Py_DECREF(r);
    }
    return 0;
}

/* A call keeps the context alive; gives the fork generation, for leave. */
static uint32_t begin(ContextObject *c)
{
    Py_INCREF((PyObject *)c);
    c->inflight++;
    return pv_fork_generation;
}

/* The last to leave finishes a close that came meanwhile.  Not in a child that a signal handler forked: rebind counted anew. */
static int64_t leave(ContextObject *c, uint32_t generation, int64_t result)
{
    if (generation == pv_fork_generation && --c->inflight == 0 && c->closing && c->on_idle != NULL) {
        PyObject *type, *value, *traceback;
        PyErr_Fetch(&type, &value, &traceback);
        PyObject *r = PyObject_CallFunctionObjArgs(c->on_idle, NULL);
        if (r == NULL)
            PyErr_WriteUnraisable((PyObject *)c);
        Py_XDECREF(r);
        PyErr_Restore(type, value, traceback);
    }
    Py_DECREF((PyObject *)c);
    return result;
}

static int64_t blocking_read(FileObject *f, uint32_t *out, uint32_t max)
{
    ContextObject *c = f->context;
    uint32_t generation = begin(c);
    int64_t n = pv_file_read(c, out, max);
    if (n == -EINTR && PyErr_CheckSignals() < 0)
        n = PV_DEAD;
    return leave(c, generation, n);
}

/* Notify or enable: may wait for room, and lets other threads run meanwhile. */
static int64_t submit_all(ContextObject *c, const uint32_t *ports, size_t n, int64_t (*all)(ContextObject *, const uint32_t *, size_t))
{
    uint32_t generation = begin(c);
    return leave(c, generation, all(c, ports, n));
}

static PyObject *file_read_method(FileObject *f, PyObject *count)
{
    uint32_t ports[PORTS_A_CALL];
    Py_ssize_t n = PyLong_AsSsize_t(count);
    if (n == -1 && PyErr_Occurred())
        return NULL;
    if (n < 0)
        return PyErr_Format(PyExc_ValueError, "a read of %zd bytes", n);
    if (enter(f, f->readable) < 0)
        return NULL;
    uint32_t max = n / 4 > (Py_ssize_t)PORTS_A_CALL ? PORTS_A_CALL : (uint32_t)(n / 4);
    if (max == 0)
        return PyBytes_FromStringAndSize(NULL, 0);
    int64_t taken = blocking_read(f, ports, max);
    return taken < 0 ? failed(taken) : PyBytes_FromStringAndSize((char *)ports, (Py_ssize_t)taken * 4);
}

/* read(2) with the caller's own buffer.  One that cannot be written is the bad pointer. */
static PyObject *file_readinto(FileObject *f, PyObject *into)
{
    uint32_t ports[PORTS_A_CALL];
    Py_buffer view;
    if (enter(f, f->readable) < 0)
        return NULL;
    int good = PyObject_GetBuffer(into, &view, PyBUF_WRITABLE) == 0;
    if (!good) {
        if (!PyErr_ExceptionMatches(PyExc_BufferError))
            return NULL;
        PyErr_Clear();
        if (PyObject_GetBuffer(into, &view, PyBUF_SIMPLE) < 0)
            return NULL;
    }
    uint32_t max = view.len / 4 > (Py_ssize_t)PORTS_A_CALL ? PORTS_A_CALL : (uint32_t)(view.len / 4);
    int64_t taken = max == 0 ? 0 : blocking_read(f, good ? ports : NULL, max);
    if (taken > 0)
        memcpy(view.buf, ports, (size_t)taken * 4);
    PyBuffer_Release(&view);
    return taken < 0 ? failed(taken) : PyLong_FromLongLong(taken * 4);
}

static PyObject *file_read_ports(FileObject *f, PyObject *count)
{
    uint32_t ports[PORTS_A_CALL];
    Py_ssize_t max = PyLong_AsSsize_t(count);
    if (max == -1 && PyErr_Occurred())
        return NULL;
    if (enter(f, f->readable) < 0)
        return NULL;
    if (max <= 0)
        return PyList_New(0);
    int64_t taken = blocking_read(f, ports, max > (Py_ssize_t)PORTS_A_CALL ? PORTS_A_CALL : (uint32_t)max);
    if (taken < 0)
        return failed(taken);
    PyObject *list = PyList_New((Py_ssize_t)taken);
    for (int64_t i = 0; list != NULL && i < taken; i++) {
        PyObject *port = PyLong_FromUnsignedLong(ports[i]);
        if (port == NULL || PyList_SetItem(list, (Py_ssize_t)i, port) < 0)
            Py_CLEAR(list);
    }
    return list;
}

static PyObject *file_write(FileObject *f, PyObject *data)
{
    uint32_t ports[PORTS_A_CALL];
    Py_buffer view;
    if (enter(f, f->writable) < 0)
        return NULL;
    if (data == Py_None)
        return failed(-EFAULT); /* the bad pointer */
    if (PyObject_GetBuffer(data, &view, PyBUF_SIMPLE) < 0)
        return NULL;
    size_t n = (size_t)view.len / 4 > PORTS_A_CALL ? PORTS_A_CALL : (size_t)view.len / 4;
    memcpy(ports, view.buf, n * 4);
    PyBuffer_Release(&view);
    int64_t r = n == 0 ? 0 : submit_all(f->context, ports, n, pv_file_enable);
    return r < 0 ? failed(r) : PyLong_FromLongLong(r * 4);
}

static PyObject *file_notify(FileObject *f, PyObject *number)
{
    uint32_t port = (uint32_t)PyLong_AsUnsignedLongMask(number);
    if (port == (uint32_t)-1 && PyErr_Occurred())
        return NULL;
    if (enter(f, 1) < 0)
        return NULL;
    int64_t r = submit_all(f->context, &port, 1, pv_file_notify);
    if (r < 0)
        return failed(r);
    Py_RETURN_NONE;
}

/* A sequence of ints, or a buffer of native u32 (array("I"), what read() gave), into a fresh array. */
static uint32_t *ports_of(PyObject *source, size_t *n)
{
    uint32_t *ports;
    if (PyObject_CheckBuffer(source)) {
        Py_buffer view;
        if (PyObject_GetBuffer(source, &view, PyBUF_SIMPLE) < 0)
            return NULL;
        *n = (size_t)view.len / 4;
        ports = PyMem_Malloc(*n * 4 + 4);
        if (ports != NULL)
            memcpy(ports, view.buf, *n * 4);
        PyBuffer_Release(&view);
        return ports != NULL ? ports : (uint32_t *)PyErr_NoMemory();
    }
    Py_ssize_t size = PySequence_Size(source);
    if (size < 0)
        return NULL;
    ports = PyMem_Malloc((size_t)size * 4 + 4);
    if (ports == NULL)
        return (uint32_t *)PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < size; i++) {
        PyObject *item = PySequence_GetItem(source, i);
        ports[i] = item != NULL ? (uint32_t)PyLong_AsUnsignedLongMask(item) : 0;
        Py_XDECREF(item);
        if (PyErr_Occurred()) {
            PyMem_Free(ports);
            return NULL;
        }
    }
    *n = (size_t)size;
    return ports;
}

static PyObject *many(FileObject *f, PyObject *source, int mode_ok, int64_t (*all)(ContextObject *, const uint32_t *, size_t))
{
    size_t n = 0;
    if (enter(f, mode_ok) < 0)
        return NULL;
    uint32_t *ports = ports_of(source, &n);
    if (ports == NULL)
        return NULL;
    int64_t r = submit_all(f->context, ports, n, all);
    PyMem_Free(ports);
    return r < 0 ? failed(r) : PyLong_FromLongLong(r);
}

static PyObject *file_notify_many(FileObject *f, PyObject *ports) { return many(f, ports, 1, pv_file_notify); }
static PyObject *file_enable(FileObject *f, PyObject *ports) { return many(f, ports, f->writable, pv_file_enable); }

static PyObject *file_poll_method(FileObject *f, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"events", "timeout_ms", NULL};
    unsigned int events = POLLIN;
    PyObject *timeout = NULL;
    long long timeout_ms = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|IO", names, &events, &timeout) || enter(f, 1) < 0)
        return NULL;
    if (timeout != NULL)
        timeout_ms = timeout == Py_None ? -1 : PyLong_AsLongLong(timeout);
    if (PyErr_Occurred())
        return NULL;
    ContextObject *c = f->context;
    uint32_t generation = begin(c);
    int64_t mask = pv_file_poll(c, events, timeout_ms);
    if (mask == -EINTR && PyErr_CheckSignals() < 0)
        mask = PV_DEAD;
    mask = leave(c, generation, mask);
    return mask < 0 ? failed(mask) : PyLong_FromLongLong(mask);
}

static PyObject *file_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"context", "readable", "writable", NULL};
    PyObject *context;
    int readable = 1, writable = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!|pp", names, pv_context_type, &context, &readable, &writable))
        return NULL;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    FileObject *f = (FileObject *)alloc(type, 0);
    if (f == NULL)
        return NULL;
    Py_INCREF(context);
    f->context = (ContextObject *)context;
    f->readable = readable;
    f->writable = writable;
    return (PyObject *)f;
}

static void file_dealloc(FileObject *f)
{
    Py_CLEAR(f->context);
    PyTypeObject *type = Py_TYPE((PyObject *)f);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(f);
    Py_DECREF(type);
}

static PyObject *file_mark_closed(FileObject *f, PyObject *ignored)
{
    (void)ignored;
    f->closed = 1;
    Py_RETURN_NONE;
}

static PyObject *file_get_closed(FileObject *f, void *closure) { (void)closure; return PyBool_FromLong(f->closed); }
static PyObject *file_get_context(FileObject *f, void *closure)
{
    (void)closure;
    Py_INCREF((PyObject *)f->context);
    return (PyObject *)f->context;
}

static PyMethodDef file_methods[] = {
    {"read", (PyCFunction)file_read_method, METH_O, "read(count) -> bytes: ports, u32 each.  Mirrors evtchn_read.  EAGAIN, EFBIG, EBADF, EINTR, EIO."},
    {"readinto", (PyCFunction)file_readinto, METH_O,
     "readinto(buffer) -> bytes read.  As read; EFAULT, and nothing is taken, for a buffer that cannot be written."},
    {"read_ports", (PyCFunction)file_read_ports, METH_O, "read_ports(max) -> list of ports: the batch form of read."},
    {"write", (PyCFunction)file_write, METH_O, "write(ports as u32 bytes) -> bytes taken: write ports back.  Mirrors evtchn_write."},
    {"enable", (PyCFunction)file_enable, METH_O, "enable(ports) -> how many: write back a sequence of ints, or a buffer of u32, of any length."},
    {"notify", (PyCFunction)file_notify, METH_O, "notify(port).  Mirrors IOCTL_EVTCHN_NOTIFY; ENOTCONN if the port is not this file's."},
    {"notify_many", (PyCFunction)file_notify_many, METH_O, "notify_many(ports) -> how many; ENOTCONN before any is sent if one is not this file's."},
    {"poll", (PyCFunction)(void (*)(void))file_poll_method, METH_VARARGS | METH_KEYWORDS,
     "poll(events=POLLIN, timeout_ms=0) -> mask, 0 at the time-out; None waits without limit.  Mirrors evtchn_poll."},
    {"_mark_closed", (PyCFunction)file_mark_closed, METH_NOARGS, "This reference answers EBADF from now on."},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef file_getset[] = {
    {"closed", (getter)file_get_closed, NULL, "True after close().", NULL},
    {"context", (getter)file_get_context, NULL, "What all references of this process share.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot file_slots[] = {
    {Py_tp_new, file_new},
    {Py_tp_dealloc, file_dealloc},
    {Py_tp_methods, file_methods},
    {Py_tp_getset, file_getset},
    {Py_tp_doc, "UserFile(context, readable=True, writable=True): one reference to an open event-channel file."},
    {0, NULL},
};
static PyType_Spec file_spec = {"pvbus.shm._core.UserFile", sizeof(FileObject), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, file_slots};

int pv_user_file_init(PyObject *module)
{
    PyObject *file_type = pv_context_init(module) < 0 ? NULL : PyType_FromSpec(&file_spec);
    if (file_type == NULL)
        return -1;
    int r = PyModule_AddObjectRef(module, "UserFile", file_type);
    Py_DECREF(file_type);
    return r;
}
