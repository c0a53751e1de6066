// Intel's names for the lanes of avx512.h, which includes this last.
#pragma once

// clang-format off
#undef _mm256_mask_storeu_epi16
#define _mm256_mask_storeu_epi16 ::lora_kernels_emulate::mask_storeu_epi16_256
#undef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16 ::lora_kernels_emulate::maskz_loadu_epi16_256
#undef _mm512_add_epi32
#define _mm512_add_epi32 ::lora_kernels_emulate::add_epi32
#undef _mm512_add_epi64
#define _mm512_add_epi64 ::lora_kernels_emulate::add_epi64
#undef _mm512_add_ps
#define _mm512_add_ps ::lora_kernels_emulate::add_ps
#undef _mm512_and_si512
#define _mm512_and_si512 ::lora_kernels_emulate::and_si512
#undef _mm512_broadcast_i32x4
#define _mm512_broadcast_i32x4 ::lora_kernels_emulate::broadcast_i32x4
#undef _mm512_castps_si512
#define _mm512_castps_si512 ::lora_kernels_emulate::castps_si512
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps ::lora_kernels_emulate::castsi512_ps
#undef _mm512_castsi512_si256
#define _mm512_castsi512_si256 ::lora_kernels_emulate::castsi512_si256
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask ::lora_kernels_emulate::cmp_ps_mask
#undef _mm512_cmpge_epu16_mask
#define _mm512_cmpge_epu16_mask ::lora_kernels_emulate::cmpge_epu16_mask
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16 ::lora_kernels_emulate::cvtepi32_epi16
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 ::lora_kernels_emulate::cvtepu16_epi32
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh ::lora_kernels_emulate::cvtne2ps_pbh
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps ::lora_kernels_emulate::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph ::lora_kernels_emulate::cvtps_ph
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps ::lora_kernels_emulate::dpbf16_ps
#undef _mm512_extracti64x4_epi64
#define _mm512_extracti64x4_epi64 ::lora_kernels_emulate::extracti64x4_epi64
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps ::lora_kernels_emulate::fmadd_ps
#undef _mm512_fpclass_ps_mask
#define _mm512_fpclass_ps_mask ::lora_kernels_emulate::fpclass_ps_mask
#undef _mm512_loadu_ps
#define _mm512_loadu_ps ::lora_kernels_emulate::loadu_ps
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 ::lora_kernels_emulate::loadu_si512
#undef _mm512_mask_or_epi32
#define _mm512_mask_or_epi32 ::lora_kernels_emulate::mask_or_epi32
#undef _mm512_shuffle_epi32
#define _mm512_shuffle_epi32 ::lora_kernels_emulate::shuffle_epi32
#undef _mm512_mask_shuffle_epi32
#define _mm512_mask_shuffle_epi32 ::lora_kernels_emulate::mask_shuffle_epi32
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps ::lora_kernels_emulate::mask_storeu_ps
#undef _mm512_maskz_compress_epi32
#define _mm512_maskz_compress_epi32 ::lora_kernels_emulate::maskz_compress_epi32
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_epi16 ::lora_kernels_emulate::maskz_loadu_epi16
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps ::lora_kernels_emulate::maskz_loadu_ps
#undef _mm512_maskz_mov_epi16
#define _mm512_maskz_mov_epi16 ::lora_kernels_emulate::maskz_mov_epi16
#undef _mm512_maskz_mov_ps
#define _mm512_maskz_mov_ps ::lora_kernels_emulate::maskz_mov_ps
#undef _mm512_movepi32_mask
#define _mm512_movepi32_mask ::lora_kernels_emulate::movepi32_mask
#undef _mm512_mul_epu32
#define _mm512_mul_epu32 ::lora_kernels_emulate::mul_epu32
#undef _mm512_mul_ps
#define _mm512_mul_ps ::lora_kernels_emulate::mul_ps
#undef _mm512_permutex2var_epi64
#define _mm512_permutex2var_epi64 ::lora_kernels_emulate::permutex2var_epi64
#undef _mm512_reduce_add_ps
#define _mm512_reduce_add_ps ::lora_kernels_emulate::reduce_add_ps
#undef _mm512_set1_epi16
#define _mm512_set1_epi16 ::lora_kernels_emulate::set1_epi16
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 ::lora_kernels_emulate::set1_epi32
#undef _mm512_set1_epi64
#define _mm512_set1_epi64 ::lora_kernels_emulate::set1_epi64
#undef _mm512_set1_ps
#define _mm512_set1_ps ::lora_kernels_emulate::set1_ps
#undef _mm512_setr_epi64
#define _mm512_setr_epi64 ::lora_kernels_emulate::setr_epi64
#undef _mm512_setzero_ps
#define _mm512_setzero_ps ::lora_kernels_emulate::setzero_ps
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 ::lora_kernels_emulate::shuffle_f32x4
#undef _mm512_shuffle_ps
#define _mm512_shuffle_ps ::lora_kernels_emulate::shuffle_ps
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 ::lora_kernels_emulate::slli_epi32
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 ::lora_kernels_emulate::srli_epi32
#undef _mm512_srli_epi64
#define _mm512_srli_epi64 ::lora_kernels_emulate::srli_epi64
#undef _mm512_storeu_ps
#define _mm512_storeu_ps ::lora_kernels_emulate::storeu_ps
#undef _mm512_storeu_si512
#define _mm512_storeu_si512 ::lora_kernels_emulate::storeu_si512
#undef _mm512_sub_ps
#define _mm512_sub_ps ::lora_kernels_emulate::sub_ps
#undef _mm512_ternarylogic_epi64
#define _mm512_ternarylogic_epi64 ::lora_kernels_emulate::ternarylogic_epi64
#undef _mm512_unpackhi_epi16
#define _mm512_unpackhi_epi16 ::lora_kernels_emulate::unpackhi_epi16
#undef _mm512_unpackhi_epi64
#define _mm512_unpackhi_epi64 ::lora_kernels_emulate::unpackhi_epi64
#undef _mm512_unpackhi_ps
#define _mm512_unpackhi_ps ::lora_kernels_emulate::unpackhi_ps
#undef _mm512_unpacklo_epi16
#define _mm512_unpacklo_epi16 ::lora_kernels_emulate::unpacklo_epi16
#undef _mm512_unpacklo_epi64
#define _mm512_unpacklo_epi64 ::lora_kernels_emulate::unpacklo_epi64
#undef _mm512_unpacklo_ps
#define _mm512_unpacklo_ps ::lora_kernels_emulate::unpacklo_ps
// clang-format on
