// y[rows of a slot] += scale * B A x[rows of that slot], for every adapter slot and slice in one call; bfloat16 with
// float32 accumulation, for CPUs with AVX-512 BF16 (Intel since Cooper Lake, AMD since Zen 4).
//
// At the few rows per adapter of a decoding step the time goes into reading A and B once, so that is what the code is
// about: two passes, shrink (A) and expand (B), each split into blocks of weights that lie behind each other; a thread
// walks over a run of blocks, multiplies each with all rows of its slot, and prefetches the memory of a later block
// into the L2 cache line by line meanwhile. x and y are read and written where they are, row by row.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#define UNROLL _Pragma("GCC unroll 16")

namespace {

using bf16 = at::BFloat16;
constexpr int kVector = 32;    // bfloat16 values in a register
constexpr int kLanes = 16;     // float32 values in a register
constexpr int kTile = 4;       // tokens, and rows of A, whose products are in registers at the same time
constexpr int kRankStep = 8;   // ranks are rounded up to this; the engine's weights are zero beyond an adapter's rank
constexpr int kMaxRank = 512;  // the largest that vLLM allows
constexpr int kTokens = 64;    // of a block of the shrink: their x stays in the L2 cache
constexpr int64_t kLine = 64;  // bytes of a cache line
constexpr int64_t kAhead = 16 * 1024;  // bytes between what is multiplied and what is prefetched (measured: 16-64 KiB)

struct Block {
  const bf16 *weights;
  int slice;   // of the layer: q, k, v or gate, up
  int column;  // the shrink's first row of A, the expand's first column of y
  int tokens_from, tokens;
  int rank;
  bool half;  // the expand's last block may have 16 columns instead of 32
};

struct Pass {
  int64_t block_bytes;
  std::vector<Block> blocks;
  std::vector<int64_t> cost{0};  // cost of all blocks before the i-th

  void add(const Block &block) {
    blocks.push_back(block);
    cost.push_back(cost.back() + std::max(block.tokens, 8));  // below 8 tokens memory is what takes the time
  }
  int first_block(int thread, int threads) const {
    return std::lower_bound(cost.begin(), cost.end(), cost.back() * thread / threads) - cost.begin();
  }
  int blocks_ahead() const { return std::max<int64_t>(1, kAhead / block_bytes); }
};

// Memory to fetch into L2, a few lines at every step of an inner loop.
struct Prefetch {
  const char *at;
  int lines_per_step;
  void step() {
    for (int i = 0; i < lines_per_step; ++i, at += kLine) _mm_prefetch(at, _MM_HINT_T1);
  }
};

__m512bh load(const bf16 *p) { return (__m512bh)_mm512_loadu_si512(p); }

// The sums over the 16 lanes of v[0], v[1], v[2] and v[3].
__m128 sum_lanes(const __m512 *v) {
  const __m512 v01 = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 v23 = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512d even = _mm512_unpacklo_pd(_mm512_castps_pd(v01), _mm512_castps_pd(v23));
  const __m512d odd = _mm512_unpackhi_pd(_mm512_castps_pd(v01), _mm512_castps_pd(v23));
  const __m512 quads = _mm512_add_ps(_mm512_castpd_ps(even), _mm512_castpd_ps(odd));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(quads), _mm512_extractf32x8_ps(quads, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// inner[t][0..3] = scale * (rows 0..3 of a (4, d_in)) . x[t]
template <int T>
void shrink_tile(const bf16 *const *x, const bf16 *a, int64_t d_in, float scale, bf16 *const *inner, Prefetch ahead) {
  __m512 sums[T][kTile];
  UNROLL for (int t = 0; t < T; ++t) UNROLL for (int i = 0; i < kTile; ++i) sums[t][i] = _mm512_setzero_ps();
  for (int64_t k = 0; k < d_in; k += kVector) {
    ahead.step();
    __m512bh weights[kTile];
    UNROLL for (int i = 0; i < kTile; ++i) weights[i] = load(a + i * d_in + k);
    UNROLL for (int t = 0; t < T; ++t) {
      const __m512bh values = load(x[t] + k);
      UNROLL for (int i = 0; i < kTile; ++i) sums[t][i] = _mm512_dpbf16_ps(sums[t][i], values, weights[i]);
    }
  }
  UNROLL for (int t = 0; t < T; ++t) {
    const __m128 scaled = _mm_mul_ps(sum_lanes(sums[t]), _mm_set1_ps(scale));
    _mm_storel_epi64((__m128i *)inner[t], (__m128i)_mm_cvtneps_pbh(scaled));
  }
}

// 8 values of the rows 0, 4, 8 and 12 of b
__m512i every_fourth_row(const bf16 *b, int64_t stride) {
  __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)b));
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(b + 4 * stride)), 1);
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(b + 8 * stride)), 2);
  return _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(b + 12 * stride)), 3);
}

