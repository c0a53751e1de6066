// The instructions of csrc/cuda/device.h on the host, written from their definition in the PTX ISA
// (9.7.15.5: warp-level matrix fragments), not from the kernels' own index maps.
#pragma once

#include "lora_kernels/scalar.h"

#define LK_LAUNCH(kernel, grid, threads, shared, stream, ...)                    \
  lora_kernels_emulate::launch(lora_kernels_emulate::dim(grid), threads, shared, \
                               [&] { (kernel)(__VA_ARGS__); })

namespace lora_kernels_emulate {
inline Dim3 dim(Dim3 d) { return d; }
inline Dim3 dim(unsigned x) { return {x, 1, 1}; }
}  // namespace lora_kernels_emulate

namespace lora_kernels {
namespace device {

using lora_kernels::from_float;
using lora_kernels::to_float;
using lora_kernels_emulate::async_commit;
using lora_kernels_emulate::async_copy_16;
using lora_kernels_emulate::dynamic_shared;

inline void async_stream_16(void* to, const void* from, int bytes) {
  async_copy_16(to, from, bytes);
}

template <int kLeft>
void async_wait() {
  lora_kernels_emulate::async_wait(kLeft);
}
using lora_kernels_emulate::write_2;

template <bool kTurned>
void load_matrices(uint32_t (&v)[4], const void* row) {
  lora_kernels_emulate::reads(row);
  uint32_t words[4];
  std::memcpy(words, row, 16);
  const uint32_t* got =
      lora_kernels_emulate::collective(words, 4, [](lora_kernels_emulate::Warp& w) {
        const auto element = [&](int matrix, int i, int j) {
          return w.in[8 * matrix + i][j / 2] >> (16 * (j % 2)) & 0xffffu;
        };
        for (int lane = 0; lane < 32; ++lane) {
          const int i = lane / 4, j = lane % 4 * 2;
          for (int m = 0; m < 4; ++m) {
            w.out[lane][m] = kTurned ? element(m, j, i) | element(m, j + 1, i) << 16
                                     : element(m, i, j) | element(m, i, j + 1) << 16;
          }
        }
      });
  std::memcpy(v, got, 16);
}

template <class T>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t words[10] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(words + 6, c, 16);
  const uint32_t* got =
      lora_kernels_emulate::collective(words, 10, [](lora_kernels_emulate::Warp& w) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const int group = lane >> 2, in_group = lane % 4;
          const auto half = [&](int word, int i) {
            T x;
            x.bits = static_cast<uint16_t>(w.in[lane][word] >> (16 * i));
            return to_float(x);
          };
          for (int i = 0; i < 8; ++i) {
            const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
            left[row][in_group * 2 + (i & 1) + (i < 4 ? 0 : 8)] = half(i / 2, i % 2);
          }
          for (int i = 0; i < 4; ++i) {
            right[in_group * 2 + (i & 1) + (i < 2 ? 0 : 8)][group] = half(4 + i / 2, i % 2);
          }
        }
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            const int row = (lane >> 2) + (i < 2 ? 0 : 8), col = lane % 4 * 2 + (i & 1);
            float start;
            std::memcpy(&start, &w.in[lane][6 + i], 4);
            double sum = static_cast<double>(start);
            for (int k = 0; k < 16; ++k) {
              sum += static_cast<double>(left[row][k]) * static_cast<double>(right[k][col]);
            }
            const float rounded = static_cast<float>(sum);
            std::memcpy(&w.out[lane][i], &rounded, 4);
          }
        }
      });
  std::memcpy(c, got, 16);
}

}  // namespace device
}  // namespace lora_kernels
