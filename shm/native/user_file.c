/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The user's side of an open event-channel file: read, write, poll and notify without a message.  A Context is what all
 * references of one process share (page, submission ring, doorbell); a UserFile is one reference (access mode, open or closed).
 *
 * The doorbell is one end of a socketpair.  Whoever finds the ring empty takes the byte, lowers the door, looks again; if
 * entries came in between and are left unread, the machine is asked for a new byte (SUB_REARM).
 */
#include "core.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#ifndef PVBUS_EXPLORED
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#endif

#define PORTS_A_CALL 1024u                    /* a page (A4.2, A5.2) */
#define SPIN_NS 20000u                        /* a blocked wake costs 13-15 us: spin about that long, if it has paid lately */
#define SCORE_MAX 16
#define PUSHBACK_NS_MAX 10000000000ull        /* a hypervisor that takes nothing for ten seconds is gone */

typedef struct {
    PyObject_HEAD
    MemoryObject *page, *ring, *public_page;
    int door, kick;
    uint32_t tail, head, rung, ports_max, fork_generation;
    int score, probe;
    int inflight;       /* blocked calls: the last one to leave finishes a close */
    PyObject *on_idle, *on_fork;
} ContextObject;

typedef struct {
    PyObject_HEAD
    ContextObject *context;
    int readable, writable, closed;
} FileObject;

static PyTypeObject *context_type;
static uint32_t fork_generation;

/* ---- the few things that touch the kernel: call-outs in the explorer ---- */
#ifdef PVBUS_EXPLORED
static int64_t called(PyObject *result)
{
    if (result == NULL)
        return PV_DEAD;
    int64_t r = PyLong_AsLongLong(result);
    Py_DECREF(result);
    return r == -1 && PyErr_Occurred() ? PV_DEAD : r;
}
static int64_t door_take(ContextObject *c) { return called(PyObject_CallMethod(c->page->model, "door_take", NULL)); }
static int64_t door_wait(ContextObject *c) { return called(PyObject_CallMethod(c->page->model, "door_wait", NULL)); }
static int64_t ring_doorbell(ContextObject *c) { return called(PyObject_CallMethod(c->page->model, "kick", NULL)); }
static int64_t spin_for_entry(ContextObject *c) { (void)c; return 0; }
static int64_t push_back(ContextObject *c, uint64_t *deadline) { (void)deadline; PV_SPIN(c->ring, "sub.full"); return 0; }
#else
/* Take the byte(s) out of the doorbell: how many, 0 when there is none. */
static int64_t door_take(ContextObject *c)
{
    char bytes[64];
    ssize_t n = recv(c->door, bytes, sizeof bytes, MSG_DONTWAIT);
    return n > 0 ? n : 0;
}

/* Block until a byte lies in the doorbell: 1, or -errno.  recv (not poll) so that SA_RESTART means what it means. */
static int64_t door_wait(ContextObject *c)
{
    char byte;
    ssize_t n;
    int error;
    Py_BEGIN_ALLOW_THREADS
    n = recv(c->door, &byte, 1, MSG_PEEK);
    error = errno;
    Py_END_ALLOW_THREADS
    if (n > 0)
        return 1;
    return n == 0 ? -EIO : -error;
}

static int64_t ring_doorbell(ContextObject *c)
{
    uint64_t one = 1;
    return write(c->kick, &one, sizeof one) == sizeof one || errno == EAGAIN ? 0 : -EIO;
}

static int64_t spin_for_entry(ContextObject *c)
{
    uint32_t producer;
    int64_t state = 0;
    PV_LOAD32(producer, c->page, PV_PAGE(producer_cpu), PV_RELAXED, "evr.cpu");
    if (producer == (uint32_t)sched_getcpu() || (c->score == 0 && (++c->probe & 15) != 0))
        return 0;
    uint64_t deadline = pv_now_ns() + SPIN_NS;
    Py_BEGIN_ALLOW_THREADS
    do {
        for (int i = 0; i < 16 && state == 0; i++) {
            PV_RELAX();
            state = pv_ring_state(c->page);
        }
    } while (state == 0 && pv_now_ns() < deadline);
    Py_END_ALLOW_THREADS
    c->score += state != 0 ? (c->score < SCORE_MAX) : -(c->score > 0);
    return state != 0;
}

