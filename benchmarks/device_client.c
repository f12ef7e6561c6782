/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What calls on /dev/xen/evtchn cost a program in C, beside a FUSE file that does nothing.
 *
 *     device_client BARE SERVER DEVICE ROUNDS CALLS TRIPS
 *
 * prints a line a round, "name bare_us device_us" for each call, then "trip p50 p99": a notify, the other process's blocking
 * read, its write-back and notify, and our blocking read.  SERVER is the process of the bare file: it is put beside us before it
 * is asked, since it costs several times as much from another processor, and does not follow us.
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
    double begin = now_us();
    for (int i = 0; i < calls; i++)
        must(ioctl(fd, NOTIFY, &port) == 0, "notify");
    return (now_us() - begin) / calls;
}

static double write_us(int fd, unsigned port, int calls)
{
    double begin = now_us();
    for (int i = 0; i < calls; i++)
        must(write(fd, &port, 4) == 4, "write");
    return (now_us() - begin) / calls;
}

static double read_us(int fd, int calls)
{
    unsigned port;
    double begin = now_us();
    for (int i = 0; i < calls; i++)
        if (read(fd, &port, 4) > 0) /* nothing, 0 from the one and EAGAIN from the other, but for an event that came late */
            must(write(fd, &port, 4) == 4, "write back");
    return (now_us() - begin) / calls;
}

static double poll_us(int fd, int calls)
{
    struct pollfd look = {fd, POLLIN, 0};
    double begin = now_us();
    for (int i = 0; i < calls; i++)
        if (poll(&look, 1, 0) == 1) /* likewise */
            take(fd);
    return (now_us() - begin) / calls;
}

/* The server of a file comes to our processor, and stays free to be moved on.  It sleeps: where it may run counts when it wakes. */
static void put_beside_us(pid_t server, int fd)
{
    struct pollfd look = {fd, POLLIN, 0};
    cpu_set_t all, here;
    CPU_ZERO(&here);
    CPU_SET((size_t)sched_getcpu(), &here);
    must(sched_getaffinity(server, sizeof all, &all) == 0, "sched_getaffinity");
    must(sched_setaffinity(server, sizeof here, &here) == 0, "sched_setaffinity");
    must(poll(&look, 1, 0) == 0, "poll");
    must(sched_setaffinity(server, sizeof all, &all) == 0, "sched_setaffinity");
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
    for (int i = 0; i < rounds; i++) {
        put_beside_us(server, bare);
        double n0 = notify_us(bare, to_b, calls), n1 = notify_us(a, to_b, calls);
        struct pollfd quiet = {b, POLLIN, 0};
        while (poll(&quiet, 1, 50) == 1) /* what was raised while masked comes once more */
            take(b);
        put_beside_us(server, bare);
        double r0 = read_us(bare, calls), r1 = read_us(b, calls);
        put_beside_us(server, bare);
        double w0 = write_us(bare, to_a, calls), w1 = write_us(b, to_a, calls);
        put_beside_us(server, bare);
        double p0 = poll_us(bare, calls), p1 = poll_us(b, calls);
        printf("notify %.2f %.2f\nread %.2f %.2f\nwrite %.2f %.2f\npoll %.2f %.2f\n", n0, n1, r0, r1, w0, w1, p0, p1);
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
    printf("trip %.2f %.2f\n", took[trips / 2], took[trips * 99 / 100]);
    return 0;
}
