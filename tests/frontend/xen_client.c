/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A client of libxenevtchn, as any program of a Xen host is one: tour, signals, ping-pong N, readers, hold.
 * Ends with 0, or with 1 behind a line that names what did not hold.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>
#include <xenevtchn.h>

#define CHECK(holds) ((holds) ? (void)0 : failed(#holds, __LINE__))
#define PORTS 300

static void failed(const char *what, int line)
{
    fprintf(stderr, "line %d: %s does not hold, errno %s\n", line, what, strerror(errno));
    exit(1);
}

static int fails_with(long value, int error)
{
    return value == -1 && errno == error;
}

static int readable(int fd, int timeout_ms)
{
    struct pollfd one = {fd, POLLIN, 0};
    return poll(&one, 1, timeout_ms) == 1 && (one.revents & POLLIN);
}

static xenevtchn_handle *opened(void)
{
    xenevtchn_handle *handle = xenevtchn_open(NULL, 0);
    CHECK(handle != NULL);
    return handle;
}

/* One pair of connected ports; the event of the birth is taken. */
static void connected(xenevtchn_handle *a, xenevtchn_handle *b, evtchn_port_t *pa, evtchn_port_t *pb)
{
    int one = xenevtchn_bind_unbound_port(a, 0);
    CHECK(one > 0);
    int other = xenevtchn_bind_interdomain(b, 0, one);
    CHECK(other > 0);
    CHECK(xenevtchn_pending(b) == other && xenevtchn_unmask(b, other) == 0);
    *pa = one, *pb = other;
}

static void tour(void)
{
    xenevtchn_handle *a = opened(), *b = opened();
    int fa = xenevtchn_fd(a), fb = xenevtchn_fd(b);
    evtchn_port_t pa, pb, other[PORTS];
    char buffer[8192];
    connected(a, b, &pa, &pb);

    CHECK(xenevtchn_notify(a, pa) == 0 && xenevtchn_notify(a, pa) == 0 && readable(fb, 5000));
    CHECK(xenevtchn_pending(b) == (int)pb && !readable(fb, 50)); /* masked until it is written back */
    CHECK(xenevtchn_notify(a, pa) == 0 && !readable(fb, 50));
    CHECK(xenevtchn_unmask(b, pb) == 0 && readable(fb, 5000) && xenevtchn_pending(b) == (int)pb);
    CHECK(fails_with(xenevtchn_notify(a, 4000), ENOTCONN));
    CHECK(fails_with(ioctl(fa, _IOC(_IOC_NONE, 'E', 2, 4), (void *)8), EFAULT));
    CHECK(read(fa, buffer, 3) == 0 && write(fa, buffer, 3) == 0);
    CHECK(write(fb, buffer, 4097) == 4096 && write(fb, (char *)&pb, 4) == 4);
    CHECK(xenevtchn_notify(a, pa) == 0 && readable(fb, 5000));
    CHECK(read(fb, buffer, 7) == 4 && write(fb, buffer, 7) == 4);
    CHECK(fcntl(fb, F_SETFL, O_NONBLOCK) == 0 && fails_with(read(fb, buffer, 7), EAGAIN) && fails_with(read(fb, buffer, 8), EAGAIN));
    CHECK(fcntl(fb, F_SETFL, 0) == 0 && fails_with(lseek(fb, 0, SEEK_CUR), ESPIPE));

    int virq = xenevtchn_bind_virq(a, 3);
    CHECK(virq > 0 && fails_with(xenevtchn_bind_virq(b, 3), EEXIST));
    CHECK(xenevtchn_unbind(a, virq) == 0 && fails_with(xenevtchn_unbind(a, virq), ENOTCONN));

    for (int i = 0; i < PORTS; i++) {
        int port = xenevtchn_bind_unbound_port(a, 0);
        CHECK(port > 0);
        int theirs = xenevtchn_bind_interdomain(b, 0, port);
        CHECK(theirs > 0);
        other[i] = port;
    }
    for (int i = 0; i < PORTS; i++) /* each is born with an event */
        CHECK(readable(fb, 5000) && xenevtchn_unmask(b, xenevtchn_pending(b)) == 0);
    for (int i = 0; i < PORTS; i++)
        CHECK(xenevtchn_notify(a, other[i]) == 0);
    for (int i = 0; i < PORTS; i++)
        CHECK(readable(fb, 5000) && xenevtchn_unmask(b, xenevtchn_pending(b)) == 0);
    CHECK(!readable(fb, 50));

    CHECK(xenevtchn_restrict(a, 1) == 0 && fails_with(xenevtchn_bind_unbound_port(a, 0), EACCES));
    CHECK(fails_with(xenevtchn_bind_interdomain(a, 0, 1), EACCES) && xenevtchn_notify(a, pa) == 0);
    int copy = dup(fb);
    CHECK(copy >= 0 && xenevtchn_close(b) == 0 && xenevtchn_notify(a, pa) == 0);
    CHECK(close(copy) == 0 && xenevtchn_close(a) == 0);
    a = opened(); /* what was closed is free */
    CHECK(xenevtchn_bind_unbound_port(a, 0) == (int)pa && xenevtchn_close(a) == 0);
}

