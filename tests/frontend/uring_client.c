/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A program that opens, reads, writes and polls the device through io_uring, and tries to read it through aio, by the system calls
 * themselves.  -DFILTERED: under the filter over the FUSE file.  Prints "ok", or the line that did not hold and what it gave, and ends with 1; with 77 where
 * there is no io_uring.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(value, wanted) check((long)(value), (long)(wanted), __LINE__)
#define BAD ((void *)-4096L)
#define LACKS 77

enum { BIND_INTERDOMAIN = 0x84501, BIND_UNBOUND_PORT = 0x44502, NOTIFY = 0x44504, PAGE = 4096, ENTRIES = 8 };

static int ring;
static unsigned *sq_tail, *sq_array, sq_mask, *cq_head, *cq_tail, cq_mask;
static struct io_uring_sqe *sqes;
static struct io_uring_cqe *cqes;

static void check(long value, long wanted, int line)
{
    if (value == wanted)
        return;
    printf("line %d: %ld, errno %d\n", line, value, errno);
    exit(1);
}

static void *mapped(size_t bytes, off_t at)
{
    void *found = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring, at);
    CHECK(found != MAP_FAILED, 1);
    return found;
}

static void setup(void)
{
    struct io_uring_params p = {0};
    ring = (int)syscall(SYS_io_uring_setup, ENTRIES, &p);
    if (ring < 0) {
        printf("io_uring_setup: %s\n", strerror(errno));
        exit(LACKS);
    }
    char *sq = mapped(p.sq_off.array + p.sq_entries * sizeof(unsigned), IORING_OFF_SQ_RING);
    char *cq = mapped(p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe), IORING_OFF_CQ_RING);
    sqes = mapped(p.sq_entries * sizeof(struct io_uring_sqe), IORING_OFF_SQES);
    sq_tail = (unsigned *)(sq + p.sq_off.tail), sq_array = (unsigned *)(sq + p.sq_off.array);
    sq_mask = *(unsigned *)(sq + p.sq_off.ring_mask);
    cq_head = (unsigned *)(cq + p.cq_off.head), cq_tail = (unsigned *)(cq + p.cq_off.tail);
    cq_mask = *(unsigned *)(cq + p.cq_off.ring_mask), cqes = (struct io_uring_cqe *)(cq + p.cq_off.cqes);
}

static struct io_uring_sqe entry(int opcode, int fd, const void *at, unsigned bytes, unsigned long name)
{
    struct io_uring_sqe made = {.opcode = (uint8_t)opcode, .fd = fd, .addr = (uintptr_t)at, .len = bytes, .user_data = name};
    made.off = opcode == IORING_OP_READ || opcode == IORING_OP_WRITE || opcode == IORING_OP_READV ? (uint64_t)-1 : 0;
    return made;
}

static void submit(struct io_uring_sqe wanted)
{
    unsigned at = *sq_tail & sq_mask;
    sqes[at] = wanted;
    sq_array[at] = at;
    __atomic_store_n(sq_tail, *sq_tail + 1, __ATOMIC_RELEASE);
    CHECK(syscall(SYS_io_uring_enter, ring, 1, 0, 0, NULL, 0), 1);
}

/* Whether something is done. */
static int is_done(void)
{
    return __atomic_load_n(cq_tail, __ATOMIC_ACQUIRE) != *cq_head;
}

/* Wait for one to be done; give its name and its answer. */
static long next_done(unsigned long *name)
{
    while (!is_done())
        CHECK(syscall(SYS_io_uring_enter, ring, 0, 1, IORING_ENTER_GETEVENTS, NULL, 0) >= 0 || errno == EINTR, 1);
    struct io_uring_cqe found = cqes[*cq_head & cq_mask];
    __atomic_store_n(cq_head, *cq_head + 1, __ATOMIC_RELEASE);
    *name = found.user_data;
    return found.res;
}

/* Wait for one to be done, which has to be this one; give its answer. */
static long done(unsigned long wanted)
{
    unsigned long name;
    long answer = next_done(&name);
    CHECK(name, wanted);
    return answer;
}

static long made(int opcode, int fd, const void *at, unsigned bytes)
{
    submit(entry(opcode, fd, at, bytes, 1));
    return done(1);
}

static long opened(int flags)
{
    struct io_uring_sqe wanted = entry(IORING_OP_OPENAT, AT_FDCWD, "/dev/xen/evtchn", 0, 1);
    wanted.open_flags = (uint32_t)flags;
    submit(wanted);
    return done(1);
}

