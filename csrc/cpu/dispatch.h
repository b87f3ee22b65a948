// The operations as compiled for one instruction set.
#pragma once

#include "launchers.h"

namespace gspo::cpu {

struct Operations {
#define GSPO_POINTER(name, Arguments) void (*name)(const Arguments&, int num_threads);
    GSPO_OPERATIONS(GSPO_POINTER)
#undef GSPO_POINTER
};

}  // namespace gspo::cpu
