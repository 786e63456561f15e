// The kernel's half of the live tap: marks the blocks of every write at its issue, and knows which writes are in flight.
//
// Issue:      slot of the request's tag := its range; then its bits in issued[index], each word before its summary bit.
// Completion: slot := free. Nothing else: a completion that the kernel skips leaves a slot in use until its tag is issued
//             again, and whatever is in a slot is only read once more than it had to be (docs/decisions/0006).
//
// The order of the stores is what the other half relies on: the slot is visible before any bit is (the atomic OR is a full
// barrier), a word before its summary bit, and all of it before the request reaches the device.
//
// Several copies of the issue program sit on the tracepoint, because the kernel skips a program that interrupts itself: what one
// copy misses, the others see. Marking twice changes nothing; `event` and `seen` of the slot keep the counting single.
//
// Layouts come from the running kernel (CO-RE); only the members used here are declared.
#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "include/clivetap_abi.h"

#define KERNEL_TYPE __attribute__((preserve_access_index))
struct block_device { __u32 bd_dev; } KERNEL_TYPE;
struct gendisk { struct block_device *part0; } KERNEL_TYPE;
struct request_queue { struct gendisk *disk; } KERNEL_TYPE;
struct blk_mq_hw_ctx { unsigned int queue_num; } KERNEL_TYPE;
struct bvec_iter { __u64 bi_sector; unsigned int bi_size; } KERNEL_TYPE;
struct bio { struct bio *bi_next; struct bvec_iter bi_iter; } KERNEL_TYPE;
enum mq_rq_state { MQ_RQ_IDLE = 0 };
struct request {
    struct request_queue *q;
    struct blk_mq_hw_ctx *mq_hctx;
    __u32 cmd_flags;
    int tag;
    unsigned int __data_len;
    __u64 __sector;
    struct bio *bio;
    enum mq_rq_state state;
} KERNEL_TYPE;

// include/linux/blk_types.h: enum req_op, the same since 4.10
enum { OP_READ = 0, OP_WRITE = 1, OP_DISCARD = 3, OP_SECURE_ERASE = 5, OP_ZONE_APPEND = 7, OP_WRITE_ZEROES = 9, OP_DRV_OUT = 35, OP_MASK = 255 };

struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __uint(map_flags, BPF_F_MMAPABLE); __type(key, __u32); __type(value, struct clivetap_state); } state SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, CLIVETAP_DISKS_MAX); __uint(map_flags, BPF_F_MMAPABLE); __type(key, __u32); __type(value, struct clivetap_disk); } disks SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __uint(map_flags, BPF_F_MMAPABLE); __type(key, __u32); __type(value, struct clivetap_slot); } slots SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __uint(map_flags, BPF_F_MMAPABLE); __type(key, __u32); __type(value, __u64); } summary SEC(".maps");
struct chunk { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, CLIVETAP_CHUNK_WORDS); __uint(map_flags, BPF_F_MMAPABLE); __type(key, __u32); __type(value, __u64); };
struct { __uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS); __uint(max_entries, 1); __type(key, __u32); __array(values, struct chunk); } chunks SEC(".maps");

// Everything before these comes before them, on every machine: BPF's atomics are ordered only when their result is asked for, x86's always.
#ifdef __TARGET_ARCH_x86
static __always_inline void set_bits(__u64 *word, __u64 mask) { __sync_fetch_and_or(word, mask); }
static __always_inline void add(__u64 *counter, __u64 n) { __sync_fetch_and_add(counter, n); }
#else
static __always_inline void set_bits(__u64 *word, __u64 mask) {
    __u64 before = __sync_fetch_and_or(word, mask);
    asm volatile("" : : "r"(before));
}
static __always_inline void add(__u64 *counter, __u64 n) {
    __u64 before = __sync_fetch_and_add(counter, n);
    asm volatile("" : : "r"(before));
}
#endif

struct marking {
    __u64 first, last;
    __u64 bio;                                                     // discards of many ranges: the next one,
    __u64 lowest, highest;                                         // and what they span
    __u32 chunk_base, chunk_count;
    __u32 summary_words, index;
    __u32 is_marking;
};

