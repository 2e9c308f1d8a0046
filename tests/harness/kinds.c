/*
 * The kinds of images that the suites go through: a table, nothing else.
 *
 * Clusters are small so that a table, a refcount block and a refcount table have few entries, and
 * that what needs another one is near.
 *
 * SPDX-License-Identifier: MIT
 */
#include "tests/harness/world.h"

#define SECTORS(kib) ((kib) * 2)

const Kind kinds[] = {
    {"v3", "cluster_size=2k", 4, SECTORS(1024), 0},
    {"odd", "cluster_size=16k", 32, SECTORS(1024) + 7, 0},
    {"v2", "cluster_size=2k,compat=0.10", 4, SECTORS(1024), KIND_V2},
    {"512", "cluster_size=512,refcount_bits=64", 1, SECTORS(128), 0},
    {"64k", "cluster_size=64k", 128, SECTORS(2048), 0},
    {"refcount1", "cluster_size=2k,refcount_bits=1", 4, SECTORS(512), KIND_NO_SHARING},
    {"4k", "cluster_size=4k", 8, SECTORS(512), KIND_4K},
    {"4k-small", "cluster_size=2k", 4, SECTORS(512), KIND_4K},
    {"slices", "cluster_size=2k", 4, SECTORS(1024), 0,
     ",l2-cache-entry-size=512,l2-cache-size=2048"},
    {"lazy", "cluster_size=2k,lazy_refcounts=on", 4, SECTORS(512), 0},
    {"ext", "cluster_size=16k,extended_l2=on", 32, SECTORS(1024), KIND_PARTS},
    {"data-file", "cluster_size=2k", 4, SECTORS(512), KIND_DATA_FILE},
    {"data-file-raw", "cluster_size=2k,data_file_raw=on", 4, SECTORS(512), KIND_DATA_FILE},
    {"data-file-ext", "cluster_size=16k,extended_l2=on", 32, SECTORS(1024),
     KIND_DATA_FILE | KIND_PARTS},
    {"bitmap", "cluster_size=2k", 4, SECTORS(512), KIND_BITMAPS},
    /* Bits of two clusters. */
    {"bitmap-512", "cluster_size=512", 1, SECTORS(2304), KIND_BITMAPS | KIND_BIG},
    {"bitmap-snapshot", "cluster_size=2k", 4, SECTORS(256), KIND_BITMAPS | KIND_SNAPSHOT},
    {"bitmap-backing", "cluster_size=16k,extended_l2=on", 32, SECTORS(1024),
     KIND_BITMAPS | KIND_BACKING | KIND_PARTS},
    {"compressed", "cluster_size=4k", 8, SECTORS(512), KIND_COMPRESSED},
    {"snapshot", "cluster_size=2k", 4, SECTORS(512), KIND_SNAPSHOT},
    {"snapshot-v2", "cluster_size=2k,compat=0.10", 4, SECTORS(512),
     KIND_SNAPSHOT | KIND_V2 | KIND_FIXED},
    {"snapshot-ext", "cluster_size=16k,extended_l2=on", 32, SECTORS(1024),
     KIND_SNAPSHOT | KIND_PARTS},
    {"snapshot-512", "cluster_size=512,refcount_bits=32", 1, SECTORS(64), KIND_SNAPSHOT},
    {"snapshot-compressed", "cluster_size=4k", 8, SECTORS(256), KIND_SNAPSHOT | KIND_COMPRESSED},
    {"packed", "cluster_size=4k,refcount_bits=4", 8, SECTORS(256),
     KIND_SNAPSHOT | KIND_COMPRESSED | KIND_TIGHT},
    /* Tables of at least two clusters: the peer cannot open others. */
    {"qed", "cluster_size=4k,table_size=2", 8, SECTORS(512), KIND_QED},
    {"qed-backing", "cluster_size=8k,table_size=2", 16, SECTORS(512), KIND_QED | KIND_BACKING},
    {"backing", "cluster_size=2k", 4, SECTORS(512), KIND_BACKING},
    {"backing-v2", "cluster_size=2k,compat=0.10", 4, SECTORS(512),
     KIND_BACKING | KIND_V2 | KIND_NO_DISCARD},
    {"backing-raw", "cluster_size=4k", 8, SECTORS(512), KIND_BACKING | KIND_RAW_BASE},
    {"backing-odd", "cluster_size=2k", 4, SECTORS(512) + 5, KIND_BACKING},
    {"backing-512", "cluster_size=512,refcount_bits=8", 1, SECTORS(64), KIND_BACKING},
    {"backing-ext", "cluster_size=16k,extended_l2=on", 32, SECTORS(1024),
     KIND_BACKING | KIND_PARTS},
    {"backing-snapshot", "cluster_size=2k", 4, SECTORS(512), KIND_BACKING | KIND_SNAPSHOT},
    {"blocks", "cluster_size=512,refcount_bits=64", 1, SECTORS(64),
     KIND_BACKING | KIND_SNAPSHOT | KIND_BLOCKS},
    {"blocks-v2", "cluster_size=512,compat=0.10", 1, SECTORS(320),
     KIND_BACKING | KIND_SNAPSHOT | KIND_BLOCKS | KIND_V2 | KIND_NO_DISCARD | KIND_FIXED},
    {"backing-compressed", "cluster_size=4k", 8, SECTORS(512), KIND_BACKING | KIND_COMPRESSED},
    {"backing-data-file", "cluster_size=2k", 4, SECTORS(512), KIND_BACKING | KIND_DATA_FILE},
    {"backing-short", "cluster_size=2k", 4, SECTORS(512), KIND_BACKING | KIND_SHORT_BASE},
};

const unsigned nb_kinds = G_N_ELEMENTS(kinds);
