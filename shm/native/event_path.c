/* SPDX-License-Identifier: Apache-2.0 */
/*
 * EventPath: the machine's side of the event path over its mapped segments.  The hypervisor process drains submission rings
 * and raises ports with it, a cpu process runs its upcalls, a file process grows and resets its ring.  Everything a user can
 * write is read once and checked here; an impossible index poisons that ring only.
 */
#include "core.h"

#include <errno.h>
#ifndef PVBUS_EXPLORED
#include <sched.h>
#endif

#define KICKS_MAX (PV_DOMAINS_MAX * PV_VCPUS_MAX) /* a kick that found no room would be a lost interrupt */

typedef struct {
    PyObject_HEAD
    MemoryObject *machine;
    uint32_t domain_ids[PV_DOMAINS_MAX];
    MemoryObject *domains[PV_DOMAINS_MAX];
    uint32_t domain_count;
    MemoryObject *pages[PV_FILES_MAX];
    MemoryObject *rings[PV_SUBMISSIONS_MAX];
    uint32_t ring_slot[PV_SUBMISSIONS_MAX];
    uint32_t rings_end; /* one past the highest ring attached */
} PathObject;

typedef struct {
    uint32_t kicks[KICKS_MAX], kick_count; /* domain << 8 | vCPU whose doorbell is to be rung */
    uint32_t rearm[KICKS_MAX], rearm_count;
    uint32_t poisoned[KICKS_MAX], poisoned_count;
    uint32_t done;
    uint64_t now;
} drained;

static MemoryObject *domain_of(PathObject *self, uint32_t domid)
{
    for (uint32_t i = 0; i < self->domain_count; i++)
        if (self->domain_ids[i] == domid)
            return self->domains[i];
    return NULL;
}

static int64_t kick(PathObject *self, uint32_t domid, int64_t marked, drained *out)
{
    int64_t asleep;
    if (marked == 0)
        return 0;
    uint32_t vcpu = (uint32_t)marked - 1;
    PV_TRY(asleep, pv_vcpu_kick(domain_of(self, domid), vcpu));
    if (asleep && out->kick_count < KICKS_MAX) /* one announcement, one kick: at most one a vCPU */
        out->kicks[out->kick_count++] = domid << 8 | vcpu;
    return 0;
}

#define SUB(i, field) PV_SUBMISSION(i, field)

/* Record what is about to be done: an heir compares the target's count of services with the one noted here. */
static int64_t claim(PathObject *self, uint32_t index, uint32_t head, MemoryObject *domain, uint32_t port)
{
    uint64_t irq;
    PV_LOAD64(irq, domain, PV_IRQ_WORD(port), PV_RELAXED, "irq");
    PV_STORE64(self->machine, SUB(index, claim), PV_CLAIM_VALID | (uint64_t)(head & 0x7fffffffu) << 32 | PV_IRQ_SERVED(irq),
               PV_RELAXED, "sub.claim");
    return 0;
}

/* Where a notify of this port goes: 1 and the target, or 0 when it is dropped (unbound peer, or not this file's port). */
static int64_t target_of(PathObject *self, MemoryObject *domain, uint32_t domid, uint32_t slot, uint32_t port,
                         MemoryObject **to, uint32_t *to_id, uint32_t *to_port)
{
    uint64_t irq, word;
    PV_LOAD64(irq, domain, PV_IRQ_WORD(port), PV_RELAXED, "irq");
    if (PV_IRQ_SLOT(irq) != slot + 1) {
        PV_COUNT64(self->machine, offsetof(struct pv_machine_header, refused), 1);
        return 0;
    }
    PV_LOAD64(word, domain, PV_PORT_WORD(port), PV_RELAXED, "port");
    if (PV_PORT_STATE(word) == PV_IPI) {
        *to = domain;
        *to_id = domid;
        *to_port = port;
        return 1;
    }
    if (PV_PORT_STATE(word) != PV_INTERDOMAIN)
        return 0;
    *to_id = PV_PORT_REMOTE_DOMAIN(word);
    *to_port = PV_PORT_REMOTE_PORT(word);
    *to = domain_of(self, *to_id);
    return *to != NULL && *to_port < PV_PORTS_2L;
}

static int64_t execute(PathObject *self, uint32_t index, uint32_t head, uint32_t slot, uint32_t entry, drained *out)
{
    uint32_t domid, port = PV_SUB_PORT(entry), to_id = 0, to_port = 0;
    int64_t r, marked;
    MemoryObject *to = NULL;
    PV_LOAD32(domid, self->machine, PV_FILE(slot, domain), PV_RELAXED, "file.domain");
    MemoryObject *domain = domain_of(self, domid);
    if (PV_SUB_OP(entry) == PV_SUB_REARM) {
        if (out->rearm_count < KICKS_MAX)
            out->rearm[out->rearm_count++] = slot;
        return 0;
    }
    if (domain == NULL || port == 0 || port >= PV_PORTS_2L || PV_SUB_OP(entry) > PV_SUB_ENABLE) {
        PV_COUNT64(self->machine, offsetof(struct pv_machine_header, refused), 1);
        return 0;
    }
    if (PV_SUB_OP(entry) == PV_SUB_ENABLE) {
        PV_TRY(r, claim(self, index, head, domain, port));
        PV_TRY(marked, pv_eoi(domain, port, slot));
        PV_COUNT64(self->machine, offsetof(struct pv_machine_header, enables), 1);
        return kick(self, domid, marked, out);
    }
    PV_COUNT64(self->machine, offsetof(struct pv_machine_header, notifies), 1);
    PV_TRY(r, target_of(self, domain, domid, slot, port, &to, &to_id, &to_port));
    if (!r)
        return 0;
    PV_TRY(r, claim(self, index, head, to, to_port));
    PV_TRY(marked, pv_set_pending(to, to_port, out->now));
    return kick(self, to_id, marked, out);
}