static long ask(int fd, unsigned long request, uint32_t first, uint32_t second)
{
    uint32_t words[2] = {first, second};
    return ioctl(fd, request, words);
}

static int ready(int fd, int timeout_ms)
{
    struct pollfd one = {fd, POLLIN, 0};
    return poll(&one, 1, timeout_ms) == 1 && one.revents == POLLIN;
}

/* Have a read wait in a thread of the kernel's, and cancel it: it takes nothing. */
static void cancelled(struct io_uring_sqe wanted)
{
    submit(wanted);
    long ended = 0;
    for (int asked = 0; !ended || asked;) { /* a word that comes while a thread goes from one wait to another is lost */
        unsigned long name;
        if (!ended && !asked)
            submit(entry(IORING_OP_ASYNC_CANCEL, -1, (void *)4, 0, 5)), asked = 1;
        long answer = next_done(&name);
        if (name == 4)
            ended = answer;
        else
            asked = 0;
    }
    CHECK(ended == -EINTR || ended == -ECANCELED, 1);
}

/* Wait until a child waits for one to be done: it has nothing to hand in, and wants one. */
static void until_it_waits(pid_t child)
{
    char path[32], line[256] = "";
    snprintf(path, sizeof path, "/proc/%d/syscall", child);
    long number = 0;
    unsigned long handed_in = 1, wanted = 0;
    while (number != SYS_io_uring_enter || handed_in || wanted != 1) {
        FILE *file = fopen(path, "r");
        CHECK(file != NULL && fgets(line, sizeof line, file) != NULL, 1);
        CHECK(fclose(file), 0);
        if (sscanf(line, "%ld %*s %lx %lx", &number, &handed_in, &wanted) != 3)
            number = 0; /* it runs */
    }
}

/* By aio no driver is read that has no method of its own for that: a filter says so.  Without one it reads. */
static void read_by_aio(int fd, void *at, unsigned long bytes)
{
    aio_context_t context = 0;
    struct iocb wanted = {.aio_fildes = (uint32_t)fd, .aio_lio_opcode = IOCB_CMD_PREAD, .aio_buf = (uintptr_t)at, .aio_nbytes = bytes};
    struct iocb *all[] = {&wanted};
    CHECK(syscall(SYS_io_setup, 1, &context), 0);
#ifdef FILTERED
    CHECK(syscall(SYS_io_submit, context, 1, all), -1);
    CHECK(errno, EINVAL);
    CHECK(read(fd, at, bytes), 4);
#else
    struct io_event found = {0};
    CHECK(syscall(SYS_io_submit, context, 1, all), 1);
    CHECK(syscall(SYS_io_getevents, context, 1, 1, &found, NULL), 1);
    CHECK(found.res, 4);
#endif
    CHECK(syscall(SYS_io_destroy, context), 0);
}

/* A filter gives one answer for all that is handed in together: behind the first, a transfer is carried out. */
static void read_by_aio_behind_another(int fd, void *at, unsigned long bytes)
{
    aio_context_t context = 0;
    int null = open("/dev/null", O_RDWR);
    struct iocb first = {.aio_fildes = (uint32_t)null, .aio_lio_opcode = IOCB_CMD_PREAD, .aio_buf = (uintptr_t)at, .aio_nbytes = 1};
    struct iocb behind = {.aio_fildes = (uint32_t)fd, .aio_lio_opcode = IOCB_CMD_PREAD, .aio_buf = (uintptr_t)at, .aio_nbytes = bytes};
    struct iocb *all[] = {&first, &behind};
    struct io_event found[2] = {{0}, {0}};
    CHECK(syscall(SYS_io_setup, 2, &context), 0);
    CHECK(syscall(SYS_io_submit, context, 2, all), 2);
    CHECK(syscall(SYS_io_getevents, context, 2, 2, found, NULL), 2);
    CHECK(found[0].res + found[1].res, 4);
    CHECK(syscall(SYS_io_destroy, context), 0);
    CHECK(close(null), 0);
}

/* A thread of the kernel's asks, and no debugger mends what it gets. */
static void looked_at_by_ring(void)
{
    struct statx seen = {0};
    struct io_uring_sqe wanted = entry(IORING_OP_STATX, AT_FDCWD, "/dev/xen/evtchn", STATX_BASIC_STATS, 1);
    wanted.off = (uintptr_t)&seen;
    submit(wanted);
    CHECK(done(1), 0);
    CHECK(seen.stx_mode & S_IFMT, S_IFREG);
}

