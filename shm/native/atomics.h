/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every access to a shared page goes through the macros of this file, and nothing else may touch one.
 *
 * The same sources are compiled twice.  In the machine (pvbus.shm._core) a macro is one C11 atomic.  In the explorer
 * (pvbus.shm._core_explored, -DPVBUS_EXPLORED) it is a call-out to a memory model: a scheduling point.  A call-out can
 * fail (the context died, the search cut this branch); then the Python error is set and the macro returns PV_DEAD from the
 * function that used it, so a dead context executes nothing further.  That is why each user of the macros returns int64_t.
 *
 * Orders: PV_RELAXED, PV_ACQUIRE, PV_RELEASE.  Read-modify-writes are sequentially consistent (full barriers on x86).
 * `site` names the access; on a barrier it is the SYNC label that also stands at its partner.
 */
#ifndef PVBUS_ATOMICS_H
#define PVBUS_ATOMICS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stddef.h>

#include "model_api.h"

#define PV_DEAD INT64_MIN

typedef struct {
    PyObject_HEAD
    uint8_t *base;      /* NULL once closed */
    size_t size;
    int writable;
    PyObject *model;    /* explorer only: who answers the call-outs */
    const struct pv_model_api *api; /* explorer only: the same in C, or NULL */
    uint32_t number;    /* of this memory in that model */
} MemoryObject;

enum pv_op { PV_OR, PV_AND, PV_XCHG, PV_ADD };
enum pv_fence { PV_MB, PV_RMB, PV_WMB };

#ifndef PVBUS_EXPLORED

#define PV_RELAXED __ATOMIC_RELAXED
#define PV_ACQUIRE __ATOMIC_ACQUIRE
#define PV_RELEASE __ATOMIC_RELEASE

/* Every access that has a site.  In the debug module (gate.h) it waits for its turn, if it is a step of the trace. */
#ifdef PVBUS_GATED
#include "gate.h"
#define PV_STEP(size, off, site, does) \
    do { int64_t pv_step_ = pv_gate_enter(size, off, site); does; pv_gate_leave(pv_step_); } while (0)
#define PV_ACCESS(m, off, site, does) PV_STEP((m)->size, off, site, does)
#else
#define PV_STEP(size, off, site, does) (does)
#define PV_ACCESS(m, off, site, does) (does)
#endif

#define PV_AT(type, m, off) ((type *)(void *)((m)->base + (off)))

#define PV_LOAD8(dst, m, off, order, site) PV_ACCESS(m, off, site, (dst) = __atomic_load_n(PV_AT(uint8_t, m, off), order))
#define PV_LOAD32(dst, m, off, order, site) PV_ACCESS(m, off, site, (dst) = __atomic_load_n(PV_AT(uint32_t, m, off), order))
#define PV_LOAD64(dst, m, off, order, site) PV_ACCESS(m, off, site, (dst) = __atomic_load_n(PV_AT(uint64_t, m, off), order))
#define PV_STORE8(m, off, v, order, site) \
    PV_ACCESS(m, off, site, __atomic_store_n(PV_AT(uint8_t, m, off), (uint8_t)(v), order))
#define PV_STORE32(m, off, v, order, site) \
    PV_ACCESS(m, off, site, __atomic_store_n(PV_AT(uint32_t, m, off), (uint32_t)(v), order))
#define PV_STORE64(m, off, v, order, site) \
    PV_ACCESS(m, off, site, __atomic_store_n(PV_AT(uint64_t, m, off), (uint64_t)(v), order))

#define PV_XCHG8(dst, m, off, v, site) \
    PV_ACCESS(m, off, site, (dst) = __atomic_exchange_n(PV_AT(uint8_t, m, off), (uint8_t)(v), __ATOMIC_SEQ_CST))
#define PV_XCHG32(dst, m, off, v, site) \
    PV_ACCESS(m, off, site, (dst) = __atomic_exchange_n(PV_AT(uint32_t, m, off), (uint32_t)(v), __ATOMIC_SEQ_CST))
#define PV_XCHG64(dst, m, off, v, site) \
    PV_ACCESS(m, off, site, (dst) = __atomic_exchange_n(PV_AT(uint64_t, m, off), (uint64_t)(v), __ATOMIC_SEQ_CST))
#define PV_OR32(dst, m, off, v, site) \
    PV_ACCESS(m, off, site, (dst) = __atomic_fetch_or(PV_AT(uint32_t, m, off), (uint32_t)(v), __ATOMIC_SEQ_CST))