/* Take at most `budget` entries of one ring. */
static int64_t drain_ring(PathObject *self, uint32_t index, uint32_t budget, drained *out)
{
    MemoryObject *ring = self->rings[index];
    uint32_t head, tail, entry, state;
    int64_t r;
    PV_LOAD32(head, self->machine, SUB(index, head), PV_RELAXED, "sub.head");
    /* SYNC(sub_publish): the tail before the entries that it covers. */
    PV_LOAD32(tail, ring, offsetof(struct pv_submission_ring, tail), PV_ACQUIRE, "sub_publish");
    if (tail == head)
        return 0;
    PV_LOAD32(state, self->machine, SUB(index, state), PV_RELAXED, "sub.state");
    if (state != 1)
        return 0;
    uint32_t count = tail - head;
    if (count > PV_SUBMISSION_ENTRIES) {
        PV_STORE32(self->machine, SUB(index, state), 2, PV_RELAXED, "sub.poison");
        PV_COUNT64(self->machine, offsetof(struct pv_machine_header, poisoned), 1);
        if (out->poisoned_count < KICKS_MAX)
            out->poisoned[out->poisoned_count++] = self->ring_slot[index];
        return 0;
    }
    if (count > budget)
        count = budget;
    if (out->now == 0) {
#ifndef PVBUS_EXPLORED
        out->now = pv_now_ns();
#else
        out->now = 1;
#endif
    }
    for (uint32_t i = 0; i < count && out->rearm_count < KICKS_MAX; i++, head++) {
        PV_LOAD32(entry, ring, PV_SUBMISSION_DATA + 4u * (size_t)(head & (PV_SUBMISSION_ENTRIES - 1)), PV_RELAXED, "sub.entry");
        PV_TRY(r, execute(self, index, head, self->ring_slot[index], entry, out));
        PV_STORE32(self->machine, SUB(index, head), head + 1, PV_RELAXED, "sub.head");
        out->done++;
    }
    PV_COUNT64(self->machine, SUB(index, taken), count);
    /* SYNC(sub_room): done with the entries before the user may overwrite them. */
    PV_STORE32(ring, offsetof(struct pv_submission_ring, head), head, PV_RELEASE, "sub_room");
    return 0;
}

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

static int64_t drain_all(PathObject *self, uint32_t first, uint32_t end, uint32_t budget, drained *out)
{
    int64_t r;
    for (uint32_t i = first; i < end; i++)
        if (self->rings[i] != NULL)
            PV_TRY(r, drain_ring(self, i, budget, out));
    return 0;
}

static PyObject *path_drain(PathObject *self, PyObject *args)
{
    unsigned int budget;
    int index = -1;
    drained out;
    out.done = out.kick_count = out.rearm_count = out.poisoned_count = 0;
    out.now = 0;
    if (!PyArg_ParseTuple(args, "I|i", &budget, &index))
        return NULL;
    uint32_t first = index < 0 ? 0 : (uint32_t)index, end = index < 0 ? self->rings_end : (uint32_t)index + 1;
    if (end > PV_SUBMISSIONS_MAX)
        return PyErr_Format(PyExc_IndexError, "no submission ring %d", index);
    if (drain_all(self, first, end, budget, &out) == PV_DEAD)
        return NULL;
    return drained_result(&out);
}

/* Announce that the hypervisor may sleep; 0 when work came in between, or 1. */
static int64_t may_sleep(PathObject *self, MemoryObject *public_page)
{
    uint32_t head, tail;
    PV_STORE32(public_page, offsetof(struct pv_public_page, hypervisor_sleeping), 1, PV_RELAXED, "sub.announce");
    /* SYNC(sub_kick): announced before we look at the tails; the user publishes its tail before it looks at us. */
    PV_SMP_MB(public_page, "sub_kick");
    for (uint32_t i = 0; i < self->rings_end; i++) {
        if (self->rings[i] == NULL)
            continue;
        PV_LOAD32(head, self->machine, SUB(i, head), PV_RELAXED, "sub.head");
        PV_LOAD32(tail, self->rings[i], offsetof(struct pv_submission_ring, tail), PV_RELAXED, "sub.tail");
        uint32_t state = 1;
        if (head != tail)
            PV_LOAD32(state, self->machine, SUB(i, state), PV_RELAXED, "sub.state");
        if (head != tail && state == 1) {
            PV_STORE32(public_page, offsetof(struct pv_public_page, hypervisor_sleeping), 0, PV_RELAXED, "sub.awake");
            return 0;
        }
    }
    return 1;
}

