/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory: the one object through which shared pages are touched.  In the machine it maps a descriptor; in the explorer it
 * names a model that answers each access.  Offsets are checked; an access must be naturally aligned, or it could tear.
 */
#include "core.h"

#include <sys/mman.h>
#include <sys/stat.h>

PyTypeObject *pv_memory_type;

#ifdef PVBUS_EXPLORED

static int answer(PyObject *result, uint64_t *out)
{
    if (result == NULL)
        return -1;
    if (out != NULL) {
        *out = PyLong_AsUnsignedLongLongMask(result);
        if (*out == (uint64_t)-1 && PyErr_Occurred()) {
            Py_DECREF(result);
            return -1;
        }
    }
    Py_DECREF(result);
    return 0;
}

#define CALL(out, method, format, ...) answer(PyObject_CallMethod(m->model, method, format, __VA_ARGS__), out)

int pv_model_load(MemoryObject *m, size_t off, int width, int order, const char *site, uint64_t *out)
{
    if (m->api != NULL)
        return m->api->load(m->api->engine, m->number, off, width, order, site, out);
    return CALL(out, "load", "Oniis", (PyObject *)m, (Py_ssize_t)off, width, order, site);
}

int pv_model_store(MemoryObject *m, size_t off, int width, uint64_t v, int order, const char *site)
{
    if (m->api != NULL)
        return m->api->store(m->api->engine, m->number, off, width, v, order, site);
    return CALL(NULL, "store", "OniKis", (PyObject *)m, (Py_ssize_t)off, width, (unsigned long long)v, order, site);
}

int pv_model_rmw(MemoryObject *m, size_t off, int width, int op, uint64_t v, const char *site, uint64_t *old)
{
    if (m->api != NULL)
        return m->api->rmw(m->api->engine, m->number, off, width, op, v, site, old);
    return CALL(old, "rmw", "OniiKs", (PyObject *)m, (Py_ssize_t)off, width, op, (unsigned long long)v, site);
}

int pv_model_cas(MemoryObject *m, size_t off, int width, uint64_t expected, uint64_t desired, const char *site,
                 uint64_t *old)
{
    if (m->api != NULL)
        return m->api->cas(m->api->engine, m->number, off, width, expected, desired, site, old);
    return CALL(old, "cas", "OniKKs", (PyObject *)m, (Py_ssize_t)off, width, (unsigned long long)expected,
                (unsigned long long)desired, site);
}

int pv_model_fence(MemoryObject *m, int kind, const char *site)
{
    return m->api != NULL ? m->api->fence(m->api->engine, kind, site) : CALL(NULL, "fence", "is", kind, site);
}

int pv_model_spin(MemoryObject *m, const char *site)
{
    return m->api != NULL ? m->api->spin(m->api->engine, site) : CALL(NULL, "spin", "s", site);
}

/* A model in C says so by its attribute `native`. */
static int find_api(MemoryObject *m)
{
    PyObject *capsule = PyObject_GetAttrString(m->model, "native");
    if (capsule == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError))
            return -1;
        PyErr_Clear();
        return 0;
    }
    m->api = PyCapsule_GetPointer(capsule, PV_MODEL_API);
    Py_DECREF(capsule); /* the model, which m holds, keeps the table */
    if (m->api == NULL)
        return -1;
    m->number = m->api->attach(m->api->engine, m);
    return 0;
}

#endif

int pv_memory_check_readable(PyObject *object, size_t size_min, const char *what)
{
    if (!PyObject_TypeCheck(object, pv_memory_type)) {
        PyErr_Format(PyExc_TypeError, "%s must be a Memory", what);
        return -1;
    }
    MemoryObject *m = (MemoryObject *)object;
    if (m->base == NULL || m->size < size_min) {
        PyErr_Format(PyExc_ValueError, "%s %s %zu bytes, needs %zu", what, m->base == NULL ? "is closed and had" : "has", m->size,
                     size_min);
        return -1;
    }
    return 0;
}

int pv_memory_check(PyObject *object, size_t size_min, const char *what)
{
    if (pv_memory_check_readable(object, size_min, what) < 0)
        return -1;
    if (!((MemoryObject *)object)->writable) {
        PyErr_Format(PyExc_ValueError, "%s is mapped read-only", what);
        return -1;
    }
    return 0;
}

static PyObject *memory_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"source", "size", "writable", NULL};
    PyObject *source;
    Py_ssize_t size;
    int writable = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "On|p", names, &source, &size, &writable))
        return NULL;
    if (size <= 0)
        return PyErr_Format(PyExc_ValueError, "a memory of %zd bytes", size);
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    MemoryObject *self = (MemoryObject *)alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->size = (size_t)size;
    self->writable = writable;
#ifdef PVBUS_EXPLORED
    Py_INCREF(source);
    self->model = source;
    self->base = (uint8_t *)1; /* open */
    if (find_api(self) < 0) {
        Py_DECREF(self);
        return NULL;
    }
