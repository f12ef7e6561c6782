/* SPDX-License-Identifier: Apache-2.0 */
/* The module: types, and the table of offsets that a test holds against pvbus/shm/layout.py. */
#include "core.h"

#define OFFSET(type, field) {#type "." #field, offsetof(struct type, field)}
#define SIZE(type) {#type, sizeof(struct type)}
#define VALUE(name) {#name, (unsigned long long)(name)}

static const struct { const char *name; unsigned long long value; } layout[] = {
    SIZE(pv_vcpu_info), OFFSET(pv_vcpu_info, evtchn_upcall_pending), OFFSET(pv_vcpu_info, evtchn_upcall_mask),
    OFFSET(pv_vcpu_info, evtchn_pending_sel), OFFSET(pv_vcpu_info, arch), OFFSET(pv_vcpu_info, time),
    OFFSET(pv_shared_info, vcpu_info), OFFSET(pv_shared_info, evtchn_pending), OFFSET(pv_shared_info, evtchn_mask),
    OFFSET(pv_shared_info, wall_clock),
    SIZE(pv_domain_header), OFFSET(pv_domain_header, version), OFFSET(pv_domain_header, magic), OFFSET(pv_domain_header, ports_max),
    OFFSET(pv_domain_header, vcpus), OFFSET(pv_domain_header, domid), OFFSET(pv_domain_header, abi), OFFSET(pv_domain_header, virq),
    OFFSET(pv_domain_header, valid_evtchns), OFFSET(pv_domain_header, array_pages), OFFSET(pv_domain_header, eoi_next_ns), OFFSET(pv_domain_header, array),
    SIZE(pv_vcpu), OFFSET(pv_vcpu, evtchn_mask), OFFSET(pv_vcpu, sleeping), OFFSET(pv_vcpu, generation), OFFSET(pv_vcpu, last_word),
    OFFSET(pv_vcpu, last_bit), OFFSET(pv_vcpu, upcalls), OFFSET(pv_vcpu, events), OFFSET(pv_vcpu, unhandled), OFFSET(pv_vcpu, spurious),
    OFFSET(pv_vcpu, warnings), OFFSET(pv_vcpu, migrations), OFFSET(pv_vcpu, heartbeat_ns), OFFSET(pv_vcpu, arrivals_head), OFFSET(pv_vcpu, arrivals_tail),
    OFFSET(pv_vcpu, arrivals_seen), OFFSET(pv_vcpu, irq_epoch), OFFSET(pv_vcpu, loop_started_ns), OFFSET(pv_vcpu, loop_events),
    OFFSET(pv_vcpu, fifo_ready), OFFSET(pv_vcpu, fifo_head), OFFSET(pv_vcpu, fifo_tail), OFFSET(pv_vcpu, control), OFFSET(pv_vcpu, fifo_dropped), OFFSET(pv_vcpu, eois_put_off),
    SIZE(pv_fifo_control), OFFSET(pv_fifo_control, ready), OFFSET(pv_fifo_control, head),
    SIZE(pv_machine_header), OFFSET(pv_machine_header, version), OFFSET(pv_machine_header, magic), OFFSET(pv_machine_header, clock_offset_ns),
    OFFSET(pv_machine_header, variants), OFFSET(pv_machine_header, hypervisor_generation), OFFSET(pv_machine_header, notifies),
    OFFSET(pv_machine_header, enables), OFFSET(pv_machine_header, refused), OFFSET(pv_machine_header, poisoned),
    OFFSET(pv_machine_header, kicks), OFFSET(pv_machine_header, drains), OFFSET(pv_machine_header, hypervisor_core), OFFSET(pv_machine_header, virq_handler),
    SIZE(pv_file), OFFSET(pv_file, state), OFFSET(pv_file, domain), OFFSET(pv_file, lock), OFFSET(pv_file, size), OFFSET(pv_file, prod),
    OFFSET(pv_file, claim), OFFSET(pv_file, delivered), OFFSET(pv_file, dropped), OFFSET(pv_file, wakes), OFFSET(pv_file, impossible),
    OFFSET(pv_file, ports), OFFSET(pv_file, restricted), OFFSET(pv_file, opener_pid), OFFSET(pv_file, process_pid), OFFSET(pv_file, name),
    OFFSET(pv_file, opened_ns), OFFSET(pv_file, cons_seen),
    SIZE(pv_submission), OFFSET(pv_submission, state), OFFSET(pv_submission, slot), OFFSET(pv_submission, head), OFFSET(pv_submission, pid),
    OFFSET(pv_submission, claim), OFFSET(pv_submission, taken),
    OFFSET(pv_file_page, version), OFFSET(pv_file_page, magic), OFFSET(pv_file_page, capacity), OFFSET(pv_file_page, ports_max),
    OFFSET(pv_file_page, bitmap), OFFSET(pv_file_page, ring), OFFSET(pv_file_page, domain), OFFSET(pv_file_page, released), OFFSET(pv_file_page, prod),
    OFFSET(pv_file_page, size), OFFSET(pv_file_page, cons), OFFSET(pv_file_page, door),
    OFFSET(pv_submission_ring, version), OFFSET(pv_submission_ring, magic), OFFSET(pv_submission_ring, entries),
    OFFSET(pv_submission_ring, tail), OFFSET(pv_submission_ring, core), OFFSET(pv_submission_ring, head),
    OFFSET(pv_public_page, version), OFFSET(pv_public_page, magic), OFFSET(pv_public_page, hypervisor_sleeping),
    OFFSET(pv_public_page, hypervisor_cpu), OFFSET(pv_public_page, machine_state),
    VALUE(PV_LAYOUT_VERSION), VALUE(PV_VCPUS_MAX), VALUE(PV_NR_VIRQS), VALUE(PV_FILES_MAX), VALUE(PV_SUBMISSIONS_MAX),
    VALUE(PV_SUBMISSION_ENTRIES), VALUE(PV_DOMAINS_MAX), VALUE(PV_PORTS_2L), VALUE(PV_PORTS_FIFO), VALUE(PV_PORTS_MAX), VALUE(PV_ABI_2L), VALUE(PV_ABI_FIFO), VALUE(PV_DOMAIN_SHARED_INFO), VALUE(PV_DOMAIN_VCPUS),
    VALUE(PV_DOMAIN_TABLES), VALUE(PV_DOMAIN_ARRIVALS), VALUE(PV_ARRIVALS), VALUE(PV_DOMAIN_BYTES),
    VALUE(PV_DOMAIN_EOI_WAITING), VALUE(PV_DOMAIN_GUEST), VALUE(PV_GUEST_PAGES),
    VALUE(PV_TABLE_PORT), VALUE(PV_TABLE_IRQ), VALUE(PV_TABLE_PENDING_SINCE), VALUE(PV_TABLE_SERVED_AT), VALUE(PV_TABLE_QUEUE),
    VALUE(PV_TABLE_EOI_AT), VALUE(PV_TABLE_EOI), VALUE(PV_TABLES),
    VALUE(PV_FIFO_PENDING), VALUE(PV_FIFO_MASKED), VALUE(PV_FIFO_LINKED), VALUE(PV_FIFO_BUSY), VALUE(PV_FIFO_LINK), VALUE(PV_FIFO_LINK_BITS),
    VALUE(PV_FIFO_PRIORITIES), VALUE(PV_FIFO_PRIORITY_DEFAULT), VALUE(PV_FIFO_WORDS_A_PAGE), VALUE(PV_FIFO_PAGES_MAX),
    VALUE(PV_QUEUE_LINKED), VALUE(PV_QUEUE_PENDING), VALUE(PV_MACHINE_FILES), VALUE(PV_MACHINE_SUBMISSIONS), VALUE(PV_MACHINE_BYTES),
    VALUE(PV_PAGE_BITMAP), VALUE(PV_PAGE_RING), VALUE(PV_SUBMISSION_DATA), VALUE(PV_SUBMISSION_BYTES),
    VALUE(PV_PORT_PEER_CLOSED), VALUE(PV_PORT_STATIC), VALUE(PV_PORT_RAW), VALUE(PV_IRQ_LOST), VALUE(PV_IRQ_ENABLED), VALUE(PV_IRQ_ACTIVE), VALUE(PV_IRQ_EXPLICIT), VALUE(PV_IRQ_TEMPORARY), VALUE(PV_IRQ_EOI_PENDING),
    VALUE(PV_IRQ_IN_SERVICE), VALUE(PV_IRQ_STATIC), VALUE(PV_IRQ_KERNEL), VALUE(PV_IRQ_DEFER), VALUE(PV_IRQ_DELAYED), VALUE(PV_IRQ_SERVED_ONE),
    VALUE(PV_OVERFLOW), VALUE(PV_POISONED), VALUE(PV_EPOCH_SHIFT), VALUE(PV_CLAIM_VALID), VALUE(PV_LOCK_FILE),
    VALUE(PV_VARIANT_DRIVER_WAKEUP), VALUE(PV_VARIANT_DUPLICATE_DROPS), VALUE(PV_VARIANT_LEAK_ON_ENOMEM),
    VALUE(PV_VARIANT_DOUBLE_CLOSE), VALUE(PV_VARIANT_STRICT_STATIC), VALUE(PV_VARIANT_ONE_TASKLET_PAIR),
    VALUE(PV_VARIANT_OFFERS_STALL), VALUE(PV_VARIANT_LEAVES_DIRTY), VALUE(PV_VARIANT_WORK_ALLOCATION_RETRIES),
    VALUE(PV_VARIANT_WRONG_SIGNAL_WORD), VALUE(PV_VARIANT_RESCIND_QUEUE), VALUE(PV_VARIANT_WORK_PER_CPU), VALUE(PV_MAGIC_DOMAIN), VALUE(PV_MAGIC_MACHINE), VALUE(PV_MAGIC_FILE),
    VALUE(PV_MAGIC_SUBMISSION), VALUE(PV_MAGIC_PUBLIC),
    VALUE(PV_TICK_NS),
};

