/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A VMBus channel's pair of rings, as one side sees it: it writes into one, `out`, and reads from the other, `in`.
 *
 *   control page  0 write_index | 4 read_index | 8 interrupt_mask | 12 pending_send_sz | 16 reserved | 64 feature bits
 *                 write_index, pending_send_sz and feature bits are the writer's words, the other two the reader's
 *   data          4096 ... bytes of the ring; indices are byte offsets in it, multiples of 8.  Empty: they are equal.
 *   packet        descriptor {type u16, offset/8 u16, length/8 u16, flags u16, transaction id u64}, payload, zeros up to a
 *                 multiple of 8; behind its length a trailer u64, the packet's own start << 32.  It may wrap after any 8 bytes.
 *
 * Which memory lies there is the other side's too, so an index of ours is kept here and never read back.
 */
#ifndef PVBUS_CHANNEL_RING_H
#define PVBUS_CHANNEL_RING_H

#include "core.h"

#define PV_CHANNEL_CONTROL 4096u
#define PV_PACKET_HEADER 16u
#define PV_PACKET_TRAILER 8u
#define PV_PACKET_LENGTH_MAX (0xFFFFu * 8u)
#define PV_PACKET_IN_BAND 6
#define PV_PACKET_TRANSFER_PAGES 7
#define PV_PACKET_GPA_DIRECT 9
#define PV_PACKET_COMPLETION 0xB
#define PV_PACKET_WANTS_COMPLETION 1u

struct pv_channel_control {
    uint32_t write_index, read_index, interrupt_mask, pending_send_sz, reserved[12], feature_bits;
};
#define PV_CONTROL(field) offsetof(struct pv_channel_control, field)

typedef struct {
    PyObject_HEAD
    MemoryObject *memory;
    size_t out, in;         /* the two control pages */
    uint32_t size;          /* data bytes of either ring */
    uint32_t write_index;   /* ours, of `out` */
    uint32_t out_read;      /* what we last saw of the other side's index there */
    uint32_t pending;       /* what we last wrote into its pending_send_sz */
    uint32_t read_index;    /* ours, of `in` */
    uint32_t published;     /* what the other side may know of it */
    int signal_always;      /* protocol 0.13: whether the ring was empty does not matter */
    int signal_owed;        /* a read has made the room that the other side waits for */
    uint32_t broken;        /* impossible things that the other side has written; one ends all traffic */
    int held;               /* what is read is not given back yet */
    MemoryObject *claims;   /* NULL, or where the claim word is */
    size_t claim_at;
    uint64_t full, out_signals, in_signals;
} RingObject;

typedef struct {
    uint16_t type, flags;
    uint64_t transaction_id;
    uint32_t payload_at, payload_bytes, next;
} pv_packet;

typedef struct {
    PyObject *const *payloads; /* bytes objects */
    Py_ssize_t count, sent;
    uint64_t first_transaction_id;
    uint16_t type, flags;
} pv_batch;

/* Each gives its value, -errno, or PV_DEAD. */
int64_t pv_channel_attach(RingObject *self);
int64_t pv_channel_send(RingObject *self, pv_batch *batch); /* 1 = the other side must be signalled */
int64_t pv_channel_look(RingObject *self, uint32_t *write_index); /* 1 = not empty */
int64_t pv_channel_parse(RingObject *self, uint32_t write_index, pv_packet *packet);
int64_t pv_channel_take(RingObject *self, const pv_packet *packet, char *payload);
int64_t pv_channel_release(RingObject *self);
int64_t pv_channel_echo(RingObject *self, int64_t most, int64_t *taken, int *full); /* 1 = as send */
int64_t pv_channel_begin_read(RingObject *self);
int64_t pv_channel_end_read(RingObject *self); /* 1 = not empty again */

int64_t pv_channel_claim(RingObject *self, uint32_t write_index); /* channel_heir.c */

PyObject *pv_channel_failed(int64_t error); /* its exception */
int64_t pv_channel_usable(RingObject *self); /* before the ring is touched, and again after Python code may have run */
PyObject *pv_channel_keep(RingObject *self, PyObject *args);
PyObject *pv_channel_position(RingObject *self, PyObject *ignored);
PyObject *pv_channel_hold(RingObject *self, PyObject *ignored);
PyObject *pv_channel_give_back(RingObject *self, PyObject *args);
PyObject *pv_channel_state(RingObject *self, PyObject *ignored);
PyObject *pv_channel_get_broken(RingObject *self, void *closure);

#define PV_CHANNEL_FIGURES 6
int64_t pv_channel_figures(RingObject *self, size_t ring, uint64_t *out);

static inline uint32_t pv_channel_free(uint32_t size, uint32_t write_index, uint32_t read_index)
{
    return write_index >= read_index ? size - (write_index - read_index) : read_index - write_index;
}
static inline int pv_channel_possible(uint32_t size, uint32_t index) { return index < size && index % 8 == 0; }

#endif /* PVBUS_CHANNEL_RING_H */
