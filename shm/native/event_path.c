/* SPDX-License-Identifier: Apache-2.0 */
/*
 * EventPath, the type: the machine's side of the event path over the segments that a process has mapped.  The hypervisor
 * process drains submission rings and raises ports with it, a cpu process runs its upcalls, a file process grows and resets
 * its ring.  Arguments are checked here; the work is done in drain.c, interrupt.c, shared_info.c and event_ring.c.
 */
#include "path.h"

#include <errno.h>
#include <string.h>

static PyObject *numbers(const uint32_t *values, uint32_t count)
{
    PyObject *list = PyList_New(count);
    for (uint32_t i = 0; list != NULL && i < count; i++) {
        PyObject *number = PyLong_FromUnsignedLong(values[i]);
        if (number == NULL || PyList_SetItem(list, i, number) < 0)
            Py_CLEAR(list);
    }
    return list;
}

static PyObject *drained_result(const drained *out)
{
    if (out->done == 0 && out->poisoned_count == 0)
        Py_RETURN_NONE;
    return Py_BuildValue("(kNNN)", (unsigned long)out->done, numbers(out->kicks, out->kick_count),
                         numbers(out->rearm, out->rearm_count), numbers(out->poisoned, out->poisoned_count));
}

static PyObject *path_drain(PathObject *self, PyObject *args)
{
    unsigned int budget;
    int index = -1;
    drained out;
    pv_drained_clear(&out);
    if (!PyArg_ParseTuple(args, "I|i", &budget, &index))
        return NULL;
    uint32_t first = index < 0 ? 0 : (uint32_t)index, end = index < 0 ? self->rings_end : (uint32_t)index + 1;
    if (end > PV_SUBMISSIONS_MAX)
        return PyErr_Format(PyExc_IndexError, "no submission ring %d", index);
    if (pv_drain(self, first, end, budget, &out) == PV_DEAD)
        return NULL;
    return drained_result(&out);
}

static PyObject *path_hypervisor_may_sleep(PathObject *self, PyObject *public_page)
{
    if (pv_memory_check(public_page, 4096, "the public page") < 0)
        return NULL;
    int64_t r = pv_hypervisor_may_sleep(self, (MemoryObject *)public_page);
    return r == PV_DEAD ? NULL : PyBool_FromLong(r != 0);
}

static MemoryObject *checked_domain(PathObject *self, unsigned int domid, unsigned int vcpu, unsigned int port)
{
    MemoryObject *domain = pv_domain_of(self, domid);
    if (domain == NULL)
        PyErr_Format(PyExc_LookupError, "no domain %u", domid);
    else if (vcpu >= PV_VCPUS_MAX || port >= PV_PORTS_MAX)
        PyErr_Format(PyExc_IndexError, "no vCPU %u or port %u", vcpu, port), domain = NULL;
    return domain;
}

static PyObject *path_cpu_may_sleep(PathObject *self, PyObject *args)
{
    unsigned int domid, vcpu;
    MemoryObject *domain;
    if (!PyArg_ParseTuple(args, "II", &domid, &vcpu) || (domain = checked_domain(self, domid, vcpu, 0)) == NULL)
        return NULL;
    int64_t r = pv_cpu_may_sleep(domain, self->hyperv[pv_domain_index(self, domid)], vcpu);
    return r == PV_DEAD ? NULL : PyBool_FromLong(r != 0);
}

static PyObject *path_upcall(PathObject *self, PyObject *args)
{
    unsigned int domid, vcpu, budget;
    MemoryObject *domain;
    pv_wakes wakes = {{0}, 0};
    if (!PyArg_ParseTuple(args, "III", &domid, &vcpu, &budget) || (domain = checked_domain(self, domid, vcpu, 0)) == NULL)
        return NULL;
    int64_t events = pv_upcall(self->machine, domain, self->pages, vcpu, budget, &wakes);
    if (events == PV_DEAD)
        return NULL;
    if (events == 0 && wakes.count == 0)
        Py_RETURN_NONE;
    return Py_BuildValue("(LN)", (long long)events, numbers(wakes.slots, wakes.count));
}

