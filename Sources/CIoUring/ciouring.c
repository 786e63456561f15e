#define _GNU_SOURCE
#include "ciouring.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

_Static_assert(sizeof(ciouring_completion) == 16, "a completion is 16 bytes, as in the kernel");

struct ciouring {
    struct io_uring ring;
    uint32_t entries;
    // A timeout's argument must stay in place until its entry is submitted: one per place in the queue.
    struct __kernel_timespec *timespecs;
};

const uint32_t ciouring_setup_submit_all = IORING_SETUP_SUBMIT_ALL;
const uint32_t ciouring_setup_coop_taskrun = IORING_SETUP_COOP_TASKRUN;
const uint32_t ciouring_setup_single_issuer = IORING_SETUP_SINGLE_ISSUER;
const uint32_t ciouring_setup_defer_taskrun = IORING_SETUP_DEFER_TASKRUN;

const int ciouring_o_direct = O_DIRECT;
const int ciouring_rwf_dsync = RWF_DSYNC;
const int ciouring_falloc_keep_size = FALLOC_FL_KEEP_SIZE;
const int ciouring_falloc_punch_hole = FALLOC_FL_PUNCH_HOLE;
const int ciouring_falloc_zero_range = FALLOC_FL_ZERO_RANGE;

int ciouring_create(ciouring **out, uint32_t entries, uint32_t cq_entries, uint32_t flags) {
    ciouring *ring = calloc(1, sizeof *ring);
    if (!ring) return -ENOMEM;
    struct io_uring_params params = {.flags = flags | IORING_SETUP_CQSIZE, .cq_entries = cq_entries};
    int result = io_uring_queue_init_params(entries, &ring->ring, &params);
    if (result < 0) {
        free(ring);
        return result;
    }
    ring->entries = params.sq_entries;
    ring->timespecs = calloc(params.sq_entries, sizeof *ring->timespecs);
    if (!ring->timespecs) {
        io_uring_queue_exit(&ring->ring);
        free(ring);
        return -ENOMEM;
    }
    *out = ring;
    return 0;
}

void ciouring_destroy(ciouring *ring) {
    io_uring_queue_exit(&ring->ring);
    free(ring->timespecs);
    free(ring);
}

int ciouring_register_ring_fd(ciouring *ring) { return io_uring_register_ring_fd(&ring->ring); }

int ciouring_reserve_buffers(ciouring *ring, uint32_t count) {
    return io_uring_register_buffers_sparse(&ring->ring, count);
}

int ciouring_set_buffer(ciouring *ring, uint32_t index, void *base, uint64_t length) {
    struct iovec iovec = {.iov_base = length ? base : NULL, .iov_len = length};
    __u64 tag = 0;
    return io_uring_register_buffers_update_tag(&ring->ring, index, &iovec, &tag, 1);
}

int ciouring_submit(ciouring *ring) { return io_uring_submit(&ring->ring); }
int ciouring_submit_and_wait(ciouring *ring, uint32_t count) { return io_uring_submit_and_wait(&ring->ring, count); }
int ciouring_get_events(ciouring *ring) { return io_uring_get_events(&ring->ring); }

uint32_t ciouring_reap(ciouring *ring, ciouring_completion *completions, uint32_t capacity) {
    struct io_uring_cqe *cqes[256];
    uint32_t count = io_uring_peek_batch_cqe(&ring->ring, cqes, capacity < 256 ? capacity : 256);
    for (uint32_t i = 0; i < count; i++)
        completions[i] = (ciouring_completion){cqes[i]->user_data, cqes[i]->res, cqes[i]->flags};
    io_uring_cq_advance(&ring->ring, count);
    return count;
}

// Every prep function: take an entry, let liburing fill it, set who it belongs to.
#define PREPARE(owner, user_data, prepare)                                    \
    struct io_uring_sqe *sqe = io_uring_get_sqe(&(owner)->ring);              \
    if (!sqe) return false;                                                   \
    prepare;                                                                  \
    io_uring_sqe_set_data64(sqe, user_data);                                  \
    return true

bool ciouring_prep_read(ciouring *r, int fd, void *buffer, uint32_t count, uint64_t offset, uint64_t user_data) {
    PREPARE(r, user_data, io_uring_prep_read(sqe, fd, buffer, count, offset));
}

bool ciouring_prep_write(ciouring *r, int fd, const void *buffer, uint32_t count, uint64_t offset, int rw_flags, uint64_t user_data) {
    PREPARE(r, user_data, io_uring_prep_write(sqe, fd, buffer, count, offset); sqe->rw_flags = rw_flags);
}

bool ciouring_prep_read_fixed(ciouring *r, int fd, void *buffer, uint32_t count, uint64_t offset, uint32_t buffer_index, uint64_t user_data) {
    PREPARE(r, user_data, io_uring_prep_read_fixed(sqe, fd, buffer, count, offset, (int)buffer_index));
}

bool ciouring_prep_write_fixed(ciouring *r, int fd, const void *buffer, uint32_t count, uint64_t offset, uint32_t buffer_index, int rw_flags, uint64_t user_data) {
    PREPARE(r, user_data, io_uring_prep_write_fixed(sqe, fd, buffer, count, offset, (int)buffer_index); sqe->rw_flags = rw_flags);
}

