/* SPDX-License-Identifier: Apache-2.0 */
/* What the C files of the core know of each other.  All int64_t functions return PV_DEAD when an explored context died. */
#ifndef PVBUS_CORE_H
#define PVBUS_CORE_H

#include "atomics.h"
#include "layout.h"

extern PyTypeObject *pv_memory_type;
/* A page that is closed or cannot be written would end the process at the first access.  Who closes one in use answers for it. */
int pv_memory_check(PyObject *object, size_t size_min, const char *what);
int pv_memory_check_readable(PyObject *object, size_t size_min, const char *what);
int pv_memory_init(PyObject *module);
int pv_event_path_init(PyObject *module);
int pv_user_file_init(PyObject *module);
PyObject *pv_hyperv_layout(void); /* hyperv_layout.c */
int pv_vmbus_layout_init(PyObject *module);
int pv_channel_ring_init(PyObject *module);
int pv_gate_init(PyObject *module); /* adds nothing but in the debug module */

/*
 * channel.c: pending and mask of a port, on the ABI that its domain has now.  What raises returns 0, or 1 + vCPU when its
 * doorbell may have to be rung.
 */
int64_t pv_set_pending(MemoryObject *domain, uint32_t port, uint64_t now);
int64_t pv_unmask(MemoryObject *domain, uint32_t port, int eoi);
int64_t pv_mask(MemoryObject *domain, uint32_t port);
int64_t pv_clear_pending(MemoryObject *domain, uint32_t port);
int64_t pv_is_pending(MemoryObject *domain, uint32_t port);
int64_t pv_mask_and_clear(MemoryObject *domain, uint32_t port); /* both, pending not before the mask */
/* Set the upcall flag: 1 + vCPU if it was clear. */
int64_t pv_vcpu_mark(MemoryObject *domain, uint32_t vcpu);
/* 1 when the sleeping CPU must be woken; clears its announcement. */
int64_t pv_vcpu_kick(MemoryObject *domain, uint32_t vcpu);

/* shared_info.c: the 2-level ABI */
int64_t pv_2l_set_pending(MemoryObject *domain, uint32_t port, uint64_t now);
int64_t pv_2l_unmask(MemoryObject *domain, uint32_t port, int eoi);

/* fifo.c: the FIFO ABI */
int64_t pv_fifo_set_pending(MemoryObject *domain, uint32_t port, uint64_t now);
int64_t pv_fifo_unmask(MemoryObject *domain, uint32_t port);
int64_t pv_fifo_rebuild(MemoryObject *domain, uint32_t vcpu);

/* event_ring.c */
#define PV_PUSH_WAKE 1
#define PV_PUSH_OVERFLOW 2
#define PV_PUSH_POISONED 4
#define PV_PUSH_GONE 8
int64_t pv_ring_lock(MemoryObject *machine, uint32_t slot, uint32_t owner);
int64_t pv_ring_unlock(MemoryObject *machine, uint32_t slot);
int64_t pv_ring_push(MemoryObject *machine, uint32_t slot, MemoryObject *page, uint32_t port, uint32_t owner,
                     MemoryObject *domain);
int64_t pv_ring_take(MemoryObject *page, uint32_t *out, uint32_t max, int *emptied);
int64_t pv_ring_grow(MemoryObject *machine, uint32_t slot, MemoryObject *page);
int64_t pv_ring_reset(MemoryObject *machine, uint32_t slot, MemoryObject *page);
int64_t pv_ring_poison(MemoryObject *machine, uint32_t slot, MemoryObject *page);
int64_t pv_ring_recover(MemoryObject *machine, uint32_t slot, MemoryObject *page, uint32_t owner, MemoryObject *domain);
int64_t pv_ring_state(MemoryObject *page); /* entries, or PV_RING_* */
#define PV_RING_OVERFLOW (1ll << 40)
#define PV_RING_POISONED (1ll << 41)
int64_t pv_door_lower(MemoryObject *page); /* 1 = not empty: go on, or re-arm */
int64_t pv_door_raise(MemoryObject *page); /* 1 = the byte has to be sent */

/* interrupt.c: the late-EOI chip and the interrupt handler; upcall.c: the loop that finds what is due */
#define PV_TICK_NS 4000000ull /* HZ = 250 */
typedef struct { uint32_t slots[64]; uint32_t count; } pv_wakes;
typedef struct {
    MemoryObject *machine, *domain, **pages;
    pv_wakes *wakes;
    uint64_t now;   /* CLOCK_MONOTONIC, for stamps */
    uint64_t clock; /* the machine's clock */
    uint32_t vcpu, left; /* events that may still be served */
    uint32_t epoch; /* of this upcall loop */
    int defer;      /* it runs too long: late EOIs of what it delivers may have to wait */
    int again;      /* something was left behind: come back */
} pv_upcall_run;
#define PV_SERVICE_DONE 0
#define PV_SERVICE_AGAIN (-1) /* another CPU has it in service (the port moved) */
int64_t pv_service(pv_upcall_run *u, uint32_t port);
int64_t pv_upcall(MemoryObject *machine, MemoryObject *domain, MemoryObject **pages, uint32_t vcpu, uint32_t budget,
                  pv_wakes *wakes);
