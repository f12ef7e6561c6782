/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The rings of a channel: packets in and out, and who has to be signalled.  A ring never signals, it says so.
 *
 * One thread of control a side.  What the other side has written is read once, into a local, and checked; the first
 * impossible thing ends the traffic (EIO), since nothing in the ring can be believed from there on.
 */
#include "channel_ring.h"

#include <errno.h>
#include <string.h>

static int64_t broke(RingObject *self)
{
    self->broken++;
    return -EIO;
}

/* Take up the indices that we, or whoever was this side before, left in the pages; say that our pending_send_sz means it. */
int64_t pv_channel_attach(RingObject *self)
{
    uint32_t features;
    PV_LOAD32(self->write_index, self->memory, self->out + PV_CONTROL(write_index), PV_RELAXED, "vmr.own");
    PV_LOAD32(self->pending, self->memory, self->out + PV_CONTROL(pending_send_sz), PV_RELAXED, "vmr.own");
    PV_LOAD32(self->read_index, self->memory, self->in + PV_CONTROL(read_index), PV_RELAXED, "vmr.own");
    PV_LOAD32(features, self->memory, self->out + PV_CONTROL(feature_bits), PV_RELAXED, "vmr.own");
    if (!(features & 1))
        PV_STORE32(self->memory, self->out + PV_CONTROL(feature_bits), features | 1, PV_RELAXED, "vmr.own");
    self->out_read = self->write_index; /* until the first look: no room, which makes it look */
    self->published = self->read_index;
    if (!pv_channel_possible(self->size, self->write_index) || !pv_channel_possible(self->size, self->read_index))
        return broke(self);
    PV_LOAD32(self->out_read, self->memory, self->out + PV_CONTROL(read_index), PV_ACQUIRE, "vmr_reuse");
    return pv_channel_possible(self->size, self->out_read) ? 0 : broke(self);
}

/* ---- the writer */

static uint32_t packet_bytes(size_t payload)
{
    return PV_PACKET_HEADER + (uint32_t)((payload + 7) & ~(size_t)7) + PV_PACKET_TRAILER;
}

static int never_fits(RingObject *self, size_t payload)
{
    return payload > PV_PACKET_LENGTH_MAX - PV_PACKET_HEADER || packet_bytes(payload) >= self->size;
}

static inline uint32_t wrapped(uint32_t size, uint32_t at) { return at >= size ? at - size : at; }

/* Write bytes from *at on, the last word padded with zeros; *at follows, and wraps. */
static int64_t put(RingObject *self, uint32_t *at, const char *from, size_t bytes)
{
    size_t data = self->out + PV_CHANNEL_CONTROL, whole = bytes & ~(size_t)7, before_end = self->size - *at;
    size_t first = whole < before_end ? whole : before_end;
    PV_STORE_WORDS(self->memory, data + *at, from, first / 8, "vmr.data");
    PV_STORE_WORDS(self->memory, data, from + first, (whole - first) / 8, "vmr.data");
    *at = wrapped(self->size, *at + (uint32_t)whole);
    if (bytes > whole) {
        uint64_t word = 0;
        memcpy(&word, from + whole, bytes - whole);
        PV_STORE64(self->memory, data + *at, word, PV_RELAXED, "vmr.data");
        *at = wrapped(self->size, *at + 8);
    }
    return 0;
}

static int64_t put_header(RingObject *self, uint32_t *at, const pv_batch *batch, size_t payload_bytes)
{
    uint64_t length8 = (packet_bytes(payload_bytes) - PV_PACKET_TRAILER) / 8;
    uint64_t header[2] = {
        batch->type | (uint64_t)(PV_PACKET_HEADER / 8) << 16 | length8 << 32 | (uint64_t)batch->flags << 48,
        batch->first_transaction_id + (uint64_t)batch->sent,
    };
    return put(self, at, (const char *)header, sizeof header);
}

