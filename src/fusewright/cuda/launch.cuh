// Launches that overlap (programmatic dependent launch, PTX ISA "griddepcontrol"): a kernel begins as soon as the last
// blocks of the one before it have left, which hides what a launch costs, and waits for it before it touches memory.
// The simulator has its own version of this file.
#pragma once

namespace fusewright {

// Waits until the launch before has ended, and all that it wrote is there. Every thread of every kernel whose
// `LaunchSpec.early` is set comes here: so a launch that has ended tells that all those before it have. Elsewhere, and
// before Hopper, there is nothing to wait for.
__device__ __forceinline__ void launch_before_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next launch begin once every block of this one has come here or left. Only where the next one has something
// to do meanwhile: one that merely waits has been seen to slow this one.
__device__ __forceinline__ void launch_after_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace fusewright