static PyObject *path_cpu_recover(PathObject *self, PyObject *args)
{
    unsigned int domid, vcpu;
    MemoryObject *domain;
    pv_wakes wakes = {{0}, 0};
    if (!PyArg_ParseTuple(args, "II", &domid, &vcpu) || (domain = checked_domain(self, domid, vcpu, 0)) == NULL)
        return NULL;
    int64_t found = pv_cpu_recover(self->machine, domain, self->pages, vcpu, &wakes);
    if (found == PV_DEAD)
        return NULL;
    return Py_BuildValue("(LN)", (long long)found, numbers(wakes.slots, wakes.count));
}

/* The vCPU whose doorbell the caller has to ring, or -1. */
static int64_t raised(MemoryObject *domain, int64_t marked)
{
    int64_t asleep;
    if (marked <= 0)
        return marked == PV_DEAD ? PV_DEAD : -1;
    PV_TRY(asleep, pv_vcpu_kick(domain, (uint32_t)marked - 1));
    return asleep ? marked - 1 : -1;
}

#define PORT_METHOD(name, call) \
    static PyObject *path_##name(PathObject *self, PyObject *args) \
    { \
        unsigned int domid, port, extra = 0, flag = 0; \
        MemoryObject *domain; \
        (void)flag; \
        if (!PyArg_ParseTuple(args, "II|II", &domid, &port, &extra, &flag) || \
            (domain = checked_domain(self, domid, 0, port)) == NULL) \
            return NULL; \
        int64_t r = raised(domain, call); \
        return r == PV_DEAD ? NULL : PyLong_FromLongLong(r); \
    }
#ifndef PVBUS_EXPLORED
PORT_METHOD(set_pending, (pv_set_pending(domain, port, pv_now_ns())))
#else
PORT_METHOD(set_pending, (pv_set_pending(domain, port, 1)))
#endif
PORT_METHOD(unmask, (pv_unmask(domain, port, (int)extra)))
PORT_METHOD(eoi, (pv_eoi(self->machine, domain, port, extra, (int)flag)))

/* The guest's own words of a port, and what the hypervisor clears when it closes one. */
#define WORD_METHOD(name, call) \
    static PyObject *path_##name(PathObject *self, PyObject *args) \
    { \
        unsigned int domid, port; \
        MemoryObject *domain; \
        if (!PyArg_ParseTuple(args, "II", &domid, &port) || (domain = checked_domain(self, domid, 0, port)) == NULL) \
            return NULL; \
        int64_t r = call; \
        return r == PV_DEAD ? NULL : PyLong_FromLongLong(r); \
    }
WORD_METHOD(mask, (pv_mask(domain, port)))
WORD_METHOD(clear_pending, (pv_clear_pending(domain, port)))

static PyObject *path_fifo_rebuild(PathObject *self, PyObject *args)
{
    unsigned int domid, vcpu;
    MemoryObject *domain;
    if (!PyArg_ParseTuple(args, "II", &domid, &vcpu) || (domain = checked_domain(self, domid, vcpu, 0)) == NULL)
        return NULL;
    uint32_t kicks[PV_VCPUS_MAX], count = 0;
    int64_t asleep, marked = pv_fifo_rebuild(domain, vcpu);
    if (marked == -1)
        return PyErr_NoMemory();
    if (marked == PV_DEAD)
        return NULL;
    for (; marked != 0; marked &= marked - 1) {
        uint32_t to = (uint32_t)__builtin_ctzll((uint64_t)marked);
        if ((asleep = pv_vcpu_kick(domain, to)) == PV_DEAD)
            return NULL;
        if (asleep)
            kicks[count++] = to;
    }
    return numbers(kicks, count);
}