static int64_t write_packet(RingObject *self, uint32_t *at, const pv_batch *batch, const char *payload, size_t bytes)
{
    int64_t r;
    uint64_t trailer = (uint64_t)*at << 32;
    PV_TRY(r, put_header(self, at, batch, bytes));
    PV_TRY(r, put(self, at, payload, bytes));
    return put(self, at, (const char *)&trailer, sizeof trailer);
}

/* 1 = a packet of so many bytes fits at write_index.  It takes strictly less than what is free: a full ring would look empty. */
static int64_t room(RingObject *self, uint32_t write_index, uint32_t bytes)
{
    uint32_t read_index;
    if (bytes < pv_channel_free(self->size, write_index, self->out_read))
        return 1;
    /* SYNC(vmr_reuse): the reader has copied what lies before its index; only then may we write there. */
    PV_LOAD32(read_index, self->memory, self->out + PV_CONTROL(read_index), PV_ACQUIRE, "vmr_reuse");
    if (!pv_channel_possible(self->size, read_index))
        return broke(self);
    self->out_read = read_index;
    return bytes < pv_channel_free(self->size, write_index, read_index);
}

/*
 * Ask to be signalled when the packet fits, and look once more.  The least room that is strictly more than the packet: the
 * reader signals as soon as so much is free, and with as much as the packet has we could do nothing.
 */
static int64_t await_room(RingObject *self, uint32_t bytes)
{
    self->full++;
    self->pending = bytes + 8;
    /* Release: who sees it sees the write_index before it, and computes with that. */
    PV_STORE32(self->memory, self->out + PV_CONTROL(pending_send_sz), self->pending, PV_RELEASE, "vmr.pending");
    /* SYNC(vmr_room): the demand is visible before we look; the reader moves its index, then looks for a demand. */
    PV_SMP_MB(self->memory, "vmr_room");
    return room(self, self->write_index, bytes);
}

/*
 * A demand that the packets up to write_index have met is withdrawn before they can be read, or reading them would be answered
 * with one signal more.  One that was made for a larger packet stays until there is room for that.
 */
static int64_t withdraw(RingObject *self, uint32_t write_index, uint32_t largest)
{
    if (self->pending == 0 || (largest + 8 < self->pending && pv_channel_free(self->size, write_index, self->out_read) < self->pending))
        return 0;
    self->pending = 0;
    PV_STORE32(self->memory, self->out + PV_CONTROL(pending_send_sz), 0, PV_RELAXED, "vmr.withdraw");
    return 0;
}

/* Publish what lies before write_index.  1 = the reader must be signalled. */
static int64_t publish(RingObject *self, uint32_t write_index)
{
    uint32_t before = self->write_index, mask, read_index;
    /* SYNC(vmr_publish): the packets before the index that covers them; the reader acquires it. */
    PV_STORE32(self->memory, self->out + PV_CONTROL(write_index), write_index, PV_RELEASE, "vmr_publish");
    self->write_index = write_index;
    /*
     * SYNC(vmr_signal): the index is visible before we look whether the reader sleeps.  It lowers its mask, or moves its index
     * up to our old one, and then looks at ours: one of the two sees the other.
     */
    PV_SMP_MB(self->memory, "vmr_signal");
    PV_LOAD32(mask, self->memory, self->out + PV_CONTROL(interrupt_mask), PV_RELAXED, "vmr.mask");
    if (mask != 0)
        return 0;
    if (self->signal_always)
        return 1;
    /* Compared only, so it need not be possible.  Not empty before: the reader has been signalled, or is at work. */
    PV_LOAD32(read_index, self->memory, self->out + PV_CONTROL(read_index), PV_RELAXED, "vmr.empty");
    return read_index == before;
}

/* Publish packets of at most `largest` bytes each, if there are any. */
static int64_t finish(RingObject *self, uint32_t write_index, uint32_t largest)
{
    int64_t r;
    if (largest == 0)
        return 0;
    PV_TRY(r, withdraw(self, write_index, largest));
    return publish(self, write_index);
}