#define PV_AND32(dst, m, off, v, site) \
    PV_ACCESS(m, off, site, (dst) = __atomic_fetch_and(PV_AT(uint32_t, m, off), (uint32_t)(v), __ATOMIC_SEQ_CST))
#define PV_OR64(dst, m, off, v, site) \
    PV_ACCESS(m, off, site, (dst) = __atomic_fetch_or(PV_AT(uint64_t, m, off), (uint64_t)(v), __ATOMIC_SEQ_CST))
#define PV_AND64(dst, m, off, v, site) \
    PV_ACCESS(m, off, site, (dst) = __atomic_fetch_and(PV_AT(uint64_t, m, off), (uint64_t)(v), __ATOMIC_SEQ_CST))
/* On failure `expected` takes the value that was seen. */
#define PV_CAS32(ok, m, off, expected, desired, site) \
    PV_ACCESS(m, off, site, (ok) = __atomic_compare_exchange_n(PV_AT(uint32_t, m, off), &(expected), (uint32_t)(desired), 0, \
              __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
#define PV_CAS64(ok, m, off, expected, desired, site) \
    PV_ACCESS(m, off, site, (ok) = __atomic_compare_exchange_n(PV_AT(uint64_t, m, off), &(expected), (uint64_t)(desired), 0, \
              __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))

#define PV_SMP_MB(m, site) __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define PV_SMP_RMB(m, site) __atomic_thread_fence(__ATOMIC_ACQUIRE)
#define PV_SMP_WMB(m, site) __atomic_thread_fence(__ATOMIC_RELEASE)

/* n 64-bit words, one relaxed access each; from and to need not be aligned.  Like every word here, 8-byte aligned in the page. */
static inline void pv_store_words(uint64_t *page, const char *from, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t word;
        __builtin_memcpy(&word, from + 8 * i, 8);
        __atomic_store_n(page + i, word, __ATOMIC_RELAXED);
    }
}
static inline void pv_load_words(char *to, const uint64_t *page, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t word = __atomic_load_n(page + i, __ATOMIC_RELAXED);
        __builtin_memcpy(to + 8 * i, &word, 8);
    }
}
#define PV_STORE_WORDS(m, off, from, n, site) pv_store_words(PV_AT(uint64_t, m, off), from, n)
#define PV_LOAD_WORDS(to, m, off, n, site) pv_load_words(to, PV_AT(const uint64_t, m, off), n)

/* A full barrier straight after a locked read-modify-write: on x86 that instruction is one already. */
#if defined(__x86_64__)
#define PV_SMP_MB_AFTER_RMW(m, site) __atomic_signal_fence(__ATOMIC_SEQ_CST)
#else
#define PV_SMP_MB_AFTER_RMW(m, site) PV_SMP_MB(m, site)
#endif

#if defined(__x86_64__)
#define PV_RELAX() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PV_RELAX() __asm__ __volatile__("yield")
#else
#define PV_RELAX() ((void)0)
#endif
/* A turn of a spin loop: the explorer lets others run until something changes. */
#define PV_SPIN(m, site) PV_RELAX()

/* Statistics and time stamps: nobody decides anything by them, so they are no scheduling points. */
#define PV_STAMP64(m, off, v) __atomic_store_n(PV_AT(uint64_t, m, off), (uint64_t)(v), __ATOMIC_RELAXED)
#define PV_COUNT64(m, off, n) \
    __atomic_store_n(PV_AT(uint64_t, m, off), \
                     __atomic_load_n(PV_AT(uint64_t, m, off), __ATOMIC_RELAXED) + (uint64_t)(n), __ATOMIC_RELAXED)

#else /* PVBUS_EXPLORED */

#define PV_RELAXED 0
#define PV_ACQUIRE 1
#define PV_RELEASE 2

int pv_model_load(MemoryObject *m, size_t off, int width, int order, const char *site, uint64_t *out);
int pv_model_store(MemoryObject *m, size_t off, int width, uint64_t v, int order, const char *site);
int pv_model_rmw(MemoryObject *m, size_t off, int width, int op, uint64_t v, const char *site, uint64_t *old);
int pv_model_cas(MemoryObject *m, size_t off, int width, uint64_t expected, uint64_t desired, const char *site,
                 uint64_t *old);
int pv_model_fence(MemoryObject *m, int kind, const char *site);
int pv_model_spin(MemoryObject *m, const char *site);

#define PV_X_LOAD(dst, m, off, width, order, site) \
    do { uint64_t pv_v_; if (pv_model_load(m, off, width, order, site, &pv_v_) < 0) return PV_DEAD; (dst) = pv_v_; } while (0)
