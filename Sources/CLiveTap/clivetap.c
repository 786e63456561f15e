#define _GNU_SOURCE
#include "clivetap.h"

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/fsmap.h>
#include <linux/loop.h>
#include <linux/membarrier.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

const unsigned char clivetap_program[] __attribute__((aligned(8))) = {
#if __has_include("live-tap-program.h")
#include "live-tap-program.h"
#endif
    0 // so that it is never empty
};
const size_t clivetap_program_bytes = sizeof clivetap_program - 1;

struct clivetap { struct bpf_object *object; };

static char *log_text;
static size_t log_bytes;

static int print(enum libbpf_print_level level, const char *format, va_list arguments) {
    if (level != LIBBPF_WARN || !log_text) return 0;
    size_t used = strlen(log_text);
    if (used + 1 < log_bytes) vsnprintf(log_text + used, log_bytes - used, format, arguments);
    return 0;
}

void clivetap_set_log(char *log, size_t bytes) {
    log_text = log;
    log_bytes = bytes;
    libbpf_set_print(print);
}

int clivetap_open(clivetap **tap) {
    LIBBPF_OPTS(bpf_object_open_opts, options, .object_name = "afterimage_tap");
    struct bpf_object *object = bpf_object__open_mem(clivetap_program, clivetap_program_bytes, &options);
    if (!object) return -errno;
    *tap = calloc(1, sizeof **tap);
    (*tap)->object = object;
    return 0;
}

static struct bpf_map *map_named(clivetap *tap, const char *name) { return bpf_object__find_map_by_name(tap->object, name); }

int clivetap_set_entries(clivetap *tap, const char *map, uint32_t entries) {
    return bpf_map__set_max_entries(map_named(tap, map), entries);
}
int clivetap_load(clivetap *tap) { return bpf_object__load(tap->object); }
int clivetap_map(clivetap *tap, const char *map) { return bpf_map__fd(map_named(tap, map)); }

int clivetap_attach(clivetap *tap, const char *program, const char *pin_path) {
    struct bpf_link *link = bpf_program__attach(bpf_object__find_program_by_name(tap->object, program));
    if (!link) return -errno;
    int result = bpf_link__pin(link, pin_path);
    bpf_link__destroy(link); // its pin keeps it attached
    return result;
}

void clivetap_close(clivetap *tap) {
    bpf_object__close(tap->object);
    free(tap);
}

int clivetap_pin(int fd, const char *path) { return bpf_obj_pin(fd, path) < 0 ? -errno : 0; }

int clivetap_get(const char *path) {
    int fd = bpf_obj_get(path);
    return fd < 0 ? -errno : fd;
}

int clivetap_create_words(uint32_t count) {
    LIBBPF_OPTS(bpf_map_create_opts, options, .map_flags = BPF_F_MMAPABLE);
    int fd = bpf_map_create(BPF_MAP_TYPE_ARRAY, "tap_words", 4, 8, count, &options);
    return fd < 0 ? -errno : fd;
}

int clivetap_put(int map, uint32_t key, uint32_t value) { return bpf_map_update_elem(map, &key, &value, BPF_ANY) < 0 ? -errno : 0; }
int clivetap_look_up(int map, uint32_t key, uint32_t *value) { return bpf_map_lookup_elem(map, &key, value) < 0 ? -errno : 0; }

int clivetap_map_by_id(uint32_t id) {
    int fd = bpf_map_get_fd_by_id(id);
    return fd < 0 ? -errno : fd;
}

int clivetap_map_entries(int map, uint32_t *entries, uint32_t *value_bytes) {
    struct bpf_map_info info = {0};
    uint32_t bytes = sizeof info;
    if (bpf_obj_get_info_by_fd(map, &info, &bytes) < 0) return -errno;
    *entries = info.max_entries;
    *value_bytes = info.value_size;
    return 0;
}

int clivetap_recursion_misses(int link, uint64_t *misses) {
    struct bpf_link_info link_info = {0};
    uint32_t bytes = sizeof link_info;
    if (bpf_obj_get_info_by_fd(link, &link_info, &bytes) < 0) return -errno;
    int program = bpf_prog_get_fd_by_id(link_info.prog_id);
    if (program < 0) return -errno;
    struct bpf_prog_info info = {0};
    bytes = sizeof info;
    int result = bpf_obj_get_info_by_fd(program, &info, &bytes) < 0 ? -errno : 0;
    close(program);
    *misses = info.recursion_misses;
    return result;
}

int clivetap_run_on(int processor) {
    static _Thread_local cpu_set_t before;
    static _Thread_local bool is_moved;
    if (processor < 0) {
        if (!is_moved) return 0;
        is_moved = false;
        return sched_setaffinity(0, sizeof before, &before) < 0 ? -errno : 0;
    }
    if (!is_moved && sched_getaffinity(0, sizeof before, &before) < 0) return -errno;
    is_moved = true;
    cpu_set_t only;
    CPU_ZERO(&only);
    CPU_SET((unsigned)processor % CPU_SETSIZE, &only);
    return sched_setaffinity(0, sizeof only, &only) < 0 ? -errno : 0;
}

