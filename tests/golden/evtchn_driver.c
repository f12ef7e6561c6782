/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The system calls of a recorded scenario, on /dev/xen/evtchn itself: each once, without a library's retries, with any pointer.
 * Every function gives the call's value or -errno.  Loaded by through_file.py; no knowledge of scenarios belongs in here.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

static long answer(long r) { return r < 0 ? -errno : r; }

long driver_open(const char *path, int flags) { return answer(open(path, flags | O_CLOEXEC)); }
long driver_close(int fd) { return answer(close(fd)); }
long driver_dup(int fd) { return answer(fcntl(fd, F_DUPFD_CLOEXEC, 0)); }
long driver_read(int fd, void *at, unsigned long count) { return answer(read(fd, at, count)); }
long driver_write(int fd, const void *at, unsigned long count) { return answer(write(fd, at, count)); }
long driver_ioctl(int fd, unsigned long request, void *argument) { return answer(ioctl(fd, request, argument)); }

/* Two segments: the first `first` bytes at `at`, the rest behind a gap of 8. */
long driver_readv(int fd, char *at, unsigned long first, unsigned long second)
{
    struct iovec segments[2] = {{at, first}, {at + first + 8, second}};
    return answer(readv(fd, segments, 2));
}

long driver_writev(int fd, char *at, unsigned long first, unsigned long second)
{
    struct iovec segments[2] = {{at, first}, {at + first + 8, second}};
    return answer(writev(fd, segments, 2));
}

long driver_poll(int fd, unsigned int events, int timeout_ms)
{
    struct pollfd look = {fd, (short)events, 0};
    long r = poll(&look, 1, timeout_ms);
    return r < 0 ? -errno : (unsigned short)look.revents;
}

long driver_mmap(int fd)
{
    return mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED ? -errno : 0;
}

/* Memory of which the last `mapped` bytes before an unmapped page are given. */
void *driver_edge(unsigned long mapped)
{
    long page = sysconf(_SC_PAGESIZE);
    char *at = mmap(NULL, 2 * (unsigned long)page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED || munmap(at + page, (unsigned long)page) < 0)
        return NULL;
    return at + page - mapped;
}
