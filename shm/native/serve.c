/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The idle loops of the hypervisor and the cpu processes, between two looks at their sockets: serve, ring doorbells, spin a
 * little, announce sleep, sleep in epoll.  They are here because a wake-up costs the event path two microseconds in C and
 * fifteen in Python.  No decision is made here that the explorer would have to see: it runs the functions that this calls.
 *
 * Doorbells are edge-triggered eventfds in the epoll set of the process's inbox.  Anything else that becomes ready is
 * level-triggered, and sends us back to Python, which finds it again.
 */
#ifndef PVBUS_EXPLORED

#include "hv.h"
#include "spin.h"

#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#ifdef PVBUS_GATED
#define BUDGET 1u            /* as in the scenarios: each event an upcall of its own */
#define CPU_SPINS 0          /* nor has a trace a place for looks that find nothing */
#else
#define BUDGET 256u          /* entries of one ring, events of one upcall: then the others, and the doorbells, get their turn */
#endif
#define ROUNDS_A_LOOK 64u    /* rounds of work between two looks at the sockets: a look costs a system call */
/*
 * How often the hypervisor looks for work before it sleeps, while that has paid lately: some 50 us of its own time, about what
 * it takes from a kick until the user that it reaches has answered.  Measured on two cores, this halves a round trip.  A CPU
 * looks for long enough to hear of what the hypervisor has in hand; a stream has a tenth more events for it.
 */
#define SPINS 128
#ifndef CPU_SPINS
#define CPU_SPINS 16
#endif
#define BESIDE_MAX 4u         /* batches in a row from its own core until the hypervisor leaves it, */
#define MOVE_NS_MIN 1000000u  /* and how long it stays elsewhere at least: a move costs 30 us */
#define EVENTS_MAX 32

typedef struct {
    PathObject *path;
    MemoryObject *public_page; /* the hypervisor */
    MemoryObject *domain;      /* a CPU */
    MemoryObject *hv;          /* of a domain on the Hyper-V platform */
    uint32_t index;            /* the domain's */
    uint32_t vcpu;
} server;

static void send_byte(PathObject *path, uint32_t slot)
{
    /* A full socket holds bytes enough, a broken one has no reader. */
    if (slot < PV_FILES_MAX && path->doors[slot] >= 0)
        PV_STEP(0, 0, "door.send", (void)!send(path->doors[slot], "\1", 1, MSG_DONTWAIT | MSG_NOSIGNAL));
}

static void ring(PathObject *path, uint32_t code)
{
    uint64_t one = 1;
    for (uint32_t i = 0; i < path->domain_count; i++)
        if (path->domain_ids[i] == code >> 8 && path->doorbells[i][code & 0xff] >= 0)
            (void)!write(path->doorbells[i][code & 0xff], &one, sizeof one);
}

static void ring_eventfd(int fd)
{
    uint64_t one = 1;
    if (fd >= 0)
        (void)!write(fd, &one, sizeof one);
}

/* Interrupts and tasklets of Hyper-V: how much was done. */
static uint32_t work_hv(server *s)
{
    pv_hv_effects out;
    pv_hv_effects_clear(&out);
    int64_t done = pv_hv_run(s->path->machine, s->hv, s->vcpu, &out);
    int *doors = s->path->channel_doors[s->index];
    for (uint32_t i = 0; doors != NULL && i < out.channel_count; i++)
        ring_eventfd(out.channels[i] < PV_HV_FLAGS ? doors[out.channels[i]] : -1);
    if (out.work)
        ring_eventfd(s->path->work_doorbells[s->index]);
    if (out.eom)
        ring_eventfd(s->path->exits[s->index][s->vcpu]);
    return (uint32_t)done;
}

/*
 * On two cores the machine keeps to one of them and leaves the other to its users: hypervisor and CPUs wait for each other all
 * the time, and a core goes from one process to the next in a microsecond, and takes ten to wake the other core.  The
 * hypervisor runs where the scheduler puts it, and the CPUs follow.  With more cores the scheduler has room for everyone.
 * The word is a hint and orders nothing: who reads an old one is on the wrong core for some rounds.
 */