// pairs[2 p] = the p-th pair of each of the 16 rows of b (16, rank): the form in which the instruction takes weights
void transpose_pairs(const bf16 *b, int64_t stride, int rank, __m512i *pairs) {
  for (int at = 0; at < rank; at += 8, pairs += 8) {
    __m512i r[4];
    UNROLL for (int i = 0; i < 4; ++i) r[i] = every_fourth_row(b + i * stride + at, stride);
    const __m512i low01 = _mm512_unpacklo_epi32(r[0], r[1]), high01 = _mm512_unpackhi_epi32(r[0], r[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(r[2], r[3]), high23 = _mm512_unpackhi_epi32(r[2], r[3]);
    pairs[0] = _mm512_unpacklo_epi64(low01, low23);
    pairs[2] = _mm512_unpackhi_epi64(low01, low23);
    pairs[4] = _mm512_unpacklo_epi64(high01, high23);
    pairs[6] = _mm512_unpackhi_epi64(high01, high23);
  }
}

void add_to(bf16 *y, __m512 change) {
  const __m512i before = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)y));
  const __m512 after = _mm512_add_ps(_mm512_castsi512_ps(_mm512_slli_epi32(before, 16)), change);
  _mm256_storeu_si256((__m256i *)y, (__m256i)_mm512_cvtneps_pbh(after));
}

// y[t][0..31] += b . inner[t], b being two interleaved groups of 16 columns from `transpose_pairs`
template <int T>
void expand_tile(const bf16 *const *inner, const __m512i *b, int rank, bf16 *const *y, bool half, Prefetch ahead) {
  __m512 sums[T][2];
  UNROLL for (int t = 0; t < T; ++t) sums[t][0] = sums[t][1] = _mm512_setzero_ps();
  for (int at = 0; at < rank; at += 2, b += 2) {
    ahead.step();
    UNROLL for (int t = 0; t < T; ++t) {
      int32_t pair;
      std::memcpy(&pair, inner[t] + at, sizeof(pair));
      const __m512bh values = (__m512bh)_mm512_set1_epi32(pair);
      sums[t][0] = _mm512_dpbf16_ps(sums[t][0], (__m512bh)b[0], values);
      sums[t][1] = _mm512_dpbf16_ps(sums[t][1], (__m512bh)b[1], values);
    }
  }
  UNROLL for (int t = 0; t < T; ++t) {
    add_to(y[t], sums[t][0]);
    if (!half) add_to(y[t] + kLanes, sums[t][1]);
  }
}

// Fetches the first blocks of this thread's run, which nothing before them prefetches.
void prefetch_first(const Pass &pass) {
  const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
  const int first = pass.first_block(thread, threads), last = pass.first_block(thread + 1, threads);
  for (int i = first; i < std::min(last, first + pass.blocks_ahead()); ++i)
    Prefetch{(const char *)pass.blocks[i].weights, int(pass.block_bytes / kLine)}.step();
}

