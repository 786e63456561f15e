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
int clivetap_map_entries(int map, uint32_t *entries);
// How often the kernel skipped the program behind this link because it would have interrupted itself.
int clivetap_recursion_misses(int link, uint64_t *misses);

// The calling thread runs on this processor only; on any that it might before, when negative.
int clivetap_run_on(int processor);

int clivetap_mount_bpffs(const char *path);
bool clivetap_is_bpffs(const char *path);

// Freezes the mounted file systems that `fds` are of (FIFREEZE), after starting a process of its own that thaws them when `limit_ms` have passed
// or when the caller is gone, whatever became of it. `guard`: two numbers for clivetap_thaw. 0 or a negative errno (then nothing is frozen).
int clivetap_freeze(const int *fds, int count, int limit_ms, int guard[2]);
// 0, or -ETIMEDOUT when they did not stay frozen until now. They are not frozen afterwards.
int clivetap_thaw(const int *fds, int count, const int guard[2]);

static inline uint64_t clivetap_load_word(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static inline void clivetap_store_word(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
static inline uint64_t clivetap_exchange(uint64_t *p, uint64_t v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }
// Whether *p was `expected` and is `desired` now; if not, *expected is what it was.
static inline bool clivetap_compare_exchange(uint64_t *p, uint64_t *expected, uint64_t desired) {
    return __atomic_compare_exchange_n(p, expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

#endif