static volatile sig_atomic_t caught, code;

static void on_signal(int number, siginfo_t *info, void *context)
{
    (void)number, (void)context;
    caught++;
    code = info->si_code;
}

static void handle(int number, int flags)
{
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = flags | SA_SIGINFO};
    CHECK(sigaction(number, &action, NULL) == 0);
    caught = 0;
}

static void alarm_in(int us)
{
    struct itimerval in = {.it_value = {0, us}};
    CHECK(setitimer(ITIMER_REAL, &in, NULL) == 0);
}

static void await_signals(int wanted)
{
    for (int i = 0; i < 500 && caught < wanted; i++)
        usleep(10000);
    usleep(30000); /* and no more than that */
    CHECK(caught == wanted);
}

/* ENOSYS, readv, SA_RESTART, SIGIO: what a front end may not be able to give. */
static void signals(void)
{
    xenevtchn_handle *a = opened(), *b = opened();
    int fb = xenevtchn_fd(b);
    evtchn_port_t pa, pb, port;
    connected(a, b, &pa, &pb);
    CHECK(fails_with(ioctl(fb, 0x1234, 0), ENOSYS) && !isatty(fb) && errno == ENOSYS);
    char four[4];
    struct iovec two[2] = {{four, 2}, {four, 4}};
    CHECK(readv(fb, two, 2) == 0); /* one call a segment, and the first is short */

    handle(SIGALRM, 0);
    alarm_in(50000);
    CHECK(fails_with(read(fb, &port, 4), EINTR) && caught == 1);

    for (int odd = 0; odd < 2; odd++) { /* a read that the kernel waits in, and one that the front end has looked at first */
        handle(SIGALRM, SA_RESTART);
        pid_t child = fork();
        if (child == 0) {
            usleep(200000);
            _exit(xenevtchn_notify(a, pa) == 0 ? 0 : 1);
        }
        alarm_in(50000);
        char buffer[8];
        CHECK(read(fb, buffer, odd ? 6 : 4) == 4 && caught == 1);
        CHECK(memcmp(buffer, &pb, 4) == 0 && xenevtchn_unmask(b, pb) == 0 && waitpid(child, NULL, 0) == child);
    }

    handle(SIGIO, SA_RESTART);
    CHECK(fcntl(fb, F_SETOWN, getpid()) == 0 && fcntl(fb, F_SETFL, O_ASYNC | O_NONBLOCK) == 0);
    CHECK(xenevtchn_notify(a, pa) == 0);
    await_signals(1);
    CHECK(code == SI_KERNEL && read(fb, &port, 4) == 4 && xenevtchn_unmask(b, pb) == 0);
    evtchn_port_t pc, pd;
    int one = xenevtchn_bind_unbound_port(a, 0), other = xenevtchn_bind_interdomain(b, 0, one); /* an event comes with it */
    pc = one, pd = other;
    await_signals(2);
    CHECK(xenevtchn_notify(a, pa) == 0); /* the ring is not empty: no signal */
    await_signals(2);
    CHECK(read(fb, &port, 4) == 4 && port == pd);
    CHECK(readable(fb, 5000) && read(fb, &port, 4) == 4 && port == pb);
    CHECK(xenevtchn_unmask(b, pb) == 0 && xenevtchn_unmask(b, pd) == 0);
    handle(SIGUSR1, 0);
    CHECK(fcntl(fb, F_SETSIG, SIGUSR1) == 0 && xenevtchn_notify(a, pc) == 0);
    await_signals(1);
    CHECK(code == POLL_IN);
    xenevtchn_close(a);
    xenevtchn_close(b);
}

