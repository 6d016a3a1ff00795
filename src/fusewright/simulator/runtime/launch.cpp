#include "launch.hpp"

#include <atomic>
#include <memory>
#include <mutex>
#include <numeric>
#include <thread>
#include <vector>

#include "cluster.hpp"

namespace fusewright_simulator {

namespace {

// Clusters in which no launch runs now: their stacks and shadow memory are kept for the next.
class ClusterPool {
  public:
    std::unique_ptr<Cluster> take() {
        std::lock_guard lock(mutex_);
        if (free_.empty()) return std::make_unique<Cluster>();
        auto cluster = std::move(free_.back());
        free_.pop_back();
        return cluster;
    }
    void give(std::unique_ptr<Cluster> cluster) {
        std::lock_guard lock(mutex_);
        free_.push_back(std::move(cluster));
    }

  private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<Cluster>> free_;
};

ClusterPool& pool() {
    static auto* pool = new ClusterPool;  // never destroyed: other threads may still simulate at exit
    return *pool;
}

// The order of the clusters: turn i runs cluster (start + i * step) % count.
struct Order {
    uint64_t count, start = 0, step = 1;

    Order(uint64_t clusters, uint64_t seed) : count(clusters) {
        if (seed == 1) start = count - 1, step = count - 1;
        if (seed <= 1 || count == 1) return;
        std::mt19937_64 random(seed);
        start = random() % count;
        do step = 1 + random() % count;
        while (std::gcd(step, count) != 1);
    }
    uint64_t cluster(uint64_t turn) const {
        return static_cast<uint64_t>((static_cast<unsigned __int128>(turn) * step + start) % count);
    }
};

}  // namespace

}  // namespace fusewright_simulator

using namespace fusewright_simulator;

int fusewright_simulator_launch(const SimulatorLaunch* launch, SimulatorFailure* failure) {
    uint64_t clusters = 1;
    for (unsigned axis = 0; axis < 3; ++axis) clusters *= launch->grid[axis] / launch->cluster[axis];
    const Order order(clusters, launch->seed);
    // Workers take turns, and each stops at the earliest turn that failed: the report does not depend on their speed.
    std::atomic<uint64_t> first_failure{order.count};
    std::mutex mutex;
    const SignalHandlers handlers;
    auto work = [&](uint64_t worker) {
        const SignalStack stack;
        auto cluster = pool().take();
        cluster->begin_launch(*launch);
        bool sound = true;
        for (uint64_t turn = worker; turn < first_failure.load(); turn += launch->workers) {
            SimulatorFailure mine{};
            if (cluster->run(order.cluster(turn), mine)) continue;
            sound = false;
            std::lock_guard lock(mutex);
            if (turn < first_failure.load()) {
                first_failure.store(turn);
                *failure = mine;
            }
        }
        if (sound) pool().give(std::move(cluster));  // else what it was in the midst of is still in its shadow memory
    };
    std::vector<std::thread> helpers;
    for (uint64_t worker = 1; worker < launch->workers; ++worker) helpers.emplace_back(work, worker);
    work(0);
    for (std::thread& helper : helpers) helper.join();
    return first_failure.load() < order.count;
}
