/* SPDX-License-Identifier: Apache-2.0 */
/* The baton gate (gate.h): empty but in the debug module. */
#include "core.h"

#ifdef PVBUS_GATED

#include "gate.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static struct pv_gate *gate;   /* NULL: this process has entered none */
static uint32_t steps_max;
static char name[PV_GATE_NAME_BYTES];
static uint32_t schedule;      /* the trace that `next` belongs to */
static uint32_t next;          /* the first step that we have not made */

static uint32_t look(uint32_t *word) { return __atomic_load_n(word, __ATOMIC_SEQ_CST); }

static void changed(void)
{
    __atomic_fetch_add(&gate->changed, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &gate->changed, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

/* Our next step, or -1. */
static int64_t own_step(void)
{
    if (look(&gate->schedule) != schedule) {
        schedule = look(&gate->schedule);
        next = 0;
    }
    uint32_t steps = look(&gate->steps);
    for (; next < steps && next < steps_max; next++) {
        uint32_t context = gate->step[next].context;
        if (context < PV_GATE_CONTEXTS_MAX && strncmp(gate->names[context], name, PV_GATE_NAME_BYTES) == 0)
            return next;
    }
    return -1;
}

int64_t pv_gate_enter(size_t size, size_t offset, const char *site)
{
    if (gate == NULL)
        return -1;
    uint32_t state = look(&gate->state);
    if (state != PV_GATE_HELD && state != PV_GATE_PLAYING)
        return -1;
    int64_t step = own_step();
    if (step < 0)
        return -1;
    struct pv_gate_step *mine = &gate->step[step];
    if (mine->size != size || mine->offset != offset || strncmp(mine->site, site, PV_GATE_SITE_BYTES) != 0)
        return -1;
    uint64_t deadline = pv_now_ns() + PV_GATE_WAIT_NS_MAX;
    for (;;) {
        uint32_t seen = look(&gate->changed);
        state = look(&gate->state);
        if (state == PV_GATE_PLAYING && look(&gate->turn) == (uint32_t)step)
            return step;
        if (state == PV_GATE_OFF || state == PV_GATE_OVER)
            return -1;
        if (pv_now_ns() > deadline) {
            __atomic_store_n(&gate->state, PV_GATE_OVER, __ATOMIC_SEQ_CST);
            changed();
            return -1;
        }
        struct timespec pause = {0, PV_GATE_LOOK_NS};
        syscall(SYS_futex, &gate->changed, FUTEX_WAIT, seen, &pause, NULL, 0);
    }
}

void pv_gate_leave(int64_t step)
{
    if (step < 0)
        return;
    int error = errno;
    next = (uint32_t)step + 1;
    __atomic_store_n(&gate->turn, next, __ATOMIC_SEQ_CST); /* the access has reached memory: x86 drains here, arm64 has dmb */
    changed();
    errno = error;
}

static PyObject *enter_gate(PyObject *module, PyObject *args)
{
    (void)module;
    const char *path, *who;
    struct stat st;
    if (!PyArg_ParseTuple(args, "ss", &path, &who))
        return NULL;
    if (strlen(who) >= PV_GATE_NAME_BYTES)
        return PyErr_Format(PyExc_ValueError, "%s: a name at the gate has fewer than %d letters", who, PV_GATE_NAME_BYTES);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return PyErr_SetFromErrnoWithFilename(PyExc_OSError, path);
    if (fstat(fd, &st) < 0 || (size_t)st.st_size < sizeof *gate) {
        close(fd);
        return PyErr_Format(PyExc_ValueError, "%s is no gate", path);
    }
    void *base = mmap(NULL, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (base == MAP_FAILED)
        return PyErr_SetFromErrno(PyExc_OSError);
    gate = base;
    steps_max = (uint32_t)(((size_t)st.st_size - sizeof *gate) / sizeof gate->step[0]);
    strncpy(name, who, sizeof name - 1);
    schedule = next = 0;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"enter_gate", enter_gate, METH_VARARGS, "enter_gate(path, name): follow the trace in this file, as the context of this name."},
    {NULL, NULL, 0, NULL},
};

int pv_gate_init(PyObject *module) { return PyModule_AddFunctions(module, methods); }

#else

int pv_gate_init(PyObject *module) { (void)module; return 0; }

#endif
