/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The channel messages of VMBus as C declares them (wire facts H6).  Nothing native reads them: they are here to hold the codec
 * of pvbus/actors/runtime/vmbus_wire.py against a compiler's idea of the same bytes, through the VMBUS_LAYOUT table of the module.
 */
#ifndef PVBUS_VMBUS_H
#define PVBUS_VMBUS_H

#include <stddef.h>
#include <stdint.h>

#define PV_VMBUS_USER_DATA 120u
#define PV_VMBUS_PAYLOAD_MAX 240u

#pragma pack(push, 1)
struct pv_vmbus_header { uint32_t type, pad; };
struct pv_vmbus_guid { uint32_t data1; uint16_t data2, data3; uint8_t data4[8]; };

struct pv_vmbus_offer_2012 { /* version 0.13: 190 bytes */
    struct pv_vmbus_header header;
    struct pv_vmbus_guid class_id, instance_id;
    uint64_t latency_100ns;
    uint32_t revision, context_bytes;
    uint16_t flags, mmio_mb;
    uint8_t user_data[PV_VMBUS_USER_DATA];
    uint16_t sub_index, mmio_mb_optional;
    uint32_t relid;
    uint8_t monitor_id, monitor_allocated;
};
struct pv_vmbus_offerchannel { /* from 1.1: 196 bytes */
    struct pv_vmbus_offer_2012 offer;
    uint16_t dedicated;
    uint32_t connection;
};
struct pv_vmbus_rescind { struct pv_vmbus_header header; uint32_t relid; };
struct pv_vmbus_requestoffers { struct pv_vmbus_header header; };
struct pv_vmbus_alloffers_delivered { struct pv_vmbus_header header; };
struct pv_vmbus_openchannel {
    struct pv_vmbus_header header;
    uint32_t relid, open_id, ring_gpadl, target_vp, downstream_page;
    uint8_t user_data[PV_VMBUS_USER_DATA];
};
struct pv_vmbus_open_result { struct pv_vmbus_header header; uint32_t relid, open_id, status; };
struct pv_vmbus_closechannel { struct pv_vmbus_header header; uint32_t relid; };
struct pv_vmbus_gpadl_header {
    struct pv_vmbus_header header;
    uint32_t relid, gpadl;
    uint16_t range_bytes, range_count;
    uint64_t words[27]; /* {byte count, byte offset} and up to 26 page numbers */
};
struct pv_vmbus_gpadl_body { struct pv_vmbus_header header; uint32_t number, gpadl; uint64_t words[28]; };
struct pv_vmbus_gpadl_created { struct pv_vmbus_header header; uint32_t relid, gpadl, status; };
struct pv_vmbus_gpadl_teardown { struct pv_vmbus_header header; uint32_t relid, gpadl; };
struct pv_vmbus_gpadl_torndown { struct pv_vmbus_header header; uint32_t gpadl; };
struct pv_vmbus_relid_released { struct pv_vmbus_header header; uint32_t relid; };
struct pv_vmbus_initiate_contact {
    struct pv_vmbus_header header;
    uint32_t version, target_vp;
    union {
        uint64_t interrupt_page; /* below 5.0 */
        struct { uint8_t sint, vtl; uint16_t pad; uint32_t features; };
    };
    uint64_t monitor_host_to_guest, monitor_guest_to_host;
};
struct pv_vmbus_version_response { /* 16 bytes, 20 with features, 40 with monitor pages */
    struct pv_vmbus_header header;
    uint8_t supported, state;
    uint16_t pad;
    uint32_t connection, features, pad2;
    uint64_t monitor_pages[2];
};
struct pv_vmbus_unload { struct pv_vmbus_header header; };
struct pv_vmbus_unload_response { struct pv_vmbus_header header; };
struct pv_vmbus_modifychannel { struct pv_vmbus_header header; uint32_t relid, target_vp; };
struct pv_vmbus_modifychannel_response { struct pv_vmbus_header header; uint32_t relid, status; };
#pragma pack(pop)

#endif /* PVBUS_VMBUS_H */
