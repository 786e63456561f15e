// io_uring behind an opaque type, and the constants of the block layer that Swift cannot import.
//
// No liburing or kernel header is included here: liburing's `struct io_uring_sqe` conflicts with the one in
// swift-system's CSystem module as soon as both reach one Swift module.
#ifndef CIOURING_H
#define CIOURING_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>

typedef struct ciouring ciouring;

typedef struct ciouring_completion {
    uint64_t user_data;
    int32_t res;
    uint32_t flags;
} ciouring_completion;

// Set-up flags (0 where the build's headers lack them; see ciouring.c).
extern const uint32_t ciouring_setup_submit_all;
extern const uint32_t ciouring_setup_coop_taskrun;
extern const uint32_t ciouring_setup_single_issuer;
extern const uint32_t ciouring_setup_defer_taskrun;

// Return 0 or a negative errno. `cq_entries` is the size of the completion queue.
int ciouring_create(ciouring **ring, uint32_t entries, uint32_t cq_entries, uint32_t flags);
void ciouring_destroy(ciouring *ring);

// Saves a file-table look-up per system call; only from the thread that uses the ring. Negative errno on failure.
int ciouring_register_ring_fd(ciouring *ring);
// Reserves `count` empty places for fixed buffers. Negative errno on failure.
int ciouring_reserve_buffers(ciouring *ring, uint32_t count);
// Fills (or with length 0 empties) one place. Negative errno on failure.
int ciouring_set_buffer(ciouring *ring, uint32_t index, void *base, uint64_t length);

// Hand queued entries to the kernel: number taken, or a negative errno.
int ciouring_submit(ciouring *ring);
int ciouring_submit_and_wait(ciouring *ring, uint32_t count);
// Runs deferred completions and flushes an overflown completion queue, without waiting.
int ciouring_get_events(ciouring *ring);
// Copies out and consumes at most `capacity` (at most 256) completions.
uint32_t ciouring_reap(ciouring *ring, ciouring_completion *completions, uint32_t capacity);

// Each queues one entry and returns true, or returns false when the submission queue is full.
// `rw_flags` are RWF_*. Pointers must stay valid until the completion.
bool ciouring_prep_read(ciouring *, int fd, void *buffer, uint32_t count, uint64_t offset, uint64_t user_data);
bool ciouring_prep_write(ciouring *, int fd, const void *buffer, uint32_t count, uint64_t offset, int rw_flags, uint64_t user_data);
bool ciouring_prep_read_fixed(ciouring *, int fd, void *buffer, uint32_t count, uint64_t offset, uint32_t buffer_index, uint64_t user_data);
bool ciouring_prep_write_fixed(ciouring *, int fd, const void *buffer, uint32_t count, uint64_t offset, uint32_t buffer_index, int rw_flags, uint64_t user_data);
bool ciouring_prep_readv(ciouring *, int fd, const struct iovec *iovecs, uint32_t count, uint64_t offset, uint64_t user_data);
bool ciouring_prep_writev(ciouring *, int fd, const struct iovec *iovecs, uint32_t count, uint64_t offset, int rw_flags, uint64_t user_data);
bool ciouring_prep_datasync(ciouring *, int fd, uint64_t user_data);
bool ciouring_prep_fallocate(ciouring *, int fd, int mode, uint64_t offset, uint64_t length, uint64_t user_data);
bool ciouring_prep_accept(ciouring *, int fd, int flags, uint64_t user_data);
bool ciouring_prep_recv(ciouring *, int fd, void *buffer, uint64_t count, int flags, uint64_t user_data);
bool ciouring_prep_recvmsg(ciouring *, int fd, struct msghdr *message, uint32_t flags, uint64_t user_data);
bool ciouring_prep_sendmsg(ciouring *, int fd, const struct msghdr *message, uint32_t flags, uint64_t user_data);
bool ciouring_prep_poll(ciouring *, int fd, uint32_t events, uint64_t user_data);
// Relative, monotonic clock; completes with -ETIME.
bool ciouring_prep_timeout(ciouring *, uint64_t nanoseconds, uint64_t user_data);
bool ciouring_prep_close(ciouring *, int fd, uint64_t user_data);
// Cancels the entry whose user_data is `target`.
bool ciouring_prep_cancel(ciouring *, uint64_t target, uint64_t user_data);
// Cancels every entry on `fd`; on any file when `fd` is negative.
bool ciouring_prep_cancel_all(ciouring *, int fd, uint64_t user_data);

// What Glibc's Swift module lacks.
extern const int ciouring_o_direct;
extern const int ciouring_rwf_dsync;
extern const int ciouring_falloc_keep_size;
extern const int ciouring_falloc_punch_hole;
extern const int ciouring_falloc_zero_range;

int ciouring_eventfd(void);                                       // EFD_CLOEXEC; or a negative errno
void ciouring_name_thread(const char *name);                      // the calling thread; at most 15 bytes

// Block device and file facts; 0 or a negative errno.
int ciouring_block_size_bytes(int fd, uint64_t *bytes);           // BLKGETSIZE64
int ciouring_block_logical_bytes(int fd, uint32_t *bytes);        // BLKSSZGET
int ciouring_block_optimal_bytes(int fd, uint32_t *bytes);        // BLKIOOPT
int ciouring_file_direct_alignment(int fd, uint32_t *bytes);      // statx STATX_DIOALIGN; 0 bytes when unknown
int ciouring_fallocate(int fd, int mode, uint64_t offset, uint64_t length);
uint32_t ciouring_device_major(uint64_t device);                  // of a dev_t
uint32_t ciouring_device_minor(uint64_t device);

#endif