static __always_inline void mark_summary(struct marking *m, __u32 section, __u32 chunk, __u64 block) {
    __u32 bit = (block & ((1 << CLIVETAP_CHUNK_BLOCK_BITS) - 1)) >> CLIVETAP_SUMMARY_BLOCK_BITS;
    __u32 key = section * m->summary_words + (m->chunk_base + chunk) * CLIVETAP_CHUNK_SUMMARY_WORDS + (bit >> 6);
    __u64 *word = bpf_map_lookup_elem(&summary, &key), mask = 1ULL << (bit & 63);
    // Reading first is sound: the word's own OR came before, so whoever has cleared this bit since will see that word.
    if (word && !(*(volatile __u64 *)word & mask)) set_bits(word, mask);
}

// The i-th word that the range touches.
static long mark_word(__u32 i, struct marking *m) {
    __u64 number = (m->first >> 6) + i, from = number << 6;
    __u64 mask = ~0ULL;
    if (from < m->first) mask &= ~0ULL << (m->first & 63);
    if (from + 63 > m->last) mask &= ~0ULL >> (63 - (m->last & 63));
    __u32 chunk = number >> (CLIVETAP_CHUNK_BLOCK_BITS - 6);
    if (chunk >= m->chunk_count) return 0;
    __u32 place = (m->chunk_base + chunk) * 3 + m->index;
    void *map = bpf_map_lookup_elem(&chunks, &place);
    if (!map) {
        mark_summary(m, CLIVETAP_SUMMARY_COARSE + m->index, chunk, from);
        return 0;
    }
    __u32 key = number & (CLIVETAP_CHUNK_WORDS - 1);
    __u64 *word = bpf_map_lookup_elem(map, &key);
    if (!word) return 0;
    set_bits(word, mask);
    mark_summary(m, CLIVETAP_SUMMARY_ISSUED + m->index, chunk, from);
    return 0;
}

static __always_inline void mark(struct marking *m, __u64 first, __u64 last) {
    m->first = first;
    m->last = last;
    __u32 words = (__u32)((last >> 6) - (first >> 6)) + 1;
    if (words == 1) mark_word(0, m);
    else bpf_loop(words, mark_word, m, 0);
}

// A look through an array: for the few disks of a group faster than a hash, and every request of every disk of the machine comes here.
static __always_inline struct clivetap_disk *disk_of(struct request *rq) {
    struct gendisk *gendisk = rq->q->disk;
    if (!gendisk) return 0;
    __u32 device = gendisk->part0->bd_dev;
    for (__u32 i = 0; i < CLIVETAP_DISKS_MAX; i++) {
        __u32 key = i;
        struct clivetap_disk *disk = bpf_map_lookup_elem(&disks, &key);
        if (!disk || !disk->device) return 0;
        if (disk->device == device) return disk;
    }
    return 0;
}

static __always_inline struct clivetap_slot *slot_of(struct clivetap_disk *disk, struct request *rq) {
    __u32 queue = rq->mq_hctx->queue_num;
    int tag = rq->tag;
    if (queue >= disk->queue_count || tag < 0 || tag >= (int)disk->tag_count) return 0;
    __u32 key = disk->slot_base + queue * disk->tag_count + tag;
    return bpf_map_lookup_elem(&slots, &key);
}

static __always_inline int writes(__u32 op) {
    return op == OP_WRITE || op == OP_DISCARD || op == OP_WRITE_ZEROES || op == OP_SECURE_ERASE || op == OP_ZONE_APPEND;
}

static __always_inline int is_dropped(__u64 period, __u64 burst) { return period && bpf_ktime_get_ns() % period < burst; }

