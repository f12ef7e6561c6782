/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A 32-bit program on the device, without a library: cc -m32 -static -nostdlib -ffreestanding.  With -DFILTERED it also makes the
 * calls that the filter over the FUSE file knows.
 * Prints "ok", or the line that did not hold and what it gave, and ends with 1.
 */
#include <stdint.h>

enum {
    EXIT = 1, FORK = 2, READ = 3, WRITE = 4, OPEN = 5, CLOSE = 6, WAITPID = 7, LSEEK = 19, IOCTL = 54, FCNTL = 55, READV = 145,
    WRITEV = 146, POLL = 168, MMAP2 = 192, MPROTECT = 125, SENDFILE = 187, PWRITEV2 = 379, FCNTL64 = 221, READAHEAD = 225,
    SENDFILE64 = 239, SPLICE = 313, SYNC_FILE_RANGE = 314, FALLOCATE = 324, COPY_FILE_RANGE = 377, PIPE = 42,
    SETITIMER = 104, SIGACTION = 174, STAT = 106, LSTAT = 107, FSTAT = 108, STAT64 = 195, LSTAT64 = 196, FSTAT64 = 197,
    FSTATAT64 = 300, STATX = 383, STATFS = 99, FSTATFS = 100, STATFS64 = 268, FSTATFS64 = 269, IO_SETUP = 245,
    IO_DESTROY = 246, IO_SUBMIT = 248,
};
enum {
    EINTR = 4, EAGAIN = 11, EFAULT = 14, ENODEV = 19, EINVAL = 22, ESPIPE = 29, ENOSYS = 38, EOPNOTSUPP = 95,
    ENOTCONN = 107,
};
enum { BIND_INTERDOMAIN = 0x84501, BIND_UNBOUND_PORT = 0x44502, UNBIND = 0x44503, NOTIFY = 0x44504 };
enum { RDWR = 2, NONBLOCK = 04000, POLLIN = 1, SETFL = 4, SHARED = 1, PRIVATE = 2, PRIVATE_ANONYMOUS = 0x22, APPEND = 16, PAGE = 4096 };
enum { SETLEASE = 1024, DIRECT = 040000, FIONREAD = 0x541b };
enum { ALARM = 14, RESTART = 0x10000000, LATER_US = 20000, SIGNALS = 3 };
enum { IFMT = 0170000, IFCHR = 0020000, IFDIR = 0040000, MISC_MAJOR = 10, CWD = -100, EMPTY_PATH = 0x1000, TMPFS = 0x1021994 };
#define BAD 0xfffff000L
#define CHECK(value, wanted) check((long)(value), (long)(wanted), __LINE__)

struct pollfd { int fd; short events, revents; };
struct segment { uint32_t at, bytes; };
struct action { void (*handler)(int); uint32_t flags, restorer, mask[2]; };

long call(long number, ...); /* up to six arguments, in the order of the kernel's registers */
__asm__(".globl call\n"
        "call: push %ebx; push %esi; push %edi; push %ebp\n"
        "mov 20(%esp), %eax; mov 24(%esp), %ebx; mov 28(%esp), %ecx; mov 32(%esp), %edx\n"
        "mov 36(%esp), %esi; mov 40(%esp), %edi; mov 44(%esp), %ebp\n"
        "int $0x80\n"
        "pop %ebp; pop %edi; pop %esi; pop %ebx; ret\n");

static void say(const char *text)
{
    long bytes = 0;
    while (text[bytes])
        bytes++;
    call(WRITE, 1, (long)text, bytes);
}

static void say_number(long value)
{
    char digits[16], *at = digits + 15;
    unsigned long left = value < 0 ? -(unsigned long)value : (unsigned long)value;
    *at = 0;
    do
        *--at = (char)('0' + left % 10);
    while (left /= 10);
    if (value < 0)
        *--at = '-';
    say(at);
}

static void check(long value, long wanted, int line)
{
    if (value == wanted)
        return;
    say("line ");
    say_number(line);
    say(": ");
    say_number(value);
    say("\n");
    call(EXIT, 1);
}

static long ready(int fd, int timeout_ms)
{
    struct pollfd one = {fd, POLLIN, 0};
    return call(POLL, (long)&one, 1, timeout_ms) == 1 && one.revents == POLLIN;
}

static long ask(int fd, long request, uint32_t first, uint32_t second)
{
    uint32_t words[2] = {first, second};
    return call(IOCTL, fd, request, (long)words);
}

static long readv_of(long number, int fd, void *at, uint32_t first, void *behind, uint32_t second)
{
    struct segment two[2] = {{(uint32_t)at, first}, {(uint32_t)behind, second}};
    return call(number, fd, (long)two, 2);
}

static volatile int signals, notifier;
static volatile uint32_t notifies;

static void on_alarm(int number)
{
    (void)number;
    if (++signals == SIGNALS)
        ask(notifier, NOTIFY, notifies, 0);
}

