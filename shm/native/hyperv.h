/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The segment of a domain on the Hyper-V platform, byte for byte.  pvbus/shm/hyperv.py draws it for readers; a test holds the
 * two against each other through the HYPERV_LAYOUT table that the module exports.  What the guest and the hypervisor share by
 * the ABI (message slots, event flags) is as the specification has it; the rest is ours.
 */
#ifndef PVBUS_HYPERV_H
#define PVBUS_HYPERV_H

#include <stddef.h>
#include <stdint.h>

#define PV_HV_VPS_MAX 32u
#define PV_HV_SINTS 16u
#define PV_HV_FLAGS 2048u            /* event flags of a SINT */
#define PV_HV_PAGE 4096u

/* Frames: page n of the segment is guest frame n.  From PV_HV_FRAME_CHANNELS on they are channel memory, in memfds. */
#define PV_HV_FRAME_VPS 1u           /* four a virtual processor: state, message page, event-flags page, spare */
#define PV_HV_FRAMES_A_VP 4u
#define PV_HV_FRAME_INTERRUPT 129u   /* first half host to guest, second half guest to host */
#define PV_HV_FRAME_MONITOR 130u     /* host to guest; the next one guest to host */
#define PV_HV_FRAME_BUFFERS 132u
#define PV_HV_FRAME_WORK 149u
#define PV_HV_FRAME_SPARE 189u       /* guest memory that nobody has a plan for */
#define PV_HV_FRAMES_SPARE 32u
#define PV_HV_FRAMES (PV_HV_FRAME_SPARE + PV_HV_FRAMES_SPARE)
#define PV_HV_BYTES (PV_HV_FRAMES * PV_HV_PAGE)
#define PV_HV_FRAME_CHANNELS 0x100000u
#define PV_HV_MAGIC 0x48595631u

struct pv_hv_header {
    uint32_t version, magic, vcpus, domid;
    uint64_t guest_os_id, hypercall; /* @16, @24 registers of the whole domain */
    uint64_t time_origin_ns;         /* @32 where TIME_REF_COUNT is 0 */
    uint32_t message_seq;            /* @40 number of the last message that was given a buffer; hypervisor */
    uint8_t pad0[20];
    uint32_t work_head;              /* @64 the workqueue process */
    uint32_t work_tail;              /* @68 the CPU processes claim here */
    uint32_t flags_are_relids;       /* @72 protocol 2.4 and above: event flags name channels; the guest, when it connects */
    uint32_t global_tasklets;        /* @76 variant one-tasklet-pair: what is scheduled, on whatever CPU */
    uint8_t pad1[48];
    uint64_t posted, delivered, signals, eoms, interrupts, interrupts_lost; /* @128 hypervisor */
    uint64_t irq_none, messages, events, work_items;                        /* the guest: sums of what its processes count */
};
struct pv_hv_vp {                    /* one page a virtual processor */
    uint64_t scontrol, siefp, simp;  /* registers: written by the hypervisor, on the VP's behalf */
    uint64_t eom;                    /* @24 EOMs written; only its CPU process counts here */
    uint64_t sint[PV_HV_SINTS];      /* @32 */
    uint64_t eom_seen;               /* @160 how many the hypervisor has answered */
    uint64_t tpr;                    /* @168 */
    uint8_t pad0[16];
    uint64_t irr[4];                 /* @192 vectors requested: the hypervisor ORs, the CPU takes by exchange */
    uint8_t pad1[32];
    uint32_t tasklets;               /* @256 bit 0 message tasklet scheduled, bit 1 event tasklet; its CPU process */
    uint32_t vector;                 /* @260 of vmbus, 0 none */
    uint32_t handled;                /* @264 number of the last message that the workqueue has begun to handle; it writes this */
    uint8_t pad2[52];
    uint64_t irqs, irq_none, messages, events, eoms, coalesced; /* @320 its CPU process */
    uint8_t pad3[16];
    uint32_t offered[PV_HV_SINTS];   /* @384 number of the message in the slot, or of the last one; hypervisor */
    uint32_t taken[PV_HV_SINTS];     /* @448 the number that was offered, by the guest before it frees the slot */
    uint64_t stimer[8];              /* @512 config and count of each synthetic timer */
};
enum { PV_HV_TASKLET_MESSAGE = 1, PV_HV_TASKLET_EVENT = 2 };

