/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Looking a little longer before sleeping: whether that pays, and who goes first meanwhile.  A spinner yields its core at each
 * turn, to whoever waits for it: with fewer cores than processes it mostly is the one that is to bring the work.  Where a
 * program that never sleeps wants the same core, a yield is answered a whole time slice later, and a sleeper would have been
 * back at once; so such a yield ends the spinning for a while, and for twice as long if there was one shortly before.
 */
#ifndef PVBUS_SPIN_H
#define PVBUS_SPIN_H

#include "core.h"

#include <sched.h>

#define PV_SPIN_NS_MAX 200000u   /* of one spin, with the time of those who went first */
#define PV_YIELD_NS_MAX 1000000u /* a window of thousands of events takes less, a time slice more */
#define PV_SPIN_SCORE_MAX 16
#define PV_SPIN_PROBE 16         /* sleeps from one try to the next while it does not pay, */
#define PV_SPIN_BUSY_MAX 9       /* and up to 2^9 times as many where a program keeps the core */

typedef struct {
    int score, sleeps, busy;
    int alone; /* one core for everybody: a yield there is a wake-up of the next, and no sooner */
} pv_spinner;

#ifndef PVBUS_EXPLORED
static inline void pv_spin_init(pv_spinner *s, int score)
{
    cpu_set_t mine;
    s->score = score;
    s->sleeps = s->busy = 0;
    s->alone = sched_getaffinity(0, sizeof mine, &mine) == 0 && CPU_COUNT(&mine) == 1;
}

/* Has it paid lately, or is it time to try again? */
static inline int pv_spin_may(pv_spinner *s)
{
    if (s->score > 0)
        return 1;
    if (++s->sleeps < PV_SPIN_PROBE)
        return 0;
    s->sleeps = 0;
    return 1;
}

static inline void pv_spin_paid(pv_spinner *s, int paid)
{
    s->score += paid ? s->score < PV_SPIN_SCORE_MAX : -(s->score > 0);
    s->busy -= paid && s->busy > 0;
}

/* 0 = the core was not given back in time: one look more, and to sleep.  Touches no spinner: threads without the GIL call it. */
static inline int pv_spin_yield(uint64_t *now)
{
    uint64_t before = *now;
    sched_yield();
    *now = pv_now_ns();
    return *now - before < PV_YIELD_NS_MAX;
}

/* After such a yield. */
static inline void pv_spin_busy(pv_spinner *s)
{
    s->score = 0;
    s->sleeps = -(PV_SPIN_PROBE << s->busy);
    s->busy += s->busy < PV_SPIN_BUSY_MAX;
}
#endif

#endif
