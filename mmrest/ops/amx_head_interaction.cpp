// ResT's head-interaction attention in bfloat16, for CPUs with AMX.
//
// All steps between two products (mixing of the heads, softmax, centring, and their
// gradients) run on a block of rows while it is in a core's cache. The formulas and
// their names are those of tiled.py. Loops are written so that compilers vectorise them.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;

// At 8 heads and 1,050 keys, the scores of a block take 1 MiB.
constexpr int64_t BLOCK_ROWS = 32;

int64_t blocks_of(int64_t rows) {
  return (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
}

// Keys are padded with zeros, so that rows of scores are whole vectors.
int64_t pad(int64_t keys) {
  return (keys + 31) / 32 * 32;
}

// (B, h, M, d) -> (B, h, padded M, d)
Tensor pad_keys(const Tensor& x) {
  return at::constant_pad_nd(x, {0, 0, 0, pad(x.size(2)) - x.size(2)});
}

// (B, N, h, d), contiguous, with zeros up to whole blocks of rows
Tensor pad_rows(const Tensor& x) {
  int64_t missing = blocks_of(x.size(1)) * BLOCK_ROWS - x.size(1);
  return at::constant_pad_nd(x, {0, 0, 0, 0, 0, missing}).contiguous();
}

// (B, h, K, N) -> (B, h, K / 2, N, 2): AMX takes right factors with pairs of rows.
Tensor right_factor(const Tensor& x) {
  return x.unflatten(2, {-1, 2}).transpose(-1, -2).contiguous();
}

// out = left right for a block of rows; `step` and `out_step` are the numbers between
// rows of left and out. A kernel for each size is kept, so a block is never shorter.
void multiply(int64_t n, int64_t k, const BFloat16* left, int64_t step,
              const BFloat16* right, float* out, int64_t out_step) {
  at::native::cpublas::brgemm(BLOCK_ROWS, n, k, step, n, out_step, false, left, right,
                              out);
}

// ---------------------------------------------------------------- rows

// exp(x) for x <= 0; 0 below -87, just before results cease to be normal numbers.
inline float exp_of(float x) {
  constexpr float ROUND = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
  float n = (x * 1.44269504f + ROUND) - ROUND;
  // ln(2) in two parts, of which the first times n is exact; |r| <= ln(2) / 2
  float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  // For NaN and -inf, n is no integer: p is NaN, or the result is not used.
  float power = std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
  return x < -87.0f ? 0.0f : p * power;
}

void softmax(float* row, int64_t size) {
  float largest = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : largest)
  for (int64_t m = 0; m < size; ++m)
    largest = row[m] > largest ? row[m] : largest;
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t m = 0; m < size; ++m) {
    row[m] = exp_of(row[m] - largest);
    sum += row[m];
  }
  float factor = 1.0f / sum;
#pragma omp simd
  for (int64_t m = 0; m < size; ++m)
    row[m] *= factor;
}

// out = row - shift
void centre(const float* __restrict row, float shift, int64_t size, BFloat16* to) {
  auto* __restrict out = reinterpret_cast<uint16_t*>(to);
#pragma omp simd
  for (int64_t m = 0; m < size; ++m) {
    // to the nearest bfloat16, or the even one of two
    auto bits = std::bit_cast<uint32_t>(row[m] - shift);
    out[m] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
}

float sum_of_squares(const float* row, float shift, int64_t size) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t m = 0; m < size; ++m)
    sum += (row[m] - shift) * (row[m] - shift);
  return sum;
}

// From the gradient of `attn - 1 / M` to that of the mixed scores, in place.
void softmax_backward(const float* __restrict attn, float through_variance,
                      int64_t size, float* __restrict grad) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t m = 0; m < size; ++m) {
    grad[m] += through_variance * attn[m];
    sum += grad[m] * attn[m];
  }
#pragma omp simd
  for (int64_t m = 0; m < size; ++m)
    grad[m] = attn[m] * (grad[m] - sum);
}

// ---------------------------------------------------------------- blocks of rows

struct Sizes {
  int64_t batch, heads, rows, keys, dim;
  int64_t blocks; // of rows, of an image
  int64_t width; // padded keys

  Sizes(const Tensor& q, const Tensor& k)
      : batch(q.size(0)), heads(q.size(1)), rows(q.size(2)), keys(k.size(2)),
        dim(q.size(3)), blocks(blocks_of(rows)), width(pad(keys)) {}

