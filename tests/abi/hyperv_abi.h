/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The bytes that a guest and Hyper-V share, declared anew for the tests: from the sizes and offsets of the ABI, not from the
 * project's own headers.  Natural order of bit-fields, little-endian.  Every structure has its size asserted below.
 */
#ifndef HYPERV_ABI_H
#define HYPERV_ABI_H

#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#pragma pack(push, 1)
struct guid { u32 a; u16 b, c; u8 d[8]; };

/* ---- channel messages */
struct header { u32 type, pad; };
struct offer { /* 196; 190 in 0.13 */
    u32 type, pad;
    struct guid class_id, instance_id;
    u64 latency;
    u32 revision, context_bytes;
    u16 flags, mmio_mb;
    u8 user_data[120];
    u16 sub_index, mmio_mb_optional;
    u32 relid;
    u8 monitor_id, monitor_allocated : 1, monitor_rsvd : 7;
    u16 dedicated : 1, dedicated_rsvd : 15;
    u32 connection;
};
struct relid { u32 type, pad, relid; };                              /* RESCIND, CLOSECHANNEL, RELID_RELEASED */
struct open { u32 type, pad, relid, open_id, ring_gpadl, target_vp, downstream_page; u8 user_data[120]; };
struct open_result { u32 type, pad, relid, open_id, status; };
struct range { u32 byte_count, byte_offset; u64 pfn[26]; };
struct gpadl_header { u32 type, pad, relid, gpadl; u16 range_bytes, range_count; struct range range; };
struct gpadl_body { u32 type, pad, number, gpadl; u64 pfn[28]; };
struct gpadl_created { u32 type, pad, relid, gpadl, status; };
struct gpadl_teardown { u32 type, pad, relid, gpadl; };
struct gpadl_torndown { u32 type, pad, gpadl; };
struct initiate { u32 type, pad, version, target_vp; u64 interrupt_page, monitor_host_to_guest, monitor_guest_to_host; };
struct initiate_5 { /* from 5.0 */
    u32 type, pad, version, target_vp;
    u8 sint, vtl;
    u16 rsvd;
    u32 features;
    u64 monitor_host_to_guest, monitor_guest_to_host;
};
struct version_response { u32 type, pad; u8 supported, state; u16 rsvd; u32 connection; };
struct version_response_2 { u32 type, pad; u8 supported, state; u16 rsvd; u32 connection, features; };
struct version_response_3 { u32 type, pad; u8 supported, state; u16 rsvd; u32 connection, features, rsvd2; u64 monitor_page[2]; };
struct modify { u32 type, pad, relid, target_vp; };
struct modify_response { u32 type, pad, relid, status; };

/* ---- pages and registers */
struct slot { /* one of 16 of a message page */
    u32 type;
    u8 payload_size, msg_pending : 1, flags_rsvd : 7;
    u16 rsvd;
    u64 sender;
    u8 payload[240];
};
struct flags_page { struct { u8 flags[256]; } sint[16]; };
struct interrupt_page { u8 host_to_guest[2048], guest_to_host[2048]; };
struct monitor_page {
    u32 group_enable : 4, state_rsvd : 28, rsvd1;
    struct { u32 pending, armed; } group[4];
    u64 rsvd2[3];
    int32_t next_check[128];
    u16 latency[128];
    u64 rsvd3[32];
    struct { u32 connection; u16 flag, rsvd; } parameter[128];
    u8 rsvd4[1984];
};
struct sint_register { u64 vector : 8, rsvd1 : 8, masked : 1, auto_eoi : 1, polling : 1, rsvd2 : 1, proxy : 1, rsvd3 : 43; };
struct page_register { u64 enable : 1, preserved : 11, frame : 52; }; /* SIMP, SIEFP, HYPERCALL */

/* ---- hypercalls */
struct post_message { u32 connection, rsvd, type, size; u8 payload[240]; };
struct signal_event { u32 connection : 24, connection_rsvd : 8; u16 flag, rsvd; };

/* ---- rings */
struct ring_control { u32 write_index, read_index, interrupt_mask, pending_send_sz, rsvd[12], features; u8 rsvd2[4028]; };
struct packet { u16 type, offset8, length8, completion : 1, flags_rsvd : 15; u64 transaction; };
struct trailer { u32 rsvd, write_index; };

/* ---- integration components: behind the pipe header */
struct ic {
    u32 pipe_flags, pipe_size;
    u16 frame_major, frame_minor, message_type, version_major, version_minor, size;
    u32 status;
    u8 transaction, transaction_flag : 1, request_flag : 1, response_flag : 1, flags_rsvd : 5;
    u16 rsvd;
};
struct ic_negotiate { u16 frame_count, message_count; u32 rsvd; struct { u16 major, minor; } version[8]; };
struct ic_heartbeat { u64 sequence; u8 rsvd[32]; };
struct ic_shutdown { u32 reason, timeout_s, flags; u8 text[2048]; };
#pragma pack(pop)

#define SIZE(name, bytes) _Static_assert(sizeof(struct name) == (bytes), #name)
SIZE(guid, 16); SIZE(header, 8); SIZE(offer, 196); SIZE(relid, 12); SIZE(open, 148); SIZE(open_result, 20);
SIZE(gpadl_header, 20 + 8 + 26 * 8); SIZE(gpadl_body, 16 + 28 * 8); SIZE(gpadl_created, 20); SIZE(gpadl_teardown, 16);
SIZE(gpadl_torndown, 12); SIZE(initiate, 40); SIZE(initiate_5, 40); SIZE(version_response, 16); SIZE(version_response_2, 20);
SIZE(version_response_3, 40); SIZE(modify, 16); SIZE(modify_response, 16); SIZE(slot, 256); SIZE(flags_page, 4096);
SIZE(interrupt_page, 4096); SIZE(monitor_page, 4096); SIZE(sint_register, 8); SIZE(page_register, 8); SIZE(post_message, 256);
SIZE(signal_event, 8); SIZE(ring_control, 4096); SIZE(packet, 16); SIZE(trailer, 8); SIZE(ic, 28);
SIZE(ic_negotiate, 40); SIZE(ic_heartbeat, 40); SIZE(ic_shutdown, 2060);

#endif /* HYPERV_ABI_H */
