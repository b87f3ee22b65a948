// Every launcher as a C function that returns the message of what it threw, or null.
#include <stdexcept>
#include <string>

#include "launchers.h"

#define GSPO_DEFINE(name, Arguments)                                    \
    extern "C" const char* name(const gspo::Arguments& args) {         \
        static std::string message;                                     \
        try {                                                           \
            gspo::cuda::name(args, nullptr);                            \
        } catch (const std::exception& error) {                         \
            return (message = error.what()).c_str();                    \
        }                                                               \
        return nullptr;                                                 \
    }
GSPO_OPERATIONS(GSPO_DEFINE)