  int64_t block_size() const { return heads * BLOCK_ROWS * width; }
  // where row r of head h begins in a block
  int64_t at(int64_t h, int64_t r) const { return (h * BLOCK_ROWS + r) * width; }
};

// block[h] = tokens[h] right[h] for rows of tokens (N, h, d)
void multiply_heads(const Sizes& s, const BFloat16* tokens,
                    const BFloat16* right, float* block) {
  for (int64_t h = 0; h < s.heads; ++h)
    multiply(s.width, s.dim, tokens + h * s.dim, s.heads * s.dim,
             right + h * s.dim * s.width, block + s.at(h, 0), s.width);
}

// 16 neighbours in a row
using Lanes [[gnu::vector_size(64), gnu::aligned(4), gnu::may_alias]] = float;

// products[i][j] = sum(a[i] * b[j]); padding is 0 in both blocks
template <int64_t H>
void products_of_heads(const Sizes& s, int64_t rows, const float* a, const float* b,
                       float* products) {
  for (int64_t i = 0; i < H; ++i) {
    Lanes sums[H] = {};
    for (int64_t m = 0; m < rows * s.width; m += 16)
      for (int64_t j = 0; j < H; ++j)
        sums[j] += *reinterpret_cast<const Lanes*>(a + s.at(i, 0) + m) *
                   *reinterpret_cast<const Lanes*>(b + s.at(j, 0) + m);
    for (int64_t j = 0; j < H; ++j) {
      products[i * H + j] = 0;
      for (int64_t lane = 0; lane < 16; ++lane)
        products[i * H + j] += sums[j][lane];
    }
  }
}

// out[i] = sum_j weight[i][j] block[j], or with weight[j][i]; out may be the block
template <int64_t H>
void mix_heads(const Sizes& s, int64_t rows, const float* weight, bool transposed,
               const float* block, float* out) {
  float w[H][H];
  for (int64_t i = 0; i < H; ++i)
    for (int64_t j = 0; j < H; ++j)
      w[i][j] = transposed ? weight[j * H + i] : weight[i * H + j];
  int64_t next = s.at(1, 0);
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = block + r * s.width;
    float* to = out + r * s.width;
#pragma omp simd
    for (int64_t m = 0; m < s.width; ++m) {
      float x[H];
      for (int64_t j = 0; j < H; ++j)
        x[j] = from[j * next + m];
      for (int64_t i = 0; i < H; ++i) {
        float sum = 0;
        for (int64_t j = 0; j < H; ++j)
          sum += w[i][j] * x[j];
        to[i * next + m] = sum;
      }
    }
  }
}

// attn = softmax(weight scores), for the keys that are not padding
template <int64_t H>
void probabilities(const Sizes& s, int64_t rows, const float* weight,
                   const float* scores, float* attn) {
  mix_heads<H>(s, rows, weight, false, scores, attn);
  for (int64_t h = 0; h < s.heads; ++h)
    for (int64_t r = 0; r < rows; ++r)
      softmax(attn + s.at(h, r), s.keys);
}

// ---------------------------------------------------------------- passes