static void keep_together(server *s)
{
    PathObject *path = s->path;
    uint64_t *said = PV_AT(uint64_t, path->machine, offsetof(struct pv_machine_header, hypervisor_core));
    int core = s->domain == NULL ? sched_getcpu() + 1 : (int)__atomic_load_n(said, __ATOMIC_RELAXED);
    cpu_set_t now, wanted;
    if (core == path->core || path->stays || sched_getaffinity(0, sizeof now, &now) != 0)
        return;
    if (s->domain == NULL) { /* as many as it may have now */
        __atomic_store_n(said, CPU_COUNT(&now) == 2 ? (uint64_t)core : 0, __ATOMIC_RELAXED);
        path->core = core;
        return;
    }
    if (path->core == 0)
        path->born = path->last = now;
    path->stays = !CPU_EQUAL(&now, &path->last) || core > CPU_SETSIZE; /* somebody else has decided */
    wanted = path->born;
    if (core > 0) {
        CPU_ZERO(&wanted);
        CPU_SET((size_t)core - 1, &wanted);
        CPU_AND(&wanted, &wanted, &path->born);
    }
    if (path->stays || CPU_COUNT(&wanted) == 0 || sched_setaffinity(0, sizeof wanted, &wanted) != 0)
        return;
    path->core = core;
    path->last = wanted;
}

/*
 * The hypervisor goes to the other core when users are on its own and none of the machine's is there: it looks for work all the
 * time, and who wakes on that core waits for its turn.  Theirs may be a server that has gone to its client.  One that sleeps
 * between batches is in nobody's way.
 */
static void make_room(server *s, const drained *out)
{
    PathObject *path = s->path;
    int core = sched_getcpu();
    cpu_set_t now, other;
    if (core < 0 || out->cores != 1ull << ((core + 1) & 63)) {
        path->beside = 0;
        return;
    }
    if (++path->beside < BESIDE_MAX || out->now - path->moved_ns < MOVE_NS_MIN)
        return;
    path->beside = 0;
    path->moved_ns = out->now;
    if (sched_getaffinity(0, sizeof now, &now) != 0 || CPU_COUNT(&now) != 2)
        return;
    other = now;
    CPU_CLR((size_t)core, &other);
    if (CPU_COUNT(&other) != 1 || sched_setaffinity(0, sizeof other, &other) != 0)
        return;
    cpu_set_t since; /* somebody else may have decided meanwhile */
    if (sched_getaffinity(0, sizeof since, &since) == 0 && CPU_EQUAL(&since, &other))
        (void)sched_setaffinity(0, sizeof now, &now);
    keep_together(s);
}

/* One bounded batch; how many entries or events. */
static uint32_t work(server *s)
{
    if (s->domain != NULL) {
        pv_wakes wakes;
        wakes.count = 0;
        int64_t events = pv_upcall(s->path->machine, s->domain, s->path->pages, s->vcpu, BUDGET, &wakes);
        for (uint32_t i = 0; i < wakes.count; i++)
            send_byte(s->path, wakes.slots[i]);
        return (uint32_t)events + (s->hv != NULL ? work_hv(s) : 0);
    }
    drained out;
    pv_drained_clear(&out);
    pv_drain(s->path, 0, s->path->rings_end, BUDGET, &out);
    pv_expire(s->path, &out);
    for (uint32_t i = 0; i < out.kick_count; i++)
        ring(s->path, out.kicks[i]);
    for (uint32_t i = 0; i < out.rearm_count; i++)
        send_byte(s->path, out.rearm[i]);
    for (uint32_t i = 0; i < out.poisoned_count; i++) {
        uint32_t slot = out.poisoned[i];
        if (s->path->pages[slot] != NULL && pv_ring_poison(s->path->machine, slot, s->path->pages[slot]))
            send_byte(s->path, slot);
    }
    if (out.cores != 0)
        make_room(s, &out);
    return out.done;
}

/* 0 no, 1 yes, 2 for a moment */
static int may_sleep(server *s)
{
    return s->domain != NULL ? (int)pv_cpu_may_sleep(s->domain, s->hv, s->vcpu)
                             : pv_hypervisor_may_sleep(s->path, s->public_page) != 0;
}

static void awake(server *s)
{
    if (s->domain != NULL)
        PV_STORE32(s->domain, PV_VCPU(s->vcpu, sleeping), 0, PV_RELAXED, "cpu.awake");
    else
        pv_hypervisor_awake(s->public_page);
}

/*
 * Between two looks of the hypervisor at the rings: whoever looks at every entry as it comes takes three cache lines from the
 * other core each time, and slows the sender down tenfold.  After some 300 ns there is a handful to take.
 */
static void breathe(void)
{
    for (int i = 0; i < 16; i++)
        PV_RELAX();
}

