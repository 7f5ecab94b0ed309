// Many queries of each sequence attend to a paged cache, causally, by warpgroup MMAs. Channels of restored tiles stand in
// the order in which words of codes unpack; queries do so too, and results are put in order on their way out.

#include "attention_prefill_sm90a_consume.cuh"
#include "attention_prefill_sm90a_produce.cuh"

extern __shared__ __align__(1024) uint8 shared_bytes[];

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_prefill_sm90a(const Query* query, const uint8* pool, const int* page_table, const int* query_starts, const int* lengths,
                        const float* value_bias, Query* out, int* counters, int sequences, int heads, int kv_heads, int max_pages,
                        int query_stride, int window, int blocks, float slope) {
    const Problem problem = {query, pool, page_table, query_starts, lengths, value_bias, out, counters,
                             sequences, heads, kv_heads, max_pages, query_stride, window, blocks, slope};
    const Shared shared = {shared_bytes};
    const int group = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0);  // the same in a warp, and known to be

    allow_next_kernel();
    if (threadIdx.x == 0) shared.init_barriers();
    __syncthreads();
    wait_for_previous_kernel();
    if (group < GROUPS) {
        take_registers<CONSUMER_REGISTERS>();
        Consumer(problem, shared, group).run();
    } else {
        give_registers<PRODUCER_REGISTERS>();
        if (group == GROUPS) KeyProducer(problem, shared).run();
        else ValueProducer(problem, shared).run();
    }
}