static PyObject *path_hypervisor_may_sleep(PathObject *self, PyObject *public_page)
{
    if (pv_memory_check(public_page, 4096, "the public page") < 0)
        return NULL;
    int64_t r = may_sleep(self, (MemoryObject *)public_page);
    return r == PV_DEAD ? NULL : PyBool_FromLong(r != 0);
}

static int64_t cpu_may_sleep(MemoryObject *domain, uint32_t vcpu)
{
    uint8_t pending;
    PV_STORE32(domain, PV_VCPU(vcpu, sleeping), 1, PV_RELAXED, "cpu.announce");
    /* SYNC(cpu_sleep): announced before we look at the upcall flag; the sender sets the flag before it looks at us. */
    PV_SMP_MB(domain, "cpu_sleep");
    PV_LOAD8(pending, domain, PV_VCPU_INFO(vcpu, evtchn_upcall_pending), PV_RELAXED, "2l.upcall.look");
    if (!pending)
        return 1;
    PV_STORE32(domain, PV_VCPU(vcpu, sleeping), 0, PV_RELAXED, "cpu.awake");
    return 0;
}

static MemoryObject *checked_domain(PathObject *self, unsigned int domid, unsigned int vcpu, unsigned int port)
{
    MemoryObject *domain = domain_of(self, domid);
    if (domain == NULL)
        PyErr_Format(PyExc_LookupError, "no domain %u", domid);
    else if (vcpu >= PV_VCPUS_MAX || port >= PV_PORTS_2L)
        PyErr_Format(PyExc_IndexError, "no vCPU %u or port %u", vcpu, port), domain = NULL;
    return domain;
}

static PyObject *path_cpu_may_sleep(PathObject *self, PyObject *args)
{
    unsigned int domid, vcpu;
    MemoryObject *domain;
    if (!PyArg_ParseTuple(args, "II", &domid, &vcpu) || (domain = checked_domain(self, domid, vcpu, 0)) == NULL)
        return NULL;
    int64_t r = cpu_may_sleep(domain, vcpu);
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
        unsigned int domid, port, extra = 0; \
        MemoryObject *domain; \
        if (!PyArg_ParseTuple(args, "II|I", &domid, &port, &extra) || \
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
PORT_METHOD(eoi, (pv_eoi(domain, port, extra)))

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

/* An heir: was the entry that its forerunner had claimed executed?  Then it is behind us. */
static int64_t resolve_claim(PathObject *self, uint32_t index)
{
    uint32_t head, entry, domid, to_id = 0, to_port, slot = self->ring_slot[index];
    uint64_t noted, irq;
    int64_t r;
    PV_LOAD64(noted, self->machine, SUB(index, claim), PV_RELAXED, "sub.claim");
    PV_LOAD32(head, self->machine, SUB(index, head), PV_RELAXED, "sub.head");
    if (!(noted & PV_CLAIM_VALID) || (uint32_t)(noted >> 32 & 0x7fffffffu) != (head & 0x7fffffffu))
        return 0;
    PV_LOAD32(entry, self->rings[index], PV_SUBMISSION_DATA + 4u * (size_t)(head & (PV_SUBMISSION_ENTRIES - 1)), PV_RELAXED, "sub.entry");
    PV_LOAD32(domid, self->machine, PV_FILE(slot, domain), PV_RELAXED, "file.domain");
    MemoryObject *to = domain_of(self, domid);
    to_port = PV_SUB_PORT(entry);
    if (to == NULL || to_port == 0 || to_port >= PV_PORTS_2L)
        return 0;
    if (PV_SUB_OP(entry) == PV_SUB_NOTIFY) {
        PV_TRY(r, target_of(self, to, domid, slot, to_port, &to, &to_id, &to_port));
        if (!r)
            return 0;
    }
    PV_LOAD64(irq, to, PV_IRQ_WORD(to_port), PV_RELAXED, "irq");
    if (PV_IRQ_SERVED(irq) != (uint32_t)noted)
        PV_STORE32(self->machine, SUB(index, head), head + 1, PV_RELAXED, "sub.head");
    return 0;
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
        if (resolve_claim(self, index) == PV_DEAD)
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
        if (PyErr_Occurred() || !slot_in_range((unsigned int)slot, PV_FILES_MAX, "file slot")) \
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
    if (path_set_domains(self, domains) < 0)
        Py_CLEAR(self);
    return (PyObject *)self;
}

static void path_dealloc(PathObject *self)
{
    Py_CLEAR(self->machine);
    for (uint32_t i = 0; i < self->domain_count; i++)
        Py_CLEAR(self->domains[i]);
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
    VAR(eoi, "eoi(domain, port, slot) -> vCPU whose doorbell is to be rung, or -1.  Mirrors xen_irq_lateeoi."),
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