int64_t pv_end_loop(MemoryObject *domain, uint32_t vcpu);
int64_t pv_cpu_recover(MemoryObject *machine, MemoryObject *domain, MemoryObject **pages, uint32_t vcpu, pv_wakes *wakes);

/* lateeoi.c: the end of an interrupt, at once or later */
int64_t pv_eoi(MemoryObject *machine, MemoryObject *domain, uint32_t port, uint32_t slot, int spurious);
/* End the interrupts whose time has come.  The vCPUs whose doorbell may have to be rung, a bit each. */
int64_t pv_eoi_expire(MemoryObject *domain, uint64_t now);

/* submission.c */
int64_t pv_submission_push(MemoryObject *ring, uint32_t *tail, uint32_t *head, uint32_t entry); /* 0, or 1 = full */
int64_t pv_submission_must_kick(MemoryObject *public_page, uint32_t *rung);

static inline size_t pv_domain_table(unsigned table, uint32_t port)
{
    return PV_DOMAIN_TABLES + ((size_t)table * PV_PORTS_MAX + port) * 8u;
}
#define PV_PORT_WORD(port) pv_domain_table(PV_TABLE_PORT, port)
#define PV_IRQ_WORD(port) pv_domain_table(PV_TABLE_IRQ, port)
#define PV_PENDING_SINCE(port) pv_domain_table(PV_TABLE_PENDING_SINCE, port)
#define PV_SERVED_AT(port) pv_domain_table(PV_TABLE_SERVED_AT, port)
#define PV_QUEUE_WORD(port) pv_domain_table(PV_TABLE_QUEUE, port)
#define PV_EOI_AT(port) pv_domain_table(PV_TABLE_EOI_AT, port)
#define PV_EOI_WORD(port) pv_domain_table(PV_TABLE_EOI, port)
#define PV_HEADER(field) offsetof(struct pv_domain_header, field)
#define PV_SHARED(field) (PV_DOMAIN_SHARED_INFO + offsetof(struct pv_shared_info, field))
#define PV_VCPU_INFO(v, field) \
    (PV_DOMAIN_SHARED_INFO + (size_t)(v) * sizeof(struct pv_vcpu_info) + offsetof(struct pv_vcpu_info, field))
#define PV_VCPU(v, field) (PV_DOMAIN_VCPUS + (size_t)(v) * 1024u + offsetof(struct pv_vcpu, field))
#define PV_ARRIVAL(v, i) (PV_DOMAIN_ARRIVALS + ((size_t)(v) * PV_ARRIVALS + ((i) & (PV_ARRIVALS - 1))) * 4u)
#define PV_FILE(slot, field) (PV_MACHINE_FILES + (size_t)(slot) * 256u + offsetof(struct pv_file, field))
#define PV_SUBMISSION(i, field) (PV_MACHINE_SUBMISSIONS + (size_t)(i) * 64u + offsetof(struct pv_submission, field))
#define PV_PAGE(field) offsetof(struct pv_file_page, field)

/* Is the domain on the FIFO ABI?  It switches while nothing of it runs, so the word that says so orders nothing. */
static inline int64_t pv_is_fifo(MemoryObject *domain)
{
    uint32_t abi;
    PV_LOAD32(abi, domain, PV_HEADER(abi), PV_RELAXED, "abi");
    return abi == PV_ABI_FIFO;
}

/* FIFO: the offset of a port's event word, 0 = none yet. */
static inline int64_t pv_fifo_word_at(MemoryObject *domain, uint32_t port)
{
    uint32_t page;
    PV_LOAD32(page, domain, PV_HEADER(array) + 4u * (port / PV_FIFO_WORDS_A_PAGE), PV_RELAXED, "fifo.page");
    if (page == 0 || page > PV_GUEST_PAGES)
        return 0;
    return PV_DOMAIN_GUEST + (int64_t)(page - 1) * 4096 + (int64_t)(port % PV_FIFO_WORDS_A_PAGE) * 4;
}

uint64_t pv_now_ns(void);
/* The machine's clock: tests move it forward.  0 in the explorer, which has no clock yet. */
int64_t pv_machine_now(MemoryObject *machine);

#endif /* PVBUS_CORE_H */