// A discard may be of many ranges, one per bio (drivers with max_discard_segments > 1: at most 256). Otherwise its bios are one run,
// and if there are more of them than this looks at, the run itself is marked as well.
#define DISCARD_RANGES_MAX 256
static long mark_bio(__u32 i, struct marking *m) {
    struct bio *bio = (struct bio *)m->bio;
    if (!bio) return 1;
    __u64 sector = BPF_CORE_READ(bio, bi_iter.bi_sector);
    __u32 bytes = BPF_CORE_READ(bio, bi_iter.bi_size);
    if (bytes >= 512) {
        __u64 first = sector >> 3, last = (sector + (bytes >> 9) - 1) >> 3;
        if (first < m->lowest) m->lowest = first;
        if (last > m->highest) m->highest = last;
        if (m->is_marking) mark(m, first, last);
    }
    m->bio = (__u64)BPF_CORE_READ(bio, bi_next);
    return 0;
}

static __always_inline int has_ranges(struct request *rq, __u32 op) { return op == OP_DISCARD && rq->bio && rq->bio->bi_next; }

// A slot's sectors, and what all slots have.
static __always_inline void put(struct clivetap_disk *disk, struct clivetap_slot *slot, __u32 sectors) {
    __u32 before = slot->sectors;
    slot->sectors = sectors;
    if (before != sectors) add((__u64 *)&disk->slot_sectors, (__u64)sectors - before);
}

// Sets `lowest` and `highest`: what the slot names, before anything is marked.
static __always_inline void span(struct marking *m, struct request *rq, __u32 op) {
    __u64 first = rq->__sector >> 3, last = (rq->__sector + (rq->__data_len >> 9) - 1) >> 3;
    m->first = m->lowest = first;
    m->last = m->highest = last;
    if (!has_ranges(rq, op)) return;
    // Its length is that of all ranges together: from the first range on that may lie anywhere, even past the disk's end.
    m->lowest = ~0ULL;
    m->highest = 0;
    m->bio = (__u64)rq->bio;
    m->is_marking = 0;
    bpf_loop(DISCARD_RANGES_MAX, mark_bio, m, 0);
    if (!m->bio && m->lowest <= m->highest) return;
    if (first < m->lowest) m->lowest = first;
    if (last > m->highest) m->highest = last;
}

static __always_inline void mark_request(struct marking *m, struct request *rq, __u32 op) {
    __u64 first = m->first, last = m->last;
    if (has_ranges(rq, op)) {
        m->bio = (__u64)rq->bio;
        m->is_marking = 1;
        bpf_loop(DISCARD_RANGES_MAX, mark_bio, m, 0);
        if (!m->bio) return;
    }
    mark(m, first, last);
}

static __always_inline void prepare(struct marking *m, struct clivetap_disk *disk, struct clivetap_state *s) {
    m->chunk_base = disk->chunk_base;
    m->chunk_count = disk->chunk_count;
    m->summary_words = s->summary_words;
    m->index = *(volatile __u64 *)&s->index & 1;
}

static __always_inline int issue(struct request *rq, __u32 copy) {
    struct clivetap_disk *disk = disk_of(rq);
    if (!disk) return 0;
    __u32 op = rq->cmd_flags & OP_MASK;
    struct clivetap_slot *slot = slot_of(disk, rq);
    if (op == OP_READ) {
        // The tag is free for reads: the write that had it has ended, whether we were told or not.
        if (copy == 0 && slot) {
            if (slot->sectors) {
                add(&disk->overtaken, 1);
                put(disk, slot, 0);
            }
            if (!slot->is_touched) slot->is_touched = 1;
        }
        return 0;
    }
    if (op == OP_DRV_OUT && copy == 0) add(&disk->undescribed, 1);
    __u32 bytes = rq->__data_len;
    if (!writes(op) || bytes < 512) return 0;
    __u32 zero = 0;
    struct clivetap_state *s = bpf_map_lookup_elem(&state, &zero);
    if (!s) return 0;
    if (is_dropped(s->drop_issue_period, s->drop_issue_burst)) {
        if (copy == 0) add(&disk->dropped_issues, 1);
        return 0;
    }

    // The copies run one after the other for one request: one that is behind comes after one that has counted it, and has nothing left to do
    // when the slot is this request's. (One that was skipped before is behind as well, and is then wrong about being late. The next copy
    // is not; and if all were, nobody counts the request, and the kernel's account tells.)
    __u32 sectors = bytes >> 9;
    if (copy > 0 && slot && slot->seen[copy] != slot->event && slot->request == (__u64)rq && slot->sectors == sectors
        && slot->first <= rq->__sector >> 3 && slot->last >= rq->__sector >> 3) {
        slot->seen[copy] = slot->event;
        return 0;
    }
    struct marking m;
    prepare(&m, disk, s);
    span(&m, rq, op);
    int is_new = 1;
    if (slot) {
        is_new = slot->seen[copy] == slot->event;
        if (is_new) {
            if (slot->sectors) add(&disk->overwritten, 1);
            slot->event++;
        }
        slot->seen[copy] = slot->event;
        slot->first = m.lowest;
        slot->last = m.highest;
        slot->request = (__u64)rq;
        put(disk, slot, sectors);
    } else if (copy == 0) {
        add(&disk->unslotted, 1);
    }
    if (copy == 0 && m.highest >= disk->block_count) add(&disk->beyond, 1);
    mark_request(&m, rq, op);
    if (is_new && slot) {
        add(&disk->issued, 1);
        add(&disk->issued_sectors, sectors);
    }
    return 0;
}

