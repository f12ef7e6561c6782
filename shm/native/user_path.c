/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The user's side of an open event-channel file: read, write, poll and notify without a message.  A Context is what all
 * references of one process share (page, submission ring, doorbell); a UserFile is one reference (access mode, open or closed).
 *
 * The doorbell is one end of a socketpair.  Whoever finds the ring empty takes the byte, lowers the door, looks again; if
 * entries came in between and are left unread, the machine is asked for a new byte (SUB_REARM).
 */
#include "user.h"

#include <errno.h>
#include <poll.h>
#ifndef PVBUS_EXPLORED
#include <fcntl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#endif

#define SPINS 64                              /* some 20 us of our own time: a blocked wake costs 13-15, so about as long as that */
#define TIMEOUT_MS_MAX 2147483647 /* poll(2) has an int */
#define PUSHBACK_NS_MAX 10000000000ull        /* a hypervisor that takes nothing for ten seconds is gone */

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
static int may_block(ContextObject *c) { (void)c; return 0; }
static void say_core(ContextObject *c) { (void)c; }
static int64_t push_back(ContextObject *c, uint64_t *deadline) { (void)deadline; PV_SPIN(c->ring, "sub.full"); return 0; }
#else
/* Take the byte(s) out of the doorbell: how many, 0 when there is none. */
static int64_t door_take(ContextObject *c)
{
    char bytes[64];
    ssize_t n;
    PV_STEP(0, 0, "door.take", n = recv(c->door, bytes, sizeof bytes, MSG_DONTWAIT));
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
    PV_STEP(0, 0, "door.wait", (void)0);
    if (n > 0)
        return 1;
    return n == 0 ? -EIO : -error;
}

static int64_t ring_doorbell(ContextObject *c)
{
    uint64_t one = 1;
    ssize_t n;
    PV_STEP(0, 0, "kick", n = write(c->kick, &one, sizeof one));
    return n == sizeof one || errno == EAGAIN ? 0 : -EIO;
}

#ifdef PVBUS_GATED
static int64_t spin_for_entry(ContextObject *c) { (void)c; return 0; } /* a trace has no place for chance */
#else
/* Look for an entry a moment longer before sleeping, if that has paid lately. */
static int64_t spin_for_entry(ContextObject *c)
{
    int64_t state = 0;
    int soon = 1;
    if (c->spinner.alone || !pv_spin_may(&c->spinner))
        return 0;
    uint64_t now = pv_now_ns(), deadline = now + PV_SPIN_NS_MAX;
    Py_BEGIN_ALLOW_THREADS
    for (int turns = SPINS; turns > 0 && state == 0 && soon && now < deadline; turns--) {
        soon = pv_spin_yield(&now);
        for (int i = 0; i < 16 && state == 0; i++) {
            PV_RELAX();
            state = pv_ring_state(c->page);
        }
    }
    Py_END_ALLOW_THREADS
    if (soon)
        pv_spin_paid(&c->spinner, state != 0);
    else
        pv_spin_busy(&c->spinner);
    return state != 0;
}
#endif

/* A file that is O_NONBLOCK says EAGAIN at once.  Asked when a read is about to sleep, not at every read. */
static int may_block(ContextObject *c)
{
    return !(fcntl(c->door, F_GETFL) & O_NONBLOCK);
}

/* Where we are: the hypervisor makes room for us (make_room in serve.c).  It orders nothing, and an old one does no harm. */
static void say_core(ContextObject *c)
{
    uint32_t core = (uint32_t)(sched_getcpu() + 1);
    if (core == c->core)
        return;
    c->core = core;
    __atomic_store_n(PV_AT(uint32_t, c->ring, offsetof(struct pv_submission_ring, core)), core, __ATOMIC_RELAXED);
}

/* The submission ring is full: let the hypervisor run.  Bounded. */
static int64_t push_back(ContextObject *c, uint64_t *deadline)
{
    uint64_t now = pv_now_ns();
    char byte;
    if (recv(c->door, &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0)
        return -EIO; /* hung up: the machine has died */
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
        if (c->fork_generation != pv_fork_generation)
            return -EINTR; /* a signal handler has forked, and this is the child: the ring is its parent's */
    }
}

static int64_t flush(ContextObject *c)
{
    int64_t must;
    say_core(c);
    PV_TRY(must, pv_submission_must_kick(c->public_page, &c->rung));
    return must ? ring_doorbell(c) : 0;
}

/* -EIO when the file was released under us: its process has died. */
static int64_t is_alive(ContextObject *c)
{
    uint32_t released;
    PV_LOAD32(released, c->page, PV_PAGE(released), PV_RELAXED, "file.released");
    return released ? -EIO : 0;
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
int64_t pv_file_read(ContextObject *c, uint32_t *out, uint32_t max)
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
        if (may_block(c)) {
            PV_TRY(r, spin_for_entry(c));
            if (r)
                continue;
        }
        PV_TRY(r, door_wait(c));
        if (r == -EAGAIN) {
            /* The door hangs up when the last process that holds its other end has heard of the release. */
            int64_t dead;
            PV_TRY(dead, is_alive(c));
            return dead < 0 ? dead : r;
        }
        if (r < 0)
            return r;
        woken = 1;
    }
    if (taken < 0 && lowered) /* an error for us; another sleeper still needs the byte */
        PV_TRY(r, rearm(c));
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
int64_t pv_file_poll(ContextObject *c, unsigned events, int64_t timeout_ms)
{
#ifdef PVBUS_EXPLORED
    (void)timeout_ms;
    int64_t state;
    PV_TRY(state, pv_ring_state(c->page));
    return mask_of(state) & (events | POLLERR);
#else
    if (timeout_ms > TIMEOUT_MS_MAX)
        timeout_ms = TIMEOUT_MS_MAX;
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
        if (state == 0 && (timeout_ms < 0 || now + PV_SPIN_NS_MAX < deadline)) {
            PV_TRY(again, spin_for_entry(c));
            if (again)
                continue;
            now = pv_now_ns();
        }
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

int64_t pv_file_enable(ContextObject *c, const uint32_t *ports, size_t n)
{
    int64_t mine, r;
    PV_TRY(r, is_alive(c));
    for (size_t i = 0; i < n && r == 0; i++) {
        PV_TRY(mine, is_mine(c, ports[i]));
        if (mine)
            PV_TRY(r, submit(c, PV_SUB_ENABLE, ports[i]));
    }
    if (r < 0)
        return r;
    PV_TRY(r, flush(c));
    return r < 0 ? r : (int64_t)n;
}

int64_t pv_file_notify(ContextObject *c, const uint32_t *ports, size_t n)
{
    int64_t mine, r;
    PV_TRY(r, is_alive(c));
    if (r < 0)
        return r;
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

int64_t pv_file_drain_door(ContextObject *c)
{
    int64_t again;
    PV_TRY(again, lower(c, 0));
    return again > 0 ? rearm(c) : 0;
}
