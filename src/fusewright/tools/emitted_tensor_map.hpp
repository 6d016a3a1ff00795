// The driver's function, asked for by name: nothing more has to be linked.
decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
    C10_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status));
#else
    C10_CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status));
#endif
    TORCH_CHECK(found && status == cudaDriverEntryPointSuccess, "these kernels need a driver of CUDA 12.0 or later");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

// Tells the copy engine (TMA) where boxes of a tensor lie: extents, the innermost first; strides of the others.
template <class T, size_t rank>
fusewright::TensorMap tensor_map(T* start, CUtensorMapDataType type, const int64_t (&extents)[rank],
                                 const int64_t (&strides)[rank - 1], const uint32_t (&box)[rank],
                                 CUtensorMapSwizzle swizzle) {
    static_assert(sizeof(fusewright::TensorMap) == sizeof(CUtensorMap));
    static const auto encode = tensor_map_encoder();
    fusewright::TensorMap map{};
    cuuint64_t dims[rank], bytes[rank];
    cuuint32_t steps[rank];
    for (size_t i = 0; i < rank; ++i) {
        if (extents[i] == 0) return map;  // nothing is ever copied
        dims[i] = extents[i];
        bytes[i] = i == 0 ? sizeof(T) : strides[i - 1] * sizeof(T);
        steps[i] = 1;
    }
    const CUresult result =
        encode(reinterpret_cast<CUtensorMap*>(&map), type, rank, start, dims, bytes + 1, box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    TORCH_CHECK(result == CUDA_SUCCESS, "the driver refuses a tensor map: CUDA error " + std::to_string(result));
    return map;
}
