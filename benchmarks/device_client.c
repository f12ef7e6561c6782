/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What calls on /dev/xen/evtchn cost a program in C, beside a FUSE file that does nothing.
 *
 *     device_client BARE SERVER DEVICE ROUNDS CALLS TRIPS
 *
 * prints lines "bound|free name bare_us device_us" for each call in each round, then "free trip p50 p99": a notify, the other
 * process's blocking read, its write-back and notify, and our blocking read.  SERVER is the process of the bare file.  Bound: we
 * and it run on one processor, where a call costs least, and the device's server runs where it will.  Free: as the scheduler has it,
 * which parts us from the bare file's server now and then, and it does not follow.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Calls in front of the counted ones, of both files: who has slept takes 100 us each for the first few. */
enum { UNCOUNTED = 50 };
enum { BIND_INTERDOMAIN = 0x84501, BIND_UNBOUND = 0x44502, NOTIFY = 0x44504 };

static double now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static void must(int ok, const char *what)
{
    if (!ok) {
        perror(what);
        exit(1);
    }
}

static void take(int fd)
{
    unsigned port;
    must(read(fd, &port, 4) == 4, "blocking read");
    must(write(fd, &port, 4) == 4, "write back");
}

static double notify_us(int fd, unsigned port, int calls)
{
    double begin = 0;
    for (int i = -UNCOUNTED; i < calls; i++) {
        if (i == 0)
            begin = now_us();
        must(ioctl(fd, NOTIFY, &port) == 0, "notify");
    }
    return (now_us() - begin) / calls;
}

static double write_us(int fd, unsigned port, int calls)
{
    double begin = 0;
    for (int i = -UNCOUNTED; i < calls; i++) {
        if (i == 0)
            begin = now_us();
        must(write(fd, &port, 4) == 4, "write");
    }
    return (now_us() - begin) / calls;
}

static double read_us(int fd, unsigned port, int calls)
{
    double begin = 0;
    for (int i = -UNCOUNTED; i < calls; i++) {
        if (i == 0)
            begin = now_us();
        if (read(fd, &port, 4) > 0) /* nothing, 0 from the one and EAGAIN from the other, but for an event that came late */
            must(write(fd, &port, 4) == 4, "write back");
    }
    return (now_us() - begin) / calls;
}

static double poll_us(int fd, unsigned port, int calls)
{
    (void)port;
    struct pollfd look = {fd, POLLIN, 0};
    double begin = 0;
    for (int i = -UNCOUNTED; i < calls; i++) {
        if (i == 0)
            begin = now_us();
        if (poll(&look, 1, 0) == 1) /* likewise */
            take(fd);
    }
    return (now_us() - begin) / calls;
}

static void may_run_on(pid_t who, const cpu_set_t *where)
{
    must(sched_setaffinity(who, sizeof *where, where) == 0, "sched_setaffinity");
}

static void wait_for_quiet(int fd)
{
    struct pollfd look = {fd, POLLIN, 0};
    while (poll(&look, 1, 50) == 1) /* what was raised while masked comes once more */
        take(fd);
}

typedef struct {
    const char *name;
    double (*us)(int fd, unsigned port, int calls);
    int fd;
    unsigned port;
} kind;

/* One kind of call, bound and then free. */
static void ask(const kind *k, int bare, pid_t server, const cpu_set_t *all, int calls)
{
    cpu_set_t here;
    CPU_ZERO(&here);
    CPU_SET((size_t)sched_getcpu(), &here);
    may_run_on(0, &here);
    may_run_on(server, &here);
    double bare_us = k->us(bare, k->port, calls), device_us = k->us(k->fd, k->port, calls);
    printf("bound %s %.2f %.2f\n", k->name, bare_us, device_us);
    may_run_on(0, all);
    may_run_on(server, all);
    bare_us = k->us(bare, k->port, calls), device_us = k->us(k->fd, k->port, calls);
    printf("free %s %.2f %.2f\n", k->name, bare_us, device_us);
}

static int compare(const void *a, const void *b)
{
    double d = *(const double *)a - *(const double *)b;
    return (d > 0) - (d < 0);
}

int main(int argc, char **argv)
{
    must(argc == 7, "usage");
    int bare = open(argv[1], O_RDWR), a = open(argv[3], O_RDWR), b = open(argv[3], O_RDWR);
    int rounds = atoi(argv[4]), calls = atoi(argv[5]), trips = atoi(argv[6]);
    pid_t server = atoi(argv[2]);
    unsigned domain = 0, ends[2] = {0, 0}, to_b, to_a;
    must(bare >= 0 && a >= 0 && b >= 0, "open");
    must((int)(to_b = ends[1] = (unsigned)ioctl(a, BIND_UNBOUND, &domain)) > 0, "bind");
    must((int)(to_a = (unsigned)ioctl(b, BIND_INTERDOMAIN, ends)) > 0, "bind");
    take(b); /* its port is born pending */
    must(fcntl(bare, F_SETFL, O_NONBLOCK) == 0 && fcntl(b, F_SETFL, O_NONBLOCK) == 0, "fcntl");
    cpu_set_t all;
    must(sched_getaffinity(0, sizeof all, &all) == 0, "sched_getaffinity");
    kind kinds[] = {{"notify", notify_us, a, to_b}, {"read", read_us, b, 0}, {"write", write_us, b, to_a}, {"poll", poll_us, b, 0}};
    for (int i = 0; i < rounds; i++)
        for (size_t k = 0; k < sizeof kinds / sizeof kinds[0]; k++) {
            ask(&kinds[k], bare, server, &all, calls);
            wait_for_quiet(b);
        }
    must(fcntl(b, F_SETFL, 0) == 0, "fcntl");
    pid_t child = fork();
    if (child == 0) {
        for (;;) {
            take(b);
            must(ioctl(b, NOTIFY, &to_a) == 0, "notify");
        }
    }
    double *took = malloc(sizeof *took * (size_t)trips);
    for (int i = 0; i < trips; i++) {
        double begin = now_us();
        must(ioctl(a, NOTIFY, &to_b) == 0, "notify");
        take(a);
        took[i] = now_us() - begin;
    }
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    qsort(took, (size_t)trips, sizeof *took, compare);
    printf("free trip %.2f %.2f\n", took[trips / 2], took[trips * 99 / 100]);
    return 0;
}