// Calls tile(T, block, first token, prefetch) for every tile of this thread's run of blocks, T being its number of
// tokens as a constant; begin(block) before the first tile of each. An inner loop takes `steps` steps.
template <class Begin, class Tile>
void walk(const Pass &pass, int64_t steps, Begin begin, Tile tile) {
  const int thread = omp_get_thread_num(), threads = omp_get_num_threads(), distance = pass.blocks_ahead();
  const int last = pass.first_block(thread + 1, threads);
  for (int i = pass.first_block(thread, threads); i < last; ++i) {
    const Block &block = pass.blocks[i];
    begin(block);
    const char *ahead = i + distance < last ? (const char *)pass.blocks[i + distance].weights : nullptr;
    const int64_t tiles = (block.tokens + kTile - 1) / kTile, loop = steps ? steps : block.rank / 2;
    const int lines = (pass.block_bytes / kLine + tiles * loop - 1) / (tiles * loop);
    int64_t left = ahead ? pass.block_bytes : 0;
    for (int t = 0; t < block.tokens; t += kTile) {
      const Prefetch prefetch{ahead, left > 0 ? lines : 0};
      ahead += left > 0 ? lines * loop * kLine : 0;
      left -= lines * loop * kLine;
      switch (block.tokens - t) {
        case 1: tile(std::integral_constant<int, 1>(), block, t, prefetch); break;
        case 2: tile(std::integral_constant<int, 2>(), block, t, prefetch); break;
        case 3: tile(std::integral_constant<int, 3>(), block, t, prefetch); break;
        default: tile(std::integral_constant<int, kTile>(), block, t, prefetch);
      }
    }
  }
}

bool fits(const at::Tensor &y, const at::Tensor &x, at::TensorList a, at::TensorList b) {
  int64_t width = 0;
  bool good = x.size(-1) % kVector == 0 && x.stride(-1) == 1 && y.stride(-1) == 1 &&
              x.scalar_type() == at::kBFloat16 && y.scalar_type() == at::kBFloat16;
  for (size_t i = 0; i < a.size(); ++i) {
    width += b[i].size(-2);
    good = good && a[i].size(-2) % kRankStep == 0 && a[i].size(-2) <= kMaxRank && b[i].size(-2) % kLanes == 0 &&
           a[i].size(-2) == a[0].size(-2) && a[i].size(-2) == b[i].size(-1) && a[i].is_contiguous() &&
           b[i].is_contiguous() && a[i].scalar_type() == at::kBFloat16 && b[i].scalar_type() == at::kBFloat16;
  }
  return good && width <= y.size(-1);
}