/* Whether or not somebody has written to it, or has looked at it. */
static void read_by_ring_and_aio(int a, int b, uint32_t port, uint32_t other)
{
    uint32_t words[4] = {0};
    struct stat seen;
    for (int round = 0; round < 3; round++) {
        CHECK(made(IORING_OP_READ, b, words, 16), 4);
        CHECK(words[0], other);
        CHECK(made(IORING_OP_WRITE, b, words, 4), 4);
        CHECK(ask(a, NOTIFY, port, 0), 0);
        CHECK(ready(b, 5000), 1);
        if (round)
            CHECK(fstat(b, &seen) | seen.st_size, 0);
        read_by_aio(b, words, 16);
        CHECK(words[0], other);
        CHECK(made(IORING_OP_WRITE, b, words, 4), 4);
        CHECK(ask(a, NOTIFY, port, 0), 0);
        CHECK(ready(b, 5000), 1);
    }
    read_by_aio_behind_another(b, words, 16);
    CHECK(words[0], other);
    looked_at_by_ring();
}

int main(void)
{
    uint32_t words[4] = {0};
    alarm(60);
    setup();
    int a = (int)opened(O_RDWR), b = (int)opened(O_RDWR);
    CHECK(a > 0 && b > 0, 1);
    long port = ask(a, BIND_UNBOUND_PORT, 0, 0), other = ask(b, BIND_INTERDOMAIN, 0, (uint32_t)port);
    CHECK(port > 0 && other > 0, 1);
    CHECK(ready(b, 5000), 1); /* a port is born with an event */

    read_by_ring_and_aio(a, b, (uint32_t)port, (uint32_t)other);

    words[0] = (uint32_t)other;
    CHECK(made(IORING_OP_READ, b, BAD, 4), -EFAULT);
    CHECK(made(IORING_OP_WRITE, b, BAD, 4), -EFAULT);
    CHECK(made(IORING_OP_WRITE, b, words, 4), 4);

    struct io_uring_sqe wanted = entry(IORING_OP_POLL_ADD, b, NULL, 0, 2);
    wanted.poll32_events = POLLIN;
    submit(wanted);
    CHECK(is_done(), 0);
    CHECK(ask(a, NOTIFY, (uint32_t)port, 0), 0);
    CHECK(done(2) & 0xffff, POLLIN);
    CHECK(made(IORING_OP_READ, b, words, 4), 4);
    CHECK(made(IORING_OP_WRITE, b, words, 4), 4);

    int status = -1;
    pid_t child = fork();
    if (child == 0) {
        setup();
        submit(entry(IORING_OP_READ, b, words, 16, 3)); /* waits in poll, or, in older kernels, in the read itself */
        CHECK(done(3), 4);
        _exit(0);
    }
    until_it_waits(child);
    CHECK(ask(a, NOTIFY, (uint32_t)port, 0), 0);
    CHECK(waitpid(child, &status, 0), child);
    CHECK(status, 0);
    CHECK(made(IORING_OP_WRITE, b, words, 4), 4);

    wanted = entry(IORING_OP_READ, b, words, 16, 4); /* waits in a thread of the kernel's */
    wanted.flags = IOSQE_ASYNC;
    submit(wanted);
    CHECK(ask(a, NOTIFY, (uint32_t)port, 0), 0);
    CHECK(done(4), 4);
    CHECK(made(IORING_OP_WRITE, b, words, 4), 4);
    cancelled(wanted);
    CHECK(ask(a, NOTIFY, (uint32_t)port, 0), 0);
    CHECK(ready(b, 5000), 1);
    CHECK(made(IORING_OP_READ, b, words, 4), 4);
    CHECK(made(IORING_OP_WRITE, b, words, 4), 4);

    /* Buffers across two pages: one transfer, which waits for nothing more. */
    char *edge = (char *)mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) + PAGE;
    CHECK(edge - PAGE != MAP_FAILED, 1);
    CHECK(ask(a, NOTIFY, (uint32_t)port, 0), 0);
    CHECK(made(IORING_OP_READ, b, edge - 4, 8), 4);
    CHECK(made(IORING_OP_WRITE, b, edge - 4, 4), 4);
    CHECK(made(IORING_OP_WRITE, b, edge - PAGE, 2 * PAGE), PAGE);
    CHECK(close(a) | close(b), 0);
    puts("ok");
    return 0;
}
