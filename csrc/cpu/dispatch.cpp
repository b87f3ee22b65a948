// Each operation exists once per instruction set; the best that this processor has is chosen at run time.
// GSPO_CPU_ISA=baseline|avx2|avx512 chooses a lesser one, for tests.
#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace gspo::cpu {

namespace baseline {
extern const Operations kOperations;
}
#ifdef GSPO_X86
namespace avx2 {
extern const Operations kOperations;
}
namespace avx512 {
extern const Operations kOperations;
}
#endif

namespace {

struct InstructionSet {
    const char* name;
    bool is_here;
    const Operations* operations;
};

const InstructionSet& chosen() {
    static const InstructionSet* const choice = [] {
#ifdef GSPO_X86
        __builtin_cpu_init();
        const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
        static const InstructionSet sets[] = {
#ifdef GSPO_X86
            {"avx512", has_avx512, &avx512::kOperations},
            {"avx2", has_avx2, &avx2::kOperations},
#endif
            {"baseline", true, &baseline::kOperations},
        };
        const char* wish = std::getenv("GSPO_CPU_ISA");
        for (const InstructionSet& set : sets) {
            if (set.is_here && (wish == nullptr || std::string(wish) == set.name)) return &set;
        }
        throw std::invalid_argument("GSPO_CPU_ISA=" + std::string(wish) +
                                    " is not an instruction set that was built and that this processor has; "
                                    "use avx512, avx2 or baseline, or unset it");
    }();
    return *choice;
}

}  // namespace

const char* instruction_set() { return chosen().name; }

#define GSPO_DEFINE(name, Arguments) \
    void name(const Arguments& args, int num_threads) { chosen().operations->name(args, num_threads); }
GSPO_OPERATIONS(GSPO_DEFINE)

}  // namespace gspo::cpu
