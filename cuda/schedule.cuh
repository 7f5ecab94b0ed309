// Which work a cluster does, and in which order.
#pragma once
#include "load.cuh"

// A run of work units of one tile. The units of a tile are its blocks of 128 channels and what it takes to finish it;
// who holds the last unit finishes it.
struct Segment {
    int tile, first, last;
};

// Tiles 0 ... whole - 1 go to the clusters in turn. The units of the others are cut into equal runs, one per cluster
// (stream-K). A cluster begins with the part of its run that leaves a tile unfinished: the next cluster, which
// finishes that tile as its very last work, then finds the partial sums ready. It waits only for clusters before it
// in launch order, so it can't wait for one that never starts.
struct Schedule {
    int units, whole, next_whole, stride;
    int begin, end;

    INLINE Schedule(int tiles, int split_tiles, int units_per_tile, int cluster, int clusters)
        : units(units_per_tile), whole(tiles - split_tiles), next_whole(cluster), stride(clusters) {
        begin = run_begin(split_tiles * units, cluster, clusters);
        end = run_begin(split_tiles * units, cluster + 1, clusters);
    }

    static INLINE int run_begin(int total, int cluster, int clusters) {
        return static_cast<int>(static_cast<long long>(total) * cluster / clusters);
    }

    INLINE bool next(Segment& segment) {
        const bool leaves_unfinished = end % units != 0;
        if (begin < end && (leaves_unfinished || next_whole >= whole)) {
            const int tile = (end - 1) / units, first = max(begin, tile * units);
            segment = {whole + tile, first - tile * units, end - tile * units};
            end = first;
            return true;
        }
        if (next_whole >= whole) return false;
        segment = {next_whole, 0, units};
        next_whole += stride;
        return true;
    }
};