/* The submission ring is full: let the hypervisor run.  Bounded. */
static int64_t push_back(ContextObject *c, uint64_t *deadline)
{
    uint64_t now = pv_now_ns();
    if (*deadline == 0)
        *deadline = now + PUSHBACK_NS_MAX;
    else if (now > *deadline)
        return -EIO;
    int64_t r = ring_doorbell(c);
    if (r < 0)
        return r;
    struct timespec pause = {0, 20000};
    Py_BEGIN_ALLOW_THREADS
    nanosleep(&pause, NULL);
    Py_END_ALLOW_THREADS
    return PyErr_CheckSignals() < 0 ? PV_DEAD : 0;
}

static void after_fork_in_child(void) { fork_generation++; }
#endif

static int64_t submit(ContextObject *c, uint32_t op, uint32_t port)
{
    uint64_t deadline = 0;
    int64_t full, r;
    for (;;) {
        PV_TRY(full, pv_submission_push(c->ring, &c->tail, &c->head, op << 30 | port));
        if (!full)
            return 0;
        PV_TRY(r, push_back(c, &deadline));
        if (r < 0)
            return r;
    }
}

static int64_t flush(ContextObject *c)
{
    int64_t must;
    PV_TRY(must, pv_submission_must_kick(c->public_page, &c->rung));
    return must ? ring_doorbell(c) : 0;
}

static int64_t is_mine(ContextObject *c, uint32_t port)
{
    uint64_t bits;
    if (port >= c->ports_max)
        return 0;
    PV_LOAD64(bits, c->page, PV_PAGE_BITMAP + 8u * (size_t)(port / 64), PV_RELAXED, "file.bitmap");
    return (int64_t)(bits >> (port % 64) & 1);
}

/* Nothing unread may be left without a byte in the doorbell. */
static int64_t rearm(ContextObject *c)
{
    int64_t raised, r;
    PV_TRY(raised, pv_door_raise(c->page));
    if (!raised)
        return 0;
    PV_TRY(r, submit(c, PV_SUB_REARM, 0));
    return r < 0 ? r : flush(c);
}

/*
 * The ring looked empty: take the byte, lower the door, look again.  1 = there is something, and no byte for it.  `woken`: a
 * byte was seen, so take it even if the door is down; an heir sends one that its forerunner may have sent already, and if it
 * stayed, nobody could fall asleep any more.
 */
static int64_t lower(ContextObject *c, int woken)
{
    uint32_t door;
    int64_t taken;
    PV_LOAD32(door, c->page, PV_PAGE(door), PV_RELAXED, "evr.door.look");
    if (!door && !woken)
        return 0;
    PV_TRY(taken, door_take(c));
    return taken ? pv_door_lower(c->page) : 0;
}

/* evtchn_read.  Number of ports in `out`, or -errno. */
static int64_t file_read(ContextObject *c, uint32_t *out, uint32_t max)
{
    int64_t taken, again, r, lowered = 0;
    int emptied = 0, woken = 0;
    for (;;) {
        PV_TRY(taken, pv_ring_take(c->page, out, max, &emptied));
        if (taken != 0)
            break;
        PV_TRY(again, lower(c, woken));
        woken = 0;
        lowered |= again;
        if (again)
            continue;
        lowered = 0;
        PV_TRY(r, spin_for_entry(c));
        if (r)
            continue;
        PV_TRY(r, door_wait(c));
        if (r < 0)
            return r;
        woken = 1;
    }
    if (taken < 0)
        return taken;
    if (emptied)
        PV_TRY(lowered, lower(c, 0));
    if (lowered)
        PV_TRY(r, rearm(c));
    return taken;
}