SEC("tp_btf/block_rq_issue") int BPF_PROG(issue_0, struct request *rq) { return issue(rq, 0); }
SEC("tp_btf/block_rq_issue") int BPF_PROG(issue_1, struct request *rq) { return issue(rq, 1); }
SEC("tp_btf/block_rq_issue") int BPF_PROG(issue_2, struct request *rq) { return issue(rq, 2); }

SEC("tp_btf/block_rq_complete") int BPF_PROG(complete, struct request *rq, int error, unsigned int bytes) {
    struct clivetap_disk *disk = disk_of(rq);
    if (!disk) return 0;
    __u32 op = rq->cmd_flags & OP_MASK;
    __u32 left = rq->__data_len;
    // What it wrote is there now: whoever compared the disk since its issue has to do so again.
    if (op == OP_DRV_OUT) add(&disk->undescribed, 1);
    if (!writes(op) || left < 512 || !bytes) return 0;
    __u32 zero = 0;
    struct clivetap_state *s = bpf_map_lookup_elem(&state, &zero);
    if (!s) return 0;
    if (is_dropped(s->drop_complete_period, s->drop_complete_burst)) {
        add(&disk->dropped_completions, 1);
        return 0;
    }
    if (bytes < left) {
        add(&disk->partial, 1);                                    // the rest is still to come
        return 0;
    }
    __u32 sectors = left >> 9;
    struct marking m;
    prepare(&m, disk, s);
    span(&m, rq, op);
    struct clivetap_slot *slot = slot_of(disk, rq);
    int is_ours = slot && slot->sectors && slot->request == (__u64)rq && slot->first <= m.lowest && slot->last >= m.highest;
    add(is_ours ? &disk->completed : &disk->unmatched, 1);
    if (slot) put(disk, slot, 0);
    if (is_ours) {
        add(&disk->completed_sectors, sectors);
        return 0;
    }
    // Issued unseen. Too late for whoever has read it meanwhile, but not lost.
    mark_request(&m, rq, op);
    add(&disk->unmatched_sectors, sectors);
    return 0;
}

// It will be issued again, and counted again. Its slot stays: what has reached the device of it is unknown. (A driver may send it back before it has
// started it, as SCSI does when the host is busy: then it was not issued.)
SEC("tp_btf/block_rq_requeue") int BPF_PROG(requeue, struct request *rq) {
    struct clivetap_disk *disk = disk_of(rq);
    if (!disk) return 0;
    __u32 bytes = rq->__data_len;
    if (!writes(rq->cmd_flags & OP_MASK) || bytes < 512 || rq->state == MQ_RQ_IDLE) return 0;
    add(&disk->requeued, 1);
    add(&disk->requeued_sectors, bytes >> 9);
    return 0;
}

char _license[] SEC("license") = "GPL";