bool ciouring_prep_readv(ciouring *r, int fd, const struct iovec *iovecs, uint32_t count, uint64_t offset, uint64_t user_data) {
    PREPARE(r, user_data, io_uring_prep_readv(sqe, fd, iovecs, count, offset));
}

bool ciouring_prep_writev(ciouring *r, int fd, const struct iovec *iovecs, uint32_t count, uint64_t offset, int rw_flags, uint64_t user_data) {
    PREPARE(r, user_data, io_uring_prep_writev2(sqe, fd, iovecs, count, offset, rw_flags));
}

bool ciouring_prep_datasync(ciouring *r, int fd, uint64_t user_data) {
    PREPARE(r, user_data, io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC));
}

bool ciouring_prep_fallocate(ciouring *r, int fd, int mode, uint64_t offset, uint64_t length, uint64_t user_data) {
    PREPARE(r, user_data, io_uring_prep_fallocate(sqe, fd, mode, (off_t)offset, (off_t)length));
}

bool ciouring_prep_accept(ciouring *r, int fd, int flags, uint64_t user_data) {
    PREPARE(r, user_data, io_uring_prep_accept(sqe, fd, NULL, NULL, flags));
}

bool ciouring_prep_recv(ciouring *r, int fd, void *buffer, uint64_t count, int flags, uint64_t user_data) {
    PREPARE(r, user_data, io_uring_prep_recv(sqe, fd, buffer, count, flags));
}

bool ciouring_prep_recvmsg(ciouring *r, int fd, struct msghdr *message, uint32_t flags, uint64_t user_data) {
    PREPARE(r, user_data, io_uring_prep_recvmsg(sqe, fd, message, flags));
}

bool ciouring_prep_sendmsg(ciouring *r, int fd, const struct msghdr *message, uint32_t flags, uint64_t user_data) {
    PREPARE(r, user_data, io_uring_prep_sendmsg(sqe, fd, message, flags));
}

bool ciouring_prep_poll(ciouring *r, int fd, uint32_t events, uint64_t user_data) {
    PREPARE(r, user_data, io_uring_prep_poll_add(sqe, fd, events));
}

bool ciouring_prep_timeout(ciouring *r, uint64_t nanoseconds, uint64_t user_data) {
    struct io_uring_sqe *sqe = io_uring_get_sqe(&r->ring);
    if (!sqe) return false;
    struct __kernel_timespec *timespec = &r->timespecs[sqe - r->ring.sq.sqes];
    timespec->tv_sec = (int64_t)(nanoseconds / 1000000000u);
    timespec->tv_nsec = (long long)(nanoseconds % 1000000000u);
    io_uring_prep_timeout(sqe, timespec, 0, 0);
    io_uring_sqe_set_data64(sqe, user_data);
    return true;
}

bool ciouring_prep_close(ciouring *r, int fd, uint64_t user_data) {
    PREPARE(r, user_data, io_uring_prep_close(sqe, fd));
}

bool ciouring_prep_cancel(ciouring *r, uint64_t target, uint64_t user_data) {
    PREPARE(r, user_data, io_uring_prep_cancel64(sqe, target, 0));
}

bool ciouring_prep_cancel_all(ciouring *r, int fd, uint64_t user_data) {
    PREPARE(r, user_data,
        io_uring_prep_cancel_fd(sqe, fd, IORING_ASYNC_CANCEL_ALL);
        if (fd < 0) { sqe->fd = -1; sqe->cancel_flags = IORING_ASYNC_CANCEL_ANY; });
}

int ciouring_eventfd(void) {
    int fd = eventfd(0, EFD_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

void ciouring_name_thread(const char *name) { pthread_setname_np(pthread_self(), name); }

int ciouring_block_size_bytes(int fd, uint64_t *bytes) { return ioctl(fd, BLKGETSIZE64, bytes) < 0 ? -errno : 0; }

int ciouring_block_logical_bytes(int fd, uint32_t *bytes) {
    int value = 0;
    if (ioctl(fd, BLKSSZGET, &value) < 0) return -errno;
    *bytes = (uint32_t)value;
    return 0;
}

int ciouring_block_optimal_bytes(int fd, uint32_t *bytes) {
    unsigned value = 0;
    if (ioctl(fd, BLKIOOPT, &value) < 0) return -errno;
    *bytes = value;
    return 0;
}

int ciouring_file_direct_alignment(int fd, uint32_t *bytes) {
    *bytes = 0;
#ifdef STATX_DIOALIGN
    struct statx facts;
    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &facts) < 0) return -errno;
    if (facts.stx_mask & STATX_DIOALIGN) *bytes = facts.stx_dio_offset_align;
#else
    (void)fd;
#endif
    return 0;
}


int ciouring_fallocate(int fd, int mode, uint64_t offset, uint64_t length) {
    return fallocate(fd, mode, (off_t)offset, (off_t)length) < 0 ? -errno : 0;
}

uint32_t ciouring_device_major(uint64_t device) { return major(device); }
uint32_t ciouring_device_minor(uint64_t device) { return minor(device); }
