/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What outlives one side of a channel: how its heir finds out what has been answered, and what inspectors see of the rings.
 *
 * Answers are published in one ring, and what they answer is given back in the other: two stores.  Who dies between them has
 * answered, and has not said so.  Before both, the claim word, in memory of this side alone, says how far both will be:
 *
 *     63 valid | 61:31 write_index / 8 of `out`, with the answers | 30:0 read_index / 8 of `in`, behind what they answer
 *
 * An heir that finds the ring written up to there gives back the rest; else nothing was published, and it answers anew.
 */
#include "channel_ring.h"

#include <errno.h>

#define CLAIM_VALID (1ull << 63)
#define CLAIM_INDEX 0x7fffffffull

/* Called before answers are published; those of the last claim have been given back by now. */
int64_t pv_channel_claim(RingObject *self, uint32_t write_index)
{
    if (self->claims == NULL)
        return 0;
    uint64_t claim = CLAIM_VALID | (uint64_t)(write_index / 8) << 31 | self->read_index / 8;
    PV_STORE64(self->claims, self->claim_at, claim, PV_RELEASE, "vmr.claim");
    return 0;
}

/* Somebody who opens the channel anew: what is claimed there is another's. */
static int64_t forget(RingObject *self)
{
    PV_STORE64(self->claims, self->claim_at, 0, PV_RELAXED, "vmr.claim");
    return 0;
}

/* An heir, before it reads or writes anything: give back what its forerunner has answered. */
static int64_t resume(RingObject *self)
{
    uint64_t claim;
    PV_LOAD64(claim, self->claims, self->claim_at, PV_RELAXED, "vmr.claim");
    uint32_t write_index = (uint32_t)(claim >> 31 & CLAIM_INDEX) * 8, read_index = (uint32_t)(claim & CLAIM_INDEX) * 8;
    if (!(claim & CLAIM_VALID) || write_index != self->write_index || !pv_channel_possible(self->size, read_index))
        return 0;
    self->read_index = read_index;
    return pv_channel_release(self);
}

PyObject *pv_channel_keep(RingObject *self, PyObject *args)
{
    PyObject *memory;
    Py_ssize_t at;
    int heir;
    if (!PyArg_ParseTuple(args, "Onp", &memory, &at, &heir))
        return NULL;
    if (at < 0 || at % 8 != 0)
        return PyErr_Format(PyExc_ValueError, "a claim at %zd", at);
    if (pv_memory_check(memory, (size_t)at + 8, "the memory of claims") < 0)
        return NULL;
    int64_t r = pv_channel_usable(self);
    if (r < 0)
        return pv_channel_failed(r);
    Py_INCREF(memory);
    Py_XDECREF((PyObject *)self->claims);
    self->claims = (MemoryObject *)memory;
    self->claim_at = (size_t)at;
    r = heir ? resume(self) : forget(self);
    if (r < 0)
        return pv_channel_failed(r);
    Py_RETURN_NONE;
}

PyObject *pv_channel_position(RingObject *self, PyObject *ignored)
{
    (void)ignored;
    return Py_BuildValue("(III)", self->read_index, self->write_index, self->size);
}

PyObject *pv_channel_hold(RingObject *self, PyObject *ignored)
{
    (void)ignored;
    self->held = 1;
    Py_RETURN_NONE;
}

PyObject *pv_channel_give_back(RingObject *self, PyObject *args)
{
    PyObject *index = Py_None;
    if (!PyArg_ParseTuple(args, "|O", &index))
        return NULL;
    int64_t r = pv_channel_usable(self);
    if (r == 0 && index != Py_None) {
        unsigned long at = PyLong_AsUnsignedLong(index);
        if (at == (unsigned long)-1 && PyErr_Occurred())
            return NULL;
        if (at > UINT32_MAX || !pv_channel_possible(self->size, (uint32_t)at))
            return PyErr_Format(PyExc_ValueError, "an index of %lu in a ring of %u bytes", at, self->size);
        self->read_index = (uint32_t)at;
    }
    self->held = 0;
    if (r < 0 || (r = pv_channel_release(self)) < 0)
        return pv_channel_failed(r);
    Py_RETURN_NONE;
}

/* ---- what inspectors see */

PyObject *pv_channel_state(RingObject *self, PyObject *ignored)
{
    static const char *const names[] = {
        "out_intr_mask", "out_read_index", "out_write_index", "out_read_bytes_avail", "out_write_bytes_avail", "out_pending_send_sz",
        "in_intr_mask", "in_read_index", "in_write_index", "in_read_bytes_avail", "in_write_bytes_avail", "in_pending_send_sz",
        "out_full", "out_signals", "in_signals", "broken"};
    uint64_t figures[16] = {[12] = self->full, self->out_signals, self->in_signals, self->broken};
    (void)ignored;
    if (pv_channel_usable(self) == PV_DEAD || pv_channel_figures(self, self->out, figures) == PV_DEAD ||
        pv_channel_figures(self, self->in, figures + PV_CHANNEL_FIGURES) == PV_DEAD)
        return NULL;
    PyObject *state = PyDict_New();
    for (size_t i = 0; state != NULL && i < sizeof figures / sizeof figures[0]; i++) {
        PyObject *value = PyLong_FromUnsignedLongLong(figures[i]);
        if (value == NULL || PyDict_SetItemString(state, names[i], value) < 0)
            Py_CLEAR(state);
        Py_XDECREF(value);
    }
    return state;
}

PyObject *pv_channel_get_broken(RingObject *self, void *closure)
{
    (void)closure;
    return PyLong_FromUnsignedLong(self->broken);
}
