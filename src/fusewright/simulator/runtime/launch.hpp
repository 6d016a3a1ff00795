// The C interface through which Python asks for a launch (mirrored by fusewright/simulator/library.py).
#pragma once
#include <cstddef>
#include <cstdint>

extern "C" {

// Memory that the kernel may touch: one argument's buffer.
struct SimulatorRange {
    uint64_t begin;
    uint64_t bytes;
    const char* name;
    uint64_t writable;
    uint64_t early;  // before the launch before has ended
};

// A variable in shared memory: its offset in the module's thread-local storage. Without a name, it is one of the
// compiler's own, to be left alone.
struct SimulatorVariable {
    uint64_t offset;
    uint64_t bytes;
    const char* name;
};

struct SimulatorLaunch {
    void (*entry)(void* const* arguments);  // calls the kernel once, as one thread
    void* const* arguments;
    char* (*anchor)();  // address of a thread-local variable of the module, for the calling OS thread
    uint64_t anchor_offset;
    const SimulatorRange* ranges;
    uint64_t range_count;
    const SimulatorVariable* variables;
    uint64_t variable_count;
    uint32_t grid[3];
    uint32_t block[3];
    uint32_t cluster[3];  // blocks
    uint32_t registers;   // a thread starts with; 0: not known
    uint64_t seed;     // 0: threads and blocks in their natural order
    uint32_t workers;  // OS threads, each of which runs whole blocks
};

struct SimulatorFailure {
    int32_t kind;  // an index into ERRORS in fusewright/simulator/library.py; 0: none; -1: interrupted
    uint32_t block[3];
    uint32_t thread[3];
    uint64_t pc;         // offset in the module of the instruction at fault; 0: none
    char message[4096];  // `{pc:hex}` stands for the source line of that offset
};

// Runs the launch. Returns 0, or 1 with `failure` filled in.
int fusewright_simulator_launch(const SimulatorLaunch* launch, SimulatorFailure* failure);

}  // extern "C"
