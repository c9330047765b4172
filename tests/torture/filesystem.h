/* Filesystems that lack this or that, and saves to them: what the parts of the program "manners" share. The system
 * calls of the library come by here. */
#ifndef TORTURE_FILESYSTEM_H
#define TORTURE_FILESYSTEM_H

#include <safetensors_torch.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* How many manners were seen; those of children count too. */
extern long* manners;

/* A filesystem without O_TMPFILE, one that sets no space aside; and what one says that has no renames, or no links: 0
 * where it has. */
extern bool no_unnamed, no_fallocate;
extern int no_renames, no_links;

/* What the filesystem's clock is ahead by, in seconds, for open files. */
extern long ahead;

/* Whether the filesystem is one that machines share; else it is ext4. */
extern bool is_shared;

/* A process that is forked while a file is about to be renamed, and lives on. */
extern bool forks_at_rename;
extern pid_t forked;

/* A file whose permissions become 0600 as soon as the one that will replace it has been made, and the most permissions
 * that this has until it is renamed; a path, or NULL. */
extern const char* narrows_at_stage;
extern mode_t most_rights;

/* What is done once, right after the library has read the header of a file; or NULL. */
extern void (*after_header)(void);

void make_directory(const char* path, mode_t mode);

/* Saves two tensors of so many words each. */
sft_status save_version(uint64_t version, size_t words, const char* path);

/* A save with this status must have failed with this errno and named the path, and left `version` in it (0: whatever it
 * may be) and nothing beside it: `before` entries in the directory. */
void is_refused(const char* what, sft_status status, const char* path, int error, uint64_t version,
                const char* directory, int before);

/* Such a save; and three that must succeed, with `beside` other entries in the directory. */
void refused(const char* what, const char* path, size_t words, int error, uint64_t version, const char* directory);
void accepted(const char* what, const char* path, size_t words, int beside, const char* directory);

/* In a child, as another user where this process may change it: what it makes of its failures is its exit status. */
void as_child(void (*body)(void), bool as_nobody);

/* The part that is about a disk without space. */
void small_disk(void);

#endif