static PyObject *layout_table(void)
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

static PyObject *now_ns(PyObject *module, PyObject *ignored)
{
    (void)module;
    (void)ignored;
    return PyLong_FromUnsignedLongLong(pv_now_ns());
}

static PyMethodDef methods[] = {
    {"now_ns", now_ns, METH_NOARGS, "CLOCK_MONOTONIC in ns."},
    {NULL, NULL, 0, NULL},
};

#ifdef PVBUS_EXPLORED
#define NAME "_core_explored"
#define INIT PyInit__core_explored
#elif defined(PVBUS_GATED)
#define NAME "_core_gated"
#define INIT PyInit__core_gated
#else
#define NAME "_core"
#define INIT PyInit__core
#endif

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, NAME, "The native core of pvbus.", -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC INIT(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL)
        return NULL;
    PyObject *table = layout_table(), *hyperv = pv_hyperv_layout();
    if (table == NULL || PyModule_AddObjectRef(module, "LAYOUT", table) < 0 || hyperv == NULL ||
        PyModule_AddObjectRef(module, "HYPERV_LAYOUT", hyperv) < 0 || pv_memory_init(module) < 0 ||
        pv_event_path_init(module) < 0 || pv_user_file_init(module) < 0 || pv_vmbus_layout_init(module) < 0 ||
        pv_channel_ring_init(module) < 0 || pv_gate_init(module) < 0)
        Py_CLEAR(module);
    Py_XDECREF(table);
    Py_XDECREF(hyperv);
    return module;
}
