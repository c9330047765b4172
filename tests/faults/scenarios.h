/* Ways to save, what is there before, and what is there afterwards. How a save is judged is not known here. */
#ifndef SCENARIOS_H
#define SCENARIOS_H

#include <safetensors_torch.h>
#include <stdbool.h>
#include <stddef.h>

/* A call that a filesystem lacks, and what it says then. */
typedef struct lack {
    const char* name;
    int error;
} lack;

/* A way to save: what is there before, and how it is written. */
typedef struct scenario {
    const char* name;
    bool exists;                             /* whether an old file, or checkpoint, is there */
    bool durable;                            /* whether the new one is to be on the disk */
    bool stranger;                           /* whether the old file is another user's */
    bool large;                              /* whether it is a large one */
    bool listed;                             /* whether it has an access control list */
    bool lists;                              /* whether new files in its directory get one */
    bool twice;                              /* whether what comes after a failure fails too */
    lack missing[3];                         /* calls that this filesystem lacks */
    uint64_t old_shard, new_shard;           /* for a checkpoint: the bytes of a file; 0 for a single file by itself */
    enum { AT_ONCE, INCREMENTAL, EDIT } how; /* all tensors at once, one by one, or a change of the metadata */
    bool in_place;                           /* whether an edit overwrites the header */
} scenario;

/* All of them. The one that ends the list has no name. */
extern const scenario scenarios[];

/* Kinds of scenarios. */
typedef enum scenario_kind { FILES, CHECKPOINTS, INCREMENTAL_WRITERS, EDITS, KINDS } scenario_kind;
scenario_kind kind_of(const scenario* what);

/* Makes the tensors that are saved, and frees them. */
void scenarios_begin(const char* directory);
void scenarios_end(void);

/* Puts there what is there before, in a fresh directory, which becomes that of path_of(). */
void prepare(const scenario* what);

/* The save that is tested, over what is there, to path_of("target"). */
sft_status run_save(const scenario* what);

/* The byte that all tensors of the checkpoint at `path` are full of: 1 for the old ones, 2 for the new ones, or if the
 * metadata were edited; 0 if they are not, or if it cannot be read. */
unsigned char value_of(const char* path);

/* Whether the file has the owner and the permissions that it is to have; those of the group may be none if it `may_be`
 * narrower. */
bool is_as_it_was(const scenario* what, bool may_be);

/* Whether the filesystem has access control lists. */
bool has_lists(void);

/* How many files a checkpoint has that is divided so. */
int files_of(uint64_t shard);

#endif