/* Write the packets of a batch for which there is room now, and publish them together. */
static int64_t send_what_fits(RingObject *self, pv_batch *batch)
{
    uint32_t write_index = self->write_index, largest = 0;
    int64_t r = 0;
    while (batch->sent < batch->count) {
        PyObject *payload = batch->payloads[batch->sent];
        size_t bytes = (size_t)PyBytes_Size(payload);
        PV_TRY(r, room(self, write_index, packet_bytes(bytes)));
        if (r < 0)
            return r;
        if (r == 0)
            break;
        PV_TRY(r, write_packet(self, &write_index, batch, PyBytes_AsString(payload), bytes));
        largest = packet_bytes(bytes) > largest ? packet_bytes(bytes) : largest;
        batch->sent++;
    }
    return finish(self, write_index, largest);
}

/*
 * Send as many packets as fit, in order.  When that is not all of them, the ring is full and the demand for room stands in
 * pending_send_sz.  EMSGSIZE, and nothing is sent, if one can never fit.  Ends: each turn but the last sends a packet.
 */
int64_t pv_channel_send(RingObject *self, pv_batch *batch)
{
    int64_t r, signal = 0;
    for (Py_ssize_t i = 0; i < batch->count; i++)
        if (never_fits(self, (size_t)PyBytes_Size(batch->payloads[i])))
            return -EMSGSIZE;
    for (;;) {
        PV_TRY(r, send_what_fits(self, batch));
        if (r < 0)
            return r;
        signal |= r;
        if (batch->sent == batch->count)
            break;
        PV_TRY(r, await_room(self, packet_bytes((size_t)PyBytes_Size(batch->payloads[batch->sent]))));
        if (r < 0)
            return r;
        if (r == 0)
            break;
    }
    self->out_signals += (uint64_t)signal;
    return signal;
}

/* ---- the reader */

int64_t pv_channel_look(RingObject *self, uint32_t *write_index)
{
    /* SYNC(vmr_publish): the index, then what it covers. */
    PV_LOAD32(*write_index, self->memory, self->in + PV_CONTROL(write_index), PV_ACQUIRE, "vmr_publish");
    if (!pv_channel_possible(self->size, *write_index))
        return broke(self);
    return *write_index != self->read_index;
}

/* The descriptor at our index, copied and then checked against what the ring holds: a header and a trailer at least. */
int64_t pv_channel_parse(RingObject *self, uint32_t write_index, pv_packet *packet)
{
    uint32_t size = self->size, at = self->read_index, held = size - pv_channel_free(size, write_index, at);
    size_t data = self->in + PV_CHANNEL_CONTROL;
    uint64_t word;
    PV_LOAD64(word, self->memory, data + at, PV_RELAXED, "vmr.packet");
    PV_LOAD64(packet->transaction_id, self->memory, data + wrapped(size, at + 8), PV_RELAXED, "vmr.packet");
    uint32_t offset = (uint32_t)(word >> 16 & 0xFFFF) * 8, length = (uint32_t)(word >> 32 & 0xFFFF) * 8;
    packet->type = (uint16_t)word;
    packet->flags = (uint16_t)(word >> 48);
    if (offset < PV_PACKET_HEADER || length < offset || length + PV_PACKET_TRAILER > held ||
        (packet->flags & ~PV_PACKET_WANTS_COMPLETION) != 0)
        return broke(self);
    packet->payload_at = wrapped(size, at + offset);
    packet->payload_bytes = length - offset;
    packet->next = wrapped(size, at + length + PV_PACKET_TRAILER);
    return 0;
}