static PyObject *path_expire(PathObject *self, PyObject *ignored)
{
    drained out;
    (void)ignored;
    pv_drained_clear(&out);
    if (pv_expire(self, &out) == PV_DEAD)
        return NULL;
    return numbers(out.kicks, out.kick_count);
}

static int slot_in_range(unsigned int index, unsigned int end, const char *what)
{
    if (index < end)
        return 1;
    PyErr_Format(PyExc_IndexError, "no %s %u", what, index);
    return 0;
}

static PyObject *path_attach_file(PathObject *self, PyObject *args)
{
    unsigned int slot;
    PyObject *page;
    if (!PyArg_ParseTuple(args, "IO", &slot, &page) || !slot_in_range(slot, PV_FILES_MAX, "file slot"))
        return NULL;
    if (page != Py_None && pv_memory_check(page, PV_PAGE_RING + 4u * PV_RING_SIZE_FIRST, "a file page") < 0)
        return NULL;
    Py_CLEAR(self->pages[slot]);
    if (page != Py_None) {
        Py_INCREF(page);
        self->pages[slot] = (MemoryObject *)page;
    }
    Py_RETURN_NONE;
}

static PyObject *path_attach_submission(PathObject *self, PyObject *args)
{
    unsigned int index, slot = 0;
    PyObject *ring;
    if (!PyArg_ParseTuple(args, "IO|I", &index, &ring, &slot) || !slot_in_range(index, PV_SUBMISSIONS_MAX, "submission ring") ||
        !slot_in_range(slot, PV_FILES_MAX, "file slot"))
        return NULL;
    if (ring != Py_None && pv_memory_check(ring, PV_SUBMISSION_BYTES, "a submission ring") < 0)
        return NULL;
    Py_CLEAR(self->rings[index]);
    if (ring != Py_None) {
        Py_INCREF(ring);
        self->rings[index] = (MemoryObject *)ring;
        self->ring_slot[index] = slot;
        if (pv_resolve_claim(self, index) == PV_DEAD)
            return NULL;
    }
    if (index >= self->rings_end)
        self->rings_end = index + 1;
    while (self->rings_end > 0 && self->rings[self->rings_end - 1] == NULL)
        self->rings_end--;
    Py_RETURN_NONE;
}

#define RING_METHOD(name, call) \
    static PyObject *path_##name(PathObject *self, PyObject *arg) \
    { \
        unsigned long slot = PyLong_AsUnsignedLong(arg); \
        if (PyErr_Occurred() || !slot_in_range(slot > PV_FILES_MAX ? PV_FILES_MAX : (unsigned int)slot, PV_FILES_MAX, "file slot")) \
            return NULL; \
        if (self->pages[slot] == NULL) \
            return PyErr_Format(PyExc_LookupError, "file slot %lu is not attached", slot); \
        int64_t r = call(self->machine, (uint32_t)slot, self->pages[slot]); \
        if (r == PV_DEAD) \
            return NULL; \
        if (r < 0) { \
            errno = (int)-r; \
            return PyErr_SetFromErrno(PyExc_OSError); \
        } \
        return PyLong_FromLongLong(r); \
    }
RING_METHOD(grow, pv_ring_grow)
RING_METHOD(reset, pv_ring_reset)
RING_METHOD(poison, pv_ring_poison)

/* Where serve_* signal: a vCPU's eventfd, an open file's socket; -1 forgets. */
static PyObject *path_set_doorbell(PathObject *self, PyObject *args)
{
    unsigned int domid, vcpu;
    int fd;
    if (!PyArg_ParseTuple(args, "IIi", &domid, &vcpu, &fd) || checked_domain(self, domid, vcpu, 0) == NULL)
        return NULL;
    for (uint32_t i = 0; i < self->domain_count; i++)
        if (self->domain_ids[i] == domid)
            self->doorbells[i][vcpu] = fd;
    Py_RETURN_NONE;
}

