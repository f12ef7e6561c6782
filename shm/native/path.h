/* SPDX-License-Identifier: Apache-2.0 */
/* What the event path's files share: the mapped segments of one process, and what a drain asks its caller to do. */
#ifndef PVBUS_PATH_H
#define PVBUS_PATH_H

#include "core.h"
#include "spin.h"

#define KICKS_MAX (PV_DOMAINS_MAX * PV_VCPUS_MAX) /* a kick that found no room would be a lost interrupt */

typedef struct {
    PyObject_HEAD
    MemoryObject *machine;
    uint32_t domain_ids[PV_DOMAINS_MAX];
    MemoryObject *domains[PV_DOMAINS_MAX];
    uint32_t domain_count;
    MemoryObject *pages[PV_FILES_MAX];
    MemoryObject *rings[PV_SUBMISSIONS_MAX];
    uint32_t ring_slot[PV_SUBMISSIONS_MAX];
    uint32_t rings_end; /* one past the highest ring attached */
    int doorbells[PV_DOMAINS_MAX][PV_VCPUS_MAX]; /* eventfds, -1 = none; sockets of open files: */
    int doors[PV_FILES_MAX];
    MemoryObject *hyperv[PV_DOMAINS_MAX];       /* of domains on the Hyper-V platform */
    int work_doorbells[PV_DOMAINS_MAX];         /* eventfds: the domain's workqueue, */
    int exits[PV_DOMAINS_MAX][PV_VCPUS_MAX];    /* and the hypervisor, when a vCPU has written EOM */
    int *channel_doors[PV_DOMAINS_MAX];         /* by relid, PV_HV_FLAGS of them; NULL = none yet */
    pv_spinner spinner;
    int core, stays;          /* keep_together: 1 + the core said or taken last, 0 = none; a CPU whose affinity is another's business */
    cpu_set_t born, last;     /* a CPU's affinity before it followed, and what it has set */
    uint32_t beside;          /* make_room: batches in a row from users on our core, */
    uint64_t moved_ns;        /* and when we last left one to them */
} PathObject;

typedef struct {
    uint32_t kicks[KICKS_MAX], kick_count; /* domain << 8 | vCPU whose doorbell is to be rung */
    uint32_t rearm[PV_SUBMISSIONS_MAX], rearm_count; /* at most one a ring */
    uint32_t poisoned[PV_SUBMISSIONS_MAX], poisoned_count;
    uint32_t done;
    uint64_t now;
    uint64_t cores; /* bits: where the users ran whose entries these were, modulo 64 */
} drained;

MemoryObject *pv_domain_of(PathObject *self, uint32_t domid);
int64_t pv_drain(PathObject *self, uint32_t first, uint32_t end, uint32_t budget, drained *out);
int64_t pv_expire(PathObject *self, drained *out);
int64_t pv_expires_in(PathObject *self);
int64_t pv_hypervisor_may_sleep(PathObject *self, MemoryObject *public_page);
int64_t pv_hypervisor_awake(MemoryObject *public_page);
int64_t pv_cpu_may_sleep(MemoryObject *domain, MemoryObject *hv, uint32_t vcpu); /* 0 no, 1 yes, 2 for a moment */
int pv_domain_index(PathObject *self, uint32_t domid); /* -1 = none */
int64_t pv_resolve_claim(PathObject *self, uint32_t index);
static inline void pv_drained_clear(drained *out)
{
    out->done = out->kick_count = out->rearm_count = out->poisoned_count = 0;
    out->now = out->cores = 0;
}

/* hv_path.c: the methods for Hyper-V */
PyObject *pv_path_hv_set_hyperv(PathObject *self, PyObject *args);
PyObject *pv_path_hv_set_exit(PathObject *self, PyObject *args);
PyObject *pv_path_hv_set_channel_door(PathObject *self, PyObject *args);
PyObject *pv_path_hv_run(PathObject *self, PyObject *args);
PyObject *pv_path_hv_recover(PathObject *self, PyObject *args);
PyObject *pv_path_hv_kick(PathObject *self, PyObject *args);
void pv_hv_path_clear(PathObject *self);

#ifndef PVBUS_EXPLORED
extern const char pv_serve_hypervisor_doc[], pv_serve_cpu_doc[];
PyObject *pv_serve_hypervisor(PathObject *self, PyObject *args);
PyObject *pv_serve_cpu(PathObject *self, PyObject *args);
#endif

#endif /* PVBUS_PATH_H */
