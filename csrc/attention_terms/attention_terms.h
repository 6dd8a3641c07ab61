// What the implementations of `attention_terms` share: the layout of what the forward pass keeps for the
// backward pass.
#pragma once

namespace attbalance {

/// Columns of `stats` (L, B, 4). `scores` and `teacher_scores` are kept as log p and log t, so the backward
/// pass needs neither lse; they give the scores back.
enum Stat : int {
    kLogSumExp = 0,         // lse: s_j = log p_j + lse
    kLogInBox = 1,          // log A_in = lse_in - lse; -inf where the region is empty
    kOutOfBox = 2,          // A_out, accumulated: never 1 - A_in
    kTeacherLogSumExp = 3,  // the teacher's lse
    kStats = 4,
};

/// Rows of `key_means` (L, B, 3, D).
enum KeyMean : int {
    kMeanIn = 0,       // kbar_in = sum_j pin_j k_j
    kMeanOut = 1,      // kbar_out = sum_j p_j (1 - m_j) k_j
    kMeanTeacher = 2,  // kbar_t = sum_j t_j k_j
    kKeyMeans = 3,
};

/// Whether a sample's region holds a token that is not padding.
enum class RegionState : signed char { kEmpty, kSome, kNotANumber };

}  // namespace attbalance
