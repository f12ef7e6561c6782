/* SPDX-License-Identifier: Apache-2.0 */
/* VMBUS_LAYOUT: {"message": size, "message.field": offset} of vmbus.h, for the test that compares it with the codec. */
#include "core.h"
#include "vmbus.h"

#define S(message) {#message, sizeof(struct pv_vmbus_##message)}
#define O(message, field) {#message "." #field, offsetof(struct pv_vmbus_##message, field)}
#define OFFER(field) O(offer_2012, field), {"offerchannel." #field, offsetof(struct pv_vmbus_offerchannel, offer.field)}

static const struct { const char *name; unsigned long value; } table[] = {
    S(header), O(header, type), O(header, pad),
    S(offer_2012), S(offerchannel), OFFER(class_id), OFFER(instance_id), OFFER(latency_100ns), OFFER(revision), OFFER(context_bytes),
    OFFER(flags), OFFER(mmio_mb), OFFER(user_data), OFFER(sub_index), OFFER(mmio_mb_optional), OFFER(relid), OFFER(monitor_id),
    OFFER(monitor_allocated), O(offerchannel, dedicated), O(offerchannel, connection),
    S(rescind), O(rescind, relid),
    S(requestoffers), S(alloffers_delivered),
    S(openchannel), O(openchannel, relid), O(openchannel, open_id), O(openchannel, ring_gpadl), O(openchannel, target_vp),
    O(openchannel, downstream_page), O(openchannel, user_data),
    S(open_result), O(open_result, relid), O(open_result, open_id), O(open_result, status),
    S(closechannel), O(closechannel, relid),
    S(gpadl_header), O(gpadl_header, relid), O(gpadl_header, gpadl), O(gpadl_header, range_bytes), O(gpadl_header, range_count),
    O(gpadl_header, words),
    S(gpadl_body), O(gpadl_body, number), O(gpadl_body, gpadl), O(gpadl_body, words),
    S(gpadl_created), O(gpadl_created, relid), O(gpadl_created, gpadl), O(gpadl_created, status),
    S(gpadl_teardown), O(gpadl_teardown, relid), O(gpadl_teardown, gpadl),
    S(gpadl_torndown), O(gpadl_torndown, gpadl),
    S(relid_released), O(relid_released, relid),
    S(initiate_contact), O(initiate_contact, version), O(initiate_contact, target_vp), O(initiate_contact, interrupt_page),
    O(initiate_contact, sint), O(initiate_contact, vtl), O(initiate_contact, features),
    O(initiate_contact, monitor_host_to_guest), O(initiate_contact, monitor_guest_to_host),
    S(version_response), O(version_response, supported), O(version_response, state), O(version_response, connection),
    O(version_response, features), O(version_response, monitor_pages),
    S(unload), S(unload_response),
    S(modifychannel), O(modifychannel, relid), O(modifychannel, target_vp),
    S(modifychannel_response), O(modifychannel_response, relid), O(modifychannel_response, status),
    {"USER_DATA", PV_VMBUS_USER_DATA}, {"PAYLOAD_MAX", PV_VMBUS_PAYLOAD_MAX},
};

int pv_vmbus_layout_init(PyObject *module)
{
    PyObject *dict = PyDict_New();
    for (size_t i = 0; dict != NULL && i < sizeof table / sizeof table[0]; i++) {
        PyObject *value = PyLong_FromUnsignedLong(table[i].value);
        if (value == NULL || PyDict_SetItemString(dict, table[i].name, value) < 0)
            Py_CLEAR(dict);
        Py_XDECREF(value);
    }
    int result = dict == NULL ? -1 : PyModule_AddObjectRef(module, "VMBUS_LAYOUT", dict);
    Py_XDECREF(dict);
    return result;
}
