/* SPDX-License-Identifier: Apache-2.0 */
/* Names of places and operations, and the lines of a trace. */
#include "engine.h"

#include <stdarg.h>

static const char *const names[] = {
    "load", "store", "rmw", "compare-exchange", "fence", "spin", "ring", "take", "wait", "choose", "clock", "lock", "unlock",
    "inherit", "allocate", "free", "await", "post", "receive",
};

const char *pv_kind_name(enum kind kind) { return names[kind]; }

void pv_where(const Engine *e, int32_t cell, char *out, size_t size)
{
    uint64_t key = e->cells[cell].key;
    if ((int64_t)key >= 0)
        PyOS_snprintf(out, size, "%s+0x%llx", e->memories[key >> 40].name, (unsigned long long)(key >> 4 & 0xFFFFFFFFF));
    else if (key >> 62 & 1)
        PyOS_snprintf(out, size, "%s", e->memories[key >> 4 & 0xFF].name);
    else
        PyOS_snprintf(out, size, "%s", e->bell_names[key & 0xFFFFFF]);
}

void pv_describe(const Engine *e, const context_t *c, char *out, size_t size)
{
    char where[2 * NAME_MAX_BYTES];
    if (c->dead || !c->waiting) {
        PyOS_snprintf(out, size, "%s", c->dead ? "dead" : c->finished ? "finished" : "running");
        return;
    }
    switch (c->op.kind) {
    case FENCE: case SPIN: case CHOOSE: case CLOCK: case BURY:
        PyOS_snprintf(out, size, "%s %s", names[c->op.kind], c->op.site);
        return;
    default:
        pv_where(e, c->op.cell, where, sizeof where);
        PyOS_snprintf(out, size, "%s %s (%s)", names[c->op.kind], c->op.site, where);
    }
}

/* A site's name for as long as the engine lives. */
const char *pv_keep_site(Engine *e, const char *site)
{
    PyObject *text = PyUnicode_InternFromString(site);
    if (text == NULL || PyList_Append(e->sites, text) < 0) {
        Py_XDECREF(text);
        PyErr_Clear();
        return "?";
    }
    const char *kept = PyUnicode_AsUTF8AndSize(text, NULL);
    Py_DECREF(text); /* the list holds it */
    return kept;
}

/* Add a line to the trace: printf with %s %d %u %x %llu %llx, %W (a cell, as a place) and %R (an object). */
void pv_trace(Engine *e, const context_t *c, const char *format, ...)
{
    char line[512], spec[8];
    size_t at = 0;
    if (e->trace == NULL)
        return;
    va_list args;
    va_start(args, format);
    for (const char *f = format; *f != 0 && at + 160 < sizeof line; f++) {
        if (*f != '%') {
            line[at++] = *f;
            continue;
        }
        size_t n = 0;
        spec[n++] = *f++;
        while (*f == 'l' && n < 4)
            spec[n++] = *f++;
        spec[n++] = *f;
        spec[n] = 0;
        if (*f == 'W') {
            pv_where(e, va_arg(args, int32_t), line + at, 2 * NAME_MAX_BYTES);
        } else if (*f == 'R') {
            PyObject *shown = PyObject_Repr(va_arg(args, PyObject *));
            const char *said = shown != NULL ? PyUnicode_AsUTF8AndSize(shown, NULL) : NULL;
            PyOS_snprintf(line + at, 120, "%s", said != NULL ? said : "?");
            Py_XDECREF(shown);
            PyErr_Clear();
        } else if (*f == 's') {
            PyOS_snprintf(line + at, 120, "%s", va_arg(args, const char *));
        } else if (n > 2) {
            PyOS_snprintf(line + at, 32, spec, va_arg(args, unsigned long long));
        } else {
            PyOS_snprintf(line + at, 32, spec, va_arg(args, int));
        }
        at += strlen(line + at);
    }
    va_end(args);
    line[at] = 0;
    PyObject *text = PyUnicode_DecodeUTF8(line, (Py_ssize_t)at, "replace");
    PyObject *entry = text != NULL ? Py_BuildValue("(sN)", c->name, text) : NULL;
    if (entry == NULL || PyList_Append(e->trace, entry) < 0)
        PyErr_Clear(); /* without memory a trace is short */
    Py_XDECREF(entry);
}
