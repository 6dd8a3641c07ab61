// `attention_terms` on a GPU. No torch header: the same bodies are compiled for the host in tests.
//
// Each pass has two kernels: `_rows` needs keys that 128-bit access can reach, and D <= 1024; `_any` needs
// nothing.
#pragma once

#include "backward.cuh"
#include "finish_rows.cuh"
#include "forward_any.cuh"
#include "forward_rows.cuh"
