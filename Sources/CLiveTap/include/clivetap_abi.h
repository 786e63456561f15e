// What the kernel's half of the live tap (live-tap.bpf.c) and ours (Sources/BlockTap/Live) share: maps that both have in memory,
// and that outlive the process, pinned in bpffs. Any change of meaning here is a new CLIVETAP_ABI.
//
// Maps, by pin name:
//   state     1 × clivetap_state
//   disks     CLIVETAP_DISKS_MAX × clivetap_disk; the first whose `device` is 0 ends the list
//   slots     clivetap_slot, one per tag of every hardware queue of every disk
//   summary   u64 words; 4 sections of state.summary_words each: CLIVETAP_SUMMARY_* (below)
//   chunks    maps of CLIVETAP_CHUNK_WORDS u64 words: at (chunk × 3 + {0, 1: issued, 2: outstanding}); absent until needed
#ifndef CLIVETAP_ABI_H
#define CLIVETAP_ABI_H

#include <linux/types.h>

#define CLIVETAP_ABI 4
#define CLIVETAP_MAGIC 0x3170615465766941ULL                      // "AiveTap1"
#define CLIVETAP_DISKS_MAX 64
#define CLIVETAP_COPIES 3                                          // of the issue program

// A chunk is 2^23 blocks (32 GiB of disk, 1 MiB per bitmap). One bit of the summary covers 4,096 blocks.
#define CLIVETAP_CHUNK_BLOCK_BITS 23
#define CLIVETAP_CHUNK_WORDS (1 << (CLIVETAP_CHUNK_BLOCK_BITS - 6))
#define CLIVETAP_SUMMARY_BLOCK_BITS 12
#define CLIVETAP_CHUNK_SUMMARY_WORDS (1 << (CLIVETAP_CHUNK_BLOCK_BITS - CLIVETAP_SUMMARY_BLOCK_BITS - 6))

// Sections of `summary`. `issued`: some word of these 4,096 blocks may have bits. `coarse`: written while their chunk had no map.
#define CLIVETAP_SUMMARY_ISSUED 0                                  // + index
#define CLIVETAP_SUMMARY_COARSE 2                                  // + index

struct clivetap_state {
    __u64 magic;                                                   // written last: the set of maps and links is complete
    __u32 abi;
    __u32 disk_count;
    __u64 index;                                                   // the buffer that is written: its lowest bit. One for all disks.
    __u64 summary_words;                                           // per section
    // Ours only, here because they must outlive the process.
    __u64 last_epoch;
    __u64 last_acknowledged;                                       // epoch; set before anything is taken from `outstanding` for it
    __u64 is_synced;                                               // `outstanding` says all that the replica lacks
    __u8 instance[16];
    // Deliberate faults (tests): events are dropped while (clock % period) < burst; nanoseconds, 0: none.
    __u64 drop_issue_period, drop_issue_burst;
    __u64 drop_complete_period, drop_complete_burst;
};

struct clivetap_disk {
    __u32 device;                                                  // as the kernel has it: major << 20 | minor; written last
    __u32 chunk_base, chunk_count;
    __u32 slot_base, queue_count, tag_count;                       // slot = slot_base + queue × tag_count + tag
    __u64 block_count;
    // Counters: only ever grow, but for slot_sectors. Each of `issued`, `completed`, `overwritten`, `overtaken`, `unmatched` and `requeued` before the sums that
    // it changes, and `issued` after its slot (LiveReconciliation.swift reads them in the other order).
    __u64 issued, issued_sectors;
    __u64 completed, completed_sectors;                            // whole requests whose issue was seen
    __u64 partial;                                                 // completions of a part
    __u64 overwritten;                                             // a write found its slot in use: a completion was never seen
    __u64 overtaken;                                               // a read found its slot in use: likewise
    __u64 unmatched, unmatched_sectors;                            // completions of what was never seen to be issued
    __u64 requeued, requeued_sectors;                              // of those that had been issued
    __u64 unslotted;                                               // issued with a tag that has no slot
    __u64 beyond;                                                  // writes past the disk's end as it was attached
    __u64 undescribed;                                             // pass-through requests that may have written: at their issue, and again at their end
    __u64 dropped_issues, dropped_completions;                     // by deliberate fault
    __s64 slot_sectors;                                            // the sum of `sectors` of its slots
    // Ours only: the kernel's sectors written and discarded minus ours when nothing was in flight (LiveReconciliation+Baseline.swift).
    __s64 baseline_sectors;
    __u64 is_calibrated;                                           // whether it is known
    __u64 baseline_unmatched;
    __u64 baseline_undescribed;
    __u64 disk_sequence;                                           // /sys/block/*/diskseq: tells a disk from its successor
};

// The write in flight under one tag. In use while `sectors` is not 0.
struct clivetap_slot {
    __u64 first, last;                                             // blocks, both included
    __u64 request;                                                 // the kernel's address of it, as a name
    __u32 sectors;
    __u32 event;                                                   // issues seen on this tag, whichever copy saw them
    __u32 seen[4];                                                 // per copy: `event` when it last ran
    __u64 is_touched;                                              // a read was issued with this tag
    __u64 reserved;
};

#ifndef __bpf__
#ifdef __cplusplus
static_assert(sizeof(struct clivetap_slot) == 64, "");
#else
_Static_assert(sizeof(struct clivetap_slot) == 64, "shared with a program in the kernel");
_Static_assert(sizeof(struct clivetap_disk) == 208, "shared with a program in the kernel");
_Static_assert(sizeof(struct clivetap_state) == 104, "shared with a program in the kernel");
#endif
#endif

#endif
