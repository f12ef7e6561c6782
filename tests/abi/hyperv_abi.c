/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Encodes and decodes the structures of hyperv_abi.h by assignment to their members, so that the compiler decides where a field
 * lies.  A command a line:  E name field=value ...  gives the bytes in hex;  D name hex  gives every field=value.
 * Values are decimal; an element of an array is field[i].  Bytes that are missing at the end of D are zeros.
 */
#include "hyperv_abi.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LINE_MAX_BYTES (1 << 20)
#define ELEMENT_NAME_BYTES 64

/* The field that a command names, or all of them when there is no name. */
static const char *wanted;
static u64 value;
static int hits;

static int is_wanted(const char *name) { return wanted != NULL && strcmp(wanted, name) == 0 && ++hits; }
static void say(const char *name, u64 number)
{
    if (wanted == NULL)
        printf(" %s=%llu", name, (unsigned long long)number);
}

#define F(member) \
    do { \
        if (is_wanted(#member)) \
            s->member = value; \
        say(#member, (u64)s->member); \
    } while (0)
#define A(array, count, member) \
    for (unsigned i = 0; i < (count); i++) { \
        char name[ELEMENT_NAME_BYTES]; \
        snprintf(name, sizeof name, "%s[%u]%s", #array, i, #member); \
        if (is_wanted(name)) \
            s->array[i] member = value; \
        say(name, (u64)s->array[i] member); \
    }
#define GUID(guid) F(guid.a); F(guid.b); F(guid.c); A(guid.d, 8, )
#define STRUCT(name, ...) static void visit_##name(void *at) { struct name *s = at; __VA_ARGS__; }

STRUCT(header, F(type); F(pad))
STRUCT(offer, F(type); F(pad); GUID(class_id); GUID(instance_id); F(latency); F(revision); F(context_bytes); F(flags); F(mmio_mb);
       A(user_data, 120, ); F(sub_index); F(mmio_mb_optional); F(relid); F(monitor_id); F(monitor_allocated); F(monitor_rsvd);
       F(dedicated); F(dedicated_rsvd); F(connection))
STRUCT(relid, F(type); F(pad); F(relid))
STRUCT(open, F(type); F(pad); F(relid); F(open_id); F(ring_gpadl); F(target_vp); F(downstream_page); A(user_data, 120, ))
STRUCT(open_result, F(type); F(pad); F(relid); F(open_id); F(status))
STRUCT(gpadl_header, F(type); F(pad); F(relid); F(gpadl); F(range_bytes); F(range_count); F(range.byte_count); F(range.byte_offset);
       A(range.pfn, 26, ))
STRUCT(gpadl_body, F(type); F(pad); F(number); F(gpadl); A(pfn, 28, ))
STRUCT(gpadl_created, F(type); F(pad); F(relid); F(gpadl); F(status))
STRUCT(gpadl_teardown, F(type); F(pad); F(relid); F(gpadl))
STRUCT(gpadl_torndown, F(type); F(pad); F(gpadl))
STRUCT(initiate, F(type); F(pad); F(version); F(target_vp); F(interrupt_page); F(monitor_host_to_guest); F(monitor_guest_to_host))
STRUCT(initiate_5, F(type); F(pad); F(version); F(target_vp); F(sint); F(vtl); F(rsvd); F(features); F(monitor_host_to_guest);
       F(monitor_guest_to_host))
STRUCT(version_response, F(type); F(pad); F(supported); F(state); F(rsvd); F(connection))
STRUCT(version_response_2, F(type); F(pad); F(supported); F(state); F(rsvd); F(connection); F(features))
STRUCT(version_response_3, F(type); F(pad); F(supported); F(state); F(rsvd); F(connection); F(features); F(rsvd2);
       A(monitor_page, 2, ))
STRUCT(modify, F(type); F(pad); F(relid); F(target_vp))
STRUCT(modify_response, F(type); F(pad); F(relid); F(status))
STRUCT(slot, F(type); F(payload_size); F(msg_pending); F(flags_rsvd); F(rsvd); F(sender); A(payload, 240, ))
STRUCT(flags_page, A(sint[0].flags, 256, ); A(sint[2].flags, 256, ); A(sint[15].flags, 256, ))
STRUCT(interrupt_page, A(host_to_guest, 2048, ); A(guest_to_host, 2048, ))
STRUCT(monitor_page, F(group_enable); F(state_rsvd); F(rsvd1); A(group, 4, .pending); A(group, 4, .armed); A(next_check, 128, );
       A(latency, 128, ); A(parameter, 128, .connection); A(parameter, 128, .flag); A(parameter, 128, .rsvd))
STRUCT(sint_register, F(vector); F(rsvd1); F(masked); F(auto_eoi); F(polling); F(rsvd2); F(proxy); F(rsvd3))
STRUCT(page_register, F(enable); F(preserved); F(frame))
STRUCT(post_message, F(connection); F(rsvd); F(type); F(size); A(payload, 240, ))
STRUCT(signal_event, F(connection); F(connection_rsvd); F(flag); F(rsvd))
STRUCT(ring_control, F(write_index); F(read_index); F(interrupt_mask); F(pending_send_sz); A(rsvd, 12, ); F(features))
STRUCT(packet, F(type); F(offset8); F(length8); F(completion); F(flags_rsvd); F(transaction))
STRUCT(trailer, F(rsvd); F(write_index))
STRUCT(ic, F(pipe_flags); F(pipe_size); F(frame_major); F(frame_minor); F(message_type); F(version_major); F(version_minor); F(size);
       F(status); F(transaction); F(transaction_flag); F(request_flag); F(response_flag); F(flags_rsvd); F(rsvd))
STRUCT(ic_negotiate, F(frame_count); F(message_count); F(rsvd); A(version, 8, .major); A(version, 8, .minor))
STRUCT(ic_heartbeat, F(sequence); A(rsvd, 32, ))
STRUCT(ic_shutdown, F(reason); F(timeout_s); F(flags); A(text, 2048, ))

#define ROW(name) {#name, sizeof(struct name), visit_##name}
static const struct { const char *name; size_t bytes; void (*visit)(void *); } table[] = {
    ROW(header), ROW(offer), ROW(relid), ROW(open), ROW(open_result), ROW(gpadl_header), ROW(gpadl_body), ROW(gpadl_created),
    ROW(gpadl_teardown), ROW(gpadl_torndown), ROW(initiate), ROW(initiate_5), ROW(version_response), ROW(version_response_2),
    ROW(version_response_3), ROW(modify), ROW(modify_response), ROW(slot), ROW(flags_page), ROW(interrupt_page), ROW(monitor_page),
    ROW(sint_register), ROW(page_register), ROW(post_message), ROW(signal_event), ROW(ring_control), ROW(packet), ROW(trailer),
    ROW(ic), ROW(ic_negotiate), ROW(ic_heartbeat), ROW(ic_shutdown),
};

static void fail(const char *what, const char *word)
{
    fprintf(stderr, "%s: %s\n", what, word);
    exit(1);
}

static void encode(size_t row, u8 *bytes)
{
    for (char *word; (word = strtok(NULL, " \n")) != NULL;) {
        char *sign = strchr(word, '=');
        if (sign == NULL)
            fail("no value", word);
        *sign = 0;
        wanted = word, value = strtoull(sign + 1, NULL, 10), hits = 0;
        table[row].visit(bytes);
        if (hits != 1)
            fail("no such field", word);
    }
    for (size_t i = 0; i < table[row].bytes; i++)
        printf("%02x", bytes[i]);
}

static void decode(size_t row, u8 *bytes)
{
    const char *hex = strtok(NULL, " \n");
    unsigned byte;
    for (size_t i = 0; hex != NULL && sscanf(hex + 2 * i, "%2x", &byte) == 1; i++) {
        if (i >= table[row].bytes)
            fail("too many bytes", table[row].name);
        bytes[i] = (u8)byte;
    }
    wanted = NULL;
    table[row].visit(bytes);
}

int main(void)
{
    static char line[LINE_MAX_BYTES];
    while (fgets(line, sizeof line, stdin) != NULL) {
        char *command = strtok(line, " \n"), *name = strtok(NULL, " \n");
        size_t row = 0;
        while (name != NULL && row < sizeof table / sizeof table[0] && strcmp(table[row].name, name) != 0)
            row++;
        if (name == NULL || row == sizeof table / sizeof table[0])
            fail("no such structure", name == NULL ? "" : name);
        u8 *bytes = calloc(1, table[row].bytes);
        if (bytes == NULL)
            fail("no memory for", name);
        if (*command == 'E')
            encode(row, bytes);
        else
            decode(row, bytes);
        putchar('\n');
        fflush(stdout);
        free(bytes);
    }
    return 0;
}
