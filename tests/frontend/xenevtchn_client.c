/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A program of libxenevtchn, as anybody would write one; it knows nothing of pvbus.  Its first argument is what it does; it says
 * "ok" at the end, or what went wrong.  Where it waits for the test it prints a line and reads one.
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
#include <sys/wait.h>
#include <unistd.h>
#include <xenevtchn.h>

#define PORTS 300
#define READERS 4
#define EVENTS_EACH 250

static void must(int ok, const char *what)
{
    if (!ok) {
        printf("%s failed: %s\n", what, strerror(errno));
        exit(1);
    }
}

static xenevtchn_handle *opened(void)
{
    xenevtchn_handle *handle = xenevtchn_open(NULL, 0);
    must(handle != NULL, "xenevtchn_open");
    return handle;
}

static void pair(xenevtchn_handle *a, xenevtchn_handle *b, int *at_a, int *at_b)
{
    *at_a = xenevtchn_bind_unbound_port(a, 0);
    must(*at_a > 0, "bind_unbound_port");
    *at_b = xenevtchn_bind_interdomain(b, 0, (evtchn_port_t)*at_a);
    must(*at_b > 0, "bind_interdomain");
    must(xenevtchn_pending(b) == *at_b, "the first event of an interdomain port");
    must(xenevtchn_unmask(b, (evtchn_port_t)*at_b) == 0, "unmask");
}

static int readable(xenevtchn_handle *handle, int timeout_ms)
{
    struct pollfd look = {xenevtchn_fd(handle), POLLIN, 0};
    return poll(&look, 1, timeout_ms);
}

static void basics(void)
{
    xenevtchn_handle *a = opened(), *b = opened();
    int at_a, at_b;
    pair(a, b, &at_a, &at_b);
    must(xenevtchn_notify(a, (evtchn_port_t)at_a) == 0, "notify");
    must(xenevtchn_pending(b) == at_b, "pending");
    must(xenevtchn_notify(a, (evtchn_port_t)at_a) == 0, "notify of a masked port");
    must(readable(b, 50) == 0, "a masked port must stay silent");
    must(xenevtchn_unmask(b, (evtchn_port_t)at_b) == 0, "unmask");
    must(readable(b, 2000) == 1 && xenevtchn_pending(b) == at_b, "the event that came while it was masked");
    xenevtchn_handle *again = xenevtchn_fdopen(NULL, dup(xenevtchn_fd(b)), 0);
    must(again != NULL, "fdopen");
    must(xenevtchn_unmask(again, (evtchn_port_t)at_b) == 0, "unmask through another handle of the file");
    must(xenevtchn_notify(a, (evtchn_port_t)at_a) == 0 && xenevtchn_pending(again) == at_b, "pending, likewise");
    must(xenevtchn_close(again) == 0, "close of a handle that is not the last");
    must(xenevtchn_unbind(b, (evtchn_port_t)at_b) == 0, "unbind");
    must(xenevtchn_notify(b, (evtchn_port_t)at_b) == -1 && errno == ENOTCONN, "notify of an unbound port");
    must(xenevtchn_unbind(b, 4000) == -1 && (errno == ENOTCONN || errno == EINVAL), "unbind of a foreign port");
    must(xenevtchn_restrict(b, 1) == 0, "restrict");
    must(xenevtchn_bind_unbound_port(b, 1) == -1 && errno == EACCES, "bind of a restricted handle");
    must(xenevtchn_restrict(b, 1) == -1 && errno == EACCES, "a second restrict");
    must(xenevtchn_close(a) == 0 && xenevtchn_close(b) == 0, "close");
}

static void virq(void)
{
    char line[16];
    xenevtchn_handle *a = opened();
    int port = xenevtchn_bind_virq(a, 3);
    must(port > 0, "bind_virq");
    printf("bound\n");
    must(fgets(line, sizeof line, stdin) != NULL, "the test's line");
    must(xenevtchn_pending(a) == port, "the VIRQ");
    must(xenevtchn_close(a) == 0, "close");
}