static unsigned mask_of(int64_t state)
{
    if (state & (PV_RING_OVERFLOW | PV_RING_POISONED))
        return POLLERR;
    return POLLOUT | POLLWRNORM | (state != 0 ? POLLIN | POLLRDNORM : 0);
}

/* evtchn_poll, then wait.  The mask, 0 at the time-out, or -errno. */
static int64_t file_poll(ContextObject *c, unsigned events, int64_t timeout_ms)
{
#ifdef PVBUS_EXPLORED
    (void)timeout_ms;
    int64_t state;
    PV_TRY(state, pv_ring_state(c->page));
    return mask_of(state) & (events | POLLERR);
#else
    uint64_t deadline = pv_now_ns() + (timeout_ms > 0 ? (uint64_t)timeout_ms * 1000000u : 0);
    int woken = 0;
    for (;;) {
        int64_t state, again;
        PV_TRY(state, pv_ring_state(c->page));
        unsigned mask = mask_of(state) & (events | POLLERR);
        if (mask != 0 || timeout_ms == 0)
            return mask;
        if (state == 0) {
            PV_TRY(again, lower(c, woken));
            if (again) {
                PV_TRY(again, rearm(c));
                if (again < 0)
                    return again;
                continue;
            }
        }
        uint64_t now = pv_now_ns();
        if (timeout_ms > 0 && now >= deadline)
            return 0;
        uint64_t left = timeout_ms < 0 ? 3600000000000ull : deadline - now;
        struct timespec pause = {(time_t)(left / 1000000000u), (long)(left % 1000000000u)};
        struct pollfd door = {c->door, (short)(events & (POLLIN | POLLRDNORM)), 0};
        int r, error;
        Py_BEGIN_ALLOW_THREADS
        r = ppoll(&door, 1, &pause, NULL);
        error = errno;
        Py_END_ALLOW_THREADS
        if (r < 0)
            return -error;
        if (door.revents & (POLLHUP | POLLERR | POLLNVAL))
            return POLLERR | POLLHUP;
        woken = (door.revents & (POLLIN | POLLRDNORM)) != 0;
    }
#endif
}

/* ---- Context ---- */

static PyObject *context_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"page", "ring", "public_page", "door", "kick", "tail", "ports_max", NULL};
    PyObject *page, *ring, *public_page;
    int door, kick;
    unsigned int tail, ports_max;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOiiII", names, &page, &ring, &public_page, &door, &kick, &tail, &ports_max))
        return NULL;
    if (pv_memory_check(page, PV_PAGE_RING, "a file page") < 0 || pv_memory_check(ring, PV_SUBMISSION_BYTES, "a submission ring") < 0 ||
        pv_memory_check(public_page, 4096, "the public page") < 0)
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
    c->score = SCORE_MAX;
    c->fork_generation = fork_generation;
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
    c->rung = 0;
    c->fork_generation = fork_generation;
    Py_RETURN_NONE;
}

static PyObject *context_drain_door(ContextObject *c, PyObject *ignored)
{
    (void)ignored;
    int64_t again = lower(c, 0);
    if (again > 0)
        again = rearm(c);
    if (again == PV_DEAD)
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
    Py_INCREF(idle);
    Py_INCREF(forked);
    Py_CLEAR(c->on_idle);
    Py_CLEAR(c->on_fork);
    c->on_idle = idle;
    c->on_fork = forked;
    Py_RETURN_NONE;
}

static PyObject *context_get_inflight(ContextObject *c, void *closure) { (void)closure; return PyLong_FromLong(c->inflight); }
static PyObject *context_get_stale(ContextObject *c, void *closure)
{
    (void)closure;
    return PyBool_FromLong(c->fork_generation != fork_generation);
}

