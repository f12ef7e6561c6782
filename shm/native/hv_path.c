/* SPDX-License-Identifier: Apache-2.0 */
/* EventPath, the methods for Hyper-V: what a cpu process, or the hypervisor, tells it of the Hyper-V half of a domain. */
#include "hv.h"

#include <stdlib.h>
#include <string.h>

static int index_of(PathObject *self, unsigned int domid, unsigned int vcpu)
{
    int index = pv_domain_index(self, domid);
    if (index >= 0 && vcpu < PV_VCPUS_MAX)
        return index;
    PyErr_Format(PyExc_LookupError, "no cpu/%u.%u", domid, vcpu);
    return -1;
}

static int hyperv_index_of(PathObject *self, unsigned int domid, unsigned int vcpu)
{
    int index = index_of(self, domid, vcpu);
    if (index < 0 || self->hyperv[index] != NULL)
        return index;
    PyErr_Format(PyExc_LookupError, "domain %u is not on the Hyper-V platform", domid);
    return -1;
}

PyObject *pv_path_hv_set_hyperv(PathObject *self, PyObject *args)
{
    unsigned int domid;
    int work, index;
    PyObject *hv;
    if (!PyArg_ParseTuple(args, "IOi", &domid, &hv, &work) || (index = index_of(self, domid, 0)) < 0 ||
        pv_memory_check(hv, PV_HV_BYTES, "a Hyper-V segment") < 0)
        return NULL;
    Py_INCREF(hv);
    Py_XDECREF((PyObject *)self->hyperv[index]);
    self->hyperv[index] = (MemoryObject *)hv;
    self->work_doorbells[index] = work;
    Py_RETURN_NONE;
}

PyObject *pv_path_hv_set_exit(PathObject *self, PyObject *args)
{
    unsigned int domid, vcpu;
    int fd, index;
    if (!PyArg_ParseTuple(args, "IIi", &domid, &vcpu, &fd) || (index = index_of(self, domid, vcpu)) < 0)
        return NULL;
    self->exits[index][vcpu] = fd;
    Py_RETURN_NONE;
}

PyObject *pv_path_hv_set_channel_door(PathObject *self, PyObject *args)
{
    unsigned int domid, relid;
    int fd, index;
    if (!PyArg_ParseTuple(args, "IIi", &domid, &relid, &fd) || (index = index_of(self, domid, 0)) < 0)
        return NULL;
    if (relid >= PV_HV_FLAGS)
        return PyErr_Format(PyExc_IndexError, "no channel %u", relid);
    if (self->channel_doors[index] == NULL) {
        self->channel_doors[index] = malloc(PV_HV_FLAGS * sizeof(int));
        if (self->channel_doors[index] == NULL)
            return PyErr_NoMemory();
        memset(self->channel_doors[index], 0xff, PV_HV_FLAGS * sizeof(int));
    }
    self->channel_doors[index][relid] = fd;
    Py_RETURN_NONE;
}

PyObject *pv_path_hv_run(PathObject *self, PyObject *args)
{
    unsigned int domid, vcpu;
    int index;
    pv_hv_effects out;
    if (!PyArg_ParseTuple(args, "II", &domid, &vcpu) || (index = hyperv_index_of(self, domid, vcpu)) < 0)
        return NULL;
    pv_hv_effects_clear(&out);
    int64_t done = pv_hv_run(self->machine, self->hyperv[index], vcpu, &out);
    if (done == PV_DEAD)
        return NULL;
    PyObject *channels = PyList_New(out.channel_count);
    for (uint32_t i = 0; channels != NULL && i < out.channel_count; i++) {
        PyObject *relid = PyLong_FromUnsignedLong(out.channels[i]);
        if (relid == NULL || PyList_SetItem(channels, i, relid) < 0)
            Py_CLEAR(channels);
    }
    return channels == NULL ? NULL : Py_BuildValue("(iNii)", (int)done, channels, out.work, out.eom);
}

PyObject *pv_path_hv_recover(PathObject *self, PyObject *args)
{
    unsigned int domid, vcpu;
    int index;
    if (!PyArg_ParseTuple(args, "II", &domid, &vcpu) || (index = hyperv_index_of(self, domid, vcpu)) < 0)
        return NULL;
    if (pv_hv_recover(self->hyperv[index], vcpu) == PV_DEAD)
        return NULL;
    Py_RETURN_NONE;
}

/* An interrupt was requested of a vCPU: 1 when its doorbell is to be rung. */
PyObject *pv_path_hv_kick(PathObject *self, PyObject *args)
{
    unsigned int domid, vcpu;
    int index;
    if (!PyArg_ParseTuple(args, "II", &domid, &vcpu) || (index = index_of(self, domid, vcpu)) < 0)
        return NULL;
    int64_t asleep = pv_vcpu_kick(self->domains[index], vcpu);
    return asleep == PV_DEAD ? NULL : PyLong_FromLongLong(asleep);
}

void pv_hv_path_clear(PathObject *self)
{
    for (uint32_t i = 0; i < PV_DOMAINS_MAX; i++) {
        Py_CLEAR(self->hyperv[i]);
        free(self->channel_doors[i]);
        self->channel_doors[i] = NULL;
    }
}
