// Signals while a launch runs: a fault of a kernel becomes the launch's failure, and an interrupt (SIGINT) ends it.
#pragma once
#include <signal.h>

#include <cstdint>
#include <memory>

namespace fusewright_simulator {

struct Thread;

// The thread whose fiber runs on this OS thread, or null. initial-exec: a handler can read it without an allocation.
extern thread_local Thread* running __attribute__((tls_model("initial-exec")));

// What a signal found in a fiber. pc: of the kernel, as return addresses are counted; null: not known.
struct Fault {
    int signal;
    uintptr_t address;
    const char* pc;
    bool call;     // there is no code at the address
    bool smashed;  // the thread has written beyond its stack
};

// Whether an interrupt came since the first of the launches that run now began.
bool interrupted();

// While any lives, the signals are handled; what does not come from a fiber goes to the handlers before.
class SignalHandlers {
  public:
    SignalHandlers();
    ~SignalHandlers();
    SignalHandlers(const SignalHandlers&) = delete;
};

// While it lives, handlers have a stack on this OS thread (a fiber's may be what overflowed), and interrupts reach it.
class SignalStack {
  public:
    SignalStack();
    ~SignalStack();
    SignalStack(const SignalStack&) = delete;

  private:
    std::unique_ptr<char[]> memory_;
    stack_t before_;
    int slot_;
};

}  // namespace fusewright_simulator
