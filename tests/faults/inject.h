/* System calls that fail when they are told to. The functions that the library calls for them are defined in this
 * program, before those of libc, so every call of the library's comes by here. */
#ifndef INJECT_H
#define INJECT_H

#include <stdbool.h>

/* What the chosen call does. */
typedef enum fault {
    FAULT_ERROR, /* fails with the errno that was given */
    FAULT_SHORT, /* a write or a copy takes one byte, or fewer than all; other calls succeed */
} fault;

/* From now on the calls of this thread are counted, from 1, and number `target` does what `kind` and `error` say. */
void inject_arm(long target, fault kind, int error);

/* Ends that. Gives how many calls there were. */
long inject_disarm(void);

/* What was called when it failed: "writev"; NULL if nothing has. "close of a duplicate" is one of another descriptor
 * for the same file. */
const char* inject_failed(void);

/* Fails every call of this name, with `error`, from inject_arm on; NULL for none. Not counted. */
void inject_always(const char* name, int error);

#endif