// Returns the output, (B, h, N, d) in the memory order (B, N, h, d), and r.
template <int64_t H>
std::tuple<Tensor, Tensor> forward_of(const Tensor& q, const Tensor& k,
                                      const Tensor& v, const Tensor& weight,
                                      double scale, double eps) {
  Sizes s(q, k);
  Tensor mix = weight.to(at::kFloat).mul(scale).contiguous();
  Tensor tokens = pad_rows(q.transpose(1, 2));
  Tensor k_right = right_factor(pad_keys(k).transpose(2, 3));
  Tensor v_right = right_factor(pad_keys(v));
  Tensor out = at::empty(tokens.sizes(), tokens.options().dtype(at::kFloat));
  Tensor squares = at::empty({s.batch, s.blocks, s.heads}, out.options());

  auto* w = mix.const_data_ptr<float>();
  auto* q_data = tokens.const_data_ptr<BFloat16>();
  auto* k_data = k_right.const_data_ptr<BFloat16>();
  auto* v_data = v_right.const_data_ptr<BFloat16>();
  auto* out_data = out.mutable_data_ptr<float>();
  auto* squares_data = squares.mutable_data_ptr<float>();
  float mean = 1.0f / s.keys;

  at::parallel_for(0, s.batch * s.blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> attn(s.block_size());
    std::vector<BFloat16> centred(BLOCK_ROWS * s.width);
    for (int64_t i = begin; i < end; ++i) {
      int64_t image = i / s.blocks, first = i % s.blocks * BLOCK_ROWS;
      int64_t rows = std::min(BLOCK_ROWS, s.rows - first);
      int64_t token = i * BLOCK_ROWS * s.heads * s.dim;
      int64_t right = image * s.heads * s.dim * s.width;
      multiply_heads(s, q_data + token, k_data + right, attn.data());
      probabilities<H>(s, rows, w, attn.data(), attn.data());
      for (int64_t h = 0; h < s.heads; ++h) {
        float square = 0;
        for (int64_t r = 0; r < rows; ++r) {
          const float* row = attn.data() + s.at(h, r);
          square += sum_of_squares(row, mean, s.keys);
          centre(row, mean, s.keys, centred.data() + r * s.width);
        }
        squares_data[i * s.heads + h] = square;
        multiply(s.dim, s.width, centred.data(), s.width,
                 v_data + right + h * s.dim * s.width, out_data + token + h * s.dim,
                 s.heads * s.dim);
      }
    }
    at::native::cpublas::brgemm_release(); // leaves AMX to others
  });

  out = out.narrow(1, 0, s.rows).transpose(1, 2);
  Tensor variance = squares.sum(1) / (static_cast<double>(s.rows) * s.keys);
  Tensor rstd = variance.add(eps).rsqrt().view({s.batch, s.heads, 1, 1});
  Tensor result = at::empty({s.batch, s.rows, s.heads, s.dim}, q.options());
  result = result.transpose(1, 2).copy_(out.mul_(rstd));
  return {result, rstd};
}