#else
    int fd = PyObject_AsFileDescriptor(source);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) < 0 || st.st_size < size) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "descriptor %d holds fewer than %zd bytes", fd, size);
        Py_DECREF(self);
        return NULL;
    }
    void *base = mmap(NULL, (size_t)size, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) {
        PyErr_SetFromErrno(PyExc_OSError);
        Py_DECREF(self);
        return NULL;
    }
    self->base = base;
#endif
    return (PyObject *)self;
}

static void memory_unmap(MemoryObject *self)
{
#ifndef PVBUS_EXPLORED
    if (self->base != NULL)
        munmap(self->base, self->size);
#endif
    self->base = NULL;
}

static void memory_dealloc(MemoryObject *self)
{
    memory_unmap(self);
    Py_CLEAR(self->model);
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyObject *memory_close(MemoryObject *self, PyObject *ignored)
{
    (void)ignored;
    memory_unmap(self);
    Py_RETURN_NONE;
}

/* Parse (offset[, value[, value]][, site]); the site defaults to "python". */
static int operands(MemoryObject *m, PyObject *const *args, Py_ssize_t n, int values, size_t width, size_t *off,
                    uint64_t *v, const char **site, int writes)
{
    if (n < 1 + values || n > 2 + values) {
        PyErr_Format(PyExc_TypeError, "takes an offset and %d value(s)", values);
        return -1;
    }
    Py_ssize_t at = PyLong_AsSsize_t(args[0]);
    if (at == -1 && PyErr_Occurred())
        return -1;
    if (m->base == NULL) {
        PyErr_SetString(PyExc_ValueError, "this memory is closed");
        return -1;
    }
    if (at < 0 || (size_t)at + width > m->size || (size_t)at % width != 0) {
        PyErr_Format(PyExc_IndexError, "offset %zd of a %zu-byte memory is outside or not aligned to %zu", at, m->size, width);
        return -1;
    }
    if (writes && !m->writable) {
        PyErr_SetString(PyExc_TypeError, "this memory is mapped read-only");
        return -1;
    }
    *off = (size_t)at;
    for (int i = 0; i < values; i++) {
        v[i] = PyLong_AsUnsignedLongLongMask(args[1 + i]);
        if (v[i] == (uint64_t)-1 && PyErr_Occurred())
            return -1;
    }
    *site = "python";
#if defined(PVBUS_EXPLORED) || defined(PVBUS_GATED)
    if (n == 2 + values) {
        *site = PyUnicode_AsUTF8AndSize(args[1 + values], NULL);
        if (*site == NULL)
            return -1;
    }
#endif
    return 0;
}

/* The access itself stands in a function returning int64_t, as the macros demand; the method wraps it. */
#define ACCESS(name, width, values, writes, body) \
    static int64_t name##_access(MemoryObject *m, size_t off, uint64_t *v, uint64_t *out, const char *site) \
    { (void)v; (void)out; (void)site; body; return 0; } \
    static PyObject *memory_##name(MemoryObject *m, PyObject *const *args, Py_ssize_t n) \
    { \
        size_t off; uint64_t v[2] = {0, 0}, out = 0; const char *site; \
        if (operands(m, args, n, values, width, &off, v, &site, writes) < 0) return NULL; \
        if (name##_access(m, off, v, &out, site) == PV_DEAD) return NULL; \
        return PyLong_FromUnsignedLongLong(out); \
    }

ACCESS(load8, 1, 0, 0, PV_LOAD8(*out, m, off, PV_RELAXED, site))
ACCESS(load32, 4, 0, 0, PV_LOAD32(*out, m, off, PV_RELAXED, site))
ACCESS(load64, 8, 0, 0, PV_LOAD64(*out, m, off, PV_RELAXED, site))
ACCESS(load32_acquire, 4, 0, 0, PV_LOAD32(*out, m, off, PV_ACQUIRE, site))
ACCESS(load64_acquire, 8, 0, 0, PV_LOAD64(*out, m, off, PV_ACQUIRE, site))
ACCESS(store8, 1, 1, 1, PV_STORE8(m, off, v[0], PV_RELAXED, site))
ACCESS(store32, 4, 1, 1, PV_STORE32(m, off, v[0], PV_RELAXED, site))
ACCESS(store64, 8, 1, 1, PV_STORE64(m, off, v[0], PV_RELAXED, site))
ACCESS(store32_release, 4, 1, 1, PV_STORE32(m, off, v[0], PV_RELEASE, site))
ACCESS(store64_release, 8, 1, 1, PV_STORE64(m, off, v[0], PV_RELEASE, site))
ACCESS(exchange8, 1, 1, 1, PV_XCHG8(*out, m, off, v[0], site))
ACCESS(exchange32, 4, 1, 1, PV_XCHG32(*out, m, off, v[0], site))
ACCESS(exchange64, 8, 1, 1, PV_XCHG64(*out, m, off, v[0], site))
ACCESS(fetch_or64, 8, 1, 1, PV_OR64(*out, m, off, v[0], site))
ACCESS(fetch_and64, 8, 1, 1, PV_AND64(*out, m, off, v[0], site))
ACCESS(compare_exchange32, 4, 2, 1,
       { int ok; uint32_t e = (uint32_t)v[0]; PV_CAS32(ok, m, off, e, v[1], site); *out = e; (void)ok; })
ACCESS(compare_exchange64, 8, 2, 1,
       { int ok; uint64_t e = v[0]; PV_CAS64(ok, m, off, e, v[1], site); *out = e; (void)ok; })
ACCESS(test_and_set_bit, 8, 1, 1,
       { uint64_t bit = 1ull << (v[0] & 63); uint64_t old; PV_OR64(old, m, off, bit, site); *out = (old & bit) != 0; })
ACCESS(test_and_clear_bit, 8, 1, 1,
       { uint64_t bit = 1ull << (v[0] & 63); uint64_t old; PV_AND64(old, m, off, ~bit, site); *out = (old & bit) != 0; })

static int64_t fence_access(MemoryObject *m, int kind, const char *site)
{
    (void)m;
    (void)site;
    if (kind == PV_MB)
        PV_SMP_MB(m, site);
    else if (kind == PV_RMB)
        PV_SMP_RMB(m, site);
    else
        PV_SMP_WMB(m, site);
    return 0;
}

#define FENCE(name, kind) \
    static PyObject *memory_##name(MemoryObject *m, PyObject *label) \
    { \
        const char *site = PyUnicode_AsUTF8AndSize(label, NULL); \
        if (site == NULL || fence_access(m, kind, site) == PV_DEAD) return NULL; \
        Py_RETURN_NONE; \
    }
FENCE(smp_mb, PV_MB)
FENCE(smp_rmb, PV_RMB)
FENCE(smp_wmb, PV_WMB)

static PyObject *memory_get_size(MemoryObject *self, void *closure)
{
    (void)closure;
    return PyLong_FromSize_t(self->size);
}

static PyObject *memory_get_closed(MemoryObject *self, void *closure)
{
    (void)closure;
    return PyBool_FromLong(self->base == NULL);
}

#define FAST(name, doc) {#name, (PyCFunction)(void (*)(void))memory_##name, METH_FASTCALL, doc}
#define O(name, doc) {#name, (PyCFunction)memory_##name, METH_O, doc}
static PyMethodDef memory_methods[] = {
    FAST(load8, "load8(offset) -> int: a relaxed load."),
    FAST(load32, "load32(offset) -> int: a relaxed load."),
    FAST(load64, "load64(offset) -> int: a relaxed load."),
    FAST(load32_acquire, "load32_acquire(offset) -> int."),
    FAST(load64_acquire, "load64_acquire(offset) -> int."),
    FAST(store8, "store8(offset, value): a relaxed store."),
    FAST(store32, "store32(offset, value): a relaxed store."),
    FAST(store64, "store64(offset, value): a relaxed store."),
    FAST(store32_release, "store32_release(offset, value)."),
    FAST(store64_release, "store64_release(offset, value)."),
    FAST(exchange8, "exchange8(offset, value) -> old value."),
    FAST(exchange32, "exchange32(offset, value) -> old value."),
    FAST(exchange64, "exchange64(offset, value) -> old value."),
    FAST(fetch_or64, "fetch_or64(offset, bits) -> old value."),
    FAST(fetch_and64, "fetch_and64(offset, bits) -> old value."),
    FAST(compare_exchange32, "compare_exchange32(offset, expected, desired) -> old value; it took place if that is `expected`."),
    FAST(compare_exchange64, "compare_exchange64(offset, expected, desired) -> old value; it took place if that is `expected`."),
    FAST(test_and_set_bit, "test_and_set_bit(offset of a 64-bit word, bit 0..63) -> old bit."),
    FAST(test_and_clear_bit, "test_and_clear_bit(offset of a 64-bit word, bit 0..63) -> old bit."),
    O(smp_mb, "smp_mb(label): a full barrier; the SYNC label also stands at its partner."),
    O(smp_rmb, "smp_rmb(label): orders loads before it with loads and stores after it."),
    O(smp_wmb, "smp_wmb(label): orders loads and stores before it with stores after it."),
    {"close", (PyCFunction)memory_close, METH_NOARGS, "Unmap; every later access raises ValueError."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef memory_getset[] = {
    {"size", (getter)memory_get_size, NULL, "Bytes mapped.", NULL},
    {"closed", (getter)memory_get_closed, NULL, "True after close().", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot memory_slots[] = {
    {Py_tp_new, memory_new},
    {Py_tp_dealloc, memory_dealloc},
    {Py_tp_methods, memory_methods},
    {Py_tp_getset, memory_getset},
    {Py_tp_doc, "Memory(fd_or_model, size, writable=True): a shared page, touched by atomics only."},
    {0, NULL},
};

static PyType_Spec memory_spec = {"pvbus.shm._core.Memory", sizeof(MemoryObject), 0, Py_TPFLAGS_DEFAULT, memory_slots};

int pv_memory_init(PyObject *module)
{
    pv_memory_type = (PyTypeObject *)PyType_FromSpec(&memory_spec);
    if (pv_memory_type == NULL)
        return -1;
    return PyModule_AddObjectRef(module, "Memory", (PyObject *)pv_memory_type);
}
