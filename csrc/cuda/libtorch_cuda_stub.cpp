// Stands in for libtorch_cuda.so at link time, so that _ops_cuda.so can be built beside a CPU-only
// torch. It only lends its name to the list of needed libraries; at run time torch's own, loaded
// before, is found.
extern "C" __attribute__((visibility("default"))) int aoti_torch_get_current_cuda_stream(int,
                                                                                         void**) {
  return 1;
}
