#include "cpu/dispatch.h"

namespace gspo::cpu::GSPO_ISA {

#define GSPO_DECLARE(name, Arguments) void name(const Arguments&, int num_threads);
GSPO_OPERATIONS(GSPO_DECLARE)

extern const Operations kOperations;
#define GSPO_ADDRESS(name, Arguments) name,
const Operations kOperations{GSPO_OPERATIONS(GSPO_ADDRESS)};

}  // namespace gspo::cpu::GSPO_ISA
