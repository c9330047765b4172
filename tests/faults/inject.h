/* System calls that fail when they are told to. The functions that the library calls for them are defined in this
 * program, before those of libc, so every call of the library's comes by here. fsync and fdatasync do nothing else:
 * nothing here loses power, and tests/torture/order.c sees when they are called. */
#ifndef INJECT_H
#define INJECT_H

#include <stdbool.h>

/* What the chosen call does. */
typedef enum fault {
    FAULT_ERROR, /* fails with the errno that was given */
    FAULT_SHORT, /* a write, a read or a copy takes one byte, or fewer than all; other calls succeed */
} fault;

/* From now on the calls of this thread are counted, from 1, and number `target` does what `kind` and `error` say. With
 * `after` more than 0, the call so many after that one fails too, with the same error. */
void inject_arm(long target, fault kind, int error, long after);

/* Ends that. Gives how many calls there were. */
long inject_disarm(void);

/* What was called when it failed, and the second time: "writev"; NULL if nothing has. Some calls are told apart by what
 * they are for: "open unnamed" (O_TMPFILE), "open a directory", "look at a name" and "look at a hidden name" (O_PATH),
 * "close of a duplicate" (of another descriptor for the same file), "statx of a file" that is open, "statx of /proc",
 * "statx of a mapping" (the path of a file that is mapped), "unlink of the lock", "unlink of a hidden name", "rename to
 * a hidden name". */
const char* inject_failed(void);
const char* inject_failed_again(void);

/* Whether something got a name that is not hidden, or bytes in a file that has one, before the fault. */
bool inject_had_changed(void);

/* Fails every call of this name too, with `error`, from inject_arm on; NULL for none any more. Not counted. "rename
 * over a file" is one to a name that is not free. */
void inject_always(const char* name, int error);

#endif
