// recorder: the workload of the quickstart's machine, and the check of what it left.
//
//   recorder check DIR            verifies everything below and prints one line; exit 0 = good, 1 = bad
//   recorder record DIR RATE KIBS appends RATE records a second and writes KIBS KiB/s of bulk data, for ever
//
// records   a ring of 256-byte records. Record n is written at slot (n-1) % ringRecords and fsynced before record n+1 is
//           begun; "AFTERIMAGE-ACK n" appears on stdout only after that. A record never crosses a 512-byte sector, and
//           disks write sectors whole, so an interrupted write leaves the old record or the new one, never a mixture.
// rewrites  now and then an old record is rewritten in place with its version raised by one, and fsynced. The next record
//           then carries (number, version) of the last rewrite known durable: whoever finds that record must find the
//           rewrite as well. That is the order which a replica has to keep.
// bulk      slots of 256 KiB, rewritten in turn by a second process; each 512-byte sector is numbered and summed by itself,
//           because a slot may be caught half written. The last slot known durable is carried by the records, too.
//
// The check: every sum is right; no record is missing; nothing is older than a record that was written after it says.
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

enum { ringRecords = 131072, rewriteEvery = 4, ackIntervalMs = 100, bulkSlots = 64, slotSectors = 512, sectorBytes = 512 };

struct record {
    uint64_t magic, number, version, timeNs;
    uint64_t rewrittenNumber, rewrittenVersion; // the last rewrite that was durable before this record was begun
    uint64_t bulkSequence;                      // the last bulk slot that was durable then
    uint64_t payload[24];
    uint64_t sum;
};
_Static_assert(sizeof(struct record) == 256, "two records to a sector");

struct sector {
    uint64_t magic, sequence, index; // index within the slot
    uint64_t payload[60];
    uint64_t sum;
};
_Static_assert(sizeof(struct sector) == sectorBytes, "a sector");

static const uint64_t recordMagic = 0x4452434552414649, sectorMagic = 0x4b4c554252414649;