/* A read that signals interrupt goes on, or ends, as their handler wants it. */
static void interrupted(int fd, uint32_t *words)
{
    static const struct action restarting = {on_alarm, RESTART, 0, {0, 0}}, ending = {on_alarm, 0, 0, {0, 0}};
    static const long again_and_again[4] = {0, LATER_US, 0, LATER_US}, never[4];
    CHECK(call(SIGACTION, ALARM, (long)&restarting, 0, 8), 0);
    CHECK(call(SETITIMER, 0, (long)again_and_again, 0), 0);
    CHECK(call(READ, fd, (long)words, 4), 4);
    CHECK(signals >= SIGNALS, 1);
    CHECK(call(SIGACTION, ALARM, (long)&ending, 0, 8), 0);
    CHECK(call(READ, fd, (long)words, 4), -EINTR);
    CHECK(call(SETITIMER, 0, (long)never, 0), 0);
}

/* A device by every call that shows what something is, in a file system of devices. */
static void shown(long fd, const char *path)
{
    uint32_t seen[64];
    const uint16_t *half = (const uint16_t *)seen;
    long whole[][2] = {{STAT64, (long)path}, {LSTAT64, (long)path}, {FSTAT64, fd}};
    for (int i = 0; i < 3; i++) {
        CHECK(call(whole[i][0], whole[i][1], (long)seen), 0);
        CHECK(seen[4] & IFMT, IFCHR);
        CHECK(seen[8] >> 8, MISC_MAJOR);
        CHECK(seen[11] | seen[12], 0);
    }
    CHECK(call(FSTATAT64, CWD, (long)path, (long)seen, 0), 0);
    CHECK(seen[4] & IFMT, IFCHR);
    CHECK(seen[8] >> 8, MISC_MAJOR);
    long old[][2] = {{STAT, (long)path}, {LSTAT, (long)path}, {FSTAT, fd}};
    for (int i = 0; i < 3; i++) {
        CHECK(call(old[i][0], old[i][1], (long)seen), 0);
        CHECK(half[4] & IFMT, IFCHR);
        CHECK(seen[4] >> 8, MISC_MAJOR);
        CHECK(seen[5], 0);
    }
    CHECK(call(STATX, fd, (long)"", EMPTY_PATH, 0x7ff, (long)seen), 0);
    CHECK(half[14] & IFMT, IFCHR);
    CHECK(seen[32], MISC_MAJOR);
    CHECK(seen[10] | seen[11], 0);
    CHECK(call(STATFS, (long)path, (long)seen), 0);
    CHECK(seen[0], TMPFS);
    CHECK(call(FSTATFS, fd, (long)seen), 0);
    CHECK(seen[0], TMPFS);
    CHECK(call(STATFS64, (long)path, 84, (long)seen), 0);
    CHECK(seen[0], TMPFS);
    CHECK(call(FSTATFS64, fd, 84, (long)seen), 0);
    CHECK(seen[0], TMPFS);
    CHECK(call(STAT64, (long)"/dev/xen", (long)seen), 0);
    CHECK(seen[4] & IFMT, IFDIR);
}

#ifdef FILTERED
static long by_aio(long fd)
{
    uint32_t context = 0, request[16] = {0}, words[1];
    long all[] = {(long)request};
    request[5] = (uint32_t)fd, request[6] = (uint32_t)words, request[8] = sizeof words;
    CHECK(call(IO_SETUP, 1, (long)&context), 0);
    long submitted = call(IO_SUBMIT, context, 1, (long)all);
    CHECK(call(IO_DESTROY, context), 0);
    return submitted;
}

/* What the kernel would answer by itself, as for a regular file. */
static void of_a_device(long fd, long other)
{
    long ends[2];
    CHECK(call(PIPE, (long)ends), 0);
    CHECK(call(MMAP2, 0, PAGE, 1, PRIVATE, fd, 0), -ENODEV);
    CHECK(call(MMAP2, 0, 0, 1, PRIVATE, fd, 0), -EINVAL);
    CHECK(call(IOCTL, fd, 0x40044599, 0), -ENOSYS);
    CHECK(call(IOCTL, fd, FIONREAD, 0), -ENOSYS);
    CHECK(call(FCNTL, fd, SETLEASE, 0), -EINVAL);
    CHECK(call(FCNTL64, fd, SETFL, NONBLOCK | DIRECT), -EINVAL);
    CHECK(call(READ, fd, 0, 3), 0);
    CHECK(call(WRITE, fd, 0, 3), 0);
    CHECK(call(READ, fd, 0, 4), -EAGAIN);
    CHECK(call(SENDFILE, ends[1], fd, 0, 4), -EINVAL);
    CHECK(call(SENDFILE64, ends[1], fd, 0, 4), -EINVAL);
    CHECK(call(SPLICE, fd, 0, ends[1], 0, 4, 0), -EINVAL);
    CHECK(by_aio(fd), -EINVAL);
    CHECK(call(READAHEAD, fd, 0, 0, PAGE), -EINVAL);
    CHECK(call(SYNC_FILE_RANGE, fd, 0, 0, 0, 0, 0), -ESPIPE);
    CHECK(call(SYNC_FILE_RANGE, fd, -1L, -1L, 0, 0, 0), -EINVAL);
    CHECK(call(FALLOCATE, fd, 0, 0, 0, 8, 0), -ENODEV);
    CHECK(call(FALLOCATE, fd, 0, 0, 0, 0, -1L), -EINVAL);
    CHECK(call(COPY_FILE_RANGE, fd, 0, other, 0, 4, 0), -EINVAL);
    CHECK(call(CLOSE, ends[0]) | call(CLOSE, ends[1]), 0);
}
#endif

