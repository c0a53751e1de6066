// The kernels of the exact merge that are compiled once per instruction set.
#pragma once

#include "exact.h"
#include "lora_kernels/exact.h"
#include "lora_kernels/isa.h"

LK_DECLARE_FOR_ISAS(
    // Columns of a panel of a.
    int exact_panel();
    // One panel of a / one row of fl32(scale * b), as float32. False where a factor is not finite.
    bool exact_widen_a(const Matrix& a, int64_t panel, float* out);
    bool exact_widen_b(const Matrix& b, float scale, int64_t row, float* out);
    // Blocks of W that it has written are marked in job.done, whatever the result.
    ExactResult exact_unit(const ExactJob& job, int64_t unit);)
