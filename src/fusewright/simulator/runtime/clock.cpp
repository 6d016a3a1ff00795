#include "clock.hpp"

#include <algorithm>

namespace fusewright_simulator {

namespace {

void join_stamps(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
    if (into.size() < from.size()) into.resize(from.size());
    for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

void raise(std::vector<uint32_t>& stamps, size_t i, uint32_t stamp) {
    if (stamps.size() <= i) stamps.resize(i + 1);
    stamps[i] = std::max(stamps[i], stamp);
}

}  // namespace

void Knowledge::join(const Knowledge& other) {
    join_stamps(seen, other.seen);
    join_stamps(fenced, other.fenced);
}

void Knowledge::clear() {
    seen.clear();
    fenced.clear();
}

void Clock::begin(size_t blocks, size_t stride) {
    if (narrow_ || fences_ || blocks * stride != known_.size()) {
        known_.resize(blocks * stride);
        for (Knowledge& knowledge : known_) knowledge.clear();
    }
    stride_ = stride;
    narrow_ = fences_ = false;
    shared_floor_ = tick_;
    floors_.assign(blocks, tick_);
    birth_ = ++tick_;
}

void Clock::collect(const Agent& agent, Knowledge& into) const {
    into.join(known_[agent.id]);
    raise(into.seen, agent.id, agent.clock);
}

void Clock::learn(const Agent& agent, const Knowledge& from) {
    narrow_ = true;
    known_[agent.id].join(from);
}

void Clock::raise_floor(Extent extent, unsigned rank) {
    if (extent == Extent::kCluster) {
        shared_floor_ = before_;
        std::fill(floors_.begin(), floors_.end(), before_);
    } else {
        floors_[rank] = before_;
    }
}

void Clock::release(Agent& by, Knowledge& into) {
    collect(by, into);
    // What the whole block did is known to each of its agents, but not to others.
    const size_t base = by.rank * stride_;
    raise(into.seen, base + stride_ - 1, 0);
    for (size_t i = base; i < base + stride_; ++i) into.seen[i] = std::max(into.seen[i], floors_[by.rank]);
    by.clock = ++tick_;
}

void Clock::fence(Agent& by) {
    Knowledge& known = known_[by.id];
    Knowledge all;
    release(by, all);
    join_stamps(known.fenced, all.seen);
    fences_ = true;
}

}  // namespace fusewright_simulator
