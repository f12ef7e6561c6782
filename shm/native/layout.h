/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The shared pages, byte for byte.  pvbus/shm/layout.py draws them for readers; a test holds the two against each other
 * through the LAYOUT table that the module exports.
 */
#ifndef PVBUS_LAYOUT_H
#define PVBUS_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

#define PV_LAYOUT_VERSION 3u
#define PV_VCPUS_MAX 32u
#define PV_NR_VIRQS 24u
#define PV_FILES_MAX 1024u          /* the owner field of an irq word has 12 bits; 1,024 open files is what doctor promises */
#define PV_SUBMISSIONS_MAX 2048u    /* one a process that uses a file: forks included */
#define PV_SUBMISSION_ENTRIES 8192u /* holds notify_many() of every 2-level port, twice */
#define PV_DOMAINS_MAX 16u
#define PV_PORTS_2L 4096u           /* 64 words of 64 bits */
#define PV_PORTS_FIFO 131072u       /* a LINK has 17 bits */
#define PV_PORTS_MAX PV_PORTS_FIFO

/* ---- xen.h, 64-bit guest: the 2-level shared info page (wire facts X5) ---- */
struct pv_vcpu_info {
    uint8_t evtchn_upcall_pending;
    uint8_t evtchn_upcall_mask;
    uint8_t pad[6];
    uint64_t evtchn_pending_sel;
    uint8_t arch[16];
    uint8_t time[32];
};
struct pv_shared_info {
    struct pv_vcpu_info vcpu_info[PV_VCPUS_MAX];
    uint64_t evtchn_pending[64];
    uint64_t evtchn_mask[64];
    uint8_t wall_clock[16];
};

/* ---- xen.h: the FIFO ABI (wire facts X6).  Event words and control blocks lie in pages of the guest. ---- */
#define PV_FIFO_PENDING (1u << 31)
#define PV_FIFO_MASKED (1u << 30)
#define PV_FIFO_LINKED (1u << 29)
#define PV_FIFO_BUSY (1u << 28)
#define PV_FIFO_LINK 0x1ffffu
#define PV_FIFO_LINK_BITS 17u
#define PV_FIFO_PRIORITIES 16u       /* 0 first */
#define PV_FIFO_PRIORITY_DEFAULT 7u
#define PV_FIFO_WORDS_A_PAGE 1024u
#define PV_FIFO_PAGES_MAX 128u
struct pv_fifo_control {             /* one a virtual CPU, 8-aligned in a page */
    uint32_t ready, reserved;
    uint32_t head[PV_FIFO_PRIORITIES];
};

