/* SPDX-License-Identifier: Apache-2.0 */
/* What the guest's Hyper-V files share: what a run of a CPU asks its caller to signal. */
#ifndef PVBUS_HV_H
#define PVBUS_HV_H

#include "hyperv.h"
#include "path.h"

#define PV_HV_CHANNELS_A_RUN 512u
#define PV_HV_RELIDS_2012 256u /* 8 words of 32 bits: what the driver of 2012 scans */

typedef struct {
    uint32_t channels[PV_HV_CHANNELS_A_RUN], channel_count; /* relids whose doorbell is to be rung */
    int channels_left; /* there are more */
    int work;          /* messages lie in the work ring: wake the workqueue */
    int work_full;     /* one stays in its slot for lack of room there */
    int eom;           /* the host waits for it: an exit */
} pv_hv_effects;

static inline void pv_hv_effects_clear(pv_hv_effects *out)
{
    out->channel_count = 0;
    out->channels_left = out->work = out->work_full = out->eom = 0;
}

int64_t pv_hv_run(MemoryObject *machine, MemoryObject *hv, uint32_t vp, pv_hv_effects *out);
int64_t pv_hv_recover(MemoryObject *hv, uint32_t vp);
/* May the CPU's process sleep, as far as Hyper-V goes?  0 no, 1 yes, 2 for a moment: the work ring is full. */
int64_t pv_hv_is_idle(MemoryObject *hv, uint32_t vp);

#endif /* PVBUS_HV_H */
