// Fibers: one stack for each thread of the block that is running, and the switch between them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fusewright_simulator {

struct Thread;

// A stack is aligned to its size and its last word names the thread that runs on it, so a memory access finds its
// thread from the stack pointer alone, with no thread-local lookup.
constexpr uintptr_t kStackBytes = 256 * 1024;
// The lowest bytes of each cannot be touched: as many as compilers let a function skip without a probe.
constexpr uintptr_t kStackGuardBytes = 64 * 1024;

struct StackTop {
    Thread* thread;
    void* reserved[7];  // keeps the stack below it aligned to 64 bytes
};

inline StackTop* current_stack() {
#if defined(__x86_64__)
    uintptr_t pointer;
    asm("mov %%rsp, %0" : "=r"(pointer));
#else
    auto pointer = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
#endif
    return reinterpret_cast<StackTop*>((pointer | (kStackBytes - 1)) + 1) - 1;
}

// The lowest address of a stack that can be used.
inline uintptr_t lowest(const StackTop* stack) {
    return reinterpret_cast<uintptr_t>(stack + 1) - kStackBytes + kStackGuardBytes;
}

inline Thread* current_thread() { return current_stack()->thread; }

#if defined(__x86_64__)
struct Context {
    void* stack_pointer = nullptr;
};
#else
struct Context {
    ucontext_t state;
};
#endif

// Saves the running context in `from` and goes on with `to`.
void switch_context(Context& from, Context& to);
// Makes `context` start `entry` (which never returns) on `stack`.
void prepare_context(Context& context, StackTop* stack, void (*entry)());

// Hands out stacks, the last one returned first, so that threads which never wait share one warm stack.
class StackPool {
  public:
    ~StackPool();
    StackTop* take();
    void give(StackTop* stack) { free_.push_back(stack); }

  private:
    std::vector<StackTop*> free_;
    std::vector<void*> mappings_;
};

}  // namespace fusewright_simulator
