// Blocks that run at the same time: a cluster, or a block by itself. They share one OS thread.
#pragma once
#include <memory>
#include <vector>

#include "block.hpp"

namespace fusewright_simulator {

class Cluster {
  public:
    void begin_launch(const SimulatorLaunch& launch);
    // Runs cluster number `index`. Returns whether it ended without a failure; `failure` then says which.
    bool run(uint64_t index, SimulatorFailure& failure);

    Clock clock;
    std::vector<BulkLoad> loads;  // in flight, oldest first
    uint64_t progress = 0;        // grows whenever something happens that others may wait for
    bool news = false;            // one of those who gave way saw something new

    size_t size() const { return blocks_.size(); }
    Block& block(unsigned rank) { return *blocks_[rank]; }
    uint64_t index() const { return index_; }
    void synchronise(Thread& thread);
    void check_barrier();
    size_t arrived() const { return arrived_.size(); }
    unsigned live() const;

  private:
    void enter(Block& block);
    bool run_blocks();
    bool land_loads();
    bool time_out();
    bool next_turns(bool waiting);
    void report_deadlock();

    const SimulatorLaunch* launch_ = nullptr;
    std::vector<std::unique_ptr<Block>> blocks_;
    Block* resident_ = nullptr;
    std::vector<Thread*> arrived_;  // at the cluster's barrier
    uint64_t index_ = 0;
    uint64_t idle_turns_ = 0;  // in a row, in which nobody saw anything new
    bool failed_ = false;
};

}  // namespace fusewright_simulator