/* Copy the payload out; the packet is ours.  The writer learns it from pv_channel_release. */
int64_t pv_channel_take(RingObject *self, const pv_packet *packet, char *payload)
{
    size_t data = self->in + PV_CHANNEL_CONTROL, before_end = self->size - packet->payload_at;
    size_t first = packet->payload_bytes < before_end ? packet->payload_bytes : before_end;
    PV_LOAD_WORDS(payload, self->memory, data + packet->payload_at, first / 8, "vmr.packet");
    PV_LOAD_WORDS(payload + first, self->memory, data, (packet->payload_bytes - first) / 8, "vmr.packet");
    self->read_index = packet->next;
    return 0;
}

/* Give the room of what was taken back.  Whether the writer must be signalled stays in signal_owed until somebody asks. */
int64_t pv_channel_release(RingObject *self)
{
    uint32_t pending, write_index, before = self->published;
    if (before == self->read_index || self->held)
        return 0;
    /* SYNC(vmr_reuse): our copies before the index that lets the writer write there. */
    PV_STORE32(self->memory, self->in + PV_CONTROL(read_index), self->read_index, PV_RELEASE, "vmr_reuse");
    self->published = self->read_index;
    /*
     * SYNC(vmr_room): the index is visible before we look for a demand; the writer makes it, then looks at the index.  It also
     * stands for SYNC(vmr_signal) where no mask is used: index moved, then the next look at the writer's.
     */
    PV_SMP_MB(self->memory, "vmr_room");
    /* And write_index after the demand: by one from before, the ring would seem to have had that room all along. */
    PV_LOAD32(pending, self->memory, self->in + PV_CONTROL(pending_send_sz), PV_ACQUIRE, "vmr.pending");
    pending &= ~7u;
    if (pending == 0)
        return 0;
    PV_LOAD32(write_index, self->memory, self->in + PV_CONTROL(write_index), PV_RELAXED, "vmr.need");
    if (!pv_channel_possible(self->size, write_index))
        return broke(self);
    if (pv_channel_free(self->size, write_index, before) < pending &&
        pv_channel_free(self->size, write_index, self->read_index) >= pending) {
        self->signal_owed = 1;
        self->in_signals++;
    }
    return 0;
}

/* ---- both at once */

/* What a channel may carry; another type is the reader's to refuse. */
static int is_known(uint16_t type)
{
    return type == PV_PACKET_IN_BAND || type == PV_PACKET_TRANSFER_PAGES || type == PV_PACKET_GPA_DIRECT || type == PV_PACKET_COMPLETION;
}

/* Copy a packet from the ring that we read to *at in the one that we write, through a buffer: nobody else sees half of it. */
static int64_t copy_across(RingObject *self, uint32_t *at, const pv_packet *packet)
{
    char words[1024];
    int64_t r;
    uint16_t type = packet->flags & PV_PACKET_WANTS_COMPLETION ? PV_PACKET_COMPLETION : PV_PACKET_IN_BAND;
    pv_batch head = {.first_transaction_id = packet->transaction_id, .type = type};
    uint64_t trailer = (uint64_t)*at << 32;
    PV_TRY(r, put_header(self, at, &head, packet->payload_bytes));
    for (uint32_t from = packet->payload_at, left = packet->payload_bytes; left > 0;) {
        uint32_t bytes = left < self->size - from ? left : self->size - from;
        bytes = bytes < sizeof words ? bytes : (uint32_t)sizeof words;
        PV_LOAD_WORDS(words, self->memory, self->in + PV_CHANNEL_CONTROL + from, bytes / 8, "vmr.packet");
        PV_TRY(r, put(self, at, words, bytes));
        from = wrapped(self->size, from + bytes);
        left -= bytes;
    }
    return put(self, at, (const char *)&trailer, sizeof trailer);
}

/* Publish answers of at most `largest` bytes each, and give back what they answer; an heir sees which of it is done.  As finish. */
static int64_t answer(RingObject *self, uint32_t write_index, uint32_t largest)
{
    int64_t r, signal;
    if (largest > 0)
        PV_TRY(r, pv_channel_claim(self, write_index));
    PV_TRY(signal, finish(self, write_index, largest));
    PV_TRY(r, pv_channel_release(self));
    return signal;
}