/* Spin for work that comes soon, if that has paid lately.  1 when some was done. */
static int spin(server *s)
{
    pv_spinner *spinner = &s->path->spinner;
    uint64_t now, deadline;
    if ((s->domain != NULL && spinner->alone) || !pv_spin_may(spinner))
        return 0;
    now = pv_now_ns();
    deadline = now + PV_SPIN_NS_MAX;
    for (int turns = s->domain == NULL ? SPINS : CPU_SPINS; turns > 0 && now < deadline; turns--) {
        int soon = pv_spin_yield(&now);
        uint32_t done = work(s);
        if (!soon)
            pv_spin_busy(spinner);
        else if (done)
            pv_spin_paid(spinner, 1);
        if (done || !soon)
            return done != 0;
        breathe();
    }
    pv_spin_paid(spinner, 0);
    return 0;
}

enum { DOORBELLS, SOMETHING, TIME_OVER };

/* What became ready: at most edge-triggered doorbells, something for Python, nothing in the time given. */
static int look(int epoll, int timeout_ms, const uint64_t *doorbells, size_t doorbell_words)
{
    struct epoll_event events[EVENTS_MAX];
    int n = epoll_wait(epoll, events, EVENTS_MAX, timeout_ms);
    if (n < 0)
        return SOMETHING; /* a signal: Python runs its handler */
    for (int i = 0; i < n; i++) {
        size_t fd = (size_t)events[i].data.fd;
        if (fd / 64 >= doorbell_words || !(doorbells[fd / 64] >> (fd % 64) & 1))
            return SOMETHING;
    }
    return n == 0 ? TIME_OVER : DOORBELLS;
}

static void serve(server *s, int epoll, int timeout_ms, const uint64_t *doorbells, size_t doorbell_words)
{
    keep_together(s);
    for (uint32_t rounds = 1;; rounds++) {
        if (rounds % ROUNDS_A_LOOK == 0) {
            keep_together(s);
            if (look(epoll, 0, doorbells, doorbell_words) == SOMETHING)
                return;
        }
        if (work(s) || spin(s)) {
            if (s->domain == NULL)
                breathe();
            continue;
        }
        int sleep = may_sleep(s);
        if (!sleep)
            continue;
        /* A late EOI that waits; a message that waits for room in the work ring. */
        int64_t timer_ms = s->domain == NULL ? pv_expires_in(s->path) : sleep == 2 ? 1 : -1;
        int ours = timer_ms >= 0 && (timeout_ms < 0 || timer_ms < timeout_ms);
        int ready = look(epoll, ours ? (int)timer_ms : timeout_ms, doorbells, doorbell_words);
        awake(s);
        s->path->beside = 0;
        keep_together(s);
        if (ready == SOMETHING || (ready == TIME_OVER && !ours) || timeout_ms == 0)
            return;
    }
}

static PyObject *served(server *s, int epoll, int timeout_ms, Py_buffer *doorbells)
{
    Py_BEGIN_ALLOW_THREADS
    serve(s, epoll, timeout_ms, doorbells->buf, (size_t)doorbells->len / 8);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(doorbells);
    Py_RETURN_NONE;
}

const char pv_serve_hypervisor_doc[] =
    "serve_hypervisor(public page, epoll fd, timeout in ms or -1, bitmap of doorbell fds as bytes): drain and sleep until "
    "something other than a doorbell is ready, or the time is over.";

PyObject *pv_serve_hypervisor(PathObject *self, PyObject *args)
{
    PyObject *public_page;
    int epoll, timeout_ms;
    Py_buffer doorbells;
    if (!PyArg_ParseTuple(args, "Oiiy*", &public_page, &epoll, &timeout_ms, &doorbells))
        return NULL;
    if (pv_memory_check(public_page, 4096, "the public page") < 0) {
        PyBuffer_Release(&doorbells);
        return NULL;
    }
    server s = {self, (MemoryObject *)public_page, NULL, NULL, 0, 0};
    return served(&s, epoll, timeout_ms, &doorbells);
}

const char pv_serve_cpu_doc[] =
    "serve_cpu(domain, vcpu, epoll fd, timeout in ms or -1, bitmap of doorbell fds as bytes): take upcalls and sleep until "
    "something other than a doorbell is ready, or the time is over.";

PyObject *pv_serve_cpu(PathObject *self, PyObject *args)
{
    unsigned int domid, vcpu;
    int epoll, timeout_ms;
    Py_buffer doorbells;
    if (!PyArg_ParseTuple(args, "IIiiy*", &domid, &vcpu, &epoll, &timeout_ms, &doorbells))
        return NULL;
    int index = pv_domain_index(self, domid);
    if (index < 0 || vcpu >= PV_VCPUS_MAX) {
        PyBuffer_Release(&doorbells);
        return PyErr_Format(PyExc_LookupError, "no cpu/%u.%u", domid, vcpu);
    }
    server s = {self, NULL, self->domains[index], self->hyperv[index], (uint32_t)index, vcpu};
    return served(&s, epoll, timeout_ms, &doorbells);
}

#endif
