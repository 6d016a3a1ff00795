// The same with blocks in clusters of so many.
template <class... Parameters, class... Arguments>
void launch_clusters(int cluster, void (*kernel)(Parameters...), int64_t x, int64_t y, int64_t z, int threads,
                     int shared_bytes, Arguments... arguments) {
    if (x == 0 || y == 0 || z == 0) return;
    C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{dim3(x, y, z), dim3(threads), size_t(shared_bytes), c10::cuda::getCurrentCUDAStream(),
                              &attribute, 1};
    C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}