/*
 * Send back up to `most` packets: as completions those that want one, the others in band; completions are dropped.  *taken counts
 * them; *full: one waits for room, which is asked for.  1 = signal.  What stops us is met again, and told, if nothing was taken.
 */
int64_t pv_channel_echo(RingObject *self, int64_t most, int64_t *taken, int *full)
{
    uint32_t seen = self->read_index, write_index = self->write_index, largest = 0;
    int64_t r = 1, answered, signal = 0;
    pv_packet packet;
    for (*taken = 0, *full = 0; *taken < most; ++*taken) {
        if (seen == self->read_index)
            PV_TRY(r, pv_channel_look(self, &seen));
        if (r > 0)
            PV_TRY(r, pv_channel_parse(self, seen, &packet));
        if (r < 0 || seen == self->read_index)
            break;
        if (!is_known(packet.type)) {
            r = -EPROTO;
            break;
        }
        uint32_t bytes = packet_bytes(packet.payload_bytes);
        if (packet.type != PV_PACKET_COMPLETION) {
            PV_TRY(r, room(self, write_index, bytes));
            if (r == 0) {
                PV_TRY(r, answer(self, write_index, largest));
                signal |= r > 0;
                largest = 0;
                PV_TRY(r, await_room(self, bytes));
                *full = r == 0;
            }
            if (r <= 0)
                break;
            PV_TRY(r, copy_across(self, &write_index, &packet));
            largest = bytes > largest ? bytes : largest;
        }
        self->read_index = packet.next;
        r = 1;
    }
    PV_TRY(answered, answer(self, write_index, largest));
    signal |= answered > 0;
    self->out_signals += (uint64_t)signal;
    return r < 0 && *taken == 0 ? r : signal;
}

/* No signals while we read.  Seen late, it costs a signal that nobody needs, so no barrier: end_read has the one that counts. */
int64_t pv_channel_begin_read(RingObject *self)
{
    PV_STORE32(self->memory, self->in + PV_CONTROL(interrupt_mask), 1, PV_RELAXED, "vmr.mask.set");
    return 0;
}

int64_t pv_channel_end_read(RingObject *self)
{
    uint32_t write_index;
    PV_STORE32(self->memory, self->in + PV_CONTROL(interrupt_mask), 0, PV_RELAXED, "vmr.mask.clear");
    /* SYNC(vmr_signal): the mask is down before the last look; a writer that saw it up has published before that. */
    PV_SMP_MB(self->memory, "vmr_signal");
    return pv_channel_look(self, &write_index);
}

/* ---- inspectors */

/* Six figures of a ring, in the order of the attributes.  Of impossible indices nothing follows: no bytes at all. */
int64_t pv_channel_figures(RingObject *self, size_t ring, uint64_t *out)
{
    uint32_t mask, read_index, write_index, pending, available = 0;
    PV_LOAD32(mask, self->memory, ring + PV_CONTROL(interrupt_mask), PV_RELAXED, "vmr.state");
    PV_LOAD32(read_index, self->memory, ring + PV_CONTROL(read_index), PV_RELAXED, "vmr.state");
    PV_LOAD32(write_index, self->memory, ring + PV_CONTROL(write_index), PV_RELAXED, "vmr.state");
    PV_LOAD32(pending, self->memory, ring + PV_CONTROL(pending_send_sz), PV_RELAXED, "vmr.state");
    int possible = pv_channel_possible(self->size, read_index) && pv_channel_possible(self->size, write_index);
    if (possible)
        available = pv_channel_free(self->size, write_index, read_index);
    uint64_t figures[PV_CHANNEL_FIGURES] = {mask, read_index, write_index, possible ? self->size - available : 0, available, pending};
    memcpy(out, figures, sizeof figures);
    return 0;
}