static void many(void)
{
    static int at_a[PORTS], at_b[PORTS];
    static char seen[1 << 17];
    xenevtchn_handle *a = opened(), *b = opened();
    for (int i = 0; i < PORTS; i++)
        pair(a, b, &at_a[i], &at_b[i]);
    for (int i = 0; i < PORTS; i++)
        must(xenevtchn_notify(a, (evtchn_port_t)at_a[i]) == 0, "notify");
    for (int i = 0; i < PORTS; i++) {
        int port = xenevtchn_pending(b);
        must(port > 0 && !seen[port]++, "each event once");
        must(xenevtchn_unmask(b, (evtchn_port_t)port) == 0, "unmask");
    }
    must(readable(b, 50) == 0, "no event more");
    must(xenevtchn_close(a) == 0 && xenevtchn_close(b) == 0, "close");
}

static void ping_pong(int rounds)
{
    xenevtchn_handle *a = opened(), *b = opened();
    int at_a, at_b;
    pair(a, b, &at_a, &at_b);
    pid_t child = fork();
    must(child >= 0, "fork");
    xenevtchn_handle *mine = child ? a : b;
    evtchn_port_t port = (evtchn_port_t)(child ? at_a : at_b);
    for (int i = 0; i < rounds; i++) {
        if (child)
            must(xenevtchn_notify(mine, port) == 0, "notify");
        must(xenevtchn_pending(mine) == (int)port, "pending");
        must(xenevtchn_unmask(mine, port) == 0, "unmask");
        if (!child)
            must(xenevtchn_notify(mine, port) == 0, "notify");
    }
    if (!child)
        _exit(0);
    int status;
    must(waitpid(child, &status, 0) == child && status == 0, "the other side");
}

static xenevtchn_handle *shared;
static int counts[1 << 17];

static void *reader(void *stop)
{
    for (;;) {
        int port = xenevtchn_pending(shared);
        must(port > 0, "pending");
        if (port == *(int *)stop) { /* pass it on to the next */
            must(xenevtchn_unmask(shared, (evtchn_port_t)port) == 0, "unmask");
            return NULL;
        }
        __atomic_add_fetch(&counts[port], 1, __ATOMIC_SEQ_CST);
        must(xenevtchn_unmask(shared, (evtchn_port_t)port) == 0, "unmask");
    }
}

static void readers(void)
{
    xenevtchn_handle *a = opened();
    int at_a[READERS], at_b[READERS], stop_a, stop_b;
    pthread_t threads[READERS];
    shared = opened();
    for (int i = 0; i < READERS; i++)
        pair(a, shared, &at_a[i], &at_b[i]);
    pair(a, shared, &stop_a, &stop_b);
    for (int i = 0; i < READERS; i++)
        must(pthread_create(&threads[i], NULL, reader, &stop_b) == 0, "pthread_create");
    for (int n = 1; n <= EVENTS_EACH; n++)
        for (int i = 0; i < READERS; i++) { /* one event a port at a time: none is merged with another */
            must(xenevtchn_notify(a, (evtchn_port_t)at_a[i]) == 0, "notify");
            while (__atomic_load_n(&counts[at_b[i]], __ATOMIC_SEQ_CST) < n)
                usleep(20);
        }
    for (int i = 0; i < READERS; i++) {
        must(counts[at_b[i]] == EVENTS_EACH, "each event returns exactly one reader");
        must(xenevtchn_notify(a, (evtchn_port_t)stop_a) == 0, "notify");
        for (int gone = 0; !gone;) /* each that hears it ends; its event is then sent again */
            for (int j = 0; j < READERS && !gone; j++)
                if (threads[j] && pthread_tryjoin_np(threads[j], NULL) == 0) {
                    threads[j] = 0;
                    gone = 1;
                }
    }
}

static void stay(void)
{
    xenevtchn_handle *a = opened(), *b = opened();
    int at_a, at_b;
    pair(a, b, &at_a, &at_b);
    printf("bound\n");
    fflush(stdout);
    xenevtchn_pending(b); /* for ever */
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (!strcmp(what, "basics"))
        basics();
    else if (!strcmp(what, "virq"))
        virq();
    else if (!strcmp(what, "many"))
        many();
    else if (!strcmp(what, "ping-pong"))
        ping_pong(atoi(argv[2]));
    else if (!strcmp(what, "readers"))
        readers();
    else if (!strcmp(what, "stay"))
        stay();
    else
        return 2;
    printf("ok\n");
    return 0;
}