static uint64_t sum64(const void *data, size_t words) {
    const uint64_t *p = data;
    uint64_t h = 0x9e3779b97f4a7c15;
    for (size_t i = 0; i < words; i++) {
        h = (h ^ p[i]) * 0xff51afd7ed558ccd;
        h ^= h >> 32;
    }
    return h;
}
static uint64_t mix(uint64_t x) {
    x ^= x >> 31;
    x *= 0xbf58476d1ce4e5b9;
    return x ^ x >> 29;
}
static uint64_t nowNs(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static int failed(const char *format, ...) {
    va_list a;
    va_start(a, format);
    printf("AFTERIMAGE-CHECK FAILED ");
    vprintf(format, a);
    printf("\n");
    va_end(a);
    return 1;
}
static void fatal(const char *what) {
    printf("AFTERIMAGE-RECORDER FAILED %s: %s\n", what, strerror(errno));
    exit(1);
}

// --- check -----------------------------------------------------------------------------------------------------------
struct found {
    struct record *records; // ring
    uint64_t slots, last, rewrites, truncated;
    uint64_t bulkLast; // highest sequence in any slot; it may be half written; 0 before the first round
};

static int readAll(int fd, void *to, size_t count) {
    for (size_t done = 0; done < count;) {
        ssize_t r = pread(fd, (char *)to + done, count - done, done);
        if (r <= 0) return -1;
        done += r;
    }
    return 0;
}

static int recordGood(const struct record *r) {
    return r->magic == recordMagic && r->sum == sum64(r, 31);
}

// The number that slot i must hold when `last` is the newest record.
static uint64_t expectedNumber(uint64_t i, uint64_t last) { return last - (last - 1 - i) % ringRecords; }

static int checkRecords(int dir, struct found *f) {
    int fd = openat(dir, "records", O_RDWR | O_CREAT, 0644);
    struct stat st;
    if (fd < 0 || fstat(fd, &st)) return failed("cannot open the records: %s", strerror(errno));
    uint64_t bytes = st.st_size;
    f->slots = bytes / sizeof(struct record);
    f->records = calloc(ringRecords + 1, sizeof(struct record));
    if (f->slots > ringRecords) return failed("the file of records is too long: %llu bytes", (unsigned long long)bytes);
    if (readAll(fd, f->records, f->slots * sizeof(struct record))) return failed("cannot read the records: %s", strerror(errno));
    // Only the newest record of a ring that has not yet come round may be incomplete: it was never acknowledged.
    if (f->slots && f->slots < ringRecords && bytes % sizeof(struct record) == 0 && !recordGood(&f->records[f->slots - 1])) f->slots--;
    if (bytes != f->slots * sizeof(struct record)) {
        f->truncated = 1;
        if (ftruncate(fd, f->slots * sizeof(struct record)) || fsync(fd)) return failed("cannot truncate: %s", strerror(errno));
    }
    close(fd);
    for (uint64_t i = 0; i < f->slots; i++) {
        if (!recordGood(&f->records[i])) return failed("bad sum in the record at slot %llu of %llu", (unsigned long long)i, (unsigned long long)f->slots);
        if (f->records[i].number > f->last) f->last = f->records[i].number;
    }
    for (uint64_t i = 0; i < f->slots; i++) {
        uint64_t expected = expectedNumber(i, f->last), number = f->records[i].number;
        if (number != expected)
            return failed("record %llu is missing (slot %llu holds record %llu, the last is %llu)", (unsigned long long)expected, (unsigned long long)i,
                          (unsigned long long)number, (unsigned long long)f->last);
        f->rewrites += f->records[i].version;
    }
    for (uint64_t i = 0; i < f->slots; i++) {
        const struct record *r = &f->records[i];
        if (!r->rewrittenNumber) continue;
        const struct record *old = &f->records[(r->rewrittenNumber - 1) % ringRecords];
        if (old->number == r->rewrittenNumber && old->version < r->rewrittenVersion)
            return failed("record %llu is at version %llu, but record %llu was written after its version %llu was durable", (unsigned long long)old->number,
                          (unsigned long long)old->version, (unsigned long long)r->number, (unsigned long long)r->rewrittenVersion);
    }
    return 0;
}

static int checkBulk(int dir, struct found *f) {
    static struct sector slot[slotSectors];
    uint64_t durable = 0, lowest[bulkSlots], highest[bulkSlots] = {0};
    for (uint64_t i = 0; i < f->slots; i++)
        if (f->records[i].bulkSequence > durable) durable = f->records[i].bulkSequence;
    int fd = openat(dir, "bulk", O_RDONLY);
    if (fd < 0 && errno == ENOENT && durable == 0) return 0; // the first round was not finished
    if (fd < 0) return failed("cannot open the bulk data: %s", strerror(errno));
    for (uint64_t s = 0; s < bulkSlots; s++) {
        if (pread(fd, slot, sizeof slot, s * sizeof slot) != sizeof slot) return failed("cannot read bulk slot %llu", (unsigned long long)s);
        lowest[s] = ~0ull;
        for (uint64_t i = 0; i < slotSectors; i++) {
            struct sector *x = &slot[i];
            if (x->magic != sectorMagic || x->index != i || x->sum != sum64(x, 63) || x->sequence % bulkSlots != s)
                return failed("bad sector %llu in bulk slot %llu", (unsigned long long)i, (unsigned long long)s);
            if (x->sequence < lowest[s]) lowest[s] = x->sequence;
            if (x->sequence > highest[s]) highest[s] = x->sequence;
        }
        if (highest[s] > f->bulkLast) f->bulkLast = highest[s];
    }
    close(fd);
    for (uint64_t s = 0; s < bulkSlots; s++) {
        uint64_t wanted = durable ? durable - (durable - s) % bulkSlots : 0; // the newest durable sequence of this slot
        if (lowest[s] < wanted)
            return failed("bulk slot %llu holds sequence %llu, but %llu was durable", (unsigned long long)s, (unsigned long long)lowest[s], (unsigned long long)wanted);
        if (highest[s] != lowest[s] && highest[s] != f->bulkLast) return failed("bulk slot %llu is half written, but is not the last", (unsigned long long)s);
    }
    return 0;
}

static int check(int dir, struct found *f) { return checkRecords(dir, f) || checkBulk(dir, f); }

// --- record ----------------------------------------------------------------------------------------------------------
static volatile uint64_t *bulkDurable; // shared with the bulk process

static void writeSlot(int fd, uint64_t sequence) {
    static struct sector slot[slotSectors];
    for (uint64_t i = 0; i < slotSectors; i++) {
        struct sector *x = &slot[i];
        x->magic = sectorMagic, x->sequence = sequence, x->index = i;
        for (int w = 0; w < 60; w++) x->payload[w] = mix(sequence * slotSectors * 64 + i * 64 + w);
        x->sum = sum64(x, 63);
    }
    if (pwrite(fd, slot, sizeof slot, sequence % bulkSlots * sizeof slot) != sizeof slot) fatal("writing bulk data");
    if (fsync(fd)) fatal("fsync of bulk data");
}

static void bulkProcess(int dir, uint64_t sequence, uint64_t kibs) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int fd = openat(dir, "bulk", O_RDWR);
    uint64_t due = nowNs(CLOCK_MONOTONIC), periodNs = slotSectors * sectorBytes / 1024 * 1000000000ull / kibs;
    for (;;) {
        writeSlot(fd, ++sequence);
        __atomic_store_n(bulkDurable, sequence, __ATOMIC_RELEASE);
        due += periodNs;
        uint64_t now = nowNs(CLOCK_MONOTONIC);
        if (due < now) due = now;
        struct timespec t = {due / 1000000000, due % 1000000000};
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, 0);
    }
}

