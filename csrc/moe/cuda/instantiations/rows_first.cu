#include "moe/cuda/tile_launch.cuh"

namespace inlay::moe::cuda {

template void start_row_product<RowProductConfig<__nv_bfloat16, RowStep::kFirst, false>>(const RowProductArguments&,
                                                                                         int64_t, void*);
template void start_row_product<RowProductConfig<__nv_bfloat16, RowStep::kFirst, true>>(const RowProductArguments&,
                                                                                        int64_t, void*);
template void start_row_product<RowProductConfig<__half, RowStep::kFirst, false>>(const RowProductArguments&, int64_t,
                                                                                  void*);
template void start_row_product<RowProductConfig<__half, RowStep::kFirst, true>>(const RowProductArguments&, int64_t,
                                                                                 void*);

}  // namespace inlay::moe::cuda