void _start(void)
{
    const char *path = "/dev/xen/evtchn";
    uint32_t words[4] = {0}, port, other, second;
    long a = call(OPEN, (long)path, RDWR), b = call(OPEN, (long)path, RDWR | NONBLOCK);
    CHECK(a > 0 && b > 0, 1);
    port = (uint32_t)ask((int)a, BIND_UNBOUND_PORT, 0, 0);
    other = (uint32_t)ask((int)b, BIND_INTERDOMAIN, 0, port);
    CHECK((long)port > 0 && (long)other > 0, 1);

    CHECK(ready((int)b, 5000), 1); /* a port is born with an event */
    CHECK(call(READ, b, BAD, 4), -EFAULT);
    CHECK(call(READ, b, (long)words, 16), 4);
    CHECK(words[0], other);
    CHECK(call(READ, b, (long)words, 16), -EAGAIN);
#ifdef FILTERED
    of_a_device(b, a);
#endif
    CHECK(call(WRITE, b, BAD, 4), -EFAULT);
    CHECK(call(WRITE, b, (long)words, 4), 4);
    CHECK(ask((int)a, NOTIFY, port, 0), 0);
    CHECK(ready((int)b, 5000), 1);
    CHECK(readv_of(READV, (int)b, words, 2, words + 1, 4), 0); /* a call a segment, up to the first short one */
    CHECK(readv_of(READV, (int)b, words, 4, words + 2, 4), 4);
    CHECK(readv_of(WRITEV, (int)b, words, 2, words + 1, 4), 0);
    CHECK(readv_of(WRITEV, (int)b, words, 4, words, 4), 8);
    struct segment one = {(uint32_t)words, 4};
    CHECK(call(PWRITEV2, b, (long)&one, 1, -1L, -1L, APPEND), -EOPNOTSUPP);

    CHECK(call(IOCTL, a, NOTIFY, BAD), -EFAULT);
    CHECK(call(IOCTL, a, UNBIND, 8), -EFAULT);
    CHECK(ask((int)a, NOTIFY, 4000, 0), -ENOTCONN);
    CHECK(call(IOCTL, a, 0x4599, 0), -ENOSYS);
    CHECK(call(LSEEK, b, 0, 1), -ESPIPE);
    CHECK(call(MMAP2, 0, PAGE, 1, SHARED, b, 0), -ENODEV);
    CHECK(call(SENDFILE, 1, b, 0, 4), -EINVAL);
    shown(a, path);

    /* Buffers across two pages: one transfer, which waits for nothing more. */
    long pages = call(MMAP2, 0, 3 * PAGE, 3, PRIVATE_ANONYMOUS, -1, 0), edge = pages + PAGE;
    CHECK(pages > 0 || pages < -PAGE, 1);
    CHECK(call(FCNTL, b, SETFL, 0), 0);
    CHECK(ask((int)a, NOTIFY, port, 0), 0);
    CHECK(call(READ, b, edge - 4, 8), 4);
    CHECK(call(WRITE, b, edge - 4, 4), 4);
    CHECK(ask((int)a, NOTIFY, port, 0), 0);
    CHECK(call(READ, b, edge - 2, 4), 4);
    CHECK(call(WRITE, b, edge - 2, 4), 4);
    CHECK(call(WRITE, b, pages, 2 * PAGE), PAGE);
    second = (uint32_t)ask((int)b, BIND_INTERDOMAIN, 0, (uint32_t)ask((int)a, BIND_UNBOUND_PORT, 0, 0));
    CHECK((long)second > 0 && ready((int)b, 5000), 1);
    CHECK(call(MPROTECT, edge, PAGE, 0), 0);
    CHECK(call(READ, b, edge - 4, 4), 4);
    CHECK(call(WRITE, b, edge - 4, 8), -EFAULT);
    CHECK(call(WRITE, b, edge - 4, 4), 4);

    long child = call(FORK); /* which ends a wait of ours */
    if (child == 0)
        call(EXIT, ask((int)a, NOTIFY, port, 0));
    CHECK(call(READ, b, (long)words, 4), 4);
    CHECK(words[0], other);
    CHECK(call(WAITPID, child, 0, 0), child);
    CHECK(call(WRITE, b, (long)words, 4), 4);
    notifier = (int)a;
    notifies = port;
    interrupted((int)b, words);
    CHECK(ask((int)b, UNBIND, other, 0), 0);
    CHECK(call(CLOSE, a) | call(CLOSE, b), 0);
    say("ok\n");
    call(EXIT, 0);
}