/* ---- a domain's segment: header, shared info, virtual CPUs, tables of PV_PORTS_MAX words, logs of arrivals, guest pages ---- */
struct pv_domain_header {
    uint32_t version, magic, ports_max, vcpus, domid, abi; /* ports_max and abi change with EVTCHNOP_init_control and reset */
    uint32_t valid_evtchns;          /* one past the highest port ever handed out: where a look at all ports may end */
    uint32_t array_pages;            /* FIFO: pages of the event array in use, and how many event words there are */
    uint64_t eoi_next_ns;            /* no late EOI that waits is due before this; 0 = none waits */
    uint8_t pad[472];
    uint32_t virq[PV_VCPUS_MAX][PV_NR_VIRQS]; /* the port a VIRQ is bound to, 0 = none; per-domain and global ones in row 0 */
    uint32_t array[PV_FIFO_PAGES_MAX]; /* FIFO: the guest page of each page of the event array + 1; 0 = none */
};
struct pv_vcpu {                     /* 1024 bytes; its own process writes it, but for the hypervisor's lines */
    uint64_t evtchn_mask[64];        /* 2-level: ports this virtual CPU serves (the guest's cpu_evtchn mask) */
    uint32_t sleeping;               /* 1 = its process may sleep: ring its doorbell */
    uint32_t generation;             /* how often its process was born */
    uint32_t last_word, last_bit;    /* where the round-robin scan goes on */
    uint64_t upcalls, events, unhandled, spurious, warnings, migrations;
    uint64_t heartbeat_ns;
    uint32_t arrivals_head;          /* 2-level: the CPU consumes here, the hypervisor appends at arrivals_tail */
    uint32_t irq_epoch;              /* upcall loops that have ended */
    uint64_t loop_started_ns;        /* the upcall loop that runs, 0 = none */
    uint32_t loop_events;            /* how many it has served */
    uint32_t fifo_ready;             /* FIFO: queues that the guest knows to hold something */
    uint32_t fifo_head[PV_FIFO_PRIORITIES]; /* FIFO: where the guest goes on in each, 0 = at the control block's head */
    uint8_t pad1[32];
    /* the hypervisor's lines: a line that both write would travel with every event */
    uint32_t arrivals_tail;          /* @704 */
    uint32_t arrivals_seen;          /* arrivals_head when the hypervisor last looked: it looks again when the log seems full */
    uint32_t control;                /* FIFO: where in the segment the control block lies, 0 = none */
    uint32_t pad2;
    uint64_t fifo_dropped;           /* FIFO: raised without a control block */
    uint64_t eois_put_off;           /* late EOIs of what it delivered that had to wait */
    uint8_t pad3[32];
    uint32_t fifo_tail[PV_FIFO_PRIORITIES]; /* @768 FIFO: the last word linked, 0 = queue known to be empty */
    uint8_t pad4[192];
};
#define PV_ABI_2L 0u
#define PV_ABI_FIFO 1u
#define PV_DOMAIN_SHARED_INFO 4096u
#define PV_DOMAIN_VCPUS 8192u
#define PV_DOMAIN_TABLES (PV_DOMAIN_VCPUS + PV_VCPUS_MAX * 1024u)
/* Table i starts at PV_DOMAIN_TABLES + i * 8 * PV_PORTS_MAX.  Pages of the segment that nobody touches cost nothing. */
enum { PV_TABLE_PORT, PV_TABLE_IRQ, PV_TABLE_PENDING_SINCE, PV_TABLE_SERVED_AT, PV_TABLE_QUEUE, PV_TABLE_EOI_AT, PV_TABLE_EOI, PV_TABLES };
#define PV_DOMAIN_ARRIVALS (PV_DOMAIN_TABLES + PV_TABLES * 8u * PV_PORTS_MAX)
#define PV_ARRIVALS 4096u            /* 2-level: a vCPU's log of ports in the order in which they were raised; full = order is lost, no event */
#define PV_DOMAIN_EOI_WAITING (PV_DOMAIN_ARRIVALS + PV_VCPUS_MAX * PV_ARRIVALS * 4u) /* a bit a port: its late EOI waits */
/* What the guest gives to Xen by frame number: first one page a vCPU for its control block, then the event array. */
#define PV_DOMAIN_GUEST (PV_DOMAIN_EOI_WAITING + PV_PORTS_MAX / 8u)
#define PV_GUEST_PAGES (PV_VCPUS_MAX + PV_FIFO_PAGES_MAX + 32u)
#define PV_DOMAIN_BYTES (PV_DOMAIN_GUEST + PV_GUEST_PAGES * 4096u)

/* Queue word (FIFO): the hypervisor's; the queue that a port was linked on last, and its priority + 1 (0 = default). */
#define PV_QUEUE_VCPU(w) ((uint32_t)((w) & 0xffu))
#define PV_QUEUE_LAST_PRIORITY(w) ((uint32_t)(((w) >> 8) & 0xfu))
#define PV_QUEUE_LINKED (1ull << 12)      /* it was linked at all: the two above mean something */
#define PV_QUEUE_PENDING (1ull << 13)     /* raised before it had an event word: replayed by expand_array */
#define PV_QUEUE_PRIORITY(w) ((uint32_t)(((w) >> 16) & 0x1fu))
#define PV_QUEUE_PRIORITY_BITS(p) ((uint64_t)((p) + 1u) << 16)
#define PV_QUEUE_LAST (0xfffull | PV_QUEUE_LINKED)

/* Late-EOI word: bits 63:32 the epoch of the upcall loop that delivered, 7:0 how often the port was spurious in a row. */
#define PV_EOI_EPOCH(w) ((uint32_t)((w) >> 32))
#define PV_EOI_SPURIOUS(w) ((uint32_t)((w) & 0xffu))

/* Port word: the hypervisor's view of a port; one store changes a port's state. */
#define PV_PORT_STATE(w) ((uint32_t)((w) & 7u))             /* 0 free, 1 reserved, 2 unbound, 3 interdomain, 4 pirq, 5 virq, 6 ipi */
#define PV_PORT_PEER_CLOSED (1ull << 3)                     /* on an unbound port: it had a peer */
#define PV_PORT_STATIC (1ull << 4)                          /* made by the configuration: no heir closes it */
#define PV_PORT_RAW (1ull << 5)                             /* made by a hypercall of the domain's kernel itself: the same */
#define PV_PORT_REMOTE_DOMAIN(w) ((uint32_t)(((w) >> 8) & 0xffffu))
#define PV_PORT_REMOTE_PORT(w) ((uint32_t)(((w) >> 24) & 0x1ffffu)) /* for a VIRQ its number */
#define PV_PORT_VCPU(w) ((uint32_t)(((w) >> 48) & 0x3fu))   /* notify vCPU */
enum { PV_FREE, PV_RESERVED, PV_UNBOUND, PV_INTERDOMAIN, PV_PIRQ, PV_VIRQ, PV_IPI };

