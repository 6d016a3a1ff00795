// Which accesses to shared memory are ordered before which, in the blocks of one cluster.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace fusewright_simulator {

// What accesses shared memory in its own time: a thread, the asynchronous side of a warp, or the copies of an mbarrier.
struct Agent {
    uint32_t id;    // within the cluster
    uint16_t rank;  // of its block in the cluster
    uint32_t clock;  // see Clock
};

// Stamps of other agents' accesses, by agent: the latest that is known to have happened, and the latest between which
// and now lies a proxy fence as well. Missing entries are 0.
struct Knowledge {
    std::vector<uint32_t> seen, fenced;

    void join(const Knowledge& other);
    void clear();
};

// Order is kept as in vector clocks (Mattern 1989), with last accesses as single stamps where that loses nothing
// (FastTrack: Flanagan and Freund, PLDI 2009). Every synchronisation is one tick. An access is stamped with its agent's
// `clock`, the tick of the agent's last synchronisation. Whatever a block did up to its `floor` happened before a
// barrier of the whole block; what happened before a narrower synchronisation is in `known_`.
class Clock {
  public:
    // Agents of block `rank` are rank * stride and on.
    void begin(size_t blocks, size_t stride);

    enum class Extent { kSome, kBlock, kCluster };
    // `acquirers` come to know all that `releasers` knew and did. extent: together they are a whole block, or cluster.
    template <class A>
    void synchronise(const std::vector<A*>& releasers, const std::vector<A*>& acquirers, Extent extent) {
        before_ = tick_++;
        joined_.clear();
        // A floor tells all of a block's agents what the others did, but not what they knew of other blocks.
        const bool join = extent == Extent::kSome || fences_ || (narrow_ && floors_.size() > 1);
        if (join)
            for (const A* agent : releasers) collect(*agent, joined_);
        if (extent != Extent::kSome) raise_floor(extent, acquirers[0]->rank);
        if (join)
            for (const A* agent : acquirers) learn(*agent, joined_);
        for (A* agent : releasers) agent->clock = tick_;
        for (A* agent : acquirers) agent->clock = tick_;
    }
    // The two halves of a synchronisation through something that lasts.
    void release(Agent& by, Knowledge& into);
    void acquire(const Agent& by, const Knowledge& from) { learn(by, from); }
    // What `by` knows of and did becomes visible to the asynchronous proxy.
    void fence(Agent& by);
    // A stamp for what `by` does now, later than all before.
    uint32_t stamp(Agent& by) { return by.clock = ++tick_; }

    // Whether an access at `stamp` by agent `other` of block `rank` happened before what `self` does now.
    bool ordered(const Agent& self, unsigned rank, uint32_t other, uint32_t stamp) const {
        return stamp <= floor(self, rank) || self.id == other || (narrow_ && at(known_[self.id].seen, other) >= stamp);
    }
    // Whether a proxy fence lies between the two as well.
    bool fenced(const Agent& self, uint32_t other, uint32_t stamp) const {
        return fences_ && at(known_[self.id].fenced, other) >= stamp;
    }
    // All that `self` may know of block `rank` without looking further.
    uint32_t floor(const Agent& self, unsigned rank) const { return self.rank == rank ? floors_[rank] : shared_floor_; }
    uint32_t birth() const { return birth_; }  // stamps before it belong to earlier blocks
    uint32_t now() const { return tick_; }
    size_t stride() const { return stride_; }

  private:
    static uint32_t at(const std::vector<uint32_t>& stamps, size_t i) { return i < stamps.size() ? stamps[i] : 0; }
    void collect(const Agent& agent, Knowledge& into) const;
    void learn(const Agent& agent, const Knowledge& from);
    void raise_floor(Extent extent, unsigned rank);

    uint32_t tick_ = 1, before_ = 0, birth_ = 1;
    uint32_t shared_floor_ = 0;     // of barriers of the whole cluster
    std::vector<uint32_t> floors_;  // by block
    size_t stride_ = 0;
    bool narrow_ = false;  // some synchronisation was narrower than a block
    bool fences_ = false;  // there was a proxy fence
    std::vector<Knowledge> known_;  // by agent
    Knowledge joined_;
};

}  // namespace fusewright_simulator
