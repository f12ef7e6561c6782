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
#define SEGMENTS_MAX 1024                     /* IOV_MAX */

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
        failed(-EBADF);
        return -1;
    }
    if (f->context->fork_generation != pv_fork_generation) {
        PyObject *hook = Py_XNewRef(f->context->on_fork);
        PyObject *r = hook == NULL ? PyErr_Format(PyExc_RuntimeError, "no fork hook") : PyObject_CallFunctionObjArgs(hook, NULL);
        Py_XDECREF(hook);
        if (r == NULL)
            return -1;
        Py_DECREF(r);
    }
    return 0;
}

/*
 * A call keeps the context alive and its file open; gives the fork generation, for leave.  Whether the reference is still open
 * is looked at again: since `enter`, the fork hook or the caller's sequence may have let another thread close it.
 */
static int begin(FileObject *f, uint32_t *generation)
{
    if (f->closed)
        return -1;
    Py_INCREF((PyObject *)f->context);
    f->context->inflight++;
    *generation = pv_fork_generation;
    return 0;
}

/* The last to leave finishes a close that came meanwhile.  Not in a child that a signal handler forked: rebind counted anew. */
static int64_t leave(ContextObject *c, uint32_t generation, int64_t result)
{
    if (generation == pv_fork_generation && --c->inflight == 0 && c->closing && c->on_idle != NULL) {
        c->closing = 0;
        PyObject *type, *value, *traceback;
        PyErr_Fetch(&type, &value, &traceback);
        PyObject *hook = Py_NewRef(c->on_idle); /* which takes itself back */
        PyObject *r = PyObject_CallFunctionObjArgs(hook, NULL);
        if (r == NULL)
            PyErr_WriteUnraisable((PyObject *)c);
        Py_XDECREF(r);
        Py_DECREF(hook);
        PyErr_Restore(type, value, traceback);
    }
    Py_DECREF((PyObject *)c);
    return result;
}

static int64_t blocking_read(FileObject *f, uint32_t *out, uint32_t max)
{
    ContextObject *c = f->context;
    uint32_t generation;
    if (begin(f, &generation) < 0)
        return -EBADF;
    int64_t n = pv_file_read(c, out, max);
    if (n == -EINTR && PyErr_CheckSignals() < 0)
        n = PV_DEAD;
    return leave(c, generation, n);
}