/* Irq word: the guest kernel's view, where a port stands between pending and written back; each step is one compare-exchange. */
#define PV_IRQ_SLOT(w) ((uint32_t)((w) & 0xfffu))           /* open file + 1; 0 = no handler */
#define PV_IRQ_LOST (1ull << 15)          /* forgotten by its file, or leaked: nobody will close it */
#define PV_IRQ_ENABLED (1ull << 16)       /* evtchn record: the user may get it */
#define PV_IRQ_ACTIVE (1ull << 17)        /* from delivery to late EOI */
#define PV_IRQ_EXPLICIT (1ull << 18)      /* mask reasons: disable_irq, ... */
#define PV_IRQ_TEMPORARY (1ull << 19)
#define PV_IRQ_EOI_PENDING (1ull << 20)
#define PV_IRQ_REASONS (PV_IRQ_EXPLICIT | PV_IRQ_TEMPORARY | PV_IRQ_EOI_PENDING)
#define PV_IRQ_IN_SERVICE (1ull << 21)    /* a CPU has claimed it and not finished */
#define PV_IRQ_STATIC (1ull << 22)
#define PV_IRQ_KERNEL (1ull << 23)        /* held by the domain's own kernel: handled in place */
#define PV_IRQ_CPU(w) ((uint32_t)(((w) >> 24) & 0x3fu)) /* who serves it while IN_SERVICE */
#define PV_IRQ_DEFER (1ull << 30)         /* delivered by an upcall loop that had run too long: its EOI may have to wait */
#define PV_IRQ_DELAYED (1ull << 31)       /* its EOI waits */
#define PV_IRQ_CPU_BITS(v) ((uint64_t)(v) << 24)
#define PV_IRQ_SERVED_ONE (1ull << 32)    /* bits 63:32 count its services: what an heir compares */
#define PV_IRQ_SERVED(w) ((uint32_t)((w) >> 32))

/* ---- the machine's segment: header, open files, submission rings ---- */
struct pv_machine_header {
    uint32_t version, magic;
    uint64_t clock_offset_ns;        /* added to CLOCK_MONOTONIC: tests advance it */
    uint32_t variants;               /* PV_VARIANT_* */
    uint32_t hypervisor_generation;
    uint64_t notifies, enables, refused, poisoned, kicks, drains;
    uint64_t hypervisor_core;        /* where the hypervisor runs, plus 1.  It writes; CPUs may follow */
    uint8_t pad[48];
    uint32_t virq_handler[PV_NR_VIRQS]; /* @128 the domain + 1 that handles a global VIRQ, 0 = the hardware domain */
};
struct pv_file {                     /* 256 bytes: what of an open file its user must not be able to write */
    uint32_t state;                  /* PV_FILE_* */
    uint32_t domain;
    uint32_t lock;                   /* producer lock: 0, 1 + vCPU, or PV_LOCK_FILE */
    uint32_t size;                   /* event ring: 0 or a power of two >= 64 */
    uint64_t prod;                   /* the authoritative P word, see below */
    uint64_t claim;                  /* what the lock's owner is about to publish */
    uint64_t delivered, dropped, wakes, impossible;
    uint32_t ports, restricted;      /* nr_evtchns; restrict domid or 0xffff */
    uint32_t opener_pid, process_pid;
    char name[32];                   /* evtchn:<comm> */
    uint64_t opened_ns;
    uint64_t cons_seen;              /* the C word when a producer last looked; it looks again when the ring seems full */
    uint8_t pad[128];
};
struct pv_submission {               /* 64 bytes: one a process that uses a file */
    uint32_t state;                  /* 0 free, 1 attached, 2 poisoned */
    uint32_t slot;                   /* the open file */
    uint32_t head;                   /* authoritative: entries before it are done */
    uint32_t pid;
    uint64_t claim;                  /* VALID | position << 32 | services of the target when claimed */
    uint64_t taken;
    uint8_t pad[32];
};
#define PV_MACHINE_FILES 4096u
#define PV_MACHINE_SUBMISSIONS (PV_MACHINE_FILES + PV_FILES_MAX * 256u)
#define PV_MACHINE_BYTES (PV_MACHINE_SUBMISSIONS + PV_SUBMISSIONS_MAX * 64u)
enum { PV_FILE_FREE, PV_FILE_OPEN, PV_FILE_DEAD, PV_FILE_CLOSING }; /* closing: its release is under way */
#define PV_LOCK_FILE 0x8000u
#define PV_CLAIM_VALID (1ull << 63)
#define PV_VARIANT_DRIVER_WAKEUP 1u  /* H/zoo 1: the driver samples cons before it publishes */
#define PV_VARIANT_DUPLICATE_DROPS 2u /* H1 */
#define PV_VARIANT_LEAK_ON_ENOMEM 4u /* H3 */
#define PV_VARIANT_DOUBLE_CLOSE 8u  /* H4 */
#define PV_VARIANT_STRICT_STATIC 16u /* H2, fixed */
#define PV_VARIANT_ONE_TASKLET_PAIR 32u /* H10, zoo 4 */
#define PV_VARIANT_OFFERS_STALL 64u /* H6 */
#define PV_VARIANT_LEAVES_DIRTY 128u /* H9 */
#define PV_VARIANT_WORK_ALLOCATION_RETRIES 256u /* H5 */
#define PV_VARIANT_WRONG_SIGNAL_WORD 512u /* H11 */
#define PV_VARIANT_RESCIND_QUEUE 1024u /* H12 */
#define PV_VARIANT_WORK_PER_CPU 2048u /* B4.9, X19a */

