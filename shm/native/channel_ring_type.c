/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ChannelRing, the type: arguments, errno and Python objects around channel_ring.c.
 *
 * Python code (a buffer's own, a finaliser's) may run whenever an object is made, and may use this very ring.  So a send makes
 * its objects first and then looks at the ring, and a receive looks again whether the packet is still there.
 */
#include "channel_ring.h"

#include <errno.h>
#include <string.h>

#define PAGE 4096
#define RING_BYTES_MAX (1 << 30) /* sums of two indices stay in 32 bits */

static PyObject *buffer_too_small;

PyObject *pv_channel_failed(int64_t error)
{
    if (error == PV_DEAD)
        return NULL;
    errno = (int)-error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* Before the ring is touched, and again after Python code may have run. */
int64_t pv_channel_usable(RingObject *self)
{
    if (self->memory->base == NULL) {
        PyErr_SetString(PyExc_ValueError, "the memory of this ring is closed");
        return PV_DEAD;
    }
    return self->broken ? -EIO : 0;
}

/* Sort arguments by name into out[count], whose defaults are kept; the first `required` must be there. */
static int arguments(PyObject *const *args, Py_ssize_t n, PyObject *kwnames, const char *const *names, int required, int count,
                     PyObject **out)
{
    Py_ssize_t named = kwnames == NULL ? 0 : PyTuple_Size(kwnames);
    if (n > count) {
        PyErr_Format(PyExc_TypeError, "takes at most %d arguments", count);
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++)
        out[i] = args[i];
    for (Py_ssize_t i = 0; i < named; i++) {
        PyObject *name = PyTuple_GetItem(kwnames, i);
        int at = 0;
        while (at < count && PyUnicode_CompareWithASCIIString(name, names[at]) != 0)
            at++;
        if (at == count || at < n) {
            PyErr_Format(PyExc_TypeError, "%s argument %R", at == count ? "unknown" : "doubled", name);
            return -1;
        }
        out[at] = args[n + i];
    }
    for (int i = 0; i < required; i++)
        if (out[i] == NULL) {
            PyErr_Format(PyExc_TypeError, "needs %s", names[i]);
            return -1;
        }
    return 0;
}

/* A new reference to bytes that nobody can change meanwhile. */
static PyObject *as_bytes(PyObject *payload)
{
    if (PyBytes_CheckExact(payload)) {
        Py_INCREF(payload);
        return payload;
    }
    if (!PyObject_CheckBuffer(payload))
        return PyErr_Format(PyExc_TypeError, "a payload must be bytes-like");
    return PyBytes_FromObject(payload);
}

static int as_id(PyObject *number, uint64_t *id)
{
    *id = number == NULL ? 0 : PyLong_AsUnsignedLongLong(number);
    return *id == (uint64_t)-1 && PyErr_Occurred() ? -1 : 0;
}

static int64_t send_batch(RingObject *self, pv_batch *batch)
{
    int64_t r = pv_channel_usable(self);
    return r < 0 ? r : pv_channel_send(self, batch);
}

static PyObject *send_one(RingObject *self, PyObject *payload, PyObject *transaction_id, int completion, uint16_t type)
{
    pv_batch batch = {.count = 1, .type = type, .flags = completion ? PV_PACKET_WANTS_COMPLETION : 0};
    PyObject *bytes;
    if (as_id(transaction_id, &batch.first_transaction_id) < 0 || (bytes = as_bytes(payload)) == NULL)
        return NULL;
    batch.payloads = &bytes;
    int64_t signal = send_batch(self, &batch);
    Py_DECREF(bytes);
    if (signal < 0)
        return pv_channel_failed(signal);
    return batch.sent == 0 ? pv_channel_failed(-EAGAIN) : PyLong_FromLongLong(signal);
}

static PyObject *ring_send(RingObject *self, PyObject *const *args, Py_ssize_t n, PyObject *kwnames)
{
    static const char *const names[] = {"payload", "transaction_id", "completion", "type"};
    PyObject *given[4] = {NULL, NULL, Py_False, NULL};
    if (arguments(args, n, kwnames, names, 1, 4, given) < 0)
        return NULL;
    int completion = PyObject_IsTrue(given[2]);
    long type = given[3] == NULL ? PV_PACKET_IN_BAND : PyLong_AsLong(given[3]);
    if (completion < 0 || (type == -1 && PyErr_Occurred()))
        return NULL;
    if (type < 0 || type > 0xFFFF)
        return PyErr_Format(PyExc_ValueError, "packet type %ld", type);
    return send_one(self, given[0], given[1], completion, (uint16_t)type);
}

static PyObject *ring_complete(RingObject *self, PyObject *const *args, Py_ssize_t n, PyObject *kwnames)
{
    static const char *const names[] = {"transaction_id", "payload"};
    PyObject *given[2] = {NULL, NULL};
    if (arguments(args, n, kwnames, names, 2, 2, given) < 0)
        return NULL;
    return send_one(self, given[1], given[0], 0, PV_PACKET_COMPLETION);
}

static PyObject *ring_send_many(RingObject *self, PyObject *const *args, Py_ssize_t n, PyObject *kwnames)
{
    static const char *const names[] = {"payloads", "first_transaction_id", "completion"};
    PyObject *given[3] = {NULL, NULL, Py_False};
    pv_batch batch = {.type = PV_PACKET_IN_BAND};
    if (arguments(args, n, kwnames, names, 1, 3, given) < 0 || as_id(given[1], &batch.first_transaction_id) < 0)
        return NULL;
    int completion = PyObject_IsTrue(given[2]);
    PyObject *sources = completion < 0 ? NULL : PySequence_Tuple(given[0]);
    if (sources == NULL)
        return NULL;
    batch.flags = completion ? PV_PACKET_WANTS_COMPLETION : 0;
    Py_ssize_t wanted = PyTuple_Size(sources);
    PyObject **payloads = PyMem_Malloc((size_t)wanted * sizeof *payloads + 1);
    if (payloads == NULL)
        PyErr_NoMemory();
    while (payloads != NULL && batch.count < wanted) {
        payloads[batch.count] = as_bytes(PyTuple_GetItem(sources, batch.count));
        if (payloads[batch.count] == NULL)
            break;
        batch.count++;
    }
    batch.payloads = payloads;
    int64_t signal = PyErr_Occurred() ? PV_DEAD : send_batch(self, &batch);
    while (batch.count > 0)
        Py_DECREF(payloads[--batch.count]);
    PyMem_Free(payloads);
    Py_DECREF(sources);
    return signal < 0 ? pv_channel_failed(signal) : Py_BuildValue("(nO)", batch.sent, signal ? Py_True : Py_False);
}

/* ---- receiving */

static PyObject *too_small(uint32_t needed)
{
    PyObject *error = PyObject_CallFunction(buffer_too_small, "is", ENOBUFS, strerror(ENOBUFS));
    PyObject *number = error == NULL ? NULL : PyLong_FromUnsignedLong(needed);
    if (number != NULL && PyObject_SetAttrString(error, "needed", number) == 0)
        PyErr_SetObject(buffer_too_small, error);
    Py_XDECREF(number);
    Py_XDECREF(error);
    return NULL;
}

/* (type, transaction id, payload, completion wanted), the payload still to be filled. */
static PyObject *packet_tuple(const pv_packet *packet, PyObject **payload)
{
    PyObject *parts[4] = {
        PyLong_FromLong(packet->type), PyLong_FromUnsignedLongLong(packet->transaction_id),
        PyBytes_FromStringAndSize(NULL, (Py_ssize_t)packet->payload_bytes), PyBool_FromLong(packet->flags),
    };
    PyObject *tuple = PyTuple_New(4);
    *payload = parts[2];
    for (int i = 0; i < 4; i++) {
        if (tuple == NULL || parts[i] == NULL || PyTuple_SetItem(tuple, i, parts[i]) < 0) {
            for (int j = i; j < 4; j++)
                Py_XDECREF(parts[j]);
            Py_XDECREF(tuple);
            return NULL;
        }
    }
    return tuple;
}

/*
 * Take a packet of at most `left` bytes: 1 and the packet, 0 = empty, -ENOBUFS and *needed, -EIO.  *write_index is what was last
 * seen of the writer's; it is looked at again only when all before it is taken.
 */
static int64_t take_one(RingObject *self, uint32_t *write_index, int64_t left, PyObject **taken, uint32_t *needed)
{
    int64_t r;
    pv_packet packet;
    for (;;) {
        if (*write_index == self->read_index) {
            PV_TRY(r, pv_channel_look(self, write_index));
            if (r <= 0)
                return r;
        }
        PV_TRY(r, pv_channel_parse(self, *write_index, &packet));
        if (r < 0)
            return r;
        if (packet.payload_bytes > left) {
            *needed = packet.payload_bytes;
            return -ENOBUFS;
        }
        uint32_t at = self->read_index;
        PyObject *payload;
        *taken = packet_tuple(&packet, &payload);
        if (*taken == NULL)
            return PV_DEAD;
        r = pv_channel_usable(self);
        if (r == 0 && self->read_index == at)
            r = pv_channel_take(self, &packet, PyBytes_AsString(payload));
        else if (r == 0)
            *write_index = self->read_index, r = 1; /* a finaliser has read from this ring: what we saw of it is old */
        if (r == 0)
            return 1;
        Py_CLEAR(*taken);
        if (r < 0)
            return r;
    }
}

/* None or "no limit" = INT64_MAX. */
static int limit(PyObject *number, int64_t *bytes_max)
{
    *bytes_max = number == Py_None ? INT64_MAX : PyLong_AsLongLong(number);
    if (*bytes_max == -1 && PyErr_Occurred())
        return -1;
    if (*bytes_max < 0)
        PyErr_Format(PyExc_ValueError, "a limit of %lld", (long long)*bytes_max);
    return *bytes_max < 0 ? -1 : 0;
}

static PyObject *ring_recv(RingObject *self, PyObject *const *args, Py_ssize_t n, PyObject *kwnames)
{
    static const char *const names[] = {"max_bytes"};
    PyObject *given[1] = {Py_None}, *packet = NULL;
    uint32_t needed = 0, write_index = self->read_index;
    int64_t bytes_max, r;
    if (arguments(args, n, kwnames, names, 0, 1, given) < 0 || limit(given[0], &bytes_max) < 0)
        return NULL;
    if ((r = pv_channel_usable(self)) < 0 || (r = take_one(self, &write_index, bytes_max, &packet, &needed)) < 0)
        return r == -ENOBUFS ? too_small(needed) : pv_channel_failed(r);
    if (r == 0)
        Py_RETURN_NONE;
    if (pv_channel_release(self) == PV_DEAD) /* a ring that broke here says so at the next call */
        Py_CLEAR(packet);
    return packet;
}

static PyObject *ring_recv_many(RingObject *self, PyObject *const *args, Py_ssize_t n, PyObject *kwnames)
{
    static const char *const names[] = {"max_packets", "max_bytes"};
    PyObject *given[2] = {NULL, Py_None};
    uint32_t needed = 0, write_index = self->read_index;
    int64_t packets, left, r;
    if (arguments(args, n, kwnames, names, 1, 2, given) < 0 || limit(given[0], &packets) < 0 || limit(given[1], &left) < 0)
        return NULL;
    PyObject *list = PyList_New(0);
    if (list == NULL)
        return NULL;
    r = pv_channel_usable(self);
    for (Py_ssize_t taken = 0; r == 0 && taken < packets; taken++) {
        PyObject *packet = NULL;
        uint32_t before = self->read_index;
        r = take_one(self, &write_index, left, &packet, &needed);
        if (r != 1)
            break;
        left -= PyBytes_Size(PyTuple_GetItem(packet, 2));
        r = PyList_Append(list, packet);
        if (r < 0) {
            self->read_index = before; /* no memory: it stays in the ring */
            r = PV_DEAD;
        }
        Py_DECREF(packet);
    }
    if (PyList_Size(list) > 0) {
        /* What stopped us is met again by the next call, if it is still there. */
        if (r == PV_DEAD && PyErr_ExceptionMatches(PyExc_MemoryError))
            PyErr_Clear();
        if (PyErr_Occurred() || pv_channel_usable(self) == PV_DEAD || pv_channel_release(self) == PV_DEAD)
            Py_CLEAR(list);
        return list;
    }
    if (r == 0)
        return list;
    Py_DECREF(list);
    return r == -ENOBUFS ? too_small(needed) : pv_channel_failed(r);
}

static PyObject *ring_echo(RingObject *self, PyObject *most)
{
    int64_t taken = 0, r, packets = PyLong_AsLongLong(most);
    int full = 0;
    if (packets == -1 && PyErr_Occurred())
        return NULL;
    if ((r = pv_channel_usable(self)) < 0 || (r = pv_channel_echo(self, packets, &taken, &full)) < 0)
        return pv_channel_failed(r);
    return Py_BuildValue("(LNN)", (long long)taken, PyBool_FromLong((long)r), PyBool_FromLong(full));
}

static PyObject *ring_begin_read(RingObject *self, PyObject *ignored)
{
    (void)ignored;
    int64_t r = pv_channel_usable(self);
    if (r < 0 || (r = pv_channel_begin_read(self)) < 0)
        return pv_channel_failed(r);
    Py_RETURN_NONE;
}

static PyObject *ring_end_read(RingObject *self, PyObject *ignored)
{
    (void)ignored;
    int64_t r = pv_channel_usable(self);
    if (r < 0 || (r = pv_channel_end_read(self)) < 0)
        return pv_channel_failed(r);
    return PyBool_FromLong((long)r);
}

static PyObject *ring_take_signal(RingObject *self, PyObject *ignored)
{
    (void)ignored;
    int owed = self->signal_owed;
    self->signal_owed = 0;
    return PyBool_FromLong(owed);
}

/* ---- the type */

static PyObject *ring_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"memory", "out_offset", "in_offset", "ring_bytes", "signal_always", NULL};
    PyObject *memory;
    Py_ssize_t out, in, bytes;
    int signal_always = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Onnn|p", names, &memory, &out, &in, &bytes, &signal_always))
        return NULL;
    if (bytes < 2 * PAGE || bytes > RING_BYTES_MAX || bytes % PAGE != 0 || out < 0 || out % PAGE != 0 || in < 0 || in % PAGE != 0 ||
        (out < in ? in - out : out - in) < bytes)
        return PyErr_Format(PyExc_ValueError, "rings of %zd bytes at %zd and %zd: whole pages, two at least, apart", bytes, out, in);
    size_t last = (size_t)(out < in ? in : out);
    if (pv_memory_check(memory, last + (size_t)bytes, "the memory of a channel") < 0)
        return NULL;
    RingObject *self = (RingObject *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (self == NULL)
        return NULL;
    Py_INCREF(memory);
    self->memory = (MemoryObject *)memory;
    self->out = (size_t)out;
    self->in = (size_t)in;
    self->size = (uint32_t)(bytes - PAGE);
    self->signal_always = signal_always;
    if (pv_channel_attach(self) == PV_DEAD) { /* a broken ring can be looked at */
        Py_DECREF((PyObject *)self);
        return NULL;
    }
    return (PyObject *)self;
}

