/* SPDX-License-Identifier: Apache-2.0 */
/* The table of the Hyper-V segment's offsets and numbers, which a test holds against pvbus/shm/hyperv.py. */
#include "core.h"
#include "hyperv.h"

#define OFFSET(type, field) {#type "." #field, offsetof(struct type, field)}
#define SIZE(type) {#type, sizeof(struct type)}
#define VALUE(name) {#name, (unsigned long long)(name)}

static const struct { const char *name; unsigned long long value; } layout[] = {
    SIZE(pv_hv_header), OFFSET(pv_hv_header, version), OFFSET(pv_hv_header, magic), OFFSET(pv_hv_header, vcpus),
    OFFSET(pv_hv_header, domid), OFFSET(pv_hv_header, guest_os_id), OFFSET(pv_hv_header, hypercall),
    OFFSET(pv_hv_header, time_origin_ns), OFFSET(pv_hv_header, message_seq), OFFSET(pv_hv_header, work_head),
    OFFSET(pv_hv_header, work_tail), OFFSET(pv_hv_header, flags_are_relids), OFFSET(pv_hv_header, global_tasklets), OFFSET(pv_hv_header, posted), OFFSET(pv_hv_header, delivered),
    OFFSET(pv_hv_header, signals), OFFSET(pv_hv_header, eoms), OFFSET(pv_hv_header, interrupts),
    OFFSET(pv_hv_header, interrupts_lost), OFFSET(pv_hv_header, irq_none), OFFSET(pv_hv_header, messages),
    OFFSET(pv_hv_header, events), OFFSET(pv_hv_header, work_items),
    SIZE(pv_hv_vp), OFFSET(pv_hv_vp, scontrol), OFFSET(pv_hv_vp, siefp), OFFSET(pv_hv_vp, simp), OFFSET(pv_hv_vp, eom),
    OFFSET(pv_hv_vp, sint), OFFSET(pv_hv_vp, eom_seen), OFFSET(pv_hv_vp, tpr), OFFSET(pv_hv_vp, irr),
    OFFSET(pv_hv_vp, tasklets), OFFSET(pv_hv_vp, vector), OFFSET(pv_hv_vp, handled), OFFSET(pv_hv_vp, irqs), OFFSET(pv_hv_vp, irq_none),
    OFFSET(pv_hv_vp, messages), OFFSET(pv_hv_vp, events), OFFSET(pv_hv_vp, eoms), OFFSET(pv_hv_vp, coalesced),
    OFFSET(pv_hv_vp, offered), OFFSET(pv_hv_vp, taken), OFFSET(pv_hv_vp, stimer),
    SIZE(pv_hv_slot), OFFSET(pv_hv_slot, type), OFFSET(pv_hv_slot, meta), OFFSET(pv_hv_slot, sender), OFFSET(pv_hv_slot, payload),
    SIZE(pv_hv_buffer), OFFSET(pv_hv_buffer, state), OFFSET(pv_hv_buffer, seq), OFFSET(pv_hv_buffer, vp),
    OFFSET(pv_hv_buffer, sint), OFFSET(pv_hv_buffer, message),
    SIZE(pv_hv_work), OFFSET(pv_hv_work, state), OFFSET(pv_hv_work, seq), OFFSET(pv_hv_work, when_ns), OFFSET(pv_hv_work, message), OFFSET(pv_hv_work, vp), OFFSET(pv_hv_work, number),
    VALUE(PV_HV_VPS_MAX), VALUE(PV_HV_SINTS), VALUE(PV_HV_FLAGS), VALUE(PV_HV_PAGE), VALUE(PV_HV_FRAME_VPS),
    VALUE(PV_HV_FRAMES_A_VP), VALUE(PV_HV_FRAME_INTERRUPT), VALUE(PV_HV_FRAME_MONITOR), VALUE(PV_HV_FRAME_BUFFERS),
    VALUE(PV_HV_FRAME_WORK), VALUE(PV_HV_FRAME_SPARE), VALUE(PV_HV_FRAMES_SPARE), VALUE(PV_HV_FRAMES), VALUE(PV_HV_BYTES),
    VALUE(PV_HV_FRAME_CHANNELS), VALUE(PV_HV_MAGIC), VALUE(PV_HV_TASKLET_MESSAGE), VALUE(PV_HV_TASKLET_EVENT),
    VALUE(PV_HV_META_SIZE), VALUE(PV_HV_META_PENDING), VALUE(PV_HV_BUFFER_ROWS), VALUE(PV_HV_BUFFERS_A_PORT),
    VALUE(PV_HV_BUFFER_FREE), VALUE(PV_HV_BUFFER_QUEUED), VALUE(PV_HV_VP_HOST), VALUE(PV_HV_WORK_ENTRIES),
    VALUE(PV_HV_WORK_FREE), VALUE(PV_HV_WORK_FILLED), VALUE(PV_HV_WORK_TAKEN), VALUE(PV_HV_WORK_CLAIMED), VALUE(PV_HV_PAGE_STATE),
    VALUE(PV_HV_PAGE_MESSAGES), VALUE(PV_HV_PAGE_FLAGS), VALUE(PV_HV_PAGE_SPARE), VALUE(PV_HV_SINT_VECTOR),
    VALUE(PV_HV_SINT_MASKED), VALUE(PV_HV_SINT_AUTO_EOI), VALUE(PV_HV_SINT_POLLING), VALUE(PV_HV_SINT_VMBUS),
    VALUE(PV_HV_MESSAGE_VMBUS), VALUE(PV_HV_VECTOR_OF_IRQ0),
    /* What the macros compute, at their last arguments: the drawing's functions must agree. */
    {"PV_HV_VP(31, taken)", PV_HV_VP(31, taken)},
    {"PV_HV_SLOT(126, 15, payload)", PV_HV_SLOT(126, 15, payload)},
    {"PV_HV_FLAG_WORD(127, 15, 2047)", PV_HV_FLAG_WORD(127, 15, 2047)},
    {"PV_HV_BUFFER(15, 15, message)", PV_HV_BUFFER(15, 15, message)},
    {"PV_HV_WORK(511, message)", PV_HV_WORK(511, message)},
};

PyObject *pv_hyperv_layout(void)
{
    PyObject *table = PyDict_New();
    for (size_t i = 0; table != NULL && i < sizeof layout / sizeof layout[0]; i++) {
        PyObject *value = PyLong_FromUnsignedLongLong(layout[i].value);
        if (value == NULL || PyDict_SetItemString(table, layout[i].name, value) < 0)
            Py_CLEAR(table);
        Py_XDECREF(value);
    }
    return table;
}
