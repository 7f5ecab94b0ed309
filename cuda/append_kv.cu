// New tokens enter a paged cache (append_rows.cuh). A warp takes as many heads of a token as it has lanes for, of queries, keys
// and values in this order. `center` (kv_heads, head_dim), in the basis of the cache, is what keys are stored without; it may
// be null.

#include "chain.cuh"
#include "numbers.cuh"

using Input = INPUT;  // bf16, fp16 or float

#include "append_rows.cuh"

constexpr bool rotates_keys = ROTATE_KEYS;
constexpr int warps = WARPS;

extern "C" __global__ void __launch_bounds__(WARPS * 32)
append_kv(uint8* pool, const Input* query, const Input* key, const Input* value, const float* cos, const float* sin,
          const float* center, const long long* slots, Input* rotated, int heads, int kv_heads, int query_stride, int key_stride, int value_stride) {
    const Place place;
    const int all = heads + 2 * kv_heads, number = (blockIdx.y * warps + threadIdx.x / 32) * heads_of_warp + place.head;
    const bool exists = number < all && place.head < heads_of_warp;
    const int vector = exists ? number : all - 1;  // lanes without a head of their own stay with the warp
    const bool is_query = vector < heads, is_value = vector >= heads + kv_heads;
    allow_next_kernel();
    wait_for_previous_kernel();

    const long long token = blockIdx.x, slot = slots[token];
    const int head = is_query ? vector : (vector - heads) % kv_heads;
    const Input* heads_of_token = is_query   ? query + token * query_stride
                                  : is_value ? value + token * value_stride
                                             : key + token * key_stride;
    Runs runs, turn;
    load_head(runs, heads_of_token + head * head_dim, place);
    load_turn(turn, cos + token * half_head, sin + token * half_head, place);
    const bool is_key = !is_query && !is_value;
    prepare_head(runs, turn, is_query || (rotates_keys && is_key), !is_value, is_key && center ? center + head * head_dim : nullptr, place);
    const Encoded encoded = encode(runs, place);
    if (!exists) return;
    if (is_query) {
        store_head(rotated + (token * heads + head) * head_dim, runs, place);
    } else if (slot >= 0) {
        store_in_page(pool + (slot / page_tokens * kv_heads + head) * page_bytes, static_cast<int>(slot % page_tokens), is_value, encoded, place);
    }
}
