// The crossovers between our kernels and the vendor's GEMM, and relaxed counters of what ran.
//
// AVX-512: measured against torch 2.13 (MKL float32, oneDNN bf16) on 2 cores of Zen 4 (float32, K
// and N 2048 and 4096) and of Zen 5 (K and N from 384 to 14336). AMX: on 2 cores of a Xeon, where
// oneDNN multiplies bf16 in tiles as our kernels do, and ours read W without a copy of it; built
// without them, ours win only where W is what costs. AVX2: on 2 cores of a Zen without AVX-512,
// where oneDNN has no bf16 and a bf16 GEMM takes six times as long as a float32 one.
#include "paths.h"

namespace lora_kernels {
namespace {

std::atomic<int64_t> g_counts[kNumPaths];
std::atomic<int> g_last{static_cast<int>(Path::vendor)};

// Whether torch's bf16 GEMM runs on tiles and our kernels do not: a level forced below, or a build
// whose assembler does not know them.
bool tiled_gemm(Isa isa) { return isa == Isa::avx512bf16 && has_amx(); }

// Whether MKL multiplies float32 with half of the vector units: AVX2 where AVX-512 is as wide.
bool narrow_mkl(Isa isa) { return isa >= Isa::avx512 && is_zen5(); }

// Whether our own kernels on tiles take every product.
bool own_tiles(DType dtype, Isa isa) { return isa == Isa::amx && dtype == DType::bf16; }

// Whether our kernels have the dot instruction, and torch's GEMM no more than that.
bool own_pairs(DType dtype, Isa isa) {
  return isa == Isa::avx512bf16 && dtype == DType::bf16 && !tiled_gemm(isa);
}

// The largest M that our streaming kernel takes.
int64_t stream_rows(DType dtype, Isa isa) {
  if (isa < Isa::avx512) return dtype == DType::f32 ? 2 : 1 << 30;
  switch (dtype) {
    case DType::f32:
      return isa == Isa::amx || narrow_mkl(isa) ? 16 : 32;
    case DType::f16:
      return 1 << 30;
    case DType::bf16:
      return own_tiles(dtype, isa) ? 1 : own_pairs(dtype, isa) ? 8 : 4;
  }
  return 0;
}

// Whether widening W block by block pays: not for few rows, nor for tiny products.
bool widening_wins(int64_t M, int64_t N, int64_t K, DType dtype, Isa isa) {
  return isa < Isa::avx512 && dtype != DType::f32 && M >= 64 && M * N * K >= 1 << 24;
}

// Whether our panel kernel beats the vendor's GEMM for a product of M rows and W.
bool panel_wins(int64_t M, int64_t N, int64_t K, int64_t depth, DType dtype, Isa isa) {
  if (M * N * K <= 1 << 15) return true;  // a GEMM call costs more than the product
  if (dtype == DType::f16) return true;
  if (isa < Isa::avx512) return dtype != DType::f32;
  if (own_tiles(dtype, isa)) return true;
  // One panel of W, 64 columns deep, must stay in L2, unless MKL is slow.
  if (dtype == DType::f32) return M >= 64 && (depth <= 2048 || narrow_mkl(isa));
  if (!own_pairs(dtype, isa)) return false;
  // Zen 5: few rows do not pay for packing W.
  return M * N * K <= 40000000 ? M >= 64 : is_zen5() && M >= 384 && depth >= 1024;
}

// Whether turning x beats the vendor's GEMM and our other kernels. bf16 with the dot instruction on
// Zen 5: by a quarter to a half up to 64 rows, by less up to 128, where small products are quicker
// in panels; on Zen 4, whose oneDNN is as fast as the units, by what the update costs, up to 64
// rows. float32 on Zen 5 by two to three times. float32 on AVX2: by a fifth from 12 to 128 rows,
// as twelve of the sixteen registers hold sums; on the Xeon by a third from 17 to 32.
bool turning_wins(int64_t M, int64_t N, int64_t K, DType dtype, Isa isa) {
  if (own_tiles(dtype, isa)) return true;
  if (own_pairs(dtype, isa) || (dtype == DType::f32 && narrow_mkl(isa))) {
    return M < 64 || (M <= (is_zen5() ? 128 : 64) && M * N * K > 20000000);
  }
  if (dtype != DType::f32) return false;
  return isa == Isa::avx2 ? M >= 12 && M <= 128 : isa == Isa::amx && M > 16 && M <= 32;
}

}  // namespace

const char* path_name(Path path) {
  constexpr const char* kNames[] = {"stream", "panel", "vendor", "widened", "add", "turned"};
  return kNames[static_cast<int>(path)];
}

Path choose_path(int64_t M, int64_t N, int64_t K, DType dtype, Isa isa, bool backward,
                 bool by_columns, bool invariant) {
  if (!by_columns && !invariant && widening_wins(M, N, K, dtype, isa)) return Path::widened;
  // Up to here a call of the vendor's GEMM costs more than the product; oneDNN's takes 25 us.
  const int64_t tiny = dtype == DType::bf16 && tiled_gemm(isa) ? 1 << 20 : 1 << 15;
  if (!backward && !by_columns) {
    if (invariant) return own_tiles(dtype, isa) ? Path::turned : Path::stream;
    if (M * N * K <= tiny || M <= stream_rows(dtype, isa)) return Path::stream;
    if (turning_wins(M, N, K, dtype, isa)) return Path::turned;
  } else if (invariant) {
    return Path::panel;
  }
  return panel_wins(M, N, K, backward ? N : K, dtype, isa) ? Path::panel : Path::vendor;
}

// From where no row form of the base product runs: there each row keeps its bits among few others.
// AVX-512 has registers for a dot form that loads less than it multiplies.
bool shrink_by_rows(int64_t M, DType x, DType a, Isa isa, bool invariant) {
  if (invariant) return false;
  if (isa == Isa::amx) return M >= 32 && x == DType::bf16 && a == DType::bf16;
  return isa < Isa::avx512 && M > 128;
}

void record_path(Path path) {
  g_counts[static_cast<int>(path)].fetch_add(1, std::memory_order_relaxed);
  g_last.store(static_cast<int>(path), std::memory_order_relaxed);
}
Path last_path() { return static_cast<Path>(g_last.load(std::memory_order_relaxed)); }
int64_t path_count(Path path) {
  return g_counts[static_cast<int>(path)].load(std::memory_order_relaxed);
}

}  // namespace lora_kernels