static PyObject *path_set_door(PathObject *self, PyObject *args)
{
    unsigned int slot;
    int fd;
    if (!PyArg_ParseTuple(args, "Ii", &slot, &fd) || !slot_in_range(slot, PV_FILES_MAX, "file slot"))
        return NULL;
    self->doors[slot] = fd;
    Py_RETURN_NONE;
}

static int path_set_domains(PathObject *self, PyObject *domains)
{
    PyObject *key, *value;
    Py_ssize_t at = 0;
    while (PyDict_Next(domains, &at, &key, &value)) {
        unsigned long domid = PyLong_AsUnsignedLong(key);
        if (PyErr_Occurred() || pv_memory_check(value, PV_DOMAIN_BYTES, "a domain's segment") < 0)
            return -1;
        if (self->domain_count == PV_DOMAINS_MAX) {
            PyErr_Format(PyExc_ValueError, "more than %u domains", PV_DOMAINS_MAX);
            return -1;
        }
        self->domain_ids[self->domain_count] = (uint32_t)domid;
        Py_INCREF(value);
        self->domains[self->domain_count++] = (MemoryObject *)value;
    }
    return 0;
}

static PyObject *path_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"machine", "domains", NULL};
    PyObject *machine, *domains;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO!", names, &machine, &PyDict_Type, &domains))
        return NULL;
    if (pv_memory_check(machine, PV_MACHINE_BYTES, "the machine's segment") < 0)
        return NULL;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    PathObject *self = (PathObject *)alloc(type, 0);
    if (self == NULL)
        return NULL;
    Py_INCREF(machine);
    self->machine = (MemoryObject *)machine;
    memset(self->doorbells, 0xff, sizeof self->doorbells);
    memset(self->doors, 0xff, sizeof self->doors);
    memset(self->work_doorbells, 0xff, sizeof self->work_doorbells);
    memset(self->exits, 0xff, sizeof self->exits);
#ifndef PVBUS_EXPLORED
    pv_spin_init(&self->spinner, 0);