// x (n_rows, d_in), y (n_rows, d_out); a[i] (slots, 1, max_rank, d_in), b[i] (slots, 1, width_i, max_rank), the slices'
// columns side by side in y. Slot s has rows[starts[s]], ..., rows[starts[s + 1] - 1] and the rank ranks[s]; int32.
void lora_linear(at::Tensor y, const at::Tensor &x, at::TensorList a, at::TensorList b, const at::Tensor &rows_,
                 const at::Tensor &starts_, const at::Tensor &ranks_, double scale) {
  TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0) && a.size() == b.size(), "x and y, a and b differ");
  for (size_t i = 0; i < a.size(); ++i)
    TORCH_CHECK(a[i].size(-1) == x.size(1) && a[i].size(0) >= ranks_.numel() && b[i].size(0) >= ranks_.numel(),
                "A ", a[i].sizes(), " and B ", b[i].sizes(), " are not for ", ranks_.numel(), " slots and x ", x.sizes());
  if (!fits(y, x, a, b)) {
    static const auto any_shape = c10::Dispatcher::singleton()
                                      .findSchemaOrThrow("astra::lora_linear", "")
                                      .typed<decltype(lora_linear)>();
    return any_shape.call(y, x, a, b, rows_, starts_, ranks_, scale);
  }
  const int slots = ranks_.numel();
  const int *rows = rows_.const_data_ptr<int>(), *starts = starts_.const_data_ptr<int>();
  TORCH_CHECK(starts_.numel() == slots + 1 && starts[slots] <= x.size(0) && starts[slots] <= rows_.numel(),
              "the step has ", starts[slots], " rows, the layer ", x.size(0));
  const int first = starts[0], n = starts[slots] - first;
  const int64_t d_in = x.size(-1), max_rank = a[0].size(-2), inner_width = a.size() * max_rank;
  Pass shrink{kTile * d_in * (int64_t)sizeof(bf16)}, expand{2 * kLanes * max_rank * (int64_t)sizeof(bf16)};
  for (int slot = 0; slot < slots; ++slot) {
    const int from = starts[slot], to = starts[slot + 1];
    if (from == to) continue;
    const int known = std::min<int64_t>(ranks_.const_data_ptr<int>()[slot], max_rank);
    const int rank = (known + kRankStep - 1) / kRankStep * kRankStep;
    for (int t = from; t < to; t += kTokens)
      for (int i = 0; i < (int)a.size(); ++i) {
        const bf16 *weights = a[i].const_data_ptr<bf16>() + slot * max_rank * d_in;
        for (int r = 0; r < rank; r += kTile)
          shrink.add({weights + r * d_in, i, r, t, std::min(kTokens, to - t), rank, false});
      }
    int column = 0;
    for (int i = 0; i < (int)b.size(); ++i) {
      const int width = b[i].size(-2);
      const bf16 *weights = b[i].const_data_ptr<bf16>() + slot * width * max_rank;
      for (int c = 0; rank && c < width; c += 2 * kLanes)
        expand.add({weights + c * max_rank, i, column + c, from, to - from, rank, c + kLanes >= width});
      column += width;
    }
  }
  if (shrink.blocks.empty()) return;
  const at::Tensor inner_ = at::empty({n, inner_width}, x.options());
  const bf16 *x_data = x.const_data_ptr<bf16>();
  bf16 *y_data = y.data_ptr<bf16>(), *inner = inner_.data_ptr<bf16>();
  const int64_t x_stride = x.stride(-2), y_stride = y.stride(-2);

#pragma omp parallel
  {
    prefetch_first(shrink);
    prefetch_first(expand);
    const auto nothing = [](const Block &) {};
    walk(shrink, d_in / kVector, nothing, [&](auto T, const Block &block, int t, Prefetch prefetch) {
      const bf16 *from[T];
      bf16 *to[T];
      for (int i = 0; i < T; ++i) {
        const int token = block.tokens_from + t + i;
        from[i] = x_data + rows[token] * x_stride;
        to[i] = inner + (token - first) * inner_width + block.slice * max_rank + block.column;
      }
      shrink_tile<T>(from, block.weights, d_in, scale, to, prefetch);
    });
#pragma omp barrier
    alignas(64) __m512i pairs[kMaxRank];
    const auto transpose = [&](const Block &block) {
      transpose_pairs(block.weights, max_rank, block.rank, pairs);
      if (!block.half) transpose_pairs(block.weights + kLanes * max_rank, max_rank, block.rank, pairs + 1);
    };
    walk(expand, 0, transpose, [&](auto T, const Block &block, int t, Prefetch prefetch) {
      const bf16 *from[T];
      bf16 *to[T];
      for (int i = 0; i < T; ++i) {
        const int token = block.tokens_from + t + i;
        from[i] = inner + (token - first) * inner_width + block.slice * max_rank;
        to[i] = y_data + rows[token] * y_stride + block.column;
      }
      expand_tile<T>(from, pairs, block.rank, to, block.half, prefetch);
    });
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(astra, CPU, m) { m.impl("lora_linear_avx512", &lora_linear); }