/* Notify or enable: may wait for room, and lets other threads run meanwhile. */
static int64_t submit_all(FileObject *f, const uint32_t *ports, size_t n, int64_t (*all)(ContextObject *, const uint32_t *, size_t))
{
    ContextObject *c = f->context;
    uint32_t generation;
    if (begin(f, &generation) < 0)
        return -EBADF;
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

/* The caller's own buffer, for the driver to read into or to write from.  A bad pointer has a length, and faults. */
typedef struct {
    Py_buffer view; /* all zero: None, the bad pointer of a write */
    int bad;
} Segment;

/* For a read, a buffer that cannot be written is the bad pointer.  -1 with the error set for what is no buffer. */
static int segment_into(PyObject *into, Segment *s)
{
    s->bad = PyObject_GetBuffer(into, &s->view, PyBUF_WRITABLE) < 0;
    if (!s->bad)
        return 0;
    if (!PyErr_ExceptionMatches(PyExc_BufferError))
        return -1;
    PyErr_Clear();
    return PyObject_GetBuffer(into, &s->view, PyBUF_SIMPLE);
}

static int segment_from(PyObject *data, Segment *s)
{
    s->bad = data == Py_None;
    return s->bad ? 0 : PyObject_GetBuffer(data, &s->view, PyBUF_SIMPLE);
}

static size_t ports_in(const Segment *s)
{
    return (size_t)s->view.len / 4 > PORTS_A_CALL ? PORTS_A_CALL : (size_t)s->view.len / 4;
}

/* read(2) with the caller's own buffer. */
static PyObject *file_readinto(FileObject *f, PyObject *into)
{
    uint32_t ports[PORTS_A_CALL];
    Segment s = {0};
    if (enter(f, f->readable) < 0 || segment_into(into, &s) < 0)
        return NULL;
    uint32_t max = (uint32_t)ports_in(&s);
    int64_t taken = max == 0 ? 0 : blocking_read(f, s.bad ? NULL : ports, max);
    if (taken > 0)
        memcpy(s.view.buf, ports, (size_t)taken * 4);
    PyBuffer_Release(&s.view);
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
    Segment s = {0};
    if (enter(f, f->writable) < 0)
        return NULL;
    if (PyBytes_CheckExact(data)) { /* what read gave: copied below, so no need of a view; a sixth less for the call */
        s.view.buf = PyBytes_AsString(data);
        s.view.len = PyBytes_Size(data);
    } else if (segment_from(data, &s) < 0) {
        return NULL;
    }
    if (s.bad)
        return failed(-EFAULT);
    size_t n = ports_in(&s);
    memcpy(ports, s.view.buf, n * 4);
    PyBuffer_Release(&s.view);
    int64_t r = n == 0 ? 0 : submit_all(f, ports, n, pv_file_enable);
    return r < 0 ? failed(r) : PyLong_FromLongLong(r * 4);
}

static PyObject *file_notify(FileObject *f, PyObject *number)
{
    uint32_t port = (uint32_t)PyLong_AsUnsignedLongMask(number);
    if (port == (uint32_t)-1 && PyErr_Occurred())
        return NULL;
    if (enter(f, 1) < 0)
        return NULL;
    int64_t r = submit_all(f, &port, 1, pv_file_notify);
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
    int64_t r = submit_all(f, ports, n, all);
    PyMem_Free(ports);
    return r < 0 ? failed(r) : PyLong_FromLongLong(r);
}

static PyObject *file_notify_many(FileObject *f, PyObject *ports) { return many(f, ports, 1, pv_file_notify); }
static PyObject *file_enable(FileObject *f, PyObject *ports) { return many(f, ports, f->writable, pv_file_enable); }

/* One driver call of readv or writev: the bytes done, or -errno. */
static int64_t read_segment(ContextObject *c, const Segment *s)
{
    uint32_t ports[PORTS_A_CALL];
    uint32_t max = (uint32_t)ports_in(s);
    int64_t taken = max == 0 ? 0 : pv_file_read(c, s->bad ? NULL : ports, max);
    if (taken > 0)
        memcpy(s->view.buf, ports, (size_t)taken * 4);
    return taken < 0 ? taken : taken * 4;
}

static int64_t write_segment(ContextObject *c, const Segment *s)
{
    uint32_t ports[PORTS_A_CALL];
    size_t n = ports_in(s);
    if (s->bad)
        return -EFAULT;
    memcpy(ports, s->view.buf, n * 4);
    int64_t done = n == 0 ? 0 : pv_file_enable(c, ports, n);
    return done < 0 ? done : done * 4;
}

/* A call a segment: the first short one ends it, and after some success an error is only the end (A12.3). */
static int64_t all_segments(FileObject *f, const Segment *segments, Py_ssize_t n, int64_t (*one)(ContextObject *, const Segment *))
{
    ContextObject *c = f->context;
    uint32_t generation;
    int64_t total = 0, done = 0;
    if (begin(f, &generation) < 0)
        return -EBADF;
    for (Py_ssize_t i = 0; i < n; i++) {
        done = one(c, &segments[i]);
        if (done > 0)
            total += done;
        if (done != segments[i].view.len)
            break;
    }
    if (done == -EINTR && total == 0 && PyErr_CheckSignals() < 0)
        done = PV_DEAD;
    return leave(c, generation, done == PV_DEAD || (done < 0 && total == 0) ? done : total);
}

static PyObject *vectored(FileObject *f, PyObject *buffers, int mode_ok, int (*take)(PyObject *, Segment *),
                          int64_t (*one)(ContextObject *, const Segment *))
{
    if (enter(f, mode_ok) < 0)
        return NULL;
    Py_ssize_t held = 0, n = PySequence_Size(buffers);
    if (n < 0)
        return NULL;
    if (n > SEGMENTS_MAX)
        return failed(-EINVAL);
    Segment *segments = PyMem_Calloc((size_t)n + 1, sizeof *segments);
    if (segments == NULL)
        return PyErr_NoMemory();
    for (int r = 0; held < n && r == 0; held += r == 0) {
        PyObject *item = PySequence_GetItem(buffers, held);
        r = item == NULL ? -1 : take(item, &segments[held]);
        Py_XDECREF(item);
    }
    int64_t total = held < n ? PV_DEAD : all_segments(f, segments, n, one);
    while (held > 0)
        PyBuffer_Release(&segments[--held].view);
    PyMem_Free(segments);
    return total < 0 ? failed(total) : PyLong_FromLongLong(total);
}

static PyObject *file_readv(FileObject *f, PyObject *buffers) { return vectored(f, buffers, f->readable, segment_into, read_segment); }
static PyObject *file_writev(FileObject *f, PyObject *buffers) { return vectored(f, buffers, f->writable, segment_from, write_segment); }

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
    uint32_t generation;
    if (begin(f, &generation) < 0)
        return failed(-EBADF);
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
    int first = !f->closed;
    f->closed = 1;
    return PyBool_FromLong(first);
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
    {"readv", (PyCFunction)file_readv, METH_O,
     "readv(buffers) -> bytes: a driver's read a buffer, until one is not filled; an error after some success is a short count."},
    {"writev", (PyCFunction)file_writev, METH_O, "writev(buffers) -> bytes: a driver's write a buffer, until one is short."},
    {"enable", (PyCFunction)file_enable, METH_O, "enable(ports) -> how many: write back a sequence of ints, or a buffer of u32, of any length."},
    {"notify", (PyCFunction)file_notify, METH_O, "notify(port).  Mirrors IOCTL_EVTCHN_NOTIFY; ENOTCONN if the port is not this file's."},
    {"notify_many", (PyCFunction)file_notify_many, METH_O, "notify_many(ports) -> how many; ENOTCONN before any is sent if one is not this file's."},
    {"poll", (PyCFunction)(void (*)(void))file_poll_method, METH_VARARGS | METH_KEYWORDS,
     "poll(events=POLLIN, timeout_ms=0) -> mask, 0 at the time-out; None waits without limit.  Mirrors evtchn_poll."},
    {"_mark_closed", (PyCFunction)file_mark_closed, METH_NOARGS, "This reference answers EBADF from now on; gives whether it was open."},
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