#endif
    if (path_set_domains(self, domains) < 0)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static void path_dealloc(PathObject *self)
{
    Py_CLEAR(self->machine);
    for (uint32_t i = 0; i < self->domain_count; i++)
        Py_CLEAR(self->domains[i]);
    pv_hv_path_clear(self);
    for (uint32_t i = 0; i < PV_FILES_MAX; i++)
        Py_CLEAR(self->pages[i]);
    for (uint32_t i = 0; i < PV_SUBMISSIONS_MAX; i++)
        Py_CLEAR(self->rings[i]);
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

#define VAR(name, doc) {#name, (PyCFunction)path_##name, METH_VARARGS, doc}
static PyMethodDef path_methods[] = {
    VAR(attach_file, "attach_file(slot, page or None): map or forget an open file's page."),
    VAR(attach_submission, "attach_submission(index, ring or None, slot=0): an entry left claimed by a dead forerunner is resolved."),
    VAR(drain, "drain(budget a ring, index=-1 for all) -> None, or (entries, vCPUs to kick as domain << 8 | vcpu, slots to re-arm, slots poisoned)."),
    VAR(upcall, "upcall(domain, vcpu, budget) -> None, or (events, slots to wake).  Mirrors xen_evtchn_do_upcall."),
    VAR(cpu_recover, "cpu_recover(domain, vcpu) -> (ports found in service, slots to wake): what an heir does first."),
    VAR(cpu_may_sleep, "cpu_may_sleep(domain, vcpu) -> False when an upcall came in between."),
    VAR(set_pending, "set_pending(domain, port) -> vCPU whose doorbell is to be rung, or -1."),
    VAR(unmask, "unmask(domain, port, eoi=0) -> vCPU whose doorbell is to be rung, or -1.  Mirrors EVTCHNOP_unmask."),
    VAR(mask, "mask(domain, port): the guest masks a port, on the ABI that the domain has now."),
    VAR(clear_pending, "clear_pending(domain, port): on the ABI that the domain has now."),
    VAR(fifo_rebuild, "fifo_rebuild(domain, vcpu) -> vCPUs whose doorbell is to be rung: for the heir of a hypervisor or of a CPU that does not run."),
    {"expire", (PyCFunction)path_expire, METH_NOARGS, "expire() -> vCPUs to kick as domain << 8 | vcpu: late EOIs whose time has come take place."},
    VAR(eoi, "eoi(domain, port, slot, spurious=0) -> vCPU whose doorbell is to be rung, or -1.  Mirrors xen_irq_lateeoi."),
    VAR(set_doorbell, "set_doorbell(domain, vcpu, eventfd or -1): where serve_hypervisor kicks."),
    VAR(set_door, "set_door(slot, socket fd or -1): where a file's doorbell byte is sent."),
#ifndef PVBUS_EXPLORED
    {"serve_hypervisor", (PyCFunction)pv_serve_hypervisor, METH_VARARGS, pv_serve_hypervisor_doc},
    {"serve_cpu", (PyCFunction)pv_serve_cpu, METH_VARARGS, pv_serve_cpu_doc},
#endif
    {"set_hyperv", (PyCFunction)pv_path_hv_set_hyperv, METH_VARARGS, "set_hyperv(domain, Memory, workqueue's eventfd or -1): the domain is on the Hyper-V platform."},
    {"set_exit", (PyCFunction)pv_path_hv_set_exit, METH_VARARGS, "set_exit(domain, vcpu, eventfd or -1): rung when the vCPU has written EOM."},
    {"set_channel_door", (PyCFunction)pv_path_hv_set_channel_door, METH_VARARGS, "set_channel_door(domain, relid, eventfd or -1): rung by the event tasklet."},
    {"hv_run", (PyCFunction)pv_path_hv_run, METH_VARARGS, "hv_run(domain, vcpu) -> (done, relids to ring, work queued, EOM written): vmbus_isr and its tasklets, once."},
    {"hv_recover", (PyCFunction)pv_path_hv_recover, METH_VARARGS, "hv_recover(domain, vcpu): an heir's first look at the work ring; both tasklets are scheduled."},
    {"kick_vcpu", (PyCFunction)pv_path_hv_kick, METH_VARARGS, "kick_vcpu(domain, vcpu) -> 1 when its doorbell is to be rung: after a vector was requested."},
    {"hypervisor_may_sleep", (PyCFunction)path_hypervisor_may_sleep, METH_O, "hypervisor_may_sleep(public page) -> False when work came in between."},
    {"grow", (PyCFunction)path_grow, METH_O, "grow(slot) -> new ring size.  Mirrors evtchn_resize_ring."},
    {"reset", (PyCFunction)path_reset, METH_O, "reset(slot): a new, empty epoch of the ring.  Mirrors IOCTL_EVTCHN_RESET."},
    {"poison", (PyCFunction)path_poison, METH_O, "poison(slot) -> 1 if its doorbell needs a byte: the file answers EIO from now on."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot path_slots[] = {
    {Py_tp_new, path_new},
    {Py_tp_dealloc, path_dealloc},
    {Py_tp_methods, path_methods},
    {Py_tp_doc, "EventPath(machine, {domain id: Memory}): the machine's side of the event path."},
    {0, NULL},
};
static PyType_Spec path_spec = {"pvbus.shm._core.EventPath", sizeof(PathObject), 0, Py_TPFLAGS_DEFAULT, path_slots};

int pv_event_path_init(PyObject *module)
{
    PyObject *type = PyType_FromSpec(&path_spec);
    if (type == NULL)
        return -1;
    int r = PyModule_AddObjectRef(module, "EventPath", type);
    Py_DECREF(type);
    return r;
}
