#include <stddef.h>
#include <stdint.h>
#include <xxhash.h>

// XXH3-64 by the widest vectors that the processor has. The library's plain functions are SSE2 on x86, whatever the processor, and take four
// times as long again while something has left the upper halves of the vector registers dirty.
#if defined(__x86_64__) && defined(__has_include)
#if __has_include(<xxh_x86dispatch.h>)
#define XXH_DISPATCH_DISABLE_REPLACE
#include <xxh_x86dispatch.h>
#define CXXHASH_HAS_DISPATCH 1
#endif
#endif

#ifdef CXXHASH_HAS_DISPATCH
// The library's wide functions are what leaves them so: xxHash 0.8.1 does not end with vzeroupper.
static inline uint64_t cxxhash_clean(uint64_t sum) {
    if (__builtin_cpu_supports("avx")) __asm__ volatile("vzeroupper");
    return sum;
}
static inline XXH128_hash_t cxxhash_128_keyed(const void *bytes, size_t count, const void *secret, size_t secret_count) {
    XXH128_hash_t sum = XXH3_128bits_withSecret_dispatch(bytes, count, secret, secret_count);
    cxxhash_clean(0);
    return sum;
}
static inline uint64_t cxxhash_64(const void *bytes, size_t count) { return cxxhash_clean(XXH3_64bits_dispatch(bytes, count)); }
static inline uint64_t cxxhash_64_seeded(const void *bytes, size_t count, uint64_t seed) { return cxxhash_clean(XXH3_64bits_withSeed_dispatch(bytes, count, seed)); }
#else
static inline XXH128_hash_t cxxhash_128_keyed(const void *bytes, size_t count, const void *secret, size_t secret_count) { return XXH3_128bits_withSecret(bytes, count, secret, secret_count); }
static inline uint64_t cxxhash_64(const void *bytes, size_t count) { return XXH3_64bits(bytes, count); }
static inline uint64_t cxxhash_64_seeded(const void *bytes, size_t count, uint64_t seed) { return XXH3_64bits_withSeed(bytes, count, seed); }
#endif
