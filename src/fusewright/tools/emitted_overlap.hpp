// ======== for the host code

// Whether a launch may begin while the one before it still ends: whether all kernels here are compiled for chips that can,
// and so wait. What they were compiled for counts, not the chip, which may run code for an older one.
bool can_overlap() {
#if defined(__CUDA_ARCH_LIST__)
    for (int arch : {__CUDA_ARCH_LIST__})
        if (arch < 900) return false;
    return true;
#else
    return false;
#endif
}
