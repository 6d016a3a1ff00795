// ======== host code

using Sizes = std::vector<c10::SymInt>;

// Messages are made without streams: where this is linked with a libstdc++ of its own, as some compilers do, the locales
// of its streams are not those that torch's copy has set up, and numbers crash it.
std::string text(c10::SymIntArrayRef sizes) {
    std::string result;
    for (const c10::SymInt& size : sizes)
        result += (result.empty() ? "" : ", ") + std::to_string(size.guard_int(__FILE__, __LINE__));
    return "[" + result + "]";
}

// Raise where an argument is not what the kernels take, also while a graph is traced, when sizes may be symbols.
void require_rank(const at::Tensor& t, const std::string& name, int64_t rank) {
    TORCH_CHECK(t.dim() == rank, name + " has shape " + text(t.sym_sizes()) + ", but these kernels take " +
                                     std::to_string(rank) + " dimensions");
}

void require_gpu(const at::Tensor& t, const std::string& name) {
    TORCH_CHECK(t.is_cuda() || t.is_meta(),
                name + " is on " + t.device().str() + "; move the model and its inputs to the GPU");
}

void require(const at::Tensor& t, const std::string& name, at::ScalarType dtype, c10::SymIntArrayRef shape,
             c10::Device device) {
    TORCH_CHECK(t.device() == device, name + " is on " + t.device().str() + ", but the model is on " + device.str() +
                                          "; move it there");
    TORCH_CHECK(t.scalar_type() == dtype, name + " is " + c10::toString(t.scalar_type()) +
                                              ", but these kernels take " + c10::toString(dtype));
    TORCH_CHECK(t.sym_sizes() == shape, name + " has shape " + text(t.sym_sizes()) + ", but these kernels take " +
                                            text(shape));
}

// The tensor as the kernels read it: with these strides and 16-byte alignment, copied only if it is not so already.
at::Tensor ready(const at::Tensor& t, at::IntArrayRef strides) {
    bool same = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
    for (int64_t i = 0; i < t.dim(); ++i) same = same && (t.size(i) <= 1 || t.stride(i) == strides[i]);
    return same || t.numel() == 0 ? t : at::empty_strided(t.sizes(), strides, t.options()).copy_(t);
}

template <class T> T* pointer(const at::Tensor& t, int64_t offset = 0) { return static_cast<T*>(t.data_ptr()) + offset; }

// early: the kernel waits for the launch before it itself (launch_before_wait).
struct Shape {
    int64_t x, y, z;  // blocks
    int threads, shared_bytes;
    bool early = true;
    int cluster = 1;
};

// On the current stream; nothing for an empty grid.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Shape& shape, const Arguments&... arguments) {
    if (shape.x == 0 || shape.y == 0 || shape.z == 0) return;
    if (shape.shared_bytes > 48 * 1024)
        C10_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                            cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes));
    cudaLaunchAttribute attributes[2];
    int count = 0;
    if (shape.early && can_overlap()) {
        attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (shape.cluster > 1) {
        attributes[count].id = cudaLaunchAttributeClusterDimension;
        attributes[count].val.clusterDim.x = shape.cluster;
        attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
        ++count;
    }
    cudaLaunchConfig_t config{dim3(shape.x, shape.y, shape.z), dim3(shape.threads), size_t(shape.shared_bytes),
                              c10::cuda::getCurrentCUDAStream(), attributes, unsigned(count)};
    C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}