static void echo(xenevtchn_handle *h)
{
    for (;;) {
        int port = xenevtchn_pending(h);
        if (port < 0 || xenevtchn_unmask(h, port) < 0 || xenevtchn_notify(h, port) < 0)
            _exit(1);
    }
}

static void ping_pong(int rounds)
{
    xenevtchn_handle *a = opened(), *b = opened();
    evtchn_port_t pa, pb;
    connected(a, b, &pa, &pb);
    pid_t child = fork();
    if (child == 0)
        echo(b);
    for (int i = 0; i < rounds; i++)
        CHECK(xenevtchn_notify(a, pa) == 0 && xenevtchn_pending(a) == (int)pa && xenevtchn_unmask(a, pa) == 0);
    CHECK(!readable(xenevtchn_fd(a), 50));
    CHECK(kill(child, SIGKILL) == 0 && waitpid(child, NULL, 0) == child);
}

static xenevtchn_handle *shared;
static int taken;

static void *reader(void *nothing)
{
    int port = xenevtchn_pending(shared);
    CHECK(port > 0 && xenevtchn_unmask(shared, port) == 0);
    __atomic_add_fetch(&taken, 1, __ATOMIC_SEQ_CST);
    return nothing;
}

/* Four threads wait; each event lets exactly one return. */
static void readers(void)
{
    xenevtchn_handle *a = opened();
    pthread_t threads[4];
    evtchn_port_t pa, pb;
    shared = opened();
    connected(a, shared, &pa, &pb);
    for (int i = 0; i < 4; i++)
        CHECK(pthread_create(&threads[i], NULL, reader, NULL) == 0);
    for (int i = 1; i <= 4; i++) {
        CHECK(xenevtchn_notify(a, pa) == 0);
        for (int look = 0; look < 500 && __atomic_load_n(&taken, __ATOMIC_SEQ_CST) < i; look++)
            usleep(10000);
        usleep(20000);
        CHECK(taken == i);
    }
    for (int i = 0; i < 4; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
}

/*
 * Hold a port until killed, or until its front end dies: an error, never a hang.  What is printed then has a length of whole
 * ports: other writes are handed over to a front end that is not there any more.
 */
static void hold(void)
{
    xenevtchn_handle *a = opened();
    int port = xenevtchn_bind_unbound_port(a, 0);
    CHECK(port > 0);
    printf("%d\n", port);
    fflush(stdout);
    int got = xenevtchn_pending(a);
    printf("%s\n", got < 0 && xenevtchn_bind_unbound_port(a, 0) < 0 ? "error!!" : "no error!!!");
    fflush(stdout);
}

int main(int count, char **arguments)
{
    const char *what = count > 1 ? arguments[1] : "";
    alarm(60);
    if (strcmp(what, "tour") == 0)
        tour();
    else if (strcmp(what, "signals") == 0)
        signals();
    else if (strcmp(what, "ping-pong") == 0)
        ping_pong(count > 2 ? atoi(arguments[2]) : 1000);
    else if (strcmp(what, "readers") == 0)
        readers();
    else if (strcmp(what, "hold") == 0)
        hold();
    else
        CHECK(!"an argument that is known");
    return 0;
}
