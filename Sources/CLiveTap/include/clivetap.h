// libbpf behind plain functions (its options, variadic loggers and opaque objects import badly), the compiled program of the kernel's
// half, and atomic operations on memory that the kernel shares. No logic.
#ifndef CLIVETAP_H
#define CLIVETAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "clivetap_abi.h"

// Compiled by tools/lib/bpf.sh; no bytes when this was built without it.
extern const unsigned char clivetap_program[];
extern const size_t clivetap_program_bytes;

typedef struct clivetap clivetap;
// Where libbpf's words about failures go, at most `bytes` of them; one caller at a time in the whole process.
void clivetap_set_log(char *log, size_t bytes);
// All return 0 or a descriptor, or a negative errno.
int clivetap_open(clivetap **tap);
int clivetap_set_entries(clivetap *tap, const char *map, uint32_t entries);
int clivetap_load(clivetap *tap);
int clivetap_map(clivetap *tap, const char *map);                  // descriptor; belongs to `tap`
int clivetap_attach(clivetap *tap, const char *program, const char *pin_path); // stays attached as long as it is pinned
void clivetap_close(clivetap *tap);

int clivetap_pin(int fd, const char *path);
int clivetap_get(const char *path);                                // descriptor of what is pinned there
int clivetap_create_words(uint32_t count);                         // an mmap-able array of u64
int clivetap_put(int map, uint32_t key, uint32_t value);           // value: a descriptor, for maps of maps
int clivetap_look_up(int map, uint32_t key, uint32_t *value);      // value: an identifier, for maps of maps
int clivetap_map_by_id(uint32_t id);
int clivetap_map_entries(int map, uint32_t *entries, uint32_t *value_bytes);
// How often the kernel skipped the program behind this link because it would have interrupted itself.
int clivetap_recursion_misses(int link, uint64_t *misses);

// The calling thread runs on this processor only; on any that it might before, when negative.
int clivetap_run_on(int processor);

// Returns when every processor has left the interrupt, softirq or tracing program that it is in. -EINVAL where the kernel does not offer that.
int clivetap_let_processors_pass(void);

int clivetap_mount_bpffs(const char *path);
bool clivetap_is_bpffs(const char *path);

// Writes out what the file system that `fd` is of has in memory, and waits for it: 0 or a negative errno.
int clivetap_sync(int fd);
// Freezes the mounted file systems that `fds` are of (FIFREEZE), after starting a process of its own that thaws them when `limit_ms` have passed
// or when the caller is gone, whatever became of it. Those that cannot be frozen (vfat: EOPNOTSUPP) are left out and `is_frozen` says so.
// `guard`: two numbers for clivetap_thaw. 0 or a negative errno (then nothing is frozen, and `failed` is which of them could not be).
int clivetap_freeze(const int *fds, int count, int limit_ms, bool *is_frozen, int guard[2], int *failed);
// They may stay frozen for another `limit_ms` from now; or `forever`: until they are thawed by name, even if the caller is gone. 0, or -ETIMEDOUT when
// they did not stay frozen until now, or the guard does not answer.
int clivetap_freeze_keep(const int guard[2], bool forever);
// 0, or -ETIMEDOUT when they did not stay frozen until now. They are not frozen afterwards.
int clivetap_thaw(const int *fds, int count, const bool *is_frozen, const int guard[2]);
// 1, 0, or a negative errno: -EOPNOTSUPP when it cannot be frozen.
int clivetap_is_frozen(int fd);
void clivetap_thaw_one(int fd);                                   // whoever has frozen it; harmless when nobody has

// Memory that is not committed before it is used, and not copied to child processes; null when there is none.
void *clivetap_reserve(size_t bytes);
void clivetap_unreserve(void *start, size_t bytes);
void clivetap_give_back(void *start, size_t bytes);               // reads as zero afterwards

// The class (0 none, 2 best effort, 3 idle) and level (0 to 7) of the calling thread's I/O; of thread `tid` as class << 13 | level.
int clivetap_set_io_priority(int io_class, int level);
int clivetap_io_priority(int tid);

// What the file system that `fd` is of says of its space (FS_IOC_GETFSMAP), some extents at a time, in their order.
typedef struct clivetap_fsmap clivetap_fsmap;
typedef struct clivetap_extent {
    uint64_t start_bytes, length_bytes;
    uint32_t major, minor;                                         // of the block device
    bool has_device;                                               // whether major and minor are known
    bool is_free;
} clivetap_extent;
clivetap_fsmap *clivetap_fsmap_open(int fd);
// How many there are in `extents` now, at most `capacity`; 0 at the end; or a negative errno.
int clivetap_fsmap_next(clivetap_fsmap *, clivetap_extent *extents, uint32_t capacity);
void clivetap_fsmap_close(clivetap_fsmap *);

// A loop device over a file in memory (memfd) that goes when its last descriptor is closed. 0, its number and its descriptor (read and write, direct), or
// a negative errno.
int clivetap_loop_create(uint64_t bytes, int *number, int *device);
int clivetap_discard(int fd, uint64_t offset, uint64_t length);   // BLKDISCARD

static inline uint64_t clivetap_load_word(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static inline void clivetap_store_word(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
static inline uint64_t clivetap_exchange(uint64_t *p, uint64_t v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }
// Whether *p was `expected` and is `desired` now; if not, *expected is what it was.
static inline bool clivetap_compare_exchange(uint64_t *p, uint64_t *expected, uint64_t desired) {
    return __atomic_compare_exchange_n(p, expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

#endif