/* ---- a file's page (sealed memfd, mapped by its user): header, bitmap of bound ports, event ring ---- */
struct pv_file_page {
    uint32_t version, magic, capacity, ports_max, bitmap, ring, domain;
    uint32_t released;               /* @28 1 = the machine has released the file: nothing of it goes anywhere any more */
    uint8_t pad1[32];
    uint64_t prod;                   /* @64 P: epoch << 34 | poisoned << 33 | overflow << 32 | producer index.  Machine writes. */
    uint32_t size;                   /* event ring size.  Machine writes. */
    uint8_t pad2[52];
    uint64_t cons;                   /* @128 C: epoch << 34 | consumer index.  Users compare-exchange; the machine validates. */
    uint8_t pad3[56];
    uint32_t door;                   /* @192 1 = a byte lies in the doorbell, or is on its way */
};
#define PV_OVERFLOW (1ull << 32)
#define PV_POISONED (1ull << 33)
#define PV_EPOCH_SHIFT 34
#define PV_EPOCH(w) ((w) >> PV_EPOCH_SHIFT)
#define PV_PAGE_BITMAP 4096u
#define PV_PAGE_RING 20480u          /* behind a bitmap of 131,072 bits */
#define PV_RING_SIZE_FIRST 64u

/* ---- a submission ring (sealed memfd, mapped by one user process) ---- */
struct pv_submission_ring {
    uint32_t version, magic, entries, pad0;
    uint8_t pad1[48];
    uint32_t tail;                   /* @64 user writes; the machine reads once and checks */
    uint32_t core;                   /* user: where it ran when it last submitted, plus 1, 0 = not known.  A hint */
    uint8_t pad2[56];
    uint32_t head;                   /* @128 machine publishes */
    uint8_t pad3[60];
};
#define PV_SUBMISSION_DATA 4096u
#define PV_SUBMISSION_BYTES (PV_SUBMISSION_DATA + PV_SUBMISSION_ENTRIES * 4u)
enum { PV_SUB_NOTIFY, PV_SUB_ENABLE, PV_SUB_REARM };
#define PV_SUB_OP(e) ((e) >> 30)
#define PV_SUB_PORT(e) ((e) & 0x3fffffffu)

/* ---- the public page (memfd, users map it read-only) ---- */
struct pv_public_page {
    uint32_t version, magic;
    uint8_t pad1[56];
    uint32_t hypervisor_sleeping;    /* @64 odd = it may sleep: a submitter rings its own doorbell, once for each value */
    uint32_t hypervisor_cpu;
    uint32_t machine_state;          /* 0 booting, 1 ready, 2 stopping */
};

#define PV_MAGIC_DOMAIN 0x444f4d31u
#define PV_MAGIC_MACHINE 0x4d414331u
#define PV_MAGIC_FILE 0x46494c31u
#define PV_MAGIC_SUBMISSION 0x53554231u
#define PV_MAGIC_PUBLIC 0x50554231u

#endif /* PVBUS_LAYOUT_H */