// It waits for a grace period of RCU: interrupts, softirqs and tracing programs that ran at the call have ended.
int clivetap_let_processors_pass(void) { return syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) < 0 ? -errno : 0; }

int clivetap_mount_bpffs(const char *path) { return mount("bpf", path, "bpf", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0700") < 0 ? -errno : 0; }

bool clivetap_is_bpffs(const char *path) {
    struct statfs facts;
    return statfs(path, &facts) == 0 && facts.f_type == 0xcafe4a11; // BPF_FS_MAGIC
}

int clivetap_sync(int fd) { return syncfs(fd) < 0 ? -errno : 0; }

// Each in a process of its own: a file system that is still being frozen cannot be thawed before that has ended, and what keeps it from ending may be
// another one of these, which must not wait for it. `thawing`: the process that is at it, per file system; 0, or -1 when it has done it (each is frozen once).
static void thaw_each(const int *fds, int count, pid_t *thawing, int told) {
    for (int i = count - 1; i >= 0; i--) {
        int status = 0;
        if (thawing[i] < 0 || (thawing[i] && waitpid(thawing[i], &status, WNOHANG) == 0)) continue;
        if (thawing[i] && WIFEXITED(status) && WEXITSTATUS(status) == 0) {
            thawing[i] = -1;
            continue;
        }
        thawing[i] = _Fork();
        if (thawing[i] > 0) continue;
        if (thawing[i] == 0) close(told);                          // whoever waits for the guard does not wait for this
        bool is_done = ioctl(fds[i], FITHAW, 0) == 0;
        if (thawing[i] == 0) _exit(!is_done);
        thawing[i] = is_done ? -1 : 0;                                            // no process to be had
    }
}

// What the guard is told. To the first two it answers whether it has thawed nothing so far.
enum { GUARD_KEEP = 'k', GUARD_FOREVER = 'f', GUARD_END = 'e' };
#define GUARD_MAX 1024                                             // file systems

// The guard: only async-signal-safe calls, as after any fork of a process with threads.
static _Noreturn void guard_freeze(const int *fds, int count, int limit_ms, int told) {
    setsid();
    for (int fd = 0; fd < 4096; fd++) {
        bool is_needed = fd == told;
        for (int i = 0; i < count; i++) is_needed |= fd == fds[i];
        if (!is_needed) close(fd); // above all the caller's locks and pipes
    }
    struct pollfd poll_told = {.fd = told, .events = POLLIN};
    bool has_thawed = false, is_forever = false;
    pid_t thawing[GUARD_MAX] = {0};
    for (;;) {
        // A freeze that takes longer than the limit is thawed as soon as it is there: until the caller says that it has ended, or is gone.
        if (poll(&poll_told, 1, is_forever ? -1 : has_thawed ? 5 : limit_ms) <= 0) {
            if (is_forever) continue;
            thaw_each(fds, count, thawing, told);
            has_thawed = true;
            continue;
        }
        char byte;
        if (read(told, &byte, 1) != 1) {
            memset(thawing, 0, sizeof thawing); // one that tried before the freeze was there may not have ended yet
            if (!is_forever) thaw_each(fds, count, thawing, told);
            _exit(0);
        }
        if (byte == GUARD_END) {
            while (wait(NULL) > 0) {}                              // none of them may thaw what is frozen later
            _exit(0);
        }
        if (byte == GUARD_FOREVER && !has_thawed) is_forever = true;
        byte = !has_thawed;
        send(told, &byte, 1, MSG_NOSIGNAL);
    }
}

int clivetap_freeze(const int *fds, int count, int limit_ms, bool *is_frozen, int guard[2], int *failed) {
    *failed = 0;
    if (count > GUARD_MAX) return -E2BIG;
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0) return -errno;
    struct timeval patience = {.tv_sec = 2};
    setsockopt(ends[1], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    pid_t pid = fork();
    if (pid < 0) {
        int error = errno;
        close(ends[0]);
        close(ends[1]);
        return -error;
    }
    if (pid == 0) guard_freeze(fds, count, limit_ms, ends[0]);
    close(ends[0]);
    guard[0] = pid;
    guard[1] = ends[1];
    for (int i = 0; i < count; i++) {
        is_frozen[i] = ioctl(fds[i], FIFREEZE, 0) == 0;
        if (is_frozen[i] || errno == EOPNOTSUPP) continue;
        int error = errno;
        clivetap_thaw(fds, i, is_frozen, guard);
        *failed = i;
        return -error;
    }
    return 0;
}

int clivetap_freeze_keep(const int guard[2], bool forever) {
    char byte = forever ? GUARD_FOREVER : GUARD_KEEP;
    if (send(guard[1], &byte, 1, MSG_NOSIGNAL) != 1) return -ETIMEDOUT;
    if (recv(guard[1], &byte, 1, 0) != 1 || !byte) return -ETIMEDOUT;
    return 0;
}

int clivetap_thaw(const int *fds, int count, const bool *is_frozen, const int guard[2]) {
    int result = 0;
    for (int i = count - 1; i >= 0; i--) {
        if (is_frozen[i] && ioctl(fds[i], FITHAW, 0) < 0) result = -ETIMEDOUT;
    }
    char byte = GUARD_END;
    if (send(guard[1], &byte, 1, MSG_NOSIGNAL) != 1) result = -ETIMEDOUT; // the guard has been killed: what it did is unknown
    close(guard[1]);
    while (waitpid(guard[0], NULL, 0) < 0 && errno == EINTR) {}
    return result;
}

// There is no way to ask but to try.
int clivetap_is_frozen(int fd) {
    if (ioctl(fd, FIFREEZE, 0) == 0) {
        ioctl(fd, FITHAW, 0);
        return 0;
    }
    return errno == EBUSY ? 1 : -errno;
}

void clivetap_thaw_one(int fd) { ioctl(fd, FITHAW, 0); }

void *clivetap_reserve(size_t bytes) {
    void *start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return NULL;
    madvise(start, bytes, MADV_DONTFORK);
    return start;
}
void clivetap_unreserve(void *start, size_t bytes) { munmap(start, bytes); }
void clivetap_give_back(void *start, size_t bytes) { madvise(start, bytes, MADV_DONTNEED); }

// linux/ioprio.h: IOPRIO_WHO_PROCESS is 1; 0 is the calling thread
int clivetap_set_io_priority(int io_class, int level) { return syscall(SYS_ioprio_set, 1, 0, io_class << 13 | level) < 0 ? -errno : 0; }
int clivetap_io_priority(int tid) { return (int)syscall(SYS_ioprio_get, 1, tid); }

#define FSMAP_RECORDS 1024
struct clivetap_fsmap {
    int fd;
    bool is_done;
    struct fsmap_head *head;
};

clivetap_fsmap *clivetap_fsmap_open(int fd) {
    clivetap_fsmap *map = calloc(1, sizeof *map);
    map->fd = fd;
    map->head = calloc(1, fsmap_sizeof(FSMAP_RECORDS));
    memset(&map->head->fmh_keys[1], 0xff, sizeof map->head->fmh_keys[1]);
    map->head->fmh_keys[1].fmr_length = 0;
    memset(map->head->fmh_keys[1].fmr_reserved, 0, sizeof map->head->fmh_keys[1].fmr_reserved);
    return map;
}

int clivetap_fsmap_next(clivetap_fsmap *map, clivetap_extent *extents, uint32_t capacity) {
    if (map->is_done) return 0;
    struct fsmap_head *head = map->head;
    head->fmh_count = capacity < FSMAP_RECORDS ? capacity : FSMAP_RECORDS;
    head->fmh_entries = 0;
    if (ioctl(map->fd, FS_IOC_GETFSMAP, head) < 0) return -errno;
    for (uint32_t i = 0; i < head->fmh_entries; i++) {
        const struct fsmap *record = &head->fmh_recs[i];
        extents[i] = (clivetap_extent){
            .start_bytes = record->fmr_physical,
            .length_bytes = record->fmr_length,
            .major = record->fmr_device >> 8 & 0xfff, // as the kernel encodes a device in 32 bits
            .minor = (record->fmr_device & 0xff) | (record->fmr_device >> 12 & 0xfff00),
            .has_device = head->fmh_oflags & FMH_OF_DEV_T,
            .is_free = record->fmr_flags & FMR_OF_SPECIAL_OWNER && record->fmr_owner == FMR_OWN_FREE,
        };
        if (record->fmr_flags & FMR_OF_LAST) map->is_done = true;
    }
    if (head->fmh_entries == 0) map->is_done = true;
    else fsmap_advance(head);
    return (int)head->fmh_entries;
}

void clivetap_fsmap_close(clivetap_fsmap *map) {
    free(map->head);
    free(map);
}

int clivetap_loop_create(uint64_t bytes, int *number, int *device) {
    int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
    if (control < 0) return -errno;
    char name[48];
    snprintf(name, sizeof name, "afterimage-self-test-%d", (int)getpid());
    int file = memfd_create(name, MFD_CLOEXEC), result = 0;
    if (file < 0 || ftruncate(file, (off_t)bytes) < 0) result = -errno;
    // Somebody else may take the free number first.
    for (int attempt = 0; result == 0; attempt++) {
        if ((*number = ioctl(control, LOOP_CTL_GET_FREE)) < 0) { result = -errno; break; }
        char path[32];
        snprintf(path, sizeof path, "/dev/loop%d", *number);
        *device = open(path, O_RDWR | O_CLOEXEC | O_DIRECT);
        if (*device < 0) { result = -errno; break; }
        struct loop_config config = {.fd = (__u32)file, .info = {.lo_flags = LO_FLAGS_AUTOCLEAR}};
        if (ioctl(*device, LOOP_CONFIGURE, &config) == 0) break;
        if (errno != EBUSY || attempt == 63) result = -errno;
        close(*device);
    }
    if (file >= 0) close(file);
    close(control);
    return result;
}

int clivetap_discard(int fd, uint64_t offset, uint64_t length) {
    uint64_t range[2] = {offset, length};
    return ioctl(fd, BLKDISCARD, range) < 0 ? -errno : 0;
}