static void ring_dealloc(RingObject *self)
{
    Py_CLEAR(self->memory);
    Py_CLEAR(self->claims);
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

#define NAMED(name, doc) {#name, (PyCFunction)(void (*)(void))ring_##name, METH_FASTCALL | METH_KEYWORDS, doc}
#define PLAIN(name, doc) {#name, (PyCFunction)ring_##name, METH_NOARGS, doc}
static PyMethodDef ring_methods[] = {
    NAMED(send, "send(payload, transaction_id=0, completion=False, type=6) -> 1 if the other side must be signalled, else 0.\n\n"
                "Mirrors vmbus_sendpacket.  EAGAIN: full, and pending_send_sz asks to be signalled when it fits; EMSGSIZE: it never\n"
                "will; EIO: the other side has written something impossible.  The payload arrives padded with zeros to 8 bytes."),
    NAMED(send_many, "send_many(payloads, first_transaction_id=0, completion=False) -> (how many were sent, must signal).\n\n"
                     "The ids count up.  Fewer than all: full, as EAGAIN of send.  EMSGSIZE, none sent: one can never fit."),
    NAMED(complete, "complete(transaction_id, payload) -> as send: a completion packet."),
    NAMED(recv, "recv(max_bytes=None) -> (type, transaction id, payload, completion wanted), or None: empty.\n\n"
                "Mirrors vmbus_recvpacket.  BufferTooSmall (ENOBUFS, .needed): the packet stays; EIO.  Ask take_signal() afterwards."),
    NAMED(recv_many, "recv_many(max_packets, max_bytes=None) -> list of packets as recv gives them; their room is given back at once.\n\n"
                     "max_bytes bounds the payloads together; BufferTooSmall only if the first is larger."),
    {"echo", (PyCFunction)ring_echo, METH_O, "echo(max_packets) -> (how many were taken, must signal, full): send back what is there."},
    PLAIN(begin_read, "begin_read(): ask for no signals while packets are read.  Mirrors hv_begin_read."),
    PLAIN(end_read, "end_read() -> True if there is something to read (again): begin anew.  Mirrors hv_end_read."),
    PLAIN(take_signal, "take_signal() -> True, once, if what was read has made the room that the other side waits for: signal it."),
    {"keep", (PyCFunction)pv_channel_keep, METH_VARARGS,
     "keep(memory, offset, heir): note there what echo() is about to answer; `heir`: what stands there is a forerunner's."},
    {"position", (PyCFunction)pv_channel_position, METH_NOARGS, "position() -> (read_index, write_index, bytes of a ring), our own."},
    {"hold", (PyCFunction)pv_channel_hold, METH_NOARGS, "hold(): what is read from now on stays in the ring until release()."},
    {"release", (PyCFunction)pv_channel_give_back, METH_VARARGS, "release(read_index=None): give back what was read, or all before an index."},
    {"state", (PyCFunction)pv_channel_state, METH_NOARGS, "state() -> figures of both rings, under the names of the attributes; read one by one, so they may not fit together."},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef ring_getset[] = {
    {"broken", (getter)pv_channel_get_broken, NULL, "Impossible things seen; if not 0, all calls but state() answer EIO.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot ring_slots[] = {
    {Py_tp_new, ring_new},
    {Py_tp_dealloc, ring_dealloc},
    {Py_tp_methods, ring_methods},
    {Py_tp_getset, ring_getset},
    {Py_tp_doc, "ChannelRing(memory, out_offset, in_offset, ring_bytes, signal_always=False): one side's view; it says when to signal."},
    {0, NULL},
};
static PyType_Spec ring_spec = {"pvbus.shm._core.ChannelRing", sizeof(RingObject), 0, Py_TPFLAGS_DEFAULT, ring_slots};

int pv_channel_ring_init(PyObject *module)
{
    buffer_too_small = PyErr_NewExceptionWithDoc("pvbus.shm._core.BufferTooSmall",
                                                 "ENOBUFS: the next packet has `needed` bytes, more than allowed.", PyExc_OSError, NULL);
    PyObject *type = buffer_too_small == NULL ? NULL : PyType_FromSpec(&ring_spec);
    if (type == NULL)
        return -1;
    int r = PyModule_AddObjectRef(module, "ChannelRing", type);
    Py_DECREF(type);
    return r < 0 ? r : PyModule_AddObjectRef(module, "BufferTooSmall", buffer_too_small);
}