/* A message slot: 16 of them, one a SINT, are a message page.  `meta` is size u8, flags u8, reserved u16: accessed as a whole. */
struct pv_hv_slot {
    uint32_t type;                   /* 0 = empty.  The hypervisor fills, the guest frees by compare-exchange. */
    uint32_t meta;                   /* the hypervisor only */
    uint64_t sender;                 /* the port */
    uint64_t payload[30];
};
#define PV_HV_META_SIZE 0xffu
#define PV_HV_META_PENDING 0x100u    /* msg_pending: whoever frees the slot owes an EOM */

/* A message buffer.  The hypervisor only: row r of the pool belongs to one port. */
struct pv_hv_buffer {
    uint32_t state, seq;             /* state: below bit 8; above, of a message for the host, the serial of the hypercall */
    uint32_t vp, sint;               /* PV_HV_VP_HOST: a message for the host */
    struct pv_hv_slot message;
};
#define PV_HV_BUFFER_ROWS 16u
#define PV_HV_BUFFERS_A_PORT 16u
enum { PV_HV_BUFFER_FREE, PV_HV_BUFFER_QUEUED };
#define PV_HV_VP_HOST 0xfffffffeu

/* The work ring: messages on their way from the CPU processes to the workqueue process. */
struct pv_hv_work {
    uint32_t state, seq;
    uint64_t when_ns;
    struct pv_hv_slot message;       /* type 0: nothing, its producer died */
    uint32_t vp, number;             /* @272 whose, and the number that the host gave it: a message that comes twice is dropped */
    uint8_t pad[40];
};
#define PV_HV_WORK_ENTRIES 512u
enum { PV_HV_WORK_FREE, PV_HV_WORK_FILLED, PV_HV_WORK_TAKEN, PV_HV_WORK_CLAIMED };
#define PV_HV_WORK_CLAIMED_BY(vp) (PV_HV_WORK_CLAIMED | (uint32_t)(vp) << 8)
/* Free, for this lap of the index: else who read the tail a lap ago would claim behind the head, and nobody would see its message. */
#define PV_HV_WORK_FREE_AT(i) (PV_HV_WORK_FREE | ((uint32_t)(i) / PV_HV_WORK_ENTRIES & 0xffffu) << 16)

/* Offsets in the segment. */
#define PV_HV_AT(frame) ((size_t)(frame) * PV_HV_PAGE)
#define PV_HV_HEADER(field) offsetof(struct pv_hv_header, field)
#define PV_HV_FRAME_VP(v, which) (PV_HV_FRAME_VPS + (size_t)(v) * PV_HV_FRAMES_A_VP + (which))
enum { PV_HV_PAGE_STATE, PV_HV_PAGE_MESSAGES, PV_HV_PAGE_FLAGS, PV_HV_PAGE_SPARE };
#define PV_HV_VP(v, field) (PV_HV_AT(PV_HV_FRAME_VP(v, PV_HV_PAGE_STATE)) + offsetof(struct pv_hv_vp, field))
/* Of the pages that SIMP and SIEFP name: the bits 63:12 of the register are the frame. */
#define PV_HV_ENABLED(reg) ((reg) & 1u)
#define PV_HV_FRAME(reg) ((reg) >> 12)
#define PV_HV_SLOT(frame, sint, field) \
    (PV_HV_AT(frame) + (size_t)(sint) * sizeof(struct pv_hv_slot) + offsetof(struct pv_hv_slot, field))
#define PV_HV_FLAG_WORD(frame, sint, flag) \
    (PV_HV_AT(frame) + (size_t)(sint) * (PV_HV_FLAGS / 8u) + (size_t)(flag) / 64u * 8u)
#define PV_HV_BUFFER(row, i, field) \
    (PV_HV_AT(PV_HV_FRAME_BUFFERS) + ((size_t)(row) * PV_HV_BUFFERS_A_PORT + (i)) * sizeof(struct pv_hv_buffer) + \
     offsetof(struct pv_hv_buffer, field))
#define PV_HV_WORK(i, field) \
    (PV_HV_AT(PV_HV_FRAME_WORK) + (size_t)((i) & (PV_HV_WORK_ENTRIES - 1)) * sizeof(struct pv_hv_work) + \
     offsetof(struct pv_hv_work, field))

/* SINT register */
#define PV_HV_SINT_VECTOR 0xffull
#define PV_HV_SINT_MASKED (1ull << 16)
#define PV_HV_SINT_AUTO_EOI (1ull << 17)
#define PV_HV_SINT_POLLING (1ull << 18)
#define PV_HV_SINT_VMBUS 2u
#define PV_HV_MESSAGE_VMBUS 1u
#define PV_HV_VECTOR_OF_IRQ0 0x30u

#endif /* PVBUS_HYPERV_H */