static void store(int fd, struct record *r) {
    for (int w = 0; w < 24; w++) r->payload[w] = mix(r->number * 4096 + r->version * 32 + w);
    r->sum = sum64(r, 31);
    if (pwrite(fd, r, sizeof *r, (r->number - 1) % ringRecords * sizeof *r) != sizeof *r) fatal("writing a record");
    if (fsync(fd)) fatal("fsync of the records");
}

// The first round goes to another name, so that "bulk" is there whole or not at all.
static uint64_t firstRound(int dir) {
    int fd = openat(dir, "bulk.new", O_RDWR | O_CREAT | O_TRUNC, 0644);
    if (fd < 0) fatal("creating the bulk data");
    for (uint64_t s = bulkSlots; s < 2 * bulkSlots; s++) writeSlot(fd, s);
    if (renameat(dir, "bulk.new", dir, "bulk") || fsync(dir)) fatal("publishing the bulk data");
    close(fd);
    return 2 * bulkSlots - 1;
}

static void record(int dir, struct found *f, uint64_t rate, uint64_t kibs) {
    // The newest slot may be half written: it is written again before any other.
    uint64_t sequence = f->bulkLast ? f->bulkLast - 1 : firstRound(dir);
    bulkDurable = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int fd = openat(dir, "records", O_RDWR);
    if (bulkDurable == MAP_FAILED || fd < 0) fatal("opening the records");
    if (fsync(dir)) fatal("fsync of the directory");
    if (kibs && fork() == 0) bulkProcess(dir, sequence, kibs);

    uint64_t random = nowNs(CLOCK_REALTIME), due = nowNs(CLOCK_MONOTONIC), printed = 0, rewrittenNumber = 0, rewrittenVersion = 0;
    for (uint64_t n = f->last + 1;; n++) {
        struct record *r = &f->records[(n - 1) % ringRecords];
        *r = (struct record){.magic = recordMagic, .number = n, .timeNs = nowNs(CLOCK_REALTIME), .rewrittenNumber = rewrittenNumber,
                             .rewrittenVersion = rewrittenVersion, .bulkSequence = __atomic_load_n(bulkDurable, __ATOMIC_ACQUIRE)};
        store(fd, r);
        uint64_t now = nowNs(CLOCK_MONOTONIC);
        if (now - printed >= ackIntervalMs * 1000000ull) {
            printf("AFTERIMAGE-ACK %llu\n", (unsigned long long)n);
            printed = now;
        }
        if (n % rewriteEvery == 0) {
            random = mix(random + n);
            uint64_t window = n < ringRecords / 2 ? n : ringRecords / 2; // far from the end that is being overwritten
            struct record *old = &f->records[(n - 1 - random % window) % ringRecords];
            old->version++;
            store(fd, old);
            rewrittenNumber = old->number, rewrittenVersion = old->version;
        }
        due += 1000000000ull / rate;
        now = nowNs(CLOCK_MONOTONIC);
        if (due < now) due = now;
        struct timespec t = {due / 1000000000, due % 1000000000};
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, 0);
    }
}

int main(int count, char **argument) {
    setvbuf(stdout, 0, _IOLBF, 0);
    if (count < 3) return fprintf(stderr, "usage: recorder check DIR | record DIR RATE KIBS\n"), 2;
    int dir = open(argument[2], O_RDONLY | O_DIRECTORY);
    if (dir < 0) fatal(argument[2]);
    struct found f = {0};
    if (check(dir, &f)) return 1;
    if (!strcmp(argument[1], "check")) {
        printf("records=%llu last=%llu rewrites=%llu bulk=%llu%s\n", (unsigned long long)f.slots, (unsigned long long)f.last, (unsigned long long)f.rewrites,
               (unsigned long long)f.bulkLast, f.truncated ? " truncated=1" : "");
        return 0;
    }
    uint64_t rate = count > 3 ? strtoull(argument[3], 0, 10) : 40, kibs = count > 4 ? strtoull(argument[4], 0, 10) : 512;
    if (rate < 1 || rate > 1000 || kibs > 1 << 20) return fprintf(stderr, "recorder: RATE is 1 to 1000 a second, KIBS at most 1048576\n"), 2;
    record(dir, &f, rate, kibs);
}