// Gradients of q, k, v and weight, from maps that are computed again, `tile_rows` rows
// of an image at once.
template <int64_t H>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_of(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& weight, const Tensor& out, const Tensor& rstd, double scale,
    int64_t tile_rows) {
  TORCH_CHECK(tile_rows > 0, "tile_rows must be at least 1, found ", tile_rows);
  Sizes s(q, k);
  Tensor mix = weight.to(at::kFloat).mul(scale).contiguous();
  Tensor wide_grad = grad.to(at::kFloat);
  Tensor through_variance = (wide_grad * out).sum({2, 3}, true).mul_(rstd.square());
  through_variance.div_(-static_cast<double>(s.rows) * s.keys);
  Tensor q_tokens = pad_rows(q.transpose(1, 2));
  // r meets G, which saves it two passes over the maps
  Tensor g_tokens = pad_rows((wide_grad * rstd).to(at::kBFloat16).transpose(1, 2));
  Tensor k_right = right_factor(pad_keys(k).transpose(2, 3));
  Tensor v_right = right_factor(pad_keys(v).transpose(2, 3));
  Tensor k_rows = right_factor(pad_keys(k));
  Tensor grad_q = at::empty({s.batch, s.rows, s.heads, s.dim}, q.options());
  Tensor k_sum = at::zeros({s.batch, s.heads, s.width, s.dim}, mix.options());
  Tensor v_sum = at::zeros_like(k_sum);
  Tensor weight_sum = at::zeros({s.heads, s.heads}, mix.options());
  tile_rows = std::min(blocks_of(tile_rows), s.blocks) * BLOCK_ROWS;
  // head, row, padded key
  Tensor centred = at::zeros({s.heads, tile_rows, s.width}, q.options());
  Tensor grad_scores = at::zeros_like(centred);

  auto* w = mix.const_data_ptr<float>();
  auto* through = through_variance.const_data_ptr<float>();
  auto* centred_data = centred.mutable_data_ptr<BFloat16>();
  auto* grad_scores_data = grad_scores.mutable_data_ptr<BFloat16>();
  auto* grad_q_data = grad_q.mutable_data_ptr<BFloat16>();
  float mean = 1.0f / s.keys;

  for (int64_t image = 0; image < s.batch; ++image) {
    int64_t right = image * s.heads * s.dim * s.width;
    auto* k_data = k_right.const_data_ptr<BFloat16>() + right;
    auto* v_data = v_right.const_data_ptr<BFloat16>() + right;
    auto* k_rows_data = k_rows.const_data_ptr<BFloat16>() + right;
    // without rows there are no blocks, and tile_rows is 0
    for (int64_t start = 0; start < s.rows; start += tile_rows) {
      int64_t count = std::min(tile_rows, s.rows - start);
      int64_t blocks = blocks_of(count);
      Tensor products = at::empty({blocks, s.heads, s.heads}, mix.options());
      auto* products_data = products.mutable_data_ptr<float>();

      at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> scores(s.block_size()), attn(s.block_size());
        std::vector<float> grads(s.block_size()), grad_rows(BLOCK_ROWS * s.dim);
        for (int64_t i = begin; i < end; ++i) {
          int64_t first = i * BLOCK_ROWS;
          int64_t rows = std::min(BLOCK_ROWS, count - first);
          int64_t row_of_image = start + first;
          int64_t token = (image * s.blocks * BLOCK_ROWS + row_of_image) * s.heads * s.dim;
          int64_t to_q = (image * s.rows + row_of_image) * s.heads * s.dim;
          multiply_heads(s, q_tokens.const_data_ptr<BFloat16>() + token, k_data,
                         scores.data());
          multiply_heads(s, g_tokens.const_data_ptr<BFloat16>() + token, v_data,
                         grads.data());
          probabilities<H>(s, rows, w, scores.data(), attn.data());
          for (int64_t h = 0; h < s.heads; ++h) {
            for (int64_t r = 0; r < rows; ++r) {
              int64_t row = s.at(h, r), to = (h * tile_rows + first + r) * s.width;
              centre(attn.data() + row, mean, s.keys, centred_data + to);
              softmax_backward(attn.data() + row, through[image * s.heads + h],
                               s.keys, grads.data() + row);
            }
          }
          products_of_heads<H>(s, rows, grads.data(), scores.data(),
                               products_data + i * s.heads * s.heads);
          mix_heads<H>(s, rows, w, true, grads.data(), grads.data());
          for (int64_t h = 0; h < s.heads; ++h) {
            int64_t to = (h * tile_rows + first) * s.width;
            for (int64_t r = 0; r < rows; ++r)
              centre(grads.data() + s.at(h, r), 0.0f, s.keys,
                     grad_scores_data + to + r * s.width);
            multiply(s.dim, s.width, grad_scores_data + to, s.width,
                     k_rows_data + h * s.dim * s.width, grad_rows.data(), s.dim);
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t c = 0; c < s.dim; ++c)
                grad_q_data[to_q + (r * s.heads + h) * s.dim + c] =
                    grad_rows[r * s.dim + c];
          }
        }
        at::native::cpublas::brgemm_release();
      });

      // N, h, d -> h, N, d
      Tensor q_tile = q_tokens[image].narrow(0, start, count).transpose(0, 1);
      Tensor g_tile = g_tokens[image].narrow(0, start, count).transpose(0, 1);
      k_sum[image] += grad_scores.narrow(1, 0, count).transpose(1, 2).bmm(q_tile);
      v_sum[image] += centred.narrow(1, 0, count).transpose(1, 2).bmm(g_tile);
      weight_sum += products.sum(0);
    }
  }
  auto without_padding = [&](const Tensor& x) {
    return x.narrow(2, 0, s.keys).to(at::kBFloat16).contiguous();
  };
  return {grad_q.transpose(1, 2), without_padding(k_sum), without_padding(v_sum),
          weight_sum.mul_(scale).to(weight.scalar_type())};
}

// Calls the function with a constant for the number of heads.
template <typename F>
auto for_heads(const Tensor& q, F function) {
  switch (q.size(1)) {
    case 2: return function(std::integral_constant<int64_t, 2>());
    case 4: return function(std::integral_constant<int64_t, 4>());
    case 8: return function(std::integral_constant<int64_t, 8>());
  }
  TORCH_CHECK(false, "expected 2, 4 or 8 heads, found ", q.size(1));
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& weight, double scale, double eps) {
  return for_heads(q, [&](auto heads) {
    return forward_of<heads()>(q, k, v, weight, scale, eps);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& weight, const Tensor& out, const Tensor& rstd, double scale,
    int64_t tile_rows) {
  return for_heads(q, [&](auto heads) {
    return backward_of<heads()>(grad, q, k, v, weight, out, rstd, scale, tile_rows);
  });
}

} // namespace

TORCH_LIBRARY(mmrest_amx, library) {
  library.def("forward(Tensor q, Tensor k, Tensor v, Tensor weight, float scale, "
              "float eps) -> (Tensor, Tensor)");
  library.def("backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor weight, "
              "Tensor out, Tensor rstd, float scale, int tile_rows) -> "
              "(Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(mmrest_amx, CPU, library) {
  library.impl("forward", forward);
  library.impl("backward", backward);
}