static PyMethodDef context_methods[] = {
    {"rebind", (PyCFunction)context_rebind, METH_VARARGS, "rebind(ring, kick, tail): a forked child's own submission ring."},
    {"set_hooks", (PyCFunction)context_hooks, METH_VARARGS, "set_hooks(on_idle, on_fork)."},
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

/* ---- UserFile ---- */

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
    if (f->context->fork_generation != fork_generation) {
        PyObject *r = f->context->on_fork == NULL ? PyErr_Format(PyExc_RuntimeError, "no fork hook")
                                                  : PyObject_CallFunctionObjArgs(f->context->on_fork, NULL);
        if (r == NULL)
            return -1;
        Py_DECREF(r);
    }
    return 0;
}

/* A blocking call keeps the context alive; the last to leave finishes a close that came meanwhile. */
static int64_t leave(ContextObject *c, int64_t result)
{
    if (--c->inflight == 0 && c->on_idle != NULL) {
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
    Py_INCREF((PyObject *)c);
    c->inflight++;
    int64_t n = file_read(c, out, max);
    if (n == -EINTR && PyErr_CheckSignals() < 0)
        n = PV_DEAD;
    return leave(c, n);
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

static int64_t enable_all(ContextObject *c, const uint32_t *ports, size_t n)
{
    int64_t mine, r = 0;
    for (size_t i = 0; i < n; i++) {
        PV_TRY(mine, is_mine(c, ports[i]));
        if (mine)
            PV_TRY(r, submit(c, PV_SUB_ENABLE, ports[i]));
        if (r < 0)
            return r;
    }
    PV_TRY(r, flush(c));
    return r < 0 ? r : (int64_t)n;
}

static int64_t notify_all(ContextObject *c, const uint32_t *ports, size_t n)
{
    int64_t mine, r;
    for (size_t i = 0; i < n; i++) {
        PV_TRY(mine, is_mine(c, ports[i]));
        if (!mine)
            return -ENOTCONN;
    }
    for (size_t i = 0; i < n; i++) {
        PV_TRY(r, submit(c, PV_SUB_NOTIFY, ports[i]));
        if (r < 0)
            return r;
    }
    PV_TRY(r, flush(c));
    return r < 0 ? r : (int64_t)n;
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
    int64_t r = n == 0 ? 0 : enable_all(f->context, ports, n);
    return r < 0 ? failed(r) : PyLong_FromLongLong(r * 4);
}

static PyObject *file_notify(FileObject *f, PyObject *number)
{
    uint32_t port = (uint32_t)PyLong_AsUnsignedLongMask(number);
    if (port == (uint32_t)-1 && PyErr_Occurred())
        return NULL;
    if (enter(f, 1) < 0)
        return NULL;
    int64_t r = notify_all(f->context, &port, 1);
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
    int64_t r = all(f->context, ports, n);
    PyMem_Free(ports);
    return r < 0 ? failed(r) : PyLong_FromLongLong(r);
}

static PyObject *file_notify_many(FileObject *f, PyObject *ports) { return many(f, ports, 1, notify_all); }
static PyObject *file_enable(FileObject *f, PyObject *ports) { return many(f, ports, f->writable, enable_all); }

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
    Py_INCREF((PyObject *)c);
    c->inflight++;
    int64_t mask = file_poll(c, events, timeout_ms);
    if (mask == -EINTR && PyErr_CheckSignals() < 0)
        mask = PV_DEAD;
    mask = leave(c, mask);
    return mask < 0 ? failed(mask) : PyLong_FromLongLong(mask);
}

static PyObject *file_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"context", "readable", "writable", NULL};
    PyObject *context;
    int readable = 1, writable = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!|pp", names, context_type, &context, &readable, &writable))
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
    context_type = (PyTypeObject *)PyType_FromSpec(&context_spec);
    PyObject *file_type = context_type == NULL ? NULL : PyType_FromSpec(&file_spec);
    if (file_type == NULL)
        return -1;
#ifndef PVBUS_EXPLORED
    if (pthread_atfork(NULL, NULL, after_fork_in_child) != 0)
        return -1;
#endif
    if (PyModule_AddObjectRef(module, "Context", (PyObject *)context_type) < 0)
        return -1;
    int r = PyModule_AddObjectRef(module, "UserFile", file_type);
    Py_DECREF(file_type);
    return r;
}