#define PV_X_STORE(m, off, width, v, order, site) \
    do { if (pv_model_store(m, off, width, (uint64_t)(v), order, site) < 0) return PV_DEAD; } while (0)
#define PV_X_RMW(dst, m, off, width, op, v, site) \
    do { uint64_t pv_v_; if (pv_model_rmw(m, off, width, op, (uint64_t)(v), site, &pv_v_) < 0) return PV_DEAD; (dst) = pv_v_; } while (0)
#define PV_X_CAS(ok, m, off, width, expected, desired, site) \
    do { uint64_t pv_v_; \
         if (pv_model_cas(m, off, width, expected, (uint64_t)(desired), site, &pv_v_) < 0) return PV_DEAD; \
         (ok) = pv_v_ == (expected); (expected) = pv_v_; } while (0)

#define PV_LOAD8(dst, m, off, order, site) PV_X_LOAD(dst, m, off, 1, order, site)
#define PV_LOAD32(dst, m, off, order, site) PV_X_LOAD(dst, m, off, 4, order, site)
#define PV_LOAD64(dst, m, off, order, site) PV_X_LOAD(dst, m, off, 8, order, site)
#define PV_STORE8(m, off, v, order, site) PV_X_STORE(m, off, 1, v, order, site)
#define PV_STORE32(m, off, v, order, site) PV_X_STORE(m, off, 4, v, order, site)
#define PV_STORE64(m, off, v, order, site) PV_X_STORE(m, off, 8, v, order, site)
#define PV_XCHG8(dst, m, off, v, site) PV_X_RMW(dst, m, off, 1, PV_XCHG, v, site)
#define PV_XCHG32(dst, m, off, v, site) PV_X_RMW(dst, m, off, 4, PV_XCHG, v, site)
#define PV_XCHG64(dst, m, off, v, site) PV_X_RMW(dst, m, off, 8, PV_XCHG, v, site)
#define PV_OR32(dst, m, off, v, site) PV_X_RMW(dst, m, off, 4, PV_OR, v, site)
#define PV_AND32(dst, m, off, v, site) PV_X_RMW(dst, m, off, 4, PV_AND, v, site)
#define PV_OR64(dst, m, off, v, site) PV_X_RMW(dst, m, off, 8, PV_OR, v, site)
#define PV_AND64(dst, m, off, v, site) PV_X_RMW(dst, m, off, 8, PV_AND, v, site)
#define PV_CAS32(ok, m, off, expected, desired, site) PV_X_CAS(ok, m, off, 4, expected, desired, site)
#define PV_CAS64(ok, m, off, expected, desired, site) PV_X_CAS(ok, m, off, 8, expected, desired, site)
#define PV_STORE_WORDS(m, off, from, n, site) \
    do { for (size_t pv_i_ = 0; pv_i_ < (n); pv_i_++) { \
             uint64_t pv_w_; __builtin_memcpy(&pv_w_, (from) + 8 * pv_i_, 8); \
             PV_X_STORE(m, (off) + 8 * pv_i_, 8, pv_w_, PV_RELAXED, site); } } while (0)
#define PV_LOAD_WORDS(to, m, off, n, site) \
    do { for (size_t pv_i_ = 0; pv_i_ < (n); pv_i_++) { \
             uint64_t pv_w_; PV_X_LOAD(pv_w_, m, (off) + 8 * pv_i_, 8, PV_RELAXED, site); \
             __builtin_memcpy((to) + 8 * pv_i_, &pv_w_, 8); } } while (0)
#define PV_X_FENCE(m, kind, site) do { if (pv_model_fence(m, kind, site) < 0) return PV_DEAD; } while (0)
#define PV_SMP_MB(m, site) PV_X_FENCE(m, PV_MB, site)
#define PV_SMP_RMB(m, site) PV_X_FENCE(m, PV_RMB, site)
#define PV_SMP_WMB(m, site) PV_X_FENCE(m, PV_WMB, site)
#define PV_SMP_MB_AFTER_RMW(m, site) PV_SMP_MB(m, site)
#define PV_SPIN(m, site) do { if (pv_model_spin(m, site) < 0) return PV_DEAD; } while (0)
#define PV_STAMP64(m, off, v) ((void)(m), (void)(off), (void)(v))
#define PV_COUNT64(m, off, n) ((void)(m), (void)(off), (void)(n))

#endif /* PVBUS_EXPLORED */

/* A call that may have died passes the death on. */
#define PV_TRY(dst, call) do { (dst) = (call); if ((dst) == PV_DEAD) return PV_DEAD; } while (0)

#endif /* PVBUS_ATOMICS_H */
