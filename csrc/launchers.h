// What csrc computes: the arguments of each operation, and its launcher on each device.
//
// Letters: T tokens, V columns of the logits here, S sequences. Arrays are contiguous but for the rows of a Matrix.
// Arguments were checked by the caller (gspo_megatron/ops/checks.py); nothing here allocates or waits.
#pragma once

#include <cstdint>

namespace gspo {

enum class Dtype : int { float64 = 0, float32 = 1, bfloat16 = 2, float16 = 3 };

struct Matrix {
    void* data;
    Dtype dtype;
    int64_t rows, columns;
    int64_t stride;  // elements from one row to the next
};

// The columns of the softmax that are here. Columns from `width` on are padding: never read.
struct Shard {
    int64_t start;  // vocabulary index of the first column
    int64_t width;
    double inverse_temperature;
};

// Statistics of each row over the columns here, or over all of them once merged.
//
// Logits are shifted before they are scaled: x = (z - max) / temperature rounds in proportion to |x|, so that the
// columns that matter, near the maximum, are all but exact.
struct Statistics {
    double* max;        // [T] the largest logit, not scaled; -inf without a column above -inf
    double* sum_exp;    // [T] sum of e^x; the 1 of the maximum and the rest are added in float64, so that
                        //     1 - p of an almost certain token keeps its digits
    double* sum_x_exp;  // [T] sum of x e^x, where x = -inf counts 0
    double* target;     // [T] the target's logit, not scaled; 0 where the target is not here
};

// What backward needs of each row.
struct Rows {
    double* shift;    // [T] the maximum over all columns, 0 where that is -inf
    double* log_sum;  // [T] log of the sum of e^x over all columns, 0 where that is 0
    double* mean;     // [T] mean of x under the softmax: entropy = log_sum - mean
};

struct LogitsStats {
    Matrix logits;
    const int64_t* targets;  // [T] vocabulary indices
    Shard shard;
    bool accumulate;  // merge with what `out` holds, of other columns of the same rows
    Statistics out;
};

struct MergeStats {  // first half: what each rank adds to the sums, relative to the maximum over all ranks
    int64_t num_rows;
    const int64_t* targets;
    Shard shard;
    Statistics local;
    const double* max;  // [T] over all ranks
    double* sums;       // [3, T] sum_exp, sum_x_exp, and the target's x (0 where the target is not here)
};

struct FinishStats {  // second half: from the sums over all ranks to the results
    int64_t num_rows;
    const int64_t* targets;
    int64_t first_target, end_target;  // a target outside gives NaN
    const double* max;                 // [T]
    const double* sums;                // [3, T]
    Dtype dtype;                       // of logprobs and entropy: float32 or float64
    void* logprobs;                    // [T]
    void* entropy;                     // [T]
    Rows rows;
};

// dz = 1/temperature · [ g_logp (1{v = target} - p_v) - g_ent p_v (x_v - mean) ]
struct LogitsBackward {
    Matrix logits;
    Matrix out;  // may be the logits' own memory if the dtype is the same; all its columns are written, padding 0
    const int64_t* targets;
    Shard shard;
    Rows rows;
    Dtype grad_dtype;           // float32 or float64
    const void* grad_logprobs;  // [T]
    const void* grad_entropy;   // [T] or null
};  // a row whose incoming gradients are 0 is set to 0 without being read

struct Pack {
    int64_t num_tokens, num_sequences;
    const bool* response_mask;  // [T]
    const int64_t* cu_seqlens;  // [S+1]; tokens behind the last belong to no sequence
};

struct SequenceSums {
    Pack pack;
    Dtype dtype;             // float32 or float64
    const void* values;      // [T]
    const void* subtrahend;  // [T] or null: subtracted from each value before it is added
    double* sums;            // [S] over response tokens
    double* num_tokens;      // [S] response tokens
};

struct SequenceFill {  // out_t = scale of its sequence at response tokens, 0 elsewhere
    Pack pack;
    const double* scale;  // [S]
    Dtype dtype;
    void* out;  // [T]
};

struct PolicyLoss {
    Pack pack;
    Dtype dtype;  // of all values here: float32 or float64
    const void* logprobs;
    const void* old_logprobs;
    const void* advantages;
    bool advantage_per_token;  // advantages are [T], else [S]
    const void* weights;       // [T] or null
    bool token_level;          // one ratio a token, else one a sequence
    double clip_low, clip_high;
    double dual_clip;         // infinity: none
    double num_global;        // N
    double* sums;             // [2, S] sum of log ratios and of response tokens, over all ranks that share the
                              // sequences; filled here if `sums_are_given` is false
    bool sums_are_given;
    void* gradient;           // [T] of the loss by logprobs
    double* terms;            // [S] each sequence's share of the loss: scratch
    double* loss;             // [1]
    void* log_ratio;          // [S]
    bool* clipped_tokens;     // [T]
    int64_t* num_clipped;     // [S] clipped tokens here
    int64_t* num_response_tokens;  // [S]
};

#define GSPO_OPERATIONS(X)             \
    X(logits_stats, LogitsStats)       \
    X(merge_stats, MergeStats)         \
    X(finish_stats, FinishStats)       \
    X(logits_backward, LogitsBackward) \
    X(sequence_sums, SequenceSums)     \
    X(sequence_fill, SequenceFill)     \
    X(policy_loss, PolicyLoss)

namespace cpu {
#define GSPO_DECLARE(name, Arguments) void name(const Arguments&, int num_threads);
GSPO_OPERATIONS(GSPO_DECLARE)
#undef GSPO_DECLARE
const char* instruction_set();  // "avx512", "avx2" or "baseline": what the operations run with
}  // namespace cpu

namespace cuda {
#define GSPO_DECLARE(name, Arguments) void name(const Arguments&, void* stream);
GSPO_OPERATIONS(GSPO_DECLARE)
#undef GSPO_DECLARE
}  // namespace cuda

}  // namespace gspo
