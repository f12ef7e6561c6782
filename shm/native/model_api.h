/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How the explored core calls a memory model that is written in C: no Python between the access and its answer.  A model
 * offers this table as a capsule, its attribute `native`; one without it is called by its Python methods instead.
 */
#ifndef PVBUS_MODEL_API_H
#define PVBUS_MODEL_API_H

#include <stdint.h>

#define PV_MODEL_API "pvbus.model_api"

/* Each int function returns 0, or -1 with a Python error set: the context is dead, or the model refuses the access. */
struct pv_model_api {
    void *engine;
    uint32_t (*attach)(void *engine, const void *memory); /* the number of a new Memory */
    int (*load)(void *engine, uint32_t memory, uint64_t off, int width, int order, const char *site, uint64_t *out);
    int (*store)(void *engine, uint32_t memory, uint64_t off, int width, uint64_t value, int order, const char *site);
    int (*rmw)(void *engine, uint32_t memory, uint64_t off, int width, int op, uint64_t value, const char *site, uint64_t *old);
    int (*cas)(void *engine, uint32_t memory, uint64_t off, int width, uint64_t expected, uint64_t desired, const char *site,
               uint64_t *old);
    int (*fence)(void *engine, int kind, const char *site);
    int (*spin)(void *engine, const char *site);
};

#endif /* PVBUS_MODEL_API_H */
